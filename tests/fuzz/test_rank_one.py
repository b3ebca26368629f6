from __future__ import annotations

from functools import partial
from typing import Any

import hypothesis.strategies as st
import numpy as np

from tests.fuzz import steps
from tests.fuzz.calls import Call, Fuzz, surroundings, threads
from tests.fuzz.closeness import assert_close, largest, least, storing, unit
from tests.fuzz.matrices import eigenvalues, inverse, positive
from tests.fuzz.operands import FACTOR_DTYPES, Draw, laid, layouts, numbers, sizes, wide


@st.composite
def solves(draw: Draw, tiny: bool) -> Call:
    u, x = [], []
    for i, dtype in enumerate(steps.dtypes(draw, draw(st.integers(0, 3)))):
        shape = draw(steps.shapes(tiny))
        u.append(laid(draw(numbers()).fill(shape, dtype, 2 * i), draw(layouts())))
        x.append(laid(draw(numbers()).fill(shape, dtype, 2 * i + 1), draw(layouts())))
    rho = draw(st.sampled_from((0.5, 1.0, 20.0, 1e-30, 1e30)))
    return Call("rank_one_solve", {"u": u, "x": x, "rho": rho}, around=draw(surroundings), threads=draw(threads))


def check_solve(implementation: str, call: Call) -> None:
    outcome = call.run() if implementation == "reference" else call.run_repeatably()
    if outcome is None:
        return
    a, rho = call.arguments, np.longdouble(call.arguments["rho"])
    u, x = ([wide(v.values).astype(np.longdouble) for v in a[name]] for name in ("u", "x"))
    with np.errstate(all="ignore"):
        square = sum(((v * v).sum() for v in u), np.longdouble(0))
        product = sum(((v * y).sum() for v, y in zip(u, x, strict=True)), np.longdouble(0))
        size = sum((np.abs(v * y).sum() for v, y in zip(u, x, strict=True)), np.longdouble(0))
        along, off = product / (rho + square), 1e-14 * size / (rho + square)
        far = not (square < 1e300 and size < 1e300)
        for i, (z, v, y, like) in enumerate(zip(outcome.result, u, x, a["x"], strict=True)):
            dtype = like.values.dtype
            expected = (y - along * v) / rho
            moved = np.abs(y) + np.abs(along * v)
            tiny, half = least(dtype), largest(dtype)
            bound = (6 * unit(dtype) * moved + off * np.abs(v) + tiny * (2 + np.abs(v))) / rho + tiny
            bound = np.nan_to_num(bound + storing(expected, dtype), nan=0)
            hard = ~(moved < half) | (moved / rho > half) | ~((abs(along) < half) & (1 / rho < half))
            hard = np.isfinite(square) & np.isfinite(product) & (hard | far) | (1 / rho < 4e6 * tiny)
            # An infinity may meet a zero, or what rounds to one.
            hard = (
                hard | ~(np.isfinite(square) & np.isfinite(product)) & np.isinf(expected) | (far & ~np.isnan(expected))
            )
            assert_close(f"solution[{i}]", z, expected, bound, unknown=hard)


@st.composite
def updates(draw: Draw, tiny: bool, low_rank: bool, spanning: bool = False) -> Call:
    """``spanning``: vectors that reach every direction, and are large beside the matrix."""
    dtype, n = draw(st.sampled_from(FACTOR_DTYPES)), draw(sizes(tiny, most=33))
    count = draw(sizes(tiny, most=17))
    if not tiny and draw(st.integers(0, 19)) == 19:
        count, n = 2, draw(st.sampled_from((64, 65, 100)))
    if spanning:
        n = draw(st.integers(1, 3))
    condition, scale = draw(st.sampled_from((1.0, 10.0, 1e3))), draw(st.sampled_from((1.0, 1e-4, 1e4)))
    p = positive(count, n, condition, scale, dtype, draw(st.integers(0, 2**16)))
    several = n + draw(st.integers(0, 2)) if spanning else draw(st.sampled_from((1, 2, 0, 3, 5)))
    shape = (count, several, n) if low_rank else (count, n)
    u = draw(numbers(("normal", "whole", "wide"))).fill(shape, dtype, 1)
    u = u * (draw(st.sampled_from((100.0, 1000.0))) if spanning else draw(st.sampled_from((1.0, 100.0, 1e-3))))
    arguments: dict[str, Any] = {
        "inverse": laid(p, draw(layouts(written=True))),
        "u": laid(u, draw(layouts())),
        "decay": draw(st.sampled_from((1.0, 0.95, 0.1, 10.0))),
        "gain": draw(st.sampled_from((1.0, 0.05, 0.0, -0.01, -1.0))),
    }
    op = "low_rank_inverse_update_" if low_rank else "rank_one_inverse_update_"
    return Call(op, arguments, frozenset({"inverse"}), draw(surroundings), draw(threads))


def check_update(implementation: str, call: Call) -> None:
    outcome = call.run() if implementation == "reference" else call.run_repeatably()
    if outcome is None:
        return
    a = call.arguments
    given, vectors = a["inverse"].values, a["u"].values
    n, u = given.shape[-1], unit(given.dtype)
    p, x = wide(given).astype(np.longdouble), wide(vectors).astype(np.longdouble)
    x = x[:, None] if x.ndim == 2 else x
    info, found = outcome.result.numpy(), wide(outcome["inverse"].resolve_neg())
    assert info.shape == given.shape[:1]
    assert set(info.tolist()) <= {0, 1, 2}
    assert_close("a refused inverse", outcome["inverse"][(info != 0).tolist()], p[info != 0], 0)
    if given.numel() == 0:
        return
    finite = np.isfinite(x).all((1, 2))
    assert info[~finite].all(), f"info is {info.tolist()} though a vector is not finite"
    with np.errstate(all="ignore"):
        clean = np.where(finite[:, None, None], x, 0)
        # The matrices on the way, without the decay: before, between the vectors and after.
        way = [inverse(p)]
        for each in np.moveaxis(clean, 1, 0):
            way.append(way[-1] + a["gain"] / a["decay"] * each[:, :, None] * each[:, None, :])
        values = np.stack([eigenvalues(matrix) for matrix in way])
        low, high = values[..., 0], values[..., -1]
        condition = high.max(0) / low.min(0)
        bound = 8 * (n + x.shape[1] + 2) * u * condition
        definite = finite & (low.min(0) > 0)
        # What rounding may do to u^T P u, as a share of what it is added to.
        largest_p = np.maximum(1 / low[0], 1 / low[-1])
        added = np.abs(a["gain"] / a["decay"]) * (clean**2).sum((1, 2))
        good = definite & (bound < 1e-2) & (n * u * added * largest_p * condition < 1e-3)
        bad = finite & (low[-1] < -100 * n * u * (high.max(0) + added))
    assert not info[good].any(), f"info is {info.tolist()}, expected 0 for {good.tolist()}"
    assert info[bad].all(), f"info is {info.tolist()}, expected a refusal for {bad.tolist()}"
    symmetric = found[info == 0]
    assert np.array_equal(symmetric, np.swapaxes(symmetric, 1, 2)), "the inverse is not symmetric"
    taken = (info == 0) & definite & (bound < 0.1)
    if taken.any():
        exact = inverse(way[-1][taken]) / a["decay"]
        allowed = bound[taken] * largest_p[taken] / a["decay"] + n * least(given.dtype)
        error = np.abs(eigenvalues(found[taken] - exact)).max(1)
        worst = (error - allowed).argmax()
        assert (error <= allowed).all(), f"an error of {error[worst]:.3g}, expected {allowed[worst]:.3g} at most"


def test_rank_one_solve(implementation: str, fuzz: Fuzz) -> None:
    fuzz(solves, partial(check_solve, implementation))


def test_large_vectors_that_span_the_space(implementation: str, fuzz: Fuzz) -> None:
    fuzz(partial(updates, low_rank=True, spanning=True), partial(check_update, implementation))


def test_rank_one_inverse_update(implementation: str, fuzz: Fuzz) -> None:
    fuzz(partial(updates, low_rank=False), partial(check_update, implementation))


def test_low_rank_inverse_update(implementation: str, fuzz: Fuzz) -> None:
    fuzz(partial(updates, low_rank=True), partial(check_update, implementation))
