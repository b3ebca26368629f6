#include "gram.cuh"
#include "gram_tensor.cuh"
#include "kernels.h"

// The weighted Gram matrix of rows: R D (D + 1) / 2 multiply-adds, half of those of a matrix product, but for what tiles
// on the diagonal waste. From a few dozen columns on they are what counts, and go to tensor cores but for float64; with
// fewer it is the one read of x.
namespace fisher_kernels::cuda {

namespace {

constexpr const char* kName = "weighted_gram_";

Gram gram_of(const WeightedGram& a) {
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
  return gram;
}

}  // namespace

void weighted_gram_(const WeightedGram& a, const Stream& stream) {
  const DeviceGuard guard(stream);
  Gram gram = gram_of(a);
  if (suits_tensor_cores(a.dtype, a.columns, a.weight != nullptr) && has_tensor_cores()) {
    return tensor_gram(kName, a.dtype, gram, stream);
  }
  for_type(a.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    for_tile<T>(a.columns, [&](auto tile) {
      using Traits = typename decltype(tile)::type;
      share_rows<Traits>(gram);
      launch_gram<Traits, AddManyTraits<Traits>>(kName, gram, stream);
    });
  });
}

}  // namespace fisher_kernels::cuda
