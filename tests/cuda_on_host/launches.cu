// What the kernels' own launches ask of the runtime.

#include "cuda/launch.cuh"
#include "interface.h"

namespace {

__global__ void shared_by_sizes_kernel() {}

}  // namespace

/// Launches a kernel with some shared memory and then with other; then with the first again, without asking for it.
EXPORTED int launched_in_turns(size_t first_bytes, size_t second_bytes) {
  for (const size_t bytes : {first_bytes, second_bytes}) {
    fisher_kernels::cuda::launch("test", shared_by_sizes_kernel, 1, 32, bytes, {-1, nullptr});
  }
  return launch(shared_by_sizes_kernel, dim3(1), dim3(32), first_bytes, nullptr);
}
