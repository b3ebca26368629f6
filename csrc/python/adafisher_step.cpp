#include <pybind11/stl.h>

#include <algorithm>
#include <memory>
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
struct AdaFisherLists {
  const Call& call;
  List params, grads, exp_avgs, steps, row_factors, column_factors;

  AdaFisherLists(const Call& call_, py::handle params_, py::handle grads_, py::handle exp_avgs_, py::handle steps_, py::handle row_factors_,
        py::handle column_factors_)
      : call(call_),
        params(params_, {call, "params"}),
        grads(read(grads_, "grads")),
        exp_avgs(read(exp_avgs_, "exp_avgs")),
        steps(read(steps_, "steps")),
        row_factors(read(row_factors_, "row_factors")),
        column_factors(read(column_factors_, "column_factors")) {}

 private:
  List read(py::handle object, const char* name) const {
    return read_list(object, params, {call, name});
  }
};

/// A row or column factor: one entry per row or column, or a constant (1 for a missing factor).
struct Factor {
  bool is_vector = false;
  const void* data = nullptr;  // null for a constant of the CPU, and for a vector without entries
  int64_t groups = 1;
  int64_t size = 1;  // of all groups
  double constant = 1.0;
};

Factor read_factor(py::handle object, DType dtype, int max_dims, const Argument& argument) {
  if (object.is_none()) return {};
  const TensorView tensor = read_tensor(object, argument);
  check_dtype(tensor, dtype, argument);
  if (tensor.dims > max_dims) {
    value_error(argument,
                "has shape " + tensor.shape() + ", expected at most " + std::to_string(max_dims) + " dimensions");
  }
  check_contiguous(tensor, argument);
  const int64_t size = tensor.numel();
  if (size != 1) return {true, tensor.data, tensor.dims == 2 ? tensor.sizes[0] : 1, size, 1.0};
  if (argument.call.place.runs_cuda()) return {false, tensor.data, 1, 1, 1.0};
  return {false, nullptr, 1, 1,
          dtype == DType::float64 ? *static_cast<const double*>(tensor.data) : *static_cast<const float*>(tensor.data)};
}

/// Fills in the factors of a parameter of `numel` elements, and its shape as [groups, rows, columns].
void set_curvature(const Call& call, AdaFisherParameter& parameter, const Factor& row, const Factor& column, int64_t numel,
                   py::ssize_t index) {
  const int64_t groups = column.groups;
  int64_t columns = column.is_vector && groups > 0 ? column.size / groups : 0;
  int64_t rows = row.is_vector ? row.size : 0;  // of all groups
  if (!row.is_vector && !column.is_vector) {
    rows = 1;
    columns = numel;
  } else if (!row.is_vector) {
    rows = columns > 0 ? numel / columns : groups;
  } else if (!column.is_vector) {
    columns = rows > 0 ? numel / rows : 0;
  }
  if (groups < 1 || rows % groups != 0 || rows * columns != numel) {
    const std::string what = std::to_string(row.size) + " row and " + std::to_string(column.size) +
                             " column factors in " + std::to_string(groups) + " groups";
    value_error({call, row.is_vector ? "row_factors" : "column_factors", index},
                "does not fit params[" + std::to_string(index) + "]: " + what +
                    ", expected groups * rows and groups * columns " +
                    "with groups * rows * columns = " + std::to_string(numel));
  }
  parameter.row_factor = row.data;
  parameter.column_factor = column.data;
  parameter.row_is_constant = !row.is_vector;
  parameter.column_is_constant = !column.is_vector;
  parameter.constant_factor = row.constant * column.constant;
  parameter.groups = groups;
  parameter.rows = rows / groups;
  parameter.columns = columns;
}

/// True if the elements of each row of a parameter fill a stretch of memory, the rows one after another, though the
/// order within a row is its own, as it is in channels_last convolutions. `places` gets the place of each element in
/// its row.
bool rows_are_dense(const TensorView& param, int64_t columns, std::vector<int64_t>& places) {
  int64_t inner = param.numel();  // elements of the dimensions not yet seen
  int first = 0;
  for (; first < param.dims && inner > columns; ++first) {
    inner /= param.sizes[first];
    if (param.sizes[first] > 1 && param.strides[first] != inner) return false;
  }
  if (inner != columns || !is_dense(param, first)) return false;

  places.assign(1, 0);
  for (int d = first; d < param.dims; ++d) {
    std::vector<int64_t> finer;
    finer.reserve(places.size() * param.sizes[d]);
    for (const int64_t place : places) {
      for (int64_t i = 0; i < param.sizes[d]; ++i) finer.push_back(place + i * param.strides[d]);
    }
    places.swap(finer);
  }
  return true;
}

template <class A>
void permute(const void* factor, const std::vector<int64_t>& places, int64_t groups, void* out) {
  const int64_t columns = static_cast<int64_t>(places.size());
  for (int64_t i = 0; i < groups * columns; ++i) {
    static_cast<A*>(out)[i / columns * columns + places[i % columns]] = static_cast<const A*>(factor)[i];
  }
}

/// Memory for column factors in another order.
using Permuted = std::vector<std::unique_ptr<char[]>>;

/// If three tensors lie alike in memory, with a permutation within the rows, the column factor is permuted instead and
/// they are contiguous for all the kernel can tell.
void permute_rows(AdaFisherParameter& parameter, const TensorView& param, const TensorView& grad,
                  const TensorView& exp_avg, Permuted& permuted) {
  if (parameter.parameter.contiguous && parameter.gradient.contiguous && parameter.moment.contiguous) return;
  std::vector<int64_t> places;
  if (!same_strides(param, grad) || !same_strides(param, exp_avg) || !rows_are_dense(param, parameter.columns, places))
    return;
  parameter.parameter.contiguous = parameter.gradient.contiguous = parameter.moment.contiguous = true;
  if (parameter.column_factor == nullptr) return;
  permuted.emplace_back(new char[parameter.groups * parameter.columns * sizeof(double)]);
  void* const out = permuted.back().get();
  parameter.dtype == DType::float64 ? permute<double>(parameter.column_factor, places, parameter.groups, out)
                                    : permute<float>(parameter.column_factor, places, parameter.groups, out);
  parameter.column_factor = out;
}

/// Parameter i of the lists, but for the step size of the CPU.
AdaFisherParameter read_parameter(const AdaFisherLists& lists, py::ssize_t i, const StepRounding& rounding,
                                  Permuted& permuted) {
  const Call& call = lists.call;
  const Argument param_argument{call, "params", i};
  const TensorView param = read_written(lists.params[i], param_argument);
  check_float(param, param_argument);
  check_writable(param, param_argument);
  const DType state_dtype = accumulation_dtype(param.dtype);
  const TensorView grad = read_like(param, param.dtype, lists.grads[i], {call, "grads", i});
  const TensorView exp_avg = read_moment(param, lists.exp_avgs[i], {call, "exp_avgs", i});
  const Factor row = read_factor(lists.row_factors[i], state_dtype, 1, {call, "row_factors", i});
  const Factor column = read_factor(lists.column_factors[i], state_dtype, 2, {call, "column_factors", i});

  AdaFisherParameter parameter{};
  parameter.parameter = strided(param);
  parameter.gradient = strided(grad);
  parameter.moment = strided(exp_avg);
  parameter.dtype = param.dtype;
  parameter.moment_dtype = exp_avg.dtype;
  set_curvature(call, parameter, row, column, param.numel(), i);
  parameter.rounding = rounding;
  // Random integers are those of places in row-major order.
  if (!call.place.runs_cuda() && !rounding.random) permute_rows(parameter, param, grad, exp_avg, permuted);
  if (parameter.columns == 1) {
    // A single column (a bias, say) is one long row to the kernel, which walks along columns.
    std::swap(parameter.row_factor, parameter.column_factor);
    std::swap(parameter.row_is_constant, parameter.column_is_constant);
    std::swap(parameter.rows, parameter.columns);
  }
  return parameter;
}

void adafisher_step_(py::handle params, py::handle grads, py::handle exp_avgs, py::handle steps, py::handle row_factors,
                     py::handle column_factors, py::handle lr_object, double beta, double damping, double weight_decay,
                     bool decoupled, bool maximize, py::handle grad_scale, py::handle found_inf,
                     const std::optional<std::vector<int64_t>>& rounding, py::handle skipped_object,
                     const Place& place) {
  const Call call("adafisher_step_", place);
  const AdaFisherLists lists(call, params, grads, exp_avgs, steps, row_factors, column_factors);
  const py::ssize_t count = lists.params.size();
  const Scalar lr = read_rate(lr_object, {call, "lr"});
  check_range(beta, beta >= 0 && beta < 1, "a number in [0, 1)", {call, "beta"});
  check_coefficient(damping, {call, "damping"});
  check_coefficient(weight_decay, {call, "weight_decay"});
  const Roundings roundings(call, rounding, count);
  const GradientScale gradient_scale = read_gradient_scale(grad_scale, found_inf, maximize, call);
  auto* const skipped = read_output<int64_t>(skipped_object, DType::int64, {count}, {call, "skipped"});

  Permuted permuted;
  std::vector<AdaFisherParameter> parameters;
  parameters.reserve(count);
  for (py::ssize_t i = 0; i < count; ++i) {
    parameters.push_back(read_parameter(lists, i, roundings[i], permuted));
    parameters.back().step = read_step(lists.steps[i], {call, "steps", i});
  }
  check_distinct(call, parameters);

  if (!place.runs_cuda()) {
    std::fill_n(skipped, count, 0);
    if (gradient_scale.found_inf.value != 0.0) return;
    BiasCorrection bias_correction(beta);
    for (AdaFisherParameter& parameter : parameters) {
      parameter.step_size = lr.value / bias_correction(++*parameter.step);
      parameter.rounding.state = absorb(parameter.rounding.base, static_cast<uint32_t>(*parameter.step));
    }
  }
  const py::gil_scoped_release release;
  run(call, AdaFisherStep{parameters.data(), count, skipped, lr, beta, damping, weight_decay,
                    decay_form(weight_decay, decoupled), gradient_scale, call.place.threads},
      FISHER_KERNELS_VARIANTS(adafisher_step_));
}

}  // namespace

void bind_adafisher_step(py::module_& module) {
  module.def("adafisher_step_", &adafisher_step_);
}

}  // namespace fisher_kernels
