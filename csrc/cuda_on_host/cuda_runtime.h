#pragma once

// CUDA on the host: stands in for the toolkit's header of this name, so that the project's .cu files compile with a
// C++17 compiler and run on the processor. Tests of the kernels need no GPU this way.
//
// Build: put this folder first among the include folders and the toolkit's after it, and compile its .cpp files along:
//
//   g++ -std=c++17 -fopenmp -fvisibility=hidden -I csrc/cuda_on_host -isystem /usr/local/cuda/include
//       -x c++ kernels.cu -x none csrc/cuda_on_host/*.cpp
//
// Types, error codes, half and bfloat16 are the toolkit's own. The toolkit's compiler and libraries are not needed.
//
// Run: `fisher_kernels::on_host::launch` (launch.h) takes the place of <<<...>>>. It runs the whole grid before it
// returns. Blocks spread over OpenMP threads; within a block every CUDA thread is a fiber, and all are on one thread of
// the processor. Shared memory is `fisher_kernels::on_host::shared_memory()`, dynamic only. What multiplies and adds in
// one rounding on the device rounds twice here, unless it says fmaf.
//
// Seen: the launch returns an error, and `last_message()` and cudaGetErrorString name the block and the threads.
// - Barriers that not all reach: threads that have ended, or wait somewhere else.
// - Warp operations: a mask without the caller, or with lanes that the block has not, that have ended or that wait
//   elsewhere; a source lane outside of the mask.
// - Writes just past the shared memory, stack overflows, exceptions, asynchronous copies at odd addresses.
// - Launches that CUDA would refuse: empty or too large, parameters of more than 32,764 bytes, more shared memory than
//   the kernel may have (48 KB, until cudaFuncSetAttribute allows more).
// In one thing it is stricter than CUDA, which lets barriers and masks pass over threads that have ended.
//
// Seen by its effect:
// - Reads of shared memory that nobody wrote: it starts as NaN in every block.
// - Some races: FISHER_KERNELS_HOST_ORDER=forward|reverse|SEED sets the order in which threads, warps and blocks run,
//   and results that differ show a missing barrier. A cheap look, not a proof: equal results prove nothing.
// - With -fsanitize=address, accesses out of bounds, of shared memory too; with -fsanitize=undefined, misaligned vector
//   loads.
// - Asynchronous copies that are read too early: they arrive when their thread waits for them, and never before.
//
// Compiled to be traced (trace/): races of the accesses that were executed, whatever their order.
//
// Tensor cores are functions of a warp (tensor_cores.h): which lane has which number is as on the device, sums are cut
// off as there.
//
// Not seen: occupancy, registers, __launch_bounds__, barriers met at different lines, time; untraced, other data races
// and the memory model. A thread that spins until another writes never ends. Not there: textures, streams (every call
// is complete when it returns), atomics on floating point, static __shared__ variables.

#ifdef __CUDACC__
#error "csrc/cuda_on_host is for host compilers: nvcc must find the toolkit's cuda_runtime.h"
#endif

#include <cuda_runtime_api.h>

// The words of CUDA that the toolkit defines for its own compiler only.
#undef __launch_bounds__
#define __launch_bounds__(...)
#undef __maxnreg__
#define __maxnreg__(...)
#undef __shared__
#define __shared__ \
  _Pragma("GCC error \"CUDA on the host has no __shared__ variables: take dynamic memory, on_host::shared_memory()\"")

#include "atomics.h"
#include "copies.h"
#include "intrinsics.h"
#include "launch.h"
#include "loads.h"
#include "running.h"
#include "tensor_cores.h"
#include "warp.h"

// Forms of the runtime's functions that take a kernel itself.

template <class... Params>
cudaError_t cudaFuncSetAttribute(void (*kernel)(Params...), cudaFuncAttribute attribute, int value) {
  return cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), attribute, value);
}

template <class... Params>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, void (*kernel)(Params...), int block_size,
                                                          size_t shared_bytes) {
  return cudaOccupancyMaxActiveBlocksPerMultiprocessor(blocks, reinterpret_cast<const void*>(kernel), block_size,
                                                       shared_bytes);
}
