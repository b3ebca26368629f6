#include <cstdint>

#include "../kernels.h"
#include "integers.h"
#include "parallel.h"
#include "scratch.h"
#include "vector.h"

// Runs of a few dozen squares are summed in Accumulator<T>, the runs in float64. What a run, a tile or a block is
// depends on the shape alone, so that any number of threads gives the same bits.
namespace fisher_kernels::FISHER_KERNELS_CAPABILITY {

namespace {

constexpr int64_t kTileBytes = 8192;    // of a row, so that a tile's accumulators stay in the first-level cache
constexpr int64_t kMinTile = 256;       // columns below which reading rows in pieces costs more than it brings
constexpr int64_t kRun = 64;            // rows summed before float64 takes over
constexpr int64_t kMinBlockRows = 256;  // rows beside which the partial sums of a block are cheap
constexpr int64_t kMaxBlocks = 16;
constexpr int64_t kWantedTasks = 8;
constexpr int64_t kCacheBytes = 1 << 20;  // what may well be in the cache already, and is not worth prefetching

template <class T>
constexpr int64_t kTile = kTileBytes / static_cast<int64_t>(sizeof(T));

/// Rows of numbers, `stride` elements apart.
template <class T>
struct Matrix {
  const T* x;
  int64_t rows;
  int64_t columns;
  int64_t stride;

  Matrix part(int64_t first_row, int64_t row_count, int64_t first_column, int64_t column_count) const {
    return {x + first_row * stride + first_column, row_count, column_count, stride};
  }
};

/// sums[j] += the squares of column j in kRows rows. Meanwhile the rows `ahead` elements farther are fetched into the
/// second-level cache: a jump from row to row is more than the hardware foresees.
template <int kRows, bool kPrefetch, class T>
inline void add_squares(const T* __restrict x, int64_t ahead, int64_t stride, int64_t columns,
                        Accumulator<T>* __restrict sums) {
  int64_t j = 0;
  for (; j + kLanes<T> <= columns; j += kLanes<T>) {
    Vector<T> sum = load(sums + j);
    for (int r = 0; r < kRows; ++r) {
      if constexpr (kPrefetch) __builtin_prefetch(x + r * stride + (j + ahead), 0, 2);
      const Vector<T> value = load(x + r * stride + j);
      sum += value * value;
    }
    store(sums + j, sum);
  }
  for (; j < columns; ++j) {
    for (int r = 0; r < kRows; ++r) {
      const Accumulator<T> value = widen(x[r * stride + j]);
      sums[j] += value * value;
    }
  }
}

/// sums[j] = the squares of column j in rows [first, end) of a tile.
template <bool kPrefetch, class T>
void sum_run(const Matrix<T>& tile, int64_t first, int64_t end, Accumulator<T>* sums) {
  for (int64_t j = 0; j < tile.columns; ++j) sums[j] = 0;
  int64_t r = first;
  for (; r + 8 <= end; r += 8) {
    const int64_t tile_beside = tile.columns - r * tile.stride;
    const int64_t ahead = r + 8 < tile.rows ? 8 * tile.stride : tile_beside;
    add_squares<8, kPrefetch>(tile.x + r * tile.stride, ahead, tile.stride, tile.columns, sums);
  }
  for (; r + 2 <= end; r += 2) add_squares<2, false>(tile.x + r * tile.stride, 0, tile.stride, tile.columns, sums);
  for (; r < end; ++r) add_squares<1, false>(tile.x + r * tile.stride, 0, tile.stride, tile.columns, sums);
}

/// out[j] = sum of the squares of column j of a tile.
template <bool kPrefetch, class T, class Out>
void sum_tile(const Matrix<T>& tile, Out* out) {
  alignas(kVectorBytes) Accumulator<T> run[kTile<T>];
  if (tile.rows <= kRun) {
    sum_run<kPrefetch>(tile, 0, tile.rows, run);
    for (int64_t j = 0; j < tile.columns; ++j) out[j] = static_cast<Out>(run[j]);
    return;
  }
  alignas(kVectorBytes) double total[kTile<T>];
  for (int64_t j = 0; j < tile.columns; ++j) total[j] = 0;
  for (int64_t first = 0; first < tile.rows; first += kRun) {
    sum_run<kPrefetch>(tile, first, smaller(first + kRun, tile.rows), run);
    for (int64_t j = 0; j < tile.columns; ++j) total[j] += run[j];
  }
  for (int64_t j = 0; j < tile.columns; ++j) out[j] = static_cast<Out>(total[j]);
}

/// out[j] = sum over i of x[i, j].
template <class Out>
void sum_over_rows(const double* x, int64_t rows, int64_t columns, Out* out) {
  constexpr int64_t kWidth = 64;
  for (int64_t first = 0; first < columns; first += kWidth) {
    const int64_t width = smaller(kWidth, columns - first);
    double sums[kWidth] = {};
    for (int64_t i = 0; i < rows; ++i) {
      for (int64_t j = 0; j < width; ++j) sums[j] += x[i * columns + first + j];
    }
    for (int64_t j = 0; j < width; ++j) out[first + j] = static_cast<Out>(sums[j]);
  }
}

/// out[i] = sum over j of x[i, j].
template <class Out>
void sum_over_columns(const double* x, int64_t rows, int64_t columns, Out* out) {
  for (int64_t i = 0; i < rows; ++i) {
    double sum = 0;
    for (int64_t j = 0; j < columns; ++j) sum += x[i * columns + j];
    out[i] = static_cast<Out>(sum);
  }
}

/// out[j] = sum of the squares of column j: blocks of rows times tiles of columns, then the sum over the blocks.
template <class T, class Out>
void sum_wide_columns(const Matrix<T>& matrix, Out* out, int threads) {
  const int64_t size = matrix.rows * matrix.columns;
  const int64_t blocks = larger(1, smaller(matrix.rows / kMinBlockRows, kMaxBlocks));
  const int64_t block_rows = ceil_div(matrix.rows, blocks);
  const int64_t wanted_tiles = larger(ceil_div(kWantedTasks, blocks), ceil_div(matrix.columns, kTile<T>));
  const int64_t even_width = ceil_div(ceil_div(matrix.columns, wanted_tiles), kLanes<T>) * kLanes<T>;
  const int64_t width = smaller(kTile<T>, larger(kMinTile, even_width));
  const int64_t tiles = ceil_div(matrix.columns, width);
  const bool prefetch = size * static_cast<int64_t>(sizeof(T)) > kCacheBytes;
  const auto sum_blocks = [&](auto* sums) {  // [blocks, columns]
    parallel_for(useful_threads(size, threads), blocks * tiles, [&](int, int64_t begin, int64_t end) {
      for (int64_t task = begin; task < end; ++task) {
        const int64_t row = smaller(task / tiles * block_rows, matrix.rows), column = task % tiles * width;
        const int64_t rows = smaller(block_rows, matrix.rows - row), columns = smaller(width, matrix.columns - column);
        const Matrix<T> tile = matrix.part(row, rows, column, columns);
        auto* const tile_sums = sums + task / tiles * matrix.columns + column;
        prefetch ? sum_tile<true>(tile, tile_sums) : sum_tile<false>(tile, tile_sums);
      }
    });
  };
  if (blocks == 1) return sum_blocks(out);
  const Scratch<double> partial(blocks * matrix.columns);
  sum_blocks(partial.data());
  sum_over_rows(partial.data(), blocks, matrix.columns, out);
}

/// How many rows of a narrow matrix without gaps to read as one, so that they fill whole registers and tiles.
template <class T>
int64_t rows_to_join(const Matrix<T>& matrix) {
  if (matrix.stride != matrix.columns || matrix.columns == 0 || matrix.columns >= kTile<T>) return 1;
  int64_t joined = 1;
  while (joined * matrix.columns % kLanes<T> != 0) joined *= 2;
  while (joined * matrix.columns < kTile<T> && joined * kRun < matrix.rows) joined *= 2;
  return joined * 4 <= matrix.rows ? joined : 1;
}

/// out[j] = sum of the squares of column j.
template <class T, class Out>
void sum_columns(const Matrix<T>& matrix, Out* out, int threads) {
  const int64_t joined = rows_to_join(matrix), columns = matrix.columns;
  if (joined == 1) return sum_wide_columns(matrix, out, threads);
  const int64_t wide_rows = matrix.rows / joined, read = wide_rows * joined;
  const Scratch<double> partial((joined + 1) * columns);
  sum_wide_columns(Matrix<T>{matrix.x, wide_rows, joined * columns, joined * columns}, partial.data(), threads);
  sum_wide_columns(matrix.part(read, matrix.rows - read, 0, columns), partial.data() + joined * columns, 1);
  sum_over_rows(partial.data(), joined + 1, columns, out);
}

/// The sum of the squares of x[0 .. size).
template <class T>
double sum_row(const T* x, int64_t size) {
  constexpr int kSums = 4;  // independent, to hide the latency of an addition
  constexpr int64_t kStep = kSums * kLanes<T>;
  constexpr int64_t kPrefetch = 2048 / sizeof(T);  // elements ahead, farther than the hardware looks
  Vector<T> sums[kSums] = {};
  int64_t i = 0;
  for (; i + kStep <= size; i += kStep) {
    for (int k = 0; k < kSums; ++k) {
      __builtin_prefetch(x + i + k * kLanes<T> + kPrefetch, 0, 2);
      const Vector<T> value = load(x + i + k * kLanes<T>);
      sums[k] += value * value;
    }
  }
  for (; i + kLanes<T> <= size; i += kLanes<T>) {
    const Vector<T> value = load(x + i);
    sums[0] += value * value;
  }
  Accumulator<T> rest = 0;
  for (; i < size; ++i) {
    const Accumulator<T> value = widen(x[i]);
    rest += value * value;
  }
  return sum_lanes<Accumulator<T>>((sums[0] + sums[1]) + (sums[2] + sums[3])) + rest;
}

/// out[c] = sum over n and s of x[n, c, s]^2, for rows of s long enough to be summed one by one.
template <class T, class Out>
void sum_long_channels(const T* x, int64_t samples, int64_t channels, int64_t positions, Out* out, int threads) {
  constexpr int64_t kPiece = kRun * 4 * kLanes<T>;
  const int64_t pieces = ceil_div(positions, kPiece), rows = samples * channels;
  const Scratch<double> partial(rows * pieces);  // [samples, channels, pieces]
  double* const sums = partial.data();
  parallel_for(useful_threads(rows * positions, threads), rows * pieces, [&](int, int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t first = i % pieces * kPiece;
      sums[i] = sum_row(x + i / pieces * positions + first, smaller(kPiece, positions - first));
    }
  });
  if (pieces == 1) return sum_over_rows(sums, samples, channels, out);
  const Scratch<double> by_piece(channels * pieces);
  sum_over_rows(sums, samples, channels * pieces, by_piece.data());
  sum_over_columns(by_piece.data(), channels, pieces, out);
}

/// The same for short rows: samples first, then positions.
template <class T, class Out>
void sum_short_channels(const T* x, int64_t samples, int64_t channels, int64_t positions, Out* out, int threads) {
  const Scratch<double> sums(channels * positions);
  sum_columns(Matrix<T>{x, samples, channels * positions, channels * positions}, sums.data(), threads);
  sum_over_columns(sums.data(), channels, positions, out);
}

/// Rows first, first + stride, ... where the context tells the stride.
struct Rows {
  int64_t first = 0;
  int64_t count = 0;
};

/// out[i] = start[i] + sum over the rows r of both parts of x[r * step + i], for i < size; a null start being zeros.
void add_rows(const double* start, const double* x, int64_t step, int64_t stride, const Rows (&parts)[2], int64_t size,
              double* out) {
  constexpr int kStep = kLanes<double>;
  const int64_t jump = stride * step;
  const auto add = [&](auto width, int64_t i) {
    Vector<double> sums[width];
    for (int k = 0; k < width; ++k) sums[k] = start ? load(start + i + k * kStep) : Vector<double>{};
    for (const Rows& rows : parts) {
      const double* row = x + rows.first * step + i;
      for (int64_t r = 0; r < rows.count; ++r, row += jump) {
        for (int k = 0; k < width; ++k) sums[k] += load(row + k * kStep);
      }
    }
    for (int k = 0; k < width; ++k) store(out + i + k * kStep, sums[k]);
  };
  int64_t i = 0;  // several registers side by side, so that additions overlap and few cache lines are visited twice
  for (; i + 8 * kStep <= size; i += 8 * kStep) add(std::integral_constant<int, 8>{}, i);
  for (; i + 4 * kStep <= size; i += 4 * kStep) add(std::integral_constant<int, 4>{}, i);
  for (; i + kStep <= size; i += kStep) add(std::integral_constant<int, 1>{}, i);
  for (; i < size; ++i) {
    double sums[4] = {start ? start[i] : 0.0};  // independent, to hide the latency of an addition
    for (const Rows& rows : parts) {
      const double* const row = x + rows.first * step + i;
      int64_t r = 0;
      for (; r + 4 <= rows.count; r += 4) {
        for (int k = 0; k < 4; ++k) sums[k] += row[(r + k) * jump];
      }
      for (; r < rows.count; ++r) sums[0] += row[r * jump];
    }
    out[i] = (sums[0] + sums[1]) + (sums[2] + sums[3]);
  }
}

/// Sums over the windows of one dimension, for lines of numbers at each of its positions. Kernel offsets that read the
/// same positions but for the borders share one sum of what they have in common, to which each adds its own. (Nothing
/// is ever subtracted: an infinity at the border must not spoil the rest.)
class WindowSums {
 public:
  explicit WindowSums(const Window& window) : window_(window), offsets_(window.kernel) {
    while (period_ < window.kernel && period_ * window.dilation % window.stride != 0) ++period_;
    for (int64_t k = 0; k < smaller(period_, window.kernel); ++k) split(k);
  }

  /// True if the one offset reads the one position.
  bool is_trivial() const {
    return window_.size == 1 && window_.kernel == 1 && window_.outputs == 1 && window_.before == 0;
  }

  /// out[k * out_step + i] = sum over the positions p that offset k reads of x[p * step + i], for i < size.
  void operator()(const double* x, int64_t step, int64_t size, double* out, int64_t out_step) const {
    const int64_t stride = window_.stride;
    for (int64_t k = 0; k < window_.kernel; ++k) {
      const Offset& offset = offsets_.data()[k];
      if (k < period_) {
        add_rows(nullptr, x, step, stride, {offset.common, {}}, size, out + k * out_step);
      } else {
        add_rows(out + k % period_ * out_step, x, step, stride, {offset.before, offset.after}, size,
                 out + k * out_step);
      }
    }
    for (int64_t k = 0; k < smaller(period_, window_.kernel); ++k) {
      const Offset& offset = offsets_.data()[k];
      if (offset.before.count + offset.after.count == 0) continue;
      double* const sums = out + k * out_step;
      add_rows(sums, x, step, stride, {offset.before, offset.after}, size, sums);
    }
  }

 private:
  /// The positions that a kernel offset reads: those it has in common with the offsets a multiple of the period away,
  /// those before and those after.
  struct Offset {
    Rows before;
    Rows common;
    Rows after;
  };

  /// The positions that offset k reads.
  Rows read_by(int64_t k) const {
    const int64_t shift = k * window_.dilation - window_.before, stride = window_.stride;  // where output 0 reads
    const int64_t skipped = shift < 0 ? smaller(ceil_div(-shift, stride), window_.outputs) : 0;
    const int64_t first = shift + skipped * stride;
    const int64_t inside = first < window_.size ? ceil_div(window_.size - first, stride) : 0;
    return {first, larger(0, smaller(window_.outputs - skipped, inside))};
  }

  /// Splits what offsets k, k + period, ... read.
  void split(int64_t k) {
    const int64_t stride = window_.stride;
    const auto end = [&](const Rows& rows) { return rows.first + rows.count * stride; };
    int64_t first = read_by(k).first, last = end(read_by(k));
    for (int64_t other = k; other < window_.kernel; other += period_) {
      first = larger(first, read_by(other).first);
      last = smaller(last, end(read_by(other)));
    }
    for (int64_t other = k; other < window_.kernel; other += period_) {
      const Rows rows = read_by(other);
      Offset& offset = offsets_.data()[other];
      offset = {rows, {}, {}};
      if (first >= last) continue;  // nothing in common
      offset.before.count = (first - rows.first) / stride;
      offset.common = {first, (last - first) / stride};
      offset.after = {last, (end(rows) - last) / stride};
    }
  }

  const Window& window_;
  Scratch<Offset> offsets_;
  int64_t period_ = 1;
};

/// The windows of all three dimensions, one dimension at a time, from squares summed over the samples. Channels are
/// done in groups of `lanes`, which lie side by side while the width is summed.
class PatchSums {
 public:
  PatchSums(const PatchSumOfSquares& a, const double* squares)
      : squares_(squares),
        channels_(a.channels),
        channels_last_(a.channels_last),
        lanes_(a.channels_last              ? kLastLanes
               : a.channels >= kFewChannels ? kFirstLanes
                                            : 1),
        depth_(a.depth),
        height_(a.height),
        width_(a.width),
        depths_(a.depth.kernel),
        heights_(a.height.kernel),
        widths_(a.width.kernel),
        lines_(a.height.size),
        line_(a.width.size),
        positions_(a.depth.size * lines_ * line_) {}

  int64_t groups() const { return ceil_div(channels_, lanes_); }

  int64_t scratch_size() const {
    return (depths_ * lines_ * line_ + depths_ * heights_ * (2 * line_ + widths_)) * lanes_;
  }

  template <class Out>
  void operator()(int64_t group, double* scratch, Out* out) const {
    const int64_t first = group * lanes_, lanes = smaller(lanes_, channels_ - first);
    double* const by_height = scratch;                                        // [depths, heights, line, lanes]
    double* const by_width = by_height + depths_ * heights_ * line_ * lanes;  // [depths, heights, widths, lanes]
    double* const rest = by_width + depths_ * heights_ * widths_ * lanes;
    if (channels_last_) {
      sum_depth_and_height(squares_ + first, channels_, lanes, rest, by_height);
    } else if (lanes == 1) {
      sum_depth_and_height(squares_ + first * positions_, 1, 1, rest, by_height);
    } else {
      const int64_t size = depths_ * heights_ * line_;
      for (int64_t c = 0; c < lanes; ++c) {
        sum_depth_and_height(squares_ + (first + c) * positions_, 1, 1, rest + size, rest);
        for (int64_t i = 0; i < size; ++i) by_height[i * lanes + c] = rest[i];
      }
    }
    for (int64_t d = 0; d < depths_ * heights_; ++d) {
      width_(by_height + d * line_ * lanes, lanes, lanes, by_width + d * widths_ * lanes, lanes);
    }
    const int64_t offsets = depths_ * heights_ * widths_;
    for (int64_t k = 0; k < offsets; ++k) {
      for (int64_t c = 0; c < lanes; ++c) out[(first + c) * offsets + k] = static_cast<Out>(by_width[k * lanes + c]);
    }
  }

 private:
  static constexpr int64_t kLastLanes = 32;
  static constexpr int64_t kFirstLanes = 8;
  static constexpr int64_t kFewChannels = 32;

  /// out [depths, heights, line, lanes] from x [depth, height, width, lanes], the positions of which are `step` apart.
  void sum_depth_and_height(const double* x, int64_t step, int64_t lanes, double* by_depth, double* out) const {
    const int64_t line = line_ * lanes, plane = lines_ * line;
    if (!depth_.is_trivial()) {
      sum_windows(depth_, x, lines_ * line_, step, lanes, by_depth, plane);
      x = by_depth;
      step = lanes;
    }
    for (int64_t d = 0; d < depths_; ++d) {
      sum_windows(height_, x + d * lines_ * line_ * step, line_, step, lanes, out + d * heights_ * line, line);
    }
  }

  /// Windows over a dimension each position of which holds `count` groups of `lanes` numbers, the groups `step` apart.
  static void sum_windows(const WindowSums& windows, const double* x, int64_t count, int64_t step, int64_t lanes,
                          double* out, int64_t out_step) {
    if (step == lanes) return windows(x, count * step, count * lanes, out, out_step);
    for (int64_t i = 0; i < count; ++i) windows(x + i * step, count * step, lanes, out + i * lanes, out_step);
  }

  const double* const squares_;
  const int64_t channels_;
  const bool channels_last_;
  const int64_t lanes_;
  const WindowSums depth_, height_, width_;
  const int64_t depths_, heights_, widths_;  // kernel sizes
  const int64_t lines_, line_;               // positions in a plane
  const int64_t positions_;
};

template <class T, class Out>
void sum_patches(const PatchSumOfSquares& a, Out* out) {
  const int64_t size = a.channels * a.depth.size * a.height.size * a.width.size;
  const Scratch<double> squares(size);
  sum_columns(Matrix<T>{static_cast<const T*>(a.x), a.samples, size, a.sample_stride}, squares.data(), a.threads);

  const PatchSums sum_windows(a, squares.data());
  const int threads = useful_threads(size, a.threads);
  const Scratch<double> scratch(threads * sum_windows.scratch_size());
  parallel_for(threads, sum_windows.groups(), [&](int thread, int64_t begin, int64_t end) {
    for (int64_t group = begin; group < end; ++group) {
      sum_windows(group, scratch.data() + thread * sum_windows.scratch_size(), out);
    }
  });
}

}  // namespace

void column_sum_of_squares(const ColumnSumOfSquares& a) {
  with_type(a.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    sum_columns(Matrix<T>{static_cast<const T*>(a.x), a.rows, a.columns, a.row_stride},
                static_cast<Accumulator<T>*>(a.out), a.threads);
  });
}

void channel_sum_of_squares(const ChannelSumOfSquares& a) {
  constexpr int64_t kLongRow = 128;
  with_type(a.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const T* const x = static_cast<const T*>(a.x);
    auto* const out = static_cast<Accumulator<T>*>(a.out);
    if (a.channels_last) {
      sum_columns(Matrix<T>{x, a.samples * a.positions, a.channels, a.channels}, out, a.threads);
    } else if (a.positions >= kLongRow) {
      sum_long_channels(x, a.samples, a.channels, a.positions, out, a.threads);
    } else {
      sum_short_channels(x, a.samples, a.channels, a.positions, out, a.threads);
    }
  });
}

void patch_sum_of_squares(const PatchSumOfSquares& a) {
  with_type(a.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    sum_patches<T>(a, static_cast<Accumulator<T>*>(a.out));
  });
}

}  // namespace fisher_kernels::FISHER_KERNELS_CAPABILITY
