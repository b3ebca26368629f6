#include <string>
#include <vector>

#include "../kernels.h"
#include "capability.h"
#include "entry_points.h"
#include "tensor.h"

namespace fisher_kernels {

namespace {

constexpr int kMostDims = 64;  // as many as torch has
constexpr int kMostSpatial = 3;

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

enum class Order { channels_first, channels_last };

/// True if the dimensions of x [N, C, *S], all or all but the first, lie without gaps in the order (C, *S) or (*S, C).
bool is_dense(const TensorView& x, int first, Order order) {
  if (x.numel() == 0) return true;
  int64_t sizes[kMostDims], strides[kMostDims];
  int dims = 0;
  const auto append = [&](int d) {
    sizes[dims] = x.sizes[d];
    strides[dims++] = x.strides[d];
  };
  for (int d = first; d < x.dims; ++d) {
    if (d != 1 || order == Order::channels_first) append(d);
  }
  if (order == Order::channels_last) append(1);
  return is_contiguous({x.data, sizes, strides, dims, x.dtype});
}

/// The product of the sizes of dimensions first to last - 1.
int64_t count(const TensorView& x, int first, int last) {
  int64_t product = 1;
  for (int d = first; d < last; ++d) product *= x.sizes[d];
  return product;
}

[[noreturn]] void layout_error(const TensorView& x, const Argument& argument, const char* expected) {
  value_error(argument,
              "has shape " + x.shape() + " and strides " + shape_text(x.strides, x.dims) + ", expected " + expected);
}

/// The length and the range of one argument of a convolution.
void check_geometry(const std::vector<int64_t>& values, size_t expected, int64_t least, const char* name) {
  const Argument argument{"patch_sum_of_squares", name};
  if (values.size() != expected) {
    value_error(argument,
                "has " + std::to_string(values.size()) + " entries, expected " + std::to_string(expected));
  }
  for (const int64_t value : values) {
    if (value < least)
      value_error(argument, "is " + std::to_string(value) + ", expected at least " + std::to_string(least));
  }
}

/// How a window of a convolution moves along a dimension of `size` positions.
Window make_window(int64_t size, int64_t kernel, int64_t stride, int64_t dilation, int64_t before, int64_t after) {
  const int64_t padded = size + before + after;
  const int64_t extent = dilation * (kernel - 1) + 1;
  if (padded < extent) {
    value_error({"patch_sum_of_squares", "kernel_size"}, "spans " + std::to_string(extent) +
                                                             " positions, expected at most the " +
                                                             std::to_string(padded) + " of the padded x");
  }
  return {size, (padded - extent) / stride + 1, kernel, stride, dilation, before};
}

}  // namespace

void column_sum_of_squares(py::handle x_object, py::handle out_object, int threads) {
  constexpr const char* kFunction = "column_sum_of_squares";
  const Argument x_argument{kFunction, "x"};
  const TensorView x = read_input(x_object, 1, kMostDims, x_argument);
  const int64_t columns = x.sizes[x.dims - 1], rows = count(x, 0, x.dims - 1);
  const TensorView out = read_output(out_object, x.dtype, {columns}, {kFunction, "out"});
  check_threads(threads, {kFunction, "threads"});
  const bool contiguous = is_contiguous(x);
  if (!contiguous && !(x.dims == 2 && (columns == 1 || x.strides[1] == 1))) {
    layout_error(x, x_argument, "a contiguous tensor or a matrix with a column stride of 1");
  }

  const py::gil_scoped_release release;
  run(ColumnSumOfSquares{x.data, out.data, x.dtype, rows, columns, contiguous ? columns : x.strides[0], threads},
      {FISHER_KERNELS_VARIANTS(column_sum_of_squares)});
}

void channel_sum_of_squares(py::handle x_object, py::handle out_object, int threads) {
  constexpr const char* kFunction = "channel_sum_of_squares";
  const Argument x_argument{kFunction, "x"};
  const TensorView x = read_input(x_object, 2, kMostDims, x_argument);
  const TensorView out = read_output(out_object, x.dtype, {x.sizes[1]}, {kFunction, "out"});
  check_threads(threads, {kFunction, "threads"});
  const bool channels_first = is_dense(x, 0, Order::channels_first);
  if (!channels_first && !is_dense(x, 0, Order::channels_last))
    layout_error(x, x_argument, "contiguous or channels last");

  const py::gil_scoped_release release;
  run(ChannelSumOfSquares{x.data, out.data, x.dtype, !channels_first, x.sizes[0], x.sizes[1], count(x, 2, x.dims),
                          threads},
      {FISHER_KERNELS_VARIANTS(channel_sum_of_squares)});
}

void patch_sum_of_squares(py::handle x_object, py::handle out_object, const std::vector<int64_t>& kernel_size,
                          const std::vector<int64_t>& stride, const std::vector<int64_t>& padding,
                          const std::vector<int64_t>& dilation, int threads) {
  constexpr const char* kFunction = "patch_sum_of_squares";
  const Argument x_argument{kFunction, "x"};
  const TensorView x = read_input(x_object, 3, 2 + kMostSpatial, x_argument);
  const int spatial = x.dims - 2;
  check_geometry(kernel_size, spatial, 1, "kernel_size");
  check_geometry(stride, spatial, 1, "stride");
  check_geometry(padding, 2 * spatial, 0, "padding");
  check_geometry(dilation, spatial, 1, "dilation");
  Window windows[kMostSpatial] = {{1, 1, 1, 1, 1, 0}, {1, 1, 1, 1, 1, 0}, {1, 1, 1, 1, 1, 0}};  // depth, height, width
  for (int d = 0; d < spatial; ++d) {
    windows[kMostSpatial - spatial + d] =
        make_window(x.sizes[2 + d], kernel_size[d], stride[d], dilation[d], padding[2 * d], padding[2 * d + 1]);
  }
  std::vector<int64_t> out_shape{x.sizes[1]};
  out_shape.insert(out_shape.end(), kernel_size.begin(), kernel_size.end());
  const TensorView out = read_output(out_object, x.dtype, out_shape, {kFunction, "out"});
  check_threads(threads, {kFunction, "threads"});
  const bool channels_first = is_dense(x, 1, Order::channels_first);
  if (!channels_first && !is_dense(x, 1, Order::channels_last))
    layout_error(x, x_argument, "each sample contiguous or channels last");

  const py::gil_scoped_release release;
  run(PatchSumOfSquares{x.data, out.data, x.dtype, !channels_first, x.sizes[0], x.strides[0], x.sizes[1], windows[0],
                        windows[1], windows[2], threads},
      {FISHER_KERNELS_VARIANTS(patch_sum_of_squares)});
}

}  // namespace fisher_kernels
