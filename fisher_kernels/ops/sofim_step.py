"""The SOFIM update of a whole list of parameters in one call."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from fisher_kernels._library import Native
from fisher_kernels.ops._define import ACCUMULATOR, check_coefficient, check_floating, define, device_of
from fisher_kernels.ops._rounding import Rounder, Rounding, check_roundings, numbers_of_roundings
from fisher_kernels.ops._step import (
    as_moment,
    check_count,
    check_distinct,
    check_lengths,
    check_like,
    check_lists,
    check_moment,
    check_one_element,
    check_one_or_each,
    check_rate,
    check_written,
    found_on_device,
    numbers_of,
    rates_of,
)

_OP = "sofim_step_"
DIRECTIONS = ("momentum", "gradient")
SCOPES = ("global", "tensor")


def _check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ValueError(f"{_OP}: {name} is {value!r}, expected one of {', '.join(map(repr, choices))}")


class _Step(NamedTuple):
    """The arguments of a call, in the order of the schema."""

    params: Sequence[Tensor]
    grads: Sequence[Tensor]
    exp_avgs: Sequence[Tensor]
    steps: Sequence[Tensor]
    lr: Sequence[Tensor]
    beta: float
    rho: float
    direction: str
    scope: str
    weight_decay: Sequence[float]
    decoupled: bool
    maximize: bool
    grad_scale: Tensor | None = None
    found_inf: Tensor | None = None
    rounding: Sequence[int] | None = None

    def check_numbers(self) -> None:
        if not 0 <= self.beta < 1:
            raise ValueError(f"{_OP}: beta is {self.beta}, expected 0 <= beta < 1")
        if not 0 < self.rho < math.inf:
            raise ValueError(f"{_OP}: rho is {self.rho}, expected a finite number above 0")
        _check_choice("direction", self.direction, DIRECTIONS)
        _check_choice("scope", self.scope, SCOPES)
        check_one_or_each(_OP, "lr", self.lr, self.params)
        check_one_or_each(_OP, "weight_decay", self.weight_decay, self.params)
        for i, decay in enumerate(self.weight_decay):
            check_coefficient(_OP, f"weight_decay[{i}]", decay)
        scalars = {f"lr[{i}]": rate for i, rate in enumerate(self.lr)}
        for name, scalar in (*scalars.items(), ("grad_scale", self.grad_scale), ("found_inf", self.found_inf)):
            check_one_element(_OP, name, scalar, device_of(self.params))

    def check_lists(self) -> None:
        check_lengths(_OP, self.params, {"grads": self.grads, "exp_avgs": self.exp_avgs, "steps": self.steps})
        check_roundings(_OP, self.rounding, len(self.params))
        device = device_of(self.params)
        for i, (p, g, m, t) in enumerate(zip(*self[:4], strict=True)):
            check_floating(_OP, f"params[{i}]", p.dtype)
            if p.device != device:
                raise ValueError(f"{_OP}: params[{i}] is on {p.device}, expected {device}, the device of params[0]")
            check_like(_OP, f"grads[{i}]", g, p.dtype, i, p)
            check_moment(_OP, f"exp_avgs[{i}]", m, i, p)
            check_count(_OP, i, t, p)
            check_written(_OP, f"params[{i}]", p)
            check_written(_OP, f"exp_avgs[{i}]", m)
        for name, tensors in (("params", self.params), ("exp_avgs", self.exp_avgs), ("steps", self.steps)):
            check_distinct(_OP, name, tensors)

    def check_rates(self) -> None:
        """The values of learning rates; what is the same tensor as the one before is not read again."""
        for i, rate in enumerate(self.lr):
            if i == 0 or rate is not self.lr[i - 1]:
                check_rate(_OP, rate, f"lr[{i}]")


def _results(s: _Step) -> tuple[Tensor, Tensor]:
    """The number of skipped elements of each parameter, and its part of the square, to be filled."""
    count, device = len(s.params), device_of(s.params)
    return (
        torch.empty(count, dtype=torch.int64, device=device),
        torch.empty(count, dtype=torch.float64, device=device),
    )


def _fake(s: _Step) -> tuple[Tensor, Tensor]:
    s.check_numbers()
    s.check_lists()
    return _results(s)


def _reference(s: _Step) -> tuple[Tensor, Tensor]:
    skipped, squares = (x.zero_() for x in _fake(s))  # squares of the corrected moments
    s.check_rates()
    count = len(s.params)
    rates = s.lr if len(s.lr) == count else [*s.lr] * count
    decays = s.weight_decay if len(s.weight_decay) == count else [*s.weight_decay] * count
    products = torch.zeros_like(squares)  # of corrected moments and gradients
    if s.found_inf is not None and bool(s.found_inf):
        return skipped, squares
    gradients, corrections, finites, rounders = [], [], [], []
    for i, (w, g, m, t, decay) in enumerate(zip(*s[:4], decays, strict=True)):
        t += 1
        dtype = ACCUMULATOR[w.dtype]
        g = g.to(dtype)
        if s.grad_scale is not None:
            g = g / s.grad_scale.to(m.device, dtype).reshape(())
        if s.maximize:
            g = -g
        if decay and not s.decoupled:
            g = g + decay * w.to(dtype)
        moment = s.beta * m.to(dtype) + (1 - s.beta) * g
        finite = moment.isfinite()
        rounder = None if s.rounding is None else Rounder(w, s.rounding[4 * i : 4 * i + 4], int(t))
        rounders.append(rounder)
        kept = as_moment(moment, m.dtype) if rounder is None else rounder.round(moment, m.dtype, low=True)
        m.copy_(torch.where(finite, kept, m))
        # Scalars and dot products in float64: only the elementwise work is in this dtype.
        correction = 1 - s.beta ** t.double().reshape(())
        taken, along = m[finite].double(), g[finite].double()
        skipped[i] = m.numel() - taken.numel()
        squares[i] = taken.square().sum() / correction**2
        products[i] = (taken * along).sum() / correction
        gradients.append(g)
        corrections.append(correction)
        finites.append(finite)
    square, product = (x.sum().expand(count) if s.scope == "global" else x for x in (squares, products))
    for i, (w, m, decay) in enumerate(zip(s.params, s.exp_avgs, decays, strict=True)):
        along_moment, along_gradient = _coefficients(square[i], product[i], corrections[i], s.rho, s.direction)
        dtype = ACCUMULATOR[w.dtype]
        step = along_moment.to(dtype) * m.to(dtype)
        if s.direction == "gradient":
            step = step + along_gradient.to(dtype) * gradients[i]
        wide = w.to(dtype)
        if decay and s.decoupled:
            step = step + decay * wide
        updated = wide - rates[i].to(m.device, dtype).reshape(()) * step
        rounder = rounders[i]
        moved = updated.to(w.dtype) if rounder is None else rounder.round(updated, w.dtype, low=False)
        w.copy_(torch.where(finites[i], moved, w))
    return skipped, squares


def _coefficients(
    square: Tensor, product: Tensor, correction: Tensor, rho: float, direction: str
) -> tuple[Tensor, Tensor]:
    """By what the moment (as it is stored) and the gradient enter F^-1 x; both 0 where a dot product overflows."""
    if direction == "momentum":
        return 1 / (correction * (rho + square)), torch.zeros_like(square)
    fits = square.isfinite() & product.isfinite()
    along_moment = -product / (correction * rho * (rho + square))
    zero = torch.zeros_like(square)
    return torch.where(fits, along_moment, zero), torch.where(fits, 1 / rho, zero)


def _native(on: Native, s: _Step) -> tuple[Tensor, Tensor]:
    skipped, squares = _results(s)
    on.kernels.sofim_step_(*s, skipped, squares, on.place(device_of(s.params)))
    increment_version(s.params)  # for backward passes that kept them; moments and counts are in no graph
    return skipped, squares


def _triton(s: _Step) -> tuple[Tensor, Tensor]:
    from fisher_kernels.triton_kernels import sofim_step

    s.check_numbers()
    s.check_rates()
    nothing, found_inf = found_on_device(s.found_inf, device_of(s.params))
    if nothing or not s.params:
        s.check_lists()
        skipped, squares = _results(s)
        return skipped.zero_(), squares.zero_()
    results = sofim_step.step(s._replace(found_inf=found_inf))
    increment_version(s.params)
    return results


_step = define(
    "sofim_step_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] steps, *, Tensor[] lr, "
    "float beta, float rho, str direction, str scope, float[] weight_decay, bool decoupled, bool maximize, "
    "Tensor? grad_scale=None, Tensor? found_inf=None, int[]? rounding=None) -> (Tensor, Tensor)",
    arguments=_Step,
    fake=_fake,
    reference=_reference,
    native=_native,
    triton=_triton,
)


def sofim_step_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    steps: Sequence[Tensor],
    *,
    lr: float | Tensor | Sequence[float | Tensor],
    beta: float,
    rho: float,
    direction: str = "momentum",
    scope: str = "global",
    weight_decay: float | Sequence[float] = 0.0,
    decoupled: bool = True,
    maximize: bool = False,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    rounding: Sequence[Rounding] | None = None,
) -> tuple[Tensor, Tensor]:
    r"""One SOFIM step of a list of parameters, in place: two passes over memory, a dot product between them.

    With all parameters as one vector w, or each as one with ``scope="tensor"``, and λ the weight decay:

    .. math::

        t &\leftarrow t + 1 \\
        g &= \pm\,\mathrm{grad} / \mathrm{grad\_scale} \quad (+\, \lambda w \text{ unless decoupled}) \\
        m &\leftarrow \beta m + (1 - \beta)\, g \qquad u = m / (1 - \beta^t) \\
        w &\leftarrow w - \mathrm{lr}\,
            \left( (u u^T + \rho I)^{-1} x \quad (+\, \lambda w \text{ if decoupled}) \right)

    The gradient is negated to maximise. x is u or g, for which Sherman and Morrison give

    .. math::

        (u u^T + \rho I)^{-1} u = \frac{u}{\rho + |u|^2} \qquad
        (u u^T + \rho I)^{-1} g = \frac{1}{\rho} \left( g - \frac{u^T g}{\rho + |u|^2}\, u \right)

    Dot products are summed in float64.

    An element whose new moment would not be finite, as after a gradient that is NaN or infinite, takes no part: it
    keeps its parameter and its moment and is in no dot product. If a dot product overflows, which takes float64
    gradients of more than 1e150, ``F^-1 x`` counts as 0. Where ``found_inf`` is not 0 nothing changes at all, the step
    counts neither (SOFIM, arXiv 2403.02833, Algorithm 1).

    Args:
        params: float32, float64, bfloat16 or float16, any shapes and strides without overlap, on one device. One that
            is in the list twice, or begins where another does, is refused, as it is of what else is written.
        grads: of the shapes and dtypes of params.
        exp_avgs: first moments m of the shapes of params; float64 for float64 parameters, else float32 or bfloat16.
            One in bfloat16 is rounded, and the step takes m as it is then.
        steps: number of steps t taken so far, one float32 element for each parameter.
        lr: learning rate, finite and at least 0: a real number or a tensor of one element, or one for each parameter.
        beta: decay of the moment, 0 <= beta < 1.
        rho: regularisation of F, above 0.
        direction: ``"momentum"`` (x is u) or ``"gradient"`` (x is g).
        scope: ``"global"`` or ``"tensor"``.
        weight_decay: at least 0; one number, or one for each parameter.
        decoupled: decay the weights rather than add the decay to the gradient.
        maximize: ascend rather than descend.
        grad_scale: one element by which gradients are divided, or None.
        found_inf: one element; the whole call does nothing where it is not 0.
        rounding: for each parameter, by which random integers it and its moment are rounded where they are bfloat16,
            the parameter by the upper halves of those of step t, the moment by the lower ones; None rounds to nearest.

    Returns:
        int64 (len(params),): how many elements of each parameter were skipped, and float64 (len(params),): what each
        parameter adds to ``|u|^2``, both on the device of the parameters; zeros where ``found_inf`` is not 0.

    Raises:
        TypeError, ValueError: an argument has the wrong dtype, shape, device, length or range; the message names it,
            and nothing is changed.
    """
    try:
        s = _Step(
            list(params), list(grads), list(exp_avgs), list(steps),
            lr=rates_of(_OP, lr), beta=beta, rho=rho, direction=direction, scope=scope,
            weight_decay=numbers_of(_OP, "weight_decay", weight_decay), decoupled=decoupled, maximize=maximize,
            grad_scale=grad_scale, found_inf=found_inf, rounding=numbers_of_roundings(_OP, rounding, params),
        )  # fmt: skip
    except TypeError:
        check_lists(_OP, dict(zip(_Step._fields, (params, grads, exp_avgs, steps), strict=False)))
        raise
    skipped, squares = _step(s)
    return skipped, squares
