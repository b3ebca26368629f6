#pragma once

#include <cstdint>
#include <utility>

#include "scratch.h"
#include "vector.h"

// Many small arrays of one size, one in each lane of a register: what is written for one array then runs on all.
namespace fisher_kernels::FISHER_KERNELS_CAPABILITY {
namespace {

/// Registers at addresses that they can be loaded from in one go.
template <class A>
class LaneScratch {
 public:
  explicit LaneScratch(int64_t size) : memory_((size + 1) * kVectorBytes) {
    const uintptr_t address = reinterpret_cast<uintptr_t>(memory_.data());
    data_ = reinterpret_cast<Vector<A>*>((address + kVectorBytes - 1) / kVectorBytes * kVectorBytes);
  }

  Vector<A>* data() const { return data_; }

 private:
  Scratch<char> memory_;
  Vector<A>* data_;
};

/// Numbers kFirst, kFirst + 1, ... of a and b in turn.
template <class A, int kFirst, int... kPlace>
inline Vector<A> interleave(Vector<A> a, Vector<A> b, std::integer_sequence<int, kPlace...>) {
#ifdef __clang__
  return __builtin_shufflevector(a, b, (kPlace % 2 * kLanes<A> + kFirst + kPlace / 2)...);
#else
  using Index = std::conditional_t<sizeof(A) == 4, int32_t, int64_t>;
  const typename VectorOf<Index, kLanes<A>>::Type places = {(kPlace % 2 * kLanes<A> + kFirst + kPlace / 2)...};
  return __builtin_shuffle(a, b, places);
#endif
}

/// Transposes a square of registers. Each round moves every number by a rotation, by one bit, of the address that its
/// row and column make; as many rounds as a row has bits exchange row and column.
template <class A>
inline void transpose(Vector<A> (&rows)[kLanes<A>]) {
  constexpr int kHalf = kLanes<A> / 2;
  constexpr std::make_integer_sequence<int, kLanes<A>> places{};
  Vector<A> turned[kLanes<A>];
#pragma GCC unroll 4
  for (int round = 1; round < kLanes<A>; round *= 2) {
#pragma GCC unroll 8
    for (int i = 0; i < kHalf; ++i) {
      turned[2 * i] = interleave<A, 0>(rows[i], rows[i + kHalf], places);
      turned[2 * i + 1] = interleave<A, kHalf>(rows[i], rows[i + kHalf], places);
    }
#pragma GCC unroll 16
    for (int i = 0; i < kLanes<A>; ++i) rows[i] = turned[i];
  }
}

/// lanes[i][r] = x[r * size + i] for arrays r < count; the lanes of the others hold the first array once more.
/// Returns zeros, and NaN in the lanes of arrays with an entry that is not finite.
template <class A>
inline Vector<A> load_lanes(const A* x, int64_t count, int64_t size, Vector<A>* lanes) {
  constexpr int64_t kWidth = kLanes<A>;
  const Vector<A> zero = {};
  Vector<A> taint[4] = {};
  if (size < kWidth) {
    for (int64_t i = 0; i < size; ++i) {
      for (int64_t r = 0; r < kWidth; ++r) lanes[i][r] = x[(r < count ? r : 0) * size + i];
      taint[0] += lanes[i] * zero;
    }
    return taint[0];
  }
  const A* row[kWidth];
  for (int64_t r = 0; r < kWidth; ++r) row[r] = x + (r < count ? r : 0) * size;
  for (int64_t next = 0; next < size; next += kWidth) {
    const int64_t first = next + kWidth <= size ? next : size - kWidth;  // the last square overlaps the one before
    Vector<A> square[kWidth];
#pragma GCC unroll 16
    for (int64_t r = 0; r < kWidth; ++r) square[r] = load(row[r] + first);
    transpose<A>(square);
#pragma GCC unroll 16
    for (int64_t r = 0; r < kWidth; ++r) {
      lanes[first + r] = square[r];
      taint[r % 4] += square[r] * zero;
    }
  }
  return (taint[0] + taint[1]) + (taint[2] + taint[3]);
}

/// x[r * size + i] = lanes[i][r] for arrays r with a bit in `chosen`.
template <class A>
inline void store_lanes(const Vector<A>* lanes, uint32_t chosen, int64_t size, A* x) {
  constexpr int64_t kWidth = kLanes<A>;
  if (size < kWidth) {
    for (int64_t i = 0; i < size; ++i) {
      for (int64_t r = 0; r < kWidth; ++r) {
        if (chosen >> r & 1) x[r * size + i] = lanes[i][r];
      }
    }
    return;
  }
  const bool all = chosen == (uint32_t{1} << kWidth) - 1;
  for (int64_t next = 0; next < size; next += kWidth) {
    const int64_t first = next + kWidth <= size ? next : size - kWidth;
    Vector<A> square[kWidth];
#pragma GCC unroll 16
    for (int64_t r = 0; r < kWidth; ++r) square[r] = lanes[first + r];
    transpose<A>(square);
    if (all) {
#pragma GCC unroll 16
      for (int64_t r = 0; r < kWidth; ++r) store(x + r * size + first, square[r]);
    } else {
#pragma GCC unroll 16
      for (int64_t r = 0; r < kWidth; ++r) {
        if (chosen >> r & 1) store(x + r * size + first, square[r]);
      }
    }
  }
}

}  // namespace
}  // namespace fisher_kernels::FISHER_KERNELS_CAPABILITY
