#pragma once

#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <string>

#include "kernels.h"
#include "types.cuh"

// Where the windows of a convolution read its input. Where a window begins and how far into it a kernel offset reads
// are tables, and their sum says where to read and whether that is inside: strides, dilation, padding and dimensions
// cost three additions and three comparisons a number.
namespace fisher_kernels::cuda {

constexpr int kSpatial = 3;
constexpr int64_t kFarthest = 1 << 29;         // a coordinate in the padded input
constexpr uint32_t kNowhere = 2u * kFarthest;  // a coordinate that is outside whatever is added to it
constexpr int64_t kSparePositions = 1024;      // by which the number of positions is below 2^31

/// Coordinates, and the distance in elements to what they say. All arithmetic is modulo 2^32: where windows begin may
/// be negative, where they are read inside never is.
struct alignas(16) Place {
  uint32_t at[kSpatial];
  uint32_t offset;
};

struct Convolution {
  uint32_t x_position;  // the stride of positions
  int32_t n;            // offsets of the kernel
  int32_t positions;    // of the output
  int32_t size[kSpatial];
  int32_t outputs[kSpatial];
  int32_t kernel[kSpatial];
  int32_t stride[kSpatial];
  int32_t dilation[kSpatial];
  int32_t before[kSpatial];

  /// Distance of coordinates from the first position.
  __device__ uint32_t distance(const uint32_t (&at)[kSpatial]) const {
    return ((at[0] * size[1] + at[1]) * size[2] + at[2]) * x_position;
  }

  /// Where the window of an output position begins.
  __device__ Place window(int32_t position) const {
    if (position >= positions) return {{kNowhere, 0, 0}, 0};
    const int32_t row = position / outputs[2];
    const int32_t o[kSpatial] = {row / outputs[1], row % outputs[1], position % outputs[2]};
    Place place;
#pragma unroll
    for (int d = 0; d < kSpatial; ++d) place.at[d] = static_cast<uint32_t>(o[d] * stride[d] - before[d]);
    place.offset = distance(place.at);
    return place;
  }

  /// How far into a window a kernel offset reads.
  __device__ Place into(int32_t k) const {
    const int32_t row = k / kernel[2];
    const int32_t o[kSpatial] = {row / kernel[1], row % kernel[1], k % kernel[2]};
    Place place;
#pragma unroll
    for (int d = 0; d < kSpatial; ++d) place.at[d] = static_cast<uint32_t>(o[d] * dilation[d]);
    place.offset = distance(place.at);
    return place;
  }

  /// What a kernel offset reads of x through a window: 0 outside.
  template <class T>
  __device__ T read(const T* from, const Place& window, const Place& into) const {
    bool inside = true;
#pragma unroll
    for (int d = 0; d < kSpatial; ++d) inside = inside && window.at[d] + into.at[d] < static_cast<uint32_t>(size[d]);
    return inside ? from[window.offset + into.offset] : narrow<T>(0);
  }
};

/// A size that kernels keep in 32 bits.
inline int32_t narrow_size(const char* name, int64_t size, const char* what, int64_t most = 0x7fffffff) {
  if (size <= most) return static_cast<int32_t>(size);
  throw std::runtime_error(std::string(name) + ": " + what + " is " + std::to_string(size) + ", expected at most " +
                           std::to_string(most) + " on a GPU");
}

/// Describes a convolution over an input whose positions are so far apart.
inline void fill_geometry(const char* name, const Window& depth, const Window& height, const Window& width,
                          int64_t position_stride, Convolution& convolution) {
  const Window windows[kSpatial] = {depth, height, width};
  int64_t n = 1, positions = 1;
  for (int d = 0; d < kSpatial; ++d) {
    const Window& window = windows[d];
    const int64_t last = window.outputs * window.stride + window.kernel * window.dilation;
    const int64_t farthest = std::max({last, window.size, window.before}) + window.before;
    narrow_size(name, farthest, "a padded dimension", kFarthest - 1);
    convolution.size[d] = static_cast<int32_t>(window.size);
    convolution.outputs[d] = static_cast<int32_t>(window.outputs);
    convolution.kernel[d] = static_cast<int32_t>(window.kernel);
    convolution.stride[d] = static_cast<int32_t>(window.stride);
    convolution.dilation[d] = static_cast<int32_t>(window.dilation);
    convolution.before[d] = static_cast<int32_t>(window.before);
    n *= window.kernel;
    positions *= window.outputs;
  }
  convolution.x_position = static_cast<uint32_t>(position_stride);
  convolution.n = narrow_size(name, n, "the size of the kernel");
  convolution.positions =
      narrow_size(name, positions, "the number of output positions", 0x7fffffff - kSparePositions);
}

}  // namespace fisher_kernels::cuda
