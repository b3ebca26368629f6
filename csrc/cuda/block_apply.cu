#include "kernels.h"
#include "reduce.cuh"
#include "staging.cuh"

// Products of many small matrices with a vector each: n^2 + 2 n numbers a block for 2 n^2 operations, so what counts is
// to read the matrices once and well. A row is added up by one thread from shared memory, or by one warp where rows are
// long; the order of its sum depends on n alone, never on where a row lies.
namespace fisher_kernels::cuda {

namespace {

constexpr const char* kName = "block_apply";

template <class A_>
struct Traits {
  using A = A_;
  static constexpr int kVector = kVectorBytes / sizeof(A);
  static constexpr int kThreads = 128;
  static constexpr int kWarps = kThreads / kWarp;

  // Rows of up to kLongest numbers go through shared memory, about kStaged numbers at a time.
  static constexpr int kLongest = 256 / sizeof(A);
  static constexpr int kStaged = 16 * 1024 / sizeof(A);
  // Of longer rows, a warp reads so many of one block side by side, and their vector once.
  static constexpr int kRows = 4;
};

template <class A>
struct Shape {
  const A* blocks;
  const A* vectors;
  A* out;
  int64_t rows;  // of all blocks
  int32_t n;
};

template <class A>
struct ShortRows : Shape<A> {
  int32_t rows_at_once;  // a multiple of threads
  Rows<A> matrix;
  Rows<A> vector;
  size_t matrix_room;  // elements

  explicit ShortRows(const Shape<A>& shape)
      : Shape<A>(shape),
        rows_at_once(divide_up(Traits<A>::kStaged / shape.n, Traits<A>::kThreads) * Traits<A>::kThreads),
        matrix(shape.n),
        vector(shape.n),
        matrix_room(matrix.room(rows_at_once)) {}

  /// Of the matrices, and of the vectors that belong to so many rows, the first and the last of them partly.
  size_t shared_bytes() const { return (matrix_room + vector.room(rows_at_once / this->n + 2)) * sizeof(A); }
};

/// Sum over k of a row times a vector, in the order of k.
template <class A>
__device__ A dot(const A* row, const A* vector, int n, bool vectors) {
  constexpr int N = Traits<A>::kVector;
  A sum = 0;
  if (vectors) {
    for (int k = 0; k < n; k += N) {
      const auto x = load_pack<N>(row + k), y = load_pack<N>(vector + k);
#pragma unroll
      for (int i = 0; i < N; ++i) sum += x.at[i] * y.at[i];
    }
    return sum;
  }
#pragma unroll 4
  for (int k = 0; k < n; ++k) sum += row[k] * vector[k];
  return sum;
}

/// A thread for each row, whatever block it belongs to.
template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads)
    short_rows_kernel(const __grid_constant__ ShortRows<typename Traits::A> p) {
  using A = typename Traits::A;
  using Staged = cuda::Staged<A, Traits::kThreads>;
  const int n = p.n;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * p.rows_at_once, first_block = first / n;
  const int here = static_cast<int>(p.rows - first < p.rows_at_once ? p.rows - first : p.rows_at_once);
  const int before = static_cast<int>(first - first_block * n);  // rows of the first block that come earlier
  const int blocks = (before + here - 1) / n + 1;

  A* const room = &shared_memory<A>();
  const A *const from = p.blocks + first * n, *const vectors_from = p.vectors + first_block * n;
  const Staged matrix(room, from, p.matrix), vectors(room + p.matrix_room, vectors_from, p.vector);
  matrix.begin(from, here * n);
  vectors.begin(vectors_from, blocks * n);
  wait_for_all_copies();
  __syncthreads();

  const bool packed = matrix.has_vectors() && vectors.has_vectors();
  for (int row = threadIdx.x; row < here; row += Traits::kThreads) {
    const int block = static_cast<int>(static_cast<uint32_t>(before + row) / static_cast<uint32_t>(n));
    p.out[first + row] = dot(matrix.row(row), vectors.row(block), n, packed);
  }
}

/// N numbers of a row from k on, 0 behind its end.
template <int N, class A>
__device__ Pack<A, N> part_of_row(const A* row, int64_t k, int64_t n, bool vectors) {
  if (vectors) return load_pack<N>(row + k);
  Pack<A, N> pack;
#pragma unroll
  for (int i = 0; i < N; ++i) pack.at[i] = k + i < n ? row[k + i] : A(0);
  return pack;
}

template <class A>
struct LongRows {
  const A* blocks;
  const A* vectors;
  A* out;
  int64_t warps;
  int64_t warps_of_block;
  int64_t n;
};

/// A warp for some rows of one block. A lane adds up every 32nd vector of 16 bytes, even where those are not aligned.
template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads)
    long_rows_kernel(const __grid_constant__ LongRows<typename Traits::A> p) {
  using A = typename Traits::A;
  constexpr int N = Traits::kVector;
  const int64_t warp = static_cast<int64_t>(blockIdx.x) * Traits::kWarps + threadIdx.x / kWarp, n = p.n;
  if (warp >= p.warps) return;  // all of its lanes
  const int lane = threadIdx.x % kWarp;
  const int64_t block = warp / p.warps_of_block, first = warp % p.warps_of_block * Traits::kRows;
  const A *const matrix = p.blocks + block * n * n, *const vector = p.vectors + block * n;
  const A* rows[Traits::kRows];
#pragma unroll
  for (int r = 0; r < Traits::kRows; ++r) rows[r] = matrix + (first + r < n ? first + r : n - 1) * n;

  const bool packed = n % N == 0 && is_aligned(p.blocks) && is_aligned(p.vectors);
  A sums[Traits::kRows] = {};
#pragma unroll 2
  for (int64_t k = lane * N; k < n; k += kWarp * N) {
    const auto x = part_of_row<N>(vector, k, n, packed);
#pragma unroll
    for (int r = 0; r < Traits::kRows; ++r) {
      const auto y = part_of_row<N>(rows[r], k, n, packed);
#pragma unroll
      for (int i = 0; i < N; ++i) sums[r] += x.at[i] * y.at[i];
    }
  }
#pragma unroll
  for (int r = 0; r < Traits::kRows; ++r) {
    const A sum = warp_sum(sums[r]);
    if (lane == r && first + r < n) p.out[block * n + first + r] = sum;
  }
}

template <class A>
void apply(const BlockApply& b, const Stream& stream) {
  using Traits = cuda::Traits<A>;
  const A *const blocks = static_cast<const A*>(b.blocks), *const vectors = static_cast<const A*>(b.vectors);
  A* const out = static_cast<A*>(b.out);
  if (b.n <= Traits::kLongest) {
    const ShortRows<A> p(Shape<A>{blocks, vectors, out, b.count * b.n, static_cast<int32_t>(b.n)});
    launch(kName, short_rows_kernel<Traits>, static_cast<unsigned>(divide_up<int64_t>(p.rows, p.rows_at_once)),
           Traits::kThreads, p.shared_bytes(), stream, p);
  } else {
    const int64_t warps_of_block = divide_up<int64_t>(b.n, Traits::kRows), warps = b.count * warps_of_block;
    launch(kName, long_rows_kernel<Traits>, static_cast<unsigned>(divide_up<int64_t>(warps, Traits::kWarps)),
           Traits::kThreads, 0, stream, LongRows<A>{blocks, vectors, out, warps, warps_of_block, b.n});
  }
}

}  // namespace

void block_apply(const BlockApply& b, const Stream& stream) {
  if (b.count == 0 || b.n == 0) return;
  const DeviceGuard guard(stream);
  for_wide_type(b.dtype, [&](auto type) { apply<typename decltype(type)::type>(b, stream); });
}

}  // namespace fisher_kernels::cuda
