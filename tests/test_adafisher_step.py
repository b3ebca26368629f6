"""adafisher_step_ against its definition in float64."""

from __future__ import annotations

import itertools
import math
import mmap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

from fisher_kernels import use_backend
from fisher_kernels.ops import ACCUMULATOR, Rounding, stochastic_round
from tests.cases import (
    DTYPES,
    LAYOUTS_OF_A_STEP,
    WRITABLE_LAYOUTS,
    channels_last,
    contiguous,
    layouts_of_a_step,
    random,
    sliced,
)
from tests.cases.adafisher_step import NAMES, PARAMETERS, Parameter, Step, step
from tests.cases.steps import SHORT_IN_TURN, around_ties
from tests.comparison import assert_same_bits, assert_within, bits, surroundings, unit_roundoff

pytestmark = pytest.mark.usefixtures("poisoned_memory", "one_thread")

# Some large, some tiny, every kind of factor; for tests whose subject is another.
SOME = tuple(PARAMETERS[i] for i in (0, 2, 8, 9, 12, 17, 20, 25, 27, 29, 31, 33, 38))
# A factor of each kind, groups, a vector, nothing, a little more than a chunk of a GPU and exactly one.
FEW = tuple(PARAMETERS[i] for i in (0, 2, 17, 20, 24, 26, 32, 46))


def parameters_for(implementation: str) -> tuple[Parameter, ...]:
    """All of them, but not for Triton's interpreter, which takes a hundred times as long."""
    return FEW if implementation == "triton" else PARAMETERS


def scalar(value: float, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.tensor(value, dtype=dtype)


# The definition and the rounding that is allowed beside it.


def curvature(case: Step, i: int) -> Tensor:
    """F of parameter i in its shape: the Kronecker products that the op never forms, plus damping."""
    param = case.params[i]
    row, column = (x[i] for x in (case.row_factors, case.column_factors))
    row = torch.ones(1).double() if row is None else row.double()
    column = torch.ones(1).double() if column is None else column.double()
    by_group = column.reshape(column.shape[0] if column.dim() == 2 else 1, -1)
    groups, columns = by_group.shape
    if by_group.numel() == 1:
        product = row.repeat_interleave(param.numel() // max(1, row.numel())) * by_group.reshape(())
    elif row.numel() == 1:
        rows = param.numel() // max(1, columns * groups)
        product = row * by_group.unsqueeze(1).expand(groups, rows, columns).flatten()
    else:
        product = torch.cat([torch.kron(r, c) for r, c in zip(row.chunk(groups), by_group, strict=True)])
    return (product + case.options["damping"]).reshape(param.shape)


class Sizes(NamedTuple):
    """What is added up, in absolute values, to make the moment and the change of a parameter."""

    moment: Tensor
    change: Tensor
    decay: Tensor


def sizes(case: Step, i: int) -> Sizes:
    o = case.options
    weight, gradient, moment = (x[i].double().abs() for x in (case.params, case.grads, case.exp_avgs))
    if o.get("grad_scale") is not None:
        gradient = gradient / o["grad_scale"].double().abs()
    decay = o["weight_decay"] * weight
    if not o["decoupled"]:
        gradient = gradient + decay
    size = o["beta"] * moment + (1 - o["beta"]) * gradient
    correction = 1 - o["beta"] ** (float(case.steps[i]) + 1)
    change = float(o["lr"]) / correction * size / curvature(case, i)
    return Sizes(size, change, float(o["lr"]) * decay if o["decoupled"] else torch.zeros_like(decay))


def rounding(case: Step, i: int) -> tuple[Tensor, Tensor]:
    """How far parameter i and its moment may lie from their definition after the step from ``case``.

    In the dtype of the moment: up to 8 roundings of the terms of the moment (scale, decay, the coefficients, products,
    sums), 10 more on the way to the change (bias correction, rate, F with its product, sum and damping, quotients),
    4 of the decoupled decay, and one as the change is taken off. The definition in float64 rounds as often: twice all
    that. Then half a unit in the last place of the parameter's own dtype, and of the moment's. Numbers below the normal
    ones may be lost.
    """
    dtype = case.params[i].dtype
    wide = ACCUMULATOR[dtype]
    u, tiny = unit_roundoff(wide), torch.finfo(wide).smallest_normal
    size = sizes(case, i)
    moment = 2 * u * 8 * size.moment + tiny
    largest = case.params[i].double().abs() + size.change + size.decay
    param = 2 * u * (18 * size.change + 4 * size.decay + largest) + tiny * (1 + size.change / (size.moment + tiny))
    kept = case.exp_avgs[i].dtype
    if kept != wide:
        moment = moment + unit_roundoff(kept) * (size.moment + moment) + torch.finfo(kept).smallest_normal * 2**-8
    if dtype != wide:
        param = param + unit_roundoff(dtype) * (largest + param) + torch.finfo(dtype).smallest_normal * 2**-8
    return param, moment


def defined(case: Step) -> tuple[Step, Tensor]:
    """The step in float64 on the reference: what it leaves, and the counts."""
    result = case.double()
    with use_backend("reference"):
        return result, result.run()


def check(case: Step, bound_of: Step | None = None) -> Step:
    """Takes the step and compares all it did with the definition; returns the arguments as they are afterwards."""
    expected, skipped = defined(case)
    before, after = case.copy(), case
    assert_same_bits(after.run(), skipped, "skipped")
    assert_step(after, expected, bound_of or before)
    for i, name in itertools.product(range(len(before.params)), ("params", "exp_avgs")):
        now, then = (surroundings(getattr(s, name)[i]) for s in (after, before))
        assert_same_bits(now, then, f"memory around {name}[{i}]")
    assert_unchanged(after, before, ("grads", "row_factors", "column_factors"))
    return after


def assert_step(after: Step, expected: Step, before: Step) -> None:
    """``after`` is ``expected``, to the rounding of a step from ``before``."""
    for i, param in enumerate(after.params):
        what = f"[{i}] of shape {tuple(param.shape)}"
        param_bound, moment_bound = rounding(before, i)
        assert_within(after.exp_avgs[i], expected.exp_avgs[i], moment_bound, f"exp_avgs{what}")
        assert_within(param, expected.params[i], param_bound, f"params{what}")
        assert_same_bits(after.steps[i], expected.steps[i], f"steps{what}")


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
    {"weight_decay": 0.1, "decoupled": True},
    {"maximize": True, "weight_decay": 0.1},
    {"maximize": True, "weight_decay": 0.1, "decoupled": True, "grad_scale": scalar(3.0)},
    {"beta": 0.0, "grad_scale": scalar(1024.0, torch.float64)},
    {"beta": 0.999, "damping": 0.5, "found_inf": scalar(0.0)},
    {"lr": 0.0, "weight_decay": 0.1, "decoupled": True},
)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_definition(options: dict[str, Any]) -> None:
    """The reference in float64 is what the formulas say, written again with the curvature formed."""
    case = step(PARAMETERS, torch.float64, **options)
    o = case.options
    after, skipped = defined(case)
    assert skipped.tolist() == [0] * len(PARAMETERS)
    for i, param in enumerate(case.params):
        t = float(case.steps[i]) + 1
        g = case.grads[i] / (1.0 if o.get("grad_scale") is None else o["grad_scale"].double())
        g = -g if o["maximize"] else g
        if not o["decoupled"]:
            g = g + o["weight_decay"] * param
        m = o["beta"] * case.exp_avgs[i] + (1 - o["beta"]) * g
        change = m / (1 - o["beta"] ** t) / curvature(case, i)
        if o["decoupled"]:
            change = change + o["weight_decay"] * param
        param_bound, moment_bound = rounding(case, i)
        assert_within(after.params[i], param - o["lr"] * change, param_bound, f"param {i}")
        assert_within(after.exp_avgs[i], m, moment_bound, f"exp_avg {i}")
        assert float(after.steps[i]) == t


@pytest.mark.parametrize(
    "wrong",
    [
        {"lr": 0.01 * (1 + 2e-5)},
        {"beta": 0.9 + 1e-6},
        {"damping": 1.002e-3},
        {"weight_decay": 0.1 * (1 + 1e-5)},
        {"decoupled": True},
        {"maximize": True},
        {"grad_scale": scalar(1 + 1e-5)},
    ],
    ids=str,
)
@pytest.mark.slow_interpreted
def test_allowed_rounding_has_teeth(implementation: str, wrong: dict[str, Any]) -> None:
    """A slip of a few units in the fifth or sixth figure of any one number is more than rounding allows."""
    case = step(SOME, torch.float32, weight_decay=0.1)
    expected, _ = defined(case)
    slipped = case.copy()
    slipped.options.update(wrong)
    slipped.run()
    with pytest.raises(AssertionError, match="entries are off"):
        assert_step(slipped, expected, case)


# Every implementation against the definition.


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_step(implementation: str, options: dict[str, Any], dtype: torch.dtype) -> None:
    check(step(PARAMETERS, dtype, **options))


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_moments_in_16_bits(implementation: str, options: dict[str, Any]) -> None:
    check(step(parameters_for(implementation), DTYPES, moments=SHORT_IN_TURN, **options))


@pytest.mark.slow_interpreted
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_mixed_dtypes(implementation: str, dtype: torch.dtype) -> None:
    first = DTYPES.index(dtype)
    dtypes = DTYPES[first:] + DTYPES[:first]
    check(step(PARAMETERS, dtypes, moments=SHORT_IN_TURN, weight_decay=0.1, decoupled=True))


def test_no_parameters(implementation: str) -> None:
    assert_same_bits(step((), torch.float32).run(), torch.zeros(0, dtype=torch.int64))


@st.composite
def parameters(draw: st.DrawFn) -> Parameter:
    groups, rows, columns = draw(st.integers(1, 6)), draw(st.integers(1, 30)), draw(st.integers(1, 40))
    row = draw(st.sampled_from([None, (1,), (groups * rows,)]))
    column = draw(st.sampled_from([None, (1,), (columns,), (groups, columns)]))
    return Parameter((groups * rows, columns), row, column)


@hypothesis.given(
    chosen=st.lists(parameters(), max_size=3),
    layout=st.sampled_from([contiguous, sliced]),
    dtype=st.sampled_from(DTYPES),
)
@pytest.mark.slow_interpreted
def test_any_factors(
    implementation: str, chosen: list[Parameter], layout: Callable[[Tensor], Tensor], dtype: torch.dtype
) -> None:
    check(step(chosen, dtype, layout=layout, moments=SHORT_IN_TURN))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("of", "layout"), LAYOUTS_OF_A_STEP)
def test_layouts_do_not_show(
    implementation: str, of: str, layout: Callable[[Tensor], Tensor], dtype: torch.dtype
) -> None:
    """The same bits wherever the elements of each lie, and no other bits around them."""
    layouts = layouts_of_a_step(of, layout)
    case = step(parameters_for(implementation), dtype, moments=SHORT_IN_TURN, **layouts, weight_decay=0.1)
    plain = case.map(contiguous)
    around = [[surroundings(x) for x in tensors] for tensors in (case.params, case.exp_avgs)]
    assert_same_bits(case.run(), plain.run())
    assert_unchanged(case, plain, NAMES, around=False)
    now = [[surroundings(x) for x in tensors] for tensors in (case.params, case.exp_avgs)]
    for x, y in zip(itertools.chain(*now), itertools.chain(*around), strict=True):
        assert_same_bits(x, y, "the memory around")


@pytest.mark.parametrize("layout", WRITABLE_LAYOUTS.values())
def test_layouts_of_all_at_once(implementation: str, layout: Callable[[Tensor], Tensor]) -> None:
    check(step(parameters_for(implementation), DTYPES, moments=SHORT_IN_TURN, layout=layout, weight_decay=0.1))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_whole_numbers_are_exact(implementation: str, dtype: torch.dtype) -> None:
    """Powers of two everywhere: every intermediate result fits, so nothing is rounded."""
    for shape, row, column in parameters_for(implementation):
        case = step([Parameter(shape, row, column)], dtype, lr=0.5, beta=0.5, damping=0.0, weight_decay=1.0)
        for i, tensors in enumerate((case.params, case.grads, case.exp_avgs)):
            tensors[0].copy_(torch.arange(tensors[0].numel()).remainder(5 + i).sub(2).view(shape))
        case.steps[0].fill_(0.0)  # 1 - beta^1 = 0.5
        for factor in (case.row_factors[0], case.column_factors[0]):
            if factor is not None:
                factor.copy_((2.0 ** torch.arange(factor.numel()).remainder(3)).view(factor.shape))
        expected, _ = defined(case)
        case.run()
        assert_within(case.params[0], expected.params[0], 0.0, f"{shape}")
        assert_within(case.exp_avgs[0], expected.exp_avgs[0], 0.0, f"{shape}")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_parameters_round_to_nearest_even(implementation: str, dtype: torch.dtype) -> None:
    """A change that float32 holds exactly, on ties and around them; subnormal results and overflow included."""
    eps, largest = torch.finfo(dtype).eps, torch.finfo(dtype).max
    starts = torch.tensor([1.0, 1 + eps, -1.0, -1 - eps, 2.0, 1024.0, 3 * eps, largest, -largest, 0.0], dtype=dtype)
    shares = [0.0, 0.25, 0.5, 0.5 + 2**-9, 0.5 - 2**-9, 0.75, 1.0, 1.5, -0.5, -0.5 - 2**-9, -1.5, -0.25, 1e4]
    w = starts.repeat_interleave(len(shares))
    unit = (w.float().abs() * eps).clamp_min(torch.finfo(dtype).smallest_normal * eps)
    change = unit * torch.tensor(shares).repeat(len(starts))
    case = step([Parameter(tuple(w.shape))], dtype, lr=1.0, beta=0.5, damping=0.0)
    case.params[0].copy_(w)
    case.grads[0].zero_()
    case.exp_avgs[0].copy_(change)  # m / 2, then divided by 1 - 0.5
    case.steps[0].fill_(0.0)
    case.run()
    assert_same_bits(case.params[0], (w.float() - change).to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_moments_round_to_nearest_even(implementation: str, dtype: torch.dtype) -> None:
    """On ties and around them, subnormal ones included; what is finite stays so. The step takes them unrounded."""
    largest = torch.finfo(torch.bfloat16).max
    exact = around_ties(subnormal=implementation != "triton")
    case = step([Parameter(tuple(exact.shape))], dtype, moments=torch.bfloat16, lr=0.0, beta=0.0)
    case.grads[0].copy_(exact)
    exact = case.grads[0].float()  # in float16 few of them are left
    rounded = exact.clamp(-largest, largest).to(torch.bfloat16)
    case.run()
    assert_same_bits(case.exp_avgs[0], torch.where(exact.isfinite(), rounded, case.exp_avgs[0]))
    assert dtype != torch.float32 or bool((rounded.abs() == largest).any() and (rounded != exact).any())

    third = step([Parameter((33,))], torch.float32, moments=torch.bfloat16, lr=1.0, beta=0.0, damping=0.0)
    third.params[0].zero_()
    third.grads[0].fill_(1 / 3)
    third.steps[0].zero_()
    third.run()
    assert_same_bits(third.params[0], torch.full((33,), -1 / 3))
    assert_same_bits(third.exp_avgs[0], torch.full((33,), 1 / 3, dtype=torch.bfloat16))


@pytest.mark.parametrize("layout", [contiguous, sliced, channels_last])
def test_stochastic_rounding(implementation: str, layout: Callable[[Tensor], Tensor]) -> None:
    check_rounding(parameters_for(implementation), layout)


def test_stochastic_rounding_of_parameters_that_several_blocks_of_a_gpu_share(implementation: str) -> None:
    shape = (2, 1030) if implementation == "triton" else (2, 8201)
    check_rounding([Parameter(shape)] * len(DTYPES), contiguous)


def test_stochastic_rounding_of_rows_of_whole_registers(implementation: str) -> None:
    """Which the CPU takes as they are. Indices that need more than 32 bits begin within a row."""
    check_rounding([Parameter((3, 128)), Parameter((2, 5, 96))] * len(DTYPES), contiguous, whole=True)


def check_rounding(parameters: Sequence[Parameter], layout: Callable[[Tensor], Tensor], whole: bool = False) -> None:
    """What the same step makes in float32, rounded by the integers of the parameter, the step and the place.

    Args:
        whole: whether places are at whole registers.
    """
    case = step(parameters, DTYPES, moments=SHORT_IN_TURN, layout=layout, weight_decay=0.1)
    wide = case.map(lambda x: x.to(ACCUMULATOR[x.dtype], copy=True))
    rounding, parts = [], []
    for i, p in enumerate(case.params):
        if p.numel() > 4:
            case.grads[i][(-1,) * p.dim()] = wide.grads[i][(-1,) * p.dim()] = math.nan
        run = p.shape[-1] if p.dim() and i % 2 else None  # columns of a matrix with more, or rows
        offset, gap = (1024 * i + 2**32 - 64, 64) if whole else (1000 * i + 2**32 - 40, 7)
        parts.append({"offset": offset, "run": run, "pitch": None if run is None else run + gap})
        rounding.append(Rounding.of(3, i, **parts[-1]))
    before = case.copy()
    case.options["rounding"] = rounding
    assert_same_bits(case.run(), wide.run())
    for i, p in enumerate(case.params):
        for name, half in (("params", "high"), ("exp_avgs", "low")):
            now, then, exact = (getattr(s, name)[i] for s in (case, before, wide))
            if now.dtype == torch.bfloat16:
                t = int(case.steps[i])
                expected = stochastic_round(exact, seed=3, ordinal=i, step=t, half=half, **parts[i])
            else:
                expected = exact.to(now.dtype)
            kept = ~case.grads[i].isfinite()
            assert_same_bits(now, torch.where(kept, then, expected), f"{name}[{i}] of shape {tuple(p.shape)}")
            assert_same_bits(surroundings(now), surroundings(then), f"memory around {name}[{i}]")


@pytest.mark.parametrize(("beta", "reached"), [(0.9, 0.98), (0.99, 0.80), (0.999, 0.25)])
@pytest.mark.slow_interpreted
def test_moments_that_round_to_nearest_stop_short(implementation: str, beta: float, reached: float) -> None:
    """Where what a step adds, (1 - beta) (g - m), is less than half a unit in the last place of m."""
    case = step([Parameter((3,))], torch.float32, moments=torch.bfloat16, beta=beta, lr=0.0)
    case.grads[0].fill_(1.0)
    case.exp_avgs[0].zero_()
    for _ in range(400):
        case.run()
    stopped = case.exp_avgs[0].clone()
    case.run()
    assert_same_bits(case.exp_avgs[0], stopped)
    assert_within(stopped, torch.full((3,), reached).double(), 0.01)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.slow_interpreted
def test_lr_may_be_a_tensor(implementation: str, dtype: torch.dtype) -> None:
    plain = step(SOME, dtype, lr=0.0078125, weight_decay=0.1, decoupled=True)
    for lr in (scalar(0.0078125), scalar(0.0078125, torch.float64), torch.tensor([[0.0078125]])):
        case = plain.copy()
        case.options["lr"] = lr
        case.run()
        assert float(lr) == 0.0078125
        expected = plain.copy()
        expected.run()
        assert_unchanged(case, expected)


@pytest.mark.slow_interpreted
def test_a_long_run(implementation: str) -> None:
    """The bias correction fades, and errors stay those of the roundings of all steps."""
    case = step(SOME[:4] + SOME[-5:-3], torch.float32, beta=0.9)
    for t in case.steps:
        t.zero_()
    expected = case.double()
    total = [torch.zeros(p.shape, dtype=torch.float64) for p in case.params]
    steps = 25 if implementation == "triton" else 100
    for k in range(steps):
        for i, p in enumerate(case.params):
            gradient = random(p.shape, p.dtype, 1000 * k + i)
            case.grads[i].copy_(gradient)
            expected.grads[i].copy_(gradient)
            total[i] += rounding(case, i)[0]
        case.run()
        with use_backend("reference"):
            expected.run()
    for i, p in enumerate(case.params):
        assert float(case.steps[i]) == steps
        # An error of the moment is felt for 1 / (1 - beta) steps.
        assert_within(p, expected.params[i], 10 * total[i], f"parameter {i}")


# What is skipped.


@pytest.mark.parametrize("value", [1.0, 2.0, math.inf, math.nan, -1.0])
def test_found_inf_stops_everything(implementation: str, value: float) -> None:
    parameters = parameters_for(implementation)
    for dtype in (torch.float32, torch.float64):
        case = step(parameters, DTYPES, weight_decay=0.1, found_inf=scalar(value, dtype))
        before = case.copy()
        assert_same_bits(case.run(), torch.zeros(len(parameters), dtype=torch.int64))
        assert_unchanged(case, before)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", [contiguous, sliced, channels_last])
@pytest.mark.parametrize("options", OPTIONS[:3], ids=str)
def test_elements_without_a_finite_gradient_keep_their_bits(
    implementation: str, options: dict[str, Any], layout: Callable[[Tensor], Tensor], dtype: torch.dtype
) -> None:
    """They are counted exactly, and all others take the very step they take without them."""
    clean = step(parameters_for(implementation), dtype, layout=layout, moments=SHORT_IN_TURN, **options)
    for param, moment in zip(clean.params, clean.exp_avgs, strict=True):
        if param.numel() > 4:  # what is kept is kept whatever it is
            param.view(dtype)[(0,) * param.dim()] = -0.0
            param[(-1,) * param.dim()] = math.inf
            moment[(-1,) * param.dim()] = math.nan
    case, before = clean.copy(), clean.copy()
    clean.run()
    masks = []
    for i, gradient in enumerate(case.grads):
        mask = random(gradient.shape, torch.float64, 31 + i) < (-3.0, -1.0, 0.0, 9.0)[i % 4]
        if gradient.numel() > 4:
            mask[(0,) * mask.dim()] = mask[(-1,) * mask.dim()] = True
        values = torch.tensor([math.nan, math.inf, -math.inf], dtype=dtype)[torch.arange(gradient.numel()) % 3]
        gradient.copy_(torch.where(mask, values.view(gradient.shape), gradient))
        masks.append(mask)
    assert_same_bits(case.run(), torch.tensor([int(mask.sum()) for mask in masks]))
    for i, mask in enumerate(masks):
        for name in ("params", "exp_avgs"):
            now, then, otherwise = (getattr(s, name)[i] for s in (case, before, clean))
            assert_same_bits(now, torch.where(mask, then, otherwise), f"{name}[{i}]")
            assert_same_bits(surroundings(now), surroundings(then), f"memory around {name}[{i}]")
        assert_same_bits(case.steps[i], clean.steps[i])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("layout", [contiguous, sliced])
def test_every_bit_pattern_of_a_skipped_parameter_stays(
    implementation: str, dtype: torch.dtype, layout: Callable[[Tensor], Tensor]
) -> None:
    """All but those of NaN, which stays NaN."""
    case = step([Parameter((65536,))], dtype, layout=layout)
    patterns = torch.arange(-32768, 32768, dtype=torch.int16).view(dtype)
    case.params[0].copy_(patterns)
    case.grads[0].fill_(math.nan)
    assert case.run().tolist() == [65536]
    assert case.params[0][patterns.isnan()].isnan().all()
    assert_same_bits(case.params[0][~patterns.isnan()], patterns[~patterns.isnan()])


def test_a_scale_that_makes_gradients_infinite(implementation: str) -> None:
    """What counts is the gradient after it is divided."""
    for value, skipped in ((0.0, 15), (math.nan, 15), (2e-38, 15), (1.0, 0), (math.inf, 0)):
        case = step([PARAMETERS[0]], torch.float32, grad_scale=scalar(value))
        case.grads[0].fill_(12.0)
        before = case.copy()
        assert case.run().tolist() == [skipped]
        if skipped:
            assert_unchanged(case, before, ("params", "exp_avgs"))
        else:
            assert case.params[0].isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_only_gradients_decide_what_is_skipped(implementation: str, dtype: torch.dtype) -> None:
    """A parameter, moment or factor that is not finite goes where IEEE arithmetic takes it, and only there."""
    for options, name, value in itertools.product(OPTIONS[:4], ("params", "exp_avgs"), (math.nan, math.inf)):
        finite = step([PARAMETERS[27]], dtype, **options)
        case = finite.copy()
        getattr(case, name)[0][3, 4] = value
        finite_bound = finite.copy()
        check(case, finite_bound)


# Bits.


@pytest.mark.slow_interpreted
def test_a_list_is_its_members_one_by_one(implementation: str) -> None:
    parameters = parameters_for(implementation)
    for options in OPTIONS:
        case = step(parameters, DTYPES, **options)
        case.grads[0][1, 1] = math.nan
        one_by_one = case.copy()
        together = case.run()
        for i in range(len(parameters)):
            assert_same_bits(one_by_one.only(i).run(), together[i : i + 1])
        assert_unchanged(case, one_by_one)


@pytest.mark.slow
def test_many_tensors(implementation: str) -> None:
    """More than the parameters of one launch have room for, of those that are contiguous and of those that are not."""
    if implementation == "triton":
        pytest.skip("all of them are one launch, in an interpreter that takes minutes")
    case = step([Parameter((2, 3), (2,), (3,))] * 700, torch.float32, weight_decay=0.1)
    for tensors in (case.params, case.exp_avgs):
        tensors[::5] = map(sliced, tensors[::5])
    check(case)


def test_rows_that_end_within_a_chunk(implementation: str) -> None:
    """Rows as long as no, one and several accesses, and longer than a chunk, with chunks that begin within them."""
    if implementation == "triton":
        pytest.skip("chunks of the interpreter have a test of their own")
    for columns in (1, 3, 4, 12, 1000, 8191, 8192, 8196, 12_289):
        rows = -(-20_000 // columns)
        for dtype in (torch.float32, torch.bfloat16):
            check(step([Parameter((rows, columns), (rows,), (columns,))], dtype))


# Cut into three shares of the elements, these end within rows, at their ends and between parameters.
SHARED = (
    Parameter((130, 257), (130,), (257,)),
    Parameter((7,), (7,)),
    Parameter((40001,), (40001,)),
    Parameter((0,)),
    Parameter((64, 3, 200), (64,), (4, 600)),
    Parameter((1024, 33)),
    Parameter((97, 256), (97,), (256,)),
)


@pytest.mark.parametrize("layout", [contiguous, sliced])
@pytest.mark.slow_interpreted
def test_same_bits_at_every_run_and_for_every_number_of_threads(
    implementation: str, set_threads: Callable[[int], None], layout: Callable[[Tensor], Tensor]
) -> None:
    shared, counts = (SHARED[:2], (1, 1)) if implementation == "triton" else (SHARED, (1, 1, 2, 3))
    case = step(shared, (torch.float32, torch.bfloat16), layout=layout, weight_decay=0.1)
    for gradient in case.grads:
        gradient.view(gradient.shape)[..., ::3] = math.nan
    results = []
    for threads in counts:
        set_threads(threads)
        copy = case.copy()
        results.append((copy, copy.run()))
    for copy, skipped in results[1:]:
        assert_same_bits(skipped, results[0][1])
        assert_unchanged(copy, results[0][0])


def test_the_step_count_is_of_the_parameter(implementation: str) -> None:
    """Each has its own, and counts far beyond where beta^t matters work."""
    for count in (0.0, 9.0, 1e6, 2.0**24 - 2):
        case = step([PARAMETERS[0], PARAMETERS[27]], torch.float32)
        case.steps = [scalar(3.0), torch.full((1,), count)]
        check(case)


# More than 2^31 elements.


def available_memory() -> int:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return 0
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))


def read_only_zeros(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Zeros that take no memory until they are written: the system maps them all to the same page."""
    size = math.prod(shape) * dtype.itemsize
    pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return torch.frombuffer(pages, dtype=dtype).view(*shape)


@pytest.mark.large
def test_more_than_2_to_31_elements(backend: str) -> None:
    if backend == "reference":
        pytest.skip("the reference holds several temporary tensors of this size")
    rows, columns = 2**16 + 1, 2**15
    if available_memory() < 14 * 2**30:
        pytest.skip("needs 14 GB of memory")
    param = read_only_zeros((rows, columns), torch.bfloat16)
    gradient = read_only_zeros((rows, columns), torch.bfloat16)
    moment = read_only_zeros((rows, columns), torch.float32)
    row = torch.full((rows,), 0.25)
    column = torch.full((columns,), 2.0)
    places = [(0, 0), (1, 5), (2**15, 77), (2**16 - 1, columns - 1), (2**16, 0), (2**16, columns - 1)]
    for i, place in enumerate(places):
        gradient[place] = i + 1.0
    gradient[2**16, 9] = math.nan
    row[2**16] = 0.5
    column[77] = 4.0
    case = Step([param], [gradient], [moment], [torch.zeros(())], [row], [column])
    case.options.update(lr=1.0, beta=0.5, damping=0.0)
    assert case.run().tolist() == [1]
    for i, place in enumerate(places):
        expected = -(i + 1.0) / float(row[place[0]] * column[place[1]])
        assert float(param[place]) == expected, place
        assert float(moment[place]) == (i + 1.0) / 2, place
        param[place] = moment[place] = 0.0
    for written in (param, moment):
        assert not any(bits(chunk).any() for chunk in written.view(-1).split(2**26))
