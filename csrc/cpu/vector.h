#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#if defined(__AVX2__)
#include <immintrin.h>
#elif defined(__SSE2__)
#include <emmintrin.h>
#endif

#include "../common/dtype.h"

#ifndef FISHER_KERNELS_CAPABILITY
#error "FISHER_KERNELS_CAPABILITY names the namespace of this build of the kernels"
#endif

// One SIMD register, written with the vector extensions of GCC and Clang, so that the same source serves every
// processor. Everything here has internal linkage: the linker must never hand code of one capability to another.
namespace fisher_kernels::FISHER_KERNELS_CAPABILITY {
namespace {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

struct bfloat16 {
  uint16_t bits;
};

/// A moment in 16 bits: what is finite stays so when it is stored.
struct bfloat16_moment : bfloat16 {};

struct float16 {
  uint16_t bits;
};

/// The type that values of T are computed in.
template <class T>
using Accumulator = std::conditional_t<std::is_same_v<T, double>, double, float>;

/// A register, or a part of one, of kSize numbers.
template <class A, int kSize>
struct VectorOf {
  typedef A Type __attribute__((vector_size(kSize * sizeof(A))));
};

template <class T>
constexpr int kLanes = kVectorBytes / static_cast<int>(sizeof(Accumulator<T>));

/// A register of Accumulator<T>.
template <class T>
using Vector = typename VectorOf<Accumulator<T>, kLanes<T>>::Type;

typedef uint32_t Words __attribute__((vector_size(kVectorBytes)));
typedef uint16_t HalfWords __attribute__((vector_size(kVectorBytes / 2)));

template <class To, class From>
inline To bits_as(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(To));
  return to;
}

template <class V, class T>
inline V load_bits(const T* p) {
  V v;
  std::memcpy(&v, p, sizeof(V));
  return v;
}

template <class T, class V>
inline void store_bits(T* p, const V& v) {
  std::memcpy(p, &v, sizeof(V));
}

// The conversions below take one word (Bits = uint32_t, Float = float) or a register of them. A 16-bit number is in the
// upper half of its word, where bfloat16 is float32 already.

/// Rounds to nearest even; NaN stays NaN. The lower half of the result is to be ignored.
template <class Bits, class Float>
inline Bits round_to_bfloat16(Float value) {
  const Bits bits = bits_as<Bits>(value);
  const Bits rounded = bits + 0x7fffu + ((bits >> 16) & 1u);
  return value != value ? bits | 0x400000u : rounded;
}

/// The same, but for finite values beyond the largest bfloat16, which become that.
template <class Bits, class Float>
inline Bits round_to_finite_bfloat16(Float value) {
  const Bits rounded = round_to_bfloat16<Bits>(value);
  return (value - value == 0) & ((rounded & 0x7f800000u) == 0x7f800000u) ? rounded - 0x10000u : rounded;
}

template <class Float, class Bits>
inline Float widen_float16(Bits upper) {
  const Bits sign = upper & 0x80000000u;
  const Bits magnitude = upper & 0x7fff0000u;
  // A multiplication moves the exponent from float16's bias to float32's, and normalises subnormal numbers on the way.
  const Bits finite = bits_as<Bits>(bits_as<Float>(magnitude >> 3) * 0x1p112f);
  return bits_as<Float>(sign | (magnitude >= 0x7c000000u ? finite | 0x7f800000u : finite));
}

/// Rounds to nearest even; NaN stays NaN.
template <class Bits, class Float>
inline Bits round_to_float16(Float value) {
  const Bits bits = bits_as<Bits>(value);
  const Bits sign = bits & 0x80000000u;
  const Bits magnitude = bits & 0x7fffffffu;
  const Bits normal = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  // The unit in the last place of 0.5 in float32 is the smallest subnormal number of float16: the addition rounds.
  const Bits subnormal = bits_as<Bits>(bits_as<Float>(magnitude) + 0.5f) - 0x3f000000u;
  const Bits infinity = (magnitude & 0u) + 0x7c00u, nan = (magnitude & 0u) + 0x7e00u;
  const Bits finite = magnitude < 0x38800000u ? subnormal : normal;
  const Bits special = magnitude > 0x7f800000u ? nan : infinity;
  return sign | ((magnitude >= 0x47800000u ? special : finite) << 16);
}

inline float widen(float value) { return value; }
inline double widen(double value) { return value; }
inline float widen(bfloat16 value) { return bits_as<float>(uint32_t{value.bits} << 16); }
inline float widen(float16 value) { return widen_float16<float>(uint32_t{value.bits} << 16); }

// Moves a register's worth of 16-bit numbers between memory and the upper halves of words. Spelled out for x86, where
// GCC 12 takes several instructions for what is one or two.
#if defined(__AVX512F__)
inline Words load_upper_halves(const void* p) {
  const __m512i place = _mm512_set_epi16(15, 0, 14, 0, 13, 0, 12, 0, 11, 0, 10, 0, 9, 0, 8, 0,  //
                                         7, 0, 6, 0, 5, 0, 4, 0, 3, 0, 2, 0, 1, 0, 0, 0);
  return (Words)_mm512_maskz_permutexvar_epi16(0xaaaaaaaau, place, _mm512_castsi256_si512(load_bits<__m256i>(p)));
}

inline void store_upper_halves(void* p, Words words) {
  const __m512i place = _mm512_set_epi16(0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0,  //
                                         31, 29, 27, 25, 23, 21, 19, 17, 15, 13, 11, 9, 7, 5, 3, 1);
  const __m512i halves = _mm512_maskz_permutexvar_epi16(0xffffu, place, (__m512i)words);
  std::memcpy(p, &halves, sizeof(HalfWords));
}
#elif defined(__AVX2__)
inline Words load_upper_halves(const void* p) { return (Words)_mm256_cvtepu16_epi32(load_bits<__m128i>(p)) << 16; }

inline void store_upper_halves(void* p, Words words) {
  const __m256i lower = (__m256i)(words >> 16);
  const __m256i packed = _mm256_packus_epi32(lower, lower);  // within each half of the register
  const __m256i halves = _mm256_permute4x64_epi64(packed, 0x08);
  std::memcpy(p, &halves, sizeof(HalfWords));
}
#else
inline Words load_upper_halves(const void* p) { return __builtin_convertvector(load_bits<HalfWords>(p), Words) << 16; }

inline void store_upper_halves(void* p, Words words) {
  const HalfWords halves = __builtin_convertvector(words >> 16, HalfWords);
  std::memcpy(p, &halves, sizeof(halves));
}
#endif

inline Vector<float> load(const float* p) { return load_bits<Vector<float>>(p); }
inline Vector<double> load(const double* p) { return load_bits<Vector<double>>(p); }
inline Vector<float> load(const bfloat16* p) { return bits_as<Vector<float>>(load_upper_halves(p)); }

inline void store(float* p, Vector<float> value) { store_bits(p, value); }
inline void store(double* p, Vector<double> value) { store_bits(p, value); }
inline void store(bfloat16* p, Vector<float> value) { store_upper_halves(p, round_to_bfloat16<Words>(value)); }
inline void store(bfloat16_moment* p, Vector<float> value) {
  store_upper_halves(p, round_to_finite_bfloat16<Words>(value));
}

/// Memory for a bfloat16 whose bits are known: what is stored is the upper half of each word as it is.
struct UpperHalf {
  uint16_t bits;
};
inline void store(UpperHalf* p, Vector<float> value) { store_upper_halves(p, bits_as<Words>(value)); }

/// What values that are as_stored_if_finite are stored as.
template <class T>
using Rounded = std::conditional_t<std::is_same_v<T, bfloat16_moment>, UpperHalf, T>;

/// Those beyond the largest bfloat16 become that. The compiler makes two instructions of what is four as conditions.
inline Vector<float> within_bfloat16(Vector<float> value) {
  constexpr float kLargest = 0x1.fep127f;
#if defined(__AVX512F__)
  const Vector<float> below = _mm512_maskz_min_ps(0xffff, _mm512_set1_ps(kLargest), value);
  return _mm512_maskz_max_ps(0xffff, _mm512_set1_ps(-kLargest), below);
#elif defined(__AVX2__)
  return _mm256_max_ps(_mm256_set1_ps(-kLargest), _mm256_min_ps(_mm256_set1_ps(kLargest), value));
#else
  const Vector<float> above = value > kLargest ? Vector<float>{} + kLargest : value;
  return above < -kLargest ? Vector<float>{} - kLargest : above;
#endif
}

/// Finite values as they are when they have been stored; nothing is promised of others, which would take twice as many
/// instructions.
template <class T>
inline Vector<T> as_stored_if_finite(Vector<T> value) {
  if constexpr (std::is_same_v<T, bfloat16_moment>) {
    const Words bits = bits_as<Words>(within_bfloat16(value));
    return bits_as<Vector<T>>((bits + 0x7fffu + ((bits >> 16) & 1u)) & 0xffff0000u);
  } else {
    return value;
  }
}

#if defined(__AVX512F__)
// The masked forms, with a full mask, because the plain ones make GCC 12 warn of uninitialised values.
inline Vector<float> load(const float16* p) { return _mm512_maskz_cvtph_ps(0xffff, load_bits<__m256i>(p)); }
inline void store(float16* p, Vector<float> value) {
  store_bits(p, _mm512_maskz_cvtps_ph(0xffff, value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
#elif defined(__AVX2__)
inline Vector<float> load(const float16* p) { return _mm256_cvtph_ps(load_bits<__m128i>(p)); }
inline void store(float16* p, Vector<float> value) {
  store_bits(p, _mm256_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
#else
inline Vector<float> load(const float16* p) { return widen_float16<Vector<float>>(load_upper_halves(p)); }
inline void store(float16* p, Vector<float> value) { store_upper_halves(p, round_to_float16<Words>(value)); }
#endif

/// Stores past the caches, which keep what they hold; p is a multiple of the size of a register. Other threads see it
/// after finish_streaming.
template <class A>
inline void stream(A* p, Vector<A> value) {
#if defined(__AVX512F__)
  _mm512_stream_si512(reinterpret_cast<__m512i*>(p), bits_as<__m512i>(value));
#elif defined(__AVX2__)
  _mm256_stream_si256(reinterpret_cast<__m256i*>(p), bits_as<__m256i>(value));
#elif defined(__SSE2__)
  _mm_stream_si128(reinterpret_cast<__m128i*>(p), bits_as<__m128i>(value));
#else
  store(p, value);
#endif
}

inline void finish_streaming() {
#ifdef __SSE2__
  _mm_sfence();
#endif
}

/// The first `count` elements at p, and zeros; count is at most that of lanes.
template <class T>
inline Vector<T> load(const T* p, int64_t count) {
  T padded[kLanes<T>] = {};
  std::memcpy(padded, p, count * sizeof(T));
  return load(padded);
}

/// Stores the first `count` lanes.
template <class T>
inline void store(T* p, Vector<T> value, int64_t count) {
  T padded[kLanes<T>];
  store(padded, value);
  std::memcpy(p, padded, count * sizeof(T));
}

/// One instruction where processors have one for it; a copy of a length that only the run tells is a call.
constexpr bool kStoresParts = kVectorBytes >= 32;

#if defined(__AVX512F__)
inline Vector<float> load(const float* p, int64_t count) { return _mm512_maskz_loadu_ps((1u << count) - 1, p); }
inline Vector<double> load(const double* p, int64_t count) { return _mm512_maskz_loadu_pd((1u << count) - 1, p); }
inline void store(float* p, Vector<float> value, int64_t count) {
  _mm512_mask_storeu_ps(p, (1u << count) - 1, value);
}
inline void store(double* p, Vector<double> value, int64_t count) {
  _mm512_mask_storeu_pd(p, (1u << count) - 1, value);
}
#elif defined(__AVX2__)
/// All bits in the first `count` words of four or eight bytes, from where `sizeof(T) * count` bytes are left of them.
template <class T>
inline __m256i first_words(int64_t count) {
  alignas(32) static constexpr int64_t kWords[8] = {-1, -1, -1, -1, 0, 0, 0, 0};
  return load_bits<__m256i>(reinterpret_cast<const char*>(kWords) + (kLanes<T> - count) * sizeof(T));
}
inline Vector<float> load(const float* p, int64_t count) { return _mm256_maskload_ps(p, first_words<float>(count)); }
inline Vector<double> load(const double* p, int64_t count) { return _mm256_maskload_pd(p, first_words<double>(count)); }
inline void store(float* p, Vector<float> value, int64_t count) {
  _mm256_maskstore_ps(p, first_words<float>(count), value);
}
inline void store(double* p, Vector<double> value, int64_t count) {
  _mm256_maskstore_pd(p, first_words<double>(count), value);
}
#endif

template <class A>
using Integer = std::conditional_t<sizeof(A) == 4, int32_t, int64_t>;

template <class A>
using Integers = typename VectorOf<Integer<A>, kLanes<A>>::Type;

/// 0, 1, 2, ...
template <class A>
struct Counting {
  Integer<A> values[kLanes<A>];

  constexpr Counting() : values() {
    for (int i = 0; i < kLanes<A>; ++i) values[i] = i;
  }
};

template <class A>
constexpr Counting<A> kCounting;

/// The first `count` lanes, and zeros.
template <class A>
inline Vector<A> first_lanes(Vector<A> value, int64_t count) {
  const auto lane = load_bits<Integers<A>>(kCounting<A>.values);
  return lane < static_cast<Integer<A>>(count) ? value : Vector<A>{};
}

/// Calls body(i, load, store) for the registers of `count` elements: load(p) and store(p, v) take what is left at the
/// end.
template <class A, class Body>
inline void for_registers(int64_t count, const Body& body) {
  int64_t i = 0;
  for (; i + kLanes<A> <= count; i += kLanes<A>) {
    body(i, [](auto* p) { return load(p); }, [](auto* p, auto value) { store(p, value); });
  }
  if (i == count) return;
  const int64_t rest = count - i;
  body(i, [=](auto* p) { return load(p, rest); }, [=](auto* p, auto value) { store(p, value, rest); });
}

/// The sum of the lanes, half added to half.
template <class A, int kSize = kLanes<A>>
inline A sum_lanes(const typename VectorOf<A, kSize>::Type& value) {
  if constexpr (kSize == 1) {
    return value[0];
  } else {
    typename VectorOf<A, kSize / 2>::Type halves[2];
    std::memcpy(&halves, &value, sizeof(value));
    return sum_lanes<A, kSize / 2>(halves[0] + halves[1]);
  }
}

/// Adds products up in float64, lane by lane in as many registers as that takes. (Sums in a vector of two registers
/// would live in memory, as all would if add were called.)
template <class A>
class SumOfProducts {
 public:
  __attribute__((always_inline)) void add(const Vector<A>& x, const Vector<A>& y) {
    const Wide wide_x = __builtin_convertvector(x, Wide), wide_y = __builtin_convertvector(y, Wide);
    Vector<double> x_parts[kParts], y_parts[kParts];
    std::memcpy(x_parts, &wide_x, sizeof(Wide));
    std::memcpy(y_parts, &wide_y, sizeof(Wide));
    for (int k = 0; k < kParts; ++k) sums_[k] += x_parts[k] * y_parts[k];
  }

  double total() const {
    Vector<double> sum = sums_[0];
    for (int k = 1; k < kParts; ++k) sum += sums_[k];
    return sum_lanes<double>(sum);
  }

 private:
  using Wide = typename VectorOf<double, kLanes<A>>::Type;
  static constexpr int kParts = kLanes<A> / kLanes<double>;

  Vector<double> sums_[kParts] = {};
};

/// Calls body with a null pointer of the C++ type of a floating-point dtype.
template <class Body>
inline void with_type(DType dtype, const Body& body) {
  switch (dtype) {
    case DType::float32: return body(static_cast<float*>(nullptr));
    case DType::float64: return body(static_cast<double*>(nullptr));
    case DType::bfloat16: return body(static_cast<bfloat16*>(nullptr));
    case DType::float16: return body(static_cast<float16*>(nullptr));
    case DType::int64: return;
  }
}

/// Calls body with null pointers of the C++ types of a parameter and of its moment.
template <class Body>
inline void with_types(DType dtype, DType moment_dtype, const Body& body) {
  with_type(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    if constexpr (!std::is_same_v<T, double>) {
      if (moment_dtype == DType::bfloat16) return body(type, static_cast<bfloat16_moment*>(nullptr));
    }
    body(type, static_cast<Accumulator<T>*>(nullptr));
  });
}

}  // namespace
}  // namespace fisher_kernels::FISHER_KERNELS_CAPABILITY
