#include "../kernels.h"
#include "capability.h"
#include "convolution.h"
#include "tensor.h"

namespace fisher_kernels {

namespace {

void batch_norm_gradients(py::handle x_object, py::handle grad_object, double eps, py::handle mean_object,
                          py::handle variance_object, py::handle scale_object, py::handle shift_object, const Place& place) {
  const Call call("batch_norm_gradients", place);
  const Argument x_argument{call, "x"}, grad_argument{call, "grad_output"};
  const Argument mean_argument{call, "mean"}, variance_argument{call, "variance"};
  const TensorView x = read_tensor(x_object, x_argument);
  check_float(x, x_argument);
  if (x.dims < 2) value_error(x_argument, "has shape " + x.shape() + ", expected at least 2 dimensions");
  const TensorView grad = read_tensor(grad_object, grad_argument);
  check_dtype(grad, x.dtype, grad_argument);
  const DType dtype = accumulation_dtype(x.dtype);
  check_shape(grad, std::vector<int64_t>(x.sizes, x.sizes + x.dims), grad_argument);
  check_coefficient(eps, {call, "eps"});
  if (mean_object.is_none() != variance_object.is_none()) {
    value_error(variance_argument, mean_object.is_none() ? "is a tensor, expected None, as mean is"
                                                         : "is None, expected a tensor, as mean is");
  }
  const int64_t samples = x.sizes[0], channels = x.sizes[1];
  const auto read_vector = [&](py::handle object, const Argument& argument) -> const void* {
    if (object.is_none()) return nullptr;
    const TensorView vector = read_tensor(object, argument);
    check_dtype(vector, dtype, argument);
    check_shape(vector, {channels}, argument);
    check_contiguous(vector, argument);
    return vector.data;
  };
  const auto read_output = [&](py::handle object, const Argument& argument) {
    const TensorView out = read_tensor(object, argument);
    check_dtype(out, dtype, argument);
    check_shape(out, {samples, channels}, argument);
    check_contiguous(out, argument);
    return out.data;
  };
  const void* const mean = read_vector(mean_object, mean_argument);
  const void* const variance = read_vector(variance_object, variance_argument);
  void* const scale = read_output(scale_object, {call, "scale"});
  void* const shift = read_output(shift_object, {call, "shift"});
  // Both orders are the same where there is one position: channels side by side are then the better view.
  const bool channels_last = is_dense(x, 1, Order::channels_last) && is_dense(grad, 1, Order::channels_last);
  if (!channels_last) {
    const char* const expected = "the samples of x and grad_output contiguous, or those of both channels last";
    if (!is_dense(x, 1, Order::channels_first)) layout_error(x, x_argument, expected);
    if (!is_dense(grad, 1, Order::channels_first)) layout_error(grad, grad_argument, expected);
  }
  int64_t positions = 1;
  for (int d = 2; d < x.dims; ++d) positions *= x.sizes[d];

  const py::gil_scoped_release release;
  run(call, BatchNormGradients{x.data, grad.data, x.dtype, grad.dtype, mean, variance, scale, shift, channels_last, samples,
                         x.strides[0], grad.strides[0], channels, positions, eps, call.place.threads},
      FISHER_KERNELS_VARIANTS(batch_norm_gradients));
}

}  // namespace

void bind_batch_norm_gradients(py::module_& module) {
  module.def("batch_norm_gradients", &batch_norm_gradients);
}

}  // namespace fisher_kernels
