// The functions of the CUDA runtime that launches need, for one device: the processor.

#include "runtime_api.h"

#include <algorithm>
#include <cstring>
#include <mutex>
#include <unordered_map>

#include "running.h"
#include "shared_memory.h"

namespace fisher_kernels::on_host {

namespace {

constexpr size_t kDefaultSharedBytes = 48 * 1024;
// Small, so that a kernel that sizes its grid by them walks it in several strides.
constexpr int kMultiprocessors = 4;
constexpr int kBlocksPerMultiprocessor = 2;

thread_local cudaError_t last_error = cudaSuccess;

std::mutex attributes_mutex;
std::unordered_map<const void*, size_t> shared_bytes_of;  // kernels that were allowed more than the default

cudaError_t returned(cudaError_t error) {
  set_last_error(error);
  return error;
}

}  // namespace

size_t allowed_shared_bytes(const void* kernel) {
  const std::lock_guard<std::mutex> lock(attributes_mutex);
  const auto found = shared_bytes_of.find(kernel);
  return found == shared_bytes_of.end() ? kDefaultSharedBytes : std::max(found->second, kDefaultSharedBytes);
}

void set_last_error(cudaError_t error) {
  if (error != cudaSuccess) last_error = error;
}

}  // namespace fisher_kernels::on_host

using namespace fisher_kernels::on_host;

cudaError_t cudaGetLastError() {
  const cudaError_t error = last_error;
  last_error = cudaSuccess;
  return error;
}

cudaError_t cudaPeekAtLastError() { return last_error; }

const char* cudaGetErrorName(cudaError_t error) {
  switch (error) {
    case cudaSuccess: return "cudaSuccess";
    case cudaErrorInvalidValue: return "cudaErrorInvalidValue";
    case cudaErrorInvalidConfiguration: return "cudaErrorInvalidConfiguration";
    case cudaErrorInvalidDevice: return "cudaErrorInvalidDevice";
    case cudaErrorIllegalAddress: return "cudaErrorIllegalAddress";
    case cudaErrorLaunchOutOfResources: return "cudaErrorLaunchOutOfResources";
    case cudaErrorLaunchFailure: return "cudaErrorLaunchFailure";
    default: return "an error that CUDA on the host does not return";
  }
}

/// The message of the last launch, if that is where the error is from: it says more than a name.
const char* cudaGetErrorString(cudaError_t error) {
  const char* message = explanation(error);
  return message != nullptr ? message : cudaGetErrorName(error);
}

cudaError_t cudaGetDeviceCount(int* count) {
  *count = 1;
  return cudaSuccess;
}

cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}

cudaError_t cudaSetDevice(int device) { return returned(device == 0 ? cudaSuccess : cudaErrorInvalidDevice); }

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
  if (device != 0) return returned(cudaErrorInvalidDevice);
  switch (attribute) {
    case cudaDevAttrMaxThreadsPerBlock: *value = 1024; break;
    case cudaDevAttrMaxThreadsPerMultiProcessor: *value = 2048; break;
    case cudaDevAttrMultiProcessorCount: *value = kMultiprocessors; break;
    case cudaDevAttrWarpSize: *value = kWarpSize; break;
    case cudaDevAttrMaxSharedMemoryPerBlock: *value = kDefaultSharedBytes; break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = kMaxSharedBytes; break;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor: *value = kMaxSharedBytes + 1024; break;
    case cudaDevAttrReservedSharedMemoryPerBlock: *value = 1024; break;
    case cudaDevAttrComputeCapabilityMajor: *value = 9; break;
    case cudaDevAttrComputeCapabilityMinor: *value = 0; break;
    default: return returned(cudaErrorInvalidValue);
  }
  return cudaSuccess;
}

cudaError_t cudaDriverGetVersion(int* version) {
  *version = CUDART_VERSION;
  return cudaSuccess;
}

cudaError_t cudaRuntimeGetVersion(int* version) {
  *version = CUDART_VERSION;
  return cudaSuccess;
}

cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute attribute, int value) {
  if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize) return cudaSuccess;  // hints
  if (value < 0 || static_cast<size_t>(value) > kMaxSharedBytes) return returned(cudaErrorInvalidValue);
  const std::lock_guard<std::mutex> lock(attributes_mutex);
  shared_bytes_of[kernel] = value;
  return cudaSuccess;
}

cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, const void* kernel, int block_size,
                                                          size_t shared_bytes) {
  if (block_size < 1) return returned(cudaErrorInvalidValue);
  const bool fits = block_size <= 1024 && shared_bytes <= allowed_shared_bytes(kernel);
  *blocks = fits ? kBlocksPerMultiprocessor : 0;
  return cudaSuccess;
}

cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind, cudaStream_t) {
  std::memcpy(to, from, bytes);
  return cudaSuccess;
}

cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t) {
  std::memset(to, value, bytes);
  return cudaSuccess;
}

cudaError_t cudaDeviceSynchronize() { return cudaSuccess; }

cudaError_t cudaStreamSynchronize(cudaStream_t) { return cudaSuccess; }
