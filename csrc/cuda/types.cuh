#pragma once

#include <cuda_runtime.h>

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

#include "common/dtype.h"
#include "common/scalar.h"

// Element types: what they are called on a GPU, how they are widened, narrowed, and moved 16 bytes at a time.
namespace fisher_kernels::cuda {

constexpr int kWarp = 32;  // threads
constexpr unsigned kAllLanes = 0xffffffffu;
constexpr int kVectorBytes = 16;  // of the widest load

/// A moment in 16 bits: what is finite stays so when it is narrowed.
struct bfloat16_moment {
  __nv_bfloat16 value;
};

/// The type in which values of T are summed and averaged.
template <class T>
using Accumulator = std::conditional_t<std::is_same_v<T, double>, double, float>;

__device__ inline float widen(float x) { return x; }
__device__ inline double widen(double x) { return x; }
__device__ inline float widen(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ inline float widen(__half x) { return __half2float(x); }
__device__ inline float widen(bfloat16_moment x) { return widen(x.value); }

/// To the nearest, ties to even.
template <class T>
__device__ inline T narrow(Accumulator<T> x) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    return __float2bfloat16_rn(x);
  } else if constexpr (std::is_same_v<T, __half>) {
    return __float2half_rn(x);
  } else if constexpr (std::is_same_v<T, bfloat16_moment>) {
    const unsigned short bits = __bfloat16_as_ushort(__float2bfloat16_rn(x));
    const bool is_over = (bits & 0x7fff) == 0x7f80 && x * 0 == 0;
    return {__ushort_as_bfloat16(is_over ? bits - 1 : bits)};
  } else {
    return x;
  }
}

/// No difference of x and x: fused with the product that x may be, it would be that product's rounding error.
template <class A>
__device__ inline bool is_finite(A x) {
  return x * 0 == 0;
}

template <class T>
struct Type {
  using type = T;
};

/// Calls f(Type<T>()) for the type of a floating-point dtype.
template <class F>
void for_type(DType dtype, F&& f) {
  switch (dtype) {
    case DType::float32: return f(Type<float>());
    case DType::float64: return f(Type<double>());
    case DType::bfloat16: return f(Type<__nv_bfloat16>());
    case DType::float16: return f(Type<__half>());
    case DType::int64: return;
  }
}

/// Calls f(Type<T>(), Type<M>()) for the types of parameters and their moments.
template <class F>
void for_types(DType dtype, DType moment_dtype, F&& f) {
  for_type(dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    if constexpr (!std::is_same_v<T, double>) {
      if (moment_dtype == DType::bfloat16) return f(type, Type<bfloat16_moment>());
    }
    f(type, Type<Accumulator<T>>());
  });
}

/// The same for the dtypes of state: float32 and float64.
template <class F>
void for_wide_type(DType dtype, F&& f) {
  dtype == DType::float64 ? f(Type<double>()) : f(Type<float>());
}

/// A number that the host knows, or one of the device.
__device__ inline double load(const Scalar& scalar) {
  if (scalar.data == nullptr) return scalar.value;
  return scalar.dtype == DType::float64 ? *static_cast<const double*>(scalar.data)
                                        : static_cast<double>(*static_cast<const float*>(scalar.data));
}

/// N elements that lie side by side.
template <class T, int N>
struct Pack {
  T at[N];
};

/// Whether 16 bytes at a time can be moved from here on.
__host__ __device__ inline bool is_aligned(const void* pointer) {
  return reinterpret_cast<uintptr_t>(pointer) % kVectorBytes == 0;
}

/// N elements from an address that is a multiple of their size, or of 16 bytes where they are more.
template <int N, class T>
__device__ inline Pack<T, N> load_pack(const T* from) {
  constexpr int kBytes = static_cast<int>(sizeof(T)) * N, kStep = kBytes < kVectorBytes ? kBytes : kVectorBytes;
  static_assert(kBytes % kStep == 0 && (kStep & (kStep - 1)) == 0, "a power of two, or a multiple of 16 bytes");
  struct alignas(kStep) Vector {
    T at[kStep / sizeof(T)];
  };
  Pack<T, N> pack;
#pragma unroll
  for (int i = 0; i < kBytes / kStep; ++i) {
    const Vector vector = reinterpret_cast<const Vector*>(from)[i];
#pragma unroll
    for (int k = 0; k < static_cast<int>(kStep / sizeof(T)); ++k) pack.at[i * (kStep / sizeof(T)) + k] = vector.at[k];
  }
  return pack;
}

template <int N, class T>
__device__ inline void store_pack(T* to, const Pack<T, N>& pack) {
  constexpr int kBytes = static_cast<int>(sizeof(T)) * N, kStep = kBytes < kVectorBytes ? kBytes : kVectorBytes;
  static_assert(kBytes % kStep == 0 && (kStep & (kStep - 1)) == 0, "a power of two, or a multiple of 16 bytes");
  struct alignas(kStep) Vector {
    T at[kStep / sizeof(T)];
  };
#pragma unroll
  for (int i = 0; i < kBytes / kStep; ++i) {
    Vector vector;
#pragma unroll
    for (int k = 0; k < static_cast<int>(kStep / sizeof(T)); ++k) vector.at[k] = pack.at[i * (kStep / sizeof(T)) + k];
    reinterpret_cast<Vector*>(to)[i] = vector;
  }
}

}  // namespace fisher_kernels::cuda
