from __future__ import annotations

from functools import partial

import hypothesis.strategies as st
import numpy as np
import torch

from tests.fuzz.calls import Call, Fuzz, surroundings, threads
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

COEFFICIENTS = (1.0, 0.0, 0.5, 0.95, 3.0, 1e-30, 1e30)


@st.composite
def grams(draw: Draw, tiny: bool) -> Call:
    rows, columns = draw(sizes(tiny)), draw(sizes(tiny))
    if not tiny and draw(st.integers(0, 24)) == 24:
        rows, columns = draw(st.sampled_from((200, 700))), draw(st.sampled_from((3, 17, 96)))
    dtype, given = draw(st.sampled_from(SUM_DTYPES)), draw(numbers())
    decay, gain = draw(st.sampled_from(COEFFICIENTS)), draw(st.sampled_from(COEFFICIENTS))
    x = laid(given.fill((rows, columns), dtype), draw(layouts()))
    out = old(draw(numbers(specials=False)).fill((columns, columns), accumulator(dtype), 1), decay)
    weight = None
    if draw(st.booleans()):
        weight = laid(draw(numbers()).fill((rows,), accumulator(dtype), 2), draw(layouts()))
    arguments = {
        "out": Operand(out, draw(contiguous_layouts())),
        "x": x,
        "weight": weight,
        "decay": decay,
        "gain": gain,
    }
    return Call("weighted_gram_", arguments, frozenset({"out"}), draw(surroundings), draw(threads))


def old(out: torch.Tensor, decay: float) -> torch.Tensor:
    """NaN wherever nothing is to be read: above the diagonal, or in all of it."""
    nan = torch.full_like(out, torch.nan)
    return nan if decay == 0 else out.tril() + nan.triu(1).nan_to_num(0) + torch.where(nan.isnan().triu(1), nan, 0)


def mirrored(lower: Array) -> Array:
    """Both triangles from the lower ones."""
    return np.where(np.tri(lower.shape[-1], dtype=bool), lower, np.swapaxes(lower, -1, -2))


def averaged(out: Array, sums: Array, decay: float, gain: float) -> Array:
    return mirrored((decay * out if decay else 0) + gain * sums)


def check(implementation: str, call: Call) -> None:
    repeatable = implementation != "reference"
    outcome = call.run_repeatably() if repeatable else call.run()
    if outcome is None:
        return
    a = call.arguments
    dtype, decay, gain = a["x"].values.dtype, a["decay"], a["gain"]
    x, out = wide(a["x"].values), wide(a["out"].values)
    weight = np.ones(len(x)) if a["weight"] is None else wide(a["weight"].values)
    with np.errstate(all="ignore"):
        terms = (weight[:, None] * x)[:, :, None] * x[:, None, :]
        expected = averaged(out, terms.sum(0), decay, gain)
        # In any order of adding up, an entry meets as many roundings as it has terms, and a few of its coefficients.
        sizes = np.nan_to_num(np.abs(terms), nan=0, posinf=0).sum(0)
        size = np.nan_to_num(averaged(np.abs(out), sizes, decay, gain), nan=0, posinf=0)
        weighed = np.nan_to_num(np.abs(weight[:, None] * x), nan=0, posinf=0)
        plain = np.nan_to_num(np.abs(x), nan=0, posinf=0)
        lost = least(dtype) * (1 + gain * (len(x) + plain.sum(0)[:, None] + plain.sum(0)))
    bound = (len(x) + 8) * unit(dtype) * size + lost
    if whole(x, weight) and gain == 1 and decay == 0 and sizes.max(initial=0) < 2**24:
        bound = 0 * size
    high = max(sizes.max(initial=0), weighed.max(initial=0))
    unknown = np.maximum(np.maximum(size, mirrored(sizes)), high) > largest(dtype)
    # An infinity times what rounds to zero on the way is NaN.
    unknown |= ~np.isfinite(expected) & bool(
        (weighed[weighed > 0] < torch.finfo(call.arguments["out"].values.dtype).tiny).any()
    )
    assert_close("out", outcome["out"], expected, bound, unknown=unknown)
    result = outcome["out"]
    assert torch.equal(result.mT.nan_to_num(), result.nan_to_num()), "the result is not symmetric"


def test_weighted_gram(implementation: str, fuzz: Fuzz) -> None:
    fuzz(grams, partial(check, implementation))
