from __future__ import annotations

import math
from functools import partial
from typing import Any

import hypothesis.strategies as st
import numpy as np
import torch

from tests.fuzz import steps
from tests.fuzz.calls import Call, Fuzz, surroundings, threads
from tests.fuzz.closeness import assert_close, largest, least, storing, unit
from tests.fuzz.operands import Array, Draw, Operand, accumulator, contiguous_layouts, numbers, wide

NAMES = ("params", "grads", "momentum_buffers")
_FLOORS = st.sampled_from((1e-3, 0.0, 1.0, 1e10))


def dense(values: Array) -> Array:
    """Blocks of lower triangles, row after row."""
    n = math.isqrt(2 * values.shape[-1])
    rows, columns = np.tril_indices(n)
    result = np.zeros((len(values), n, n), values.dtype)
    result[:, rows, columns] = result[:, columns, rows] = values
    return result


@st.composite
def inverses(draw: Draw, shape: tuple[int, ...], dtype: torch.dtype, salt: int) -> Operand:
    """Symmetric to the bit; the last two dimensions are a block, or the last one a packed block."""
    storage = accumulator(dtype) if draw(st.integers(0, 3)) else torch.bfloat16
    x = draw(numbers(("normal", "whole", "wide"), specials=False)).fill(shape, storage, salt)
    if len(shape) > 2:
        x = x.tril() + x.tril(-1).mT
    return Operand(x, draw(contiguous_layouts()))


@st.composite
def calls(draw: Draw, tiny: bool) -> Call:
    lists: dict[str, list[Any]] = {name: [] for name in (*NAMES, "inverses")}
    for salt, dtype in enumerate(steps.dtypes(draw, draw(st.integers(0, 2)))):
        shape = draw(steps.shapes(tiny))
        rows, numel = shape[0] if shape else 1, math.prod(shape)
        columns = math.prod(shape[1:])
        biased = bool(shape) and draw(st.booleans())
        kind = draw(st.sampled_from(("blocks", "packed", "shared")))
        width = columns + biased
        if kind == "shared":
            n = draw(st.sampled_from([n for n in (1, 2, 3, 4, 5, 9, 16, 33, width) if 0 < n <= max(1, width)]))
            blocks: tuple[int, ...] = (1, -(-width // n), n, n)
        else:
            parts = [n for n in (1, 2, 3, 4, 5, 8, 9, 16, 17) if numel % n == 0]
            n = width if biased else draw(st.sampled_from(parts))
            count = rows if biased else numel // n
            blocks = (count, n, n) if kind == "blocks" else (count, n * (n + 1) // 2)
        if n > 80:  # a block of that size is slow to draw, and no other code
            continue
        short = draw(st.booleans())
        given = [draw(steps.tensors(shape, dtype, short))]
        if biased:
            given.append(draw(steps.tensors([rows], dtype, short)))
        for tensors in given:
            for name, x in zip(NAMES, tensors.values(), strict=True):
                lists[name].append(x)
        lists["inverses"] += [draw(inverses(blocks, dtype, salt)), *[None] * biased]
    arguments: dict[str, Any] = {
        **lists,
        "lr": draw(steps.rates),
        "momentum": draw(st.sampled_from((0.9, 0.0, 0.5, 1 - 1e-9))),
        "weight_decay": draw(st.sampled_from(steps.DECAYS)),
        **draw(steps.options()),
        "kl_clip": draw(st.sampled_from((None, 1e-3, 1e-30, 1e30))),
        "kl_along": draw(st.sampled_from(("momentum", "gradient"))),
        "max_relative_step": draw(st.sampled_from((None, 1e-3, 1.0, 1e-20, 1e20))),
    }
    # What a bias has of its own is that of the parameter before it.
    first = [i - (inverse is None) for i, inverse in enumerate(lists["inverses"])]
    if draw(st.booleans()):
        arguments["floor"] = draw(_FLOORS)
    elif first:
        floors = [draw(_FLOORS) for _ in first]
        arguments["floor"] = [floors[i] for i in first]
    if draw(st.booleans()):
        numbers_of_layers = [draw(st.integers(-1, 2)) for _ in first]
        arguments["layers"] = [numbers_of_layers[i] for i in first]
    return Call("mbf_step_", arguments, frozenset((NAMES[0], NAMES[2])), draw(surroundings), draw(threads))


class _Joined:
    """A parameter with its bias, as one vector; which of its elements, or none (-1), each block acts on."""

    def __init__(self, a: dict[str, Any], i: int) -> None:
        self.first = i
        self.members = [i, i + 1] if i + 1 < len(a["params"]) and a["inverses"][i + 1] is None else [i]
        self.dtype = a["params"][i].values.dtype
        param, inverse = a["params"][i].values, a["inverses"][i].values
        self.w, g, m = (np.concatenate([wide(a[name][k].values).ravel() for k in self.members]) for name in NAMES)
        p = wide(inverse.to(accumulator(self.dtype)))
        rows = param.shape[0] if param.dim() else 1
        index = np.arange(param.numel()).reshape(rows, param.numel() // max(1, rows))
        if len(self.members) == 2:
            index = np.hstack([index, param.numel() + np.arange(rows)[:, None]])
        if p.ndim == 4:
            blocks, n = p.shape[1:3]
            index = np.pad(index, [(0, 0), (0, blocks * n - index.shape[1])], constant_values=-1)
            self.index, p = index.reshape(rows * blocks, n), np.tile(p[0], (rows, 1, 1))
        else:
            p = p if p.ndim == 3 else dense(p)
            self.index = index.reshape(p.shape[:2])
        self.there = self.index >= 0
        decay = 0 if a["decoupled"] else a["weight_decay"]
        g = g / steps.number(a.get("grad_scale", 1.0)) * (-1 if a["maximize"] else 1)
        self.size_g = np.abs(g) + (decay * np.abs(self.w) if decay else 0)
        self.g = g + decay * self.w if decay else g
        self.old, self.new = m, a["momentum"] * m + self.g
        self.size = a["momentum"] * np.abs(m) + self.size_g
        self.d = np.where(self.there, (p * self._in_blocks(self.new)[:, None, :]).sum(-1), 0)
        reach = (np.abs(p) * self._in_blocks(self.size)[:, None, :]).sum(-1)
        u, n, tiny = unit(self.dtype), p.shape[-1], least(self.dtype)
        self.error = (n + 6) * u * reach + tiny * (n + 4 * np.abs(p).sum(-1))
        half = largest(self.dtype)
        top = np.maximum(np.where(self.there, reach, 0), self._in_blocks(self.size))
        finite = np.isfinite(self.d).all(-1)
        self.skipped = ~finite | (np.abs(self.d) > 2 * half).any(-1)
        self.vague = finite & (top > half / 4).any(-1)  # perhaps left out, perhaps not

    def _in_blocks(self, x: Array) -> Array:
        return np.where(self.there, x[self.index], 0) if x.size else np.zeros(self.index.shape)

    def spread(self, by_block: Array) -> Array:
        """What holds for a block for each of its elements."""
        result = np.zeros(len(self.w), by_block.dtype)
        full = np.broadcast_to(by_block, self.index.shape)
        result[self.index[self.there]] = full[self.there]
        return result

    def product(self, along_momentum: bool) -> tuple[Any, Any]:
        """Part of the sum of <d, m> or <d, g>, and how far rounding may take it."""
        kept = ~self.skipped[:, None] & self.there
        other = (self.new, self.size) if along_momentum else (self.g, self.size_g)
        g, size = map(self._in_blocks, other)
        off = self.error * size + 4 * unit(self.dtype) * np.abs(self.d) * size + 1e-15 * np.abs(self.d * g)
        return np.where(kept, self.d * g, 0).sum(), np.where(kept, off + 2.0**-1074, 0).sum()


class _Caps:
    """What the steps of layers are shortened by, and how far rounding may take that; None where that is not known."""

    def __init__(self, a: dict[str, Any], joined: list[_Joined], scale: Any, vary: Any, known: bool) -> None:
        count = len(a["params"])
        self.layers = a.get("layers") or [x.first for i in range(count) for x in joined if i in x.members]
        floor = a.get("floor", 1e-3)
        floors = floor if isinstance(floor, list) else [floor] * count
        self.found: dict[int, tuple[Any, Any] | None] = {}
        for layer in set(self.layers):
            mine = [x for x in joined if self.layers[x.first] == layer]
            least = min(floors[x.first] for x in mine)
            self.found[layer] = self._find(a, mine, least, scale, vary) if known else None

    @staticmethod
    def _find(a: dict[str, Any], mine: list[_Joined], floor: float, scale: Any, vary: Any) -> tuple[Any, Any] | None:
        most, lr = a["max_relative_step"], np.longdouble(steps.number(a["lr"]))
        if most is None:
            return np.longdouble(1), np.longdouble(0)
        if any(x.vague.any() for x in mine):
            return None
        kept = [~x.skipped[:, None] & x.there for x in mine]
        squares = [np.where(k, lr * x.d, 0) ** 2 for k, x in zip(kept, mine, strict=True)]
        errors = [np.where(k, lr * x.error, 0) ** 2 for k, x in zip(kept, mine, strict=True)]
        weights = [np.where(np.isfinite(x.w), x.w, 0) ** 2 for x in mine]
        # What is lost, or too large, in float64, which is added up.
        for xs in (*squares, *weights):
            if xs.sum() > 1e290 or ((xs > 0) & (xs < 1e-290)).any():
                return None
        norm, off = (np.sqrt(sum((x.sum() for x in xs), np.longdouble(0))) for xs in (squares, errors))
        size = np.sqrt(sum((x.sum() for x in weights), np.longdouble(0)))
        bound = most * max(size, floor * np.sqrt(np.longdouble(sum(len(x.w) for x in mine))))
        length, off = scale * norm, (scale + vary) * off + vary * norm
        low, high = (bound / x if x > bound else np.longdouble(1) for x in (length + off, max(length - off, 0)))
        cap = bound / length if length > bound else np.longdouble(1)
        return cap, max(cap - low, high - cap) + 1e-13 * cap

    def of(self, i: int) -> tuple[Any, Any] | None:
        """The cap of parameter i, and its error."""
        return self.found[self.layers[i]]


def check(implementation: str, call: Call) -> None:
    # Products with shared inverses are the vendor's, which may divide them among threads.
    shared = any(x is not None and x.values.dim() == 4 for x in call.arguments["inverses"])
    outcome = call.run() if implementation == "reference" or shared else call.run_repeatably()
    if outcome is None:
        return
    a, (skipped, scale, caps) = call.arguments, outcome.result
    if steps.does_nothing(a):
        assert not skipped.any()
        assert scale == 1
        assert bool((caps == 1).all())
        steps.assert_untouched(outcome, a, (NAMES[0], NAMES[2]))
        return
    with np.errstate(all="ignore"):
        compare(call, outcome)


def compare(call: Call, outcome: Any) -> None:
    a, (skipped, found_scale, found_caps) = call.arguments, outcome.result
    layers = [_Joined(a, i) for i, inverse in enumerate(a["inverses"]) if inverse is not None]
    lr, decay, clip = steps.number(a["lr"]), a["weight_decay"], a["kl_clip"]
    total, off = (
        (sum(parts) for parts in zip(*(x.product(a["kl_along"] == "momentum") for x in layers), strict=True))
        if layers
        else (0, 0)
    )
    scale, vary = np.longdouble(1), np.longdouble(0)
    known = not any(x.vague.any() for x in layers)
    if clip is not None and lr:
        low, high = (max(abs(total) - off, 0) * lr * lr / clip, (abs(total) + off) * lr * lr / clip)
        # The sum, which is one in float64, may overflow though what becomes of it does not.
        known = known and max(high, abs(total) + off) < 1e290 and not 0 < high < 1e-290
        scale = min(scale, 1 / np.sqrt(abs(total) * lr * lr / clip)) if total else scale
        vary = max(scale - 1 / np.sqrt(max(high, 1)), 1 / np.sqrt(max(low, 1)) - scale) + 1e-14 * scale
    if known:
        assert_close("scale", found_scale, np.asarray(scale), vary + 1e-15)
    caps = _Caps(a, layers, scale, vary, known)
    for i, found_cap in enumerate(found_caps):
        if (wanted := caps.of(i)) is not None:
            assert_close(f"caps[{i}]", found_cap, np.asarray(wanted[0]), wanted[1])
    by_first = {x.first: x for x in layers}
    for i in range(len(a["params"])):
        layer = by_first.get(i)
        sure, most = (
            (int((layer.skipped & ~layer.vague).sum()), int((layer.skipped | layer.vague).sum())) if layer else (0, 0)
        )
        steps.skipped_within(f"skipped[{i}]", skipped[i], sure, most)
    for x in layers:
        u, tiny, half = unit(x.dtype), least(x.dtype), largest(x.dtype) / 4
        skip, vague = x.spread(x.skipped[:, None]), x.spread(x.vague[:, None])
        moment = np.where(skip, x.old, x.new)
        kept = a["momentum_buffers"][x.first].values.dtype
        off_moment = np.where(skip, 0, 6 * u * np.nan_to_num(x.size) + 3 * tiny + storing(moment, kept))
        d, error = x.spread(x.d), x.spread(x.error)
        cap, vary_cap = caps.of(x.first) or (np.longdouble(1), np.longdouble(0))
        along, off = scale * cap, vary * cap + (scale + vary) * vary_cap
        step = along * d + (decay * x.w if a["decoupled"] and decay else 0)
        size = np.abs(along * d) + (decay * np.abs(x.w) if a["decoupled"] and decay else 0)
        expected = np.where(skip, x.w, x.w - lr * step)
        bound = lr * (along * error + off * np.abs(d)) + 8 * u * (np.abs(x.w) + lr * size)
        bound = bound + tiny * (4 + np.abs(d) + lr * (1 + np.abs(x.w))) + storing(expected, x.dtype)
        bound = np.where(skip, 0, np.nan_to_num(bound, nan=0, posinf=0))
        hard = ~(lr * size < half) | (lr * decay > half) | (lr > half) | ~(bound < half)
        hard |= ~np.isfinite(expected) | (caps.of(x.first) is None)
        hard = vague | hard & ~skip
        begin = 0
        for k in x.members:
            shape = tuple(a["params"][k].values.shape)
            part = slice(begin, begin + math.prod(shape))
            begin = part.stop
            for name, want, give, odd in (
                ("momentum_buffers", moment, off_moment, vague),
                ("params", expected, bound, hard),
            ):
                want, give, odd = (v[part].reshape(shape) for v in (want, give, odd))
                assert_close(f"{name}[{k}]", outcome[name][k], want, give, unknown=odd)


def test_mbf_step(implementation: str, fuzz: Fuzz) -> None:
    fuzz(calls, partial(check, implementation))
