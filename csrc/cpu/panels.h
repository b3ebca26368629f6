#pragma once

#include <cstdint>

#include "vector.h"

// Matrix products of panels: some columns of a matrix side by side, as wide as a few registers, row after row.
namespace fisher_kernels::FISHER_KERNELS_CAPABILITY {
namespace {

// A tile in registers: kTileRows x kWidth<A> sums.
constexpr int kTileRows = kVectorBytes == 64 ? 8 : 4;

template <class A>
constexpr int kWidth = 2 * kLanes<A>;

template <class T>
T* align(T* p) {
  const uintptr_t address = reinterpret_cast<uintptr_t>(p);
  return reinterpret_cast<T*>((address + kVectorBytes - 1) / kVectorBytes * kVectorBytes);
}

/// totals[i, j] += sum over r of left[r, i] * right[r, j], for kTileRows columns of one panel and all of another.
template <class A>
inline void add_products(const A* left, const A* right, int64_t rows, A* totals) {
  constexpr int kStep = kLanes<A>;
  Vector<A> sums[kTileRows][2] = {};
  for (int64_t r = 0; r < rows; ++r, left += kWidth<A>, right += kWidth<A>) {
    const Vector<A> low = load(right), high = load(right + kStep);
#pragma GCC unroll 8
    for (int i = 0; i < kTileRows; ++i) {
      sums[i][0] += left[i] * low;
      sums[i][1] += left[i] * high;
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < kTileRows; ++i) {
    A* const total = totals + i * kWidth<A>;
    store(total, load(total) + sums[i][0]);
    store(total + kStep, load(total + kStep) + sums[i][1]);
  }
}

}  // namespace
}  // namespace fisher_kernels::FISHER_KERNELS_CAPABILITY
