#include "step.cuh"
#include "strided.cuh"

// The AdaFisher update: 20 bytes a parameter in float32, 3 reads and 2 writes, in one launch for each dtype and one that
// counts steps. The factors are small and come from the caches.
namespace fisher_kernels::cuda {

namespace {

constexpr const char* kName = "adafisher_step_";

template <class T_>
struct Traits {
  using T = T_;
  using A = Accumulator<T>;
  static constexpr int kVector = kVectorBytes / sizeof(T);  // elements of a parameter that a thread moves at once
  static constexpr int kThreads = 256;
  static constexpr int kWarps = kThreads / kWarp;
  static constexpr int kTile = kThreads * kVector;  // elements that a block moves at once
  static_assert(kChunk % kTile == 0);
};

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

struct Entry {
  void* parameter;
  const void* gradient;
  void* moment;
  const void* row_factor;     // or null for 1
  const void* column_factor;  // or null for 1
  int64_t size;
  int64_t rows;  // of a group
  int64_t columns;
  int32_t index;  // among all parameters
  bool row_is_constant;
  bool column_is_constant;
};

struct StridedEntry : Entry {
  Geometry geometry;
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
    return row(row_) * right + damping;
  }

  __device__ A at(int64_t index) const { return at(index / columns, index % columns); }
};

/// F along a chunk of a parameter: what follows its first element, found without 64-bit divisions.
template <class A>
struct CurvatureOfChunk {
  Curvature<A> curvature;
  int64_t row;     // of the first element
  int64_t column;  // likewise
  uint32_t inverse;

  __device__ CurvatureOfChunk(const Curvature<A>& curvature_, int64_t first)
      : curvature(curvature_), row(first / curvature_.columns), column(first % curvature_.columns) {
    // ceil(2^32 / columns): quotients of what is below kChunk + columns come out exact, both being below 2^14.
    inverse = curvature.columns <= kChunk ? 0xffffffffu / static_cast<uint32_t>(curvature.columns) + 1 : 0;
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

  /// Whether N elements from a multiple of N on are in one row, their column factors 16 bytes at a time.
  template <int N>
  __device__ bool has_packs() const {
    return curvature.columns % N == 0 && (!curvature.by_column || is_aligned(curvature.column_factor));
  }

  template <int N>
  __device__ Pack<A, N> pack(int64_t offset) const {
    const int64_t down = split(offset);
    const A left = curvature.row(row + down);
    Pack<A, N> pack;
    if (curvature.column_factor != nullptr && curvature.by_column) {
      pack = load_pack<N>(curvature.group(row + down) + offset);
    } else {
      const A right = curvature.column_factor == nullptr ? A(1) : *curvature.column_factor;
#pragma unroll
      for (int i = 0; i < N; ++i) pack.at[i] = right;
    }
#pragma unroll
    for (int i = 0; i < N; ++i) pack.at[i] = left * pack.at[i] + curvature.damping;
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

/// The update of one element. Returns whether it was left as it was, its gradient not being finite.
template <class T, class A>
__device__ bool update(T& parameter, T gradient, A& moment, A curvature, const Rates<A>& rates) {
  const A w = widen(parameter);
  A g = widen(gradient) * rates.gradient_scale;
  if (!is_finite(g)) return true;
  // Not even a NaN of the parameter gets into the moment where there is no decay.
  if (rates.weight_decay != 0) g += rates.weight_decay * w;
  moment = rates.beta * moment + rates.gain * g;
  A change = rates.step_size * moment / curvature;
  if (rates.shrinkage != 0) change += rates.shrinkage * w;
  parameter = narrow<T>(w - change);
  return false;
}

/// One chunk of a parameter, the chunk whole and all of it aligned. Where `kPacked`, no pack crosses a row.
template <class Traits, bool kPacked>
__device__ int update_packs(typename Traits::T* parameter, const typename Traits::T* gradient,
                            typename Traits::A* moment, const CurvatureOfChunk<typename Traits::A>& curvature,
                            const Rates<typename Traits::A>& rates) {
  constexpr int N = Traits::kVector;
  int found = 0;
#pragma unroll 2
  for (int tile = 0; tile < kChunk; tile += Traits::kTile) {
    const int at = tile + static_cast<int>(threadIdx.x) * N;
    auto w = load_pack<N>(parameter + at);
    const auto g = load_pack<N>(gradient + at);
    auto m = load_pack<N>(moment + at);
    Pack<typename Traits::A, N> f;
    if constexpr (kPacked) {
      f = curvature.template pack<N>(at);
    } else {
#pragma unroll
      for (int i = 0; i < N; ++i) f.at[i] = curvature.at(at + i);
    }
#pragma unroll
    for (int i = 0; i < N; ++i) found += update(w.at[i], g.at[i], m.at[i], f.at[i], rates);
    store_pack<N>(parameter + at, w);
    store_pack<N>(moment + at, m);
  }
  return found;
}

template <class Traits>
__device__ int update_chunk(const Entry& entry, int64_t first, const Rates<typename Traits::A>& rates, double damping) {
  using T = typename Traits::T;
  using A = typename Traits::A;
  T* const parameter = static_cast<T*>(entry.parameter) + first;
  const T* const gradient = static_cast<const T*>(entry.gradient) + first;
  A* const moment = static_cast<A*>(entry.moment) + first;
  const CurvatureOfChunk<A> curvature(Curvature<A>(entry, damping), first);
  const int64_t left = entry.size - first;
  if (left >= kChunk && is_aligned(parameter) && is_aligned(gradient) && is_aligned(moment)) {
    return curvature.template has_packs<Traits::kVector>()
               ? update_packs<Traits, true>(parameter, gradient, moment, curvature, rates)
               : update_packs<Traits, false>(parameter, gradient, moment, curvature, rates);
  }
  const int count = static_cast<int>(left < kChunk ? left : kChunk);
  int found = 0;
  for (int i = threadIdx.x; i < count; i += Traits::kThreads) {
    T w = parameter[i];
    A m = moment[i];
    found += update(w, gradient[i], m, curvature.at(i), rates);
    parameter[i] = w;
    moment[i] = m;
  }
  return found;
}

template <class Traits>
__device__ int update_chunk(const StridedEntry& entry, int64_t first, const Rates<typename Traits::A>& rates,
                            double damping) {
  using T = typename Traits::T;
  using A = typename Traits::A;
  const Curvature<A> curvature(entry, damping);
  const int64_t end = first + kChunk < entry.size ? first + kChunk : entry.size;
  int found = 0;
  for (int64_t i = first + threadIdx.x; i < end; i += Traits::kThreads) {
    const Geometry::Place place = entry.geometry.locate(i);
    T* const parameter = static_cast<T*>(entry.parameter) + place.at[0];
    A* const moment = static_cast<A*>(entry.moment) + place.at[2];
    T w = *parameter;
    A m = *moment;
    found += update(w, static_cast<const T*>(entry.gradient)[place.at[1]], m, curvature.at(place.whole), rates);
    *parameter = w;
    *moment = m;
  }
  return found;
}

template <class Traits, class Entry>
__global__ void __launch_bounds__(Traits::kThreads)
    adafisher_step_kernel(const __grid_constant__ Table<Entry, Shared> table) {
  const Shared& shared = table.shared;
  if (is_off(shared.scale)) return;
  const int i = table.tensor_of(blockIdx.x);
  const Entry& entry = table.entries[i];
  const int64_t first = static_cast<int64_t>(blockIdx.x - table.start[i]) * kChunk;
  const Rates<typename Traits::A> rates(shared, entry.index);
  const int found = update_chunk<Traits>(entry, first, rates, shared.damping);
  count_skipped(found, shared_memory<int[Traits::kWarps]>(), shared.skipped + entry.index);
}

Entry make_entry(const AdaFisherParameter& p, int64_t index) {
  return {p.parameter.data, p.gradient.data,           p.moment.data,       p.row_factor,
          p.column_factor,  p.numel(),                 p.rows,              p.columns,
          static_cast<int32_t>(index), p.row_is_constant, p.column_is_constant};
}

/// All parameters of one dtype.
template <class T>
void step(const AdaFisherStep& arguments, const Geometries<AdaFisherParameter>& geometries, const Shared& shared,
          DType dtype, const Stream& stream) {
  using Traits = cuda::Traits<T>;
  constexpr size_t kSharedBytes = sizeof(int[Traits::kWarps]);
  TableWriter<Table<Entry, Shared>> contiguous(kName, adafisher_step_kernel<Traits, Entry>, Traits::kThreads,
                                               kSharedBytes, stream, shared);
  TableWriter<Table<StridedEntry, Shared>> strided(kName, adafisher_step_kernel<Traits, StridedEntry>,
                                                   Traits::kThreads, kSharedBytes, stream, shared);
  for (int64_t i = 0; i < arguments.count; ++i) {
    const AdaFisherParameter& p = arguments.parameters[i];
    if (p.dtype != dtype) continue;
    const Entry entry = make_entry(p, i);
    if (const Geometry* const geometry = geometries[i]) {
      strided.add({entry, *geometry}, chunks(entry.size));
    } else {
      contiguous.add(entry, chunks(entry.size));
    }
  }
  contiguous.flush();
  strided.flush();
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
  for (const DType dtype : {DType::float32, DType::bfloat16, DType::float16, DType::float64}) {
    for_type(dtype, [&](auto type) { step<typename decltype(type)::type>(arguments, geometries, shared, dtype, stream); });
  }
}

}  // namespace fisher_kernels::cuda
