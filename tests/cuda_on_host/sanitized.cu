// A program whose argument says which access it gets wrong, for a build with sanitizers.

#include <string_view>

#include "interface.h"

namespace {

/// Doubles four numbers at a time, by way of shared memory.
__global__ void double_kernel(float* x, int skipped, int written, int shared) {
  auto* mine = reinterpret_cast<float4*>(shared_memory()) + threadIdx.x;
  *mine = reinterpret_cast<const float4*>(x + skipped)[threadIdx.x];
  __syncthreads();
  if (threadIdx.x == 0) shared_memory()[shared] = shared_memory()[0];
  const float more = __shfl_xor_sync(kAllLanes, mine->y, 0);
  reinterpret_cast<float4*>(x + written)[threadIdx.x] = {2 * mine->x, 2 * more, 2 * mine->z, 2 * mine->w};
}

}  // namespace

int main(int, char** arguments) {
  const std::string_view fault = arguments[1];
  constexpr int kThreads = 64;
  constexpr int kBytes = kThreads * sizeof(float4);
  auto* x = new float[4 * (kThreads + 1)]();
  const int skipped = fault == "misaligned" ? 1 : 0;
  const int written = fault == "global" ? 8 : 0;
  const int shared = fault == "shared" ? kBytes : 0;
  const int error = launch(double_kernel, dim3(3), dim3(kThreads), kBytes, nullptr, x, skipped, written, shared);
  delete[] x;
  return error;
}
