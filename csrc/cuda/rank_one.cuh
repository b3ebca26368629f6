#pragma once

#include <limits>

#include "kernels.h"
#include "reduce.cuh"
#include "tensor_list.cuh"

// Inverses kept current, P <- (P - gain sum over j of v_j v_j^T / den_j) / decay with v_j = Q_j u_j and
// den_j = decay + gain u_j^T Q_j u_j, where Q_j is P less the terms before j: an L D L^T factorisation of
// decay I + gain U P U^T, as it goes along. P moves once in and once out, 8 n^2 bytes a block in float32, for 4 n^2
// operations a vector: nothing but memory should count.
//
// A block that fits is held in shared memory (rank_one.cu), larger ones pass through several kernels
// (rank_one_large.cu). Here is what both do for a vector.
namespace fisher_kernels::cuda::rank_one {

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

/// Updates blocks that do not fit in shared memory. T: float or double.
template <class T>
void update_large(const Update<T>& b, const Stream& stream);

}  // namespace fisher_kernels::cuda::rank_one
