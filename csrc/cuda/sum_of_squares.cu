#include <algorithm>
#include <stdexcept>
#include <string>

#include "kernels.h"
#include "launch.cuh"
#include "reduce.cuh"

// Sums of squares: one read of x, 16 bytes a load, and partial sums, which are a few hundredths of it and less where it
// is large. All but long runs of one channel is the sum of squares of the columns of a matrix. What a thread, a block
// and a tile add up depends on shapes alone; whether packs or single elements are loaded changes no sum.
namespace fisher_kernels::cuda {

namespace {

// ---- Columns of a matrix.

template <class T_>
struct ColumnTraits {
  using T = T_;
  using A = Accumulator<T>;
  static constexpr int kVector = kVectorBytes / sizeof(T);  // columns of a thread
  static constexpr int kThreads = 256;
  static constexpr int kBlocksAtOnce = 3;  // on a multiprocessor: 96 KB in flight
  static constexpr int kRun = 8;           // rows that are in flight, and added before what came before
  static constexpr int kMostRounds = 128;  // rows that a thread adds: 8 roundings in a run, 16 of runs, 11 in the tree
  struct Shared {
    A sums[kThreads * kVector];
  };
  static_assert(kMostRounds % kRun == 0 && kVector * sizeof(T) == kVectorBytes);
};

constexpr int kDown = 8;         // threads below each other, if there are as many lines, so that 32 read 512 bytes
constexpr int kMostAcross = 64;  // threads beside each other, if those can read a whole line
constexpr int kBlocks = 1024;    // enough for every device: from there on a thread adds more lines

/// A matrix, each of its lines being one row or, without gaps, a few rows: as many as begin at a multiple of 16 bytes.
struct ColumnSums {
  const void* x;
  void* out;        // [blocks, width / folded]
  int64_t stride;   // from line to line, in elements
  int64_t lines;
  int64_t width;    // of a line
  int64_t last;     // elements of the last line that are there
  int64_t tiles;    // in a line
  int32_t rounds;   // lines that a thread adds
  int32_t across;   // threads beside each other
  int32_t down;     // threads below each other
  int32_t folded;   // rows of a line that a block adds up: all of them, if it has the whole line
  bool aligned;     // every line begins at a multiple of 16 bytes
};

template <class T>
__device__ inline Accumulator<T> square(T x) {
  const Accumulator<T> value = widen(x);
  return value * value;
}

/// The squares of some elements of one column, in their order. Those that are missing count nothing.
template <int N, class T, class At>
__device__ inline Accumulator<T> sum_run(At at) {
  Accumulator<T> sum = 0;
#pragma unroll
  for (int j = 0; j < N; ++j) sum += square<T>(at(j));
  return sum;
}

template <class T, int N>
__device__ inline Pack<T, N> zeros() {
  Pack<T, N> pack;
#pragma unroll
  for (int k = 0; k < N; ++k) pack.at[k] = narrow<T>(0);
  return pack;
}

/// Adds `count` lines, `step` elements apart, to the sums of columns that lie side by side, 16 bytes a load.
template <class Traits>
__device__ inline void add_packs(const typename Traits::T* x, int64_t step, int count, typename Traits::A* sums) {
  using T = typename Traits::T;
  constexpr int N = Traits::kRun, V = Traits::kVector;
  for (int i = 0; i < count; i += N, x += N * step) {
    Pack<T, V> packs[N];
#pragma unroll
    for (int j = 0; j < N; ++j) packs[j] = i + j < count ? load_pack<V>(x + j * step) : zeros<T, V>();
#pragma unroll
    for (int k = 0; k < V; ++k) sums[k] += sum_run<N, T>([&](int j) { return packs[j].at[k]; });
  }
}

/// The same for columns that are `apart`, as far as they are below `width`: one after the other, element by element.
template <class Traits>
__device__ inline void add_elements(const typename Traits::T* x, int64_t step, int count, int apart, int width,
                                    typename Traits::A* sums) {
  using T = typename Traits::T;
  constexpr int N = Traits::kRun;
#pragma unroll
  for (int k = 0; k < Traits::kVector; ++k) {
    if (k * apart >= width) continue;
    const T* from = x + k * apart;
    for (int i = 0; i < count; i += N, from += N * step) {
      T column[N];
#pragma unroll
      for (int j = 0; j < N; ++j) column[j] = i + j < count ? from[j * step] : narrow<T>(0);
      sums[k] += sum_run<N, T>([&](int j) { return column[j]; });
    }
  }
}

/// Adds up the rows of a matrix in shared memory into its first row, in pairs. All threads call it.
template <int kThreads, class A>
__device__ inline void add_shared_rows(A* sums, int rows, int columns) {
  __syncthreads();
  while (rows > 1) {
    const int kept = (rows + 1) / 2, added = (rows - kept) * columns;
    for (int i = threadIdx.x; i < added; i += kThreads) sums[i] += sums[kept * columns + i];
    rows = kept;
    __syncthreads();
  }
}

/// A block adds up to `rounds * down` lines of a tile. A warp reads 512 contiguous bytes of wide lines, and of narrow
/// ones without gaps likewise, as several lines.
template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads, Traits::kBlocksAtOnce)
    sum_columns_kernel(const __grid_constant__ ColumnSums p) {
  using T = typename Traits::T;
  using A = typename Traits::A;
  constexpr int V = Traits::kVector;
  auto& sums = shared_memory<typename Traits::Shared>().sums;  // [down, across * V]
  const int i = threadIdx.x % p.across, row = threadIdx.x / p.across, tile = p.across * V;
  const int64_t block = blockIdx.x / p.tiles, column = blockIdx.x % p.tiles * tile;
  const int64_t first = block * p.rounds * p.down;
  const int lines = static_cast<int>(min(p.lines - first, static_cast<int64_t>(p.rounds) * p.down));
  const int width = static_cast<int>(min(p.width - column, static_cast<int64_t>(tile)));
  const bool is_cut = first + lines == p.lines && p.last < p.width;  // the last line, which is then in this block
  const int whole = lines - is_cut;
  const bool packed = p.aligned && width % V == 0;
  const int at = packed ? i * V : i, apart = packed ? 1 : p.across;  // the columns of this thread
  if (row < p.down) {
    A mine[V] = {};
    const T* const x = static_cast<const T*>(p.x) + (first + row) * p.stride + column + at;
    const int count = whole > row ? (whole - row + p.down - 1) / p.down : 0;
    if (!packed) {
      add_elements<Traits>(x, p.down * p.stride, count, apart, width - at, mine);
    } else if (at < width) {
      add_packs<Traits>(x, p.down * p.stride, count, mine);
    }
    if (is_cut && row == whole % p.down) {
      const int64_t left = min(p.last - column, static_cast<int64_t>(width)) - at;
      const T* const line = x + count * p.down * p.stride;
#pragma unroll
      for (int k = 0; k < V; ++k) {
        if (k * apart < left) mine[k] += square(line[k * apart]);
      }
    }
#pragma unroll
    for (int k = 0; k < V; ++k) sums[row * tile + at + k * apart] = mine[k];
  }
  const int columns = tile / p.folded;
  add_shared_rows<Traits::kThreads>(sums, p.down * p.folded, columns);
  A* const out = static_cast<A*>(p.out) + block * (p.width / p.folded) + column;
  for (int c = threadIdx.x; c < min(columns, width); c += Traits::kThreads) out[c] = sums[c];
}

// ---- Sums of partial sums, in float64.

constexpr int kAddThreads = 512;
constexpr int kAddRows = 8;  // in flight

struct RowSums {
  const void* x;  // [rows, columns]
  void* out;      // [columns]
  int64_t rows;
  int64_t columns;
  int32_t across;  // columns of a block
};

template <class A>
__global__ void __launch_bounds__(kAddThreads) add_rows_kernel(const __grid_constant__ RowSums p) {
  auto& sums = shared_memory<double[kAddThreads]>();
  const int down = kAddThreads / p.across, row = threadIdx.x / p.across;
  const int64_t column = static_cast<int64_t>(blockIdx.x) * p.across + threadIdx.x % p.across;
  double sum = 0;
  if (column < p.columns) {
    const A* const x = static_cast<const A*>(p.x) + column;
    for (int64_t first = row; first < p.rows; first += kAddRows * down) {
      A values[kAddRows];
#pragma unroll
      for (int j = 0; j < kAddRows; ++j) {
        const int64_t r = first + j * down;
        values[j] = r < p.rows ? x[r * p.columns] : A(0);
      }
#pragma unroll
      for (int j = 0; j < kAddRows; ++j) sum += values[j];
    }
  }
  sums[threadIdx.x] = sum;
  add_shared_rows<kAddThreads>(sums, down, p.across);
  if (row == 0 && column < p.columns) static_cast<A*>(p.out)[column] = static_cast<A>(sums[threadIdx.x]);
}

/// out[j] = sum over i of x[i, j].
template <class A>
void add_rows(const char* name, const A* x, int64_t rows, int64_t columns, A* out, const Stream& stream) {
  // 32 bytes of a row where there are many, so that many threads share a column.
  const int across = rows > 64 ? 8 : kWarp;
  const RowSums sums{x, out, rows, columns, across};
  launch(name, add_rows_kernel<A>, divide_up<int64_t>(columns, across), kAddThreads, sizeof(double[kAddThreads]),
         stream, sums);
}

constexpr int kRunThreads = 256;

struct RunSums {
  const void* x;  // [outer, channels, inner]
  void* out;      // [channels]
  int64_t outer;
  int64_t channels;
  int64_t inner;
  int32_t lanes;  // threads that share a channel: a warp or all
};

template <class A>
__global__ void __launch_bounds__(kRunThreads) add_runs_kernel(const __grid_constant__ RunSums p) {
  auto& partials = shared_memory<double[kRunThreads / kWarp]>();
  const int lane = threadIdx.x % p.lanes;
  const int64_t channel = static_cast<int64_t>(blockIdx.x) * (kRunThreads / p.lanes) + threadIdx.x / p.lanes;
  double sum = 0;
  if (channel < p.channels && p.inner > 0) {
    const int64_t down = p.lanes / p.inner, along = p.lanes % p.inner;  // what one step of all lanes is
    int64_t o = lane / p.inner, i = lane % p.inner;
#pragma unroll 4
    while (o < p.outer) {
      sum += static_cast<const A*>(p.x)[(o * p.channels + channel) * p.inner + i];
      o += down;
      i += along;
      if (i >= p.inner) {
        i -= p.inner;
        ++o;
      }
    }
  }
  sum = p.lanes == kWarp ? warp_sum(sum) : block_sum(sum, partials);
  if (lane == 0 && channel < p.channels) static_cast<A*>(p.out)[channel] = static_cast<A>(sum);
}

/// out[c] = sum over o and i of x[o, c, i].
template <class A>
void add_runs(const char* name, const A* x, int64_t outer, int64_t channels, int64_t inner, A* out,
              const Stream& stream) {
  const int lanes = outer * inner <= 16 * kWarp ? kWarp : kRunThreads;
  const RunSums sums{x, out, outer, channels, inner, lanes};
  launch(name, add_runs_kernel<A>, divide_up<int64_t>(channels, kRunThreads / lanes), kRunThreads,
         sizeof(double[kRunThreads / kWarp]), stream, sums);
}

/// The largest power of two that is at most `value`, or 1.
int64_t power_of_two(int64_t value) {
  int64_t power = 1;
  while (2 * power <= value) power *= 2;
  return power;
}

template <class T>
struct Matrix {
  const T* x;
  int64_t rows;
  int64_t columns;
  int64_t stride;
};

/// How the rows of a matrix are read as lines and shared by threads and blocks, `out` aside.
template <class Traits>
ColumnSums plan_columns(const Matrix<typename Traits::T>& matrix) {
  constexpr int64_t V = Traits::kVector;
  int64_t joined = 1;
  if (matrix.stride == matrix.columns) {
    while (joined * matrix.columns % V != 0) joined *= 2;
    if (matrix.rows < 4 * joined) joined = 1;
  }
  const int64_t width = joined * matrix.columns, packs = divide_up(width, V);
  const int64_t lines = divide_up(matrix.rows, joined);
  int64_t down = 1;
  while (down < kDown && down < lines) down *= 2;
  int64_t across = packs;
  if (packs > std::max<int64_t>(kMostAcross, Traits::kThreads / down)) {
    // Tiles that begin where a line of the cache does, about as wide as each other.
    constexpr int64_t kCacheLine = 128 / kVectorBytes;
    const int64_t tiles = divide_up<int64_t>(packs, Traits::kThreads / down);
    across = divide_up(divide_up(packs, tiles), kCacheLine) * kCacheLine;
  }
  down = std::min(std::max<int64_t>(lines, 1), Traits::kThreads / across);
  ColumnSums sums{};
  sums.x = matrix.x;
  sums.stride = joined * matrix.stride;
  sums.lines = lines;
  sums.width = width;
  sums.last = lines == 0 ? width : width - (lines * joined - matrix.rows) * matrix.columns;
  sums.tiles = divide_up(packs, across);
  sums.across = static_cast<int32_t>(across);
  sums.down = static_cast<int32_t>(down);
  sums.folded = static_cast<int32_t>(sums.tiles == 1 ? joined : 1);
  sums.aligned = is_aligned(matrix.x) && (sums.stride % V == 0 || lines <= 1);
  const int64_t rounds = std::max<int64_t>(1, divide_up(lines, down));
  const int64_t wanted = std::clamp<int64_t>(power_of_two(rounds * sums.tiles / kBlocks), Traits::kRun,
                                             Traits::kMostRounds);
  sums.rounds = static_cast<int32_t>(divide_up(rounds, divide_up(rounds, wanted)));  // as even as they come
  return sums;
}

/// out[j] = sum of the squares of column j.
template <class T>
void sum_columns(const char* name, const Matrix<T>& matrix, Accumulator<T>* out, const Stream& stream) {
  using Traits = ColumnTraits<T>;
  using A = Accumulator<T>;
  if (matrix.columns == 0) return;
  ColumnSums sums = plan_columns<Traits>(matrix);
  const int64_t blocks = std::max<int64_t>(1, divide_up<int64_t>(sums.lines, int64_t{sums.rounds} * sums.down));
  const int64_t partial_rows = blocks * (sums.width / sums.folded / matrix.columns);
  const auto run = [&](A* to) {
    sums.out = to;
    launch(name, sum_columns_kernel<Traits>, blocks * sums.tiles, Traits::kThreads, sizeof(typename Traits::Shared),
           stream, sums);
  };
  if (partial_rows == 1) return run(out);
  const Scratch partial(stream, partial_rows * matrix.columns * sizeof(A));
  run(partial.as<A>());
  add_rows(name, partial.as<A>(), partial_rows, matrix.columns, out, stream);
}

// ---- Long runs of one channel.

template <class T_>
struct PieceTraits {
  using T = T_;
  using A = Accumulator<T>;
  static constexpr int kVector = kVectorBytes / sizeof(T);
  static constexpr int kThreads = 256;
  static constexpr int kWarps = kThreads / kWarp;
  static constexpr int kFlight = 8;                     // packs that are in flight
  static constexpr int kRound = kWarp * kVector;        // elements that a warp reads at once
  static constexpr int kPiece = 2 * kFlight * kRound;   // elements that a warp adds up
  static constexpr int kLong = 2 * kRound;              // positions from which on a run is worth a warp
};

struct PieceSums {
  const void* x;
  void* out;       // [runs, pieces]
  int64_t tasks;   // runs * pieces
  int64_t pieces;  // of a run
  int64_t size;    // of a run
  bool aligned;    // x is
};

template <bool kAligned, class T, int N>
__device__ inline Pack<T, N> load_elements(const T* from) {
  if constexpr (kAligned) {
    return load_pack<N>(from);
  } else {
    Pack<T, N> pack;
#pragma unroll
    for (int k = 0; k < N; ++k) pack.at[k] = from[k];
    return pack;
  }
}

/// The squares of elements [ahead, left) after x, which is a multiple of 16 bytes from the start of the tensor. The sum
/// over the lanes of the warp is what is wanted.
template <class Traits, bool kAligned>
__device__ typename Traits::A sum_piece(const typename Traits::T* x, int ahead, int left) {
  using T = typename Traits::T;
  using A = typename Traits::A;
  constexpr int V = Traits::kVector, N = Traits::kFlight;
  const int lane = threadIdx.x % kWarp;
  A sums[V] = {};
  for (int first = lane * V; first + V <= left; first += N * Traits::kRound) {
    Pack<T, V> packs[N];
#pragma unroll
    for (int j = 0; j < N; ++j) {
      const int at = first + j * Traits::kRound;
      packs[j] = at >= ahead && at + V <= left ? load_elements<kAligned, T, V>(x + at) : zeros<T, V>();
    }
#pragma unroll
    for (int k = 0; k < V; ++k) sums[k] += sum_run<N, T>([&](int j) { return packs[j].at[k]; });
  }
  A sum = 0;
  if (ahead > 0 && lane >= ahead && lane < min(V, left)) sum += square(x[lane]);
  const int rest = left / V * V + lane;
  if (rest < left && (ahead == 0 || rest >= V)) sum += square(x[rest]);
#pragma unroll
  for (int k = 0; k < V; ++k) sum += sums[k];
  return sum;
}

/// A warp adds up a piece of a run. Pieces begin at 16 bytes, wherever the run does.
template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads) sum_pieces_kernel(const __grid_constant__ PieceSums p) {
  using T = typename Traits::T;
  constexpr int V = Traits::kVector;
  const int64_t task = static_cast<int64_t>(blockIdx.x) * Traits::kWarps + threadIdx.x / kWarp;
  if (task >= p.tasks) return;  // a whole warp, and no barrier follows
  const int64_t begin = task / p.pieces * p.size, base = begin / V * V + task % p.pieces * Traits::kPiece;
  const int ahead = static_cast<int>(max(begin - base, int64_t{0}));
  const int left = static_cast<int>(min(begin + p.size - base, static_cast<int64_t>(Traits::kPiece)));
  const T* const x = static_cast<const T*>(p.x) + base;
  const auto mine = p.aligned ? sum_piece<Traits, true>(x, ahead, left) : sum_piece<Traits, false>(x, ahead, left);
  const auto sum = warp_sum(mine);
  if (threadIdx.x % kWarp == 0) static_cast<typename Traits::A*>(p.out)[task] = sum;
}

/// out[c] = sum over n and s of x[n, c, s]^2, run by run.
template <class T>
void sum_long_runs(const char* name, const ChannelSumOfSquares& a, const Stream& stream) {
  using Traits = PieceTraits<T>;
  using A = typename Traits::A;
  const int64_t pieces = divide_up<int64_t>(a.positions + Traits::kVector - 1, Traits::kPiece);
  const int64_t tasks = a.samples * a.channels * pieces;
  const Scratch partial(stream, tasks * sizeof(A));
  const PieceSums sums{a.x, partial.as<void>(), tasks, pieces, a.positions, is_aligned(a.x)};
  launch(name, sum_pieces_kernel<Traits>, divide_up<int64_t>(tasks, Traits::kWarps), Traits::kThreads, 0, stream, sums);
  A* const out = static_cast<A*>(a.out);
  if (pieces == 1) return add_rows(name, partial.as<A>(), a.samples, a.channels, out, stream);
  add_runs(name, partial.as<A>(), a.samples, a.channels, pieces, out, stream);
}

/// The same, samples first and then positions.
template <class T>
void sum_short_runs(const char* name, const ChannelSumOfSquares& a, const Stream& stream) {
  using A = Accumulator<T>;
  const int64_t size = a.channels * a.positions;
  const Matrix<T> matrix{static_cast<const T*>(a.x), a.samples, size, size};
  A* const out = static_cast<A*>(a.out);
  if (a.positions == 1) return sum_columns(name, matrix, out, stream);
  const Scratch by_position(stream, size * sizeof(A));
  sum_columns(name, matrix, by_position.as<A>(), stream);
  add_runs(name, by_position.as<A>(), 1, a.channels, a.positions, out, stream);
}

// ---- Windows over an image of squares that were summed over the samples. What an offset of the kernel reads is a box
// of positions, so a tile of the image is summed along its width for each offset in that dimension, and what is left
// over its lines. An offset that does not read a position leaves it out: nothing is multiplied by 0. In float64, of
// which there is little to do: x has been read, and the image is one sample.

struct WindowTraits {
  static constexpr int kThreads = 256;
  static constexpr int kOffsets = 8;   // in the width, side by side
  static constexpr int kRows = 256;    // lines of all channels of a tile
  static constexpr int kLines = 64;    // of one channel
  static constexpr int kFirst = 4096;  // numbers of a tile where positions are side by side
  static constexpr int kLast = 256;    // positions of a tile where channels are
  static_assert(kLines <= kThreads && kLines <= kRows && kRows / kWarp <= kLines);
};

struct WindowShared {
  double sums[WindowTraits::kOffsets * WindowTraits::kRows];
  int64_t depth_of[WindowTraits::kLines];
  int64_t height_of[WindowTraits::kLines];
  int32_t first[WindowTraits::kOffsets];  // position of the tile that an offset reads
  int32_t count[WindowTraits::kOffsets];  // of them
};

struct WindowSums {
  const void* x;
  void* out;  // [tiles, channels, kernel of depth, of height, of width]
  Window depth;
  Window height;
  Window width;
  int64_t channels;
  int64_t channel_stride;
  int64_t line_stride;
  int64_t position_stride;
  int64_t line_tiles;
  int64_t width_tiles;
  int32_t tile_channels;
  int32_t tile_lines;
  int32_t tile_width;
  int32_t lanes;       // threads that share a line
  int32_t line_lanes;  // threads that share what is left
  bool channels_last;
};

/// Whether an offset of the kernel reads a position in one of its windows.
__device__ inline bool is_read(const Window& window, int64_t position, int64_t offset) {
  const int64_t shift = position + window.before - offset * window.dilation;
  return shift >= 0 && shift < window.outputs * window.stride && (window.stride == 1 || shift % window.stride == 0);
}

/// What an offset reads of the `size` positions from `begin` on: the first, counted from there, and how many.
__device__ inline void find_span(const Window& window, int64_t offset, int64_t begin, int64_t size, int32_t& first,
                                 int32_t& count) {
  const int64_t shift = begin + window.before - offset * window.dilation;  // output o reads o * stride - shift
  const int64_t least = shift <= 0 ? 0 : divide_up(shift, window.stride);
  const int64_t end = shift + size <= 0 ? 0 : divide_up(shift + size, window.stride);
  const int64_t outputs = min(end, window.outputs) - least;
  first = static_cast<int32_t>(outputs > 0 ? least * window.stride - shift : 0);
  count = static_cast<int32_t>(max(outputs, int64_t{0}));
}

/// The sum over groups of so many lanes, a power of two, in each first one.
__device__ inline double group_sum(double value, int lanes) {
  for (int distance = lanes / 2; distance > 0; distance /= 2) value += __shfl_xor_sync(kAllLanes, value, distance);
  return value;
}

template <class A>
__global__ void __launch_bounds__(WindowTraits::kThreads) sum_windows_kernel(const __grid_constant__ WindowSums p) {
  using Traits = WindowTraits;
  auto& shared = shared_memory<WindowShared>();
  const int thread = threadIdx.x;
  const int64_t tiles = p.line_tiles * p.width_tiles, tile = blockIdx.x % tiles;
  const int64_t channel = blockIdx.x / tiles * p.tile_channels;
  const int64_t line = tile / p.width_tiles * p.tile_lines, position = tile % p.width_tiles * p.tile_width;
  const int channels = static_cast<int>(min(p.channels - channel, static_cast<int64_t>(p.tile_channels)));
  const int lines = static_cast<int>(min(p.depth.size * p.height.size - line, static_cast<int64_t>(p.tile_lines)));
  const int64_t width = min(p.width.size - position, static_cast<int64_t>(p.tile_width));
  const int rows = channels * lines;
  const A* const x =
      static_cast<const A*>(p.x) + channel * p.channel_stride + line * p.line_stride + position * p.position_stride;
  const uint32_t planes = static_cast<uint32_t>(p.depth.kernel * p.height.kernel);
  A* const out = static_cast<A*>(p.out) + (tile * p.channels + channel) * planes * p.width.kernel;
  if (thread < lines) {
    shared.depth_of[thread] = (line + thread) / p.height.size;
    shared.height_of[thread] = (line + thread) % p.height.size;
  }
  for (int64_t offset = 0; offset < p.width.kernel; offset += Traits::kOffsets) {
    const int offsets = static_cast<int>(min(p.width.kernel - offset, static_cast<int64_t>(Traits::kOffsets)));
    if (thread < offsets)
      find_span(p.width, offset + thread, position, width, shared.first[thread], shared.count[thread]);
    __syncthreads();

    const int lane = thread % p.lanes, groups = Traits::kThreads / p.lanes;
    for (int begin = 0; begin < rows * offsets; begin += groups) {
      const int task = begin + thread / p.lanes, row = task % rows, k = task / rows;
      double sum = 0;
      if (task < rows * offsets) {
        // Neighbours in a warp are neighbours in memory.
        const int c = p.channels_last ? row % channels : row / lines;
        const int l = p.channels_last ? row / channels : row % lines;
        const A* const from = x + c * p.channel_stride + l * p.line_stride + shared.first[k] * p.position_stride;
        const int64_t step = p.width.stride * p.position_stride;
#pragma unroll 4
        for (int o = lane; o < shared.count[k]; o += p.lanes) sum += from[o * step];
      }
      sum = group_sum(sum, p.lanes);
      if (lane == 0 && task < rows * offsets) shared.sums[k * Traits::kRows + row] = sum;
    }
    __syncthreads();

    const int line_lane = thread % p.line_lanes, line_groups = Traits::kThreads / p.line_lanes;
    const uint32_t results = planes * static_cast<uint32_t>(channels * offsets);
    for (uint32_t begin = 0; begin < results; begin += line_groups) {
      const uint32_t result = begin + thread / p.line_lanes;
      const int c = static_cast<int>(result % channels), k = static_cast<int>(result / channels % offsets);
      const uint32_t plane = result / static_cast<uint32_t>(channels * offsets);
      double sum = 0;
      if (result < results) {
        const int64_t by_depth = plane / p.height.kernel, by_height = plane % p.height.kernel;
        const double* const from = shared.sums + k * Traits::kRows + (p.channels_last ? c : c * lines);
        for (int l = line_lane; l < lines; l += p.line_lanes) {
          if (is_read(p.depth, shared.depth_of[l], by_depth) && is_read(p.height, shared.height_of[l], by_height))
            sum += from[p.channels_last ? l * channels : l];
        }
      }
      sum = group_sum(sum, p.line_lanes);
      if (line_lane == 0 && result < results)
        out[(c * static_cast<int64_t>(planes) + plane) * p.width.kernel + offset + k] = static_cast<A>(sum);
    }
    __syncthreads();
  }
}

/// A power of two of lanes for so many numbers, four or more each.
int32_t lanes_for(int64_t count, int64_t most) {
  return static_cast<int32_t>(std::min(power_of_two(divide_up<int64_t>(count, 4)), most));
}

/// How the image of one sample is cut into tiles, `x` and `out` aside.
WindowSums plan_windows(const PatchSumOfSquares& a) {
  using Traits = WindowTraits;
  const int64_t lines = a.depth.size * a.height.size, width = a.width.size, positions = lines * width;
  WindowSums sums{};
  sums.depth = a.depth;
  sums.height = a.height;
  sums.width = a.width;
  sums.channels = a.channels;
  sums.channels_last = a.channels_last;
  sums.channel_stride = a.channels_last ? 1 : positions;
  sums.line_stride = a.channels_last ? width * a.channels : width;
  sums.position_stride = a.channels_last ? a.channels : 1;
  const int64_t most = a.channels_last ? Traits::kLast : Traits::kFirst;
  const int64_t tile_width = std::clamp<int64_t>(width, 1, most);
  const int64_t most_lines = a.channels_last ? Traits::kRows / kWarp : Traits::kLines;
  const int64_t tile_lines = std::clamp<int64_t>(std::min(lines, most / tile_width), 1, most_lines);
  const int64_t beside = std::min(Traits::kLines / tile_lines, most / (tile_lines * tile_width));
  const int64_t tile_channels = std::min(a.channels, a.channels_last ? kWarp : std::max<int64_t>(1, beside));
  sums.tile_width = static_cast<int32_t>(tile_width);
  sums.tile_lines = static_cast<int32_t>(tile_lines);
  sums.tile_channels = static_cast<int32_t>(tile_channels);
  sums.line_tiles = std::max<int64_t>(1, divide_up(lines, tile_lines));
  sums.width_tiles = std::max<int64_t>(1, divide_up(width, tile_width));
  sums.lanes = lanes_for(tile_width, a.channels_last ? power_of_two(kWarp / tile_channels) : kWarp);
  sums.line_lanes = lanes_for(tile_lines, kWarp);
  return sums;
}

template <class A>
void sum_windows(const char* name, const PatchSumOfSquares& a, const A* squares, A* out, const Stream& stream) {
  using Traits = WindowTraits;
  WindowSums sums = plan_windows(a);
  const int64_t tiles = sums.line_tiles * sums.width_tiles;
  const int64_t size = a.channels * a.depth.kernel * a.height.kernel * a.width.kernel;
  const auto run = [&](A* to) {
    sums.x = squares;
    sums.out = to;
    launch(name, sum_windows_kernel<A>, tiles * divide_up<int64_t>(a.channels, sums.tile_channels), Traits::kThreads,
           sizeof(WindowShared), stream, sums);
  };
  if (tiles == 1) return run(out);
  const Scratch partial(stream, tiles * size * sizeof(A));
  run(partial.as<A>());
  add_rows(name, partial.as<A>(), tiles, size, out, stream);
}

}  // namespace

void column_sum_of_squares(const ColumnSumOfSquares& a, const Stream& stream) {
  const DeviceGuard guard(stream);
  for_type(a.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    sum_columns("column_sum_of_squares", Matrix<T>{static_cast<const T*>(a.x), a.rows, a.columns, a.row_stride},
                static_cast<Accumulator<T>*>(a.out), stream);
  });
}

void channel_sum_of_squares(const ChannelSumOfSquares& a, const Stream& stream) {
  constexpr const char* kName = "channel_sum_of_squares";
  if (a.channels == 0) return;
  const DeviceGuard guard(stream);
  for_type(a.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    if (a.channels_last) {
      const Matrix<T> matrix{static_cast<const T*>(a.x), a.samples * a.positions, a.channels, a.channels};
      sum_columns(kName, matrix, static_cast<Accumulator<T>*>(a.out), stream);
    } else if (a.positions >= PieceTraits<T>::kLong && a.samples > 0) {
      sum_long_runs<T>(kName, a, stream);
    } else {
      sum_short_runs<T>(kName, a, stream);
    }
  });
}

void patch_sum_of_squares(const PatchSumOfSquares& a, const Stream& stream) {
  constexpr const char* kName = "patch_sum_of_squares";
  constexpr int64_t kMostPlanes = int64_t{1} << 20;  // offsets in depth and height, counted in 32 bits
  if (a.depth.kernel > kMostPlanes || a.depth.kernel * a.height.kernel > kMostPlanes)
    throw std::runtime_error(std::string(kName) + ": kernel_size is too large for a GPU");
  if (a.channels == 0) return;
  const DeviceGuard guard(stream);
  for_type(a.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    using A = Accumulator<T>;
    const int64_t size = a.channels * a.depth.size * a.height.size * a.width.size;
    const Scratch squares(stream, size * sizeof(A));
    const Matrix<T> matrix{static_cast<const T*>(a.x), a.samples, size, a.sample_stride};
    sum_columns(kName, matrix, squares.as<A>(), stream);
    sum_windows(kName, a, squares.as<A>(), static_cast<A*>(a.out), stream);
  });
}

}  // namespace fisher_kernels::cuda
