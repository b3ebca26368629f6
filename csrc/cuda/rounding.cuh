#pragma once

#include "common/rounding.h"
#include "strided.cuh"
#include "types.cuh"

// Stochastic rounding on a GPU: the functions of common/rounding.h, on the types that kernels store.
namespace fisher_kernels::cuda {

/// A number rounded by one half of the random bits of its element.
template <bool kLow>
__device__ inline __nv_bfloat16 round_stochastically(float value, uint32_t random) {
  const uint32_t rounded = fisher_kernels::round_stochastically(__float_as_uint(value), random_half<kLow>(random));
  return __ushort_as_bfloat16(static_cast<unsigned short>(rounded >> 16));
}

/// The random bits of elements from one on.
__device__ inline RandomWalk random_walk(const RoundingIndex& at, uint32_t state, int64_t element) {
  const int64_t row = quotient(element, at.run);
  return RandomWalk(at, state, row, element - row * at.run);
}

}  // namespace fisher_kernels::cuda
