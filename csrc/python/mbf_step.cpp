#include <pybind11/stl.h>

#include <algorithm>
#include <cmath>
#include <map>
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
struct MbfLists {
  const Call& call;
  List params, grads, momentum_buffers, inverses, directions;

  MbfLists(const Call& call_, py::handle params_, py::handle grads_, py::handle momentum_buffers_, py::handle inverses_,
        py::handle directions_)
      : call(call_),
        params(params_, {call, "params"}),
        grads(read(grads_, "grads")),
        momentum_buffers(read(momentum_buffers_, "momentum_buffers")),
        inverses(read(inverses_, "inverses")),
        directions(read(directions_, "directions")) {}

 private:
  List read(py::handle object, const char* name) const {
    return read_list(object, params, {call, name});
  }
};

struct Arrays {
  TensorView param, grad, moment;

  Arrays(const MbfLists& lists, py::ssize_t i) {
    const Call& call = lists.call;
    const Argument param_argument{call, "params", i};
    param = read_written(lists.params[i], param_argument);
    check_float(param, param_argument);
    check_writable(param, param_argument);
    grad = read_like(param, param.dtype, lists.grads[i], {call, "grads", i});
    moment = read_moment(param, lists.momentum_buffers[i], {call, "momentum_buffers", i});
  }

  MbfArrays strided() const {
    return {fisher_kernels::strided(param), fisher_kernels::strided(grad), fisher_kernels::strided(moment)};
  }
};

/// A parameter and its bias as [rows, columns], both 0 where the bias does not fit.
struct Matrix {
  int64_t rows, columns;

  Matrix(const TensorView& param, const TensorView* bias) {
    rows = bias != nullptr ? bias->numel() : param.dims > 0 ? param.sizes[0] : 1;
    columns = bias != nullptr;
    if (rows > 0) {
      columns += param.numel() / rows;
    } else {
      int64_t width = 1;
      for (int d = 1; d < param.dims; ++d) width *= param.sizes[d];
      columns += width;
    }
    fits = rows * (columns - (bias != nullptr)) == param.numel();
  }

  bool fits;
};

[[noreturn]] void refuse_shape(const Call& call, const TensorView& inverse, const Matrix& matrix, const TensorView& param,
                               const TensorView* bias, py::ssize_t i) {
  const std::string total = std::to_string(matrix.rows * matrix.columns), columns = std::to_string(matrix.columns);
  value_error({call, "inverses", i},
              "has shape " + inverse.shape() + ", expected (B, n, n) or (B, n (n + 1) / 2) with B * n = " + total +
                  (bias != nullptr ? " and n = " + columns : "") +
                  ", or (1, S, n, n) with (S - 1) * n < " + columns + " <= S * n, for params[" + std::to_string(i) +
                  "] of shape " + param.shape() +
                  (bias != nullptr ? " and the bias params[" + std::to_string(i + 1) + "] of shape " + bias->shape() : ""));
}

/// Fills in how an inverse, or the directions under one, lie on [rows, columns].
void set_layout(const Call& call, MbfParameter& parameter, const TensorView& inverse, const TensorView& param, const TensorView* bias,
                py::handle directions_object, py::ssize_t i) {
  const Matrix matrix(param, bias);
  const int64_t total = matrix.rows * matrix.columns;
  parameter.rows = matrix.rows;
  parameter.columns = parameter.size = matrix.columns;
  if (inverse.dims == 4) {
    const int64_t blocks = inverse.sizes[1], n = inverse.sizes[2];
    if (!matrix.fits || inverse.sizes[0] != 1 || inverse.sizes[3] != n || (blocks - 1) * n >= matrix.columns ||
        matrix.columns > blocks * n)
      refuse_shape(call, inverse, matrix, param, bias, i);
    parameter.size = n;
    if (directions_object.is_none() && !call.place.runs_cuda()) {
      parameter.inverse = inverse.data;
      parameter.shared = true;
      return;
    }
    const Argument argument{call, "directions", i};
    const TensorView directions = read_tensor(directions_object, argument);
    check_dtype(directions, accumulation_dtype(param.dtype), argument);
    check_shape(directions, {blocks, matrix.rows, n}, argument);
    check_contiguous(directions, argument);
    parameter.directions = directions.data;
    parameter.row_stride = n;
    parameter.block_stride = matrix.rows * n;
    return;
  }
  if (inverse.dims != 2 && inverse.dims != 3) refuse_shape(call, inverse, matrix, param, bias, i);
  const int64_t length = inverse.sizes[inverse.dims - 1];
  const int64_t n = inverse.dims == 3 ? length : static_cast<int64_t>(std::sqrt(2.0 * static_cast<double>(length)));
  const bool square = (inverse.dims == 3 ? inverse.sizes[1] : n * (n + 1) / 2) == length;
  if (!matrix.fits || !square || inverse.sizes[0] * n != total || (bias != nullptr && total > 0 && n != matrix.columns))
    refuse_shape(call, inverse, matrix, param, bias, i);
  parameter.inverse = inverse.data;
  parameter.packed = inverse.dims == 2;
  parameter.rows = inverse.sizes[0];
  parameter.columns = parameter.size = n;
}

/// Parameter i of the lists, which has an inverse, with the bias that follows it.
MbfParameter read_parameter(const MbfLists& lists, py::ssize_t i) {
  const Call& call = lists.call;
  const Argument inverse_argument{call, "inverses", i};
  const Arrays weight(lists, i);
  const TensorView inverse = read_tensor(lists.inverses[i], inverse_argument);
  const DType wide = accumulation_dtype(weight.param.dtype);
  if (inverse.dtype != wide && inverse.dtype != DType::bfloat16) {
    type_error(inverse_argument,
               std::string("has dtype ") + name(inverse.dtype) + ", expected " + name(wide) + " or bfloat16");
  }
  check_contiguous(inverse, inverse_argument);

  MbfParameter parameter{};
  parameter.weight = weight.strided();
  parameter.dtype = weight.param.dtype;
  parameter.moment_dtype = weight.moment.dtype;
  parameter.inverse_dtype = inverse.dtype;
  parameter.biased = i + 1 < lists.params.size() && lists.inverses[i + 1].is_none();
  if (parameter.biased) {
    const Arrays bias(lists, i + 1);
    check_dtype(bias.param, weight.param.dtype, {call, "params", i + 1});
    check_dtype(bias.moment, weight.moment.dtype, {call, "momentum_buffers", i + 1});
    parameter.bias = bias.strided();
    set_layout(call, parameter, inverse, weight.param, &bias.param, lists.directions[i], i);
  } else {
    set_layout(call, parameter, inverse, weight.param, nullptr, lists.directions[i], i);
  }
  return parameter;
}

/// A bound that may be missing, as 0.
double read_bound(const Call& call, py::handle object, const char* name) {
  const double bound = object.is_none() ? 0.0 : object.cast<double>();
  check_range(bound, object.is_none() || (std::isfinite(bound) && bound > 0), "a finite number > 0, or None",
              {call, name});
  return bound;
}

/// The settings that each parameter may have for itself.
class Settings {
 public:
  Settings(const Call& call, py::handle lr, const std::vector<double>& weight_decay, const std::vector<double>& floor,
           const std::optional<std::vector<int64_t>>& layers, py::ssize_t count)
      : call_(call),
        rates_(read_rates(call, List(lr, {call, "lr"}), count)),
        decays_(weight_decay),
        floors_(floor),
        layers_(layers) {
    check(decays_, count, "weight_decay");
    check(floors_, count, "floor");
    if (layers_ && static_cast<py::ssize_t>(layers_->size()) != count) {
      value_error({call, "layers"}, "has " + std::to_string(layers_->size()) + " entries, expected " +
                                        std::to_string(count) + ", the length of params");
    }
  }

  /// A bias takes its step with the parameter before it.
  void check_joined(py::ssize_t i) const {
    if (rates_.size() > 1 && !is_same(rates_[i], rates_[i - 1])) refuse("lr", i);
    if (decays_.size() > 1 && decays_[i] != decays_[i - 1]) refuse("weight_decay", i);
    if (floors_.size() > 1 && floors_[i] != floors_[i - 1]) refuse("floor", i);
    if (layers_ && (*layers_)[i] != (*layers_)[i - 1]) refuse("layers", i);
  }

  void set(MbfParameter& parameter, py::ssize_t i, bool decoupled) {
    parameter.lr = rates_[rates_.size() > 1 ? i : 0];
    parameter.weight_decay = decays_[decays_.size() > 1 ? i : 0];
    parameter.decay = decay_form(parameter.weight_decay, decoupled);
    const int64_t layer = layers_ ? (*layers_)[i] : i;
    parameter.layer = numbers_.try_emplace(layer, static_cast<int64_t>(numbers_.size())).first->second;
    const double floor = floors_[floors_.size() > 1 ? i : 0];
    if (parameter.layer == static_cast<int64_t>(of_layers_.size())) of_layers_.push_back(floor);
    of_layers_[parameter.layer] = std::min(of_layers_[parameter.layer], floor);
  }

  int64_t layers() const { return static_cast<int64_t>(numbers_.size()); }

  /// The floor of a layer of which all parameters are set: the smallest of theirs.
  double floor(int64_t layer) const { return of_layers_[layer]; }

 private:
  void check(const std::vector<double>& values, py::ssize_t count, const char* name) const {
    check_one_or_each(call_, static_cast<py::ssize_t>(values.size()), count, name);
    for (size_t i = 0; i < values.size(); ++i) check_coefficient(values[i], {call_, name, static_cast<py::ssize_t>(i)});
  }

  static bool is_same(const Scalar& x, const Scalar& y) { return x.value == y.value && x.data == y.data; }

  [[noreturn]] void refuse(const char* name, py::ssize_t i) const {
    const std::string before = "[" + std::to_string(i - 1) + "]";
    value_error({call_, name, i}, "is not " + std::string(name) + before + ", expected the same, as params[" +
                                      std::to_string(i) + "] is stepped together with params" + before);
  }

  const Call& call_;
  const std::vector<Scalar> rates_;
  const std::vector<double>& decays_;
  const std::vector<double>& floors_;
  const std::optional<std::vector<int64_t>>& layers_;
  std::map<int64_t, int64_t> numbers_;  // of layers
  std::vector<double> of_layers_;       // floors
};

void mbf_step_(py::handle params, py::handle grads, py::handle momentum_buffers, py::handle inverses,
               py::handle directions, py::handle lr, double momentum, const std::vector<double>& weight_decay,
               bool decoupled, bool maximize, py::handle kl_clip_object, const std::string& kl_along,
               py::handle max_relative_step_object, const std::vector<double>& floor,
               const std::optional<std::vector<int64_t>>& layers, py::handle grad_scale, py::handle found_inf,
               py::handle skipped_object, py::handle scale_object, py::handle caps_object, const Place& place) {
  const Call call("mbf_step_", place);
  const MbfLists lists(call, params, grads, momentum_buffers, inverses, directions);
  const py::ssize_t count = lists.params.size();
  Settings settings(call, lr, weight_decay, floor, layers, count);
  check_range(momentum, momentum >= 0 && momentum < 1, "a number in [0, 1)", {call, "momentum"});
  const double kl_clip = read_bound(call, kl_clip_object, "kl_clip");
  const bool along_gradient = read_choice(call, kl_along, "momentum", "gradient", "kl_along");
  const double max_relative_step = read_bound(call, max_relative_step_object, "max_relative_step");
  const GradientScale gradient_scale = read_gradient_scale(grad_scale, found_inf, maximize, call);
  auto* const skipped = read_output<int64_t>(skipped_object, DType::int64, {count}, {call, "skipped"});
  auto* const scale = read_output<double>(scale_object, DType::float64, {}, {call, "scale"});
  auto* const caps = read_output<double>(caps_object, DType::float64, {count}, {call, "caps"});

  std::vector<MbfParameter> parameters;
  parameters.reserve(count);
  Beginnings param_beginnings(call, "params"), moment_beginnings(call, "momentum_buffers");
  const auto begin = [&](const MbfArrays& arrays, py::ssize_t i) {
    param_beginnings.add(arrays.parameter, i);
    moment_beginnings.add(arrays.moment, i);
  };
  for (py::ssize_t i = 0; i < count; i += parameters.back().biased ? 2 : 1) {
    if (lists.inverses[i].is_none()) {
      value_error({call, "inverses", i},
                  "is None, expected the inverse of params[" + std::to_string(i - 1) + "] before it");
    }
    parameters.push_back(read_parameter(lists, i));
    MbfParameter& parameter = parameters.back();
    parameter.skipped = skipped + i;
    parameter.cap = caps + i;
    settings.set(parameter, i, decoupled);
    begin(parameter.weight, i);
    if (parameter.biased) {
      settings.check_joined(i + 1);
      begin(parameter.bias, i + 1);
    }
  }
  for (MbfParameter& parameter : parameters) parameter.floor = settings.floor(parameter.layer);
  param_beginnings.check();
  moment_beginnings.check();

  if (!place.runs_cuda()) {
    std::fill_n(skipped, count, 0);
    std::fill_n(caps, count, 1.0);
    *scale = 1.0;
    if (gradient_scale.found_inf.value != 0.0) return;
  }
  const py::gil_scoped_release release;
  run(call,
      MbfStep{parameters.data(), static_cast<int64_t>(parameters.size()), settings.layers(), skipped, caps, count, scale,
              momentum, gradient_scale, kl_clip, along_gradient, max_relative_step, call.place.threads},
      FISHER_KERNELS_VARIANTS(mbf_step_));
}

}  // namespace

void bind_mbf_step(py::module_& module) {
  module.def("mbf_step_", &mbf_step_);
}

}  // namespace fisher_kernels
