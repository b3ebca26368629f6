#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <unordered_map>
#include <vector>

#include "kernels.h"

// Tensors of any strides that are walked element by element: a parameter, its gradient and its moment.
namespace fisher_kernels::cuda {

constexpr int kStridedDims = 6;  // that are left when neighbours in memory are joined
constexpr int kWalked = 3;

/// a / b for numbers of at least 0, most of which are small: a GPU takes 5 times as long for 64 bits.
__device__ inline int64_t quotient(int64_t a, int64_t b) {
  if (((a | b) >> 32) == 0) return static_cast<uint32_t>(a) / static_cast<uint32_t>(b);
  return a / b;
}

/// Where the elements of three tensors of one shape lie. The outermost dimension comes first; those that there are not
/// have size 1.
struct Geometry {
  int64_t sizes[kStridedDims];
  int64_t whole[kStridedDims];  // strides of a contiguous tensor of the same shape
  int64_t strides[kWalked][kStridedDims];

  struct Place {
    int64_t whole;
    int64_t at[kWalked];
  };

  __device__ Place locate(int64_t index) const {
    Place place{0, {0, 0, 0}};
#pragma unroll 1
    for (int d = kStridedDims - 1; d >= 0; --d) {
      if (sizes[d] == 1) continue;
      const int64_t outer = quotient(index, sizes[d]), digit = index - outer * sizes[d];
      index = outer;
      place.whole += digit * whole[d];
#pragma unroll
      for (int k = 0; k < kWalked; ++k) place.at[k] += digit * strides[k][d];
    }
    return place;
  }
};

/// Walks elements in the memory order of the first tensor or, `row_major`, in that of their indices.
inline Geometry make_geometry(const char* function, const StridedArray* const (&tensors)[kWalked], bool row_major) {
  struct Dimension {
    int64_t size;
    int64_t strides[1 + kWalked];  // of a contiguous tensor, then of these
  };
  std::vector<Dimension> dims;
  int64_t whole = 1;
  for (int d = tensors[0]->dims - 1; d >= 0; --d) {
    const int64_t size = tensors[0]->sizes[d];
    if (size != 1) {
      dims.push_back({size, {whole, tensors[0]->strides[d], tensors[1]->strides[d], tensors[2]->strides[d]}});
    }
    whole *= size;
  }
  const auto outer = [&](const Dimension& a, const Dimension& b) {
    if (!row_major && a.strides[1] != b.strides[1]) return a.strides[1] > b.strides[1];
    return a.strides[0] > b.strides[0];
  };
  std::sort(dims.begin(), dims.end(), outer);
  std::vector<Dimension> joined;
  for (const Dimension& dim : dims) {
    bool adjacent = !joined.empty();
    for (int k = 0; adjacent && k <= kWalked; ++k) adjacent = joined.back().strides[k] == dim.size * dim.strides[k];
    if (adjacent) {
      const int64_t size = joined.back().size * dim.size;
      joined.back() = dim;
      joined.back().size = size;
    } else {
      joined.push_back(dim);
    }
  }
  if (joined.size() > kStridedDims) {
    throw std::invalid_argument(std::string(function) + ": a tensor has " + std::to_string(joined.size()) +
                                " dimensions that are not next to each other in memory, expected at most " +
                                std::to_string(kStridedDims) + "; make it contiguous");
  }
  Geometry geometry;
  const int missing = kStridedDims - static_cast<int>(joined.size());
  for (int d = 0; d < kStridedDims; ++d) {
    const Dimension dim = d < missing ? Dimension{1, {0, 0, 0, 0}} : joined[d - missing];
    geometry.sizes[d] = dim.size;
    geometry.whole[d] = dim.strides[0];
    for (int k = 0; k < kWalked; ++k) geometry.strides[k][d] = dim.strides[1 + k];
  }
  return geometry;
}

/// What is walked of a parameter, as the kernels name it: parameter, gradient, moment. One that has two has one twice.
struct WalkedArrays {
  const StridedArray* at[kWalked];

  bool are_contiguous() const { return at[0]->contiguous && at[1]->contiguous && at[2]->contiguous; }
};

template <class Parameter>
WalkedArrays walked(const Parameter& p) {
  return {{&p.parameter, &p.gradient, &p.moment}};
}
inline WalkedArrays walked(const DirectionParameter& p) { return {{&p.parameter, &p.moment, &p.direction}}; }
inline WalkedArrays walked(const CappedParameter& p) { return {{&p.parameter, &p.parameter, &p.direction}}; }

/// The geometries of those parameters of a step that are not contiguous, found before anything is launched: a fault
/// leaves everything as it was.
template <class Parameter>
class Geometries {
 public:
  Geometries(const char* function, const Parameter* parameters, int64_t count, bool row_major) {
    for (int64_t i = 0; i < count; ++i) {
      const WalkedArrays arrays = walked(parameters[i]);
      if (!arrays.are_contiguous()) of_.emplace(i, make_geometry(function, arrays.at, row_major));
    }
  }

  /// Null for one that is contiguous.
  const Geometry* operator[](int64_t i) const {
    const auto found = of_.find(i);
    return found == of_.end() ? nullptr : &found->second;
  }

 private:
  std::unordered_map<int64_t, Geometry> of_;
};

}  // namespace fisher_kernels::cuda
