#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <utility>

#include "common/stream.h"
#ifdef FISHER_KERNELS_CUDA_ON_HOST
#include "launch.h"
#endif

// How every kernel is started, and the shared memory it finds.
namespace fisher_kernels::cuda {

/// Throws std::runtime_error unless a call of the runtime succeeded.
inline void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  const std::string text = std::string(what) + ": CUDA error " + cudaGetErrorName(error) + ": " + cudaGetErrorString(error);
  cudaGetLastError();  // the next launch is not to be blamed for it
  throw std::runtime_error(text);
}

/// Makes the device of a stream current for as long as the object lives.
class DeviceGuard {
 public:
  explicit DeviceGuard(const Stream& stream) : device_(stream.device) {
    if (device_ < 0) return;
    check(cudaGetDevice(&previous_), "cudaGetDevice");
    if (previous_ != device_) check(cudaSetDevice(device_), "cudaSetDevice");
  }
  ~DeviceGuard() {
    if (device_ >= 0 && previous_ != device_) cudaSetDevice(previous_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int device_;
  int previous_ = -1;
};

/// Bytes of shared memory that a thread block of the current device may have.
inline int most_shared_bytes() {
  int device = 0, bytes = 0;
  check(cudaGetDevice(&device), "cudaGetDevice");
  check(cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device), "cudaDeviceGetAttribute");
  return bytes;
}

/// Queues a kernel on a stream, on the current device. Nothing happens where the grid is empty.
template <class... Parameters, class... Arguments>
void launch(const char* name, void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes,
            const Stream& stream, Arguments&&... arguments) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return;
  const auto handle = static_cast<cudaStream_t>(stream.handle);
  constexpr size_t kWithoutAsking = 48 * 1024;
  if (shared_bytes > kWithoutAsking) {
    // All there is, at every launch: were it what this one needs, a smaller one from another thread could take from it
    // what was just allowed.
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most_shared_bytes()), name);
  }
#ifdef FISHER_KERNELS_CUDA_ON_HOST
  check(on_host::launch(kernel, grid, block, shared_bytes, handle, std::forward<Arguments>(arguments)...), name);
#else
  kernel<<<grid, block, shared_bytes, handle>>>(std::forward<Arguments>(arguments)...);
  check(cudaGetLastError(), name);
#endif
}

/// The dynamic shared memory of this block, all that kernels use: not initialised.
template <class T>
__device__ T& shared_memory() {
#ifdef FISHER_KERNELS_CUDA_ON_HOST
  return *reinterpret_cast<T*>(on_host::shared_memory());
#else
  extern __shared__ __align__(128) unsigned char bytes[];
  return *reinterpret_cast<T*>(bytes);
#endif
}

/// ceil(count / size), for counts of at least 0.
template <class Integer>
__host__ __device__ constexpr Integer divide_up(Integer count, Integer size) {
  return count / size + (count % size != 0);
}

}  // namespace fisher_kernels::cuda
