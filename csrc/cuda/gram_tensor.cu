#include "gram_tensor.cuh"

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "async_copy.cuh"

// Gram matrices on tensor cores. They multiply numbers of 16 bits alone, so a number of float32 goes as three of
// bfloat16, whose sum it is:
//   bfloat16, float16:   x x                                                     1 product
//   bfloat16, weighted:  w x in three parts, times x                             3
//   float32:             both in three parts: the six products down to 2^-16     6, three are left out, 2^-24 together
// With that products are as good as those of float32. Sums are not: tensor cores cut off where float32 rounds, always
// towards 0. So they add the products of 16 or 32 rows to a sum that starts at 0, the smallest parts first, and the
// float32 units add those sums up.
//
// Rows lie as they do in memory, and are transposed on the way to registers: `ldmatrix` does that for 16 bits.
namespace fisher_kernels::cuda {

namespace {

constexpr int kBlockRows = 16, kBlockColumns = 8;  // of what a warp multiplies with one instruction
constexpr int kBlockDepth = 16;                    // rows of x

template <class T_, int kLefts_, int kRights_, int kTile_, int kWarpsAcross_>
struct TensorTraits {
  using T = T_;
  using A = float;
  static constexpr int kTile = kTile_;      // rows and columns
  static constexpr int kLefts = kLefts_;    // parts of a number of the rows of the tile, times its weight
  static constexpr int kRights = kRights_;  // and of the columns
  static constexpr bool kIsWhole = kLefts == 1 && kRights == 1;
  using Part = std::conditional_t<kIsWhole, T, __nv_bfloat16>;
  static constexpr int kWarpsAcross = kWarpsAcross_, kWarpsDown = 2;
  static constexpr int kThreads = kWarp * kWarpsAcross * kWarpsDown;
  static constexpr int kRows = kTile / kWarpsDown, kColumns = kTile / kWarpsAcross;  // of a warp
  static constexpr int kBlocksDown = kRows / kBlockRows;
  static constexpr int kPairsAcross = kColumns / (2 * kBlockColumns);  // of blocks, which are read together
  static constexpr int kDepth = kIsWhole ? 2 * kBlockDepth : kBlockDepth;  // rows of a slab
  static constexpr int kSteps = kDepth / kBlockDepth;
  // Rows of 16 bytes more, so that eight of a matrix, which are read together, find each bank once.
  static constexpr int kPitch = kTile + kVectorBytes / sizeof(Part);
  // On a multiprocessor, which limits registers: 255 of them for large tiles, else 128 or 168.
  static constexpr int kLeastBlocks = kTile == kMediumTile ? (kIsWhole ? 4 : 3) : kThreads == 128 ? 2 : 1;
  static_assert(kTile % (kWarpsDown * kBlockRows) == 0 && kTile % (kWarpsAcross * 2 * kBlockColumns) == 0);
};

template <class Traits>
struct PartSlab {
  using Part = typename Traits::Part;
  alignas(kVectorBytes) Part left[Traits::kLefts][Traits::kDepth][Traits::kPitch];
  alignas(kVectorBytes) Part right[Traits::kRights][Traits::kDepth][Traits::kPitch];
};

template <class Traits>
union TensorMemory {
  PartSlab<Traits> slabs[2];
  typename Traits::A tile[Traits::kTile][Traits::kTile + 1];
};

/// Numbers of bfloat16 whose sum is x, but for what lies below 2^-133; x and zeros where x is not finite.
template <int kParts>
__device__ void split(float x, __nv_bfloat16 (&parts)[kParts]) {
  parts[0] = narrow<__nv_bfloat16>(x);
  if (is_finite(x) && !is_finite(widen(parts[0]))) {  // rounded to infinity: cut off
    parts[0] = __ushort_as_bfloat16(static_cast<unsigned short>(__float_as_uint(x) >> 16));
  }
  float rest = is_finite(x) ? x - widen(parts[0]) : 0;
#pragma unroll
  for (int p = 1; p < kParts; ++p) {
    parts[p] = narrow<__nv_bfloat16>(rest);
    rest -= widen(parts[p]);
  }
}

/// Two numbers of bfloat16 in a register, the first in the lower half.
__device__ inline uint32_t as_pair(__nv_bfloat16 low, __nv_bfloat16 high) {
  return __bfloat16_as_ushort(low) | static_cast<uint32_t>(__bfloat16_as_ushort(high)) << 16;
}

/// Parts of N numbers, in pairs: both of a pair are rounded by one instruction.
template <int kParts, int N>
__device__ void split(const Pack<float, N>& x, Pack<uint32_t, N / 2> (&parts)[kParts]) {
  bool are_plain = true;  // none is rounded to infinity, infinite or NaN
#pragma unroll
  for (int i = 0; i < N; ++i) are_plain = are_plain & (fabsf(x.at[i]) < 0x1.ffp127f);
  if (!are_plain) {
#pragma unroll
    for (int i = 0; i < N / 2; ++i) {
      __nv_bfloat16 lows[kParts], highs[kParts];
      split(x.at[2 * i], lows);
      split(x.at[2 * i + 1], highs);
#pragma unroll
      for (int p = 0; p < kParts; ++p) parts[p].at[i] = as_pair(lows[p], highs[p]);
    }
    return;
  }
#pragma unroll
  for (int i = 0; i < N / 2; ++i) {
    float low = x.at[2 * i], high = x.at[2 * i + 1];
#pragma unroll
    for (int p = 0; p < kParts; ++p) {
      const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
      memcpy(&parts[p].at[i], &pair, sizeof(pair));
      low -= __uint_as_float(parts[p].at[i] << 16);
      high -= __uint_as_float(parts[p].at[i] & 0xffff0000u);
    }
  }
}

/// What a thread reads of x, and how it leaves that for tensor cores: as it is by asynchronous copies, 16 bytes each,
/// else by way of registers.
template <class Traits, int N>
class PartReader : public SlabReader<Traits, N> {
  using Base = SlabReader<Traits, N>;
  using Part = typename Traits::Part;
  static constexpr bool kCopies = Traits::kIsWhole && N > 1;

 public:
  __device__ PartReader(const Gram& gram, const TilePlace& place, int64_t first) : Base(gram, 0, place, first) {}

  /// Whether the rows of a tile are its columns, and are not stored again.
  __device__ bool is_square() const { return this->is_diagonal_ && (Traits::kIsWhole || this->weight_ == nullptr); }

  /// Begins to read the next slab, of which so many rows are there.
  __device__ void fetch(int slab, int rows, PartSlab<Traits>& to) {
    if constexpr (kCopies) {
#pragma unroll
      for (int p = 0; p < Base::kPasses; ++p) {
        const int row = this->row_ + p * Base::kRows;
        const int64_t offset = p * Base::kRows * this->stride_;
        copy(&to.right[0][row][this->column_], this->right_ + offset, row < rows && this->has_right_);
        if (!is_square()) copy(&to.left[0][row][this->column_], this->left_ + offset, row < rows && this->has_left_);
      }
      end_copies();
      this->left_ += Traits::kDepth * this->stride_;
      this->right_ += Traits::kDepth * this->stride_;
    } else {
      Base::fetch(slab, rows);
    }
  }

  /// Has it there, after the next barrier.
  __device__ void store(PartSlab<Traits>& to) const {
    if constexpr (kCopies) {
      wait_for_copies<0>();
    } else {
#pragma unroll
      for (int p = 0; p < Base::kPasses; ++p) {
        const int row = this->row_ + p * Base::kRows;
        if constexpr (Traits::kIsWhole) {
          store_pack(&to.right[0][row][this->column_], this->fetched_right_[p]);
          if (!is_square()) store_pack(&to.left[0][row][this->column_], this->fetched_left_[p]);
        } else {
          Pack<float, N> left, right;
          this->widen_both(p, left, right);
          store_parts(to.right, row, right);
          if (!is_square()) store_parts(to.left, row, left);
        }
      }
    }
  }

 private:
  static __device__ void copy(Part* to, const Part* from, bool is_there) {
    is_there ? copy_async<kVectorBytes>(to, from) : store_pack<N>(to, Pack<Part, N>{});
  }

  template <int kParts>
  __device__ void store_parts(Part (&side)[kParts][Traits::kDepth][Traits::kPitch], int row,
                              const Pack<float, N>& numbers) const {
    if constexpr (N == 1) {
      Part parts[kParts];
      split(numbers.at[0], parts);
#pragma unroll
      for (int p = 0; p < kParts; ++p) side[p][row][this->column_] = parts[p];
    } else {
      Pack<uint32_t, N / 2> parts[kParts];
      split(numbers, parts);
#pragma unroll
      for (int p = 0; p < kParts; ++p) {
        store_pack<N / 2>(reinterpret_cast<uint32_t*>(&side[p][row][this->column_]), parts[p]);
      }
    }
  }
};

/// The sums of a warp, of which each thread has four of every block: see mma.cuh.
template <class Traits>
class WarpSums {
 public:
  using Part = typename Traits::Part;
  static constexpr int kDown = Traits::kBlocksDown, kPairs = Traits::kPairsAcross, kSteps = Traits::kSteps;
  static constexpr int kLefts = Traits::kLefts, kRights = Traits::kRights;

  /// Whether the warp has sums of the lower triangle.
  static __device__ bool is_needed(const TilePlace& place) {
    return place.row != place.column || first_row() + Traits::kRows > first_column();
  }

  /// Products of the rows of a slab; `left` are its parts for the rows of the tile.
  __device__ void add_products(const Part (*left)[Traits::kDepth][Traits::kPitch], const PartSlab<Traits>& slab) {
    uint32_t a[kSteps][kLefts][kDown][4];
    // Of four matrices the first and the third are the first rows of x, and the second and the fourth the columns that
    // follow; of those of the other side the second and the third change places.
    const int lane = threadIdx.x % kWarp, row = lane % 8, odd = lane / 8 % 2 * 8, high = lane / 16 * 8;
#pragma unroll
    for (int s = 0; s < kSteps; ++s) {
#pragma unroll
      for (int p = 0; p < kLefts; ++p) {
#pragma unroll
        for (int d = 0; d < kDown; ++d) {
          load_transposed(a[s][p][d], &left[p][s * kBlockDepth + high + row][first_row() + d * kBlockRows + odd]);
        }
      }
    }
#pragma unroll
    for (int c = 0; c < kPairs; ++c) {
      uint32_t b[kSteps][kRights][4];
      const int column = first_column() + c * 2 * kBlockColumns;
#pragma unroll
      for (int s = 0; s < kSteps; ++s) {
#pragma unroll
        for (int p = 0; p < kRights; ++p) {
          load_transposed(b[s][p], &slab.right[p][s * kBlockDepth + odd + row][column + high]);
        }
      }
#pragma unroll
      for (int d = 0; d < kDown; ++d) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          float sums[4] = {};
          multiply_parts(a, b, d, half, sums);
#pragma unroll
          for (int i = 0; i < 4; ++i) sums_[d][2 * c + half][i] += sums[i];
        }
      }
    }
  }

  /// Into a tile of contiguous rows, aligned.
  __device__ void store(float* tile) const {
    each([&](int row, int column, const float* sums) {
      store_pack<2>(tile + row * Traits::kTile + column, Pack<float, 2>{{sums[0], sums[1]}});
    });
  }

  template <class Tile>
  __device__ void scatter(Tile& tile) const {
    each([&](int row, int column, const float* sums) {
      tile[row][column] = sums[0];
      tile[row][column + 1] = sums[1];
    });
  }

 private:
  /// Products of a block, the smallest first: parts of x are 2^-8 of those before.
  static __device__ void multiply_parts(const uint32_t (&a)[kSteps][kLefts][kDown][4],
                                        const uint32_t (&b)[kSteps][kRights][4], int d, int half, float (&sums)[4]) {
    constexpr int kMostOrder = 2;
#pragma unroll
    for (int order = kMostOrder; order >= 0; --order) {
#pragma unroll
      for (int p = 0; p < kLefts; ++p) {
        const int q = order - p;
        if (q < 0 || q >= kRights) continue;
#pragma unroll
        for (int s = 0; s < kSteps; ++s) {
          multiply_add<Part>(sums, a[s][p][d], b[s][q][2 * half], b[s][q][2 * half + 1]);
        }
      }
    }
  }

  static __device__ int first_row() { return threadIdx.x / kWarp / Traits::kWarpsAcross * Traits::kRows; }
  static __device__ int first_column() { return threadIdx.x / kWarp % Traits::kWarpsAcross * Traits::kColumns; }

  /// Calls body(row, column, sums) for every two sums of this thread that are neighbours in a row.
  template <class Body>
  __device__ void each(const Body& body) const {
    const int lane = threadIdx.x % kWarp;
#pragma unroll
    for (int d = 0; d < kDown; ++d) {
#pragma unroll
      for (int c = 0; c < 2 * kPairs; ++c) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          body(first_row() + d * kBlockRows + i * 8 + lane / 4, first_column() + c * kBlockColumns + lane % 4 * 2,
               sums_[d][c] + 2 * i);
        }
      }
    }
  }

  float sums_[kDown][2 * kPairs][4] = {};
};

template <class Traits, int N>
__global__ void __launch_bounds__(Traits::kThreads, Traits::kLeastBlocks)
    tensor_gram_kernel(const __grid_constant__ Gram gram) {
  auto& memory = shared_memory<TensorMemory<Traits>>();
  const TilePlace place = tile_of_triangle(blockIdx.x);
  const int64_t first = blockIdx.y * gram.share;
  const int64_t rows = gram.rows - first < gram.share ? gram.rows - first : gram.share;
  const auto slabs = static_cast<int>(divide_up<int64_t>(rows, Traits::kDepth));
  const auto rows_of_last = static_cast<int>(rows - static_cast<int64_t>(slabs - 1) * Traits::kDepth);
  PartReader<Traits, N> reader(gram, place, first);
  WarpSums<Traits> sums;
  const bool is_needed = WarpSums<Traits>::is_needed(place);
  // A slab is read while the one before is multiplied.
#pragma unroll 1
  for (int slab = 0; slab <= slabs; ++slab) {
    PartSlab<Traits>& next = memory.slabs[slab % 2];
    if (slab < slabs) reader.fetch(slab, slab + 1 < slabs ? Traits::kDepth : rows_of_last, next);
    if (slab > 0 && is_needed) {
      const PartSlab<Traits>& last = memory.slabs[(slab - 1) % 2];
      const auto* left = last.left;
      if (reader.is_square()) left = last.right;
      sums.add_products(left, last);
    }
    if (slab < slabs) reader.store(next);
    __syncthreads();
  }
  finish_share<Traits>(gram, 0, place, memory, sums);
}

/// Shares out rows so that the blocks of threads, as many at once as a large GPU runs, are done soonest.
template <class Traits>
void share_rows_in_waves(Gram& gram) {
  constexpr int64_t kAtOnce = 132 * Traits::kLeastBlocks;
  constexpr int64_t kMostWaves = 2;  // for more, the sums of shares would take much memory
  // Of a share; also what a share takes besides its rows, where there are several: its sums are written and read.
  constexpr int64_t kLeastRows = Traits::kTile == kMediumTile ? 128 : 512;
  const int64_t blocks = std::max<int64_t>(1, tiles_of_triangle(gram.columns, Traits::kTile));
  gram.shares = 1;
  int64_t least = divide_up(blocks, kAtOnce) * gram.rows;
  for (int64_t waves = 1; waves <= kMostWaves; ++waves) {
    const int64_t shares = std::min(waves * kAtOnce / blocks, gram.rows / kLeastRows);
    if (shares < 2) continue;
    const int64_t cost = divide_up(blocks * shares, kAtOnce) * (divide_up(gram.rows, shares) + kLeastRows);
    if (cost < least) least = cost, gram.shares = shares;
  }
  gram.share = std::max<int64_t>(1, divide_up<int64_t>(divide_up(gram.rows, gram.shares), Traits::kDepth)) *
               Traits::kDepth;
  gram.shares = std::max<int64_t>(1, divide_up(gram.rows, gram.share));
}

template <class Traits, int N>
void run(const char* name, const Gram& gram, const Stream& stream) {
  launch_shares<Traits, AddManyTraits<Traits>>(name, gram, stream, [&](const Gram& filled, dim3 grid) {
    launch(name, tensor_gram_kernel<Traits, N>, grid, Traits::kThreads, sizeof(TensorMemory<Traits>), stream, filled);
  });
}

template <class T, int kLefts, int kRights>
void run(const char* name, Gram gram, const Stream& stream) {
  // Warps of 64 x 64 sums read less of shared memory, those of 64 x 32 leave registers for parts and for single numbers.
  constexpr int kWide = kLefts * kRights == 1 ? 2 : 4;
  using Medium = TensorTraits<T, kLefts, kRights, kMediumTile, 2>;
  using Large = TensorTraits<T, kLefts, kRights, kLargeTile, kWide>;
  using Single = TensorTraits<T, kLefts, kRights, kLargeTile, 4>;
  constexpr int kVector = kVectorBytes / sizeof(T);
  const bool packs = has_packs<T>(gram);
  if (gram.columns > kMostOfMedium) {
    share_rows_in_waves<Large>(gram);  // for single numbers too: the same sums however rows are read
    packs ? run<Large, kVector>(name, gram, stream) : run<Single, 1>(name, gram, stream);
  } else {
    share_rows_in_waves<Medium>(gram);
    packs ? run<Medium, kVector>(name, gram, stream) : run<Medium, 1>(name, gram, stream);
  }
}

}  // namespace

void tensor_gram(const char* name, DType dtype, Gram gram, const Stream& stream) {
  const bool weighted = gram.weight != nullptr;
  switch (dtype) {
    case DType::bfloat16:
      return weighted ? run<__nv_bfloat16, 3, 1>(name, gram, stream) : run<__nv_bfloat16, 1, 1>(name, gram, stream);
    case DType::float16: return run<__half, 1, 1>(name, gram, stream);
    default: return run<float, 3, 3>(name, gram, stream);
  }
}

}  // namespace fisher_kernels::cuda
