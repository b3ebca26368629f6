// Intrinsics, one row of the results for each.

#include "interface.h"

namespace {

__global__ void bits_kernel(const unsigned* x, const unsigned* y, int size, int* out) {
  const int i = static_cast<int>(threadIdx.x);
  const unsigned a = __ldg(x + i);
  const unsigned b = __ldcs(y + i);
  const auto wide = static_cast<unsigned long long>(a) << 32 | b;
  int row = 0;
  const auto put = [&](int value) { __stcs(out + row++ * size + i, value); };
  put(__popc(a));
  put(__popcll(wide));
  put(__clz(static_cast<int>(a)));
  put(__clzll(static_cast<long long>(wide)));
  put(__ffs(static_cast<int>(a)));
  put(__ffsll(static_cast<long long>(wide)));
  put(static_cast<int>(__umulhi(a, b)));
  put(static_cast<int>(__umul64hi(wide, wide) >> 32));
  put(static_cast<int>(min(a, b)));
  put(max(static_cast<int>(a), static_cast<int>(b)));
  put(static_cast<int>(__float_as_uint(__uint_as_float(a))));
  put(__float_as_int(__int_as_float(static_cast<int>(a))));
  const double joined = __hiloint2double(static_cast<int>(a), static_cast<int>(b));
  put(static_cast<int>(__double_as_longlong(joined) >> 32));
  put(__double2loint(__longlong_as_double(__double_as_longlong(joined))));
}

__global__ void floats_kernel(const float* x, const float* y, int size, float* out) {
  const int i = static_cast<int>(threadIdx.x);
  const float a = __ldcg(x + i);
  const float b = y[i];
  int row = 0;
  const auto put = [&](float value) { __stcg(out + row++ * size + i, value); };
  put(__fadd_rn(a, b));
  put(__fsub_rn(a, b));
  put(__fmul_rn(a, b));
  put(__fdiv_rn(a, b));
  put(__fsqrt_rn(a));
  put(__frcp_rn(a));
  put(__frsqrt_rn(a));
  put(rsqrtf(a));
  put(min(a, b));
  put(max(a, b));
  put(__fmaf_rn(a, b, -__fmul_rn(a, b)));
}

__global__ void doubles_kernel(const double* x, const double* y, int size, double* out) {
  const int i = static_cast<int>(threadIdx.x);
  const double a = x[i];
  const double b = y[i];
  int row = 0;
  const auto put = [&](double value) { out[row++ * size + i] = value; };
  put(__dadd_rn(a, b));
  put(__dsub_rn(a, b));
  put(__dmul_rn(a, b));
  put(__ddiv_rn(a, b));
  put(__dsqrt_rn(a));
  put(__drcp_rn(a));
  put(rsqrt(a));
  put(min(a, b));
  put(max(a, b));
  put(__fma_rn(a, b, -__dmul_rn(a, b)));
}

}  // namespace

EXPORTED int bits(const unsigned* x, const unsigned* y, int size, int* out) {
  return launch(bits_kernel, dim3(1), dim3(size), 0, nullptr, x, y, size, out);
}

EXPORTED int floats(const float* x, const float* y, int size, float* out) {
  return launch(floats_kernel, dim3(1), dim3(size), 0, nullptr, x, y, size, out);
}

EXPORTED int doubles(const double* x, const double* y, int size, double* out) {
  return launch(doubles_kernel, dim3(1), dim3(size), 0, nullptr, x, y, size, out);
}

/// What a launcher asks the runtime; the numbers end with the kernel's blocks per multiprocessor.
EXPORTED int runtime(int* numbers, int* cells, int size) {
  const cudaDeviceAttr attributes[] = {cudaDevAttrMultiProcessorCount, cudaDevAttrMaxSharedMemoryPerBlockOptin,
                                       cudaDevAttrComputeCapabilityMajor, cudaDevAttrComputeCapabilityMinor};
  int device = -1;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) error = cudaSetDevice(device);
  for (const cudaDeviceAttr attribute : attributes) {
    if (error == cudaSuccess) error = cudaDeviceGetAttribute(numbers++, attribute, device);
  }
  if (error == cudaSuccess) error = cudaMemsetAsync(cells, 0xff, size * sizeof(int), nullptr);
  if (error == cudaSuccess) {
    error = cudaMemcpyAsync(cells, cells + size, sizeof(int), cudaMemcpyDeviceToDevice, nullptr);
  }
  if (error == cudaSuccess) error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(numbers, floats_kernel, 256, 0);
  return error;
}
