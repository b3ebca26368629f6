#include "convolution.h"

#include <limits>
#include <string>

namespace fisher_kernels {

namespace {

// With numbers of 31 bits the places of windows fit into 64, and so does the square of the number of offsets.
constexpr int64_t kLargest = std::numeric_limits<int32_t>::max();
constexpr int64_t kMostWindows = int64_t{1} << 40;

/// a * b, or one more than the limit where it is above that.
int64_t product_up_to(int64_t limit, int64_t a, int64_t b) { return b != 0 && a > limit / b ? limit + 1 : a * b; }

/// The length and the range of one argument of a convolution.
void check_geometry(const std::vector<int64_t>& values, size_t expected, int64_t least, const Argument& argument) {
  if (values.size() != expected) {
    value_error(argument,
                "has " + std::to_string(values.size()) + " entries, expected " + std::to_string(expected));
  }
  for (const int64_t value : values) {
    if (value < least)
      value_error(argument, "is " + std::to_string(value) + ", expected at least " + std::to_string(least));
    if (value > kLargest)
      value_error(argument, "is " + std::to_string(value) + ", expected at most " + std::to_string(kLargest));
  }
}

/// How a window of a convolution moves along a dimension of `size` positions.
Window make_window(const Call& call, int64_t size, int64_t kernel, int64_t stride, int64_t dilation, int64_t before,
                   int64_t after) {
  const int64_t padded = size + before + after;
  const int64_t extent = dilation * (kernel - 1) + 1;
  if (padded < extent) {
    value_error({call, "kernel_size"}, "spans " + std::to_string(extent) + " positions, expected at most the " +
                                               std::to_string(padded) + " of the padded x");
  }
  return {size, (padded - extent) / stride + 1, kernel, stride, dilation, before};
}

}  // namespace

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

void layout_error(const TensorView& x, const Argument& argument, const char* expected) {
  value_error(argument,
              "has shape " + x.shape() + " and strides " + shape_text(x.strides, x.dims) + ", expected " + expected);
}

ChannelArray read_channels(const TensorView& x, const Argument& argument) {
  int64_t positions = 1;
  for (int d = 2; d < x.dims; ++d) positions *= x.sizes[d];
  if (is_dense(x, 1, Order::channels_first)) return {x.data, x.strides[0], positions, 1};
  if (is_dense(x, 1, Order::channels_last)) return {x.data, x.strides[0], 1, x.sizes[1]};
  layout_error(x, argument, "each sample contiguous or channels last");
}

Windows read_windows(const Call& call, const TensorView& x, const std::vector<int64_t>& kernel_size,
                     const std::vector<int64_t>& stride, const std::vector<int64_t>& padding,
                     const std::vector<int64_t>& dilation) {
  const int spatial = x.dims - 2;
  check_geometry(kernel_size, spatial, 1, {call, "kernel_size"});
  check_geometry(stride, spatial, 1, {call, "stride"});
  check_geometry(padding, 2 * spatial, 0, {call, "padding"});
  check_geometry(dilation, spatial, 1, {call, "dilation"});
  Window windows[kMostSpatial] = {{1, 1, 1, 1, 1, 0}, {1, 1, 1, 1, 1, 0}, {1, 1, 1, 1, 1, 0}};  // depth, height, width
  int64_t offsets = 1, count = 1;
  for (int d = 0; d < spatial; ++d) {
    offsets = product_up_to(kLargest, offsets, kernel_size[d]);
    if (offsets > kLargest)
      value_error({call, "kernel_size"}, "is too large, expected a product of at most " + std::to_string(kLargest));
    windows[kMostSpatial - spatial + d] = make_window(call, x.sizes[2 + d], kernel_size[d], stride[d], dilation[d],
                                                      padding[2 * d], padding[2 * d + 1]);
    count = product_up_to(kMostWindows, count, windows[kMostSpatial - spatial + d].outputs);
    if (count > kMostWindows) value_error({call, "padding"}, "is too large, expected at most 2^40 windows");
  }
  return {windows[0], windows[1], windows[2]};
}

}  // namespace fisher_kernels
