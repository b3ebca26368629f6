#pragma once

#include <cstdint>

#include "../kernels.h"
#include "convolution.h"
#include "integers.h"
#include "lanes.h"
#include "panels.h"
#include "parallel.h"
#include "scratch.h"
#include "shares.h"
#include "vector.h"

// The factor of a convolution of few channels: some windows at a time are unfolded into panels, which stay in the
// first-level caches, and tiles of the lower triangle are summed from them. A unit of work is a share of the samples
// by a group; what it is depends on the shape alone.
namespace fisher_kernels::FISHER_KERNELS_CAPABILITY {
namespace {

/// T: of x.
template <class T>
class UnfoldedGram {
  using A = Accumulator<T>;
  static constexpr int64_t kRun = 64;  // windows unfolded at a time, and summed in registers

 public:
  explicit UnfoldedGram(const ConvGram& a)
      : a_(a),
        geometry_(a.depth, a.height, a.width),
        columns_(a.columns()),
        real_(columns_ - (a.bias ? 1 : 0)),
        panels_(ceil_div(columns_, kWidth<A>)),
        padded_(panels_ * kWidth<A>),
        products_(0.5 * a.samples * geometry_.outputs * padded_ * padded_),
        shares_(a.samples, a.groups, products_, padded_ * padded_ * static_cast<int64_t>(sizeof(A))),
        offsets_(real_) {
    for (int64_t i = 0; i < real_; ++i) {
      offsets_.data()[i] = i / geometry_.taps * (geometry_.padded + 1) + geometry_.tap_places()[i % geometry_.taps];
    }
  }

  void operator()() const {
    const int64_t units = a_.groups * shares_.count(), size = padded_ * padded_;
    const int threads = static_cast<int>(smaller(threads_for_products(products_ * a_.groups, a_.threads), units));
    const int64_t copy = a_.channels * (geometry_.padded + 1), panels = kRun * padded_;
    const int64_t of_thread = ceil_div(copy + panels, kLanes<A>) * kLanes<A>;
    const Scratch<A> scratch(units * size + threads * of_thread + kLanes<A>);
    A* const totals = align(scratch.data());
    parallel_for(threads, units, [&](int thread, int64_t begin, int64_t end) {
      A* const own = totals + units * size + thread * of_thread;
      for (int64_t i = 0; i < copy; ++i) own[panels + i] = 0;  // the padding, which no copy overwrites
      for (int64_t unit = begin; unit < end; ++unit) sum(unit, own, own + panels, totals + unit * size);
    });
    const int64_t rows = a_.groups * columns_;
    const int64_t numbers = rows * columns_ * shares_.count();
    parallel_for(useful_threads(numbers, a_.threads), rows, [&](int, int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) write(row / columns_, row % columns_, totals);
    });
  }

 private:
  /// Where the total of an entry lies, in the panel of its column.
  int64_t place(int64_t row, int64_t column) const {
    return (column / kWidth<A> * padded_ + row) * kWidth<A> + column % kWidth<A>;
  }

  void sum(int64_t unit, A* panels, A* copy, A* totals) const {
    for (int64_t i = 0; i < padded_ * padded_; ++i) totals[i] = 0;
    const int64_t group = unit / shares_.count(), share = unit % shares_.count();
    int64_t rows = 0;
    for (int64_t s = shares_.first(share); s < shares_.first(share + 1); ++s) {
      const T* x = static_cast<const T*>(a_.x.data) + s * a_.x.sample_stride +
                   group * a_.channels * a_.x.channel_stride;
      A* to = copy;
      for (int64_t c = 0; c < a_.channels; ++c, x += a_.x.channel_stride, to += geometry_.padded + 1) {
        for (int64_t p = 0; p < geometry_.inputs; ++p) {
          to[geometry_.input_places()[p]] = widen(x[p * a_.x.position_stride]);
        }
      }
      for (int64_t l = 0; l < geometry_.outputs;) {
        const int64_t count = smaller(kRun - rows, geometry_.outputs - l);
        unfold(copy, l, count, panels + rows * kWidth<A>);
        rows += count;
        l += count;
        if (rows == kRun) {
          multiply(panels, rows, totals);
          rows = 0;
        }
      }
    }
    if (rows > 0) multiply(panels, rows, totals);
  }

  /// What stands in columns that read nothing: the bias, and those that fill the last panel.
  A fill(int64_t column) const { return column < columns_ ? A{1} : A{0}; }

  /// Writes some windows as rows of all panels.
  void unfold(const A* copy, int64_t first, int64_t count, A* panels) const {
    constexpr int64_t kStep = kLanes<A>;
    const int64_t* const windows = geometry_.window_places() + first;
    for (int64_t column = 0; column < padded_; column += kStep) {
      A* const to = panels + column / kWidth<A> * (kRun * kWidth<A>) + column % kWidth<A>;
      const int64_t* const offsets = offsets_.data() + column;
      int64_t l = 0;
      while (l < count) {
        if (l + kStep <= count && windows[l + kStep - 1] - windows[l] == kStep - 1) {  // neighbours in the copy
          Vector<A> square[kStep];
#pragma GCC unroll 16
          for (int64_t i = 0; i < kStep; ++i) {
            square[i] = column + i < real_ ? load(copy + offsets[i] + windows[l]) : Vector<A>{} + fill(column + i);
          }
          transpose<A>(square);
#pragma GCC unroll 16
          for (int64_t i = 0; i < kStep; ++i) store(to + (l + i) * kWidth<A>, square[i]);
          l += kStep;
          continue;
        }
        A* const row = to + l * kWidth<A>;
        for (int64_t i = 0; i < kStep; ++i) {
          row[i] = column + i < real_ ? copy[offsets[i] + windows[l]] : fill(column + i);
        }
        ++l;
      }
    }
  }

  void multiply(const A* panels, int64_t rows, A* totals) const {
    constexpr int64_t kSize = kRun * kWidth<A>;
    for (int64_t right = 0; right < panels_; ++right) {
      for (int64_t row = right * kWidth<A>; row < columns_; row += kTileRows) {
        add_products(panels + row / kWidth<A> * kSize + row % kWidth<A>, panels + right * kSize, rows,
                     totals + (right * padded_ + row) * kWidth<A>);
      }
    }
  }

  /// Averages a row of the lower triangle of a group, and its mirror image.
  void write(int64_t group, int64_t row, const A* totals) const {
    const A decay = static_cast<A>(a_.decay), gain = static_cast<A>(a_.gain);
    const int64_t size = padded_ * padded_;
    A* const out = static_cast<A*>(a_.out) + group * columns_ * columns_;
    totals += group * shares_.count() * size;
    for (int64_t column = 0; column <= row; ++column) {
      A sum = 0;
      for (int64_t share = 0; share < shares_.count(); ++share) sum += totals[share * size + place(row, column)];
      if (column == real_) sum = static_cast<A>(a_.samples * geometry_.outputs);  // of the bias with itself
      A value = gain * sum;
      if (decay != 0) value += decay * out[row * columns_ + column];
      out[row * columns_ + column] = out[column * columns_ + row] = value;
    }
  }

  const ConvGram& a_;
  const Geometry geometry_;
  const int64_t columns_;
  const int64_t real_;  // without the bias
  const int64_t panels_;
  const int64_t padded_;           // columns of all panels
  const double products_;          // multiply-adds of a group
  const Shares shares_;
  const Scratch<int64_t> offsets_;  // where columns read in the copy of a window's sample
};

}  // namespace
}  // namespace fisher_kernels::FISHER_KERNELS_CAPABILITY
