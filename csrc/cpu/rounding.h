#pragma once

#include <cstdint>

#include "../kernels.h"
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

/// Random bits of `count` elements one after another, the first of which has the index `lower`.
struct RandomRun {
  uint32_t lower;
  uint32_t key;
  int64_t count;

  /// Those from element i on.
  RandomRun from(int64_t i) const { return {lower + static_cast<uint32_t>(i), key, count - i}; }
};

/// Whether each stretch that begins at a whole register is one of whole registers.
template <class A>
bool has_whole_stretches(const RoundingIndex& at) {
  return at.offset % kLanes<A> == 0 && at.run % kLanes<A> == 0 && at.pitch % kLanes<A> == 0;
}

/// Calls body(i, random, k, load, store) for the registers of a chunk from element `first` on; register i is register k
/// of those that have the random integers `random`, which are none unless kRandom.
template <class A, bool kRandom, class Body>
void for_random_registers(const StepRounding& rounding, int64_t first, int64_t count, const Body& body) {
  if constexpr (kRandom) {
    for_stretches(rounding.index, rounding.state, first, count,
                  [&](int64_t begin, int64_t length, uint32_t lower, uint32_t key) {
      const RandomRun random{lower, key, length};
      for_registers<A>(length, [&](int64_t k, const auto& load, const auto& store) {
        body(begin + k, random, k, load, store);
      });
    });
  } else {
    const RandomRun none{0, 0, count};
    for_registers<A>(count, [&](int64_t i, const auto& load, const auto& store) { body(i, none, i, load, store); });
  }
}

/// What store_rounded would store of values that are finite, as numbers to go on with; nothing is promised of others.
template <bool kLow, class T>
inline Vector<T> as_rounded_if_finite(Vector<T> value, int64_t i, const RandomRun& random) {
  if constexpr (std::is_base_of_v<bfloat16, T>) {
    const Words words = random_words(random.lower + static_cast<uint32_t>(i), random.key);
    const Words bits = round_finite_stochastically(bits_as<Words>(value), random_half<kLow>(words));
    return bits_as<Vector<T>>(bits & 0xffff0000u);
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
