#pragma once

#include "kernels.h"
#include "reduce.cuh"
#include "strided.cuh"
#include "tensor_list.cuh"

// What the steps that take lists of parameters share.
namespace fisher_kernels::cuda {

/// Whether a step is to do nothing.
__device__ inline bool is_off(const GradientScale& scale) { return load(scale.found_inf) != 0; }

/// What gradients are multiplied by.
__device__ inline double factor(const GradientScale& scale) {
  return (scale.maximize ? -1.0 : 1.0) / load(scale.divisor);
}

/// Adds how many elements the threads of a block left out; `partials` is as for block_sum.
__device__ inline void count_skipped(int found, int* partials, int64_t* skipped) {
  const int total = block_sum(found, partials);
  // Whole numbers: no order matters.
  if (threadIdx.x == 0 && total > 0)
    atomicAdd(reinterpret_cast<unsigned long long*>(skipped), static_cast<unsigned long long>(total));
}

/// Counts one more step of parameters, t <- t + 1, unless the step is off; corrections[i] gets 1 - beta^t, skipped[i]
/// zero. `step_of(i)` is where t of parameter i is, null where it is counted elsewhere.
template <class StepOf>
void advance(const char* name, int64_t count, StepOf step_of, double beta, const GradientScale& scale,
             double* corrections, int64_t* skipped, const Stream& stream);

namespace advancing {

struct Shared {
  double beta;
  GradientScale scale;
  double* corrections;
  int64_t* skipped;
};

struct Steps {
  static constexpr int kCapacity =
      static_cast<int>((kMostParameters - sizeof(Shared) - 8) / (sizeof(float*) + sizeof(int32_t)));
  Shared shared;
  float* step[kCapacity];
  int32_t index[kCapacity];  // among all parameters
  int32_t count;
};
static_assert(sizeof(Steps) <= kMostParameters);

constexpr int kThreads = 128;

/// 1 - beta^t.
__device__ inline double correction(double beta, float t) { return 1 - pow(beta, static_cast<double>(t)); }

static __global__ void __launch_bounds__(kThreads) advance(const __grid_constant__ Steps steps) {
  const int i = blockIdx.x * kThreads + threadIdx.x;
  if (i >= steps.count) return;
  const Shared& shared = steps.shared;
  const int32_t index = steps.index[i];
  shared.skipped[index] = 0;
  if (is_off(shared.scale)) return;
  const float t = *steps.step[i] + 1;
  *steps.step[i] = t;
  shared.corrections[index] = correction(shared.beta, t);
}

}  // namespace advancing

template <class StepOf>
void advance(const char* name, int64_t count, StepOf step_of, double beta, const GradientScale& scale,
             double* corrections, int64_t* skipped, const Stream& stream) {
  using namespace advancing;
  const std::unique_ptr<Steps> steps(new Steps);
  steps->shared = {beta, scale, corrections, skipped};
  steps->count = 0;
  const auto flush = [&] {
    launch(name, advancing::advance, divide_up(steps->count, kThreads), kThreads, 0, stream, *steps);
    steps->count = 0;
  };
  for (int64_t i = 0; i < count; ++i) {
    float* const step = step_of(i);
    if (step == nullptr) continue;
    if (steps->count == Steps::kCapacity) flush();
    steps->step[steps->count] = step;
    steps->index[steps->count++] = static_cast<int32_t>(i);
  }
  flush();
}

// The walk along the chunks of parameters, gradients and moments.

template <class T_, int kBatch_, class G_ = T_, class M_ = Accumulator<T_>>
struct StepTraits {
  using T = T_;  // of parameters
  using G = G_;  // of gradients, or of what is in their place
  using M = M_;  // of moments
  using A = Accumulator<T>;
  // Elements that a thread moves at once.
  static constexpr int kVector = kVectorBytes / (sizeof(M) < sizeof(T) ? sizeof(M) : sizeof(T));
  static constexpr int kThreads = 256;
  static constexpr int kWarps = kThreads / kWarp;
  static constexpr int kTile = kThreads * kVector;  // elements that a block moves at once
  static constexpr int kBatch = kBatch_;            // moves of a thread whose loads are in flight together
  static_assert(kChunk % (kTile * kBatch) == 0);
};

/// What a walk needs to know of a parameter: the first part of the entries of a table.
struct StepArrays {
  void* parameter;
  const void* gradient;
  void* moment;
  int64_t size;
};

/// The entry of a parameter that is not contiguous.
template <class Entry>
struct StridedEntry : Entry {
  Geometry geometry;
};

/// Where the elements of a parameter, its gradient and its moment are, from one of them on.
template <class T, class G = T, class M = Accumulator<T>>
struct Elements {
  T* parameter;
  const G* gradient;
  M* moment;

  __device__ explicit Elements(const StepArrays& arrays)
      : parameter(static_cast<T*>(arrays.parameter)),
        gradient(static_cast<const G*>(arrays.gradient)),
        moment(static_cast<M*>(arrays.moment)) {}

  __device__ void move(int64_t by_parameter, int64_t by_gradient, int64_t by_moment) {
    parameter += by_parameter;
    gradient += by_gradient;
    moment += by_moment;
  }

  __device__ Elements operator+(int64_t offset) const {
    Elements moved = *this;
    moved.move(offset, offset, offset);
    return moved;
  }

  __device__ bool are_aligned() const { return is_aligned(parameter) && is_aligned(gradient) && is_aligned(moment); }
};

/// Elements of the chunk that begins with element `first`.
__device__ inline int chunk_size(const StepArrays& arrays, int64_t first) {
  return static_cast<int>(arrays.size - first < kChunk ? arrays.size - first : kChunk);
}

/// Hands a chunk of a parameter over to what is done with it, by calls of
///   body.take<N, kCount>(elements, stride, at):
/// `kCount` runs of N elements, `stride` apart, the first one from `elements` on, which is element `at` of the chunk.
/// Runs of more than one element are aligned for load_pack<N>. All loads of a call should come before its stores.
///
/// However the elements lie in memory, a thread gets the same ones in the same order: runs of kVector, kTile apart. So
/// what it adds up has the same bits. Where a chunk is not aligned the loads of a warp overlap in their sectors, and
/// caches make up for it.
template <class Traits, class Body>
__device__ void walk(const StepArrays& arrays, int64_t first, Body& body) {
  constexpr int N = Traits::kVector, kTile = Traits::kTile, kBatch = Traits::kBatch;
  using E = Elements<typename Traits::T, typename Traits::G, typename Traits::M>;
  const E chunk = E(arrays) + first;
  const int count = chunk_size(arrays, first);
  int at = threadIdx.x * N;
  if (chunk.are_aligned()) {
    if constexpr (kBatch > 1) {
      for (; at + (kBatch - 1) * kTile + N <= count; at += kBatch * kTile) {
        body.template take<N, kBatch>(chunk + at, kTile, at);
      }
    }
    for (; at + N <= count; at += kTile) body.template take<N, 1>(chunk + at, kTile, at);
  } else {
    for (; at + N <= count; at += kTile) body.template take<1, N>(chunk + at, 1, at);
  }
  for (; at < count; ++at) body.template take<1, 1>(chunk + at, 1, at);  // of the one run that the end cuts
}

/// The same for one that is not contiguous, with single elements, and for `at` their numbers in a contiguous tensor.
template <class Traits, class Entry, class Body>
__device__ void walk(const StridedEntry<Entry>& entry, int64_t first, Body& body) {
  const int count = chunk_size(entry, first);
  for (int run = threadIdx.x * Traits::kVector; run < count; run += Traits::kTile) {
    for (int at = run; at < run + Traits::kVector && at < count; ++at) {
      const Geometry::Place place = entry.geometry.locate(first + at);
      Elements<typename Traits::T, typename Traits::G, typename Traits::M> elements(entry);
      elements.move(place.at[0], place.at[1], place.at[2]);
      body.template take<1, 1>(elements, 1, place.whole);
    }
  }
}

/// The dtypes that parameters and their moments have together.
struct StepDTypes {
  DType parameter;
  DType moment;
};

constexpr StepDTypes kStepDTypes[] = {
    {DType::float32, DType::float32},   {DType::bfloat16, DType::float32}, {DType::float16, DType::float32},
    {DType::float32, DType::bfloat16},  {DType::bfloat16, DType::bfloat16}, {DType::float16, DType::bfloat16},
    {DType::float64, DType::float64},
};

/// Whether a parameter has these.
inline auto are_of(const StepDTypes& dtypes) {
  return [=](const auto& p) { return p.dtype == dtypes.parameter && p.moment_dtype == dtypes.moment; };
}

/// Launches a kernel over the chunks of parameters, in one form for contiguous ones and in another one for the rest.
template <class Entry, class Shared>
class StepWriter {
 public:
  using Contiguous = Table<Entry, Shared>;
  using Strided = Table<StridedEntry<Entry>, Shared>;

  StepWriter(const char* name, void (*contiguous)(Contiguous), void (*strided)(Strided), int threads,
             size_t shared_bytes, const Stream& stream, const Shared& shared)
      : contiguous_(name, contiguous, threads, shared_bytes, stream, shared),
        strided_(name, strided, threads, shared_bytes, stream, shared) {}

  /// `geometry` is null for a contiguous one.
  void add(const Entry& entry, const Geometry* geometry) {
    if (geometry == nullptr) {
      contiguous_.add(entry, chunks(entry.size));
    } else {
      strided_.add({entry, *geometry}, chunks(entry.size));
    }
  }

  void flush() {
    contiguous_.flush();
    strided_.flush();
  }

 private:
  TableWriter<Contiguous> contiguous_;
  TableWriter<Strided> strided_;
};

}  // namespace fisher_kernels::cuda
