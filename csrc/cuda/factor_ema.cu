#include <algorithm>
#include <limits>
#include <vector>

#include "kernels.h"
#include "tensor_list.cuh"
#include "types.cuh"

// minmax and the moving average of lists of vectors. A block has a chunk of a vector. The range of what is new is
// found first: minmax of one chunk does so in the launch that writes, all else in a launch of its own, so that memory
// sees 8 bytes an entry in float32 for minmax and 12 for the average, as long as the second reading comes from a cache.
// Smallest and largest entries are exact in any order.
namespace fisher_kernels::cuda {

namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;
constexpr int kFlight = 4;      // loads of a thread before the first is used
constexpr double kFlat = 1e-5;  // a spread of at most this share of the largest entry is rounding

template <class A>
constexpr int kVector = kVectorBytes / sizeof(A);  // entries that a thread moves at once
static_assert(kChunk % (kThreads * kVector<float>) == 0);

/// The smallest and largest of some entries; none at all lie between infinities the other way round, and a NaN between
/// those of every number.
template <class A>
struct Range {
  A low;
  A high;

  static __device__ Range none() {
    return {std::numeric_limits<A>::infinity(), -std::numeric_limits<A>::infinity()};
  }
  static __device__ Range all() { return {-std::numeric_limits<A>::infinity(), std::numeric_limits<A>::infinity()}; }

  __device__ void include(const Range& other) {
    low = min(low, other.low);
    high = max(high, other.high);
  }

  __device__ void include(A value) { include(value == value ? Range{value, value} : all()); }

  /// Whether there is nothing but finite entries.
  __device__ bool is_finite() const {
    return low >= -std::numeric_limits<A>::max() && high <= std::numeric_limits<A>::max();
  }
};

/// Ranges of chunks, which float64 holds whatever the type of the vector.
using ChunkRange = Range<double>;

template <class A>
struct Shared {
  Range<A> ranges[kWarps];
};

template <class A>
__device__ Range<A> warp_range(Range<A> range) {
#pragma unroll
  for (int distance = kWarp / 2; distance > 0; distance /= 2) {
    range.include(Range<A>{__shfl_xor_sync(kAllLanes, range.low, distance),
                           __shfl_xor_sync(kAllLanes, range.high, distance)});
  }
  return range;
}

/// The range of all threads of a block, in all of them. All call it, and may do so again.
template <class A>
__device__ Range<A> block_range(Range<A> range, Shared<A>& shared) {
  range = warp_range(range);
  if (threadIdx.x % kWarp == 0) shared.ranges[threadIdx.x / kWarp] = range;
  __syncthreads();
#pragma unroll
  for (int warp = 0; warp < kWarps; ++warp) range.include(shared.ranges[warp]);
  __syncthreads();
  return range;
}

/// The range of chunks [first, end), in all threads of the block.
__device__ inline ChunkRange load_range(const ChunkRange* ranges, int64_t first, int64_t end,
                                        Shared<double>& shared) {
  auto range = ChunkRange::none();
#pragma unroll 1
  for (int64_t chunk = first + threadIdx.x; chunk < end; chunk += kThreads) {
    const auto both = load_pack<2>(&ranges[chunk].low);
    range.include(ChunkRange{both.at[0], both.at[1]});
  }
  return block_range(range, shared);
}

template <int N>
struct Count {
  static constexpr int value = N;
};

/// Calls use(i, load(Count<N>(), i)) for the i that are 0, N, 2 N, ... below N `count` of all threads of a block; the
/// loads of kFlight of them come before the first use.
template <int N, class Load, class Use>
__device__ void for_packs(int count, const Load& load, const Use& use) {
  for (int first = threadIdx.x; first < count; first += kFlight * kThreads) {
    decltype(load(Count<N>(), 0)) values[kFlight];
#pragma unroll
    for (int j = 0; j < kFlight; ++j) {
      if (first + j * kThreads < count) values[j] = load(Count<N>(), (first + j * kThreads) * N);
    }
#pragma unroll
    for (int j = 0; j < kFlight; ++j) {
      if (first + j * kThreads < count) use((first + j * kThreads) * N, values[j]);
    }
  }
}

/// The same for `count` entries, 16 bytes at a time, or one by one from where there are no 16 left.
template <class A, class Load, class Use>
__device__ void for_entries(int count, bool packed, const Load& load, const Use& use) {
  const int packs = packed ? count / kVector<A> : 0, rest = packs * kVector<A>;
  for_packs<kVector<A>>(packs, load, use);
  for_packs<1>(
      count - rest, [&](auto n, int i) { return load(n, rest + i); },
      [&](int i, const auto& values) { use(rest + i, values); });
}

/// The range of x / divisor over so many entries, of this thread's.
template <class A>
__device__ Range<A> range_of(const A* x, int count, A divisor) {
  auto range = Range<A>::none();
  for_entries<A>(
      count, is_aligned(x), [&](auto n, int i) { return load_pack<n.value>(x + i); },
      [&](int, const auto& pack) {
#pragma unroll
        for (const A value : pack.at) range.include(value / divisor);
      });
  return range;
}

/// minmax of the entries of a vector whose range is known.
template <class A>
struct Normalization {
  A low;
  A divisor;
  A constant;
  bool is_constant;

  template <class B>
  __device__ Normalization(const Range<B>& range, double eps) : low(static_cast<A>(range.low)) {
    const A high = static_cast<A>(range.high), spread = high - low;
    const bool is_finite = spread <= std::numeric_limits<A>::max();  // false too where spread is NaN
    divisor = spread + static_cast<A>(eps);
    is_constant = !is_finite || spread <= static_cast<A>(kFlat) * max(high, -low);
    constant = is_finite ? A(1) : std::numeric_limits<A>::quiet_NaN();
  }

  __device__ A operator()(A value) const { return is_constant ? constant : (value - low) / divisor; }
};

// ---- minmax.

struct MinMaxShared {
  double eps;
  ChunkRange* ranges;
};

struct MinMaxEntry {
  const void* x;
  void* out;
  Scalar weight;
  int64_t size;
  int64_t first;  // chunk, among those of all vectors of several
};

using MinMaxTable = Table<MinMaxEntry, MinMaxShared>;

/// The chunk of a block.
template <class A>
struct MinMaxChunk {
  const A* x;
  A* out;
  A weight;
  int64_t chunk;
  int count;

  __device__ MinMaxChunk(const MinMaxEntry& entry, int64_t chunk_) : chunk(chunk_) {
    const int64_t start = chunk * kChunk;
    x = static_cast<const A*>(entry.x) + start;
    out = static_cast<A*>(entry.out) + start;
    weight = static_cast<A>(load(entry.weight));
    count = static_cast<int>(min(entry.size - start, static_cast<int64_t>(kChunk)));
  }

  /// Where the weight is 0, nothing was averaged yet.
  __device__ void write(const Normalization<A>& normalize) const {
    for_entries<A>(
        count, is_aligned(x) && is_aligned(out), [&](auto n, int i) { return load_pack<n.value>(x + i); },
        [&](int i, auto pack) {
#pragma unroll
          for (A& value : pack.at) value = weight == 0 ? A(1) : normalize(value / weight);
          store_pack(out + i, pack);
        });
  }
};

/// minmax of a vector that is one chunk.
template <class A>
__global__ void __launch_bounds__(kThreads) minmax_kernel(const __grid_constant__ MinMaxTable table) {
  const MinMaxChunk<A> chunk(table.entries[blockIdx.x], 0);
  const auto range = block_range(range_of(chunk.x, chunk.count, chunk.weight), shared_memory<Shared<A>>());
  chunk.write(Normalization<A>(range, table.shared.eps));
}

/// The range of one chunk of x / weight.
template <class A>
__global__ void __launch_bounds__(kThreads) minmax_ranges_kernel(const __grid_constant__ MinMaxTable table) {
  const int i = table.tensor_of(blockIdx.x);
  const MinMaxEntry& entry = table.entries[i];
  const MinMaxChunk<A> chunk(entry, blockIdx.x - table.start[i]);
  const auto range = block_range(range_of(chunk.x, chunk.count, chunk.weight), shared_memory<Shared<A>>());
  if (threadIdx.x == 0) table.shared.ranges[entry.first + chunk.chunk] = {range.low, range.high};
}

/// One chunk of minmax, out of the ranges of all chunks of its vector.
template <class A>
__global__ void __launch_bounds__(kThreads) minmax_results_kernel(const __grid_constant__ MinMaxTable table) {
  const int i = table.tensor_of(blockIdx.x);
  const MinMaxEntry& entry = table.entries[i];
  const MinMaxChunk<A> chunk(entry, blockIdx.x - table.start[i]);
  const int64_t end = entry.first + divide_up<int64_t>(entry.size, kChunk);
  const auto range = load_range(table.shared.ranges, entry.first, end, shared_memory<Shared<double>>());
  chunk.write(Normalization<A>(range, table.shared.eps));
}

/// All vectors of one dtype that are one chunk, or all that are several.
void minmax_of(const MinMax& arguments, DType dtype, bool one_chunk, void (*kernel)(MinMaxTable),
               const MinMaxShared& shared, const Stream& stream) {
  TableWriter<MinMaxTable> writer("minmax", kernel, kThreads, sizeof(Shared<double>), stream, shared);
  int64_t first = 0;
  for (int64_t i = 0; i < arguments.count; ++i) {
    const MinMaxVector& v = arguments.vectors[i];
    const int64_t count = chunks(v.size);
    if (v.dtype == dtype && (count <= 1) == one_chunk) writer.add({v.x, v.out, v.weight, v.size, first}, count);
    if (count > 1) first += count;
  }
  writer.flush();
}

// ---- The moving average.

struct EmaShared {
  double decay;
  double gain;
  double eps;
  ChunkRange* ranges;
  int64_t* rejected;
  bool normalize;
};

struct EmaEntry {
  void* state;
  const void* next;
  double divisor;
  int64_t size;
  int64_t next_size;
  int64_t first;  // chunk, among those of all vectors
  int64_t run;    // that the vector is in
  int64_t run_first;  // chunk of the run
  int64_t run_end;
};

using EmaTable = Table<EmaEntry, EmaShared>;

/// A vector without entries has an empty chunk, so that somebody speaks for its run.
int64_t chunks_of(int64_t size) { return std::max<int64_t>(1, chunks(size)); }

/// The chunk of a block.
template <class A>
struct EmaChunk {
  A* state;
  const A* next;
  A divisor;
  int64_t chunk;  // among those of all vectors
  int count;      // of entries that there are of `next`
  bool completed;  // by a 1 that follows

  __device__ EmaChunk(const EmaEntry& entry, int64_t number) : chunk(entry.first + number) {
    const int64_t start = number * kChunk, size = min(entry.size - start, static_cast<int64_t>(kChunk));
    state = static_cast<A*>(entry.state) + start;
    next = static_cast<const A*>(entry.next) + start;
    divisor = static_cast<A>(entry.divisor);
    count = static_cast<int>(min(entry.next_size - start, static_cast<int64_t>(kChunk)));
    completed = count < size;
  }
};

/// The range of one chunk of next / divisor.
template <class A>
__global__ void __launch_bounds__(kThreads) ema_ranges_kernel(const __grid_constant__ EmaTable table) {
  const int i = table.tensor_of(blockIdx.x);
  const EmaChunk<A> chunk(table.entries[i], blockIdx.x - table.start[i]);
  auto mine = range_of(chunk.next, chunk.count, chunk.divisor);
  if (chunk.completed) mine.include(A(1));
  const auto range = block_range(mine, shared_memory<Shared<A>>());
  if (threadIdx.x == 0) table.shared.ranges[chunk.chunk] = {range.low, range.high};
}

/// Entries of a state with what is new.
template <class A, int N>
struct Both {
  static constexpr int kCount = N;
  Pack<A, N> state;
  Pack<A, N> next;
};

/// The new state of one chunk; `value_of` makes its argument what is averaged.
template <class A, class ValueOf>
__device__ void average(const EmaChunk<A>& chunk, A decay, A gain, const ValueOf& value_of) {
  // Rounded the same way wherever an entry lies: no compiler chooses which product is fused.
  const auto update = [&](A state, A value) { return fma(gain, value_of(value), decay * state); };
  for_entries<A>(
      chunk.count, is_aligned(chunk.state) && is_aligned(chunk.next),
      [&](auto n, int i) {
        return Both<A, n.value>{load_pack<n.value>(chunk.state + i), load_pack<n.value>(chunk.next + i)};
      },
      [&](int i, const auto& both) {
        auto state = both.state;
#pragma unroll
        for (int k = 0; k < both.kCount; ++k) state.at[k] = update(state.at[k], both.next.at[k] / chunk.divisor);
        store_pack(chunk.state + i, state);
      });
  if (chunk.completed && threadIdx.x == 0) chunk.state[chunk.count] = update(chunk.state[chunk.count], A(1));
}

/// One chunk of the average of a vector whose run is finite. The first block of a run says whether it is.
template <class A>
__global__ void __launch_bounds__(kThreads) ema_results_kernel(const __grid_constant__ EmaTable table) {
  const EmaShared& shared = table.shared;
  auto& memory = shared_memory<Shared<double>>();
  const int i = table.tensor_of(blockIdx.x);
  const EmaEntry& entry = table.entries[i];
  const EmaChunk<A> chunk(entry, blockIdx.x - table.start[i]);
  const bool is_finite = load_range(shared.ranges, entry.run_first, entry.run_end, memory).is_finite();
  if (chunk.chunk == entry.run_first && threadIdx.x == 0) shared.rejected[entry.run] = is_finite ? 0 : 1;
  if (!is_finite) return;
  const A decay = static_cast<A>(shared.decay), gain = static_cast<A>(shared.gain);
  if (shared.normalize) {
    const int64_t end = entry.first + divide_up<int64_t>(entry.size, kChunk);
    const auto range = load_range(shared.ranges, entry.first, end, memory);
    average(chunk, decay, gain, Normalization<A>(range, shared.eps));
  } else {
    average(chunk, decay, gain, [](A value) { return value; });
  }
}

/// One launch over all vectors of one dtype, or as many as their tables take.
void ema_of(const FactorEma& arguments, DType dtype, const EmaEntry* entries, void (*kernel)(EmaTable),
            const EmaShared& shared, const Stream& stream) {
  TableWriter<EmaTable> writer("factor_ema_", kernel, kThreads, sizeof(Shared<double>), stream, shared);
  for (int64_t i = 0; i < arguments.count; ++i) {
    if (arguments.vectors[i].dtype != dtype) continue;
    writer.add(entries[i], chunks_of(entries[i].size));
  }
  writer.flush();
}

/// The chunks of all vectors, numbered in the order of the list, and which of them a run has.
std::vector<EmaEntry> number_chunks(const FactorEma& arguments, int64_t& count) {
  std::vector<EmaEntry> entries;
  entries.reserve(arguments.count);
  count = 0;
  for (int64_t run = 0; run < arguments.count / arguments.joint; ++run) {
    const int64_t run_first = count;
    for (int64_t i = run * arguments.joint; i < (run + 1) * arguments.joint; ++i) {
      const FactorEmaVector& v = arguments.vectors[i];
      entries.push_back({v.state, v.next, v.divisor, v.size, v.next_size, count, run, run_first, 0});
      count += chunks_of(v.size);
    }
    for (auto entry = entries.end() - arguments.joint; entry != entries.end(); ++entry) entry->run_end = count;
  }
  return entries;
}

}  // namespace

void minmax(const MinMax& arguments, const Stream& stream) {
  const DeviceGuard guard(stream);
  int64_t several = 0;  // chunks of vectors that are more than one
  for (int64_t i = 0; i < arguments.count; ++i) {
    const int64_t count = chunks(arguments.vectors[i].size);
    if (count > 1) several += count;
  }
  const Scratch ranges(stream, several * sizeof(ChunkRange));
  const MinMaxShared shared{arguments.eps, ranges.as<ChunkRange>()};
  for (const DType dtype : {DType::float32, DType::float64}) {
    for_wide_type(dtype, [&](auto type) {
      using A = typename decltype(type)::type;
      minmax_of(arguments, dtype, true, minmax_kernel<A>, shared, stream);
      if (several == 0) return;
      minmax_of(arguments, dtype, false, minmax_ranges_kernel<A>, shared, stream);
      minmax_of(arguments, dtype, false, minmax_results_kernel<A>, shared, stream);
    });
  }
}

void factor_ema_(const FactorEma& arguments, const Stream& stream) {
  const DeviceGuard guard(stream);
  int64_t count;
  const std::vector<EmaEntry> entries = number_chunks(arguments, count);
  const Scratch ranges(stream, count * sizeof(ChunkRange));
  const EmaShared shared{arguments.decay, arguments.gain,     arguments.eps, ranges.as<ChunkRange>(),
                         arguments.rejected, arguments.normalize};
  // A run may be of both types: all vectors are looked at before any is written.
  for (const bool looks : {true, false}) {
    for (const DType dtype : {DType::float32, DType::float64}) {
      for_wide_type(dtype, [&](auto type) {
        using A = typename decltype(type)::type;
        ema_of(arguments, dtype, entries.data(), looks ? ema_ranges_kernel<A> : ema_results_kernel<A>, shared,
                  stream);
      });
    }
  }
}

}  // namespace fisher_kernels::cuda
