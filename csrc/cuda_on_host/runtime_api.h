#pragma once

// What launches and the runtime's functions know of each other.

#include <cuda_runtime_api.h>

#include <cstddef>

namespace fisher_kernels::on_host {

/// Dynamic shared memory that a kernel may be launched with: more than 48 KB only by cudaFuncSetAttribute.
size_t allowed_shared_bytes(const void* kernel);

/// What cudaGetLastError will return to this thread of the processor, unless it is cudaSuccess.
void set_last_error(cudaError_t error);

/// What the last launch from this thread of the processor says of `error`; null if it says nothing.
const char* explanation(cudaError_t error);

}  // namespace fisher_kernels::on_host
