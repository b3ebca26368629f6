#include "tensor_cores.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>
#include <cmath>

#include "running.h"

namespace fisher_kernels::on_host {

namespace {

constexpr int kRows = 16, kColumns = 8, kDepth = 16;
constexpr int kAddends = 8;  // products that are added at once
constexpr int kBits = 24;    // that are kept below and with the highest of the largest addend

float widen(const __nv_bfloat16*, unsigned short bits) { return __bfloat162float(__ushort_as_bfloat16(bits)); }
float widen(const __half*, unsigned short bits) { return __half2float(__ushort_as_half(bits)); }

/// The float next to x towards 0.
float cut_off(double x) {
  const auto near = static_cast<float>(x);
  const bool is_over = std::isfinite(near) && std::abs(static_cast<double>(near)) > std::abs(x);
  return is_over ? std::nextafterf(near, 0.0f) : near;
}

float add_aligned(float sum, const double* products) {
  double largest = std::abs(static_cast<double>(sum)), plain = sum;
  for (int i = 0; i < kAddends; ++i) {
    largest = std::max(largest, std::abs(products[i]));
    plain += products[i];
  }
  if (!std::isfinite(plain)) return static_cast<float>(plain);
  if (largest == 0) return sum;
  const int exponent = std::max(std::ilogb(largest) - (kBits - 1), -149);  // of the last bit that is kept
  const double unit = std::ldexp(1.0, exponent), inverse = std::ldexp(1.0, -exponent);
  auto total = static_cast<int64_t>(sum * inverse);
  for (int i = 0; i < kAddends; ++i) total += static_cast<int64_t>(products[i] * inverse);
  return cut_off(static_cast<double>(total) * unit);
}

/// One of the two numbers of a register.
template <class T>
float number(uint32_t pair, int which) {
  return widen(static_cast<T*>(nullptr), static_cast<unsigned short>(pair >> 16 * which));
}

template <class T>
void multiply(void* const (&lanes)[kWarpSize]) {
  double a[kRows][kDepth], b[kColumns][kDepth];
  for (int lane = 0; lane < kWarpSize; ++lane) {
    const auto& part = *static_cast<const MatrixProduct*>(lanes[lane]);
    const int group = lane / 4, pair = lane % 4 * 2;
    for (int i = 0; i < 2; ++i) {
      for (int r = 0; r < 4; ++r) a[group + r % 2 * 8][pair + i + r / 2 * 8] = number<T>(part.a[r], i);
      for (int r = 0; r < 2; ++r) b[group][pair + i + r * 8] = number<T>(part.b[r], i);
    }
  }
  for (int lane = 0; lane < kWarpSize; ++lane) {
    auto& part = *static_cast<MatrixProduct*>(lanes[lane]);
    for (int i = 0; i < 4; ++i) {
      const double* const row = a[lane / 4 + i / 2 * 8];
      const double* const column = b[lane % 4 * 2 + i % 2];
      double products[kDepth];
      for (int k = 0; k < kDepth; ++k) products[k] = row[k] * column[k];
      for (int k = 0; k < kDepth; k += kAddends) part.sums[i] = add_aligned(part.sums[i], products + k);
    }
  }
}

void transpose(void* const (&lanes)[kWarpSize]) {
  const auto part = [&](int lane) -> MatrixLoad& { return *static_cast<MatrixLoad*>(lanes[lane]); };
  for (int lane = 0; lane < kWarpSize; ++lane) {
    for (int matrix = 0; matrix < 4; ++matrix) {
      const int row = 8 * matrix + lane % 4 * 2, column = lane / 4;
      part(lane).columns[matrix] = part(row).row[column] | static_cast<uint32_t>(part(row + 1).row[column]) << 16;
    }
  }
}

void meet(Meeting meeting, WarpWork work, void* mine) {
  meet_warp({meeting, 0, kWarpSize, ~uint32_t{0}, 0, reinterpret_cast<uint64_t>(mine), work});
}

}  // namespace

void multiply_bfloat16(MatrixProduct& mine) { meet(Meeting::multiply_matrices, &multiply<__nv_bfloat16>, &mine); }
void multiply_float16(MatrixProduct& mine) { meet(Meeting::multiply_matrices, &multiply<__half>, &mine); }
void transpose_matrices(MatrixLoad& mine) { meet(Meeting::load_matrices, &transpose, &mine); }

}  // namespace fisher_kernels::on_host
