#include <cstdint>

#include "../kernels.h"
#include "parallel.h"
#include "vector.h"

// Bare passes over memory, for benchmarks: what no kernel that moves the same bytes can beat.
namespace fisher_kernels::FISHER_KERNELS_CAPABILITY {

namespace {

/// Adds the numbers at `read` to those at `first` and, if kBoth, at `second`, for `count` numbers.
template <bool kBoth>
void update(float* __restrict first, float* __restrict second, const float* __restrict read, int64_t count) {
  for_registers<float>(count, [&](int64_t i, const auto& load, const auto& store) {
    const Vector<float> value = load(read + i);
    store(first + i, load(first + i) + value);
    if constexpr (kBoth) store(second + i, load(second + i) + value);
  });
}

}  // namespace

void stream_update(const StreamUpdate& a) {
  int64_t total = 0;
  for (int64_t i = 0; i < a.count; ++i) total += a.arrays[i].size;
  parallel_for(useful_threads(total, a.threads), total, [&](int, int64_t begin, int64_t end) {
    int64_t start = 0;  // of array i among all numbers
    for (int64_t i = 0; i < a.count && start < end; ++i) {
      const StreamArrays& arrays = a.arrays[i];
      const Part part = part_of(begin, end, start, arrays.size, 1);
      if (!part.empty()) {
        float* const first = arrays.first + part.first;
        const float* const read = arrays.read + part.first;
        const int64_t size = part.last - part.first;
        arrays.second == nullptr ? update<false>(first, nullptr, read, size)
                                 : update<true>(first, arrays.second + part.first, read, size);
      }
      start += arrays.size;
    }
  });
}

void stream_read(const StreamRead& a) {
  // Several streams at once, fetched ahead: one alone is slower.
  constexpr int kStreams = 8;
  constexpr int64_t kAhead = 4096;
  constexpr int64_t kStep = sizeof(Words);
  *a.sum = 0;
  parallel_for(useful_threads(a.bytes / 4, a.threads), a.bytes / kStep, [&](int, int64_t begin, int64_t end) {
    Words sums[kStreams] = {};
    const int64_t length = (end - begin) / kStreams;
    const char* const first = a.data + begin * kStep;
    for (int64_t i = 0; i < length; ++i) {
      for (int k = 0; k < kStreams; ++k) {
        const char* const p = first + (k * length + i) * kStep;
        __builtin_prefetch(p + kAhead, 0, 2);
        sums[k] += load_bits<Words>(p);
      }
    }
    for (int64_t i = begin + kStreams * length; i < end; ++i) sums[0] += load_bits<Words>(a.data + i * kStep);
    uint32_t sum = 0;
    for (int k = 0; k < kStreams; ++k) {
      for (size_t lane = 0; lane < sizeof(Words) / sizeof(uint32_t); ++lane) sum += sums[k][lane];
    }
    __atomic_fetch_add(a.sum, sum, __ATOMIC_RELAXED);  // the sum is returned so that no compiler drops the reads
  });
}

}  // namespace fisher_kernels::FISHER_KERNELS_CAPABILITY
