#include <cstdint>
#include <limits>

#include "../kernels.h"
#include "vector.h"

namespace fisher_kernels::FISHER_KERNELS_CAPABILITY {

namespace {

template <class A>
struct Range {
  A min = std::numeric_limits<A>::infinity();
  A max = -std::numeric_limits<A>::infinity();
  bool has_nan = false;

  void include(A value) {
    if (value < min) min = value;
    if (value > max) max = value;
    has_nan |= value != value;
  }
};

/// The smallest and largest entry of x / weight, NaN aside.
template <class A>
Range<A> range_of(const A* x, int64_t size, A weight) {
  using V = Vector<A>;
  constexpr int kStep = kLanes<A>;
  Range<A> range;
  int64_t i = 0;
  if (size >= kStep) {
    V min = load(x) / weight, max = min;
    auto nan = min != min;
    for (; i + kStep <= size; i += kStep) {
      const V value = load(x + i) / weight;
      min = value < min ? value : min;
      max = value > max ? value : max;
      nan |= value != value;
    }
    for (int lane = 0; lane < kStep; ++lane) {
      range.include(min[lane]);
      range.include(max[lane]);
      range.has_nan |= nan[lane] != 0;
    }
  }
  for (; i < size; ++i) range.include(x[i] / weight);
  return range;
}

/// minmax(v) entry by entry: (v - min) / divisor + constant.
template <class A>
struct Normalization {
  A min;
  A divisor;
  A constant;
  bool is_constant;

  Normalization(const Range<A>& range, double eps) {
    const A largest = range.max > -range.min ? range.max : -range.min;  // of the absolute values
    const A spread = range.max - range.min;
    const bool is_finite = !range.has_nan && spread <= std::numeric_limits<A>::max();  // false too where spread is NaN
    min = range.min;
    divisor = spread + static_cast<A>(eps);
    is_constant = !is_finite || spread <= static_cast<A>(1e-5) * largest;
    constant = is_finite ? A(1) : std::numeric_limits<A>::quiet_NaN();
  }

  A operator()(A value) const { return is_constant ? constant : (value - min) / divisor; }
};

template <class A>
void minmax_vector(const MinMaxVector& vector, double eps) {
  const A* __restrict x = static_cast<const A*>(vector.x);
  A* __restrict out = static_cast<A*>(vector.out);
  const A weight = static_cast<A>(vector.weight.value);
  if (weight == 0) {
    for (int64_t i = 0; i < vector.size; ++i) out[i] = A(1);
    return;
  }
  const Normalization<A> normalize(range_of(x, vector.size, weight), eps);
  for (int64_t i = 0; i < vector.size; ++i) out[i] = normalize(x[i] / weight);
}

template <class A>
Range<A> range_of(const FactorEmaVector& vector) {
  Range<A> range =
      range_of(static_cast<const A*>(vector.next), vector.next_size, static_cast<A>(vector.divisor));
  if (vector.next_size < vector.size) range.include(A(1));
  return range;
}

template <class A>
bool is_finite(const FactorEmaVector& vector) {
  const Range<A> range = range_of<A>(vector);
  const A limit = std::numeric_limits<A>::max();
  return !range.has_nan && range.max <= limit && range.min >= -limit;
}

template <class A>
void update_vector(const FactorEmaVector& vector, const FactorEma& ema) {
  A* __restrict state = static_cast<A*>(vector.state);
  const A* __restrict next = static_cast<const A*>(vector.next);
  const A decay = static_cast<A>(ema.decay), gain = static_cast<A>(ema.gain), divisor = static_cast<A>(vector.divisor);
  const auto update = [&](const auto& value) {
    for (int64_t i = 0; i < vector.next_size; ++i) state[i] = decay * state[i] + gain * value(next[i] / divisor);
    for (int64_t i = vector.next_size; i < vector.size; ++i) state[i] = decay * state[i] + gain * value(A(1));
  };
  if (ema.normalize) {
    update(Normalization<A>(range_of<A>(vector), ema.eps));
  } else {
    update([](A value) { return value; });
  }
}

bool is_finite(const FactorEmaVector& vector) {
  return vector.dtype == DType::float64 ? is_finite<double>(vector) : is_finite<float>(vector);
}

}  // namespace

void minmax(const MinMax& arguments) {
  for (int64_t i = 0; i < arguments.count; ++i) {
    const MinMaxVector& vector = arguments.vectors[i];
    vector.dtype == DType::float64 ? minmax_vector<double>(vector, arguments.eps)
                                   : minmax_vector<float>(vector, arguments.eps);
  }
}

void factor_ema_(const FactorEma& arguments) {
  for (int64_t run = 0; run < arguments.count / arguments.joint; ++run) {
    const FactorEmaVector* const vectors = arguments.vectors + run * arguments.joint;
    bool finite = true;
    for (int64_t i = 0; i < arguments.joint; ++i) finite = finite && is_finite(vectors[i]);
    arguments.rejected[run] = finite ? 0 : 1;
    if (!finite) continue;
    for (int64_t i = 0; i < arguments.joint; ++i) {
      vectors[i].dtype == DType::float64 ? update_vector<double>(vectors[i], arguments)
                                         : update_vector<float>(vectors[i], arguments);
    }
  }
}

}  // namespace fisher_kernels::FISHER_KERNELS_CAPABILITY
