#include <algorithm>
#include <cmath>
#include <string>
#include <vector>

#include "../kernels.h"
#include "capability.h"
#include "entry_points.h"
#include "tensor.h"

namespace fisher_kernels {

namespace {

constexpr const char* kFunction = "adafisher_step_";

void check_range(double value, bool in_range, const char* name, const char* expected) {
  if (!in_range) value_error({kFunction, name}, "is " + std::string(py::str(py::float_(value))) + ", expected " + expected);
}

void check_like(const TensorView& tensor, const TensorView& model, const Argument& argument, const char* model_name) {
  if (same_shape(tensor, model)) return;
  value_error(argument, "has shape " + tensor.shape() + ", expected " + model.shape() + ", the shape of " + model_name + "[" +
                            std::to_string(argument.index) + "]");
}

/// A tensor that is written must not hold one element at several indices.
void check_writable(const TensorView& tensor, const Argument& argument) {
  if (tensor.numel() == 0) return;
  for (int d = 0; d < tensor.dims; ++d) {
    if (tensor.sizes[d] > 1 && tensor.strides[d] == 0) {
      value_error(argument, "has strides " + shape_text(tensor.strides, tensor.dims) + " for shape " + tensor.shape() +
                                ", expected every element in a place of its own");
    }
  }
}

StridedArray strided(const TensorView& tensor) {
  return {tensor.data, tensor.sizes, tensor.strides, tensor.dims, is_contiguous(tensor)};
}

double first_element(const TensorView& factor) {
  return factor.dtype == DType::float64 ? *static_cast<const double*>(factor.data) : *static_cast<const float*>(factor.data);
}

/// A row or column factor: a vector over rows or columns, or a constant (a missing factor being 1).
struct Factor {
  TensorView tensor{};
  int64_t size = 0;  // 0 for a constant
  bool is_vector = false;
  double constant = 1.0;
};

Factor read_factor(py::handle object, DType dtype, int max_dims, const Argument& argument) {
  Factor factor;
  if (object.is_none()) return factor;
  factor.tensor = read_tensor(object, argument);
  check_dtype(factor.tensor, dtype, argument);
  if (factor.tensor.dims > max_dims) {
    value_error(argument, "has shape " + factor.tensor.shape() + ", expected at most " + std::to_string(max_dims) + " dimensions");
  }
  check_contiguous(factor.tensor, argument);
  factor.size = factor.tensor.numel();
  factor.is_vector = factor.size != 1;
  if (!factor.is_vector) factor.constant = first_element(factor.tensor);
  return factor;
}

/// Fills in the shape and the factors of a parameter with `numel` elements.
void set_curvature(AdaFisherParameter& parameter, const Factor& row, const Factor& column, int64_t numel, py::ssize_t index) {
  const bool grouped = column.is_vector && column.tensor.dims == 2;
  const int64_t groups = grouped ? column.tensor.sizes[0] : 1;
  int64_t columns = column.is_vector ? column.size / std::max<int64_t>(groups, 1) : 1;
  int64_t all_rows = 1;  // of all groups
  if (row.is_vector) {
    all_rows = row.size;
    if (!column.is_vector) columns = all_rows > 0 ? numel / all_rows : 0;
  } else if (column.is_vector) {
    all_rows = columns > 0 ? numel / columns : 0;
  } else {
    columns = numel;
  }
  if (all_rows * columns != numel || (groups > 0 ? all_rows % groups : all_rows) != 0) {
    const Argument argument{kFunction, row.is_vector ? "row_factors" : "column_factors", index};
    value_error(argument, "does not fit params[" + std::to_string(index) + "] of " + std::to_string(numel) + " elements: " +
                              std::to_string(all_rows) + " rows in " + std::to_string(groups) + " groups, " +
                              std::to_string(columns) + " columns");
  }
  parameter.row_factor = row.is_vector ? row.tensor.data : nullptr;
  parameter.column_factor = column.is_vector ? column.tensor.data : nullptr;
  parameter.constant_factor = row.constant * column.constant;
  parameter.groups = groups;
  parameter.rows = groups > 0 ? all_rows / groups : 0;
  parameter.columns = columns;
  if (columns == 1) {
    // A single column (a bias, say): its rows are one long row, so that the kernel always walks along columns.
    std::swap(parameter.row_factor, parameter.column_factor);
    std::swap(parameter.rows, parameter.columns);
  }
}

/// 1 - beta^t for many equal t.
class BiasCorrection {
 public:
  explicit BiasCorrection(double beta) : beta_(beta) {}

  double operator()(float t) {
    if (t != t_) {
      t_ = t;
      value_ = 1.0 - std::pow(beta_, static_cast<double>(t));
    }
    return value_;
  }

 private:
  double beta_;
  float t_ = 0.0f;
  double value_ = 0.0;
};

}  // namespace

void adafisher_step_(py::handle params, py::handle grads, py::handle exp_avgs, py::handle steps, py::handle row_factors,
                     py::handle column_factors, py::handle lr_object, double beta, double damping, double weight_decay,
                     bool decoupled, bool maximize, py::handle grad_scale, py::handle found_inf, py::handle skipped_object,
                     int threads) {
  const Argument params_argument{kFunction, "params"};
  const List params_list(params, params_argument);
  const py::ssize_t count = params_list.size();
  const auto read_list = [&](py::handle object, const char* name) {
    const Argument argument{kFunction, name};
    const List list(object, argument);
    list.check_size(count, argument, "the number of params");
    return list;
  };
  const List grads_list = read_list(grads, "grads");
  const List exp_avgs_list = read_list(exp_avgs, "exp_avgs");
  const List steps_list = read_list(steps, "steps");
  const List row_factors_list = read_list(row_factors, "row_factors");
  const List column_factors_list = read_list(column_factors, "column_factors");

  const double lr = read_scalar(lr_object, {kFunction, "lr"});
  check_range(lr, std::isfinite(lr) && lr >= 0, "lr", "a finite number >= 0");
  check_range(beta, beta >= 0 && beta < 1, "beta", "a number in [0, 1)");
  check_range(damping, std::isfinite(damping) && damping >= 0, "damping", "a finite number >= 0");
  check_range(weight_decay, std::isfinite(weight_decay) && weight_decay >= 0, "weight_decay", "a finite number >= 0");
  const double scale = grad_scale.is_none() ? 1.0 : 1.0 / read_scalar(grad_scale, {kFunction, "grad_scale"});
  const bool refused = !found_inf.is_none() && read_scalar(found_inf, {kFunction, "found_inf"}) != 0.0;
  const Argument skipped_argument{kFunction, "skipped"};
  const TensorView skipped = read_tensor(skipped_object, skipped_argument);
  check_dtype(skipped, DType::int64, skipped_argument);
  check_shape(skipped, {count}, skipped_argument);
  check_contiguous(skipped, skipped_argument);
  check_threads(threads, {kFunction, "threads"});

  std::vector<AdaFisherParameter> parameters(count);
  std::vector<float*> step_counts(count);
  for (py::ssize_t i = 0; i < count; ++i) {
    const Argument param_argument{kFunction, "params", i};
    const TensorView param = read_tensor(params_list[i], param_argument);
    check_float(param, param_argument);
    check_writable(param, param_argument);
    const DType state_dtype = accumulation_dtype(param.dtype);

    const Argument grad_argument{kFunction, "grads", i};
    const TensorView grad = read_tensor(grads_list[i], grad_argument);
    check_dtype(grad, param.dtype, grad_argument);
    check_like(grad, param, grad_argument, "params");

    const Argument exp_avg_argument{kFunction, "exp_avgs", i};
    const TensorView exp_avg = read_tensor(exp_avgs_list[i], exp_avg_argument);
    check_dtype(exp_avg, state_dtype, exp_avg_argument);
    check_like(exp_avg, param, exp_avg_argument, "params");
    check_writable(exp_avg, exp_avg_argument);

    const Argument step_argument{kFunction, "steps", i};
    const TensorView step = read_tensor(steps_list[i], step_argument);
    check_dtype(step, DType::float32, step_argument);
    if (step.numel() != 1) value_error(step_argument, "has shape " + step.shape() + ", expected one element");
    step_counts[i] = static_cast<float*>(step.data);

    AdaFisherParameter& parameter = parameters[i];
    parameter.parameter = strided(param);
    parameter.gradient = strided(grad);
    parameter.moment = strided(exp_avg);
    parameter.dtype = param.dtype;
    set_curvature(parameter, read_factor(row_factors_list[i], state_dtype, 1, {kFunction, "row_factors", i}),
                  read_factor(column_factors_list[i], state_dtype, 2, {kFunction, "column_factors", i}), param.numel(), i);
  }

  auto* const skipped_counts = static_cast<int64_t*>(skipped.data);
  std::fill_n(skipped_counts, count, 0);
  if (refused) return;
  BiasCorrection bias_correction(beta);
  for (py::ssize_t i = 0; i < count; ++i) parameters[i].step_size = lr / bias_correction(++*step_counts[i]);

  const WeightDecay decay = weight_decay == 0.0 ? WeightDecay::none : decoupled ? WeightDecay::decoupled : WeightDecay::coupled;
  const py::gil_scoped_release release;
  run(AdaFisherStep{parameters.data(), count, skipped_counts, lr, beta, damping, weight_decay, decay, maximize ? -scale : scale,
                    threads},
      {FISHER_KERNELS_VARIANTS(adafisher_step_)});
}

}  // namespace fisher_kernels
