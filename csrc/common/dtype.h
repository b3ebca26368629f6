#pragma once

#include <cstdint>

namespace fisher_kernels {

enum class DType : uint8_t {
  float32,
  float64,
  bfloat16,
  float16,
  int64,
};

constexpr const char* name(DType dtype) {
  switch (dtype) {
    case DType::float32: return "float32";
    case DType::float64: return "float64";
    case DType::bfloat16: return "bfloat16";
    case DType::float16: return "float16";
    case DType::int64: return "int64";
  }
  return "unknown";
}

/// Bytes of one element.
constexpr int64_t size_of(DType dtype) {
  switch (dtype) {
    case DType::float32: return 4;
    case DType::float64: return 8;
    case DType::bfloat16: return 2;
    case DType::float16: return 2;
    case DType::int64: return 8;
  }
  return 0;
}

/// The type in which values of `dtype` are summed, averaged and kept as state.
constexpr DType accumulation_dtype(DType dtype) { return dtype == DType::float64 ? DType::float64 : DType::float32; }

}  // namespace fisher_kernels
