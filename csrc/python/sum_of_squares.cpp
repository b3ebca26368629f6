#include <pybind11/stl.h>

#include <string>
#include <vector>

#include "../kernels.h"
#include "capability.h"
#include "convolution.h"
#include "tensor.h"

namespace fisher_kernels {

namespace {

TensorView read_input(py::handle object, int least_dims, int most_dims, const Argument& argument) {
  const TensorView x = read_tensor(object, argument);
  check_float(x, argument);
  if (x.dims < least_dims || x.dims > most_dims) {
    value_error(argument, "has shape " + x.shape() + ", expected " + std::to_string(least_dims) + " to " +
                              std::to_string(most_dims) + " dimensions");
  }
  return x;
}

TensorView read_output(py::handle object, DType input, const std::vector<int64_t>& shape, const Argument& argument) {
  const TensorView out = read_tensor(object, argument);
  check_dtype(out, accumulation_dtype(input), argument);
  check_shape(out, shape, argument);
  check_contiguous(out, argument);
  return out;
}

/// The product of the sizes of dimensions first to last - 1.
int64_t count(const TensorView& x, int first, int last) {
  int64_t product = 1;
  for (int d = first; d < last; ++d) product *= x.sizes[d];
  return product;
}

void column_sum_of_squares(py::handle x_object, py::handle out_object, const Place& place) {
  const Call call("column_sum_of_squares", place);
  const Argument x_argument{call, "x"};
  const TensorView x = read_input(x_object, 1, kMostDims, x_argument);
  const int64_t columns = x.sizes[x.dims - 1], rows = count(x, 0, x.dims - 1);
  const TensorView out = read_output(out_object, x.dtype, {columns}, {call, "out"});
  const bool contiguous = is_contiguous(x);
  if (!contiguous && !(x.dims == 2 && (columns == 1 || x.strides[1] == 1))) {
    layout_error(x, x_argument, "a contiguous tensor or a matrix with a column stride of 1");
  }

  const py::gil_scoped_release release;
  run(call, ColumnSumOfSquares{x.data, out.data, x.dtype, rows, columns, contiguous ? columns : x.strides[0], call.place.threads},
      FISHER_KERNELS_VARIANTS(column_sum_of_squares));
}

void channel_sum_of_squares(py::handle x_object, py::handle out_object, const Place& place) {
  const Call call("channel_sum_of_squares", place);
  const Argument x_argument{call, "x"};
  const TensorView x = read_input(x_object, 2, kMostDims, x_argument);
  const TensorView out = read_output(out_object, x.dtype, {x.sizes[1]}, {call, "out"});
  const bool channels_first = is_dense(x, 0, Order::channels_first);
  if (!channels_first && !is_dense(x, 0, Order::channels_last))
    layout_error(x, x_argument, "contiguous or channels last");

  const py::gil_scoped_release release;
  run(call, ChannelSumOfSquares{x.data, out.data, x.dtype, !channels_first, x.sizes[0], x.sizes[1], count(x, 2, x.dims),
                          call.place.threads},
      FISHER_KERNELS_VARIANTS(channel_sum_of_squares));
}

void patch_sum_of_squares(py::handle x_object, py::handle out_object, const std::vector<int64_t>& kernel_size,
                          const std::vector<int64_t>& stride, const std::vector<int64_t>& padding,
                          const std::vector<int64_t>& dilation, const Place& place) {
  const Call call("patch_sum_of_squares", place);
  const Argument x_argument{call, "x"};
  const TensorView x = read_input(x_object, 3, 2 + kMostSpatial, x_argument);
  const Windows windows = read_windows(call, x, kernel_size, stride, padding, dilation);
  std::vector<int64_t> out_shape{x.sizes[1]};
  out_shape.insert(out_shape.end(), kernel_size.begin(), kernel_size.end());
  const TensorView out = read_output(out_object, x.dtype, out_shape, {call, "out"});
  const bool channels_first = is_dense(x, 1, Order::channels_first);
  if (!channels_first && !is_dense(x, 1, Order::channels_last))
    layout_error(x, x_argument, "each sample contiguous or channels last");

  const py::gil_scoped_release release;
  run(call, PatchSumOfSquares{x.data, out.data, x.dtype, !channels_first, x.sizes[0], x.strides[0], x.sizes[1], windows.depth,
                        windows.height, windows.width, call.place.threads},
      FISHER_KERNELS_VARIANTS(patch_sum_of_squares));
}

}  // namespace

void bind_sum_of_squares(py::module_& module) {
  module.def("column_sum_of_squares", &column_sum_of_squares);
  module.def("channel_sum_of_squares", &channel_sum_of_squares);
  module.def("patch_sum_of_squares", &patch_sum_of_squares);
}

}  // namespace fisher_kernels
