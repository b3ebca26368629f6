#include <pybind11/stl.h>

#include <algorithm>
#include <cmath>
#include <optional>
#include <string>
#include <vector>

#include "../kernels.h"
#include "capability.h"
#include "step.h"
#include "tensor.h"

namespace fisher_kernels {

namespace {

/// The list arguments, all of one length.
struct SofimLists {
  const Call& call;
  List params, grads, exp_avgs, steps;

  SofimLists(const Call& call_, py::handle params_, py::handle grads_, py::handle exp_avgs_, py::handle steps_)
      : call(call_),
        params(params_, {call, "params"}),
        grads(read_list(grads_, params, {call, "grads"})),
        exp_avgs(read_list(exp_avgs_, params, {call, "exp_avgs"})),
        steps(read_list(steps_, params, {call, "steps"})) {}
};

/// Parameter i of the lists, but for its coefficients.
SofimParameter read_parameter(const SofimLists& lists, py::ssize_t i, const StepRounding& rounding) {
  const Call& call = lists.call;
  const Argument param_argument{call, "params", i};
  const TensorView param = read_written(lists.params[i], param_argument);
  check_float(param, param_argument);
  check_writable(param, param_argument);
  const TensorView grad = read_like(param, param.dtype, lists.grads[i], {call, "grads", i});
  const TensorView exp_avg = read_moment(param, lists.exp_avgs[i], {call, "exp_avgs", i});

  SofimParameter parameter{};
  parameter.parameter = strided(param);
  parameter.gradient = strided(grad);
  parameter.moment = strided(exp_avg);
  parameter.rounding = rounding;
  if (!rounding.random) {  // whose integers are those of places in row-major order
    walk_as_they_lie({{param, parameter.parameter}, {grad, parameter.gradient}, {exp_avg, parameter.moment}});
  }
  parameter.size = param.numel();
  parameter.dtype = param.dtype;
  parameter.moment_dtype = exp_avg.dtype;
  return parameter;
}

void sofim_step_(py::handle params, py::handle grads, py::handle exp_avgs, py::handle steps, py::handle lr, double beta,
                 double rho, const std::string& direction, const std::string& scope,
                 const std::vector<double>& weight_decay, bool decoupled, bool maximize, py::handle grad_scale,
                 py::handle found_inf, const std::optional<std::vector<int64_t>>& rounding, py::handle skipped_object,
                 py::handle squares_object, const Place& place) {
  const Call call("sofim_step_", place);
  const SofimLists lists(call, params, grads, exp_avgs, steps);
  const py::ssize_t count = lists.params.size();
  check_range(beta, beta >= 0 && beta < 1, "a number in [0, 1)", {call, "beta"});
  check_range(rho, std::isfinite(rho) && rho > 0, "a finite number > 0", {call, "rho"});
  const bool along_gradient = read_choice(call, direction, "momentum", "gradient", "direction");
  const bool by_parameter = read_choice(call, scope, "global", "tensor", "scope");
  const std::vector<Scalar> rates = read_rates(call, List(lr, {call, "lr"}), count);
  const auto decays = static_cast<py::ssize_t>(weight_decay.size());
  check_one_or_each(call, decays, count, "weight_decay");
  for (py::ssize_t i = 0; i < decays; ++i) check_coefficient(weight_decay[i], {call, "weight_decay", i});
  const Roundings roundings(call, rounding, count);
  const GradientScale gradient_scale = read_gradient_scale(grad_scale, found_inf, maximize, call);
  auto* const skipped = read_output<int64_t>(skipped_object, DType::int64, {count}, {call, "skipped"});
  auto* const squares = read_output<double>(squares_object, DType::float64, {count}, {call, "squares"});

  std::vector<SofimParameter> parameters;
  parameters.reserve(count);
  for (py::ssize_t i = 0; i < count; ++i) {
    SofimParameter parameter = read_parameter(lists, i, roundings[i]);
    parameter.step = read_step(lists.steps[i], {call, "steps", i});
    parameter.lr = rates[rates.size() == 1 ? 0 : i];
    parameter.weight_decay = weight_decay[decays == 1 ? 0 : i];
    parameter.decay = decay_form(parameter.weight_decay, decoupled);
    parameters.push_back(parameter);
  }
  check_distinct(call, parameters);

  if (!place.runs_cuda()) {
    std::fill_n(skipped, count, 0);
    std::fill_n(squares, count, 0.0);
    if (gradient_scale.found_inf.value != 0.0) return;
    BiasCorrection bias_correction(beta);
    for (SofimParameter& parameter : parameters) {
      parameter.correction = bias_correction(++*parameter.step);
      parameter.rounding.state = absorb(parameter.rounding.base, static_cast<uint32_t>(*parameter.step));
    }
  }
  const py::gil_scoped_release release;
  run(call, SofimStep{parameters.data(), count, skipped, squares, beta, rho, along_gradient, by_parameter, gradient_scale,
                call.place.threads},
      FISHER_KERNELS_VARIANTS(sofim_step_));
}

}  // namespace

void bind_sofim_step(py::module_& module) {
  module.def("sofim_step_", &sofim_step_);
}

}  // namespace fisher_kernels
