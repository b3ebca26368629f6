#include <algorithm>
#include <cstdint>

#include "convolution.cuh"
#include "kernels.h"
#include "launch.cuh"
#include "types.cuh"

// Two stages, for a slab of blocks and samples at a time: the gradients w of the kernels by single samples go to a
// workspace that the second-level cache holds, and mini_block_gram_ sums their outer products.
//
// The gradients are a matrix product over output positions for each sample and group,
//   w[o, (i, k)] = sum over l of grad_output[o, l] * x[i, window(l) + into(k)],
// which takes 2 S O I n L operations (I of a group) and is bound by them: the triangles take S O I n (n + 1) more, and
// w is written to and read from the cache once, 8 S O I n bytes in float32. The right side is gathered from x where it
// lies, n times from the first-level cache and once from memory; nothing is unfolded in memory. Where a window begins
// and how far into it an offset reads are tables in shared memory, their sum says where to read and whether that is
// inside: strides, dilation, padding and dimensions cost three additions and three comparisons a number, which all rows
// of a tile share.
namespace fisher_kernels::cuda {

namespace {

constexpr const char* kName = "conv_mini_block_gram_";

constexpr int64_t kWorkspace = 32 << 20;  // bytes of gradients that are held, unless those of one block are more
constexpr int64_t kFewestSamples = 16;    // of which gradients are held: out is read and written once for each slab
constexpr int64_t kFullTile = 64;         // rows
constexpr int64_t kManyBlocks = 1024;     // of threads, that fill a GPU
constexpr int64_t kSomeBlocks = 512;      // with fewer, positions are split
constexpr int64_t kMostSamples = 8;       // that one block works on, one after the other, with the same tables
constexpr int kSegment = 1024;            // positions that are summed before their sum is added to the entry
constexpr int kStep = 16;                 // positions that are staged in shared memory together
static_assert(kSegment % kStep == 0 && kSegment <= kSparePositions);

/// The blocks and samples of one launch. Rows are output channels of a group; columns are input channels of the group,
/// each with n kernel offsets.
struct Slab : Convolution {
  const void* x;     // from the first channel and sample on
  const void* grad;  // likewise
  void* w;           // [parts, samples, groups, rows, columns]
  int64_t x_sample;
  int64_t x_group;
  int64_t grad_sample;
  int64_t grad_group;
  int64_t w_sample;
  int64_t w_part;
  uint32_t x_channel;
  uint32_t grad_channel;
  uint32_t grad_position;
  int32_t samples;
  int32_t groups;
  int32_t rows;
  int32_t channels;
  int32_t columns;
  int32_t part_positions;  // a multiple of kSegment
  int32_t block_samples;
  bool x_last;  // channels are side by side in x
  bool grad_last;
};

/// Positions of a part: [first, last).
struct Range {
  int32_t first;
  int32_t last;

  __device__ Range(int64_t index, int32_t length, int32_t size)
      : first(static_cast<int32_t>(index * length)), last(length < size - first ? first + length : size) {}
};

/// The windows of a segment, and none up to a whole step. All threads call it; those of before are no longer read.
__device__ int fill_windows(const Slab& slab, int32_t first, int32_t last, Place* windows) {
  const int count = min(kSegment, last - first);
  __syncthreads();
  for (int i = threadIdx.x; i < divide_up(count, kStep) * kStep; i += blockDim.x) {
    windows[i] = i < count ? slab.window(first + i) : Place{{kNowhere, 0, 0}, 0};
  }
  __syncthreads();
  return count;
}

// Matrix products: a block of threads has a tile of w in registers, of one sample at a time, and stages kStep positions
// of both sides in shared memory while it multiplies those before.

template <class T_, int kRows_, int kColumns_>
struct TileTraits {
  using T = T_;
  using A = Accumulator<T>;
  static constexpr int kRows = kRows_;
  static constexpr int kColumns = kColumns_;
  static constexpr int kThreadRows = 4;  // of the tile of one thread
  static constexpr int kThreadColumns = 4;
  // Lanes are 4 x 8, so that what a warp reads of either side is at most 128 bytes of shared memory at a time.
  static constexpr int kLaneRows = 4;
  static constexpr int kLaneColumns = kWarp / kLaneRows;
  static constexpr int kWarpColumns = kColumns / (kLaneColumns * kThreadColumns);  // warps beside one another
  static constexpr int kThreads = kRows / kThreadRows * (kColumns / kThreadColumns);
  static constexpr int kLefts = kRows * kStep / kThreads;  // numbers that a thread stages
  static constexpr int kRights = kColumns * kStep / kThreads;
  // Rows of 16 bytes more: eight positions by four lines, which a warp stages together, are 32 different banks.
  static constexpr int kPad = 4;
  static_assert(kRows % (kLaneRows * kThreadRows) == 0 && kColumns % (kLaneColumns * kThreadColumns) == 0);
  static_assert(kThreads % kRows == 0 && kThreads % kColumns == 0 && kThreads % (4 * kStep) == 0);
  static_assert(kThreads / kRows <= kStep && kThreads / kColumns <= kStep && kStep == 16);

  // Instructions for each multiply-add of a full tile: itself, what is read from shared memory, what is staged.
  static constexpr double kCost = 1 + 0.25 / kThreadRows + 0.25 / kThreadColumns + 14.0 / kRows + 6.0 / kColumns;

  struct Shared {
    Place windows[kSegment];
    Place into[kColumns];
    alignas(16) A left[2][kStep][kRows + kPad];
    alignas(16) A right[2][kStep][kColumns + kPad];
  };
};

template <class T>
using SquareTile = TileTraits<T, 64, 64>;
template <class T>
using TallTile = TileTraits<T, 64, 32>;
template <class T>
using WideTile = TileTraits<T, 16, 128>;

/// The positions and lines (rows or columns) of a side that a thread stages: neighbours in memory are those of lanes.
struct Staging {
  int position;
  int line;
  int position_step;
  int line_step;
};

template <int kLines, int kThreads>
__device__ Staging staging(bool lines_are_neighbours) {
  const int t = threadIdx.x;
  if (lines_are_neighbours) return {t / kLines, t % kLines, kThreads / kLines, 0};
  return {t % 8 + t / 32 % 2 * 8, t / 8 % 4 + t / 64 * 4, 0, kThreads / kStep};
}

/// One tile of one sample.
template <class Traits>
class Tile {
  using T = typename Traits::T;
  using A = typename Traits::A;
  using Shared = typename Traits::Shared;
  static constexpr int kThreadRows = Traits::kThreadRows, kThreadColumns = Traits::kThreadColumns;

 public:
  __device__ Tile(const Slab& slab, Shared& shared, int32_t row, int32_t column)
      : slab_(slab),
        shared_(shared),
        lefts_(staging<Traits::kRows, Traits::kThreads>(slab.grad_last)),
        rights_(staging<Traits::kColumns, Traits::kThreads>(slab.x_last)),
        first_row_(row),
        rows_(slab.rows - row) {
    const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
    row_ = (warp / Traits::kWarpColumns * Traits::kLaneRows + lane / Traits::kLaneColumns) * kThreadRows;
    column_ = (warp % Traits::kWarpColumns * Traits::kLaneColumns + lane % Traits::kLaneColumns) * kThreadColumns;
    for (int i = threadIdx.x; i < Traits::kColumns; i += Traits::kThreads) {
      shared.into[i] = {{kNowhere, 0, 0}, 0};
      if (column + i >= slab.columns) continue;
      const int32_t channel = (column + i) / slab.n;
      shared.into[i] = slab.into(column + i - channel * slab.n);
      shared.into[i].offset += channel * slab.x_channel;
    }
  }

  /// Sums over `count` positions, of grad from the first one on.
  __device__ void multiply(const T* x, const T* grad, int count, A (&sums)[kThreadRows][kThreadColumns]) {
    const int steps = divide_up(count, kStep);
#pragma unroll 1
    for (int step = 0; step <= steps; ++step) {
      if (step < steps) fetch(x, grad, step * kStep, count);
      if (step > 0) multiply_step((step - 1) % 2, sums);
      if (step < steps) stage(step % 2);
      __syncthreads();
    }
  }

  /// Writes the sums of a segment to a tile of w, or adds them to it.
  __device__ void write(A* w, int32_t column, bool is_first, const A (&sums)[kThreadRows][kThreadColumns]) const {
    const int32_t columns = slab_.columns - column - column_;
#pragma unroll
    for (int r = 0; r < kThreadRows; ++r) {
      if (row_ + r >= rows_) break;
      A* const to = w + static_cast<int64_t>(first_row_ + row_ + r) * slab_.columns + column + column_;
      Pack<A, kThreadColumns> values;
#pragma unroll
      for (int c = 0; c < kThreadColumns; ++c) values.at[c] = sums[r][c];
      if (slab_.columns % kThreadColumns == 0) {  // then every row is aligned
        if (columns <= 0) break;
        if (!is_first) add(values, load_pack<kThreadColumns>(to));
        store_pack(to, values);
        continue;
      }
#pragma unroll
      for (int c = 0; c < kThreadColumns; ++c) {
        if (c < columns) to[c] = is_first ? values.at[c] : to[c] + values.at[c];
      }
    }
  }

 private:
  __device__ static void add(Pack<A, kThreadColumns>& values, const Pack<A, kThreadColumns>& old) {
#pragma unroll
    for (int c = 0; c < kThreadColumns; ++c) values.at[c] = old.at[c] + values.at[c];
  }

  /// Loads what comes next from memory.
  __device__ void fetch(const T* x, const T* grad, int first, int count) {
#pragma unroll
    for (int i = 0; i < Traits::kLefts; ++i) {
      const int position = first + lefts_.position + i * lefts_.position_step, row = lefts_.line + i * lefts_.line_step;
      const uint32_t at = row * slab_.grad_channel + position * slab_.grad_position;
      left_[i] = position < count && row < rows_ ? grad[at] : narrow<T>(0);
    }
#pragma unroll
    for (int i = 0; i < Traits::kRights; ++i) {
      const Place window = shared_.windows[first + rights_.position + i * rights_.position_step];
      right_[i] = slab_.read(x, window, shared_.into[rights_.line + i * rights_.line_step]);
    }
  }

  /// Stores it where it is multiplied.
  __device__ void stage(int buffer) {
#pragma unroll
    for (int i = 0; i < Traits::kLefts; ++i) {
      A* const to = shared_.left[buffer][lefts_.position + i * lefts_.position_step];
      to[lefts_.line + i * lefts_.line_step] = widen(left_[i]);
    }
#pragma unroll
    for (int i = 0; i < Traits::kRights; ++i) {
      A* const to = shared_.right[buffer][rights_.position + i * rights_.position_step];
      to[rights_.line + i * rights_.line_step] = widen(right_[i]);
    }
  }

  __device__ void multiply_step(int buffer, A (&sums)[kThreadRows][kThreadColumns]) const {
#pragma unroll
    for (int l = 0; l < kStep; ++l) {
      const auto left = load_pack<kThreadRows>(shared_.left[buffer][l] + row_);
      const auto right = load_pack<kThreadColumns>(shared_.right[buffer][l] + column_);
#pragma unroll
      for (int r = 0; r < kThreadRows; ++r) {
#pragma unroll
        for (int c = 0; c < kThreadColumns; ++c) sums[r][c] += left.at[r] * right.at[c];
      }
    }
  }

  const Slab& slab_;
  Shared& shared_;
  const Staging lefts_;
  const Staging rights_;
  const int32_t first_row_;
  const int32_t rows_;  // from the tile's first on
  int row_;             // of this thread in the tile
  int column_;
  T left_[Traits::kLefts];
  T right_[Traits::kRights];
};

template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads) tile_kernel(const __grid_constant__ Slab slab) {
  using T = typename Traits::T;
  using A = typename Traits::A;
  auto& shared = shared_memory<typename Traits::Shared>();
  // Column tiles come first: neighbours share grad_output, and x in turn.
  int64_t block = blockIdx.x;
  const auto next = [&](int32_t count) {
    const int64_t index = block % count;
    block /= count;
    return index;
  };
  const int32_t column = static_cast<int32_t>(next(divide_up(slab.columns, Traits::kColumns))) * Traits::kColumns;
  const int32_t row = static_cast<int32_t>(next(divide_up(slab.rows, Traits::kRows))) * Traits::kRows;
  const int64_t group = next(slab.groups);
  const Range samples(next(divide_up(slab.samples, slab.block_samples)), slab.block_samples, slab.samples);
  const Range positions(block, slab.part_positions, slab.positions);

  const T* const x = static_cast<const T*>(slab.x) + group * slab.x_group;
  const T* const grad =
      static_cast<const T*>(slab.grad) + group * slab.grad_group + static_cast<int64_t>(row) * slab.grad_channel;
  A* const w = static_cast<A*>(slab.w) + block * slab.w_part + group * slab.rows * slab.columns;
  Tile<Traits> tile(slab, shared, row, column);
  for (int32_t first = positions.first; first < positions.last; first += kSegment) {
    const int count = fill_windows(slab, first, positions.last, shared.windows);
    for (int64_t s = samples.first; s < samples.last; ++s) {
      A sums[Traits::kThreadRows][Traits::kThreadColumns] = {};
      tile.multiply(x + s * slab.x_sample,
                    grad + s * slab.grad_sample + static_cast<int64_t>(first) * slab.grad_position, count, sums);
      tile.write(w + s * slab.w_sample, column, first == positions.first, sums);
    }
  }
}

// Few rows and columns a group, as in depthwise convolutions, would leave most of a tile empty. Here a warp has some
// blocks of one sample. Some lanes share each, neighbours of which read neighbouring positions; or, where channels are
// neighbours in memory, each lane has a block of its own. A number of grad_output is loaded once for kTaps offsets.

template <class T_>
struct DirectTraits {
  using T = T_;
  using A = Accumulator<T>;
  static constexpr int kThreads = 128;
  static constexpr int kWarps = kThreads / kWarp;
  static constexpr int kTaps = 9;
  static constexpr double kCost = 12;  // instructions for each multiply-add

  struct Shared {
    Place windows[kSegment];
    Place into[kTaps];
  };
};

struct Direct {
  Slab slab;
  int32_t lanes;        // of a block: a power of two
  int32_t units;        // warps' shares: some blocks of one sample
  int32_t block_units;  // that a block of threads works on
};

/// The sums of a block over a segment, in all of its lanes.
template <class Traits>
__device__ void sum_directly(const Slab& slab, const typename Traits::Shared& shared, const typename Traits::T* x,
                             const typename Traits::T* grad, int count, int taps, int lanes, bool is_one,
                             typename Traits::A (&sums)[Traits::kTaps]) {
  for (int l = threadIdx.x % lanes; is_one && l < count; l += lanes) {
    const auto g = widen(grad[static_cast<uint32_t>(l) * slab.grad_position]);
    const Place window = shared.windows[l];
#pragma unroll
    for (int t = 0; t < Traits::kTaps; ++t) {
      if (t < taps) sums[t] += g * widen(slab.read(x, window, shared.into[t]));
    }
  }
  for (int distance = lanes / 2; distance > 0; distance /= 2) {
#pragma unroll
    for (int t = 0; t < Traits::kTaps; ++t) sums[t] += __shfl_xor_sync(kAllLanes, sums[t], distance);
  }
}

template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads) direct_kernel(const __grid_constant__ Direct direct) {
  using T = typename Traits::T;
  using A = typename Traits::A;
  constexpr int kTaps = Traits::kTaps;
  const Slab& slab = direct.slab;
  auto& shared = shared_memory<typename Traits::Shared>();
  const int32_t tap_tiles = divide_up(slab.n, kTaps), unit_tiles = divide_up(direct.units, direct.block_units);
  const int32_t tap = static_cast<int32_t>(blockIdx.x % tap_tiles) * kTaps, taps = min(kTaps, slab.n - tap);
  const Range units(blockIdx.x / tap_tiles % unit_tiles, direct.block_units, direct.units);
  const int64_t part = blockIdx.x / tap_tiles / unit_tiles;
  const Range positions(part, slab.part_positions, slab.positions);
  const int lane = threadIdx.x % direct.lanes, slot = threadIdx.x % kWarp / direct.lanes;
  const int32_t blocks = slab.groups * slab.rows * slab.channels, slots = kWarp / direct.lanes;
  const int32_t block_units = divide_up(blocks, slots);  // of one sample
  for (int t = threadIdx.x; t < taps; t += Traits::kThreads) shared.into[t] = slab.into(tap + t);

  for (int32_t first = positions.first; first < positions.last; first += kSegment) {
    const int count = fill_windows(slab, first, positions.last, shared.windows);
    for (int32_t unit = units.first + threadIdx.x / kWarp; unit < units.last; unit += Traits::kWarps) {
      const int64_t sample = unit / block_units;
      const int32_t wanted = unit % block_units * slots + slot;
      const bool is_one = wanted < blocks;
      const int32_t index = is_one ? wanted : 0;
      const int32_t channel = index % slab.channels, row = index / slab.channels % slab.rows;
      const int64_t group = index / slab.channels / slab.rows;
      const T* const x = static_cast<const T*>(slab.x) + sample * slab.x_sample + group * slab.x_group +
                         static_cast<int64_t>(channel) * slab.x_channel;
      const T* const grad = static_cast<const T*>(slab.grad) + sample * slab.grad_sample + group * slab.grad_group +
                            static_cast<int64_t>(row) * slab.grad_channel +
                            static_cast<int64_t>(first) * slab.grad_position;
      A sums[kTaps] = {};
      sum_directly<Traits>(slab, shared, x, grad, count, taps, direct.lanes, is_one, sums);
      A* const w = static_cast<A*>(slab.w) + part * slab.w_part + sample * slab.w_sample +
                   static_cast<int64_t>(index) * slab.n + tap;
#pragma unroll
      for (int t = 0; t < kTaps; ++t) {
        if (is_one && t < taps && t % direct.lanes == lane) w[t] = first == positions.first ? sums[t] : w[t] + sums[t];
      }
    }
  }
}

// Parts of positions.

template <class A_>
struct PartsTraits {
  using A = A_;
  static constexpr int kVector = kVectorBytes / sizeof(A);
  static constexpr int kThreads = 256;
};

/// w[0] += w[1] + ..., one part after the other.
template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads) add_parts_kernel(const __grid_constant__ Slab slab, int32_t parts) {
  constexpr int N = Traits::kVector;
  const int64_t at = (static_cast<int64_t>(blockIdx.x) * Traits::kThreads + threadIdx.x) * N;
  if (at >= slab.w_part) return;
  auto* const w = static_cast<typename Traits::A*>(slab.w) + at;
  auto sums = load_pack<N>(w);
  for (int32_t part = 1; part < parts; ++part) {
    const auto values = load_pack<N>(w + part * slab.w_part);
#pragma unroll
    for (int i = 0; i < N; ++i) sums.at[i] += values.at[i];
  }
  store_pack<N>(w, sums);
}

// How the work is divided, by shape alone.

enum class Form { direct, wide, tall, square };

/// The form that takes the fewest instructions for the gradients of one group.
template <class T>
Form choose_form(int64_t rows, int64_t columns) {
  Form best = Form::direct;
  double least = static_cast<double>(rows * columns) * DirectTraits<T>::kCost;
  const auto consider = [&](Form form, auto traits) {
    using Traits = decltype(traits);
    const int64_t padded = divide_up<int64_t>(rows, Traits::kRows) * Traits::kRows *
                           (divide_up<int64_t>(columns, Traits::kColumns) * Traits::kColumns);
    const double cost = static_cast<double>(padded) * Traits::kCost;
    if (cost < least) least = cost, best = form;
  };
  consider(Form::wide, WideTile<T>());
  consider(Form::tall, TallTile<T>());
  consider(Form::square, SquareTile<T>());
  return best;
}

/// Blocks that follow one another in out: all of some groups, all channels of some rows of a group, or some channels of
/// a row. Sizes are the largest, the last ones of each dimension may be smaller.
struct Division {
  int64_t samples;
  int64_t groups;
  int64_t rows;
  int64_t channels;
};

Division divide(const ConvMiniBlockGram& a, int64_t n, int64_t entry_bytes) {
  const int64_t of_group = a.outputs * a.inputs, all = a.groups * of_group;
  const int64_t gradients = std::max<int64_t>(1, kWorkspace / (n * entry_bytes));  // of one block by one sample
  // Rows of a full tile if they can be had with a number of samples that is worth a pass over out.
  const int64_t wanted = std::min(all, std::min(a.outputs, kFullTile) * a.inputs);
  const int64_t samples = std::min(a.samples, std::max(kFewestSamples, gradients / wanted));
  const int64_t most = std::max<int64_t>(1, gradients / samples);
  if (most >= of_group) return {samples, std::min(a.groups, most / of_group), a.outputs, a.inputs};
  if (most < a.inputs) return {samples, 1, 1, most};
  const int64_t rows = most / a.inputs;
  return {samples, 1, rows < kFullTile ? rows : rows / kFullTile * kFullTile, a.inputs};
}

/// What all launches share.
template <class T>
Slab make_slab(const ConvMiniBlockGram& a) {
  Slab slab{};
  fill_geometry(kName, a.depth, a.height, a.width, a.x.position_stride, slab);
  const auto extent = [](const ChannelArray& array, int64_t channels, int64_t size) {
    return channels * array.channel_stride + size * array.position_stride;
  };
  const int64_t inputs = a.depth.size * a.height.size * a.width.size;
  narrow_size(kName, extent(a.x, a.inputs, inputs), "the size of a group of x");
  narrow_size(kName, extent(a.grad_output, a.outputs, slab.positions), "the size of a group of grad_output");
  slab.x_sample = a.x.sample_stride;
  slab.x_group = a.inputs * a.x.channel_stride;
  slab.x_channel = static_cast<uint32_t>(a.x.channel_stride);
  slab.grad_sample = a.grad_output.sample_stride;
  slab.grad_group = a.outputs * a.grad_output.channel_stride;
  slab.grad_channel = static_cast<uint32_t>(a.grad_output.channel_stride);
  slab.grad_position = static_cast<uint32_t>(a.grad_output.position_stride);
  slab.x_last = a.x.channel_stride <= a.x.position_stride;  // or there is one position
  slab.grad_last = a.grad_output.channel_stride <= a.grad_output.position_stride;
  return slab;
}

template <class T>
class SlabwiseGram {
  using A = Accumulator<T>;
  static constexpr int kVector = PartsTraits<A>::kVector;

 public:
  SlabwiseGram(const ConvMiniBlockGram& a, const Stream& stream)
      : a_(a),
        stream_(stream),
        slab_(make_slab<T>(a)),
        division_(divide(a, slab_.n, sizeof(A))),
        form_(choose_form<T>(a.outputs, a.inputs * slab_.n)) {
    narrow_size(kName, division_.channels * slab_.n, "the size of a row of gradients");
    resize(slab_, division_.samples, division_.groups, division_.rows, division_.channels);
    const int64_t segments = divide_up<int64_t>(slab_.positions, kSegment), blocks = grid(slab_);
    const int64_t fitting = std::max<int64_t>(1, kWorkspace / (slab_.w_part * static_cast<int64_t>(sizeof(A))));
    const int64_t parts = std::min({segments, divide_up(kSomeBlocks, blocks), fitting});
    const int64_t part_segments = divide_up(segments, parts);
    slab_.part_positions = static_cast<int32_t>(part_segments * kSegment);
    parts_ = static_cast<int32_t>(divide_up(segments, part_segments));
  }

  void operator()() {
    const Scratch workspace(stream_, parts_ * slab_.w_part * sizeof(A));
    slab_.w = workspace.as<void>();
    for (int64_t group = 0; group < a_.groups; group += division_.groups) {
      for (int64_t row = 0; row < a_.outputs; row += division_.rows) {
        for (int64_t channel = 0; channel < a_.inputs; channel += division_.channels) sum(group, row, channel);
      }
    }
  }

 private:
  /// Makes a slab one of so many.
  static void resize(Slab& slab, int64_t samples, int64_t groups, int64_t rows, int64_t channels) {
    slab.samples = static_cast<int32_t>(samples);
    slab.groups = static_cast<int32_t>(groups);
    slab.rows = static_cast<int32_t>(rows);
    slab.channels = static_cast<int32_t>(channels);
    slab.columns = static_cast<int32_t>(channels * slab.n);
    slab.w_sample = divide_up<int64_t>(groups * rows * slab.columns, kVector) * kVector;
    slab.w_part = samples * slab.w_sample;
  }

  /// Averages the blocks that begin with one into out.
  void sum(int64_t group, int64_t row, int64_t channel) {
    const int64_t groups = std::min(division_.groups, a_.groups - group);
    const int64_t rows = std::min(division_.rows, a_.outputs - row);
    const int64_t channels = std::min(division_.channels, a_.inputs - channel);
    const int64_t first_block = (group * a_.outputs + row) * a_.inputs + channel, n = slab_.n;
    for (int64_t sample = 0; sample < a_.samples; sample += division_.samples) {
      const int64_t samples = std::min(division_.samples, a_.samples - sample);
      Slab slab = slab_;
      resize(slab, samples, groups, rows, channels);
      slab.x = static_cast<const T*>(a_.x.data) + sample * slab.x_sample + group * slab.x_group +
               channel * a_.x.channel_stride;
      slab.grad = static_cast<const T*>(a_.grad_output.data) + sample * slab.grad_sample + group * slab.grad_group +
                  row * a_.grad_output.channel_stride;
      make_gradients(slab);
      mini_block_gram_({slab.w, static_cast<A*>(a_.out) + first_block * n * n, accumulation_dtype(a_.dtype), samples,
                        slab.w_sample, groups * rows * channels, n, sample == 0 ? a_.decay : 1, a_.gain, 0},
                       stream_);
    }
  }

  void make_gradients(Slab& slab) {
    const int64_t blocks = grid(slab) * parts_;
    switch (form_) {
      case Form::square: run_tiles<SquareTile<T>>(slab, blocks); break;
      case Form::tall: run_tiles<TallTile<T>>(slab, blocks); break;
      case Form::wide: run_tiles<WideTile<T>>(slab, blocks); break;
      case Form::direct: {
        using Traits = DirectTraits<T>;
        launch(kName, direct_kernel<Traits>, static_cast<unsigned>(blocks), Traits::kThreads,
               sizeof(typename Traits::Shared), stream_, direct(slab));
      }
    }
    if (parts_ == 1) return;
    using Traits = PartsTraits<A>;
    const auto adding = divide_up<int64_t>(slab.w_part, Traits::kThreads * Traits::kVector);
    launch(kName, add_parts_kernel<Traits>, static_cast<unsigned>(adding), Traits::kThreads, 0, stream_, slab, parts_);
  }

  template <class Traits>
  void run_tiles(const Slab& slab, int64_t blocks) const {
    launch(kName, tile_kernel<Traits>, static_cast<unsigned>(blocks), Traits::kThreads,
           sizeof(typename Traits::Shared), stream_, slab);
  }

  /// Blocks of threads of one part of a slab; also sets how many samples each works on.
  int64_t grid(Slab& slab) const {
    switch (form_) {
      case Form::square: return tiles<SquareTile<T>>(slab);
      case Form::tall: return tiles<TallTile<T>>(slab);
      case Form::wide: return tiles<WideTile<T>>(slab);
      case Form::direct: break;
    }
    const Direct how = direct(slab);
    return divide_up<int64_t>(how.units, how.block_units) * divide_up<int64_t>(slab.n, DirectTraits<T>::kTaps);
  }

  template <class Traits>
  static int64_t tiles(Slab& slab) {
    const int64_t tiles = divide_up<int64_t>(slab.columns, Traits::kColumns) *
                          divide_up<int64_t>(slab.rows, Traits::kRows) * slab.groups;
    slab.block_samples = static_cast<int32_t>(
        std::min(kMostSamples, std::max<int64_t>(1, tiles * slab.samples / kManyBlocks)));
    return tiles * divide_up(slab.samples, slab.block_samples);
  }

  static Direct direct(const Slab& slab) {
    const int32_t lanes = slab.x_last || slab.positions < 8 ? 1 : slab.positions < 64 ? 8 : kWarp;
    const int32_t blocks = slab.groups * slab.rows * slab.channels;
    const int32_t units = slab.samples * divide_up(blocks, kWarp / lanes);
    constexpr int32_t kWarps = DirectTraits<T>::kWarps;
    const int32_t each = static_cast<int32_t>(std::min(kMostSamples, units / (kWarps * kManyBlocks)));
    return {slab, lanes, units, kWarps * std::max(1, each)};
  }

  const ConvMiniBlockGram& a_;
  const Stream& stream_;
  Slab slab_;  // the largest
  const Division division_;
  const Form form_;
  int32_t parts_;
};

}  // namespace

void conv_mini_block_gram_(const ConvMiniBlockGram& a, const Stream& stream) {
  const DeviceGuard guard(stream);
  const int64_t n = a.depth.kernel * a.height.kernel * a.width.kernel, blocks = a.groups * a.outputs * a.inputs;
  if (blocks == 0) return;
  if (a.samples * a.depth.outputs * a.height.outputs * a.width.outputs == 0) {
    return mini_block_gram_({nullptr, a.out, accumulation_dtype(a.dtype), 0, blocks * n, blocks, n, a.decay, a.gain, 0},
                            stream);
  }
  for_type(a.dtype, [&](auto type) { SlabwiseGram<typename decltype(type)::type>(a, stream)(); });
}

}  // namespace fisher_kernels::cuda
