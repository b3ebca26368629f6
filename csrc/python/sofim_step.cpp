#include <algorithm>
#include <cmath>
#include <string>
#include <vector>

#include "../kernels.h"
#include "capability.h"
#include "entry_points.h"
#include "step.h"
#include "tensor.h"

namespace fisher_kernels {

namespace {

constexpr const char* kFunction = "sofim_step_";

/// The list arguments, all of one length.
struct Lists {
  List params, grads, exp_avgs, steps;

  Lists(py::handle params_, py::handle grads_, py::handle exp_avgs_, py::handle steps_)
      : params(params_, {kFunction, "params"}),
        grads(read_list(grads_, params, {kFunction, "grads"})),
        exp_avgs(read_list(exp_avgs_, params, {kFunction, "exp_avgs"})),
        steps(read_list(steps_, params, {kFunction, "steps"})) {}
};

void check_one_or_each(py::ssize_t size, py::ssize_t params, const char* name) {
  if (size == 1 || size == params) return;
  value_error({kFunction, name}, "has " + std::to_string(size) + " entries, expected 1 or " + std::to_string(params) +
                                     ", the length of params");
}

/// Whether a choice between two names is the second one.
bool read_choice(const std::string& value, const char* first, const char* second, const char* name) {
  if (value != first && value != second) {
    value_error({kFunction, name}, "is '" + value + "', expected one of '" + first + "', '" + second + "'");
  }
  return value == second;
}

/// Learning rates of all parameters; what is the same tensor as the one before is not read again.
std::vector<double> read_rates(py::handle object, py::ssize_t params) {
  const List list(object, {kFunction, "lr"});
  check_one_or_each(list.size(), params, "lr");
  std::vector<double> rates;
  rates.reserve(list.size());
  for (py::ssize_t i = 0; i < list.size(); ++i) {
    if (i > 0 && list[i].is(list[i - 1])) {
      rates.push_back(rates.back());
      continue;
    }
    const Argument argument{kFunction, "lr", i};
    rates.push_back(read_scalar(list[i], argument));
    check_coefficient(rates.back(), argument);
  }
  return rates;
}

/// Parameter i of the lists, but for its coefficients.
SofimParameter read_parameter(const Lists& lists, py::ssize_t i) {
  const Argument param_argument{kFunction, "params", i}, exp_avg_argument{kFunction, "exp_avgs", i};
  const TensorView param = read_tensor(lists.params[i], param_argument);
  check_float(param, param_argument);
  check_writable(param, param_argument);
  const TensorView grad = read_like(param, param.dtype, lists.grads[i], {kFunction, "grads", i});
  const TensorView exp_avg =
      read_like(param, accumulation_dtype(param.dtype), lists.exp_avgs[i], exp_avg_argument);
  check_writable(exp_avg, exp_avg_argument);

  SofimParameter parameter{};
  parameter.parameter = strided(param);
  parameter.gradient = strided(grad);
  parameter.moment = strided(exp_avg);
  // No element knows its neighbours: three tensors that fill their memory alike are walked in its order.
  if (!parameter.parameter.contiguous && same_strides(param, grad) && same_strides(param, exp_avg) && is_dense(param)) {
    parameter.parameter.contiguous = parameter.gradient.contiguous = parameter.moment.contiguous = true;
  }
  parameter.size = param.numel();
  parameter.dtype = param.dtype;
  return parameter;
}

}  // namespace

void sofim_step_(py::handle params, py::handle grads, py::handle exp_avgs, py::handle steps, py::handle lr, double beta,
                 double rho, const std::string& direction, const std::string& scope,
                 const std::vector<double>& weight_decay, bool decoupled, bool maximize, py::handle grad_scale,
                 py::handle found_inf, py::handle skipped_object, py::handle squares_object, int threads) {
  const Lists lists(params, grads, exp_avgs, steps);
  const py::ssize_t count = lists.params.size();
  check_range(beta, beta >= 0 && beta < 1, "a number in [0, 1)", {kFunction, "beta"});
  check_range(rho, std::isfinite(rho) && rho > 0, "a finite number > 0", {kFunction, "rho"});
  const bool along_gradient = read_choice(direction, "momentum", "gradient", "direction");
  const bool by_parameter = read_choice(scope, "global", "tensor", "scope");
  const std::vector<double> rates = read_rates(lr, count);
  const auto decays = static_cast<py::ssize_t>(weight_decay.size());
  check_one_or_each(decays, count, "weight_decay");
  for (py::ssize_t i = 0; i < decays; ++i) check_coefficient(weight_decay[i], {kFunction, "weight_decay", i});
  const double gradient_scale = read_gradient_scale(grad_scale, maximize, kFunction);
  const bool refused = read_found_inf(found_inf, kFunction);
  auto* const skipped = read_output<int64_t>(skipped_object, DType::int64, {count}, {kFunction, "skipped"});
  auto* const squares = read_output<double>(squares_object, DType::float64, {count}, {kFunction, "squares"});
  check_threads(threads, {kFunction, "threads"});

  std::vector<SofimParameter> parameters;
  std::vector<float*> counters;
  parameters.reserve(count);
  counters.reserve(count);
  for (py::ssize_t i = 0; i < count; ++i) {
    parameters.push_back(read_parameter(lists, i));
    counters.push_back(read_step(lists.steps[i], {kFunction, "steps", i}));
  }

  std::fill_n(skipped, count, 0);
  std::fill_n(squares, count, 0.0);
  if (refused) return;
  BiasCorrection bias_correction(beta);
  for (py::ssize_t i = 0; i < count; ++i) {
    SofimParameter& parameter = parameters[i];
    parameter.correction = bias_correction(++*counters[i]);
    parameter.lr = rates[rates.size() == 1 ? 0 : i];
    parameter.weight_decay = weight_decay[decays == 1 ? 0 : i];
    parameter.decay = decay_form(parameter.weight_decay, decoupled);
  }
  const py::gil_scoped_release release;
  run(SofimStep{parameters.data(), count, skipped, squares, beta, rho, along_gradient, by_parameter, gradient_scale,
                threads},
      {FISHER_KERNELS_VARIANTS(sofim_step_)});
}

}  // namespace fisher_kernels
