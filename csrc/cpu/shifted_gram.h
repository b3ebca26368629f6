#pragma once

#include <cstdint>

#include "../kernels.h"
#include "convolution.h"
#include "integers.h"
#include "panels.h"
#include "parallel.h"
#include "scratch.h"
#include "vector.h"

// The factor of a convolution of many channels, without unfolding: the padded input is copied once, channels side by
// side, and an entry of the result is a product of the copy with itself, shifted from one kernel offset to another.
//
// The entry of offsets a and b is a sum over windows l of x[l + a] x[l + b]. That of a + 1 and b + 1 is the same sum
// over windows that are moved by one, so that most of its products are the same. All pairs of offsets which are equally
// far apart form a class: the windows of all of its members are cut where those of one of them begin or end, each piece
// is summed once, and the sum is added to every member that has it. Nothing is ever subtracted: each entry is the sum
// of its own products. For a 3 x 3 kernel this leaves 25 of 81 products, apart from the borders.
namespace fisher_kernels::FISHER_KERNELS_CAPABILITY {
namespace {

inline int64_t greatest_divisor(int64_t a, int64_t b) { return b == 0 ? a : greatest_divisor(b, a % b); }

/// A range of windows, or of members of a class.
struct Range {
  int64_t first;
  int64_t last;

  int64_t size() const { return last - first; }
};

/// The pairs of kernel offsets along one dimension, in classes of those that read the same products: members are
/// `period` offsets apart and read through windows `shift` further on.
class Pairs {
 public:
  struct Class {
    int64_t left;  // offsets of the first member
    int64_t right;
    int64_t members;
  };

  explicit Pairs(const Window& window)
      : period(window.stride / greatest_divisor(window.stride, window.dilation)),
        shift(window.dilation / greatest_divisor(window.stride, window.dilation)),
        kernel_(window.kernel),
        outputs_(window.outputs) {}

  int64_t classes() const {
    const int64_t first = smaller(period, kernel_);  // the smaller offset is below
    return first * (2 * kernel_ - first);
  }

  Class at(int64_t index) const {
    int64_t smallest = 0;  // with each smaller offset: the pair of it with itself, then those with a larger one
    for (;; ++smallest) {
      const int64_t count = 2 * (kernel_ - smallest) - 1;
      if (index < count) break;
      index -= count;
    }
    const int64_t largest = smallest + (index + 1) / 2, members = (kernel_ - 1 - largest) / period + 1;
    return index % 2 == 0 ? Class{largest, smallest, members} : Class{smallest, largest, members};
  }

  /// Pieces of a class.
  int64_t pieces(const Class& c) const { return 2 * c.members - 1; }

  /// The windows of a piece, as the first member counts them: between neighbouring ends, in order.
  Range windows(const Class& c, int64_t piece) const { return {cut(c, piece), cut(c, piece + 1)}; }

  /// The members that have these windows.
  Range members(const Class& c, const Range& windows) const {
    const int64_t last = windows.first / shift + 1, behind = windows.last - outputs_;
    return {behind > 0 ? ceil_div(behind, shift) : 0, smaller(last, c.members)};
  }

  /// Windows of all pieces of all classes.
  double work() const {
    double sum = 0;
    for (int64_t smallest = 0; smallest < smaller(period, kernel_); ++smallest) {
      for (int64_t largest = smallest; largest < kernel_; ++largest) {
        const int64_t more = (kernel_ - 1 - largest) / period;  // members but the first
        sum += (largest == smallest ? 1.0 : 2.0) * (outputs_ + more * smaller(shift, outputs_));
      }
    }
    return sum;
  }

  const int64_t period;
  const int64_t shift;

 private:
  /// Where members begin and end, in order: 0, shift, ... and outputs, outputs + shift, ..., merged.
  int64_t cut(const Class& c, int64_t index) const {
    // The first `before` beginnings come before the first end, and behind it they take turns with the ends.
    const int64_t before = smaller(c.members, ceil_div(outputs_, shift));
    if (index < before) return index * shift;
    const int64_t turn = index - before, both = 2 * (c.members - before);
    if (turn < both) return turn % 2 == 0 ? outputs_ + turn / 2 * shift : (before + turn / 2) * shift;
    return outputs_ + (turn - (c.members - before)) * shift;
  }

  const int64_t kernel_;
  const int64_t outputs_;
};

/// kRegisters: of a panel's width.
template <class A, int kRegisters>
class ShiftedGram {
  static constexpr int64_t kStep = kLanes<A>;
  static constexpr int64_t kWide = kRegisters * kStep;  // channels of a panel
  static constexpr int kRows = kRegisters == 2 ? kTileRows : 2 * kTileRows < kStep ? 2 * kTileRows : kStep;
  static constexpr int64_t kSquare = kWide * kWide;
  static constexpr int64_t kRun = 128;             // windows summed in registers
  static constexpr int64_t kPanelBytes = 1 << 17;  // of the samples that are copied at a time, unless one has more

 public:
  /// products: multiply-adds in all.
  ShiftedGram(const ConvGram& a, double products)
      : a_(a),
        geometry_(a.depth, a.height, a.width),
        depth_(a.depth),
        height_(a.height),
        width_(a.width),
        n_(geometry_.taps),
        classes_(depth_.classes() * height_.classes() * width_.classes()),
        panels_(ceil_div(a.channels, kWide)),
        pairs_(panels_ * (panels_ + 1) / 2) {
    geometry_.widen(kWide);
    sample_ = (geometry_.padded + 1) * kWide;
    block_ = larger(1, smaller(a.samples, kPanelBytes / (sample_ * static_cast<int64_t>(sizeof(A)))));
    panel_ = block_ * sample_;
    threads_ = threads_for_products(products, a.threads);
  }

  template <class T>
  void run() const {
    const int64_t copies = a_.groups * panels_ * panel_, totals = a_.groups * pairs_ * n_ * n_ * kSquare;
    const int64_t biases = a_.bias ? a_.groups * panels_ * n_ * kWide : 0;
    const Scratch<A> scratch(copies + totals + biases + kStep);
    Work work;
    work.copies = align(scratch.data());
    work.totals = work.copies + copies;
    work.biases = work.totals + totals;
    const int64_t units = pairs_ * classes_ + (a_.bias ? panels_ : 0);
    for (int64_t first = 0; first == 0 || first < a_.samples; first += block_) {
      work.first = first;
      work.samples = smaller(block_, a_.samples - first);
      const int64_t rows = a_.groups * panels_ * work.samples;
      parallel_for(threads_, rows, [&](int, int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) copy<T>(i / work.samples, i % work.samples, work);
      });
      parallel_for(threads_, a_.groups * units, [&](int, int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
          const int64_t group = i / units, unit = i % units;
          unit < pairs_ * classes_ ? sum_class(group, unit / classes_, unit % classes_, work)
                                   : sum_panel(group, unit - pairs_ * classes_, work);
        }
      });
    }
    parallel_for(threads_, a_.groups * pairs_, [&](int, int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) write_pair(i / pairs_, i % pairs_, work);
    });
    if (!a_.bias) return;
    for (int64_t group = 0; group < a_.groups; ++group) write_bias(group, work);
  }

 private:
  /// Memory of all threads, and the samples that are copied.
  struct Work {
    A* copies;  // [groups, panels, samples, positions, kWide]
    A* totals;  // [groups, pairs, n, n, kWide, kWide]: of a panel's offset and channel, then of the other's
    A* biases;  // [groups, panels, n, kWide]
    int64_t first;
    int64_t samples;
  };

  /// A panel and one that is not behind it.
  struct Pair {
    int64_t left;
    int64_t right;
  };

  static Pair pair_at(int64_t index) {
    int64_t left = 0;
    while ((left + 1) * (left + 2) / 2 <= index) ++left;
    return {left, index - left * (left + 1) / 2};
  }

  template <class T>
  void copy(int64_t panel, int64_t s, const Work& work) const {
    A* const to = work.copies + panel * panel_ + s * sample_;
    if (work.first == 0) {
      for (int64_t i = 0; i < sample_; ++i) to[i] = 0;  // the padding, which no copy overwrites
    }
    const int64_t group = panel / panels_;
    for (int64_t r = 0; r < kRegisters; ++r) {
      const int64_t channel = panel % panels_ * kWide + r * kStep, lanes = smaller(kStep, a_.channels - channel);
      if (lanes <= 0) break;
      const T* const x = static_cast<const T*>(a_.x.data) + (work.first + s) * a_.x.sample_stride +
                         (group * a_.channels + channel) * a_.x.channel_stride;
      copy_lanes<T>({x, a_.x.channel_stride, a_.x.position_stride}, lanes, geometry_.inputs, geometry_.input_places(),
                    to + r * kStep);
    }
  }

  int64_t offset(int64_t depth, int64_t height, int64_t width) const {
    return (depth * a_.height.kernel + height) * a_.width.kernel + width;
  }

  /// Adds the products of a pair of panels, at the offsets of a class, to the totals of its members.
  void sum_class(int64_t group, int64_t pair, int64_t index, const Work& work) const {
    const Pairs::Class width = width_.at(index % width_.classes());
    const Pairs::Class height = height_.at(index / width_.classes() % height_.classes());
    const Pairs::Class depth = depth_.at(index / width_.classes() / height_.classes());
    const Pair panels = pair_at(pair);
    const int64_t a = offset(depth.left, height.left, width.left), b = offset(depth.right, height.right, width.right);
    if (panels.left == panels.right && a < b) return;  // the mirror image of another class
    A* const totals = work.totals + ((group * pairs_ + pair) * n_ * n_ + a * n_ + b) * kSquare;
    const int64_t next = n_ + 1;  // from the total of (a, b) to that of (a + 1, b + 1)
    const auto total = [&](int64_t d, int64_t h, int64_t w) {
      return totals + offset(d * depth_.period, h * height_.period, w * width_.period) * next * kSquare;
    };
    const auto for_members = [&](const Range& depths, const Range& heights, const Range& widths, const auto& body) {
      for (int64_t d = depths.first; d < depths.last; ++d) {
        for (int64_t h = heights.first; h < heights.last; ++h) {
          for (int64_t w = widths.first; w < widths.last; ++w) body(total(d, h, w));
        }
      }
    };
    if (work.first == 0) {
      for_members({0, depth.members}, {0, height.members}, {0, width.members}, [](A* to) {
        for (int64_t i = 0; i < kSquare; ++i) to[i] = 0;
      });
    }
    const int64_t* const taps = geometry_.tap_places();
    const A* const left = work.copies + (group * panels_ + panels.left) * panel_ + taps[a];
    const A* const right = work.copies + (group * panels_ + panels.right) * panel_ + taps[b];
    for (int64_t i = 0; i < depth_.pieces(depth); ++i) {
      const Range depths = depth_.windows(depth, i), in_depth = depth_.members(depth, depths);
      for (int64_t j = 0; j < height_.pieces(height); ++j) {
        const Range heights = height_.windows(height, j), in_height = height_.members(height, heights);
        for (int64_t k = 0; k < width_.pieces(width); ++k) {
          const Range widths = width_.windows(width, k), in_width = width_.members(width, widths);
          if (depths.size() * heights.size() * widths.size() == 0 || in_depth.size() <= 0 || in_height.size() <= 0 ||
              in_width.size() <= 0) {
            continue;
          }
          alignas(kVectorBytes) A sums[kSquare] = {};
          sum_piece(left, right, {depths, heights, widths}, work.samples, sums);
          for_members(in_depth, in_height, in_width, [&](A* to) {
            for (int64_t r = 0; r < kSquare; r += kStep) store(to + r, load(to + r) + load(sums + r));
          });
        }
      }
    }
  }

  struct Box {
    Range depths;
    Range heights;
    Range widths;
  };

  /// Calls body(places, count) for all windows of a box in all samples, up to kRun at a time.
  template <class Body>
  void for_runs(const Box& box, int64_t samples, const Body& body) const {
    int64_t places[kRun], count = 0;
    for (int64_t s = 0; s < samples; ++s) {
      for (int64_t d = box.depths.first; d < box.depths.last; ++d) {
        for (int64_t h = box.heights.first; h < box.heights.last; ++h) {
          const int64_t row = d * a_.depth.stride * geometry_.plane + h * a_.height.stride * geometry_.line;
          const int64_t line = s * sample_ + row * kWide;
          for (int64_t w = box.widths.first; w < box.widths.last; ++w) {
            places[count++] = line + w * a_.width.stride * kWide;
            if (count == kRun) {
              body(places, count);
              count = 0;
            }
          }
        }
      }
    }
    if (count > 0) body(places, count);
  }

  void sum_piece(const A* left, const A* right, const Box& box, int64_t samples, A* sums) const {
    for_runs(box, samples, [&](const int64_t* places, int64_t count) {
      for (int64_t row = 0; row < kWide; row += kRows) add_run(left + row, right, places, count, sums + row * kWide);
    });
  }

  /// sums[i, j] += sum over places of left[place + i] * right[place + j], for kRows channels by all of a panel.
  static void add_run(const A* left, const A* right, const int64_t* places, int64_t count, A* sums) {
    Vector<A> of_run[kRows][kRegisters] = {};
    for (int64_t p = 0; p < count; ++p) {
      const A* const l = left + places[p];
      const A* const r = right + places[p];
      Vector<A> values[kRegisters];
#pragma GCC unroll 2
      for (int k = 0; k < kRegisters; ++k) values[k] = load(r + k * kStep);
#pragma GCC unroll 16
      for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 2
        for (int k = 0; k < kRegisters; ++k) of_run[i][k] += l[i] * values[k];
      }
    }
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 2
      for (int k = 0; k < kRegisters; ++k) {
        A* const sum = sums + i * kWide + k * kStep;
        store(sum, load(sum) + of_run[i][k]);
      }
    }
  }

  /// Adds what each offset reads, which are the products with the bias.
  void sum_panel(int64_t group, int64_t panel, const Work& work) const {
    const A* const from = work.copies + (group * panels_ + panel) * panel_;
    A* const to = work.biases + (group * panels_ + panel) * n_ * kWide;
    if (work.first == 0) {
      for (int64_t i = 0; i < n_ * kWide; ++i) to[i] = 0;
    }
    const Box all = {{0, a_.depth.outputs}, {0, a_.height.outputs}, {0, a_.width.outputs}};
    for_runs(all, work.samples, [&](const int64_t* places, int64_t count) {
      for (int64_t offset = 0; offset < n_; ++offset) {
        for (int64_t k = 0; k < kWide; k += kStep) {
          const A* const values = from + geometry_.tap_places()[offset] + k;
          Vector<A> sum = {};
          for (int64_t p = 0; p < count; ++p) sum += load(values + places[p]);
          A* const total = to + offset * kWide + k;
          store(total, load(total) + sum);
        }
      }
    });
  }

  A average(A* out, A total) const {
    const A value = static_cast<A>(a_.gain) * total;
    return a_.decay == 0 ? value : value + static_cast<A>(a_.decay) * *out;
  }

  /// Averages what a pair of panels has of the lower triangle, and its mirror image, row after row.
  void write_pair(int64_t group, int64_t pair, const Work& work) const {
    const Pair panels = pair_at(pair);
    const int64_t columns = a_.columns(), row = panels.left * kWide, column = panels.right * kWide;
    const int64_t rows = smaller(kWide, a_.channels - row), width = smaller(kWide, a_.channels - column);
    A* const out = static_cast<A*>(a_.out) + group * columns * columns;
    A* const corner = out + row * n_ * columns + column * n_;
    const A* const totals = work.totals + (group * pairs_ + pair) * n_ * n_ * kSquare;
    const bool is_diagonal = row == column;
    for (int64_t i = 0; i < rows; ++i) {
      for (int64_t a = 0; a < n_; ++a) {
        A* const to = corner + (i * n_ + a) * columns;
        for (int64_t j = 0; j < (is_diagonal ? i + 1 : width); ++j) {
          const int64_t end = is_diagonal && i == j ? a + 1 : n_;
          for (int64_t b = 0; b < end; ++b) {
            const A total = is_diagonal && a < b ? totals[(b * n_ + a) * kSquare + j * kWide + i]
                                                 : totals[(a * n_ + b) * kSquare + i * kWide + j];
            to[j * n_ + b] = average(to + j * n_ + b, total);
          }
        }
      }
    }
    A* const mirrored = out + column * n_ * columns + row * n_;
    for (int64_t j = 0; j < width * n_; ++j) {
      A* const to = mirrored + j * columns;
      for (int64_t i = is_diagonal ? j + 1 : 0; i < rows * n_; ++i) to[i] = corner[i * columns + j];
    }
  }

  void write_bias(int64_t group, const Work& work) const {
    const int64_t columns = a_.columns(), last = columns - 1;
    A* const out = static_cast<A*>(a_.out) + group * columns * columns;
    for (int64_t c = 0; c < a_.channels; ++c) {
      const A* const totals = work.biases + (group * panels_ + c / kWide) * n_ * kWide + c % kWide;
      for (int64_t offset = 0; offset < n_; ++offset) {
        A* const to = out + last * columns + c * n_ + offset;
        *to = out[(c * n_ + offset) * columns + last] = average(to, totals[offset * kWide]);
      }
    }
    A* const corner = out + last * columns + last;
    *corner = average(corner, static_cast<A>(a_.samples * geometry_.outputs));
  }

  const ConvGram& a_;
  Geometry geometry_;  // of copies, whose positions are kWide numbers
  const Pairs depth_;
  const Pairs height_;
  const Pairs width_;
  const int64_t n_;
  const int64_t classes_;
  const int64_t panels_;  // of a group
  const int64_t pairs_;   // of those
  int64_t sample_;        // numbers of a sample in a panel
  int64_t block_;         // samples that are copied at a time
  int64_t panel_;
  int threads_;
};

}  // namespace
}  // namespace fisher_kernels::FISHER_KERNELS_CAPABILITY
