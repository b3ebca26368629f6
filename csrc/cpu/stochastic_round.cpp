#include <cstdint>

#include "../kernels.h"
#include "parallel.h"
#include "rounding.h"
#include "vector.h"

namespace fisher_kernels::FISHER_KERNELS_CAPABILITY {

namespace {

// Elements that a share of the work begins at a multiple of: a multiple of every kLanes.
constexpr int64_t kChunk = 1024;

template <bool kLow>
void round_part(const StochasticRound& a, const Part& part) {
  for_stretches(a.index, a.state, part.first, part.last - part.first,
                [&](int64_t i, int64_t count, uint32_t lower, uint32_t key) {
    const float* const x = a.x + part.first + i;
    UpperHalf* const out = static_cast<UpperHalf*>(a.out) + part.first + i;
    for_registers<float>(count, [&](int64_t k, const auto& load, const auto& store) {
      store(out + k, round_stochastically<kLow>(load(x + k), random_words(lower + static_cast<uint32_t>(k), key)));
    });
  });
}

}  // namespace

void stochastic_round(const StochasticRound& a) {
  parallel_for(useful_threads(a.size, a.threads), a.size, [&](int, int64_t begin, int64_t end) {
    const Part part = part_of(begin, end, 0, a.size, kChunk);
    if (part.empty()) return;
    a.low ? round_part<true>(a, part) : round_part<false>(a, part);
  });
}

}  // namespace fisher_kernels::FISHER_KERNELS_CAPABILITY
