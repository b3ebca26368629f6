from __future__ import annotations

import itertools
import math
from functools import partial
from typing import Any

import hypothesis.strategies as st
import numpy as np
import torch

from tests.fuzz.calls import Call, Fuzz, surroundings, threads
from tests.fuzz.closeness import assert_close, least, unit, whole
from tests.fuzz.operands import SUM_DTYPES, Array, Draw, laid, layouts, numbers, sizes, wide

HUGE = (2**62, 2**63 - 1)


@st.composite
def columns(draw: Draw, tiny: bool) -> Call:
    shape = [*draw(st.lists(sizes(tiny, most=5), max_size=2)), *draw(st.lists(sizes(tiny), min_size=1, max_size=2))]
    if not tiny and draw(st.integers(0, 19)) == 19:
        shape = [draw(st.sampled_from((1300, 4099))), draw(st.sampled_from((3, 33)))]
    return _call(draw, "column_sum_of_squares", shape)


@st.composite
def channels(draw: Draw, tiny: bool) -> Call:
    shape = [draw(sizes(tiny, most=17)), draw(sizes(tiny, most=33)), *draw(st.lists(sizes(tiny, most=17), max_size=2))]
    if not tiny and draw(st.integers(0, 19)) == 19:
        shape = [2, 3, draw(st.sampled_from((2049, 9001)))]
    return _call(draw, "channel_sum_of_squares", shape)


@st.composite
def patches(draw: Draw, tiny: bool) -> Call:
    spatial = draw(st.integers(1, 3))
    kernel, stride, dilation = (
        [draw(st.integers(1, most)) for _ in range(spatial)] for most in (4 if spatial < 3 else 2, 3, 3)
    )
    padding = [(draw(st.integers(0, 3)), draw(st.integers(0, 3))) for _ in range(spatial)]
    inner = [
        max(0, d * (k - 1) + 1 - a - b) + draw(sizes(tiny, most=17 if spatial < 3 else 5)) - 1
        for k, d, (a, b) in zip(kernel, dilation, padding, strict=True)
    ]
    shape = [draw(sizes(tiny, most=17)), draw(sizes(tiny, most=33)), *(max(0, n) for n in inner)]
    refused = any(
        n + a + b < d * (k - 1) + 1 for n, (a, b), k, d in zip(shape[2:], padding, kernel, dilation, strict=True)
    )
    if draw(st.integers(0, 24)) == 24:
        padding[-1], refused = (0, draw(st.sampled_from(HUGE))) if draw(st.booleans()) else (HUGE[1], 0), True
    geometry = {"kernel_size": kernel, "stride": stride, "padding": padding, "dilation": dilation}
    return _call(draw, "patch_sum_of_squares", shape, refused=refused, **geometry)


def _call(draw: Draw, op: str, shape: list[int], refused: bool = False, **geometry: Any) -> Call:
    dtype = draw(st.sampled_from(SUM_DTYPES))
    x = laid(draw(numbers()).fill(shape, dtype), draw(layouts()))
    return Call(op, {"x": x, **geometry}, around=draw(surroundings), threads=draw(threads), refused=refused)


def column_squares(x: Array) -> Array:
    return (x * x).reshape(math.prod(x.shape[:-1]), x.shape[-1]).sum(0)


def channel_squares(x: Array) -> Array:
    return (x * x).sum((0, *range(2, x.ndim)))


def patch_squares(x: Array, kernel: list[int], stride: list[int], padding: list[Any], dilation: list[int]) -> Array:
    """Each offset of the kernel looks at every window, and leaves out those where it reads padding."""
    out = np.zeros((x.shape[1], *kernel), x.dtype)
    for offset in itertools.product(*map(range, kernel)):
        read = x * x
        for d, (k, s, (before, after), step) in enumerate(zip(offset, stride, padding, dilation, strict=True)):
            size = x.shape[2 + d]
            extent = step * (kernel[d] - 1) + 1
            places = np.arange(0, size + before + after - extent + 1, s) + k * step - before
            read = read.take(places[(places >= 0) & (places < size)], axis=2 + d)
        out[(slice(None), *offset)] = read.sum((0, *range(2, x.ndim)))
    return out


def check(implementation: str, call: Call) -> None:
    outcome = call.run() if implementation == "reference" else call.run_repeatably()
    if outcome is None:
        return
    x = call.arguments["x"].values
    dtype, values = x.dtype, wide(x)
    with np.errstate(all="ignore"):
        if call.op == "column_sum_of_squares":
            expected = column_squares(values)
        elif call.op == "channel_sum_of_squares":
            expected = channel_squares(values)
        else:
            geometry = (call.arguments[k] for k in ("kernel_size", "stride", "padding", "dilation"))
            expected = patch_squares(values, *geometry)
    assert outcome.result.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    # Terms are positive: the error is as many roundings of the sum as a term meets, and 72 where runs are short.
    terms = values.size // max(1, values.shape[-1 if call.op[:3] == "col" else 1])
    roundings = terms + 4
    if dtype != torch.float64 and implementation != "reference":
        roundings = min(72, roundings)
    bound = roundings * unit(dtype) * np.nan_to_num(expected, nan=0, posinf=0) + terms * least(dtype)
    if whole(values) and expected.max(initial=0) < 2**24:
        bound = np.zeros_like(bound)
    assert_close("sum", outcome.result, expected, bound)


def test_column_sum_of_squares(implementation: str, fuzz: Fuzz) -> None:
    fuzz(columns, partial(check, implementation))


def test_channel_sum_of_squares(implementation: str, fuzz: Fuzz) -> None:
    fuzz(channels, partial(check, implementation))


def test_patch_sum_of_squares(implementation: str, fuzz: Fuzz) -> None:
    fuzz(patches, partial(check, implementation))
