#include "gram.cuh"

#include <algorithm>

#include "kernels.h"

// The weighted Gram matrix of rows: R D (D + 1) / 2 multiply-adds in float32 (float64 for float64), half of those of a
// matrix product, but for what tiles on the diagonal waste. From a few dozen columns on they are what counts; with
// fewer it is the one read of x.
namespace fisher_kernels::cuda {

namespace {

constexpr const char* kName = "weighted_gram_";

constexpr int kSmall = 32, kMedium = 64, kLarge = 128;  // tiles
constexpr int64_t kMostOfMedium = 256;  // columns: above, less is read for a product and few tiles are half empty
constexpr int64_t kRun = 128;           // rows; a share is no shorter,
constexpr int64_t kMostShares = 1024;   // and there are no more than so many,
constexpr int64_t kThreadsAtOnce = 4 * 132 * 256;  // nor more than make up so many threads

template <class Traits>
void weighted_gram(const WeightedGram& a, const Stream& stream) {
  static_assert(kRun % Traits::kDepth == 0);
  // A result of few columns has many shares, and few threads to add them.
  using Add = AddTraits<typename Traits::A, Traits::kTile, 8, sizeof(typename Traits::A) == 8 ? 4 : 8>;
  const int64_t blocks = std::max<int64_t>(1, tiles_of_triangle(a.columns, Traits::kTile));
  const int64_t wanted = std::min({kThreadsAtOnce / Traits::kThreads / blocks, a.rows / kRun, kMostShares});
  const int64_t rows = divide_up(a.rows, std::max<int64_t>(1, wanted));
  Gram gram{};
  gram.x = a.x;
  gram.weight = a.weight;
  gram.out = a.out;
  gram.rows = a.rows;
  gram.row_stride = a.row_stride;
  gram.matrices = 1;
  gram.columns = a.columns;
  gram.share = std::max<int64_t>(1, divide_up<int64_t>(rows, Traits::kDepth)) * Traits::kDepth;
  gram.run = kRun;
  gram.shares = std::max<int64_t>(1, divide_up(a.rows, gram.share));
  gram.decay = a.decay;
  gram.gain = a.gain;
  launch_gram<Traits, Add>(kName, gram, stream);
}

}  // namespace

void weighted_gram_(const WeightedGram& a, const Stream& stream) {
  const DeviceGuard guard(stream);
  for_type(a.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    if (a.columns <= kSmall) return weighted_gram<GramTraits<T, kSmall>>(a, stream);
    if constexpr (!std::is_same_v<T, double>) {
      if (a.columns > kMostOfMedium) return weighted_gram<GramTraits<T, kLarge>>(a, stream);
    }
    weighted_gram<GramTraits<T, kMedium>>(a, stream);
  });
}

}  // namespace fisher_kernels::cuda
