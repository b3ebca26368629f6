#include "kernels.h"
#include "launch.cuh"
#include "rounding.cuh"

// Stochastic rounding of one array: 6 bytes an element, 16 of them a load and 8 a store.
namespace fisher_kernels::cuda {

namespace {

constexpr int kThreads = 256;
constexpr int kVector = kVectorBytes / sizeof(float);  // elements that a thread moves at once
constexpr int kTile = kThreads * kVector;              // elements that a block moves at once
constexpr int kBatch = 4;                              // loads of a thread that are in flight together
constexpr int kChunk = kTile * kBatch;                 // elements of a block

struct Rounding {
  const float* x;
  __nv_bfloat16* out;
  int64_t size;
  RoundingIndex index;
  uint32_t base;
  uint32_t state;
  const float* step;  // or null
  bool aligned;  // x to 16 bytes and out to 8
};

template <bool kLow>
__global__ void __launch_bounds__(kThreads) kernel(const __grid_constant__ Rounding p) {
  const int64_t start = static_cast<int64_t>(blockIdx.x) * kChunk;
  const uint32_t state = p.step == nullptr ? p.state : absorb(p.base, static_cast<uint32_t>(*p.step));
  if (p.aligned && p.size - start >= kChunk) {
    const int64_t first = start + threadIdx.x * kVector;
    Pack<float, kVector> packs[kBatch];
#pragma unroll
    for (int j = 0; j < kBatch; ++j) packs[j] = load_pack<kVector>(p.x + first + j * kTile);
#pragma unroll
    for (int j = 0; j < kBatch; ++j) {
      RandomWalk random = random_walk(p.index, state, first + j * kTile);
      Pack<__nv_bfloat16, kVector> rounded;
#pragma unroll
      for (int k = 0; k < kVector; ++k) rounded.at[k] = round_stochastically<kLow>(packs[j].at[k], random.next());
      store_pack<kVector>(p.out + first + j * kTile, rounded);
    }
    return;
  }
  const int64_t end = p.size - start < kChunk ? p.size : start + kChunk;
  for (int64_t i = start + threadIdx.x; i < end; i += kThreads) {
    p.out[i] = round_stochastically<kLow>(p.x[i], random_walk(p.index, state, i).next());
  }
}

}  // namespace

void stochastic_round(const StochasticRound& a, const Stream& stream) {
  const DeviceGuard guard(stream);
  auto* const out = static_cast<__nv_bfloat16*>(a.out);
  const bool aligned = is_aligned(a.x) && reinterpret_cast<uintptr_t>(out) % (kVector * sizeof(*out)) == 0;
  launch("stochastic_round", a.low ? kernel<true> : kernel<false>,
         static_cast<unsigned>(divide_up<int64_t>(a.size, kChunk)), kThreads, 0, stream,
         Rounding{a.x, out, a.size, a.index, a.base, a.state, a.step, aligned});
}

}  // namespace fisher_kernels::cuda
