"""Whether a result is as close to its definition as rounding explains."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from tests.fuzz.operands import Array, accumulator, wide


def unit(dtype: torch.dtype) -> float:
    """The largest share of itself by which rounding moves a number."""
    return torch.finfo(accumulator(dtype)).eps / 2


def least(dtype: torch.dtype) -> float:
    """The distance of subnormal numbers, below which nothing is known of a product."""
    limits = torch.finfo(accumulator(dtype))
    return limits.smallest_normal * limits.eps


def largest(dtype: torch.dtype) -> float:
    """Half of the range: what passes it may have overflowed on the way."""
    return torch.finfo(accumulator(dtype)).max / 2


def whole(*arrays: Array) -> bool:
    """Whether all are whole numbers: sums and products of them are exact as long as they are small."""
    return all(bool((x == np.rint(x)).all()) for x in arrays)


def storing(expected: Array, dtype: torch.dtype) -> Array:
    """By how much it moves a number to be stored in a dtype: by nothing, where results have the accumulator's."""
    if dtype == accumulator(dtype):
        return np.zeros_like(expected)
    limits = torch.finfo(dtype)
    return np.nan_to_num(np.abs(expected)) * limits.eps / 2 + limits.smallest_normal * limits.eps


def assert_close(
    what: str, found: Tensor, expected: Array, bound: Array | float, *, unknown: Array | bool = False
) -> None:
    """Finite numbers are within a bound, NaN and infinities the same; ``unknown`` where nothing is promised."""
    assert tuple(found.shape) == expected.shape, f"{what} has shape {tuple(found.shape)}, expected {expected.shape}"
    got = wide(found.resolve_neg())
    bound = np.broadcast_to(np.asarray(bound), expected.shape)
    with np.errstate(all="ignore"):
        same = (got == expected) | (np.isnan(got) & np.isnan(expected))
        near = np.isfinite(expected) & (np.abs(got - expected) <= bound)
        # What may be too large for the dtype, on that side, may be infinite.
        over = np.isinf(got) & (np.copysign(1, got) * expected + bound >= torch.finfo(found.dtype).max)
    bad = ~(same | near | over | np.broadcast_to(np.asarray(unknown), expected.shape))
    if bad.any():
        place = tuple(int(i) for i in np.argwhere(bad)[0])
        raise AssertionError(
            f"{what}{list(place)} is {got[place]:.17g}, expected {expected[place]:.17g}, give or take "
            f"{float(bound[place]):.3g}; {int(bad.sum())} of {bad.size} entries are wrong"
        )
