#include <type_traits>

#include "async_copy.cuh"
#include "step_rounding.cuh"

// The AdaFisher update: 20 bytes a parameter in float32, 3 reads and 2 writes, 16 with moments in 16 bits, in a launch
// for each pair of dtypes, and one that counts the steps of parameters of several chunks. Steps of those of one chunk
// are counted by its block of threads. The factors are small and come from the caches.
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
  float* counted;             // t of a parameter whose only block counts it, else null
  const void* row_factor;     // or null for 1
  const void* column_factor;  // or null for 1
  int64_t rows;  // of a group
  int64_t columns;
  int32_t index;  // among all parameters
  bool row_is_constant;
  bool column_is_constant;
};

/// Thread blocks of a multiprocessor that there are registers for: 64 of them a thread in float32, more in float64 and
/// where integers are drawn.
template <class A, class Entry_>
constexpr int kResident = kIsRandomEntry<Entry_, Entry> ? 2 : sizeof(A) == 8 ? 3 : 4;

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

  template <int N>
  __device__ Pack<A, N> pack(int64_t index) const {
    static_assert(N == 1);
    const int64_t row = index / columns, group = row / rows, column = index % columns;
    const A left = row_factor == nullptr ? A(1) : row_factor[by_row ? row : 0],
            right = column_factor == nullptr ? A(1) : column_factor[by_column ? group * columns + column : 0];
    return {{fma(left, right, damping)}};
  }
};

/// By how much quotients grow along a chunk, from that of one number on: found without divisions of 64 bits.
struct Quotients {
  uint32_t reciprocal;  // ceil(2^31 / divisor), or 0 where that is longer than a chunk
  int32_t edge;         // what lies between the last multiple and the number, or where the next one is

  __device__ Quotients(int64_t divisor, int64_t rest) {
    if (divisor <= kChunk) {
      reciprocal = (0x7fffffffu + static_cast<uint32_t>(divisor)) / static_cast<uint32_t>(divisor);
      edge = static_cast<int32_t>(rest);
    } else {
      reciprocal = 0;
      edge = static_cast<int32_t>(divisor - rest < kChunk ? divisor - rest : kChunk);
    }
  }

  /// The same as (rest + offset) / divisor for an offset of less than kChunk: both are below 2^14.
  __device__ int at(int offset) const {
    if (reciprocal == 0) return offset >= edge;
    return static_cast<int>(__umulhi(static_cast<uint32_t>(2 * (edge + offset)), reciprocal));
  }
};

/// F along a chunk of a parameter. Factors are found from those of its first element on, to keep few numbers in mind.
template <class A>
class ChunkOfCurvature {
 public:
  __device__ ChunkOfCurvature(const Entry& entry, int64_t first, double damping)
      : ChunkOfCurvature(entry, damping, first / entry.columns, first % entry.columns) {}

  /// Whether no run of elements crosses a row, and column factors can be read 16 bytes at a time.
  __device__ bool has_packs(int elements) const {
    return columns_ % elements == 0 && (!by_column_ || is_aligned(right_));
  }

 protected:
  __device__ ChunkOfCurvature(const Entry& entry, double damping, int64_t row, int64_t column)
      : columns_(entry.columns),
        down_(entry.columns, column),
        groups_(entry.rows, row % entry.rows),
        by_row_(!entry.row_is_constant),
        by_column_(entry.column_factor != nullptr && !entry.column_is_constant),
        damping_(static_cast<A>(damping)),
        left_(static_cast<const A*>(entry.row_factor)),
        right_(static_cast<const A*>(entry.column_factor)) {
    if (left_ != nullptr && by_row_) left_ += row;
    if (by_column_) right_ += row / entry.rows * columns_ + column;
  }

  __device__ A left(int down) const { return left_ == nullptr ? A(1) : left_[by_row_ ? down : 0]; }

  /// Where the column factor of an element is, of a row so far down: its group's are behind those of groups before.
  __device__ const A* right(int down, int offset) const {
    return right_ + (offset - (down - groups_.at(down)) * columns_);
  }

  __device__ A right_of_all() const { return right_ == nullptr ? A(1) : *right_; }

  __device__ A at(int offset) const {
    const int down = down_.at(offset);
    return fma(left(down), by_column_ ? *right(down, offset) : right_of_all(), damping_);
  }

  int64_t columns_;
  Quotients down_;
  Quotients groups_;
  bool by_row_;
  bool by_column_;
  A damping_;
  const A* left_;
  const A* right_;
};

/// The same for runs of elements. Which of the two a chunk takes is asked once: a loop that has room for both needs
/// more registers.
template <class A, bool kHasPacks>
struct RunsOfCurvature : ChunkOfCurvature<A> {
  __device__ explicit RunsOfCurvature(const ChunkOfCurvature<A>& chunk) : ChunkOfCurvature<A>(chunk) {}

  template <int N>
  __device__ Pack<A, N> pack(int64_t offset_) const {
    const int offset = static_cast<int>(offset_);
    Pack<A, N> pack;
    if constexpr (N == 1 || !kHasPacks) {
#pragma unroll
      for (int i = 0; i < N; ++i) pack.at[i] = this->at(offset + i);
    } else {
      const int down = this->down_.at(offset);
      const A left = this->left(down);
      if (this->by_column_) {
        pack = load_pack<N>(this->right(down, offset));
      } else {
        const A right = this->right_of_all();
#pragma unroll
        for (int i = 0; i < N; ++i) pack.at[i] = right;
      }
#pragma unroll
      for (int i = 0; i < N; ++i) pack.at[i] = fma(left, pack.at[i], this->damping_);
    }
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

  __device__ Rates(const Shared& shared, double correction) {
    const double lr = load(shared.lr);
    gradient_scale = static_cast<A>(factor(shared.scale));
    beta = static_cast<A>(shared.beta);
    gain = static_cast<A>(1 - shared.beta);
    step_size = static_cast<A>(lr / correction);
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

/// What a block of threads shares.
struct Memory {
  double correction;
  int found[8];
};

/// The step of a chunk with a curvature. Returns how many elements this thread has left as they were.
template <class Traits, class Entry, class Curvature>
__device__ int update_chunk(const Entry& entry, int64_t first, const Shared& shared, double correction,
                            const Curvature& curvature) {
  const auto integers = integers_of<cuda::Entry>(entry, first, entry.counted != nullptr);
  Update<Traits, Curvature, std::remove_const_t<decltype(integers)>> update{
      curvature, {shared, correction}, integers, 0};
  walk<Traits>(entry, first, update);
  return update.found;
}

template <class Traits, class Entry>
__device__ int step_chunk(const Entry& entry, int64_t first, const Shared& shared, double correction) {
  using A = typename Traits::A;
  const ChunkOfCurvature<A> chunk(entry, first, shared.damping);
  if (chunk.has_packs(Traits::kVector)) {
    return update_chunk<Traits>(entry, first, shared, correction, RunsOfCurvature<A, true>(chunk));
  }
  return update_chunk<Traits>(entry, first, shared, correction, RunsOfCurvature<A, false>(chunk));
}

template <class Traits, class Entry>
__device__ int step_chunk(const StridedEntry<Entry>& entry, int64_t first, const Shared& shared, double correction) {
  return update_chunk<Traits>(entry, first, shared, correction,
                              Curvature<typename Traits::A>(entry, shared.damping));
}

/// Asks for a chunk that is a whole parameter, of which 128 bytes come at a time.
template <class Traits, class Entry>
__device__ void fetch(const Entry& entry) {
  const int64_t at = threadIdx.x * 128;
  static_assert(Traits::kThreads * 128 >= kChunk * sizeof(float));
  const auto fetch_of = [&](const void* array, int64_t size) {
    if (at < entry.size * size) fetch_line(static_cast<const char*>(array) + at);
  };
  fetch_of(entry.parameter, sizeof(typename Traits::T));
  fetch_of(entry.gradient, sizeof(typename Traits::G));
  fetch_of(entry.moment, sizeof(typename Traits::M));
}

template <class Traits, class Entry>
__device__ void fetch(const StridedEntry<Entry>&) {}

/// 1 - beta^t of the step that is taken. Powers take as long as memory does to answer: of a parameter that the block
/// counts it is asked first.
template <class Traits, class Entry>
__device__ double correction_of(const Entry& entry, const Shared& shared, Memory& memory) {
  if (entry.counted == nullptr) return shared.corrections[entry.index];
  fetch<Traits>(entry);
  if (threadIdx.x == 0) memory.correction = advancing::correction(shared.beta, *entry.counted + 1);
  __syncthreads();
  return memory.correction;
}

template <class Traits, class Entry>
__global__ void __launch_bounds__(Traits::kThreads, kResident<typename Traits::A, Entry>)
    adafisher_step_kernel(const __grid_constant__ Table<Entry, Shared> table) {
  auto& memory = shared_memory<Memory>();
  static_assert(Traits::kWarps == sizeof(memory.found) / sizeof(int));
  const Shared& shared = table.shared;
  const int i = table.tensor_of(blockIdx.x);
  const Entry& entry = table.entries[i];
  int64_t* const skipped = shared.skipped + entry.index;
  if (is_off(shared.scale)) {
    if (entry.counted != nullptr && threadIdx.x == 0) *skipped = 0;
    return;
  }
  const int found = step_chunk<Traits>(entry, static_cast<int64_t>(blockIdx.x - table.start[i]) * kChunk, shared,
                                       correction_of<Traits>(entry, shared, memory));
  if (entry.counted == nullptr) return count_skipped(found, memory.found, skipped);
  const int total = block_sum(found, memory.found);
  if (threadIdx.x != 0) return;
  *skipped = total;
  *entry.counted += 1;  // all have read it
}

/// Whether the only block of a parameter counts its steps.
bool counts_itself(const AdaFisherParameter& p) { return p.numel() > 0 && p.numel() <= kChunk; }

Entry make_entry(const AdaFisherParameter& p, int64_t index) {
  return {{p.parameter.data, p.gradient.data, p.moment.data, p.numel()},
          counts_itself(p) ? p.step : nullptr,
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
  using Traits = StepTraits<T, 1, T, M>;
  StepWriter<Entry, Shared> writer(kName, adafisher_step_kernel<Traits, Entry>,
                                   adafisher_step_kernel<Traits, StridedEntry<Entry>>, Traits::kThreads,
                                   sizeof(Memory), stream, shared);
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
  const auto counted_first = [&](int64_t i) {
    const AdaFisherParameter& p = arguments.parameters[i];
    return counts_itself(p) ? nullptr : p.step;
  };
  advance(kName, arguments.count, counted_first, arguments.beta, arguments.gradient_scale, corrections.as<double>(),
          arguments.skipped, stream);
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
