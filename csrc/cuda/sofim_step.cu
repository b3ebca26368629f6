#include "step_rounding.cuh"

// The SOFIM update in two passes: 24 bytes a parameter in float32 in direction momentum, 18 with moments in 16 bits, of which the second pass finds
// some in the L2 cache, and 28 in direction gradient. Between the passes a small kernel makes of the first one's dot
// products, 24 bytes a chunk, what the second one takes off.
namespace fisher_kernels::cuda {

namespace {

constexpr const char* kName = "sofim_step_";
constexpr int kSolveThreads = 256;
constexpr int kSolveWarps = kSolveThreads / kWarp;
static_assert(kSolveThreads % kWarp == 0 && kSolveWarps <= kWarp);

// A thread has two loads in flight in the first pass, where compilers put off what is more until the sums are done with
// what is there, and four in the second one; half as many again where three arrays are read. With 32 registers in
// float32 all threads of a multiprocessor do.
template <class T, class M>
using AdvanceTraits = StepTraits<T, 1, T, M>;
template <class T, class M>
using DescendTraits = StepTraits<T, 2, T, M>;

/// What the first pass finds in a chunk.
struct Sums {
  double square;   // m . m
  double product;  // m . g, in direction gradient
  int64_t left_out;
};

/// What a parameter adds to a dot product, and what is taken off it: along_moment * m + along_gradient * g +
/// lr * (decay * w). The product of lr and decay may be beyond the range of its dtype where that of decay and w is not.
struct Solution {
  double square;   // u . u
  double product;  // u . g
  double correction;
  double lr;
  double along_moment;
  double along_gradient;
  double decay;
};

/// Of both passes.
struct Shared {
  GradientScale scale;
  double beta;
  bool along_gradient;
  Sums* sums;  // of all chunks
  Solution* solutions;
  unsigned* solved;  // how many parameters were, in global scope
};

struct Entry : StepArrays {
  double weight_decay;  // in coupled form
  int64_t first_chunk;  // among all chunks
  int64_t index;        // among all parameters
};

/// Gradients and moments of the elements of a parameter. Every rounding is written down, and no compiler fuses what it
/// likes: paths of other accesses have the same bits.
template <class A>
struct Momentum {
  A gradient_scale;
  A weight_decay;  // in coupled form
  A beta;
  A gain;  // 1 - beta

  __device__ Momentum(const Shared& shared, const Entry& entry)
      : gradient_scale(static_cast<A>(factor(shared.scale))),
        weight_decay(static_cast<A>(entry.weight_decay)),
        beta(static_cast<A>(shared.beta)),
        gain(static_cast<A>(1 - shared.beta)) {}

  __device__ bool reads_parameters() const { return weight_decay != 0; }

  template <class T>
  __device__ A gradient(T stored, T parameter) const {
    const A g = gradient_scale * widen(stored);
    return reads_parameters() ? fma(weight_decay, widen(parameter), g) : g;
  }

  __device__ A advance(A moment, A g) const { return fma(beta, moment, gain * g); }
};

/// The first pass over a chunk: moments go on, but for those that would not be finite, and are multiplied.
template <class T, class M, class Integers>
struct Advance {
  using A = Accumulator<T>;

  Momentum<A> momentum;
  Integers integers;
  bool along_gradient;
  double square;
  double product;
  int left_out;

  template <int N, int kCount>
  __device__ void take(const Elements<T, T, M>& elements, int stride, int64_t at) {
    Pack<T, N> g[kCount], w[kCount] = {};
    Pack<M, N> m[kCount];
#pragma unroll
    for (int k = 0; k < kCount; ++k) {
      g[k] = load_pack<N>(elements.gradient + k * stride);
      m[k] = load_pack<N>(elements.moment + k * stride);
      if (momentum.reads_parameters()) w[k] = load_pack<N>(elements.parameter + k * stride);
    }
#pragma unroll
    for (int k = 0; k < kCount; ++k) {
      auto random = integers.from(at + k * stride);
#pragma unroll
      for (int i = 0; i < N; ++i) advance(m[k].at[i], momentum.gradient(g[k].at[i], w[k].at[i]), random.next());
      store_pack<N>(elements.moment + k * stride, m[k]);
    }
  }

 private:
  __device__ void advance(M& moment, A g, uint32_t random) {
    const A next = momentum.advance(widen(moment), g);
    const bool counts = is_finite(next);
    if (counts) moment = kIsRandom<Integers> ? narrow_at_random<true, M>(next, random) : narrow<M>(next);
    // In float64: squares of what float32 holds fit. Zeros change no sum.
    const double factor = counts ? widen(moment) : 0;
    square = fma(factor, factor, square);
    if (along_gradient) product = fma(factor, static_cast<double>(counts ? g : 0), product);
    left_out += !counts;
  }
};

/// The second pass over a chunk. Where the first one left elements out they show by their gradients, as their moments
/// have not changed. (One that has cannot overflow now, between itself and g, unless both are within rounding of the
/// largest number.)
template <class T, class M, class Integers>
struct Descend {
  using A = Accumulator<T>;

  Momentum<A> momentum;
  Integers integers;
  A along_moment;
  A along_gradient;
  A rate;
  A decay;
  bool goes_along_gradient;
  bool some_were_left_out;

  __device__ Descend(const Shared& shared, const Entry& entry, int64_t chunk, const Integers& integers_)
      : momentum(shared, entry),
        integers(integers_),
        along_moment(static_cast<A>(shared.solutions[entry.index].along_moment)),
        along_gradient(static_cast<A>(shared.solutions[entry.index].along_gradient)),
        rate(static_cast<A>(shared.solutions[entry.index].lr)),
        decay(static_cast<A>(shared.solutions[entry.index].decay)),
        goes_along_gradient(shared.along_gradient),
        some_were_left_out(shared.sums[entry.first_chunk + chunk].left_out > 0) {}

  template <int N, int kCount>
  __device__ void take(const Elements<T, T, M>& elements, int stride, int64_t at) {
    const bool reads_gradients = goes_along_gradient || some_were_left_out;
    Pack<T, N> w[kCount], g[kCount] = {};
    Pack<M, N> m[kCount];
#pragma unroll
    for (int k = 0; k < kCount; ++k) {
      w[k] = load_pack<N>(elements.parameter + k * stride);
      m[k] = load_pack<N>(elements.moment + k * stride);
      if (reads_gradients) g[k] = load_pack<N>(elements.gradient + k * stride);
    }
#pragma unroll
    for (int k = 0; k < kCount; ++k) {
      auto random = integers.from(at + k * stride);
#pragma unroll
      for (int i = 0; i < N; ++i) {
        descend(w[k].at[i], momentum.gradient(g[k].at[i], w[k].at[i]), widen(m[k].at[i]), random.next());
      }
      store_pack<N>(elements.parameter + k * stride, w[k]);
    }
  }

 private:
  __device__ void descend(T& parameter, A g, A moment, uint32_t random) const {
    if (some_were_left_out && !is_finite(momentum.advance(moment, g))) return;
    const A w = widen(parameter);
    A change = rounded_product(along_moment, moment);
    if (goes_along_gradient) change = fma(along_gradient, g, change);
    // Not even a NaN of the parameter gets into the change where there is no decay.
    if (decay != 0) change = fma(rate, rounded_product(decay, w), change);
    parameter = kIsRandom<Integers> ? narrow_at_random<false, T>(w - change, random) : narrow<T>(w - change);
  }

  /// One that is not fused with what follows.
  __device__ static float rounded_product(float x, float y) { return __fmul_rn(x, y); }
  __device__ static double rounded_product(double x, double y) { return __dmul_rn(x, y); }
};

template <int kWarps>
struct SumsOfWarps {
  double square[kWarps];
  double product[kWarps];
  int64_t left_out[kWarps];

  /// The sums over a block, in its first thread.
  __device__ Sums add(const Sums& own, bool along_gradient) {
    Sums sums{block_sum(own.square, square), 0, 0};
    if (along_gradient) sums.product = block_sum(own.product, product);
    if (__syncthreads_or(own.left_out > 0)) sums.left_out = block_sum(own.left_out, left_out);  // rarely
    return sums;
  }
};

template <class Traits, class Entry>
__global__ void __launch_bounds__(Traits::kThreads)
    advance_kernel(const __grid_constant__ Table<Entry, Shared> table) {
  const Shared& shared = table.shared;
  if (is_off(shared.scale)) return;
  const int i = table.tensor_of(blockIdx.x);
  const Entry& entry = table.entries[i];
  const int64_t chunk = blockIdx.x - table.start[i];
  const auto integers = integers_of<cuda::Entry>(entry, chunk * kChunk, 1);  // of the step that is counted in between
  Advance<typename Traits::T, typename Traits::M, std::remove_const_t<decltype(integers)>> advance{
      {shared, entry}, integers, shared.along_gradient, 0, 0, 0};
  walk<Traits>(entry, chunk * kChunk, advance);
  const Sums sums = shared_memory<SumsOfWarps<Traits::kWarps>>().add(
      {advance.square, advance.product, advance.left_out}, shared.along_gradient);
  if (threadIdx.x != 0) return;
  shared.sums[entry.first_chunk + chunk] = sums;
  if (blockIdx.x == 0) *shared.solved = 0;
}

/// Backwards, to begin with the moments that the first pass left in the cache.
template <class Traits, class Entry>
__global__ void __launch_bounds__(Traits::kThreads)
    descend_kernel(const __grid_constant__ Table<Entry, Shared> table) {
  const Shared& shared = table.shared;
  if (is_off(shared.scale)) return;
  const uint32_t block = gridDim.x - 1 - blockIdx.x;
  const int i = table.tensor_of(block);
  const Entry& entry = table.entries[i];
  const int64_t chunk = block - table.start[i];
  const auto integers = integers_of<cuda::Entry>(entry, chunk * kChunk);
  Descend<typename Traits::T, typename Traits::M, std::remove_const_t<decltype(integers)>> descend(shared, entry, chunk,
                                                                                                  integers);
  walk<Traits>(entry, chunk * kChunk, descend);
}

namespace solving {

struct Shared {
  GradientScale scale;
  double beta;
  double rho;
  bool along_gradient;
  bool by_parameter;
  int64_t count;  // of all parameters
  const Sums* sums;
  Solution* solutions;
  unsigned* solved;
  int64_t* skipped;
  double* squares;
};

/// A parameter, which is one block's.
struct Entry {
  float* step;
  Scalar lr;
  double weight_decay;  // in decoupled form
  int64_t first_chunk;
  int64_t chunks;
  int64_t index;
};

struct Memory {
  SumsOfWarps<kSolveWarps> sums_of_warps;
  double square;
  double product;
  bool is_last;
};

/// Counts the step of a parameter; what it adds to the dot products of u, given those of m.
__device__ Solution open(const Shared& shared, const Entry& entry, const Sums& sums) {
  const float t = *entry.step + 1;
  *entry.step = t;
  Solution solution{};
  solution.correction = 1 - pow(shared.beta, static_cast<double>(t));
  solution.square = sums.square / (solution.correction * solution.correction);
  solution.product = sums.product / solution.correction;
  solution.lr = load(entry.lr);
  solution.decay = entry.weight_decay;
  return solution;
}

/// The solve of one vector, by the formula of Sherman and Morrison, with the moment m = correction * u as it is stored.
__device__ void close(const Shared& shared, double square, double product, Solution& solution) {
  const double lr = solution.lr, bottom = shared.rho + square;
  if (!shared.along_gradient) {
    solution.along_moment = lr / (solution.correction * bottom);
    return;
  }
  if (!is_finite(square) || !is_finite(product)) return;  // counts as 0
  solution.along_moment = -lr * product / (solution.correction * shared.rho * bottom);
  solution.along_gradient = lr / shared.rho;
}

/// Whether this block is the last one, so that it sees what all others wrote before they asked.
__device__ bool is_last(const Shared& shared, bool& answer) {
  if (threadIdx.x == 0) {
    __threadfence();
    answer = atomicAdd(shared.solved, 1u) == static_cast<unsigned>(shared.count - 1);
  }
  __syncthreads();
  __threadfence();
  return answer;
}

__global__ void __launch_bounds__(kSolveThreads) solve_kernel(const __grid_constant__ Table<Entry, Shared> table) {
  const Shared& shared = table.shared;
  const Entry& entry = table.entries[blockIdx.x];
  if (is_off(shared.scale)) {
    if (threadIdx.x != 0) return;
    shared.skipped[entry.index] = 0;
    shared.squares[entry.index] = 0;
    return;
  }
  Memory& memory = shared_memory<Memory>();
  Sums own{};
#pragma unroll 8
  for (int64_t chunk = threadIdx.x; chunk < entry.chunks; chunk += kSolveThreads) {
    const Sums& more = shared.sums[entry.first_chunk + chunk];
    own.square += more.square;
    own.product += more.product;
    own.left_out += more.left_out;
  }
  const Sums sums = memory.sums_of_warps.add(own, shared.along_gradient);
  if (threadIdx.x == 0) {
    Solution solution = open(shared, entry, sums);
    shared.skipped[entry.index] = sums.left_out;
    shared.squares[entry.index] = solution.square;
    if (shared.by_parameter) close(shared, solution.square, solution.product, solution);
    shared.solutions[entry.index] = solution;
  }
  if (shared.by_parameter || !is_last(shared, memory.is_last)) return;

  Sums all{};
#pragma unroll 8
  for (int64_t i = threadIdx.x; i < shared.count; i += kSolveThreads) {
    all.square += shared.solutions[i].square;
    all.product += shared.solutions[i].product;
  }
  all = memory.sums_of_warps.add(all, shared.along_gradient);
  if (threadIdx.x == 0) {
    memory.square = all.square;
    memory.product = all.product;
  }
  __syncthreads();
  for (int64_t i = threadIdx.x; i < shared.count; i += kSolveThreads) {
    close(shared, memory.square, memory.product, shared.solutions[i]);
  }
}

}  // namespace solving

/// Queues one of the passes over all parameters of two dtypes that round alike, on a kernel for each kind of entry.
template <class Entry, class T, class M>
void queue(void (*contiguous)(Table<Entry, Shared>), void (*strided)(Table<StridedEntry<Entry>, Shared>),
           size_t shared_bytes, const SofimStep& arguments, const Geometries<SofimParameter>& geometries,
           const Shared& shared, const StepDTypes& dtypes, const Stream& stream) {
  StepWriter<Entry, Shared> writer(kName, contiguous, strided, AdvanceTraits<T, M>::kThreads, shared_bytes, stream,
                                   shared);
  constexpr bool kRandom = kIsRandomEntry<Entry, cuda::Entry>;
  int64_t first_chunk = 0;
  for (int64_t i = 0; i < arguments.count; ++i) {
    const SofimParameter& p = arguments.parameters[i];
    if (p.dtype == dtypes.parameter && p.moment_dtype == dtypes.moment &&
        kRandom == (p.rounding.random && kIsShort<T, M>)) {
      const double weight_decay = p.decay == WeightDecay::coupled ? p.weight_decay : 0;
      Entry entry;
      static_cast<cuda::Entry&>(entry) = {
          {p.parameter.data, p.gradient.data, p.moment.data, p.size}, weight_decay, first_chunk, i};
      if constexpr (kRandom) set_rounding(entry, p);
      writer.add(entry, geometries[i]);
    }
    first_chunk += chunks(p.size);
  }
  writer.flush();
}

void solve(const SofimStep& arguments, const solving::Shared& shared, const Stream& stream) {
  TableWriter<Table<solving::Entry, solving::Shared>> writer(kName, solving::solve_kernel, kSolveThreads,
                                                             sizeof(solving::Memory), stream, shared);
  int64_t first_chunk = 0;
  for (int64_t i = 0; i < arguments.count; ++i) {
    const SofimParameter& p = arguments.parameters[i];
    const double weight_decay = p.decay == WeightDecay::decoupled ? p.weight_decay : 0;
    writer.add({p.step, p.lr, weight_decay, first_chunk, chunks(p.size), i}, 1);
    first_chunk += chunks(p.size);
  }
  writer.flush();
}

}  // namespace

void sofim_step_(const SofimStep& arguments, const Stream& stream) {
  // Bits do not depend on where elements lie: they are multiplied in row-major order.
  const Geometries<SofimParameter> geometries(kName, arguments.parameters, arguments.count, true);
  const DeviceGuard guard(stream);
  int64_t all_chunks = 0;
  for (int64_t i = 0; i < arguments.count; ++i) all_chunks += chunks(arguments.parameters[i].size);
  const Scratch sums(stream, all_chunks * sizeof(Sums));
  const Scratch solutions(stream, arguments.count * sizeof(Solution));
  const Scratch solved(stream, sizeof(unsigned));
  const Shared shared{arguments.gradient_scale, arguments.beta,           arguments.along_gradient,
                      sums.as<Sums>(),          solutions.as<Solution>(), solved.as<unsigned>()};
  const auto for_entries = [&](const auto& pass) {
    for (const StepDTypes& dtypes : kStepDTypes) {
      for_types(dtypes.parameter, dtypes.moment, [&](auto type, auto moment_type) {
        using T = typename decltype(type)::type;
        using M = typename decltype(moment_type)::type;
        pass(type, moment_type, Type<Entry>(), dtypes);
        if constexpr (kIsShort<T, M>) pass(type, moment_type, Type<RandomEntry<Entry>>(), dtypes);
      });
    }
  };
  for_entries([&](auto type, auto moment_type, auto entry_type, const StepDTypes& dtypes) {
    using T = typename decltype(type)::type;
    using M = typename decltype(moment_type)::type;
    using E = typename decltype(entry_type)::type;
    using Traits = AdvanceTraits<T, M>;
    queue<E, T, M>(advance_kernel<Traits, E>, advance_kernel<Traits, StridedEntry<E>>,
                   sizeof(SumsOfWarps<Traits::kWarps>), arguments, geometries, shared, dtypes, stream);
  });
  // Nobody waits for all where there is one, or where the first pass had nothing to do.
  const bool by_parameter = arguments.by_parameter || arguments.count == 1 || all_chunks == 0;
  solve(arguments,
        {arguments.gradient_scale, arguments.beta, arguments.rho, arguments.along_gradient, by_parameter,
         arguments.count, shared.sums, shared.solutions, shared.solved, arguments.skipped, arguments.squares},
        stream);
  for_entries([&](auto type, auto moment_type, auto entry_type, const StepDTypes& dtypes) {
    using T = typename decltype(type)::type;
    using M = typename decltype(moment_type)::type;
    using E = typename decltype(entry_type)::type;
    using Traits = DescendTraits<T, M>;
    queue<E, T, M>(descend_kernel<Traits, E>, descend_kernel<Traits, StridedEntry<E>>, 0, arguments, geometries, shared,
                   dtypes, stream);
  });
}

}  // namespace fisher_kernels::cuda
