"""Samples of the sums of squares."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from fisher_kernels.tools.samples.sample import (
    SUM_DTYPES,
    Inputs,
    Sample,
    Source,
    Tolerance,
    last,
    random,
    with_non_finite,
)


class Patch(NamedTuple):
    """An input and the geometry of a convolution over it."""

    shape: tuple[int, ...]
    kernel_size: int | Sequence[int]
    stride: int | Sequence[int] = 1
    padding: int | Sequence[int] | Sequence[tuple[int, int]] = 0
    dilation: int | Sequence[int] = 1


def _tolerance(inputs: Inputs, expected: list[Tensor], u: float) -> list[Tolerance]:
    # All terms are positive, so the relative error of a sum of n rounded squares in any order stays, with overwhelming
    # probability, below a few sqrt(n) u (Higham and Mary, SIAM J. Sci. Comput. 41, 2019).
    terms = max(inputs["x"].numel() // max(len(expected[0]), 1), 1)
    return [4 * math.sqrt(terms) * u * expected[0].abs() + torch.finfo(torch.float32).tiny]


_COLUMNS: dict[str, Callable[[Source], Tensor]] = {
    "257 x 33": lambda s: s.normal(257, 33),
    "1 x 1": lambda s: s.normal(1, 1),
    "5 x 7 x 19": lambda s: s.normal(5, 7, 19),
    "rows of a wider tensor": lambda s: s.normal(63, 50)[:, 3:40],
    "every other column": lambda s: s.normal(63, 50)[:, ::2],
    "transposed": lambda s: s.normal(31, 500).t(),
    "no rows": lambda s: s.normal(0, 5),
    "not finite": lambda s: with_non_finite(s.normal(9, 17)),
    "many rows": lambda s: s.normal(9000, 8),
}

_CHANNELS: dict[str, Callable[[Source], Tensor]] = {
    "3 x 5 x 7 x 9": lambda s: s.normal(3, 5, 7, 9),
    "channels last": lambda s: last(s.normal(3, 37, 5, 9)),
    "one dimension": lambda s: s.normal(4, 6, 131),
    "long runs": lambda s: s.normal(2, 2, 5001),
    "three dimensions": lambda s: s.normal(2, 3, 4, 5, 6),
    "no spatial dimension": lambda s: s.normal(65, 12),
    "slice": lambda s: s.normal(3, 8, 9, 9)[:, 1:6, 2:, ::2],
    "no samples": lambda s: s.normal(0, 4, 3, 3),
    "not finite": lambda s: with_non_finite(s.normal(2, 5, 3, 3)),
}

_PATCHES: dict[str, Patch] = {
    "3 x 3": Patch((3, 5, 9, 11), 3, padding=1),
    "5 x 3, stride 2": Patch((3, 4, 13, 10), (5, 3), stride=2, padding=(2, 0)),
    "dilated": Patch((2, 3, 17, 16), 3, dilation=(3, 2), padding=2),
    "uneven padding": Patch((2, 3, 8, 7), 4, padding=((1, 2), (0, 3)), stride=3),
    "1 x 1": Patch((4, 33, 6, 6), 1, stride=2),
    "one dimension": Patch((4, 6, 101), 7, padding=3, stride=2),
    "three dimensions": Patch((2, 3, 5, 6, 7), (3, 2, 3), padding=1),
    "channels last": Patch((3, 18, 9, 7), 3, padding=1, stride=2),
    "one dimension, channels last": Patch((2, 6, 19), 3),
    "slice": Patch((2, 6, 12, 12), 3),
    "no samples": Patch((0, 4, 5, 5), 3),
}


def _patch_inputs(name: str, patch: Patch, source: Source) -> Inputs:
    x = random(patch.shape, source.dtype, 0, source.device)
    if name.endswith("channels last"):
        x = last(x)
    elif name == "slice":
        x = x[:, ::2, 1:, :-3]
    _, *geometry = patch
    return {"x": x, **dict(zip(Patch._fields[1:], geometry, strict=True))}


def _inputs(layout: Callable[[Source], Tensor], source: Source) -> Inputs:
    return {"x": layout(source)}


def _samples() -> Iterator[Sample]:
    for op, layouts in (("column_sum_of_squares", _COLUMNS), ("channel_sum_of_squares", _CHANNELS)):
        for name, layout in layouts.items():
            yield Sample(op, name, SUM_DTYPES, partial(_inputs, layout), _tolerance)
    for name, patch in _PATCHES.items():
        yield Sample("patch_sum_of_squares", name, SUM_DTYPES, partial(_patch_inputs, name, patch), _tolerance)


SAMPLES = tuple(_samples())
