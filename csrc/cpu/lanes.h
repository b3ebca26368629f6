#pragma once

#include <cstdint>
#include <cstring>
#include <utility>

#include "integers.h"
#include "scratch.h"
#include "transpose.h"
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
inline Vector<A> alternate(Vector<A> a, Vector<A> b, std::integer_sequence<int, kPlace...>) {
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
      turned[2 * i] = alternate<A, 0>(rows[i], rows[i + kHalf], places);
      turned[2 * i + 1] = alternate<A, kHalf>(rows[i], rows[i + kHalf], places);
    }
#pragma GCC unroll 16
    for (int i = 0; i < kLanes<A>; ++i) rows[i] = turned[i];
  }
}

/// A bit for each lane.
template <class A>
constexpr uint32_t kAllLanes = (uint32_t{1} << kLanes<A>) - 1;

/// lanes[i][r] = x[r * size + i] for arrays r < count and as many entries i, from `first` on, as are turned at a time.
/// The lanes of the other arrays hold the first one once more.
template <class A>
inline void load_piece(const A* x, int64_t count, int64_t size, int64_t first, Vector<A>* lanes) {
  Vector<A> columns[kPiece<A>];
  if (count == kLanes<A>) {
    transpose_piece(x + first, size, columns);
  } else {
    A rows[kLanes<A>][kPiece<A>];
    for (int64_t r = 0; r < kLanes<A>; ++r) {
      std::memcpy(rows[r], x + (r < count ? r : 0) * size + first, sizeof(rows[r]));
    }
    transpose_piece(rows[0], kPiece<A>, columns);
  }
#pragma GCC unroll 4
  for (int i = 0; i < kPiece<A>; ++i) lanes[first + i] = columns[i];
}

/// The same for all entries.
template <class A>
inline void load_lanes(const A* x, int64_t count, int64_t size, Vector<A>* lanes) {
  if (size < kPiece<A>) {
    for (int64_t i = 0; i < size; ++i) {
      for (int64_t r = 0; r < kLanes<A>; ++r) lanes[i][r] = x[(r < count ? r : 0) * size + i];
    }
    return;
  }
  for (int64_t i = 0; i < size; i += kPiece<A>) load_piece(x, count, size, smaller(i, size - kPiece<A>), lanes);
}

/// The same for n x n matrices, of whose upper triangles a part is left out.
template <class A>
inline void load_lower(const A* x, int64_t count, int64_t n, Vector<A>* lanes) {
  const int64_t size = n * n;
  if (size < kPiece<A>) return load_lanes(x, count, size, lanes);
  int64_t next = 0;
  for (int64_t i = 0; i < n; ++i) {
    for (next = larger(next, i * n); next <= i * (n + 1); next += kPiece<A>) {
      load_piece(x, count, size, smaller(next, size - kPiece<A>), lanes);
    }
  }
}

/// Whether no number is infinite or NaN.
template <class A>
inline bool all_finite(const A* x, int64_t count) {
  constexpr int64_t kStep = 4 * kLanes<A>;
  const Vector<A> zero = {};
  Vector<A> sum[4] = {};  // of zeros and NaN
  int64_t i = 0;
  for (; i + kStep <= count; i += kStep) {
#pragma GCC unroll 4
    for (int64_t k = 0; k < 4; ++k) sum[k] += load(x + i + k * kLanes<A>) * zero;
  }
  for (; i + kLanes<A> <= count; i += kLanes<A>) sum[0] += load(x + i) * zero;
  sum[1] += load(x + i, count - i) * zero;
  return sum_lanes<A>((sum[0] + sum[1]) + (sum[2] + sum[3])) == 0;
}

/// out = a v, for an n x n matrix and a vector in each lane.
template <class A>
inline void multiply_lanes(const Vector<A>* a, const Vector<A>* v, int64_t n, Vector<A>* out) {
  int64_t i = 0;
  for (; i + 4 <= n; i += 4) {
    Vector<A> sum[4] = {};
    for (int64_t k = 0; k < n; ++k) {
#pragma GCC unroll 4
      for (int64_t r = 0; r < 4; ++r) sum[r] += a[(i + r) * n + k] * v[k];
    }
    for (int64_t r = 0; r < 4; ++r) out[i + r] = sum[r];
  }
  for (; i < n; ++i) {
    Vector<A> sum = {};
    for (int64_t k = 0; k < n; ++k) sum += a[i * n + k] * v[k];
    out[i] = sum;
  }
}

/// x[r * size + i] = lanes[i][r] for arrays r with a bit in `chosen`.
template <class A>
inline void store_lanes(const Vector<A>* lanes, uint32_t chosen, int64_t size, A* x) {
  constexpr int64_t kWidth = kLanes<A>;
  if (size < kWidth) {
    if constexpr (kStoresParts) {
      Vector<A> square[kWidth];
#pragma GCC unroll 16
      for (int64_t i = 0; i < kWidth; ++i) square[i] = lanes[smaller(i, size - 1)];  // those past the end go nowhere
      transpose<A>(square);
#pragma GCC unroll 16
      for (int64_t r = 0; r < kWidth; ++r) {
        if (chosen >> r & 1) store(x + r * size, square[r], size);
      }
      return;
    }
    for (int64_t i = 0; i < size; ++i) {
      for (int64_t r = 0; r < kWidth; ++r) {
        if (chosen >> r & 1) x[r * size + i] = lanes[i][r];
      }
    }
    return;
  }
  const bool all = chosen == kAllLanes<A>;
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
