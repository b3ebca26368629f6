// Kernels with a fault each, which CUDA on the host must name.

#include <stdexcept>

#include "fiber.h"
#include "interface.h"

namespace {

enum class Fault {
  return_before_barrier,
  return_before_shuffle,
  return_before_product,
  barrier_or_warp,
  two_barriers,
  two_shuffles,
  two_masks,
  own_lane,
  lanes_beyond,
  source_lane,
  width,
  shared_memory,
  stack,
  exception,
  launch,
  asynchronous_copy,
  second_block,
};

__global__ void harmless_kernel() {}

/// Fills more than a stack holds.
__device__ __attribute__((noinline)) void deep() {
  volatile char frame[FISHER_KERNELS_HOST_STACK_BYTES];
  for (char volatile& byte : frame) byte = 1;
}

__global__ void faulty_kernel(Fault fault) {
  const unsigned i = threadIdx.x;
  const int value = static_cast<int>(i);
  switch (fault) {
    case Fault::return_before_barrier:
      if (i == 3) return;
      __syncthreads();
      break;
    case Fault::return_before_shuffle:
      if (i == 9) return;
      __shfl_sync(kAllLanes, value, 0);
      break;
    case Fault::return_before_product: {
      if (i == 9) return;
      fisher_kernels::on_host::MatrixProduct product{};
      fisher_kernels::on_host::multiply_bfloat16(product);
      break;
    }
    case Fault::barrier_or_warp:
      if (i == 5) __syncthreads();
      __syncwarp();
      break;
    case Fault::two_barriers:
      if (i == 7) {
        __syncthreads_count(1);
      } else {
        __syncthreads();
      }
      break;
    case Fault::two_shuffles:
      if (i == 1) {
        __shfl_up_sync(kAllLanes, value, 1);
      } else {
        __shfl_down_sync(kAllLanes, value, 1);
      }
      break;
    case Fault::two_masks: __ballot_sync(i == 2 ? 0xffffu : kAllLanes, 1); break;
    case Fault::own_lane: __any_sync(0xfffffffeu, 1); break;
    case Fault::lanes_beyond:
      if (i >= 32) __syncwarp();
      break;
    case Fault::source_lane: __shfl_sync(i < 16 ? 0xffffu : 0xffff0000u, value, i < 16 ? 20 : 16); break;
    case Fault::width: __shfl_sync(kAllLanes, value, 0, 12); break;
    case Fault::shared_memory:
      if (i == 0) shared_memory()[70] = 1;
      break;
    case Fault::stack:
      if (i == 0) deep();
      break;
    case Fault::exception:
      if (i == 4) throw std::runtime_error("four");
      __syncthreads();
      break;
    case Fault::launch: launch(harmless_kernel, dim3(1), dim3(1), 0, nullptr); break;
    case Fault::asynchronous_copy:
      fisher_kernels::on_host::begin_copy(shared_memory() + 8 * i, shared_memory() + 64, i == 1 ? 16 : 8);
      break;
    case Fault::second_block:
      if (blockIdx.y == 1 && i == 0) return;
      __syncthreads();
      break;
  }
}

/// Goes wrong in the last block, after the others have taken a while.
__global__ void late_kernel() {
  for (int i = 0; i < 50; ++i) __syncthreads();
  if (blockIdx.x == gridDim.x - 1 && threadIdx.x == 0) return;
  __syncthreads();
}

struct Parameters {
  char bytes[32764];
};

struct TooLarge {
  char bytes[32765];
};

__global__ void largest_table_kernel(Parameters) {}
__global__ void too_large_table_kernel(TooLarge) {}
__global__ void roomy_kernel() {}

}  // namespace

/// Launches the kernel with the fault of this number, on a block that ends within a warp.
EXPORTED int faulty(int fault) {
  const dim3 grid = static_cast<Fault>(fault) == Fault::second_block ? dim3(1, 2) : dim3(1);
  const dim3 block = static_cast<Fault>(fault) == Fault::lanes_beyond ? dim3(40) : dim3(64);
  return launch(faulty_kernel, grid, block, 64, nullptr, static_cast<Fault>(fault));
}

EXPORTED int late(int blocks) { return launch(late_kernel, dim3(blocks), dim3(128), 0, nullptr); }

EXPORTED int empty(unsigned grid_x, unsigned grid_y, unsigned block_x, unsigned block_z, size_t shared_bytes) {
  return launch(harmless_kernel, dim3(grid_x, grid_y), dim3(block_x, 1, block_z), shared_bytes, nullptr);
}

/// With as much shared memory as asked for before.
EXPORTED int roomy(int allowed_bytes, size_t shared_bytes) {
  const auto attribute = cudaFuncAttributeMaxDynamicSharedMemorySize;
  if (const cudaError_t error = cudaFuncSetAttribute(roomy_kernel, attribute, allowed_bytes)) return error;
  return launch(roomy_kernel, dim3(1), dim3(32), shared_bytes, nullptr);
}

EXPORTED int largest_table() { return launch(largest_table_kernel, dim3(1), dim3(64), 0, nullptr, Parameters{}); }
EXPORTED int too_large_table() { return launch(too_large_table_kernel, dim3(1), dim3(64), 0, nullptr, TooLarge{}); }

EXPORTED int last_error() { return cudaGetLastError(); }
EXPORTED const char* error_string(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }
EXPORTED const char* error_name(int error) { return cudaGetErrorName(static_cast<cudaError_t>(error)); }
