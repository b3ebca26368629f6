#include <string>

#include "../kernels.h"
#include "capability.h"
#include "entry_points.h"
#include "tensor.h"

namespace fisher_kernels {

namespace {

TensorView read_input(py::handle object, int dims, const Argument& argument) {
  const TensorView x = read_tensor(object, argument);
  check_float(x, argument);
  check_dims(x, dims, argument);
  return x;
}

TensorView read_output(py::handle object, DType input, const std::vector<int64_t>& shape, const Argument& argument) {
  const TensorView out = read_tensor(object, argument);
  check_dtype(out, accumulation_dtype(input), argument);
  check_shape(out, shape, argument);
  check_contiguous(out, argument);
  return out;
}

/// True if the dimensions of `x`, taken in this order, lie in row-major order without gaps.
bool is_dense(const TensorView& x, std::initializer_list<int> order) {
  if (x.numel() == 0) return true;
  int64_t sizes[8], strides[8];
  int dims = 0;
  for (const int d : order) {
    sizes[dims] = x.sizes[d];
    strides[dims] = x.strides[d];
    ++dims;
  }
  return is_contiguous({x.data, sizes, strides, dims, x.dtype});
}

[[noreturn]] void layout_error(const TensorView& x, const Argument& argument, const char* expected) {
  value_error(argument,
              "has shape " + x.shape() + " and strides " + shape_text(x.strides, x.dims) + ", expected " + expected);
}

const char* const kDimensions[] = {"depth", "height", "width"};

/// Dimension d (0 to 2) of a convolution over x [N, C, D, H, W].
Window make_window(const TensorView& x, int d, int64_t kernel, int64_t stride, int64_t dilation, int64_t before,
                   int64_t after) {
  constexpr const char* kFunction = "patch_sum_of_squares";
  const std::string where = std::string(" in the ") + kDimensions[d];
  const auto check_positive = [&](int64_t value, const char* name) {
    if (value < 1) value_error({kFunction, name}, "is " + std::to_string(value) + where + ", expected at least 1");
  };
  check_positive(kernel, "kernel_size");
  check_positive(stride, "stride");
  check_positive(dilation, "dilation");
  const int64_t size = x.sizes[d + 2];
  const int64_t padded = size + before + after;
  const int64_t extent = dilation * (kernel - 1) + 1;
  if (padded < extent) {
    value_error({kFunction, "kernel_size"}, "spans " + std::to_string(extent) + " positions" + where +
                                                ", expected at most the " + std::to_string(padded) +
                                                " of the padded x");
  }
  return {size, (padded - extent) / stride + 1, kernel, stride, dilation, before};
}

}  // namespace

void column_sum_of_squares(py::handle x_object, py::handle out_object, int threads) {
  constexpr const char* kFunction = "column_sum_of_squares";
  const Argument x_argument{kFunction, "x"};
  const TensorView x = read_input(x_object, 2, x_argument);
  const int64_t rows = x.sizes[0], columns = x.sizes[1];
  const TensorView out = read_output(out_object, x.dtype, {columns}, {kFunction, "out"});
  check_threads(threads, {kFunction, "threads"});
  if (rows > 0 && columns > 1 && x.strides[1] != 1) layout_error(x, x_argument, "a column stride of 1");

  const py::gil_scoped_release release;
  run(ColumnSumOfSquares{x.data, out.data, x.dtype, rows, columns, x.strides[0], threads},
      {FISHER_KERNELS_VARIANTS(column_sum_of_squares)});
}

void channel_sum_of_squares(py::handle x_object, py::handle out_object, int threads) {
  constexpr const char* kFunction = "channel_sum_of_squares";
  const Argument x_argument{kFunction, "x"};
  const TensorView x = read_input(x_object, 3, x_argument);
  const TensorView out = read_output(out_object, x.dtype, {x.sizes[1]}, {kFunction, "out"});
  check_threads(threads, {kFunction, "threads"});
  const bool contiguous = is_contiguous(x);
  if (!contiguous && !is_dense(x, {0, 2, 1})) layout_error(x, x_argument, "contiguous or channels last");

  const py::gil_scoped_release release;
  run(ChannelSumOfSquares{x.data, out.data, x.dtype, !contiguous, x.sizes[0], x.sizes[1], x.sizes[2], threads},
      {FISHER_KERNELS_VARIANTS(channel_sum_of_squares)});
}

void patch_sum_of_squares(py::handle x_object, py::handle out_object, const std::array<int64_t, 3>& kernel_size,
                          const std::array<int64_t, 3>& stride, const std::array<int64_t, 6>& padding,
                          const std::array<int64_t, 3>& dilation, int threads) {
  constexpr const char* kFunction = "patch_sum_of_squares";
  const Argument x_argument{kFunction, "x"};
  const TensorView x = read_input(x_object, 5, x_argument);
  Window windows[3];
  for (int d = 0; d < 3; ++d) {
    windows[d] = make_window(x, d, kernel_size[d], stride[d], dilation[d], padding[2 * d], padding[2 * d + 1]);
  }
  const int64_t channels = x.sizes[1];
  const TensorView out =
      read_output(out_object, x.dtype, {channels, kernel_size[0], kernel_size[1], kernel_size[2]}, {kFunction, "out"});
  check_threads(threads, {kFunction, "threads"});
  const bool channels_first = is_dense(x, {1, 2, 3, 4});
  if (!channels_first && !is_dense(x, {2, 3, 4, 1}))
    layout_error(x, x_argument, "each sample contiguous or channels last");

  const py::gil_scoped_release release;
  run(PatchSumOfSquares{x.data, out.data, x.dtype, !channels_first, x.sizes[0], x.strides[0], channels, windows[0],
                        windows[1], windows[2], threads},
      {FISHER_KERNELS_VARIANTS(patch_sum_of_squares)});
}

}  // namespace fisher_kernels
