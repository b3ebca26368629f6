#pragma once

#include <cstdint>
#include <type_traits>

namespace fisher_kernels::FISHER_KERNELS_CAPABILITY {
namespace {

constexpr int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
constexpr int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

/// a / b rounded up, for a >= 0 and b > 0.
constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

/// Calls body with a value from 1 to kMost as a constant.
template <int kMost, class Body>
void with_constant(int64_t value, const Body& body) {
  if constexpr (kMost > 1) {
    if (value < kMost) return with_constant<kMost - 1>(value, body);
  }
  body(std::integral_constant<int, kMost>{});
}

}  // namespace
}  // namespace fisher_kernels::FISHER_KERNELS_CAPABILITY
