// Kernels that are right, for what CUDA on the host must compute.

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

using fisher_kernels::on_host::launch;
using fisher_kernels::on_host::shared_memory;

namespace {

constexpr unsigned kAllLanes = 0xffffffffu;

template <class T>
__device__ T warp_sum(T value) {
  for (int lanes = warpSize / 2; lanes > 0; lanes /= 2) value += __shfl_down_sync(kAllLanes, value, lanes);
  return value;
}

/// Adds up integers: lanes by shuffles, warps by shared memory, blocks by an atomic.
__global__ void __launch_bounds__(256) sum_kernel(const int* __restrict__ x, int64_t size, unsigned long long* sum) {
  auto* partial = reinterpret_cast<long long*>(shared_memory());
  long long mine = 0;
  const int64_t stride = int64_t{blockDim.x} * gridDim.x;
  for (int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; i < size; i += stride) mine += __ldg(x + i);
  mine = warp_sum(mine);
  if (threadIdx.x % warpSize == 0) partial[threadIdx.x / warpSize] = mine;
  __syncthreads();
  if (threadIdx.x < warpSize) {
    const unsigned warps = blockDim.x / warpSize;
    mine = warp_sum(threadIdx.x < warps ? partial[threadIdx.x] : 0LL);
    if (threadIdx.x == 0) atomicAdd(sum, static_cast<unsigned long long>(mine));
  }
}

/// Counts visits to the cells of a 3-D grid and writes down who came.
__global__ void places_kernel(int* visits, int* places) {
  const dim3 size(gridDim.x * blockDim.x, gridDim.y * blockDim.y, gridDim.z * blockDim.z);
  const unsigned x = blockIdx.x * blockDim.x + threadIdx.x;
  const unsigned y = blockIdx.y * blockDim.y + threadIdx.y;
  const unsigned z = blockIdx.z * blockDim.z + threadIdx.z;
  const unsigned cell = (z * size.y + y) * size.x + x;
  atomicAdd(visits + cell, 1);
  places[3 * cell] = static_cast<int>(x);
  places[3 * cell + 1] = static_cast<int>(y);
  places[3 * cell + 2] = static_cast<int>(z);
}

struct Table {
  int64_t numbers[4000];  // 32,000 bytes, near the limit of kernel parameters
};

__global__ void table_kernel(const __grid_constant__ Table table, int64_t* out, int size) {
  const int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  if (i < size) out[i] = table.numbers[i];
}

}  // namespace

extern "C" {

__attribute__((visibility("default"))) int sum(const int* x, int64_t size, int blocks, int threads, unsigned long long* sum) {
  return launch(sum_kernel, dim3(blocks), dim3(threads), threads / 32 * sizeof(long long), nullptr, x, size, sum);
}

__attribute__((visibility("default"))) int places(int* visits, int* out) {
  return launch(places_kernel, dim3(3, 2, 2), dim3(5, 3, 4), 0, nullptr, visits, out);
}
__attribute__((visibility("default"))) int table(const int64_t* in, int64_t* out) {
  Table t;
  for (int i = 0; i < 4000; ++i) t.numbers[i] = in[i];
  return launch(table_kernel, dim3(32), dim3(128), 0, nullptr, t, out, 4000);
}
__attribute__((visibility("default"))) const char* message() { return fisher_kernels::on_host::last_message().c_str(); }
}
