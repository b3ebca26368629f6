#pragma once

#include <cstdint>

#include "integers.h"
#include "lanes.h"
#include "parallel.h"
#include "vector.h"

// Inverts one symmetric positive definite matrix A in place by symmetric sweeps (Gauss-Jordan elimination without
// pivoting), a panel of columns K at a time. With A_KK = L D L^T, for all rows i and j outside of K, before it or after:
//
//   V_i = A_iK L^-T   Y_i = V_i D^-1   A_ij <- A_ij - Y_i V_j^T   A_iK <- Y_i L^-1   A_KK <- -A_KK^-1
//
// After all panels -A^-1 is left. L is applied by substitution: a product with A_KK^-1 would round by as much as the
// condition of A_KK, which the rest of the matrix then multiplies with its own.
namespace fisher_kernels::FISHER_KERNELS_CAPABILITY {
namespace {

// A tile in registers: kTileHeight x kTileRegisters sums, and as many factors as fit beside them.
#if defined(__AVX512F__)
constexpr int kTileHeight = 8, kTileRegisters = 2;  // of 32
#elif defined(__aarch64__)
constexpr int kTileHeight = 4, kTileRegisters = 4;  // of 32
#elif defined(__AVX2__)
constexpr int kTileHeight = 4, kTileRegisters = 3;  // of 16
#else
constexpr int kTileHeight = 4, kTileRegisters = 2;  // of 16, and products need some without fused operations
#endif

/// Columns of a strip: those of a tile.
template <class A>
constexpr int kStrip = kTileRegisters * kLanes<A>;

static_assert(kStrip<double> % kTileHeight == 0 && kStrip<float> <= 32);

/// Columns that panels have at most, in whole strips.
template <class A>
constexpr int64_t kMostSwept = 64 / kStrip<A> * kStrip<A>;

/// Columns of the panels of a matrix. Wide ones move the matrix through the registers less often, narrow ones leave
/// less to substitution.
template <class A>
inline int64_t panel_width(int64_t n) {
  constexpr int64_t kNarrow = 32 / kStrip<A> * kStrip<A>;
  constexpr int64_t kLargestNarrow = 384;
  return n <= kLargestNarrow ? kNarrow : kMostSwept<A>;
}

/// A matrix and what sweeping it takes. The lower triangle is cut into strips of columns, one after the other, row after
/// row from that of their first column on. Behind the last row follow ones on the diagonal up to a whole tile, and zeros
/// up to a whole strip.
template <class A>
struct Sweep {
  int64_t rows;  // in whole tiles
  int64_t strips;
  A* entries;
  A* right;       // [strips, kMostSwept, kStrip], V^T of the rows of a strip
  A* left;        // the same of Y
  A* upper;       // [kMostSwept, kMostSwept], L^T of the panel above its diagonal
  A* lower;       // L below it
  A* diagonal;    // [kMostSwept, kMostSwept], where it is factored
  A* reciprocal;  // [kMostSwept], of D

  /// In memory for size(n) numbers.
  Sweep(int64_t n, A* memory) : rows(ceil_div(n, kTileHeight) * kTileHeight), strips(ceil_div(n, kStrip<A>)) {
    constexpr int64_t kSquare = kMostSwept<A> * kMostSwept<A>;
    entries = memory;
    right = entries + triangle(strips);
    left = right + strips * kStep;
    upper = left + strips * kStep;
    lower = upper + kSquare;
    diagonal = lower + kSquare;
    reciprocal = diagonal + kSquare;
  }

  static int64_t size(int64_t n) {
    const int64_t strips = ceil_div(n, kStrip<A>);
    return triangle(strips) + 2 * strips * kStep + 3 * kMostSwept<A> * kMostSwept<A> + kMostSwept<A>;
  }

  static int64_t triangle(int64_t strips) { return strips * (strips + 1) / 2 * kStrip<A> * kStrip<A>; }

  /// A row of a strip.
  A* at(int64_t strip, int64_t row) const {
    return entries + (strip * strips * kStrip<A> - kStrip<A> * strip * (strip + 1) / 2 + row) * kStrip<A>;
  }

  /// Numbers between the strips of `right` and of `left`.
  static constexpr int64_t kStep = kMostSwept<A> * kStrip<A>;
};

/// Columns first, first + 1, ..., in whole tiles, and the strips that hold them.
template <class A>
struct Panel {
  int64_t first;
  int64_t count;

  int64_t first_strip() const { return first / kStrip<A>; }
  int64_t last_strip() const { return ceil_div(first + count, kStrip<A>); }
  bool has(int64_t strip) const { return first_strip() <= strip && strip < last_strip(); }
};

template <class A>
using Tile = Vector<A>[kTileHeight][kTileRegisters];

/// tile[i] -= sum over k < count of left[k * step + i] * right[k], a row of a strip.
template <class A>
inline void subtract_rows(Tile<A>& tile, const A* left, int64_t step, const A* right, int64_t count) {
  for (int64_t k = 0; k < count; ++k, left += step, right += kStrip<A>) {
    Vector<A> factors[kTileRegisters];
#pragma GCC unroll 4
    for (int j = 0; j < kTileRegisters; ++j) factors[j] = load(right + j * kLanes<A>);
#pragma GCC unroll 8
    for (int i = 0; i < kTileHeight; ++i) {
#pragma GCC unroll 4
      for (int j = 0; j < kTileRegisters; ++j) tile[i][j] -= left[i] * factors[j];
    }
  }
}

template <class A>
inline void load_tile(const A* x, Tile<A>& tile) {
#pragma GCC unroll 8
  for (int i = 0; i < kTileHeight; ++i) {
#pragma GCC unroll 4
    for (int j = 0; j < kTileRegisters; ++j) tile[i][j] = load(x + i * kStrip<A> + j * kLanes<A>);
  }
}

template <class A>
inline void store_tile(const Tile<A>& tile, A* x) {
#pragma GCC unroll 8
  for (int i = 0; i < kTileHeight; ++i) {
#pragma GCC unroll 4
    for (int j = 0; j < kTileRegisters; ++j) store(x + i * kStrip<A> + j * kLanes<A>, tile[i][j]);
  }
}

/// tile[i] -= factor * tile[k].
template <class A>
inline void subtract_row(Tile<A>& tile, int i, A factor, int k) {
#pragma GCC unroll 4
  for (int j = 0; j < kTileRegisters; ++j) tile[i][j] -= factor * tile[k][j];
}

/// v = L^-1 x, for the rows of a strip in the lanes.
template <class A>
inline void substitute_forward(const Sweep<A>& sweep, int64_t count, const A* x, A* v) {
  constexpr int64_t kStep = kMostSwept<A>;
  for (int64_t first = 0; first < count; first += kTileHeight) {
    Tile<A> tile;
    load_tile(x + first * kStrip<A>, tile);
    subtract_rows<A>(tile, sweep.upper + first, kStep, v, first);
    const A* const factors = sweep.upper + first * kStep + first;
#pragma GCC unroll 8
    for (int i = 1; i < kTileHeight; ++i) {
#pragma GCC unroll 8
      for (int k = 0; k < i; ++k) subtract_row<A>(tile, i, factors[k * kStep + i], k);
    }
    store_tile<A>(tile, v + first * kStrip<A>);
  }
}

/// x = L^-T y.
template <class A>
inline void substitute_backward(const Sweep<A>& sweep, int64_t count, const A* y, A* x) {
  constexpr int64_t kStep = kMostSwept<A>;
  for (int64_t first = count - kTileHeight; first >= 0; first -= kTileHeight) {
    const int64_t below = first + kTileHeight;
    Tile<A> tile;
    load_tile(y + first * kStrip<A>, tile);
    subtract_rows<A>(tile, sweep.lower + below * kStep + first, kStep, x + below * kStrip<A>, count - below);
    const A* const factors = sweep.lower + first * kStep + first;
#pragma GCC unroll 8
    for (int i = kTileHeight - 2; i >= 0; --i) {
#pragma GCC unroll 8
      for (int k = kTileHeight - 1; k > i; --k) subtract_row<A>(tile, i, factors[k * kStep + i], k);
    }
    store_tile<A>(tile, x + first * kStrip<A>);
  }
}

/// y = D^-1 v.
template <class A>
inline void divide_by_pivots(const Sweep<A>& sweep, int64_t count, const A* v, A* y) {
  for (int64_t k = 0; k < count; ++k) {
    for (int j = 0; j < kStrip<A>; j += kLanes<A>) {
      store(y + k * kStrip<A> + j, sweep.reciprocal[k] * load(v + k * kStrip<A> + j));
    }
  }
}

/// to[j, i] = from[i, j], for whole registers of rows and of columns.
template <class A>
inline void turn(const A* from, int64_t from_step, int64_t rows, int64_t columns, A* to, int64_t to_step) {
  for (int64_t i = 0; i < rows; i += kLanes<A>) {
    for (int64_t j = 0; j < columns; j += kLanes<A>) {
      Vector<A> square[kLanes<A>];
#pragma GCC unroll 16
      for (int k = 0; k < kLanes<A>; ++k) square[k] = load(from + (i + k) * from_step + j);
      transpose<A>(square);
#pragma GCC unroll 16
      for (int k = 0; k < kLanes<A>; ++k) store(to + (j + k) * to_step + i, square[k]);
    }
  }
}

/// Factors the square of a panel on the diagonal; false if it is not positive definite, or no longer finite.
template <class A>
inline bool factor_panel(const Sweep<A>& sweep, Panel<A> panel) {
  constexpr int64_t kStep = kMostSwept<A>;
  for (int64_t strip = panel.first_strip(); strip < panel.last_strip(); ++strip) {
    const int64_t row = strip * kStrip<A>, place = row - panel.first;
    turn(sweep.at(strip, row), kStrip<A>, panel.last_strip() * kStrip<A> - row, kStrip<A>,
         sweep.diagonal + place * kStep + place, kStep);
  }
  for (int64_t k = 0; k < panel.count; ++k) {
    const A* const row = sweep.diagonal + k * kStep;
    A* const factors = sweep.upper + k * kStep;
    const A pivot = row[k];
    if (!(pivot > 0 && pivot * 0 == 0)) return false;
    const A reciprocal = sweep.reciprocal[k] = 1 / pivot;
    for (int64_t j = k - k % kLanes<A>; j < panel.count; j += kLanes<A>) store(factors + j, reciprocal * load(row + j));
    for (int64_t i = k + 1; i < panel.count; ++i) {
      A* const other = sweep.diagonal + i * kStep;
      for (int64_t j = i - i % kLanes<A>; j < panel.count; j += kLanes<A>) {
        store(other + j, load(other + j) - factors[i] * load(row + j));
      }
    }
  }
  for (int64_t k = 0; k < panel.count; k += kLanes<A>) {
    turn(sweep.upper + k * kStep + k, kStep, kLanes<A>, panel.count - k, sweep.lower + k * kStep + k, kStep);
  }
  return true;
}

/// V and Y of the rows of a strip, and what becomes of their entries in the panel.
template <class A>
inline void sweep_strip(const Sweep<A>& sweep, Panel<A> panel, int64_t strip) {
  alignas(kVectorBytes) A turned[Sweep<A>::kStep];
  const int64_t row = strip * kStrip<A>;
  const bool above = strip < panel.first_strip(), inside = panel.has(strip);
  A* const x = above ? sweep.at(strip, panel.first) : turned;
  if (inside) {  // the rows of the identity become those of the inverse
    for (int64_t i = 0; i < panel.count * kStrip<A>; ++i) x[i] = 0;
    for (int64_t i = 0; i < kStrip<A> && row + i < panel.first + panel.count; ++i) {
      x[(row + i - panel.first) * kStrip<A> + i] = 1;
    }
  } else if (!above) {
    for (int64_t k = panel.first_strip(); k < panel.last_strip(); ++k) {
      turn(sweep.at(k, row), kStrip<A>, kStrip<A>, kStrip<A>, x + (k * kStrip<A> - panel.first) * kStrip<A>, kStrip<A>);
    }
  }
  A *const v = sweep.right + strip * Sweep<A>::kStep, *const y = sweep.left + strip * Sweep<A>::kStep;
  substitute_forward(sweep, panel.count, x, v);
  divide_by_pivots(sweep, panel.count, v, y);
  substitute_backward(sweep, panel.count, y, x);
  if (inside) {
    const A* const from = x + (row - panel.first) * kStrip<A>;
    A* const to = sweep.at(strip, row);
    for (int64_t i = 0; i < (panel.first + panel.count - row) * kStrip<A>; ++i) to[i] = -from[i];
  } else if (!above) {
    for (int64_t k = panel.first_strip(); k < panel.last_strip(); ++k) {
      turn(x + (k * kStrip<A> - panel.first) * kStrip<A>, kStrip<A>, kStrip<A>, kStrip<A>, sweep.at(k, row), kStrip<A>);
    }
  }
}

/// A_ij <- A_ij - Y_i V_j^T for the rows i of one strip and the columns j of another.
template <class A>
inline void update_square(const Sweep<A>& sweep, int64_t count, int64_t rows, int64_t columns) {
  const A* const left = sweep.left + rows * Sweep<A>::kStep;
  const A* const right = sweep.right + columns * Sweep<A>::kStep;
  const int64_t first = rows * kStrip<A>, height = smaller(kStrip<A>, sweep.rows - first);
  for (int64_t i = 0; i < height; i += kTileHeight) {
    Tile<A> sums = {}, tile;
    subtract_rows<A>(sums, left + i, kStrip<A>, right, count);
    A* const entries = sweep.at(columns, first + i);
    load_tile(entries, tile);
#pragma GCC unroll 8
    for (int r = 0; r < kTileHeight; ++r) {
#pragma GCC unroll 4
      for (int j = 0; j < kTileRegisters; ++j) tile[r][j] += sums[r][j];
    }
    store_tile<A>(tile, entries);
  }
}

/// Squares begin, begin + 1, ... of the lower triangle, one strip of columns after the other.
template <class A>
inline void update_squares(const Sweep<A>& sweep, Panel<A> panel, int64_t begin, int64_t end) {
  int64_t columns = 0, rows = begin;
  for (; rows >= sweep.strips; ++columns) rows -= sweep.strips - columns - 1;
  for (int64_t i = begin; i < end; ++i) {
    if (!panel.has(columns) && !panel.has(rows)) update_square(sweep, panel.count, rows, columns);
    if (++rows == sweep.strips) rows = ++columns;
  }
}

/// Leaves -A^-1 of a matrix, or returns false if it is not positive definite. Who does what changes no bit.
template <class A>
inline bool sweep_all(const Sweep<A>& sweep, int threads) {
  const int64_t width = panel_width<A>(sweep.rows), squares = sweep.strips * (sweep.strips + 1) / 2;
  for (int64_t first = 0; first < sweep.rows; first += width) {
    const Panel<A> panel{first, smaller(width, sweep.rows - first)};
    if (!factor_panel(sweep, panel)) return false;
    const double products = static_cast<double>(sweep.rows) * static_cast<double>(panel.count);
    parallel_for(threads_for_products(products * static_cast<double>(panel.count), threads), sweep.strips,
                 [&](int, int64_t begin, int64_t end) {
                   for (int64_t strip = begin; strip < end; ++strip) sweep_strip(sweep, panel, strip);
                 });
    parallel_for(threads_for_products(products * static_cast<double>(sweep.rows) / 2, threads), squares,
                 [&](int, int64_t begin, int64_t end) { update_squares(sweep, panel, begin, end); });
  }
  return true;
}

/// The lower triangle of a matrix, damped.
template <class A>
inline void load_strips(const A* a, int64_t n, A damping, const Sweep<A>& sweep) {
  for (int64_t strip = 0; strip < sweep.strips; ++strip) {
    const int64_t column = strip * kStrip<A>;
    for (int64_t row = column; row < sweep.strips * kStrip<A>; ++row) {
      A* const to = sweep.at(strip, row);
      const int64_t filled = row < n ? smaller(kStrip<A>, row + 1 - column) : 0;
      const A* const from = a + row * n + column;
      for_registers<A>(filled, [&](int64_t j, auto load, auto store) { store(to + j, load(from + j)); });
      for (int64_t j = filled; j < kStrip<A>; ++j) to[j] = 0;
      if (row >= column + kStrip<A>) continue;
      to[row - column] = row < n ? to[row - column] + damping : row < sweep.rows ? 1 : 0;
    }
  }
}

/// out = -x and the mirror image of that, for the lower triangle x of an n x n matrix in strips.
template <class A>
inline void store_negative(const Sweep<A>& sweep, int64_t n, A* out) {
  constexpr int64_t kWidth = kLanes<A>;
  for (int64_t column = 0; column < n; column += kWidth) {
    const int64_t strip = column / kStrip<A>, place = column % kStrip<A>, columns = smaller(kWidth, n - column);
    for (int64_t row = column; row < n; row += kWidth) {
      const int64_t rows = smaller(kWidth, n - row);
      const bool crossed = row == column;  // by the diagonal
      Vector<A> square[kWidth];
#pragma GCC unroll 16
      for (int64_t k = 0; k < kWidth; ++k) square[k] = -load(sweep.at(strip, row + k) + place);
      for (int64_t k = 0; k < rows; ++k) store(out + (row + k) * n + column, square[k], crossed ? k + 1 : columns);
      transpose<A>(square);
      for (int64_t k = 0; k < columns; ++k) {
        A* const to = out + (column + k) * n + row;
        if (crossed) {
          for (int64_t r = k + 1; r < rows; ++r) to[r] = square[k][r];
        } else {
          store(to, square[k], rows);
        }
      }
    }
  }
}

}  // namespace
}  // namespace fisher_kernels::FISHER_KERNELS_CAPABILITY
