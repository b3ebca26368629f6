#pragma once

#include "types.cuh"

// Sums whose order depends on nothing but the shape of what is summed.
namespace fisher_kernels::cuda {

/// The sum over the lanes of a warp, in all of them, always in the same order.
template <class T>
__device__ inline T warp_sum(T value) {
#pragma unroll
  for (int distance = kWarp / 2; distance > 0; distance /= 2) value += __shfl_xor_sync(kAllLanes, value, distance);
  return value;
}

/// The sum over a block of whole warps, in its first thread; `partials` has room in shared memory for one entry a warp.
/// All threads call it, and may use the memory again after the next barrier.
template <class T>
__device__ inline T block_sum(T value, T* partials) {
  value = warp_sum(value);
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp;
  if (lane == 0) partials[warp] = value;
  __syncthreads();
  if (warp == 0) value = warp_sum(lane < warps ? partials[lane] : T(0));
  return value;
}

}  // namespace fisher_kernels::cuda
