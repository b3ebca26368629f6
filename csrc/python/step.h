#pragma once

#include <algorithm>
#include <cmath>
#include <initializer_list>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "../kernels.h"
#include "tensor.h"

// What the entry points of the steps share.
namespace fisher_kernels {

/// A tensor that is written must not hold one element at several indices.
inline void check_writable(const TensorView& tensor, const Argument& argument) {
  for (int d = 0; d < tensor.dims; ++d) {
    if (tensor.sizes[d] <= 1 || tensor.strides[d] != 0 || tensor.numel() == 0) continue;
    value_error(argument, "has strides " + shape_text(tensor.strides, tensor.dims) + " for shape " + tensor.shape() +
                              ", expected every element in a place of its own");
  }
}

/// A tensor of the shape of the parameter of the same index.
inline TensorView check_like(const TensorView& tensor, const TensorView& param, DType dtype, const Argument& argument) {
  check_dtype(tensor, dtype, argument);
  if (!same_shape(tensor, param)) {
    value_error(argument, "has shape " + tensor.shape() + ", expected " + param.shape() + ", the shape of params[" +
                              std::to_string(argument.index) + "]");
  }
  return tensor;
}

inline TensorView read_like(const TensorView& param, DType dtype, py::handle object, const Argument& argument) {
  return check_like(read_tensor(object, argument), param, dtype, argument);
}

/// The same, of what is written.
inline TensorView read_written_like(const TensorView& param, DType dtype, py::handle object, const Argument& argument) {
  const TensorView tensor = check_like(read_written(object, argument), param, dtype, argument);
  check_writable(tensor, argument);
  return tensor;
}

/// A moment: in the dtype that values of the parameter are summed in, or in bfloat16 where that is float32.
inline TensorView check_moment(const TensorView& tensor, const TensorView& param, const Argument& argument) {
  const DType wide = accumulation_dtype(param.dtype);
  const bool is_short = tensor.dtype == DType::bfloat16 && wide == DType::float32;
  return check_like(tensor, param, is_short ? DType::bfloat16 : wide, argument);
}

/// The same, of one that is written.
inline TensorView read_moment(const TensorView& param, py::handle object, const Argument& argument) {
  const TensorView tensor = check_moment(read_written(object, argument), param, argument);
  check_writable(tensor, argument);
  return tensor;
}

/// By which random integers parameters are rounded: four numbers for each, or none at all.
class Roundings {
 public:
  Roundings(const Call& call, const std::optional<std::vector<int64_t>>& numbers, py::ssize_t params) : call_(call) {
    if (!numbers) return;
    if (static_cast<py::ssize_t>(numbers->size()) != 4 * params) {
      value_error({call, "rounding"}, "has " + std::to_string(numbers->size() / 4) + " entries, expected " +
                                          std::to_string(params) + ", the length of params");
    }
    numbers_ = numbers->data();
  }

  bool any() const { return numbers_ != nullptr; }

  /// Those of parameter i, but for the state.
  StepRounding operator[](py::ssize_t i) const {
    if (numbers_ == nullptr) return {};
    const int64_t* const n = numbers_ + 4 * i;
    check(n[0] >= 0 && n[0] < (int64_t{1} << 32), i, "base", n[0], "0 to 2^32 - 1");
    check(n[1] >= 0, i, "offset", n[1], "at least 0");
    check(n[2] >= 1, i, "run", n[2], "at least 1");
    check(n[3] >= n[2], i, "pitch", n[3], "at least " + std::to_string(n[2]) + ", the run");
    return {{n[1], n[2], n[3]}, static_cast<uint32_t>(n[0]), 0, true};
  }

 private:
  void check(bool fits, py::ssize_t i, const char* name, int64_t found, const std::string& expected) const {
    if (fits) return;
    const std::string what = "rounding[" + std::to_string(i) + "]." + name;
    value_error({call_, what.c_str()}, "is " + std::to_string(found) + ", expected " + expected);
  }

  const Call& call_;
  const int64_t* numbers_ = nullptr;
};

/// Where the tensors of a list that is written begin. A tensor that is in the list twice would be stepped twice; of
/// tensors that overlap in another way nothing is known.
class Beginnings {
 public:
  Beginnings(const Call& call, const char* name) : call_(call), name_(name) {}

  void add_place(const void* data, py::ssize_t index) { places_.emplace_back(data, index); }

  /// What is empty is written nowhere.
  template <class Array>
  void add(const Array& array, py::ssize_t index) {
    if (std::find(array.sizes, array.sizes + array.dims, 0) == array.sizes + array.dims) add_place(array.data, index);
  }

  void check() {
    std::sort(places_.begin(), places_.end());
    for (size_t k = 1; k < places_.size(); ++k) {
      if (places_[k - 1].first != places_[k].first) continue;
      value_error({call_, name_, places_[k].second},
                  "shares memory with " + std::string(name_) + "[" + std::to_string(places_[k - 1].second) +
                      "], expected each to be in the list once");
    }
  }

 private:
  const Call& call_;
  const char* name_;
  std::vector<std::pair<const void*, py::ssize_t>> places_;
};

inline StridedArray strided(const TensorView& tensor) {
  return {tensor.data, tensor.sizes, tensor.strides, tensor.dims, is_contiguous(tensor)};
}

inline bool same_strides(const TensorView& a, const TensorView& b) {
  for (int d = 0; d < a.dims; ++d) {
    if (a.sizes[d] > 1 && a.strides[d] != b.strides[d]) return false;
  }
  return true;
}

/// True if dimensions `first` and on lie in memory without gaps, in whatever order.
inline bool is_dense(const TensorView& tensor, int first = 0) {
  std::vector<int> order;  // innermost first
  for (int d = first; d < tensor.dims; ++d) {
    if (tensor.sizes[d] > 1) order.push_back(d);
  }
  std::sort(order.begin(), order.end(), [&](int a, int b) { return tensor.strides[a] < tensor.strides[b]; });
  int64_t stride = 1;
  for (const int d : order) {
    if (tensor.strides[d] != stride) return false;
    stride *= tensor.sizes[d];
  }
  return true;
}

/// A tensor, and the array of a kernel that stands for it.
struct Walked {
  const TensorView& tensor;
  StridedArray& array;
};

/// Where no element knows its neighbours, tensors of one shape that fill their memory alike are walked in its order.
inline void walk_as_they_lie(std::initializer_list<Walked> all) {
  const TensorView& first = all.begin()->tensor;
  if (is_contiguous(first) || !is_dense(first)) return;
  for (const Walked& other : all) {
    if (!same_strides(first, other.tensor)) return;
  }
  for (const Walked& each : all) each.array.contiguous = true;
}

/// A list that has an entry for each parameter.
inline List read_list(py::handle object, const List& params, const Argument& argument) {
  const List list(object, argument);
  list.check_size(params.size(), argument, "the number of params");
  return list;
}

/// A number of steps taken, which is to be advanced.
inline float* read_step(py::handle object, const Argument& argument) {
  const TensorView step = read_written(object, argument);
  check_dtype(step, DType::float32, argument);
  if (step.numel() != 1) value_error(argument, "has shape " + step.shape() + ", expected one element");
  return static_cast<float*>(step.data);
}

/// A number of steps taken, which is only read.
inline const float* read_count(py::handle object, const Argument& argument) {
  const TensorView step = read_tensor(object, argument);
  check_dtype(step, DType::float32, argument);
  if (step.numel() != 1) value_error(argument, "has shape " + step.shape() + ", expected one element");
  return static_cast<const float*>(step.data);
}

/// By which random integers parameters are rounded in a step whose number is kept beside each, and only read.
class StepRoundings {
 public:
  StepRoundings(const Call& call, const std::optional<std::vector<int64_t>>& numbers, py::handle steps,
                py::ssize_t params)
      : call_(call), roundings_(call, numbers, params) {
    if (!roundings_.any()) return;
    if (steps.is_none()) {
      value_error({call, "steps"}, "is None, expected the number of the step for each parameter beside rounding");
    }
    steps_.emplace(steps, Argument{call, "steps"});
    steps_->check_size(params, {call, "steps"}, "the number of params");
  }

  /// Fills in what a parameter, number i, has of it.
  template <class Parameter>
  void set(Parameter& p, py::ssize_t i) const {
    p.rounding = roundings_[i];
    p.step = nullptr;
    if (!steps_) return;
    const Argument argument{call_, "steps", i};
    p.step = read_count((*steps_)[i], argument);
    if (!call_.place.runs_cuda()) p.rounding.state = absorb(p.rounding.base, static_cast<uint32_t>(*p.step));
  }

 private:
  const Call& call_;
  const Roundings roundings_;
  std::optional<List> steps_;
};

/// A learning rate; what lies on a GPU is not waited for.
inline Scalar read_rate(py::handle object, const Argument& argument) {
  const Scalar rate = read_scalar(object, argument);
  check_coefficient(rate.value, argument);
  return rate;
}

/// There is one of a setting for all parameters, or one for each.
inline void check_one_or_each(const Call& call, py::ssize_t size, py::ssize_t params, const char* name) {
  if (size == 1 || size == params) return;
  value_error({call, name}, "has " + std::to_string(size) + " entries, expected 1 or " + std::to_string(params) +
                                ", the length of params");
}

/// Learning rates of all parameters; what is the same tensor as the one before is not read again.
inline std::vector<Scalar> read_rates(const Call& call, const List& list, py::ssize_t params) {
  check_one_or_each(call, list.size(), params, "lr");
  std::vector<Scalar> rates;
  rates.reserve(list.size());
  for (py::ssize_t i = 0; i < list.size(); ++i) {
    if (i > 0 && list[i].is(list[i - 1])) {
      rates.push_back(rates.back());
      continue;
    }
    rates.push_back(read_rate(list[i], {call, "lr", i}));
  }
  return rates;
}

/// Whether a choice between two names is the second one.
inline bool read_choice(const Call& call, const std::string& value, const char* first, const char* second,
                        const char* name) {
  if (value != first && value != second) {
    value_error({call, name}, "is '" + value + "', expected one of '" + first + "', '" + second + "'");
  }
  return value == second;
}

/// What scales gradients, and whether the step is not to be taken at all.
inline GradientScale read_gradient_scale(py::handle grad_scale, py::handle found_inf, bool maximize, const Call& call) {
  GradientScale scale{maximize, {1.0}, {0.0}};
  if (!grad_scale.is_none()) scale.divisor = read_scalar(grad_scale, {call, "grad_scale"});
  if (!found_inf.is_none()) scale.found_inf = read_scalar(found_inf, {call, "found_inf"});
  return scale;
}

/// A tensor that the caller allocated for a result.
template <class T>
T* read_output(py::handle object, DType dtype, const std::vector<int64_t>& shape, const Argument& argument) {
  const TensorView tensor = read_tensor(object, argument);
  check_dtype(tensor, dtype, argument);
  check_shape(tensor, shape, argument);
  check_contiguous(tensor, argument);
  return static_cast<T*>(tensor.data);
}

/// Parameters, moments and numbers of steps, each of which is written, are in their lists once.
template <class Parameter>
void check_distinct(const Call& call, const std::vector<Parameter>& parameters) {
  if (parameters.size() < 2) return;
  Beginnings params(call, "params"), exp_avgs(call, "exp_avgs"), steps(call, "steps");
  py::ssize_t i = 0;
  for (const Parameter& parameter : parameters) {
    params.add(parameter.parameter, i);
    exp_avgs.add(parameter.moment, i);
    steps.add_place(parameter.step, i++);
  }
  params.check();
  exp_avgs.check();
  steps.check();
}

inline WeightDecay decay_form(double weight_decay, bool decoupled) {
  return weight_decay == 0.0 ? WeightDecay::none : decoupled ? WeightDecay::decoupled : WeightDecay::coupled;
}

/// 1 - beta^t, for many equal t.
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

}  // namespace fisher_kernels
