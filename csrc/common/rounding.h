#pragma once

#include <cstdint>

// Stochastic rounding to bfloat16: random integers that are a function of a place and a time, and what they do to a
// number. Everything here is written once for the CPU, where Bits is one word or a register of them, and for GPUs, and
// has internal linkage, as all that is compiled for several instruction sets.
namespace fisher_kernels {

/// Which integer an element takes. Element i of an array in row-major order is element
///   offset + i / run * pitch + i % run
/// of the whole array that it is a part of: rows from some row on have an offset, columns a run and a pitch.
struct RoundingIndex {
  int64_t offset;
  int64_t run;  // at least 1
  int64_t pitch;
};

namespace {

/// A bijection of 32 bits in which every bit of x changes every bit of the result with a probability close to 1/2.
template <class Bits>
constexpr Bits lowbias32(Bits x) {
  x ^= x >> 16;
  x *= 0x7feb352du;
  x ^= x >> 15;
  x *= 0x846ca68bu;
  x ^= x >> 16;
  return x;
}

/// Mixes a word into a state. Both are hashed: two states that differ little never lead to the same sequence in another
/// order.
constexpr uint32_t absorb(uint32_t state, uint32_t word) { return lowbias32(state ^ lowbias32(word)); }

/// What all elements have in common whose indices have the same upper 32 bits; `state` has seed, ordinal and step.
constexpr uint32_t rounding_key(uint32_t state, uint64_t index) {
  return absorb(state, static_cast<uint32_t>(index >> 32));
}

/// 32 random bits for indices, given by their lower halves: the upper 16 round a parameter, the lower 16 a moment.
template <class Bits>
constexpr Bits random_bits(Bits lower, uint32_t key) {
  return lowbias32(lower ^ key);
}

/// The half of random bits that one number takes.
template <bool kLow, class Bits>
constexpr Bits random_half(Bits random) {
  if constexpr (kLow) return random & 0xffffu;
  return random >> 16;
}

/// A finite float32 rounded to the bfloat16 towards or away from zero, away with a probability that is the fraction of
/// the distance: in the upper half of the result, whose lower half is to be ignored. `half` has 16 random bits. What is
/// finite stays finite. Numbers are taken as integers, so subnormal ones are like all others.
template <class Bits>
constexpr Bits round_finite_stochastically(Bits value, Bits half) {
  const Bits largest = (value & 0u) + 0x7f7fffffu, sum = (value & 0x7fffffffu) + half;
  return (value & 0x80000000u) | (sum < largest ? sum : largest);
}

/// The same of any value; what is not finite stays what it is.
template <class Bits>
constexpr Bits round_stochastically(Bits value, Bits half) {
  const Bits magnitude = value & 0x7fffffffu;
  const Bits special = magnitude > 0x7f800000u ? value | 0x400000u : value;
  return magnitude < 0x7f800000u ? round_finite_stochastically(value, half) : special;
}

/// Random bits for elements one after another.
class RandomWalk {
 public:
  constexpr RandomWalk(const RoundingIndex& at, uint32_t state, int64_t row, int64_t column)
      : state_(state),
        run_(at.run),
        skipped_(at.pitch - at.run),
        index_(at.offset + row * at.pitch + column),
        left_(at.run - column),
        key_(rounding_key(state, index_)) {}

  constexpr uint32_t next() {
    const uint32_t random = random_bits(static_cast<uint32_t>(index_), key_);
    ++index_;
    if (--left_ == 0) {
      left_ = run_;
      index_ += skipped_;
      key_ = rounding_key(state_, index_);
    } else if (static_cast<uint32_t>(index_) == 0) {
      key_ = rounding_key(state_, index_);
    }
    return random;
  }

 private:
  const uint32_t state_;
  const int64_t run_;
  const int64_t skipped_;
  uint64_t index_;
  int64_t left_;  // of this run
  uint32_t key_;
};

}  // namespace
}  // namespace fisher_kernels
