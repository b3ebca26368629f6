"""Samples of sofim_step_."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

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

OPTIONS: dict[str, Any] = {"lr": 0.1, "beta": 0.9, "rho": 0.5}


def step(
    shapes: Sequence[tuple[int, ...]],
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
    lists: dict[str, list[Tensor]] = {name: [] for name in ("params", "grads", "exp_avgs", "steps")}
    for i, (shape, storage, kept) in enumerate(zip(shapes, in_turn(dtype), in_turn(moments), strict=False)):
        made = (
            layout(random(shape, storage, 7 * i, device)),
            (grad_layout or layout)(random(shape, storage, 7 * i + 1, device)),
            (moment_layout or layout)(random(shape, of_moment(storage, kept), 7 * i + 2, device)),
            torch.tensor(float(i % 5), device=device),
        )
        for tensors, tensor in zip(lists.values(), made, strict=True):
            tensors.append(tensor)
    return {**lists, **OPTIONS, **options}


_SHAPES = ((7, 13), (33,), (), (0, 4), (50, 70), (10, 12), (4, 6, 3, 3), (9, 14))
_FEW = ((3, 5), (), (3, 0, 5), (8,), (1025,))


def _gradients(x: Tensor) -> Tensor:
    """In the order of their parameters, but for one."""
    return x.t().contiguous().t() if x.shape == (9, 14) else in_all_orders(x)


def _inputs(of_each: bool, options: dict[str, Any], source: Source) -> Inputs:
    """One gradient is not finite in places. ``of_each``: a learning rate for each parameter, on its device."""
    layouts: dict[str, Any] = {"layout": in_all_orders, "grad_layout": _gradients}
    given = {"lr": 0.01, "rho": 5.0, "weight_decay": 0.1, "decoupled": not of_each, **options}
    inputs = step(_SHAPES, source.dtype, device=source.device, **layouts, **given)
    if of_each:
        dtypes = in_turn((torch.float32, torch.float64))
        inputs["lr"] = [torch.full_like(t, 0.01, dtype=d) for t, d in zip(inputs["steps"], dtypes, strict=False)]
    with_non_finite(inputs["grads"][1])
    return inputs


def _two_dtypes(options: dict[str, Any], source: Source) -> Inputs:
    return step(_FEW, (source.dtype, torch.bfloat16), device=source.device, **on(source.device, options))


def _of_each(value: Any, count: int) -> list[float]:
    """One number for each parameter, of one for all or a list."""
    values = list(value) if isinstance(value, (list, tuple)) else [value]
    return [float(x) for x in values] * (count if len(values) == 1 else 1)


def _tolerance(kept: float, inputs: Inputs, expected: list[Tensor], u: float) -> list[Tolerance]:
    """``kept``: the unit roundoff of the moments as they are kept, if that is not u."""
    # Rounded moments and gradients change the dot products, which change the coefficients; all terms are bounded by
    # their magnitudes.
    params, steps, beta, rho = (inputs[name] for name in ("params", "steps", "beta", "rho"))
    rates = _of_each(inputs["lr"], len(params))
    decays = _of_each(inputs.get("weight_decay", 0.0), len(params))
    decoupled = inputs.get("decoupled", True)
    scale = float(inputs.get("grad_scale", 1.0))
    gradients = [
        g.abs().nan_to_num(0, 0, 0) / scale + (0.0 if decoupled else decay) * w.abs()
        for g, w, decay in zip(inputs["grads"], params, decays, strict=True)
    ]
    moments = [beta * m.abs() + (1 - beta) * g for m, g in zip(inputs["exp_avgs"], gradients, strict=True)]
    corrected = [m / (1 - beta ** (float(t) + 1)) for m, t in zip(moments, steps, strict=True)]
    squares = torch.stack([c.square().sum() for c in corrected])
    products = torch.stack([(c * g).sum() for c, g in zip(corrected, gradients, strict=True)])
    exact = expected[-1]
    all_squares, all_products = squares, products
    if inputs.get("scope", "global") == "global":
        exact, all_squares, all_products = (x.sum().expand(len(x)) for x in (exact, squares, products))
    of_params = []
    for i, (w, g, c) in enumerate(zip(params, gradients, corrected, strict=True)):
        bottom = rho + exact[i]
        change = c / bottom * (1 + all_squares[i] / bottom)
        if inputs.get("direction") == "gradient":
            change = (g + change * all_products[i]) / rho
        of_params.append(40 * (u * w.abs() * (1 + rates[i] * decays[i]) + max(u, kept) * rates[i] * change))
    of_moments = [16 * u * m for m in moments]
    changed = kept_where_not_finite([*of_params, *of_moments], [*inputs["grads"], *inputs["grads"]])
    return [*changed, *(0.0 for _ in steps), 0.0, 32 * max(u, kept) * squares]


_EACH = {
    "lr": [torch.tensor(rate) for rate in (0.1, 0.2, 0.3, 0.4, 0.5)],
    "direction": "gradient",
    "scope": "tensor",
    "weight_decay": [0.1, 0.0, 0.2, 0.3, 0.4],
    "decoupled": False,
    "maximize": True,
    "grad_scale": torch.tensor(2.0),
    "found_inf": torch.zeros(1),
}


_EXACT, _ROUNDED = partial(_tolerance, 0.0), partial(_tolerance, 2.0**-9)


def _samples() -> Iterator[Sample]:
    for direction, scope, of_each in (
        ("momentum", "global", False),
        ("momentum", "tensor", False),
        ("gradient", "global", False),
        ("gradient", "tensor", False),
        ("momentum", "global", True),
        ("gradient", "global", True),
    ):
        name = f"{direction}, {scope}" + (", rates of each" if of_each else "")
        inputs = partial(_inputs, of_each, {"direction": direction, "scope": scope})
        yield Sample("sofim_step_", name, SUM_DTYPES, inputs, _EXACT)
    for name, options in (("two dtypes", {"lr": [torch.tensor(0.1)]}), ("two dtypes, all options", _EACH)):
        yield Sample("sofim_step_", name, (torch.float32,), partial(_two_dtypes, options), _EXACT)
    for direction in ("momentum", "gradient"):
        inputs = partial(_inputs, False, {"direction": direction, "moments": torch.bfloat16})
        yield Sample("sofim_step_", f"{direction}, moments in 16 bits", SUM_DTYPES, inputs, _ROUNDED)


SAMPLES = tuple(_samples())
