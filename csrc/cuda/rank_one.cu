#include <algorithm>
#include <limits>

#include "kernels.h"
#include "reduce.cuh"
#include "tensor_list.cuh"

// Inverses kept current, P <- (P - gain sum over j of v_j v_j^T / den_j) / decay with v_j = Q_j u_j and
// den_j = decay + gain u_j^T Q_j u_j, where Q_j is P less the terms before j: an L D L^T factorisation of
// decay I + gain U P U^T, as it goes along. P moves once in and once out, 8 n^2 bytes a block in float32, for 4 n^2
// operations a vector: nothing but memory should count.
//
// A block that fits is held in shared memory and is the work of a team: some lanes of a warp, a warp, or several warps.
// What a team reads of P at a time lies side by side, columns across the lanes, so that v = P u, for a symmetric P a
// sum of rows, needs no sum over lanes. The blocks of several teams lie one behind the other in memory and are moved by
// all threads together, 16 bytes at a time, wherever a block begins.
//
// Larger blocks pass through four launches: products P u_j, judgement, a look at those results that may overflow, which
// are hardly ever there, and the update. They are read twice and written once; the second time the L2 cache has what
// fits into it.
namespace fisher_kernels::cuda {

namespace {

constexpr const char* kName = "inverse_update_";

enum Status : int32_t { kUpdated = 0, kNotPositive = 1, kNotFinite = 2 };

template <class T>
struct Update {
  T* inverse;     // [count, n, n]
  const T* u;     // [count, vectors, n]
  int64_t* info;  // [count]
  double decay;
  double gain;
  int64_t count;
  int64_t vectors;
  int n;

  __device__ T sign() const { return gain < 0 ? T(-1) : T(1); }
  __device__ T reciprocal() const { return static_cast<T>(1 / decay); }
};

/// The threads that work on a block together.
template <int kSize_>
struct Team {
  static constexpr int kSize = kSize_;
  static constexpr bool kInWarp = kSize <= kWarp;
  static constexpr int kWarps = divide_up(kSize, kWarp);

  double* partials;  // [kWarps] in shared memory, for several warps

  __device__ int rank() const { return threadIdx.x % kSize; }

  __device__ void sync() const {
    if constexpr (kInWarp) {
      __syncwarp(kAllLanes);
    } else {
      __syncthreads();
    }
  }

  /// Of all threads and in all of them, always in the same order.
  template <class T, class Combine>
  __device__ T reduce(T value, Combine combine) const {
#pragma unroll
    for (int distance = (kInWarp ? kSize : kWarp) / 2; distance > 0; distance /= 2) {
      value = combine(value, __shfl_xor_sync(kAllLanes, value, distance));
    }
    if constexpr (!kInWarp) {
      T* const of_warps = reinterpret_cast<T*>(partials);
      __syncthreads();  // what was reduced before has been read
      if (threadIdx.x % kWarp == 0) of_warps[threadIdx.x / kWarp] = value;
      __syncthreads();
      value = of_warps[0];
#pragma unroll
      for (int warp = 1; warp < kWarps; ++warp) value = combine(value, of_warps[warp]);
    }
    return value;
  }

  template <class T>
  __device__ T sum(T value) const {
    return reduce(value, [](T a, T b) { return a + b; });
  }

  __device__ double largest(double value) const {
    return reduce(value, [](double a, double b) { return max(a, b); });
  }

  __device__ bool any(bool value) const { return sum(static_cast<int>(value)) != 0; }
};

// What a vector does.

struct Verdict {
  Status status;
  double root;  // of |gain| / den
};

/// What is asked of every vector before its update, with q = u^T Q u and size = the sum of u_i^2 Q_ii.
template <class T>
__device__ Verdict judge(const Update<T>& b, double q, double size) {
  constexpr double kUnit = std::numeric_limits<T>::epsilon() / 2;
  const double den = b.decay + b.gain * q;
  // By how much rounding the entries of Q moves q: each is at most the root of Q_ii Q_kk.
  const double noise = b.n * kUnit * size, of_den = fabs(b.gain) * noise;
  if (!is_finite(den) || !is_finite(noise)) return {kNotFinite, 0};
  const bool lost = den <= of_den || (b.decay * q < den * noise && of_den > kUnit * kUnit * b.decay);
  return {lost ? kNotPositive : kUpdated, sqrt(fabs(b.gain) / den)};
}

/// Vectors of a block, entry c of vector j at data[j * vector_stride + c * entry_stride].
template <class T>
struct Vectors {
  T* data;
  int64_t vector_stride;
  int entry_stride;

  __device__ T& at(int64_t j, int c) const { return data[j * vector_stride + static_cast<int64_t>(c) * entry_stride]; }
};

/// Takes w_j from P u_j to Q_j u_j times the root of |gain| / den_j, w_0 to w_(j-1) being there, where P is what they
/// are subtracted from. `size` is the diagonal of that, or what it has grown to. All of it thread by thread: what a
/// thread writes is read by no other.
template <class Team, class T>
__device__ Status scale(const Team& team, const Update<T>& b, const Vectors<const T>& u, const Vectors<T>& w, T* size,
                        int64_t j) {
  constexpr int kStep = Team::kSize;
  const T sign = b.sign();
#pragma unroll 1
  for (int64_t i = 0; i < j; ++i) {
    T along = 0;
    for (int c = team.rank(); c < b.n; c += kStep) along += w.at(i, c) * u.at(j, c);
    along = sign * team.sum(along);
    for (int c = team.rank(); c < b.n; c += kStep) w.at(j, c) -= along * w.at(i, c);
  }
  T q = 0, sum = 0;
  for (int c = team.rank(); c < b.n; c += kStep) {
    const T x = u.at(j, c);
    q += x * w.at(j, c);
    sum += x * (x * size[c]);
  }
  q = team.sum(q);
  sum = team.sum(sum);
  const Verdict verdict = judge(b, static_cast<double>(q), static_cast<double>(sum));
  const T root = static_cast<T>(verdict.root);
  for (int c = team.rank(); c < b.n; c += kStep) {
    const T value = w.at(j, c) * root;
    w.at(j, c) = value;
    if (b.gain < 0) size[c] += value * value;
  }
  return verdict.status;
}

// Blocks in shared memory.

template <class T_, int kTeam_, int kColumns_, int kBatch_>
struct Traits {
  using T = T_;
  using Team = cuda::Team<kTeam_>;
  static constexpr int kTeam = kTeam_;        // threads of a block
  static constexpr int kColumns = kColumns_;  // of P that a thread works on
  static constexpr int kBatch = kBatch_;      // vectors for which P is read once
  static constexpr int kVector = kVectorBytes / sizeof(T);
  static constexpr int kThreads = kTeam > kWarp ? kTeam : sizeof(T) == 8 ? 64 : 128;
  static constexpr int kTeams = kThreads / kTeam;
  static constexpr int kAcross = kTeam < kWarp ? kTeam : kWarp;  // lanes side by side in a row of P
  static constexpr int kSlices = kTeam / kAcross;                // warps that share the rows out among them
  static constexpr int kMostRows = kAcross * kColumns;
  static constexpr int kUnroll = kBatch == 1 ? 4 : 2;  // rows
  // Thread blocks of a multiprocessor for which there are registers.
  static constexpr int kResident = kTeam <= kWarp ? 8 : sizeof(T) == 8 ? 2 : 3;
  static_assert(kBatch == 1 || kBatch * sizeof(T) % kVectorBytes == 0);
  // The first entries of all tiles lie alike, as far as 16 bytes go, whatever n is.
  static_assert(kTeams == 1 || kTeams % kVector == 0);
};

/// Shared memory of a thread block, in the order in which it lies.
template <class Traits>
struct Memory {
  using T = typename Traits::T;

  struct Fixed {
    double partials[Traits::Team::kWarps];
    int32_t status[Traits::kTeams];
  };

  Fixed* fixed;
  T* u;         // [kTeams, n, kBatch]
  T* w;         // likewise
  T* partials;  // [kSlices, n, kBatch] where there are slices
  T* tile;      // [kTeams, n, n], with room for a beginning that is no multiple of 16 bytes
  T* size;      // [kTeams, n]

  __device__ explicit Memory(int n) : fixed(&shared_memory<Fixed>()) {
    u = reinterpret_cast<T*>(reinterpret_cast<unsigned char*>(fixed) + kFixedBytes);
    w = u + vectors(n);
    partials = w + vectors(n);
    tile = partials + of_slices(n);
    size = tile + of_tile(n);
  }

  static size_t bytes(int n) {
    return kFixedBytes + (2 * vectors(n) + of_slices(n) + of_tile(n) + Traits::kTeams * n) * sizeof(T);
  }

 private:
  static constexpr int kFixedBytes = divide_up<int>(sizeof(Fixed), kVectorBytes) * kVectorBytes;

  /// Whole 16 bytes, as all that comes before the tile has.
  __host__ __device__ static constexpr int padded(int elements) {
    return divide_up(elements, Traits::kVector) * Traits::kVector;
  }
  __host__ __device__ static constexpr int vectors(int n) { return padded(Traits::kTeams * n * Traits::kBatch); }
  __host__ __device__ static constexpr int of_slices(int n) {
    return Traits::kSlices > 1 ? padded(Traits::kSlices * n * Traits::kBatch) : 0;
  }
  __host__ __device__ static constexpr int of_tile(int n) {
    return padded(Traits::kTeams * n * n) + Traits::kVector;
  }
};

/// Elements by which an address lies past a multiple of 16 bytes.
template <class T>
__device__ inline int misalignment(const T* pointer) {
  return static_cast<int>(reinterpret_cast<uintptr_t>(pointer) % kVectorBytes / sizeof(T));
}

/// By all threads of a block, between addresses that are alike misaligned.
template <int kThreads, class T>
__device__ inline void copy(const T* from, T* to, int count) {
  constexpr int N = kVectorBytes / sizeof(T), kUnroll = 4;
  const int thread = threadIdx.x;
  const int head = min((N - misalignment(from)) % N, count);
  if (thread < head) to[thread] = from[thread];
  const int packs = (count - head) / N;
  // As bits: of what holds numbers the compiler makes stores of single ones.
  const uint4* const packs_from = reinterpret_cast<const uint4*>(from + head);
  uint4* const packs_to = reinterpret_cast<uint4*>(to + head);
  int i = thread;
#pragma unroll 1
  for (; i + (kUnroll - 1) * kThreads < packs; i += kUnroll * kThreads) {
    uint4 held[kUnroll];  // all on their way before the first is stored
#pragma unroll
    for (int k = 0; k < kUnroll; ++k) held[k] = packs_from[i + k * kThreads];
#pragma unroll
    for (int k = 0; k < kUnroll; ++k) packs_to[i + k * kThreads] = held[k];
  }
#pragma unroll 1
  for (; i < packs; i += kThreads) packs_to[i] = packs_from[i];
  const int at = head + packs * N + thread;
  if (at < count) to[at] = from[at];
}

/// One block and the team that updates it.
template <class Traits>
class Updater {
 public:
  using T = typename Traits::T;

  /// `p` is where the block will be; its vectors begin at `vectors`, null where there is no block.
  __device__ Updater(const Update<T>& b, const Memory<Traits>& memory, T* p, const T* vectors)
      : b_(b), team_{memory.fixed->partials}, p_(p), vectors_(vectors), partials_(memory.partials) {
    const int number = threadIdx.x / Traits::kTeam, of_team = number * b.n * Traits::kBatch;
    u_ = memory.u + of_team;
    w_ = memory.w + of_team;
    size_ = memory.size + number * b.n;
    slice_ = team_.rank() / Traits::kAcross;
#pragma unroll
    for (int i = 0; i < Traits::kColumns; ++i) {
      // Teams of a warp begin with different columns: their blocks may lie a multiple of all banks apart.
      const int turn = Traits::kAcross == kWarp ? i : (i + number) % Traits::kColumns;
      column_[i] = team_.rank() % Traits::kAcross + turn * Traits::kAcross;
    }
  }

  /// Loads vectors `first` and on, and zeros for those that there are not.
  __device__ void load(int64_t first) const {
    for (int c = team_.rank(); c < b_.n; c += Traits::kTeam) {
#pragma unroll
      for (int j = 0; j < Traits::kBatch; ++j) {
        const bool there = vectors_ != nullptr && first + j < b_.vectors;
        u_[c * Traits::kBatch + j] = there ? vectors_[(first + j) * b_.n + c] : T(0);
      }
    }
  }

  /// The block and the first vectors have been loaded.
  __device__ Status update() const {
    bool positive = true, finite = true;
    for (int c = team_.rank(); c < b_.n; c += Traits::kTeam) {
      size_[c] = p_[c * (b_.n + 1)];
      positive = positive && size_[c] > 0;
    }
    const Vectors<const T> u{u_, 1, Traits::kBatch};
    const Vectors<T> w{w_, 1, Traits::kBatch};
    Status status = kUpdated;
    for (int64_t first = 0; first < b_.vectors; first += Traits::kBatch) {
      if (first > 0) {
        load(first);
        team_.sync();
      }
      multiply();
      const int64_t left = b_.vectors - first;
#pragma unroll 1
      for (int j = 0; j < Traits::kBatch && j < left; ++j) {
        const Status fault = scale(team_, b_, u, w, size_, j);
        if (status == kUpdated) status = fault;
      }
      team_.sync();
      finite = subtract(left > Traits::kBatch ? T(1) : b_.reciprocal());
      team_.sync();
    }
    for (int c = team_.rank(); c < b_.n; c += Traits::kTeam) positive = positive && p_[c * (b_.n + 1)] > 0;
    const bool infinite = team_.any(!finite), not_positive = team_.any(!positive);
    return status != kUpdated ? status : infinite ? kNotFinite : not_positive ? kNotPositive : kUpdated;
  }

 private:
  /// v_j = P u_j for a batch, P being symmetric.
  __device__ void multiply() const {
    Pack<T, Traits::kBatch> sums[Traits::kColumns] = {};
#pragma unroll Traits::kUnroll
    for (int r = slice_; r < b_.n; r += Traits::kSlices) {
      const auto x = load_pack<Traits::kBatch>(u_ + r * Traits::kBatch);
      const T* const row = p_ + r * b_.n;
#pragma unroll
      for (int i = 0; i < Traits::kColumns; ++i) {
        const T entry = row[min(column_[i], b_.n - 1)];
#pragma unroll
        for (int j = 0; j < Traits::kBatch; ++j) sums[i].at[j] += x.at[j] * entry;
      }
    }
    const int count = b_.n * Traits::kBatch;
    T* const to = Traits::kSlices > 1 ? partials_ + slice_ * count : w_;
#pragma unroll
    for (int i = 0; i < Traits::kColumns; ++i) {
      if (column_[i] < b_.n) store_pack(to + column_[i] * Traits::kBatch, sums[i]);
    }
    team_.sync();
    if constexpr (Traits::kSlices > 1) {
      for (int k = team_.rank(); k < count; k += Traits::kTeam) {
        T sum = partials_[k];
        for (int slice = 1; slice < Traits::kSlices; ++slice) sum += partials_[slice * count + k];
        w_[k] = sum;
      }
      team_.sync();
    }
  }

  /// P <- (P - sum over a batch of w_j w_j^T) * factor. The product of two entries of w_j is the same in any order, and
  /// P stays symmetric. Returns whether what this thread has written is finite.
  __device__ bool subtract(T factor) const {
    const T sign = b_.sign();
    Pack<T, Traits::kBatch> right[Traits::kColumns];
#pragma unroll
    for (int i = 0; i < Traits::kColumns; ++i) {
      right[i] = load_pack<Traits::kBatch>(w_ + max(min(column_[i], b_.n - 1), 0) * Traits::kBatch);
    }
    T taint = 0;  // or NaN
#pragma unroll Traits::kUnroll
    for (int r = slice_; r < b_.n; r += Traits::kSlices) {
      const auto left = load_pack<Traits::kBatch>(w_ + r * Traits::kBatch);
      T* const row = p_ + r * b_.n;
#pragma unroll
      for (int i = 0; i < Traits::kColumns; ++i) {
        if (column_[i] >= b_.n) continue;
        T value = row[column_[i]];
#pragma unroll
        for (int j = 0; j < Traits::kBatch; ++j) value -= sign * left.at[j] * right[i].at[j];
        value *= factor;
        taint += value * T(0);
        row[column_[i]] = value;
      }
    }
    return taint == 0;
  }

  const Update<T>& b_;
  const typename Traits::Team team_;
  T* const p_;              // [n, n]
  const T* const vectors_;  // [vectors, n]
  T* u_;                    // [n, kBatch]
  T* w_;                    // [n, kBatch]
  T* size_;                 // [n]
  T* const partials_;       // [kSlices, n, kBatch]
  int slice_;
  int column_[Traits::kColumns];
};

template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads, Traits::kResident)
    update_kernel(const __grid_constant__ Update<typename Traits::T> b) {
  using T = typename Traits::T;
  const Memory<Traits> memory(b.n);
  const int64_t first = static_cast<int64_t>(blockIdx.x) * Traits::kTeams, left = b.count - first;
  const int present = static_cast<int>(left < Traits::kTeams ? left : Traits::kTeams), area = b.n * b.n;
  T* const blocks = b.inverse + first * area;
  T* const tile = memory.tile + misalignment(blocks);
  const int number = threadIdx.x / Traits::kTeam;
  const bool there = number < present;
  const Updater<Traits> updater(b, memory, tile + number * area,
                                there ? b.u + (first + number) * b.vectors * b.n : nullptr);
  updater.load(0);
  copy<Traits::kThreads>(blocks, tile, present * area);
  __syncthreads();

  const Status status = updater.update();
  if (threadIdx.x % Traits::kTeam == 0) {
    memory.fixed->status[number] = status;
    if (there) b.info[first + number] = status;
  }
  // A barrier too: all that is stored has been computed.
  if (!__syncthreads_or(there && status != kUpdated)) {
    copy<Traits::kThreads>(tile, blocks, present * area);
    return;
  }
#pragma unroll 1
  for (int i = threadIdx.x; i < present * area; i += Traits::kThreads) {
    if (memory.fixed->status[i / area] == kUpdated) blocks[i] = tile[i];
  }
}

// Blocks that do not fit.

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
  using Team = cuda::Team<kJudges>;
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

// The launches.

// Every GPU since compute capability 8.0 has as much for a thread block. A constant, so that the size from which blocks
// count as large, and with it the bits of a result, does not depend on the device.
constexpr size_t kMostShared = 96 * 1024;

template <class Traits>
void launch_teams(const Update<typename Traits::T>& b, const Stream& stream) {
  const size_t bytes = Memory<Traits>::bytes(std::max(b.n, 1));  // blocks of no rows read where a first would be
  launch(kName, update_kernel<Traits>, static_cast<unsigned>(divide_up<int64_t>(b.count, Traits::kTeams)),
         Traits::kThreads, bytes, stream, b);
}

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

template <class T, int kBatch>
void update(const Update<T>& b, const Stream& stream) {
  using UpTo8 = Traits<T, 2, 4, kBatch>;
  using UpTo16 = Traits<T, 4, 4, kBatch>;
  using UpTo32 = Traits<T, 8, 4, kBatch>;
  using UpTo64 = Traits<T, 32, 2, kBatch>;
  using UpTo160 = Traits<T, 256, 5, kBatch>;
  if (b.n <= UpTo8::kMostRows) return launch_teams<UpTo8>(b, stream);
  if (b.n <= UpTo16::kMostRows) return launch_teams<UpTo16>(b, stream);
  if (b.n <= UpTo32::kMostRows) return launch_teams<UpTo32>(b, stream);
  if (b.n <= UpTo64::kMostRows) return launch_teams<UpTo64>(b, stream);
  if (b.n <= UpTo160::kMostRows && Memory<UpTo160>::bytes(b.n) <= kMostShared) return launch_teams<UpTo160>(b, stream);
  update_large(b, stream);
}

}  // namespace

void inverse_update_(const InverseUpdate& b, const Stream& stream) {
  if (b.count == 0) return;
  const DeviceGuard guard(stream);
  for_wide_type(b.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    const Update<T> of_type{static_cast<T*>(b.inverse),
                            static_cast<const T*>(b.u),
                            b.info,
                            b.decay,
                            b.gain,
                            b.count,
                            b.vectors,
                            static_cast<int>(b.n)};
    b.vectors == 1 ? update<T, 1>(of_type, stream) : update<T, 4>(of_type, stream);
  });
}

}  // namespace fisher_kernels::cuda
