#include "kernels.h"
#include "staging.cuh"

// Inverses of many small symmetric positive definite blocks, and solutions with them. A CTA moves a run of blocks
// through shared memory, 16 bytes a thread: 2 n^2 numbers a block for an inverse, n^2 + 2 n for a solution. In between
// each block stays in registers, of one thread or spread over a few lanes, a warp or a CTA: a good n^3 / 2
// multiplications for an inverse, of which one triangle is worked on, and n^3 / 2 for a solution (a third of that in
// one thread).
//
// The blocks are swept (Gauss-Jordan elimination without pivoting, which positive definite blocks do not need): with
// c column k, d = c_k and r = c / d, entry a_ij becomes a_ij - c_i r_j, row and column k become r, and -1 / d stands
// where they meet. After n sweeps -a is the inverse. There are no roots, whose rounding would count twice.
namespace fisher_kernels::cuda {

namespace {

constexpr int kLargest = 64;

/// Of blocks of up to this size the quotients c / d are corrected by what rounding took from them: a few instructions
/// make each number of an inverse of two rows exact to a few roundings, whatever the condition. Of larger blocks other
/// roundings cost as much.
constexpr int kLargestCorrected = 3;
constexpr int kSmallest = 4;  // the size class that these are of

/// A size class: blocks of up to `kSize` rows, n being a number at run time, and each block on a grid of lanes. Rows
/// and columns are dealt to the grid in turns, as cards are, so that each lane has its share of the block:
/// - column j to grid column j % kColumns, as number j / kColumns of its `kTurns`;
/// - row i to grid row (i % kColumns) / kDeal, `kDeal` neighbours at each turn.
///
/// A multiprocessor has room for so many CTAs that a thread has `kRegisters`, of an inverse or a solution.
template <class A_, int kSize_, int kGridRows, int kGridColumns, int kRegisters, int kRegistersOfSolution>
struct Traits {
  using A = A_;
  static constexpr int kSize = kSize_;
  static constexpr int kVector = kVectorBytes / sizeof(A);
  static constexpr int kThreads = 64;  // of a CTA: few, so that some CTAs of an SM move blocks while others compute
  static constexpr int kRows = kGridRows;
  static constexpr int kColumns = kGridColumns;
  static constexpr int kDeal = kColumns / kRows;
  static constexpr int kTurns = kSize / kColumns;
  static constexpr int kLanes = kRows * kColumns;    // that share a block
  static constexpr int kBlocks = kThreads / kLanes;  // of a CTA

  template <bool kSolve>
  static constexpr int kResident = 65536 / (kThreads * (kSolve ? kRegistersOfSolution : kRegisters));

  // A column on its way to all lanes: the numbers of each grid column together, at odd multiples of 16 bytes, which
  // lie in banks of their own.
  static constexpr int kPart = divide_up(kTurns, kVector) * kVector;
  static constexpr int kPitch = (kPart / kVector | 1) * kVector;
  static constexpr int kLine = kColumns * kPitch + kVector;  // and one number more: of a right-hand side

  static_assert(kTurns * kColumns == kSize && kDeal * kRows == kColumns && kThreads % kLanes == 0);
  static_assert(kWarp % kLanes == 0 || kLanes == kThreads, "lanes are of a warp, or all of the CTA");
  static_assert(kLanes == 1 || kColumns % 2 == 0, "lines take turns");
};

/// What is there in shared memory besides blocks.
template <class Traits>
struct alignas(kVectorBytes) Fixed {
  typename Traits::A lines[Traits::kLanes == 1 ? 1 : Traits::kBlocks][2][Traits::kLine];
  int bad[Traits::kBlocks];
};

template <class A>
struct Params {
  const A* blocks;
  const A* rhs;  // where solutions are wanted
  A* out;
  int64_t* info;
  int64_t count;
  A damping;
  int32_t n;
  bool keep_bad;
  Rows<A> rows;      // of blocks: whole blocks, if a thread has one for itself
  Rows<A> right;     // of right-hand sides
  size_t rows_room;  // elements
};

/// What came to shared memory is looked at for what is not finite; which block that is in is asked only then.
struct MarkBad {
  int* bad;
  int size;  // elements of a block

  template <class A, int N>
  __device__ void operator()(const Pack<A, N>& pack, int first) const {
    A taint = 0;
#pragma unroll
    for (int i = 0; i < N; ++i) taint += pack.at[i] * A(0);
    if (taint == 0) return;
    unsigned which = 0;
#pragma unroll
    for (int i = 0; i < N; ++i) which |= is_finite(pack.at[i]) ? 0u : 1u << i;
    for (; which != 0; which &= which - 1) bad[(first + __ffs(which) - 1) / size] = 1;  // whoever writes, writes 1
  }
};

/// A pivot of a positive definite block.
template <class A>
__device__ bool is_good(A pivot) {
  return pivot > 0 && is_finite(pivot);
}

/// The lower triangle of a block in one thread.
template <class Traits>
struct Triangle {
  using A = typename Traits::A;
  static constexpr int kSize = Traits::kSize;

  A a[kSize][kSize];  // of which the compiler keeps what is used
  int n;

  __device__ Triangle(const A* block, const Params<A>& p) : n(p.n) {
#pragma unroll
    for (int i = 0; i < kSize; ++i) {
#pragma unroll
      for (int j = 0; j <= i; ++j) a[i][j] = i < n ? block[i * n + j] : A(0);
      a[i][i] += p.damping;
    }
  }

  __device__ A& at(int i, int j) { return i < j ? a[j][i] : a[i][j]; }

  /// Returns whether all pivots are good.
  __device__ bool invert() {
    bool good = true;
#pragma unroll
    for (int k = 0; k < kSize; ++k) {
      if (k < n) good = sweep(k) && good;
    }
    return good;
  }

  __device__ bool sweep(int k) {
    const A pivot = a[k][k], reciprocal = 1 / pivot;
    A r[kSize];
#pragma unroll
    for (int i = 0; i < kSize; ++i) r[i] = at(i, k) * reciprocal;
    if (kSize == kSmallest && k < kLargestCorrected && n <= kLargestCorrected) {
#pragma unroll
      for (int j = 0; j < kLargestCorrected; ++j) {
        const A rest = fma(-r[j], pivot, at(j, k)) * reciprocal;  // what rounding took
#pragma unroll
        for (int i = j; i < kLargestCorrected; ++i) {
          if (i != k && j != k) a[i][j] = fma(-at(i, k), r[j], a[i][j]) - at(i, k) * rest;
        }
      }
    } else {
#pragma unroll
      for (int i = 0; i < kSize; ++i) {
#pragma unroll
        for (int j = 0; j <= i; ++j) {
          if (i != k && j != k) a[i][j] -= at(i, k) * r[j];
        }
      }
    }
#pragma unroll
    for (int i = 0; i < kSize; ++i) at(i, k) = i == k ? -reciprocal : r[i];
    return is_good(pivot);
  }

  /// Writes the inverse, or NaN in place of it. Returns whether it is of use.
  __device__ bool store(A* block, bool good) const {
    A taint = 0;
#pragma unroll
    for (int i = 0; i < kSize; ++i) {
#pragma unroll
      for (int j = 0; j <= i; ++j) taint += i < n ? a[i][j] * A(0) : A(0);
    }
    good = good && taint == 0;
    const A nan = static_cast<A>(NAN);
#pragma unroll
    for (int i = 0; i < kSize; ++i) {
#pragma unroll
      for (int j = 0; j <= i; ++j) {
        if (i < n) block[i * n + j] = block[j * n + i] = good ? 0 - a[i][j] : nan;
      }
    }
    return good;
  }

  /// Solves for a right-hand side in place, or makes it NaN: A = L D L^T, and two triangular systems. Returns whether
  /// the solution is of use.
  __device__ bool solve(A* rhs, bool good) {
    A x[kSize], reciprocals[kSize];
#pragma unroll
    for (int i = 0; i < kSize; ++i) x[i] = i < n ? rhs[i] : A(0);
#pragma unroll
    for (int k = 0; k < kSize; ++k) {
      reciprocals[k] = 0;
      if (k >= n) continue;
      good = is_good(a[k][k]) && good;
      reciprocals[k] = 1 / a[k][k];
      eliminate(k, reciprocals[k], x);
    }
    A taint = 0;
#pragma unroll
    for (int k = kSize - 1; k >= 0; --k) {
      x[k] *= reciprocals[k];
#pragma unroll
      for (int i = k + 1; i < kSize; ++i) x[k] -= a[i][k] * x[i];
      taint += x[k] * A(0);
    }
    good = good && taint == 0;
#pragma unroll
    for (int i = 0; i < kSize; ++i) {
      if (i < n) rhs[i] = good ? x[i] : static_cast<A>(NAN);
    }
    return good;
  }

  /// Column k of L in place of that of A, what is right of it without its share, and so x.
  __device__ void eliminate(int k, A reciprocal, A (&x)[kSize]) {
#pragma unroll
    for (int i = kSize - 1; i > k; --i) {
      const A factor = a[i][k] * reciprocal;
      if (kSize == kSmallest && i < kLargestCorrected && n <= kLargestCorrected) {
        const A rest = fma(-factor, a[k][k], a[i][k]) * reciprocal;
#pragma unroll
        for (int j = k + 1; j <= i; ++j) a[i][j] = fma(-factor, a[j][k], a[i][j]) - rest * a[j][k];
      } else {
#pragma unroll
        for (int j = k + 1; j <= i; ++j) a[i][j] -= factor * a[j][k];
      }
      a[i][k] = factor;
      x[i] -= factor * x[k];
    }
  }
};

/// A lane's part of a block that a grid of lanes shares: rows and columns as `Traits` says. What is behind the last row
/// and column is 0 and stays so. An inverse is swept where the turn of a row comes no earlier than that of a column: on
/// the diagonal and below it, a good half. A solution drops columns instead.
template <class Traits, bool kSolve>
struct Tile {
  using A = typename Traits::A;
  static constexpr int kDeal = Traits::kDeal;
  static constexpr int kTurns = Traits::kTurns;
  static constexpr int kPart = Traits::kPart;

  A a[kDeal][kTurns][kTurns];  // of which the compiler keeps what is used
  A x[kDeal][kTurns];  // the right-hand side, the same in all columns of the grid
  A* line;             // of two, in shared memory
  A* of_rows;          // what is of this lane's rows in a line
  A* of_columns;       // likewise
  int n;
  int grid_row;
  int grid_column;

  /// The lanes of a block wait for each other, and see what the others wrote.
  static __device__ void meet() {
    if constexpr (Traits::kLanes > kWarp) {
      __syncthreads();
    } else {
      __syncwarp();
    }
  }

  /// Reads the lower triangle alone. The diagonal is damped.
  __device__ Tile(const A* block, int pitch, A damping, A* line_, int n_) : line(line_), n(n_) {
    const int lane = threadIdx.x % Traits::kLanes;
    grid_row = lane / Traits::kColumns;
    grid_column = lane % Traits::kColumns;
    of_rows = line + grid_row * kDeal * Traits::kPitch;
    of_columns = line + grid_column * Traits::kPitch;
    for_all([&](A& entry, int i, int j, bool lower) {
      entry = 0;
      if (!is_inside(i, j)) return;
      entry = lower ? block[i * pitch + j] : block[j * pitch + i];
      if (i == j) entry += damping;
    });
  }

  __device__ int row(int deal, int turn) const { return turn * Traits::kColumns + grid_row * kDeal + deal; }
  __device__ int column(int turn) const { return turn * Traits::kColumns + grid_column; }

  __device__ bool is_inside(int i, int j) const { return i < n && j < n; }

  /// The turns of columns that are kept of rows of a turn.
  static __device__ constexpr int end_of_columns(int turn) { return kSolve ? kTurns : turn + 1; }

  /// Calls body(entry, i, j, i >= j) for all entries that are kept, in the block or behind its end.
  template <class Body>
  __device__ void for_all(Body body) {
#pragma unroll
    for (int e = 0; e < kDeal; ++e) {
#pragma unroll
      for (int s = 0; s < kTurns; ++s) {
#pragma unroll
        for (int t = 0; t < end_of_columns(s); ++t) {
          const int i = row(e, s), j = column(t);
          body(a[e][s][t], i, j, s == t ? i >= j : s > t);
        }
      }
    }
  }

  __device__ void load_rhs(const A* rhs) {
#pragma unroll
    for (int e = 0; e < kDeal; ++e) {
#pragma unroll
      for (int s = 0; s < kTurns; ++s) x[e][s] = row(e, s) < n ? rhs[row(e, s)] : A(0);
    }
  }

  /// Sweeps over all pivots, turn by turn, so that the registers of each are known. Returns whether all are good.
  __device__ bool sweep() {
    bool good = true;
#pragma unroll
    for (int turn = 0; turn < kTurns; ++turn) {
#pragma unroll 1
      for (int q = 0; q < Traits::kRows; ++q) {
#pragma unroll
        for (int deal = 0; deal < kDeal; ++deal) {
          const int k = turn * Traits::kColumns + q * kDeal + deal;
          if (k < n) good = sweep(turn, q, deal) && good;
        }
      }
    }
    return good;
  }

  /// Numbers `first` to `last` of a grid column, 16 bytes at a time where all of those are among them.
  template <class Value>
  static __device__ void write(A* to, int first, int last, const Value& value) {
    constexpr int N = Traits::kVector;
#pragma unroll
    for (int v = 0; v < kPart; v += N) {
      if (v >= first && v + N <= last) {
        Pack<A, N> pack;
#pragma unroll
        for (int i = 0; i < N; ++i) pack.at[i] = value(v + i);
        store_pack(to + v, pack);
        continue;
      }
#pragma unroll
      for (int i = v; i < v + N; ++i) {
        if (i >= first && i < last) to[i] = value(i);
      }
    }
  }

  /// Sweeps over the pivot in row (deal, turn) of grid row q. Lines take turns: who writes one has seen all others meet
  /// after they had read it.
  __device__ bool sweep(int turn, int q, int deal) {
    const int in_turn = q * kDeal + deal;  // the grid column of the pivot
    const A* const of_pivot = line + in_turn * Traits::kPitch;
    const bool has_row = of_rows == line + q * kDeal * Traits::kPitch, has_column = of_columns == of_pivot;
    const int turned = in_turn % 2 * Traits::kLine;
    A* const of_rhs = line + turned + Traits::kColumns * Traits::kPitch;
    // What is not kept of the column stands in the row.
    const int kept = kSolve ? 0 : turn;
    if (has_column) {
#pragma unroll
      for (int e = 0; e < kDeal; ++e) {
        write(of_rows + turned + e * Traits::kPitch, kept, kPart,
              [&](int s) { return s < kTurns ? a[e][s < kTurns ? s : 0][turn] : A(0); });
      }
      if (kSolve && has_row) *of_rhs = x[deal][turn];
    }
    if (has_row) write(of_columns + turned, 0, kept, [&](int t) { return a[deal][turn][t]; });
    meet();
    const A pivot = of_pivot[turned + turn];
    Pack<A, kPart> c[kDeal], r = load_pack<kPart>(of_columns + turned);
#pragma unroll
    for (int e = 0; e < kDeal; ++e) c[e] = load_pack<kPart>(of_rows + turned + e * Traits::kPitch);
    const A reciprocal = 1 / pivot;
#pragma unroll
    for (int t = 0; t < kTurns; ++t) r.at[t] *= reciprocal;
    // What stands in row and column of the pivot is replaced, by the same subtraction: from 0, with a factor of -1.
    if (!kSolve && has_column) {
      r.at[turn] = -reciprocal;
#pragma unroll
      for (int e = 0; e < kDeal; ++e) {
#pragma unroll
        for (int s = turn; s < kTurns; ++s) a[e][s][turn] = 0;
      }
    }
    // A solution needs nothing more of the columns that were swept.
    const int first = kSolve ? turn : 0;
    if (has_row) {
      c[deal].at[turn] = -1;
#pragma unroll
      for (int t = 0; t < end_of_columns(turn); ++t) a[deal][turn][t] = 0;
      if (kSolve) x[deal][turn] = 0;
    }
#pragma unroll
    for (int e = 0; e < kDeal; ++e) {
#pragma unroll
      for (int s = 0; s < kTurns; ++s) {
#pragma unroll
        for (int t = first; t < end_of_columns(s); ++t) a[e][s][t] -= c[e].at[s] * r.at[t];
      }
    }
    if (kSolve) {
      const A of_x = *of_rhs * reciprocal;
#pragma unroll
      for (int e = 0; e < kDeal; ++e) {
#pragma unroll
        for (int s = 0; s < kTurns; ++s) x[e][s] -= c[e].at[s] * of_x;
      }
    }
    return is_good(pivot);
  }

  /// Whether no lane of this block has a taint.
  __device__ bool is_clean(A taint) const {
    if constexpr (Traits::kLanes > kWarp) {
      return __syncthreads_or(taint != 0) == 0;
    } else {
      const unsigned tainted = __ballot_sync(kAllLanes, taint != 0);
      const unsigned first = threadIdx.x % kWarp / Traits::kLanes * Traits::kLanes;
      return (tainted >> first & kAllLanes >> (kWarp - Traits::kLanes)) == 0;
    }
  }

  /// Writes the inverse, or NaN in place of it, both triangles from the lower one. Returns whether it is of use.
  __device__ bool store(A* block, int pitch, bool good) {
    A taint = 0;
    for_all([&](A& entry, int i, int j, bool lower) { taint += lower && is_inside(i, j) ? entry * A(0) : A(0); });
    good = is_clean(taint) && good;
    const A nan = static_cast<A>(NAN);
    for_all([&](A& entry, int i, int j, bool lower) {
      if (lower && is_inside(i, j)) block[i * pitch + j] = block[j * pitch + i] = good ? 0 - entry : nan;
    });
    return good;
  }

  __device__ bool store_solution(A* rhs, bool good) const {
    A taint = 0;
#pragma unroll
    for (int e = 0; e < kDeal; ++e) {
#pragma unroll
      for (int s = 0; s < kTurns; ++s) taint += row(e, s) < n ? x[e][s] * A(0) : A(0);
    }
    good = is_clean(taint) && good;
#pragma unroll
    for (int e = 0; e < kDeal; ++e) {
#pragma unroll
      for (int s = 0; s < kTurns; ++s) {
        if (grid_column == 0 && row(e, s) < n) rhs[row(e, s)] = good ? x[e][s] : static_cast<A>(NAN);
      }
    }
    return good;
  }
};

/// Inverts a block of shared memory in place, or makes it NaN. Returns whether the result is of use.
template <class Traits>
__device__ bool invert(typename Traits::A* block, int pitch, typename Traits::A* line,
                       const Params<typename Traits::A>& p, bool good) {
  if constexpr (Traits::kLanes == 1) {
    Triangle<Traits> triangle(block, p);
    good = triangle.invert() && good;
    return triangle.store(block, good);
  } else {
    Tile<Traits, false> tile(block, pitch, p.damping, line, p.n);
    good = tile.sweep() && good;
    tile.meet();  // all have read the block
    return tile.store(block, pitch, good);
  }
}

/// Likewise for a right-hand side.
template <class Traits>
__device__ bool solve(const typename Traits::A* block, int pitch, typename Traits::A* rhs, typename Traits::A* line,
                      const Params<typename Traits::A>& p, bool good) {
  if constexpr (Traits::kLanes == 1) {
    return Triangle<Traits>(block, p).solve(rhs, good);
  } else {
    Tile<Traits, true> tile(block, pitch, p.damping, line, p.n);
    tile.load_rhs(rhs);
    good = tile.sweep() && good;
    tile.meet();  // all have read the right-hand side
    return tile.store_solution(rhs, good);
  }
}

template <class Traits, bool kSolve>
constexpr int kResident = Traits::template kResident<kSolve>;

template <class Traits, bool kSolve>
__global__ void __launch_bounds__(Traits::kThreads, kResident<Traits, kSolve>)
    kernel(const __grid_constant__ Params<typename Traits::A> p) {
  using A = typename Traits::A;
  using Staged = cuda::Staged<A, Traits::kThreads>;
  const int n = p.n, size = n * n, number = threadIdx.x / Traits::kLanes;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * Traits::kBlocks, left = p.count - first;
  const int here = static_cast<int>(left < Traits::kBlocks ? left : Traits::kBlocks);

  auto& fixed = shared_memory<Fixed<Traits>>();
  A* const room = reinterpret_cast<A*>(&fixed + 1);
  const A *const from = p.blocks + first * size, *const right_from = kSolve ? p.rhs + first * n : nullptr;
  const Staged blocks(room, from, p.rows), right(room + p.rows_room, right_from, p.right);
  blocks.begin(from, here * size);
  if (kSolve) right.begin(right_from, here * n);
  if (threadIdx.x < Traits::kBlocks) fixed.bad[threadIdx.x] = 0;
  __syncthreads();
  wait_for_all_copies();
  blocks.look_through(from, here * size, MarkBad{fixed.bad, size});
  if (kSolve) right.look_through(right_from, here * n, MarkBad{fixed.bad, n});
  __syncthreads();

  // Those without a block at the end work on what happens to be there: warps stay together.
  A* const line = fixed.lines[Traits::kLanes == 1 ? 0 : number][0];
  A* const block = blocks.row(Traits::kLanes == 1 ? number : number * n);
  bool good = fixed.bad[number] == 0;
  if constexpr (kSolve) {
    good = solve<Traits>(block, blocks.pitch(), right.row(number), line, p, good);
  } else {
    good = invert<Traits>(block, blocks.pitch(), line, p, good);
  }
  const bool bad = !good && number < here;
  if (threadIdx.x % Traits::kLanes == 0 && number < here) {
    fixed.bad[number] = bad;
    p.info[first + number] = bad;
  }
  const bool any_bad = __syncthreads_or(bad);

  if constexpr (kSolve) {
    right.store(p.out + first * n, here * n);
  } else if (p.keep_bad && any_bad) {
    blocks.store_some(p.out + first * size, here * size, [&](int e) { return fixed.bad[e / size] == 0; });
  } else {
    blocks.store(p.out + first * size, here * size);
  }
}

/// Calls f with the class of a size: a thread to a block, 4 lanes, 16, a warp or a CTA. In float64, whose registers are
/// twice as large, there are fewer classes.
template <class A, class F>
void for_class(int64_t n, F&& f) {
  if (n <= kSmallest) return f(Type<Traits<A, kSmallest, 1, 1, 64, 64>>());
  if constexpr (std::is_same_v<A, float>) {
    if (n <= 9) return f(Type<Traits<A, 9, 1, 1, 64, 72>>());
    if (n <= 12) return f(Type<Traits<A, 12, 2, 2, 72, 80>>());
    if (n <= 16) return f(Type<Traits<A, 16, 2, 2, 96, 128>>());
    if (n <= 20) return f(Type<Traits<A, 20, 4, 4, 64, 64>>());
    if (n <= 28) return f(Type<Traits<A, 28, 4, 4, 88, 96>>());
    if (n <= 32) return f(Type<Traits<A, 32, 4, 4, 96, 128>>());
    if (n <= 40) return f(Type<Traits<A, 40, 4, 8, 104, 120>>());
    if (n <= 48) return f(Type<Traits<A, 48, 4, 8, 128, 168>>());
    if (n <= 56) return f(Type<Traits<A, 56, 4, 8, 128, 208>>());
    return f(Type<Traits<A, kLargest, 4, 8, 128, 208>>());
  } else {
    if (n <= 9) return f(Type<Traits<A, 9, 1, 1, 128, 136>>());
    if (n <= 16) return f(Type<Traits<A, 16, 2, 2, 168, 208>>());
    if (n <= 32) return f(Type<Traits<A, 32, 4, 4, 168, 208>>());
    if (n <= 48) return f(Type<Traits<A, 48, 8, 8, 104, 160>>());
    return f(Type<Traits<A, kLargest, 8, 8, 168, 208>>());
  }
}

template <bool kSolve, class Arguments>
void run(const char* name, const Arguments& b, const void* rhs, bool keep_bad, const Stream& stream) {
  if (b.n > kLargest) {
    throw std::runtime_error(std::string(name) + ": blocks of " + std::to_string(b.n) + " rows, expected at most " +
                             std::to_string(kLargest));
  }
  const DeviceGuard guard(stream);
  for_wide_type(b.dtype, [&](auto type) {
    using A = typename decltype(type)::type;
    for_class<A>(b.n, [&](auto of_size) {
      using Traits = typename decltype(of_size)::type;
      constexpr bool kWhole = Traits::kLanes == 1;  // a row of shared memory is a block
      const Rows<A> rows(kWhole ? b.n * b.n : b.n), right(b.n);
      const size_t rows_room = rows.room(kWhole ? Traits::kBlocks : Traits::kBlocks * b.n);
      const size_t right_room = kSolve ? right.room(Traits::kBlocks) : 0;
      const Params<A> p{static_cast<const A*>(b.blocks), static_cast<const A*>(rhs), static_cast<A*>(b.out),
                        b.info, b.count, static_cast<A>(b.damping), static_cast<int32_t>(b.n), keep_bad,
                        rows, right, rows_room};
      launch(name, kernel<Traits, kSolve>, static_cast<unsigned>(divide_up<int64_t>(b.count, Traits::kBlocks)),
             Traits::kThreads, sizeof(Fixed<Traits>) + (rows_room + right_room) * sizeof(A), stream, p);
    });
  });
}

}  // namespace

void block_inverse(const BlockInverse& b, const Stream& stream) {
  run<false>("block_inverse", b, nullptr, b.keep_bad, stream);
}

void block_solve(const BlockSolve& b, const Stream& stream) { run<true>("block_solve", b, b.rhs, false, stream); }

}  // namespace fisher_kernels::cuda
