#pragma once

// Where the running CUDA thread stands, and the two places where it can wait for others.

#include <cuda_runtime_api.h>

#include <cstdint>

namespace fisher_kernels::on_host {

inline constexpr int kWarpSize = 32;

/// What `threadIdx` and its like say now. A block stays on one thread of the processor, so each of those has its own.
struct Running {
  uint3 thread;
  uint3 block;
  uint3 block_size;
  uint3 grid_size;
  unsigned char* shared;
};

// __thread, not thread_local: nothing needs to look first whether it was constructed.
extern __thread Running running;

/// The dynamic shared memory of the running block: aligned to 128 bytes and, before the block wrote to it, NaN
/// whether it is read as float, double, half or bfloat16.
inline unsigned char* shared_memory() { return running.shared; }

/// Where threads meet. Those that meet must all have come for the same.
enum class Meeting : uint8_t {
  syncthreads,
  syncthreads_count,
  syncthreads_and,
  syncthreads_or,
  syncwarp,
  shuffle,
  shuffle_up,
  shuffle_down,
  shuffle_xor,
  ballot,
  any,
  all,
  multiply_matrices,
  load_matrices,
};

/// What a whole warp does together, on what each of its lanes has.
using WarpWork = void (*)(void* const (&lanes)[kWarpSize]);

/// What a thread brings to where it meets others.
struct Arrival {
  Meeting meeting;
  uint8_t bytes;   // of the value that a shuffle moves
  int width;       // of the segments of a shuffle
  uint32_t mask;   // lanes of the warp that meet
  uint32_t lane;   // of a shuffle: source lane, delta or lane mask
  uint64_t value;  // bits that a shuffle moves, the predicate of a vote, or where the lane has its part of the work
  WarpWork work = nullptr;  // of tensor cores
};

/// Waits for all threads of the block. Of their predicates: the number that hold (count), whether all or any do.
int meet_block(Meeting meeting, bool predicate);

/// Waits for the other lanes in the mask. Returns the bits this lane receives, or what the vote said.
uint64_t meet_warp(const Arrival& arrival);

}  // namespace fisher_kernels::on_host

// As macros, for CUDA's names are constants that differ from thread to thread.
#define threadIdx (static_cast<const uint3&>(::fisher_kernels::on_host::running.thread))
#define blockIdx (static_cast<const uint3&>(::fisher_kernels::on_host::running.block))
#define blockDim (static_cast<const uint3&>(::fisher_kernels::on_host::running.block_size))
#define gridDim (static_cast<const uint3&>(::fisher_kernels::on_host::running.grid_size))
#define warpSize (::fisher_kernels::on_host::kWarpSize)
