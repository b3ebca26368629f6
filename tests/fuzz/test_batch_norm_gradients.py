from __future__ import annotations

from functools import partial
from typing import Any

import hypothesis.strategies as st
import numpy as np
import torch

from tests.fuzz.calls import Call, Fuzz, surroundings, threads
from tests.fuzz.closeness import assert_close, largest, least, unit
from tests.fuzz.operands import SUM_DTYPES, Draw, laid, layouts, numbers, sizes, wide


@st.composite
def normalisations(draw: Draw, tiny: bool) -> Call:
    shape = [draw(sizes(tiny, most=17)), draw(sizes(tiny, most=33)), *draw(st.lists(sizes(tiny, most=17), max_size=2))]
    if not tiny and draw(st.integers(0, 24)) == 24:
        shape = [3, 2, draw(st.sampled_from((300, 4100)))]
    dtype = draw(st.sampled_from(SUM_DTYPES))
    other = dtype if draw(st.integers(0, 3)) else draw(st.sampled_from(SUM_DTYPES))
    x = draw(numbers()).fill(shape, dtype)
    x = x + draw(st.sampled_from((0, 0, 1, 1000)))  # a mean of many deviations
    arguments: dict[str, Any] = {
        "x": laid(x, draw(layouts())),
        "grad_output": laid(draw(numbers()).fill(shape, other, 1), draw(layouts())),
        "eps": draw(st.sampled_from((1e-5, 0.0, 1e-12, 1.0, 1e30))),
    }
    if draw(st.booleans()):
        for i, name in enumerate(("mean", "variance")):
            of = draw(st.sampled_from(SUM_DTYPES))
            values = draw(numbers(("normal", "whole", "wide"))).fill((shape[1],), of, 2 + i)
            arguments[name] = laid(values.abs() if name == "variance" else values, draw(layouts()))
    return Call("batch_norm_gradients", arguments, around=draw(surroundings), threads=draw(threads))


def check(implementation: str, call: Call) -> None:
    outcome = call.run_repeatably() if implementation != "reference" else call.run()
    if outcome is None:
        return
    a = call.arguments
    x, grad = a["x"].values, a["grad_output"].values
    dtype = torch.float64 if torch.float64 in (x.dtype, grad.dtype) else torch.float32
    samples, channels = x.shape[:2]
    scale, shift = outcome.result
    assert scale.dtype == shift.dtype == dtype
    if x.numel() == 0:
        assert tuple(scale.shape) == tuple(shift.shape) == (samples, channels)
        assert not scale.any()
        assert not shift.any()
        return
    x, grad = (wide(v.to(dtype)).reshape(samples, channels, -1) for v in (x, grad))
    with np.errstate(all="ignore"):
        own, own_variance = x.mean((0, 2), keepdims=True), x.var((0, 2), keepdims=True)
        mean, variance = own, own_variance
        if "mean" in a:
            mean, variance = (wide(a[name].values.to(dtype))[None, :, None] for name in ("mean", "variance"))
        distance, deviation = np.abs(x - mean), np.sqrt(variance)
        root = np.sqrt(variance + a["eps"])
        expected_shift = grad.sum(2)
        expected = (grad * (x - mean) / root).sum(2)
        sizes = np.nan_to_num(np.abs(grad), nan=0, posinf=0)
        products = (sizes * (distance + deviation + (0 if "mean" in a else np.sqrt(own_variance)))).sum(2)
        # A thread adds at most 128 numbers before float64 takes over, and pieces of those.
        roundings = min(300, 2 * (x.size // channels) + 24)
        bound = roundings * unit(dtype) * products / root[..., 0]
        bound += least(dtype) * (1 + (sizes.sum(2) + x.size) * (1 + 1 / root[..., 0]))
        # Distances beyond the root of the range have infinite squares; means beyond 1e6 deviations leave few digits.
        far = np.sqrt(largest(dtype) / (x.size // channels))
        apart = np.nan_to_num(np.abs(x).max((0, 2), keepdims=True), nan=0)
        unknown = (products > largest(dtype) / 4) | (root == 0)[..., 0] | (root > np.sqrt(largest(dtype)))[..., 0]
        if "mean" not in a:
            unknown = unknown | ((apart > far) | (apart > 1e6 * deviation) & (variance > 0))[..., 0]
            unknown = unknown | ((variance > 0) & (variance < 1e5 * least(dtype)))[..., 0]
        unknown = unknown | (np.abs(x - mean).max((0, 2)) > largest(dtype))
    total = sizes.sum(2)
    assert_close("shift", shift, expected_shift, roundings * unit(dtype) * total, unknown=total > largest(dtype))
    assert_close("scale", scale, expected, bound, unknown=unknown)


def test_batch_norm_gradients(implementation: str, fuzz: Fuzz) -> None:
    fuzz(normalisations, partial(check, implementation))
