#pragma once

// Arithmetic, bits and conversions of device code. What the C library has under the same name (fmaf, sqrtf, ...) is
// left to it.

#include <math.h>
#include <stdlib.h>

#include <cstring>

namespace fisher_kernels::on_host {

/// The same bits as another type.
template <class To, class From>
inline To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(To));
  return to;
}

/// Rounded here and now: keeps the compiler from contracting a product and a sum into one operation, as CUDA
/// promises for the names that end in `_rn`.
template <class T>
inline T rounded(T value) {
#ifdef __x86_64__
  asm("" : "+x"(value));
#elif defined(__aarch64__)
  asm("" : "+w"(value));
#endif
  return value;
}

}  // namespace fisher_kernels::on_host

// Bits.

inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
inline int __clz(int x) { return x == 0 ? 32 : __builtin_clz(static_cast<unsigned>(x)); }
inline int __clzll(long long x) { return x == 0 ? 64 : __builtin_clzll(static_cast<unsigned long long>(x)); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __ffsll(long long x) { return __builtin_ffsll(x); }

inline unsigned __umulhi(unsigned x, unsigned y) {
  return static_cast<unsigned>(static_cast<unsigned long long>(x) * y >> 32);
}
inline int __mulhi(int x, int y) { return static_cast<int>(static_cast<long long>(x) * y >> 32); }
inline unsigned long long __umul64hi(unsigned long long x, unsigned long long y) {
  return static_cast<unsigned long long>(static_cast<unsigned __int128>(x) * y >> 64);
}
inline long long __mul64hi(long long x, long long y) {
  return static_cast<long long>(static_cast<__int128>(x) * y >> 64);
}

// The same bits under another type.

inline unsigned __float_as_uint(float x) { return fisher_kernels::on_host::bits_as<unsigned>(x); }
inline float __uint_as_float(unsigned x) { return fisher_kernels::on_host::bits_as<float>(x); }
inline int __float_as_int(float x) { return fisher_kernels::on_host::bits_as<int>(x); }
inline float __int_as_float(int x) { return fisher_kernels::on_host::bits_as<float>(x); }
inline long long __double_as_longlong(double x) { return fisher_kernels::on_host::bits_as<long long>(x); }
inline double __longlong_as_double(long long x) { return fisher_kernels::on_host::bits_as<double>(x); }
inline int __double2hiint(double x) { return static_cast<int>(__double_as_longlong(x) >> 32); }
inline int __double2loint(double x) { return static_cast<int>(__double_as_longlong(x)); }
inline double __hiloint2double(int high, int low) {
  const auto bits = static_cast<unsigned long long>(static_cast<unsigned>(high)) << 32 | static_cast<unsigned>(low);
  return fisher_kernels::on_host::bits_as<double>(bits);
}

// Arithmetic rounded to nearest even, which no compiler may contract.

inline float __fadd_rn(float x, float y) { return fisher_kernels::on_host::rounded(x + y); }
inline float __fsub_rn(float x, float y) { return fisher_kernels::on_host::rounded(x - y); }
inline float __fmul_rn(float x, float y) { return fisher_kernels::on_host::rounded(x * y); }
inline float __fdiv_rn(float x, float y) { return x / y; }
inline float __fmaf_rn(float x, float y, float z) { return fmaf(x, y, z); }
inline float __fsqrt_rn(float x) { return sqrtf(x); }
inline float __frcp_rn(float x) { return 1.0f / x; }
/// Rounded twice, by way of double: the device rounds once.
inline float __frsqrt_rn(float x) { return static_cast<float>(1.0 / sqrt(static_cast<double>(x))); }

inline double __dadd_rn(double x, double y) { return fisher_kernels::on_host::rounded(x + y); }
inline double __dsub_rn(double x, double y) { return fisher_kernels::on_host::rounded(x - y); }
inline double __dmul_rn(double x, double y) { return fisher_kernels::on_host::rounded(x * y); }
inline double __ddiv_rn(double x, double y) { return x / y; }
inline double __fma_rn(double x, double y, double z) { return fma(x, y, z); }
inline double __dsqrt_rn(double x) { return sqrt(x); }
inline double __drcp_rn(double x) { return 1.0 / x; }

/// Rounded twice: the device's own is within 2 (float) or 1 (double) units in the last place and need not agree.
inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }
inline double rsqrt(double x) { return 1.0 / sqrt(x); }
inline float rsqrt(float x) { return rsqrtf(x); }

// min and max take the types that CUDA's take, not templates: what is ambiguous there is ambiguous here. Of floating
// point they return the operand that is a number.

#define FISHER_KERNELS_HOST_MIN_MAX(R, A, B)                                                                       \
  inline R min(A x, B y) { return static_cast<R>(y) < static_cast<R>(x) ? static_cast<R>(y) : static_cast<R>(x); } \
  inline R max(A x, B y) { return static_cast<R>(x) < static_cast<R>(y) ? static_cast<R>(y) : static_cast<R>(x); }

FISHER_KERNELS_HOST_MIN_MAX(int, int, int)
FISHER_KERNELS_HOST_MIN_MAX(unsigned, unsigned, unsigned)
FISHER_KERNELS_HOST_MIN_MAX(unsigned, unsigned, int)
FISHER_KERNELS_HOST_MIN_MAX(unsigned, int, unsigned)
FISHER_KERNELS_HOST_MIN_MAX(long, long, long)
FISHER_KERNELS_HOST_MIN_MAX(unsigned long, unsigned long, unsigned long)
FISHER_KERNELS_HOST_MIN_MAX(unsigned long, unsigned long, long)
FISHER_KERNELS_HOST_MIN_MAX(unsigned long, long, unsigned long)
FISHER_KERNELS_HOST_MIN_MAX(long long, long long, long long)
FISHER_KERNELS_HOST_MIN_MAX(unsigned long long, unsigned long long, unsigned long long)
FISHER_KERNELS_HOST_MIN_MAX(unsigned long long, unsigned long long, long long)
FISHER_KERNELS_HOST_MIN_MAX(unsigned long long, long long, unsigned long long)
#undef FISHER_KERNELS_HOST_MIN_MAX

inline float min(float x, float y) { return fminf(x, y); }
inline float max(float x, float y) { return fmaxf(x, y); }
inline double min(double x, double y) { return fmin(x, y); }
inline double max(double x, double y) { return fmax(x, y); }
inline double min(float x, double y) { return fmin(x, y); }
inline double max(float x, double y) { return fmax(x, y); }
inline double min(double x, float y) { return fmin(x, y); }
inline double max(double x, float y) { return fmax(x, y); }
