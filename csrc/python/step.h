#pragma once

#include <string>

#include "../kernels.h"
#include "tensor.h"

// What the entry points of the steps share.
namespace fisher_kernels {

/// Reads a tensor of the shape of the parameter of the same index.
inline TensorView read_like(const TensorView& param, DType dtype, py::handle object, const Argument& argument) {
  const TensorView tensor = read_tensor(object, argument);
  check_dtype(tensor, dtype, argument);
  if (!same_shape(tensor, param)) {
    value_error(argument, "has shape " + tensor.shape() + ", expected " + param.shape() + ", the shape of params[" +
                              std::to_string(argument.index) + "]");
  }
  return tensor;
}

/// A tensor that is written must not hold one element at several indices.
inline void check_writable(const TensorView& tensor, const Argument& argument) {
  for (int d = 0; d < tensor.dims; ++d) {
    if (tensor.sizes[d] <= 1 || tensor.strides[d] != 0 || tensor.numel() == 0) continue;
    value_error(argument, "has strides " + shape_text(tensor.strides, tensor.dims) + " for shape " + tensor.shape() +
                              ", expected every element in a place of its own");
  }
}

inline StridedArray strided(const TensorView& tensor) {
  return {tensor.data, tensor.sizes, tensor.strides, tensor.dims, is_contiguous(tensor)};
}

}  // namespace fisher_kernels
