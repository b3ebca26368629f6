from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import hypothesis.strategies as st
import numpy as np
import torch

from tests.fuzz.calls import Call, Fuzz, Outcome, surroundings, threads
from tests.fuzz.closeness import assert_close, largest, least, unit, whole
from tests.fuzz.operands import (
    SUM_DTYPES,
    Array,
    Draw,
    Operand,
    accumulator,
    contiguous_layouts,
    laid,
    layouts,
    numbers,
    sizes,
    wide,
)
from tests.fuzz.test_gram import COEFFICIENTS, averaged, mirrored, old
from tests.fuzz.test_sum_of_squares import HUGE


@st.composite
def grams(draw: Draw, tiny: bool) -> Call:
    samples, blocks, n = draw(sizes(tiny)), draw(sizes(tiny, most=33)), draw(sizes(tiny, most=17))
    dtype = draw(st.sampled_from(SUM_DTYPES))
    v = laid(draw(numbers()).fill((samples, blocks, n), dtype), draw(layouts()))
    return call_of(draw, "mini_block_gram_", (blocks, n, n), dtype, v=v)


class Geometry(NamedTuple):
    """A convolution: the size of its input, the number of its windows, and what an op is told."""

    shape: list[int]
    windows: list[int]
    arguments: dict[str, Any]


@st.composite
def geometries(draw: Draw) -> Geometry:
    spatial = draw(st.integers(1, 3))
    kernel, stride, dilation = (
        [draw(st.integers(1, most)) for _ in range(spatial)] for most in (3 if spatial < 3 else 2, 3, 3)
    )
    padding = [(draw(st.integers(0, 2)), draw(st.integers(0, 2))) for _ in range(spatial)]
    windows = [draw(st.integers(1, 5 if spatial < 3 else 3)) for _ in range(spatial)]
    shape = [
        max(0, (w - 1) * s + d * (k - 1) + 1 - a - b)
        for w, s, d, k, (a, b) in zip(windows, stride, dilation, kernel, padding, strict=True)
    ]
    return Geometry(shape, windows, {"kernel_size": kernel, "stride": stride, "padding": padding, "dilation": dilation})


@st.composite
def convolutions(draw: Draw, tiny: bool) -> Call:
    shape, windows, geometry = draw(geometries())
    samples = 0 if draw(st.integers(0, 4)) == 4 else draw(sizes(tiny, most=33))
    if samples or tiny or draw(st.integers(0, 3)) == 3:
        groups = draw(sizes(tiny, most=33, least=1))
        inputs, outputs = draw(sizes(tiny, most=17 // min(groups, 5))), draw(sizes(tiny, most=17 // min(groups, 5)))
    else:
        # A kernel may leave what its scratch memory held. Many channels are cheap without samples, and with these
        # numbers the units of work that kernels cut them into differ in size.
        groups, outputs = draw(st.sampled_from((17, 17, 5))), draw(st.sampled_from((5, 5, 9)))
        inputs = draw(st.integers(1, 5))
    left_out = [draw(st.sampled_from((0, 0, 0, 1))) for _ in shape]  # windows without a derivative
    refused = draw(st.integers(0, 24)) == 24
    if refused:
        geometry["padding"][-1] = (0, draw(st.sampled_from(HUGE)))
    dtype = draw(st.sampled_from(SUM_DTYPES))
    x = laid(draw(numbers()).fill((samples, groups * inputs, *shape), dtype), draw(layouts()))
    positions = [w - less for w, less in zip(windows, left_out, strict=True)]
    grad = laid(draw(numbers()).fill((samples, groups * outputs, *positions), dtype, 1), draw(layouts()))
    n = math.prod(geometry["kernel_size"])
    blocks = (groups * outputs, inputs, n, n)
    geometry["groups"] = groups
    return call_of(draw, "conv_mini_block_gram_", blocks, dtype, refused, x=x, grad_output=grad, **geometry)


def call_of(
    draw: Draw, op: str, blocks: tuple[int, ...], dtype: torch.dtype, refused: bool = False, **rest: Any
) -> Call:
    decay, gain = draw(st.sampled_from(COEFFICIENTS)), draw(st.sampled_from(COEFFICIENTS))
    out = old(draw(numbers(specials=False)).fill(blocks, accumulator(dtype), 2), decay)
    arguments = {"out": Operand(out, draw(contiguous_layouts())), **rest, "decay": decay, "gain": gain}
    return Call(op, arguments, frozenset({"out"}), draw(surroundings), draw(threads), refused)


def check(implementation: str, call: Call) -> None:
    outcome = call.run_repeatably() if implementation != "reference" else call.run()
    if outcome is None:
        return
    v = wide(call.arguments["v"].values)
    with np.errstate(all="ignore"):
        terms = v[..., :, None] * v[..., None, :]
        sizes = np.nan_to_num(np.abs(terms), nan=0, posinf=0).sum(0)
        compare(call, outcome, terms.sum(0), sizes, len(v) + 8, len(v), whole(v))


def compare(
    call: Call, outcome: Outcome, sums: Array, sizes: Array, roundings: int, terms: Any, exact: bool, high: bool = False
) -> None:
    """``sizes``: of the magnitudes of what is added up, which overflow before that where they are ``high``.

    ``terms``: how many of them may be lost to underflow.
    """
    out, decay, gain = wide(call.arguments["out"].values), call.arguments["decay"], call.arguments["gain"]
    dtype = call.arguments["out"].values.dtype
    expected = averaged(out, sums, decay, gain)
    size = np.nan_to_num(averaged(np.abs(out), sizes, decay, gain), nan=0, posinf=0)
    bound = roundings * unit(dtype) * size + least(dtype) * (2 + gain * terms)
    if exact and gain == 1 and decay == 0 and sizes.max(initial=0) < 2**24:
        bound = 0 * size
    unknown = high | (np.maximum(size, mirrored(sizes)) > largest(dtype))
    assert_close("out", outcome["out"], expected, bound, unknown=unknown)
    result = outcome["out"]
    assert torch.equal(result.mT.nan_to_num(), result.nan_to_num()), "the result is not symmetric"


def reads(x: Array, a: dict[str, Any], positions: Sequence[int]) -> Iterator[Array]:
    """What each offset of a convolution's kernel reads, through as many windows: [N, C, *positions]."""
    padded = np.pad(x, [(0, 0), (0, 0), *a["padding"]])
    for offset in itertools.product(*map(range, a["kernel_size"])):
        read = padded
        for d, (k, s, step, size) in enumerate(zip(offset, a["stride"], a["dilation"], positions, strict=True)):
            read = read.take(np.arange(size) * s + k * step, axis=2 + d)
        yield read


def gradients(x: Array, grad: Array, a: dict[str, Any]) -> Array:
    """What each sample adds to a convolution's gradient, window after window: [N, O, I / groups, n]."""
    (samples, channels), (outputs, *positions) = x.shape[:2], grad.shape[1:]
    groups = a["groups"]
    result = []
    for read in reads(x, a, positions):
        channel = read.reshape(samples, groups, 1, channels // groups, math.prod(positions))
        each = grad.reshape(samples, groups, outputs // groups, 1, math.prod(positions))
        result.append((channel * each).sum(-1).reshape(samples, outputs, channels // groups))
    return np.stack(result, -1)


def check_convolution(implementation: str, call: Call) -> None:
    outcome = call.run_repeatably() if implementation != "reference" else call.run()
    if outcome is None:
        return
    a = call.arguments
    x, grad = wide(a["x"].values), wide(a["grad_output"].values)
    with np.errstate(all="ignore"):
        v = gradients(x, grad, a)
        finite_x, finite_grad = (np.nan_to_num(np.abs(each), nan=0, posinf=0) for each in (x, grad))
        size = gradients(finite_x, finite_grad, a)
        positions = math.prod(grad.shape[2:])
        sizes = (size[..., :, None] * size[..., None, :]).sum(0)
        sums = (v[..., :, None] * v[..., None, :]).sum(0)
        # What is lost of v to underflow is multiplied by the rest of it.
        lost = positions * size.sum(0).max(-1, initial=0)[..., None, None] * 2 + len(v)
        exact = whole(x, grad) and size.max(initial=0) < 2**24
        high = size.max(initial=0) > largest(a["out"].values.dtype)
        compare(call, outcome, sums, sizes, 2 * positions + len(v) + 8, lost, exact, high)


def test_mini_block_gram(implementation: str, fuzz: Fuzz) -> None:
    fuzz(grams, partial(check, implementation))


def test_conv_mini_block_gram(implementation: str, fuzz: Fuzz) -> None:
    fuzz(convolutions, partial(check_convolution, implementation))
