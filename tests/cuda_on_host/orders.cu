// What the order of threads, warps and blocks changes, and what it must not.

#include "interface.h"

namespace {

/// Everyone reads its right neighbour, with a barrier between write and read or without.
__global__ void neighbours_kernel(int* out, bool has_barrier) {
  auto* cells = reinterpret_cast<int*>(shared_memory());
  cells[threadIdx.x] = static_cast<int>(threadIdx.x);
  if (has_barrier) __syncthreads();
  out[threadIdx.x] = cells[(threadIdx.x + 1) % blockDim.x];
}

/// The same within a warp, between two of its meetings.
__global__ void lanes_kernel(int* out, bool has_barrier) {
  auto* cells = reinterpret_cast<int*>(shared_memory());
  const int mine = __shfl_xor_sync(kAllLanes, static_cast<int>(threadIdx.x), 1);
  cells[threadIdx.x] = mine;
  if (has_barrier) __syncwarp();
  out[threadIdx.x] = cells[(threadIdx.x + 1) % blockDim.x];
}

/// The order in which blocks and threads come.
__global__ void arrivals_kernel(unsigned* turn, int* out) {
  out[atomicAdd(turn, 1)] = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
}

}  // namespace

EXPORTED int neighbours(int* out, int threads, bool has_barrier) {
  return launch(neighbours_kernel, dim3(1), dim3(threads), threads * sizeof(int), nullptr, out, has_barrier);
}

EXPORTED int lanes(int* out, int threads, bool has_barrier) {
  return launch(lanes_kernel, dim3(1), dim3(threads), threads * sizeof(int), nullptr, out, has_barrier);
}

EXPORTED int arrivals(int* out, int blocks, int threads) {
  unsigned turn = 0;
  return launch(arrivals_kernel, dim3(blocks), dim3(threads), 0, nullptr, &turn, out);
}
