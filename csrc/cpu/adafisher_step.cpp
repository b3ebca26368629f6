#include <cstdint>

#include "../kernels.h"
#include "parallel.h"
#include "vector.h"

namespace fisher_kernels::FISHER_KERNELS_CAPABILITY {

namespace {

constexpr int64_t kChunk = 1024;  // elements worked on at a time, so that buffers stay in the first-level cache

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

/// What the update of every element of a parameter shares.
template <class A>
struct Rates {
  A gradient_divisor;
  A beta;
  A gain;  // 1 - beta
  A step_size;
  A weight_decay;    // coupled form
  A shrinkage;       // decoupled form: lr * weight_decay

  Rates(const AdaFisherStep& step, const AdaFisherParameter& parameter)
      : gradient_divisor(static_cast<A>(step.gradient_divisor)),
        beta(static_cast<A>(step.beta)),
        gain(static_cast<A>(1.0 - step.beta)),
        step_size(static_cast<A>(parameter.step_size)),
        weight_decay(static_cast<A>(step.weight_decay)),
        shrinkage(static_cast<A>(step.lr * step.weight_decay)) {}
};

/// The update of one register of elements. Returns -1 in the lanes left as they were, else 0.
template <WeightDecay kDecay, class V, class A>
inline auto update(V& parameter, V gradient, V& moment, V curvature, const Rates<A>& rates) {
  gradient /= rates.gradient_divisor;
  const auto finite = gradient - gradient == 0;  // infinity - infinity is NaN
  if constexpr (kDecay == WeightDecay::coupled) gradient += rates.weight_decay * parameter;
  const V next_moment = rates.beta * moment + rates.gain * gradient;
  V change = rates.step_size * next_moment / curvature;
  if constexpr (kDecay == WeightDecay::decoupled) change += rates.shrinkage * parameter;
  const V next_parameter = parameter - change;
  moment = finite ? next_moment : moment;
  parameter = finite ? next_parameter : parameter;
  return ~finite;
}

/// Updates `count` consecutive elements; returns how many were left as they were.
template <WeightDecay kDecay, class T, class A>
int64_t update_chunk(T* __restrict parameter, const T* __restrict gradient, A* __restrict moment, const A* __restrict curvature,
                     int64_t count, const Rates<A>& rates) {
  using V = Vector<T>;
  decltype(V{} == V{}) skipped = {};
  int64_t i = 0;
  for (; i + kLanes<T> <= count; i += kLanes<T>) {
    V w = load(parameter + i), m = load(moment + i);
    skipped += update<kDecay>(w, load(gradient + i), m, load(curvature + i), rates);
    store(parameter + i, w);
    store(moment + i, m);
  }
  if (i < count) {
    const int64_t rest = count - i;
    V w = load(parameter + i, rest), m = load(moment + i, rest);
    skipped += update<kDecay>(w, load(gradient + i, rest), m, load(curvature + i), rates);
    store(parameter + i, w, rest);
    store(moment + i, m, rest);
  }
  int64_t total = 0;
  for (int lane = 0; lane < kLanes<T>; ++lane) total -= skipped[lane];
  return total;
}

/// curvature[i] = F of element first + i. Whole registers are stored: room for one more is needed.
template <class A>
void fill_curvature(const AdaFisherParameter& p, double damping_, int64_t first, int64_t count, A* curvature) {
  const A* const row_factor = static_cast<const A*>(p.row_factor);
  const A* const column_factor = static_cast<const A*>(p.column_factor);
  const A damping = static_cast<A>(damping_), constant = static_cast<A>(p.constant_factor);
  int64_t row = first / p.columns, column = first % p.columns;
  for (int64_t done = 0; done < count;) {
    const int64_t run = smaller(p.columns - column, count - done);
    const A scale = row_factor ? row_factor[row] * constant : constant;
    if (column_factor) {
      const A* const factor = column_factor + row / p.rows * p.columns + column;
      for (int64_t i = 0; i < run; ++i) curvature[done + i] = scale * factor[i] + damping;
    } else {
      for (int64_t i = 0; i < run; ++i) curvature[done + i] = scale + damping;
    }
    done += run;
    column = 0;
    ++row;
  }
  for (int64_t i = 0; i < kLanes<A>; ++i) curvature[count + i] = 1;
}

/// Visits elements first .. first + count of a strided array in row-major order.
template <class Visit>
void visit_strided(const StridedArray& array, int64_t first, int64_t count, const Visit& visit) {
  constexpr int kMaxDims = 64;  // as torch has
  int64_t index[kMaxDims];
  int64_t offset = 0;
  for (int d = array.dims - 1; d >= 0; --d) {
    index[d] = first % array.sizes[d];
    first /= array.sizes[d];
    offset += index[d] * array.strides[d];
  }
  for (int64_t i = 0; i < count; ++i) {
    visit(i, offset);
    for (int d = array.dims - 1; d >= 0; --d) {
      offset += array.strides[d];
      if (++index[d] < array.sizes[d]) break;
      offset -= array.sizes[d] * array.strides[d];
      index[d] = 0;
    }
  }
}

template <class T>
void gather(const StridedArray& array, int64_t first, int64_t count, T* out) {
  const T* const data = static_cast<const T*>(array.data);
  visit_strided(array, first, count, [&](int64_t i, int64_t offset) { out[i] = data[offset]; });
}

template <class T>
void scatter(const T* in, int64_t first, int64_t count, const StridedArray& array) {
  T* const data = static_cast<T*>(array.data);
  visit_strided(array, first, count, [&](int64_t i, int64_t offset) { data[offset] = in[i]; });
}

template <WeightDecay kDecay, class T>
int64_t step_range(const AdaFisherStep& step, const AdaFisherParameter& p, int64_t begin, int64_t end) {
  using A = Accumulator<T>;
  const Rates<A> rates(step, p);
  const bool contiguous = p.parameter.contiguous && p.gradient.contiguous && p.moment.contiguous;
  alignas(kVectorBytes) A curvature[kChunk + kLanes<T>];
  int64_t skipped = 0;
  for (int64_t first = begin; first < end; first += kChunk) {
    const int64_t count = smaller(kChunk, end - first);
    fill_curvature(p, step.damping, first, count, curvature);
    if (contiguous) {
      skipped += update_chunk<kDecay>(static_cast<T*>(p.parameter.data) + first, static_cast<const T*>(p.gradient.data) + first,
                                      static_cast<A*>(p.moment.data) + first, curvature, count, rates);
    } else {
      alignas(kVectorBytes) T parameter[kChunk], gradient[kChunk];
      alignas(kVectorBytes) A moment[kChunk];
      gather(p.parameter, first, count, parameter);
      gather(p.gradient, first, count, gradient);
      gather(p.moment, first, count, moment);
      skipped += update_chunk<kDecay>(parameter, gradient, moment, curvature, count, rates);
      scatter(parameter, first, count, p.parameter);
      scatter(moment, first, count, p.moment);
    }
  }
  return skipped;
}

int64_t step_range(const AdaFisherStep& step, const AdaFisherParameter& p, int64_t begin, int64_t end) {
  int64_t skipped = 0;
  with_type(p.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    switch (step.decay) {
      case WeightDecay::none: skipped = step_range<WeightDecay::none, T>(step, p, begin, end); break;
      case WeightDecay::coupled: skipped = step_range<WeightDecay::coupled, T>(step, p, begin, end); break;
      case WeightDecay::decoupled: skipped = step_range<WeightDecay::decoupled, T>(step, p, begin, end); break;
    }
  });
  return skipped;
}

/// The start of the chunk that holds element i.
inline int64_t chunk_start(int64_t i) { return i - i % kChunk; }

}  // namespace

void adafisher_step_(const AdaFisherStep& step) {
  int64_t total = 0;
  for (int64_t i = 0; i < step.count; ++i) total += step.parameters[i].numel();
  // The elements of all parameters, end to end, are split evenly. Cuts fall between chunks, which start with their
  // parameter: so an element meets the same code whatever the number of threads.
  parallel_for(useful_threads(total, step.threads), total, [&](int64_t begin, int64_t end) {
    int64_t start = 0;  // of parameter i among all elements
    for (int64_t i = 0; i < step.count && start < end; ++i) {
      const AdaFisherParameter& p = step.parameters[i];
      const int64_t size = p.numel();
      const int64_t first = begin > start ? chunk_start(smaller(begin - start, size) + kChunk - 1) : 0;
      const int64_t last = end - start < size ? smaller(size, chunk_start(end - start + kChunk - 1)) : size;
      if (first < last) {
        const int64_t skipped = step_range(step, p, first, last);
        if (skipped > 0) __atomic_fetch_add(step.skipped + i, skipped, __ATOMIC_RELAXED);
      }
      start += size;
    }
  });
}

}  // namespace fisher_kernels::FISHER_KERNELS_CAPABILITY
