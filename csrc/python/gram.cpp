#include "../kernels.h"
#include "capability.h"
#include "tensor.h"

namespace fisher_kernels {

namespace {

void weighted_gram_(py::handle out_object, py::handle x_object, py::handle weight_object, double decay, double gain,
                    const Place& place) {
  const Call call("weighted_gram_", place);
  const Argument out_argument{call, "out"}, x_argument{call, "x"}, weight_argument{call, "weight"};
  const TensorView x = read_tensor(x_object, x_argument);
  check_float(x, x_argument);
  check_dims(x, 2, x_argument);
  const int64_t rows = x.sizes[0], columns = x.sizes[1];
  const DType wide = accumulation_dtype(x.dtype);
  if (rows > 0 && columns > 1 && x.strides[1] != 1) {
    value_error(x_argument, "has strides " + shape_text(x.strides, x.dims) + ", expected unit column stride");
  }
  const TensorView out = read_written(out_object, out_argument);
  check_dtype(out, wide, out_argument);
  check_shape(out, {columns, columns}, out_argument);
  check_contiguous(out, out_argument);
  void* weight_data = nullptr;
  if (!weight_object.is_none()) {
    const TensorView weight = read_tensor(weight_object, weight_argument);
    check_dtype(weight, wide, weight_argument);
    check_shape(weight, {rows}, weight_argument);
    check_contiguous(weight, weight_argument);
    weight_data = weight.data;
  }
  check_coefficient(decay, {call, "decay"});
  check_coefficient(gain, {call, "gain"});

  const py::gil_scoped_release release;
  run(call, WeightedGram{x.data, weight_data, out.data, x.dtype, rows, columns, x.strides[0], decay, gain, call.place.threads},
      FISHER_KERNELS_VARIANTS(weighted_gram_));
}

}  // namespace

void bind_gram(py::module_& module) {
  module.def("weighted_gram_", &weighted_gram_);
}

}  // namespace fisher_kernels
