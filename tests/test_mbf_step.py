"""mbf_step_ against its definition in float64."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

from fisher_kernels import backends, use_backend
from fisher_kernels._library import native_module
from fisher_kernels.ops import ACCUMULATOR, mbf_step
from fisher_kernels.ops._blocks import pack
from fisher_kernels.ops._step import rates_of
from tests.cases import (
    DTYPES,
    LAYOUTS_OF_A_STEP,
    WRITABLE_LAYOUTS,
    channels_last,
    contiguous,
    layouts_of_a_step,
    sliced,
    spread,
    unaligned,
)
from tests.cases.mbf_step import NAMES, PARAMETERS, Parameter, Step, packed, step, unpack
from tests.cases.steps import SHORT_IN_TURN, around_ties
from tests.comparison import assert_same_bits, assert_within, surroundings, unit_roundoff
from tests.interpreted import interpreted

pytestmark = pytest.mark.usefixtures("poisoned_memory", "one_thread")

_NATIVE = native_module()
CPU = [] if _NATIVE is None else [f"cpu-{name}" for name in _NATIVE.capabilities()]
"""The native kernels, once for every instruction set of this processor."""

# Every kind of inverse, with and without a bias, for tests whose subject is another.
SOME = (
    Parameter((4, 3, 3, 3), (12, 9, 9)),
    packed((4, 3, 3, 3), 12, 9),
    Parameter((50,), (50, 1, 1)),
    Parameter((2, 33), (2, 33, 33)),
    Parameter((5,), (5, 2, 2)),
    Parameter((5,), None),
    packed((6, 4), 6, 5),
    Parameter((6,), None),
    Parameter((7, 11), (1, 4, 3, 3)),
    Parameter((7,), None),
    Parameter((3, 2, 2), (1, 1, 5, 5)),
)

# Triton's interpreter takes a hundredth of a second and more for a program: every kind for it too, of small sizes.
INTERPRETED = (
    Parameter((3, 5, 1), (15, 1, 1)),
    Parameter((5, 13, 3, 3), (65, 9, 9)),  # more than a program holds
    packed((4, 3, 3, 3), 12, 9),
    packed((5, 17), 5, 17),
    Parameter((2, 3, 2, 6), (8, 9, 9)),
    Parameter((3, 49), (3, 49, 49)),
    Parameter((), (1, 1, 1, 1)),
    Parameter((0, 4), (0, 4, 4)),
    Parameter((9,), (9, 2, 2)),
    Parameter((9,), None),
    packed((6, 4), 6, 5),
    Parameter((6,), None),
    Parameter((0, 2), (0, 3, 3)),
    Parameter((0,), None),
    Parameter((4, 12), (1, 5, 3, 3)),
    Parameter((4,), None),
    Parameter((2, 700), (1, 1, 701, 701)),  # a block longer than what a program holds
    Parameter((2,), None),
)
FEW = (
    Parameter((2, 3, 2, 6), (8, 9, 9)),
    Parameter((6,), (6, 1, 1)),
    packed((6, 4), 6, 5),
    Parameter((6,), None),
    Parameter((4, 12), (1, 5, 3, 3)),
    Parameter((4,), None),
)


def parameters_for(
    implementation: str,
    interpreted: Sequence[Parameter] = INTERPRETED,
    native: Sequence[Parameter] = PARAMETERS,
    cuda: Sequence[Parameter] = PARAMETERS,
) -> Sequence[Parameter]:
    return {"triton": interpreted, "cuda": cuda}.get(implementation, native)


def scalar(value: float, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.tensor(value, dtype=dtype)


# The definition, written from the formulas, and the rounding that is allowed beside it.


def bias_of(case: Step, i: int) -> bool:
    return i + 1 < len(case.params) and case.inverses[i + 1] is None


Place = tuple[int, int]  # a parameter and an element of it in row-major order


def places(case: Step, i: int) -> list[tuple[Any, list[Place | None]]]:
    """The blocks of inverse i, each a matrix and the elements it acts on, None for a column that is not there."""
    inverse, param = case.inverses[i], case.params[i]
    assert inverse is not None
    rows = param.shape[0] if param.dim() else 1
    width = math.prod(param.shape[1:])
    table: list[list[Place | None]] = [[(i, r * width + c) for c in range(width)] for r in range(rows)]
    if bias_of(case, i):
        rows = case.params[i + 1].numel()
        width = param.numel() // max(1, rows)
        table = [[*((i, r * width + c) for c in range(width)), (i + 1, r)] for r in range(rows)]
    if inverse.dim() == 4:
        n = inverse.shape[-1]
        return [
            (inverse[0, s], (row[s * n : (s + 1) * n] + [None] * n)[:n])
            for row in table
            for s in range(inverse.shape[1])
        ]
    matrices = inverse if inverse.dim() == 3 else unpack(inverse)
    n = matrices.shape[-1]
    flat = list(itertools.chain(*table))
    return [(matrix, flat[b * n : (b + 1) * n]) for b, matrix in enumerate(matrices)]


def of_each(case: Step, name: str, default: float | None = None) -> list[float]:
    """A setting of each parameter."""
    value = case.options.get(name, default)
    return [float(x) for x in (value if isinstance(value, list) else [value] * len(case.params))]


def layers_of(case: Step) -> list[int]:
    """The layer of each parameter: as the call says, or a number for each inverse."""
    own = [i - (inverse is None) for i, inverse in enumerate(case.inverses)]
    return case.options.get("layers") or own


def naive(case: Step) -> tuple[list[Tensor], list[Tensor], float, list[float]]:
    """The parameters, the momentum, the scale and the caps after the step, number after number in float64."""
    o, lr, weight_decay = case.options, of_each(case, "lr"), of_each(case, "weight_decay")
    params, grads, moments = ([x.double().flatten().tolist() for x in tensors] for tensors in case.lists()[:3])
    directions, total = [[0.0] * len(p) for p in params], 0.0
    for i in range(len(params)):
        for matrix, block in places(case, i) if case.inverses[i] is not None else ():
            entries = matrix.double().tolist()
            m, gs = [0.0] * len(block), [0.0] * len(block)
            for k, place in enumerate(block):
                if place is not None:
                    p, e = place
                    g = grads[p][e] / (1.0 if o.get("grad_scale") is None else float(o["grad_scale"]))
                    g = -g if o["maximize"] else g
                    gs[k] = g + (0.0 if o["decoupled"] else weight_decay[p] * params[p][e])
                    m[k] = moments[p][e] = o["momentum"] * moments[p][e] + gs[k]
            for k, place in enumerate(block):
                if place is not None:
                    p, e = place
                    directions[p][e] = sum(entries[k][j] * m[j] for j in range(len(block)))
                    total += lr[p] ** 2 * directions[p][e] * (gs if o.get("kl_along") == "gradient" else m)[k]
    clip, most = o.get("kl_clip"), o.get("max_relative_step")
    scale = 1.0 if clip is None or total == 0 else min(1.0, math.sqrt(clip / abs(total)))
    layers, floors = layers_of(case), of_each(case, "floor", 1e-3)
    caps = dict.fromkeys(layers, 1.0)
    for layer in caps if most is not None else ():
        members = [p for p, of in enumerate(layers) if of == layer]
        size = math.sqrt(sum(w * w for p in members for w in params[p]))
        length = math.sqrt(sum((scale * lr[p] * d) ** 2 for p in members for d in directions[p]))
        least = min(floors[p] for p in members) * math.sqrt(sum(len(params[p]) for p in members))
        bound = most * max(size, least)
        caps[layer] = bound / length if length > bound else 1.0
    for p, (weights, along) in enumerate(zip(params, directions, strict=True)):
        for e, d in enumerate(along):
            decay = weight_decay[p] * weights[e] if o["decoupled"] else 0.0
            weights[e] -= lr[p] * (scale * caps[layers[p]] * d + decay)

    def like(values: Sequence[Sequence[float]]) -> list[Tensor]:
        return [torch.tensor(v, dtype=torch.float64).view(x.shape) for v, x in zip(values, case.params, strict=True)]

    return like(params), like(moments), scale, [caps[layer] for layer in layers]


class Sizes:
    """What is added up, in absolute values, on the way to the results of a step."""

    def __init__(self, case: Step) -> None:
        o, lr, decays = case.options, of_each(case, "lr"), of_each(case, "weight_decay")
        absolute = case.map(lambda x: x.double().abs())
        u = unit_roundoff(torch.float64)
        roundings = 0.0
        self.weights, self.gradients, self.moments = absolute.params, absolute.grads, absolute.momentum_buffers
        if o.get("grad_scale") is not None:
            self.gradients = [g / o["grad_scale"].double().abs() for g in self.gradients]
        if not o["decoupled"]:
            both = zip(self.gradients, self.weights, decays, strict=True)
            self.gradients = [g + decay * w for g, w, decay in both]
        self.moments = [o["momentum"] * m + g for m, g in zip(self.moments, self.gradients, strict=True)]
        # The step of magnitudes in float64, with a rate of -1 and no weights, leaves |P| |m| in the parameters.
        magnitude = Step(
            [torch.zeros_like(w) for w in self.weights],
            [-m for m in self.moments],
            [torch.zeros_like(m) for m in self.moments],
            absolute.inverses,
            {"lr": 1.0, "momentum": 0.0, "weight_decay": 0.0, "decoupled": False, "maximize": False},
        )
        with use_backend("reference"):
            magnitude.run()
        self.directions = magnitude.params
        self.roundings = []  # of each direction, in units of its size
        for i, p in enumerate(case.params):
            inverse = case.inverses[i]
            n = self.roundings[-1] - 10 if inverse is None else 0 if inverse.dim() == 2 else inverse.shape[-1]
            if inverse is not None and inverse.dim() == 2:
                n = unpack(inverse[:1]).shape[-1]
            self.roundings.append(n + 10)
            u = max(u, unit_roundoff(ACCUMULATOR[p.dtype]))
        self.sum = 0.0
        error = 0.0
        along = self.gradients if o.get("kl_along") == "gradient" else self.moments
        for d, g, n, rate in zip(self.directions, along, self.roundings, lr, strict=True):
            self.sum += rate**2 * float((d * g).sum())
            error += rate**2 * 2 * u * (n + 4) * float((d * g).sum())
            roundings += d.numel()
        self.sum_error = error + 2 * unit_roundoff(torch.float64) * roundings * self.sum


def bounds(case: Step, scale: float, caps: Sequence[float]) -> tuple[list[Tensor], list[Tensor], float, list[float]]:
    """How far parameters, momentum, scale and caps may lie from their definition after the step from ``case``.

    In the dtype of the momentum: 6 roundings of its terms (scale, decay, products, sums); n products and sums on the
    way to a direction; 4 more to the change and one as it is taken off; 4 of the decoupled decay. The definition in
    float64 rounds as often: twice all that. The scale inherits the error of the sum of <d, m>, which cancellation
    amplifies; a cap inherits that of the scale and that of |lr d|. Then half a unit in the last place of the
    parameter's own dtype, and of the momentum's as it is kept. Numbers below the normal ones may be lost.
    """
    o, size, rates, decays = case.options, Sizes(case), of_each(case, "lr"), of_each(case, "weight_decay")
    of_scale = 0.0
    if o.get("kl_clip") is not None and any(rates):
        # d scale / d sum = scale / (2 sum), with the sum kl_clip / scale^2 where the clip is active.
        least = o["kl_clip"] / scale**2 if scale < 1 else o["kl_clip"]
        assert size.sum_error < least / 4, "a sum that is all rounding"
        of_scale = scale * size.sum_error / least + 4 * unit_roundoff(torch.float64)
    of_caps = [0.0] * len(caps)
    if o.get("max_relative_step") is not None:
        of_caps = cap_errors(case, size, scale, of_scale, caps)
    params, moments = [], []
    for i, p in enumerate(case.params):
        wide = ACCUMULATOR[p.dtype]
        u, tiny = unit_roundoff(wide), torch.finfo(wide).smallest_normal
        moment, kept = 2 * u * 6 * size.moments[i] + tiny, case.momentum_buffers[i].dtype
        if kept != wide:
            stored = unit_roundoff(kept) * (size.moments[i] + moment)
            moment = moment + stored + torch.finfo(kept).smallest_normal * 2**-8
        moments.append(moment)
        lr = rates[i]
        change = lr * scale * caps[i] * size.directions[i]
        decay = lr * decays[i] * size.weights[i] if o["decoupled"] else torch.zeros_like(change)
        largest = size.weights[i] + change + decay
        bound = 2 * u * (size.roundings[i] * change + 4 * decay + largest)
        bound = bound + lr * (caps[i] * of_scale + scale * of_caps[i]) * size.directions[i]
        bound = bound + tiny * size.roundings[i]
        if p.dtype != wide:
            bound = bound + unit_roundoff(p.dtype) * (largest + bound) + torch.finfo(p.dtype).smallest_normal * 2**-8
        params.append(bound)
    return params, moments, of_scale, of_caps


def cap_errors(case: Step, size: Sizes, scale: float, of_scale: float, caps: Sequence[float]) -> list[float]:
    """How far the cap of each parameter may be off: by the errors of |lr d|, of the scale and of a few roundings.

    |lr d| is off by at most the norm of the errors of d; where a layer is capped, scale |lr d| is bound / cap.
    """
    o, rates, layers = case.options, of_each(case, "lr"), layers_of(case)
    floors, u = of_each(case, "floor", 1e-3), 64 * unit_roundoff(torch.float64)
    errors = []
    for i, layer in enumerate(layers):
        members = [p for p, of in enumerate(layers) if of == layer]
        weight = math.sqrt(sum(float(size.weights[p].square().sum()) for p in members))
        count = sum(size.weights[p].numel() for p in members)
        bound = o["max_relative_step"] * max(weight, min(floors[p] for p in members) * math.sqrt(count))
        off = [
            rates[p] * 2 * unit_roundoff(ACCUMULATOR[case.params[p].dtype]) * size.roundings[p] * size.directions[p]
            for p in members
        ]
        error = math.sqrt(sum(float(x.square().sum()) for x in off))
        # cap = bound / length: d cap = cap d length / length, with a length of at least bound where it may be active.
        least = bound / caps[i] / scale if bound and scale else math.inf
        errors.append(caps[i] * (error / least + of_scale / scale + u * math.sqrt(1 + count)) if scale else 0.0)
    return errors


def defined(case: Step) -> tuple[Step, Tensor, Tensor]:
    """The step in float64 on the reference: what it leaves, the counts and the scale."""
    return defined_with_caps(case)[:3]


def defined_with_caps(case: Step) -> tuple[Step, Tensor, Tensor, Tensor]:
    """The same, and the caps."""
    result = case.double()
    with use_backend("reference"):
        return (result, *result.run_with_caps())


def check(case: Step) -> Step:
    """Takes the step and compares all it did with the definition; returns the arguments as they are afterwards."""
    expected, skipped, scale, caps = defined_with_caps(case)
    before, after = case.copy(), case
    found, found_scale, found_caps = after.run_with_caps()
    assert_same_bits(found, skipped, "skipped")
    assert_step(after, found_scale, expected, scale, before, found_caps, caps)
    for i, name in itertools.product(range(len(before.params)), ("params", "momentum_buffers")):
        now, then = (surroundings(getattr(s, name)[i]) for s in (after, before))
        assert_same_bits(now, then, f"memory around {name}[{i}]")
    assert_unchanged(after, before, ("grads", "inverses"))
    return after


def assert_step(
    after: Step,
    scale: Tensor,
    expected: Step,
    expected_scale: Tensor,
    before: Step,
    caps: Tensor | None = None,
    expected_caps: Tensor | None = None,
) -> None:
    """``after`` is ``expected``, to the rounding of a step from ``before``."""
    wanted = [1.0] * len(before.params) if expected_caps is None else expected_caps.tolist()
    of_params, of_moments, of_scale, of_caps = bounds(before, float(expected_scale), wanted)
    assert scale.dtype == torch.float64
    if caps is not None:
        assert caps.dtype == torch.float64
        for i, (cap, want, bound) in enumerate(zip(caps.tolist(), wanted, of_caps, strict=True)):
            assert abs(cap - want) <= bound, f"caps[{i}] is {cap}, expected {want} within {bound}"
    assert_within(scale, expected_scale, of_scale, "scale")
    for i, param in enumerate(after.params):
        what = f"[{i}] of shape {tuple(param.shape)}"
        assert_within(after.momentum_buffers[i], expected.momentum_buffers[i], of_moments[i], f"momentum_buffers{what}")
        assert_within(param, expected.params[i], of_params[i], f"params{what}")


def assert_unchanged(after: Step, before: Step, names: Sequence[str] = NAMES, around: bool = True) -> None:
    for name in names:
        for i, (now, then) in enumerate(zip(getattr(after, name), getattr(before, name), strict=True)):
            if isinstance(now, Tensor) and now.device.type == "cpu":
                assert_same_bits(now, then, f"{name}[{i}]")
                if around:
                    assert_same_bits(surroundings(now), surroundings(then), f"memory around {name}[{i}]")


OPTIONS: tuple[dict[str, Any], ...] = (
    {},
    {"weight_decay": 0.1},
    {"weight_decay": 0.1, "decoupled": True, "kl_clip": 1e-3},
    {"maximize": True, "weight_decay": 0.1, "kl_clip": 0.01},
    {"maximize": True, "weight_decay": 0.1, "decoupled": True, "grad_scale": scalar(3.0)},
    {"momentum": 0.0, "grad_scale": scalar(1024.0, torch.float64)},
    {"momentum": 0.99, "found_inf": scalar(0.0), "kl_clip": 1e6},
    {"lr": 0.0, "weight_decay": 0.1, "decoupled": True, "kl_clip": 1e-3},
    {"maximize": True, "weight_decay": 0.1, "kl_clip": 0.01, "kl_along": "gradient"},
    {"weight_decay": 0.1, "decoupled": True, "max_relative_step": 0.01},
    {"kl_clip": 0.1, "max_relative_step": 1e-3, "floor": 2.0, "grad_scale": scalar(3.0)},
)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_definition(options: dict[str, Any]) -> None:
    """The reference in float64 is what the formulas say, number after number."""
    large = [math.prod(p.inverse or ()) > 10_000 for p in PARAMETERS]
    chosen = [p for i, p in enumerate(PARAMETERS) if not large[i - (p.inverse is None)]]
    case = step(chosen, torch.float64, **options)
    after, skipped, scale, caps = defined_with_caps(case)
    assert skipped.tolist() == [0] * len(chosen)
    params, moments, expected_scale, expected_caps = naive(case)
    expected = Step(params, case.grads, moments, case.inverses, case.options)
    wanted = torch.tensor(expected_caps, dtype=torch.float64)
    assert_step(after, scale, expected, scalar(expected_scale, torch.float64), case, caps, wanted)
    assert (float(scale) < 1) == (options.get("kl_clip") in (1e-3, 0.01, 0.1) and options.get("lr") != 0.0)
    assert bool(caps.lt(1).any()) == ("max_relative_step" in options)


@pytest.mark.parametrize(
    "wrong",
    [
        {"lr": 0.01 * (1 + 1e-4)},
        {"momentum": 0.9 + 1e-5},
        {"weight_decay": 0.1 * (1 + 1e-4)},
        {"decoupled": True},
        {"maximize": True},
        {"kl_clip": 1e-3},
        {"max_relative_step": 1e-3},
        {"grad_scale": scalar(1 + 1e-4)},
    ],
    ids=str,
)
def test_allowed_rounding_has_teeth(implementation: str, wrong: dict[str, Any]) -> None:
    case = step(SOME, torch.float32, weight_decay=0.1)
    expected, _, scale = defined(case)
    slipped = case.copy()
    slipped.options.update(wrong)
    slipped.run()
    with pytest.raises(AssertionError, match="entries are off"):
        assert_step(slipped, scale, expected, scale, case)


# Every implementation against the definition.


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_step(implementation: str, options: dict[str, Any], dtype: torch.dtype) -> None:
    cuda = PARAMETERS if dtype == torch.float32 else INTERPRETED
    check(step(parameters_for(implementation, cuda=cuda), dtype, **options))


@pytest.mark.slow_interpreted
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_momentum_in_16_bits(implementation: str, options: dict[str, Any]) -> None:
    some = parameters_for(implementation, cuda=INTERPRETED)
    check(step(some, DTYPES, moments=SHORT_IN_TURN, **options))


@pytest.mark.slow_interpreted
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", OPTIONS[:3], ids=str)
def test_inverses_stored_in_bfloat16(implementation: str, options: dict[str, Any], dtype: torch.dtype) -> None:
    cuda = PARAMETERS if dtype == torch.float32 else INTERPRETED
    moments = SHORT_IN_TURN if implementation == "triton" else None
    check(step(parameters_for(implementation, cuda=cuda), dtype, moments=moments, storage=torch.bfloat16, **options))


@pytest.mark.slow_interpreted
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_mixed_dtypes(implementation: str, dtype: torch.dtype) -> None:
    first = DTYPES.index(dtype)
    dtypes = DTYPES[first:] + DTYPES[:first]
    check(step(parameters_for(implementation), dtypes, weight_decay=0.1, decoupled=True, kl_clip=1e-3))


def test_no_parameters(implementation: str) -> None:
    for options in ({}, {"kl_clip": 1.0}):
        skipped, scale = step((), torch.float32, **options).run()
        assert_same_bits(skipped, torch.zeros(0, dtype=torch.int64))
        assert_same_bits(scale, torch.ones((), dtype=torch.float64))


@st.composite
def parameters(draw: st.DrawFn) -> list[Parameter]:
    rows, width, biased = draw(st.integers(1, 30)), draw(st.integers(1, 40)), draw(st.booleans())
    columns = width + biased
    kind = draw(st.sampled_from(["blocks", "packed", "shared"]))
    n = draw(st.integers(1, columns + 2)) if kind == "shared" else columns
    shape = {
        "blocks": (rows, n, n),
        "packed": (rows, n * (n + 1) // 2),
        "shared": (1, -(-columns // n), n, n),
    }[kind]
    return [Parameter((rows, width), shape), *([Parameter((rows,), None)] if biased else [])]


@pytest.mark.slow_interpreted
@hypothesis.given(
    chosen=st.lists(parameters(), max_size=3),
    layout=st.sampled_from([contiguous, sliced]),
    dtype=st.sampled_from(DTYPES),
    storage=st.sampled_from([None, torch.bfloat16]),
)
def test_any_inverses(
    implementation: str,
    chosen: list[list[Parameter]],
    layout: Callable[[Tensor], Tensor],
    dtype: torch.dtype,
    storage: torch.dtype | None,
) -> None:
    drawn = chosen[:1] if implementation == "triton" else chosen
    check(step(list(itertools.chain(*drawn)), dtype, layout=layout, moments=SHORT_IN_TURN, storage=storage))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("of", "layout"), LAYOUTS_OF_A_STEP)
def test_layouts_do_not_show(
    implementation: str, of: str, layout: Callable[[Tensor], Tensor], dtype: torch.dtype
) -> None:
    """The same bits wherever the elements of each lie, and no other bits around them."""
    some = parameters_for(implementation, FEW, cuda=INTERPRETED)
    layouts = layouts_of_a_step(of, layout)
    case = step(some, dtype, **layouts, moments=SHORT_IN_TURN, weight_decay=0.1, kl_clip=1e-3)
    plain = case.copy()
    plain.params, plain.grads, plain.momentum_buffers = ([contiguous(x) for x in xs] for xs in case.lists()[:3])
    around = [[surroundings(x) for x in tensors] for tensors in (case.params, case.momentum_buffers)]
    assert_same_bits(case.run()[1], plain.run()[1])
    assert_unchanged(case, plain, around=False)
    now = [[surroundings(x) for x in tensors] for tensors in (case.params, case.momentum_buffers)]
    for x, y in zip(itertools.chain(*now), itertools.chain(*around), strict=True):
        assert_same_bits(x, y, "the memory around")


@pytest.mark.parametrize("layout", WRITABLE_LAYOUTS.values())
def test_layouts_of_all_at_once(implementation: str, layout: Callable[[Tensor], Tensor]) -> None:
    some = parameters_for(implementation, FEW, cuda=INTERPRETED)
    check(step(some, DTYPES, layout=layout, moments=SHORT_IN_TURN, weight_decay=0.1))


@pytest.mark.slow_interpreted
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_whole_numbers_are_exact(implementation: str, dtype: torch.dtype) -> None:
    """Small whole numbers and powers of two everywhere: every intermediate result fits, so nothing is rounded."""
    some = parameters_for(implementation)
    case = step(some, dtype, lr=1.0, momentum=0.5, weight_decay=1.0, kl_clip=1e9)
    for k, tensors in enumerate(case.lists()[:3]):
        for x in tensors:
            x.copy_(torch.arange(x.numel()).remainder(3 + k).sub(1).mul(1 + (k == 2)).view(x.shape))
    for x in case.inverses:
        if x is not None and x.dim() == 2:
            x.copy_(torch.arange(x.numel()).remainder(5).sub(2).view(x.shape) * (x.shape[1] < 60))
        elif x is not None:
            y = torch.arange(x.numel()).remainder(3).sub(1).view(x.shape).tril() * (x.shape[-1] < 12)
            x.copy_(y + y.tril(-1).mT)
    expected, _, _ = defined(case)
    case.run()
    for i, parameter in enumerate(some):
        assert_within(case.params[i], expected.params[i], 0.0, f"{parameter}")
        assert_within(case.momentum_buffers[i], expected.momentum_buffers[i], 0.0, f"{parameter}")


@pytest.mark.slow_interpreted
def test_lr_may_be_a_tensor(implementation: str) -> None:
    plain = step(SOME, DTYPES, lr=0.0078125, weight_decay=0.1, decoupled=True, kl_clip=1e-3)
    for lr in (scalar(0.0078125), scalar(0.0078125, torch.float64), torch.tensor([[0.0078125]])):
        case, expected = plain.copy(), plain.copy()
        case.options["lr"] = lr
        case.run()
        assert float(lr) == 0.0078125
        expected.run()
        assert_unchanged(case, expected)


def test_packed_and_whole_blocks_agree(implementation: str) -> None:
    """A packed inverse is a way of storing it; so is bfloat16, at 2^-8 of each entry at most."""
    rows, n = (60 if implementation == "triton" else 1200), 9
    shape = (rows, 3, 3)
    whole = step([Parameter(shape, (rows, n, n))], torch.float32, lr=1.0, momentum=0.0)
    whole.params[0].zero_()
    small, short = whole.copy(), whole.copy()
    assert whole.inverses[0] is not None
    small.inverses[0] = pack(whole.inverses[0])
    short.inverses[0] = whole.inverses[0].bfloat16()
    for case in (whole, small, short):
        case.run()
    size = torch.einsum("bij,bj->bi", whole.inverses[0].double().abs(), whole.grads[0].double().abs().view(-1, n))
    rounding = 2 * 2 * n * unit_roundoff(torch.float32) * size.view(shape)
    assert_within(small.params[0], whole.params[0].double(), rounding, "packed")
    stored = unit_roundoff(torch.bfloat16) * size.view(shape)
    assert_within(short.params[0], whole.params[0].double(), stored + rounding, "bfloat16")
    assert bool((short.params[0] != whole.params[0]).any())


@pytest.mark.parametrize("implementation", CPU, indirect=True)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_packed_blocks_are_multiplied_in_the_order_of_whole_ones(implementation: str, dtype: torch.dtype) -> None:
    """On the CPU the bits are the same, in whichever way it takes the entries from where they are packed.

    That is so where four registers hold a row. Longer rows of whole blocks are added up register by register.
    """
    assert _NATIVE is not None
    most = 4 * {"baseline": 16, "avx2": 32, "avx512": 64}[_NATIVE.capability()] // dtype.itemsize
    sizes = [n for n in (2, 3, 4, 5, 6, 7, 8, 9, 10, 16) if n <= most]
    kinds = ((1, None), (37, None), (37, torch.bfloat16))
    for n, (rows, storage) in itertools.product(sizes, kinds):
        small = step([packed((rows, n), rows, n)], dtype, storage=storage, inverse_layout=unaligned)
        whole = small.copy()
        assert small.inverses[0] is not None
        whole.inverses[0] = unpack(small.inverses[0])
        for case in (whole, small):
            case.run()
        assert_same_bits(small.params[0], whole.params[0], f"{rows} blocks of {n} rows in {storage}")


# Kernels of 16 channels and of multiples: those of one output are worked on where they lie side by side. The last shape
# has too few of them, and is gathered.
SIDE_BY_SIDE = (
    Parameter((3, 16, 3, 3), (48, 9, 9)),
    packed((2, 48, 3, 3), 96, 9),
    Parameter((2, 32, 2, 2), (64, 4, 4)),
    packed((1, 32, 2, 4), 32, 8),
    packed((2, 16, 4, 4), 32, 16),
    Parameter((2, 16, 5, 5), (32, 25, 25)),
    Parameter((2, 16, 2, 2, 2), (32, 8, 8)),
    Parameter((2, 17, 3, 3), (34, 9, 9)),
)


@pytest.mark.parametrize("implementation", CPU, indirect=True)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_kernels_in_channels_last_order(implementation: str, dtype: torch.dtype) -> None:
    """The definition, and the bits of row-major order, in every way that the sums of a step are asked for."""
    for options in ({"weight_decay": 0.1}, OPTIONS[2], OPTIONS[8], OPTIONS[10]):
        for storage in (None, torch.bfloat16):
            kinds: dict[str, Any] = {"moments": SHORT_IN_TURN, "storage": storage}
            case = step(SIDE_BY_SIDE, dtype, layout=channels_last, inverse_layout=unaligned, **kinds, **options)
            plain = case.copy()
            plain.params, plain.grads, plain.momentum_buffers = ([contiguous(x) for x in xs] for xs in case.lists()[:3])
            found, expected = case.run_with_caps(), plain.run_with_caps()
            for what, x, y in zip(("skipped", "scale", "caps"), found, expected, strict=True):
                assert_same_bits(x, y, what)
            assert_unchanged(case, plain, around=False)
        check(step(SIDE_BY_SIDE, dtype, layout=channels_last, **options))


@pytest.mark.parametrize("implementation", CPU, indirect=True)
@pytest.mark.parametrize("clip", [None, 1e-3])
def test_kernels_in_channels_last_order_are_skipped_one_by_one(implementation: str, clip: float | None) -> None:
    case = step([Parameter((3, 32, 3, 3), (96, 9, 9))], torch.float32, layout=channels_last, kl_clip=clip)
    case.grads[0][1, 5, 0, 2] = math.nan
    case.momentum_buffers[0][2, 31, 2, 2] = math.inf
    before, plain = case.copy(), case.copy()
    plain.params, plain.grads, plain.momentum_buffers = ([contiguous(x) for x in xs] for xs in case.lists()[:3])
    skipped, scale = case.run()
    assert_same_bits(scale, plain.run()[1])
    assert skipped.tolist() == [2]
    assert_unchanged(case, plain, around=False)
    for o, i in ((1, 5), (2, 31)):
        assert_same_bits(case.params[0][o, i], before.params[0][o, i])
        assert_same_bits(case.momentum_buffers[0][o, i], before.momentum_buffers[0][o, i])


# The clip.


@pytest.mark.slow_interpreted
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_clip_bounds_the_change(implementation: str, dtype: torch.dtype) -> None:
    """One scale for all parameters, 1 as soon as the bound is kept."""
    case = step(SOME, dtype, momentum=0.0)
    # Without momentum, in which case it is the gradient.
    total = sum(float((before - after).mul(g).sum()) for before, after, g in changes(case)) * 0.01
    for share, expected in ((0.25, 0.5), (0.81, 0.9), (1.1, 1.0), (1e30, 1.0)):
        clipped = step(SOME, dtype, momentum=0.0, kl_clip=total * share)
        _, scale = clipped.run()
        assert abs(float(scale) - expected) < 1e-3
        assert float(scale) == 1.0 or expected < 1.0


def changes(case: Step) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Parameters before and after the step in float64, and gradients."""
    after, _, _ = defined(case)
    return [(p.double(), a, g.double()) for p, a, g in zip(case.params, after.params, case.grads, strict=True)]


def test_a_sum_of_nothing_is_not_clipped(implementation: str) -> None:
    case = step(SOME, torch.float32, kl_clip=1e-30)
    for x in (*case.grads, *case.momentum_buffers):
        x.zero_()
    assert float(case.run()[1]) == 1.0
    case = step(SOME, torch.float32, kl_clip=1e-30, lr=0.0)
    assert float(case.run()[1]) == 1.0


def test_the_clip_of_many_blocks(implementation: str) -> None:
    """More than one block of threads adds up, where whole numbers add up the same in any order."""
    size = 40 if implementation == "triton" else 1024 + 3
    many = Parameter((size, 257), (1, 1, 257, 257)), Parameter((5,), (5, 1, 1))
    case = step(many, torch.float32, lr=1.0, momentum=0.0, kl_clip=1.0, kl_along="gradient", max_relative_step=1e3)
    for gradient, inverse in zip(case.grads, case.inverses, strict=True):
        assert inverse is not None
        gradient.copy_(torch.arange(gradient.numel()).view_as(gradient) % 5 - 2)
        inverse.copy_(torch.eye(inverse.shape[-1]))
    total = sum(float(gradient.square().sum()) for gradient in case.grads)
    _, scale, *_ = case.run()
    assert float(scale) == math.sqrt(1 / total)


def test_skipped_blocks_do_not_enter_the_clip(implementation: str) -> None:
    case = step(SOME, torch.float32, kl_clip=1e-3)
    for i in (1, 2, 6, 7, 8, 9):
        case.grads[i].fill_(math.nan)
    without = step(SOME, torch.float32, kl_clip=1e-3)
    for i in (1, 2, 6, 7, 8, 9):
        without.grads[i].zero_()
        without.momentum_buffers[i].zero_()
    (skipped, scale), (_, expected) = case.run(), without.run()
    assert skipped.tolist() == [0, 12, 50, 0, 0, 0, 6, 0, 28, 0, 0]
    assert_same_bits(scale, expected)
    for i in (0, 3, 4, 5, 10):
        assert_same_bits(case.params[i], without.params[i])


@pytest.mark.slow_interpreted
@pytest.mark.parametrize("kl_along", ["momentum", "gradient"])
def test_one_scale_for_all_rates(implementation: str, kl_along: str) -> None:
    """The sum is of lr^2 <d, .>: parameters of other rates and decays are bounded as if there were one vector."""
    many = parameters_for(implementation, FEW, SOME, SOME)
    first = [i - (inverse is None) for i, (_, inverse) in enumerate(many)]
    options = {
        "lr": [0.01 * (1 + i % 3) for i in first],
        "weight_decay": [0.1 * (i % 2) for i in first],
        "kl_along": kl_along,
        "kl_clip": 0.01,
    }
    for decoupled in (False, True):
        case = step(many, torch.float32, **options, decoupled=decoupled)
        scale = naive(case.double())[2]
        assert scale < 1
        check(case)
        on_device = step(many, DTYPES, **{**options, "lr": rates_of("", options["lr"])}, decoupled=decoupled)
        check(on_device)


# The cap.

CAPPED = {"max_relative_step": 1e-3, "floor": 0.0, "weight_decay": 0.1, "decoupled": True}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("clip", [None, 0.1])
def test_the_cap_bounds_the_step_of_a_layer(implementation: str, clip: float | None, dtype: torch.dtype) -> None:
    """Weights and biases of one layer together, whatever their places in the list are; and no decay of the bound."""
    some = parameters_for(implementation, FEW, SOME, SOME)
    first = [i - (inverse is None) for i, (_, inverse) in enumerate(some)]
    layers = [10 * (i % 3) for i in first]
    check(step(some, dtype, **CAPPED, kl_clip=clip, layers=layers, lr=[0.1 * (1 + i % 2) for i in first]))
    case = step(some, torch.float64, **{**CAPPED, "weight_decay": 0.0}, kl_clip=clip, layers=layers)
    before = case.copy()
    _, _, caps = case.run_with_caps()
    for layer in set(layers):
        members = [p for p, of in enumerate(layers) if of == layer]
        moved = math.sqrt(sum(float((case.params[p] - before.params[p]).square().sum()) for p in members))
        size = math.sqrt(sum(float(before.params[p].square().sum()) for p in members))
        assert len({float(caps[p]) for p in members}) == 1
        assert float(caps[members[0]]) < 1
        assert moved == pytest.approx(1e-3 * size, rel=1e-9)


def test_a_step_within_its_bound_is_not_capped(implementation: str) -> None:
    some = parameters_for(implementation, FEW, SOME, SOME)
    case = step(some, torch.float32, max_relative_step=1e3, kl_clip=1e-3)
    plain = step(some, torch.float32, kl_clip=1e-3)
    _, _, caps = case.run_with_caps()
    plain.run()
    assert_same_bits(caps, torch.ones(len(some), dtype=torch.float64))
    assert_unchanged(case, plain)


def test_the_floor_lets_zeros_move(implementation: str) -> None:
    some = parameters_for(implementation, FEW, SOME, SOME)
    for floor in (0.0, 1e-2):
        case = step(some, torch.float32, max_relative_step=0.02, floor=floor)
        for p in case.params:
            p.zero_()
        before = case.copy()
        check(case)
        for i, (p, then) in enumerate(zip(case.params, before.params, strict=True)):
            if p.numel() and case.inverses[i] is not None:
                assert bool((p == then).all()) == (floor == 0.0), i


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_floors_of_each(implementation: str, dtype: torch.dtype) -> None:
    """A layer's is the smallest of its parameters, wherever in the list they are."""
    some = parameters_for(implementation, FEW, SOME, SOME)
    first = [i - (inverse is None) for i, (_, inverse) in enumerate(some)]
    floors = [(0.0, 10.0, 0.5, 2.0, 1e-3)[i % 5] for i in first]
    options = {"max_relative_step": 1e-3, "weight_decay": 0.1, "decoupled": True, "floor": floors}
    check(step(some, dtype, **options))
    options |= {"layers": [10 * (i % 3) for i in first], "kl_clip": 0.1}
    check(step(some, dtype, **options))
    case = step(some, torch.float64, **options)
    wanted = naive(case)[3]
    assert case.run_with_caps()[2].tolist() == pytest.approx(wanted, rel=1e-9)
    assert len({round(cap, 12) for cap in wanted}) == 3


def test_floors_of_many(implementation: str) -> None:
    """More than one launch takes."""
    many = [Parameter((3,), (3, 1, 1))] * (20 if implementation == "triton" else 200)
    layers = [i // 2 for i in range(len(many))]
    check(step(many, torch.float32, max_relative_step=1e-3, floor=[0.1 * (i % 37) for i in layers], layers=layers))


def test_zeros_move_as_far_as_the_floor_of_their_layer(implementation: str) -> None:
    """Beside a large layer, whose floor is below its weights and which is capped by these."""
    some = [Parameter((6, 8), (1, 1, 8, 8)), Parameter((3, 5), (3, 5, 5)), Parameter((9, 4), (1, 1, 4, 4))]
    floors = [0.1, 0.01, 1e-3]
    case = step(some, torch.float64, max_relative_step=0.02, floor=floors, lr=100.0)
    for p in case.params[:2]:
        p.zero_()
    before = case.copy()
    check(case)
    moved = [float((now - then).norm()) for now, then in zip(case.params, before.params, strict=True)]
    wanted = [0.02 * 0.1 * math.sqrt(48), 0.02 * 0.01 * math.sqrt(15), 0.02 * float(before.params[2].norm())]
    assert moved == pytest.approx(wanted, rel=1e-9)


def test_one_floor_is_that_of_each(implementation: str) -> None:
    """To the bit."""
    some = parameters_for(implementation, FEW, SOME, SOME)
    case = step(some, torch.float32, max_relative_step=1e-3, floor=2.0)
    other = case.copy()
    other.options["floor"] = [2.0] * len(some)
    assert_same_bits(case.run_with_caps()[2], other.run_with_caps()[2])
    assert_unchanged(case, other)


def test_what_is_not_finite_is_in_no_norm(implementation: str) -> None:
    """Of a block that is skipped the weights count, its direction does not; a weight that is a NaN does not."""
    some = [parameter for parameter in parameters_for(implementation, FEW, SOME, SOME) if math.prod(parameter.shape)]
    case = step(some, torch.float32, **CAPPED)
    for g in case.grads[::2]:
        g.view(-1)[0] = math.inf
    case.params[-1].view(-1)[-1] = math.nan
    clean = case.copy()
    clean.params[-1].view(-1)[-1] = 0.0
    wanted = defined_with_caps(clean)[3]
    (skipped, _, caps), (_, _, expected) = case.run_with_caps(), clean.run_with_caps()
    assert int(skipped.sum()) > 0
    assert_same_bits(caps, expected)
    # Of well-conditioned blocks in float32: the worst |P| |m| is a few times |P m|.
    torch.testing.assert_close(caps, wanted, rtol=1e-4, atol=0)
    assert bool(caps.gt(0).all())


def test_directions_that_overflow_do_not_move_their_layer(implementation: str) -> None:
    case = step([Parameter((2, 3), (2, 3, 3)), Parameter((2,), (2, 1, 1))], torch.float64, max_relative_step=0.1)
    case.grads[0].fill_(1e200)
    before = case.copy()
    _, _, caps = case.run_with_caps()
    assert float(caps[0]) == 0
    assert_same_bits(case.params[0], before.params[0])
    assert float(caps[1]) > 0
    assert bool((case.params[1] != before.params[1]).all())


def test_found_inf_caps_nothing(implementation: str) -> None:
    case = step(FEW, torch.float32, **CAPPED, found_inf=scalar(1.0))
    before = case.copy()
    _, _, caps = case.run_with_caps()
    assert_same_bits(caps, torch.ones(len(FEW), dtype=torch.float64))
    assert_unchanged(case, before)


# What is skipped.


@pytest.mark.parametrize("value", [1.0, 2.0, math.inf, math.nan, -1.0])
def test_found_inf_stops_everything(implementation: str, value: float) -> None:
    for dtype in (torch.float32, torch.float64):
        case = step(PARAMETERS, DTYPES, weight_decay=0.1, kl_clip=1e-3, found_inf=scalar(value, dtype))
        before = case.copy()
        skipped, scale = case.run()
        assert_same_bits(skipped, torch.zeros(len(PARAMETERS), dtype=torch.int64))
        assert_same_bits(scale, torch.ones((), dtype=torch.float64))
        assert_unchanged(case, before)


def spoil(case: Step, values: Sequence[float]) -> tuple[list[int], list[Tensor]]:
    """Puts values into the gradients of every third block; how many blocks that are, and which elements."""
    counts, masks = [0] * len(case.params), [torch.zeros(p.numel(), dtype=torch.bool) for p in case.params]
    grads = [g.flatten().clone() for g in case.grads]
    for i, inverse in enumerate(case.inverses):
        blocks = [] if inverse is None else places(case, i)
        for b in range(i % 3, len(blocks), 3):
            present = [place for place in blocks[b][1] if place is not None]
            if not present:
                continue
            p, e = present[(b + i) % len(present)]
            grads[p][e] = values[b % len(values)]
            counts[i] += 1
            for p, e in present:
                masks[p][e] = True
    for gradient, flat in zip(case.grads, grads, strict=True):
        gradient.copy_(flat.view(gradient.shape))
    return counts, [mask.view(p.shape) for mask, p in zip(masks, case.params, strict=True)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", [contiguous, sliced, channels_last])
@pytest.mark.parametrize("options", [*OPTIONS[:2], {"kl_clip": 1e6, "decoupled": True, "weight_decay": 0.1}], ids=str)
@pytest.mark.parametrize("diagonal", [False, True])
def test_blocks_without_a_finite_gradient_keep_their_bits(
    implementation: str,
    diagonal: bool,
    options: dict[str, Any],
    layout: Callable[[Tensor], Tensor],
    dtype: torch.dtype,
) -> None:
    """They are counted exactly, and all others take the very step they take without them."""
    some = parameters_for(implementation, FEW, cuda=INTERPRETED)
    clean = step(some, dtype, layout=layout, moments=SHORT_IN_TURN, **options)
    if diagonal:  # a NaN reaches the whole block through zeros too
        for inverse in clean.inverses:
            if inverse is not None and inverse.dim() > 2:
                inverse.copy_(torch.eye(inverse.shape[-1]).expand(inverse.shape))
            elif inverse is not None:
                n = unpack(inverse[:1]).shape[-1]
                inverse.copy_(pack(torch.eye(n).expand(inverse.shape[0], n, n)))
    for param in clean.params:
        if param.numel() > 4:
            param[(0,) * param.dim()] = -0.0
    case, before = clean.copy(), clean.copy()
    clean.run()
    counts, masks = spoil(case, (math.nan, math.inf, -math.inf))
    skipped, _ = case.run()
    assert skipped.tolist() == counts
    for i, mask in enumerate(masks):
        for name in ("params", "momentum_buffers"):
            now, then, otherwise = (getattr(s, name)[i] for s in (case, before, clean))
            assert_same_bits(now, torch.where(mask, then, otherwise), f"{name}[{i}]")
            assert_same_bits(surroundings(now), surroundings(then), f"memory around {name}[{i}]")


@pytest.mark.parametrize("value", [math.nan, math.inf, 3e38])
def test_blocks_of_an_inverse_that_is_not_finite_are_skipped(implementation: str, value: float) -> None:
    """And no others: what lies around a block, zeros times infinity included, does not reach it. Sums that overflow
    count as the infinity they are."""
    some = parameters_for(implementation)
    for i, parameter in enumerate(some):
        count = (parameter.inverse or (0,))[0]
        if parameter.inverse is None or len(parameter.inverse) == 4 or count < 3:
            continue
        biased = i + 1 < len(some) and some[i + 1].inverse is None
        clean = step(some[i : i + 1 + biased], torch.float32)
        for g in clean.grads:
            g.abs_().add_(1.0).mul_(10.0)
        case, before = clean.copy(), clean.copy()
        assert case.inverses[0] is not None
        bad = torch.arange(count) % 2 == 1
        bad[-2:] = torch.tensor([True, False])
        case.inverses[0][bad] = value
        clean.run()
        skipped, _ = case.run()
        assert skipped[0] == bad.sum()
        for name in ("params", "momentum_buffers"):
            now, then, otherwise = (
                torch.cat([x.reshape(count, -1) for x in getattr(s, name)], 1) for s in (case, before, clean)
            )
            assert_same_bits(now, torch.where(bad[:, None], then, otherwise), f"{name} {parameter}")


@pytest.mark.parametrize("end", [0, -1])
@pytest.mark.parametrize("clip", [None, 1e6])
def test_one_direction_that_is_not_finite_skips_its_whole_block(
    implementation: str, clip: float | None, end: int
) -> None:
    """The others of the block are finite, and whoever works on them has to be told."""
    some = [p for p in parameters_for(implementation, cuda=INTERPRETED) if p.inverse != (0, 4, 4)]
    clean = step(some, torch.float32, kl_clip=clip)
    case, before = clean.copy(), clean.copy()
    clean.run()
    for inverse in case.inverses:
        if inverse is not None and inverse.dim() < 4 and inverse.numel():
            inverse[1::2].flatten(1)[:, end] = math.inf
    skipped, _ = case.run()
    for i, (_, shape) in enumerate(some):
        if shape is None:
            continue
        count = 0 if len(shape) == 4 else shape[0] // 2
        assert int(skipped[i]) == count
        whole = slice(i, i + 1 + bias_of(case, i))
        rows = max(1, shape[0])
        bad = torch.arange(rows) % 2 == 1 if count else torch.zeros(rows, dtype=torch.bool)
        for name in ("params", "momentum_buffers"):
            now, then, otherwise = (
                torch.cat([x.reshape(rows, -1) for x in getattr(s, name)[whole]], 1) for s in (case, before, clean)
            )
            assert_same_bits(now, torch.where(bad[:, None], then, otherwise), f"{name}[{i}]")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("layout", [contiguous, sliced])
def test_every_bit_pattern_of_a_skipped_parameter_stays(
    implementation: str, dtype: torch.dtype, layout: Callable[[Tensor], Tensor]
) -> None:
    """All but those of NaN, which stays NaN."""
    n = 1 if implementation == "triton" else 4
    case = step([Parameter((65536,), (65536 // n, n, n))], dtype, layout=layout, moments=torch.bfloat16)
    moments = torch.arange(-32768, 32768, dtype=torch.int16).view(torch.bfloat16)
    case.momentum_buffers[0].copy_(moments)
    patterns = torch.arange(-32768, 32768, dtype=torch.int16).view(dtype)
    case.params[0].copy_(patterns)
    case.grads[0].fill_(math.nan)
    assert case.run()[0].tolist() == [65536 // n]
    assert case.params[0][patterns.isnan()].isnan().all()
    assert_same_bits(case.params[0][~patterns.isnan()], patterns[~patterns.isnan()])
    assert case.momentum_buffers[0][moments.isnan()].isnan().all()
    assert_same_bits(case.momentum_buffers[0][~moments.isnan()], moments[~moments.isnan()])


def test_a_scale_that_makes_gradients_infinite(implementation: str) -> None:
    for value, skipped in ((0.0, 15), (math.nan, 15), (2e-38, 15), (1.0, 0), (math.inf, 0)):
        case = step([PARAMETERS[1]], torch.float32, grad_scale=scalar(value))
        case.grads[0].fill_(12.0)
        before = case.copy()
        assert case.run()[0].tolist() == [skipped]
        if skipped:
            assert_unchanged(case, before)
        else:
            assert case.params[0].isfinite().all()


# A momentum in 16 bits.


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("rows", [1, 2, 11])
def test_momentum_rounds_to_nearest_even(implementation: str, rows: int, dtype: torch.dtype) -> None:
    """On ties and around them, subnormal ones included; what is finite stays so."""
    exact = around_ties(subnormal=implementation != "triton")
    exact = torch.cat([exact, exact[: -len(exact) % 22]])  # in whole blocks
    case = step([Parameter((len(exact),), (len(exact) // rows, rows, rows))], dtype, moments=torch.bfloat16)
    assert case.inverses[0] is not None
    case.inverses[0].copy_(torch.eye(rows).expand_as(case.inverses[0]))
    case.grads[0].copy_(exact)
    case.options |= {"lr": 0.0, "momentum": 0.0}
    exact, before = case.grads[0].float(), case.momentum_buffers[0].clone()  # in float16 few of them are left
    largest = torch.finfo(torch.bfloat16).max
    rounded = exact.clamp(-largest, largest).to(torch.bfloat16)
    stepped = exact.isfinite().view(-1, rows).all(1).repeat_interleave(rows)
    case.run()
    assert_same_bits(case.momentum_buffers[0], torch.where(stepped, rounded, before))
    assert dtype != torch.float32 or bool((rounded.abs() == largest).any() and (rounded != exact).any())


UNROUNDED = (
    Parameter((33,), (33, 1, 1)),
    Parameter((4, 3, 3), (4, 9, 9)),
    packed((4, 5), 4, 5),
    Parameter((3, 10), (3, 11, 11)),
    Parameter((3,), None),
    Parameter((4, 12), (1, 5, 3, 3)),
    Parameter((4,), None),
    Parameter((1, 513), (1, 513, 513)),
    Parameter((2, 599), (1, 1, 600, 600)),
    Parameter((2,), None),
)


@pytest.mark.parametrize("clip", [None, 0.25])
def test_directions_are_of_the_momentum_before_it_is_rounded(implementation: str, clip: float | None) -> None:
    """And so is the sum that the clip is about."""
    for i, parameter in enumerate(UNROUNDED):
        if parameter.inverse is None:
            continue
        biased = i + 1 < len(UNROUNDED) and UNROUNDED[i + 1].inverse is None
        case = step(UNROUNDED[i : i + 1 + biased], torch.float32, moments=torch.bfloat16, lr=1.0, momentum=0.0)
        inverse = case.inverses[0]
        assert inverse is not None
        if inverse.dim() == 2:
            inverse.copy_(pack(torch.eye(5).expand(len(inverse), 5, 5)))
        else:
            inverse.copy_(torch.eye(inverse.shape[-1]).expand_as(inverse))
        for w, g in zip(case.params, case.grads, strict=True):
            w.zero_()
            g.fill_(1 / 3)
        third = float(torch.tensor(1 / 3))
        count = sum(w.numel() for w in case.params)
        case.options["kl_clip"] = None if clip is None else clip * third**2 * count
        _, scale = case.run()
        assert float(scale) == (1.0 if clip is None else pytest.approx(0.5, rel=1e-12))
        for w, m in zip(case.params, case.momentum_buffers, strict=True):
            assert_within(w, torch.full(w.shape, -third * float(scale), dtype=torch.float64), 1e-7, f"{parameter}")
            assert_same_bits(m.contiguous(), torch.full(m.shape, 1 / 3, dtype=torch.bfloat16))


# Bits.


@pytest.mark.slow_interpreted
def test_a_list_is_its_members_one_by_one(implementation: str) -> None:
    for options in (OPTIONS[1], OPTIONS[4]):
        some = parameters_for(implementation)
        case = step(some, DTYPES, **options)
        one_by_one = case.copy()
        case.run()
        for i, (_, inverse) in enumerate(some):
            if inverse is not None:
                one_by_one.part(i, i + 1 + bias_of(case, i)).run()
        assert_unchanged(case, one_by_one)


# Cut into shares, these end within chunks, at their ends and between parameters.
SHARED = (
    Parameter((130, 20, 3, 3), (2600, 9, 9)),
    packed((70, 20, 3, 3), 1400, 9),
    Parameter((7,), (7, 1, 1)),
    Parameter((30001,), (30001, 1, 1)),
    Parameter((64, 99), (64, 100, 100)),
    Parameter((64,), None),
    Parameter((900, 40), (1, 2, 21, 21)),
    Parameter((900,), None),
    Parameter((3, 5000), (1, 50, 100, 100)),
    Parameter((2048,), (2048, 2, 2)),
    Parameter((2048,), None),
)


@pytest.mark.parametrize("layout", [contiguous, sliced])
def test_same_bits_at_every_run_and_for_every_number_of_threads(
    implementation: str, set_threads: Callable[[int], None], layout: Callable[[Tensor], Tensor]
) -> None:
    some = parameters_for(implementation, FEW, SHARED, SHARED)
    options = {"moments": SHORT_IN_TURN, "weight_decay": 0.1, "kl_clip": 1e-3}
    case = step(some, (torch.float32, torch.bfloat16), layout=layout, **options)
    for gradient in case.grads:
        gradient.view(gradient.shape)[..., ::37] = math.nan
    results = []
    for threads in (1, 1) if implementation in ("triton", "cuda") else (1, 1, 2, 3):
        set_threads(threads)
        copy = case.copy()
        results.append((copy, *copy.run()))
    assert 0.0 < float(results[0][2]) < 1.0
    for copy, skipped, scale in results[1:]:
        assert_same_bits(skipped, results[0][1])
        assert_same_bits(scale, results[0][2])
        assert_unchanged(copy, results[0][0])


# What the kernels for GPUs have of their own.


LARGE = (packed((513,), 1, 513), Parameter((1, 512), (1, 513, 513)), Parameter((1,), None))


@pytest.mark.slow_interpreted
@pytest.mark.parametrize(("layout", "clip"), [(contiguous, 1e-3), (spread, None)])
def test_blocks_larger_than_what_a_program_holds(
    implementation: str, layout: Callable[[Tensor], Tensor], clip: float | None
) -> None:
    case = check(step(LARGE, torch.float32, layout=layout, storage=torch.bfloat16, weight_decay=0.1, kl_clip=clip))
    case.grads[0][500] = math.nan
    alone = case.part(0, 1)
    before = alone.copy()
    assert alone.run()[0].tolist() == [1]
    assert_unchanged(alone, before)


@pytest.mark.parametrize("clip", [None, 1e-3])
@pytest.mark.parametrize("layout", [contiguous, unaligned])
@pytest.mark.parametrize("moments", [None, torch.bfloat16], ids=str)
def test_full_chunks_of_single_elements(
    implementation: str, moments: torch.dtype | None, layout: Callable[[Tensor], Tensor], clip: float | None
) -> None:
    """Aligned ones are read 16 bytes at a time, all others element by element: with the same results."""
    one = [Parameter((16390,), (16390, 1, 1))]
    aligned = step(one, torch.float32, layout=contiguous, moments=moments, kl_clip=clip)
    aligned.inverses = [contiguous(x) for x in aligned.inverses if x is not None]
    aligned.grads[0][[7, 9000, 16389]] = math.nan
    case = aligned.map(layout)
    (skipped, scale), (expected, expected_scale) = case.run(), aligned.run()
    assert skipped.tolist() == expected.tolist() == [3]
    assert_same_bits(scale, expected_scale)
    assert_unchanged(case, aligned, ("params", "momentum_buffers"), around=False)


# Whole blocks fill a tile of the CUDA kernels, and one more or less; the largest block that fits one, and the next;
# slabs of 16 rows, and a row more or less; and what a step may skip as a whole.
TILES = (
    *(Parameter((count, n), (count, n, n)) for n, count in ((2, 255), (2, 256), (2, 257), (9, 56), (9, 57), (16, 17))),
    *(Parameter((3, n), (3, n, n)) for n in (71, 72, 79, 80, 81)),
    *(packed((2, n), 2, n) for n in (99, 100, 101, 111, 112, 113, 129)),
)
ENDS = (
    Parameter((8193,), (8193, 1, 1)),
    Parameter((5, 0), (5, 1, 1)),  # nothing but a bias
    Parameter((5,), None),
    packed((3, 128), 3, 129),
    Parameter((3,), None),
)


@pytest.mark.parametrize(
    ("storage", "layout", "options"),
    [
        (None, contiguous, OPTIONS[1]),
        (None, spread, OPTIONS[2]),
        (torch.bfloat16, contiguous, OPTIONS[2]),
        (torch.bfloat16, spread, OPTIONS[1]),
    ],
)
def test_tiles(
    implementation: str, storage: torch.dtype | None, layout: Callable[[Tensor], Tensor], options: dict[str, Any]
) -> None:
    if implementation == "triton":
        pytest.skip("tiles of the CUDA kernels")
    dtypes = (torch.float32, torch.float16, torch.float64) if storage is None else (torch.bfloat16, torch.float32)
    case = check(step(TILES + ENDS, dtypes, layout=layout, moments=SHORT_IN_TURN, storage=storage, **options))
    before = case.copy()
    for g in case.grads:
        g[..., -1:] = math.inf
    assert case.run()[0].tolist() == [*(parameter.shape[0] for parameter in TILES), 1, 1, 0, 3, 0]
    whole = slice(0, len(TILES))
    for name in ("params", "momentum_buffers"):
        for now, then in zip(getattr(case, name)[whole], getattr(before, name)[whole], strict=True):
            assert_same_bits(now, then, name)


@pytest.mark.parametrize(("layout", "copies"), [(contiguous, 350), (spread, 90)])
def test_more_parameters_than_a_launch_takes(
    implementation: str, copies: int, layout: Callable[[Tensor], Tensor]
) -> None:
    """And more partial sums than the clip has threads: many times the same are as much more in the sum."""
    if implementation == "triton":
        pytest.skip("tables of the CUDA kernels")
    kinds = (Parameter((2,), (2, 1, 1)), Parameter((2, 2), (2, 2, 2)), packed((3,), 1, 3))
    few = step(kinds, torch.float32, layout=layout, kl_clip=1e-6)
    many = Step(*([layout(x) for _ in range(copies) for x in tensors] for tensors in few.lists()[:3]), [])
    many.inverses = [contiguous(x) for _ in range(copies) for x in few.inverses if x is not None]
    many.options = {**few.options, "kl_clip": 1e-6 * copies}
    (_, expected), (skipped, scale) = few.run(), many.run()
    assert skipped.tolist() == [0] * 3 * copies
    assert float(expected) < 1
    assert_within(scale, expected, 2 * copies * unit_roundoff(torch.float64), "scale")
    for i, one in enumerate(few.params):
        all_like_it = one.double().expand(copies, *one.shape)
        bound = 4 * unit_roundoff(torch.float32) * all_like_it.abs()
        assert_within(torch.stack(many.params[i::3]), all_like_it, bound, f"params[{i}]")
        moment = few.momentum_buffers[i]
        assert_same_bits(torch.stack(many.momentum_buffers[i::3]), moment.expand(copies, *moment.shape).contiguous())


@pytest.mark.skipif("triton" not in backends.available(), reason="Triton cannot run here")
@pytest.mark.parametrize("found_inf", [None, 0.0, 1.0])
def test_numbers_that_only_kernels_read(monkeypatch: pytest.MonkeyPatch, found_inf: float | None) -> None:
    """As they are on a GPU, where nobody waits for them."""
    from fisher_kernels.triton_kernels import _steps
    from fisher_kernels.triton_kernels import mbf_step as kernels

    monkeypatch.setattr(kernels, "scalar", lambda x: (1.0, x))
    monkeypatch.setattr(_steps, "scalar", lambda x: (1.0, x))
    numbers = {"lr": scalar(0.01, torch.float64), "grad_scale": scalar(3.0), "kl_clip": 1e-3}
    case = step(FEW, DTYPES, maximize=True, weight_decay=0.1, **numbers)
    if found_inf != 1.0:
        with use_backend("triton"):
            case.options["found_inf"] = None if found_inf is None else scalar(found_inf)
            check(case)
        return
    before = case.copy()
    options = {"decoupled": False, **case.options, "found_inf": scalar(found_inf)}
    options |= {"lr": [options["lr"]], "weight_decay": [options["weight_decay"]]}
    skipped, scale, caps = kernels.step(mbf_step._Step(*case.lists(), **options))
    assert_same_bits(caps, torch.ones(len(FEW), dtype=torch.float64))
    assert_same_bits(skipped, torch.zeros(len(FEW), dtype=torch.int64))
    assert_same_bits(scale, torch.ones((), dtype=torch.float64))
    assert_unchanged(case, before)


@interpreted
@pytest.mark.parametrize("clip", [None, 1e-3])
def test_blocks_larger_than_few_lanes(monkeypatch: pytest.MonkeyPatch, clip: float | None) -> None:
    """As those of 513 and more are with 512 lanes, which the interpreter takes seconds for."""
    from fisher_kernels.triton_kernels import mbf_step as kernels

    monkeypatch.setattr(kernels, "_LANES", type(kernels._LANES)(8))
    with use_backend("triton"):
        check(
            step(
                (packed((27,), 3, 9), Parameter((2, 17), (2, 18, 18)), Parameter((2,), None)),
                torch.float32,
                kl_clip=clip,
            )
        )


@pytest.mark.skipif("triton" not in backends.available(), reason="Triton cannot run here")
def test_launches_do_not_grow_with_the_list(monkeypatch: pytest.MonkeyPatch) -> None:
    from fisher_kernels.triton_kernels import mbf_step as kernels

    def launches(copies: int) -> int:
        started = []
        monkeypatch.setattr(kernels, "launch", lambda *_, **__: started.append(1))
        with use_backend("triton"):
            step(FEW * copies, torch.float32, kl_clip=1e-3, max_relative_step=0.1).run()
        return len(started)

    assert launches(1) == launches(5)
