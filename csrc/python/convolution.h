#pragma once

#include <cstdint>
#include <vector>

#include "../kernels.h"
#include "tensor.h"

// The arguments that kernels on the inputs of convolutions share.
namespace fisher_kernels {

constexpr int kMostDims = 64;  // as many as torch has
constexpr int kMostSpatial = 3;

enum class Order { channels_first, channels_last };

/// True if the dimensions of x [N, C, *S], all or all but the first, lie without gaps in the order (C, *S) or (*S, C).
bool is_dense(const TensorView& x, int first, Order order);

[[noreturn]] void layout_error(const TensorView& x, const Argument& argument, const char* expected);

/// x [N, C, *S] with positions that are evenly spaced in each sample.
ChannelArray read_channels(const TensorView& x, const Argument& argument);

/// Dimensions that there are not have one position and one window.
struct Windows {
  Window depth;
  Window height;
  Window width;
};

/// Checks the geometry of a convolution over x [N, C, *S]. padding holds (before, after) for each dimension.
Windows read_windows(const Call& call, const TensorView& x, const std::vector<int64_t>& kernel_size,
                     const std::vector<int64_t>& stride, const std::vector<int64_t>& padding,
                     const std::vector<int64_t>& dilation);

}  // namespace fisher_kernels
