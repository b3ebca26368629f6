from __future__ import annotations

from functools import partial
from typing import Any

import hypothesis.strategies as st
import numpy as np
import torch
from torch import Tensor

from tests.fuzz.calls import Call, Fuzz, surroundings, threads
from tests.fuzz.closeness import assert_close, largest, least, unit
from tests.fuzz.operands import FACTOR_DTYPES, Array, Draw, Operand, contiguous_layouts, numbers, sizes, wide

EPSILONS = (1e-6, 0.0, 1e-30, 1.0, 1e30)
COEFFICIENTS = (0.8, 0.0, 1.0, 0.2, 1e-30, 1e30)


@st.composite
def factors(draw: Draw, n: int, dtype: torch.dtype, salt: int) -> Tensor:
    """Mostly what factors are, sums of squares; some equal to rounding, or nearly."""
    x = draw(numbers()).fill((n,), dtype, salt)
    how = draw(st.integers(0, 5))
    if how == 5:
        return 1 + x.clamp(-1, 1) * draw(st.sampled_from((0.0, 1e-7, 1e-5, 1e-4, 1e-2)))
    return x if how == 4 else x.abs()


@st.composite
def lists(draw: Draw, tiny: bool) -> tuple[list[int], list[torch.dtype]]:
    lengths = draw(st.lists(sizes(tiny), max_size=4))
    if not tiny and draw(st.integers(0, 29)) == 29:
        lengths = [40_000, 1, 4097]
    return lengths, [draw(st.sampled_from(FACTOR_DTYPES)) for _ in lengths]


@st.composite
def scalings(draw: Draw, tiny: bool, into: bool) -> Call:
    lengths, dtypes = draw(lists(tiny))
    x = [draw(factors(n, d, i)) for i, (n, d) in enumerate(zip(lengths, dtypes, strict=True))]
    arguments: dict[str, Any] = {"x": [Operand(v, draw(contiguous_layouts())) for v in x]}
    if into:
        arguments["out"] = [Operand(torch.full_like(v, torch.nan), draw(contiguous_layouts())) for v in x]
    arguments["eps"] = draw(st.sampled_from(EPSILONS))
    if draw(st.booleans()):
        weights = [draw(st.sampled_from((1.0, 0.0, 0.36, 7.0, 1e-20))) for _ in x]
        shapes = [draw(st.sampled_from(((), (1,)))) for _ in x]
        given = [torch.full(s, w, dtype=d) for s, w, d in zip(shapes, weights, dtypes, strict=True)]
        arguments["weights"] = [Operand(w, draw(contiguous_layouts())) for w in given]
    op = "minmax_" if into else "minmax"
    return Call(op, arguments, frozenset({"out"} if into else ()), draw(surroundings), draw(threads))


@st.composite
def averages(draw: Draw, tiny: bool) -> Call:
    lengths, dtypes = draw(lists(tiny))
    joint = draw(st.sampled_from([j for j in (1, 2, 3) if len(lengths) % j == 0]))
    short = [draw(st.integers(0, 3)) == 3 and n > 0 for n in lengths]
    state = [draw(factors(n, d, 10 + i)) for i, (n, d) in enumerate(zip(lengths, dtypes, strict=True))]
    new = [draw(factors(n - s, d, i)) for i, (n, s, d) in enumerate(zip(lengths, short, dtypes, strict=True))]
    arguments: dict[str, Any] = {
        "state": [Operand(v, draw(contiguous_layouts())) for v in state],
        "new": [Operand(v, draw(contiguous_layouts())) for v in new],
        "decay": draw(st.sampled_from(COEFFICIENTS)),
        "gain": draw(st.sampled_from(COEFFICIENTS)),
        "normalize": draw(st.booleans()),
        "eps": draw(st.sampled_from(EPSILONS)),
        "joint": joint,
    }
    if draw(st.booleans()):
        arguments["divisors"] = [draw(st.sampled_from((1.0, 0.0, 3.0, 64.0, 1e-10))) for _ in state]
    return Call("factor_ema_", arguments, frozenset({"state"}), draw(surroundings), draw(threads))


def scaled(v: Array, eps: float, dtype: torch.dtype, divided: bool) -> tuple[Array, Array, bool]:
    """A vector in the unit interval, by how much rounding may move it, and whether that is not known."""
    if not v.size:
        return v, v, False
    if not np.isfinite(v).all():
        return np.full_like(v, np.nan), np.zeros_like(v), False
    low, high, most = v.min(), v.max(), np.abs(v).max()
    spread = high - low
    flat = spread / most if most else 0
    # An entry has the rounding of its division, if any, and their differences have that as a share of the largest.
    error = 8 * unit(dtype) + (2 * unit(dtype) * most * divided + least(dtype) * 2) / (spread + eps or 1)
    error += 4 * unit(dtype) * most / (spread or 1) * divided
    near = abs(flat - 1e-5) <= 4 * unit(dtype) or 0 < spread <= 2 * least(dtype) or 0 < most <= 2e5 * least(dtype)
    unknown = bool(near) or spread > largest(dtype) or most > largest(dtype) or eps + spread > largest(dtype)
    result = np.ones_like(v) if flat <= 1e-5 else (v - low) / (spread + eps)
    return result, np.full_like(v, error), unknown


def check_minmax(implementation: str, call: Call) -> None:
    outcome = call.run_repeatably()
    if outcome is None:
        return
    a = call.arguments
    results = outcome["out"] if call.op == "minmax_" else outcome.result
    assert len(results) == len(a["x"])
    weights = a.get("weights", [None] * len(results))
    for i, (found, x, w) in enumerate(zip(results, a["x"], weights, strict=True)):
        v, dtype = wide(x.values), x.values.dtype
        assert found.dtype == dtype
        with np.errstate(all="ignore"):
            weight = 1.0 if w is None else wide(w.values).reshape(())
            if weight == 0:
                expected, bound, unknown = np.ones_like(v), np.zeros_like(v), False
            else:
                expected, bound, unknown = scaled(v / weight, a["eps"], dtype, w is not None)
        assert_close(f"minmax of x[{i}]", found, expected, bound, unknown=unknown)


def check_average(implementation: str, call: Call) -> None:
    outcome = call.run_repeatably()
    if outcome is None:
        return
    a, rejected = call.arguments, outcome.result.tolist()
    divisors = a.get("divisors", [1.0] * len(a["state"]))
    assert len(rejected) == len(a["state"]) // a["joint"]
    for run, refused in enumerate(rejected):
        members, overflows, nonfinite, values = range(run * a["joint"], (run + 1) * a["joint"]), False, False, {}
        for i in members:
            state, new = a["state"][i].values, wide(a["new"][i].values)
            with np.errstate(all="ignore"):
                value = new / divisors[i]
            overflows |= bool((np.abs(value[np.isfinite(value)]) > largest(state.dtype)).any())
            nonfinite |= not np.isfinite(value).all()
            values[i] = np.append(value, 1) if len(value) < len(state) else value
        assert refused in (0, 1)
        assert overflows or refused == nonfinite, f"rejected[{run}] is {refused}"
        for i in members:
            _check_state(call, i, outcome["state"][i], bool(refused), values[i])


def _check_state(call: Call, i: int, found: Tensor, refused: bool, value: Array) -> None:
    a = call.arguments
    old, dtype = wide(a["state"][i].values), a["state"][i].values.dtype
    if refused:
        assert_close(f"state[{i}], of a run that was refused,", found, old, 0)
        return
    error, unknown = np.zeros_like(value), False
    with np.errstate(all="ignore"):
        if a["normalize"]:
            value, error, unknown = scaled(value, a["eps"], dtype, "divisors" in a)
        expected = a["decay"] * old + a["gain"] * value
        size = a["decay"] * np.abs(old) + a["gain"] * np.abs(value)
        size = np.nan_to_num(size, nan=0, posinf=0)
        bound = 6 * unit(dtype) * size + a["gain"] * error + least(dtype) * (3 + a["gain"])
    assert_close(f"state[{i}]", found, expected, bound, unknown=unknown | (size > largest(dtype)))


def test_minmax(implementation: str, fuzz: Fuzz) -> None:
    fuzz(partial(scalings, into=False), partial(check_minmax, implementation))


def test_minmax_into(implementation: str, fuzz: Fuzz) -> None:
    fuzz(partial(scalings, into=True), partial(check_minmax, implementation))


def test_factor_ema(implementation: str, fuzz: Fuzz) -> None:
    fuzz(averages, partial(check_average, implementation))
