#pragma once

#include "dtype.h"

namespace fisher_kernels {

/// A number, or one that lies on a GPU and that only kernels read.
struct Scalar {
  double value = 1.0;          // 1 where there is data
  const void* data = nullptr;  // one element, or null for what the value says
  DType dtype = DType::float64;

  bool is_on_gpu() const { return data != nullptr; }
};

}  // namespace fisher_kernels
