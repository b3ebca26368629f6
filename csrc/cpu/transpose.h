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
#if defined(__AVX512F__)
  } else if constexpr (kPieces == 4) {
    const auto piece = [=](int i) { return load_bits<__m128>(p + i * step); };
    __m512 pieces = _mm512_zextps128_ps512(piece(0));
    pieces = _mm512_insertf32x4(pieces, piece(1), 1);
    pieces = _mm512_insertf32x4(pieces, piece(2), 2);
    return bits_as<V>(_mm512_insertf32x4(pieces, piece(3), 3));
#endif
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

/// Where transpose_odd takes fewer instructions than transpose_piece.
constexpr bool kTransposesOdd = kVectorBytes >= 32;

/// b in the lanes whose number has the bit kBit, a in the others.
template <class A, int kBit>
inline Vector<A> choose(Vector<A> a, Vector<A> b) {
#if defined(__AVX512F__)
  constexpr int kLanesWithBit = kBit == 1 ? 0xaaaa : kBit == 2 ? 0xcccc : kBit == 4 ? 0xf0f0 : 0xff00;
  if constexpr (sizeof(A) == 4) {
    return _mm512_mask_blend_ps(kLanesWithBit, a, b);
  } else {
    return _mm512_mask_blend_pd(kLanesWithBit & 0xff, a, b);
  }
#elif defined(__AVX2__)
  if constexpr (sizeof(A) == 4) {
    return _mm256_blend_ps(a, b, kBit == 1 ? 0xaa : kBit == 2 ? 0xcc : 0xf0);
  } else {
    return _mm256_blend_pd(a, b, kBit == 1 ? 0xa : 0xc);
  }
#else
  const auto lane = load_bits<Integers<A>>(kCounting<A>.values);
  return (lane & static_cast<Integer<A>>(kBit)) != 0 ? b : a;
#endif
}

/// In the lanes whose number has the bit kBit, and then in those with each higher one, column c <- column c - kBit.
template <class A, int kBit, int kSize>
inline void move_columns(Vector<A> (&columns)[kSize]) {
  if constexpr (kBit < kLanes<A>) {
    Vector<A> moved[kSize];
#pragma GCC unroll 16
    for (int c = 0; c < kSize; ++c) moved[c] = choose<A, kBit>(columns[c], columns[(c + kBit * (kSize - 1)) % kSize]);
#pragma GCC unroll 16
    for (int c = 0; c < kSize; ++c) columns[c] = moved[c];
    move_columns<A, 2 * kBit>(columns);
  }
}

/// Lane l <- lane kFirst + l * kStride, modulo their number.
template <class A, int kFirst, int kStride, int... l>
inline Vector<A> permute(Vector<A> value, std::integer_sequence<int, l...>) {
  return __builtin_shufflevector(value, value, ((kFirst + l * kStride) % kLanes<A>)...);
}

template <class A, int kSize, int... c>
inline void store_columns(const Vector<A> (&columns)[kSize], A* to, std::integer_sequence<int, c...>) {
  (store(to + c * kLanes<A>, permute<A, c, kSize>(columns[c], std::make_integer_sequence<int, kLanes<A>>{})), ...);
}

/// columns[c] = entry c of each of kLanes<T> rows of kSize entries, which lie one behind the other. Since kSize is odd,
/// no two of the numbers of an entry are in the same lane of the registers that they are loaded into. So they get into
/// one register without leaving their lanes, and each register is then put into order.
template <class T, int kSize>
__attribute__((always_inline)) inline void transpose_odd(const T* rows, Accumulator<T>* columns) {
  using A = Accumulator<T>;
  static_assert(kSize % 2 == 1);
  Vector<A> turned[kSize];  // lane l of register c is of column (c + l) % kSize
#pragma GCC unroll 16
  for (int i = 0; i < kSize; ++i) turned[i * kLanes<A> % kSize] = load(rows + i * kLanes<A>);
  move_columns<A, 1>(turned);
  store_columns<A, kSize>(turned, columns, std::make_integer_sequence<int, kSize>{});
}
#else
template <class A>
inline void transpose_piece(const A* rows, int64_t stride, Vector<A> (&columns)[kPiece<A>]) {
  for (int lane = 0; lane < kLanes<A>; ++lane) {
    for (int c = 0; c < kPiece<A>; ++c) columns[c][lane] = rows[lane * stride + c];
  }
}

constexpr bool kTransposesOdd = false;

template <class T, int kSize>
void transpose_odd(const T* rows, Accumulator<T>* columns);
#endif

}  // namespace
}  // namespace fisher_kernels::FISHER_KERNELS_CAPABILITY
