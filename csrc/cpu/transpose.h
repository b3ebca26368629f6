#pragma once

#include <cstdint>
#include <utility>

#include "vector.h"

// Turns rows in memory into registers of columns: lane l of column c is entry c of row l.
namespace fisher_kernels::FISHER_KERNELS_CAPABILITY {
namespace {

/// Entries of a row that are turned at a time: 16 bytes.
template <class A>
constexpr int kPiece = 16 / static_cast<int>(sizeof(A));

#if defined(__clang__) || __GNUC__ >= 12
template <class V, class Half, int... i>
inline V join(Half low, Half high, std::integer_sequence<int, i...>) {
  return __builtin_shufflevector(low, high, i...);
}

/// Pieces of kPieces rows side by side, the rows `step` apart.
template <class A, int kPieces>
inline auto load_pieces(const A* p, int64_t step) {
  constexpr int kSize = kPieces * kPiece<A>;
  using V = typename VectorOf<A, kSize>::Type;
  if constexpr (kPieces == 1) {
    return load_bits<V>(p);
  } else {
    const auto low = load_pieces<A, kPieces / 2>(p, step);
    const auto high = load_pieces<A, kPieces / 2>(p + kPieces / 2 * step, step);
    return join<V>(low, high, std::make_integer_sequence<int, kSize>{});
  }
}

/// The lower or upper halves of all pieces of a and b, entry by entry in turn.
template <class A, bool kUpper, class V, int... i>
inline V interleave(V a, V b, std::integer_sequence<int, i...>) {
  constexpr int kSize = kPiece<A>, kFirst = kUpper ? kSize / 2 : 0;
  return __builtin_shufflevector(a, b, (i / kSize * kSize + kFirst + i % kSize / 2 + i % 2 * kLanes<A>)...);
}

template <class A, bool kUpper>
inline Vector<A> interleave(Vector<A> a, Vector<A> b) {
  return interleave<A, kUpper>(a, b, std::make_integer_sequence<int, kLanes<A>>{});
}

/// columns[c] = entry c of each of kLanes<double> rows, which are `stride` apart.
inline void transpose_piece(const double* rows, int64_t stride, Vector<double> (&columns)[kPiece<double>]) {
  constexpr int kPieces = kLanes<double> / 2;
  const Vector<double> even = load_pieces<double, kPieces>(rows, 2 * stride);
  const Vector<double> odd = load_pieces<double, kPieces>(rows + stride, 2 * stride);
  columns[0] = interleave<double, false>(even, odd);
  columns[1] = interleave<double, true>(even, odd);
}

inline void transpose_piece(const float* rows, int64_t stride, Vector<float> (&columns)[kPiece<float>]) {
  constexpr int kPieces = kLanes<float> / 4;
  Vector<float> row[4];
  for (int r = 0; r < 4; ++r) row[r] = load_pieces<float, kPieces>(rows + r * stride, 4 * stride);
  const auto pairs = [](Vector<float> a, Vector<float> b, auto upper) {
    const auto both = interleave<float, upper>(a, b);
    return bits_as<Vector<double>>(both);
  };
  const auto turn = [&](auto upper, Vector<float>* two) {
    const Vector<double> a = pairs(row[0], row[1], upper), b = pairs(row[2], row[3], upper);
    two[0] = bits_as<Vector<float>>(interleave<double, false>(a, b));
    two[1] = bits_as<Vector<float>>(interleave<double, true>(a, b));
  };
  turn(std::false_type{}, columns);
  turn(std::true_type{}, columns + 2);
}
#else
template <class A>
inline void transpose_piece(const A* rows, int64_t stride, Vector<A> (&columns)[kPiece<A>]) {
  for (int lane = 0; lane < kLanes<A>; ++lane) {
    for (int c = 0; c < kPiece<A>; ++c) columns[c][lane] = rows[lane * stride + c];
  }
}
#endif

}  // namespace
}  // namespace fisher_kernels::FISHER_KERNELS_CAPABILITY
