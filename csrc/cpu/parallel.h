#pragma once

#include <cstdint>

#ifdef _OPENMP
#include <omp.h>
#endif

namespace fisher_kernels::FISHER_KERNELS_CAPABILITY {
namespace {

/// Threads worth starting for `work` elements: a parallel region costs a few microseconds.
inline int useful_threads(int64_t work, int threads) {
  constexpr int64_t kMinWork = 32 * 1024;
  const int64_t useful = work / kMinWork;
  return useful < 1 ? 1 : useful < threads ? static_cast<int>(useful) : threads;
}

/// Calls body(begin, end) on each thread with its even share of [0, count). Nothing may be thrown in the body.
template <class Body>
void parallel_for(int threads, int64_t count, const Body& body) {
#ifdef _OPENMP
  if (threads > 1) {
#pragma omp parallel num_threads(threads)
    {
      const int64_t share = omp_get_thread_num(), shares = omp_get_num_threads();
      body(count * share / shares, count * (share + 1) / shares);
    }
    return;
  }
#endif
  static_cast<void>(threads);
  body(int64_t{0}, count);
}

}  // namespace
}  // namespace fisher_kernels::FISHER_KERNELS_CAPABILITY
