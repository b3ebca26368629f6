#pragma once

#include <cstdint>

#include "integers.h"
#include "lanes.h"
#include "transpose.h"
#include "vector.h"

// Sums of outer products of many small vectors, one vector in each lane: a register holds one entry of each, and every
// product of two entries is one instruction for all.
namespace fisher_kernels::FISHER_KERNELS_CAPABILITY {
namespace {

// Rows and columns of a tile of the triangle, whose sums fill most of the registers.
constexpr int kMaxPanel = kVectorBytes == 64 ? 5 : 3;

/// Where row i of a triangle begins; columns 0 to i follow.
inline int64_t triangle(int64_t i) { return i * (i + 1) / 2; }

/// The vectors of a group of blocks in a run of samples, entry by entry: a register [samples, n] for each.
template <class A>
struct Run {
  const A* entries;
  int64_t samples;
  int64_t n;
  bool is_first;
};

struct Nothing {
  void operator()() const {}
};

/// totals[row + r, column + c] += the sum over a run of the products of entries row + r and column + c. Calls
/// meanwhile() for each sample.
template <class A, int kRows, int kColumns, bool kDiagonal, class Meanwhile>
void add_tile(const Run<A>& run, int64_t row, int64_t column, A* totals, const Meanwhile& meanwhile) {
  constexpr int kStep = kLanes<A>;
  Vector<A> sums[kRows][kColumns] = {};
  const A* entries = run.entries;
  for (int64_t s = 0; s < run.samples; ++s, entries += run.n * kStep) {
    meanwhile();
    Vector<A> right[kColumns];
#pragma GCC unroll 8
    for (int c = 0; c < kColumns; ++c) right[c] = load(entries + (column + c) * kStep);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const Vector<A> left = kDiagonal ? right[r] : load(entries + (row + r) * kStep);
#pragma GCC unroll 8
      for (int c = 0; c < (kDiagonal ? r + 1 : kColumns); ++c) sums[r][c] += left * right[c];
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
    for (int c = 0; c < (kDiagonal ? r + 1 : kColumns); ++c) {
      A* const total = totals + (triangle(row + r) + column + c) * kStep;
      store(total, run.is_first ? sums[r][c] : load(total) + sums[r][c]);
    }
  }
}

/// Tiles of the triangle.
inline int64_t tiles_of(int64_t n) { return triangle(ceil_div(n, kMaxPanel)); }

/// Adds a run to the totals [n (n + 1) / 2], tile by tile of the triangle; the n entries are split evenly. Calls
/// meanwhile() for each sample of each tile.
template <class A, class Meanwhile = Nothing>
void add_run(const Run<A>& run, A* totals, const Meanwhile& meanwhile = {}) {
  const int64_t panels = ceil_div(run.n, kMaxPanel);
  const auto first = [&](int64_t panel) { return run.n * panel / panels; };
  const auto size = [&](int64_t panel) { return first(panel + 1) - first(panel); };
  for (int64_t i = 0; i < panels; ++i) {
    with_constant<kMaxPanel>(size(i), [&](auto rows) {
      for (int64_t j = 0; j < i; ++j) {
        with_constant<kMaxPanel>(size(j), [&](auto columns) {
          add_tile<A, rows, columns, false>(run, first(i), first(j), totals, meanwhile);
        });
      }
      add_tile<A, rows, rows, true>(run, first(i), first(i), totals, meanwhile);
    });
  }
}

/// out[i, j] <- decay * out[i, j] + gain * totals, both triangles from the lower one.
template <class A>
void write_block(const A* totals, int64_t n, A decay, A gain, A* out) {
  for (int64_t i = 0; i < n; ++i) {
    for (int64_t j = 0; j <= i; ++j) {
      A value = gain * totals[(triangle(i) + j) * kLanes<A>];
      if (decay != 0) value += decay * out[i * n + j];
      out[i * n + j] = out[j * n + i] = value;
    }
  }
}

/// totals <- gain * totals + decay * out in each lane, for n x n matrices that lie `stride` apart, one for each of the
/// first `lanes` lanes. Only their lower triangles are used.
template <class A>
inline void average_totals(const A* out, int64_t stride, int64_t lanes, int64_t n, A decay, A gain, A* totals) {
  Vector<A> old[kPiece<A>];
  for (int64_t row = 0; row < n; ++row) {
    A* const row_totals = totals + triangle(row) * kLanes<A>;
    for (int64_t next = 0; next <= row; next += kPiece<A>) {
      const int64_t first = smaller(row * n + next, n * n - kPiece<A>);
      load_piece(out + first, lanes, stride, 0, old);
      for (int64_t column = next; column <= smaller(row, next + kPiece<A> - 1); ++column) {
        A* const total = row_totals + column * kLanes<A>;
        store(total, gain * load(total) + decay * old[row * n + column - first]);
      }
    }
  }
}

/// out <- decay * out + gain * totals for the matrices of average_totals, both triangles from the lower one. Overwrites
/// the totals.
template <class A>
void write_blocks(A* totals, int64_t lanes, int64_t n, A decay, A gain, A* out, int64_t stride) {
  constexpr int64_t kStep = kLanes<A>;
  const int64_t size = n * n;
  if (size == 1 && stride == 1) {
    const Vector<A> value = gain * load(totals);
    return store(out, decay == 0 ? value : value + decay * load(out, lanes), lanes);
  }
  if (size < kStep) {
    for (int64_t lane = 0; lane < lanes; ++lane) write_block(totals + lane, n, decay, gain, out + lane * stride);
    return;
  }
  if (decay != 0) {
    average_totals(out, stride, lanes, n, decay, gain, totals);
    gain = 1;
  }
  for (int64_t next = 0; next < size; next += kStep) {  // as many entries of each matrix as it has lanes
    const int64_t first = smaller(next, size - kStep);
    int64_t row = first / n, column = first % n;
    const A* total = totals + (column <= row ? triangle(row) + column : triangle(column) + row) * kStep;
    Vector<A> square[kStep];
#pragma GCC unroll 16
    for (int64_t k = 0; k < kStep; ++k) {
      square[k] = gain * load(total);
      total += (column < row ? 1 : column + 1) * kStep;
      if (++column == n) {
        column = 0;
        total = totals + triangle(++row) * kStep;
      }
    }
    transpose<A>(square);
    if (lanes == kStep) {
#pragma GCC unroll 16
      for (int64_t lane = 0; lane < kStep; ++lane) store(out + lane * stride + first, square[lane]);
    } else {
      for (int64_t lane = 0; lane < lanes; ++lane) store(out + lane * stride + first, square[lane]);
    }
  }
}

}  // namespace
}  // namespace fisher_kernels::FISHER_KERNELS_CAPABILITY
