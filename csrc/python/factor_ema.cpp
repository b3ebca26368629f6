#include <vector>

#include "../kernels.h"
#include "capability.h"
#include "step.h"
#include "tensor.h"

namespace fisher_kernels {

namespace {

/// A contiguous vector in a type that state is kept in.
TensorView check_state_vector(const TensorView& vector, const Argument& argument) {
  check_float(vector, argument);
  check_dtype(vector, accumulation_dtype(vector.dtype), argument);
  check_dims(vector, 1, argument);
  check_contiguous(vector, argument);
  return vector;
}

TensorView read_state_vector(py::handle object, const Argument& argument) {
  return check_state_vector(read_tensor(object, argument), argument);
}

TensorView read_written_vector(py::handle object, const Argument& argument) {
  return check_state_vector(read_written(object, argument), argument);
}

TensorView read_written_vector_like(const TensorView& model, py::handle object, const Argument& argument) {
  const TensorView vector = read_written_vector(object, argument);
  check_dtype(vector, model.dtype, argument);
  check_shape(vector, {model.sizes[0]}, argument);
  return vector;
}

/// As long as the state, or one entry shorter.
TensorView read_contribution(const TensorView& state, py::handle object, const Argument& argument) {
  const TensorView vector = read_state_vector(object, argument);
  check_dtype(vector, state.dtype, argument);
  if (vector.sizes[0] != state.sizes[0] && vector.sizes[0] + 1 != state.sizes[0]) {
    value_error(argument, "has shape " + vector.shape() + ", expected " + state.shape() +
                              ", the shape of its state, or one entry less");
  }
  return vector;
}

double read_coefficient(py::handle object, const Argument& argument) {
  const double value = PyFloat_AsDouble(object.ptr());
  if (value == -1.0 && PyErr_Occurred()) {
    PyErr_Clear();
    type_error(argument, std::string("is of type ") + Py_TYPE(object.ptr())->tp_name + ", expected a number");
  }
  check_coefficient(value, argument);
  return value;
}

void run_minmax(const Call& call, py::handle out, py::handle x, py::handle weights, double eps) {
  const Argument out_argument{call, "out"}, weights_argument{call, "weights"};
  const List x_list(x, {call, "x"}), out_list(out, out_argument);
  const bool weighted = !weights.is_none();
  const List weights_list = weighted ? List(weights, weights_argument) : x_list;
  out_list.check_size(x_list.size(), out_argument, "the length of x");
  weights_list.check_size(x_list.size(), weights_argument, "the length of x");
  check_coefficient(eps, {call, "eps"});

  std::vector<MinMaxVector> vectors(x_list.size());
  Beginnings beginnings(call, "out");
  for (py::ssize_t i = 0; i < x_list.size(); ++i) {
    const TensorView vector = read_state_vector(x_list[i], {call, "x", i});
    const TensorView result = read_written_vector_like(vector, out_list[i], {call, "out", i});
    const Scalar weight = weighted ? read_scalar(weights_list[i], {call, "weights", i}, vector.dtype) : Scalar{};
    vectors[i] = {vector.data, result.data, weight, vector.sizes[0], vector.dtype};
    beginnings.add(result, i);
  }
  beginnings.check();

  const py::gil_scoped_release release;
  run(call, MinMax{vectors.data(), x_list.size(), eps}, FISHER_KERNELS_VARIANTS(minmax));
}

void minmax(py::handle out, py::handle x, py::handle weights, double eps, const Place& place) {
  run_minmax({"minmax", place}, out, x, weights, eps);
}

void minmax_(py::handle out, py::handle x, py::handle weights, double eps, const Place& place) {
  run_minmax({"minmax_", place}, out, x, weights, eps);
}

void factor_ema_(py::handle states, py::handle next, py::handle divisors, py::handle rejected, double decay,
                 double gain, bool normalize, double eps, int64_t joint, const Place& place) {
  const Call call("factor_ema_", place);
  const Argument next_argument{call, "new"}, joint_argument{call, "joint"};
  const List states_list(states, {call, "state"}), next_list(next, next_argument);
  next_list.check_size(states_list.size(), next_argument, "the number of states");
  const bool divided = !divisors.is_none();
  const Argument divisors_argument{call, "divisors"};
  const List divisors_list = divided ? List(divisors, divisors_argument) : states_list;
  divisors_list.check_size(states_list.size(), divisors_argument, "the number of states");
  if (joint < 1 || states_list.size() % joint != 0) {
    value_error(joint_argument, "is " + std::to_string(joint) + ", expected a divisor of the number of states, " +
                                    std::to_string(states_list.size()));
  }
  check_coefficient(decay, {call, "decay"});
  check_coefficient(gain, {call, "gain"});
  check_coefficient(eps, {call, "eps"});
  const Argument rejected_argument{call, "rejected"};
  const TensorView flags = read_tensor(rejected, rejected_argument);
  check_dtype(flags, DType::int64, rejected_argument);
  check_shape(flags, {states_list.size() / joint}, rejected_argument);
  check_contiguous(flags, rejected_argument);

  std::vector<FactorEmaVector> vectors(states_list.size());
  Beginnings beginnings(call, "state");
  for (py::ssize_t i = 0; i < states_list.size(); ++i) {
    const TensorView state = read_written_vector(states_list[i], {call, "state", i});
    const TensorView contribution = read_contribution(state, next_list[i], {call, "new", i});
    const double divisor = divided ? read_coefficient(divisors_list[i], {call, "divisors", i}) : 1.0;
    vectors[i] = {state.data, contribution.data, divisor, state.sizes[0], contribution.sizes[0], state.dtype};
    beginnings.add(state, i);
  }
  beginnings.check();

  const py::gil_scoped_release release;
  run(call, FactorEma{vectors.data(), states_list.size(), joint, static_cast<int64_t*>(flags.data), decay, gain, eps,
                normalize},
      FISHER_KERNELS_VARIANTS(factor_ema_));
}

}  // namespace

void bind_factor_ema(py::module_& module) {
  module.def("minmax", &minmax);
  module.def("minmax_", &minmax_);
  module.def("factor_ema_", &factor_ema_);
}

}  // namespace fisher_kernels
