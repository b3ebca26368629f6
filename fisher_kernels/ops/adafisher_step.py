"""The AdaFisher update of a whole list of parameters in one call."""

from __future__ import annotations

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
    check_beside,
    check_count,
    check_distinct,
    check_lengths,
    check_like,
    check_lists,
    check_moment,
    check_one_element,
    check_rate,
    check_written,
    found_on_device,
    rate_of,
)

_OP = "adafisher_step_"


class _View(NamedTuple):
    """A parameter seen as (groups, rows, columns)."""

    groups: int
    rows: int
    columns: int


def _view(i: int, param: Tensor, row_factor: Tensor | None, column_factor: Tensor | None) -> _View:
    """How factor i divides parameter i; a factor with one element stands for a constant."""
    numel = param.numel()
    rows = row_factor.numel() if row_factor is not None and row_factor.numel() != 1 else None
    groups, columns = 1, None
    if column_factor is not None and column_factor.numel() != 1:
        groups = column_factor.shape[0] if column_factor.dim() == 2 else 1
        columns = column_factor.shape[-1]
    if columns is None:
        columns = numel // rows if rows else numel
    if rows is None:
        rows = numel // columns if columns else groups
    if not (rows * columns == numel and groups >= 1 and rows % groups == 0):
        raise ValueError(
            f"{_OP}: row_factors[{i}] has shape {_shape(row_factor)} and column_factors[{i}] {_shape(column_factor)}, "
            f"expected (groups * rows,) and (groups, columns) with groups * rows * columns = {numel}, the size of "
            f"params[{i}] of shape {tuple(param.shape)}"
        )
    return _View(groups, rows // groups, columns)


def _shape(x: Tensor | None) -> str:
    return "None" if x is None else str(tuple(x.shape))


class _Step(NamedTuple):
    """The arguments of a call, in the order of the schema."""

    params: Sequence[Tensor]
    grads: Sequence[Tensor]
    exp_avgs: Sequence[Tensor]
    steps: Sequence[Tensor]
    row_factors: Sequence[Tensor | None]
    column_factors: Sequence[Tensor | None]
    lr: Tensor
    beta: float
    damping: float
    weight_decay: float
    decoupled: bool
    maximize: bool
    grad_scale: Tensor | None = None
    found_inf: Tensor | None = None
    rounding: Sequence[int] | None = None

    def check_numbers(self) -> None:
        if not 0 <= self.beta < 1:
            raise ValueError(f"{_OP}: beta is {self.beta}, expected 0 <= beta < 1")
        check_coefficient(_OP, "damping", self.damping)
        check_coefficient(_OP, "weight_decay", self.weight_decay)
        for name, scalar in (("lr", self.lr), ("grad_scale", self.grad_scale), ("found_inf", self.found_inf)):
            check_one_element(_OP, name, scalar, device_of(self.params))

    def check(self) -> list[_View]:
        """All but the value of the learning rate; returns a view of each parameter."""
        lists: dict[str, Sequence[Tensor | None]] = {
            "grads": self.grads,
            "exp_avgs": self.exp_avgs,
            "steps": self.steps,
            "row_factors": self.row_factors,
            "column_factors": self.column_factors,
        }
        check_lengths(_OP, self.params, lists)
        self.check_numbers()
        check_roundings(_OP, self.rounding, len(self.params))
        views = []
        for i, (p, g, m, t, r, c) in enumerate(zip(*self[:6], strict=True)):
            check_floating(_OP, f"params[{i}]", p.dtype)
            wide = ACCUMULATOR[p.dtype]
            check_like(_OP, f"grads[{i}]", g, p.dtype, i, p)
            check_moment(_OP, f"exp_avgs[{i}]", m, i, p)
            check_count(_OP, i, t, p)
            for name, factor, dims in ((f"row_factors[{i}]", r, 1), (f"column_factors[{i}]", c, 2)):
                if factor is not None:
                    check_beside(_OP, name, factor, wide, i, p)
                    if not (factor.is_contiguous() and factor.dim() <= dims):
                        raise ValueError(
                            f"{_OP}: {name} has shape {tuple(factor.shape)} and strides {factor.stride()}, expected a "
                            f"contiguous {'vector' if dims == 1 else 'vector, or (groups, columns)'}"
                        )
            check_written(_OP, f"params[{i}]", p)
            check_written(_OP, f"exp_avgs[{i}]", m)
            views.append(_view(i, p, r, c))
        for name, tensors in (("params", self.params), ("exp_avgs", self.exp_avgs), ("steps", self.steps)):
            check_distinct(_OP, name, tensors)
        return views

    def curvature(self, i: int, view: _View) -> Tensor | float:
        """Form row * column + damping in the shape of parameter i."""
        row_factor, column_factor = self.row_factors[i], self.column_factors[i]
        product: Tensor | float = 1.0
        if row_factor is not None:
            product = row_factor.reshape((-1, 1, 1) if row_factor.numel() == 1 else (view.groups, view.rows, 1))
        if column_factor is not None:
            product = product * column_factor.reshape(
                (1, 1, 1) if column_factor.numel() == 1 else (view.groups, 1, view.columns)
            )
        if isinstance(product, float):
            return product + self.damping
        return (product + self.damping).expand(*view).reshape(self.params[i].shape)


def _new_skipped(s: _Step) -> Tensor:
    """The number of skipped elements of each parameter, to be filled."""
    return torch.empty(len(s.params), dtype=torch.int64, device=device_of(s.params))


def _fake(s: _Step) -> Tensor:
    s.check()
    return _new_skipped(s)


def _reference(s: _Step) -> Tensor:
    views = s.check()
    check_rate(_OP, s.lr)
    skipped = _new_skipped(s).zero_()
    if s.found_inf is not None and bool(s.found_inf):
        return skipped
    for i, (w, g, m, t, view) in enumerate(zip(*s[:4], views, strict=True)):
        t += 1
        dtype = ACCUMULATOR[w.dtype]
        g = g.to(dtype)
        if s.grad_scale is not None:
            g = g / s.grad_scale.to(m.device, dtype).reshape(())
        if s.maximize:
            g = -g
        finite = g.isfinite()
        skipped[i] = g.numel() - finite.sum()
        wide = w.to(dtype)
        if s.weight_decay and not s.decoupled:
            g = g + s.weight_decay * wide
        moment = s.beta * m.to(dtype) + (1 - s.beta) * g
        # Scalars in float64, as they come: only the elementwise work is in this dtype.
        correction = 1 - s.beta ** t.double().reshape(())
        step = moment / correction.to(dtype) / s.curvature(i, view)
        if s.weight_decay and s.decoupled:
            step = step + s.weight_decay * wide
        updated = wide - s.lr.to(m.device, dtype).reshape(()) * step
        if s.rounding is None:
            kept, taken = as_moment(moment, m.dtype), updated.to(w.dtype)
        else:
            rounder = Rounder(w, s.rounding[4 * i : 4 * i + 4], int(t))
            kept, taken = rounder.round(moment, m.dtype, low=True), rounder.round(updated, w.dtype, low=False)
        m.copy_(torch.where(finite, kept, m))
        w.copy_(torch.where(finite, taken, w))
    return skipped


def _native(on: Native, s: _Step) -> Tensor:
    skipped = _new_skipped(s)
    on.kernels.adafisher_step_(*s, skipped, on.place(device_of(s.params)))
    increment_version(s.params)  # for backward passes that kept them; moments and counts are in no graph
    return skipped


def _triton(s: _Step) -> Tensor:
    from fisher_kernels.triton_kernels import adafisher_step

    s.check_numbers()
    check_rate(_OP, s.lr)
    nothing, found_inf = found_on_device(s.found_inf, device_of(s.params))
    if nothing or not s.params:
        s.check()
        return _new_skipped(s).zero_()
    skipped = adafisher_step.step(s._replace(found_inf=found_inf))
    increment_version(s.params)
    return skipped


_step = define(
    "adafisher_step_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] steps, "
    "Tensor?[] row_factors, Tensor?[] column_factors, *, Tensor lr, float beta, float damping, float weight_decay, "
    "bool decoupled, bool maximize, Tensor? grad_scale=None, Tensor? found_inf=None, int[]? rounding=None) -> Tensor",
    arguments=_Step,
    fake=_fake,
    reference=_reference,
    native=_native,
    triton=_triton,
)


def adafisher_step_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    steps: Sequence[Tensor],
    row_factors: Sequence[Tensor | None],
    column_factors: Sequence[Tensor | None],
    *,
    lr: float | Tensor,
    beta: float,
    damping: float,
    weight_decay: float,
    decoupled: bool,
    maximize: bool,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    rounding: Sequence[Rounding] | None = None,
) -> Tensor:
    r"""One AdaFisher step of a list of parameters, in place, in one pass over memory.

    With each parameter w seen as (groups, rows, columns) in row-major order, its factors r and c, and λ the weight
    decay:

    .. math::

        t &\leftarrow t + 1 \\
        g &= \pm\,\mathrm{grad} / \mathrm{grad\_scale} \quad (+\, \lambda w \text{ unless decoupled}) \\
        m &\leftarrow \beta m + (1 - \beta)\, g \\
        F_{\mathrm{group},\mathrm{row},\mathrm{column}} &=
            r_{\mathrm{group},\mathrm{row}}\, c_{\mathrm{group},\mathrm{column}} + \mathrm{damping} \\
        w &\leftarrow w - \mathrm{lr} \left( \frac{m}{(1 - \beta^t)\, F}
            \quad (+\, \lambda w \text{ if decoupled}) \right)

    The gradient is negated to maximise. The curvature F, a Kronecker product of two diagonals, is never formed. An
    element whose gradient is NaN or infinite keeps its parameter and its moment. Where ``found_inf`` is not 0 nothing
    changes at all, not even the step counts (AdaFisher, arXiv 2405.16397, Algorithm 1).

    Args:
        params: float32, float64, bfloat16 or float16, any shapes and strides without overlap. One that is in the list
            twice, or begins where another does, is refused, as it is of what else is written.
        grads: of the shapes and dtypes of params.
        exp_avgs: first moments m of the shapes of params; float64 for float64 parameters, else float32 or bfloat16.
            One in bfloat16 is rounded as it is written; the step itself takes m before that.
        steps: number of steps t taken so far, one float32 element for each parameter.
        row_factors: for each parameter (groups * rows,), one element that stands for all, or None for 1; contiguous, in
            float64 for float64 parameters, else float32.
        column_factors: for each parameter (columns,) or (groups, columns), one element, or None for 1.
        lr: learning rate, finite and at least 0: a real number or a tensor of one element.
        beta: decay of the moment, 0 <= beta < 1.
        damping: added to the product of the factors, at least 0; the product plus damping should be positive.
        weight_decay: at least 0.
        decoupled: decay the weights (AdaFisherW) rather than add the decay to the gradient (AdaFisher).
        maximize: ascend rather than descend.
        grad_scale: one element by which gradients are divided, or None.
        found_inf: one element; the whole call does nothing where it is not 0.
        rounding: for each parameter, by which random integers it and its moment are rounded where they are bfloat16,
            the parameter by the upper halves of those of step t, the moment by the lower ones; None rounds to nearest.

    Returns:
        int64 (len(params),): how many elements of each parameter were skipped, on the device of the parameters.

    Raises:
        TypeError, ValueError: an argument has the wrong dtype, shape, device, length or range; the message names it,
            and nothing is changed.
    """
    try:
        s = _Step(
            list(params), list(grads), list(exp_avgs), list(steps), list(row_factors), list(column_factors),
            lr=rate_of(_OP, lr), beta=beta, damping=damping, weight_decay=weight_decay, decoupled=decoupled,
            maximize=maximize, grad_scale=grad_scale, found_inf=found_inf,
            rounding=numbers_of_roundings(_OP, rounding, params),
        )  # fmt: skip
    except TypeError:
        values = (params, grads, exp_avgs, steps, row_factors, column_factors)
        check_lists(_OP, dict(zip(_Step._fields, values, strict=False)))
        raise
    skipped: Tensor = _step(s)
    return skipped
