#pragma once

#include <cstdint>

#ifdef _OPENMP
#include <omp.h>
#endif

#include "integers.h"

namespace fisher_kernels::FISHER_KERNELS_CAPABILITY {
namespace {

/// Threads worth starting for `work` elements: a parallel region costs a few microseconds.
inline int useful_threads(int64_t work, int threads) {
  constexpr int64_t kMinWork = 32 * 1024;
  const int64_t useful = work / kMinWork;
  return useful < 1 ? 1 : useful < threads ? static_cast<int>(useful) : threads;
}

/// The same for multiply-adds, which go through registers several at a time.
inline int threads_for_products(double products, int threads) {
  constexpr double kEnough = 0x1p50;  // for any number of threads
  return useful_threads(static_cast<int64_t>((products < kEnough ? products : kEnough) / 16), threads);
}

/// Calls body(thread, begin, end) on each of `threads` threads with its even share of [0, count). It must throw
/// nothing.
template <class Body>
void parallel_for(int threads, int64_t count, const Body& body) {
#ifdef _OPENMP
  if (threads > 1) {
#pragma omp parallel num_threads(threads)
    {
      const int thread = omp_get_thread_num();
      const int64_t shares = omp_get_num_threads();  // fewer than asked for if OpenMP says so
      body(thread, count * thread / shares, count * (thread + 1) / shares);
    }
    return;
  }
#endif
  static_cast<void>(threads);
  body(0, int64_t{0}, count);
}

/// A stretch of an array.
struct Part {
  int64_t first;
  int64_t last;

  bool empty() const { return first >= last; }
};

/// Of arrays laid end to end, of which this one comes after `start` elements, what a share [begin, end) of all elements
/// holds. Cuts fall between chunks, which start with their array: so an element meets the same code whatever the number
/// of shares.
inline Part part_of(int64_t begin, int64_t end, int64_t start, int64_t size, int64_t chunk) {
  const auto cut = [&](int64_t i) { return i <= start ? 0 : smaller(size, ceil_div(i - start, chunk) * chunk); };
  return {cut(begin), cut(end)};
}

}  // namespace
}  // namespace fisher_kernels::FISHER_KERNELS_CAPABILITY
