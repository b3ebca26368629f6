// Kernels whose results the tests know.

#include <omp.h>

#include "interface.h"

namespace {

template <class T>
__device__ T warp_sum(T value) {
  for (int lanes = warpSize / 2; lanes > 0; lanes /= 2) value += __shfl_down_sync(kAllLanes, value, lanes);
  return value;
}

/// Adds up integers: lanes by shuffles, warps by shared memory, blocks by an atomic.
__global__ void __launch_bounds__(256) sum_kernel(const int* __restrict__ x, int64_t size, unsigned long long* sum) {
  auto* partial = reinterpret_cast<long long*>(shared_memory());
  long long mine = 0;
  const int64_t stride = int64_t{blockDim.x} * gridDim.x;
  for (int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; i < size; i += stride) mine += __ldg(x + i);
  mine = warp_sum(mine);
  if (threadIdx.x % warpSize == 0) partial[threadIdx.x / warpSize] = mine;
  __syncthreads();
  if (threadIdx.x < warpSize) {
    const unsigned warps = blockDim.x / warpSize;
    mine = warp_sum(threadIdx.x < warps ? partial[threadIdx.x] : 0LL);
    if (threadIdx.x == 0) atomicAdd(sum, static_cast<unsigned long long>(mine));
  }
}

/// Counts visits to the cells of a 3-D grid and writes down who came.
__global__ void places_kernel(int* visits, int* places) {
  const dim3 size(gridDim.x * blockDim.x, gridDim.y * blockDim.y, gridDim.z * blockDim.z);
  const unsigned x = blockIdx.x * blockDim.x + threadIdx.x;
  const unsigned y = blockIdx.y * blockDim.y + threadIdx.y;
  const unsigned z = blockIdx.z * blockDim.z + threadIdx.z;
  const unsigned cell = (z * size.y + y) * size.x + x;
  atomicAdd(visits + cell, 1);
  places[3 * cell] = static_cast<int>(x);
  places[3 * cell + 1] = static_cast<int>(y);
  places[3 * cell + 2] = static_cast<int>(z);
}

constexpr int kTableSize = 4000;

struct Table {
  int64_t numbers[kTableSize];  // 32,000 bytes, near the limit of kernel parameters
};

__global__ void table_kernel(const __grid_constant__ Table table, int64_t* out) {
  const int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  if (i < kTableSize) out[i] = table.numbers[i];
}

/// Every kind of shuffle, one row of `out` for each.
template <class T>
__global__ void shuffles_kernel(const T* in, T* out, int operand, int width, unsigned mask) {
  const int i = static_cast<int>(threadIdx.x);
  const int size = static_cast<int>(blockDim.x);
  const T value = in[i];
  out[i] = __shfl_sync(mask, value, operand, width);
  out[size + i] = __shfl_up_sync(mask, value, operand, width);
  out[2 * size + i] = __shfl_down_sync(mask, value, operand, width);
  out[3 * size + i] = __shfl_xor_sync(mask, value, operand, width);
}

/// Every kind of vote, one row of `out` for each.
__global__ void votes_kernel(const int* predicates, unsigned* out) {
  const unsigned i = threadIdx.x;
  const unsigned size = blockDim.x;
  const int mine = predicates[i];
  // The last warp may have fewer lanes.
  const unsigned lanes = min(size - i / warpSize * warpSize, static_cast<unsigned>(warpSize));
  const unsigned mask = kAllLanes >> (warpSize - lanes);
  out[i] = __ballot_sync(mask, mine);
  out[size + i] = __any_sync(mask, mine);
  out[2 * size + i] = __all_sync(mask, mine);
  out[3 * size + i] = __syncthreads_count(mine);
  out[4 * size + i] = __syncthreads_and(mine);
  out[5 * size + i] = __syncthreads_or(mine);
}

/// Two halves of a warp, each at its own meetings.
__global__ void halves_kernel(int* out) {
  int value = static_cast<int>(threadIdx.x);
  if (threadIdx.x < 16) {
    for (int lanes = 8; lanes > 0; lanes /= 2) value += __shfl_xor_sync(0xffffu, value, lanes);
  } else {
    for (int lanes = 8; lanes > 0; lanes /= 2) value = max(value, __shfl_xor_sync(0xffff0000u, value, lanes));
  }
  __syncwarp();
  out[threadIdx.x] = value;
}

__global__ void atomics_kernel(int* cells, unsigned long long* total) {
  const int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  atomicMax(cells, i);
  atomicMin(cells + 1, -i);
  atomicOr(reinterpret_cast<unsigned*>(cells + 2), 1u << (i % 32));
  for (int old = cells[3];;) {
    const int seen = atomicCAS(cells + 3, old, old + 2);
    if (seen == old) break;
    old = seen;
  }
  if (atomicExch(cells + 4, 1) == 0) atomicAdd(cells + 5, 1);
  atomicAdd(total, i);
}

/// Copies shared memory that nobody wrote.
__global__ void unwritten_kernel(unsigned char* out, int bytes) {
  for (int i = static_cast<int>(threadIdx.x); i < bytes; i += static_cast<int>(blockDim.x)) out[i] = shared_memory()[i];
  __syncthreads();
  shared_memory()[threadIdx.x] = 0;
}

}  // namespace

EXPORTED int sum(const int* x, int64_t size, int blocks, int threads, unsigned long long* out) {
  const size_t shared_bytes = threads / 32 * sizeof(long long);
  return launch(sum_kernel, dim3(blocks), dim3(threads), shared_bytes, nullptr, x, size, out);
}

EXPORTED int places(int* visits, int* out) {
  return launch(places_kernel, dim3(3, 2, 2), dim3(5, 3, 4), 0, nullptr, visits, out);
}

EXPORTED int table(const int64_t* numbers, int64_t* out) {
  Table table;
  for (int i = 0; i < kTableSize; ++i) table.numbers[i] = numbers[i];
  return launch(table_kernel, dim3(32), dim3(128), 0, nullptr, table, out);
}

EXPORTED int shuffles_of_32_bits(const float* in, float* out, int threads, int operand, int width, unsigned mask) {
  return launch(shuffles_kernel<float>, dim3(1), dim3(threads), 0, nullptr, in, out, operand, width, mask);
}

EXPORTED int shuffles_of_64_bits(const int64_t* in, int64_t* out, int threads, int operand, int width, unsigned mask) {
  return launch(shuffles_kernel<int64_t>, dim3(1), dim3(threads), 0, nullptr, in, out, operand, width, mask);
}

EXPORTED int votes(const int* predicates, unsigned* out, int threads) {
  return launch(votes_kernel, dim3(1), dim3(threads), 0, nullptr, predicates, out);
}

EXPORTED int halves(int* out) { return launch(halves_kernel, dim3(1), dim3(32), 0, nullptr, out); }

EXPORTED int atomics(int blocks, int threads, int* cells, unsigned long long* total) {
  return launch(atomics_kernel, dim3(blocks), dim3(threads), 0, nullptr, cells, total);
}

EXPORTED int unwritten(unsigned char* out, int bytes, int blocks) {
  return launch(unwritten_kernel, dim3(blocks), dim3(96), bytes, nullptr, out, bytes);
}

/// Threads of the processor that run the blocks.
EXPORTED void set_threads(int threads) { omp_set_num_threads(threads); }

EXPORTED const char* last_message() { return fisher_kernels::on_host::last_message().c_str(); }
