#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <cstdlib>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "launch.cuh"
#include "types.cuh"

// Matrix products of a warp on tensor cores, from compute capability 8.0 on. All 32 lanes call each function; which
// numbers a lane has is that of the PTX ISA for mma.m16n8k16, and said here at each.
namespace fisher_kernels::cuda {

/// Whether kernels use them on the current device.
inline bool has_tensor_cores() {
  const char* const setting = std::getenv("FISHER_KERNELS_TENSOR_CORES");
  const std::string text = setting == nullptr || *setting == 0 ? "1" : setting;
  if (text != "0" && text != "1") {
    throw std::runtime_error("FISHER_KERNELS_TENSOR_CORES is '" + text + "', expected '0' or '1'");
  }
  int device = 0, major = 0;
  check(cudaGetDevice(&device), "cudaGetDevice");
  check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device), "cudaDeviceGetAttribute");
  return text == "1" && major >= 8;
}

// With g = lane / 4 and t = 2 (lane % 4) a lane has, two numbers in each register,
//   of 16 x 16 numbers a[row][k]:  a[g][t ...], a[g + 8][t ...], a[g][t + 8 ...], a[g + 8][t + 8 ...];
//   of 16 x 8 numbers b[k][column]:  b[t ...][g], b[t + 8 ...][g];
//   of 16 x 8 sums:  sums[g][t], sums[g][t + 1], sums[g + 8][t], sums[g + 8][t + 1].

/// sums += a b, for bfloat16 or float16. Products are exact; of sums less than the last bit of the largest addend is
/// cut off, not rounded.
template <class T>
__device__ inline void multiply_add(float (&sums)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  static_assert(std::is_same_v<T, __nv_bfloat16> || std::is_same_v<T, __half>);
#ifdef FISHER_KERNELS_CUDA_ON_HOST
  on_host::MatrixProduct product{{a[0], a[1], a[2], a[3]}, {b0, b1}, {sums[0], sums[1], sums[2], sums[3]}};
  std::is_same_v<T, __half> ? on_host::multiply_float16(product) : on_host::multiply_bfloat16(product);
  for (int i = 0; i < 4; ++i) sums[i] = product.sums[i];
#else
  if constexpr (std::is_same_v<T, __half>) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  } else {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
#endif
}

/// Reads four 8 x 8 matrices of 16 bits from shared memory, transposed. `row` is an address of 16 bytes: that of row
/// lane % 8 of matrix lane / 8. A lane receives rows t and t + 1 of column g of each.
__device__ inline void load_transposed(uint32_t (&to)[4], const void* row) {
#ifdef FISHER_KERNELS_CUDA_ON_HOST
  struct alignas(16) Row {
    uint16_t at[8];
  };
  const Row read = *static_cast<const Row*>(row);
  on_host::MatrixLoad load{};
  for (int i = 0; i < 8; ++i) load.row[i] = read.at[i];
  on_host::transpose_matrices(load);
  for (int i = 0; i < 4; ++i) to[i] = load.columns[i];
#else
  const auto from = static_cast<unsigned>(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(from)
               : "memory");
#endif
}

}  // namespace fisher_kernels::cuda
