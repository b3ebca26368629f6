"""sofim_step_ against its definition in float64."""

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
from fisher_kernels.ops import ACCUMULATOR, Rounding, sofim_step_, stochastic_round
from tests.cases import (
    DTYPES,
    LAYOUTS_OF_A_STEP,
    WRITABLE_LAYOUTS,
    channels_last,
    contiguous,
    layouts_of_a_step,
    random,
    sliced,
    transposed,
    unaligned,
)
from tests.cases.sofim_step import NAMES, SHAPES, Step, step
from tests.cases.steps import SHORT_IN_TURN
from tests.comparison import assert_same_bits, assert_within, surroundings, unit_roundoff
from tests.interpreted import far, far_partials, far_sums, interpreted

pytestmark = [pytest.mark.usefixtures("poisoned_memory", "one_thread"), pytest.mark.pairs_interpreted]

WRITTEN = ("params", "exp_avgs")
FORMS = list(itertools.product(("momentum", "gradient"), ("global", "tensor")))
each_form = pytest.mark.parametrize(("direction", "scope"), FORMS)

# So few elements that the solve depends on each of them.
FEW = ((3, 5), (5,), (), (1,), (0,), (17,))


# What Triton's interpreter takes instead of the shapes of all: it is slow, at every tensor.
SOME = ((3, 5), (), (0,), (2, 1030), (4, 3, 2, 5, 9))


def shapes_for(implementation: str) -> tuple[tuple[int, ...], ...]:
    return SOME if implementation == "triton" else SHAPES


def scalar(value: float, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.tensor(value, dtype=dtype)


def per_parameter(case: Step, name: str) -> list[float]:
    """An option that is one number, or a list of one or of all."""
    value = case.options.get(name, 0.0)
    values = value if isinstance(value, list) else [value]
    return [float(v) for v in (values * len(case.params) if len(values) == 1 else values)]


# The definition and the rounding that is allowed beside it.


def gradients(case: Step) -> list[Tensor]:
    """What enters the moments, in float64."""
    o = case.options
    scale = float(o["grad_scale"]) if o.get("grad_scale") is not None else 1.0
    result = []
    for w, g, decay in zip(case.params, case.grads, per_parameter(case, "weight_decay"), strict=True):
        value = g.double() / scale * (-1 if o.get("maximize") else 1)
        result.append(value if o.get("decoupled", True) else value + decay * w.double())
    return result


def corrections(case: Step) -> list[float]:
    return [1 - case.options["beta"] ** (float(t) + 1) for t in case.steps]


def naive(case: Step) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """Parameters, moments and squares in float64 by way of the matrix F, which the op never forms."""
    beta, rho = case.options["beta"], case.options["rho"]
    gs = gradients(case)
    moments = [beta * m.double() + (1 - beta) * g for m, g in zip(case.exp_avgs, gs, strict=True)]
    corrected = [m / c for m, c in zip(moments, corrections(case), strict=True)]

    def solve(u: Tensor, g: Tensor) -> Tensor:
        matrix = torch.outer(u, u) + rho * torch.eye(len(u), dtype=torch.float64)
        return torch.linalg.solve(matrix, g if case.options.get("direction") == "gradient" else u)

    flat = [[x.reshape(-1) for x in xs] for xs in (corrected, gs)]
    if case.options.get("scope") == "tensor":
        steps = [solve(u, g) for u, g in zip(*flat, strict=True)]
    else:
        steps = list(solve(*(torch.cat(xs) for xs in flat)).split([len(u) for u in flat[0]]))
    params = []
    rates, decays = per_parameter(case, "lr"), per_parameter(case, "weight_decay")
    for w, d, lr, decay in zip(case.params, steps, rates, decays, strict=True):
        shrinkage = decay if case.options.get("decoupled", True) else 0.0
        params.append(w.double() - lr * (d.view(w.shape) + shrinkage * w.double()))
    return params, moments, torch.stack([u.square().sum() for u in flat[0]])


class Allowed:
    """How far parameters, moments and squares may lie from their definition after the step from ``case``.

    In the dtype of a moment: up to 3 roundings of the gradient's terms (scale, decay and its product), 8 of those of
    the moment. Both change the dot products, which are added up exactly but for n roundings in float64; these change
    the coefficients, which are rounded themselves; the products and sums that make the change round 6 times, the
    decoupled decay 4 times, and what is left once more. The definition in float64 rounds as often: twice all that.
    Then half a unit in the last place of the parameter's own dtype. Numbers below the normal ones may be lost. A moment
    that is stored in 16 bits is off by half a unit of its own as well, wherever it is used.
    """

    def __init__(self, case: Step) -> None:
        o = case.options
        scale = float(o["grad_scale"]) if o.get("grad_scale") is not None else 1.0
        rates, decays, divisors = per_parameter(case, "lr"), per_parameter(case, "weight_decay"), corrections(case)
        along_gradient = o.get("direction") == "gradient"
        rho, count = o["rho"], sum(w.numel() for w in case.params)
        gs = gradients(case)
        us = [unit_roundoff(ACCUMULATOR[w.dtype]) for w in case.params]
        tinies = [torch.finfo(ACCUMULATOR[w.dtype]).smallest_normal for w in case.params]
        sizes_g, sizes_m = [], []  # what is added up, in absolute values
        self.moments, of_storing, square_errors, product_errors, squares, products = [], [], [], [], [], []
        for i, (w, g, m) in enumerate(zip(case.params, gs, case.exp_avgs, strict=True)):
            of_gradient = case.grads[i].double().abs() / abs(scale)
            if not o.get("decoupled", True):
                of_gradient = of_gradient + decays[i] * w.double().abs()
            of_moment = o["beta"] * m.double().abs() + (1 - o["beta"]) * of_gradient
            sizes_g.append(of_gradient)
            sizes_m.append(of_moment)
            moment = (o["beta"] * m.double() + (1 - o["beta"]) * g).abs()
            error_m, error_g = 8 * us[i] * of_moment + tinies[i], 3 * us[i] * of_gradient + tinies[i]
            stored = torch.zeros_like(error_m)
            if m.dtype not in (torch.float64, ACCUMULATOR[w.dtype]):
                stored = unit_roundoff(m.dtype) * (moment + 2 * error_m) + torch.finfo(m.dtype).smallest_normal * 2**-8
            self.moments.append(2 * error_m + stored)
            of_storing.append(stored)
            error_m = error_m + stored
            n = count * unit_roundoff(torch.float64)
            squares.append((moment.square().sum() / divisors[i] ** 2).item())
            square_errors.append(((2 * moment * error_m).sum() / divisors[i] ** 2).item() + n * squares[-1])
            products.append(((moment * g.abs()).sum() / divisors[i]).item())
            of_products = (moment * error_g + g.abs() * error_m).sum() / divisors[i]
            product_errors.append(of_products.item() + n * products[-1])
        self.squares = torch.tensor(square_errors, dtype=torch.float64) * 2
        if o.get("scope", "global") == "global":
            squares, products, square_errors, product_errors = (
                [sum(x)] * len(x) for x in (squares, products, square_errors, product_errors)
            )
        self.params = []
        for i, w in enumerate(case.params):
            u, tiny, bottom = us[i], tinies[i], rho + squares[i]
            relative = square_errors[i] / bottom
            if along_gradient:
                coefficient = products[i] / (divisors[i] * rho * bottom)
                error = product_errors[i] / (divisors[i] * rho * bottom)
            else:
                coefficient, error = 1 / (divisors[i] * bottom), 0.0
            error = error + coefficient * (relative + 2 * u) + tiny
            size = coefficient * sizes_m[i]
            moment_error = 8 * u * sizes_m[i] + tiny + of_storing[i]
            change_error = error * sizes_m[i] + coefficient * moment_error + 6 * u * size
            if along_gradient:
                size = size + sizes_g[i] / rho
                change_error = change_error + (10 * u * sizes_g[i] + tiny) / rho
            decay = decays[i] * w.double().abs() if o.get("decoupled", True) else torch.zeros_like(size)
            largest = w.double().abs() + rates[i] * (size + decay)
            bound = 2 * (rates[i] * (change_error + 4 * u * decay) + u * largest) + tiny
            if w.dtype != ACCUMULATOR[w.dtype]:
                bound = bound + unit_roundoff(w.dtype) * (largest + bound)
                bound = bound + torch.finfo(w.dtype).smallest_normal * 2**-8
            self.params.append(bound)


def defined(case: Step) -> tuple[Step, Tensor, Tensor]:
    """The step in float64 on the reference: what it leaves, the counts and the squares."""
    result = case.double()
    with use_backend("reference"):
        return result, *result.run()


def check(case: Step) -> Step:
    """Takes the step and compares all it did with the definition; returns the arguments as they are afterwards."""
    expected, skipped, squares = defined(case)
    before, after = case.copy(), case
    actual_skipped, actual_squares = after.run()
    assert_same_bits(actual_skipped, skipped, "skipped")
    assert_step(after, actual_squares, expected, squares, before)
    for i, name in itertools.product(range(len(before.params)), WRITTEN):
        now, then = (surroundings(getattr(s, name)[i]) for s in (after, before))
        assert_same_bits(now, then, f"memory around {name}[{i}]")
    assert_unchanged(after, before, ("grads",))
    return after


def assert_step(after: Step, squares: Tensor, expected: Step, expected_squares: Tensor, before: Step) -> None:
    """``after`` is ``expected``, to the rounding of a step from ``before``."""
    rounding = Allowed(before)
    assert_within(squares, expected_squares, rounding.squares, "squares")
    for i, param in enumerate(after.params):
        what = f"[{i}] of shape {tuple(param.shape)}"
        assert_within(after.exp_avgs[i], expected.exp_avgs[i], rounding.moments[i], f"exp_avgs{what}")
        assert_within(param, expected.params[i], rounding.params[i], f"params{what}")
        assert_same_bits(after.steps[i], expected.steps[i], f"steps{what}")


def assert_unchanged(after: Step, before: Step, names: Sequence[str] = NAMES, around: bool = True) -> None:
    for name in names:
        for i, (now, then) in enumerate(zip(getattr(after, name), getattr(before, name), strict=True)):
            if now.device.type == "cpu":
                assert_same_bits(now, then, f"{name}[{i}]")
                if around:
                    assert_same_bits(surroundings(now), surroundings(then), f"memory around {name}[{i}]")


def assert_same_results(actual: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor], what: str = "") -> None:
    for a, e in zip(actual, expected, strict=True):
        assert_same_bits(a, e, what)


OPTIONS: tuple[dict[str, Any], ...] = (
    {},
    {"weight_decay": 0.01},
    {"weight_decay": 0.1, "decoupled": False},
    {"maximize": True, "weight_decay": 0.1, "decoupled": False, "grad_scale": scalar(3.0)},
    {"maximize": True, "weight_decay": 0.01, "grad_scale": scalar(1024.0, torch.float64)},
    {"beta": 0.0, "rho": 1e-3, "lr": 0.01},
    {"beta": 0.999, "rho": 1e5, "found_inf": scalar(0.0)},
    {"lr": 0.0, "weight_decay": 0.1},
)


@each_form
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_definition(options: dict[str, Any], direction: str, scope: str) -> None:
    """The reference in float64 is what the matrix says, as far as the condition of a solve with it allows."""
    case = step((*FEW, (200,)), torch.float64, direction=direction, scope=scope, **options)
    params, moments, squares = naive(case)
    after, skipped, actual_squares = defined(case)
    assert skipped.tolist() == [0] * len(case.params)
    rounding = Allowed(case)
    condition = 1 + float(squares.sum()) / case.options["rho"]
    solved = sum(w.numel() for w in case.params) * condition * unit_roundoff(torch.float64)
    assert_within(actual_squares, squares, rounding.squares, "squares")
    for i, (w, lr) in enumerate(zip(case.params, per_parameter(case, "lr"), strict=True)):
        right = gradients(case)[i] if direction == "gradient" else moments[i] / corrections(case)[i]
        bound = rounding.params[i] + lr * solved * right.norm() / case.options["rho"]
        assert_within(after.params[i], params[i], bound, f"params[{i}] of shape {tuple(w.shape)}")
        assert_within(after.exp_avgs[i], moments[i], rounding.moments[i], f"exp_avgs[{i}]")
        assert float(after.steps[i]) == float(case.steps[i]) + 1


@each_form
@pytest.mark.parametrize(
    "wrong",
    [
        {"lr": 10.0 * (1 + 2e-4)},
        {"beta": 0.9 + 1e-5},
        {"rho": 30.0 * (1 + 2e-3)},
        {"weight_decay": 0.1 * (1 + 1e-3)},
        {"decoupled": True},
        {"maximize": True},
        {"grad_scale": scalar(1 + 1e-4)},
        {"direction": "other"},
        {"scope": "other"},
    ],
    ids=str,
)
def test_allowed_rounding_has_teeth(implementation: str, wrong: dict[str, Any], direction: str, scope: str) -> None:
    """A slip in the fourth figure of any one number, or another choice, is more than rounding allows."""
    others = {
        "direction": {"momentum": "gradient", "gradient": "momentum"},
        "scope": {"global": "tensor", "tensor": "global"},
    }
    case = step(
        FEW, torch.float32, lr=10.0, rho=30.0, weight_decay=0.1, decoupled=False, direction=direction, scope=scope
    )
    expected, _, squares = defined(case)
    slipped = case.copy()
    slipped.options.update({k: others[k][case.options[k]] if v == "other" else v for k, v in wrong.items()})
    _, slipped_squares = slipped.run()
    with pytest.raises(AssertionError, match="entries are off"):
        assert_step(slipped, slipped_squares, expected, squares, case)


# Every implementation against the definition.


@each_form
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_step(
    implementation: str,
    options: dict[str, Any],
    dtype: torch.dtype,
    direction: str,
    scope: str,
) -> None:
    check(step(shapes_for(implementation), dtype, direction=direction, scope=scope, **options))
    check(step(FEW, dtype, direction=direction, scope=scope, **options))


@each_form
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_mixed_dtypes(implementation: str, dtype: torch.dtype, direction: str, scope: str) -> None:
    first = DTYPES.index(dtype)
    dtypes = DTYPES[first:] + DTYPES[:first]
    options = {"direction": direction, "scope": scope, "weight_decay": 0.01}
    check(step(shapes_for(implementation), dtypes, **options))
    check(step(shapes_for(implementation), dtypes, moments=SHORT_IN_TURN, **options))


@each_form
@pytest.mark.parametrize("moments", [None, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", [contiguous, channels_last])
def test_stochastic_rounding(
    implementation: str,
    layout: Callable[[Tensor], Tensor],
    moments: torch.dtype | None,
    direction: str,
    scope: str,
) -> None:
    check_rounding(shapes_for(implementation), moments, layout, direction=direction, scope=scope)


@pytest.mark.parametrize("moments", [None, torch.bfloat16], ids=str)
def test_stochastic_rounding_of_parameters_that_several_blocks_of_a_gpu_share(
    implementation: str, moments: torch.dtype | None
) -> None:
    shape = (2, 1030) if implementation == "triton" else (2, 8201)
    check_rounding([shape] * 2, moments, contiguous)


def check_rounding(
    shapes: Sequence[tuple[int, ...]],
    moments: torch.dtype | None,
    layout: Callable[[Tensor], Tensor],
    **options: Any,
) -> None:
    """What the same step makes in float32, rounded by the integers of the parameter, the step and the place.

    Parameters are compared where moments are in float32: others are in the norm as they were rounded.
    """
    case = step(shapes, torch.bfloat16, moments=moments, layout=layout, weight_decay=0.1, **options)
    wide = case.map(lambda x: x.to(torch.float32, copy=True))
    case.grads[0][0, 0] = wide.grads[0][0, 0] = math.nan
    places = [{"offset": 1000 * i} for i in range(len(case.params))]
    before = case.copy()
    case.options["rounding"] = [Rounding.of(3, i, **place) for i, place in enumerate(places)]
    skipped, _ = case.run()
    assert_same_bits(skipped, wide.run()[0])
    for i, place in enumerate(places):
        of = {"seed": 3, "ordinal": i, "step": int(case.steps[i]), **place}
        kept = ~case.grads[i].isfinite()
        if moments is None:
            expected = stochastic_round(wide.params[i], half="high", **of)
            assert_same_bits(case.params[i], torch.where(kept, before.params[i], expected), f"params[{i}]")
        else:
            expected = stochastic_round(wide.exp_avgs[i], half="low", **of)
            assert_same_bits(case.exp_avgs[i], torch.where(kept, before.exp_avgs[i], expected), f"exp_avgs[{i}]")


@each_form
def test_parts_are_rounded_by_the_integers_of_the_whole(implementation: str, direction: str, scope: str) -> None:
    """With a rate of 0 and no momentum: parameters stay, and moments are gradients."""
    options = {"direction": direction, "scope": scope, "lr": 0.0, "beta": 0.0}
    whole = step([(12, 35)], torch.float32, moments=torch.bfloat16, **options)
    part = whole.map(lambda x: x[3:8, 10:31].clone())
    whole.options["rounding"] = [Rounding.of(3, 1)]
    part.options["rounding"] = [Rounding.of(3, 1, offset=3 * 35 + 10, run=21, pitch=35)]
    whole.run()
    part.run()
    assert_same_bits(part.exp_avgs[0], whole.exp_avgs[0][3:8, 10:31])
    assert bool((part.exp_avgs[0] != part.grads[0].to(torch.bfloat16)).any())


@each_form
def test_no_parameters(implementation: str, direction: str, scope: str) -> None:
    for options in ({}, {"lr": [], "weight_decay": []}):
        skipped, squares = step((), torch.float32, direction=direction, scope=scope, **options).run()
        assert_same_bits(skipped, torch.zeros(0, dtype=torch.int64))
        assert_same_bits(squares, torch.zeros(0, dtype=torch.float64))


@pytest.mark.slow_interpreted
def test_any_shapes(implementation: str) -> None:
    @(hypothesis.settings(max_examples=8) if implementation == "triton" else hypothesis.settings())
    @hypothesis.given(
        shapes=st.lists(st.lists(st.integers(0, 40), max_size=3).map(tuple), max_size=3),
        layout=st.sampled_from([contiguous, sliced]),
        dtype=st.sampled_from(DTYPES),
        form=st.sampled_from(FORMS),
    )
    def check_some(
        shapes: list[tuple[int, ...]],
        layout: Callable[[Tensor], Tensor],
        dtype: torch.dtype,
        form: tuple[str, str],
    ) -> None:
        options = {"direction": form[0], "scope": form[1], "weight_decay": 0.1, "decoupled": False}
        check(step(shapes, dtype, layout=layout, moments=SHORT_IN_TURN, **options))

    check_some()


@each_form
@pytest.mark.parametrize("decoupled", [True, False])
@pytest.mark.slow_interpreted
def test_rates_and_decays_of_each(implementation: str, decoupled: bool, direction: str, scope: str) -> None:
    """Lists of one are for all; zeros among others are zeros; a rate may be any tensor of one element."""
    shapes = shapes_for(implementation)
    rates: list[Any] = [0.01 * (i % 5) for i in range(len(shapes))]
    decays = [(0.0, 0.1, 0.02)[i % 3] for i in range(len(shapes))]
    options = {"decoupled": decoupled, "direction": direction, "scope": scope}
    case = step(shapes, DTYPES, lr=rates, weight_decay=decays, **options)
    same = case.copy()
    kinds = (float, scalar, lambda x: scalar(x, torch.float64), lambda x: torch.full((1, 1), x, dtype=torch.float64))
    exact = [float(scalar(x)) for x in rates]
    case.options["lr"] = exact
    same.options["lr"] = [kinds[i % 4](x) for i, x in enumerate(exact)]
    check(case)
    same.run()
    assert_unchanged(same, case)

    few = FEW[:3] if implementation == "triton" else FEW
    one = step(few, DTYPES, lr=[0.25], weight_decay=[0.1], **options)
    shared = scalar(0.25)
    for lr in (0.25, shared, [shared] * len(few), tuple(scalar(0.25) for _ in few)):
        other = one.copy()
        other.options.update(lr=lr, weight_decay=0.1)
        expected = one.copy()
        assert_same_results(other.run(), expected.run())
        assert_unchanged(other, expected)
    assert float(shared) == 0.25


@each_form
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("of", "layout"), LAYOUTS_OF_A_STEP)
def test_layouts_do_not_show(
    implementation: str,
    of: str,
    layout: Callable[[Tensor], Tensor],
    dtype: torch.dtype,
    direction: str,
    scope: str,
) -> None:
    """The same bits wherever the elements of one of the three lie, and no other bits around them."""
    shapes = SOME[-2:] if implementation == "triton" else SHAPES
    options = {"direction": direction, "scope": scope, "weight_decay": 0.1, "decoupled": False}
    case = step(shapes, dtype, moments=SHORT_IN_TURN, **layouts_of_a_step(of, layout), **options)
    case.grads[-1].view(case.grads[-1].shape)[0, 0, 0, 0, 0] = math.nan
    plain, before = case.map(contiguous), case.copy()
    assert_same_results(case.run(), plain.run())
    assert_unchanged(case, plain, NAMES, around=False)
    for name, i in itertools.product(WRITTEN, range(len(shapes))):
        now, then = (surroundings(getattr(s, name)[i]) for s in (case, before))
        assert_same_bits(now, then, f"memory around {name}[{i}]")


@each_form
@pytest.mark.parametrize("layout", WRITABLE_LAYOUTS.values())
def test_layouts_of_all_at_once(
    implementation: str, layout: Callable[[Tensor], Tensor], direction: str, scope: str
) -> None:
    options = {"direction": direction, "scope": scope, "weight_decay": 0.1, "decoupled": False}
    check(step(shapes_for(implementation), DTYPES, moments=SHORT_IN_TURN, layout=layout, **options))


@pytest.mark.parametrize("layout", [channels_last, transposed])
def test_dense_tensors_are_walked_in_the_order_of_memory(backend: str, layout: Callable[[Tensor], Tensor]) -> None:
    """As the same elements in the same places are under any other shape."""
    if backend == "reference":
        pytest.skip("walks in row-major order")
    case = step(shapes_for(backend), DTYPES, layout=layout)
    flat = case.map(lambda x: x.as_strided((x.numel(),), (1,), x.storage_offset()).clone())
    assert_same_results(case.run(), flat.run())
    for name in WRITTEN:
        for x, y in zip(getattr(case, name), getattr(flat, name), strict=True):
            assert_same_bits(x.as_strided((x.numel(),), (1,), x.storage_offset()), y, name)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_whole_numbers_are_exact(implementation: str, dtype: torch.dtype) -> None:
    """With rho + |u|^2 a power of two, every intermediate result fits, so nothing is rounded."""
    for shape in shapes_for(implementation):
        case = step([shape], dtype, beta=0.5, weight_decay=2**-18)
        for i, tensors in enumerate((case.params, case.grads, case.exp_avgs)):
            tensors[0].copy_(torch.arange(tensors[0].numel()).remainder(5 + i).sub(2).view(shape))
        case.steps[0].fill_(0.0)  # 1 - beta^1 = 0.5
        square = (case.grads[0].double() + case.exp_avgs[0].double()).square().sum()
        case.options["rho"] = 2.0**18 - float(square)
        case.options["lr"] = 2.0**18
        expected, _, squares = defined(case)
        _, actual_squares = case.run()
        assert_within(actual_squares, squares, 0.0, f"{shape}")
        assert_within(actual_squares, square.view(1), 0.0, f"{shape}")
        assert_within(case.params[0], expected.params[0], 0.0, f"{shape}")
        assert_within(case.exp_avgs[0], expected.exp_avgs[0], 0.0, f"{shape}")


@each_form
def test_a_long_run(implementation: str, direction: str, scope: str) -> None:
    """The bias correction fades, and errors stay those of the roundings of all steps."""
    few, count = {"triton": (FEW[:2], 15), "cuda": (FEW[:2], 100)}.get(implementation, (FEW, 100))
    case = step(few, torch.float32, direction=direction, scope=scope)
    for t in case.steps:
        t.zero_()
    expected = case.double()
    total = [torch.zeros(p.shape, dtype=torch.float64) for p in case.params]
    for k in range(count):
        for i, p in enumerate(case.params):
            gradient = random(p.shape, p.dtype, 1000 * k + i)
            case.grads[i].copy_(gradient)
            expected.grads[i].copy_(gradient)
        total = [t + bound for t, bound in zip(total, Allowed(case).params, strict=True)]
        case.run()
        with use_backend("reference"):
            expected.run()
    for i, p in enumerate(case.params):
        assert float(case.steps[i]) == count
        # An error of the moment is felt for 1 / (1 - beta) steps.
        assert_within(p, expected.params[i], 10 * total[i], f"parameter {i}")


@pytest.mark.parametrize("direction", ["momentum", "gradient"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_vector_however_it_is_cut(implementation: str, dtype: torch.dtype, direction: str) -> None:
    """The global solve knows nothing of tensors: only the order in which its dot products are added up changes."""
    whole = step([(5000,)], dtype, direction=direction, weight_decay=0.1)
    rounding = Allowed(whole)
    cuts = [1, 1023, 0, 1024, 17, 1500, 1435]
    parts = whole.copy()
    for name in NAMES[:3]:
        setattr(parts, name, [x.clone() for x in getattr(whole, name)[0].split(cuts)])
    parts.steps = [whole.steps[0].clone() for _ in cuts]
    _, squares = parts.run()
    _, square = whole.run()
    assert_within(squares.sum().view(1), square, 5000 * unit_roundoff(torch.float64) * square)
    assert_same_bits(torch.cat(parts.exp_avgs), whole.exp_avgs[0])
    assert_within(torch.cat(parts.params), whole.params[0].double(), 2 * rounding.params[0])


# Sums.


@each_form
def test_squares_beyond_float32(implementation: str, direction: str, scope: str) -> None:
    """Dot products are in float64: gradients of 1e30 are numbers like others."""
    case = step(FEW, torch.float32, direction=direction, scope=scope, lr=1.0)
    for gradient, moment in zip(case.grads, case.exp_avgs, strict=True):
        gradient *= 1e30
        moment *= 1e30
    after = check(case)
    assert all(p.isfinite().all() for p in after.params)


@each_form
@pytest.mark.parametrize("decoupled", [True, False])
def test_dot_products_beyond_float64(implementation: str, decoupled: bool, direction: str, scope: str) -> None:
    """The solve counts as 0 where a dot product overflows; moments go on, and the decay of the weights does."""
    case = step(FEW, torch.float64, direction=direction, scope=scope, weight_decay=0.1, decoupled=decoupled)
    case.grads[1] *= 1e200
    case.grads[1][0] = -1e200
    before = case.copy()
    apart, _, finite_squares = defined(step(FEW, torch.float64, direction=direction, scope=scope, weight_decay=0.1))
    expected, _, _ = defined(case)
    skipped, squares = case.run()
    assert skipped.tolist() == [0] * len(FEW)
    assert squares.isinf().tolist() == [i == 1 for i in range(len(FEW))]
    for i, (w, old) in enumerate(zip(case.params, before.params, strict=True)):
        assert_within(case.exp_avgs[i], expected.exp_avgs[i], 1e-15 * expected.exp_avgs[i].abs(), f"exp_avgs[{i}]")
        if scope == "global" or i == 1:
            shrunk = old - 0.1 * (0.1 * old) if decoupled else old
            assert_within(w, shrunk, 4 * unit_roundoff(torch.float64) * old.abs(), f"params[{i}]")
        elif decoupled:
            assert_within(w, apart.params[i], Allowed(before.only(i)).params[i - i], f"params[{i}]")
            assert_within(squares[i : i + 1], finite_squares[i : i + 1], 1e-13 * finite_squares[i : i + 1])


# What is skipped.


@pytest.mark.parametrize("value", [1.0, 2.0, math.inf, math.nan, -1.0])
def test_found_inf_stops_everything(implementation: str, value: float) -> None:
    for dtype, (direction, scope) in itertools.product((torch.float32, torch.float64), FORMS):
        found_inf = scalar(value, dtype)
        shapes = shapes_for(implementation)
        case = step(shapes, DTYPES, weight_decay=0.1, direction=direction, scope=scope, found_inf=found_inf)
        before = case.copy()
        skipped, squares = case.run()
        assert_same_bits(skipped, torch.zeros(len(shapes), dtype=torch.int64))
        assert_same_bits(squares, torch.zeros(len(shapes), dtype=torch.float64))
        assert_unchanged(case, before)


@each_form
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", [contiguous, sliced, channels_last])
@pytest.mark.parametrize("options", OPTIONS[:3], ids=str)
def test_elements_without_a_finite_moment_keep_their_bits(
    implementation: str,
    options: dict[str, Any],
    layout: Callable[[Tensor], Tensor],
    dtype: torch.dtype,
    direction: str,
    scope: str,
) -> None:
    """They are counted exactly, and all others take the very step they take beside zeros."""
    case = step(shapes_for(implementation), dtype, layout=layout, direction=direction, scope=scope, **options)
    without = case.copy()  # zeros add nothing to a dot product
    masks = []
    for i, gradient in enumerate(case.grads):
        # Several, none, half, all; some in the first and last places of chunks that have no other.
        mask = random(gradient.shape, torch.float64, 31 + i) < (-2.0, -9.0, 0.0, 9.0)[i % 4]
        if gradient.numel() > 4:
            mask[(0,) * mask.dim()] = mask[(-1,) * mask.dim()] = True
        values = torch.tensor([math.nan, math.inf, -math.inf], dtype=dtype)[torch.arange(gradient.numel()) % 3]
        gradient.copy_(torch.where(mask, values.view(gradient.shape), gradient))
        for tensors in without.lists()[:3]:
            tensors[i].masked_fill_(mask, 0)
        # What is kept is kept whatever it is.
        case.params[i].masked_fill_(mask, -0.0)
        if gradient.numel() > 4:
            case.params[i][(-1,) * mask.dim()] = math.inf
            case.exp_avgs[i][(0,) * mask.dim()] = math.nan
        masks.append(mask)
    before = case.copy()
    skipped, squares = case.run()
    _, expected_squares = without.run()
    assert_same_bits(skipped, torch.tensor([int(mask.sum()) for mask in masks]))
    # The reference leaves out what the kernel adds as zeros, and so adds up in another order.
    rounding = Allowed(without)
    if implementation == "reference":
        assert_within(squares, expected_squares, rounding.squares)
    else:
        assert_same_bits(squares, expected_squares)
    for i, mask in enumerate(masks):
        for name, bounds in (("params", rounding.params), ("exp_avgs", rounding.moments)):
            now, then, otherwise = (getattr(s, name)[i] for s in (case, before, without))
            assert_same_bits(now[mask], then[mask], f"{name}[{i}]")
            if implementation == "reference":
                assert_within(now[~mask], otherwise[~mask].double(), bounds[i][~mask], f"{name}[{i}]")
            else:
                assert_same_bits(now[~mask], otherwise[~mask], f"{name}[{i}]")
            assert_same_bits(surroundings(now), surroundings(then), f"memory around {name}[{i}]")
        assert_same_bits(case.steps[i], without.steps[i])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("layout", [contiguous, sliced])
def test_every_bit_pattern_of_a_skipped_parameter_stays(
    implementation: str, dtype: torch.dtype, layout: Callable[[Tensor], Tensor]
) -> None:
    """All but those of NaN, which stays NaN."""
    case = step([(65536,)], dtype, layout=layout)
    patterns = torch.arange(-32768, 32768, dtype=torch.int16).view(dtype)
    case.params[0].copy_(patterns)
    case.grads[0].fill_(math.nan)
    skipped, squares = case.run()
    assert skipped.tolist() == [65536]
    assert squares.tolist() == [0.0]
    assert case.params[0][patterns.isnan()].isnan().all()
    assert_same_bits(case.params[0][~patterns.isnan()], patterns[~patterns.isnan()])


@each_form
def test_a_scale_that_makes_gradients_infinite(implementation: str, direction: str, scope: str) -> None:
    """What counts is the moment after the gradient is divided."""
    for value, count in ((0.0, 15), (math.nan, 15), (2e-38, 15), (1.0, 0), (math.inf, 0)):
        case = step([(3, 5)], torch.float32, direction=direction, scope=scope, grad_scale=scalar(value))
        case.grads[0].fill_(12.0)
        before = case.copy()
        skipped, _ = case.run()
        assert skipped.tolist() == [count]
        if count:
            assert_unchanged(case, before, WRITTEN)
        else:
            assert case.params[0].isfinite().all()


@each_form
def test_moments_that_overflow_are_skipped(implementation: str, direction: str, scope: str) -> None:
    """A weight decay of finite numbers may do it, and a moment that is not finite never comes back."""
    case = step([(40,)], torch.float32, direction=direction, scope=scope, weight_decay=10.0, decoupled=False)
    case.params[0][3] = 3e38
    case.exp_avgs[0][17] = math.inf
    case.exp_avgs[0][39] = math.nan
    before = case.copy()
    skipped, squares = case.run()
    assert skipped.tolist() == [3]
    assert squares.isfinite().all()
    for name in WRITTEN:
        now, then = getattr(case, name)[0], getattr(before, name)[0]
        kept = torch.zeros(40, dtype=torch.bool)
        kept[[3, 17, 39]] = True
        assert_same_bits(now[kept], then[kept], name)
        assert (now != then)[~kept].all()


def test_a_parameter_that_is_not_finite_concerns_nobody_else(implementation: str) -> None:
    """Decoupled, it goes where IEEE arithmetic takes it."""
    for value, options in itertools.product((math.nan, math.inf, -math.inf), OPTIONS[:2]):
        case = step(shapes_for(implementation), torch.float32, **options)
        case.params[-1][1, 1, 1, 1, 1] = value
        check(case)


# Bits.


def test_a_rate_and_a_decay_whose_product_overflows(implementation: str) -> None:
    """lr * decay is infinite in float32, and neither of them nor decay * w is: a weight of 0 stays where it is."""
    params = [torch.tensor([0.0, -0.0, 1e-20, 2.0]), torch.tensor([0.0, 3.0])]
    zeros = [torch.zeros_like(p) for p in params]
    sofim_step_(
        params,
        zeros,
        [z.clone() for z in zeros],
        [torch.zeros(()) for _ in params],
        lr=1e30,
        beta=0.9,
        rho=0.5,
        direction="momentum",
        scope="global",
        weight_decay=1e10,
        decoupled=True,
        maximize=False,
    )
    assert params[0].tolist()[:2] == [0.0, 0.0]
    assert params[0][2].item() == pytest.approx(-1e20, rel=1e-6)  # a few roundings
    assert params[0][3].item() == params[1][1].item() == -math.inf
    assert params[1][0].item() == 0.0


@each_form
@pytest.mark.parametrize("layout", [contiguous, sliced, channels_last])
def test_same_bits_at_every_run_and_for_every_number_of_threads(
    implementation: str,
    set_threads: Callable[[int], None],
    layout: Callable[[Tensor], Tensor],
    direction: str,
    scope: str,
) -> None:
    # Cut into three shares of the elements, these end within tensors and between them.
    shapes = ((130, 257), (7,), (40001,), (0,), (64, 3, 200), (1024, 33), (97, 256))
    if implementation == "triton":
        shapes = ((7,), (65, 130), (97, 25))
    case = step(shapes, (torch.float32, torch.bfloat16), layout=layout, direction=direction, scope=scope)
    for gradient in case.grads[::2]:
        gradient.view(gradient.shape)[..., ::3] = math.nan
    results = []
    for threads in (1, 1) if implementation == "triton" else (1, 1, 2, 3):
        set_threads(threads)
        copy = case.copy()
        results.append((copy, copy.run()))
    for copy, result in results[1:]:
        assert_same_results(result, results[0][1])
        assert_unchanged(copy, results[0][0])


@pytest.mark.slow_on_host
@pytest.mark.slow_interpreted
@pytest.mark.parametrize("direction", ["momentum", "gradient"])
def test_tensors_of_their_own_are_the_list_one_by_one(implementation: str, direction: str) -> None:
    for options in OPTIONS[1:6:2] if implementation == "triton" else OPTIONS:
        shapes = shapes_for(implementation)
        case = step(shapes, DTYPES, scope="tensor", direction=direction, **options)
        case.grads[-1][0, 0, 0] = math.nan
        one_by_one = case.copy()
        skipped, squares = case.run()
        for i in range(len(shapes)):
            assert_same_results(one_by_one.only(i).run(), (skipped[i : i + 1], squares[i : i + 1]))
        assert_unchanged(case, one_by_one)


def test_the_step_count_is_of_the_parameter(implementation: str) -> None:
    """Each has its own, and counts far beyond where beta^t matters work."""
    for (direction, scope), count in itertools.product(FORMS, (0.0, 9.0, 1e6, 2.0**24 - 2)):
        case = step([(3, 5), (63, 17)], torch.float32, direction=direction, scope=scope)
        case.steps = [scalar(3.0), torch.full((1,), count)]
        check(case)


# What is there only where a step is cut into chunks and launches.


def followed(x: Tensor) -> Tensor:
    """The same at the start of memory that goes on."""
    return torch.cat([x.flatten(), x.new_full((8192,), 7)])[: x.numel()].view(x.shape)


@pytest.mark.parametrize("direction", ["momentum", "gradient"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_full_chunks(implementation: str, dtype: torch.dtype, direction: str) -> None:
    """GPUs have a path of wide accesses, unless they are not aligned or someone was left out: the same bits."""
    sizes = [2 * 8192 + 5]
    if implementation != "triton":
        sizes += [8191, 8192 + 4096, 8192 + 1024 + 3]  # whole moves of a block, two by two and one by one, and less
    for size in sizes:
        options = {"direction": direction, "weight_decay": 0.1, "decoupled": dtype == torch.float64}
        case = step([(size,)], dtype, layout=followed, **options)
        spoiled = case.copy()
        spoiled.grads[0][size - 7] = math.nan
        moved, spoiled_and_moved = case.map(unaligned), spoiled.map(unaligned)
        check(case)
        moved.run()
        assert_unchanged(moved, case, around=False)
        assert_same_results(spoiled_and_moved.run(), spoiled.run())
        assert_unchanged(spoiled_and_moved, spoiled, around=False)


@pytest.mark.slow_on_host
def test_many_tensors(implementation: str) -> None:
    """More than the parameters of one launch have room for, of those that are contiguous and of those that are not."""
    if implementation == "triton":
        pytest.skip("all of them are one launch, in an interpreter that takes minutes")
    case = step([(2, 3)] * 700, torch.float32, direction="gradient", weight_decay=0.1)
    for tensors in (case.params, case.exp_avgs):
        tensors[::5] = map(sliced, tensors[::5])
    check(case)


@pytest.mark.slow_on_host
def test_many_chunks(implementation: str) -> None:
    """More than are added up side by side."""
    if implementation == "triton":
        pytest.skip("would take minutes")
    check(step([(259, 8192), (3, 5)], torch.bfloat16, direction="gradient", weight_decay=0.1))


# Triton.


@interpreted
@pytest.mark.parametrize("direction", ["momentum", "gradient"])
def test_offsets_beyond_32_bits(monkeypatch: pytest.MonkeyPatch, direction: str) -> None:
    """The last chunk of a tensor of more than 2^31 elements, of which no other is there."""
    from fisher_kernels.triton_kernels import sofim_step as kernels

    case = step([(100,)], torch.bfloat16, direction=direction, weight_decay=0.1, decoupled=False)
    case.grads[0][3] = math.nan
    near = case.copy()
    with use_backend("triton"):
        expected = near.run()
        monkeypatch.setattr(kernels, "table", far(kernels.table, (2, 2, 4)))
        monkeypatch.setattr(kernels, "new_partials", far_partials)
        monkeypatch.setattr(kernels, "add_chunks", far_sums)
        assert_same_results(case.run(), expected)
    assert_unchanged(case, near)


@interpreted
def test_numbers_on_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where reading them would wait, kernels read them: the same bits."""
    from fisher_kernels.triton_kernels import sofim_step as kernels

    each = [scalar(0.1), scalar(0.2, torch.float64), scalar(0.3)]
    for lr, maximize in ((scalar(0.1), False), (each, True), (each[:1], False), (scalar(0.1, torch.float64), True)):
        case = step(FEW[:3], DTYPES, lr=lr, maximize=maximize, weight_decay=0.1, grad_scale=scalar(3.0))
        on_host = case.copy()
        with use_backend("triton"):
            expected = on_host.run()
            with monkeypatch.context() as patch:
                patch.setattr(kernels, "scalar", lambda x: (1.0, x))
                assert_same_results(case.run(), expected)
        assert_unchanged(case, on_host)


@interpreted
def test_launches_and_uploads(monkeypatch: pytest.MonkeyPatch) -> None:
    """A longer list is no more launches; a new rate of all is no upload, rates of each are one when they change."""
    from fisher_kernels.triton_kernels import _launch, _lists

    launches: list[Any] = []
    uploads: list[Tensor] = []
    monkeypatch.setattr(_lists, "_upload", lambda host, device: uploads.append(host) or host)

    def counts(case: Step, **options: Any) -> tuple[int, int]:
        case.options.update(options)
        launches.clear()
        uploads.clear()
        with use_backend("triton"), _launch.recording(launches.append):
            case.run()
        return len(launches), len(uploads)

    for length in (1, 40):
        case = step([(3, 5)] * length, torch.float32)
        assert counts(case)[0] == 5
        assert counts(case, lr=0.2) == (5, 0)
    assert counts(case, lr=[0.1 * i for i in range(length)])[0] == 5
    assert counts(case) == (5, 0)
    assert counts(case, lr=[0.2 * i for i in range(length)]) == (5, 1)
    assert counts(case, weight_decay=[0.01 * i for i in range(length)]) == (5, 1)
    assert counts(case) == (5, 0)
