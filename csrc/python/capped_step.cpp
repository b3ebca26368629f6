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

void heavy_ball_(py::handle params, py::handle grads, py::handle momentum_buffers, double momentum, double weight_decay,
                 bool maximize, py::handle grad_scale, py::handle found_inf, py::handle steps,
                 const std::optional<std::vector<int64_t>>& rounding, py::handle skipped_object, const Place& place) {
  const Call call("heavy_ball_", place);
  const List param_list(params, {call, "params"});
  const List grad_list = read_list(grads, param_list, {call, "grads"});
  const List moment_list = read_list(momentum_buffers, param_list, {call, "momentum_buffers"});
  const py::ssize_t count = param_list.size();
  check_range(momentum, momentum >= 0 && momentum < 1, "a number in [0, 1)", {call, "momentum"});
  check_coefficient(weight_decay, {call, "weight_decay"});
  const StepRoundings roundings(call, rounding, steps, count);
  const GradientScale gradient_scale = read_gradient_scale(grad_scale, found_inf, maximize, call);
  auto* const skipped = read_output<int64_t>(skipped_object, DType::int64, {count}, {call, "skipped"});

  std::vector<HeavyBallParameter> parameters(count);
  Beginnings beginnings(call, "momentum_buffers");
  for (py::ssize_t i = 0; i < count; ++i) {
    HeavyBallParameter& p = parameters[i];
    const Argument argument{call, "params", i};
    const TensorView param = read_tensor(param_list[i], argument);
    check_float(param, argument);
    const TensorView grad = read_like(param, param.dtype, grad_list[i], {call, "grads", i});
    const TensorView moment = read_moment(param, moment_list[i], {call, "momentum_buffers", i});
    p.gradient = strided(grad);
    p.moment = strided(moment);
    roundings.set(p, i);
    if (weight_decay != 0) {
      p.parameter = strided(param);
      // Random integers are those of places in row-major order.
      if (!p.rounding.random) walk_as_they_lie({{param, p.parameter}, {grad, p.gradient}, {moment, p.moment}});
    } else {
      if (!p.rounding.random) walk_as_they_lie({{grad, p.gradient}, {moment, p.moment}});
      p.parameter = p.gradient;  // nobody reads it
    }
    p.size = param.numel();
    p.dtype = param.dtype;
    p.moment_dtype = moment.dtype;
    beginnings.add(p.moment, i);
  }
  beginnings.check();

  if (!place.runs_cuda() && gradient_scale.found_inf.value != 0.0) return;
  const py::gil_scoped_release release;
  run(call, HeavyBall{parameters.data(), count, skipped, momentum, weight_decay, gradient_scale, place.threads},
      FISHER_KERNELS_VARIANTS(heavy_ball_));
}

void direction_sums(py::handle params, py::handle directions, py::handle momentum_buffers, py::handle skipped_object,
                    bool products, bool weights, py::handle sums_object, const Place& place) {
  const Call call("direction_sums", place);
  const List param_list(params, {call, "params"});
  const List direction_list = read_list(directions, param_list, {call, "directions"});
  const List moment_list = read_list(momentum_buffers, param_list, {call, "momentum_buffers"});
  const py::ssize_t count = param_list.size();
  const int64_t* const skipped =
      skipped_object.is_none() ? nullptr
                               : read_output<int64_t>(skipped_object, DType::int64, {count}, {call, "skipped"});
  auto* const sums = read_output<double>(sums_object, DType::float64, {count, 3}, {call, "sums"});

  std::vector<DirectionParameter> parameters(count);
  for (py::ssize_t i = 0; i < count; ++i) {
    DirectionParameter& p = parameters[i];
    const Argument argument{call, "params", i};
    const TensorView param = read_tensor(param_list[i], argument);
    check_float(param, argument);
    const TensorView direction =
        read_like(param, accumulation_dtype(param.dtype), direction_list[i], {call, "directions", i});
    const Argument moment_argument{call, "momentum_buffers", i};
    const TensorView moment = check_moment(read_tensor(moment_list[i], moment_argument), param, moment_argument);
    // What nobody reads lies as the direction does, and has its dtype.
    const TensorView &read_param = weights ? param : direction, &read_moment = products ? moment : direction;
    p.parameter = strided(read_param);
    p.direction = strided(direction);
    p.moment = strided(read_moment);
    walk_as_they_lie({{direction, p.direction}, {read_param, p.parameter}, {read_moment, p.moment}});
    p.size = param.numel();
    p.moment_dtype = read_moment.dtype;
    p.dtype = param.dtype;  // also of one that is not read: it says how elements are shared out, and so the sums' bits
  }

  const py::gil_scoped_release release;
  run(call, DirectionSums{parameters.data(), count, skipped, sums, products, weights, place.threads},
      FISHER_KERNELS_VARIANTS(direction_sums));
}

/// What there is one of, or one for each parameter.
template <class T>
const T& of_each(const std::vector<T>& values, py::ssize_t i) {
  return values[values.size() == 1 ? 0 : i];
}

/// The number of each parameter's layer; returns how many layers there are.
int64_t check_layers(const Call& call, const std::vector<int64_t>& layers, py::ssize_t params) {
  if (static_cast<py::ssize_t>(layers.size()) != params) {
    value_error({call, "layers"}, "has " + std::to_string(layers.size()) + " entries, expected " +
                                      std::to_string(params) + ", the length of params");
  }
  int64_t before = -1;
  for (py::ssize_t i = 0; i < params; ++i) {
    const int64_t layer = layers[i];
    if (layer != before + 1 && (i == 0 || layer != before)) {
      const std::string wanted = i == 0 ? "0" : std::to_string(before) + " or " + std::to_string(before + 1) +
                                                    ", as layers are numbered in order";
      value_error({call, "layers", i}, "is " + std::to_string(layer) + ", expected " + wanted);
    }
    before = layer;
  }
  return before + 1;
}

void capped_step_(py::handle params, py::handle directions, py::handle sums_object, const std::vector<int64_t>& layers,
                  py::handle lr, const std::vector<double>& weight_decay, py::handle kl_clip_object,
                  const std::vector<double>& max_relative_step, const std::vector<double>& floor, py::handle found_inf,
                  py::handle steps, const std::optional<std::vector<int64_t>>& rounding, py::handle scale_object,
                  py::handle factors_object, py::handle skipped_object, const Place& place) {
  const Call call("capped_step_", place);
  const List param_list(params, {call, "params"});
  const List direction_list = read_list(directions, param_list, {call, "directions"});
  const py::ssize_t count = param_list.size();
  const int64_t layer_count = check_layers(call, layers, count);
  const double kl_clip = kl_clip_object.is_none() ? 0.0 : kl_clip_object.cast<double>();
  check_range(kl_clip, kl_clip_object.is_none() || (std::isfinite(kl_clip) && kl_clip > 0),
              "a finite number > 0, or None", {call, "kl_clip"});
  const std::vector<Scalar> rates = read_rates(call, List(lr, {call, "lr"}), count);
  check_one_or_each(call, weight_decay.size(), count, "weight_decay");
  check_one_or_each(call, max_relative_step.size(), count, "max_relative_step");
  check_one_or_each(call, floor.size(), count, "floor");
  for (size_t i = 0; i < weight_decay.size(); ++i) {
    check_coefficient(weight_decay[i], {call, "weight_decay", static_cast<py::ssize_t>(i)});
  }
  for (size_t i = 0; i < max_relative_step.size(); ++i) {
    check_range(max_relative_step[i], max_relative_step[i] > 0, "a number > 0, or None",
                {call, "max_relative_step", static_cast<py::ssize_t>(i)});
  }
  for (size_t i = 0; i < floor.size(); ++i) {
    check_coefficient(floor[i], {call, "floor", static_cast<py::ssize_t>(i)});
  }
  const StepRoundings roundings(call, rounding, steps, count);
  Scalar found{0.0};
  if (!found_inf.is_none()) found = read_scalar(found_inf, {call, "found_inf"});
  const auto* const sums = read_output<double>(sums_object, DType::float64, {count, 3}, {call, "sums"});
  auto* const scale = read_output<double>(scale_object, DType::float64, {}, {call, "scale"});
  auto* const factors = read_output<double>(factors_object, DType::float64, {layer_count}, {call, "factors"});
  auto* const skipped = read_output<int64_t>(skipped_object, DType::int64, {count}, {call, "skipped"});

  std::vector<CappedParameter> parameters(count);
  Beginnings beginnings(call, "params");
  for (py::ssize_t i = 0; i < count; ++i) {
    CappedParameter& p = parameters[i];
    const Argument argument{call, "params", i};
    const TensorView param = read_written(param_list[i], argument);
    check_float(param, argument);
    check_writable(param, argument);
    const TensorView direction =
        read_like(param, accumulation_dtype(param.dtype), direction_list[i], {call, "directions", i});
    p.parameter = strided(param);
    p.direction = strided(direction);
    roundings.set(p, i);
    if (!p.rounding.random) walk_as_they_lie({{param, p.parameter}, {direction, p.direction}});  // see heavy_ball_
    p.size = param.numel();
    p.layer = layers[i];
    p.lr = of_each(rates, i);
    p.weight_decay = of_each(weight_decay, i);
    p.max_relative_step = of_each(max_relative_step, i);
    p.floor = of_each(floor, i);
    p.dtype = param.dtype;
    beginnings.add(p.parameter, i);
  }
  beginnings.check();

  if (!place.runs_cuda() && found.value != 0.0) {
    *scale = 1.0;
    std::fill_n(factors, layer_count, 1.0);
    std::fill_n(skipped, count, 0);
    return;
  }
  const py::gil_scoped_release release;
  run(call, CappedStep{parameters.data(), count, layer_count, sums, kl_clip, found, scale, factors, skipped,
                       place.threads},
      FISHER_KERNELS_VARIANTS(capped_step_));
}

}  // namespace

void bind_capped_step(py::module_& module) {
  module.def("heavy_ball_", &heavy_ball_);
  module.def("direction_sums", &direction_sums);
  module.def("capped_step_", &capped_step_);
}

}  // namespace fisher_kernels
