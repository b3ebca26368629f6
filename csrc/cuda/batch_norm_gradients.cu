#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <string>

#include "kernels.h"
#include "launch.cuh"
#include "types.cuh"

// Bound by memory: x and grad_output are read once, 16 bytes at a time where they are aligned, and an eighth of x once
// more before that for a pivot where no mean is given; 8 bytes are written for each sample's channel, and half of them
// once more.
//
// The pivot is near the mean, and need not be exact: with d = x - pivot and rest = mean(d),
//   mean = pivot + rest,   variance = mean(d^2) - rest^2,   sum of g (x - mean) = sum of g d - rest * sum of g
// (Chan, Golub and LeVeque). It is the mean of every eighth sample. Whatever those are, rest^2 is at most 8 times the
// variance, to which they contribute: no more than three bits cancel, and none of random samples, where rest is as
// small as their number is large. Short runs are summed in Accumulator<T>, what belongs to a channel in float64.
//
// With given statistics there is one launch, and another where positions are split. Without there are five: sums of
// some of x, the pivots, all other sums, what they say of a channel, and the scales. Sums are split by shape alone.
namespace fisher_kernels::cuda {

namespace {

constexpr const char* kName = "batch_norm_gradients";

constexpr int kThreads = 128;
constexpr int kRun = 64;                  // positions that a thread adds before float64 takes over, at least
constexpr int kMostLanes = kWarp;         // that share the positions of a channel
constexpr int64_t kManyBlocks = 2048;     // of threads, that keep memory busy
constexpr int64_t kManyThreads = 1 << 17;  // likewise
constexpr int64_t kMostSamples = 64;      // that a thread works on
constexpr int64_t kPivotStep = 8;         // of samples: those of the pivot
constexpr int64_t kFewestNumbers = 16;    // of a channel for which sums of a block of threads are worth what they take

template <class T_>
struct Traits {
  using T = T_;
  using A = Accumulator<T>;
  static constexpr int N = kVectorBytes / static_cast<int>(sizeof(T));
  // What the threads of a block sum up together: N channels each, of one kind of sum or of two.
  struct Shared {
    alignas(16) double sums[kThreads * 2 * N];
  };
};

/// A pass over x, and over grad_output but for the pivot. A block of threads has some channels of some samples, and a
/// piece of the positions.
struct Pass {
  const void* x;
  const void* grad;      // null for the pivot
  const void* pivot;     // [channels], or null for 0
  const void* variance;  // [channels], or null if it is not given or scales are finished later
  void* scale;           // [pieces, samples, channels]: sums of g d, or what they become with the variance
  void* shift;           // [pieces, samples, channels]: sums of g
  double* of_channels;   // [2, rows, channels]: sums of d and, if there is a grad, of d^2; or null
  int64_t samples;
  int64_t x_sample;
  int64_t grad_sample;
  int64_t group_samples;  // a multiple of sample_lanes
  double eps;
  int32_t channels;
  int32_t positions;
  int32_t piece_positions;
  int32_t pieces;
  int32_t groups;         // of samples
  int32_t lanes;          // threads that share the positions of a channel: a power of two, as are the next two
  int32_t channel_lanes;  // threads beside one another in channels
  int32_t sample_lanes;   // and in samples
  bool packed;            // 16 bytes at a time
};

/// What a block of threads works on.
struct Part {
  int32_t tile;  // of channels
  int32_t piece;
  int32_t group;
  int32_t first;  // position
  int32_t count;

  __device__ Part(const Pass& pass, int32_t tile_channels) {
    const int32_t tiles = divide_up(pass.channels, tile_channels);
    tile = static_cast<int32_t>(blockIdx.x % tiles);
    piece = static_cast<int32_t>(blockIdx.x / tiles % pass.pieces);
    group = static_cast<int32_t>(blockIdx.x / tiles / pass.pieces);
    first = piece * pass.piece_positions;
    count = min(pass.piece_positions, pass.positions - first);
  }
};

template <class A>
__device__ A inverse_deviation(double variance, double eps) {
  return static_cast<A>(1 / sqrt(variance + eps));
}

/// Sums over some positions of a channel.
template <class A>
struct Sums {
  A distance = 0;
  A square = 0;
  A gradient = 0;
  A product = 0;

  __device__ void add(A d) { distance += d; }

  __device__ void add(A d, A g) {
    distance += d;
    square += d * d;
    gradient += g;
    product += g * d;
  }
};

// Positions side by side: neighbouring lanes of a warp have neighbouring positions of a channel.

template <class T>
__device__ T sum_of_lanes(T value, int lanes) {
  for (int distance = lanes / 2; distance > 0; distance /= 2) value += __shfl_xor_sync(kAllLanes, value, distance);
  return value;
}

/// The sums of one thread over a run of positions.
template <class Traits, bool kMean>
__device__ Sums<typename Traits::A> sum_run(const Pass& pass, const typename Traits::T* x,
                                            const typename Traits::T* grad, int count, typename Traits::A pivot) {
  using A = typename Traits::A;
  constexpr int N = Traits::N;
  const int lane = threadIdx.x % pass.lanes;
  Sums<A> sums;
  if (pass.packed) {
#pragma unroll 4
    for (int i = lane * N; i < count; i += pass.lanes * N) {
      const auto xs = load_pack<N>(x + i);
      if constexpr (kMean) {
#pragma unroll
        for (int k = 0; k < N; ++k) sums.add(widen(xs.at[k]) - pivot);
      } else {
        const auto gs = load_pack<N>(grad + i);
#pragma unroll
        for (int k = 0; k < N; ++k) sums.add(widen(xs.at[k]) - pivot, widen(gs.at[k]));
      }
    }
    return sums;
  }
#pragma unroll 4
  for (int i = lane; i < count; i += pass.lanes) {
    if constexpr (kMean) {
      sums.add(widen(x[i]) - pivot);
    } else {
      sums.add(widen(x[i]) - pivot, widen(grad[i]));
    }
  }
  return sums;
}

template <class Traits, bool kMean>
__global__ void __launch_bounds__(kThreads, kMean ? 10 : sizeof(typename Traits::A) == 8 ? 8 : 9)
    channels_first_kernel(const __grid_constant__ Pass pass) {
  using A = typename Traits::A;
  const int lane = threadIdx.x % pass.lanes, slot = threadIdx.x / pass.lanes;
  const int sample_lane = slot / pass.channel_lanes;
  const Part part(pass, pass.channel_lanes);
  const int64_t channel = static_cast<int64_t>(part.tile) * pass.channel_lanes + slot % pass.channel_lanes;
  const bool is_channel = channel < pass.channels;
  const A pivot = is_channel && pass.pivot != nullptr ? static_cast<const A*>(pass.pivot)[channel] : A(0);
  A factor = 1;
  if (is_channel && pass.variance != nullptr) {
    factor = inverse_deviation<A>(static_cast<const A*>(pass.variance)[channel], pass.eps);
  }
  const int64_t offset = channel * pass.positions + part.first;
  const int64_t first = part.group * pass.group_samples, last = min(first + pass.group_samples, pass.samples);
  double distance = 0, square = 0;
  for (int64_t begin = first; begin < last; begin += pass.sample_lanes) {  // of all lanes together: they meet below
    const int64_t sample = begin + sample_lane;
    const bool is_one = is_channel && sample < last;
    const auto* const x = static_cast<const typename Traits::T*>(pass.x) + sample * pass.x_sample + offset;
    const auto* const grad = static_cast<const typename Traits::T*>(pass.grad) + sample * pass.grad_sample + offset;
    const Sums<A> sums = sum_run<Traits, kMean>(pass, x, grad, is_one ? part.count : 0, pivot);
    distance += static_cast<double>(sums.distance);
    if constexpr (!kMean) {
      square += static_cast<double>(sums.square);
      const A gradient = sum_of_lanes(sums.gradient, pass.lanes), product = sum_of_lanes(sums.product, pass.lanes);
      if (is_one && lane == 0) {
        const int64_t at = (part.piece * pass.samples + sample) * pass.channels + channel;
        static_cast<A*>(pass.shift)[at] = gradient;
        static_cast<A*>(pass.scale)[at] = product * factor;
      }
    }
  }
  if (pass.of_channels == nullptr) return;
  distance = sum_of_lanes(distance, pass.lanes);
  if constexpr (!kMean) square = sum_of_lanes(square, pass.lanes);
  if (!is_channel || lane != 0) return;
  const int64_t rows = static_cast<int64_t>(pass.groups) * pass.pieces * pass.sample_lanes;
  const int64_t row = (static_cast<int64_t>(part.group) * pass.pieces + part.piece) * pass.sample_lanes + sample_lane;
  pass.of_channels[row * pass.channels + channel] = distance;
  if constexpr (!kMean) pass.of_channels[(rows + row) * pass.channels + channel] = square;
}

// Channels side by side: a thread has N of them, and neighbouring lanes have neighbouring channels. Threads that share
// channels meet in shared memory.

/// The channels of a thread, counted from the first of its block: N side by side where they are loaded together, else
/// one in each of N runs.
template <int N>
struct ChannelsOfThread {
  int first;
  int step;
  int32_t left;  // channels from the first of the block on

  __device__ ChannelsOfThread(const Pass& pass, int lane, int32_t left_)
      : first(pass.packed ? lane * N : lane), step(pass.packed ? 1 : pass.channel_lanes), left(left_) {}

  __device__ int operator[](int k) const { return first + k * step; }
  __device__ bool has(int k) const { return first + k * step < left; }

  template <class T>
  __device__ Pack<T, N> load(const T* from, bool packed) const {
    if (packed) return load_pack<N>(from + first);
    Pack<T, N> pack;
#pragma unroll
    for (int k = 0; k < N; ++k) pack.at[k] = has(k) ? from[first + k * step] : narrow<T>(0);
    return pack;
  }

  template <class T>
  __device__ void store(T* to, const Pack<T, N>& pack, bool packed) const {
    if (packed) return store_pack(to + first, pack);
#pragma unroll
    for (int k = 0; k < N; ++k) {
      if (has(k)) to[first + k * step] = pack.at[k];
    }
  }
};

/// Sums over `lanes` threads of the same channels, as many as a block has: write(number, kind, channel, sum). All
/// threads call it.
template <class Traits, class B, class Write>
__device__ void sum_threads(const Pass& pass, const ChannelsOfThread<Traits::N>& channels, int lanes,
                            const Pack<B, Traits::N> (&values)[2], Write write) {
  constexpr int N = Traits::N;
  B* const sums = reinterpret_cast<B*>(shared_memory<typename Traits::Shared>().sums);
  const int width = pass.channel_lanes * N, slot = threadIdx.x / pass.channel_lanes;
  const int numbers = kThreads / pass.channel_lanes / lanes;  // of sums of a channel
  // [lanes, numbers, 2, width]
  B* const own = sums + ((slot % lanes) * numbers + slot / lanes) * 2 * width;
#pragma unroll
  for (int kind = 0; kind < 2; ++kind) {
#pragma unroll
    for (int k = 0; k < N; ++k) own[kind * width + channels[k]] = values[kind].at[k];
  }
  __syncthreads();
  for (int i = threadIdx.x; i < numbers * 2 * width; i += kThreads) {
    B sum = sums[i];
    for (int lane = 1; lane < lanes; ++lane) sum += sums[lane * numbers * 2 * width + i];
    write(i / (2 * width), i / width % 2, i % width, sum);
  }
  __syncthreads();
}

/// The sums of one thread over a piece of the positions of one sample.
template <class Traits, bool kMean>
__device__ void sum_positions(const Pass& pass, const ChannelsOfThread<Traits::N>& channels,
                              const typename Traits::T* x, const typename Traits::T* grad, int count,
                              const Pack<typename Traits::A, Traits::N>& pivots,
                              Sums<typename Traits::A> (&sums)[Traits::N]) {
  constexpr int N = Traits::N;
  const int first = threadIdx.x / pass.channel_lanes % pass.lanes;
#pragma unroll 4
  for (int i = first; i < count; i += pass.lanes) {
    const int64_t at = static_cast<int64_t>(i) * pass.channels;
    const auto xs = channels.load(x + at, pass.packed);
    if constexpr (kMean) {
#pragma unroll
      for (int k = 0; k < N; ++k) sums[k].add(widen(xs.at[k]) - pivots.at[k]);
    } else {
      const auto gs = channels.load(grad + at, pass.packed);
#pragma unroll
      for (int k = 0; k < N; ++k) sums[k].add(widen(xs.at[k]) - pivots.at[k], widen(gs.at[k]));
    }
  }
}

template <class Traits, bool kMean>
__global__ void __launch_bounds__(kThreads) channels_last_kernel(const __grid_constant__ Pass pass) {
  using A = typename Traits::A;
  constexpr int N = Traits::N;
  const Part part(pass, pass.channel_lanes * N);
  const int64_t channel = static_cast<int64_t>(part.tile) * pass.channel_lanes * N;
  const ChannelsOfThread<N> channels(pass, threadIdx.x % pass.channel_lanes,
                                     static_cast<int32_t>(pass.channels - channel));
  const int sample_lane = threadIdx.x / pass.channel_lanes / pass.lanes;
  Pack<A, N> pivots, factors;
#pragma unroll
  for (int k = 0; k < N; ++k) {
    const int64_t c = channel + channels[k];
    pivots.at[k] = pass.pivot != nullptr && channels.has(k) ? static_cast<const A*>(pass.pivot)[c] : A(0);
    factors.at[k] = 1;
    if (pass.variance != nullptr && channels.has(k)) {
      factors.at[k] = inverse_deviation<A>(static_cast<const A*>(pass.variance)[c], pass.eps);
    }
  }
  const int64_t offset = static_cast<int64_t>(part.first) * pass.channels + channel;
  const int64_t first = part.group * pass.group_samples, last = min(first + pass.group_samples, pass.samples);
  const int64_t of_piece = part.piece * pass.samples * pass.channels + channel;
  Pack<double, N> totals[2] = {};
  for (int64_t begin = first; begin < last; begin += pass.sample_lanes) {
    const int64_t sample = begin + sample_lane;
    const bool is_one = sample < last && channels.has(0);
    const auto* const x = static_cast<const typename Traits::T*>(pass.x) + sample * pass.x_sample + offset;
    const auto* const grad = static_cast<const typename Traits::T*>(pass.grad) + sample * pass.grad_sample + offset;
    Sums<A> sums[N];
    sum_positions<Traits, kMean>(pass, channels, x, grad, is_one ? part.count : 0, pivots, sums);
    Pack<A, N> of_sample[2];
#pragma unroll
    for (int k = 0; k < N; ++k) {
      totals[0].at[k] += static_cast<double>(sums[k].distance);
      totals[1].at[k] += static_cast<double>(sums[k].square);
      of_sample[0].at[k] = sums[k].gradient;
      of_sample[1].at[k] = sums[k].product * factors.at[k];
    }
    if constexpr (kMean) continue;
    A *const shift = static_cast<A*>(pass.shift) + of_piece, *const scale = static_cast<A*>(pass.scale) + of_piece;
    if (pass.lanes == 1) {
      if (!is_one) continue;
      channels.store(shift + sample * pass.channels, of_sample[0], pass.packed);
      channels.store(scale + sample * pass.channels, of_sample[1], pass.packed);
      continue;
    }
    sum_threads<Traits>(pass, channels, pass.lanes, of_sample, [&](int number, int kind, int c, A sum) {
      if (c >= channels.left || begin + number >= last) return;
      (kind == 0 ? shift : scale)[(begin + number) * pass.channels + c] = sum;
    });
  }
  if (pass.of_channels == nullptr) return;
  const int64_t rows = static_cast<int64_t>(pass.groups) * pass.pieces;
  const int64_t row = static_cast<int64_t>(part.group) * pass.pieces + part.piece;
  sum_threads<Traits>(pass, channels, kThreads / pass.channel_lanes, totals, [&](int, int kind, int c, double sum) {
    if (c >= channels.left || (kMean && kind == 1)) return;
    pass.of_channels[(kind * rows + row) * pass.channels + channel + c] = sum;
  });
}

// What belongs to whole channels.

/// Sums over rows of sums, and what follows from them for a channel: its pivot, or what finishes its scales.
struct Fold {
  const double* of_channels;  // [1 or 2, rows, channels]
  void* pivot;                // [channels], or null
  void* rest;                 // [channels], of the mean, beyond the pivot; or null
  void* factor;               // [channels], 1 / standard deviation; or null
  int64_t rows;
  int32_t channels;
  double numbers;  // of x in a channel
  double eps;
};

constexpr int kFoldChannels = 8;  // side by side: whole sectors
constexpr int kFoldRows = 32;

/// The sum of one kind over the rows of a channel, in the first row of threads.
__device__ double sum_rows(const Fold& fold, int kind, int32_t channel, double* partials) {
  const int row = threadIdx.x / kFoldChannels;
  double sum = 0;
  if (channel < fold.channels) {
#pragma unroll 4
    for (int64_t r = row; r < fold.rows; r += kFoldRows) {
      sum += fold.of_channels[(kind * fold.rows + r) * fold.channels + channel];
    }
  }
  partials[threadIdx.x] = sum;
  __syncthreads();
  for (int half = kFoldRows / 2; half > 0; half /= 2) {
    if (row < half) partials[threadIdx.x] += partials[threadIdx.x + half * kFoldChannels];
    __syncthreads();
  }
  sum = partials[threadIdx.x];
  __syncthreads();
  return sum;
}

template <class A>
__global__ void __launch_bounds__(kFoldChannels* kFoldRows) fold_kernel(const __grid_constant__ Fold fold) {
  double* const partials = shared_memory<double[kFoldChannels * kFoldRows]>();
  const int32_t channel = static_cast<int32_t>(blockIdx.x) * kFoldChannels + threadIdx.x % kFoldChannels;
  const bool writes = threadIdx.x < kFoldChannels && channel < fold.channels;
  const double mean = sum_rows(fold, 0, channel, partials) / fold.numbers;
  if (fold.pivot != nullptr) {
    if (writes) static_cast<A*>(fold.pivot)[channel] = static_cast<A>(mean);
    return;
  }
  const double variance = sum_rows(fold, 1, channel, partials) / fold.numbers - mean * mean;
  if (!writes) return;
  static_cast<A*>(fold.rest)[channel] = static_cast<A>(mean);
  static_cast<A*>(fold.factor)[channel] = inverse_deviation<A>(variance < 0 ? 0 : variance, fold.eps);  // NaN stays
}

/// The results from the sums of all pieces.
struct Finish {
  const void* products;   // [pieces, samples, channels]; the scales themselves where there is one piece
  const void* gradients;  // likewise the shifts
  const void* rest;       // [channels], or null where statistics are given
  const void* factor;     // [channels], or null where they are
  const void* variance;   // then [channels]
  void* scale;
  void* shift;
  int64_t count;  // samples * channels
  int32_t channels;
  int32_t pieces;
  double eps;
};

template <class A>
__global__ void __launch_bounds__(kThreads) finish_kernel(const __grid_constant__ Finish finish) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= finish.count) return;
  const int64_t channel = i % finish.channels;
  double product = 0, gradient = 0;
  for (int64_t piece = 0; piece < finish.pieces; ++piece) {
    product += static_cast<const A*>(finish.products)[piece * finish.count + i];
    gradient += static_cast<const A*>(finish.gradients)[piece * finish.count + i];
  }
  if (finish.pieces > 1) static_cast<A*>(finish.shift)[i] = static_cast<A>(gradient);
  A factor;
  if (finish.rest != nullptr) {
    factor = static_cast<const A*>(finish.factor)[channel];
    // An infinite gradient stays one.
    if (is_finite(gradient)) product -= static_cast<double>(static_cast<const A*>(finish.rest)[channel]) * gradient;
  } else {
    factor = inverse_deviation<A>(static_cast<const A*>(finish.variance)[channel], finish.eps);
  }
  static_cast<A*>(finish.scale)[i] = static_cast<A>(product) * factor;
}

// How the work is divided, by shape alone.

/// The largest power of two that is at most so much, and at most `most`, one itself; at least 1.
int32_t power_below(int64_t size, int32_t most) {
  int32_t power = 1;
  while (2 * power <= size && power < most) power *= 2;
  return power;
}

/// The smallest power of two that is at least so much, but at most `most`.
int32_t power_above(int64_t size, int32_t most) {
  int32_t power = 1;
  while (power < size && power < most) power *= 2;
  return power;
}

/// Sets the lanes, pieces and groups of a pass; returns its blocks of threads.
int64_t divide(const BatchNormGradients& a, int n, Pass& pass) {
  const int64_t step = pass.packed ? n : 1;
  int64_t tile = 0;  // channels
  if (a.channels_last) {
    pass.channel_lanes = power_above(divide_up<int64_t>(a.channels, n), kWarp);
    tile = static_cast<int64_t>(pass.channel_lanes) * n;
    // A thread has at least four positions, and no more threads than memory needs share a channel.
    const int32_t slots = std::min(kThreads / pass.channel_lanes, kMostLanes);
    const int64_t wanted = kManyThreads / (a.samples * divide_up(a.channels, tile) * pass.channel_lanes);
    pass.lanes = power_below(std::min(a.positions / 4, wanted), slots);
    pass.piece_positions = kRun * pass.lanes;
  } else {
    // Two loads of 16 bytes a thread, or four of one number.
    pass.lanes = power_below(pass.packed ? a.positions / (2 * step) : a.positions / 4, kMostLanes);
    pass.channel_lanes = power_above(a.channels, kThreads / pass.lanes);
    tile = pass.channel_lanes;
    pass.piece_positions = 2 * kRun * kMostLanes;
  }
  pass.sample_lanes = kThreads / pass.lanes / pass.channel_lanes;
  pass.pieces = static_cast<int32_t>(divide_up<int64_t>(a.positions, pass.piece_positions));
  const int64_t tiles = divide_up(a.channels, tile);
  const int64_t samples = a.samples * tiles * pass.pieces / (pass.sample_lanes * kManyBlocks);
  const int64_t fewest = divide_up(kFewestNumbers, a.positions);
  pass.group_samples = std::min(kMostSamples, std::max(fewest, samples)) * pass.sample_lanes;
  pass.groups = static_cast<int32_t>(divide_up(a.samples, pass.group_samples));
  return tiles * pass.pieces * pass.groups;
}

/// Rows of sums of channels that a pass makes.
int64_t rows_of(const BatchNormGradients& a, const Pass& pass) {
  return static_cast<int64_t>(pass.groups) * pass.pieces * (a.channels_last ? 1 : pass.sample_lanes);
}

/// Whether a tensor can be read N numbers at a time.
template <class T>
bool has_packs(const BatchNormGradients& a, const T* data, int64_t sample_stride, int n) {
  const int64_t run = a.channels_last ? a.channels : a.positions;
  return run % n == 0 && sample_stride % n == 0 && reinterpret_cast<uintptr_t>(data) % (n * sizeof(T)) == 0;
}

Pass make_pass(const BatchNormGradients& a) {
  Pass pass{};
  pass.x = a.x;
  pass.samples = a.samples;
  pass.x_sample = a.x_sample_stride;
  pass.eps = a.eps;
  pass.channels = static_cast<int32_t>(a.channels);
  pass.positions = static_cast<int32_t>(a.positions);
  return pass;
}

template <class Traits, bool kMean>
void run_pass(const BatchNormGradients& a, const Pass& pass, int64_t blocks, const Stream& stream) {
  if (blocks > 0x7fffffff) throw std::runtime_error(std::string(kName) + ": x has too many elements for a GPU");
  if (a.channels_last) {
    launch(kName, channels_last_kernel<Traits, kMean>, static_cast<unsigned>(blocks), kThreads,
           sizeof(typename Traits::Shared), stream, pass);
  } else {
    launch(kName, channels_first_kernel<Traits, kMean>, static_cast<unsigned>(blocks), kThreads, 0, stream, pass);
  }
}

template <class A>
void run_fold(const Fold& fold, const Stream& stream) {
  launch(kName, fold_kernel<A>, static_cast<unsigned>(divide_up(fold.channels, kFoldChannels)),
         kFoldChannels * kFoldRows, sizeof(double[kFoldChannels * kFoldRows]), stream, fold);
}

/// What is near the mean of each channel: that of some samples.
template <class T>
void make_pivots(const BatchNormGradients& all, Accumulator<T>* pivot, const Stream& stream) {
  using Traits = cuda::Traits<T>;
  BatchNormGradients a = all;
  a.samples = divide_up(all.samples, kPivotStep);
  a.x_sample_stride = all.x_sample_stride * kPivotStep;
  Pass pass = make_pass(a);
  pass.packed = has_packs(a, static_cast<const T*>(a.x), a.x_sample_stride, Traits::N);
  const int64_t blocks = divide(a, Traits::N, pass), rows = rows_of(a, pass);
  const Scratch of_channels(stream, rows * a.channels * sizeof(double));
  pass.of_channels = of_channels.as<double>();
  run_pass<Traits, true>(a, pass, blocks, stream);
  run_fold<Accumulator<T>>({pass.of_channels, pivot, nullptr, nullptr, rows, pass.channels,
                            static_cast<double>(a.samples) * static_cast<double>(a.positions), a.eps},
                           stream);
}

template <class T>
void gradients(const BatchNormGradients& a, const Stream& stream) {
  using Traits = cuda::Traits<T>;
  using A = typename Traits::A;
  const bool own = a.mean == nullptr;
  const int64_t count = a.samples * a.channels;
  Pass pass = make_pass(a);
  pass.grad = a.grad_output;
  pass.grad_sample = a.grad_sample_stride;
  pass.packed = has_packs(a, static_cast<const T*>(a.x), a.x_sample_stride, Traits::N) &&
                has_packs(a, static_cast<const T*>(a.grad_output), a.grad_sample_stride, Traits::N) &&
                is_aligned(a.scale) && is_aligned(a.shift);
  const int64_t blocks = divide(a, Traits::N, pass), rows = rows_of(a, pass);
  const bool split = pass.pieces > 1;

  const Scratch of_channel(stream, own ? 3 * a.channels * sizeof(A) : 0);  // pivots, rests and factors
  const Scratch of_channels(stream, own ? 2 * rows * a.channels * sizeof(double) : 0);
  const Scratch of_pieces(stream, split ? 2 * pass.pieces * count * sizeof(A) : 0);
  A *const pivot = own ? of_channel.as<A>() : nullptr, *const rest = own ? pivot + a.channels : nullptr,
           *const factor = own ? rest + a.channels : nullptr;
  if (own) make_pivots<T>(a, pivot, stream);
  pass.pivot = own ? pivot : a.mean;
  pass.variance = split ? nullptr : a.variance;
  pass.of_channels = of_channels.as<double>();
  pass.scale = split ? of_pieces.as<void>() : a.scale;
  pass.shift = split ? of_pieces.as<A>() + pass.pieces * count : a.shift;
  run_pass<Traits, false>(a, pass, blocks, stream);
  if (own) {
    run_fold<A>({pass.of_channels, nullptr, rest, factor, rows, pass.channels,
                 static_cast<double>(a.samples) * static_cast<double>(a.positions), a.eps},
                stream);
  }
  if (!own && !split) return;
  const Finish finish{pass.scale, pass.shift, rest,          factor,      a.variance, a.scale,
                      a.shift,    count,      pass.channels, pass.pieces, a.eps};
  launch(kName, finish_kernel<A>, static_cast<unsigned>(divide_up<int64_t>(count, kThreads)), kThreads, 0, stream,
         finish);
}

}  // namespace

void batch_norm_gradients(const BatchNormGradients& a, const Stream& stream) {
  constexpr int64_t kMost = 0x7fffffff - 2 * kRun * kMostLanes;
  if (a.channels > kMost || a.positions > kMost) {
    throw std::runtime_error(std::string(kName) + ": x has " + std::to_string(a.channels) + " channels and " +
                             std::to_string(a.positions) + " positions, expected at most " + std::to_string(kMost) +
                             " of each on a GPU");
  }
  const DeviceGuard guard(stream);
  if (a.samples * a.channels * a.positions == 0) return;  // the caller's zeros
  for_type(a.x_dtype, [&](auto type) { gradients<typename decltype(type)::type>(a, stream); });
}

}  // namespace fisher_kernels::cuda
