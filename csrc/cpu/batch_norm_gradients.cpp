#include <cstdint>

#include "../kernels.h"
#include "integers.h"
#include "lanes.h"
#include "parallel.h"
#include "scratch.h"
#include "vector.h"

// Two passes over a channel: one for its mean, and one for everything else from the distances d to that mean: sums of d
// and d^2 over the channel, of g and g * d over each sample. The mean of the first pass need not be exact, since the
// sums of d know what it missed (Chan, Golub and LeVeque's corrected two-pass algorithm): with d = x - pivot and
// rest = mean(d),
//   mean = pivot + rest,   variance = mean(d^2) - rest^2,   sum of g (x - mean) = sum of g d - rest * sum of g,
// and rest is as small as rounding, so that nothing cancels. Short runs are summed in Accumulator<T>, the runs
// of a channel in float64.
namespace fisher_kernels::FISHER_KERNELS_CAPABILITY {

namespace {

constexpr int64_t kRun = 64;  // numbers a lane adds before float64 takes over

constexpr int64_t kPrefetched = 1 << 15;  // numbers of a channel that the second-level cache holds beside another's

/// What is left to do with the sums of a channel once all of it has been seen.
template <class A>
struct Finish {
  A rest;     // of the mean, beyond the pivot
  A inverse;  // 1 / standard deviation

  /// The gradient of the scale from the sums of g * d and of g. An infinite gradient stays one.
  A operator()(A product, A gradient) const {
    return (product - (gradient - gradient == 0 ? rest * gradient : A{0})) * inverse;
  }
};

template <class A>
inline A inverse_deviation(double variance, double eps) {
  return static_cast<A>(1 / __builtin_sqrt(variance + eps));
}

/// From the sums of d and d^2 over `count` numbers.
template <class A>
inline Finish<A> finish_own(double sum, double squares, int64_t count, double eps) {
  const double rest = sum / static_cast<double>(count);
  const double variance = squares / static_cast<double>(count) - rest * rest;
  return {static_cast<A>(rest), inverse_deviation<A>(variance < 0 ? 0 : variance, eps)};
}

// Long runs: the positions of a channel are the lanes.

/// The sums of one channel, a sample's positions being side by side.
template <class T>
class LongRuns {
  using A = Accumulator<T>;
  using V = Vector<T>;
  static constexpr int64_t kWidth = kLanes<T>;
  static constexpr int64_t kPiece = kRun * kWidth;

 public:
  explicit LongRuns(const BatchNormGradients& a)
      : a_(a), samples_(a.samples), channels_(a.channels), positions_(a.positions), mask_{} {
    const int64_t rest = positions_ % kWidth;
    for (int64_t i = 0; i < kWidth; ++i) mask_[i] = i >= kWidth - rest ? -1 : 0;
  }

  int64_t scratch_size() const { return 2 * samples_; }

  /// Writes only when all is known: the outputs of a channel are far apart.
  template <bool kOwn>
  void sum(int64_t channel, A* products_of_samples) const {
    A* const gradients_of_samples = products_of_samples + samples_;
    const T* const x = static_cast<const T*>(a_.x) + channel * positions_;
    const T* const grad = static_cast<const T*>(a_.grad_output) + channel * positions_;
    A* const scale = static_cast<A*>(a_.scale) + channel;
    A* const shift = static_cast<A*>(a_.shift) + channel;
    const A pivot = kOwn ? mean(x, grad) : static_cast<const A*>(a_.mean)[channel];
    V sums[2] = {}, squares[2] = {};
    double sum = 0, square = 0;
    int64_t pending = 0;
    V gradient_rows[kWidth], product_rows[kWidth];
    for (int64_t n = 0; n < samples_; ++n) {
      V gradient = {}, product = {};
      for (int64_t first = 0; first < positions_; first += kPiece) {
        const int64_t size = smaller(kPiece, positions_ - first);
        V gradients[2] = {}, products[2] = {};
        const auto add = [&](int slot, V d, V g) {
          if constexpr (kOwn) {
            sums[slot] += d;
            squares[slot] += d * d;
          }
          gradients[slot] += g;
          products[slot] += g * d;
        };
        const T* const xs = x + n * a_.x_sample_stride + first;
        const T* const gs = grad + n * a_.grad_sample_stride + first;
        visit<2>(
            size, [&](int slot, int64_t i) { add(slot, load(xs + i) - pivot, load(gs + i)); },
            [&](int64_t i) { add(1, keep(load(xs + i) - pivot), keep(load(gs + i))); });
        gradient += gradients[0] + gradients[1];
        product += products[0] + products[1];
        pending += size;
        if (kOwn && pending >= kPiece) {
          sum += fold(sums);
          square += fold(squares);
          pending = 0;
        }
      }
      gradient_rows[n % kWidth] = gradient;
      product_rows[n % kWidth] = product;
      if (n % kWidth == kWidth - 1 || n == samples_ - 1) {
        const int64_t first = n - n % kWidth, count = n - first + 1;
        sum_rows(gradient_rows, count, gradients_of_samples + first);
        sum_rows(product_rows, count, products_of_samples + first);
      }
    }
    Finish<A> finish{0, 0};
    if constexpr (kOwn) {
      finish = finish_own<A>(sum + fold(sums), square + fold(squares), samples_ * positions_, a_.eps);
    } else {
      finish.inverse = inverse_deviation<A>(static_cast<const A*>(a_.variance)[channel], a_.eps);
    }
    for (int64_t n = 0; n < samples_; ++n) {
      scale[n * channels_] = finish(products_of_samples[n], gradients_of_samples[n]);
      shift[n * channels_] = gradients_of_samples[n];
    }
  }

 private:
  /// visit_register(slot, i) for the registers of a piece, visit_last(i) for one that ends where the piece does and
  /// has been seen in part; a piece that is not the last one has no such register.
  template <int kSlots, class Register, class Last>
  static void visit(int64_t size, const Register& visit_register, const Last& visit_last) {
    int64_t i = 0;
    for (; i + kSlots * kWidth <= size; i += kSlots * kWidth) {
#pragma GCC unroll 4
      for (int slot = 0; slot < kSlots; ++slot) visit_register(slot, i + slot * kWidth);
    }
    for (; i + kWidth <= size; i += kWidth) visit_register(0, i);
    if (i < size) visit_last(size - kWidth);
  }

  /// Zeros where the last register of a run repeats what came before.
  V keep(V value) const { return mask_ ? value : V{}; }

  /// out[i] = the sum of row i, for i < count: one transposition is cheaper than as many sums of lanes.
  static void sum_rows(V (&rows)[kWidth], int64_t count, A* out) {
    for (int64_t i = count; i < kWidth; ++i) rows[i] = V{};
    transpose<A>(rows);
#pragma GCC unroll 4
    for (int half = kWidth / 2; half > 0; half /= 2) {
#pragma GCC unroll 8
      for (int i = 0; i < half; ++i) rows[i] += rows[i + half];
    }
    count == kWidth ? store(out, rows[0]) : store(out, rows[0], count);
  }

  static A fold(V (&sums)[2]) {
    const A sum = sum_lanes<A>(sums[0] + sums[1]);
    sums[0] = sums[1] = V{};
    return sum;
  }

  /// Meanwhile the gradients of a small channel are fetched, which lie farther apart than the hardware foresees.
  A mean(const T* x, const T* grad) const {
    const bool prefetch = samples_ * positions_ <= kPrefetched;
    double total = 0;
    V sums[4] = {};
    int64_t pending = 0;
    for (int64_t n = 0; n < samples_; ++n) {
      for (int64_t first = 0; first < positions_; first += kPiece) {
        const T* const xs = x + n * a_.x_sample_stride + first;
        const int64_t size = smaller(kPiece, positions_ - first);
        visit<4>(
            size,
            [&](int slot, int64_t i) {
              if (prefetch) __builtin_prefetch(grad + n * a_.grad_sample_stride + first + i);
              sums[slot] += load(xs + i);
            },
            [&](int64_t i) { sums[1] += keep(load(xs + i)); });
        pending += size;
        if (pending >= kPiece) {
          total += sum_lanes<A>((sums[0] + sums[1]) + (sums[2] + sums[3]));
          for (V& sum : sums) sum = V{};
          pending = 0;
        }
      }
    }
    total += sum_lanes<A>((sums[0] + sums[1]) + (sums[2] + sums[3]));
    return static_cast<A>(total / static_cast<double>(samples_ * positions_));
  }

  using Mask = decltype(V{} < V{});

  const BatchNormGradients& a_;
  const int64_t samples_, channels_, positions_;
  Mask mask_;
};

// Channels side by side are the lanes.

/// Registers of channels as they lie in memory.
template <class T>
struct Rows {
  using Element = T;
  const T* x;
  int64_t sample_stride;
  int64_t row_stride;

  const T* operator()(int64_t sample, int64_t first, int64_t) const {
    return x + sample * sample_stride + first * row_stride;
  }
};

/// One register of channels, copied side by side for a run of positions; lanes without a channel repeat the first. The
/// sums know the type of the copy alone.
template <class A>
struct CopiedRows {
  using Element = A;
  static constexpr int64_t kWidth = kLanes<A>;
  const void* x;
  DType dtype;
  int64_t offset;  // of the first channel
  int64_t sample_stride;
  int64_t channel_stride;
  int64_t position_stride;
  int64_t count;  // of channels
  int64_t row_stride = kWidth;
  alignas(kVectorBytes) A copy[kRun * kWidth];

  const A* operator()(int64_t sample, int64_t first, int64_t size) {
    with_type(dtype, [&](auto* type) {
      using T = std::remove_pointer_t<decltype(type)>;
      if constexpr (std::is_same_v<Accumulator<T>, A>) {
        const T* const from = static_cast<const T*>(x) + offset + sample * sample_stride + first * position_stride;
        for (int64_t c = 0; c < kWidth; ++c) {
          const T* const channel = from + (c < count ? c : 0) * channel_stride;
          for (int64_t s = 0; s < size; ++s) copy[s * kWidth + c] = widen(channel[s * position_stride]);
        }
      }
    });
    return copy;
  }
};

/// The sums of kRegisters registers of channels, of which those from `begin` to `end` are written. The arrays of `a`
/// are those of the first channel.
template <int kRegisters, bool kOwn, class Rows>
void sum_side_by_side(const BatchNormGradients& a, int64_t channel, int64_t begin, int64_t end, Rows& x,
                      Rows& grad) {
  using A = Accumulator<typename Rows::Element>;
  using V = Vector<A>;
  constexpr int64_t kWidth = kLanes<A>, kChannels = kRegisters * kWidth;
  // totals[c] += sums, which start again from 0.
  const auto fold = [](V(&sums)[kRegisters], double(&totals)[kChannels]) {
#pragma GCC unroll 4
    for (int k = 0; k < kRegisters; ++k) {
      for (int64_t c = 0; c < kWidth; ++c) totals[k * kWidth + c] += sums[k][c];
      sums[k] = V{};
    }
  };
  const double count = static_cast<double>(a.samples * a.positions);
  alignas(kVectorBytes) A pivots[kChannels];
  if constexpr (kOwn) {
    double totals[kChannels] = {};
    V sums[kRegisters] = {};
    int64_t pending = 0;
    for (int64_t n = 0; n < a.samples; ++n) {
      for (int64_t first = 0; first < a.positions; first += kRun) {
        const int64_t size = smaller(kRun, a.positions - first);
        const auto* row = x(n, first, size);
        for (int64_t s = 0; s < size; ++s, row += x.row_stride) {
#pragma GCC unroll 4
          for (int k = 0; k < kRegisters; ++k) sums[k] += load(row + k * kWidth);
        }
        pending += size;
        if (pending >= kRun) {
          fold(sums, totals);
          pending = 0;
        }
      }
    }
    fold(sums, totals);
    for (int64_t c = 0; c < kChannels; ++c) pivots[c] = static_cast<A>(totals[c] / count);
  } else {
    for (int64_t c = 0; c < kChannels; ++c) pivots[c] = c < end ? static_cast<const A*>(a.mean)[channel + c] : A{0};
  }
  V pivot[kRegisters];
#pragma GCC unroll 4
  for (int k = 0; k < kRegisters; ++k) pivot[k] = load(pivots + k * kWidth);

  A* const scale = static_cast<A*>(a.scale) + channel;
  A* const shift = static_cast<A*>(a.shift) + channel;
  double sum[kChannels] = {}, square[kChannels] = {};
  V sums[kRegisters] = {}, squares[kRegisters] = {};
  int64_t pending = 0;
  const bool one_run = a.positions <= kRun;
  for (int64_t n = 0; n < a.samples; ++n) {
    double gradient[kChannels] = {}, product[kChannels] = {};
    V gradients[kRegisters] = {}, products[kRegisters] = {};
    for (int64_t first = 0; first < a.positions; first += kRun) {
      const int64_t size = smaller(kRun, a.positions - first);
      const auto* row = x(n, first, size);
      const auto* grad_row = grad(n, first, size);
      for (int64_t s = 0; s < size; ++s, row += x.row_stride, grad_row += grad.row_stride) {
#pragma GCC unroll 4
        for (int k = 0; k < kRegisters; ++k) {
          const V d = load(row + k * kWidth) - pivot[k], g = load(grad_row + k * kWidth);
          if constexpr (kOwn) {
            sums[k] += d;
            squares[k] += d * d;
          }
          gradients[k] += g;
          products[k] += g * d;
        }
      }
      if (!one_run) {
        fold(gradients, gradient);
        fold(products, product);
      }
      pending += size;
      if (kOwn && pending >= kRun) {
        fold(sums, sum);
        fold(squares, square);
        pending = 0;
      }
    }
    A* const scales = scale + n * a.channels;
    A* const shifts = shift + n * a.channels;
    if (!one_run) {
      for (int64_t c = begin; c < end; ++c) {
        shifts[c] = static_cast<A>(gradient[c]);
        scales[c] = static_cast<A>(product[c]);
      }
    } else if (end - begin == kChannels) {
#pragma GCC unroll 4
      for (int k = 0; k < kRegisters; ++k) {
        store(shifts + k * kWidth, gradients[k]);
        store(scales + k * kWidth, products[k]);
      }
    } else {
      for (int64_t c = begin; c < end; ++c) {
        shifts[c] = gradients[c / kWidth][c % kWidth];
        scales[c] = products[c / kWidth][c % kWidth];
      }
    }
  }
  fold(sums, sum);
  fold(squares, square);
  Finish<A> finish[kChannels] = {};
  for (int64_t c = begin; c < end; ++c) {
    if constexpr (kOwn) {
      finish[c] = finish_own<A>(sum[c], square[c], a.samples * a.positions, a.eps);
    } else {
      finish[c].inverse = inverse_deviation<A>(static_cast<const A*>(a.variance)[channel + c], a.eps);
    }
  }
  for (int64_t n = 0; n < a.samples; ++n) {
    A* const scales = scale + n * a.channels;
    const A* const shifts = shift + n * a.channels;
    for (int64_t c = begin; c < end; ++c) scales[c] = finish[c](scales[c], shifts[c]);
  }
}

template <class T, bool kOwn>
void sum_long_runs(const BatchNormGradients& a, int threads) {
  const LongRuns<T> runs(a);
  const Scratch<Accumulator<T>> scratch(threads * runs.scratch_size());
  parallel_for(threads, a.channels, [&](int thread, int64_t begin, int64_t end) {
    auto* const own = scratch.data() + thread * runs.scratch_size();
    for (int64_t channel = begin; channel < end; ++channel) runs.template sum<kOwn>(channel, own);
  });
}

template <class T, bool kOwn>
void sum_rows(const BatchNormGradients& a, int threads) {
  constexpr int64_t kWidth = kLanes<T>;
  parallel_for(threads, ceil_div(a.channels, kWidth), [&](int, int64_t begin, int64_t end) {
    for (int64_t group = begin; group < end; ++group) {
      // The last register overlaps the one before.
      const int64_t wanted = group * kWidth, channel = smaller(wanted, a.channels - kWidth);
      const Rows<T> rows{static_cast<const T*>(a.x) + channel, a.x_sample_stride, a.channels};
      const Rows<T> grad_rows{static_cast<const T*>(a.grad_output) + channel, a.grad_sample_stride, a.channels};
      sum_side_by_side<1, kOwn>(a, channel, wanted - channel, kWidth, rows, grad_rows);
    }
  });
}

template <class A, bool kOwn>
void sum_copies(const BatchNormGradients& a, int threads) {
  constexpr int64_t kWidth = kLanes<A>;
  const int64_t channel_stride = a.channels_last ? 1 : a.positions;
  const int64_t position_stride = a.channels_last ? a.channels : 1;
  parallel_for(threads, ceil_div(a.channels, kWidth), [&](int, int64_t begin, int64_t end) {
    for (int64_t group = begin; group < end; ++group) {
      const int64_t wanted = group * kWidth, count = smaller(kWidth, a.channels - wanted);
      const auto rows_of = [&](const void* data, int64_t sample_stride) {
        return CopiedRows<A>{data,           a.x_dtype,         wanted * channel_stride, sample_stride,
                             channel_stride, position_stride, count,                   kWidth,
                             {}};
      };
      CopiedRows<A> rows = rows_of(a.x, a.x_sample_stride), grad_rows = rows_of(a.grad_output, a.grad_sample_stride);
      sum_side_by_side<1, kOwn>(a, wanted, 0, count, rows, grad_rows);
    }
  });
}

template <bool kOwn>
void sum_channels(const BatchNormGradients& a) {
  const int threads = useful_threads(a.samples * a.channels * a.positions, a.threads);
  const int64_t width = a.x_dtype == DType::float64 ? kLanes<double> : kLanes<float>;
  const bool long_runs = !a.channels_last && a.positions >= width;
  if (!long_runs && !(a.channels_last && a.channels >= width)) {
    return a.x_dtype == DType::float64 ? sum_copies<double, kOwn>(a, threads) : sum_copies<float, kOwn>(a, threads);
  }
  with_type(a.x_dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    long_runs ? sum_long_runs<T, kOwn>(a, threads) : sum_rows<T, kOwn>(a, threads);
  });
}

}  // namespace

void batch_norm_gradients(const BatchNormGradients& a) {
  a.mean == nullptr ? sum_channels<true>(a) : sum_channels<false>(a);
}

}  // namespace fisher_kernels::FISHER_KERNELS_CAPABILITY
