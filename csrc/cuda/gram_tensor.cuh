#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "gram.cuh"
#include "mma.cuh"

namespace fisher_kernels::cuda {

/// Whether rows of so many columns are multiplied on tensor cores, where there are any. With few columns the read of x
/// is what counts; weighted float16 is left out for it is seldom met.
inline bool suits_tensor_cores(DType dtype, int64_t columns, bool weighted) {
  return columns > kSmallTile && dtype != DType::float64 && !(dtype == DType::float16 && weighted);
}

/// The Gram matrix of rows there; sets `share`, `shares`, `tiles` and `partials`.
void tensor_gram(const char* name, DType dtype, Gram gram, const Stream& stream);

}  // namespace fisher_kernels::cuda
