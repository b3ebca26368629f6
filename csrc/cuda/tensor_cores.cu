#include <cstdint>
#include <cstring>

#include "kernels.h"
#include "mma.cuh"

// Whether tensor cores do what mma.cuh says: every place of every matrix is looked at, by numbers that are exact and tell
// where they come from. Kernels rely on it, and a processor has nothing but a model of it.
namespace fisher_kernels::cuda {

namespace {

constexpr const char* kName = "probe_tensor_cores";
constexpr int kRows = 16, kColumns = 8, kDepth = 16;

/// The number at b[k][column]: 1 to 128, which 8 bits hold.
__device__ int number_of(int k, int column) { return k * kColumns + column + 1; }

/// Numbers that one lane has wrong of four matrices that were read transposed.
__device__ int64_t probe_load(uint16_t (&matrix)[kDepth][kRows]) {
  const int lane = threadIdx.x, group = lane / 4, pair = lane % 4 * 2;
  for (int i = lane; i < kDepth * kRows; i += kWarp) matrix[i / kRows][i % kRows] = static_cast<uint16_t>(0x4100 + i);
  __syncwarp();
  uint32_t found[4];
  load_transposed(found, &matrix[lane % 8 + lane / 16 * 8][lane / 8 % 2 * 8]);
  int64_t wrong = 0;
  for (int m = 0; m < 4; ++m) {
    for (int i = 0; i < 2; ++i) {
      const int k = m / 2 * 8 + pair + i, row = m % 2 * 8 + group;
      wrong += (found[m] >> 16 * i & 0xffff) != static_cast<uint32_t>(0x4100 + k * kRows + row);
    }
  }
  return wrong;
}

template <class T>
__device__ uint32_t pair_of(float low, float high) {
  const Pack<T, 2> pair{{narrow<T>(low), narrow<T>(high)}};
  uint32_t bits;
  memcpy(&bits, &pair, sizeof(bits));
  return bits;
}

/// Numbers that one lane has wrong of sums + a b, for each a that has a single 1.
template <class T>
__device__ int64_t probe_product() {
  const int lane = threadIdx.x, group = lane / 4, pair = lane % 4 * 2;
  uint32_t b[2];
  for (int r = 0; r < 2; ++r) {
    const int k = r * 8 + pair;
    b[r] = pair_of<T>(static_cast<float>(number_of(k, group)), static_cast<float>(number_of(k + 1, group)));
  }
  int64_t wrong = 0;
  for (int one = 0; one < kRows * kDepth; ++one) {
    uint32_t a[4];
    for (int r = 0; r < 4; ++r) {
      const int place = (r % 2 * 8 + group) * kDepth + r / 2 * 8 + pair;
      a[r] = pair_of<T>(place == one ? 1.0f : 0.0f, place + 1 == one ? 1.0f : 0.0f);
    }
    float sums[4], expected[4];
    for (int i = 0; i < 4; ++i) {
      const int row = group + i / 2 * 8, column = pair + i % 2;
      sums[i] = static_cast<float>(1000 * (row * kColumns + column));
      expected[i] = sums[i] + static_cast<float>(row == one / kDepth ? number_of(one % kDepth, column) : 0);
    }
    multiply_add<T>(sums, a, b[0], b[1]);
    for (int i = 0; i < 4; ++i) wrong += sums[i] != expected[i];
  }
  return wrong;
}

__device__ int64_t warp_sum(int64_t value) {
  for (int distance = kWarp / 2; distance > 0; distance /= 2) value += __shfl_xor_sync(kAllLanes, value, distance);
  return value;
}

__global__ void __launch_bounds__(kWarp) probe_kernel(int64_t* wrong) {
  struct Memory {
    alignas(kVectorBytes) uint16_t matrix[kDepth][kRows];
  };
  const int64_t found[] = {warp_sum(probe_load(shared_memory<Memory>().matrix)),
                           warp_sum(probe_product<__nv_bfloat16>()), warp_sum(probe_product<__half>())};
  for (int i = 0; i < TensorCoreProbe::kProbes; ++i) {
    if (threadIdx.x == 0) wrong[i] = found[i];
  }
}

}  // namespace

void probe_tensor_cores(const TensorCoreProbe& a, const Stream& stream) {
  const DeviceGuard guard(stream);
  launch(kName, probe_kernel, 1, kWarp, kDepth * kRows * sizeof(uint16_t), stream, a.wrong);
}

}  // namespace fisher_kernels::cuda
