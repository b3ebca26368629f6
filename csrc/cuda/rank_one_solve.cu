#include <algorithm>

#include "kernels.h"
#include "reduce.cuh"
#include "tensor_list.cuh"

// Solutions with a damped outer product. A first pass leaves u.u and u.x of every chunk in float64; a second one reads
// u and x again and writes the solution: 20 bytes a number in float32. It begins with the chunks that the first pass
// read last, which the L2 cache still holds: what fits there is read from memory once, 12 bytes a number.
//
// Every block of the second pass adds the sums itself, one a thread, which costs less than the launch of a kernel that
// would. Where there are more chunks than threads, a launch in between folds them. What is added to what follows from
// the sizes of the tensors alone, not from where they lie.
namespace fisher_kernels::cuda {

namespace {

constexpr const char* kName = "rank_one_solve";
constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;
constexpr int kMostSums = kThreads;  // that the second pass takes

template <class T_>
struct Traits {
  using T = T_;
  using A = Accumulator<T>;
  static constexpr int kVector = kVectorBytes / sizeof(T);  // elements that a thread moves at once
  static constexpr int kTile = kThreads * kVector;          // elements that a block moves at once
  static constexpr int kUnroll = 4;                         // packs of u and of x that are on their way at a time
  static constexpr int kHeld = 2;                           // the same where results are stored in between
  static_assert(kChunk % (kTile * kUnroll) == 0 && kChunk % (kTile * kHeld) == 0);
};

struct alignas(16) Products {
  double square;  // u.u
  double along;   // u.x
};

struct Shared {
  Products* of_chunks;
  const Products* sums;  // of consecutive chunks
  int32_t sum_count;     // at most kMostSums
  double rho;
};

struct Entry {
  const void* u;
  const void* x;
  void* out;
  int64_t size;
  int64_t first_chunk;  // among those of all tensors
};

/// What one block works on.
template <class T>
struct Chunk {
  const T* u;
  const T* x;
  T* out;
  int count;

  __device__ Chunk(const Entry& entry, int64_t number) {
    const int64_t first = number * kChunk, left = entry.size - first;
    u = static_cast<const T*>(entry.u) + first;
    x = static_cast<const T*>(entry.x) + first;
    out = static_cast<T*>(entry.out) + first;
    count = static_cast<int>(left < kChunk ? left : kChunk);
  }

  __device__ bool is_aligned() const { return cuda::is_aligned(u) && cuda::is_aligned(x) && cuda::is_aligned(out); }
};

/// The products of two numbers of float32 or less are exact here.
__device__ inline void add(Products& sum, double u, double x) {
  sum.square = fma(u, u, sum.square);
  sum.along = fma(u, x, sum.along);
}

template <class T, int N>
__device__ inline void add(Products& sum, const Pack<T, N>& u, const Pack<T, N>& x) {
#pragma unroll
  for (int i = 0; i < N; ++i) add(sum, widen(u.at[i]), widen(x.at[i]));
}

/// What this thread adds of a chunk: the same elements in the same order, however they lie.
template <class Traits>
__device__ Products multiply(const Chunk<typename Traits::T>& chunk) {
  constexpr int N = Traits::kVector;
  const int first = static_cast<int>(threadIdx.x) * N;
  const bool aligned = chunk.is_aligned();
  Products sum{0, 0};
  if (aligned && chunk.count == kChunk) {
#pragma unroll Traits::kUnroll
    for (int at = first; at < kChunk; at += Traits::kTile) {
      add(sum, load_pack<N>(chunk.u + at), load_pack<N>(chunk.x + at));
    }
    return sum;
  }
  for (int at = first; at < chunk.count; at += Traits::kTile) {
    if (aligned && at + N <= chunk.count) {
      add(sum, load_pack<N>(chunk.u + at), load_pack<N>(chunk.x + at));
      continue;
    }
    const int end = min(at + N, chunk.count);
    for (int i = at; i < end; ++i) add(sum, widen(chunk.u[i]), widen(chunk.x[i]));
  }
  return sum;
}

template <class Traits>
__global__ void __launch_bounds__(kThreads) multiply_kernel(const __grid_constant__ Table<Entry, Shared> table) {
  const int i = table.tensor_of(blockIdx.x);
  const Entry& entry = table.entries[i];
  const int64_t number = blockIdx.x - table.start[i];
  Products sum = multiply<Traits>(Chunk<typename Traits::T>(entry, number));
  auto& partials = shared_memory<double[2][kWarps]>();
  sum.square = block_sum(sum.square, partials[0]);
  sum.along = block_sum(sum.along, partials[1]);
  if (threadIdx.x == 0) table.shared.of_chunks[entry.first_chunk + number] = sum;
}

struct Fold {
  const Products* from;  // [count]
  Products* to;
  int64_t count;
  int64_t length;  // of what becomes one sum
};

/// A warp for each sum.
__global__ void __launch_bounds__(kThreads) fold_kernel(const __grid_constant__ Fold fold) {
  const int64_t group = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / kWarp;
  const int64_t first = group * fold.length;
  if (first >= fold.count) return;
  const int64_t end = min(first + fold.length, fold.count);
  Products sum{0, 0};
  for (int64_t i = first + threadIdx.x % kWarp; i < end; i += kWarp) {
    sum.square += fold.from[i].square;
    sum.along += fold.from[i].along;
  }
  sum = {warp_sum(sum.square), warp_sum(sum.along)};
  if (threadIdx.x % kWarp == 0) fold.to[group] = sum;
}

struct SolveMemory {
  double partials[2][kWarps];
  double along;
};

/// By what u enters the solution, in all threads of a block.
__device__ double coefficient(const Shared& shared, SolveMemory& memory) {
  Products sum{0, 0};
  if (static_cast<int>(threadIdx.x) < shared.sum_count) sum = shared.sums[threadIdx.x];
  const double square = block_sum(sum.square, memory.partials[0]);
  const double along = block_sum(sum.along, memory.partials[1]);
  if (threadIdx.x == 0) memory.along = along / (shared.rho + square);
  __syncthreads();
  return memory.along;
}

/// (x - along * u) / rho.
template <class T, class A>
__device__ inline T solve(T u, T x, A along, A rho) {
  return narrow<T>((widen(x) - along * widen(u)) / rho);
}

/// So many packs from `at` on, a tile apart: all are on their way before the first result is stored, since the compiler
/// has to believe that one could be what is read next.
template <class Traits, int kPacks>
__device__ inline void solve_packs(const Chunk<typename Traits::T>& chunk, int at, typename Traits::A along,
                                   typename Traits::A rho) {
  constexpr int N = Traits::kVector;
  Pack<typename Traits::T, N> u[kPacks], x[kPacks];
#pragma unroll
  for (int k = 0; k < kPacks; ++k) {
    u[k] = load_pack<N>(chunk.u + at + k * Traits::kTile);
    x[k] = load_pack<N>(chunk.x + at + k * Traits::kTile);
  }
#pragma unroll
  for (int k = 0; k < kPacks; ++k) {
#pragma unroll
    for (int i = 0; i < N; ++i) x[k].at[i] = solve(u[k].at[i], x[k].at[i], along, rho);
    store_pack<N>(chunk.out + at + k * Traits::kTile, x[k]);
  }
}

template <class Traits>
__device__ void solve(const Chunk<typename Traits::T>& chunk, typename Traits::A along, typename Traits::A rho) {
  constexpr int N = Traits::kVector;
  const int thread = threadIdx.x;
  const bool aligned = chunk.is_aligned();
  if (aligned && chunk.count == kChunk) {
    for (int at = thread * N; at < kChunk; at += Traits::kHeld * Traits::kTile) {
      solve_packs<Traits, Traits::kHeld>(chunk, at, along, rho);
    }
    return;
  }
  const int packed = aligned ? chunk.count / N * N : 0;
  for (int at = thread * N; at < packed; at += Traits::kTile) solve_packs<Traits, 1>(chunk, at, along, rho);
  for (int i = packed + thread; i < chunk.count; i += kThreads) {
    chunk.out[i] = solve(chunk.u[i], chunk.x[i], along, rho);
  }
}

template <class Traits>
__global__ void __launch_bounds__(kThreads) solve_kernel(const __grid_constant__ Table<Entry, Shared> table) {
  using A = typename Traits::A;
  const uint32_t block = gridDim.x - 1 - blockIdx.x;
  const int i = table.tensor_of(block);
  const A along = static_cast<A>(coefficient(table.shared, shared_memory<SolveMemory>()));
  solve<Traits>(Chunk<typename Traits::T>(table.entries[i], block - table.start[i]), along,
                static_cast<A>(table.shared.rho));
}

/// Launches a kernel on all tensors of one dtype.
template <class T>
void launch_on(void (*kernel)(Table<Entry, Shared>), const RankOneSolve& s, size_t shared_bytes, const Shared& shared,
               DType dtype, const Stream& stream) {
  TableWriter<Table<Entry, Shared>> tensors(kName, kernel, kThreads, shared_bytes, stream, shared);
  int64_t first_chunk = 0;
  for (int64_t i = 0; i < s.count; ++i) {
    const RankOneArrays& a = s.arrays[i];
    if (a.dtype == dtype) tensors.add({a.u, a.x, a.out, a.size, first_chunk}, chunks(a.size));
    first_chunk += chunks(a.size);
  }
  tensors.flush();
}

constexpr DType kDTypes[] = {DType::float32, DType::bfloat16, DType::float16, DType::float64};

}  // namespace

void rank_one_solve(const RankOneSolve& s, const Stream& stream) {
  int64_t count = 0;
  for (int64_t i = 0; i < s.count; ++i) count += chunks(s.arrays[i].size);
  if (count == 0) return;
  const DeviceGuard guard(stream);
  const Scratch memory(stream, (count + kMostSums) * sizeof(Products));
  Products* const of_chunks = memory.as<Products>();
  Shared shared{of_chunks, of_chunks, static_cast<int32_t>(std::min<int64_t>(count, kMostSums)), s.rho};
  for (const DType dtype : kDTypes) {
    for_type(dtype, [&](auto type) {
      using T = typename decltype(type)::type;
      launch_on<T>(multiply_kernel<Traits<T>>, s, sizeof(double[2][kWarps]), shared, dtype, stream);
    });
  }
  if (count > kMostSums) {
    const Fold fold{of_chunks, of_chunks + count, count, divide_up<int64_t>(count, kMostSums)};
    shared.sums = fold.to;
    shared.sum_count = static_cast<int32_t>(divide_up(count, fold.length));
    launch(kName, fold_kernel, divide_up(shared.sum_count, kWarps), kThreads, 0, stream, fold);
  }
  for (const DType dtype : kDTypes) {
    for_type(dtype, [&](auto type) {
      using T = typename decltype(type)::type;
      launch_on<T>(solve_kernel<Traits<T>>, s, sizeof(SolveMemory), shared, dtype, stream);
    });
  }
}

}  // namespace fisher_kernels::cuda
