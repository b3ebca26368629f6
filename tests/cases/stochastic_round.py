"""Stochastic rounding by its definition, and numbers and places for it."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

Array = np.ndarray[Any, Any]

SIZES = (0, 1, 3, 15, 16, 17, 1023, 1024, 1025, 4097)
"""Around a register of the CPU and what a share of its work begins at; beyond a block on a GPU."""


class Place(NamedTuple):
    """Where a part of a tensor begins, and its runs."""

    offset: int = 0
    run: int | None = None
    pitch: int | None = None


PLACES = (
    Place(),
    Place(offset=5),
    Place(offset=2**32 - 11),  # the upper half of the index changes on the way
    Place(offset=2**31 + 5),
    Place(offset=2**32),
    Place(offset=2**63 - 5000),
    Place(offset=3, run=1, pitch=1),
    Place(offset=2, run=1, pitch=7),
    Place(offset=1, run=13, pitch=20),
    Place(offset=0, run=16, pitch=16),
    Place(offset=2**31, run=100, pitch=2**31 + 3),
    Place(offset=2**33 - 50, run=700, pitch=2**32 - 5),
    Place(offset=4, run=1100, pitch=1200),
    Place(offset=9, run=10**9, pitch=2**40),
)

SPECIAL_BITS = (
    *(0x00000000, 0x00000001, 0x00007FFF, 0x00008000, 0x0000FFFF, 0x00010000),  # zero and subnormal numbers
    *(0x007FFFFF, 0x00800000, 0x0080FFFF),  # around the smallest normal number
    *(0x3F7FFFFF, 0x3F800000, 0x3F808000, 0x3F818000),  # around 1, and ties
    *(0x7F7F0000, 0x7F7F0001, 0x7F7F8000, 0x7F7FFFFF),  # the largest of bfloat16, and beyond it
    *(0x7F800000, 0x7F800001, 0x7F80FFFF, 0x7FBFFFFF, 0x7FC00000, 0x7FFFFFFF),  # infinity and NaN
)


def special() -> Tensor:
    """Each of them with either sign."""
    values = np.array([*SPECIAL_BITS, *(b | 0x80000000 for b in SPECIAL_BITS)], dtype=np.uint32)
    return torch.from_numpy(values.view(np.float32))


# The definition, in other words than the reference: unsigned integers that wrap around, and the neighbours of a number.


def lowbias32(x: Array) -> Array:
    x = (x ^ (x >> np.uint32(16))) * np.uint32(0x7FEB352D)
    x = (x ^ (x >> np.uint32(15))) * np.uint32(0x846CA68B)
    return x ^ (x >> np.uint32(16))


def absorb(state: Array, *words: int | Array) -> Array:
    for word in words:
        state = lowbias32(state ^ lowbias32(np.atleast_1d(np.asarray(word)).astype(np.uint32)))
    return state


def integers(count: int, place: Place = Place(), seed: int = 0, ordinal: int = 0, step: int = 0) -> Array:  # noqa: B008
    """The random integer of each element of a part."""
    element = np.arange(count, dtype=np.uint64)
    run = np.uint64(max(count, 1) if place.run is None else place.run)
    pitch = run if place.pitch is None else np.uint64(place.pitch)
    index = np.uint64(place.offset) + element // run * pitch + element % run
    start = np.array([0x9E3779B9], dtype=np.uint32)
    state = absorb(start, seed & 0xFFFFFFFF, seed >> 32, ordinal, step)
    low, high = (index & np.uint64(0xFFFFFFFF)).astype(np.uint32), (index >> np.uint64(32)).astype(np.uint32)
    return lowbias32(low ^ absorb(state, high)) if count else low


def halves(random: Array, half: str) -> Array:
    return (random & np.uint32(0xFFFF) if half == "low" else random >> np.uint32(16)).astype(np.int64)


def rounded(x: Tensor, half: Array) -> Tensor:
    """x by the distances to its neighbours in bfloat16, which float64 has exactly."""
    bits = x.contiguous().view(-1).view(torch.int32).numpy().view(np.uint32)
    below = bits & np.uint32(0xFFFF0000)
    above = below + np.uint32(0x10000)
    with np.errstate(over="ignore", invalid="ignore"):
        value, low, high = (v.view(np.float32).astype(np.float64) for v in (bits, below, above))
        high[np.isinf(high)] = np.copysign(2.0**128, high[np.isinf(high)])
        share = (value - low) / (high - low) * 65536  # of 65536 random numbers, how many lead away from zero
        up = half >= 65536 - share
    largest = np.isinf(above.view(np.float32)) & ~np.isinf(value)
    result = np.where(up & ~largest, above, below) >> np.uint32(16)
    result = np.where(np.isnan(value), (bits >> np.uint32(16)) | np.uint32(0x40), result)
    result = np.where(np.isinf(value), bits >> np.uint32(16), result)
    return torch.from_numpy(result.astype(np.uint16).view(np.int16)).view(torch.bfloat16).view(x.shape)


def definition(x: Tensor, place: Place = Place(), half: str = "high", **of: int) -> Tensor:  # noqa: B008
    return rounded(x, halves(integers(x.numel(), place, **of), half))
