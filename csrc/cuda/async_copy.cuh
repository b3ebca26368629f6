#pragma once

#include <cuda_runtime.h>

// Copies to shared memory that pass by the registers, so that many are under way while a warp computes.
namespace fisher_kernels::cuda {

/// Begins a copy of 4, 8 or 16 bytes between addresses that are multiples of so many.
template <int kBytes>
__device__ inline void copy_async(void* to_shared, const void* from) {
  static_assert(kBytes == 4 || kBytes == 8 || kBytes == 16);
#ifdef FISHER_KERNELS_CUDA_ON_HOST
  on_host::begin_copy(to_shared, from, kBytes);
#else
  const auto to = static_cast<unsigned>(__cvta_generic_to_shared(to_shared));
  if constexpr (kBytes == 16) {  // past the first-level cache
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(from) : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(to), "l"(from), "n"(kBytes) : "memory");
  }
#endif
}

/// Asks for what an address holds to be brought into the second-level cache.
__device__ inline void fetch_line([[maybe_unused]] const void* at) {
#ifndef FISHER_KERNELS_CUDA_ON_HOST
  asm volatile("prefetch.global.L2 [%0];" ::"l"(at));
#endif
}

/// Ends a group of this thread's copies.
__device__ inline void end_copies() {
#ifdef FISHER_KERNELS_CUDA_ON_HOST
  on_host::end_copies();
#else
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

/// Waits until no more than so many of this thread's last groups are under way. Other threads see what arrived after
/// their next barrier.
template <int kGroups>
__device__ inline void wait_for_copies() {
#ifdef FISHER_KERNELS_CUDA_ON_HOST
  on_host::wait_for_copies(kGroups);
#else
  asm volatile("cp.async.wait_group %0;" ::"n"(kGroups) : "memory");
#endif
}

}  // namespace fisher_kernels::cuda
