#pragma once

#include <cstdint>

#include "../kernels.h"
#include "integers.h"
#include "lanes.h"
#include "scratch.h"
#include "vector.h"

// The input of a convolution as kernels copy it: with its padding, and channels side by side in lanes.
namespace fisher_kernels::FISHER_KERNELS_CAPABILITY {
namespace {

/// Tables of where things lie in a copy of the padded input that holds no more than the windows read.
class Geometry {
 public:
  Geometry(const Window& depth, const Window& height, const Window& width)
      : inputs(depth.size * height.size * width.size),
        outputs(depth.outputs * height.outputs * width.outputs),
        taps(depth.kernel * height.kernel * width.kernel),
        plane(reach(height) * reach(width)),
        line(reach(width)),
        padded(outputs == 0 ? 0 : reach(depth) * plane),
        memory_(inputs + outputs + taps) {
    int64_t* place = memory_.data();
    const auto fill = [&](int64_t depths, int64_t heights, int64_t widths, const auto& at) {
      for (int64_t d = 0; d < depths; ++d) {
        for (int64_t h = 0; h < heights; ++h) {
          for (int64_t w = 0; w < widths; ++w) *place++ = at(d, h, w);
        }
      }
    };
    const auto is_read = [](const Window& window, int64_t i) { return i + window.before < reach(window); };
    fill(depth.size, height.size, width.size, [&](int64_t d, int64_t h, int64_t w) {
      if (outputs == 0 || !(is_read(depth, d) && is_read(height, h) && is_read(width, w))) return padded;
      return (d + depth.before) * plane + (h + height.before) * line + w + width.before;
    });
    fill(depth.outputs, height.outputs, width.outputs, [&](int64_t d, int64_t h, int64_t w) {
      return d * depth.stride * plane + h * height.stride * line + w * width.stride;
    });
    fill(depth.kernel, height.kernel, width.kernel, [&](int64_t d, int64_t h, int64_t w) {
      return d * depth.dilation * plane + h * height.dilation * line + w * width.dilation;
    });
  }

  /// Numbers side by side at each position.
  void widen(int64_t lanes) {
    for (int64_t i = 0; i < inputs + outputs + taps; ++i) memory_.data()[i] *= lanes;
  }

  const int64_t* input_places() const { return memory_.data(); }
  const int64_t* window_places() const { return memory_.data() + inputs; }
  const int64_t* tap_places() const { return memory_.data() + inputs + outputs; }

  const int64_t inputs;
  const int64_t outputs;
  const int64_t taps;
  const int64_t plane;  // positions of the copy
  const int64_t line;
  const int64_t padded;  // and the place of what no window reads

 private:
  static int64_t reach(const Window& window) {
    return (window.outputs - 1) * window.stride + (window.kernel - 1) * window.dilation + 1;
  }

  Scratch<int64_t> memory_;
};

/// Channels of one sample.
template <class T>
struct Channels {
  const T* data;
  int64_t lane_stride;
  int64_t position_stride;
};

/// to[places[p] + lane] = x[lane, p], and zeros in lanes that x does not have. Null places are p * kLanes.
template <class T>
void copy_lanes(const Channels<T>& x, int64_t lanes, int64_t positions, const int64_t* places, Accumulator<T>* to) {
  using A = Accumulator<T>;
  constexpr int64_t kStep = kLanes<T>;
  const auto place = [&](int64_t p) { return to + (places ? places[p] : p * kStep); };
  if (x.position_stride == 1 && positions >= kStep) {
    for (int64_t next = 0; next < positions; next += kStep) {
      const int64_t first = smaller(next, positions - kStep);  // the last square overlaps the one before
      Vector<A> square[kStep];
#pragma GCC unroll 16
      for (int64_t lane = 0; lane < kStep; ++lane) {
        square[lane] = lane < lanes ? load(x.data + lane * x.lane_stride + first) : Vector<A>{};
      }
      transpose<A>(square);
#pragma GCC unroll 16
      for (int64_t p = 0; p < kStep; ++p) store(place(first + p), square[p]);
    }
  } else if (x.lane_stride == 1 && lanes == kStep) {
    for (int64_t p = 0; p < positions; ++p) store(place(p), load(x.data + p * x.position_stride));
  } else {
    for (int64_t p = 0; p < positions; ++p) {
      A* const values = place(p);
      for (int64_t lane = 0; lane < kStep; ++lane) {
        values[lane] = lane < lanes ? widen(x.data[lane * x.lane_stride + p * x.position_stride]) : A{0};
      }
    }
  }
}

}  // namespace
}  // namespace fisher_kernels::FISHER_KERNELS_CAPABILITY
