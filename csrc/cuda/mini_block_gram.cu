#include "async_copy.cuh"
#include "gram.cuh"
#include "kernels.h"

// Gram matrices of many small blocks. Up to 49 numbers a block, 7 x 7 convolutions, the one read of v is what counts:
// S B n numbers for S B n (n + 1) / 2 multiply-adds.
//
// A warp copies some neighbouring blocks of a sample, as they lie in memory, to shared memory, several samples ahead
// and without registers, 16 bytes at a time. One lane has all sums of a block up to n = 12; beyond, the lower triangle
// is cut into 10, 15 or 28 tiles of one lane each. The warps of a thread block have the same blocks and share the
// samples. Larger blocks are matrix products.
//
// Lanes read number i of their blocks at a distance of n, which for even n meets banks of shared memory more than once:
// that costs more than what else there is only for n = 8, where eight lanes meet, and keeps up with the memory there.
//
// Which samples are summed together follows from their number and n alone, so that a block's result does not depend on
// how many others there are. Shares of the samples are added in order, either by the thread block that summed them or,
// where there are few of those, by a second kernel.
namespace fisher_kernels::cuda {

namespace {

constexpr const char* kName = "mini_block_gram_";

constexpr int kWarps = 8;  // of a thread block
constexpr int kThreads = kWarps * kWarp;

constexpr size_t kMostShared = 160 * 1024;  // bytes of shared memory that a thread block gets on every GPU built for
constexpr int64_t kShare = 256;       // samples, but
constexpr int64_t kMostShares = 64;   // shares are longer where there would be more
constexpr int64_t kManyGroups = 264;  // that keep a GPU busy, two a multiprocessor: below, shares are apart

struct Params {
  const void* v;
  void* out;
  void* partials;  // [shares, groups, kSums, lanes] or null where shares are added at once
  int64_t samples;
  int64_t sample_stride;
  int64_t blocks;
  int32_t size;
  uint32_t inverse_size;    // as for divide
  uint32_t inverse_square;  // of size^2
  int64_t share;            // samples
  int64_t shares;
  double decay;
  double gain;
};

/// The quotient of numbers below 2^16 by one whose inverse(divisor) is given, for divisors below 2^12.
__device__ inline int divide(int number, uint32_t inverse) {
  return inverse == 0 ? number : static_cast<int>(__umulhi(static_cast<uint32_t>(number), inverse));
}

/// ceil(2^32 / divisor), or 0 for a divisor of 1.
uint32_t inverse(uint32_t divisor) { return divisor == 1 ? 0 : 0xffffffffu / divisor + 1; }

/// How blocks are cut into the tiles of lanes.
struct Cut {
  int32_t edge;    // tiles down the diagonal of a block
  int32_t part;    // rows and columns of a tile
  int32_t blocks;  // of a warp
  int32_t sums;    // of a lane
};

/// Blocks of up to kEdge * kPart numbers, whose triangles are cut into tiles of kPart x kPart, kEdge down the diagonal.
template <class T_, int kEdge_, int kPart_>
struct Traits {
  using T = T_;
  using A = Accumulator<T>;
  static constexpr int kEdge = kEdge_, kPart = kPart_;
  static constexpr int kMost = kEdge * kPart;             // numbers of a block
  static constexpr int kLanes = kEdge * (kEdge + 1) / 2;  // of a block
  static constexpr int kBlocks = kWarp / kLanes;          // of a warp
  static constexpr bool kIsTriangle = kEdge == 1;         // a lane's tile is on the diagonal
  static constexpr int kSums = kIsTriangle ? kPart * (kPart + 1) / 2 : kPart * kPart;  // of a lane
  // On a multiprocessor, which limits registers: the more a lane needs for its sums, the fewer warps keep memory busy.
  static constexpr int kWords = kSums * static_cast<int>(sizeof(A) / 4);
  static constexpr int kLeastBlocks = kWords > 90 ? 1 : kWords > 49 ? 2 : kWords > 32 ? 3 : kWords > 16 ? 4 : 5;
  static constexpr int kStages = 4;                         // samples that a warp has room for
  static constexpr int kVector = kVectorBytes / sizeof(T);  // numbers of v copied at once
  // Neighbouring blocks of a sample begin anywhere within 16 bytes.
  static constexpr int kStage = (kBlocks * kMost + 2 * kVector - 1) / kVector * kVector;
  static_assert(kLanes <= kWarp && (kWarps & (kWarps - 1)) == 0 && (kStages & (kStages - 1)) == 0);
  static_assert(kMost * kMost < 1 << 12 && kBlocks * kMost * kMost < 1 << 16);

  static constexpr Cut cut() { return {kEdge, kPart, kBlocks, kSums}; }

  /// Whether a lane has a sum of row i and column j of its tile.
  static constexpr bool has(int i, int j) { return !kIsTriangle || j <= i; }

  /// The number of that sum.
  static constexpr int index(int i, int j) { return kIsTriangle ? i * (i + 1) / 2 + j : i * kPart + j; }
};

template <class Traits>
struct Memory {
  using A = typename Traits::A;
  A totals[Traits::kSums][kWarp];  // of the shares so far
  union {
    alignas(kVectorBytes) typename Traits::T stages[kWarps][Traits::kStages][Traits::kStage];
    A sums[kWarps / 2][Traits::kSums][kWarp];
    A blocks[Traits::kBlocks * Traits::kMost * Traits::kMost];  // of the result
  };
};

/// The blocks of a warp, and what a lane has of them.
struct Group {
  int64_t first;  // block
  int count;      // of blocks
  int block;      // of the lane
  int row;        // where its tile begins
  int column;
  bool is_used;

  __device__ Group(const Params& params, const Cut& cut) : first(static_cast<int64_t>(blockIdx.x) * cut.blocks) {
    const int64_t left = params.blocks - first;
    count = static_cast<int>(left < cut.blocks ? left : cut.blocks);
    const int lane = threadIdx.x % kWarp, lanes = cut.edge * (cut.edge + 1) / 2;
    block = lane / lanes;
    is_used = block < count;
    if (!is_used) block = 0;
    int tile = lane % lanes, down = 0;
#pragma unroll
    for (int i = 0; i + 1 < cut.edge; ++i) {
      if (tile > down) tile -= ++down;
    }
    row = down * cut.part;
    column = tile * cut.part;
  }
};

/// What a lane adds up: a tile of a block's triangle. Numbers beyond the block give sums that nobody reads.
template <class Traits>
struct LaneSums {
  using A = typename Traits::A;
  A at[Traits::kPart][Traits::kPart];

  template <class F>
  __device__ void each(F&& f) {
#pragma unroll
    for (int i = 0; i < Traits::kPart; ++i) {
#pragma unroll
      for (int j = 0; j < Traits::kPart; ++j) {
        if (Traits::has(i, j)) f(at[i][j], i, j);
      }
    }
  }

  /// The same with the lane's place among sums [kSums, lanes].
  template <class F>
  __device__ void each_in(A (*sums)[kWarp], F&& f) {
    each([&](A& sum, int i, int j) { f(sum, sums[Traits::index(i, j)][threadIdx.x % kWarp]); });
  }

  __device__ void clear() {
    each([](A& sum, int, int) { sum = 0; });
  }

  __device__ void add_products(const typename Traits::T* rows, const typename Traits::T* columns) {
    A left[Traits::kPart], right[Traits::kPart];
#pragma unroll
    for (int i = 0; i < Traits::kPart; ++i) {
      left[i] = widen(rows[i]);
      right[i] = Traits::kIsTriangle ? left[i] : A(widen(columns[i]));
    }
    each([&](A& sum, int i, int j) { sum += left[i] * right[j]; });
  }
};

/// Numbers of T from their place within 16 bytes.
template <class T>
__device__ int shift_of(const T* from) {
  return static_cast<int>(reinterpret_cast<uintptr_t>(from) % kVectorBytes / sizeof(T));
}

/// What a warp copies of each sample. Numbers count from the multiple of 16 bytes at or before the first of its blocks.
struct Range {
  int begin;   // 0, or where the sample begins
  int wanted;  // where the blocks end
  int end;     // 16 bytes later, or where the sample ends
};

/// Begins the copy of neighbours to a stage, where they lie within 16 bytes as they did. Around them, other parts of
/// the sample are copied too, so that copies are 16 bytes; but nothing from before its begin or behind its end, where
/// another tensor may be, or nothing.
template <class Traits>
__device__ void copy_to_stage(const typename Traits::T* from, const Range& range, typename Traits::T* stage) {
  constexpr int kVector = Traits::kVector, kBytes = sizeof(typename Traits::T);
#pragma unroll 1
  for (int i = static_cast<int>(threadIdx.x) % kWarp * kVector; i < range.wanted; i += kWarp * kVector) {
    if (range.begin <= i && i + kVector <= range.end) {
      copy_async<kVectorBytes>(stage + i, from + i);
      continue;
    }
    const int end = min(i + kVector, range.end);
#pragma unroll 1
    for (int k = max(i, range.begin); k < end; ++k) {
      if constexpr (kBytes < 4) {
        stage[k] = from[k];  // to be seen at the barrier that waits for the copies
      } else {
        copy_async<kBytes>(stage + k, from + k);
      }
    }
  }
}

/// Adds what the warps of a thread block have of a share up, in warp 0.
template <class Traits>
__device__ void fold(Memory<Traits>& memory, LaneSums<Traits>& sums) {
  using A = typename Traits::A;
  const int warp = threadIdx.x / kWarp;
  for (int half = kWarps / 2; half > 0; half /= 2) {
    __syncthreads();
    if (warp >= half && warp < 2 * half) {
      sums.each_in(memory.sums[warp - half], [](A& sum, A& place) { place = sum; });
    }
    __syncthreads();
    if (warp < half) sums.each_in(memory.sums[warp], [](A& sum, A& place) { sum += place; });
  }
}

/// The sums of a share of the samples, from one of them on, in warp 0.
template <class Traits>
__device__ void sum_share(const Params& params, const Group& group, int64_t first, Memory<Traits>& memory,
                          LaneSums<Traits>& sums) {
  using T = typename Traits::T;
  constexpr int kStages = Traits::kStages, kVector = Traits::kVector;
  const int warp = threadIdx.x / kWarp, size = group.count * params.size;
  const int64_t left = params.samples - first;
  const auto samples = static_cast<int>(left < params.share ? left : params.share);
  const int count = (samples - warp + kWarps - 1) / kWarps;
  const int64_t step = kWarps * params.sample_stride;
  const T* from = static_cast<const T*>(params.v) + (first + warp) * params.sample_stride + group.first * params.size;
  static_assert(kWarps % kVector == 0, "all samples of a warp begin alike within 16 bytes");
  const int shift = shift_of(from);
  from -= shift;
  const int64_t behind = (params.blocks - group.first - group.count) * params.size;  // numbers of the sample
  const Range range{group.first == 0 ? shift : 0, shift + size,
                    shift + size + static_cast<int>(behind < kVector ? behind : kVector)};
  auto& stages = memory.stages[warp];
  const int row = group.block * params.size + group.row, column = group.block * params.size + group.column;
  const auto copy = [&](int k) {
    if (k < count) copy_to_stage<Traits>(from, range, stages[k % kStages]);
    end_copies();
    from += step;
  };
  sums.clear();
#pragma unroll 1
  for (int k = 0; k + 1 < kStages; ++k) copy(k);
  for (int k = 0; k < count; ++k) {
    wait_for_copies<kStages - 2>();
    __syncwarp();  // what the other lanes copied is there too, and they are done with the stage that is next
    copy(k + kStages - 1);
    const T* const stage = stages[k % kStages] + shift;
    sums.add_products(stage + row, stage + column);
  }
  fold(memory, sums);
}

/// Averages the sums of a group, which are in the lower triangles of `blocks`, into the result.
template <class A>
__device__ void write_blocks(const Params& params, const Group& group, A* blocks) {
  const int n = params.size, square = n * n, count = group.count * square;
  const A decay = static_cast<A>(params.decay), gain = static_cast<A>(params.gain);
  A* const out = static_cast<A*>(params.out) + group.first * square;
#pragma unroll 1  // each load waits for a branch, so that none would be under way together
  for (int at = threadIdx.x; at < count; at += kThreads) {
    const int block = divide(at, params.inverse_square) * square, place = at - block;
    const int i = divide(place, params.inverse_size), j = place - i * n;
    if (j > i) continue;
    A value = gain * blocks[at];
    if (decay != 0) value = fma(decay, out[at], value);
    blocks[at] = value;
    blocks[block + j * n + i] = value;
  }
  __syncthreads();
#pragma unroll 4
  for (int at = threadIdx.x; at < count; at += kThreads) out[at] = blocks[at];
}

/// Where in shared blocks a sum of a lane belongs, or -1.
__device__ inline int place_in_blocks(const Params& params, const Group& group, int i, int j) {
  const int n = params.size, row = group.row + i, column = group.column + j;
  return group.is_used && row < n && column <= row ? (group.block * n + row) * n + column : -1;
}

template <class Traits>
__global__ void __launch_bounds__(kThreads, Traits::kLeastBlocks)
    small_kernel(const __grid_constant__ Params params) {
  using A = typename Traits::A;
  auto& memory = shared_memory<Memory<Traits>>();
  const Group group(params, Traits::cut());
  const bool is_first_warp = threadIdx.x < kWarp, apart = params.partials != nullptr;
  const int64_t begin = apart ? blockIdx.y : 0, end = apart ? begin + 1 : params.shares;
  LaneSums<Traits> sums;
  sums.clear();
  for (int64_t share = begin; share < end; ++share) {
    __syncthreads();  // the sums of the last share are read
    sum_share(params, group, share * params.share, memory, sums);
    if (is_first_warp && share > begin) sums.each_in(memory.totals, [](A& sum, A& place) { sum += place; });
    if (is_first_warp && share + 1 < end) sums.each_in(memory.totals, [](A& sum, A& place) { place = sum; });
  }
  if (apart) {
    auto* const to = static_cast<A(*)[kWarp]>(params.partials) + (begin * gridDim.x + blockIdx.x) * Traits::kSums;
    if (is_first_warp) sums.each_in(to, [](A& sum, A& place) { place = sum; });
    return;
  }
  __syncthreads();
  if (is_first_warp) {
    sums.each([&](A& sum, int i, int j) {
      const int place = place_in_blocks(params, group, i, j);
      if (place >= 0) memory.blocks[place] = sum;
    });
  }
  __syncthreads();
  write_blocks(params, group, memory.blocks);
}

/// Adds shares up in order, as the other kernel does where it has them all. One kernel serves all classes.
template <class A>
__global__ void __launch_bounds__(kThreads)
    small_shares_kernel(const __grid_constant__ Params params, const __grid_constant__ Cut cut) {
  A* const blocks = &shared_memory<A>();
  const Group group(params, cut);
  const int64_t size = static_cast<int64_t>(gridDim.x) * cut.sums;
  const auto* const partials = static_cast<const A(*)[kWarp]>(params.partials) + blockIdx.x * cut.sums;
  for (int k = threadIdx.x / kWarp; k < cut.sums; k += kWarps) {
    const TilePlace sum = cut.edge == 1 ? tile_of_triangle(k) : TilePlace{k / cut.part, k % cut.part};
    const int place = place_in_blocks(params, group, sum.row, sum.column);
    if (place < 0) continue;
    const A* from = partials[k] + threadIdx.x % kWarp;
    A total = *from;
#pragma unroll 8  // loads under way together
    for (int64_t share = 1; share < params.shares; ++share) total += from[share * size * kWarp];
    blocks[place] = total;
  }
  __syncthreads();
  write_blocks(params, group, blocks);
}

template <class Traits>
void small_blocks(const MiniBlockGram& a, const Stream& stream) {
  using A = typename Traits::A;
  constexpr int64_t kMostGroups = 0x7fffffff;
  static_assert(sizeof(Memory<Traits>) <= kMostShared);
  const auto n = static_cast<uint32_t>(a.size);
  const int64_t groups = divide_up<int64_t>(a.blocks, Traits::kBlocks);
  if (groups > kMostGroups) throw std::runtime_error(std::string(kName) + ": the result has too many blocks");
  Params params{};
  params.v = a.v;
  params.out = a.out;
  params.samples = a.samples;
  params.sample_stride = a.sample_stride;
  params.blocks = a.blocks;
  params.size = static_cast<int32_t>(n);
  params.inverse_size = inverse(n);
  params.inverse_square = inverse(n * n);
  params.share = kShare * std::max<int64_t>(1, divide_up(a.samples, kShare * kMostShares));
  params.shares = divide_up(a.samples, params.share);
  params.decay = a.decay;
  params.gain = a.gain;
  const bool apart = params.shares > 1 && groups < kManyGroups;
  const Scratch partials(stream, apart ? params.shares * groups * Traits::kSums * kWarp * sizeof(A) : 0);
  params.partials = apart ? partials.as<void>() : nullptr;
  launch(kName, small_kernel<Traits>, dim3(static_cast<unsigned>(groups), apart ? params.shares : 1), kThreads,
         sizeof(Memory<Traits>), stream, params);
  if (!apart) return;
  launch(kName, small_shares_kernel<A>, dim3(static_cast<unsigned>(groups)), kThreads,
         Traits::kBlocks * n * n * sizeof(A), stream, params, Traits::cut());
}

/// Blocks as Gram matrices of their own: sums of runs in order, whether or not they are apart.
template <class T>
void large_blocks(const MiniBlockGram& a, const Stream& stream) {
  using Traits = GramTraits<T, 64>;
  using Add = AddTraits<typename Traits::A, Traits::kTile, 32, 1>;
  constexpr int64_t kManyTiles = 1024;  // of 64 threads, eight a multiprocessor
  constexpr int64_t kRun = 64;
  static_assert(kRun % Traits::kDepth == 0);
  const int64_t run = kRun * std::max<int64_t>(1, divide_up(a.samples, kRun * kMostShares));
  const int64_t runs = std::max<int64_t>(1, divide_up(a.samples, run));
  const bool apart = a.blocks * tiles_of_triangle(a.size, Traits::kTile) < kManyTiles;
  Gram gram{};
  gram.x = a.v;
  gram.out = a.out;
  gram.rows = a.samples;
  gram.row_stride = a.sample_stride;
  gram.matrices = a.blocks;
  gram.matrix_stride = a.size;
  gram.columns = a.size;
  gram.run = run;
  gram.shares = apart ? runs : 1;
  gram.share = apart ? run : runs * run;
  gram.decay = a.decay;
  gram.gain = a.gain;
  launch_gram<Traits, Add>(kName, gram, stream);
}

}  // namespace

void mini_block_gram_(const MiniBlockGram& a, const Stream& stream) {
  if (a.blocks == 0 || a.size == 0) return;
  const DeviceGuard guard(stream);
  for_type(a.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    if (a.size <= 4) return small_blocks<Traits<T, 1, 4>>(a, stream);
    if (a.size <= 9) return small_blocks<Traits<T, 1, 9>>(a, stream);
    if (a.size <= 12) return small_blocks<Traits<T, 1, 12>>(a, stream);
    if (a.size <= 16) return small_blocks<Traits<T, 4, 4>>(a, stream);
    if (a.size <= 25) return small_blocks<Traits<T, 5, 5>>(a, stream);
    if (a.size <= 49) return small_blocks<Traits<T, 7, 7>>(a, stream);
    large_blocks<T>(a, stream);
  });
}

}  // namespace fisher_kernels::cuda
