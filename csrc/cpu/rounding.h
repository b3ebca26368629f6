#pragma once

#include <cstdint>

#include "../common/rounding.h"
#include "integers.h"
#include "vector.h"

namespace fisher_kernels::FISHER_KERNELS_CAPABILITY {
namespace {

/// Calls body(i, count, lower, key) for stretches of the elements first to first + count - 1 whose indices follow one
/// another and have the same key: elements first + i to first + i + count of the call, the first with the index `lower`.
template <class Body>
void for_stretches(const RoundingIndex& at, uint32_t state, int64_t first, int64_t count, const Body& body) {
  constexpr int64_t kIndices = int64_t{1} << 32;  // with the same upper half
  int64_t row = first / at.run, column = first % at.run;
  for (int64_t i = 0; i < count;) {
    const int64_t index = at.offset + row * at.pitch + column;
    const int64_t stretch = smaller(smaller(at.run - column, count - i), kIndices - index % kIndices);
    body(i, stretch, static_cast<uint32_t>(index), rounding_key(state, index));
    i += stretch;
    column += stretch;
    if (column == at.run) {
      column = 0;
      ++row;
    }
  }
}

/// Random bits for a register of indices from `lower` on.
inline Words random_words(uint32_t lower, uint32_t key) {
  return random_bits(lower + load_bits<Words>(kCounting<float>.values), key);
}

/// A register of float32, rounded; to be stored as UpperHalf.
template <bool kLow>
inline Vector<float> round_stochastically(Vector<float> value, Words random) {
  return bits_as<Vector<float>>(fisher_kernels::round_stochastically(bits_as<Words>(value), random_half<kLow>(random)));
}

/// Random bits of elements one after another, the first of which has the index `lower`.
struct RandomRun {
  uint32_t lower;
  uint32_t key;
};

/// What store_rounded would store, as numbers to go on with.
template <bool kLow, class T>
inline Vector<T> as_rounded(Vector<T> value, int64_t i, const RandomRun& random) {
  if constexpr (std::is_base_of_v<bfloat16, T>) {
    const Words words = random_words(random.lower + static_cast<uint32_t>(i), random.key);
    return bits_as<Vector<T>>(bits_as<Words>(round_stochastically<kLow>(value, words)) & 0xffff0000u);
  } else {
    return value;
  }
}

/// Stores elements i and on of `count` elements at p, at most a register of them; what is bfloat16 rounds by one half of
/// the random bits.
template <bool kLow, class T, class Store>
inline void store_rounded(T* p, int64_t i, Vector<T> value, const RandomRun& random, const Store& store) {
  if constexpr (std::is_base_of_v<bfloat16, T>) {
    const Words words = random_words(random.lower + static_cast<uint32_t>(i), random.key);
    store(reinterpret_cast<UpperHalf*>(p + i), round_stochastically<kLow>(value, words));
  } else {
    store(p + i, value);
  }
}

}  // namespace
}  // namespace fisher_kernels::FISHER_KERNELS_CAPABILITY
