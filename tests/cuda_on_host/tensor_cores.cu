// Tensor cores: a warp's registers in, a warp's registers out.

#include "interface.h"

namespace {

namespace on_host = fisher_kernels::on_host;

__global__ void multiply_kernel(const uint32_t* a, const uint32_t* b, float* sums,
                                void (*multiply)(on_host::MatrixProduct&)) {
  const int lane = static_cast<int>(threadIdx.x);
  on_host::MatrixProduct mine;
  for (int i = 0; i < 4; ++i) mine.a[i] = a[4 * lane + i];
  for (int i = 0; i < 2; ++i) mine.b[i] = b[2 * lane + i];
  for (int i = 0; i < 4; ++i) mine.sums[i] = sums[4 * lane + i];
  multiply(mine);
  for (int i = 0; i < 4; ++i) sums[4 * lane + i] = mine.sums[i];
}

__global__ void transpose_kernel(const uint16_t* rows, uint32_t* out) {
  const int lane = static_cast<int>(threadIdx.x);
  on_host::MatrixLoad mine{};
  for (int i = 0; i < 8; ++i) mine.row[i] = rows[8 * lane + i];
  on_host::transpose_matrices(mine);
  for (int i = 0; i < 4; ++i) out[4 * lane + i] = mine.columns[i];
}

}  // namespace

EXPORTED int multiply_bfloat16(const uint32_t* a, const uint32_t* b, float* sums) {
  return launch(multiply_kernel, dim3(1), dim3(32), 0, nullptr, a, b, sums, &on_host::multiply_bfloat16);
}

EXPORTED int multiply_float16(const uint32_t* a, const uint32_t* b, float* sums) {
  return launch(multiply_kernel, dim3(1), dim3(32), 0, nullptr, a, b, sums, &on_host::multiply_float16);
}

EXPORTED int transpose(const uint16_t* rows, uint32_t* out) {
  return launch(transpose_kernel, dim3(1), dim3(32), 0, nullptr, rows, out);
}
