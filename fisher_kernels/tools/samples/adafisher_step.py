"""Samples of adafisher_step_."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

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
    as_made,
    in_all_orders,
    in_turn,
    kept_where_not_finite,
    of_moment,
    on,
)

Shape = tuple[int, ...]


class Parameter(NamedTuple):
    """The shapes of a parameter and of its factors; None where there is none."""

    shape: Shape
    row: Shape | None = None
    column: Shape | None = None


OPTIONS: dict[str, Any] = {
    "lr": 0.01,
    "beta": 0.9,
    "damping": 1e-3,
    "weight_decay": 0.0,
    "decoupled": False,
    "maximize": False,
}


def step(
    parameters: Sequence[Parameter],
    dtype: torch.dtype | Sequence[torch.dtype],
    *,
    layout: Layout = as_made,
    grad_layout: Layout | None = None,
    moment_layout: Layout | None = None,
    moments: torch.dtype | Sequence[torch.dtype | None] | None = None,
    device: Device = None,
    **options: Any,
) -> Inputs:
    """The arguments of a step of parameters in the middle of a run; dtypes in turn if there are several.

    ``moments`` are the dtypes of these, None being the wide one beside a parameter's; beside float64 that is all.
    """
    names = ("params", "grads", "exp_avgs", "steps", "row_factors", "column_factors")
    lists: dict[str, list[Any]] = {name: [] for name in names}
    each = zip(parameters, in_turn(dtype), in_turn(moments), strict=False)
    for i, ((shape, row, column), storage, kept) in enumerate(each):
        wide = ACCUMULATOR[storage]
        made = (
            layout(random(shape, storage, 7 * i, device)),
            (grad_layout or layout)(random(shape, storage, 7 * i + 1, device)),
            (moment_layout or layout)(random(shape, of_moment(storage, kept), 7 * i + 2, device)),
            torch.tensor(float(i % 5), device=device),
            None if row is None else random(row, wide, 7 * i + 3, device).square(),
            None if column is None else random(column, wide, 7 * i + 4, device).square(),
        )
        for tensors, tensor in zip(lists.values(), made, strict=True):
            tensors.append(tensor)
    return {**lists, **OPTIONS, **options}


_PARAMETERS = (
    Parameter((7, 13), (7,), (13,)),
    Parameter((64, 130), (64,), (130,)),
    Parameter((6, 3, 3, 3), (6,), (2, 27)),  # in two groups
    Parameter((33,), (33,)),
    Parameter((), (1,), (1,)),
    Parameter((0, 4), (0,), (4,)),
    Parameter((5, 9)),
    Parameter((10, 12), (10,), (12,)),
    Parameter((4, 6, 3, 3), (4,), (54,)),
)
_FEW = (Parameter((3, 5), None, (5,)), Parameter((0, 4), (0,), (4,)), Parameter((6, 2, 3), (6,), (2, 6)), Parameter(()))


def _inputs(options: dict[str, Any], source: Source) -> Inputs:
    """Gradients in row-major order, wherever their parameters are; one of them not finite in places."""
    layouts: dict[str, Any] = {"layout": in_all_orders, "grad_layout": as_made, "moment_layout": as_made}
    inputs = step(_PARAMETERS, source.dtype, device=source.device, **layouts, **on(source.device, options))
    with_non_finite(inputs["grads"][1])
    return inputs


def _two_dtypes(options: dict[str, Any], source: Source) -> Inputs:
    return step(_FEW, (source.dtype, torch.bfloat16), device=source.device, **on(source.device, options))


# About ten roundings, each of a term that is no larger than the sum of the magnitudes below.


def _tolerance(inputs: Inputs, expected: list[Tensor], u: float) -> list[Tolerance]:
    steps = inputs["steps"]
    if inputs.get("found_inf") is not None and inputs["found_inf"].any():
        return [0.0] * len(expected)
    scale = inputs.get("grad_scale", torch.ones(()))
    beta, lr, decay = (inputs[name] for name in ("beta", "lr", "weight_decay"))
    of_params, of_moments = [], []
    for i, t in enumerate(steps):
        w, g, m = (inputs[name][i].abs() for name in ("params", "grads", "exp_avgs"))
        moment = beta * m + (1 - beta) * (g / scale.reshape(()) + decay * w)
        curvature = _curvature(w, inputs["row_factors"][i], inputs["column_factors"][i]) + inputs["damping"]
        update = moment / (1 - beta ** (float(t) + 1)) / curvature + decay * w
        of_params.append(16 * u * (w + lr * update))
        of_moments.append(16 * u * moment)
    changed = kept_where_not_finite([*of_params, *of_moments], [*inputs["grads"], *inputs["grads"]])
    return [*changed, *(0.0 for _ in steps), 0.0]


def _curvature(like: Tensor, row: Tensor | None, column: Tensor | None) -> Tensor:
    """The Kronecker product of the factors, that of each group of rows; 1 in place of a factor that is not there."""
    product = torch.ones_like(like).reshape(*like.shape[:1], math.prod(like.shape[1:]))
    if row is not None:
        product = product * row[:, None]
    if column is not None:
        columns = column.view(-1, column.shape[-1])
        product = product * columns.repeat_interleave(len(product) // len(columns), 0)
    return product.reshape(like.shape)


_DECAY = {"weight_decay": 0.1}
_OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "weight decay in the gradient": _DECAY,
    "decoupled weight decay": {**_DECAY, "decoupled": True},
    "maximised and scaled": {"maximize": True, "grad_scale": torch.tensor([1024.0]), "found_inf": torch.zeros(1)},
    "moments in 16 bits": {**_DECAY, "moments": torch.bfloat16},
    "nothing at all after an overflow": {"grad_scale": torch.tensor([2.0]), "found_inf": torch.ones(1)},
}
_ALL = {
    **_DECAY,
    "lr": torch.tensor(0.01),
    "decoupled": True,
    "maximize": True,
    "grad_scale": torch.tensor(2.0),
    "found_inf": torch.zeros(1),
}


def _samples() -> Iterator[Sample]:
    for name, options in _OPTIONS.items():
        yield Sample("adafisher_step_", name, SUM_DTYPES, partial(_inputs, options), _tolerance)
    integers = {"rounding": [Rounding.of(0, i) for i in range(len(_PARAMETERS))]}
    inputs = partial(_inputs, integers)
    yield Sample("adafisher_step_", "random integers, which nothing here takes", (torch.float32,), inputs, _tolerance)
    for name, options in (("two dtypes", {"lr": torch.tensor(0.01)}), ("two dtypes, all options", _ALL)):
        yield Sample("adafisher_step_", name, (torch.float32,), partial(_two_dtypes, options), _tolerance)


SAMPLES = tuple(_samples())
