// The toolkit's bfloat16 and half, each pattern or number by a CUDA thread of its own.

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "interface.h"

namespace {

__device__ float widened(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ float widened(__half x) { return __half2float(x); }
__device__ void narrow(float x, __nv_bfloat16* out) { *out = __float2bfloat16_rn(x); }
__device__ void narrow(float x, __half* out) { *out = __float2half_rn(x); }

template <class T>
__global__ void widen_kernel(const T* in, float* out, int size) {
  const int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  if (i < size) out[i] = widened(in[i]);
}

template <class T>
__global__ void narrow_kernel(const float* in, T* out, int size) {
  const int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  if (i < size) narrow(in[i], out + i);
}

dim3 blocks(int size) { return dim3((size + 255) / 256); }

}  // namespace

EXPORTED int widen_bfloat16(const void* in, float* out, int size) {
  return launch(widen_kernel<__nv_bfloat16>, blocks(size), dim3(256), 0, nullptr, static_cast<const __nv_bfloat16*>(in),
                out, size);
}

EXPORTED int widen_float16(const void* in, float* out, int size) {
  return launch(widen_kernel<__half>, blocks(size), dim3(256), 0, nullptr, static_cast<const __half*>(in), out, size);
}

EXPORTED int narrow_bfloat16(const float* in, void* out, int size) {
  return launch(narrow_kernel<__nv_bfloat16>, blocks(size), dim3(256), 0, nullptr, in, static_cast<__nv_bfloat16*>(out),
                size);
}

EXPORTED int narrow_float16(const float* in, void* out, int size) {
  return launch(narrow_kernel<__half>, blocks(size), dim3(256), 0, nullptr, in, static_cast<__half*>(out), size);
}
