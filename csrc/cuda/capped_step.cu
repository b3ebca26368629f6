#include "step_rounding.cuh"

// The step along preconditioned momentum in three passes, of 12 bytes a parameter in float32 each: the momentum, the
// sums that bound the step, and the step. Between the last two one block makes of the sums what is taken off. A momentum
// in 16 bits saves 4 bytes in the first pass and 2 in the second.
namespace fisher_kernels::cuda {

namespace {

constexpr DType kDTypes[] = {DType::float32, DType::bfloat16, DType::float16, DType::float64};
constexpr int kThreads = StepTraits<float, 1>::kThreads;
constexpr int kWarps = StepTraits<float, 1>::kWarps;

/// Queues a pass over the parameters that are wanted, on a kernel for each kind of entry; entry_of(i) makes an entry.
template <class Entry, class Shared, class Parameter, class Wanted, class EntryOf>
void queue(const char* name, void (*contiguous)(Table<Entry, Shared>),
           void (*strided)(Table<StridedEntry<Entry>, Shared>), size_t shared_bytes, const Parameter* parameters,
           int64_t count, const Geometries<Parameter>& geometries, const Shared& shared, const Stream& stream,
           const Wanted& wanted, const EntryOf& entry_of) {
  StepWriter<Entry, Shared> writer(name, contiguous, strided, kThreads, shared_bytes, stream, shared);
  for (int64_t i = 0; i < count; ++i) {
    if (wanted(parameters[i])) writer.add(entry_of(i), geometries[i]);
  }
  writer.flush();
}

/// Calls body with the kinds of entries that there are of what is stored as a T, one that rounds at random among them.
template <class Entry, class T, class Body>
void for_entries(const Body& body) {
  body(Type<Entry>());
  if constexpr (kIsShort<T, T>) body(Type<RandomEntry<Entry>>());
}

/// Whether a parameter that is wanted has entries of kind E.
template <class Entry, class E, class T, class Wanted>
auto round_as(const Wanted& wanted) {
  return [=](const auto& p) {
    return wanted(p) && kIsRandomEntry<E, Entry> == (p.rounding.random && kIsShort<T, T>);
  };
}

/// An entry of kind E.
template <class E, class Entry, class Parameter>
E with_rounding(const Entry& entry, const Parameter& p) {
  E made;
  static_cast<Entry&>(made) = entry;
  if constexpr (kIsRandomEntry<E, Entry>) set_rounding(made, p);
  return made;
}

// The momentum.

namespace momentum {

struct Shared {
  GradientScale scale;
  double momentum;
  double weight_decay;  // in coupled form
  int64_t* skipped;
};

struct Entry : StepArrays {
  int64_t index;  // among all parameters
};

/// What is fused is written down: compilers choose otherwise on another path, and layouts are not to show in the bits.
template <class T, class M, class Integers>
struct Advance {
  using A = Accumulator<T>;

  Integers integers;
  A scale;
  A momentum;
  A decay;
  int left_out;

  __device__ Advance(const Shared& shared, const Integers& integers_)
      : integers(integers_),
        scale(static_cast<A>(factor(shared.scale))),
        momentum(static_cast<A>(shared.momentum)),
        decay(static_cast<A>(shared.weight_decay)),
        left_out(0) {}

  template <int N, int kCount>
  __device__ void take(const Elements<T, T, M>& elements, int stride, int64_t at) {
    const bool decays = decay != 0;
    Pack<T, N> g[kCount], w[kCount] = {};
    Pack<M, N> m[kCount];
#pragma unroll
    for (int k = 0; k < kCount; ++k) {
      g[k] = load_pack<N>(elements.gradient + k * stride);
      m[k] = load_pack<N>(elements.moment + k * stride);
      if (decays) w[k] = load_pack<N>(elements.parameter + k * stride);
    }
#pragma unroll
    for (int k = 0; k < kCount; ++k) {
      auto random = integers.from(at + k * stride);
#pragma unroll
      for (int i = 0; i < N; ++i) {
        A gradient = scale * widen(g[k].at[i]);
        if (decays) gradient = fma(decay, widen(w[k].at[i]), gradient);
        const A next = fma(momentum, widen(m[k].at[i]), gradient);
        const bool counts = is_finite(next);
        const uint32_t bits = random.next();
        if (counts) m[k].at[i] = kIsRandom<Integers> ? narrow_at_random<true, M>(next, bits) : narrow<M>(next);
        left_out += !counts;
      }
      store_pack<N>(elements.moment + k * stride, m[k]);
    }
  }
};

template <class Traits, class Entry>
__global__ void __launch_bounds__(Traits::kThreads)
    heavy_ball_kernel(const __grid_constant__ Table<Entry, Shared> table) {
  const Shared& shared = table.shared;
  if (is_off(shared.scale)) return;
  const int i = table.tensor_of(blockIdx.x);
  const Entry& entry = table.entries[i];
  const int64_t first = static_cast<int64_t>(blockIdx.x - table.start[i]) * kChunk;
  const auto integers = integers_of<momentum::Entry>(entry, first);
  Advance<typename Traits::T, typename Traits::M, std::remove_const_t<decltype(integers)>> advance(shared, integers);
  walk<Traits>(entry, first, advance);
  count_skipped(advance.left_out, shared_memory<int[Traits::kWarps]>(), shared.skipped + entry.index);
}

}  // namespace momentum

// The sums.

struct Sums {
  double product;    // d . m
  double direction;  // d . d
  double weight;     // w . w
};

namespace summing {

struct Shared {
  bool products;
  bool weights;
  Sums* sums;  // of all chunks
};

struct Entry : StepArrays {  // the momentum is in the gradient's place, the direction in the moment's
  int64_t first_chunk;       // among all chunks
};

/// In float64: squares of what float32 holds fit.
template <class T, class M>
struct AddUp {
  using A = Accumulator<T>;

  bool products;
  bool weights;
  Sums sums;

  template <int N, int kCount>
  __device__ void take(const Elements<T, M>& elements, int stride, int64_t) {
    Pack<T, N> w[kCount] = {};
    Pack<A, N> d[kCount];
    Pack<M, N> m[kCount] = {};
#pragma unroll
    for (int k = 0; k < kCount; ++k) {
      d[k] = load_pack<N>(elements.moment + k * stride);
      if (products) m[k] = load_pack<N>(elements.gradient + k * stride);
      if (weights) w[k] = load_pack<N>(elements.parameter + k * stride);
    }
#pragma unroll
    for (int k = 0; k < kCount; ++k) {
#pragma unroll
      for (int i = 0; i < N; ++i) {
        const double along = d[k].at[i];
        sums.direction = fma(along, along, sums.direction);
        if (products) sums.product = fma(along, static_cast<double>(widen(m[k].at[i])), sums.product);
        if (weights) {
          const double value = widen(w[k].at[i]);
          sums.weight = fma(value, value, sums.weight);
        }
      }
    }
  }
};

struct SumsOfWarps {
  double product[kWarps];
  double direction[kWarps];
  double weight[kWarps];

  /// The sums over a block, in its first thread.
  __device__ Sums add(const Sums& own) {
    return {block_sum(own.product, product), block_sum(own.direction, direction), block_sum(own.weight, weight)};
  }
};

template <class Traits, class Entry>
__global__ void __launch_bounds__(Traits::kThreads)
    sums_kernel(const __grid_constant__ Table<Entry, Shared> table) {
  const Shared& shared = table.shared;
  const int i = table.tensor_of(blockIdx.x);
  const Entry& entry = table.entries[i];
  const int64_t chunk = blockIdx.x - table.start[i];
  AddUp<typename Traits::T, typename Traits::G> adding{shared.products, shared.weights, {0, 0, 0}};
  walk<Traits>(entry, chunk * kChunk, adding);
  const Sums sums = shared_memory<SumsOfWarps>().add(adding.sums);
  if (threadIdx.x == 0) shared.sums[entry.first_chunk + chunk] = sums;
}

}  // namespace summing

namespace finishing {

struct Shared {
  const Sums* sums;        // of all chunks
  const int64_t* skipped;  // or null
  Sums* out;
};

/// A parameter, which is one block's.
struct Entry {
  int64_t first_chunk;
  int64_t chunks;
  int64_t index;
};

__global__ void __launch_bounds__(kThreads) finish_kernel(const __grid_constant__ Table<Entry, Shared> table) {
  const Shared& shared = table.shared;
  const Entry& entry = table.entries[blockIdx.x];
  Sums own{0, 0, 0};
#pragma unroll 4
  for (int64_t chunk = threadIdx.x; chunk < entry.chunks; chunk += kThreads) {
    const Sums& more = shared.sums[entry.first_chunk + chunk];
    own.product += more.product;
    own.direction += more.direction;
    own.weight += more.weight;
  }
  Sums sums = shared_memory<summing::SumsOfWarps>().add(own);
  if (threadIdx.x != 0) return;
  if (shared.skipped != nullptr && shared.skipped[entry.index] > 0) {
    sums.product = sums.direction = sums.weight = NAN;
  }
  shared.out[entry.index] = sums;
}

}  // namespace finishing

// The step.

/// What the sums of a parameter come to, and then what is taken off it.
struct Term {
  double product;  // lr^2 d . m
  double size;     // lr^2 d . d
  double weight;   // w . w
  double most;     // max_relative_step
  double floor;
  double lr;
  double along;    // lr * scale * factor
  double shrinkage;
  int64_t elements;
  int64_t layer;
  bool is_finite;
  bool is_taken;  // with all of its layer
};

namespace weighing {

struct Shared {
  const Sums* sums;  // of all parameters
  Term* terms;
};

struct Entry {
  Scalar lr;
  double weight_decay;
  double most;
  double floor;
  int64_t elements;
  int64_t layer;
  int64_t index;
};

constexpr int kThreads = 128;

/// A parameter a thread.
__global__ void __launch_bounds__(kThreads) weigh_kernel(const __grid_constant__ Table<Entry, Shared> table) {
  const int i = blockIdx.x * kThreads + threadIdx.x;
  if (i >= table.count) return;
  const Entry& entry = table.entries[i];
  const Sums& sums = table.shared.sums[entry.index];
  const double lr = load(entry.lr);
  table.shared.terms[entry.index] = {lr * lr * sums.product,
                                     lr * lr * sums.direction,
                                     sums.weight,
                                     entry.most,
                                     entry.floor,
                                     lr,
                                     0,
                                     lr * entry.weight_decay,
                                     entry.elements,
                                     entry.layer,
                                     is_finite(sums.product) && is_finite(sums.direction) && is_finite(sums.weight),
                                     false};
}

}  // namespace weighing

struct Bounds {
  Scalar found_inf;
  double kl_clip;  // 0 for none
  int64_t count;
  Term* terms;
  double* scale;
  double* factors;
  int64_t* skipped;
};

/// The terms of a layer together; `elements` are all of its elements.
struct Layer {
  Term sums;
  int64_t end;  // one past its last parameter
};

__device__ Layer gather(const Bounds& bounds, int64_t first) {
  Layer layer{bounds.terms[first], first + 1};
  for (; layer.end < bounds.count; ++layer.end) {
    const Term& term = bounds.terms[layer.end];
    if (term.layer != layer.sums.layer) break;
    layer.sums.product += term.product;
    layer.sums.size += term.size;
    layer.sums.weight += term.weight;
    layer.sums.most = term.most < layer.sums.most ? term.most : layer.sums.most;
    layer.sums.floor = term.floor < layer.sums.floor ? term.floor : layer.sums.floor;
    layer.sums.elements += term.elements;
    layer.sums.is_finite = layer.sums.is_finite && term.is_finite;
  }
  return layer;
}

/// The first parameter of a layer that this thread has, from parameter i on.
__device__ int64_t next_layer(const Bounds& bounds, int64_t i) {
  while (i < bounds.count && i > 0 && bounds.terms[i].layer == bounds.terms[i - 1].layer) i += kThreads;
  return i;
}

__device__ double factor_of(const Term& layer, double scale) {
  if (!layer.is_finite) return 0;
  const double weight = sqrt(layer.weight), least = layer.floor * sqrt(static_cast<double>(layer.elements));
  const double limit = layer.most * (weight > least ? weight : least), size = scale * sqrt(layer.size);
  return size > limit ? limit / size : 1;
}

struct Memory {
  double of_warps[kWarps];
  double scale;
};

/// All layers in one block: the scale of all of them is what each waits for.
__global__ void __launch_bounds__(kThreads) solve_kernel(const Bounds bounds) {
  Memory& memory = shared_memory<Memory>();
  const bool is_off = load(bounds.found_inf) != 0;
  double own = 0;
  for (int64_t i = next_layer(bounds, threadIdx.x); i < bounds.count; i = next_layer(bounds, i + kThreads)) {
    const Term layer = gather(bounds, i).sums;
    if (layer.is_finite) own += layer.product;
  }
  const double size = fabs(block_sum(own, memory.of_warps));
  if (threadIdx.x == 0) {
    const bool fits = is_off || bounds.kl_clip == 0 || size <= bounds.kl_clip;
    memory.scale = fits ? 1 : is_finite(size) ? sqrt(bounds.kl_clip / size) : 0;
    *bounds.scale = memory.scale;
  }
  __syncthreads();
  const double scale = memory.scale;
  for (int64_t i = next_layer(bounds, threadIdx.x); i < bounds.count; i = next_layer(bounds, i + kThreads)) {
    const Layer layer = gather(bounds, i);
    const double factor = is_off ? 1 : factor_of(layer.sums, scale);
    bounds.factors[layer.sums.layer] = factor;
    for (int64_t k = i; k < layer.end; ++k) {
      Term& term = bounds.terms[k];
      term.along = term.lr * scale * factor;
      term.is_taken = layer.sums.is_finite && !is_off;
      bounds.skipped[k] = layer.sums.is_finite || is_off ? 0 : term.elements;
    }
  }
}

namespace descending {

struct Shared {
  const Term* terms;
};

struct Entry : StepArrays {  // nothing is in the gradient's place, the direction in the moment's
  int64_t index;
};

template <class T, class Integers>
struct Descend {
  using A = Accumulator<T>;

  Integers integers;
  A along;
  A shrinkage;

  template <int N, int kCount>
  __device__ void take(const Elements<T>& elements, int stride, int64_t at) {
    Pack<T, N> w[kCount];
    Pack<A, N> d[kCount];
#pragma unroll
    for (int k = 0; k < kCount; ++k) {
      w[k] = load_pack<N>(elements.parameter + k * stride);
      d[k] = load_pack<N>(elements.moment + k * stride);
    }
#pragma unroll
    for (int k = 0; k < kCount; ++k) {
      auto random = integers.from(at + k * stride);
#pragma unroll
      for (int i = 0; i < N; ++i) {
        const A old = widen(w[k].at[i]);
        A next = fma(-along, d[k].at[i], old);
        if (shrinkage != 0) next = fma(-shrinkage, old, next);
        const uint32_t bits = random.next();
        w[k].at[i] = kIsRandom<Integers> ? narrow_at_random<false, T>(next, bits) : narrow<T>(next);
      }
      store_pack<N>(elements.parameter + k * stride, w[k]);
    }
  }
};

template <class Traits, class Entry>
__global__ void __launch_bounds__(Traits::kThreads)
    descend_kernel(const __grid_constant__ Table<Entry, Shared> table) {
  using A = typename Traits::A;
  const int i = table.tensor_of(blockIdx.x);
  const Entry& entry = table.entries[i];
  const Term& term = table.shared.terms[entry.index];
  if (!term.is_taken) return;
  const int64_t first = static_cast<int64_t>(blockIdx.x - table.start[i]) * kChunk;
  const auto integers = integers_of<descending::Entry>(entry, first);
  Descend<typename Traits::T, std::remove_const_t<decltype(integers)>> descend{
      integers, static_cast<A>(term.along), static_cast<A>(term.shrinkage)};
  walk<Traits>(entry, first, descend);
}

}  // namespace descending

/// Fills the terms of all parameters.
void weigh(const CappedStep& step, Term* terms, const Stream& stream) {
  using WeighingTable = Table<weighing::Entry, weighing::Shared>;
  const std::unique_ptr<WeighingTable> table(new WeighingTable);
  table->shared = {reinterpret_cast<const Sums*>(step.sums), terms};
  for (int64_t first = 0; first < step.count; first += WeighingTable::kCapacity) {
    table->count = static_cast<int32_t>(std::min<int64_t>(step.count - first, WeighingTable::kCapacity));
    for (int k = 0; k < table->count; ++k) {
      const CappedParameter& p = step.parameters[first + k];
      table->entries[k] = {p.lr, p.weight_decay, p.max_relative_step, p.floor, p.size, p.layer, first + k};
    }
    launch("capped_step_", weighing::weigh_kernel, divide_up(table->count, weighing::kThreads), weighing::kThreads, 0,
           stream, *table);
  }
}

}  // namespace

void heavy_ball_(const HeavyBall& all, const Stream& stream) {
  using namespace momentum;
  const Geometries<HeavyBallParameter> geometries("heavy_ball_", all.parameters, all.count, false);
  const DeviceGuard guard(stream);
  const Shared shared{all.gradient_scale, all.momentum, all.weight_decay, all.skipped};
  const auto entry_of = [&](int64_t i) {
    const HeavyBallParameter& p = all.parameters[i];
    return Entry{{p.parameter.data, p.gradient.data, p.moment.data, p.size}, i};
  };
  for (const StepDTypes& dtypes : kStepDTypes) {
    for_types(dtypes.parameter, dtypes.moment, [&](auto type, auto moment_type) {
      using T = typename decltype(type)::type;
      using M = typename decltype(moment_type)::type;
      using Traits = StepTraits<T, 2, T, M>;
      for_entries<Entry, M>([&](auto entry_type) {
        using E = typename decltype(entry_type)::type;
        queue<E, Shared>("heavy_ball_", heavy_ball_kernel<Traits, E>, heavy_ball_kernel<Traits, StridedEntry<E>>,
                         sizeof(int[Traits::kWarps]), all.parameters, all.count, geometries, shared, stream,
                         round_as<Entry, E, M>(are_of(dtypes)),
                         [&](int64_t i) { return with_rounding<E>(entry_of(i), all.parameters[i]); });
      });
    });
  }
}

void direction_sums(const DirectionSums& all, const Stream& stream) {
  using namespace summing;
  constexpr const char* kName = "direction_sums";
  // Bits do not depend on where elements lie: they are multiplied in row-major order.
  const Geometries<DirectionParameter> geometries(kName, all.parameters, all.count, true);
  const DeviceGuard guard(stream);
  int64_t all_chunks = 0;
  for (int64_t i = 0; i < all.count; ++i) all_chunks += chunks(all.parameters[i].size);
  const Scratch sums(stream, all_chunks * sizeof(Sums));
  const Shared shared{all.products, all.weights, sums.as<Sums>()};
  TableWriter<Table<finishing::Entry, finishing::Shared>> finisher(
      kName, finishing::finish_kernel, kThreads, sizeof(SumsOfWarps), stream,
      {shared.sums, all.skipped, reinterpret_cast<Sums*>(all.sums)});
  for (const StepDTypes& dtypes : kStepDTypes) {
    for_types(dtypes.parameter, dtypes.moment, [&](auto type, auto moment_type) {
      using Traits = StepTraits<typename decltype(type)::type, 1, typename decltype(moment_type)::type>;
      int64_t next = 0, first_chunk = 0;
      // Called for the parameters of two dtypes, in order.
      const auto entry_of = [&](int64_t i) {
        for (; next < i; ++next) first_chunk += chunks(all.parameters[next].size);
        const DirectionParameter& p = all.parameters[i];
        return Entry{{p.parameter.data, p.moment.data, p.direction.data, p.size}, first_chunk};
      };
      queue<Entry, Shared>(kName, sums_kernel<Traits, Entry>, sums_kernel<Traits, StridedEntry<Entry>>,
                           sizeof(SumsOfWarps), all.parameters, all.count, geometries, shared, stream, are_of(dtypes),
                           entry_of);
    });
  }
  int64_t first_chunk = 0;
  for (int64_t i = 0; i < all.count; ++i) {
    const int64_t own = chunks(all.parameters[i].size);
    finisher.add({first_chunk, own, i}, 1);
    first_chunk += own;
  }
  finisher.flush();
}

void capped_step_(const CappedStep& step, const Stream& stream) {
  using namespace descending;
  constexpr const char* kName = "capped_step_";
  const Geometries<CappedParameter> geometries(kName, step.parameters, step.count, false);
  const DeviceGuard guard(stream);
  const Scratch terms(stream, step.count * sizeof(Term));
  weigh(step, terms.as<Term>(), stream);
  const Bounds bounds{step.found_inf,   step.kl_clip, step.count,  terms.as<Term>(),
                      step.scale, step.factors, step.skipped};
  launch(kName, solve_kernel, 1, kThreads, sizeof(Memory), stream, bounds);
  const Shared shared{bounds.terms};
  const auto entry_of = [&](int64_t i) {
    const CappedParameter& p = step.parameters[i];
    return Entry{{p.parameter.data, p.parameter.data, p.direction.data, p.size}, i};
  };
  for (const DType dtype : kDTypes) {
    for_type(dtype, [&](auto type) {
      using T = typename decltype(type)::type;
      using Traits = StepTraits<T, 2>;
      for_entries<Entry, T>([&](auto entry_type) {
        using E = typename decltype(entry_type)::type;
        queue<E, Shared>(kName, descend_kernel<Traits, E>, descend_kernel<Traits, StridedEntry<E>>, 0, step.parameters,
                         step.count, geometries, shared, stream,
                         round_as<Entry, E, T>([=](const CappedParameter& p) { return p.dtype == dtype; }),
                         [&](int64_t i) { return with_rounding<E>(entry_of(i), step.parameters[i]); });
      });
    });
  }
}

}  // namespace fisher_kernels::cuda
