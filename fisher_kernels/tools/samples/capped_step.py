"""Samples of heavy_ball_, direction_sums and capped_step_."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fisher_kernels.ops import ACCUMULATOR, Rounding
from fisher_kernels.tools.samples.sample import (
    SUM_DTYPES,
    Device,
    Inputs,
    Sample,
    Source,
    Tolerance,
    random,
    with_non_finite,
)
from fisher_kernels.tools.samples.steps import (
    Layout,
    Moments,
    as_made,
    in_all_orders,
    in_turn,
    kept_where_not_finite,
    of_moment,
    on,
)

_DOUBLE = torch.finfo(torch.float64).eps / 2

OPTIONS: dict[str, Any] = {"lr": 0.1, "kl_clip": 1e-3, "max_relative_step": 0.02}


def _lists(
    names: Sequence[str],
    shapes: Sequence[tuple[int, ...]],
    dtype: torch.dtype | Sequence[torch.dtype],
    layouts: dict[str, Layout],
    device: Device,
    moments: Moments = None,
) -> dict[str, list[Tensor]]:
    """Tensors for every parameter; dtypes in turn if there are several.

    They are in the wide dtype but for gradients and, as ``moments`` tells, the momentum.
    """
    lists: dict[str, list[Tensor]] = {name: [] for name in names}
    for i, (shape, storage, kept) in enumerate(zip(shapes, in_turn(dtype), in_turn(moments), strict=False)):
        dtypes = {"params": storage, "grads": storage, "momentum_buffers": of_moment(storage, kept)}
        for k, name in enumerate(names):
            made = random(shape, dtypes.get(name, ACCUMULATOR[storage]), 7 * i + k, device)
            lists[name].append(layouts.get(name, layouts["params"])(made))
    return lists


def momentum(
    shapes: Sequence[tuple[int, ...]],
    dtype: torch.dtype | Sequence[torch.dtype],
    *,
    layout: Layout = as_made,
    device: Device = None,
    layouts: Mapping[str, Layout] | None = None,
    moments: Moments = None,
    **options: Any,
) -> Inputs:
    """The arguments of heavy_ball_ in the middle of a run."""
    names = ("params", "grads", "momentum_buffers")
    lists = _lists(names, shapes, dtype, {"params": layout, **(layouts or {})}, device, moments)
    return {**lists, "momentum": 0.9, **options}


def sums(
    shapes: Sequence[tuple[int, ...]],
    dtype: torch.dtype | Sequence[torch.dtype],
    *,
    layout: Layout = as_made,
    device: Device = None,
    layouts: Mapping[str, Layout] | None = None,
    moments: Moments = None,
    **options: Any,
) -> Inputs:
    """The arguments of direction_sums."""
    names = ("params", "directions", "momentum_buffers")
    return {**_lists(names, shapes, dtype, {"params": layout, **(layouts or {})}, device, moments), **options}


def in_pairs(count: int) -> list[int]:
    """Layers of a weight and a bias each."""
    return [i // 2 for i in range(count)]


def step(
    shapes: Sequence[tuple[int, ...]],
    dtype: torch.dtype | Sequence[torch.dtype],
    *,
    layout: Layout = as_made,
    device: Device = None,
    layouts: Mapping[str, Layout] | None = None,
    **options: Any,
) -> Inputs:
    """The arguments of capped_step_, with sums as momentum that is half the direction and half another has them."""
    names = ("params", "directions", "others")
    lists = _lists(names, shapes, dtype, {"params": layout, **(layouts or {})}, device)
    others = lists.pop("others")
    added = [
        torch.stack([(d * (d + o) / 2).sum(), d.square().sum(), w.square().sum()])
        for w, d, o in zip(*([x.double() for x in xs] for xs in (*lists.values(), others)), strict=True)
    ]
    all_sums = torch.stack(added) if added else torch.empty(0, 3, dtype=torch.float64, device=device)
    return {**lists, "sums": all_sums, "layers": in_pairs(len(shapes)), **OPTIONS, **options}


_SHAPES = ((7, 13), (33,), (), (0, 4), (50, 70), (10, 12), (4, 6, 3, 3), (9, 14))
_FEW = ((3, 5), (), (3, 0, 5), (8,), (1025,))


def _other_order(x: Tensor) -> Tensor:
    """In the order of their parameters, but for one."""
    return x.t().contiguous().t() if x.shape == (9, 14) else in_all_orders(x)


def _at_random(made: Callable[[dict[str, Any], Source], Inputs], source: Source) -> Inputs:
    """With random integers, which nothing takes that is not in bfloat16."""
    inputs = made({}, source)
    params = inputs["params"]
    steps = [torch.full((), 3.0, device=p.device) for p in params]
    return {**inputs, "steps": steps, "rounding": [Rounding.of(0, i) for i in range(len(params))]}


# heavy_ball_


def _momentum_inputs(options: dict[str, Any], source: Source) -> Inputs:
    """One gradient is not finite in places."""
    layouts = {"grads": _other_order}
    inputs = momentum(
        _SHAPES, source.dtype, layout=in_all_orders, layouts=layouts, device=source.device, **on(source.device, options)
    )
    with_non_finite(inputs["grads"][1])
    return inputs


def _momentum_of_two_dtypes(source: Source) -> Inputs:
    return momentum(_FEW, (source.dtype, torch.bfloat16), device=source.device)


def _momentum_tolerance(inputs: Inputs, expected: list[Tensor], u: float) -> list[Tolerance]:
    scale, decay = float(inputs.get("grad_scale", 1.0)), inputs.get("weight_decay", 0.0)
    bounds = [
        8 * u * (inputs["momentum"] * m.abs() + g.abs().nan_to_num(0, 0, 0) / scale + decay * w.abs())
        for w, g, m in zip(inputs["params"], inputs["grads"], inputs["momentum_buffers"], strict=True)
    ]
    return [*kept_where_not_finite(bounds, inputs["grads"]), 0.0]


# direction_sums


def _sums_inputs(options: dict[str, Any], source: Source) -> Inputs:
    layouts = {"directions": _other_order}
    return sums(
        _SHAPES, source.dtype, layout=in_all_orders, layouts=layouts, device=source.device, **on(source.device, options)
    )


def _sums_of_two_dtypes(source: Source) -> Inputs:
    return sums(_FEW, (source.dtype, torch.bfloat16), device=source.device)


def _sums_tolerance(inputs: Inputs, expected: list[Tensor], u: float) -> list[Tolerance]:
    """Products of two numbers in float32 are exact in float64, in which they are added up."""
    bounds = []
    for w, d, m in zip(inputs["params"], inputs["directions"], inputs["momentum_buffers"], strict=True):
        sizes = torch.stack([(d * m).abs().sum(), d.square().sum(), w.square().sum()])
        bounds.append((d.numel() + 2) * 2 * _DOUBLE * sizes)
    return [torch.stack(bounds)]


# capped_step_


def _step_inputs(options: dict[str, Any], source: Source) -> Inputs:
    """The parameters of one layer begin at zero, a sum of another is not finite."""
    layouts = {"directions": _other_order}
    inputs = step(
        _SHAPES, source.dtype, layout=in_all_orders, layouts=layouts, device=source.device, **on(source.device, options)
    )
    inputs["params"][4].zero_()
    inputs["params"][5].zero_()
    inputs["sums"][4:6, 2] = 0
    inputs["sums"][0, 1] = math.nan
    return inputs


def _step_of_each(source: Source) -> Inputs:
    """Rates on the device of the parameters, and of each parameter all that may be of each."""
    dtypes = in_turn((torch.float32, torch.float64))
    rates = [torch.full((), 0.01 * i, dtype=d, device=source.device) for i, d in zip(range(5), dtypes, strict=False)]
    return step(
        _FEW, (source.dtype, torch.bfloat16), device=source.device, layers=[0, 0, 0, 1, 2], lr=rates,
        weight_decay=[0.1, 0.0, 0.2, 0.3, 0.4], max_relative_step=[None, 0.02, 0.01, None, 0.03],
        floor=[0.1, 0.1, 0.2, 2.0, 0.0], found_inf=torch.zeros(1, device=source.device),
    )  # fmt: skip


def _each(value: Any, count: int) -> list[float]:
    values = list(value) if isinstance(value, (list, tuple)) else [value]
    return [0.0 if x is None else float(x) for x in values] * (count if len(values) == 1 else 1)


def _step_tolerance(inputs: Inputs, expected: list[Tensor], u: float) -> list[Tolerance]:
    """Scale and factors are float64, but for the last rounding of what elements are multiplied by."""
    params, directions, layers = (inputs[name] for name in ("params", "directions", "layers"))
    scale, factors, skipped = expected[len(params) :]
    count = len(params)
    rates, decays = _each(inputs["lr"], count), _each(inputs.get("weight_decay", 0.0), count)
    bounds: list[Tolerance] = []
    for i, (w, d) in enumerate(zip(params, directions, strict=True)):
        taken = 0.0 if skipped[i] > 0 else 1.0
        change = rates[i] * (float(scale) * float(factors[layers[i]]) * d.abs() + decays[i] * w.abs())
        bounds.append(taken * 8 * u * (w.abs() + change))
    rounding = 8 * (count + 4) * _DOUBLE
    return [*bounds, rounding * scale, rounding * factors, 0.0]


_ALL: dict[str, Any] = {"weight_decay": 0.1, "maximize": True, "grad_scale": torch.tensor(2.0)}


def _samples() -> Iterator[Sample]:
    for name, options in (("momentum", {}), ("decay, scaled gradients", {**_ALL, "found_inf": torch.zeros(1)})):
        yield Sample("heavy_ball_", name, SUM_DTYPES, partial(_momentum_inputs, options), _momentum_tolerance)
    momentum_in_16_bits = partial(_momentum_inputs, {"moments": torch.bfloat16, "weight_decay": 0.1})
    yield Sample("heavy_ball_", "momentum in 16 bits", SUM_DTYPES, momentum_in_16_bits, _momentum_tolerance)
    yield Sample("heavy_ball_", "two dtypes", (torch.float32,), _momentum_of_two_dtypes, _momentum_tolerance)
    at_random = "random integers, which nothing here takes"
    inputs = partial(_at_random, _momentum_inputs)
    yield Sample("heavy_ball_", at_random, (torch.float32,), inputs, _momentum_tolerance)
    skipped = torch.tensor([0, 3, 0, 0, 0, 0, 0, 1])
    for name, options in (
        ("all", {"skipped": skipped}),
        ("without products", {"products": False}),
        ("without weights", {"weights": False}),
        ("momentum in 16 bits", {"moments": torch.bfloat16}),
    ):
        yield Sample("direction_sums", name, SUM_DTYPES, partial(_sums_inputs, options), _sums_tolerance)
    yield Sample("direction_sums", "two dtypes", (torch.float32,), _sums_of_two_dtypes, _sums_tolerance)
    for name, options in (
        ("trust region and cap", {}),
        ("cap alone, decay", {"kl_clip": None, "weight_decay": 0.1}),
        ("trust region alone", {"max_relative_step": None, "lr": torch.tensor(0.05)}),
    ):
        yield Sample("capped_step_", name, SUM_DTYPES, partial(_step_inputs, options), _step_tolerance)
    yield Sample("capped_step_", at_random, (torch.float32,), partial(_at_random, _step_inputs), _step_tolerance)
    yield Sample("capped_step_", "two dtypes, all of each", (torch.float32,), _step_of_each, _step_tolerance)


SAMPLES = tuple(_samples())
