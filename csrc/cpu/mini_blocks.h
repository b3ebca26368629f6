#pragma once

#include <cstdint>

#include "integers.h"
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

/// totals[row + r, column + c] += the sum over a run of the products of entries row + r and column + c.
template <class A, int kRows, int kColumns, bool kDiagonal>
void add_tile(const Run<A>& run, int64_t row, int64_t column, A* totals) {
  constexpr int kStep = kLanes<A>;
  Vector<A> sums[kRows][kColumns] = {};
  const A* entries = run.entries;
  for (int64_t s = 0; s < run.samples; ++s, entries += run.n * kStep) {
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

/// Adds a run to the totals [n (n + 1) / 2], tile by tile of the triangle; the n entries are split evenly.
template <class A>
void add_run(const Run<A>& run, A* totals) {
  const int64_t panels = ceil_div(run.n, kMaxPanel);
  const auto first = [&](int64_t panel) { return run.n * panel / panels; };
  const auto size = [&](int64_t panel) { return first(panel + 1) - first(panel); };
  for (int64_t i = 0; i < panels; ++i) {
    with_constant<kMaxPanel>(size(i), [&](auto rows) {
      for (int64_t j = 0; j < i; ++j) {
        with_constant<kMaxPanel>(size(j), [&](auto columns) {
          add_tile<A, rows, columns, false>(run, first(i), first(j), totals);
        });
      }
      add_tile<A, rows, rows, true>(run, first(i), first(i), totals);
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

}  // namespace
}  // namespace fisher_kernels::FISHER_KERNELS_CAPABILITY
