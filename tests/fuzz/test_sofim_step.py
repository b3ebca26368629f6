from __future__ import annotations

from functools import partial
from typing import Any

import hypothesis.strategies as st
import numpy as np

from tests.fuzz import steps
from tests.fuzz.calls import Call, Fuzz, surroundings, threads
from tests.fuzz.closeness import assert_close, largest, least, storing, unit
from tests.fuzz.operands import Draw, wide

WRITTEN = ("params", "exp_avgs", "steps")


@st.composite
def calls(draw: Draw, tiny: bool) -> Call:
    count = draw(st.integers(0, 3))
    lists: dict[str, list[Any]] = {name: [] for name in ("params", "grads", "exp_avgs")}
    for dtype in steps.dtypes(draw, count):
        given = draw(steps.tensors(draw(steps.shapes(tiny)), dtype, short=draw(st.booleans())))
        for name, x in zip(lists, given.values(), strict=True):
            lists[name].append(x)
    each = count > 0 and draw(st.booleans())
    arguments: dict[str, Any] = {
        **lists,
        "steps": steps.counts(draw, count),
        "lr": [draw(steps.rates) for _ in range(count)] if each else draw(steps.rates),
        "beta": draw(st.sampled_from(steps.BETAS)),
        "rho": draw(st.sampled_from((0.5, 20.0, 1e-3, 1e-30, 1e30))),
        "direction": draw(st.sampled_from(("momentum", "gradient"))),
        "scope": draw(st.sampled_from(("global", "tensor"))),
        "weight_decay": draw(st.sampled_from(steps.DECAYS)),
        **draw(steps.options()),
    }
    return Call("sofim_step_", arguments, frozenset(WRITTEN), draw(surroundings), draw(threads))


def check(implementation: str, call: Call) -> None:
    outcome = call.run() if implementation == "reference" else call.run_repeatably()
    if outcome is None:
        return
    a, (skipped, squares) = call.arguments, outcome.result
    assert skipped.shape == squares.shape == (len(a["params"]),)
    if steps.does_nothing(a):
        assert not skipped.any()
        assert not squares.any()
        steps.assert_untouched(outcome, a, WRITTEN)
        return
    steps.assert_counted(outcome, a)
    with np.errstate(all="ignore"):
        compare(call, outcome)


class _Parameter:
    """The new moment of a parameter and what it adds to the dot products, with magnitudes for their rounding."""

    def __init__(self, a: dict[str, Any], i: int) -> None:
        self.dtype = a["params"][i].values.dtype
        self.w, g, m = (wide(a[name][i].values).astype(np.longdouble) for name in ("params", "grads", "exp_avgs"))
        beta, decay = np.longdouble(a["beta"]), a["weight_decay"]
        self.g = g / steps.number(a.get("grad_scale", 1.0)) * (-1 if a["maximize"] else 1)
        self.size_g = np.abs(self.g)
        if not a["decoupled"] and decay:
            self.g, self.size_g = self.g + decay * self.w, self.size_g + decay * np.abs(self.w)
        new = beta * m + (1 - beta) * self.g
        self.size = beta * np.abs(m) + (1 - beta) * self.size_g
        half = largest(self.dtype)
        self.kept = ~np.isfinite(new) | (np.abs(new) > 2 * half) | ~(self.size_g <= 2 * half)
        self.near = np.isfinite(new) & ((self.size > half) | (self.size_g > half))  # perhaps left out, perhaps not
        self.moment = np.where(self.kept, m, new)
        self.left = 1 - beta ** np.longdouble((a["steps"][i].values + 1).item())
        taken = ~self.kept
        u, g = self.moment[taken] / self.left, self.g[taken]
        size, size_g = self.size[taken] / self.left, self.size_g[taken]
        self.square, self.product = (u * u).sum(), (u * g).sum()
        round_, tiny = 12 * unit(self.dtype) + 8 * 2.0**-53 / self.left, least(self.dtype) * 4
        self.stored = np.where(self.kept, 0, storing(self.moment, a["exp_avgs"][i].values.dtype))
        off = round_ * size + (tiny + self.stored[taken]) / self.left
        off_g = 4 * unit(self.dtype) * size_g + tiny
        self.square_error = (2 * size * off + off * off).sum() + 1e-15 * self.square + len(u) * 2.0**-1074
        self.product_error = (
            (size * off_g + size_g * off + off * off_g).sum() + 1e-15 * (size * size_g).sum() + len(u) * 2.0**-1074
        )
        self.off = round_ * self.size + tiny + self.stored


def compare(call: Call, outcome: Any) -> None:
    a = call.arguments
    each = [_Parameter(a, i) for i in range(len(a["params"]))]
    rates = a["lr"] if isinstance(a["lr"], list) else [a["lr"]] * len(each)
    rho, (skipped, squares) = np.longdouble(a["rho"]), outcome.result
    vague = [bool(p.near.any()) for p in each]
    for i, p in enumerate(each):
        u, tiny = unit(p.dtype), least(p.dtype)
        sure, most = int((p.kept & ~p.near).sum()), int((p.kept | p.near).sum())
        steps.skipped_within(f"skipped[{i}]", skipped[i], sure, most)
        off = np.where(p.kept, 0, 8 * u * np.nan_to_num(p.size) + 4 * tiny) + p.stored
        assert_close(f"exp_avgs[{i}]", outcome["exp_avgs"][i], p.moment, off, unknown=p.near)
        if not vague[i]:
            expected = np.asarray(p.square)
            assert_close(f"squares[{i}]", squares[i], expected, p.square_error, unknown=p.square > 1e300)
        members, group_vague = (each, any(vague)) if a["scope"] == "global" else ([p], vague[i])
        square, square_error = sum(q.square for q in members), sum(q.square_error for q in members)
        product, product_error = sum(q.product for q in members), sum(q.product_error for q in members)
        if group_vague or not (square < 1e300 and abs(product) < 1e300):
            continue
        lr, decay, under = steps.number(rates[i]), a["weight_decay"], rho + square
        along = 1 / under
        step = p.moment / p.left * along
        # The coefficient's own error, and the moment's.
        vary = square_error / under
        error = (p.off / p.left) * along + np.abs(step) * (vary + vary**2 + 8 * u + 8 * 2.0**-53 / p.left)
        coefficient = along / p.left
        if a["direction"] == "gradient":
            ratio, spread = abs(product) * along, (product_error + abs(product) * vary) * along
            error = np.abs(p.moment / p.left) * spread + (p.off / p.left + 8 * u * np.abs(p.moment / p.left)) * ratio
            error = (error + 6 * u * p.size_g + tiny) / rho
            step = (p.g - product * along * p.moment / p.left) / rho
            error += 8 * u * (p.size_g + np.abs(p.moment / p.left) * ratio) / rho
            coefficient = max(ratio / p.left / rho, 1 / rho)
        if a["decoupled"] and decay:
            step, error = step + decay * p.w, error + 4 * u * decay * np.abs(p.w)
        expected = np.where(p.kept, p.w, p.w - lr * step)
        bound = lr * error + 8 * u * (np.abs(p.w) + lr * np.abs(step)) + tiny * (4 + lr * (4 + p.size + p.size_g))
        bound = np.where(p.kept, 0, np.nan_to_num(bound + storing(expected, p.dtype), nan=0))
        half = largest(p.dtype) / 4
        top = np.maximum.reduce([p.size / p.left, p.size * coefficient, np.abs(step), lr * np.abs(step) + 0 * p.w])
        hard = ~(top < half) | (coefficient > half) | (coefficient < 4e6 * tiny) | (lr > half)
        hard |= ~(lr * error < half) | (coefficient * lr > half)
        hard |= (decay * np.abs(p.w) > half) | (p.size_g / rho > half) | ((1 / rho < 4e6 * tiny) | (1 / rho > half))
        odd = ~np.isfinite(expected) & ~p.kept
        assert_close(f"params[{i}]", outcome["params"][i], expected, bound, unknown=hard & ~p.kept | odd)


def test_sofim_step(implementation: str, fuzz: Fuzz) -> None:
    fuzz(calls, partial(check, implementation))
