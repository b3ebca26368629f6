#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

#include "../kernels.h"
#include "block_products.h"
#include "integers.h"
#include "lanes.h"
#include "parallel.h"
#include "scratch.h"
#include "strided.h"
#include "vector.h"

namespace fisher_kernels::FISHER_KERNELS_CAPABILITY {

namespace {

// Elements worked on at a time, in whole rows: few, so that the processor asks for the memory of the gradient, the
// momentum, the inverse and the parameter in turn and never long for one alone. A matter of the shape alone, as sums over
// parameters are made of one partial sum for each chunk.
constexpr int64_t kChunk = 128;
constexpr int64_t kWholeRows = 16;  // as many of them fill whole registers

// The same where rows share their inverse, which serves all rows of a chunk when it has come into the caches.
constexpr int64_t kSharedChunk = 2048;
constexpr int64_t kSharedRows = 8;

int64_t chunk_rows(const MbfParameter& p) {
  if (p.shared) return ceil_div(larger(1, kSharedChunk / p.columns), kSharedRows) * kSharedRows;
  return p.columns * kWholeRows <= 4 * kChunk ? ceil_div(kChunk, p.columns * kWholeRows) * kWholeRows
                                              : larger(1, kChunk / p.columns);
}
int64_t chunk_count(const MbfParameter& p) { return ceil_div(p.rows, chunk_rows(p)); }
int64_t numel(const MbfParameter& p) { return p.rows * p.columns; }
int64_t block_numbers(const MbfParameter& p) {
  return p.packed ? p.columns * (p.columns + 1) / 2 : p.columns * p.columns;
}

// Elements of rows that lie side by side, as kernels of convolutions do in channels-last order: such a panel is worked
// on at once, where it lies, and stays in the nearer caches.
constexpr int64_t kMostInPanel = 32768;

/// How many rows lie side by side, in whole chunks and alike in all arrays; 0 where they do not, or are not multiplied
/// so.
int64_t panel_rows(const MbfParameter& p) {
  const MbfArrays& arrays = p.weight;
  const bool multiplied = p.dtype == DType::float64 ? goes_side_by_side<double>(p.columns, p.packed)
                                                    : goes_side_by_side<float>(p.columns, p.packed);
  const bool turned = p.inverse != nullptr && !p.shared && !p.biased && !arrays.parameter.contiguous && multiplied &&
                      chunk_rows(p) % kWholeRows == 0;
  if (!turned) return 0;
  const int64_t rows = Walk(arrays.parameter).side_by_side(p.columns);
  const bool alike = Walk(arrays.gradient).side_by_side(p.columns) == rows &&
                     Walk(arrays.moment).side_by_side(p.columns) == rows;
  return alike && rows % chunk_rows(p) == 0 && rows * p.columns <= kMostInPanel ? rows : 0;
}

/// What the bounds of a step are about, of some of its elements.
struct Sums {
  double change = 0;  // lr^2 d m, or lr^2 d g
  double square = 0;  // lr^2 d^2
  double weight = 0;  // w^2

  Sums& operator+=(const Sums& more) {
    change += more.change;
    square += more.square;
    weight += more.weight;
    return *this;
  }
};

/// Words moved for a chunk, about: what threads share evenly.
int64_t chunk_cost(const MbfParameter& p) {
  if (p.shared) return chunk_rows(p) * p.columns * (5 + p.size / 16);  // as many products take as long as a word
  const int64_t inverse = p.inverse != nullptr ? block_numbers(p) : p.columns;
  return chunk_rows(p) * (inverse + 5 * p.columns);
}

/// Memory of one thread for a chunk.
template <class A>
class Buffers {
 public:
  /// Room for `elements` of a chunk and one block of an inverse with its row.
  Buffers(int64_t elements, int64_t block, int64_t row)
      : stride_(ceil_div(elements + 2 * kLanes<A>, kLanes<A>) * kLanes<A>),
        memory_(7 * stride_ + block + 3 * row + 6 * kLanes<A>) {
    const uintptr_t address = reinterpret_cast<uintptr_t>(memory_.data());
    data_ = reinterpret_cast<A*>((address + kVectorBytes - 1) / kVectorBytes * kVectorBytes);
  }

  template <class T>
  T* parameter() const { return reinterpret_cast<T*>(data_); }
  template <class T>
  T* gradient() const { return reinterpret_cast<T*>(data_ + stride_); }
  A* old_moment() const { return data_ + 2 * stride_; }
  A* moment() const { return data_ + 3 * stride_; }
  A* scaled_gradient() const { return data_ + 4 * stride_; }
  A* direction() const { return data_ + 5 * stride_; }
  bfloat16_moment* short_moment() const { return reinterpret_cast<bfloat16_moment*>(data_ + 6 * stride_); }
  /// Three rows of a packed block, then a copy of a block.
  A* work() const { return data_ + 7 * stride_; }

 private:
  int64_t stride_;
  Scratch<A> memory_;
  A* data_;
};

/// Rows of a tensor, those of a bias joined on, where they lie or by way of a buffer.
template <class T>
class Rows {
 public:
  /// Rows of a panel, which are read together, are in place in the order of memory.
  Rows(const StridedArray& weight, const StridedArray& bias, const MbfParameter& p, bool in_panels, T* buffer)
      : weight_(weight),
        bias_(bias),
        columns_(p.columns),
        width_(p.columns - p.biased),
        in_place_((weight.contiguous || in_panels) && !p.biased),
        dense_(weight.contiguous),
        biased_(p.biased),
        data_(static_cast<T*>(weight.data)),
        bias_data_(static_cast<T*>(bias.data)),
        buffer_(buffer) {}

  /// Where rows from there on are once they have been read.
  T* place(int64_t first) const { return in_place_ ? data_ + first * columns_ : buffer_; }

  T* read(int64_t first, int64_t count) const {
    if (in_place_) return place(first);
    if (dense_) {
      for (int64_t r = 0; r < count; ++r) copy_run(data_ + (first + r) * width_, width_, buffer_ + r * columns_);
      read_bias(first, count);
      return buffer_;
    }
    // The elements of the weight go to the end of the buffer, from where they move to their rows in order.
    T* const from = buffer_ + count * (columns_ - width_);
    if (width_ > 0) gather(data_, weight_, first * width_, count * width_, from);
    if (biased_) {
      for (int64_t r = 0; r < count; ++r) {
        for (int64_t c = 0; c < width_; ++c) buffer_[r * columns_ + c] = from[r * width_ + c];
      }
      read_bias(first, count);
    }
    return buffer_;
  }

  /// Writes back what was read and changed, or other rows; those may be lost.
  void write(int64_t first, int64_t count, T* rows) const {
    if (in_place_) {
      T* const out = data_ + first * columns_;
      if (out != rows) std::memcpy(out, rows, count * columns_ * sizeof(T));
      return;
    }
    if (biased_) {
      bias_.visit(first, count, [&](int64_t i, int64_t offset, int64_t run, int64_t stride) {
        for (int64_t k = 0; k < run; ++k) bias_data_[offset + k * stride] = rows[(i + k) * columns_ + width_];
      });
      if (dense_) {
        for (int64_t r = 0; r < count; ++r) copy_run(rows + r * columns_, width_, data_ + (first + r) * width_);
        return;
      }
      for (int64_t r = 0; r < count; ++r) {
        for (int64_t c = 0; c < width_; ++c) rows[r * width_ + c] = rows[r * columns_ + c];
      }
    }
    if (width_ > 0) scatter(rows, first * width_, count * width_, weight_, data_);
  }

 private:
  /// Into the last column of what was read.
  void read_bias(int64_t first, int64_t count) const {
    bias_.visit(first, count, [&](int64_t i, int64_t offset, int64_t run, int64_t stride) {
      for (int64_t k = 0; k < run; ++k) buffer_[(i + k) * columns_ + width_] = bias_data_[offset + k * stride];
    });
  }

  const Walk weight_;
  const Walk bias_;
  const int64_t columns_;
  const int64_t width_;  // columns of the weight
  const bool in_place_;
  const bool dense_;  // the weight fills its memory, row after row
  const bool biased_;
  T* const data_;
  T* const bias_data_;
  T* const buffer_;
};

/// Rows of the momentum, which is computed in A and kept in that or in bfloat16. Which of them a run tells: kernels for
/// both would take twice as long to compile, and what is converted is in the nearest cache.
template <class A>
class Moments {
 public:
  Moments(const MbfParameter& p, bool in_panels, const Buffers<A>& buffers)
      : is_short_(std::is_same_v<A, float> && p.moment_dtype == DType::bfloat16),
        columns_(p.columns),
        widened_(buffers.old_moment()),
        wide_(p.weight.moment, p.bias.moment, p, in_panels, buffers.old_moment()),
        short_(p.weight.moment, p.bias.moment, p, in_panels, buffers.short_moment()) {}

  /// Where rows from there on lie, if they are read in place, and how many bytes a row has.
  const char* place(int64_t first) const {
    return is_short_ ? reinterpret_cast<const char*>(short_.place(first))
                     : reinterpret_cast<const char*>(wide_.place(first));
  }
  int64_t row_bytes() const { return columns_ * static_cast<int64_t>(is_short_ ? sizeof(bfloat16_moment) : sizeof(A)); }

  const A* read(int64_t first, int64_t count) const {
    if constexpr (std::is_same_v<A, float>) {
      if (is_short_) {
        const bfloat16_moment* const kept = short_.read(first, count);
        for_registers<A>(count * columns_, [&](int64_t i, const auto& load, const auto&) {
          store(widened_ + i, load(kept + i));  // the buffers have room for a whole register
        });
        return widened_;
      }
    }
    return wide_.read(first, count);
  }

  /// Writes rows, which may be lost.
  void write(int64_t first, int64_t count, A* rows) const {
    if constexpr (std::is_same_v<A, float>) {
      if (is_short_) {
        bfloat16_moment* const kept = short_.place(first);
        for_registers<A>(count * columns_, [&](int64_t i, const auto&, const auto& store) {
          store(kept + i, load(rows + i));
        });
        return short_.write(first, count, kept);
      }
    }
    wide_.write(first, count, rows);
  }

 private:
  const bool is_short_;
  const int64_t columns_;
  A* const widened_;
  const Rows<A> wide_;
  const Rows<bfloat16_moment> short_;
};

/// The step of one parameter.
template <WeightDecay kDecay, class T>
class Stepper {
 public:
  using A = Accumulator<T>;

  Stepper(const MbfStep& step, const MbfParameter& p, int64_t panel, const Buffers<A>& buffers)
      : step_(step),
        p_(p),
        panel_(panel),
        buffers_(buffers),
        parameter_(p.weight.parameter, p.bias.parameter, p, panel > 0, buffers.template parameter<T>()),
        gradient_(p.weight.gradient, p.bias.gradient, p, panel > 0, buffers.template gradient<T>()),
        moment_(p, panel > 0, buffers) {}

  /// Rows that are worked on at a time: a chunk, or a panel of them.
  int64_t rows_at_once() const { return panel_ > 0 ? panel_ : chunk_rows(p_); }

  /// Writes the momentum of so many rows. Without `directions` it takes the step too; else those are stored, NaN for
  /// what is skipped, and the sums of each chunk.
  void advance(int64_t first, int64_t rows, A* directions, Sums* sums) {
    const int64_t count = rows * p_.columns;
    A* const moment = buffers_.moment();
    A* const d = buffers_.direction();
    const A* const old = moment_.read(first, rows);
    T* const w = parameter_.read(first, rows);
    accumulate(w, gradient_.read(first, rows), old, count);
    multiply(first, rows);
    if (!is_finite(d, count)) skip_blocks(rows, old);
    if (directions == nullptr) {
      moment_.write(first, rows, moment);
      update(w, d, count, p_.lr.value);
      return parameter_.write(first, rows, w);
    }
    const A* const other = step_.along_gradient ? buffers_.scaled_gradient() : moment;
    if (panel_ > 0) {
      add_up_panel(w, d, other, sums);
    } else {
      *sums = add_up(w, d, other, count);
    }
    moment_.write(first, rows, moment);
    std::memcpy(directions, d, count * sizeof(A));
  }

  /// Takes the step of a chunk of rows along stored directions.
  void descend(int64_t first, int64_t rows, const A* directions, double rate) {
    T* const w = parameter_.read(first, rows);
    update(w, directions, rows * p_.columns, rate);
    parameter_.write(first, rows, w);
  }

  int64_t skipped() const { return skipped_; }

 private:
  void accumulate(const T* w, const T* gradient, const A* old, int64_t count) const {
    const A gradient_scale = static_cast<A>(step_.gradient_scale.factor()), momentum = static_cast<A>(step_.momentum),
            weight_decay = static_cast<A>(p_.weight_decay);
    const bool keep_gradient = step_.kl_clip > 0 && step_.along_gradient;
    A* const moment = buffers_.moment();
    A* const scaled = buffers_.scaled_gradient();
    for_registers<A>(count, [&](int64_t i, const auto& load, const auto&) {
      Vector<A> g = gradient_scale * load(gradient + i);
      if constexpr (kDecay == WeightDecay::coupled) g += weight_decay * load(w + i);
      if (keep_gradient) store(scaled + i, g);
      store(moment + i, momentum * load(old + i) + g);  // the buffers have room for a whole register
    });
  }

  void multiply(int64_t first, int64_t rows) {
    if (p_.inverse == nullptr) return copy_directions(first, rows);
    if constexpr (std::is_same_v<A, float>) {
      if (p_.inverse_dtype == DType::bfloat16) return multiply_by(static_cast<const bfloat16*>(p_.inverse), first, rows);
    }
    multiply_by(static_cast<const A*>(p_.inverse), first, rows);
  }

  template <class S>
  void multiply_by(const S* inverse, int64_t first, int64_t rows) {
    const A* const m = buffers_.moment();
    A* const d = buffers_.direction();
    if (p_.shared) {
      for (int64_t c = 0; c < p_.columns; c += p_.size) {
        const int64_t block = c / p_.size * p_.size * p_.size;
        multiply_shared<A>(inverse + block, p_.size, m + c, rows, p_.columns, smaller(p_.size, p_.columns - c), d + c);
      }
      return;
    }
    if (p_.columns == 1) {
      for_registers<A>(rows, [&](int64_t i, const auto& load, const auto&) {
        store(d + i, load(m + i) * load(inverse + first + i));
      });
      return;
    }
    const int64_t numbers = block_numbers(p_);
    // Rows are read a register past their ends. The last blocks, where nothing may follow, move to where something does.
    const int64_t safe = (p_.rows * numbers - kLanes<A>) / numbers;
    A* const work = buffers_.work();
    S* const copy = reinterpret_cast<S*>(work + 3 * (p_.columns + kLanes<A>));
    if (panel_ > 0) {
      return multiply_side_by_side<A>(inverse + first * numbers, rows, safe - first, p_.columns, p_.packed,
                                      ahead(first, rows), m, d, copy);
    }
    if (p_.packed && p_.columns <= kMostInLanes && !is_spread<A>(p_.columns)) {
      for (int64_t r = 0; r < rows; r += kLanes<A>) {
        multiply_packed_in_lanes<A>(inverse + (first + r) * numbers, smaller(kLanes<A>, rows - r), p_.columns,
                                    m + r * p_.columns, d + r * p_.columns);
      }
      return;
    }
    with_size(p_.columns, p_.packed, [&](auto n, auto packed) {
      for (int64_t r = 0; r < rows; ++r) {
        const S* block = inverse + (first + r) * numbers;
        if (first + r >= safe) {
          std::memcpy(copy, block, numbers * sizeof(S));
          block = copy;
        }
        multiply_block<A>(block, n, packed, m + r * n, d + r * n, work);
      }
    });
  }

  /// What comes after the momentum and the gradient of a panel, and its parameter, which is used last.
  Ahead ahead(int64_t first, int64_t rows) const {
    const int64_t row_bytes = p_.columns * static_cast<int64_t>(sizeof(T));
    return {{moment_.place(first + rows), reinterpret_cast<const char*>(gradient_.place(first + rows)),
             reinterpret_cast<const char*>(parameter_.place(first))},
            {moment_.row_bytes(), row_bytes, row_bytes}};
  }

  void copy_directions(int64_t first, int64_t rows) {
    const A* const directions = static_cast<const A*>(p_.directions);
    A* const d = buffers_.direction();
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t c = 0, block = 0; c < p_.columns; c += p_.size, ++block) {
        const A* const from = directions + (first + r) * p_.row_stride + block * p_.block_stride;
        std::memcpy(d + r * p_.columns + c, from, smaller(p_.size, p_.columns - c) * sizeof(A));
      }
    }
  }

  static bool is_finite(const A* d, int64_t count) {
    Vector<A> taint = {};
    for_registers<A>(count, [&](int64_t i, const auto& load, const auto&) { taint += load(d + i) * A(0); });
    return sum_lanes<A>(taint) == 0;
  }

  /// Counts the blocks of a chunk whose direction is not finite; that becomes NaN, and their momentum what it was.
  __attribute__((noinline)) void skip_blocks(int64_t rows, const A* old) {
    A* const moment = buffers_.moment();
    A* const d = buffers_.direction();
    const int64_t row = panel_ > 0 ? 1 : p_.columns, step = panel_ > 0 ? panel_ : 1;
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t c = 0; c < p_.columns; c += p_.size) {
        const int64_t begin = r * row + c * step, end = begin + smaller(p_.size, p_.columns - c) * step;
        A taint = 0;
        for (int64_t i = begin; i < end; i += step) taint += d[i] * A(0);
        if (taint == 0) continue;
        ++skipped_;
        for (int64_t i = begin; i < end; i += step) {
          d[i] = std::numeric_limits<A>::quiet_NaN();
          moment[i] = old[i];
        }
      }
    }
  }

  /// The sums of each chunk of a panel, which is brought in the order of rows before: sums are made in that order.
  __attribute__((noinline)) void add_up_panel(const T* w, const A* d, const A* other, Sums* sums) const {
    const int64_t rows = chunk_rows(p_);
    A* const weights = buffers_.template parameter<A>();
    A* const directions = buffers_.template gradient<A>();
    A* const others = buffers_.old_moment();
    for (int64_t r = 0; r < panel_; r += rows, ++sums) {
      const auto order = [&](const auto* panel, A* out) {
        for (int64_t t = 0; t < rows; t += kLanes<A>) {
          Vector<A> lanes[kMostSideBySide<A>];
          for (int64_t k = 0; k < p_.columns; ++k) lanes[k] = load(panel + k * panel_ + r + t);
          store_lanes(lanes, kAllLanes<A>, p_.columns, out + t * p_.columns);
        }
      };
      order(w, weights);
      order(d, directions);
      order(other, others);
      *sums = add_up(weights, directions, others, rows * p_.columns);
    }
  }

  /// Directions that are NaN are in no sum, and weights that are not finite neither.
  template <class W>
  Sums add_up(const W* w, const A* d, const A* other, int64_t count) const {
    const Vector<A> zero = {};
    const double square_of_rate = p_.lr.value * p_.lr.value;
    Sums sums;
    if (step_.kl_clip > 0) {
      SumOfProducts<A> change;
      for_registers<A>(count, [&](int64_t i, const auto& load, const auto&) {
        const Vector<A> x = load(d + i), y = load(other + i);
        change.add(x == x ? x : zero, x == x ? y : zero);
      });
      sums.change = square_of_rate * change.total();
    }
    if (step_.max_relative_step > 0) {
      SumOfProducts<A> square, weight;
      for_registers<A>(count, [&](int64_t i, const auto& load, const auto&) {
        const Vector<A> x = load(d + i), y = load(w + i), step = x == x ? x : zero;
        square.add(step, step);
        const Vector<A> there = y - y == zero ? y : zero;
        weight.add(there, there);
      });
      sums.square = square_of_rate * square.total();
      sums.weight = weight.total();
    }
    return sums;
  }

  /// One step along d, but for what is NaN.
  void update(T* w, const A* d, int64_t count, double rate) const {
    const A step_size = static_cast<A>(rate), shrinkage = static_cast<A>(p_.lr.value * p_.weight_decay);
    for_registers<A>(count, [&](int64_t i, const auto& load, const auto& store) {
      const Vector<A> old = load(w + i), along = load(d + i);
      Vector<A> change = step_size * along;
      if constexpr (kDecay == WeightDecay::decoupled) change += shrinkage * old;
      store(w + i, along == along ? old - change : old);
    });
  }

  const MbfStep& step_;
  const MbfParameter& p_;
  const int64_t panel_;  // rows that lie side by side
  const Buffers<A>& buffers_;
  const Rows<T> parameter_;
  const Rows<T> gradient_;
  const Moments<A> moment_;
  int64_t skipped_ = 0;
};

/// Calls body with a Stepper for one parameter.
template <class Body>
void with_stepper(const MbfStep& step, const MbfParameter& p, const Body& body) {
  with_type(p.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const int64_t block = p.inverse != nullptr && !p.shared ? block_numbers(p) : 0;
    const int64_t panel = panel_rows(p);
    const Buffers<Accumulator<T>> buffers(larger(chunk_rows(p), panel) * p.columns, block, p.columns);
    const auto with = [&](auto stepper) {
      body(stepper);
      if (stepper.skipped() > 0) __atomic_fetch_add(p.skipped, stepper.skipped(), __ATOMIC_RELAXED);
    };
    switch (p.decay) {
      case WeightDecay::none: return with(Stepper<WeightDecay::none, T>(step, p, panel, buffers));
      case WeightDecay::coupled: return with(Stepper<WeightDecay::coupled, T>(step, p, panel, buffers));
      case WeightDecay::decoupled: return with(Stepper<WeightDecay::decoupled, T>(step, p, panel, buffers));
    }
  });
}

/// What comes before a parameter.
struct Start {
  int64_t cost;
  int64_t chunk;
  int64_t element;
};

/// Calls body(parameter, start, first chunk, last chunk) on several threads, which share the chunks of all parameters
/// evenly, those of a panel together.
template <class Body>
void for_chunks(const MbfStep& step, const Body& body) {
  int64_t total = 0;
  for (int64_t i = 0; i < step.count; ++i) {
    if (numel(step.parameters[i]) > 0) total += chunk_count(step.parameters[i]) * chunk_cost(step.parameters[i]);
  }
  parallel_for(useful_threads(total, step.threads), total, [&](int, int64_t begin, int64_t end) {
    Start start{0, 0, 0};
    for (int64_t i = 0; i < step.count && start.cost < end; ++i) {
      const MbfParameter& p = step.parameters[i];
      if (numel(p) == 0) continue;
      const int64_t chunks = chunk_count(p), cost = chunk_cost(p), panel = larger(1, panel_rows(p) / chunk_rows(p));
      const auto cut = [&](int64_t at) { return smaller(chunks, ceil_div(at - start.cost, cost * panel) * panel); };
      const int64_t first = begin > start.cost ? cut(begin) : 0, last = cut(end);
      if (first < last) body(p, start, first, last);
      start = {start.cost + chunks * cost, start.chunk + chunks, start.element + numel(p)};
    }
  });
}

/// Calls body(first row, rows) for what is worked on at a time in chunks of a parameter.
template <class Stepper, class Body>
__attribute__((always_inline)) inline void for_rows(const Stepper& stepper, const MbfParameter& p, int64_t begin,
                                                    int64_t end, const Body& body) {
  const int64_t at_once = stepper.rows_at_once(), last = smaller(p.rows, end * chunk_rows(p));
  for (int64_t first = begin * chunk_rows(p); first < last; first += at_once) {
    body(first, smaller(at_once, last - first));
  }
}

/// What the steps of layers are shortened by, from the sums of each, the number of its elements and its floor.
void find_caps(const MbfStep& step, const Sums* of_layers, const int64_t* elements, const double* floors,
               double* caps) {
  for (int64_t layer = 0; layer < step.layers; ++layer) {
    const double weight = __builtin_sqrt(of_layers[layer].weight),
                 least = floors[layer] * __builtin_sqrt(static_cast<double>(elements[layer])),
                 bound = step.max_relative_step * (weight > least ? weight : least),
                 length = *step.scale * __builtin_sqrt(of_layers[layer].square);  // not finite if the sum overflows
    caps[layer] = length <= bound ? 1.0 : __builtin_isfinite(length) ? bound / length : 0.0;
  }
  for (int64_t i = 0; i < step.count; ++i) {
    const MbfParameter& p = step.parameters[i];
    for (int k = 0; k <= p.biased; ++k) p.cap[k] = caps[p.layer];
  }
}

/// Makes the scale and the caps of the sums of all chunks.
void find_bounds(const MbfStep& step, const Sums* sums) {
  const bool caps = step.max_relative_step > 0;
  const Scratch<Sums> of_layers(step.layers);
  const Scratch<int64_t> elements(step.layers);
  const Scratch<double> floors(step.layers), of_each(step.layers);
  for (int64_t layer = 0; layer < step.layers; ++layer) {
    of_layers.data()[layer] = {};
    elements.data()[layer] = 0;
  }
  double change = 0;
  for (int64_t i = 0; i < step.count; ++i) {
    const MbfParameter& p = step.parameters[i];
    floors.data()[p.layer] = p.floor;
    if (numel(p) == 0) continue;
    elements.data()[p.layer] += numel(p);
    for (int64_t chunk = 0; chunk < chunk_count(p); ++chunk, ++sums) {
      change += sums->change;
      of_layers.data()[p.layer] += *sums;
    }
  }
  const double size = change < 0 ? -change : change;
  if (step.kl_clip > 0 && size > step.kl_clip) *step.scale = __builtin_sqrt(step.kl_clip / size);
  if (caps) find_caps(step, of_layers.data(), elements.data(), floors.data(), of_each.data());
}

}  // namespace

void mbf_step_(const MbfStep& step) {
  *step.scale = 1;
  int64_t chunks = 0, elements = 0;
  for (int64_t i = 0; i < step.count; ++i) {
    const MbfParameter& p = step.parameters[i];
    if (numel(p) == 0) continue;
    chunks += chunk_count(p);
    elements += numel(p);
  }
  const bool waits = step.waits();
  const Scratch<Sums> sums(waits ? chunks : 0);
  const Scratch<double> directions(waits ? elements : 0);  // each in the type of its momentum
  for_chunks(step, [&](const MbfParameter& p, const Start& start, int64_t begin, int64_t end) {
    with_stepper(step, p, [&](auto& stepper) {
      using A = typename std::remove_reference_t<decltype(stepper)>::A;
      A* const stored = reinterpret_cast<A*>(directions.data() + start.element);
      for_rows(stepper, p, begin, end, [&](int64_t first, int64_t rows) {
        Sums* const of_chunks = sums.data() + start.chunk + first / chunk_rows(p);
        stepper.advance(first, rows, waits ? stored + first * p.columns : nullptr, of_chunks);
      });
    });
  });
  if (!waits) return;
  find_bounds(step, sums.data());
  for_chunks(step, [&](const MbfParameter& p, const Start& start, int64_t begin, int64_t end) {
    const double rate = p.lr.value * *step.scale * *p.cap;
    with_stepper(step, p, [&](auto& stepper) {
      using A = typename std::remove_reference_t<decltype(stepper)>::A;
      const A* const stored = reinterpret_cast<const A*>(directions.data() + start.element);
      for_rows(stepper, p, begin, end, [&](int64_t first, int64_t rows) {
        stepper.descend(first, rows, stored + first * p.columns, rate);
      });
    });
  });
}

}  // namespace fisher_kernels::FISHER_KERNELS_CAPABILITY
