#include <pybind11/stl.h>

#include <cstdint>
#include <string>
#include <vector>

#include "../kernels.h"
#include "capability.h"
#include "convolution.h"
#include "tensor.h"

namespace fisher_kernels {

namespace {

void conv_gram_(py::handle out_object, py::handle x_object, const std::vector<int64_t>& kernel_size,
                const std::vector<int64_t>& stride, const std::vector<int64_t>& padding,
                const std::vector<int64_t>& dilation, int64_t groups, bool bias, double decay, double gain,
                const Place& place) {
  const Call call("conv_gram_", place);
  const Argument out_argument{call, "out"}, x_argument{call, "x"};
  const TensorView x = read_tensor(x_object, x_argument);
  check_float(x, x_argument);
  if (x.dims < 3 || x.dims > 2 + kMostSpatial) {
    value_error(x_argument, "has shape " + x.shape() + ", expected 3 to 5 dimensions");
  }
  if (groups < 1 || x.sizes[1] % groups != 0) {
    value_error({call, "groups"}, "is " + std::to_string(groups) + ", expected a divisor of the " +
                                      std::to_string(x.sizes[1]) + " channels of x");
  }
  const Windows windows = read_windows(call, x, kernel_size, stride, padding, dilation);
  ConvGram gram{};
  gram.dtype = x.dtype;
  gram.samples = x.sizes[0];
  gram.groups = groups;
  gram.channels = x.sizes[1] / groups;
  gram.depth = windows.depth;
  gram.height = windows.height;
  gram.width = windows.width;
  gram.bias = bias;
  gram.decay = decay;
  gram.gain = gain;
  gram.threads = call.place.threads;
  constexpr int64_t kMostColumns = int64_t{1} << 31;  // far more than fit into memory, and their square into 64 bits
  if (gram.channels > kMostColumns / gram.offsets()) {
    value_error(x_argument, "has shape " + x.shape() + ", expected at most 2^31 channels times offsets of the kernel");
  }
  const TensorView out = read_written(out_object, out_argument);
  check_dtype(out, accumulation_dtype(x.dtype), out_argument);
  check_shape(out, {groups, gram.columns(), gram.columns()}, out_argument);
  check_contiguous(out, out_argument);
  check_coefficient(decay, {call, "decay"});
  check_coefficient(gain, {call, "gain"});
  gram.x = read_channels(x, x_argument);
  gram.out = out.data;

  const py::gil_scoped_release release;
  run(call, gram, FISHER_KERNELS_VARIANTS(conv_gram_));
}

}  // namespace

void bind_conv_gram(py::module_& module) {
  module.def("conv_gram_", &conv_gram_);
}

}  // namespace fisher_kernels
