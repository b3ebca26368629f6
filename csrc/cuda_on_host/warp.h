#pragma once

// Barriers of blocks and warps, votes and shuffles.

#include <cstring>
#include <type_traits>

#include "running.h"

namespace fisher_kernels::on_host {

template <class T>
T shuffle(Meeting meeting, unsigned mask, T value, unsigned lane, int width) {
  static_assert(std::is_arithmetic_v<T> && (sizeof(T) == 4 || sizeof(T) == 8),
                "shuffles move arithmetic types of 4 or 8 bytes");
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  bits = meet_warp({meeting, sizeof(T), width, mask, lane, bits});
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

inline uint32_t vote(Meeting meeting, unsigned mask, bool predicate) {
  return static_cast<uint32_t>(meet_warp({meeting, 0, kWarpSize, mask, 0, predicate}));
}

}  // namespace fisher_kernels::on_host

inline void __syncthreads() {
  using namespace fisher_kernels::on_host;
  meet_block(Meeting::syncthreads, false);
}

inline int __syncthreads_count(int predicate) {
  using namespace fisher_kernels::on_host;
  return meet_block(Meeting::syncthreads_count, predicate != 0);
}

inline int __syncthreads_and(int predicate) {
  using namespace fisher_kernels::on_host;
  return meet_block(Meeting::syncthreads_and, predicate != 0);
}

inline int __syncthreads_or(int predicate) {
  using namespace fisher_kernels::on_host;
  return meet_block(Meeting::syncthreads_or, predicate != 0);
}

inline void __syncwarp(unsigned mask = 0xffffffffu) {
  using namespace fisher_kernels::on_host;
  vote(Meeting::syncwarp, mask, false);
}

inline unsigned __ballot_sync(unsigned mask, int predicate) {
  using namespace fisher_kernels::on_host;
  return vote(Meeting::ballot, mask, predicate != 0);
}

inline int __any_sync(unsigned mask, int predicate) {
  using namespace fisher_kernels::on_host;
  return vote(Meeting::any, mask, predicate != 0) != 0;
}

inline int __all_sync(unsigned mask, int predicate) {
  using namespace fisher_kernels::on_host;
  return vote(Meeting::all, mask, predicate != 0) != 0;
}

template <class T>
T __shfl_sync(unsigned mask, T value, int lane, int width = warpSize) {
  using namespace fisher_kernels::on_host;
  return shuffle(Meeting::shuffle, mask, value, static_cast<unsigned>(lane), width);
}

template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = warpSize) {
  using namespace fisher_kernels::on_host;
  return shuffle(Meeting::shuffle_up, mask, value, delta, width);
}

template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = warpSize) {
  using namespace fisher_kernels::on_host;
  return shuffle(Meeting::shuffle_down, mask, value, delta, width);
}

template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = warpSize) {
  using namespace fisher_kernels::on_host;
  return shuffle(Meeting::shuffle_xor, mask, value, static_cast<unsigned>(lane_mask), width);
}
