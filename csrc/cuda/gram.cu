#include "gram.cuh"
#include "kernels.h"

// The weighted Gram matrix of rows: R D (D + 1) / 2 multiply-adds in float32 (float64 for float64), half of those of a
// matrix product, but for what tiles on the diagonal waste. From a few dozen columns on they are what counts; with
// fewer it is the one read of x.
namespace fisher_kernels::cuda {

namespace {

constexpr const char* kName = "weighted_gram_";

template <class Traits>
void weighted_gram(const WeightedGram& a, const Stream& stream) {
  Gram gram{};
  gram.x = a.x;
  gram.weight = a.weight;
  gram.out = a.out;
  gram.rows = a.rows;
  gram.row_stride = a.row_stride;
  gram.matrices = 1;
  gram.columns = a.columns;
  gram.decay = a.decay;
  gram.gain = a.gain;
  share_rows<Traits>(gram);
  launch_gram<Traits, AddManyTraits<Traits>>(kName, gram, stream);
}

}  // namespace

void weighted_gram_(const WeightedGram& a, const Stream& stream) {
  const DeviceGuard guard(stream);
  for_type(a.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    for_tile<T>(a.columns, [&](auto traits) { weighted_gram<typename decltype(traits)::type>(a, stream); });
  });
}

}  // namespace fisher_kernels::cuda
