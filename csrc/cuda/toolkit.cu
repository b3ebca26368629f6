#include "launch.cuh"
#include "kernels.h"

namespace fisher_kernels::cuda {

Toolkit toolkit() {
  Toolkit toolkit{nullptr, FISHER_KERNELS_CUDA_ARCHS, CUDART_VERSION, 0};
  // Without a driver there is an error, and the version stays 0.
  if (cudaDriverGetVersion(&toolkit.driver) != cudaSuccess) cudaGetLastError();
  return toolkit;
}

}  // namespace fisher_kernels::cuda
