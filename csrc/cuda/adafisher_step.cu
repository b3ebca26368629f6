#include <type_traits>

#include "step_rounding.cuh"

// The AdaFisher update: 20 bytes a parameter in float32, 3 reads and 2 writes, 16 with moments in 16 bits, in one launch
// for each pair of dtypes and one that counts steps. The factors are small and come from the caches.
namespace fisher_kernels::cuda {

namespace {

constexpr const char* kName = "adafisher_step_";

struct Shared {
  GradientScale scale;
  Scalar lr;
  double beta;
  double damping;
  double weight_decay;
  WeightDecay decay;
  const double* corrections;  // 1 - beta^t, of all parameters
  int64_t* skipped;
};

struct Entry : StepArrays {
  const void* row_factor;     // or null for 1
  const void* column_factor;  // or null for 1
  int64_t rows;  // of a group
  int64_t columns;
  int32_t index;  // among all parameters
  bool row_is_constant;
  bool column_is_constant;
};

/// F = row * column + damping of any element, for numbers of the element in row-major order.
template <class A>
struct Curvature {
  const A* row_factor;
  const A* column_factor;
  int64_t rows;
  int64_t columns;
  bool by_row;
  bool by_column;
  A damping;

  __device__ Curvature(const Entry& entry, double damping_)
      : row_factor(static_cast<const A*>(entry.row_factor)),
        column_factor(static_cast<const A*>(entry.column_factor)),
        rows(entry.rows),
        columns(entry.columns),
        by_row(!entry.row_is_constant),
        by_column(!entry.column_is_constant),
        damping(static_cast<A>(damping_)) {}

  __device__ A row(int64_t row) const { return row_factor == nullptr ? A(1) : row_factor[by_row ? row : 0]; }

  /// The column factors of the group of a row.
  __device__ const A* group(int64_t row) const { return column_factor + (by_column ? row / rows * columns : 0); }

  __device__ A at(int64_t row_, int64_t column) const {
    const A right = column_factor == nullptr ? A(1) : group(row_)[by_column ? column : 0];
    return fma(row(row_), right, damping);
  }

  __device__ A at(int64_t index) const { return at(index / columns, index % columns); }

  template <int N>
  __device__ Pack<A, N> pack(int64_t index) const {
    static_assert(N == 1);
    return {{at(index)}};
  }
};

/// F along a chunk of a parameter: what follows its first element, found without 64-bit divisions.
template <class Traits>
struct CurvatureOfChunk {
  using A = typename Traits::A;

  Curvature<A> curvature;
  int64_t row;     // of the first element
  int64_t column;  // likewise
  uint32_t inverse;
  bool has_packs;  // no run of elements crosses a row, and column factors can be read 16 bytes at a time

  __device__ CurvatureOfChunk(const Curvature<A>& curvature_, int64_t first)
      : curvature(curvature_), row(first / curvature_.columns), column(first % curvature_.columns) {
    // ceil(2^32 / columns): quotients of what is below kChunk + columns come out exact, both being below 2^14.
    inverse = curvature.columns <= kChunk ? 0xffffffffu / static_cast<uint32_t>(curvature.columns) + 1 : 0;
    has_packs =
        curvature.columns % Traits::kVector == 0 && (!curvature.by_column || is_aligned(curvature.column_factor));
  }

  /// The row of an element, counted from `row`; `offset` becomes its column.
  __device__ int64_t split(int64_t& offset) const {
    offset += column;
    if (curvature.columns == 1) {
      const int64_t down = offset;
      offset = 0;
      return down;
    }
    if (inverse != 0) {
      const int64_t down = __umulhi(static_cast<uint32_t>(offset), inverse);
      offset -= down * curvature.columns;
      return down;
    }
    if (offset < curvature.columns) return 0;
    offset -= curvature.columns;  // rows are longer than a chunk
    return 1;
  }

  __device__ A at(int64_t offset) const {
    const int64_t down = split(offset);
    return curvature.at(row + down, offset);
  }

  template <int N>
  __device__ Pack<A, N> pack(int64_t offset) const {
    Pack<A, N> pack;
    if (N == 1 || !has_packs) {
#pragma unroll
      for (int i = 0; i < N; ++i) pack.at[i] = at(offset + i);
      return pack;
    }
    const int64_t down = split(offset);
    const A left = curvature.row(row + down);
    if (curvature.column_factor != nullptr && curvature.by_column) {
      pack = load_pack<N>(curvature.group(row + down) + offset);
    } else {
      const A right = curvature.column_factor == nullptr ? A(1) : *curvature.column_factor;
#pragma unroll
      for (int i = 0; i < N; ++i) pack.at[i] = right;
    }
#pragma unroll
    for (int i = 0; i < N; ++i) pack.at[i] = fma(left, pack.at[i], curvature.damping);
    return pack;
  }
};

/// The coefficients of one parameter, in the type that it is computed in.
template <class A>
struct Rates {
  A gradient_scale;
  A beta;
  A gain;          // 1 - beta
  A step_size;     // lr / (1 - beta^t)
  A weight_decay;  // coupled form
  A shrinkage;     // decoupled form: lr * weight_decay

  __device__ Rates(const Shared& shared, int32_t index) {
    const double lr = load(shared.lr);
    gradient_scale = static_cast<A>(factor(shared.scale));
    beta = static_cast<A>(shared.beta);
    gain = static_cast<A>(1 - shared.beta);
    step_size = static_cast<A>(lr / shared.corrections[index]);
    weight_decay = static_cast<A>(shared.decay == WeightDecay::coupled ? shared.weight_decay : 0);
    shrinkage = static_cast<A>(shared.decay == WeightDecay::decoupled ? lr * shared.weight_decay : 0);
  }
};

/// The update of one element. Returns whether it was left as it was, its gradient not being finite. What is fused is
/// written down: compilers choose otherwise on another path, and layouts are not to show in the bits.
template <bool kRandom, class T, class M, class A>
__device__ bool update(T& parameter, T gradient, M& moment, A curvature, const Rates<A>& rates, uint32_t random) {
  const A w = widen(parameter);
  A g = widen(gradient) * rates.gradient_scale;
  if (!is_finite(g)) return true;
  // Not even a NaN of the parameter gets into the moment where there is no decay.
  if (rates.weight_decay != 0) g = fma(rates.weight_decay, w, g);
  const A m = fma(rates.beta, widen(moment), rates.gain * g);
  moment = kRandom ? narrow_at_random<true, M>(m, random) : narrow<M>(m);
  A change = rates.step_size * m / curvature;
  if (rates.shrinkage != 0) change = fma(rates.shrinkage, w, change);
  parameter = kRandom ? narrow_at_random<false, T>(w - change, random) : narrow<T>(w - change);
  return false;
}

/// What is done with the elements of a chunk.
template <class Traits, class Curvature, class Integers>
struct Update {
  using T = typename Traits::T;
  using M = typename Traits::M;
  using A = typename Traits::A;

  Curvature curvature;
  Rates<A> rates;
  Integers integers;
  int found;

  template <int N, int kCount>
  __device__ void take(const Elements<T, T, M>& elements, int stride, int64_t at) {
    Pack<T, N> w[kCount], g[kCount];
    Pack<M, N> m[kCount];
    Pack<A, N> f[kCount];
#pragma unroll
    for (int k = 0; k < kCount; ++k) {
      w[k] = load_pack<N>(elements.parameter + k * stride);
      g[k] = load_pack<N>(elements.gradient + k * stride);
      m[k] = load_pack<N>(elements.moment + k * stride);
      f[k] = curvature.template pack<N>(at + k * stride);
    }
#pragma unroll
    for (int k = 0; k < kCount; ++k) {
      auto random = integers.from(at + k * stride);
#pragma unroll
      for (int i = 0; i < N; ++i) {
        found += update<kIsRandom<Integers>>(w[k].at[i], g[k].at[i], m[k].at[i], f[k].at[i], rates,
                                                               random.next());
      }
      store_pack<N>(elements.parameter + k * stride, w[k]);
      store_pack<N>(elements.moment + k * stride, m[k]);
    }
  }
};

template <class Traits>
__device__ CurvatureOfChunk<Traits> curvature_of(const Entry& entry, int64_t first, double damping) {
  return {Curvature<typename Traits::A>(entry, damping), first};
}

template <class Traits, class Entry>
__device__ Curvature<typename Traits::A> curvature_of(const StridedEntry<Entry>& entry, int64_t, double damping) {
  return {entry, damping};
}

template <class Traits, class Entry>
__global__ void __launch_bounds__(Traits::kThreads)
    adafisher_step_kernel(const __grid_constant__ Table<Entry, Shared> table) {
  const Shared& shared = table.shared;
  if (is_off(shared.scale)) return;
  const int i = table.tensor_of(blockIdx.x);
  const Entry& entry = table.entries[i];
  const int64_t first = static_cast<int64_t>(blockIdx.x - table.start[i]) * kChunk;
  const auto curvature = curvature_of<Traits>(entry, first, shared.damping);
  const auto integers = integers_of<cuda::Entry>(entry, first);
  Update<Traits, std::remove_const_t<decltype(curvature)>, std::remove_const_t<decltype(integers)>> update{
      curvature, {shared, entry.index}, integers, 0};
  walk<Traits>(entry, first, update);
  count_skipped(update.found, shared_memory<int[Traits::kWarps]>(), shared.skipped + entry.index);
}

Entry make_entry(const AdaFisherParameter& p, int64_t index) {
  return {{p.parameter.data, p.gradient.data, p.moment.data, p.numel()},
          p.row_factor,
          p.column_factor,
          p.rows,
          p.columns,
          static_cast<int32_t>(index),
          p.row_is_constant,
          p.column_is_constant};
}

/// All parameters of two dtypes that round alike.
template <class Entry, class T, class M>
void step(const AdaFisherStep& arguments, const Geometries<AdaFisherParameter>& geometries, const Shared& shared,
          const StepDTypes& dtypes, const Stream& stream) {
  // In 16 bits no more than two blocks fit on a multiprocessor either way.
  using Traits = StepTraits<T, sizeof(T) == 2 ? 2 : 1, T, M>;
  StepWriter<Entry, Shared> writer(kName, adafisher_step_kernel<Traits, Entry>,
                                   adafisher_step_kernel<Traits, StridedEntry<Entry>>, Traits::kThreads,
                                   sizeof(int[Traits::kWarps]), stream, shared);
  for (int64_t i = 0; i < arguments.count; ++i) {
    const AdaFisherParameter& p = arguments.parameters[i];
    if (p.dtype != dtypes.parameter || p.moment_dtype != dtypes.moment) continue;
    if (kIsRandomEntry<Entry, cuda::Entry> != (p.rounding.random && kIsShort<T, M>)) continue;
    Entry entry;
    static_cast<cuda::Entry&>(entry) = make_entry(p, i);
    if constexpr (kIsRandomEntry<Entry, cuda::Entry>) set_rounding(entry, p);
    writer.add(entry, geometries[i]);
  }
  writer.flush();
}

}  // namespace

void adafisher_step_(const AdaFisherStep& arguments, const Stream& stream) {
  const Geometries<AdaFisherParameter> geometries(kName, arguments.parameters, arguments.count, false);
  const DeviceGuard guard(stream);
  const Scratch corrections(stream, arguments.count * sizeof(double));
  advance(
      kName, arguments.count, [&](int64_t i) { return arguments.parameters[i].step; }, arguments.beta,
      arguments.gradient_scale, corrections.as<double>(), arguments.skipped, stream);
  const Shared shared{arguments.gradient_scale, arguments.lr,    arguments.beta,           arguments.damping,
                      arguments.weight_decay,   arguments.decay, corrections.as<double>(), arguments.skipped};
  for (const StepDTypes& dtypes : kStepDTypes) {
    for_types(dtypes.parameter, dtypes.moment, [&](auto type, auto moment_type) {
      using T = typename decltype(type)::type;
      using M = typename decltype(moment_type)::type;
      step<Entry, T, M>(arguments, geometries, shared, dtypes, stream);
      if constexpr (kIsShort<T, M>) step<RandomEntry<Entry>, T, M>(arguments, geometries, shared, dtypes, stream);
    });
  }
}

}  // namespace fisher_kernels::cuda
