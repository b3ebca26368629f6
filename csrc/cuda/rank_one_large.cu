#include "rank_one.cuh"

// Updates of inverses that do not fit in shared memory, in four launches: products P u_j, judgement, a look at those
// results that may overflow, which are hardly ever there, and the update. Blocks are read twice and written once; the
// second time the L2 cache has what fits into it.
namespace fisher_kernels::cuda::rank_one {

namespace {

/// Sums over rows are split as n alone says: by packs of kVector, which go into n, or by single elements. `kAligned`
/// says whether packs can be moved as such.
template <class T_, int kVector_, bool kAligned_ = true>
struct RowTraits {
  using T = T_;
  static constexpr int kVector = kVector_;  // neighbours in a row that a lane works on
  static constexpr bool kAligned = kAligned_;
  static constexpr int kThreads = 256;
  static constexpr int kWarps = kThreads / kWarp;
  static constexpr int kRows = 4;   // of a warp
  static constexpr int kBatch = 4;  // vectors for which P is read once
  static constexpr int kTile = kWarps * kRows;
};

constexpr int kTileRows = RowTraits<float, 1>::kTile;
constexpr int kTileWarps = RowTraits<float, 1>::kWarps;

template <class T>
struct LargeUpdate {
  Update<T> b;
  T* w;             // [count, vectors, n]
  T* size;          // [count, n]
  T* reach;         // [count, tiles, kTileWarps]: the largest magnitude among some rows of P
  int32_t* status;  // [count]
  int32_t* unsure;  // [count]: whether entries of the result may overflow
  int32_t tiles;    // of a block

  __device__ T* block(int64_t number) const { return b.inverse + number * b.n * b.n; }
  __device__ const T* vectors(int64_t number) const { return b.u + number * b.vectors * b.n; }
  __device__ T* terms(int64_t number) const { return w + number * b.vectors * b.n; }
};

/// Rows of a block that a warp works on. Those past the end are the last one once more.
template <class Traits>
struct Rows {
  int first;
  int n;

  __device__ Rows(int tile, int n_)
      : first(tile * Traits::kTile + static_cast<int>(threadIdx.x) / kWarp * Traits::kRows), n(n_) {}

  __device__ bool has(int i) const { return first + i < n; }
  __device__ int row(int i) const { return min(first + i, n - 1); }
  __device__ int64_t start(int i) const { return static_cast<int64_t>(row(i)) * n; }
};

template <class Traits, class T>
__device__ inline Pack<T, Traits::kVector> load_neighbours(const T* from) {
  if constexpr (Traits::kAligned) {
    return load_pack<Traits::kVector>(from);
  } else {
    Pack<T, Traits::kVector> pack;
#pragma unroll
    for (int k = 0; k < Traits::kVector; ++k) pack.at[k] = from[k];
    return pack;
  }
}

/// v_j = P u_j, for some rows of P each warp.
template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads)
    multiply_kernel(const __grid_constant__ LargeUpdate<typename Traits::T> large) {
  using T = typename Traits::T;
  constexpr int N = Traits::kVector;
  const Update<T>& b = large.b;
  const int64_t block = blockIdx.x / large.tiles;
  const int tile = static_cast<int>(blockIdx.x % large.tiles), lane = threadIdx.x % kWarp;
  const Rows<Traits> rows(tile, b.n);
  const T* const p = large.block(block);
  const T* const u = large.vectors(block);
  T reach = 0;
  for (int64_t first = 0; first < b.vectors; first += Traits::kBatch) {
    T sums[Traits::kRows][Traits::kBatch] = {};
    for (int c = lane * N; c < b.n; c += kWarp * N) {
      Pack<T, N> entries[Traits::kRows], x[Traits::kBatch];
#pragma unroll
      for (int i = 0; i < Traits::kRows; ++i) entries[i] = load_neighbours<Traits>(p + rows.start(i) + c);
#pragma unroll
      for (int j = 0; j < Traits::kBatch; ++j) {
        const int64_t vector = first + j < b.vectors ? first + j : b.vectors - 1;
        x[j] = load_neighbours<Traits>(u + vector * b.n + c);
      }
#pragma unroll
      for (int i = 0; i < Traits::kRows; ++i) {
#pragma unroll
        for (int k = 0; k < N; ++k) {
          const T entry = entries[i].at[k];
          reach = max(reach, entry < 0 ? -entry : entry);
#pragma unroll
          for (int j = 0; j < Traits::kBatch; ++j) sums[i][j] += entry * x[j].at[k];
        }
      }
    }
#pragma unroll
    for (int i = 0; i < Traits::kRows; ++i) {
#pragma unroll
      for (int j = 0; j < Traits::kBatch; ++j) {
        const T sum = warp_sum(sums[i][j]);
        if (lane == 0 && rows.has(i) && first + j < b.vectors) {
          large.terms(block)[(first + j) * b.n + rows.row(i)] = sum;
        }
      }
    }
  }
  const double largest = Team<kWarp>{nullptr}.largest(reach);
  if (lane == 0) large.reach[blockIdx.x * static_cast<int64_t>(Traits::kWarps) + threadIdx.x / kWarp] = largest;
}

constexpr int kJudges = 256;  // threads that look at one block

/// Takes products to terms, and says what becomes of a block, but for results that may overflow.
template <class T>
__global__ void __launch_bounds__(kJudges) judge_kernel(const __grid_constant__ LargeUpdate<T> large) {
  using Team = rank_one::Team<kJudges>;
  const Team team{shared_memory<double[Team::kWarps]>()};
  const Update<T>& b = large.b;
  const int64_t block = blockIdx.x;
  const T* const p = large.block(block);
  T* const size = large.size + block * b.n;
  const auto diagonal = [&](int c) { return p[static_cast<int64_t>(c) * (b.n + 1)]; };
  bool positive = true;
  for (int c = team.rank(); c < b.n; c += kJudges) {
    size[c] = diagonal(c);
    positive = positive && size[c] > 0;
  }
  const Vectors<T> w{large.terms(block), b.n, 1};
  Status status = kUpdated;
#pragma unroll 1
  for (int64_t j = 0; j < b.vectors; ++j) {
    const Status fault = scale(team, b, Vectors<const T>{large.vectors(block), b.n, 1}, w, size, j);
    if (status == kUpdated) status = fault;
  }

  // No entry of the result is larger than the largest of P and the largest sum of squares of terms together, and none
  // on the way there either.
  double reach = 0, squares = 0;
  bool finite = true;
  for (int c = team.rank(); c < b.n; c += kJudges) {
    T value = diagonal(c);
    double square = 0;
    for (int64_t j = 0; j < b.vectors; ++j) {
      const T term = w.at(j, c);
      value -= b.sign() * term * term;
      square += static_cast<double>(term) * static_cast<double>(term);
    }
    positive = positive && value * b.reciprocal() > 0;
    finite = finite && is_finite(square);  // NaN is never the largest
    squares = max(squares, square);
  }
  const int counted = large.tiles * kTileWarps;
  for (int i = team.rank(); i < counted; i += kJudges) {
    reach = max(reach, static_cast<double>(large.reach[block * counted + i]));
  }
  reach = team.largest(reach) + team.largest(squares);
  const double bound = reach * max(1.0, static_cast<double>(b.reciprocal()));
  const bool sure = !team.any(!finite) && bound <= std::numeric_limits<T>::max() / 2;
  const bool not_positive = team.any(!positive);
  if (threadIdx.x != 0) return;
  large.unsure[block] = status == kUpdated && !sure;
  large.status[block] = status == kUpdated && not_positive ? kNotPositive : status;
}

/// P <- (P - sum over j of w_j w_j^T) / decay for the blocks that are good or, where `kLook`, only whether the results
/// that may overflow do.
template <class Traits, bool kLook>
__global__ void __launch_bounds__(Traits::kThreads)
    subtract_kernel(const __grid_constant__ LargeUpdate<typename Traits::T> large) {
  using T = typename Traits::T;
  constexpr int N = Traits::kVector;
  const Update<T>& b = large.b;
  const int64_t block = blockIdx.x / large.tiles;
  const int tile = static_cast<int>(blockIdx.x % large.tiles), lane = threadIdx.x % kWarp;
  const int32_t status = large.status[block];
  if (!kLook && tile == 0 && threadIdx.x == 0) b.info[block] = status;
  if (kLook ? large.unsure[block] == 0 : status != kUpdated) return;
  const Rows<Traits> rows(tile, b.n);
  if (!rows.has(0)) return;  // another warp writes the last row
  T* const p = large.block(block);
  const T* const w = large.terms(block);
  const T sign = b.sign(), factor = b.reciprocal();
  T taint = 0;  // or NaN
  for (int c = lane * N; c < b.n; c += kWarp * N) {
    Pack<T, N> entries[Traits::kRows];
#pragma unroll
    for (int i = 0; i < Traits::kRows; ++i) entries[i] = load_pack<N>(p + rows.start(i) + c);
    for (int64_t j = 0; j < b.vectors; ++j) {
      const T* const term = w + j * b.n;
      const Pack<T, N> right = load_pack<N>(term + c);
#pragma unroll
      for (int i = 0; i < Traits::kRows; ++i) {
        const T left = sign * term[rows.row(i)];
#pragma unroll
        for (int k = 0; k < N; ++k) entries[i].at[k] -= left * right.at[k];
      }
    }
#pragma unroll
    for (int i = 0; i < Traits::kRows; ++i) {
#pragma unroll
      for (int k = 0; k < N; ++k) {
        entries[i].at[k] *= factor;
        taint += entries[i].at[k] * T(0);
      }
      if (!kLook && rows.has(i)) store_pack(p + rows.start(i) + c, entries[i]);
    }
  }
  if (kLook && taint != 0) atomicMax(&large.status[block], static_cast<int32_t>(kNotFinite));
}

}  // namespace

template <class T>
void update_large(const Update<T>& b, const Stream& stream) {
  constexpr int kVector = kVectorBytes / sizeof(T);
  const int tiles = divide_up(b.n, kTileRows);
  const Scratch w(stream, b.count * b.vectors * b.n * sizeof(T)), size(stream, b.count * b.n * sizeof(T)),
      reach(stream, b.count * tiles * kTileWarps * sizeof(T)), status(stream, 2 * b.count * sizeof(int32_t));
  const LargeUpdate<T> large{b,
                             w.as<T>(),
                             size.as<T>(),
                             reach.as<T>(),
                             status.as<int32_t>(),
                             status.as<int32_t>() + b.count,
                             tiles};
  using Packs = RowTraits<T, kVector>;
  using LoosePacks = RowTraits<T, kVector, false>;
  using Elements = RowTraits<T, 1>;
  const bool in_packs = b.n % kVector == 0, aligned = in_packs && is_aligned(b.inverse) && is_aligned(b.u);
  const auto multiply = aligned    ? multiply_kernel<Packs>
                        : in_packs ? multiply_kernel<LoosePacks>
                                   : multiply_kernel<Elements>;
  const auto subtract = aligned ? subtract_kernel<Packs, false> : subtract_kernel<Elements, false>;
  constexpr int kThreads = Elements::kThreads;
  constexpr size_t kPartials = sizeof(double[kJudges / kWarp]);
  const auto count = static_cast<unsigned>(b.count), count_of_tiles = static_cast<unsigned>(b.count * tiles);
  launch(kName, multiply, count_of_tiles, kThreads, 0, stream, large);
  launch(kName, judge_kernel<T>, count, kJudges, kPartials, stream, large);
  launch(kName, subtract_kernel<Elements, true>, count_of_tiles, kThreads, 0, stream, large);
  launch(kName, subtract, count_of_tiles, kThreads, 0, stream, large);
}

template void update_large(const Update<float>&, const Stream&);
template void update_large(const Update<double>&, const Stream&);

}  // namespace fisher_kernels::cuda::rank_one
