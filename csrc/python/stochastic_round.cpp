#include "../kernels.h"
#include "capability.h"
#include "step.h"
#include "tensor.h"

namespace fisher_kernels {

namespace {

void stochastic_round(py::handle x_object, py::handle out_object, uint32_t base, uint32_t step, int64_t offset,
                      int64_t run_length, int64_t pitch, bool low, py::handle count, const Place& place) {
  const Call call("stochastic_round", place);
  const Argument x_argument{call, "x"}, out_argument{call, "out"}, run_argument{call, "run"};
  const TensorView x = read_tensor(x_object, x_argument);
  check_dtype(x, DType::float32, x_argument);
  check_contiguous(x, x_argument);
  const TensorView out = read_tensor(out_object, out_argument);
  check_dtype(out, DType::bfloat16, out_argument);
  check_shape(out, {x.sizes, x.sizes + x.dims}, out_argument);
  check_contiguous(out, out_argument);
  if (run_length < 1) value_error(run_argument, "is " + std::to_string(run_length) + ", expected at least 1");
  const float* on_device = nullptr;
  if (!count.is_none()) {
    const float* const number = read_count(count, {call, "step"});
    if (place.runs_cuda()) {
      on_device = number;
    } else {
      step = static_cast<uint32_t>(*number);
    }
  }

  const py::gil_scoped_release release;
  run(call, StochasticRound{static_cast<const float*>(x.data), out.data, x.numel(), {offset, run_length, pitch},
                            base, absorb(base, step), on_device, low, place.threads},
      FISHER_KERNELS_VARIANTS(stochastic_round));
}

}  // namespace

void bind_stochastic_round(py::module_& module) {
  module.def("stochastic_round", &stochastic_round);
}

}  // namespace fisher_kernels
