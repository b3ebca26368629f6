"""Stochastic rounding to bfloat16, to the bits of ``csrc/common/rounding.h``, which says what it all means."""

from collections.abc import Sequence

import triton
import triton.language as tl

from ._language import as_moment, narrow


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


@triton.jit
def state_of(numbers, steps, RANDOM: tl.constexpr):
    """The state of a parameter in a step that has been counted; ``numbers`` are base, offset, run and pitch."""
    state = tl.full((), 0, tl.uint32)
    if RANDOM:
        state = absorb(tl.load(numbers).to(tl.uint32), tl.load(steps).to(tl.uint32))
    return state


@triton.jit
def random_of(numbers, state, element, RANDOM: tl.constexpr):
    """32 random bits for each of some elements, by their row-major places; nothing where nothing is random."""
    if RANDOM:
        offset, run, pitch = tl.load(numbers + 1), tl.load(numbers + 2), tl.load(numbers + 3)
        random = random_bits(offset + element // run * pitch + element % run, state)
    else:
        random = None
    return random


@triton.jit
def stored(x, random, T: tl.constexpr, LOW: tl.constexpr, RANDOM: tl.constexpr):
    """x as a parameter is stored or, by the lower half of the random bits, a moment."""
    if RANDOM and T == tl.bfloat16:
        result = round_stochastically(x, random, LOW)
    elif LOW:
        result = as_moment(x, T)
    else:
        result = narrow(x, T)
    return result


def rounding_rows(rounding: Sequence[int] | None, count: int) -> list[tuple[int, ...]]:
    """Base, offset, run and pitch of each parameter for a layout; zeros where nothing is random."""
    if rounding is None:
        return [(0, 0, 0, 0)] * count
    return [tuple(rounding[4 * i : 4 * i + 4]) for i in range(count)]
