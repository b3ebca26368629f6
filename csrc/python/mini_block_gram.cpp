#include <pybind11/stl.h>

#include <string>
#include <vector>

#include "../kernels.h"
#include "capability.h"
#include "convolution.h"
#include "tensor.h"

namespace fisher_kernels {

namespace {

void mini_block_gram_(py::handle out_object, py::handle v_object, double decay, double gain, const Place& place) {
  const Call call("mini_block_gram_", place);
  const Argument out_argument{call, "out"}, v_argument{call, "v"};
  const TensorView v = read_tensor(v_object, v_argument);
  check_float(v, v_argument);
  check_dims(v, 3, v_argument);
  const int64_t samples = v.sizes[0], blocks = v.sizes[1], n = v.sizes[2];
  const TensorView sample{v.data, v.sizes + 1, v.strides + 1, 2, v.dtype};
  if (v.numel() > 0) check_contiguous(sample, v_argument);
  const TensorView out = read_written(out_object, out_argument);
  check_dtype(out, accumulation_dtype(v.dtype), out_argument);
  check_shape(out, {blocks, n, n}, out_argument);
  check_contiguous(out, out_argument);
  check_coefficient(decay, {call, "decay"});
  check_coefficient(gain, {call, "gain"});

  const py::gil_scoped_release release;
  run(call, MiniBlockGram{v.data, out.data, v.dtype, samples, v.strides[0], blocks, n, decay, gain, call.place.threads},
      FISHER_KERNELS_VARIANTS(mini_block_gram_));
}

void conv_mini_block_gram_(py::handle out_object, py::handle x_object, py::handle grad_object,
                           const std::vector<int64_t>& kernel_size, const std::vector<int64_t>& stride,
                           const std::vector<int64_t>& padding, const std::vector<int64_t>& dilation, int64_t groups,
                           double decay, double gain, const Place& place) {
  const Call call("conv_mini_block_gram_", place);
  const Argument out_argument{call, "out"}, x_argument{call, "x"}, grad_argument{call, "grad_output"};
  const TensorView x = read_tensor(x_object, x_argument);
  check_float(x, x_argument);
  if (x.dims < 3 || x.dims > 2 + kMostSpatial) {
    value_error(x_argument, "has shape " + x.shape() + ", expected 3 to 5 dimensions");
  }
  const TensorView grad = read_tensor(grad_object, grad_argument);
  check_dtype(grad, x.dtype, grad_argument);
  check_dims(grad, x.dims, grad_argument);
  if (grad.sizes[0] != x.sizes[0]) {
    value_error(grad_argument, "has shape " + grad.shape() + ", expected the " + std::to_string(x.sizes[0]) +
                                   " samples of x of shape " + x.shape());
  }
  if (groups < 1 || x.sizes[1] % groups != 0 || grad.sizes[1] % groups != 0) {
    value_error({call, "groups"}, "is " + std::to_string(groups) + ", expected a divisor of the " +
                                           std::to_string(x.sizes[1]) + " channels of x and the " +
                                           std::to_string(grad.sizes[1]) + " of grad_output");
  }
  Windows windows = read_windows(call, x, kernel_size, stride, padding, dilation);
  Window* const dimensions[kMostSpatial] = {&windows.depth, &windows.height, &windows.width};
  int64_t n = 1;
  for (int d = 2; d < x.dims; ++d) {
    Window& window = *dimensions[kMostSpatial - x.dims + d];
    if (grad.sizes[d] > window.outputs) {
      value_error(grad_argument, "has shape " + grad.shape() + ", expected at most " +
                                     std::to_string(window.outputs) + " positions in spatial dimension " +
                                     std::to_string(d - 2) + ", the windows of x of shape " + x.shape());
    }
    window.outputs = grad.sizes[d];
    n *= window.kernel;
  }
  const int64_t inputs = x.sizes[1] / groups, outputs = grad.sizes[1] / groups;
  const TensorView out = read_written(out_object, out_argument);
  check_dtype(out, accumulation_dtype(x.dtype), out_argument);
  check_shape(out, {grad.sizes[1], inputs, n, n}, out_argument);
  check_contiguous(out, out_argument);
  check_coefficient(decay, {call, "decay"});
  check_coefficient(gain, {call, "gain"});
  const ChannelArray x_channels = read_channels(x, x_argument), grad_channels = read_channels(grad, grad_argument);

  const py::gil_scoped_release release;
  run(call, ConvMiniBlockGram{x_channels, grad_channels, out.data, x.dtype, x.sizes[0], groups, inputs, outputs,
                        windows.depth, windows.height, windows.width, decay, gain, call.place.threads},
      FISHER_KERNELS_VARIANTS(conv_mini_block_gram_));
}

}  // namespace

void bind_mini_block_gram(py::module_& module) {
  module.def("mini_block_gram_", &mini_block_gram_);
  module.def("conv_mini_block_gram_", &conv_mini_block_gram_);
}

}  // namespace fisher_kernels
