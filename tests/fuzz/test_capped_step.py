from __future__ import annotations

from functools import partial
from typing import Any

import hypothesis.strategies as st
import numpy as np
import torch

from tests.fuzz import steps
from tests.fuzz.calls import Call, Fuzz, surroundings, threads
from tests.fuzz.closeness import assert_close, largest, least, storing, unit
from tests.fuzz.operands import Draw, Operand, accumulator, laid, layouts, numbers, wide


@st.composite
def lists(draw: Draw, tiny: bool, names: dict[str, bool], written: str) -> dict[str, list[Any]]:
    """Tensors of up to three parameters. ``names`` says which have the dtype of the parameter."""
    made: dict[str, list[Any]] = {name: [] for name in names}
    for dtype in steps.dtypes(draw, draw(st.integers(0, 3))):
        shape = draw(steps.shapes(tiny))
        alike, same = draw(layouts(written=True, lazy=False)), draw(st.booleans())
        kept = {"momentum_buffers": torch.bfloat16} if dtype != torch.float64 and draw(st.booleans()) else {}
        for k, (name, narrow) in enumerate(names.items()):
            values = draw(numbers()).fill(shape, dtype if narrow else kept.get(name, accumulator(dtype)), k)
            made[name].append(laid(values, alike if same else draw(layouts(written=name == written))))
    return made


def arrays(a: dict[str, Any], *names: str) -> Any:
    """The tensors of each parameter in numpy's widest format, after the dtype of the parameter."""
    for xs in zip(*(a[name] for name in names), strict=True):
        yield xs[0].values.dtype, *(wide(x.values).astype(np.longdouble) for x in xs)


# heavy_ball_


@st.composite
def momentum_calls(draw: Draw, tiny: bool) -> Call:
    made = draw(lists(tiny, {"params": True, "grads": True, "momentum_buffers": False}, "momentum_buffers"))
    options = draw(steps.options())
    options.pop("decoupled")
    arguments = {
        **made,
        "momentum": draw(st.sampled_from(steps.BETAS)),
        "weight_decay": draw(st.sampled_from(steps.DECAYS)),
        **options,
    }
    return Call("heavy_ball_", arguments, frozenset(("momentum_buffers",)), draw(surroundings), draw(threads))


def check_momentum(implementation: str, call: Call) -> None:
    outcome = call.run() if implementation == "reference" else call.run_repeatably()
    if outcome is None:
        return
    a, skipped = call.arguments, outcome.result
    assert skipped.shape == (len(a["params"]),)
    if steps.does_nothing(a):
        assert not skipped.any()
        steps.assert_untouched(outcome, a, ("momentum_buffers",))
        return
    scale, sign = steps.number(a.get("grad_scale", 1.0)), -1 if a["maximize"] else 1
    with np.errstate(all="ignore"):
        for i, (dtype, w, g, m) in enumerate(arrays(a, "params", "grads", "momentum_buffers")):
            terms = [np.longdouble(a["momentum"]) * m, sign * g / scale]
            if a["weight_decay"]:
                terms.append(np.longdouble(a["weight_decay"]) * w)
            new, size = sum(terms), sum(map(np.abs, terms))
            half = largest(dtype)
            kept = ~np.isfinite(new) | (np.abs(new) > 2 * half)
            near = np.isfinite(new) & (size > half)  # perhaps left out, perhaps not
            steps.skipped_within(f"skipped[{i}]", skipped[i], int((kept & ~near).sum()), int((kept | near).sum()))
            bound = np.where(kept, 0, 8 * unit(dtype) * np.nan_to_num(size) + 4 * least(dtype) * (1 + 1 / scale))
            bound = bound + np.where(kept, 0, storing(new, a["momentum_buffers"][i].values.dtype))
            expected = np.where(kept, m, new)
            assert_close(f"momentum_buffers[{i}]", outcome["momentum_buffers"][i], expected, bound, unknown=near)


def test_heavy_ball(implementation: str, fuzz: Fuzz) -> None:
    fuzz(momentum_calls, partial(check_momentum, implementation))


# direction_sums


@st.composite
def sums_calls(draw: Draw, tiny: bool) -> Call:
    made = draw(lists(tiny, {"params": True, "directions": False, "momentum_buffers": False}, ""))
    arguments: dict[str, Any] = {**made, "products": draw(st.booleans()), "weights": draw(st.booleans())}
    if draw(st.booleans()):
        counts = [draw(st.sampled_from((0, 0, 1, 2**40))) for _ in made["params"]]
        arguments["skipped"] = Operand(torch.tensor(counts, dtype=torch.int64))
    return Call("direction_sums", arguments, frozenset(), draw(surroundings), draw(threads))


def check_sums(implementation: str, call: Call) -> None:
    outcome = call.run() if implementation == "reference" else call.run_repeatably()
    if outcome is None:
        return
    a, found = call.arguments, outcome.result
    assert found.dtype == torch.float64
    assert found.shape == (len(a["params"]), 3)
    skipped = a["skipped"].values.tolist() if "skipped" in a else [0] * len(a["params"])
    with np.errstate(all="ignore"):
        for i, (_, w, d, m) in enumerate(arrays(a, "params", "directions", "momentum_buffers")):
            products = (d * m if a["products"] else 0 * np.ones_like(d), d * d, w * w if a["weights"] else 0 * d)
            for k, x in enumerate(products):
                wanted = k == 1 or a[("products", "", "weights")[k]]
                expected = np.asarray(x.sum() if wanted else np.longdouble(0))
                if skipped[i]:
                    expected = np.asarray(np.longdouble(np.nan))
                size = np.nan_to_num(np.abs(x).sum()) if wanted else 0
                bound = 2.0**-52 * (d.size + 2) * size + d.size * 2.0**-1074
                beyond = bool(wanted and not skipped[i] and np.isfinite(expected) and size > 1e307)
                assert_close(f"sums[{i}, {k}]", found[i, k], expected, bound, unknown=beyond)


def test_direction_sums(implementation: str, fuzz: Fuzz) -> None:
    fuzz(sums_calls, partial(check_sums, implementation))


# capped_step_

_SUMS = (0.0, 1.0, -3.0, 1e-30, 1e30, -1e20, 1e100, np.nan, np.inf)


@st.composite
def step_calls(draw: Draw, tiny: bool) -> Call:
    made = draw(lists(tiny, {"params": True, "directions": False}, "params"))
    count = len(made["params"])
    some = st.sampled_from(_SUMS)
    rows = [[draw(some), abs(draw(some)), abs(draw(some))] for _ in range(count)]
    layers = [0]
    for _ in range(count):
        layers.append(layers[-1] + draw(st.integers(0, 1)))

    def one_or_each(values: Any) -> Any:
        return [draw(values) for _ in range(count)] if count and draw(st.booleans()) else draw(values)

    arguments: dict[str, Any] = {
        **made,
        "sums": Operand(torch.tensor(rows, dtype=torch.float64).view(count, 3)),
        "layers": layers[:count],
        "lr": one_or_each(steps.rates),
        "weight_decay": one_or_each(st.sampled_from(steps.DECAYS)),
        "kl_clip": draw(st.sampled_from((None, 1e-3, 1.0, 1e-30))),
        "max_relative_step": one_or_each(st.sampled_from((None, 0.02, 1.0, 1e-20))),
        "floor": one_or_each(st.sampled_from((1e-3, 0.0, 1.0, 1e10))),
    }
    if draw(st.integers(0, 3)) == 3:
        arguments["found_inf"] = Operand(torch.full((1,), draw(st.sampled_from((0.0, 0.0, 1.0)))))
    return Call("capped_step_", arguments, frozenset(("params",)), draw(surroundings), draw(threads))


def check_step(implementation: str, call: Call) -> None:
    outcome = call.run() if implementation == "reference" else call.run_repeatably()
    if outcome is None:
        return
    a, (scale, factors, skipped) = call.arguments, outcome.result
    count, layers = len(a["params"]), a["layers"]
    assert scale.shape == ()
    assert factors.shape == (len(set(layers)),)
    assert skipped.shape == (count,)
    if steps.does_nothing(a):
        assert float(scale) == 1
        assert bool((factors == 1).all())
        assert not skipped.any()
        steps.assert_untouched(outcome, a, ("params",))
        return
    with np.errstate(all="ignore"):
        compare(a, outcome)


def compare(a: dict[str, Any], outcome: Any) -> None:
    count, layers, (scale, factors, skipped) = len(a["params"]), np.asarray(a["layers"], dtype=int), outcome.result
    rates = np.array([steps.number(x) for x in _each(a["lr"], count)], dtype=np.longdouble)
    decays = np.array(_each(a["weight_decay"], count), dtype=np.longdouble)
    caps = np.array([np.inf if x is None else x for x in _each(a["max_relative_step"], count)], dtype=np.longdouble)
    floors = np.array(_each(a["floor"], count), dtype=np.longdouble)
    rows = a["sums"].values.numpy().astype(np.longdouble)
    sizes = np.array([w.values.numel() for w in a["params"]], dtype=np.longdouble)
    good = [i for i in range(count) if np.isfinite(rows[layers == layers[i]]).all()]
    products = rates[good] ** 2 * rows[good, 0]
    total, magnitude = abs(products.sum()), np.abs(products).sum()
    clip = a["kl_clip"]
    nu = np.longdouble(1) if clip is None or total <= clip else np.sqrt(clip / total)
    # What cancels leaves a rounding error of any size; near the range of float64 sums may be infinite.
    vague = clip is not None and (magnitude > 1e10 * total or magnitude > 1e300)
    spread = 1e-14 * (1 + magnitude / total if total else 1)
    assert_close("scale", scale, np.asarray(nu), spread * nu, unknown=vague)
    for layer in range(len(factors)):
        mine = np.flatnonzero(layers == layer)
        if mine[0] not in good:
            assert float(factors[layer]) == 0
            for i in mine:
                assert int(skipped[i]) == int(sizes[i])
                found, before = outcome["params"][i].resolve_neg(), a["params"][i].values
                assert bool(((found == before) | (found.isnan() & before.isnan())).all())
            continue
        assert not skipped[mine].any()
        if vague:
            continue
        length = nu * np.sqrt((rates[mine] ** 2 * rows[mine, 1]).sum())
        limit = caps[mine].min() * max(np.sqrt(rows[mine, 2].sum()), floors[mine].min() * np.sqrt(sizes[mine].sum()))
        factor = limit / length if length > limit else np.longdouble(1)
        extreme = bool((rates[mine] ** 2 * rows[mine, 1] > 1e300).any() or (length > 0 and nu < 1e-290))
        assert_close(f"factors[{layer}]", factors[layer], np.asarray(factor), 4 * spread * factor, unknown=extreme)
        if extreme:
            continue
        for i, (dtype, w, d) in enumerate(arrays(a, "params", "directions")):
            if i not in mine:
                continue
            along, shrinkage = rates[i] * nu * factor, rates[i] * decays[i]
            terms = [w, along * d] + ([shrinkage * w] if decays[i] else [])
            expected = w - sum(terms[1:])
            size = sum(map(np.abs, terms))
            u, tiny, half = unit(dtype), least(dtype), largest(dtype) / 4
            bound = (8 * u + 8 * spread) * size + tiny * (4 + np.abs(d) + np.abs(w))
            bound = np.nan_to_num(bound + storing(expected, dtype))
            # A coefficient beyond the range of its dtype, or below it, is not what the definition multiplies by.
            hard = ~(size < half) | (max(along, shrinkage) > half)
            hard |= 0 < along < 4e6 * tiny or 0 < shrinkage < 4e6 * tiny
            assert_close(f"params[{i}]", outcome["params"][i], expected, bound, unknown=hard | ~np.isfinite(expected))


def _each(value: Any, count: int) -> list[Any]:
    return value if isinstance(value, list) else [value] * count


def test_capped_step(implementation: str, fuzz: Fuzz) -> None:
    fuzz(step_calls, partial(check_step, implementation))
