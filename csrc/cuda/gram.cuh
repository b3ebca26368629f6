#pragma once

#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <string>

#include "launch.cuh"
#include "types.cuh"

// Gram matrices of the rows of matrices, each a matrix product of which only tiles of the lower triangle are computed.
//
// A block of threads sums a tile over a share of the rows. Slabs of a few rows, once for the rows and once for the
// columns of the tile, pass through shared memory, and while one is multiplied the next is on its way in registers. As
// rows of x lie as products need them, nothing is transposed. A thread has kPer x kPer sums and reads 2 kPer numbers
// from shared memory for kPer^2 multiply-adds: with 8 x 8 the multipliers set the pace, not the memory.
//
// Sums are cut into runs, and runs into shares, by shape alone. One share is averaged into the result by the block that
// summed it; several are added in order by a second kernel.
namespace fisher_kernels::cuda {

/// A tile of the lower triangle, counted row after row.
struct TilePlace {
  int row;
  int column;
};

__device__ inline TilePlace tile_of_triangle(int64_t tile) {
  // The root is rounded, and may be one off.
  auto row = static_cast<int64_t>((sqrt(8.0 * static_cast<double>(tile) + 1.0) - 1.0) / 2.0);
  if (row * (row + 1) / 2 > tile) --row;
  if ((row + 1) * (row + 2) / 2 <= tile) ++row;
  return {static_cast<int>(row), static_cast<int>(tile - row * (row + 1) / 2)};
}

constexpr int kGramRun = 128;  // rows whose products are added to a sum that starts at 0, where they are shared out

/// out[b] <- decay * out[b] + gain * sum over r of weight[r] x[r, b] x[r, b]^T.
struct Gram {
  const void* x;       // [rows, matrices, columns] with unit column stride
  const void* weight;  // [rows] or null for ones
  void* out;           // [matrices, columns, columns]
  void* partials;      // [shares, matrices, tiles, tile, tile] or null where there is one share
  int64_t rows;
  int64_t row_stride;
  int64_t matrices;
  int64_t matrix_stride;  // of x
  int64_t columns;
  int64_t share;  // rows, a multiple of the depth of a slab
  int64_t run;    // rows whose products are added to a sum that starts at 0, likewise; not on tensor cores
  int64_t shares;
  int64_t tiles;  // of a matrix
  double decay;
  double gain;
};

template <class T_, int kTile_>
struct GramTraits {
  using T = T_;
  using A = Accumulator<T>;
  static constexpr int kTile = kTile_;  // rows and columns
  static constexpr int kPer = kTile == 32 || sizeof(A) == 8 ? 4 : 8;  // rows and columns of a thread
  static constexpr int kAcross = kTile / kPer;                        // threads
  static constexpr int kThreads = kAcross * kAcross;
  static constexpr int kDepth =  // rows of a slab, such that every thread reads 16 bytes or twice so many
      kTile == 64 ? 8 : kTile == 128 ? (sizeof(T) == 2 ? 16 : 8) : (sizeof(T) == 8 ? 8 : 16);
  static constexpr int kVector = kVectorBytes / sizeof(T);  // elements of x that a thread reads at once
  static constexpr int kPiece = kVectorBytes / sizeof(A);   // numbers of shared memory likewise
  static constexpr int kPieces = kPer / kPiece;
  static constexpr int kSums = kPer * kPer;
  // Rows of a slab that are multiplied at once: more take registers that other blocks are to have.
  static constexpr int kUnroll = kTile == 128 && sizeof(T) == 2 ? 1 : kPer == 8 ? 2 : 4;
  // A warp's lanes are 4 x 8, so that eight that are read together find each bank once.
  static constexpr int kLanesAcross = 8;
  static constexpr int kLanesDown = kWarp / kLanesAcross;
  static constexpr int kWarpsAcross = kAcross / kLanesAcross;
  // On a multiprocessor, which limits registers: 128 of them where there are 256 threads, else 168.
  static constexpr int kLeastBlocks = kPer == 4 ? 1 : kTile == 128 ? 2 : 6;
  static_assert(kThreads % kWarp == 0 && kThreads % kTile == 0 && kPer % kPiece == 0 && kAcross % kLanesAcross == 0);
};

template <class Traits>
struct Slab {
  alignas(kVectorBytes) typename Traits::A left[Traits::kDepth][Traits::kTile];  // times the weights
  alignas(kVectorBytes) typename Traits::A right[Traits::kDepth][Traits::kTile];
};

template <class Traits>
union GramMemory {
  using A = typename Traits::A;
  struct {
    Slab<Traits> slabs[2];
    A totals[Traits::kSums / Traits::kPiece][Traits::kThreads][Traits::kPiece];  // of earlier runs, each thread's own
  } sums;
  A tile[Traits::kTile][Traits::kTile + 1];  // one more, so that columns are read without bank conflicts
};

/// What a thread reads of x: N neighbours in some rows of a slab, for the rows and for the columns of a tile.
template <class Traits, int N>
class SlabReader {
 public:
  using T = typename Traits::T;
  using A = typename Traits::A;
  static constexpr int kRows = Traits::kThreads * N / Traits::kTile;  // that all threads read at once
  static constexpr int kPasses = Traits::kDepth / kRows;
  static_assert(Traits::kDepth % kRows == 0 && Traits::kTile % N == 0);

  __device__ SlabReader(const Gram& gram, int64_t matrix, const TilePlace& place, int64_t first)
      : stride_(gram.row_stride),
        row_(static_cast<int>(threadIdx.x) * N / Traits::kTile),
        column_(static_cast<int>(threadIdx.x) * N % Traits::kTile),
        is_diagonal_(place.row == place.column) {
    const int64_t left = static_cast<int64_t>(place.row) * Traits::kTile + column_;
    const int64_t right = static_cast<int64_t>(place.column) * Traits::kTile + column_;
    // Where columns are read N at a time their number is a multiple of N.
    has_left_ = left < gram.columns;
    has_right_ = right < gram.columns;
    const T* const x = static_cast<const T*>(gram.x) + matrix * gram.matrix_stride + (first + row_) * stride_;
    left_ = x + left;
    right_ = x + right;
    weight_ = gram.weight == nullptr ? nullptr : static_cast<const A*>(gram.weight) + first + row_;
  }

  /// Called before each slab of a share is read.
  __device__ void prepare(int) {}

  /// Reads the next slab, of which so many rows are there, into registers.
  __device__ void fetch(int, int rows) {
#pragma unroll
    for (int p = 0; p < kPasses; ++p) {
      const bool there = row_ + p * kRows < rows;
      const int64_t offset = p * kRows * stride_;
      fetched_left_[p] = fetched_right_[p] = Pack<T, N>{};
      fetched_weight_[p] = 1;
      if (there && has_right_) fetched_right_[p] = load_pack<N>(right_ + offset);
      if (there && has_left_ && !is_diagonal_) fetched_left_[p] = load_pack<N>(left_ + offset);
      if (there && weight_ != nullptr) fetched_weight_[p] = weight_[p * kRows];
    }
    left_ += Traits::kDepth * stride_;
    right_ += Traits::kDepth * stride_;
    if (weight_ != nullptr) weight_ += Traits::kDepth;
  }

  __device__ void store(Slab<Traits>& slab) const {
#pragma unroll
    for (int p = 0; p < kPasses; ++p) {
      Pack<A, N> left, right;
      widen_both(p, left, right);
      store_pack<N>(&slab.left[row_ + p * kRows][column_], left);
      store_pack<N>(&slab.right[row_ + p * kRows][column_], right);
    }
  }

 protected:
  __device__ void widen_both(int p, Pack<A, N>& left, Pack<A, N>& right) const {
#pragma unroll
    for (int i = 0; i < N; ++i) {
      right.at[i] = widen(fetched_right_[p].at[i]);
      left.at[i] = (is_diagonal_ ? right.at[i] : A(widen(fetched_left_[p].at[i]))) * fetched_weight_[p];
    }
  }

  const T* left_;
  const T* right_;
  const A* weight_;
  int64_t stride_;
  int row_;
  int column_;
  bool is_diagonal_;
  bool has_left_;
  bool has_right_;
  Pack<T, N> fetched_left_[kPasses] = {};
  Pack<T, N> fetched_right_[kPasses] = {};
  A fetched_weight_[kPasses] = {};
};

/// The sums of a thread. Its rows and columns are pieces of 16 bytes, far apart, so that lanes read neighbours.
template <class Traits>
class ThreadSums {
 public:
  using A = typename Traits::A;
  static constexpr int kPer = Traits::kPer, kPiece = Traits::kPiece;

  __device__ ThreadSums() {
    const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
    down_ = warp / Traits::kWarpsAcross * Traits::kLanesDown + lane / Traits::kLanesAcross;
    across_ = warp % Traits::kWarpsAcross * Traits::kLanesAcross + lane % Traits::kLanesAcross;
    clear();
  }

  __device__ int row(int i) const { return place(i, down_); }
  __device__ int column(int j) const { return place(j, across_); }

  __device__ void add_products(const Slab<Traits>& slab) {
#pragma unroll Traits::kUnroll
    for (int k = 0; k < Traits::kDepth; ++k) {
      A left[kPer], right[kPer];
      read(slab.left[k], down_, left);
      read(slab.right[k], across_, right);
#pragma unroll
      for (int i = 0; i < kPer; ++i) {
#pragma unroll
        for (int j = 0; j < kPer; ++j) sums_[i][j] += left[i] * right[j];
      }
    }
  }

  template <class Totals>
  __device__ void add(const Totals& totals) {
#pragma unroll
    for (int i = 0; i < kPer; ++i) {
#pragma unroll
      for (int p = 0; p < Traits::kPieces; ++p) {
        const auto pack = load_pack<kPiece>(totals[i * Traits::kPieces + p][threadIdx.x]);
#pragma unroll
        for (int k = 0; k < kPiece; ++k) sums_[i][p * kPiece + k] += pack.at[k];
      }
    }
  }

  /// Leaves the sums there and starts anew.
  template <class Totals>
  __device__ void move_to(Totals& totals) {
#pragma unroll
    for (int i = 0; i < kPer; ++i) {
#pragma unroll
      for (int p = 0; p < Traits::kPieces; ++p) {
        store_pack<kPiece>(totals[i * Traits::kPieces + p][threadIdx.x], piece(i, p));
      }
    }
    clear();
  }

  /// Into a tile of contiguous rows, aligned.
  __device__ void store(A* tile) const {
#pragma unroll
    for (int i = 0; i < kPer; ++i) {
#pragma unroll
      for (int p = 0; p < Traits::kPieces; ++p) {
        store_pack<kPiece>(tile + row(i) * Traits::kTile + column(p * kPiece), piece(i, p));
      }
    }
  }

  template <class Tile>
  __device__ void scatter(Tile& tile) const {
#pragma unroll
    for (int i = 0; i < kPer; ++i) {
#pragma unroll
      for (int j = 0; j < kPer; ++j) tile[row(i)][column(j)] = sums_[i][j];
    }
  }

 private:
  static __device__ int place(int i, int thread) {
    return i / kPiece * (Traits::kTile / Traits::kPieces) + thread * kPiece + i % kPiece;
  }

  static __device__ void read(const A* row, int thread, A (&numbers)[kPer]) {
#pragma unroll
    for (int p = 0; p < Traits::kPieces; ++p) {
      const auto pack = load_pack<kPiece>(row + place(p * kPiece, thread));
#pragma unroll
      for (int k = 0; k < kPiece; ++k) numbers[p * kPiece + k] = pack.at[k];
    }
  }

  __device__ Pack<A, kPiece> piece(int i, int p) const {
    Pack<A, kPiece> pack;
#pragma unroll
    for (int k = 0; k < kPiece; ++k) pack.at[k] = sums_[i][p * kPiece + k];
    return pack;
  }

  __device__ void clear() {
#pragma unroll
    for (int i = 0; i < kPer; ++i) {
#pragma unroll
      for (int j = 0; j < kPer; ++j) sums_[i][j] = 0;
    }
  }

  int down_;
  int across_;
  A sums_[kPer][kPer];
};

/// Averages a part of a tile into the lower triangle of a matrix, and its mirror image. All threads call it, after the
/// barrier that ends the writing of the part.
template <int kRows, int kColumns, int kThreads, class A>
__device__ void write_average(A (*part)[kColumns + 1], A* out, int64_t columns, int64_t row, int64_t column, A decay,
                              A gain) {
  for (int at = threadIdx.x; at < kRows * kColumns; at += kThreads) {
    const int i = at / kColumns, j = at % kColumns;
    if (row + i >= columns || column + j > row + i) continue;
    A* const to = out + (row + i) * columns + column + j;
    A value = gain * part[i][j];
    if (decay != 0) value = fma(decay, *to, value);
    part[i][j] = *to = value;
  }
  __syncthreads();
  for (int at = threadIdx.x; at < kRows * kColumns; at += kThreads) {
    const int i = at % kRows, j = at / kRows;
    if (row + i < columns && column + j < row + i) out[(column + j) * columns + row + i] = part[i][j];
  }
}

/// Sums over a share of the rows, which a reader has: see SlabReader. Ends with a barrier.
template <class Traits, class Reader>
__device__ void sum_share(const Gram& gram, Reader& reader, GramMemory<Traits>& memory, ThreadSums<Traits>& sums) {
  constexpr int kDepth = Traits::kDepth;
  const int64_t first = blockIdx.y * gram.share;
  const int64_t rows = gram.rows - first < gram.share ? gram.rows - first : gram.share;
  const auto slabs = static_cast<int>(divide_up<int64_t>(rows, kDepth));
  const auto rows_of_last = static_cast<int>(rows - static_cast<int64_t>(slabs - 1) * kDepth);
  const auto slabs_of_run = static_cast<int>(gram.run / kDepth);
  bool has_totals = false;
  int left_of_run = slabs_of_run;
  // A slab is read while the one before is multiplied.
  for (int slab = 0; slab <= slabs; ++slab) {
    const bool is_behind = slab == slabs;
    reader.prepare(slab);
    if (!is_behind) reader.fetch(slab, slab + 1 < slabs ? kDepth : rows_of_last);
    if (slab > 0) {
      sums.add_products(memory.sums.slabs[(slab - 1) % 2]);
      --left_of_run;
    }
    if (!is_behind) reader.store(memory.sums.slabs[slab % 2]);
    if (left_of_run == 0 || is_behind) {
      if (has_totals) sums.add(memory.sums.totals);
      if (!is_behind) sums.move_to(memory.sums.totals);
      has_totals = true;
      left_of_run = slabs_of_run;
    }
    __syncthreads();
  }
}

/// Leaves the sums of a share with the others, or averages those of the only one into the result.
template <class Traits, class Memory, class Sums>
__device__ void finish_share(const Gram& gram, int64_t matrix, const TilePlace& place, Memory& memory,
                             const Sums& sums) {
  using A = typename Traits::A;
  constexpr int kTile = Traits::kTile;
  if (gram.partials != nullptr) {
    sums.store(static_cast<A*>(gram.partials) +
               (blockIdx.y * gram.matrices * gram.tiles + blockIdx.x) * (kTile * kTile));
    return;
  }
  sums.scatter(memory.tile);
  __syncthreads();
  write_average<kTile, kTile, Traits::kThreads>(
      memory.tile, static_cast<A*>(gram.out) + matrix * gram.columns * gram.columns, gram.columns,
      static_cast<int64_t>(place.row) * kTile, static_cast<int64_t>(place.column) * kTile, static_cast<A>(gram.decay),
      static_cast<A>(gram.gain));
}

template <class Traits, int N>
__global__ void __launch_bounds__(Traits::kThreads, Traits::kLeastBlocks)
    gram_kernel(const __grid_constant__ Gram gram) {
  auto& memory = shared_memory<GramMemory<Traits>>();
  const int64_t matrix = blockIdx.x / gram.tiles;
  const TilePlace place = tile_of_triangle(blockIdx.x % gram.tiles);
  ThreadSums<Traits> sums;
  SlabReader<Traits, N> reader(gram, matrix, place, blockIdx.y * gram.share);
  sum_share<Traits>(gram, reader, memory, sums);
  finish_share<Traits>(gram, matrix, place, memory, sums);
}

/// How shares are added: kRows x 32 sums to a block, in kGroups that each add every so many shares.
template <class A_, int kTile_, int kRows_, int kGroups_>
struct AddTraits {
  using A = A_;
  static constexpr int kTile = kTile_, kRows = kRows_, kGroups = kGroups_;
  static constexpr int kColumns = 32;
  static constexpr int kPiece = kVectorBytes / sizeof(A);
  static constexpr int kThreadsOfGroup = kRows * kColumns / kPiece;
  static constexpr int kThreads = kThreadsOfGroup * kGroups;
  static constexpr int kParts = kTile / kRows * (kTile / kColumns);  // of a tile
  static constexpr int kUnroll = 4;                                  // shares whose loads are under way together
  static_assert(kThreads <= 1024 && kTile % kRows == 0 && kTile % kColumns == 0);

  struct Memory {
    A sums[kGroups][kRows][kColumns + 1];
  };
};

template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads) add_shares_kernel(const __grid_constant__ Gram gram) {
  using A = typename Traits::A;
  constexpr int kTile = Traits::kTile, kRows = Traits::kRows, kColumns = Traits::kColumns, kPiece = Traits::kPiece;
  auto& memory = shared_memory<typename Traits::Memory>();
  const int64_t matrix = blockIdx.x / gram.tiles;
  const TilePlace place = tile_of_triangle(blockIdx.x % gram.tiles);
  const int part_row = blockIdx.y / (kTile / kColumns) * kRows;
  const int part_column = blockIdx.y % (kTile / kColumns) * kColumns;
  const int64_t row = static_cast<int64_t>(place.row) * kTile + part_row;
  const int64_t column = static_cast<int64_t>(place.column) * kTile + part_column;
  const int group = threadIdx.x / Traits::kThreadsOfGroup, thread = threadIdx.x % Traits::kThreadsOfGroup;
  const int i = thread * kPiece / kColumns, j = thread * kPiece % kColumns;

  const bool is_needed = row + i < gram.columns && column + j <= row + i;
  const int64_t share_size = gram.matrices * gram.tiles * (kTile * kTile);
  const A* from = static_cast<const A*>(gram.partials) + static_cast<int64_t>(blockIdx.x) * (kTile * kTile) +
                  (part_row + i) * kTile + part_column + j + group * share_size;
  Pack<A, kPiece> total{};
#pragma unroll Traits::kUnroll
  for (int64_t share = group; share < (is_needed ? gram.shares : 0); share += Traits::kGroups) {
    const auto pack = load_pack<kPiece>(from);
#pragma unroll
    for (int k = 0; k < kPiece; ++k) total.at[k] += pack.at[k];
    from += Traits::kGroups * share_size;
  }
#pragma unroll
  for (int k = 0; k < kPiece; ++k) memory.sums[group][i][j + k] = total.at[k];
  __syncthreads();
  for (int at = threadIdx.x; at < kRows * kColumns; at += Traits::kThreads) {
    A& first = memory.sums[0][at / kColumns][at % kColumns];
#pragma unroll
    for (int g = 1; g < Traits::kGroups; ++g) first += memory.sums[g][at / kColumns][at % kColumns];
  }
  __syncthreads();
  write_average<kRows, kColumns, Traits::kThreads>(
      memory.sums[0], static_cast<A*>(gram.out) + matrix * gram.columns * gram.columns, gram.columns, row, column,
      static_cast<A>(gram.decay), static_cast<A>(gram.gain));
}

inline int64_t tiles_of_triangle(int64_t columns, int tile) {
  const int64_t edge = divide_up<int64_t>(columns, tile);
  return edge * (edge + 1) / 2;
}

/// Whether rows of all matrices can be read 16 bytes at a time.
template <class T>
bool has_packs(const Gram& gram) {
  constexpr int kVector = kVectorBytes / sizeof(T);
  return is_aligned(gram.x) && gram.columns % kVector == 0 && gram.row_stride % kVector == 0 &&
         gram.matrix_stride % kVector == 0;
}

/// Shares out rows that are matrices' own: sets `share`, `run` and `shares`.
template <class Traits>
void share_rows(Gram& gram) {
  constexpr int64_t kRun = kGramRun;                 // a share is no shorter,
  constexpr int64_t kMostShares = 1024;              // and there are no more than so many,
  constexpr int64_t kThreadsAtOnce = 4 * 132 * 256;  // nor more than make up so many threads
  static_assert(kRun % Traits::kDepth == 0);
  const int64_t blocks = std::max<int64_t>(1, gram.matrices * tiles_of_triangle(gram.columns, Traits::kTile));
  const int64_t wanted = std::min({kThreadsAtOnce / Traits::kThreads / blocks, gram.rows / kRun, kMostShares});
  const int64_t rows = divide_up(gram.rows, std::max<int64_t>(1, wanted));
  gram.share = std::max<int64_t>(1, divide_up<int64_t>(rows, Traits::kDepth)) * Traits::kDepth;
  gram.run = kRun;
  gram.shares = std::max<int64_t>(1, divide_up(gram.rows, gram.share));
}

/// How the shares of results that few threads have are added: of few columns there are many.
template <class Traits>
using AddManyTraits = AddTraits<typename Traits::A, Traits::kTile, 8, sizeof(typename Traits::A) == 8 ? 4 : 8>;

constexpr int kSmallTile = 32, kMediumTile = 64, kLargeTile = 128;
constexpr int64_t kMostOfMedium = 256;  // columns: above, less is read for a product and few tiles are half empty

/// Calls body(type) for a tile that suits so many columns, `type` being that of GramTraits<T, tile>.
template <class T, class Body>
void for_tile(int64_t columns, const Body& body) {
  if (columns <= kSmallTile) return body(Type<GramTraits<T, kSmallTile>>());
  if constexpr (!std::is_same_v<T, double>) {
    if (columns > kMostOfMedium) return body(Type<GramTraits<T, kLargeTile>>());
  }
  body(Type<GramTraits<T, kMediumTile>>());
}

/// Fills in `tiles` and `partials`, calls first(gram, grid), which launches what sums shares, and adds them as `Add`
/// says; `share`, `run` and `shares` are set.
template <class Traits, class Add, class First>
void launch_shares(const char* name, Gram gram, const Stream& stream, const First& first) {
  using A = typename Traits::A;
  static_assert(Add::kTile == Traits::kTile);
  constexpr int64_t kMostBlocks = 0x7fffffff;
  gram.tiles = tiles_of_triangle(gram.columns, Traits::kTile);
  if (gram.tiles != 0 && gram.matrices > kMostBlocks / gram.tiles) {
    throw std::runtime_error(std::string(name) + ": the result has too many elements");
  }
  const bool apart = gram.shares > 1;
  const int64_t blocks = gram.matrices * gram.tiles;
  const Scratch partials(stream, apart ? gram.shares * blocks * (Traits::kTile * Traits::kTile) * sizeof(A) : 0);
  gram.partials = apart ? partials.as<void>() : nullptr;
  first(gram, dim3(static_cast<unsigned>(blocks), static_cast<unsigned>(gram.shares)));
  if (!apart) return;
  launch(name, add_shares_kernel<Add>, dim3(static_cast<unsigned>(blocks), Add::kParts), Add::kThreads,
         sizeof(typename Add::Memory), stream, gram);
}

/// The same for rows that lie in memory.
template <class Traits, class Add>
void launch_gram(const char* name, const Gram& gram, const Stream& stream) {
  const auto kernel =
      has_packs<typename Traits::T>(gram) ? gram_kernel<Traits, Traits::kVector> : gram_kernel<Traits, 1>;
  launch_shares<Traits, Add>(name, gram, stream, [&](const Gram& filled, dim3 grid) {
    launch(name, kernel, grid, Traits::kThreads, sizeof(GramMemory<Traits>), stream, filled);
  });
}

}  // namespace fisher_kernels::cuda
