#pragma once

#include "dtype.h"

namespace fisher_kernels {

/// A number, or one that lies on a GPU and that only kernels read.
struct Scalar {
  double value = 1.0;          // unknown, and 1, where it lies on a GPU
  const void* data = nullptr;  // one element, or null for what the value says
  DType dtype = DType::float64;
};

}  // namespace fisher_kernels
