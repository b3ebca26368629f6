"""Stochastic rounding to bfloat16, to the bits of ``csrc/common/rounding.h``, which says what it all means."""

import triton
import triton.language as tl


@triton.jit
def lowbias32(x):
    """A bijection of 32 bits; x is uint32."""
    x ^= x >> 16
    x *= 0x7FEB352D
    x ^= x >> 15
    x *= 0x846CA68B
    x ^= x >> 16
    return x


@triton.jit
def absorb(state, word):
    """Mix a word into a state, both uint32."""
    return lowbias32(state ^ lowbias32(word))


@triton.jit
def random_bits(index, state):
    """32 random bits for each of some indices, int64; ``state`` is uint32 and has seed, ordinal and step."""
    return lowbias32(index.to(tl.uint32) ^ absorb(state, (index >> 32).to(tl.uint32)))


@triton.jit
def round_stochastically(x, random, LOW: tl.constexpr):
    """float32 to bfloat16, away from zero with a probability that is the fraction of the distance.

    ``random`` are the bits of each element, of which the lower or the upper half is used.
    """
    half = (random & 0xFFFF) if LOW else (random >> 16)
    bits = x.to(tl.uint32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    finite = tl.minimum(magnitude + half, 0x7F7FFFFF)
    special = tl.where(magnitude > 0x7F800000, magnitude | 0x400000, magnitude)
    rounded = tl.where(magnitude < 0x7F800000, finite, special) | (bits & 0x80000000)
    return (rounded >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
