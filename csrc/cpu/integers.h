#pragma once

#include <cstdint>

namespace fisher_kernels::FISHER_KERNELS_CAPABILITY {
namespace {

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

/// a / b rounded up, for a >= 0 and b > 0.
inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace
}  // namespace fisher_kernels::FISHER_KERNELS_CAPABILITY
