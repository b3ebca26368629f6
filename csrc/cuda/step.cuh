#pragma once

#include "kernels.h"
#include "reduce.cuh"
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

/// Counts one more step of every parameter, t <- t + 1, unless the step is off; corrections[i] gets 1 - beta^t, skipped
/// zeros. `step_of(i)` is where t of parameter i is, null for none.
template <class StepOf>
void advance(const char* name, int64_t count, StepOf step_of, double beta, const GradientScale& scale,
             double* corrections, int64_t* skipped, const Stream& stream);

namespace advancing {

struct Shared {
  double beta;
  GradientScale scale;
  double* corrections;
  int64_t* skipped;
  int64_t first;  // parameter of the table
};

struct Steps {
  static constexpr int kCapacity = static_cast<int>((kMostParameters - sizeof(Shared) - 8) / sizeof(float*));
  Shared shared;
  float* step[kCapacity];
  int32_t count;
};
static_assert(sizeof(Steps) <= kMostParameters);

constexpr int kThreads = 128;

static __global__ void __launch_bounds__(kThreads) advance(const __grid_constant__ Steps steps) {
  const int i = blockIdx.x * kThreads + threadIdx.x;
  if (i >= steps.count) return;
  const Shared& shared = steps.shared;
  shared.skipped[shared.first + i] = 0;
  if (is_off(shared.scale)) return;
  const float t = *steps.step[i] + 1;
  *steps.step[i] = t;
  shared.corrections[shared.first + i] = 1 - pow(shared.beta, static_cast<double>(t));
}

}  // namespace advancing

template <class StepOf>
void advance(const char* name, int64_t count, StepOf step_of, double beta, const GradientScale& scale,
             double* corrections, int64_t* skipped, const Stream& stream) {
  using namespace advancing;
  const std::unique_ptr<Steps> steps(new Steps);
  for (int64_t first = 0; first < count; first += Steps::kCapacity) {
    steps->shared = {beta, scale, corrections, skipped, first};
    steps->count = static_cast<int32_t>(std::min<int64_t>(count - first, Steps::kCapacity));
    for (int i = 0; i < steps->count; ++i) steps->step[i] = step_of(first + i);
    launch(name, advancing::advance, divide_up(steps->count, kThreads), kThreads, 0, stream, *steps);
  }
}

}  // namespace fisher_kernels::cuda
