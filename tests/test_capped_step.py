"""heavy_ball_, direction_sums and capped_step_ against their definitions in float64."""

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

from fisher_kernels import use_backend
from fisher_kernels.ops import ACCUMULATOR, Rounding, capped_step_, direction_sums, heavy_ball_, stochastic_round
from tests.cases import (
    DTYPES,
    LAYOUTS,
    WRITABLE_LAYOUTS,
    channels_last,
    contiguous,
    integers,
    random,
    sliced,
    unaligned,
)
from tests.cases.capped_step import SHAPES, Step, Sums, momentum, step, sums
from tests.cases.steps import SHORT_IN_TURN, Lists, around_ties
from tests.comparison import assert_same_bits, assert_within, surroundings, unit_roundoff
from tests.interpreted import far, far_partials, far_sums, interpreted

pytestmark = [pytest.mark.usefixtures("poisoned_memory", "one_thread"), pytest.mark.pairs_interpreted]

DOUBLE = unit_roundoff(torch.float64)
ALL_CONTIGUOUS = dict.fromkeys(("params", "grads", "directions", "momentum_buffers", "others"), contiguous)
FEW = ((3, 5), (5,), (), (1,), (0,), (17,))

# What Triton's interpreter takes instead of the shapes of all: it is slow, at every tensor.
SOME = ((3, 5), (), (0,), (2, 1030), (4, 3, 2, 5, 9))


def shapes_for(implementation: str) -> tuple[tuple[int, ...], ...]:
    return SOME if implementation == "triton" else SHAPES


def scalar(value: float, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.tensor(value, dtype=dtype)


def per_parameter(case: Step, name: str, default: Any = 0.0) -> list[Any]:
    """An option that is one number, or a list of one or of all."""
    value = case.options.get(name, default)
    values = list(value) if isinstance(value, (list, tuple)) else [value]
    return values * len(case.lists()[0]) if len(values) == 1 else values


def assert_unchanged(after: Lists, before: Lists, names: Sequence[str], around: bool = True) -> None:
    """The bits of lists, and of the memory around them."""
    for name in names:
        for i, (now, then) in enumerate(zip(getattr(after, name), getattr(before, name), strict=True)):
            if now.device.type == "cpu":
                assert_same_bits(now, then, f"{name}[{i}]")
                if around:
                    assert_same_bits(surroundings(now), surroundings(then), f"memory around {name}[{i}]")


def assert_same_results(actual: Sequence[Tensor], expected: Sequence[Tensor], what: str = "") -> None:
    for a, e in zip(actual, expected, strict=True):
        assert_same_bits(a, e, what)


def assert_surroundings_unchanged(after: Lists, before: Lists, name: str) -> None:
    for i, (now, then) in enumerate(zip(getattr(after, name), getattr(before, name), strict=True)):
        assert_same_bits(surroundings(now), surroundings(then), f"memory around {name}[{i}]")


# The momentum.

MOMENTUM_OPTIONS: tuple[dict[str, Any], ...] = (
    {},
    {"weight_decay": 0.1},
    {"maximize": True, "grad_scale": scalar(3.0)},
    {"maximize": True, "weight_decay": 0.1, "grad_scale": scalar(1024.0, torch.float64)},
    {"momentum": 0.0, "found_inf": scalar(0.0)},
)


def defined_momentum(case: Any) -> list[tuple[Tensor, Tensor]]:
    """The new momentum in float64, and how far rounding may take a result from it.

    In float32, or float64 for such parameters: up to 3 roundings of the gradient (of the scale, of the product, of the
    decay's), 3 more of the sum and its terms. The definition rounds as often: twice all that. Then half a unit in the
    last place of its own dtype. Numbers below the normal ones may be lost.
    """
    o, result = case.options, []
    scale = float(o["grad_scale"]) if o.get("grad_scale") is not None else 1.0
    sign, decay = -1 if o.get("maximize") else 1, o.get("weight_decay", 0.0)
    for w, g, m in zip(case.params, case.grads, case.momentum_buffers, strict=True):
        terms = [o["momentum"] * m.double(), sign * g.double() / scale]
        if decay:
            terms.append(decay * w.double())
        size = sum(x.abs() for x in terms)
        wide = ACCUMULATOR[w.dtype]
        bound = 12 * unit_roundoff(wide) * size + torch.finfo(wide).smallest_normal
        if m.dtype != wide:
            bound = bound + unit_roundoff(m.dtype) * (size + bound) + torch.finfo(m.dtype).smallest_normal * 2**-8
        result.append((sum(terms), bound))
    return result


def assert_momentum(case: Any, expected: list[tuple[Tensor, Tensor]]) -> None:
    for i, (m, (value, bound)) in enumerate(zip(case.momentum_buffers, expected, strict=True)):
        assert_within(m, value, bound, f"momentum_buffers[{i}] of shape {tuple(m.shape)}")


def check_momentum(case: Any) -> None:
    """Advances the momentum and compares all that was done with the definition."""
    before, expected = case.copy(), defined_momentum(case)
    skipped = case.run()
    assert_same_bits(skipped, torch.zeros(len(case.params), dtype=torch.int64))
    assert_momentum(case, expected)
    assert_surroundings_unchanged(case, before, "momentum_buffers")
    assert_unchanged(case, before, ("params", "grads"))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", MOMENTUM_OPTIONS, ids=str)
def test_momentum(implementation: str, options: dict[str, Any], dtype: torch.dtype) -> None:
    check_momentum(momentum(shapes_for(implementation), dtype, **options))


@pytest.mark.parametrize("options", MOMENTUM_OPTIONS[:2], ids=str)
@pytest.mark.parametrize("moments", [None, SHORT_IN_TURN], ids=["wide", "16 bits"])
def test_momentum_of_mixed_dtypes(implementation: str, moments: Any, options: dict[str, Any]) -> None:
    check_momentum(momentum(shapes_for(implementation), DTYPES, moments=moments, **options))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_momentum_rounds_to_nearest_even(implementation: str, dtype: torch.dtype) -> None:
    """On ties and around them, subnormal ones included; what is finite stays so."""
    exact, largest = around_ties(subnormal=implementation != "triton"), torch.finfo(torch.bfloat16).max
    case = momentum([tuple(exact.shape)], dtype, moments=torch.bfloat16, momentum=0.0)
    case.grads[0].copy_(exact)
    exact, before = case.grads[0].float(), case.momentum_buffers[0].clone()  # in float16 few of them are left
    rounded = exact.clamp(-largest, largest).to(torch.bfloat16)
    assert case.run().tolist() == [int((~exact.isfinite()).sum())]
    assert_same_bits(case.momentum_buffers[0], torch.where(exact.isfinite(), rounded, before))
    assert dtype != torch.float32 or bool((rounded.abs() == largest).any() and (rounded != exact).any())


def assert_rounded(case: Step | Any, wide: Step | Any, before: Any, name: str, half: str, kept: Sequence[Any]) -> None:
    """A list is what the same call made in float32, rounded by the integers of ``places``; but for what is kept."""
    for i, place in enumerate(places(case)):
        now, then, exact = (getattr(s, name)[i] for s in (case, before, wide))
        expected = exact.to(now.dtype)
        if now.dtype == torch.bfloat16:
            expected = stochastic_round(exact, seed=3, ordinal=i, step=7 + i, half=half, **place)
        assert_same_bits(now, torch.where(kept[i], then, expected), f"{name}[{i}] of shape {tuple(now.shape)}")
        assert_same_bits(surroundings(now), surroundings(then), f"memory around {name}[{i}]")


def places(case: Any) -> list[dict[str, Any]]:
    """Where the elements of each parameter are in a whole one: in turn rows of it, and columns of a matrix."""
    runs = [p.shape[-1] if p.dim() and p.shape[-1] and i % 2 else None for i, p in enumerate(case.params)]
    # Indices pass 2^32 on the way.
    return [
        {"offset": 1000 * i + 2**32 - 40, "run": run, "pitch": None if run is None else run + 7}
        for i, run in enumerate(runs)
    ]


def for_rounding(implementation: str) -> list[tuple[int, ...]]:
    """Of each dtype one whose order in memory need not be row-major, and one that takes several blocks of a GPU."""
    large = () if implementation == "triton" else (2, 8201)
    return [*shapes_for(implementation), *[(4, 3, 2, 3)] * len(DTYPES), *[large] * len(DTYPES)]


def rounding(case: Any) -> dict[str, Any]:
    """The arguments that round a call at random."""
    return {
        "steps": [scalar(7 + i) for i in range(len(case.params))],
        "rounding": [Rounding.of(3, i, **place) for i, place in enumerate(places(case))],
    }


@pytest.mark.parametrize("layout", [contiguous, sliced, channels_last])
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_momentum_rounds_at_random(implementation: str, decay: float, layout: Callable[[Tensor], Tensor]) -> None:
    case = momentum(for_rounding(implementation), DTYPES, moments=SHORT_IN_TURN, layout=layout, weight_decay=decay)
    wide = case.map(lambda x: x.to(ACCUMULATOR[x.dtype], copy=True))
    for i, p in enumerate(case.params):
        if p.numel() > 4:
            case.grads[i][(-1,) * p.dim()] = wide.grads[i][(-1,) * p.dim()] = math.nan
    before = case.copy()
    case.options.update(rounding(case))
    assert_same_bits(case.run(), wide.run())
    assert_rounded(case, wide, before, "momentum_buffers", "low", [~g.isfinite() for g in case.grads])
    assert_unchanged(case, before, ("params",))


@pytest.mark.parametrize(
    "wrong",
    [
        {"momentum": 0.9 + 1e-4},
        {"weight_decay": 0.1 * (1 + 1e-3)},
        {"weight_decay": 0.0},
        {"maximize": True},
        {"grad_scale": scalar(3 * (1 + 1e-4))},
    ],
    ids=str,
)
def test_rounding_of_momentum_has_teeth(implementation: str, wrong: dict[str, Any]) -> None:
    case = momentum(FEW, torch.float32, weight_decay=0.1, grad_scale=scalar(3.0))
    expected = defined_momentum(case)
    case.options.update(wrong)
    case.run()
    with pytest.raises(AssertionError, match="entries are off"):
        assert_momentum(case, expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_momentum_of_whole_numbers_is_exact(implementation: str, dtype: torch.dtype) -> None:
    for shape in shapes_for(implementation):
        case = momentum([shape], dtype, momentum=0.5, weight_decay=0.25, grad_scale=scalar(2.0))
        for k, tensors in enumerate(case.lists()):
            tensors[0].copy_(integers(shape, dtype, k))
        ((expected, _),) = defined_momentum(case)
        case.run()
        assert_within(case.momentum_buffers[0], expected, 0.0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("of", ["grads", "momentum_buffers", "params"])
@pytest.mark.parametrize("layout", LAYOUTS.values())
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_layouts_do_not_show_in_momentum(
    implementation: str, layout: Callable[[Tensor], Tensor], of: str, decay: float, dtype: torch.dtype
) -> None:
    """The same bits wherever the elements of one of the three lie, and no other bits around them."""
    if layout not in WRITABLE_LAYOUTS.values() and of == "momentum_buffers":
        pytest.skip("is refused")
    shapes = SOME[-2:] if implementation == "triton" else SHAPES
    layouts = {**ALL_CONTIGUOUS, of: layout}
    case = momentum(shapes, dtype, layouts=layouts, moments=SHORT_IN_TURN, weight_decay=decay)
    plain, before = case.map(contiguous), case.copy()
    assert_same_bits(case.run(), plain.run())
    assert_unchanged(case, plain, ("momentum_buffers",), around=False)
    assert_surroundings_unchanged(case, before, "momentum_buffers")


@pytest.mark.parametrize("layout", WRITABLE_LAYOUTS.values())
def test_momentum_in_layouts_of_all_at_once(implementation: str, layout: Callable[[Tensor], Tensor]) -> None:
    some = shapes_for(implementation)
    check_momentum(momentum(some, DTYPES, layout=layout, moments=SHORT_IN_TURN, weight_decay=0.1))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", [contiguous, sliced, channels_last])
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_elements_without_finite_momentum_keep_their_bits(
    implementation: str, layout: Callable[[Tensor], Tensor], decay: float, dtype: torch.dtype
) -> None:
    """They are counted exactly, and all others go on as they do beside zeros."""
    case = momentum(shapes_for(implementation), dtype, layout=layout, moments=SHORT_IN_TURN, weight_decay=decay)
    without, masks = case.copy(), []
    for i, gradient in enumerate(case.grads):
        mask = random(gradient.shape, torch.float64, 31 + i) < (-2.0, -9.0, 0.0, 9.0)[i % 4]
        if gradient.numel() > 4:
            mask[(0,) * mask.dim()] = mask[(-1,) * mask.dim()] = True
        values = torch.tensor([math.nan, math.inf, -math.inf], dtype=dtype)[torch.arange(gradient.numel()) % 3]
        gradient.copy_(torch.where(mask, values.view(gradient.shape), gradient))
        without.grads[i].masked_fill_(mask, 0)
        if gradient.numel() > 4:
            case.momentum_buffers[i][(0,) * mask.dim()] = math.nan  # what is kept is kept whatever it is
        masks.append(mask)
    before = case.copy()
    skipped = case.run()
    without.run()
    assert_same_bits(skipped, torch.tensor([int(mask.sum()) for mask in masks]))
    for i, mask in enumerate(masks):
        now, then, otherwise = (s.momentum_buffers[i] for s in (case, before, without))
        assert_same_bits(now[mask], then[mask], f"momentum_buffers[{i}]")
        assert_same_bits(now[~mask], otherwise[~mask], f"momentum_buffers[{i}]")
    assert_surroundings_unchanged(case, before, "momentum_buffers")


def test_a_scale_that_makes_gradients_infinite(implementation: str) -> None:
    for value, count in ((0.0, 15), (math.nan, 15), (2e-38, 15), (1.0, 0), (math.inf, 0)):
        case = momentum([(3, 5)], torch.float32, grad_scale=scalar(value))
        case.grads[0].fill_(12.0)
        before = case.copy()
        assert case.run().tolist() == [count]
        if count:
            assert_unchanged(case, before, ("momentum_buffers",))
        else:
            assert case.momentum_buffers[0].isfinite().all()


def test_momentum_that_overflows_is_skipped(implementation: str) -> None:
    """And one that only just fits is not, though another such gradient would pass the range."""
    case = momentum([(40,)], torch.float32, weight_decay=10.0)
    case.params[0][3] = 3e38
    case.momentum_buffers[0][17] = math.inf
    case.params[0][21], case.momentum_buffers[0][21], case.grads[0][21] = 0.0, 0.0, 3e38
    before = case.copy()
    assert case.run().tolist() == [2]
    assert_same_bits(case.momentum_buffers[0][[3, 17]], before.momentum_buffers[0][[3, 17]])
    assert case.momentum_buffers[0][21] == 3e38


def test_parameters_are_not_read_without_a_decay(implementation: str) -> None:
    case = momentum(shapes_for(implementation), torch.float32)
    same = case.copy()
    for w in case.params:
        w.fill_(math.nan)
    assert_same_bits(case.run(), same.run())
    assert_unchanged(case, same, ("momentum_buffers",))


@pytest.mark.parametrize("value", [1.0, 2.0, math.inf, math.nan, -1.0])
def test_found_inf_stops_everything(implementation: str, value: float) -> None:
    for dtype in (torch.float32, torch.float64):
        found_inf = scalar(value, dtype)
        shapes = shapes_for(implementation)
        advancing = momentum(shapes, DTYPES, weight_decay=0.1, found_inf=found_inf)
        before = advancing.copy()
        assert_same_bits(advancing.run(), torch.zeros(len(shapes), dtype=torch.int64))
        assert_unchanged(advancing, before, ("params", "grads", "momentum_buffers"))
        stepping = step(shapes, DTYPES, weight_decay=0.1, found_inf=found_inf)
        stepping.options["sums"][0] = math.nan
        still = stepping.copy()
        scale, factors, skipped = stepping.run()
        assert float(scale) == 1.0
        assert_same_bits(factors, torch.ones(-(-len(shapes) // 2), dtype=torch.float64))
        assert_same_bits(skipped, torch.zeros(len(shapes), dtype=torch.int64))
        assert_unchanged(stepping, still, ("params", "directions"))


# The sums.


def defined_sums(case: Any) -> tuple[Tensor, Tensor]:
    """The sums, and their bounds: products of float32 are exact in float64, in which n - 1 sums round at most."""
    rows, bounds = [], []
    for w, d, m in zip(*([x.double().flatten() for x in xs] for xs in case.lists()), strict=True):
        products = (d * m, d * d, w * w)
        rows.append(torch.tensor([math.fsum(x.tolist()) for x in products], dtype=torch.float64))
        sizes = [(len(w) + 2) * DOUBLE * float(x.abs().sum()) for x in products]
        bounds.append(torch.tensor(sizes, dtype=torch.float64))
    return torch.stack(rows), torch.stack(bounds)


def check_sums(case: Any) -> None:
    before, (expected, bounds) = case.copy(), defined_sums(case)
    assert_within(case.run(), expected, bounds)
    assert_unchanged(case, before, ("params", "directions", "momentum_buffers"))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sums(implementation: str, dtype: torch.dtype) -> None:
    check_sums(sums(shapes_for(implementation), dtype))


@pytest.mark.parametrize("moments", [None, SHORT_IN_TURN], ids=["wide", "16 bits"])
def test_sums_of_mixed_dtypes(implementation: str, moments: Any) -> None:
    check_sums(sums(shapes_for(implementation), DTYPES, moments=moments))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sums_of_whole_numbers_are_exact(implementation: str, dtype: torch.dtype) -> None:
    shapes = shapes_for(implementation)
    case = sums(shapes, dtype)
    for k, tensors in enumerate(case.lists()):
        for x in tensors:
            x.copy_(integers(x.shape, dtype, k))
    expected, _ = defined_sums(case)
    assert_within(case.run(), expected, 0.0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("of", ["params", "directions", "momentum_buffers"])
@pytest.mark.parametrize("layout", LAYOUTS.values())
def test_layouts_do_not_show_in_sums(
    implementation: str, layout: Callable[[Tensor], Tensor], of: str, dtype: torch.dtype
) -> None:
    shapes = SOME[-2:] if implementation == "triton" else SHAPES
    case = sums(shapes, dtype, layouts={**ALL_CONTIGUOUS, of: layout}, moments=SHORT_IN_TURN)
    before = case.copy()
    assert_same_bits(case.run(), case.map(contiguous).run())
    assert_unchanged(case, before, ("params", "directions", "momentum_buffers"))


@pytest.mark.parametrize("layout", WRITABLE_LAYOUTS.values())
def test_sums_in_layouts_of_all_at_once(implementation: str, layout: Callable[[Tensor], Tensor]) -> None:
    check_sums(sums(shapes_for(implementation), DTYPES, layout=layout, moments=SHORT_IN_TURN))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("flag", "column", "unread"), [("products", 0, "momentum_buffers"), ("weights", 2, "params")])
def test_what_is_not_wanted_is_not_read(
    implementation: str, flag: str, column: int, unread: str, dtype: torch.dtype
) -> None:
    """Its sums are 0, the others have the same bits, wherever what is not read lies."""
    case = sums(shapes_for(implementation), dtype, moments=SHORT_IN_TURN)
    expected = case.run()
    expected[:, column] = 0
    for lay in (contiguous, sliced):
        without = case.copy()
        without.options[flag] = False
        setattr(without, unread, [lay(torch.full_like(x, math.nan)) for x in getattr(without, unread)])
        assert_same_bits(without.run(), expected)


def test_numbers_beyond_the_squares_of_float32(implementation: str) -> None:
    case = sums(FEW, torch.float32)
    for tensors in case.lists():
        for x in tensors:
            x.mul_(1e37)
    case.params[0][0, 0] = torch.finfo(torch.float32).max
    case.directions[0][0, 0] = -torch.finfo(torch.float32).max
    expected, _ = defined_sums(case)
    assert expected.isfinite().all()
    assert float(expected.max()) > 1e76
    check_sums(case)


def test_sums_beyond_float64_and_of_what_is_not_finite_stay_where_they_are(implementation: str) -> None:
    """No parameter shows in the sums of another, and what is not finite is not lost."""
    shapes = ((3, 5), (2000,), (7,), (40,))
    case = sums(shapes, torch.float64)
    fine = case.run()
    case.directions[1].mul_(1e200)
    case.momentum_buffers[2][6] = math.nan
    case.params[3][11] = -math.inf
    found = case.run()
    assert_same_bits(found[0], fine[0])
    assert found[1].isfinite().tolist() == [True, False, True]
    assert found[2].isfinite().tolist() == [False, True, True]
    assert found[3].isfinite().tolist() == [True, True, False]
    assert_same_bits(found[2, 1:], fine[2, 1:])


def test_sums_of_what_was_skipped_are_nan(implementation: str) -> None:
    case = sums(FEW, torch.float32)
    fine = case.run()
    case.options["skipped"] = torch.tensor([0, 1, 0, 0, 0, 2**40])
    found = case.run()
    skipped = [i in (1, 5) for i in range(len(FEW))]
    assert found.isnan().all(1).tolist() == found.isnan().any(1).tolist() == skipped
    assert_same_bits(found[[0, 2, 3, 4]], fine[[0, 2, 3, 4]])


def test_sums_of_parts_add_up(implementation: str) -> None:
    case = sums([(5000,)], torch.float32)
    cuts = [1, 1023, 0, 1024, 17, 1500, 1435]
    parts = Sums(*([x.clone() for x in tensors[0].split(cuts)] for tensors in case.lists()), {})
    whole = case.run()
    _, bounds = defined_sums(case)
    assert_within(parts.run().sum(0, keepdim=True), whole, 2 * bounds)


# The step.


def members(case: Step) -> list[list[int]]:
    """The parameters of each layer."""
    layers = case.options["layers"]
    return [[i for i, layer in enumerate(layers) if layer == number] for number in range(len(set(layers)))]


class Defined:
    """What a step leaves in float64: scale, factors, parameters and skipped elements; and what rounding allows.

    Scale and factors come of a few operations in float64 on as many sums as there are parameters. In the dtype of the
    direction: the rounded coefficient, its product, two more with a decay, and the difference. Then half a unit in the
    last place of the parameter's own dtype.
    """

    def __init__(self, case: Step) -> None:
        o, count = case.options, len(case.params)
        rates = [float(x) for x in per_parameter(case, "lr")]
        decays = per_parameter(case, "weight_decay")
        caps = [math.inf if x is None else x for x in per_parameter(case, "max_relative_step", None)]
        floors = per_parameter(case, "floor", 1e-3)
        rows = o["sums"].tolist()
        layers = members(case)
        taken = [all(map(math.isfinite, itertools.chain(*(rows[i] for i in m)))) for m in layers]
        clip = o.get("kl_clip")
        total = abs(math.fsum(rates[i] ** 2 * rows[i][0] for m, t in zip(layers, taken, strict=True) if t for i in m))
        terms = sum(abs(rates[i] ** 2 * rows[i][0]) for m, t in zip(layers, taken, strict=True) if t for i in m)
        self.scale = 1.0 if clip is None or total <= clip else math.sqrt(clip / total)
        condition = terms / total if total else 1.0
        self.rounding = 4 * (count + 8) * DOUBLE * condition
        self.factors, self.skipped = [], [0] * count
        self.params: list[Tensor] = [w.double() for w in case.params]
        self.bounds: list[Tensor] = [torch.zeros(w.shape, dtype=torch.float64) for w in case.params]
        for m, t in zip(layers, taken, strict=True):
            numel = sum(case.params[i].numel() for i in m)
            if not t:
                self.factors.append(0.0)
                for i in m:
                    self.skipped[i] = case.params[i].numel()
                continue
            size = self.scale * math.sqrt(math.fsum(rates[i] ** 2 * rows[i][1] for i in m))
            weight = math.sqrt(math.fsum(rows[i][2] for i in m))
            limit = min(caps[i] for i in m) * max(weight, min(floors[i] for i in m) * math.sqrt(numel))
            self.factors.append(min(1.0, limit / size) if size else 1.0)
            for i in m:
                w, d = case.params[i].double(), case.directions[i].double()
                u = unit_roundoff(ACCUMULATOR[case.params[i].dtype])
                along, decay = rates[i] * self.scale * self.factors[-1] * d, rates[i] * decays[i] * w
                self.params[i] = w - along - decay
                sizes = w.abs() + along.abs() + decay.abs()
                tiny = torch.finfo(ACCUMULATOR[case.params[i].dtype]).smallest_normal * (1 + d.abs())
                bound = 2 * (4 * u * sizes + self.rounding * along.abs()) + tiny
                if case.params[i].dtype != ACCUMULATOR[case.params[i].dtype]:
                    bound = bound + unit_roundoff(case.params[i].dtype) * (sizes + bound)
                    bound = bound + torch.finfo(case.params[i].dtype).smallest_normal * 2**-8
                self.bounds[i] = bound

    def check(self, after: Step, results: tuple[Tensor, Tensor, Tensor]) -> None:
        scale, factors, skipped = results
        assert_within(scale, torch.tensor(self.scale, dtype=torch.float64), self.rounding * self.scale, "scale")
        wanted = torch.tensor(self.factors, dtype=torch.float64)
        assert_within(factors, wanted, 2 * self.rounding * wanted, "factors")
        assert skipped.dtype == torch.int64
        assert skipped.tolist() == self.skipped
        for i, (w, value, bound) in enumerate(zip(after.params, self.params, self.bounds, strict=True)):
            assert_within(w, value, bound, f"params[{i}] of shape {tuple(w.shape)}")


def check(case: Step) -> tuple[Tensor, Tensor, Tensor]:
    """Takes the step and compares all it did with the definition."""
    before, expected = case.copy(), Defined(case)
    results = case.run()
    expected.check(case, results)
    assert_surroundings_unchanged(case, before, "params")
    assert_unchanged(case, before, ("directions",))
    return results


OPTIONS: tuple[dict[str, Any], ...] = (
    {"kl_clip": 10.0},
    {"kl_clip": 10.0, "weight_decay": 0.1},
    {"kl_clip": None},
    {"max_relative_step": None},
    {"kl_clip": None, "max_relative_step": None, "weight_decay": 0.01},
    {"kl_clip": 1e30, "lr": 1e-9},  # neither binds
    {"lr": 0.0, "weight_decay": 0.1},
    {"lr": scalar(0.3, torch.float64), "floor": 1.0, "found_inf": scalar(0.0)},
)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_step(implementation: str, options: dict[str, Any], dtype: torch.dtype) -> None:
    shapes = shapes_for(implementation)
    scale, factors, _ = check(step(shapes, dtype, **options))
    if options in OPTIONS[:2]:  # both bounds hold, or there is nothing to see
        assert float(scale) < 1
        assert (factors < 1).any()
        assert (factors[factors < 1] > 0).all()


@pytest.mark.parametrize("options", OPTIONS[:2], ids=str)
def test_step_of_mixed_dtypes(implementation: str, options: dict[str, Any]) -> None:
    check(step(shapes_for(implementation), DTYPES, **options))


@pytest.mark.parametrize(
    "wrong",
    [
        {"lr": 0.1 * (1 + 1e-4)},
        {"kl_clip": 1e-2 * (1 + 1e-3)},
        {"max_relative_step": 0.2 * (1 + 1e-3)},
        {"floor": 0.3},
        {"floor": [1e-3, 1e-3, 0.3, 0.3, 1e-3, 1e-3]},
        {"weight_decay": 0.1 * (1 + 1e-3)},
        {"kl_clip": None},
        {"max_relative_step": None},
        {"layers": [0, 1, 2, 2, 3, 4]},
    ],
    ids=str,
)
def test_rounding_of_a_step_has_teeth(implementation: str, wrong: dict[str, Any]) -> None:
    options = {"lr": 0.1, "kl_clip": 1e-2, "max_relative_step": 0.2, "floor": 1e-3, "weight_decay": 0.1}
    if "lr" in wrong:  # which bounds would make good
        options.update(kl_clip=None, max_relative_step=None)
    case = step(FEW, torch.float32, **options)
    for tensors in (case.params[2:4], case.directions[:2]):  # one layer is small, another one's step is large
        for x in tensors:
            x.mul_(1e-2)
    refresh(case)
    expected = Defined(case)
    case.options.update(wrong)
    results = case.run()
    with pytest.raises(AssertionError):
        expected.check(case, results)


def refresh(case: Step) -> None:
    """Sums as parameters and directions are now; those of the directions and the momentum stay."""
    case.options["sums"] = torch.stack(
        [
            torch.stack([row[0], d.double().square().sum(), w.double().square().sum()])
            for row, w, d in zip(case.options["sums"], case.params, case.directions, strict=True)
        ]
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kl_clip", [None, 1e-3])
def test_what_differs_from_parameter_to_parameter(
    implementation: str, kl_clip: float | None, dtype: torch.dtype
) -> None:
    """Rates (numbers, or tensors of either dtype), decays, caps and floors; of the latter two a layer's is the smallest
    of its parameters."""
    shapes = shapes_for(implementation)
    kinds = (float, scalar, lambda x: scalar(x, torch.float64), lambda x: torch.full((1, 1), x))
    count = len(shapes)
    layers = [i // 3 for i in range(count)]
    options = {
        "lr": [kinds[i % 4](0.0625 * (i % 5)) for i in range(count)],
        "weight_decay": [(0.0, 0.1, 0.02)[i % 3] for i in range(count)],
        "max_relative_step": [(None, 0.02, 0.01, 0.5)[i % 4] for i in range(count)],
        "floor": [(0.0, 10.0, 1.0, 1e-3, 2.0)[i % 5] for i in range(count)],
    }
    check(step(shapes, dtype, layers=layers, kl_clip=kl_clip, **options))
    one = step(FEW[:3], dtype, kl_clip=kl_clip)
    for lr in (0.1, [0.1], (0.1, 0.1, 0.1), [scalar(0.1, torch.float64)] * 3):
        other, same = one.copy(), one.copy()
        other.options.update(lr=lr, max_relative_step=[0.02], weight_decay=[0.0], floor=[1e-3] * len(one.params))
        assert_same_results(other.run(), same.run())
        assert_unchanged(other, same, ("params",))


def test_groups_do_not_change_the_scale(implementation: str) -> None:
    """Parameters of the same rate with a decay and without one, in any layers, share the trust region of all."""
    case = step(FEW, torch.float32, max_relative_step=None, kl_clip=1e-3)
    apart = case.copy()
    apart.options.update(layers=list(range(len(FEW))), weight_decay=[0.1, 0.0] * 3)
    scale, _, _ = case.run()
    other, _, _ = apart.run()
    assert_within(other, scale, (len(FEW) + 4) * DOUBLE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_both_bounds_hold(implementation: str, dtype: torch.dtype) -> None:
    """Of the step as it was taken: |w' - w| is at most the cap, and lr^2 scale^2 |<d, m>| at most kl_clip."""
    for seed, lr in itertools.product(range(3), (1e-3, 0.1, 10.0, 1e6)):
        case = step(FEW, dtype, lr=lr, kl_clip=0.5, max_relative_step=0.02)
        for x in case.directions:
            x.mul_(10.0 ** (3 * seed - 3))
        refresh(case)
        case.options["sums"][:, 0] *= (-1) ** seed  # uphill or down
        before = case.copy()
        scale, factors, _ = check(case)
        total = float(case.options["sums"][:, 0].sum().abs()) * lr**2
        assert float(scale) ** 2 * total <= 0.5 * (1 + 1e-12)
        for number, layer in enumerate(members(case)):
            pairs = [(case.params[i].double(), before.params[i].double()) for i in layer]
            moved = math.sqrt(sum(float((now - then).square().sum()) for now, then in pairs))
            weight = math.sqrt(sum(float(then.square().sum()) for _, then in pairs))
            numel = sum(then.numel() for _, then in pairs)
            limit = 0.02 * max(weight, 1e-3 * math.sqrt(numel))
            slack = math.sqrt(numel) * unit_roundoff(dtype) * 4 * (weight + limit)
            assert moved <= limit + slack
            if float(factors[number]) < 1 and numel:
                assert moved >= limit - slack


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_layers_at_zero_move_as_far_as_the_floor_lets_them(implementation: str, dtype: torch.dtype) -> None:
    case = step([(6, 8), (6,), (3, 5), (3,)], dtype, kl_clip=None, max_relative_step=0.5, floor=1e-2, lr=1.0)
    for w in case.params[:2]:
        w.zero_()
    refresh(case)
    check(case)
    moved = math.sqrt(sum(float(w.double().square().sum()) for w in case.params[:2]))
    assert moved == pytest.approx(0.5 * 1e-2 * math.sqrt(54), rel=0.02 if dtype.itemsize == 2 else 1e-5)
    case.options["floor"] = 0.0
    for w in case.params[:2]:
        w.zero_()
    refresh(case)
    _, factors, skipped = case.run()
    assert float(factors[0]) == 0.0
    assert float(factors[1]) > 0.0
    assert skipped.tolist() == [0, 0, 0, 0]
    assert not any(w.any() for w in case.params[:2])


def test_the_smallest_floor_of_a_layer_counts(implementation: str) -> None:
    """Beside a layer that is larger than its floors, and is capped by what it is."""
    shapes = [(6, 8), (6,), (3, 5), (3,), (7, 9)]
    options = {"kl_clip": None, "max_relative_step": 0.02, "floor": [0.3, 0.1, 0.01, 0.03, 1e-3], "lr": 100.0}
    case = step(shapes, torch.float64, **options)
    for w in case.params[:4]:
        w.zero_()
    refresh(case)
    before = case.copy()
    check(case)
    squares = [float((now - then).square().sum()) for now, then in zip(case.params, before.params, strict=True)]
    moved = [math.sqrt(sum(squares[i : i + 2])) for i in (0, 2, 4)]
    wanted = [0.1 * math.sqrt(54), 0.01 * math.sqrt(18), float(before.params[4].norm())]
    assert moved == pytest.approx([0.02 * x for x in wanted], rel=1e-9)


def test_directions_of_zero(implementation: str) -> None:
    """Nothing divides by them: scale and factors are 1, and the decay goes on."""
    case = step(FEW, torch.float32, weight_decay=0.1)
    for d in case.directions:
        d.zero_()
    case.options["sums"][:, 0] = 0
    refresh(case)
    scale, factors, _ = check(case)
    assert float(scale) == 1.0
    assert factors.tolist() == [1.0, 1.0, 1.0]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", [contiguous, sliced])
def test_a_layer_with_a_sum_that_is_not_finite_stays(
    implementation: str, layout: Callable[[Tensor], Tensor], dtype: torch.dtype
) -> None:
    """Weight and bias, to the bit; the others take the step that they take without it."""
    shapes = ((3, 5), (5,), (4, 6), (6,), (33,), (1,))
    for value, row, column in itertools.product((math.nan, math.inf, -math.inf), (2, 3), range(3)):
        case = step(shapes, dtype, layout=layout, weight_decay=0.1)
        case.params[2][0, 0] = math.nan
        case.options["sums"][row, column] = value
        before, without = case.copy(), case.copy()
        others = [0, 1, 4, 5]
        for name in ("params", "directions"):
            setattr(without, name, [getattr(without, name)[i] for i in others])
        without.options.update(sums=case.options["sums"][others].clone(), layers=[0, 0, 1, 1])
        scale, factors, skipped = case.run()
        expected_scale, expected_factors, _ = without.run()
        assert_same_bits(scale, expected_scale)
        assert float(factors[1]) == 0.0
        assert_same_bits(factors[[0, 2]], expected_factors)
        assert skipped.tolist() == [0, 0, 24, 6, 0, 0]
        for i in (2, 3):
            assert_same_bits(case.params[i], before.params[i])
        for i, k in enumerate(others):
            assert_same_bits(case.params[k], without.params[i])
        assert_surroundings_unchanged(case, before, "params")


def test_a_sum_over_all_beyond_float64(implementation: str) -> None:
    """The trust region then has no room: no step, but for the decay."""
    case = step(FEW, torch.float64, weight_decay=0.1, kl_clip=1.0, max_relative_step=None)
    case.options["sums"][:2, 0] = 1.5e308
    case.options["lr"] = 2.0
    before = case.copy()
    scale, factors, skipped = case.run()
    assert float(scale) == 0.0
    assert factors.tolist() == [1.0, 1.0, 1.0]
    assert not skipped.any()
    for now, then in zip(case.params, before.params, strict=True):
        assert_within(now, then - 0.2 * then, 4 * DOUBLE * then.abs())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("of", ["params", "directions"])
@pytest.mark.parametrize("layout", LAYOUTS.values())
def test_layouts_do_not_show_in_a_step(
    implementation: str, layout: Callable[[Tensor], Tensor], of: str, dtype: torch.dtype
) -> None:
    if layout not in WRITABLE_LAYOUTS.values() and of == "params":
        pytest.skip("is refused")
    shapes = SOME[-2:] if implementation == "triton" else SHAPES
    case = step(shapes, dtype, layouts={**ALL_CONTIGUOUS, of: layout}, weight_decay=0.1)
    plain, before = case.map(contiguous), case.copy()
    assert_same_results(case.run(), plain.run())
    assert_unchanged(case, plain, ("params",), around=False)
    assert_surroundings_unchanged(case, before, "params")


@pytest.mark.parametrize("layout", WRITABLE_LAYOUTS.values())
def test_step_in_layouts_of_all_at_once(implementation: str, layout: Callable[[Tensor], Tensor]) -> None:
    check(step(shapes_for(implementation), DTYPES, layout=layout, weight_decay=0.1))


# All three.


def test_no_parameters(implementation: str) -> None:
    assert_same_bits(momentum((), torch.float32).run(), torch.zeros(0, dtype=torch.int64))
    assert_same_bits(sums((), torch.float32).run(), torch.zeros(0, 3, dtype=torch.float64))
    for options in ({}, {"lr": [], "weight_decay": [], "max_relative_step": []}):
        scale, factors, skipped = step((), torch.float32, **options).run()
        assert float(scale) == 1.0
        assert_same_bits(factors, torch.zeros(0, dtype=torch.float64))
        assert_same_bits(skipped, torch.zeros(0, dtype=torch.int64))


@pytest.mark.slow_interpreted
def test_any_shapes(implementation: str) -> None:
    @(hypothesis.settings(max_examples=8) if implementation == "triton" else hypothesis.settings())
    @hypothesis.given(
        shapes=st.lists(st.lists(st.integers(0, 40), max_size=3).map(tuple), min_size=1, max_size=3),
        layout=st.sampled_from([contiguous, sliced]),
        dtype=st.sampled_from(DTYPES),
    )
    def check_some(shapes: list[tuple[int, ...]], layout: Callable[[Tensor], Tensor], dtype: torch.dtype) -> None:
        check_momentum(momentum(shapes, dtype, layout=layout, weight_decay=0.1))
        check_sums(sums(shapes, dtype, layout=layout))
        check(step(shapes, dtype, layout=layout, weight_decay=0.1))

    check_some()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_step_of_kfac(implementation: str, dtype: torch.dtype) -> None:
    """The three together, with matrices between them, against K-FAC's step in float64: [W | b] of two layers.

    Momentum and directions of a layer are one matrix each, of which weight and bias have a view.
    """
    shapes = [((4, 6), (4,)), ((3, 4), (3,))]
    lr, mu, clip, most, decay = 0.1, 0.9, 1e-3, 0.02, 0.01
    params = [random(s, dtype, 10 * k + i) for k, layer in enumerate(shapes) for i, s in enumerate(layer)]
    grads = [random(s, dtype, 100 + 10 * k + i) for k, layer in enumerate(shapes) for i, s in enumerate(layer)]
    joined = [torch.zeros(o, i + 1) for (o, i), _ in shapes]
    directions = [torch.zeros_like(x) for x in joined]

    def inverse(n: int, seed: int) -> Tensor:
        x = random((n, n), torch.float64, seed)
        return torch.linalg.inv(x @ x.T / n + 0.1 * torch.eye(n))

    factors = [(inverse(o, 200 + o), inverse(i + 1, 300 + i)) for (o, i), _ in shapes]

    def views(matrices: list[Tensor]) -> list[Tensor]:
        return [v for x in matrices for v in (x[:, :-1], x[:, -1])]

    exact = [p.double() for p in params]
    exact_momentum = [torch.zeros(o, i + 1, dtype=torch.float64) for (o, i), _ in shapes]
    bounds = [torch.zeros(p.shape, dtype=torch.float64) for p in params]
    for _ in range(3):
        skipped = heavy_ball_(params, grads, views(joined), momentum=mu)
        for d, m, (g_inverse, a_inverse) in zip(directions, joined, factors, strict=True):
            d.copy_(g_inverse @ m.double() @ a_inverse)
        all_sums = direction_sums(params, views(directions), views(joined), skipped=skipped)
        scale, factor, left = capped_step_(
            params, views(directions), all_sums, [0, 0, 1, 1], lr=lr, weight_decay=decay, kl_clip=clip,
            max_relative_step=most,
        )  # fmt: skip
        for k, m in enumerate(exact_momentum):
            m.mul_(mu).add_(torch.cat([grads[2 * k].double(), grads[2 * k + 1].double()[:, None]], 1))
        exact_directions = [g @ m @ a for m, (g, a) in zip(exact_momentum, factors, strict=True)]
        along = sum(float((d * m).sum()) for d, m in zip(exact_directions, exact_momentum, strict=True))
        nu = min(1.0, math.sqrt(clip / (lr**2 * abs(along))))
        assert float(scale) == pytest.approx(nu, rel=1e-4)
        assert not left.any()
        for k, d in enumerate(exact_directions):
            w = torch.cat([exact[2 * k], exact[2 * k + 1][:, None]], 1)
            c = min(1.0, most * max(float(w.norm()), 1e-3 * math.sqrt(w.numel())) / (lr * nu * float(d.norm())))
            # In float32 the directions are off by a few thousand units; a parameter in bfloat16 by half a unit a step,
            # which the next step's cap sees.
            assert float(factor[k]) == pytest.approx(c, rel=1e-4 if dtype == torch.float32 else 2e-2)
            w = (1 - lr * decay) * w - lr * nu * c * d
            exact[2 * k], exact[2 * k + 1] = w[:, :-1].clone(), w[:, -1].clone()
            for i, now in ((2 * k, exact[2 * k]), (2 * k + 1, exact[2 * k + 1])):
                bounds[i] += 2 * unit_roundoff(dtype) * now.abs() + 1e-5 + (1e-3 if dtype != torch.float32 else 0)
    for i, (p, value) in enumerate(zip(params, exact, strict=True)):
        assert_within(p, value, bounds[i], f"params[{i}]")


def long_shapes(implementation: str) -> tuple[tuple[int, ...], ...]:
    """Cut into three shares of the elements, these end within tensors and between them."""
    if implementation == "triton":
        return ((7,), (65, 130), (97, 25))
    return ((130, 257), (7,), (40001,), (0,), (64, 3, 200), (1024, 33), (97, 256))


@pytest.mark.parametrize("layout", [contiguous, sliced, channels_last])
@pytest.mark.parametrize("make", [momentum, sums, step])
def test_same_bits_at_every_run_and_for_every_number_of_threads(
    implementation: str,
    set_threads: Callable[[int], None],
    layout: Callable[[Tensor], Tensor],
    make: Callable[..., Any],
) -> None:
    moments = {} if make is step else {"moments": SHORT_IN_TURN}
    case = make(long_shapes(implementation), (torch.float32, torch.bfloat16), layout=layout, **moments)
    if make is momentum:
        for gradient in case.grads[::2]:
            gradient.view(gradient.shape)[..., ::3] = math.nan
    results = []
    for threads in (1, 1) if implementation == "triton" else (1, 1, 2, 3):
        set_threads(threads)
        copy = case.copy()
        result = copy.run()
        results.append((copy, result if isinstance(result, tuple) else (result,)))
    names = [name for name in ("params", "momentum_buffers") if hasattr(case, name)]
    for copy, result in results[1:]:
        assert_same_results(result, results[0][1])
        assert_unchanged(copy, results[0][0], names)


def followed(x: Tensor) -> Tensor:
    """The same at the start of memory that goes on."""
    return torch.cat([x.flatten(), x.new_full((8192,), 7)])[: x.numel()].view(x.shape)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("moments", [None, torch.bfloat16], ids=str)
def test_full_chunks(implementation: str, moments: torch.dtype | None, dtype: torch.dtype) -> None:
    """GPUs have a path of wide accesses, unless they are not aligned: the same bits."""
    sizes = [2 * 8192 + 5]
    if implementation != "triton":
        sizes += [8191, 8192 + 4096, 8192 + 1024 + 3]  # whole moves of a block, two by two and one by one, and less
    for size in sizes:
        for case, examine, written in (
            (
                momentum([(size,)], dtype, layout=followed, moments=moments, weight_decay=0.1),
                check_momentum,
                "momentum_buffers",
            ),
            (sums([(size,)], dtype, layout=followed, moments=moments), check_sums, "params"),
            (step([(size,)], dtype, layout=followed, weight_decay=0.1), check, "params"),
        ):
            moved = case.map(unaligned)
            unmoved = case.copy()
            examine(case)
            result, expected = moved.run(), unmoved.run()
            many = isinstance(result, tuple)
            assert_same_results(result if many else (result,), expected if many else (expected,))
            assert_unchanged(moved, case, (written,), around=False)


@pytest.mark.slow_on_host
def test_many_tensors(implementation: str) -> None:
    """More than the parameters of one launch have room for, of those that are contiguous and of those that are not."""
    if implementation == "triton":
        pytest.skip("all of them are one launch, in an interpreter that takes minutes")
    shapes = [(2, 3)] * (1500 if "cuda" in implementation else 300)
    advancing = momentum(shapes, torch.float32, weight_decay=0.1)
    adding, stepping = sums(shapes, torch.float32), step(shapes, torch.float32, weight_decay=0.1)
    for tensors in (advancing.momentum_buffers, adding.directions, stepping.params):
        tensors[::5] = map(sliced, tensors[::5])
    check_momentum(advancing)
    check_sums(adding)
    check(stepping)


@pytest.mark.slow_on_host
def test_many_chunks(implementation: str) -> None:
    """More than are added up side by side."""
    if implementation == "triton":
        pytest.skip("would take minutes")
    check_sums(sums([(259, 8192), (3, 5)], torch.bfloat16))


# Triton.


@interpreted
def test_offsets_beyond_32_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """The last chunk of a tensor of more than 2^31 elements, of which no other is there."""
    from fisher_kernels.triton_kernels import capped_step as kernels

    for make, widths in ((momentum, (2, 2, 4)), (sums, (2, 4, 4)), (step, (2, 4, 4))):
        case = make([(100,)], torch.bfloat16)
        if make is step:  # the floor knows how many elements there are
            case.options["floor"] = 0.0
        near = case.copy()
        with use_backend("triton"), monkeypatch.context() as patch:
            expected = near.run()
            patch.setattr(kernels, "table", far(kernels.table, widths))
            patch.setattr(kernels, "new_partials", far_partials)
            patch.setattr(kernels, "add_chunks", far_sums)
            result = case.run()
        many = isinstance(result, tuple)
        assert_same_results(result if many else (result,), expected if many else (expected,))
        assert_unchanged(case, near, [name for name in ("params", "momentum_buffers") if hasattr(case, name)])


@interpreted
def test_numbers_on_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where reading them would wait, kernels read them: the same bits."""
    from fisher_kernels.triton_kernels import _steps
    from fisher_kernels.triton_kernels import capped_step as kernels

    each = [scalar(0.1), scalar(0.2, torch.float64), scalar(0.3)]
    cases = [momentum(FEW[:3], DTYPES, maximize=maximize, grad_scale=scalar(3.0)) for maximize in (False, True)]
    cases += [step(FEW[:3], DTYPES, lr=lr, weight_decay=0.1) for lr in (scalar(0.1), each, each[:1])]
    for case in cases:
        on_host = case.copy()
        with use_backend("triton"):
            expected = on_host.run()
            with monkeypatch.context() as patch:
                for module in (kernels, _steps):
                    patch.setattr(module, "scalar", lambda x: (1.0, x))
                result = case.run()
        many = isinstance(result, tuple)
        assert_same_results(result if many else (result,), expected if many else (expected,))
        assert_unchanged(case, on_host, [name for name in ("params", "momentum_buffers") if hasattr(case, name)])


@interpreted
def test_launches_and_uploads(monkeypatch: pytest.MonkeyPatch) -> None:
    """A longer list is no more launches; a new rate of all is no upload, rates of each are one when they change."""
    from fisher_kernels.triton_kernels import _launch, _lists

    launches: list[Any] = []
    uploads: list[Tensor] = []
    monkeypatch.setattr(_lists, "_upload", lambda host, device: uploads.append(host) or host)

    def counts(case: Any, **options: Any) -> tuple[int, int]:
        case.options.update(options)
        launches.clear()
        uploads.clear()
        with use_backend("triton"), _launch.recording(launches.append):
            case.run()
        return len(launches), len(uploads)

    for length in (1, 40):
        for make, number in ((momentum, 1), (sums, 3), (step, 2)):
            case = make([(3, 5)] * length, torch.float32)
            assert counts(case)[0] == number
            assert counts(case) == (number, 0)
        assert counts(case, lr=0.2) == (2, 0)
    counts(case, lr=[0.1 * i for i in range(length)])
    assert counts(case) == (2, 0)
    assert counts(case, lr=[0.2 * i for i in range(length)]) == (2, 1)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_parameters_that_momentum_does_not_read_are_checked_all_the_same(backend: str) -> None:
    """Also where gradients and moments are those of a call before."""
    grads, buffers = ([torch.ones(2, 3)] for _ in range(2))
    heavy_ball_([torch.ones(2, 3)], grads, buffers, momentum=0.5)
    before = buffers[0].clone()
    nested = torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])
    for params, message in (([nested], "nested"), ([torch.ones(3, 2)], "shape")):
        with pytest.raises((TypeError, ValueError), match=message):
            heavy_ball_(params, grads, buffers, momentum=0.5)
        assert torch.equal(buffers[0], before)


@pytest.mark.parametrize("layout", [contiguous, sliced, channels_last])
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_steps_round_at_random(implementation: str, decay: float, layout: Callable[[Tensor], Tensor]) -> None:
    case = step(for_rounding(implementation), DTYPES, layout=layout, weight_decay=decay)
    case.options["sums"][0, 1] = math.nan
    wide = case.map(lambda x: x.to(ACCUMULATOR[x.dtype], copy=True))
    before = case.copy()
    case.options.update(rounding(case))
    _, factors, skipped = case.run()
    assert_same_results((factors, skipped), wide.run()[1:])
    kept = [(skipped[i] > 0).expand(p.shape) for i, p in enumerate(case.params)]
    assert_rounded(case, wide, before, "params", "high", kept)
    assert bool(factors[0] == 0)
