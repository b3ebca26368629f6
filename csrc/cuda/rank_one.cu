#include <algorithm>

#include "rank_one.cuh"
#include "staging.cuh"

// Updates of inverses that fit in shared memory. Each is the work of a team: some lanes of a warp, a warp, or several
// warps. What a team reads of P at a time lies side by side, columns across the lanes, so that v = P u, for a symmetric
// P a sum of rows, needs no sum over lanes. The blocks of several teams lie one behind the other in memory and are moved
// by all threads together, 16 bytes at a time, wherever a block begins.
namespace fisher_kernels::cuda {

namespace {

using namespace rank_one;

template <class T_, int kTeam_, int kColumns_, int kBatch_>
struct Traits {
  using T = T_;
  using Team = rank_one::Team<kTeam_>;
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
  begin_to_copy_run<Traits::kThreads>(tile, blocks, present * area);
  updater.load(0);
  wait_for_all_copies();
  __syncthreads();

  const Status status = updater.update();
  if (threadIdx.x % Traits::kTeam == 0) {
    memory.fixed->status[number] = status;
    if (there) b.info[first + number] = status;
  }
  // A barrier too: all that is stored has been computed.
  if (!__syncthreads_or(there && status != kUpdated)) {
    store_run<Traits::kThreads>(blocks, tile, present * area);
    return;
  }
#pragma unroll 1
  for (int i = threadIdx.x; i < present * area; i += Traits::kThreads) {
    if (memory.fixed->status[i / area] == kUpdated) blocks[i] = tile[i];
  }
}

// Every GPU since compute capability 8.0 has as much for a thread block. A constant, so that the size from which blocks
// count as large, and with it the bits of a result, does not depend on the device.
constexpr size_t kMostShared = 96 * 1024;

template <class Traits>
void launch_teams(const Update<typename Traits::T>& b, const Stream& stream) {
  const size_t bytes = Memory<Traits>::bytes(std::max(b.n, 1));  // blocks of no rows read where a first would be
  launch(kName, update_kernel<Traits>, static_cast<unsigned>(divide_up<int64_t>(b.count, Traits::kTeams)),
         Traits::kThreads, bytes, stream, b);
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
