#include <cstdint>

#include "../kernels.h"
#include "integers.h"
#include "lanes.h"
#include "panels.h"
#include "parallel.h"
#include "scratch.h"
#include "sweep.h"
#include "vector.h"

namespace fisher_kernels::FISHER_KERNELS_CAPABILITY {

namespace {

// Each lane holds one block, so what follows is the arithmetic of a single block on numbers that are registers. It goes
// through the matrix in squares of kTile x kTile numbers, of which a sum stays in registers.
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kTile = 4;  // 16 sums, 4 factors and one more fit into 32 registers
#else
constexpr int kTile = 3;
#endif

/// A block A in each lane: n x n numbers in row-major order, and a register of zeros that becomes NaN in the lanes of
/// blocks that are not to be used. A = L D L^T with ones on the diagonal of L, and A^-1 = M^T D^-1 M with M = L^-1.
/// That takes no roots, whose rounding would count twice in the inverse.
template <class A>
struct Lanes {
  Vector<A>* a;
  Vector<A>* reciprocal;  // [n], of D
  int64_t n;
  Vector<A> taint;
  const char* next;  // goes through the next group, which is to be in the cache when this one is done
  int64_t stride;    // a step of it; there is one with each product of columns
};

/// Entries of a matrix: at(i, k) is data[i * row + k * step].
template <class A>
struct Entries {
  const Vector<A>* data;
  int64_t row;
  int64_t step;
};

/// tile[i][j] -= sum over k < count of x(i, k) * y(j, k). Fetches some of the next group on the way: a few lines at a
/// time, for which nobody has to wait. What is asked for beyond its end does no harm.
template <class A, int kRows, int kColumns>
inline void subtract_products(Vector<A> (&tile)[kRows][kColumns], Entries<A> x, Entries<A> y, int64_t count,
                              Lanes<A>& lanes) {
  const char* next = lanes.next;
  const int64_t stride = lanes.stride;
  for (int64_t k = 0; k < count; ++k) {
    __builtin_prefetch(next, 0, 2);
    next += stride;
    Vector<A> factors[kColumns];
#pragma GCC unroll 4
    for (int j = 0; j < kColumns; ++j) factors[j] = y.data[j * y.row + k * y.step];
#pragma GCC unroll 4
    for (int i = 0; i < kRows; ++i) {
      const Vector<A> factor = x.data[i * x.row + k * x.step];
#pragma GCC unroll 4
      for (int j = 0; j < kColumns; ++j) tile[i][j] -= factor * factors[j];
    }
  }
  lanes.next = next;
}

/// Blocks of up to this size are factored without the error that rounding L brings: that costs a few instructions, and
/// makes each number of an inverse of two rows exact to a few roundings, whatever the condition. Of larger blocks other
/// roundings cost as much.
constexpr int64_t kLargestCorrected = 3;

/// c - x * y, rounded once, on processors without an instruction for it as well; one where there is one.
template <class A>
inline Vector<A> subtract_product(Vector<A> c, Vector<A> x, Vector<A> y) {
  Vector<A> result;
  for (int i = 0; i < kLanes<A>; ++i) {
    if constexpr (sizeof(A) == sizeof(float)) {
      result[i] = __builtin_fmaf(-x[i], y[i], c[i]);
    } else {
      result[i] = __builtin_fma(-x[i], y[i], c[i]);
    }
  }
  return result;
}

/// Rows first, first + 1, ... of L in place of those of the lower triangle, and of L D as columns of the upper one.
template <class A, int kRows>
inline void factor_rows(Lanes<A>& lanes, int64_t first) {
  const int64_t n = lanes.n;
  Vector<A>* const rows = lanes.a + first * n;
  for (int64_t column = 0; column < first; column += kTile) {
    const Vector<A>* const above = lanes.a + column * n + column;
    Vector<A> tile[kRows][kTile];
    for (int i = 0; i < kRows; ++i) {
      for (int j = 0; j < kTile; ++j) tile[i][j] = rows[i * n + column + j];
    }
    subtract_products<A>(tile, Entries<A>{rows, n, 1}, Entries<A>{lanes.a + column, 1, n}, column, lanes);
#pragma GCC unroll 4
    for (int j = 0; j < kTile; ++j) {
#pragma GCC unroll 4
      for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 4
        for (int k = 0; k < j; ++k) tile[i][j] -= tile[i][k] * above[j * n + k];
        rows[i * n + column + j] = tile[i][j] * lanes.reciprocal[column + j];
        lanes.a[(column + j) * n + first + i] = tile[i][j];
      }
    }
  }
  Vector<A> tile[kRows][kRows];
  for (int i = 0; i < kRows; ++i) {
    for (int j = 0; j < kRows; ++j) tile[i][j] = rows[i * n + first + j];
  }
  subtract_products<A>(tile, Entries<A>{rows, n, 1}, Entries<A>{lanes.a + first, 1, n}, first, lanes);
  const Vector<A> zero = {}, one = zero + 1, nan = zero + static_cast<A>(__builtin_nan(""));
#pragma GCC unroll 4
  for (int j = 0; j < kRows; ++j) {
    const Vector<A> pivot = tile[j][j];
    lanes.taint += pivot > zero ? pivot * zero : nan;
    const Vector<A> reciprocal = one / pivot;
    lanes.reciprocal[first + j] = reciprocal;
#pragma GCC unroll 4
    for (int i = j + 1; i < kRows; ++i) {
      const Vector<A> entry = tile[i][j] * reciprocal;
      rows[i * n + first + j] = entry;
      if (kRows <= kLargestCorrected && n == kRows) {
        const Vector<A> rest = subtract_product<A>(tile[i][j], entry, pivot) * reciprocal;  // what rounding took
#pragma GCC unroll 4
        for (int k = j + 1; k <= i; ++k) {
          tile[i][k] = subtract_product<A>(tile[i][k], entry, tile[k][j]) - rest * tile[k][j];
        }
      } else {
#pragma GCC unroll 4
        for (int k = j + 1; k <= i; ++k) tile[i][k] -= entry * tile[k][j];
      }
    }
  }
}

/// Rows of M in place of those of L, and of D^-1 M as columns of the upper triangle. The squares on the diagonal hold M
/// alone, with its ones and zeros.
template <class A, int kRows>
inline void invert_rows(Lanes<A>& lanes, int64_t first) {
  const int64_t n = lanes.n;
  Vector<A>* const rows = lanes.a + first * n;
  const Vector<A>* const reciprocal = lanes.reciprocal + first;
  for (int64_t column = 0; column < first; column += kTile) {
    Vector<A> tile[kRows][kTile] = {};
    subtract_products<A>(tile, Entries<A>{rows + column, n, 1}, Entries<A>{lanes.a + column * n + column, 1, n},
                         first - column, lanes);
#pragma GCC unroll 4
    for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 4
      for (int j = 0; j < kTile; ++j) {
#pragma GCC unroll 4
        for (int k = 0; k < i; ++k) tile[i][j] -= rows[i * n + first + k] * tile[k][j];
        rows[i * n + column + j] = tile[i][j];
        lanes.a[(column + j) * n + first + i] = tile[i][j] * reciprocal[i];
      }
    }
  }
  Vector<A> tile[kRows][kRows] = {};
#pragma GCC unroll 4
  for (int j = 0; j < kRows; ++j) {
    tile[j][j] += 1;
#pragma GCC unroll 4
    for (int i = j + 1; i < kRows; ++i) {
#pragma GCC unroll 4
      for (int k = j; k < i; ++k) tile[i][j] -= rows[i * n + first + k] * tile[k][j];
    }
  }
  for (int i = 0; i < kRows; ++i) {
    for (int j = 0; j < kRows; ++j) rows[i * n + first + j] = tile[i][j];
  }
}

/// Rows of M^T D^-1 M in place of those of M, mirrored into the columns above. Rows below are read, those above not.
template <class A, int kRows>
inline void square_rows(Lanes<A>& lanes, int64_t first) {
  const int64_t n = lanes.n, below = first + kRows;
  Vector<A>* const rows = lanes.a + first * n;
  const Vector<A> zero = {};
  Vector<A> taint = lanes.taint;  // in a register
  Vector<A> scaled[kRows][kRows];  // the square of M on the diagonal, negative
  for (int k = 0; k < kRows; ++k) {
    for (int i = 0; i < kRows; ++i) scaled[k][i] = -(rows[k * n + first + i] * lanes.reciprocal[first + k]);
  }
  for (int64_t column = 0; column < first; column += kTile) {
    Vector<A> tile[kRows][kTile] = {};
    subtract_products<A>(tile, Entries<A>{rows + below, n, 1}, Entries<A>{lanes.a + below * n + column, 1, n},
                         n - below, lanes);
#pragma GCC unroll 4
    for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 4
      for (int j = 0; j < kTile; ++j) {
#pragma GCC unroll 4
        for (int k = i; k < kRows; ++k) tile[i][j] += scaled[k][i] * rows[k * n + column + j];
        tile[i][j] = -tile[i][j];
        taint += tile[i][j] * zero;
        lanes.a[(column + j) * n + first + i] = tile[i][j];
      }
    }
    for (int i = 0; i < kRows; ++i) {
      for (int j = 0; j < kTile; ++j) rows[i * n + column + j] = tile[i][j];
    }
  }
  Vector<A> tile[kRows][kRows] = {};
  subtract_products<A>(tile, Entries<A>{rows + below, n, 1}, Entries<A>{lanes.a + below * n + first, 1, n}, n - below,
                       lanes);
#pragma GCC unroll 4
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 4
    for (int j = 0; j <= i; ++j) {
#pragma GCC unroll 4
      for (int k = i; k < kRows; ++k) tile[i][j] += scaled[k][i] * rows[k * n + first + j];
      taint += tile[i][j] * zero;
    }
  }
  for (int i = 0; i < kRows; ++i) {
    for (int j = 0; j <= i; ++j) rows[i * n + first + j] = rows[j * n + first + i] = -tile[i][j];
  }
  lanes.taint = taint;
}

/// Calls body with the rows of each square in turn: kTile of them, or what is left.
template <class Body>
inline void for_rows(int64_t n, const Body& body) {
  using Whole = std::integral_constant<int, kTile>;
  int64_t first = 0;
  for (; first + kTile <= n; first += kTile) body(Whole{}, first);
  switch (n - first) {
    case 1: return body(std::integral_constant<int, 1>{}, first);
    case 2: return body(std::integral_constant<int, 2>{}, first);
    case 3: return body(std::integral_constant<int, kTile == 4 ? 3 : 1>{}, first);
    default: return;
  }
}

template <class A>
inline void factor(Lanes<A>& lanes, A damping) {
  for (int64_t i = 0; i < lanes.n; ++i) lanes.a[i * (lanes.n + 1)] += damping;
  for_rows(lanes.n, [&](auto rows, int64_t first) { factor_rows<A, decltype(rows)::value>(lanes, first); });
}

template <class A>
inline void invert(Lanes<A>& lanes) {
  for_rows(lanes.n, [&](auto rows, int64_t first) { invert_rows<A, decltype(rows)::value>(lanes, first); });
  for_rows(lanes.n, [&](auto rows, int64_t first) { square_rows<A, decltype(rows)::value>(lanes, first); });
}

/// x <- (L D L^T)^-1 x.
template <class A>
inline void solve(Lanes<A>& lanes, Vector<A>* x) {
  const int64_t n = lanes.n;
  for (int64_t i = 0; i < n; ++i) {
    const Vector<A>* const row = lanes.a + i * n;
    Vector<A> sum[2] = {x[i], {}};
    for (int64_t k = 0; k < i; ++k) sum[k % 2] -= row[k] * x[k];
    x[i] = sum[0] + sum[1];
  }
  for (int64_t i = 0; i < n; ++i) x[i] *= lanes.reciprocal[i];
  const Vector<A> zero = {};
  for (int64_t i = n - 1; i >= 0; --i) {
    const Vector<A>* const row = lanes.a + i * n;
    const Vector<A> value = x[i];
    lanes.taint += value * zero;
    for (int64_t k = 0; k < i; ++k) x[k] -= row[k] * value;
  }
}

/// Marks the bad blocks of a group in info, and returns a bit for each good one.
template <class A>
inline uint32_t judge(const Lanes<A>& lanes, int64_t count, int64_t* info) {
  uint32_t good = 0;
  for (int64_t r = 0; r < count; ++r) {
    info[r] = lanes.taint[r] == 0 ? 0 : 1;
    good |= static_cast<uint32_t>(1 - info[r]) << r;
  }
  return good;
}

template <class A>
inline void fill_bad(A* out, int64_t size, const int64_t* info, int64_t count) {
  for (int64_t r = 0; r < count; ++r) {
    for (int64_t i = 0; info[r] != 0 && i < size; ++i) out[r * size + i] = static_cast<A>(__builtin_nan(""));
  }
}

constexpr int64_t kCacheLine = 64;

/// Results larger than this do not stay in the caches until they are read: they bypass them, which saves reading what
/// is overwritten.
constexpr int64_t kStreamedBytes = 4 << 20;

template <class A>
inline bool worth_streaming(const A* out, int64_t size) {
  const bool aligned = reinterpret_cast<uintptr_t>(out) % kVectorBytes == 0;
  return aligned && size * static_cast<int64_t>(sizeof(A)) >= kStreamedBytes;
}

/// NaN in the lanes of blocks with an entry that is not finite. The whole group is read in the order of memory, which
/// is what the processor fetches ahead; taking the blocks side by side is not.
template <class A>
inline Vector<A> find_taint(const A* blocks, int64_t count, int64_t size) {
  Vector<A> taint = {};
  if (all_finite(blocks, count * size)) return taint;
  for (int64_t r = 0; r < count; ++r) {
    if (!all_finite(blocks + r * size, size)) taint[r] = static_cast<A>(__builtin_nan(""));
  }
  return taint;
}

/// Calls body(lanes, room, first, count) for each group of blocks, read into lanes and factored. There is room for all
/// numbers of a group, and `extra` more registers lie behind the reciprocals.
template <class A, class Body>
inline void for_groups(const A* blocks, int64_t count, int64_t n, double damping, int64_t extra, int threads,
                       const Body& body) {
  constexpr int64_t kWidth = kLanes<A>;
  const int64_t size = n * n, groups = ceil_div(count, kWidth);
  const int useful = static_cast<int>(smaller(groups, useful_threads(groups * kWidth * size * (1 + n / 8), threads)));
  parallel_for(useful, groups, [&](int, int64_t begin, int64_t end) {
    const LaneScratch<A> scratch(2 * size + n + extra);
    Vector<A>* const a = scratch.data() + size;
    A* const room = reinterpret_cast<A*>(scratch.data());
    // About as many products of columns as factor, invert and square have together.
    const int64_t tiles = ceil_div(n, kTile), products = larger(1, kTile * tiles * tiles * tiles / 2);
    const int64_t stride = ceil_div(size * kVectorBytes, products * kCacheLine) * kCacheLine;
    for (int64_t group = begin; group < end; ++group) {
      const int64_t first = group * kWidth, present = smaller(count - first, kWidth);
      const A* const next = blocks + (group + 1 < end ? first + present : first) * size;
      Lanes<A> lanes{a, a + size, n, find_taint(blocks + first * size, present, size),
                     reinterpret_cast<const char*>(next), stride};
      load_lower(blocks + first * size, present, n, a);
      factor(lanes, static_cast<A>(damping));
      body(lanes, room, first, present);
    }
    finish_streaming();
  });
}

/// Blocks of more rows are inverted one by one: there a register holds numbers of one block.
constexpr int64_t kLargestInverseInLanes = 64;

/// Inverts a block; out is written to only if it is good.
template <class A>
inline bool invert_by_sweeps(const A* block, int64_t n, A damping, const Sweep<A>& sweep, int threads, A* out) {
  if (!all_finite(block, n * n)) return false;
  load_strips(block, n, damping, sweep);
  if (!sweep_all(sweep, threads) || !all_finite(sweep.entries, sweep.right - sweep.entries)) return false;
  store_negative(sweep, n, out);
  return true;
}

/// Threads share out the blocks, or the work on each of them where there are fewer blocks than threads.
template <class A>
inline void invert_large(const BlockInverse& b) {
  const int64_t size = b.n * b.n, needed = ceil_div(Sweep<A>::size(b.n), kLanes<A>) * kLanes<A>;
  const bool shared_out = b.count >= b.threads;
  const int each = shared_out ? 1 : b.threads, together = shared_out ? b.threads : 1;
  const Scratch<A> scratch(together * needed + kLanes<A>);
  A* const memory = align(scratch.data());
  parallel_for(together, b.count, [&](int thread, int64_t begin, int64_t end) {
    const Sweep<A> sweep(b.n, memory + thread * needed);
    for (int64_t i = begin; i < end; ++i) {
      const A* const block = static_cast<const A*>(b.blocks) + i * size;
      A* const out = static_cast<A*>(b.out) + i * size;
      b.info[i] = invert_by_sweeps(block, b.n, static_cast<A>(b.damping), sweep, each, out) ? 0 : 1;
      if (!b.keep_bad) fill_bad(out, size, b.info + i, 1);
    }
  });
}

// A product with a matrix reads it once. Rows shorter than a few registers leave lanes idle, and adding up the lanes
// costs as much as the row: there one matrix in each lane is faster.
constexpr int64_t kLargestProductInLanes = 24;

template <class A>
inline void apply_in_lanes(const A* blocks, const A* vectors, A* out, int64_t count, int64_t n, int threads) {
  constexpr int64_t kWidth = kLanes<A>;
  const int64_t size = n * n, groups = ceil_div(count, kWidth);
  const int useful = static_cast<int>(smaller(groups, useful_threads(count * size, threads)));
  parallel_for(useful, groups, [&](int, int64_t begin, int64_t end) {
    const LaneScratch<A> scratch(size + 2 * n);
    Vector<A>* const a = scratch.data();
    Vector<A>*const v = a + size, *const sums = v + n;
    for (int64_t group = begin; group < end; ++group) {
      const int64_t first = group * kWidth, present = smaller(count - first, kWidth);
      load_lanes(blocks + first * size, present, size, a);
      load_lanes(vectors + first * n, present, n, v);
      multiply_lanes<A>(a, v, n, sums);
      store_lanes(sums, (uint32_t{1} << present) - 1, n, out + first * n);
    }
  });
}

template <class A>
inline void apply_by_rows(const A* blocks, const A* vectors, A* out, int64_t count, int64_t n, int threads) {
  const int64_t whole = n - n % kLanes<A>;
  parallel_for(useful_threads(count * n * n, threads), count, [&](int, int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) {
      const A* const v = vectors + block * n;
      const Vector<A> rest = load(v + whole, n - whole);
      for (int64_t i = 0; i < n; ++i) {
        const A* const row = blocks + (block * n + i) * n;
        Vector<A> sum = load(row + whole, n - whole) * rest;
        for (int64_t k = 0; k < whole; k += kLanes<A>) sum += load(row + k) * load(v + k);
        out[block * n + i] = sum_lanes<A>(sum);
      }
    }
  });
}

}  // namespace

void block_inverse(const BlockInverse& b) {
  with_type(b.dtype, [&](auto* type) {
    using A = Accumulator<std::remove_pointer_t<decltype(type)>>;
    if (b.n > kLargestInverseInLanes) return invert_large<A>(b);
    A* const out = static_cast<A*>(b.out);
    const int64_t size = b.n * b.n;
    const bool streamed = worth_streaming(out, b.count * size);
    for_groups(static_cast<const A*>(b.blocks), b.count, b.n, b.damping, 0, b.threads,
               [&](Lanes<A>& lanes, A* room, int64_t first, int64_t count) {
                 invert(lanes);
                 A* const to = out + first * size;
                 const uint32_t good = judge(lanes, count, b.info + first);
                 if (streamed && good == kAllLanes<A>) {
                   store_lanes(lanes.a, good, size, room);
                   for (int64_t i = 0; i < size * kLanes<A>; i += kLanes<A>) stream(to + i, load(room + i));
                   return;
                 }
                 store_lanes(lanes.a, good, size, to);
                 if (!b.keep_bad) fill_bad(to, size, b.info + first, count);
               });
  });
}

void block_solve(const BlockSolve& b) {
  with_type(b.dtype, [&](auto* type) {
    using A = Accumulator<std::remove_pointer_t<decltype(type)>>;
    const A* const rhs = static_cast<const A*>(b.rhs);
    A* const out = static_cast<A*>(b.out);
    for_groups(static_cast<const A*>(b.blocks), b.count, b.n, b.damping, b.n, b.threads,
               [&](Lanes<A>& lanes, A*, int64_t first, int64_t count) {
                 Vector<A>* const x = lanes.reciprocal + b.n;
                 lanes.taint += find_taint(rhs + first * b.n, count, b.n);
                 load_lanes(rhs + first * b.n, count, b.n, x);
                 solve(lanes, x);
                 store_lanes(x, judge(lanes, count, b.info + first), b.n, out + first * b.n);
                 fill_bad(out + first * b.n, b.n, b.info + first, count);
               });
  });
}

void block_apply(const BlockApply& b) {
  with_type(b.dtype, [&](auto* type) {
    using A = Accumulator<std::remove_pointer_t<decltype(type)>>;
    const A* const blocks = static_cast<const A*>(b.blocks);
    const A* const vectors = static_cast<const A*>(b.vectors);
    A* const out = static_cast<A*>(b.out);
    if (b.n <= kLargestProductInLanes) {
      apply_in_lanes(blocks, vectors, out, b.count, b.n, b.threads);
    } else {
      apply_by_rows(blocks, vectors, out, b.count, b.n, b.threads);
    }
  });
}

}  // namespace fisher_kernels::FISHER_KERNELS_CAPABILITY
