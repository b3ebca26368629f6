from __future__ import annotations

import math
from functools import partial

import hypothesis.strategies as st
import numpy as np

from tests.fuzz.calls import Call, Fuzz
from tests.fuzz.closeness import whole
from tests.fuzz.operands import SUM_DTYPES, Array, Draw, laid, layouts, numbers, sizes, wide
from tests.fuzz.test_mini_block_gram import call_of, compare, geometries, reads
from tests.fuzz.test_sum_of_squares import HUGE


@st.composite
def convolutions(draw: Draw, tiny: bool) -> Call:
    shape, _, geometry = draw(geometries())
    samples = 0 if draw(st.integers(0, 9)) == 9 else draw(sizes(tiny, most=33))
    groups = draw(sizes(tiny, most=33, least=1))
    channels = draw(sizes(tiny, most=33 // min(groups, 5)))
    bias = draw(st.booleans())
    refused = draw(st.integers(0, 24)) == 24
    if refused:
        geometry["padding"][-1] = (0, draw(st.sampled_from(HUGE)))
    dtype = draw(st.sampled_from(SUM_DTYPES))
    x = laid(draw(numbers()).fill((samples, groups * channels, *shape), dtype), draw(layouts()))
    columns = channels * math.prod(geometry["kernel_size"]) + bias
    geometry |= {"groups": groups, "bias": bias}
    return call_of(draw, "conv_gram_", (groups, columns, columns), dtype, refused, x=x, **geometry)


def patches(x: Array, call: Call) -> Array:
    """Patches [groups, N * L, D]."""
    a = call.arguments
    groups, bias = a["groups"], a["bias"]
    windows = [
        (size + before + after - step * (k - 1) - 1) // s + 1
        for size, k, s, step, (before, after) in zip(
            x.shape[2:], a["kernel_size"], a["stride"], a["dilation"], a["padding"], strict=True
        )
    ]
    rows = len(x) * math.prod(windows)
    of_offsets = [
        read.reshape(len(x), groups, x.shape[1] // groups, math.prod(windows)).transpose(1, 0, 3, 2)
        for read in reads(x, a, windows)
    ]
    channels = x.shape[1] // groups
    flat = np.stack(of_offsets, -1).reshape(groups, rows, channels * len(of_offsets))
    return np.concatenate([flat, np.ones((groups, rows, int(bias)), flat.dtype)], -1)


def check(implementation: str, call: Call) -> None:
    outcome = call.run_repeatably() if implementation != "reference" else call.run()
    if outcome is None:
        return
    x = wide(call.arguments["x"].values)
    with np.errstate(all="ignore"):
        h = patches(x, call)
        size = patches(np.nan_to_num(np.abs(x), nan=0, posinf=0), call)
        sums, of_sizes = (np.einsum("gri,grj->gij", v, v) for v in (h, size))
        rows = h.shape[1]
        compare(call, outcome, sums, of_sizes, rows + 8, rows, whole(x))


def test_conv_gram(implementation: str, fuzz: Fuzz) -> None:
    fuzz(convolutions, partial(check, implementation))
