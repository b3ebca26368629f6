#pragma once

#include <string>
#include <vector>

#include "../kernels.h"
#include "tensor.h"

// What the entry points of the kernels on many small square matrices share.
namespace fisher_kernels {

inline void check_single_or_double(const TensorView& tensor, const Argument& argument) {
  if (tensor.dtype == DType::float32 || tensor.dtype == DType::float64) return;
  type_error(argument, std::string("has dtype ") + name(tensor.dtype) + ", expected float32 or float64");
}

/// [B, n, n], contiguous.
inline TensorView read_blocks(py::handle object, const Argument& argument) {
  const TensorView blocks = read_tensor(object, argument);
  check_single_or_double(blocks, argument);
  if (blocks.dims != 3 || blocks.sizes[1] != blocks.sizes[2]) {
    value_error(argument, "has shape " + blocks.shape() + ", expected (B, n, n)");
  }
  check_contiguous(blocks, argument);
  return blocks;
}

inline TensorView read_like(py::handle object, const TensorView& blocks, const std::vector<int64_t>& shape,
                            const Argument& argument) {
  const TensorView tensor = read_tensor(object, argument);
  check_dtype(tensor, blocks.dtype, argument);
  check_shape(tensor, shape, argument);
  check_contiguous(tensor, argument);
  return tensor;
}

inline int64_t* read_info(py::handle object, const TensorView& blocks, const Argument& argument) {
  const TensorView info = read_tensor(object, argument);
  check_dtype(info, DType::int64, argument);
  check_shape(info, {blocks.sizes[0]}, argument);
  check_contiguous(info, argument);
  return static_cast<int64_t*>(info.data);
}

}  // namespace fisher_kernels
