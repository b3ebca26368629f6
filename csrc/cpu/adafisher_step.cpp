#include <cstdint>

#include "../kernels.h"
#include "integers.h"
#include "parallel.h"
#include "rounding.h"
#include "strided.h"
#include "vector.h"

namespace fisher_kernels::FISHER_KERNELS_CAPABILITY {

namespace {

// Elements worked on at a time where the curvature passes through a buffer: few enough that the processor evaluates it
// for the next chunk while it waits for the memory of this one. A multiple of every kLanes.
constexpr int64_t kChunk = 128;
constexpr int64_t kShortestRun = 64;  // of a row whose curvature goes straight to registers
// Elements ahead, for 16-bit parameters beside moments twice as wide; where all are alike the hardware does better.
constexpr int64_t kPrefetch = 256;

/// What the update of every element of a parameter shares.
template <class A>
struct Rates {
  A gradient_scale;
  A beta;
  A gain;  // 1 - beta
  A step_size;
  A weight_decay;  // coupled form
  A shrinkage;     // decoupled form: lr * weight_decay

  Rates(const AdaFisherStep& step, const AdaFisherParameter& parameter)
      : gradient_scale(static_cast<A>(step.gradient_scale.factor())),
        beta(static_cast<A>(step.beta)),
        gain(static_cast<A>(1.0 - step.beta)),
        step_size(static_cast<A>(parameter.step_size)),
        weight_decay(static_cast<A>(step.weight_decay)),
        shrinkage(static_cast<A>(step.lr.value * step.weight_decay)) {}
};

/// The update of one register of elements; those whose gradient is not finite stay as they are. Returns 0 in the lanes
/// that were updated and NaN in the others.
template <WeightDecay kDecay, class V, class A>
inline V update(V& parameter, V gradient, V& moment, V curvature, const Rates<A>& rates) {
  gradient *= rates.gradient_scale;
  const V doubt = gradient - gradient;  // infinity - infinity is NaN
  const auto finite = doubt == 0;
  if constexpr (kDecay == WeightDecay::coupled) gradient += rates.weight_decay * parameter;
  const V next_moment = rates.beta * moment + rates.gain * gradient;
  V change = rates.step_size * next_moment / curvature;
  if constexpr (kDecay == WeightDecay::decoupled) change += rates.shrinkage * parameter;
  const V next_parameter = parameter - change;
  moment = finite ? next_moment : moment;
  parameter = finite ? next_parameter : parameter;
  return doubt;
}

template <class T>
int64_t count_non_finite(const T* gradient, int64_t count, Accumulator<T> gradient_scale) {
  int64_t found = 0;
  for (int64_t i = 0; i < count; ++i) {
    const Accumulator<T> value = widen(gradient[i]) * gradient_scale;
    found += value - value != 0;
  }
  return found;
}

/// Updates `count` consecutive elements; curvature(i) is F from element i on, a whole register of it. What is bfloat16
/// is rounded by the random integers of `random` if kRandom. `doubt` becomes NaN in some lane if any element was left as
/// it was.
template <WeightDecay kDecay, bool kRandom, class T, class M, class Curvature>
inline void update_run(T* __restrict parameter, const T* __restrict gradient, M* __restrict moment, int64_t count,
                       const Curvature& curvature, const Rates<Accumulator<T>>& rates, const RandomRun& random,
                       Vector<T>& doubt) {
  for_registers<Accumulator<T>>(count, [&](int64_t i, const auto& load, const auto& store) {
    if constexpr (sizeof(T) != sizeof(M)) {
      __builtin_prefetch(parameter + i + kPrefetch, 1);
      __builtin_prefetch(gradient + i + kPrefetch, 0);
      __builtin_prefetch(moment + i + 2 * kPrefetch, 1);
    }
    Vector<T> w = load(parameter + i), m = load(moment + i);
    doubt += update<kDecay>(w, load(gradient + i), m, curvature(i), rates);
    if constexpr (kRandom) {
      store_rounded<false>(parameter, i, w, random, store);
      store_rounded<true>(moment, i, m, random, store);
    } else {
      store(parameter + i, w);
      store(moment + i, m);
    }
  });
}

/// A chunk's worth of the column factor that is missing.
template <class A>
struct Ones {
  A values[kChunk];

  constexpr Ones() : values() {
    for (A& value : values) value = A(1);
  }
};

template <class A>
constexpr Ones<A> kOnes;

/// F of consecutive elements of one row: scale * factor + damping.
template <class A>
struct CurvatureRun {
  int64_t count;
  A scale;
  const A* factor;
};

/// Evaluates F element after element. A row is what shares one entry of the row factor.
template <class A>
class CurvatureCursor {
 public:
  CurvatureCursor(const AdaFisherParameter& p, double damping, int64_t first)
      : constant_(static_cast<A>(p.constant_factor)),
        damping_(static_cast<A>(damping)),
        columns_(p.columns),
        group_rows_(p.rows == 1 ? p.groups : p.rows),
        row_step_(p.row_factor ? 1 : 0),
        column_step_(p.column_factor ? 1 : 0),
        factor_step_(p.rows == 1 ? column_step_ * p.columns : 0),
        group_step_(p.rows == 1 ? 0 : column_step_ * p.columns),
        column_(first % p.columns) {
    const int64_t row = first / p.columns, group = row / group_rows_;
    rows_left_ = group_rows_ - row % group_rows_;
    row_factor_ = p.row_factor ? static_cast<const A*>(p.row_factor) + row : kOnes<A>.values;
    column_factor_ = p.column_factor ? static_cast<const A*>(p.column_factor) : kOnes<A>.values;
    column_factor_end_ = column_factor_ + (p.column_factor ? p.groups * p.columns : kChunk);
    column_factor_ += row * factor_step_ + group * group_step_;
  }

  /// Whether rows are long and a whole number of registers each: then runs are worth taking, and none has a remainder.
  bool has_whole_runs() const { return columns_ >= kShortestRun && columns_ % kLanes<A> == 0; }

  /// As much as is left of the row, but at most `count` elements; moves past them.
  CurvatureRun<A> next_run(int64_t count) {
    const int64_t most = column_step_ == 0 ? smaller(count, kChunk) : count;
    const CurvatureRun<A> run{smaller(columns_ - column_, most), *row_factor_ * constant_,
                              column_factor_ + column_ * column_step_};
    column_ += run.count;
    if (column_ == columns_) skip_rows(1);
    return run;
  }

  /// Stores F of the next `count` elements, at most a chunk, and moves past them. Registers are stored whole, the next
  /// one overwriting what is too much: `out` has room for one more than it takes.
  void fill(int64_t count, A* out) {
    A* const end = out + count;
    while (out < end) {
      const int64_t rows = column_ == 0 && columns_ <= kLanes<A> ? fill_short_rows(out, end) : 0;
      if (rows > 0) {
        out += rows * columns_;
        skip_rows(rows);
      } else {
        const CurvatureRun<A> run = next_run(end - out);
        fill_run(run, out);
        out += run.count;
      }
    }
  }

 private:
  /// Moves to the start of a later row of the group, or to the next group.
  void skip_rows(int64_t count) {
    column_ = 0;
    row_factor_ += count * row_step_;
    column_factor_ += count * factor_step_;
    rows_left_ -= count;
    if (rows_left_ > 0) return;
    rows_left_ = group_rows_;
    column_factor_ += group_step_;
  }

  void fill_run(const CurvatureRun<A>& run, A* out) const {
    const A scale = run.scale, damping = damping_;
    const A* const factor = run.factor;
    int64_t i = 0;
    for (; i + kLanes<A> <= run.count; i += kLanes<A>) store(out + i, scale * load(factor + i) + damping);
    if (i == run.count) return;
    if (run.count < kLanes<A>) return store(out, scale * load(factor, run.count) + damping);
    i = run.count - kLanes<A>;  // a few elements once more, so as not to read past the factor
    store(out + i, scale * load(factor + i) + damping);
  }

  /// Fills rows of at most a register, in the smallest registers that hold one, as long as they fit before `end`,
  /// belong to one group and can be read whole. Returns how many.
  int64_t fill_short_rows(A* out, const A* end) const {
    constexpr int kQuarter = kLanes<A> >= 4 ? kLanes<A> / 4 : 1;
    if (columns_ <= kQuarter) return fill_short_rows<kQuarter>(out, end);
    if (columns_ <= kLanes<A> / 2) return fill_short_rows<kLanes<A> / 2>(out, end);
    return fill_short_rows<kLanes<A>>(out, end);
  }

  template <int kWidth>
  int64_t fill_short_rows(A* out, const A* end) const {
    using V = typename VectorOf<A, kWidth>::Type;
    const CurvatureCursor at = *this;  // a copy, which the stores below cannot change
    const A* row_factor = at.row_factor_;
    const A* factor = at.column_factor_;
    const A* factor_end = at.column_factor_end_;
    A padded[kWidth] = {};
    if (at.factor_step_ == 0) {
      for (int64_t c = 0; c < at.columns_; ++c) padded[c] = factor[c];
      factor = padded;
      factor_end = padded + kWidth;
    }
    int64_t rows = 0;
    for (; rows < at.rows_left_ && end - out >= at.columns_ && factor_end - factor >= kWidth; ++rows) {
      store_bits(out, *row_factor * at.constant_ * load_bits<V>(factor) + at.damping_);
      out += at.columns_;
      row_factor += at.row_step_;
      factor += at.factor_step_;
    }
    return rows;
  }

  const A constant_;
  const A damping_;
  const int64_t columns_;
  const int64_t group_rows_;   // rows that share a column factor, or that each have their own, one after another
  const int64_t row_step_;     // from one row to the next in the row factor: 0 if that is missing
  const int64_t column_step_;  // from one column to the next in the column factor: 0 if that is missing
  const int64_t factor_step_;  // from one row to the next in the column factor
  const int64_t group_step_;   // from one group to the next in the column factor
  int64_t column_;
  int64_t rows_left_;       // in the group
  const A* row_factor_;     // at the row
  const A* column_factor_;  // at the row's first column
  const A* column_factor_end_;
};

/// Calls body(first, count, random) for elements begin to end, as many at a time as have one key if kRandom.
template <bool kRandom, class Body>
void for_random_runs(const StepRounding& rounding, int64_t begin, int64_t end, const Body& body) {
  if constexpr (kRandom) {
    for_stretches(rounding.index, rounding.state, begin, end - begin,
                  [&](int64_t i, int64_t count, uint32_t lower, uint32_t key) {
      body(begin + i, count, RandomRun{lower, key, count});
    });
  } else {
    body(begin, end - begin, RandomRun{0, 0, end - begin});
  }
}

/// Steps elements begin to end of a parameter whose tensors lie in row-major order.
template <WeightDecay kDecay, bool kRandom, class T, class M>
int64_t step_contiguous(const AdaFisherStep& step, const AdaFisherParameter& p, int64_t begin, int64_t end) {
  using A = Accumulator<T>;
  T* const parameter = static_cast<T*>(p.parameter.data);
  const T* const gradient = static_cast<const T*>(p.gradient.data);
  M* const moment = static_cast<M*>(p.moment.data);
  const Rates<A> rates(step, p);
  CurvatureCursor<A> cursor(p, step.damping, begin);
  Vector<T> doubt = {};
  const auto update_at = [&](int64_t first, int64_t count, const auto& curvature, const RandomRun& random) {
    update_run<kDecay, kRandom>(parameter + first, gradient + first, moment + first, count, curvature, rates, random,
                                doubt);
  };
  if (cursor.has_whole_runs() && (!kRandom || has_whole_stretches<A>(p.rounding.index))) {
    const A damping = static_cast<A>(step.damping);
    for_random_runs<kRandom>(p.rounding, begin, end, [&](int64_t start, int64_t count, const RandomRun& random) {
      for (int64_t i = 0; i < count;) {
        const CurvatureRun<A> run = cursor.next_run(count - i);
        const auto curvature = [&](int64_t k) { return run.scale * load(run.factor + k) + damping; };
        update_at(start + i, run.count, curvature, random.from(i));
        i += run.count;
      }
    });
  } else {
    alignas(kVectorBytes) A buffer[kChunk + kLanes<T>];
    for_random_runs<kRandom>(p.rounding, begin, end, [&](int64_t start, int64_t count, const RandomRun& random) {
      for (int64_t i = 0; i < count; i += kChunk) {
        const int64_t some = smaller(kChunk, count - i);
        cursor.fill(some, buffer);
        update_at(start + i, some, [&](int64_t k) { return load(buffer + k); }, random.from(i));
      }
    });
  }
  return sum_lanes<A>(doubt) == 0 ? 0 : count_non_finite(gradient + begin, end - begin, rates.gradient_scale);
}

/// The same for tensors of any strides, by way of buffers.
template <WeightDecay kDecay, bool kRandom, class T, class M>
int64_t step_by_chunks(const AdaFisherStep& step, const AdaFisherParameter& p, int64_t begin, int64_t end) {
  using A = Accumulator<T>;
  Chunks<T, kChunk> parameters(p.parameter), gradients(p.gradient);
  Chunks<M, kChunk> moments(p.moment);
  const Rates<A> rates(step, p);
  CurvatureCursor<A> cursor(p, step.damping, begin);
  alignas(kVectorBytes) A curvature[kChunk + kLanes<T>];
  int64_t skipped = 0;
  for (int64_t first = begin; first < end; first += kChunk) {
    const int64_t count = smaller(kChunk, end - first);
    cursor.fill(count, curvature);
    const T* const gradient = gradients.read(first, count);
    Vector<T> doubt = {};
    T* const parameter = parameters.read(first, count);
    M* const moment = moments.read(first, count);
    for_random_runs<kRandom>(p.rounding, first, first + count,
                             [&](int64_t start, int64_t length, const RandomRun& random) {
      const int64_t i = start - first;
      const auto curvature_at = [&](int64_t k) { return load(curvature + i + k); };
      update_run<kDecay, kRandom>(parameter + i, gradient + i, moment + i, length, curvature_at, rates, random, doubt);
    });
    parameters.write(first, count);
    moments.write(first, count);
    if (sum_lanes<A>(doubt) != 0) skipped += count_non_finite(gradient, count, rates.gradient_scale);
  }
  return skipped;
}

template <WeightDecay kDecay, bool kRandom, class T, class M>
int64_t step_range(const AdaFisherStep& step, const AdaFisherParameter& p, int64_t begin, int64_t end) {
  const bool contiguous = p.parameter.contiguous && p.gradient.contiguous && p.moment.contiguous;
  return contiguous ? step_contiguous<kDecay, kRandom, T, M>(step, p, begin, end)
                    : step_by_chunks<kDecay, kRandom, T, M>(step, p, begin, end);
}

template <WeightDecay kDecay, class T, class M>
int64_t step_range(const AdaFisherStep& step, const AdaFisherParameter& p, int64_t begin, int64_t end) {
  if constexpr (std::is_base_of_v<bfloat16, T> || std::is_base_of_v<bfloat16, M>) {
    if (p.rounding.random) return step_range<kDecay, true, T, M>(step, p, begin, end);
  }
  return step_range<kDecay, false, T, M>(step, p, begin, end);
}

int64_t step_range(const AdaFisherStep& step, const AdaFisherParameter& p, int64_t begin, int64_t end) {
  int64_t skipped = 0;
  with_types(p.dtype, p.moment_dtype, [&](auto* type, auto* moment_type) {
    using T = std::remove_pointer_t<decltype(type)>;
    using M = std::remove_pointer_t<decltype(moment_type)>;
    switch (step.decay) {
      case WeightDecay::none: skipped = step_range<WeightDecay::none, T, M>(step, p, begin, end); break;
      case WeightDecay::coupled: skipped = step_range<WeightDecay::coupled, T, M>(step, p, begin, end); break;
      case WeightDecay::decoupled: skipped = step_range<WeightDecay::decoupled, T, M>(step, p, begin, end); break;
    }
  });
  return skipped;
}

}  // namespace

void adafisher_step_(const AdaFisherStep& step) {
  int64_t total = 0;
  for (int64_t i = 0; i < step.count; ++i) total += step.parameters[i].numel();
  // The elements of all parameters, end to end, are split evenly.
  parallel_for(useful_threads(total, step.threads), total, [&](int, int64_t begin, int64_t end) {
    int64_t start = 0;  // of parameter i among all elements
    for (int64_t i = 0; i < step.count && start < end; ++i) {
      const AdaFisherParameter& p = step.parameters[i];
      const Part part = part_of(begin, end, start, p.numel(), kChunk);
      if (!part.empty()) {
        const int64_t skipped = step_range(step, p, part.first, part.last);
        if (skipped > 0) __atomic_fetch_add(step.skipped + i, skipped, __ATOMIC_RELAXED);
      }
      start += p.numel();
    }
  });
}

}  // namespace fisher_kernels::FISHER_KERNELS_CAPABILITY
