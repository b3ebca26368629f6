#pragma once

#include <cstdint>

#include "integers.h"

// Samples that are shared out where there is little else to share.
namespace fisher_kernels::FISHER_KERNELS_CAPABILITY {
namespace {

/// Shares of the samples, whose sums are added in order. How many there are depends on the shape alone.
class Shares {
 public:
  /// units: what is summed over all samples; products: multiply-adds of a unit; bytes: of its totals.
  Shares(int64_t samples, int64_t units, double products, int64_t bytes) : samples_(samples) {
    const int64_t most = smaller(smaller(kMostUnits / units, samples), kTotals / units / bytes);
    const double worth = products / kWorth;
    count_ = worth < static_cast<double>(most) ? larger(1, static_cast<int64_t>(worth)) : larger(1, most);
  }

  int64_t count() const { return count_; }
  int64_t first(int64_t share) const { return samples_ * share / count_; }

 private:
  static constexpr int64_t kMostUnits = 64;  // of all shares
  static constexpr int64_t kWorth = 1 << 22;  // multiply-adds; a share of less is none of its own
  static constexpr int64_t kTotals = 16 << 20;  // bytes, unless those of one share of each unit are more

  int64_t samples_;
  int64_t count_;
};

}  // namespace
}  // namespace fisher_kernels::FISHER_KERNELS_CAPABILITY
