from __future__ import annotations

from functools import partial
from typing import Any

import hypothesis.strategies as st
import numpy as np
import torch

from tests.fuzz.calls import Call, Fuzz, Outcome, surroundings, threads
from tests.fuzz.closeness import assert_close, largest, least, unit
from tests.fuzz.matrices import eigenvalues, inverse, lower, norms, positive
from tests.fuzz.operands import FACTOR_DTYPES, SPECIALS, Array, Draw, laid, layouts, numbers, sizes, wide

SCALES = (1.0, 1e-4, 1e6)


@st.composite
def blocks(draw: Draw, tiny: bool, dtype: torch.dtype) -> torch.Tensor:
    """Most of them positive definite, some not, or not finite, in a place or two."""
    count, n = draw(sizes(tiny, most=33)), draw(sizes(tiny, most=33))
    if not tiny and draw(st.integers(0, 19)) == 19:
        count, n = 2, draw(st.sampled_from((48, 64, 65, 97, 130)))
    condition, scale = draw(st.sampled_from((1.0, 10.0, 1e3))), draw(st.sampled_from(SCALES))
    a = positive(count, n, condition, scale, dtype, draw(st.integers(0, 2**16)))
    if a.numel() and draw(st.integers(0, 2)) == 2:
        b, i, j = (draw(st.integers(0, size - 1)) for size in a.shape)
        a[b, i, j] = draw(st.sampled_from((*SPECIALS, -3 * scale)))
        if draw(st.booleans()):
            a[b, j, i] = a[b, i, j]
    return a


@st.composite
def calls(draw: Draw, tiny: bool, op: str) -> Call:
    dtype = draw(st.sampled_from(FACTOR_DTYPES))
    a = draw(blocks(tiny, dtype))
    arguments: dict[str, Any] = {}
    if op == "block_inverse_":
        arguments["out"] = laid(draw(numbers()).fill(a.shape, dtype, 1), draw(layouts(written=True)))
    if op == "block_apply":
        a = draw(numbers()).fill(a.shape, dtype)  # any square matrix
    arguments["inverse" if op == "block_apply" else "blocks"] = laid(a, draw(layouts()))
    if op != "block_apply":
        arguments["damping"] = draw(st.sampled_from((0.0, 1e-2, 1.0, 1e-30, 1e20)))
    if op in ("block_solve", "block_apply"):
        v = draw(numbers(specials=op == "block_apply")).fill(a.shape[:2], dtype, 2)
        arguments["rhs" if op == "block_solve" else "vectors"] = laid(v, draw(layouts()))
    return Call(op, arguments, frozenset({"out"} & arguments.keys()), draw(surroundings), draw(threads))


def run(implementation: str, call: Call) -> Outcome | None:
    """Larger blocks may be LAPACK's, whose bits may depend on the number of threads."""
    name = "inverse" if call.op == "block_apply" else "blocks"
    inverted = implementation.startswith("cpu") and call.op in ("block_inverse", "block_inverse_")
    native = implementation != "reference" and call.arguments[name].values.shape[-1] <= 64
    return call.run_repeatably() if native or inverted else call.run()


def check(implementation: str, call: Call) -> None:
    outcome = run(implementation, call)
    if outcome is None:
        return
    a = call.arguments
    given = a["blocks"].values
    dtype, n, u = given.dtype, given.shape[-1], unit(given.dtype)
    result, info = (outcome["out"], outcome.result) if call.op == "block_inverse_" else outcome.result
    assert info.shape == given.shape[:1]
    with np.errstate(all="ignore"):
        full = wide(given)
        # The damping is added in the dtype of the blocks, and this is what is inverted.
        damped = lower(wide(given + a["damping"] * torch.eye(n, dtype=dtype)))
        values = eigenvalues(damped) if n else np.ones((len(full), 1))
        low, high = values[:, 0], values[:, -1]
        margin = 8 * (n + 2) * u * np.maximum(high, np.abs(damped).max((1, 2), initial=0))
        finite = np.isfinite(full).all((1, 2))
        good, bad = finite & (low > margin), ~finite | (low < -margin)
        exact = inverse(np.where(good[:, None, None], damped, np.eye(n))) if n else damped
        condition = np.where(good, high / low, 1)
        bound = 8 * (n + 1) * u * condition * norms(exact) + n * least(dtype) * condition
        if call.op == "block_solve":
            rhs = wide(a["rhs"].values)
            exact = (exact * rhs[:, None, :]).sum(-1)
            bound = bound * norms(rhs, (1,)) + least(dtype) * n / np.where(good, low, 1)
            size = norms(rhs, (1,)) / np.where(good, low, 1)
            good &= np.isfinite(rhs).all(1) & (size < largest(dtype) / 1e3) & (norms(rhs, (1,)) < largest(dtype) / 1e3)
            bad |= ~np.isfinite(rhs).all(1)
            good &= norms(rhs, (1,)) * condition < largest(dtype) / 1e3
            # What of a number is lost where it is subnormal comes back amplified, and a result may be subnormal itself.
            bound += least(dtype) * n * (1 + condition / np.where(good, low, 1))
    found = info.numpy()
    assert set(found.tolist()) <= {0, 1}
    assert not found[good].any(), f"info is {found.tolist()}, expected 0 for {good.tolist()}"
    assert found[bad].all(), f"info is {found.tolist()}, expected 1 for {bad.tolist()}"
    refused = found == 1
    got = wide(result.resolve_neg())
    if call.op == "block_inverse_":
        before = wide(a["out"].values)
        assert_close("out of a bad block", result[refused.tolist()], before[refused], 0)
    else:
        assert np.isnan(got[refused]).all(), "what is refused is not NaN"
    sure = good & ~refused
    error = norms(got[sure] - exact[sure], tuple(range(1, got.ndim)))
    assert (error <= bound[sure]).all(), f"an error of {error.max():.3g}, expected {bound[sure][error.argmax()]:.3g}"
    if call.op != "block_solve":
        assert np.array_equal(got[~refused], np.swapaxes(got[~refused], 1, 2)), "the inverse is not symmetric"
        if n == 2 and implementation != "reference":
            entries = 10 * u * np.abs(exact) + 4 * least(dtype)
            assert_close("inverse of two rows", result[sure.tolist()], exact[sure], entries[sure])


def check_apply(implementation: str, call: Call) -> None:
    outcome = run(implementation, call)
    if outcome is None:
        return
    a, v = wide(call.arguments["inverse"].values), wide(call.arguments["vectors"].values)
    dtype, n = call.arguments["vectors"].values.dtype, a.shape[-1]
    with np.errstate(all="ignore"):
        expected: Array = (a * v[:, None, :]).sum(-1)
        size = np.nan_to_num(np.abs(a * v[:, None, :]), nan=0, posinf=0).sum(-1)
        bound = (n + 2) * unit(dtype) * size + (n + 1) * least(dtype)
    assert_close("product", outcome.result, expected, bound, unknown=size > largest(dtype))


def test_block_inverse(implementation: str, fuzz: Fuzz) -> None:
    fuzz(partial(calls, op="block_inverse"), partial(check, implementation))


def test_block_inverse_into(implementation: str, fuzz: Fuzz) -> None:
    fuzz(partial(calls, op="block_inverse_"), partial(check, implementation))


def test_block_solve(implementation: str, fuzz: Fuzz) -> None:
    fuzz(partial(calls, op="block_solve"), partial(check, implementation))


def test_block_apply(implementation: str, fuzz: Fuzz) -> None:
    fuzz(partial(calls, op="block_apply"), partial(check_apply, implementation))
