// Kernels that are right, and wrong once `kFault` is set: each fault is one that the trace must name.

#include <utility>

#include "../cuda_on_host/interface.h"

namespace {

constexpr int kThreads = 64;
constexpr int kBlocks = 4;

struct Params {
  int* out;           // kBlocks * kThreads
  const int* in;      // likewise
  unsigned* counter;  // 0
};

__device__ int* memory() { return reinterpret_cast<int*>(shared_memory()); }

__device__ int* own(const Params& params) { return params.out + blockIdx.x * kThreads + threadIdx.x; }

// Shared memory.

template <bool kFault>
__global__ void barrier(Params params) {
  const int i = threadIdx.x;
  memory()[i] = i;
  if (!kFault) __syncthreads();
  *own(params) = memory()[(i + 32) % kThreads];
}

template <bool kFault>
__global__ void barrier_after_reading(Params params) {
  const int i = threadIdx.x;
  int sum = 0;
  for (int round = 0; round < 3; ++round) {
    memory()[i] = round;
    __syncthreads();
    sum += memory()[(i + 32) % kThreads];
    if (!kFault) __syncthreads();
  }
  *own(params) = sum;
}

template <bool kFault>
__global__ void two_buffers(Params params) {
  const int i = threadIdx.x;
  int sum = 0;
  for (int round = 0; round < 4; ++round) {
    int* buffer = memory() + (kFault ? 0 : round % 2 * kThreads);
    buffer[i] = round;
    __syncthreads();
    sum += buffer[(i + 32) % kThreads];
  }
  *own(params) = sum;
}

template <bool kFault>
__global__ void warp(Params params) {
  const int i = threadIdx.x;
  memory()[i] = i;
  if (!kFault) __syncwarp();
  *own(params) = memory()[i ^ 1];
}

/// A shuffle brings lanes together and orders nothing in memory.
template <bool kFault>
__global__ void shuffle(Params params) {
  const int i = threadIdx.x;
  memory()[i] = i;
  const int more = __shfl_xor_sync(kAllLanes, i, 1);
  if (!kFault) __syncwarp();
  *own(params) = memory()[i ^ 1] + more;
}

template <bool kFault>
__global__ void half_a_warp(Params params) {
  const int i = threadIdx.x;
  memory()[i] = i;
  __syncwarp(i % 32 < 16 ? 0x0000ffffu : 0xffff0000u);
  *own(params) = memory()[kFault ? i ^ 16 : i ^ 1];
}

/// Half words beside each other are two places.
template <bool kFault>
__global__ void half_words(Params params) {
  const int i = threadIdx.x;
  auto* words = reinterpret_cast<int16_t*>(memory());
  words[kFault ? i / 2 : i] = static_cast<int16_t>(i);
  __syncthreads();
  *own(params) = words[i / 2];
}

template <bool kFault>
__global__ void unwritten(Params params) {
  const int i = threadIdx.x;
  if (!kFault || i != 5) memory()[i] = i;
  __syncthreads();
  *own(params) = memory()[kThreads - 1 - i];
}

// Asynchronous copies.

__device__ void copy(const Params& params, int stage) {
  using namespace fisher_kernels::on_host;
  const int i = threadIdx.x;
  begin_copy(memory() + stage * kThreads + i, params.in + stage * kThreads + i, sizeof(int));
  end_copies();
}

template <bool kFault>
__global__ void wait_for_enough(Params params) {
  using fisher_kernels::on_host::wait_for_copies;
  copy(params, 0);
  copy(params, 1);
  wait_for_copies(kFault ? 2 : 1);
  __syncthreads();
  *own(params) = memory()[threadIdx.x ^ 1];
  wait_for_copies(0);
}

template <bool kFault>
__global__ void barrier_after_the_wait(Params params) {
  using fisher_kernels::on_host::wait_for_copies;
  copy(params, 0);
  if (kFault) __syncthreads();
  wait_for_copies(0);
  if (!kFault) __syncthreads();
  *own(params) = memory()[threadIdx.x ^ 1];
}

/// The first of two stages is filled again while others read it.
template <bool kFault>
__global__ void refill(Params params) {
  using fisher_kernels::on_host::wait_for_copies;
  copy(params, 0);
  wait_for_copies(0);
  __syncthreads();
  const int read = memory()[threadIdx.x ^ 1];
  if (!kFault) __syncthreads();
  copy(params, 0);
  wait_for_copies(0);
  *own(params) = read;
}

// Memory of the device.

template <bool kFault>
__global__ void within_a_block(Params params) {
  *own(params) = 1;
  if (!kFault) __syncthreads();
  const int read = params.out[blockIdx.x * kThreads + (threadIdx.x + 32) % kThreads];
  __syncthreads();
  *own(params) = read;
}

template <bool kFault>
__global__ void output_of_another(Params params) {
  *own(params) = params.in[threadIdx.x];
  if (kFault && blockIdx.x == 2) *own(params) = params.out[threadIdx.x];
}

template <bool kFault>
__global__ void one_place(Params params) {
  if (threadIdx.x == 0) params.out[kFault ? 0 : blockIdx.x] = 7;
}

/// What one block reads another changes.
template <bool kFault>
__global__ void input_of_another(Params params) {
  const int read = params.out[kFault ? threadIdx.x : blockIdx.x * kThreads + threadIdx.x];
  __syncthreads();
  *own(params) = read + 1;
}

template <bool kFault>
__global__ void count(Params params) {
  if (threadIdx.x != 0) return;
  if (kFault) *params.counter += 1;
  if (!kFault) atomicAdd(params.counter, 1u);
}

enum class Last { right, without_first_fence, without_second_fence, fence_of_the_block, fence_too_early };

/// The block that comes last adds up what all have written.
template <Last kLast>
__device__ void add_in_the_last_block(Params params) {
  const int i = threadIdx.x;
  if (kLast == Last::fence_too_early) __threadfence();
  *own(params) = i;
  __syncthreads();
  if (i == 0) {
    if (kLast == Last::fence_of_the_block) __threadfence_block();
    if (kLast == Last::right || kLast == Last::without_second_fence) __threadfence();
    memory()[0] = atomicAdd(params.counter, 1u) == kBlocks - 1;
  }
  __syncthreads();
  if (memory()[0] == 0) return;
  if (kLast != Last::without_second_fence) __threadfence();
  int sum = 0;
  for (int block = 0; block < kBlocks; ++block) sum += params.out[block * kThreads + i];
  __syncthreads();
  params.out[i] = sum;
}

template <bool kFault>
__global__ void first_fence(Params params) {
  add_in_the_last_block<kFault ? Last::without_first_fence : Last::right>(params);
}

template <bool kFault>
__global__ void second_fence(Params params) {
  add_in_the_last_block<kFault ? Last::without_second_fence : Last::right>(params);
}

template <bool kFault>
__global__ void fence_of_the_device(Params params) {
  add_in_the_last_block<kFault ? Last::fence_of_the_block : Last::right>(params);
}

template <bool kFault>
__global__ void fence_after_writing(Params params) {
  add_in_the_last_block<kFault ? Last::fence_too_early : Last::right>(params);
}

// What is right and slow.

template <bool kFault>
__global__ void neighbours(Params params) {
  *own(params) = params.in[threadIdx.x * (kFault ? 2 : 1)];
}

/// Eight rows of four words, by columns: beside each other in four banks, or with pads between rows in all.
template <bool kFault>
__global__ void pads(Params params) {
  const int i = threadIdx.x;
  if (i >= 32) return;
  memory()[i % 8 * (kFault ? 32 : 36) + i / 8] = i;
  __syncwarp();
  *own(params) = memory()[i % 8 * (kFault ? 32 : 36) + i / 8];
}

}  // namespace

#define KERNEL(name)                                                                            \
  EXPORTED int name(int* out, const int* in, unsigned* counter, int fault) {                    \
    return launch(fault ? name<true> : name<false>, kBlocks, kThreads, 4 * kThreads * sizeof(int), nullptr, \
                  Params{out, in, counter});                                                    \
  }

KERNEL(barrier)
KERNEL(barrier_after_reading)
KERNEL(two_buffers)
KERNEL(warp)
KERNEL(shuffle)
KERNEL(half_a_warp)
KERNEL(half_words)
KERNEL(unwritten)
KERNEL(wait_for_enough)
KERNEL(barrier_after_the_wait)
KERNEL(refill)
KERNEL(within_a_block)
KERNEL(output_of_another)
KERNEL(one_place)
KERNEL(input_of_another)
KERNEL(count)
KERNEL(first_fence)
KERNEL(second_fence)
KERNEL(fence_of_the_device)
KERNEL(fence_after_writing)
KERNEL(neighbours)
KERNEL(pads)

EXPORTED const char* last_message() { return fisher_kernels::on_host::last_message().c_str(); }
