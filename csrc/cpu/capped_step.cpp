#include <cstdint>
#include <limits>
#include <type_traits>

#include "../kernels.h"
#include "integers.h"
#include "list_chunks.h"
#include "parallel.h"
#include "rounding.h"
#include "scratch.h"
#include "strided.h"
#include "vector.h"

namespace fisher_kernels::FISHER_KERNELS_CAPABILITY {

namespace {

// Elements that are worked on at a time and whose products are added up on their own. A multiple of every kLanes.
constexpr int64_t kChunk = 1024;

inline bool is_finite(double x) { return x - x == 0; }

/// Calls body with true or false as a constant.
template <class Body>
void with_flag(bool flag, const Body& body) {
  flag ? body(std::true_type{}) : body(std::false_type{});
}

/// Calls body with whether what is stored as a T is rounded at random, as a constant.
template <class T, class Body>
void with_random(const StepRounding& rounding, const Body& body) {
  if constexpr (std::is_base_of_v<bfloat16, T>) {
    if (rounding.random) return body(std::true_type{});
  }
  body(std::false_type{});
}

/// Advances the momentum of a part of a parameter; returns how many elements stay as they are, as they would not be
/// finite.
template <bool kDecays, bool kRandom, class T, class M>
int64_t advance(const HeavyBall& all, const HeavyBallParameter& p, const Part& part) {
  using A = Accumulator<T>;
  using V = Vector<T>;
  Chunks<T, kChunk> parameters(p.parameter), gradients(p.gradient);
  Chunks<M, kChunk> moments(p.moment);
  const A momentum = static_cast<A>(all.momentum), decay = static_cast<A>(all.weight_decay),
          scale = static_cast<A>(all.gradient_scale.factor());
  int64_t skipped = 0;
  for (int64_t first = part.first; first < part.last; first += kChunk) {
    const int64_t count = smaller(kChunk, part.last - first);
    const T* const gradient = gradients.read(first, count);
    const T* const w = kDecays ? parameters.read(first, count) : nullptr;
    M* const moment = moments.read(first, count);
    Integers<A> left_out = {};
    for_random_registers<A, kRandom>(p.rounding, first, count,
                                     [&](int64_t i, const RandomRun& random, int64_t k, const auto& load,
                                         const auto& store) {
      V g = scale * load(gradient + i);
      if constexpr (kDecays) g += decay * load(w + i);
      const V old = load(moment + i), next = momentum * old + g;
      V zero = next - next;  // infinity - infinity is NaN
      const V kept = zero == 0 ? next : old;
      if constexpr (kRandom) {
        store_rounded<true>(moment + i - k, k, kept, random, store);
      } else {
        store(moment + i, kept);
      }
      // A scale may make NaN of what is not there.
      if (k + kLanes<A> > random.count) zero = first_lanes<A>(zero, random.count - k);
      left_out -= zero != 0;
    });
    moments.write(first, count);
    skipped += sum_lanes<Integer<A>, kLanes<A>>(left_out);
  }
  return skipped;
}

/// The three sums of a chunk, and then of a parameter.
struct Sums {
  double product;    // d . m
  double direction;  // d . d
  double weight;     // w . w

  void operator+=(const Sums& other) {
    product += other.product;
    direction += other.direction;
    weight += other.weight;
  }
};

/// Adds up the chunks of a part of a parameter, each on its own.
template <bool kProducts, bool kWeights, class T, class M>
void add_up(const DirectionParameter& p, int64_t i, const Part& part, const ListChunks<kChunk>& chunks, Sums* sums) {
  using A = Accumulator<T>;
  using V = Vector<T>;
  Chunks<T, kChunk> parameters(p.parameter);
  Chunks<A, kChunk> directions(p.direction);
  Chunks<M, kChunk> moments(p.moment);
  chunks.for_chunks(i, part, [&](int64_t chunk, int64_t first, int64_t count) {
    const A* const d = directions.read(first, count);
    const M* const m = kProducts ? moments.read(first, count) : nullptr;
    const T* const w = kWeights ? parameters.read(first, count) : nullptr;
    SumOfProducts<A> product, direction, weight;
    for_registers<A>(count, [&](int64_t k, const auto& load, const auto&) {
      const V along = load(d + k);
      direction.add(along, along);
      if constexpr (kProducts) product.add(along, load(m + k));
      if constexpr (kWeights) {
        const V value = load(w + k);
        weight.add(value, value);
      }
    });
    sums[chunk] = {product.total(), direction.total(), weight.total()};
  });
}

/// w <- w - (along d + shrinkage w) in a part of a parameter.
template <bool kDecays, bool kRandom, class T>
void descend(const CappedParameter& p, double along, double shrinkage, const Part& part) {
  using A = Accumulator<T>;
  Chunks<T, kChunk> parameters(p.parameter);
  Chunks<A, kChunk> directions(p.direction);
  const A by_direction = static_cast<A>(along), by_weight = static_cast<A>(shrinkage);
  for (int64_t first = part.first; first < part.last; first += kChunk) {
    const int64_t count = smaller(kChunk, part.last - first);
    T* const w = parameters.read(first, count);
    const A* const d = directions.read(first, count);
    for_random_registers<A, kRandom>(p.rounding, first, count,
                                     [&](int64_t i, const RandomRun& random, int64_t k, const auto& load,
                                         const auto& store) {
      const Vector<T> old = load(w + i);
      Vector<T> change = by_direction * load(d + i);
      if constexpr (kDecays) change += by_weight * old;
      if constexpr (kRandom) {
        store_rounded<false>(w + i - k, k, old - change, random, store);
      } else {
        store(w + i, old - change);
      }
    });
    parameters.write(first, count);
  }
}

/// What the sums of a layer come to.
struct Layer {
  double size;       // sum of lr^2 d . d
  double weight;     // w . w
  double most;       // max_relative_step
  double floor;
  int64_t elements;
  bool is_taken;     // whether all its sums are finite
};

Layer measure(const CappedStep& step, int64_t first, int64_t last) {
  constexpr double kInfinity = std::numeric_limits<double>::infinity();
  Layer layer{0, 0, kInfinity, kInfinity, 0, true};
  for (int64_t i = first; i < last; ++i) {
    const CappedParameter& p = step.parameters[i];
    const double* const sums = step.sums + 3 * i;
    layer.is_taken = layer.is_taken && is_finite(sums[0]) && is_finite(sums[1]) && is_finite(sums[2]);
    layer.size += p.lr.value * p.lr.value * sums[1];
    layer.weight += sums[2];
    layer.most = p.max_relative_step < layer.most ? p.max_relative_step : layer.most;
    layer.floor = p.floor < layer.floor ? p.floor : layer.floor;
    layer.elements += p.size;
  }
  return layer;
}

/// One past the last parameter of the layer that begins with parameter `first`.
int64_t end_of_layer(const CappedStep& step, int64_t first) {
  int64_t last = first;
  while (last < step.count && step.parameters[last].layer == step.parameters[first].layer) ++last;
  return last;
}

double scale_of(const CappedStep& step) {
  if (step.kl_clip == 0) return 1;
  double total = 0;
  for (int64_t first = 0, last; first < step.count; first = last) {
    last = end_of_layer(step, first);
    if (!measure(step, first, last).is_taken) continue;
    for (int64_t i = first; i < last; ++i) {
      const double lr = step.parameters[i].lr.value;
      total += lr * lr * step.sums[3 * i];
    }
  }
  const double size = total < 0 ? -total : total;
  if (size <= step.kl_clip) return 1;
  return is_finite(size) ? __builtin_sqrt(step.kl_clip / size) : 0;
}

double factor_of(const CappedStep& step, const Layer& layer) {
  if (!layer.is_taken) return 0;
  const double weight = __builtin_sqrt(layer.weight),
               least = layer.floor * __builtin_sqrt(static_cast<double>(layer.elements)),
               limit = layer.most * (weight > least ? weight : least),
               size = *step.scale * __builtin_sqrt(layer.size);
  return size > limit ? limit / size : 1;
}

}  // namespace

void heavy_ball_(const HeavyBall& all) {
  const ListChunks<kChunk> chunks(all.parameters, all.count);
  chunks.for_parts(all.threads, [&](int64_t i, const Part& part) {
    const HeavyBallParameter& p = all.parameters[i];
    with_types(p.dtype, p.moment_dtype, [&](auto* type, auto* moment_type) {
      using T = std::remove_pointer_t<decltype(type)>;
      using M = std::remove_pointer_t<decltype(moment_type)>;
      with_flag(all.weight_decay != 0, [&](auto decays) {
        with_random<M>(p.rounding, [&](auto random) {
          const int64_t skipped = advance<decltype(decays)::value, decltype(random)::value, T, M>(all, p, part);
          if (skipped > 0) __atomic_fetch_add(all.skipped + i, skipped, __ATOMIC_RELAXED);
        });
      });
    });
  });
}

void direction_sums(const DirectionSums& all) {
  const ListChunks<kChunk> chunks(all.parameters, all.count);
  const Scratch<Sums> chunk_sums(chunks.count());
  chunks.for_parts(all.threads, [&](int64_t i, const Part& part) {
    const DirectionParameter& p = all.parameters[i];
    with_types(p.dtype, p.moment_dtype, [&](auto* type, auto* moment_type) {
      using T = std::remove_pointer_t<decltype(type)>;
      using M = std::remove_pointer_t<decltype(moment_type)>;
      with_flag(all.products, [&](auto products) {
        with_flag(all.weights, [&](auto weights) {
          add_up<decltype(products)::value, decltype(weights)::value, T, M>(p, i, part, chunks,
                                                                                       chunk_sums.data());
        });
      });
    });
  });
  for (int64_t i = 0; i < all.count; ++i) {
    Sums sums{};
    for (int64_t chunk = chunks.first(i); chunk < chunks.first(i + 1); ++chunk) sums += chunk_sums.data()[chunk];
    if (all.skipped != nullptr && all.skipped[i] > 0) {
      sums.product = sums.direction = sums.weight = std::numeric_limits<double>::quiet_NaN();
    }
    double* const out = all.sums + 3 * i;
    out[0] = sums.product;
    out[1] = sums.direction;
    out[2] = sums.weight;
  }
}

void capped_step_(const CappedStep& step) {
  *step.scale = scale_of(step);
  const Scratch<double> along(step.count);
  for (int64_t first = 0, last; first < step.count; first = last) {
    last = end_of_layer(step, first);
    const Layer layer = measure(step, first, last);
    const double factor = factor_of(step, layer);
    step.factors[step.parameters[first].layer] = factor;
    for (int64_t i = first; i < last; ++i) {
      along.data()[i] = step.parameters[i].lr.value * *step.scale * factor;
      step.skipped[i] = layer.is_taken ? 0 : step.parameters[i].size;
    }
  }
  const ListChunks<kChunk> chunks(step.parameters, step.count);
  chunks.for_parts(step.threads, [&](int64_t i, const Part& part) {
    if (step.skipped[i] > 0) return;
    const CappedParameter& p = step.parameters[i];
    with_type(p.dtype, [&](auto* type) {
      using T = std::remove_pointer_t<decltype(type)>;
      with_flag(p.weight_decay != 0, [&](auto decays) {
        with_random<T>(p.rounding, [&](auto random) {
          descend<decltype(decays)::value, decltype(random)::value, T>(p, along.data()[i], p.lr.value * p.weight_decay,
                                                                       part);
        });
      });
    });
  });
}

}  // namespace fisher_kernels::FISHER_KERNELS_CAPABILITY
