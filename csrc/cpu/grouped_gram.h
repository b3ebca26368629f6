#pragma once

#include <cstdint>

#include "../kernels.h"
#include "convolution.h"
#include "integers.h"
#include "lanes.h"
#include "mini_blocks.h"
#include "parallel.h"
#include "scratch.h"
#include "shares.h"
#include "vector.h"

// The factors of a convolution of many groups of few channels, as depthwise ones are: one group in each lane. A
// register holds an entry of the patches of as many groups, and every product of two entries is one instruction for
// all.
namespace fisher_kernels::FISHER_KERNELS_CAPABILITY {
namespace {

/// T: of x.
template <class T>
class GroupedGram {
  using A = Accumulator<T>;
  static constexpr int64_t kStep = kLanes<A>;
  static constexpr int64_t kRun = 32;  // windows summed before their sum is added to the total

 public:
  explicit GroupedGram(const ConvGram& a)
      : a_(a),
        geometry_(a.depth, a.height, a.width),
        columns_(a.columns()),
        sums_(triangle(columns_) * kStep),
        units_(ceil_div(a.groups, kStep)),
        products_(0.5 * a.samples * geometry_.outputs * columns_ * columns_ * kStep),
        shares_(a.samples, units_, products_, sums_ * static_cast<int64_t>(sizeof(A))) {
    geometry_.widen(kStep);
    channel_ = (geometry_.padded + 1) * kStep;
  }

  void operator()() const {
    const int64_t count = units_ * shares_.count(), copy = a_.channels * channel_, run = kRun * columns_ * kStep;
    const int threads = static_cast<int>(smaller(threads_for_products(products_ * units_, a_.threads), count));
    const LaneScratch<A> scratch((count * sums_ + threads * (copy + run)) / kStep);
    A* const totals = reinterpret_cast<A*>(scratch.data());
    parallel_for(threads, count, [&](int thread, int64_t begin, int64_t end) {
      A* const own = totals + count * sums_ + thread * (copy + run);
      for (int64_t i = 0; i < copy; ++i) own[i] = 0;  // the padding, which no copy overwrites
      for (int64_t i = begin; i < end; ++i) sum(i, own, own + copy, totals + i * sums_);
    });
    parallel_for(threads, units_, [&](int, int64_t begin, int64_t end) {
      for (int64_t unit = begin; unit < end; ++unit) write(unit, totals + unit * shares_.count() * sums_);
    });
  }

 private:
  void sum(int64_t index, A* copy, A* entries, A* totals) const {
    for (int64_t i = 0; i < sums_; ++i) totals[i] = 0;
    const int64_t unit = index / shares_.count(), share = index % shares_.count();
    const int64_t lanes = smaller(kStep, a_.groups - unit * kStep);
    for (int64_t s = shares_.first(share); s < shares_.first(share + 1); ++s) {
      const T* const x = static_cast<const T*>(a_.x.data) + s * a_.x.sample_stride +
                         unit * kStep * a_.channels * a_.x.channel_stride;
      for (int64_t c = 0; c < a_.channels; ++c) {
        copy_lanes<T>({x + c * a_.x.channel_stride, a_.channels * a_.x.channel_stride, a_.x.position_stride}, lanes,
                      geometry_.inputs, geometry_.input_places(), copy + c * channel_);
      }
      for (int64_t l = 0; l < geometry_.outputs; l += kRun) {
        const int64_t count = smaller(kRun, geometry_.outputs - l);
        unfold(copy, geometry_.window_places() + l, count, entries);
        add_run(Run<A>{entries, count, columns_, false}, totals);
      }
    }
  }

  void unfold(const A* copy, const int64_t* windows, int64_t count, A* entries) const {
    for (int64_t l = 0; l < count; ++l) {
      for (int64_t c = 0; c < a_.channels; ++c) {
        const A* const window = copy + c * channel_ + windows[l];
        for (int64_t k = 0; k < geometry_.taps; ++k, entries += kStep) {
          store(entries, load(window + geometry_.tap_places()[k]));
        }
      }
      if (a_.bias) {
        store(entries, Vector<A>{} + A{1});
        entries += kStep;
      }
    }
  }

  /// Adds the shares of the groups of a unit, and averages them into the result.
  void write(int64_t unit, A* totals) const {
    for (int64_t share = 1; share < shares_.count(); ++share) {
      for (int64_t i = 0; i < sums_; i += kStep) store(totals + i, load(totals + i) + load(totals + share * sums_ + i));
    }
    if (a_.bias) {  // by itself
      store(totals + sums_ - kStep, Vector<A>{} + static_cast<A>(a_.samples * geometry_.outputs));
    }
    write_blocks(totals, smaller(kStep, a_.groups - unit * kStep), columns_, static_cast<A>(a_.decay),
                 static_cast<A>(a_.gain), static_cast<A*>(a_.out) + unit * kStep * columns_ * columns_,
                 columns_ * columns_);
  }

  const ConvGram& a_;
  Geometry geometry_;  // of copies, whose positions are kStep numbers
  const int64_t columns_;
  const int64_t sums_;  // of a unit: a triangle in each lane
  const int64_t units_;
  const double products_;  // multiply-adds of a unit
  const Shares shares_;
  int64_t channel_;  // numbers of a channel's copy
};

}  // namespace
}  // namespace fisher_kernels::FISHER_KERNELS_CAPABILITY
