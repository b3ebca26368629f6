#include <cstdint>
#include <limits>

#include "../kernels.h"
#include "integers.h"
#include "lanes.h"
#include "parallel.h"
#include "scratch.h"
#include "vector.h"

namespace fisher_kernels::FISHER_KERNELS_CAPABILITY {

namespace {

// Solutions. The dot products take one pass over u and x and the solution another, which goes from the end of each
// thread's share to its beginning: what the first pass read last is still in the caches.

constexpr int64_t kPieceSize = 8192;  // elements of a partial sum: a matter of the shapes alone

struct Piece {
  const RankOneArrays* arrays;
  int64_t first;
  int64_t size;
};

struct Products {
  double square;  // u.u
  double along;   // u.x
};

template <class T>
inline Products multiply(const T* u, const T* x, int64_t size) {
  using A = Accumulator<T>;
  SumOfProducts<A> square, along;
  for_registers<A>(size, [&](int64_t i, const auto& load, const auto&) {
    const Vector<T> v = load(u + i);
    square.add(v, v);
    along.add(v, load(x + i));
  });
  return {square.total(), along.total()};
}

/// out = (x - along * u) / rho.
template <class T>
inline void subtract(const T* u, const T* x, int64_t size, double along_u, double damping, T* out) {
  using A = Accumulator<T>;
  const A along = static_cast<A>(along_u), rho = static_cast<A>(damping);
  for_registers<A>(size, [&](int64_t i, const auto& load, const auto& store) {
    store(out + i, (load(x + i) - along * load(u + i)) / rho);
  });
}

/// Calls body(u, x, out, size) with pointers of the dtype of the piece.
template <class Body>
inline void with_piece(const Piece& piece, const Body& body) {
  with_type(piece.arrays->dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const RankOneArrays& arrays = *piece.arrays;
    body(static_cast<const T*>(arrays.u) + piece.first, static_cast<const T*>(arrays.x) + piece.first,
         static_cast<T*>(arrays.out) + piece.first, piece.size);
  });
}

// Inverses.

enum Status : int64_t { kUpdated = 0, kNotPositive = 1, kNotFinite = 2 };

/// What is asked of every vector before its update, for one block or for one in each lane of V.
template <class A, class V>
struct Judgement {
  V den;
  V status;

  /// q = u^T P u, and size = the sum of u_i^2 P_ii.
  Judgement(const InverseUpdate& b, V q, V size) {
    using Number = std::conditional_t<std::is_same_v<V, double>, double, A>;
    constexpr Number kUnit = std::numeric_limits<A>::epsilon() / 2;
    const Number decay = static_cast<Number>(b.decay), gain = static_cast<Number>(b.gain), zero = 0;
    const V none = V{}, one = none + 1, two = none + 2;
    den = decay + gain * q;
    // By how much rounding the entries of P moves q: each is at most the root of P_ii P_jj.
    const V noise = (b.n * kUnit) * size, of_den = (gain < 0 ? -gain : gain) * noise;
    const auto lost = (den <= of_den) | ((decay * q < den * noise) & (of_den > kUnit * kUnit * decay));
    status = (den - den == zero) & (noise - noise == zero) ? (lost ? one : none) : two;
  }
};

// Small blocks: one in each lane, stored from where they have been updated.

/// At least half a register, below which the last register of a row reaches over more than the next one.
constexpr int64_t kLargestInLanes = 16;

template <class A>
constexpr int64_t kCacheLine = 64 / static_cast<int64_t>(sizeof(A));  // numbers of one

template <class A>
struct LaneUpdater {
  using V = Vector<A>;

  const InverseUpdate& b;
  V* const p;     // [n, n]
  V* const u;     // [vectors, n]
  V* const v;     // [n]
  V* const size;  // [n], of the diagonal of P: at first, or what it has grown to

  /// Registers that it works on.
  static int64_t registers(const InverseUpdate& b) { return b.n * (b.n + b.vectors + 2); }

  LaneUpdater(const InverseUpdate& update, V* memory)
      : b(update), p(memory), u(p + b.n * b.n), v(u + b.vectors * b.n), size(v + b.n) {}

  /// Updates what has been loaded, and says what became of each lane.
  V update() const {
    const V zero = {}, one = zero + 1, two = zero + 2;
    V status = zero, lowest = one, taint = zero;
    for (int64_t i = 0; i < b.n; ++i) {
      size[i] = p[i * (b.n + 1)];
      lowest = size[i] < lowest ? size[i] : lowest;
    }
    for (int64_t j = 0; j < b.vectors; ++j) {
      const V* const x = u + j * b.n;
      multiply_lanes<A>(p, x, b.n, v);
      V q = zero, sum = zero;
      for (int64_t i = 0; i < b.n; ++i) {
        q += x[i] * v[i];
        sum += x[i] * (x[i] * size[i]);
      }
      const Judgement<A, V> judgement(b, q, sum);
      status = status != zero ? status : judgement.status;
      taint = subtract(static_cast<A>(b.gain) / judgement.den, j + 1 == b.vectors ? static_cast<A>(1 / b.decay) : A(1));
      for (int64_t i = 0; i < b.n; ++i) {
        const V left = p[i * (b.n + 1)];
        lowest = left < lowest ? left : lowest;
        if (b.gain < 0) size[i] = left;
      }
    }
    const V of_result = taint == zero ? (lowest > zero ? zero : one) : two;
    return status != zero ? status : of_result;
  }

  /// P <- (P - c v v^T) * scale; zero, or NaN in the lanes where that is not finite.
  V subtract(V c, A scale) const {
    V taint = {};
    for (int64_t r = 0; r < b.n; ++r) {
      V* const row = p + r * b.n;
      const V along = c * v[r];
      for (int64_t k = 0; k <= r; ++k) {
        const V value = (row[k] - along * v[k]) * scale;
        taint += value * A(0);
        row[k] = p[k * b.n + r] = value;
      }
    }
    return taint;
  }
};

template <class A>
inline void update_in_lanes(const InverseUpdate& b) {
  constexpr int64_t kWidth = kLanes<A>;
  A* const inverse = static_cast<A*>(b.inverse);
  const A* const u = static_cast<const A*>(b.u);
  const int64_t size = b.n * b.n, row = b.vectors * b.n, groups = ceil_div(b.count, kWidth);
  const int64_t threads = useful_threads(b.count * (size + row), b.threads);
  parallel_for(static_cast<int>(smaller(threads, groups)), groups, [&](int, int64_t begin, int64_t end) {
    const LaneScratch<A> scratch(LaneUpdater<A>::registers(b));
    const LaneUpdater<A> updater(b, scratch.data());
    for (int64_t group = begin; group < end; ++group) {
      const int64_t first = group * kWidth, present = smaller(b.count - first, kWidth);
      A* const blocks = inverse + first * size;
      // What lies side by side in lanes lies one behind the other in memory: processors do not see it coming.
      const A* const next = blocks + present * size;
      for (int64_t i = 0; i < kWidth * size; i += kCacheLine<A>) __builtin_prefetch(next + i, 0, 2);
      load_lanes(blocks, present, size, updater.p);
      load_lanes(u + first * row, present, row, updater.u);
      const Vector<A> status = updater.update();
      uint32_t good = 0;
      for (int64_t r = 0; r < present; ++r) {
        b.info[first + r] = static_cast<int64_t>(status[r]);
        good |= static_cast<uint32_t>(status[r] == 0) << r;
      }
      store_lanes(updater.p, good, size, blocks);
    }
  });
}

// Larger blocks: one after the other. A block is gone through twice, for the products P u_j and to change it; between
// the two it stays in the caches. Its rows need not fill registers. For the products the last register of a row reaches
// into the next one, which is right behind it; only at the end of the block is a part of a register read.

/// The lanes from p on that lie before `end`, and zeros.
template <class A>
inline Vector<A> load_until(const A* p, const A* end) {
  return end - p >= kLanes<A> ? load(p) : load(p, end - p);
}

/// What one thread needs to update one block after the other.
template <class A>
class RowUpdater {
 public:
  explicit RowUpdater(const InverseUpdate& b)
      : b_(b),
        n_(b.n),
        vectors_(b.vectors),
        stride_(ceil_div(b.n, kLanes<A>) * kLanes<A>),
        sign_(b.gain < 0 ? A(-1) : A(1)),
        reciprocal_(static_cast<A>(1 / b.decay)),
        around_stride_(stride_ + kLanes<A>),
        memory_((b.vectors + 2) * (stride_ / kLanes<A>) + b.vectors * (around_stride_ / kLanes<A>)),
        w_(reinterpret_cast<A*>(memory_.data())),
        diagonal_(w_ + b.vectors * stride_),
        size_(diagonal_ + stride_),
        around_(size_ + stride_) {}

  /// P <- (P - gain sum over j of v_j v_j^T / den_j) / decay with v_j = Q_j u_j and den_j = decay + gain u_j^T Q_j u_j,
  /// where Q_j is P less the terms before j: an L D L^T factorisation of decay I + gain U P U^T, as it goes along.
  Status update(A* p, const A* u) {
    begin(p);
    for (int64_t j = 0; j < vectors_; ++j) {
      multiply(p, u + j * n_, w_ + j * stride_);
      const Status status = scale(j, u + j * n_);
      if (status != kUpdated) return status;
    }
    const Status status = look(p);
    if (status == kUpdated) write(p);
    return status;
  }

 private:
  static constexpr int kStripRegisters = 4;  // of columns whose sums stay in registers

  void begin(const A* p) {
    for (int64_t i = 0; i < stride_; ++i) diagonal_[i] = size_[i] = i < n_ ? p[i * (n_ + 1)] : A(1);
    reach_ = Vector<A>{};
  }

  /// v = P u.
  void multiply(const A* p, const A* u, A* v) {
    for (int64_t first = 0; first < n_; first += kStripRegisters * kLanes<A>) {
      const int64_t registers = smaller(ceil_div(n_ - first, kLanes<A>), kStripRegisters);
      with_constant<kStripRegisters>(registers, [&](auto count) { multiply<decltype(count)::value>(p, u, first, v); });
    }
  }

  /// Columns first, first + 1, ... of it, in kRegisters registers. Adds the squares of P to the reach.
  template <int kRegisters>
  void multiply(const A* p, const A* u, int64_t first, A* v) {
    Vector<A> sum[kRegisters] = {}, squares[kRegisters] = {};
    const int64_t n = n_;
    const auto add = [&](int64_t r, const auto& load) {
      const A* const row = p + r * n + first;
#pragma GCC unroll 4
      for (int i = 0; i < kRegisters; ++i) {
        const Vector<A> value = load(row + i * kLanes<A>);
        sum[i] += u[r] * value;
        squares[i] += value * value;
      }
    };
    const A* const end = p + n * n;
    int64_t r = 0;
    for (; r < n - 1; ++r) add(r, [](const A* entries) { return load(entries); });
    add(r, [=](const A* entries) { return load_until(entries, end); });
    for (int i = 0; i < kRegisters; ++i) {
      const int64_t c = first + i * kLanes<A>;
      store(v + c, first_lanes<A>(sum[i], smaller(n_ - c, kLanes<A>)));
      reach_ += squares[i];
    }
  }

  /// Takes w_j from P u_j to Q_j u_j times the root of |gain| / den_j.
  Status scale(int64_t j, const A* u) {
    A* const v = w_ + j * stride_;
    const A* const end = u + n_;
    for (int64_t i = 0; i < j; ++i) {
      const A* const w = w_ + i * stride_;
      Vector<A> sum = {};
      for (int64_t c = 0; c < n_; c += kLanes<A>) sum += load(w + c) * load_until(u + c, end);
      const A along = sign_ * sum_lanes<A>(sum);
      for (int64_t c = 0; c < n_; c += kLanes<A>) store(v + c, load(v + c) - along * load(w + c));
    }
    Vector<A> products = {}, sizes = {};
    for (int64_t c = 0; c < n_; c += kLanes<A>) {
      const Vector<A> x = load_until(u + c, end);
      products += x * load(v + c);
      sizes += x * (x * load(size_ + c));
    }
    const Judgement<A, double> judgement(b_, sum_lanes<A>(products), sum_lanes<A>(sizes));
    if (judgement.status != 0) return static_cast<Status>(judgement.status);
    const Vector<A> far = Vector<A>{} + std::numeric_limits<A>::infinity();
    const A root = static_cast<A>(__builtin_sqrt(sign_ * b_.gain / judgement.den));
    for (int64_t c = 0; c < n_; c += kLanes<A>) {
      const Vector<A> w = root * load(v + c), left = load(diagonal_ + c) - (sign_ * w) * w, size = load(size_ + c);
      store(v + c, w);
      store(diagonal_ + c, left);
      if (b_.gain < 0) store(size_ + c, left);
      reach_ += (left * reciprocal_ > A(0)) & (size > A(0)) ? w * w : far;
    }
    return kUpdated;
  }

  /// What becomes of entries. Held in registers: for all a compiler knows, a store may change what an object points at.
  struct Change {
    const A* w;
    int64_t vectors;
    int64_t stride;
    A sign;
    A reciprocal;

    /// Lanes of entries (r, c), (r, c + 1), ... of the result, given those of P.
    Vector<A> operator()(Vector<A> old, int64_t r, int64_t c) const {
      for (int64_t j = 0; j < vectors; ++j) old -= (sign * w[j * stride + r]) * load(w + j * stride + c);
      return old * reciprocal;
    }
  };

  Change change() const { return {w_, vectors_, stride_, sign_, reciprocal_}; }

  /// Whether the result may be written.
  Status look(const A* p) const {
    // No entry of P is larger than 1 + the sum of their squares. Nearly always that is all there is to see.
    constexpr double kRoom = std::numeric_limits<A>::max() / 4;
    if ((1 + static_cast<double>(sum_lanes<A>(reach_))) / b_.decay < kRoom) return kUpdated;
    const Change updated = change();
    Vector<A> taint = {};
    bool positive = true;
    for (int64_t r = 0; r < n_; ++r) {
      const A* const row = p + r * n_;
      for (int64_t c = 0; c < n_; c += kLanes<A>) {
        taint += updated(load(row + c, smaller(n_ - c, kLanes<A>)), r, c) * A(0);
      }
      positive = positive && row[r] > 0 && diagonal_[r] * reciprocal_ > 0;
    }
    if (sum_lanes<A>(taint) != 0) return kNotFinite;
    return positive ? kUpdated : kNotPositive;
  }

  void write(A* p) {
    for (int64_t j = 0; j < vectors_; ++j) {
      const A* const w = w_ + j * stride_;
      A* const around = around_ + j * around_stride_;
      for (int64_t c = 0; c < n_ + kLanes<A>; ++c) around[c] = sign_ * w[c < n_ ? c : c - n_];
    }
    vectors_ == 1 ? write<true>(p) : write<false>(p);
  }

  /// In the order of memory, by registers at their natural addresses: a store across two lines of the cache takes as
  /// long as several within one. A register may hold the end of a row and the beginning of the next. Meanwhile later
  /// blocks are fetched: into the first cache where there is room for them beside this one, else into the second.
  template <bool kOneVector>
  void write(A* p) const {
    const int64_t n = n_, size = n * n, vectors = kOneVector ? 1 : vectors_, stride = stride_;
    const int64_t around_stride = around_stride_;
    const A *const w = w_, *const around = around_;
    const A reciprocal = reciprocal_;
    const auto lane = load_bits<Integers<A>>(kCounting<A>.values);
    const Vector<A> one = Vector<A>{} + 1;
    const bool fits_twice = size * static_cast<int64_t>(sizeof(A)) <= 4096;
    int64_t r = 0, c = 0;
    const auto next = [&](Vector<A> value, int64_t count) {
      const auto in_row = lane < static_cast<Integer<A>>(n - c);
      for (int64_t j = 0; j < vectors; ++j) {
        const A* const row = w + j * stride + r;  // of the last row no lane is in the next one
        value -= (in_row ? row[0] * one : row[1] * one) * load(around + j * around_stride + c);
      }
      c += count;
      if (c >= n) {
        c -= n;
        ++r;
      }
      return value * reciprocal;
    };
    const int64_t head = -(reinterpret_cast<intptr_t>(p) / static_cast<int64_t>(sizeof(A))) & (kLanes<A> - 1);
    if (head > 0) store(p, next(load(p, head), head), head);
    int64_t i = head;
    for (; i + kLanes<A> <= size; i += kLanes<A>) {
      if (fits_twice) {
        __builtin_prefetch(p + i + size + size / 2, 0, 3);
      } else {
        __builtin_prefetch(p + i + 2 * size, 0, 2);
      }
      store(p + i, next(load(p + i), kLanes<A>));
    }
    if (i < size) store(p + i, next(load(p + i, size - i), size - i), size - i);
  }

  const InverseUpdate& b_;
  const int64_t n_;
  const int64_t vectors_;
  const int64_t stride_;
  const A sign_;
  const A reciprocal_;
  const int64_t around_stride_;
  const LaneScratch<A> memory_;
  A* const w_;         // [vectors, stride]: v_j times the root of |gain| / den_j; zeros at the end of each
  A* const diagonal_;  // of P less the terms so far, and ones
  A* const size_;      // of P, or of what it has grown to
  A* const around_;    // [vectors, around_stride]: w_j with the sign of the gain, and its beginning once more
  Vector<A> reach_;    // sums of squares of what the result is made of, or infinite where the diagonal is not positive
};

template <class A>
inline void update_by_rows(const InverseUpdate& b) {
  A* const inverse = static_cast<A*>(b.inverse);
  const A* const u = static_cast<const A*>(b.u);
  const int64_t size = b.n * b.n, row = b.vectors * b.n;
  const int64_t threads = useful_threads(b.count * (size + row), b.threads);
  parallel_for(static_cast<int>(smaller(threads, b.count)), b.count, [&](int, int64_t begin, int64_t end) {
    RowUpdater<A> updater(b);
    for (int64_t i = begin; i < end; ++i) b.info[i] = updater.update(inverse + i * size, u + i * row);
  });
}

}  // namespace

void rank_one_solve(const RankOneSolve& s) {
  int64_t count = 0, total = 0;
  for (int64_t i = 0; i < s.count; ++i) {
    count += ceil_div(s.arrays[i].size, kPieceSize);
    total += s.arrays[i].size;
  }
  const Scratch<Piece> pieces(count);
  const Scratch<Products> products(count);
  Piece* piece = pieces.data();
  for (int64_t i = 0; i < s.count; ++i) {
    const int64_t size = s.arrays[i].size;
    for (int64_t k = 0; k < size; k += kPieceSize) *piece++ = {s.arrays + i, k, smaller(kPieceSize, size - k)};
  }
  const int threads = useful_threads(total, s.threads);
  parallel_for(threads, count, [&](int, int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      with_piece(pieces.data()[i], [&](const auto* u, const auto* x, auto*, int64_t size) {
        products.data()[i] = multiply(u, x, size);
      });
    }
  });
  Products sum{};
  for (int64_t i = 0; i < count; ++i) {
    sum.square += products.data()[i].square;
    sum.along += products.data()[i].along;
  }
  const double along = sum.along / (s.rho + sum.square);
  parallel_for(threads, count, [&](int, int64_t begin, int64_t end) {
    for (int64_t i = end - 1; i >= begin; --i) {
      with_piece(pieces.data()[i], [&](const auto* u, const auto* x, auto* out, int64_t size) {
        subtract(u, x, size, along, s.rho, out);
      });
    }
  });
}

void inverse_update_(const InverseUpdate& b) {
  with_type(b.dtype, [&](auto* type) {
    using A = Accumulator<std::remove_pointer_t<decltype(type)>>;
    b.n <= kLargestInLanes ? update_in_lanes<A>(b) : update_by_rows<A>(b);
  });
}

}  // namespace fisher_kernels::FISHER_KERNELS_CAPABILITY
