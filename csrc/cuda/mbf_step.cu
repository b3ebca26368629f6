#include <algorithm>
#include <limits>

#include "mbf_bounds.cuh"
#include "staging.cuh"

// The mini-block Fisher step. What moves in float32, a parameter under blocks of n x n: gradient 4 bytes, momentum and
// parameter 8 each, inverse 4 n (half of that packed, or in bfloat16): 20 + 4 n bytes, for 2 n flops. Bandwidth is all
// that counts, and for n = 9 two thirds of it is the inverse. A momentum in 16 bits saves 4 bytes.
//
// With kl_clip the step has to wait for a sum over everything, with max_relative_step for sums over layers. The first
// pass keeps d, NaN where it is skipped, and the second reads it: 8 bytes more, where forming d again would cost the
// inverse and the momentum, 4 n + 4. For the norm of the weights the first pass reads them too: 4 bytes.
//
// A parameter takes one of four ways, by the size of its blocks:
// - one element: `step_diagonal`, elementwise, 16 bytes at a time
// - as many as a tile of shared memory holds (n = 71, packed n = 100): `step_blocks`, whole blocks through that memory
// - more: `multiply` cuts every block into slabs of rows and writes d, and `step_along` takes the step
// - directions that BLAS formed: `step_along` alone
namespace fisher_kernels::cuda {

namespace {

using namespace mbf;

constexpr int kPerThread = kElements / kThreads;

/// A tile of blocks: parameters of type T, inverses stored as S.
template <class T_, class S_>
struct Traits {
  using T = T_;
  using S = S_;
  using A = Accumulator<T>;
  static constexpr int kVector = kVectorBytes / sizeof(S);  // numbers of an inverse that a thread moves at once

  struct Memory {
    alignas(kVectorBytes) S inverse[kNumbers + kVector];  // from where it is aligned as in global memory
    A moment[kElements];
    int skipped[kElements];  // blocks
    double sums[3][kWarps];
  };
};

/// Of tiles, thread blocks of a multiprocessor that there are registers for.
template <class T>
constexpr int kResident = sizeof(T) == 8 ? 3 : 5;

constexpr int kSlabThreads = 128;

template <class A>
struct SlabMemory {
  A moment[kSlabRows];
  A sums[kSlabThreads / kWarp][kSlabRows];
};

struct DiagonalMemory {
  double sums[3][kWarps];
  int found[kWarps];
};

struct AlongMemory {
  double sums[3][kWarps];
  int skipped[kElements];  // blocks
};

/// Where an element lies.
template <class T>
struct Element {
  T* parameter = nullptr;
  const T* gradient = nullptr;
  void* moment = nullptr;
};

// A momentum is computed in A and kept in that or in bfloat16. Which of them an entry tells, where elements are moved
// one by one: kernels for both would take twice as long to compile.

/// Where element `at` of a momentum lies.
template <class A>
__device__ void* locate_moment(const Entry& entry, void* moment, int64_t at) {
  return static_cast<char*>(moment) + at * static_cast<int64_t>(entry.short_moment ? sizeof(bfloat16_moment) : sizeof(A));
}

template <class A>
__device__ A load_moment(const Entry& entry, const void* moment) {
  if constexpr (std::is_same_v<A, float>) {
    if (entry.short_moment) return widen(*static_cast<const bfloat16_moment*>(moment));
  }
  return *static_cast<const A*>(moment);
}

template <class A>
__device__ void store_moment(const Entry& entry, void* moment, A value) {
  if constexpr (std::is_same_v<A, float>) {
    if (entry.short_moment) {
      *static_cast<bfloat16_moment*>(moment) = narrow<bfloat16_moment>(value);
      return;
    }
  }
  *static_cast<A*>(moment) = value;
}

/// Element `column` of row `first + down`.
template <class T>
__device__ Element<T> locate(const JoinedEntry& entry, int64_t first, int down, int64_t column) {
  const int64_t row = first + down, width = entry.columns - entry.biased;
  const bool is_bias = entry.biased && column == width;
  const int64_t index = is_bias ? row : row * width + column;
  Geometry::Place place{index, {index, index, index}};
  if (is_bias ? entry.bias_strided : entry.strided) {
    place = (is_bias ? entry.bias_geometry : entry.geometry).locate(index);
  }
  return {static_cast<T*>(is_bias ? entry.bias_parameter : entry.parameter) + place.at[0],
          static_cast<const T*>(is_bias ? entry.bias_gradient : entry.gradient) + place.at[1],
          locate_moment<Accumulator<T>>(entry, is_bias ? entry.bias_moment : entry.moment, place.at[2])};
}

/// The block of element `at` of a tile, and its place in it.
struct Split {
  int block;
  int number;

  __device__ Split(const Entry& entry, int at) : block(entry.block_of(at)), number(at - block * entry.n) {}
};

/// Element `at` of the tile whose first block is row `first`: nothing is divided where rows lie one after another.
template <class T>
__device__ Element<T> locate_in_tile(const Entry& entry, int64_t first, int at_) {
  const int64_t at = first * entry.n + at_;
  return {static_cast<T*>(entry.parameter) + at, static_cast<const T*>(entry.gradient) + at,
          locate_moment<Accumulator<T>>(entry, entry.moment, at)};
}

template <class T>
__device__ Element<T> locate_in_tile(const JoinedEntry& entry, int64_t first, int at) {
  const Split split(entry, at);
  return locate<T>(entry, first, split.block, split.number);
}

// What is fused is written down: compilers choose otherwise on another path, and layouts are not to show in the bits.

/// The gradient that enters the momentum.
template <class T, class A>
__device__ A scaled(T gradient, T parameter, const Rates<A>& rates) {
  A g = widen(gradient) * rates.gradient_scale;
  // Not even a NaN of the parameter gets into it where there is no decay.
  if (rates.weight_decay != 0) g = fma(rates.weight_decay, widen(parameter), g);
  return g;
}

template <class A>
__device__ A new_moment(A moment, A gradient, const Rates<A>& rates) {
  return fma(rates.momentum, moment, gradient);
}

/// A parameter after the step along d.
template <class T, class A>
__device__ T stepped(T parameter, A d, const Rates<A>& rates) {
  const A w = widen(parameter);
  if (rates.shrinkage == 0) return narrow<T>(fma(-rates.step_size, d, w));
  return narrow<T>(w - fma(rates.shrinkage, w, rates.step_size * d));
}

__device__ inline void count_block(int64_t* skipped) {
  atomicAdd(reinterpret_cast<unsigned long long*>(skipped), 1ull);  // whole numbers: no order matters
}

// Sums that bounds are about.

template <class A>
__device__ void add_direction(Sums& sums, A d, A other) {
  const double wide = static_cast<double>(d);
  sums.change = fma(wide, static_cast<double>(other), sums.change);
  sums.square = fma(wide, wide, sums.square);
}

template <class T>
__device__ void add_weight(Sums& sums, T parameter) {
  const double w = static_cast<double>(widen(parameter));
  if (is_finite(w)) sums.weight = fma(w, w, sums.weight);
}

/// The sums of the threads of a block, which has made all of them or all but those for caps.
__device__ inline void store_sums(const Sums& own, const Shared& shared, double (&partials)[3][kWarps], Sums* out) {
  Sums sums{block_sum(own.change, partials[0]), 0, 0};
  if (shared.caps) {
    sums.square = block_sum(own.square, partials[1]);
    sums.weight = block_sum(own.weight, partials[2]);
  }
  if (threadIdx.x == 0) *out = sums;
}

// Blocks of one element.

/// What is done with them.
template <class T, class M, class S>
struct Diagonal {
  using A = Accumulator<T>;

  const S* inverse;  // of the chunk, as is the next
  A* directions;     // null where the step waits for no sum
  bool in_packs;     // the inverse is aligned as the rest is
  Rates<A> rates;
  Shared shared;
  int found;
  Sums sums;

  template <int N>
  __device__ Pack<S, N> load_inverse(int64_t at) const {
    if (N > 1 && in_packs) return load_pack<N>(inverse + at);
    Pack<S, N> pack;
#pragma unroll
    for (int i = 0; i < N; ++i) pack.at[i] = inverse[at + i];
    return pack;
  }

  /// d, NaN where it is skipped.
  __device__ A advance(T& parameter, T gradient, M& moment, S inverse) {
    const bool waits = directions != nullptr;
    if (waits && shared.caps) add_weight(sums, parameter);
    const A g = scaled(gradient, parameter, rates);
    const A m = new_moment(widen(moment), g, rates);
    const A d = static_cast<A>(widen(inverse)) * m;
    if (!is_finite(d)) {
      ++found;
      return std::numeric_limits<A>::quiet_NaN();
    }
    moment = narrow<M>(m);
    if (waits) {
      add_direction(sums, d, shared.along_gradient ? g : m);
    } else {
      parameter = stepped(parameter, d, rates);
    }
    return d;
  }

  template <int N, int kCount>
  __device__ void take(const Elements<T, T, M>& elements, int stride, int64_t at) {
    const bool waits = directions != nullptr;
    Pack<T, N> w[kCount] = {}, g[kCount];
    Pack<M, N> m[kCount];
    Pack<S, N> p[kCount];
#pragma unroll
    for (int k = 0; k < kCount; ++k) {
      if (!waits || shared.caps || rates.weight_decay != 0) w[k] = load_pack<N>(elements.parameter + k * stride);
      g[k] = load_pack<N>(elements.gradient + k * stride);
      m[k] = load_pack<N>(elements.moment + k * stride);
      p[k] = load_inverse<N>(at + k * stride);
    }
#pragma unroll
    for (int k = 0; k < kCount; ++k) {
      Pack<A, N> d;
#pragma unroll
      for (int i = 0; i < N; ++i) d.at[i] = advance(w[k].at[i], g[k].at[i], m[k].at[i], p[k].at[i]);
      store_pack<N>(elements.moment + k * stride, m[k]);
      if (waits) {
        store_pack<N>(directions + at + k * stride, d);
      } else {
        store_pack<N>(elements.parameter + k * stride, w[k]);
      }
    }
  }
};

__device__ inline int64_t origin(const Entry&, int64_t first) { return first; }

/// Its walk counts from the first element of all.
__device__ inline int64_t origin(const StridedEntry<Entry>&, int64_t) { return 0; }

/// 24 bytes a parameter in float32, 20 with a momentum in 16 bits.
template <class T, class M, class S, class Entry>
__global__ void __launch_bounds__(kThreads) step_diagonal(const __grid_constant__ Table<Entry, Shared> table) {
  using A = Accumulator<T>;
  using Traits = StepTraits<T, 1, T, M>;
  static_assert(Traits::kThreads == kThreads);
  auto& memory = shared_memory<DiagonalMemory>();
  const int i = table.tensor_of(blockIdx.x);
  const Entry& entry = table.entries[i];
  const Rates<A> rates = entry.template rates<A>();
  if (rates.off) return;
  const int64_t chunk = blockIdx.x - table.start[i], first = chunk * kChunk, from = origin(entry, first);
  const S* const inverse = static_cast<const S*>(entry.inverse) + from;
  const bool waits = entry.sums != nullptr;
  Diagonal<T, M, S> diagonal{inverse, waits ? static_cast<A*>(entry.directions) + from : nullptr, is_aligned(inverse),
                          rates, table.shared, 0, {}};
  walk<Traits>(entry, first, diagonal);
  count_skipped(diagonal.found, memory.found, entry.skipped);
  if (waits) store_sums(diagonal.sums, table.shared, memory.sums, entry.sums + chunk);
}

// Blocks in tiles.

/// Entry `column` of P m. Lanes are columns: P being symmetric, they read a row of it together, as it lies in memory.
/// Blocks of kernels of 3 x 3 have a size that the compiler knows: of 9 products, half the instructions counted rows.
template <int kSize = 0, class A, class S>
__device__ A product(const S* block, int size, const A* moment, int column) {
  const int n = kSize == 0 ? size : kSize;
  const S* at = block + column;
  A d = 0;
#pragma unroll(kSize == 0 ? 4 : kSize)
  for (int k = 0; k < n; ++k, at += n) d += static_cast<A>(widen(*at)) * moment[k];
  return d;
}

/// The same where the lower triangle is packed.
template <class A, class S>
__device__ A product_of_packed(const S* block, int n, const A* moment, int column) {
  const S* at = block + column * (column + 1) / 2;
  A d = 0;
#pragma unroll 4
  for (int k = 0; k < n; ++k) {
    d += static_cast<A>(widen(*at)) * moment[k];
    at += k < column ? 1 : k + 1;  // along the row of the column, then down
  }
  return d;
}

/// A tile of whole blocks, an element a lane. The inverse passes through shared memory, where lanes of neighbouring
/// blocks meet in a bank two to four at a time: 4 to 6 cycles for 128 bytes, which global memory takes 8 or more to
/// deliver. A block of threads has up to 26 KB of loads in flight before its first barrier, and five of them are on
/// a multiprocessor in float32, so that some load while others multiply.
template <class Traits, class Entry>
__global__ void __launch_bounds__(kThreads, kResident<typename Traits::T>)
    step_blocks(const __grid_constant__ Table<Entry, Shared> table) {
  using T = typename Traits::T;
  using A = typename Traits::A;
  using S = typename Traits::S;
  auto& memory = shared_memory<typename Traits::Memory>();
  const int i = table.tensor_of(blockIdx.x);
  const Entry& entry = table.entries[i];
  const int64_t tile = blockIdx.x - table.start[i], first = tile * entry.blocks_in_tile;
  const int n = entry.n, numbers = static_cast<int>(entry.numbers());
  const int64_t left = entry.rows - first;
  const int blocks = left < entry.blocks_in_tile ? static_cast<int>(left) : entry.blocks_in_tile, count = blocks * n;
  const bool packed = entry.packed, waits = entry.sums != nullptr, caps = table.shared.caps;

  const S* const from = static_cast<const S*>(entry.inverse) + first * numbers;
  S* const inverse = memory.inverse + misalignment(from);
  begin_to_copy_run<kThreads>(inverse, from, blocks * numbers);
  const Rates<A> rates = entry.template rates<A>();
  Element<T> elements[kPerThread];
  T w[kPerThread] = {}, gradient[kPerThread] = {};
  A g[kPerThread] = {}, m[kPerThread] = {};
#pragma unroll
  for (int k = 0; k < kPerThread; ++k) {
    const int at = k * kThreads + static_cast<int>(threadIdx.x);
    if (at >= count) continue;
    elements[k] = locate_in_tile<T>(entry, first, at);
    if (!waits || caps || rates.weight_decay != 0) w[k] = *elements[k].parameter;
    gradient[k] = *elements[k].gradient;
    m[k] = load_moment<A>(entry, elements[k].moment);
  }
  if (rates.off) {
    wait_for_all_copies();
    return;
  }
#pragma unroll
  for (int k = 0; k < kPerThread; ++k) {
    g[k] = scaled(gradient[k], w[k], rates);
    m[k] = new_moment(m[k], g[k], rates);
  }
#pragma unroll
  for (int k = 0; k < kPerThread; ++k) {
    const int at = k * kThreads + static_cast<int>(threadIdx.x);
    if (at < count) memory.moment[at] = m[k];
    if (at < blocks) memory.skipped[at] = 0;
  }
  wait_for_all_copies();
  __syncthreads();

  A d[kPerThread] = {};
#pragma unroll
  for (int k = 0; k < kPerThread; ++k) {
    const int at = k * kThreads + static_cast<int>(threadIdx.x);
    if (at >= count) continue;
    const Split split(entry, at);
    const S* const block = inverse + split.block * numbers;
    const A* const moment = memory.moment + split.block * n;
    d[k] = packed   ? product_of_packed(block, n, moment, split.number)
           : n == 9 ? product<9>(block, n, moment, split.number)
                    : product(block, n, moment, split.number);
    if (!is_finite(d[k])) memory.skipped[split.block] = 1;
  }
  __syncthreads();

  Sums sums{};
#pragma unroll
  for (int k = 0; k < kPerThread; ++k) {
    const int at = k * kThreads + static_cast<int>(threadIdx.x);
    if (at >= count) continue;
    const Split split(entry, at);
    const bool skip = memory.skipped[split.block] != 0;
    if (skip && split.number == 0) count_block(entry.skipped);
    if (waits) {
      A* const kept = static_cast<A*>(entry.directions) + first * n;
      kept[at] = skip ? std::numeric_limits<A>::quiet_NaN() : d[k];
      if (!skip) add_direction(sums, d[k], table.shared.along_gradient ? g[k] : m[k]);
      if (caps) add_weight(sums, w[k]);
    }
    if (skip) continue;
    store_moment(entry, elements[k].moment, m[k]);
    if (!waits) *elements[k].parameter = stepped(w[k], d[k], rates);
  }
  if (waits) store_sums(sums, table.shared, memory.sums, entry.sums + tile);
}

// Larger blocks.

/// The new momentum, beside the old one.
template <class T>
__global__ void __launch_bounds__(kThreads) form_moments(const __grid_constant__ Table<JoinedEntry, Shared> table) {
  using A = Accumulator<T>;
  const int i = table.tensor_of(blockIdx.x);
  const JoinedEntry& entry = table.entries[i];
  const Rates<A> rates = entry.template rates<A>();
  if (rates.off) return;
  const int64_t at = static_cast<int64_t>(blockIdx.x - table.start[i]) * kThreads + threadIdx.x;
  if (at >= entry.rows * entry.n) return;
  const int64_t row = quotient(at, entry.n);
  const Element<T> element = locate<T>(entry, row, 0, at - row * entry.n);
  const T w = rates.weight_decay != 0 ? *element.parameter : T();
  static_cast<A*>(entry.moments)[at] =
      new_moment(load_moment<A>(entry, element.moment), scaled(*element.gradient, w, rates), rates);
}

/// d of a slab of rows of one block. A thread goes along all of them at once, one column after another, so that as many
/// loads are in flight. Of a packed block, which is read once, a slab also gives what its rows add to d as columns.
template <class A, class S>
__global__ void __launch_bounds__(kSlabThreads) multiply(const __grid_constant__ Table<Entry, Shared> table) {
  auto& memory = shared_memory<SlabMemory<A>>();
  const int i = table.tensor_of(blockIdx.x);
  const Entry& entry = table.entries[i];
  if (entry.template rates<A>().off) return;
  const int n = entry.n, slabs = divide_up(n, kSlabRows), thread = threadIdx.x;
  const int64_t tile = blockIdx.x - table.start[i], row = quotient(tile, slabs);
  const int first = static_cast<int>(tile - row * slabs) * kSlabRows;
  const int rows = n - first < kSlabRows ? n - first : kSlabRows;
  const bool packed = entry.packed;
  const A* const moment = static_cast<const A*>(entry.moments) + row * n;
  if (thread < kSlabRows) memory.moment[thread] = thread < rows ? moment[first + thread] : A(0);
  __syncthreads();

  const int64_t before = packed ? static_cast<int64_t>(first) * (first + 1) / 2 : static_cast<int64_t>(first) * n;
  const S* const slab = static_cast<const S*>(entry.inverse) + row * entry.numbers() + before;
  A* const part = packed ? static_cast<A*>(entry.parts) + tile * n : nullptr;
  const int columns = packed ? first + rows : n;
  A sums[kSlabRows] = {};
  for (int column = thread; column < columns; column += kSlabThreads) {
    const A m = moment[column];
    A as_column = 0;
#pragma unroll
    for (int k = 0; k < kSlabRows; ++k) {
      if (k >= rows || (packed && column > first + k)) continue;
      const A p = static_cast<A>(widen(slab[(packed ? k * first + k * (k + 1) / 2 : k * n) + column]));
      sums[k] += p * m;
      if (packed && column < first + k) as_column += p * memory.moment[k];
    }
    if (packed) part[column] = as_column;
  }

  const int lane = thread % kWarp, warp = thread / kWarp;
#pragma unroll
  for (int k = 0; k < kSlabRows; ++k) {
    const A sum = warp_sum(sums[k]);
    if (lane == 0) memory.sums[warp][k] = sum;
  }
  __syncthreads();
  if (thread >= rows) return;
  A d = 0;
#pragma unroll
  for (int k = 0; k < kSlabThreads / kWarp; ++k) d += memory.sums[k][thread];
  static_cast<A*>(entry.directions)[row * n + first + thread] = d;
}

/// Adds to d of packed blocks what the slabs gave as columns.
template <class A>
__global__ void __launch_bounds__(kThreads) add_columns(const __grid_constant__ Table<Entry, Shared> table) {
  const int i = table.tensor_of(blockIdx.x);
  const Entry& entry = table.entries[i];
  if (entry.template rates<A>().off) return;
  const int n = entry.n, slabs = divide_up(n, kSlabRows);
  const int64_t at = static_cast<int64_t>(blockIdx.x - table.start[i]) * kThreads + threadIdx.x;
  if (at >= entry.rows * n) return;
  const int64_t row = quotient(at, n);
  const int column = static_cast<int>(at - row * n);
  const A* const parts = static_cast<const A*>(entry.parts) + row * slabs * n + column;
  A d = static_cast<A*>(entry.directions)[at];
#pragma unroll 4
  for (int slab = column / kSlabRows; slab < slabs; ++slab) d += parts[static_cast<int64_t>(slab) * n];
  static_cast<A*>(entry.directions)[at] = d;
}

// Directions that are known.

/// A block of threads' blocks of a parameter.
struct Run {
  int64_t row;    // of the first block
  int64_t block;  // its place in the row
  int64_t in_row;
  int blocks;

  __device__ Run(const Entry& entry, int64_t tile) : in_row(entry.blocks_in_row()) {
    const int64_t first = tile * entry.blocks_in_tile, left = entry.rows * in_row - first;
    blocks = left < entry.blocks_in_tile ? static_cast<int>(left) : entry.blocks_in_tile;
    row = quotient(first, in_row);
    block = first - row * in_row;
  }

  /// Calls body(block of the run, number in it, rows down, column, where the direction is) for elements of this thread.
  template <class Body>
  __device__ void for_elements(const Entry& entry, const Body& body) const {
    const int size = entry.n, count = blocks * size;
    for (int at = threadIdx.x; at < count; at += kThreads) {
      const int unit = at / size, number = at % size;
      const int64_t down = quotient(block + unit, in_row), place = block + unit - down * in_row;
      const int64_t column = place * size + number;
      if (column >= entry.columns) continue;
      body(unit, number, static_cast<int>(down), column,
           (row + down) * entry.row_stride + place * entry.block_stride + number);
    }
  }
};

/// Momentum, and the step or its sums, for a run of blocks or one that is longer than a tile.
template <class T>
__global__ void __launch_bounds__(kThreads) step_along(const __grid_constant__ Table<JoinedEntry, Shared> table) {
  using A = Accumulator<T>;
  auto& memory = shared_memory<AlongMemory>();
  const int i = table.tensor_of(blockIdx.x);
  const JoinedEntry& entry = table.entries[i];
  const Rates<A> rates = entry.template rates<A>();
  if (rates.off) return;
  const int64_t tile = blockIdx.x - table.start[i];
  const Run run(entry, tile);
  A* const directions = static_cast<A*>(entry.directions);
  const bool waits = entry.sums != nullptr, caps = table.shared.caps;
  for (int k = threadIdx.x; k < run.blocks; k += kThreads) memory.skipped[k] = 0;
  __syncthreads();
  run.for_elements(entry, [&](int block, int, int, int64_t, int64_t at) {
    if (!is_finite(directions[at])) memory.skipped[block] = 1;
  });
  __syncthreads();
  Sums sums{};
  run.for_elements(entry, [&](int block, int number, int down, int64_t column, int64_t at) {
    const bool skip = memory.skipped[block] != 0;
    if (skip && number == 0) count_block(entry.skipped);
    if (skip && waits) directions[at] = std::numeric_limits<A>::quiet_NaN();
    if (skip && !(waits && caps)) return;
    const Element<T> element = locate<T>(entry, run.row, down, column);
    const T w = waits && !caps && rates.weight_decay == 0 ? T() : *element.parameter;
    if (waits && caps) add_weight(sums, w);
    if (skip) return;
    const A d = directions[at];
    const A g = scaled(*element.gradient, w, rates),
            m = new_moment(load_moment<A>(entry, element.moment), g, rates);
    store_moment(entry, element.moment, m);
    if (waits) {
      add_direction(sums, d, table.shared.along_gradient ? g : m);
    } else {
      *element.parameter = stepped(w, d, rates);
    }
  });
  if (waits) store_sums(sums, table.shared, memory.sums, entry.sums + tile);
}

/// The step of a chunk along directions that are kept, but for those that are NaN, where these lie as the parameter
/// does: 12 bytes a parameter in float32.
template <class T>
__device__ void descend_chunk(const Entry& entry, int64_t first, const Rates<Accumulator<T>>& rates) {
  using A = Accumulator<T>;
  constexpr int N = kVectorBytes / sizeof(T), kTile = kThreads * N;
  static_assert(kChunk % kTile == 0);
  T* const parameter = static_cast<T*>(entry.parameter) + first;
  const A* const directions = static_cast<const A*>(entry.directions) + first;
  const int64_t left = entry.rows * entry.columns - first;
  if (left >= kChunk && is_aligned(parameter) && is_aligned(directions)) {
#pragma unroll 2
    for (int tile = 0; tile < kChunk; tile += kTile) {
      const int at = tile + static_cast<int>(threadIdx.x) * N;
      auto w = load_pack<N>(parameter + at);
      const auto d = load_pack<N>(directions + at);
#pragma unroll
      for (int i = 0; i < N; ++i) {
        if (d.at[i] == d.at[i]) w.at[i] = stepped(w.at[i], d.at[i], rates);
      }
      store_pack<N>(parameter + at, w);
    }
    return;
  }
  const int count = static_cast<int>(left < kChunk ? left : kChunk);
  for (int at = threadIdx.x; at < count; at += kThreads) {
    const A d = directions[at];
    if (d == d) parameter[at] = stepped(parameter[at], d, rates);
  }
}

template <class T>
__device__ void descend_chunk(const JoinedEntry& entry, int64_t first, const Rates<Accumulator<T>>& rates) {
  using A = Accumulator<T>;
  const int64_t left = entry.rows * entry.columns - first, row = quotient(first, entry.columns),
                from = first - row * entry.columns;
  const int count = static_cast<int>(left < kChunk ? left : kChunk);
  for (int at = threadIdx.x; at < count; at += kThreads) {
    const int64_t down = quotient(from + at, entry.columns), column = from + at - down * entry.columns,
                  block = quotient(column, entry.n);
    const A d = static_cast<const A*>(entry.directions)[(row + down) * entry.row_stride + block * entry.block_stride +
                                                        (column - block * entry.n)];
    T* const parameter = locate<T>(entry, row, static_cast<int>(down), column).parameter;
    if (d == d) *parameter = stepped(*parameter, d, rates);
  }
}

template <class T, class Entry>
__global__ void __launch_bounds__(kThreads) descend(const __grid_constant__ Table<Entry, Shared> table) {
  const int i = table.tensor_of(blockIdx.x);
  const Rates<Accumulator<T>> rates = table.entries[i].template rates<Accumulator<T>>();
  if (rates.off) return;
  descend_chunk<T>(table.entries[i], static_cast<int64_t>(blockIdx.x - table.start[i]) * kChunk, rates);
}

/// What a kernel needs of an entry.
template <class Kind>
Kind as(const JoinedEntry& entry) {
  if constexpr (std::is_same_v<Kind, StridedEntry<Entry>>) {
    return {entry, entry.geometry};
  } else {
    return entry;
  }
}

/// Launches a kernel over some of the items.
template <class Entry, class Kernel, class Wanted, class Blocks>
void launch_table(const Plan& plan, Kernel kernel, int threads, size_t shared_bytes, const Shared& shared,
                  const Stream& stream, Wanted wanted, Blocks blocks) {
  if (std::none_of(plan.items.begin(), plan.items.end(), wanted)) return;
  TableWriter<Table<Entry, Shared>> table(kName, kernel, threads, shared_bytes, stream, shared);
  for (const Item& item : plan.items) {
    if (wanted(item)) table.add(as<Entry>(item.entry), blocks(item));
  }
  table.flush();
}

/// The pass over blocks of one element whose momentum is kept as M.
template <class T, class M, class S>
void launch_diagonals(const Plan& plan, DType dtype, DType moment, DType inverse, const Shared& shared,
                      const Stream& stream) {
  const auto on = [&](bool joined) {
    return [=](const Item& item) {
      return item.is(dtype, inverse) && item.moment_dtype == moment && item.way == Way::diagonal &&
             item.joined == joined;
    };
  };
  launch_table<Entry>(plan, step_diagonal<T, M, S, Entry>, kThreads, sizeof(DiagonalMemory), shared, stream, on(false),
                      tiles_of);
  using Strided = StridedEntry<Entry>;
  launch_table<Strided>(plan, step_diagonal<T, M, S, Strided>, kThreads, sizeof(DiagonalMemory), shared, stream,
                        on(true), tiles_of);
}

/// The passes over inverses stored as S.
template <class T, class S>
void launch_products(const Plan& plan, DType dtype, DType inverse, const Shared& shared, const Stream& stream) {
  using A = Accumulator<T>;
  const auto on = [&](bool joined) {
    return [=](const Item& item) {
      return item.is(dtype, inverse) && item.way == Way::blocks && item.joined == joined;
    };
  };
  constexpr size_t kBytes = sizeof(typename Traits<T, S>::Memory);
  launch_diagonals<T, A, S>(plan, dtype, accumulation_dtype(dtype), inverse, shared, stream);
  if constexpr (std::is_same_v<A, float>) {
    launch_diagonals<T, bfloat16_moment, S>(plan, dtype, DType::bfloat16, inverse, shared, stream);
  }
  launch_table<Entry>(plan, step_blocks<Traits<T, S>, Entry>, kThreads, kBytes, shared, stream, on(false), tiles_of);
  launch_table<JoinedEntry>(plan, step_blocks<Traits<T, S>, JoinedEntry>, kThreads, kBytes, shared, stream,
                            on(true), tiles_of);
  const auto in_slabs = [=](const Item& item) { return item.is(dtype, inverse) && item.way == Way::slabs; };
  launch_table<Entry>(plan, multiply<A, S>, kSlabThreads, sizeof(SlabMemory<A>), shared, stream, in_slabs, slabs_of);
}

/// The first pass of parameters of one dtype, the only one where the step waits for no sum.
template <class T>
void launch_step(const Plan& plan, DType dtype, const Shared& shared, const Stream& stream) {
  using A = Accumulator<T>;
  constexpr size_t kBytes = sizeof(AlongMemory);
  const auto blocks_of = [](const Item& item) {
    return divide_up<int64_t>(item.entry.rows * item.entry.n, kThreads);
  };
  launch_table<JoinedEntry>(
      plan, form_moments<T>, kThreads, 0, shared, stream,
      [=](const Item& item) { return item.dtype == dtype && item.way == Way::slabs; }, blocks_of);
  launch_products<T, A>(plan, dtype, accumulation_dtype(dtype), shared, stream);
  if constexpr (std::is_same_v<A, float>) {
    launch_products<T, __nv_bfloat16>(plan, dtype, DType::bfloat16, shared, stream);
  }
  launch_table<Entry>(
      plan, add_columns<A>, kThreads, 0, shared, stream,
      [=](const Item& item) { return item.dtype == dtype && item.parts >= 0; }, blocks_of);
  launch_table<JoinedEntry>(
      plan, step_along<T>, kThreads, kBytes, shared, stream,
      [=](const Item& item) { return item.dtype == dtype && (item.way == Way::slabs || item.way == Way::along); },
      tiles_of);
}

/// The second pass.
template <class T>
void launch_descend(const Plan& plan, DType dtype, const Shared& shared, const Stream& stream) {
  const auto on = [&](bool flat) {
    return [=](const Item& item) { return item.dtype == dtype && item.flat == flat; };
  };
  const auto chunks_of = [](const Item& item) { return chunks(item.entry.rows * item.entry.columns); };
  launch_table<Entry>(plan, descend<T, Entry>, kThreads, 0, shared, stream, on(true), chunks_of);
  launch_table<JoinedEntry>(plan, descend<T, JoinedEntry>, kThreads, 0, shared, stream, on(false), chunks_of);
}

/// Calls f(Type<T>(), dtype) for the dtypes that there are.
template <class F>
void for_dtypes(const Plan& plan, const F& f) {
  for (const DType dtype : {DType::float32, DType::bfloat16, DType::float16, DType::float64}) {
    if (plan.has(dtype)) for_type(dtype, [&](auto type) { f(type, dtype); });
  }
}

}  // namespace

void mbf_step_(const MbfStep& step, const Stream& stream) {
  Plan plan(step);
  const DeviceGuard guard(stream);
  const Scratch scratch(stream, plan.bytes);
  char* const memory = scratch.as<char>();
  plan.place(memory);
  preparing::launch(step, plan, stream);
  const Shared shared{step.along_gradient, step.max_relative_step > 0};
  for_dtypes(plan, [&](auto type, DType dtype) {
    launch_step<typename decltype(type)::type>(plan, dtype, shared, stream);
  });
  if (!step.waits()) return;
  bounds::launch(step, plan, memory, stream);
  for_dtypes(plan, [&](auto type, DType dtype) {
    launch_descend<typename decltype(type)::type>(plan, dtype, shared, stream);
  });
}

}  // namespace fisher_kernels::cuda
