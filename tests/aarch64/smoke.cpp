// Runs kernels of several kinds, as they were compiled for another processor, and compares them with their definitions
// in float64. Sums are of small integers, which have no rounding: they are compared exactly.
#include <cmath>
#include <cstdio>
#include <limits>
#include <string>
#include <vector>

#include "common/processor.h"
#include "kernels.h"

namespace {

using namespace fisher_kernels;

constexpr int kThreads = 2;
int failures = 0;

/// NaN is near nothing.
void expect(const char* what, int64_t index, double found, double wanted, double bound = 0) {
  if (std::abs(found - wanted) <= bound) return;
  if (++failures > 20) return;
  std::printf("%s: %.9g at %lld, expected %.9g\n", what, found, static_cast<long long>(index), wanted);
}

/// Integers from -3 to 3.
int integer(int64_t i) { return static_cast<int>((5 * i + i / 7 + i / 31) % 7) - 3; }

/// Numbers between 1/2 and 1.
double fraction(int64_t i) { return 0.5 + static_cast<double>(i * 37 % 101) / 202; }

/// -3 to 3 as 16-bit numbers.
constexpr uint16_t kFloat16[] = {0xc200, 0xc000, 0xbc00, 0x0000, 0x3c00, 0x4000, 0x4200};
constexpr uint16_t kBFloat16[] = {0xc040, 0xc000, 0xbf80, 0x0000, 0x3f80, 0x4000, 0x4040};

template <class T, class Sum, class Encode>
void check_sum_of_squares(DType dtype, const Encode& encode) {
  constexpr int64_t kRows = 4000, kColumns = 19, kStride = 23;
  std::vector<T> x(kRows * kStride);
  for (size_t i = 0; i < x.size(); ++i) x[i] = encode(integer(i));
  std::vector<Sum> out(kColumns, -1);
  baseline::column_sum_of_squares({x.data(), out.data(), dtype, kRows, kColumns, kStride, kThreads});
  for (int64_t c = 0; c < kColumns; ++c) {
    double sum = 0;
    for (int64_t r = 0; r < kRows; ++r) sum += integer(r * kStride + c) * integer(r * kStride + c);
    expect((std::string("column_sum_of_squares of ") + name(dtype)).c_str(), c, out[c], sum);
  }
}

void check_weighted_gram() {
  constexpr int64_t kRows = 700, kColumns = 37, kStride = 41;
  std::vector<float> x(kRows * kStride), weight(kRows), out(kColumns * kColumns);
  for (size_t i = 0; i < x.size(); ++i) x[i] = static_cast<float>(integer(i));
  for (int64_t r = 0; r < kRows; ++r) weight[r] = static_cast<float>(integer(3 * r)) / 2;
  for (int64_t i = 0; i < kColumns; ++i) {
    for (int64_t j = 0; j < kColumns; ++j) out[i * kColumns + j] = static_cast<float>(integer(i + j));
  }
  const std::vector<float> old = out;
  baseline::weighted_gram_(
      {x.data(), weight.data(), out.data(), DType::float32, kRows, kColumns, kStride, 0.5, 2.0, kThreads});
  for (int64_t i = 0; i < kColumns * kColumns; ++i) {
    double sum = 0;
    for (int64_t r = 0; r < kRows; ++r) {
      sum += double{weight[r]} * x[r * kStride + i / kColumns] * x[r * kStride + i % kColumns];
    }
    expect("weighted_gram_", i, out[i], 0.5 * old[i] + 2 * sum);
  }
}

void check_conv_gram(int64_t groups, int64_t channels) {
  constexpr int64_t kSamples = 3, kSize = 12, kKernel = 3, kPadding = 1;
  const int64_t columns = channels * kKernel + 1;
  std::vector<float> x(kSamples * groups * channels * kSize), out(groups * columns * columns);
  for (size_t i = 0; i < x.size(); ++i) x[i] = static_cast<float>(integer(i));
  const Window none = {1, 1, 1, 1, 1, 0}, width = {kSize, kSize, kKernel, 1, 1, kPadding};
  const ChannelArray array = {x.data(), groups * channels * kSize, kSize, 1};
  baseline::conv_gram_(
      {array, out.data(), DType::float32, kSamples, groups, channels, none, none, width, true, 0, 2.0, kThreads});
  const auto patch = [&](int64_t s, int64_t group, int64_t l, int64_t column) -> double {
    const int64_t position = l + column % kKernel - kPadding;
    if (column == columns - 1) return 1;
    if (position < 0 || position >= kSize) return 0;
    return x[((s * groups + group) * channels + column / kKernel) * kSize + position];
  };
  for (int64_t i = 0; i < groups * columns * columns; ++i) {
    double sum = 0;
    for (int64_t s = 0; s < kSamples; ++s) {
      for (int64_t l = 0; l < kSize; ++l) {
        const int64_t group = i / columns / columns;
        sum += patch(s, group, l, i / columns % columns) * patch(s, group, l, i % columns);
      }
    }
    expect("conv_gram_", i, out[i], 2 * sum);
  }
}

double norm(const std::vector<double>& a) {
  double sum = 0;
  for (const double value : a) sum += value * value;
  return std::sqrt(sum);
}

/// Gauss and Jordan's, without pivots.
std::vector<double> inverse_of(std::vector<double> a, int64_t n) {
  std::vector<double> inverse(n * n);
  for (int64_t i = 0; i < n; ++i) inverse[i * n + i] = 1;
  for (int64_t k = 0; k < n; ++k) {
    const double pivot = a[k * n + k];
    for (int64_t j = 0; j < n; ++j) {
      a[k * n + j] /= pivot;
      inverse[k * n + j] /= pivot;
    }
    for (int64_t i = 0; i < n; ++i) {
      const double factor = i == k ? 0 : a[i * n + k];
      for (int64_t j = 0; j < n; ++j) {
        a[i * n + j] -= factor * a[k * n + j];
        inverse[i * n + j] -= factor * inverse[k * n + j];
      }
    }
  }
  return inverse;
}

template <class T>
void check_block_inverse(DType dtype, int64_t n) {
  constexpr int64_t kCount = 7, kIndefinite = 4;
  constexpr double kDamping = 0.5;
  std::vector<T> blocks(kCount * n * n), out(kCount * n * n);
  std::vector<int64_t> info(kCount, -1);
  for (int64_t b = 0; b < kCount; ++b) {
    for (int64_t i = 0; i < n * n; ++i) {
      double sum = i / n == i % n ? 1 : 0;
      for (int64_t k = 0; k < n; ++k) sum += integer(b + i / n * n + k) * integer(b + i % n * n + k) / 8.0;
      blocks[b * n * n + i] = static_cast<T>(b == kIndefinite ? -sum : sum);
    }
  }
  baseline::block_inverse(
      {blocks.data(), out.data(), info.data(), kDamping, kCount, n, dtype, /*keep_bad=*/false, kThreads});
  const std::string what = std::string("block_inverse of ") + name(dtype) + ", n = " + std::to_string(n);
  for (int64_t b = 0; b < kCount; ++b) {
    expect((what + ", info").c_str(), b, info[b], b == kIndefinite);
    std::vector<double> a(blocks.begin() + b * n * n, blocks.begin() + (b + 1) * n * n);
    for (int64_t i = 0; i < n; ++i) a[i * n + i] += kDamping;
    const std::vector<double> wanted = inverse_of(a, n);
    // The documented bound on the error, once for the kernel and once for what it is compared with.
    const double unit = std::numeric_limits<T>::epsilon() / 2, condition = norm(a) * norm(wanted);
    const double bound = 2 * 8 * (n + 1) * unit * condition * norm(wanted);
    for (int64_t i = 0; i < n * n; ++i) {
      const double found = out[b * n * n + i];
      if (b != kIndefinite) expect(what.c_str(), b * n * n + i, found, wanted[i], bound);
      if (b == kIndefinite) expect((what + ", is NaN").c_str(), i, std::isnan(found), true);
    }
  }
}

void check_adafisher_step() {
  constexpr int64_t kRows = 301, kColumns = 257, kSize = kRows * kColumns, kBad = 12345;
  constexpr double kBeta = 0.875, kDamping = 0.125, kDecay = 0.25, kLr = 0.0625, kStepSize = 0.5;
  std::vector<float> w(kSize), g(kSize), m(kSize), row_factor(kRows), column_factor(kColumns);
  for (int64_t i = 0; i < kSize; ++i) {
    w[i] = static_cast<float>(fraction(i));
    g[i] = static_cast<float>(integer(i));
    m[i] = static_cast<float>(-fraction(3 * i));
  }
  g[kBad] = std::numeric_limits<float>::infinity();
  for (int64_t r = 0; r < kRows; ++r) row_factor[r] = static_cast<float>(fraction(5 * r));
  for (int64_t c = 0; c < kColumns; ++c) column_factor[c] = static_cast<float>(fraction(7 * c));
  const std::vector<float> old_w = w, old_m = m;

  const int64_t sizes[] = {kRows, kColumns}, strides[] = {kColumns, 1};
  const auto array = [&](std::vector<float>& a) { return StridedArray{a.data(), sizes, strides, 2, true}; };
  AdaFisherParameter parameter = {};
  parameter.parameter = array(w);
  parameter.gradient = array(g);
  parameter.moment = array(m);
  parameter.row_factor = row_factor.data();
  parameter.column_factor = column_factor.data();
  parameter.constant_factor = 1;
  parameter.groups = 1;
  parameter.rows = kRows;
  parameter.columns = kColumns;
  parameter.step_size = kStepSize;
  parameter.dtype = DType::float32;
  int64_t skipped = 0;
  AdaFisherStep step = {};
  step.parameters = &parameter;
  step.count = 1;
  step.skipped = &skipped;
  step.lr.value = kLr;
  step.beta = kBeta;
  step.damping = kDamping;
  step.weight_decay = kDecay;
  step.decay = WeightDecay::decoupled;
  step.gradient_scale.found_inf.value = 0;
  step.threads = kThreads;
  baseline::adafisher_step_(step);

  expect("adafisher_step_, skipped", 0, skipped, 1);
  for (int64_t i = 0; i < kSize; ++i) {
    const bool bad = i == kBad;
    const double old = old_w[i], f = double{row_factor[i / kColumns]} * column_factor[i % kColumns] + kDamping;
    const double moment = bad ? old_m[i] : kBeta * old_m[i] + (1 - kBeta) * g[i];
    const double weight = bad ? old : old - kLr * kDecay * old - kStepSize * moment / f;
    // Eight roundings at most lie between them, of numbers that are no larger than these sums.
    const double unit = bad ? 0 : 8 * std::numeric_limits<float>::epsilon() / 2;
    const double sum = kBeta * std::abs(old_m[i]) + (1 - kBeta) * std::abs(g[i]);
    expect("adafisher_step_, moment", i, m[i], moment, bad ? 0 : unit * sum);
    expect("adafisher_step_, parameter", i, w[i], weight, bad ? 0 : unit * (std::abs(old) + kStepSize * sum / f));
  }
}

}  // namespace

int main() {
  const auto names = processor_capabilities();
  expect("instruction sets", 0, static_cast<double>(names.size()), 1);
  check_sum_of_squares<float, float>(DType::float32, [](int value) { return static_cast<float>(value); });
  check_sum_of_squares<double, double>(DType::float64, [](int value) { return static_cast<double>(value); });
  check_sum_of_squares<uint16_t, float>(DType::bfloat16, [](int value) { return kBFloat16[value + 3]; });
  check_sum_of_squares<uint16_t, float>(DType::float16, [](int value) { return kFloat16[value + 3]; });
  check_weighted_gram();
  check_conv_gram(1, 2);
  check_conv_gram(1, 9);
  check_conv_gram(6, 1);
  for (const int64_t n : {1, 3, 6, 17, 70, 100}) {
    check_block_inverse<float>(DType::float32, n);
    check_block_inverse<double>(DType::float64, n);
  }
  check_adafisher_step();
  std::printf("%d of the comparisons failed\n", failures);
  return failures > 0;
}
