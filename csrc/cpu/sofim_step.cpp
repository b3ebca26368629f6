#include <cstdint>
#include <type_traits>

#include "../kernels.h"
#include "integers.h"
#include "list_chunks.h"
#include "rounding.h"
#include "scratch.h"
#include "strided.h"
#include "vector.h"

namespace fisher_kernels::FISHER_KERNELS_CAPABILITY {

namespace {

// Elements whose products are added up on their own, counted from the start of their parameter: a matter of its shape
// alone, so that the sums are the same for any number of threads. A multiple of every kLanes.
constexpr int64_t kChunk = 1024;

/// What the first pass finds in a chunk, and then in a parameter and in all.
struct Sums {
  double square;   // m . m
  double product;  // m . g
  int64_t skipped;

  void operator+=(const Sums& other) {
    square += other.square;
    product += other.product;
    skipped += other.skipped;
  }
};

/// The second pass takes along_moment * m + along_gradient * g + rate * (decay * w) off each parameter. The product of
/// rate and decay may be beyond the range of its dtype where that of decay and w is not.
struct Rates {
  double along_moment;
  double along_gradient;
  double rate;
  double decay;
};

/// Gradients and moments of a parameter's elements, a register of them or one.
template <WeightDecay kDecay, class A>
struct Momentum {
  A gradient_scale;
  A weight_decay;
  A beta;
  A gain;  // 1 - beta

  Momentum(const SofimStep& step, const SofimParameter& p)
      : gradient_scale(static_cast<A>(step.gradient_scale.factor())),
        weight_decay(static_cast<A>(p.weight_decay)),
        beta(static_cast<A>(step.beta)),
        gain(static_cast<A>(1.0 - step.beta)) {}

  /// g; load reads gradients and parameters.
  template <class Load, class T>
  auto gradient(const Load& load, const T* stored, const T* parameter) const {
    auto g = gradient_scale * load(stored);
    if constexpr (kDecay == WeightDecay::coupled) g += weight_decay * load(parameter);
    return g;
  }

  template <class X>
  X advance(X moment, X g) const {
    return beta * moment + gain * g;
  }
};

/// Both passes over one parameter.
template <WeightDecay kDecay, bool kAlongGradient, bool kRandom, class T, class M>
class Stepper {
 public:
  Stepper(const SofimStep& step, const SofimParameter& p)
      : momentum_(step, p),
        rounding_(p.rounding),
        parameter_(p.parameter),
        gradient_(p.gradient),
        moment_(p.moment) {}

  /// Advances the moments of a chunk; those that would not be finite stay as they are and enter no sum.
  Sums advance(int64_t first, int64_t count) {
    const T* const gradient = gradient_.read(first, count);
    const T* const w = kDecay == WeightDecay::coupled ? parameter_.read(first, count) : nullptr;
    M* const moment = moment_.read(first, count);
    const Momentum<kDecay, A> momentum = momentum_;  // a copy, which the stores below cannot change
    SumOfProducts<A> square, product;
    V doubt = {};
    for_random_registers<A, kRandom>(rounding_, first, count,
                                     [&](int64_t i, const RandomRun& random, int64_t k, const auto& load,
                                         const auto& store) {
      const V g = momentum.gradient(load, gradient + i, w + i), old = load(moment + i);
      const V made = momentum.advance(old, g);
      const V zero = made - made;  // infinity - infinity is NaN
      const V next = kRandom ? as_rounded_if_finite<true, M>(made, k, random) : as_stored_if_finite<M>(made);
      doubt += zero;
      store(reinterpret_cast<Rounded<M>*>(moment + i), zero == 0 ? next : old);
      const V counted = zero == 0 ? next : V{};
      square.add(counted, counted);
      if constexpr (kAlongGradient) product.add(counted, zero == 0 ? g : V{});
    });
    moment_.write(first, count);
    const int64_t skipped = sum_lanes<A>(doubt) == 0 ? 0 : count_skipped(gradient, w, moment, count);
    return {square.total(), product.total(), skipped};
  }

  /// Takes a step along the moments of a chunk. If some were skipped, they are found by their gradients as before:
  /// their moment has not changed. (One that has cannot overflow now, between itself and g, unless both are within
  /// rounding of the largest number.)
  void descend(int64_t first, int64_t count, const Rates& rates, bool some_were_skipped) {
    some_were_skipped ? descend<true>(first, count, rates) : descend<false>(first, count, rates);
  }

 private:
  using A = Accumulator<T>;
  using V = Vector<T>;

  /// After the others have changed.
  int64_t count_skipped(const T* gradient, const T* w, const M* moment, int64_t count) const {
    int64_t skipped = 0;
    for (int64_t i = 0; i < count; ++i) {
      const A g = momentum_.gradient([](const T* p) { return widen(*p); }, gradient + i, w + i);
      const A next = momentum_.advance(widen(moment[i]), g);
      skipped += next - next != 0;
    }
    return skipped;
  }

  template <bool kSomeWereSkipped>
  void descend(int64_t first, int64_t count, const Rates& rates) {
    const A along_moment = static_cast<A>(rates.along_moment), along_gradient = static_cast<A>(rates.along_gradient),
            rate = static_cast<A>(rates.rate), decay = static_cast<A>(rates.decay);
    T* const w = parameter_.read(first, count);
    const T* const gradient = kAlongGradient || kSomeWereSkipped ? gradient_.read(first, count) : nullptr;
    const M* const moment = moment_.read(first, count);
    const Momentum<kDecay, A> momentum = momentum_;
    for_random_registers<A, kRandom>(rounding_, first, count,
                                     [&](int64_t i, const RandomRun& random, int64_t k, const auto& load,
                                         const auto& store) {
      const V old = load(w + i), m = load(moment + i);
      const auto put = [&](V value) {
        if constexpr (kRandom) {
          store_rounded<false>(w + i - k, k, value, random, store);
        } else {
          store(w + i, value);
        }
      };
      V change = along_moment * m;
      if constexpr (kDecay == WeightDecay::decoupled) change += rate * (decay * old);
      if constexpr (kAlongGradient || kSomeWereSkipped) {
        const V g = momentum.gradient(load, gradient + i, w + i);
        if constexpr (kAlongGradient) change += along_gradient * g;
        if constexpr (kSomeWereSkipped) {
          const V next = momentum.advance(m, g);
          return put(next - next == 0 ? old - change : old);
        }
      }
      put(old - change);
    });
    parameter_.write(first, count);
  }

  const Momentum<kDecay, A> momentum_;
  const StepRounding rounding_;
  Chunks<T, kChunk> parameter_;
  Chunks<T, kChunk> gradient_;
  Chunks<M, kChunk> moment_;
};

/// Calls body with a Stepper for one parameter.
template <class Body>
void with_stepper(const SofimStep& step, const SofimParameter& p, const Body& body) {
  with_types(p.dtype, p.moment_dtype, [&](auto* type, auto* moment_type) {
    using T = std::remove_pointer_t<decltype(type)>;
    using M = std::remove_pointer_t<decltype(moment_type)>;
    const auto with = [&](auto decay) {
      constexpr WeightDecay kDecay = decltype(decay)::value;
      const auto with_random = [&](auto random) {
        constexpr bool kRandom = decltype(random)::value;
        if (step.along_gradient) {
          Stepper<kDecay, true, kRandom, T, M> stepper(step, p);
          body(stepper);
        } else {
          Stepper<kDecay, false, kRandom, T, M> stepper(step, p);
          body(stepper);
        }
      };
      if constexpr (std::is_base_of_v<bfloat16, T> || std::is_base_of_v<bfloat16, M>) {
        if (p.rounding.random) return with_random(std::true_type{});
      }
      with_random(std::false_type{});
    };
    switch (p.decay) {
      case WeightDecay::none: return with(std::integral_constant<WeightDecay, WeightDecay::none>{});
      case WeightDecay::coupled: return with(std::integral_constant<WeightDecay, WeightDecay::coupled>{});
      case WeightDecay::decoupled: return with(std::integral_constant<WeightDecay, WeightDecay::decoupled>{});
    }
  });
}

inline bool is_finite(double x) { return x - x == 0; }

/// The solve of one vector, given the sums of its moments u = m / correction in place of m.
Rates solve(const SofimStep& step, const SofimParameter& p, const Sums& sums) {
  const double square = sums.square, product = sums.product;
  const double rate = p.lr.value, decay = p.weight_decay, bottom = step.rho + square;
  if (!step.along_gradient) return {rate / (p.correction * bottom), 0.0, rate, decay};
  if (!is_finite(square) || !is_finite(product)) return {0.0, 0.0, rate, decay};
  return {-rate * product / (p.correction * step.rho * bottom), rate / step.rho, rate, decay};
}

/// Calls body(stepper, parameter, chunk, first, count) for the chunks of all parameters on several threads.
template <class Body>
void for_chunks(const SofimStep& step, const ListChunks<kChunk>& chunks, const Body& body) {
  chunks.for_parts(step.threads, [&](int64_t i, const Part& part) {
    with_stepper(step, step.parameters[i], [&](auto& stepper) {
      chunks.for_chunks(i, part, [&](int64_t chunk, int64_t first, int64_t count) {
        body(stepper, i, chunk, first, count);
      });
    });
  });
}

}  // namespace

void sofim_step_(const SofimStep& step) {
  const ListChunks<kChunk> chunks(step.parameters, step.count);
  const Scratch<Sums> chunk_sums(chunks.count());
  for_chunks(step, chunks, [&](auto& stepper, int64_t, int64_t chunk, int64_t first, int64_t count) {
    chunk_sums.data()[chunk] = stepper.advance(first, count);
  });

  const Scratch<Sums> sums(step.count);
  Sums all{};
  for (int64_t i = 0; i < step.count; ++i) {
    Sums& own = sums.data()[i];
    own = {};
    for (int64_t chunk = chunks.first(i); chunk < chunks.first(i + 1); ++chunk) own += chunk_sums.data()[chunk];
    const double correction = step.parameters[i].correction;
    own.square /= correction * correction;
    own.product /= correction;
    step.skipped[i] = own.skipped;
    step.squares[i] = own.square;
    all += own;
  }

  // Forwards once more: what the first pass left in the caches is worth less than memory that is asked for in order.
  for_chunks(step, chunks, [&](auto& stepper, int64_t i, int64_t chunk, int64_t first, int64_t count) {
    const Rates rates = solve(step, step.parameters[i], step.by_parameter ? sums.data()[i] : all);
    stepper.descend(first, count, rates, chunk_sums.data()[chunk].skipped > 0);
  });
}

}  // namespace fisher_kernels::FISHER_KERNELS_CAPABILITY
