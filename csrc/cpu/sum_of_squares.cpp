#include <cstdint>

#include "../kernels.h"
#include "parallel.h"
#include "scratch.h"
#include "vector.h"

// Sums of squares are exact to rounding and the same for any number of threads: runs of a few dozen squares are summed in
// Accumulator<T>, the runs in float64, and what a run, a tile or a block is depends on the shape alone.
namespace fisher_kernels::FISHER_KERNELS_CAPABILITY {

namespace {

constexpr int64_t kTile = 1024;         // columns whose accumulators stay in the first-level cache
constexpr int64_t kMinTile = 256;       // columns below which reading a row in pieces costs more than it brings
constexpr int64_t kRun = 64;            // rows summed before float64 takes over
constexpr int64_t kMinBlockRows = 256;  // rows that make the partial sums of a block cheap beside them
constexpr int64_t kMaxBlocks = 16;
constexpr int64_t kWantedTasks = 8;

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }
inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

/// Rows of numbers, `stride` elements apart.
template <class T>
struct Matrix {
  const T* x;
  int64_t rows;
  int64_t columns;
  int64_t stride;

  Matrix rows_from(int64_t first, int64_t count) const { return {x + first * stride, count, columns, stride}; }
  Matrix columns_from(int64_t first, int64_t count) const { return {x + first, rows, count, stride}; }
};

/// sums[j] += the squares of column j in kRows rows.
template <int kRows, class T>
inline void add_squares(const T* __restrict x, int64_t stride, int64_t columns, Accumulator<T>* __restrict sums) {
  int64_t j = 0;
  for (; j + kLanes<T> <= columns; j += kLanes<T>) {
    Vector<T> sum = load(sums + j);
    for (int r = 0; r < kRows; ++r) {
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

/// out[j] = sum of the squares of column j, for at most kTile columns.
template <class T, class Out>
void sum_tile(const Matrix<T>& tile, Out* out) {
  alignas(kVectorBytes) Accumulator<T> run[kTile];
  alignas(kVectorBytes) double total[kTile];
  for (int64_t j = 0; j < tile.columns; ++j) total[j] = 0;
  for (int64_t first = 0; first < tile.rows; first += kRun) {
    const int64_t end = smaller(first + kRun, tile.rows);
    for (int64_t j = 0; j < tile.columns; ++j) run[j] = 0;
    int64_t r = first;
    for (; r + 4 <= end; r += 4) add_squares<4>(tile.x + r * tile.stride, tile.stride, tile.columns, run);
    for (; r < end; ++r) add_squares<1>(tile.x + r * tile.stride, tile.stride, tile.columns, run);
    for (int64_t j = 0; j < tile.columns; ++j) total[j] += run[j];
  }
  for (int64_t j = 0; j < tile.columns; ++j) out[j] = static_cast<Out>(total[j]);
}

/// out[j] = sum over i of partial[i, j].
template <class Out>
void sum_rows(const double* partial, int64_t rows, int64_t columns, Out* out) {
  for (int64_t j = 0; j < columns; ++j) {
    double sum = 0;
    for (int64_t i = 0; i < rows; ++i) sum += partial[i * columns + j];
    out[j] = static_cast<Out>(sum);
  }
}

/// out[j] = sum of the squares of column j: blocks of rows times tiles of columns, then the sum over the blocks.
template <class T, class Out>
void sum_wide_columns(const Matrix<T>& matrix, Out* out, int threads) {
  const int64_t blocks = larger(1, smaller(matrix.rows / kMinBlockRows, kMaxBlocks));
  const int64_t block_rows = ceil_div(matrix.rows, blocks);
  const int64_t wanted = larger(ceil_div(kWantedTasks, blocks), ceil_div(matrix.columns, kTile));
  const int64_t width = smaller(kTile, larger(kMinTile, ceil_div(ceil_div(matrix.columns, wanted), 64) * 64));
  const int64_t tiles = ceil_div(matrix.columns, width);
  const auto sum_tasks = [&](auto* sums) {
    parallel_for(useful_threads(matrix.rows * matrix.columns, threads), blocks * tiles, [&](int64_t begin, int64_t end) {
      for (int64_t task = begin; task < end; ++task) {
        const int64_t block = task / tiles, first_row = smaller(block * block_rows, matrix.rows);
        const int64_t first_column = task % tiles * width;
        sum_tile(matrix.rows_from(first_row, smaller(block_rows, matrix.rows - first_row))
                     .columns_from(first_column, smaller(width, matrix.columns - first_column)),
                 sums + block * matrix.columns + first_column);
      }
    });
  };
  if (blocks == 1) return sum_tasks(out);
  const Scratch<double> partial(blocks * matrix.columns);
  sum_tasks(partial.data());
  sum_rows(partial.data(), blocks, matrix.columns, out);
}

/// How many rows of a narrow, gapless matrix to read as one, so that they fill whole registers.
template <class T>
int64_t rows_to_join(const Matrix<T>& matrix) {
  if (matrix.stride != matrix.columns || matrix.columns >= kTile || matrix.columns == 0) return 1;
  int64_t joined = 1;
  while (joined * matrix.columns % kLanes<T> != 0 || joined * matrix.columns < kMinTile) joined *= 2;
  return joined <= matrix.rows ? joined : 1;
}

/// out[j] = sum of the squares of column j.
template <class T, class Out>
void sum_columns(const Matrix<T>& matrix, Out* out, int threads) {
  const int64_t joined = rows_to_join(matrix), columns = matrix.columns;
  if (joined == 1) return sum_wide_columns(matrix, out, threads);
  const int64_t wide_rows = matrix.rows / joined, read = wide_rows * joined;
  const Scratch<double> partial((joined + 1) * columns);
  sum_wide_columns(Matrix<T>{matrix.x, wide_rows, joined * columns, joined * columns}, partial.data(), threads);
  sum_wide_columns(matrix.rows_from(read, matrix.rows - read), partial.data() + joined * columns, 1);
  sum_rows(partial.data(), joined + 1, columns, out);
}

/// The sum of the squares of x[0 .. size).
template <class T>
double sum_run(const T* x, int64_t size) {
  constexpr int kSums = 4;  // independent, to hide the latency of an addition
  constexpr int64_t kStep = kSums * kLanes<T>;
  Vector<T> sums[kSums] = {};
  int64_t i = 0;
  for (; i + kStep <= size; i += kStep) {
    for (int k = 0; k < kSums; ++k) {
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
  return sum_lanes((sums[0] + sums[1]) + (sums[2] + sums[3])) + rest;
}

/// out[c] = sum over n and s of x[n, c, s]^2, for rows of s long enough to be summed one by one.
template <class T, class Out>
void sum_long_channels(const T* x, int64_t samples, int64_t channels, int64_t positions, Out* out, int threads) {
  constexpr int64_t kPiece = kRun * 4 * kLanes<T>;
  const int64_t pieces = ceil_div(positions, kPiece), rows = samples * channels;
  const Scratch<double> partial(rows * pieces);  // [samples, channels, pieces]
  double* const sums = partial.data();
  parallel_for(useful_threads(rows * positions, threads), rows * pieces, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t first = i % pieces * kPiece;
      sums[i] = sum_run(x + i / pieces * positions + first, smaller(kPiece, positions - first));
    }
  });
  for (int64_t c = 0; c < channels; ++c) {
    double sum = 0;
    for (int64_t n = 0; n < samples; ++n) {
      for (int64_t p = 0; p < pieces; ++p) sum += sums[(n * channels + c) * pieces + p];
    }
    out[c] = static_cast<Out>(sum);
  }
}

/// The same for short rows: samples first, then positions.
template <class T, class Out>
void sum_short_channels(const T* x, int64_t samples, int64_t channels, int64_t positions, Out* out, int threads) {
  const Scratch<double> sums(channels * positions);
  sum_columns(Matrix<T>{x, samples, channels * positions, channels * positions}, sums.data(), threads);
  for (int64_t c = 0; c < channels; ++c) {
    double sum = 0;
    for (int64_t s = 0; s < positions; ++s) sum += sums.data()[c * positions + s];
    out[c] = static_cast<Out>(sum);
  }
}

/// The sum of `count` numbers `step` apart.
inline double sum_strided(const double* x, int64_t step, int64_t count) {
  double sums[4] = {};  // independent, to hide the latency of an addition
  int64_t i = 0;
  for (; i + 4 <= count; i += 4) {
    for (int k = 0; k < 4; ++k) sums[k] += x[(i + k) * step];
  }
  for (; i < count; ++i) sums[0] += x[i * step];
  return (sums[0] + sums[1]) + (sums[2] + sums[3]);
}

/// out[k, i] = sum over output positions o of x[o * stride + k * dilation - before, i], for vectors of `size` numbers that
/// lie `step` apart in x.
void sum_windows(const double* x, int64_t step, int64_t size, const Window& window, double* out) {
  for (int64_t k = 0; k < window.kernel; ++k) {
    const int64_t shift = k * window.dilation - window.before;  // the input position of output position 0
    const int64_t first = shift < 0 ? ceil_div(-shift, window.stride) : 0;
    const int64_t end = shift < window.size ? smaller(window.outputs, (window.size - 1 - shift) / window.stride + 1) : 0;
    const int64_t count = larger(0, end - first), jump = window.stride * step;
    const double* const start = x + (first * window.stride + shift) * step;
    int64_t i = 0;
    for (; i + kLanes<double> <= size; i += kLanes<double>) {
      Vector<double> sum = {};
      for (int64_t o = 0; o < count; ++o) sum += load(start + o * jump + i);
      store(out + k * size + i, sum);
    }
    for (; i < size; ++i) out[k * size + i] = sum_strided(start + i, jump, count);
  }
}

template <class T, class Out>
void sum_patches(const PatchSumOfSquares& a, Out* out) {
  const int64_t positions = a.depth.size * a.height.size * a.width.size;
  const Scratch<double> squares(a.channels * positions);
  sum_columns(Matrix<T>{static_cast<const T*>(a.x), a.samples, a.channels * positions, a.sample_stride}, squares.data(), a.threads);

  // One channel at a time if they lie apart, all at once if they alternate.
  const int64_t lanes = a.channels_last ? a.channels : 1, groups = a.channels_last ? 1 : a.channels;
  const int64_t plane = a.height.size * a.width.size * lanes, line = a.width.size * lanes;
  const int64_t depths = a.depth.kernel, heights = a.height.kernel, widths = a.width.kernel;
  const Scratch<double> by_depth(depths * plane), by_height(depths * heights * line), by_width(depths * heights * widths * lanes);
  for (int64_t g = 0; g < groups; ++g) {
    sum_windows(squares.data() + g * positions, plane, plane, a.depth, by_depth.data());
    for (int64_t d = 0; d < depths; ++d) {
      sum_windows(by_depth.data() + d * plane, line, line, a.height, by_height.data() + d * heights * line);
    }
    for (int64_t d = 0; d < depths * heights; ++d) {
      sum_windows(by_height.data() + d * line, lanes, lanes, a.width, by_width.data() + d * widths * lanes);
    }
    const int64_t offsets = depths * heights * widths;
    for (int64_t k = 0; k < offsets; ++k) {
      for (int64_t c = 0; c < lanes; ++c) out[(g + c) * offsets + k] = static_cast<Out>(by_width.data()[k * lanes + c]);
    }
  }
}

}  // namespace

void column_sum_of_squares(const ColumnSumOfSquares& a) {
  with_type(a.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    sum_columns(Matrix<T>{static_cast<const T*>(a.x), a.rows, a.columns, a.row_stride}, static_cast<Accumulator<T>*>(a.out),
                a.threads);
  });
}

void channel_sum_of_squares(const ChannelSumOfSquares& a) {
  constexpr int64_t kLongRow = 64;
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
