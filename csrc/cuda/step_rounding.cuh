#pragma once

#include "rounding.cuh"
#include "step.cuh"

// How steps round what is stored in bfloat16 at random: by the random integers of its elements.
namespace fisher_kernels::cuda {

/// What is stored in bfloat16, rounded by one half of random bits; the rest is rounded to nearest.
template <bool kLow, class T>
__device__ inline T narrow_at_random(Accumulator<T> value, uint32_t random) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    return round_stochastically<kLow>(value, random);
  } else if constexpr (std::is_same_v<T, bfloat16_moment>) {
    return {round_stochastically<kLow>(value, random)};
  } else {
    return narrow<T>(value);
  }
}

/// Random integers of elements of a chunk, for a parameter that rounds to nearest: none.
struct NoIntegers {
  struct Walk {
    __device__ uint32_t next() const { return 0; }
  };

  __device__ Walk from(int64_t) const { return {}; }
};

/// The same of a parameter that rounds at random; `first` is the element that others are counted from.
struct Integers {
  RoundingIndex index;
  uint32_t state;
  int64_t first;

  __device__ RandomWalk from(int64_t at) const { return random_walk(index, state, first + at); }
};

/// What the entry of a parameter that rounds at random has besides.
template <class Entry>
struct RandomEntry : Entry {
  RoundingIndex index_of_elements;
  const float* step;
  uint32_t base;
};

/// Whether there is something in bfloat16 to round.
template <class T, class M>
constexpr bool kIsShort = std::is_same_v<T, __nv_bfloat16> || std::is_same_v<M, bfloat16_moment>;

/// Fills in what a RandomEntry has besides.
template <class Entry, class Parameter>
void set_rounding(Entry& entry, const Parameter& p) {
  entry.index_of_elements = p.rounding.index;
  entry.step = p.step;
  entry.base = p.rounding.base;
}

template <class Integers_>
constexpr bool kIsRandom = !std::is_same_v<Integers_, NoIntegers>;

/// Whether an entry is that of a parameter that rounds at random.
template <class Entry, class Base>
constexpr bool kIsRandomEntry = std::is_base_of_v<RandomEntry<Base>, Entry>;

/// The random integers of a chunk of an entry: of one that is contiguous from `first` on, else of all of it. `later` is
/// how many steps there will have been beside those that have been counted.
template <class Base, class Entry>
__device__ auto integers_of(const Entry& entry, int64_t first, int later = 0) {
  if constexpr (kIsRandomEntry<Entry, Base>) {
    const bool strided = std::is_base_of_v<StridedEntry<RandomEntry<Base>>, Entry>;
    return Integers{entry.index_of_elements, absorb(entry.base, static_cast<uint32_t>(*entry.step + later)),
                    strided ? 0 : first};
  } else {
    return NoIntegers{};
  }
}

}  // namespace fisher_kernels::cuda
