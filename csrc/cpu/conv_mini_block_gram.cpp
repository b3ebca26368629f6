#include <cstdint>
#include <utility>

#include "../kernels.h"
#include "convolution.h"
#include "integers.h"
#include "lanes.h"
#include "mini_blocks.h"
#include "parallel.h"
#include "scratch.h"
#include "vector.h"

// One block per lane, as in mini_block_gram.cpp; here the vectors, the gradients of the kernels of a convolution by one
// sample, are made on the way. Each is a sum over output positions of grad_output times what a kernel offset reads:
//   entry[offset] = sum over l of left[l] * right[window[l] + offset],
// left being a channel of grad_output and right a channel of the padded input. The lanes are input channels (left is
// one number for all lanes), output channels (right is) or the groups of the convolution (both have one a lane),
// whichever fills registers best. What has lanes is copied, a few samples at a time, so that they lie side by side.
namespace fisher_kernels::FISHER_KERNELS_CAPABILITY {

namespace {

constexpr int64_t kRun = 16;          // samples summed before their sum is added to the total
constexpr int64_t kSegment = 1024;    // positions summed before their sum is added to the entry
constexpr int64_t kCopies = 1 << 18;  // bytes of copies that a thread aims at, and of totals: both stay in its cache
constexpr int64_t kTotals = 1 << 18;

// Sums, the left operands and a right one share the registers: kTaps * rows + rows + 1.
constexpr int kRegisters = kVectorBytes == 64 ? 32 : 16;
constexpr int kMaxTaps = kVectorBytes == 64 ? 9 : 4;
constexpr int kMostRows = 8;

constexpr int max_rows(int64_t taps) {
  const int64_t rows = (kRegisters - 1) / (taps + 1);
  return static_cast<int>(rows < kMostRows ? rows : kMostRows);
}

/// Taps that leave no registers for so many rows never come with them.
constexpr int fitting_rows(int rows, int taps) { return rows < max_rows(taps) ? rows : max_rows(taps); }

/// Keeps a value that is used several times in a register: GCC would load it anew at each use.
template <class V>
inline void keep_in_register([[maybe_unused]] V& value) {
#if defined(__x86_64__)
  asm("" : "+v"(value));
#endif
}

/// The sizes of parts of `size` that are as even as can be.
struct Even {
  int64_t size;
  int64_t parts;

  int64_t first(int64_t part) const { return size * part / parts; }
  int64_t count(int64_t part) const { return first(part + 1) - first(part); }
};

inline Even split_evenly(int64_t size, int64_t most) { return {size, ceil_div(size, most)}; }

/// Products of one sample at a run of output positions.
template <class A>
struct Products {
  const A* left;  // at the first position
  int64_t left_row;
  int64_t left_step;  // from position to position
  const A* right;
  const int64_t* windows;  // where each position's window begins in `right`
  const int64_t* taps;     // where the kernel offsets lie in a window
  int64_t positions;
  A* entries;
  int64_t entries_row;
  const int64_t* places;  // of the kernel offsets in a row of entries
  bool is_first;
};

template <class A, bool kInLanes>
inline Vector<A> operand(const A* p) {
  if constexpr (kInLanes) {
    return load(p);
  } else {
    return *p - Vector<A>{};  // in all lanes; taking off zero is no instruction
  }
}

/// entries[r, places[t]] (+)= sum over positions l of left[r, l] * right[windows[l] + taps[t]].
template <class A, bool kLeftLanes, bool kRightLanes, int kRows, int kTaps>
void add_products(const Products<A>& p) {
  Vector<A> sums[kRows][kTaps] = {};
  const A* right[kTaps];
#pragma GCC unroll 16
  for (int t = 0; t < kTaps; ++t) right[t] = p.right + p.taps[t];
  const A* left = p.left;
  const int64_t left_row = p.left_row, left_step = p.left_step;
  const int64_t* const end = p.windows + p.positions;
  for (const int64_t* window = p.windows; window != end; ++window, left += left_step) {
    const int64_t first = *window;
    Vector<A> lefts[kRows];
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) lefts[r] = operand<A, kLeftLanes>(left + r * left_row);
#pragma GCC unroll 16
    for (int t = 0; t < kTaps; ++t) {
      Vector<A> value = operand<A, kRightLanes>(right[t] + first);
      keep_in_register(value);
#pragma GCC unroll 16
      for (int r = 0; r < kRows; ++r) sums[r][t] += lefts[r] * value;
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 16
    for (int t = 0; t < kTaps; ++t) {
      A* const entry = p.entries + r * p.entries_row + p.places[t];
      store(entry, p.is_first ? sums[r][t] : load(entry) + sums[r][t]);
    }
  }
}

/// add_products for 1 to kMostRows rows and 1 to kMaxTaps taps.
template <class A, bool kLeftLanes, bool kRightLanes, int... kPlace>
inline void add_products(const Products<A>& products, int64_t rows, int64_t taps,
                         std::integer_sequence<int, kPlace...>) {
  static constexpr void (*kFunctions[])(const Products<A>&) = {
      add_products<A, kLeftLanes, kRightLanes, fitting_rows(kPlace / kMaxTaps + 1, kPlace % kMaxTaps + 1),
                   kPlace % kMaxTaps + 1>...};
  kFunctions[(rows - 1) * kMaxTaps + taps - 1](products);
}

/// Where things numbered by slot and lane begin: first + slot * per_slot + lane * per_lane.
struct Numbering {
  int64_t first;
  int64_t per_slot;
  int64_t per_lane;

  int64_t operator()(int64_t slot) const { return first + slot * per_slot; }
};

/// What the lanes of a register are.
enum class Lanes { inputs, outputs, groups };

inline Lanes choose_lanes(const ConvMiniBlockGram& a, int64_t step) {
  // Padded sizes over sizes, compared crosswise.
  const auto padded = [&](int64_t size) { return ceil_div(size, step) * step; };
  Lanes best = Lanes::inputs;
  int64_t size = a.inputs;
  if (padded(a.outputs) * size < padded(size) * a.outputs) best = Lanes::outputs, size = a.outputs;
  if (padded(a.groups) * size < padded(size) * a.groups) best = Lanes::groups;
  return best;
}

/// Only what copies numbers knows their type: all else is compiled once for each type that sums have.
template <class A, Lanes kLanesAre>
class Kernel {
  static constexpr int64_t kStep = kLanes<A>;
  static constexpr bool kLeftLanes = kLanesAre != Lanes::inputs;
  static constexpr bool kRightLanes = kLanesAre != Lanes::outputs;

 public:
  explicit Kernel(const ConvMiniBlockGram& a)
      : a_(a), stages_(!kLeftLanes && a.dtype != accumulation_dtype(a.dtype)), geometry_(a.depth, a.height, a.width), n_(geometry_.taps), columns_(n_ + kMaxTaps), places_(n_ + kMaxTaps) {
    const int64_t width = kRightLanes ? kStep : 1;
    if (kRightLanes) geometry_.widen(kStep);
    const int64_t lane_groups = kLanesAre == Lanes::groups ? ceil_div(a.groups, kStep) : a.groups;
    const int64_t lefts = kLanesAre == Lanes::outputs ? ceil_div(a.outputs, kStep) : a.outputs;
    const int64_t rights = kLanesAre == Lanes::inputs ? ceil_div(a.inputs, kStep) : a.inputs;
    const int64_t most_slots = larger(1, kMaxTaps / n_);
    slots_ = ceil_div(rights, ceil_div(rights, most_slots));
    rows_ = max_rows(ceil_div(slots_ * n_, ceil_div(slots_ * n_, kMaxTaps)));

    right_size_ = (geometry_.padded + 1) * width;
    left_size_ = kLeftLanes ? geometry_.outputs * kStep : 0;
    totals_size_ = triangle(n_) * kStep;
    const int64_t bytes = sizeof(A);
    // A matter of the shape of single channels: no block knows how many others there are.
    run_ = larger(1, smaller(kRun, kCopies / ((left_size_ + most_slots * right_size_) * bytes)));
    for (int64_t slot = 0; slot < slots_; ++slot) {
      for (int64_t k = 0; k < n_; ++k) {
        columns_.data()[slot * n_ + k] = slot * run_ * right_size_ + geometry_.tap_places()[k];
        places_.data()[slot * n_ + k] = (slot * rows_ * run_ * n_ + k) * kStep;
      }
    }
    const int64_t vectors = larger(1, kTotals / (totals_size_ * bytes));
    if (kLeftLanes) {  // a copy of left serves many rights, which in turn are few where copies of them are large
      const int64_t copies = larger(1, kCopies / (run_ * right_size_ * bytes));
      left_parts_ = split_evenly(lefts, rows_);
      right_parts_ = split_evenly(rights, larger(slots_, smaller(vectors / rows_, copies)));
    } else {
      left_parts_ = split_evenly(lefts, larger(rows_, vectors / slots_));
      right_parts_ = split_evenly(rights, slots_);
    }
    // Which unit a block is in changes nothing for it: units may be as many as threads ask for.
    threads_ = useful_threads(a.samples * lefts * rights * lane_groups * n_ * (geometry_.outputs + n_), a.threads);
    const auto are_few = [&] { return lane_groups * left_parts_.parts * right_parts_.parts < threads_; };
    while (!kLeftLanes && are_few() && right_parts_.parts < rights) ++right_parts_.parts;
    while (are_few() && left_parts_.parts * rows_ < lefts) ++left_parts_.parts;
    while (are_few() && right_parts_.parts < rights) ++right_parts_.parts;
    units_ = lane_groups * left_parts_.parts * right_parts_.parts;
    threads_ = static_cast<int>(larger(1, smaller(threads_, units_)));
    most_lefts_ = ceil_div(lefts, left_parts_.parts);
    most_rights_ = ceil_div(rights, right_parts_.parts);
  }

  void operator()() const {
    const int64_t copies = run_ * (most_rights_ * right_size_ + most_lefts_ * left_size_);
    const int64_t entries = slots_ * rows_ * run_ * n_ * kStep, totals = most_lefts_ * most_rights_ * totals_size_;
    const int64_t staged = stages_ ? rows_ * geometry_.outputs : 0;
    const int64_t size = ceil_div(copies + entries + totals + staged, kStep) * kStep;
    const LaneScratch<A> scratch(threads_ * size / kStep);
    parallel_for(threads_, units_, [&](int thread, int64_t begin, int64_t end) {
      Buffers buffers;
      buffers.totals = reinterpret_cast<A*>(scratch.data()) + thread * size;
      buffers.entries = buffers.totals + totals;
      buffers.lefts = buffers.entries + entries;
      buffers.rights = buffers.lefts + run_ * most_lefts_ * left_size_;
      buffers.staged = buffers.rights + run_ * most_rights_ * right_size_;
      for (A* p = buffers.rights; p < buffers.staged; ++p) *p = 0;  // the padding, which no copy overwrites
      for (int64_t unit = begin; unit < end; ++unit) sum_unit(unit, buffers);
    });
  }

 private:
  /// A thread's memory. Copies of channels: [slots, samples of a run, positions, lanes].
  struct Buffers {
    A* totals;   // [rights, lefts, n (n + 1) / 2, lanes]
    A* entries;  // [right slots of a tile, left slots, samples of a run, n, lanes]
    A* lefts;
    A* rights;
    A* staged;  // [rows, positions]
  };

  /// Blocks that are summed together: all pairs of a few left and a few right slots.
  struct Unit {
    int64_t lefts;
    int64_t rights;
    int64_t lanes;  // of all slots from the first on
    Numbering left_channel;
    Numbering right_channel;
    Numbering left_block;  // of left slot and lane in out
    int64_t right_block;   // further on in out for each right slot

    int64_t lanes_of(int64_t left, int64_t right) const {
      const int64_t slot = kLanesAre == Lanes::outputs ? left : kLanesAre == Lanes::inputs ? right : 0;
      return smaller(kStep, lanes - slot * kStep);
    }
  };

  Unit unit_at(int64_t index) const {
    const int64_t right = index % right_parts_.parts, left = index / right_parts_.parts % left_parts_.parts;
    const int64_t lane_group = index / right_parts_.parts / left_parts_.parts;
    const int64_t first_left = left_parts_.first(left), first_right = right_parts_.first(right);
    const int64_t ins = a_.inputs, outs = a_.outputs;
    Unit unit{left_parts_.count(left), right_parts_.count(right), 0, {}, {}, {}, 0};
    if constexpr (kLanesAre == Lanes::inputs) {
      unit.lanes = ins - first_right * kStep;
      unit.left_channel = {lane_group * outs + first_left, 1, 0};
      unit.right_channel = {lane_group * ins + first_right * kStep, kStep, 1};
      unit.left_block = {unit.left_channel.first * ins + first_right * kStep, ins, 1};
      unit.right_block = kStep;
    } else if constexpr (kLanesAre == Lanes::outputs) {
      unit.lanes = outs - first_left * kStep;
      unit.left_channel = {lane_group * outs + first_left * kStep, kStep, 1};
      unit.right_channel = {lane_group * ins + first_right, 1, 0};
      unit.left_block = {unit.left_channel.first * ins + first_right, kStep * ins, ins};
      unit.right_block = 1;
    } else {
      const int64_t group = lane_group * kStep;
      unit.lanes = a_.groups - group;
      unit.left_channel = {group * outs + first_left, 1, outs};
      unit.right_channel = {group * ins + first_right, 1, ins};
      unit.left_block = {unit.left_channel.first * ins + first_right, ins, outs * ins};
      unit.right_block = 1;
    }
    return unit;
  }

  void sum_unit(int64_t index, const Buffers& buffers) const {
    const Unit unit = unit_at(index);
    const Even tiles = split_evenly(unit.lefts, rows_), right_tiles = split_evenly(unit.rights, slots_);
    if (a_.samples == 0) {
      // Of the largest unit: in one that is smaller the slots do not lie side by side.
      for (int64_t i = 0; i < most_lefts_ * most_rights_ * totals_size_; ++i) buffers.totals[i] = 0;
    }
    for (int64_t first = 0; first < a_.samples; first += run_) {
      const int64_t samples = smaller(run_, a_.samples - first);
      with_element([&](auto* type) { copy(type, unit, first, samples, buffers); });
      for (int64_t right = 0; right < right_tiles.parts; ++right) {
        for (int64_t left = 0; left < tiles.parts; ++left) {
          const Tile tile{tiles.first(left), tiles.count(left), right_tiles.first(right), right_tiles.count(right)};
          sum_tile(unit, tile, first, samples, buffers);
        }
      }
    }
    write(unit, buffers);
  }

  /// Calls body with a null pointer of the type that x and grad_output have.
  template <class Body>
  void with_element(const Body& body) const {
    with_type(a_.dtype, [&](auto* type) {
      if constexpr (std::is_same_v<Accumulator<std::remove_pointer_t<decltype(type)>>, A>) body(type);
    });
  }

  /// Lays the lanes of a few samples side by side.
  template <class T>
  void copy(const T*, const Unit& unit, int64_t first, int64_t samples, const Buffers& buffers) const {
    for (int64_t s = 0; s < samples; ++s) {
      for (int64_t right = 0; right < unit.rights; ++right) {
        const T* const x = static_cast<const T*>(a_.x.data) + (first + s) * a_.x.sample_stride +
                           unit.right_channel(right) * a_.x.channel_stride;
        A* const to = buffers.rights + (right * run_ + s) * right_size_;
        const int64_t* const places = geometry_.input_places();
        if constexpr (kRightLanes) {
          const int64_t lane_stride = unit.right_channel.per_lane * a_.x.channel_stride;
          copy_lanes<T>({x, lane_stride, a_.x.position_stride}, unit.lanes_of(0, right), geometry_.inputs, places, to);
        } else {
          for (int64_t p = 0; p < geometry_.inputs; ++p) to[places[p]] = widen(x[p * a_.x.position_stride]);
        }
      }
      for (int64_t left = 0; kLeftLanes && left < unit.lefts; ++left) {
        const int64_t lane_stride = unit.left_channel.per_lane * a_.grad_output.channel_stride;
        copy_lanes<T>({left_data<T>(unit, left, first + s), lane_stride, a_.grad_output.position_stride},
                      unit.lanes_of(left, 0), geometry_.outputs, nullptr,
                      buffers.lefts + (left * run_ + s) * left_size_);
      }
    }
  }

  template <class T>
  const T* left_data(const Unit& unit, int64_t left, int64_t sample) const {
    return static_cast<const T*>(a_.grad_output.data) + sample * a_.grad_output.sample_stride +
           unit.left_channel(left) * a_.grad_output.channel_stride;
  }

  /// Widens some left rows of a sample.
  template <class T>
  void stage(const T*, const Unit& unit, int64_t left, int64_t rows, int64_t sample, A* to) const {
    const T* row = left_data<T>(unit, left, sample);
    for (int64_t r = 0; r < rows; ++r, row += a_.grad_output.channel_stride, to += geometry_.outputs) {
      int64_t l = 0;
      if (a_.grad_output.position_stride == 1) {
        for (; l + kStep <= geometry_.outputs; l += kStep) store(to + l, load(row + l));
      }
      for (; l < geometry_.outputs; ++l) to[l] = widen(row[l * a_.grad_output.position_stride]);
    }
  }

  /// Slots whose sums share the registers: several right ones where the kernel has few offsets.
  struct Tile {
    int64_t left;
    int64_t lefts;
    int64_t right;
    int64_t rights;
  };

  /// Adds the outer products of a run of samples.
  void sum_tile(const Unit& unit, const Tile& tile, int64_t first, int64_t samples, const Buffers& buffers) const {
    const int64_t entries_row = run_ * n_ * kStep, left = tile.left;
    const Even columns = split_evenly(tile.rights * n_, kMaxTaps);
    for (int64_t s = 0; s < samples; ++s) {
      Products<A> products;
      products.entries_row = entries_row;
      const A* lefts;
      if constexpr (kLeftLanes) {
        lefts = buffers.lefts + (left * run_ + s) * left_size_;
        products.left_row = run_ * left_size_;
        products.left_step = kStep;
      } else if (stages_) {
        with_element([&](auto* type) { stage(type, unit, left, tile.lefts, first + s, buffers.staged); });
        lefts = buffers.staged;
        products.left_row = geometry_.outputs;
        products.left_step = 1;
      } else {
        lefts = left_data<A>(unit, left, first + s);
        products.left_row = a_.grad_output.channel_stride;
        products.left_step = a_.grad_output.position_stride;
      }
      products.right = buffers.rights + (tile.right * run_ + s) * right_size_;
      products.entries = buffers.entries + s * n_ * kStep;
      for (int64_t group = 0; group < columns.parts; ++group) {
        products.taps = columns_.data() + columns.first(group);
        products.places = places_.data() + columns.first(group);
        int64_t l = 0;
        do {  // once even where there are no positions, for the zeros
          products.left = lefts + l * products.left_step;
          products.windows = geometry_.window_places() + l;
          products.positions = smaller(kSegment, geometry_.outputs - l);
          products.is_first = l == 0;
          add_products<A, kLeftLanes, kRightLanes>(products, tile.lefts, columns.count(group),
                                                   std::make_integer_sequence<int, kMostRows * kMaxTaps>{});
          l += kSegment;
        } while (l < geometry_.outputs);
      }
    }
    for (int64_t right = 0; right < tile.rights; ++right) {
      for (int64_t r = 0; r < tile.lefts; ++r) {
        add_run(Run<A>{buffers.entries + (right * rows_ + r) * entries_row, samples, n_, first == 0},
                buffers.totals + ((tile.right + right) * most_lefts_ + left + r) * totals_size_);
      }
    }
  }

  void write(const Unit& unit, const Buffers& buffers) const {
    const A decay = static_cast<A>(a_.decay), gain = static_cast<A>(a_.gain);
    const int64_t step = unit.left_block.per_lane * n_ * n_;
    for (int64_t left = 0; left < unit.lefts; ++left) {
      for (int64_t right = 0; right < unit.rights; ++right) {
        const int64_t block = unit.left_block(left) + right * unit.right_block;
        write_blocks(buffers.totals + (right * most_lefts_ + left) * totals_size_, unit.lanes_of(left, right), n_, decay,
                     gain, static_cast<A*>(a_.out) + block * n_ * n_, step);
      }
    }
  }

  const ConvMiniBlockGram& a_;
  const bool stages_;  // left numbers are widened, a few rows at a time
  Geometry geometry_;
  const int64_t n_;
  int64_t slots_;  // most right slots of a tile
  int64_t rows_;   // most left slots
  const Scratch<int64_t> columns_, places_;  // where right slots' kernel offsets lie in copies and in entries
  Even left_parts_, right_parts_;
  int64_t units_;
  int threads_;
  int64_t most_lefts_, most_rights_;  // of a unit
  int64_t run_;
  int64_t left_size_, right_size_, totals_size_;
};

template <class A>
void sum_in(const ConvMiniBlockGram& a) {
  switch (choose_lanes(a, kLanes<A>)) {
    case Lanes::inputs: return Kernel<A, Lanes::inputs>(a)();
    case Lanes::outputs: return Kernel<A, Lanes::outputs>(a)();
    case Lanes::groups: return Kernel<A, Lanes::groups>(a)();
  }
}

}  // namespace

void conv_mini_block_gram_(const ConvMiniBlockGram& a) {
  if (a.groups * a.inputs * a.outputs == 0) return;
  a.dtype == DType::float64 ? sum_in<double>(a) : sum_in<float>(a);
}

}  // namespace fisher_kernels::FISHER_KERNELS_CAPABILITY
