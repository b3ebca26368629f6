#pragma once

// What a warp does on tensor cores. All 32 lanes come, each with its part of every matrix; who has which numbers is as
// the PTX ISA says of mma.m16n8k16 and ldmatrix.
//
// Sums are cut off as tensor cores cut them off. Products are exact. Eight of them and the sum before are aligned to the
// largest of the nine, and of each what lies below the 24 bits of that one is lost; so is what lies below the 24 bits of
// the result. Devices keep bits beyond these and may add 16 at a time: a bound that holds here holds there.

#include <cuda_runtime_api.h>

#include <cstdint>

namespace fisher_kernels::on_host {

/// A lane's part of sums += a * b: a is 16 x 16, b 16 x 8, both in 16 bits, two numbers a register; sums are 16 x 8.
struct MatrixProduct {
  uint32_t a[4];
  uint32_t b[2];
  float sums[4];
};

void multiply_bfloat16(MatrixProduct& mine);
void multiply_float16(MatrixProduct& mine);

/// A lane's part of four 8 x 8 matrices in 16 bits: the row that it reads, its lane / 8-th matrix's lane % 8-th, and
/// what it receives, of each matrix two neighbours in a column.
struct MatrixLoad {
  uint16_t row[8];
  uint32_t columns[4];
};

/// As ldmatrix with .x4.trans.
void transpose_matrices(MatrixLoad& mine);

}  // namespace fisher_kernels::on_host
