#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#ifdef __F16C__
#include <immintrin.h>
#endif

#include "../common/dtype.h"

#ifndef FISHER_KERNELS_CAPABILITY
#error "FISHER_KERNELS_CAPABILITY names the namespace of this build of the kernels"
#endif

// One SIMD register, written with the vector extensions of GCC and Clang, so that the same source serves every processor.
// Everything here has internal linkage: the linker must never hand code of one capability to another.
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

struct float16 {
  uint16_t bits;
};

/// The type that values of T are computed in.
template <class T>
using Accumulator = std::conditional_t<std::is_same_v<T, double>, double, float>;

template <class A>
struct VectorOf;

template <>
struct VectorOf<float> {
  typedef float Type __attribute__((vector_size(kVectorBytes)));
};

template <>
struct VectorOf<double> {
  typedef double Type __attribute__((vector_size(kVectorBytes)));
};

/// A register of Accumulator<T>.
template <class T>
using Vector = typename VectorOf<Accumulator<T>>::Type;

template <class T>
constexpr int kLanes = kVectorBytes / static_cast<int>(sizeof(Accumulator<T>));

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

// The conversions below take one word (Bits = uint32_t, Float = float) or a register of them.

template <class Float, class Bits>
inline Float widen_bfloat16(Bits half) {
  return bits_as<Float>(half << 16);
}

/// Rounds to nearest even; NaN stays NaN.
template <class Bits, class Float>
inline Bits narrow_to_bfloat16(Float value) {
  const Bits bits = bits_as<Bits>(value);
  const Bits rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const Bits quiet_nan = (bits >> 16) | 0x40u;
  return (bits & 0x7fffffffu) > 0x7f800000u ? quiet_nan : rounded;
}

template <class Float, class Bits>
inline Float widen_float16(Bits half) {
  const Bits sign = (half & 0x8000u) << 16;
  const Bits magnitude = half & 0x7fffu;
  // A multiplication moves the exponent from float16's bias to float32's, and normalises subnormal numbers on the way.
  const Bits finite = bits_as<Bits>(bits_as<Float>(magnitude << 13) * 0x1p112f);
  return bits_as<Float>(sign | (magnitude >= 0x7c00u ? finite | 0x7f800000u : finite));
}

/// Rounds to nearest even; NaN stays NaN.
template <class Bits, class Float>
inline Bits narrow_to_float16(Float value) {
  const Bits bits = bits_as<Bits>(value);
  const Bits sign = (bits >> 16) & 0x8000u;
  const Bits magnitude = bits & 0x7fffffffu;
  const Bits normal = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  // The unit in the last place of 0.5 in float32 is the smallest subnormal number of float16: the addition rounds.
  const Bits subnormal = bits_as<Bits>(bits_as<Float>(magnitude) + 0.5f) - 0x3f000000u;
  const Bits finite = magnitude < 0x38800000u ? subnormal : normal;
  const Bits special = (magnitude > 0x7f800000u ? (magnitude & 0u) + 0x7e00u : (magnitude & 0u) + 0x7c00u);
  return sign | (magnitude >= 0x47800000u ? special : finite);
}

inline float widen(float value) { return value; }
inline double widen(double value) { return value; }
inline float widen(bfloat16 value) { return widen_bfloat16<float>(uint32_t{value.bits}); }
inline float widen(float16 value) { return widen_float16<float>(uint32_t{value.bits}); }

inline Vector<float> load(const float* p) { return load_bits<Vector<float>>(p); }
inline Vector<double> load(const double* p) { return load_bits<Vector<double>>(p); }

inline Words load_half_words(const void* p) {
  return __builtin_convertvector(load_bits<HalfWords>(p), Words);
}

inline void store_half_words(void* p, Words words) {
  const HalfWords half = __builtin_convertvector(words, HalfWords);
  std::memcpy(p, &half, sizeof(half));
}

inline Vector<float> load(const bfloat16* p) { return widen_bfloat16<Vector<float>>(load_half_words(p)); }

inline void store(float* p, Vector<float> value) { std::memcpy(p, &value, sizeof(value)); }
inline void store(double* p, Vector<double> value) { std::memcpy(p, &value, sizeof(value)); }
inline void store(bfloat16* p, Vector<float> value) { store_half_words(p, narrow_to_bfloat16<Words>(value)); }

#if defined(__AVX512F__)
// The masked forms with a full mask: the plain ones make GCC 12 warn of uninitialised values.
inline Vector<float> load(const float16* p) { return _mm512_maskz_cvtph_ps(0xffff, load_bits<__m256i>(p)); }
inline void store(float16* p, Vector<float> value) {
  const __m256i half = _mm512_maskz_cvtps_ph(0xffff, value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  std::memcpy(p, &half, sizeof(half));
}
#elif defined(__F16C__) && defined(__AVX2__)
inline Vector<float> load(const float16* p) { return _mm256_cvtph_ps(load_bits<__m128i>(p)); }
inline void store(float16* p, Vector<float> value) {
  const __m128i half = _mm256_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  std::memcpy(p, &half, sizeof(half));
}
#else
inline Vector<float> load(const float16* p) { return widen_float16<Vector<float>>(load_half_words(p)); }
inline void store(float16* p, Vector<float> value) { store_half_words(p, narrow_to_float16<Words>(value)); }
#endif

/// The first `count` elements at p, and zeros.
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

/// The sum of the lanes, in float64.
template <class V>
inline double sum_lanes(V value) {
  double sum = 0;
  for (size_t i = 0; i < sizeof(value) / sizeof(value[0]); ++i) sum += value[i];
  return sum;
}

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

}  // namespace
}  // namespace fisher_kernels::FISHER_KERNELS_CAPABILITY
