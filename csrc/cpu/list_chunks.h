#pragma once

#include <cstdint>

#include "integers.h"
#include "parallel.h"
#include "scratch.h"

namespace fisher_kernels::FISHER_KERNELS_CAPABILITY {
namespace {

/// The elements of a list of arrays laid end to end, in chunks of `kChunk` that start with their array. Chunks are
/// numbered in order: a matter of the sizes alone, so that what is added up chunk by chunk is the same for any number of
/// threads.
template <int64_t kChunk>
class ListChunks {
 public:
  /// Arrays have a `size`.
  template <class Array>
  ListChunks(const Array* arrays, int64_t count) : starts_(count + 1), count_(count) {
    Start* const starts = starts_.data();
    starts[0] = {0, 0};
    for (int64_t i = 0; i < count; ++i) {
      starts[i + 1] = {starts[i].element + arrays[i].size, starts[i].chunk + ceil_div(arrays[i].size, kChunk)};
    }
  }

  /// Number of the first chunk of array i; of what comes after the last one, how many there are.
  int64_t first(int64_t i) const { return starts_.data()[i].chunk; }
  int64_t count() const { return first(count_); }

  /// Calls body(i, part) for the parts of the arrays on several threads, which share the elements evenly and in every
  /// pass alike. Parts are of whole chunks.
  template <class Body>
  void for_parts(int threads, const Body& body) const {
    const Start* const starts = starts_.data();
    const int64_t total = starts[count_].element;
    parallel_for(useful_threads(total, threads), total, [&](int, int64_t begin, int64_t end) {
      for (int64_t i = 0; i < count_; ++i) {
        const int64_t size = starts[i + 1].element - starts[i].element;
        const Part part = part_of(begin, end, starts[i].element, size, kChunk);
        if (!part.empty()) body(i, part);
      }
    });
  }

  /// Calls body(chunk, first, count) for the chunks of a part of array i, `first` being an element of the array.
  template <class Body>
  void for_chunks(int64_t i, const Part& part, const Body& body) const {
    for (int64_t begin = part.first; begin < part.last; begin += kChunk) {
      body(first(i) + begin / kChunk, begin, smaller(kChunk, part.last - begin));
    }
  }

 private:
  struct Start {
    int64_t element;
    int64_t chunk;
  };

  const Scratch<Start> starts_;
  const int64_t count_;
};

}  // namespace
}  // namespace fisher_kernels::FISHER_KERNELS_CAPABILITY
