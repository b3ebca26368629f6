from __future__ import annotations

import math
from functools import partial
from typing import Any

import hypothesis.strategies as st
import numpy as np
import torch

from tests.fuzz import steps
from tests.fuzz.calls import Call, Fuzz, Outcome, surroundings, threads
from tests.fuzz.closeness import assert_close, largest, least, storing, unit
from tests.fuzz.operands import Array, Draw, Operand, accumulator, contiguous_layouts, numbers, wide

WRITTEN = ("params", "exp_avgs", "steps")


@st.composite
def factor(draw: Draw, shape: tuple[int, ...], dtype: torch.dtype, salt: int) -> Operand | None:
    how = draw(st.integers(0, 3))
    if how == 3:
        return None
    values = draw(numbers(("normal", "whole", "wide", "small"), specials=False)).fill(
        shape if how < 2 else (1,), accumulator(dtype), salt
    )
    return Operand(values.abs(), draw(contiguous_layouts()))


@st.composite
def calls(draw: Draw, tiny: bool) -> Call:
    count = draw(st.integers(0, 3))
    lists: dict[str, list[Any]] = {name: [] for name in ("params", "grads", "exp_avgs")}
    rows, columns = [], []
    for dtype in steps.dtypes(draw, count):
        shape = draw(steps.shapes(tiny))
        given = draw(steps.tensors(shape, dtype, short=draw(st.booleans())))
        for name, x in zip(lists, given.values(), strict=True):
            lists[name].append(x)
        # (groups, rows, columns): a divisor of the first dimension, what is left of it, and the rest.
        first, rest = (shape[0], math.prod(shape[1:])) if shape else (1, 1)
        groups = draw(st.sampled_from([g for g in (1, 2, 3) if first and first % g == 0] or [1]))
        row = draw(factor((first,), dtype, 3)) if first * rest else None
        column = draw(factor((groups, rest) if groups > 1 else (rest,), dtype, 4)) if first * rest else None
        if column is None and row is not None and row.values.numel() == 1 and rest > 1 and first == 1:
            row = None
        rows.append(row)
        columns.append(column)
    arguments: dict[str, Any] = {
        **lists,
        "steps": steps.counts(draw, count),
        "row_factors": rows,
        "column_factors": columns,
        "lr": draw(steps.rates),
        "beta": draw(st.sampled_from(steps.BETAS)),
        "damping": draw(st.sampled_from((0.1, 1e-3, 0.0, 1e-30, 1e10))),
        "weight_decay": draw(st.sampled_from(steps.DECAYS)),
        **draw(steps.options()),
    }
    return Call("adafisher_step_", arguments, frozenset(WRITTEN), draw(surroundings), draw(threads))


def curvature(shape: torch.Size, row: Operand | None, column: Operand | None, damping: float) -> Array:
    """Row by row of the parameter seen as a matrix; each group of rows has its own columns."""
    numel = math.prod(shape)
    r = wide(row.values).reshape(-1) if row is not None else np.ones(1)
    c = wide(column.values) if column is not None else np.ones(1)
    groups = c.reshape(-1, c.shape[-1])
    columns = groups.shape[1] if groups.shape[1] > 1 else numel // len(r) if len(r) > 1 else numel // len(groups)
    lines = numel // max(1, columns)
    product = np.repeat(groups, lines // len(groups), axis=0) * (r[:, None] if len(r) > 1 else r)
    return (np.broadcast_to(product, (lines, max(1, columns))) + damping).reshape(shape)


def check(implementation: str, call: Call) -> None:
    outcome = call.run_repeatably()
    if outcome is None:
        return
    a = call.arguments
    assert outcome.result.shape == (len(a["params"]),)
    if steps.does_nothing(a):
        assert not outcome.result.any()
        steps.assert_untouched(outcome, a, WRITTEN)
        return
    steps.assert_counted(outcome, a)
    for i in range(len(a["params"])):
        with np.errstate(all="ignore"):
            check_parameter(call, outcome, i)


def check_parameter(call: Call, outcome: Outcome, i: int) -> None:
    a = call.arguments
    param, dtype = a["params"][i].values, a["params"][i].values.dtype
    if param.numel() == 0:
        assert outcome.result[i] == 0
        return
    w, g, m = (wide(a[name][i].values) for name in ("params", "grads", "exp_avgs"))
    beta, lr, decay = np.longdouble(a["beta"]), steps.number(a["lr"]), a["weight_decay"]
    g = g / steps.number(a.get("grad_scale", 1.0)) * (-1 if a["maximize"] else 1)
    kept = ~np.isfinite(g) | (np.abs(g) > 2 * largest(dtype))
    near = np.isfinite(g) & (np.abs(g) > largest(dtype))
    steps.skipped_within(f"skipped[{i}]", outcome.result[i], int((kept & ~near).sum()), int((kept | near).sum()))
    size = np.abs(g)
    if not a["decoupled"] and decay:
        g, size = g + decay * w, size + decay * np.abs(w)
    moment, size = beta * m + (1 - beta) * g, beta * np.abs(m) + (1 - beta) * size
    t = np.longdouble((a["steps"][i].values + 1).item())
    left = 1 - beta**t
    fisher = curvature(param.shape, a["row_factors"][i], a["column_factors"][i], a["damping"])
    step, change = moment / left / fisher, size / left / fisher
    if a["decoupled"] and decay:
        step, change = step + decay * w, change + decay * np.abs(w)
    expected = np.where(kept, w, w - lr * step)
    # About ten roundings; those of 1 - beta^t, in float64, count for more where it is small.
    u, tiny, half = unit(dtype), least(dtype), largest(dtype) / 4
    of_moment = np.where(kept, 0, 8 * u * np.nan_to_num(size) + 4 * tiny)
    of_moment = of_moment + np.where(kept, 0, storing(moment, a["exp_avgs"][i].values.dtype))
    roundings = 16 * u + 4 * 2.0**-53 / left
    rounded = tiny * lr * (4 / (left * fisher) + 4 * (1 + decay) + 8 / fisher * np.maximum(1, size))
    bound = np.where(kept, 0, roundings * np.nan_to_num(np.abs(w) + lr * change) + rounded + 4 * tiny)
    bound = bound + np.where(kept, 0, storing(expected, dtype))
    over = near | (size > half)
    parts = np.maximum.reduce([size / left, size / left / fisher, change, lr * change, lr / left + 0 * size])
    hard = (
        over
        | ~(parts < half)
        | (fisher > half)
        | (fisher < 1e6 * tiny)
        | (lr / left / fisher > half)
        | (lr / left * size > half)
    )
    hard |= decay * np.abs(w) > half
    moment = np.where(kept, m, moment)
    assert_close(f"exp_avgs[{i}]", outcome["exp_avgs"][i], moment, of_moment, unknown=over & ~(kept & ~near))
    # Where w, m or a factor is not finite the formula says what comes out, as far as it does not depend on order.
    odd = ~np.isfinite(expected) & ~kept
    assert_close(f"params[{i}]", outcome["params"][i], expected, bound, unknown=hard & ~(kept & ~near) | odd)


def test_adafisher_step(implementation: str, fuzz: Fuzz) -> None:
    fuzz(calls, partial(check, implementation))
