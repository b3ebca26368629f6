"""The AdaFisher update of a list of parameters, in two launches for each pair of dtypes.

It moves 20 bytes a parameter in float32, 16 with moments in 16 bits.
"""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._configs import config, trial
from ._language import divide, divmod_from, is_finite
from ._launch import launch
from ._lists import CHUNK, Layout, address, are_aligned, locate, one, table
from ._rounding import random_of, rounding_rows, state_of, stored
from ._steps import advance, by_moment, is_off, scalar, times

# The lists, in the order of the arguments.
_PARAM, _GRAD, _MOMENT, _STEP, _ROW, _COLUMN = (tl.constexpr(k) for k in range(6))
# What the layout has for each parameter: see `kernel`.
_WIDTH = tl.constexpr(10)
_ROUNDING = tl.constexpr(6)


@triton.jit
def _curvature(row_factor, column_factor, strides, row, group, column, mask, damping):
    """F = row * column + damping."""
    by_row, by_column, by_group = strides
    left = tl.load(row_factor + row * by_row, mask)
    right = tl.load(column_factor + column * by_column + group * by_group, mask)
    return left * right + damping


@triton.jit
def _curvature_of_run(row_factor, column_factor, shape, strides, first, lanes, mask, damping):
    """F of elements first + lanes in row-major order."""
    rows, columns = shape
    row = first // columns
    down, column = divmod_from(first % columns, lanes, columns)
    across, _ = divmod_from(row % rows, down, rows)
    return _curvature(row_factor, column_factor, strides, row + down, row // rows + across, column, mask, damping)


@triton.jit
def _curvature_at(row_factor, column_factor, shape, strides, index, mask, damping):
    """F of elements anywhere in row-major order."""
    rows, columns = shape
    row = index // columns
    return _curvature(row_factor, column_factor, strides, row, row // rows, index % columns, mask, damping)


@triton.jit
def _update(
    param, grad, moment, mask, element, layout, state,
    curvature, inverse_scale, beta, gain, step_size, weight_decay, shrinkage, A: tl.constexpr, RANDOM: tl.constexpr,
):  # fmt: skip
    """Step the elements at some addresses; counts those whose gradient is not finite, which stay as they were."""
    w, m = tl.load(param, mask), tl.load(moment, mask)
    wide = w.to(A)
    g = tl.load(grad, mask).to(A) * inverse_scale
    finite = is_finite(g)
    # Not even a NaN of the parameter gets into the moment where there is no decay.
    g += tl.where(weight_decay != 0, weight_decay * wide, 0)
    new = beta * m.to(A) + gain * g
    change = divide(step_size * new, curvature) + tl.where(shrinkage != 0, shrinkage * wide, 0)
    random = random_of(layout + _ROUNDING, state, element, RANDOM)
    tl.store(param, tl.where(finite, stored(wide - change, random, w.dtype, False, RANDOM), w), mask)
    tl.store(moment, tl.where(finite, stored(new, random, m.dtype, True, RANDOM), m), mask)
    return finite


@triton.jit(do_not_specialize=["count"])
def kernel(
    addresses,  # [6, count]
    count,
    layouts,  # [count, 10]: size, rows of a group, columns, steps in the factors: of a row, a column, a group; rounding
    geometry,
    chunks,  # [programs, 2]
    corrections,  # [count]: 1 - beta^t
    skipped,  # [count]
    lr: tl.float64,
    lr_factor,
    beta: tl.float64,
    damping: tl.float64,
    weight_decay: tl.float64,  # of the coupled form
    shrinkage: tl.float64,  # of the decoupled form
    scale: tl.float64,
    scale_factor,
    found_inf,
    T: tl.constexpr,
    M: tl.constexpr,
    A: tl.constexpr,
    STRIDED: tl.constexpr,
    RANDOM: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One chunk of one parameter."""
    if not is_off(found_inf):
        program = tl.program_id(0).to(tl.int64)
        i = tl.load(chunks + 2 * program)
        start = tl.load(chunks + 2 * program + 1).to(tl.int64) * CHUNK
        layout = layouts + i.to(tl.int64) * _WIDTH
        param = address(addresses, count, _PARAM, i, T)
        grad = address(addresses, count, _GRAD, i, T)
        moment = address(addresses, count, _MOMENT, i, M)
        row_factor = address(addresses, count, _ROW, i, A)
        column_factor = address(addresses, count, _COLUMN, i, A)
        shape = tl.load(layout + 1), tl.load(layout + 2)
        strides = tl.load(layout + 3), tl.load(layout + 4), tl.load(layout + 5)

        rate = times(lr, lr_factor)
        inverse_scale = (1 / times(scale, scale_factor)).to(A)
        step_size = (rate / tl.load(corrections + i)).to(A)
        shrink = (rate * shrinkage).to(A)
        b = tl.full((), beta, A)
        gain = (1 - tl.full((), beta, tl.float64)).to(A)
        damp = tl.full((), damping, A)
        decay = tl.full((), weight_decay, A)
        state = state_of(layout + _ROUNDING, address(addresses, count, _STEP, i, tl.float32), RANDOM)
        lanes = tl.arange(0, BLOCK)
        left = tl.minimum(tl.load(layout) - start, CHUNK).to(tl.int32)
        found = tl.zeros((BLOCK,), tl.int32)

        if STRIDED:
            for first in range(0, left, BLOCK):
                mask = first + lanes < left
                whole, at_param, at_grad, at_moment = locate(geometry, i, start + first, lanes)
                curvature = _curvature_at(row_factor, column_factor, shape, strides, whole, mask, damp)
                finite = _update(
                    param + at_param, grad + at_grad, moment + at_moment, mask, whole, layout, state,
                    curvature, inverse_scale, b, gain, step_size, decay, shrink, A, RANDOM,
                )  # fmt: skip
                found += (mask & ~finite).to(tl.int32)
        elif (left == CHUNK) & are_aligned(param, grad, moment):
            # No mask and known alignment: 16 bytes a load.
            wide_param, wide_grad = tl.multiple_of(param, 16), tl.multiple_of(grad, 16)
            wide_moment = tl.multiple_of(moment, 16)
            for first in range(0, CHUNK, BLOCK):
                at = start + first + lanes
                curvature = _curvature_of_run(
                    row_factor, column_factor, shape, strides, start + first, lanes, None, damp
                )
                finite = _update(
                    wide_param + at, wide_grad + at, wide_moment + at, None, at, layout, state,
                    curvature, inverse_scale, b, gain, step_size, decay, shrink, A, RANDOM,
                )  # fmt: skip
                found += (~finite).to(tl.int32)
        else:
            for first in range(0, left, BLOCK):
                mask = first + lanes < left
                at = start + first + lanes
                curvature = _curvature_of_run(
                    row_factor, column_factor, shape, strides, start + first, lanes, mask, damp
                )
                finite = _update(
                    param + at, grad + at, moment + at, mask, at, layout, state,
                    curvature, inverse_scale, b, gain, step_size, decay, shrink, A, RANDOM,
                )  # fmt: skip
                found += (mask & ~finite).to(tl.int32)
        total = tl.sum(found)
        if total > 0:
            tl.atomic_add(skipped + i, total.to(tl.int64), sem="relaxed")  # whole numbers: no order matters


def _factor_strides(
    view: tuple[int, int, int], row_factor: Tensor | None, column_factor: Tensor | None
) -> tuple[int, ...]:
    """The view but for its groups, and how far the next row, column and group lie in the factors; 0 for constants."""
    _, rows, columns = view
    by_row = row_factor is not None and row_factor.numel() != 1
    by_column = column_factor is not None and column_factor.numel() != 1
    return rows, columns, int(by_row), int(by_column), columns if by_column else 0


def step(s: Any) -> Tensor:
    """Take the step.

    Args:
        s: the arguments of the op by their names, found_inf on the device of the parameters. ``s.check()`` checks the
            lists, which need it where they are new, and gives (groups, rows, columns) for each parameter.
    """

    def layout() -> Layout:
        rows = map(_factor_strides, s.check(), s.row_factors, s.column_factors)
        roundings = rounding_rows(s.rounding, len(s.params))
        return by_moment([(*row, *of) for row, of in zip(rows, roundings, strict=True)], s.exp_avgs)

    device = s.params[0].device
    factors = (
        [one(p) if x is None else x for x, p in zip(xs, s.params, strict=False)]
        for xs in (s.row_factors, s.column_factors)
    )
    lists = s.params, s.grads, s.exp_avgs, s.steps, *factors
    rounding = None if s.rounding is None else tuple(s.rounding)
    plan = table("adafisher_step_", lists, layout, key=rounding, written=(0, 2, 3))
    rate, rate_factor = scalar(s.lr)
    scale, scale_factor = scalar(s.grad_scale)
    decays = (0.0, s.weight_decay) if s.decoupled else (s.weight_decay, 0.0)
    corrections, skipped = advance(plan, _STEP.value, s.beta, s.found_inf, device)
    for (dtype, wide, strided, chunks), kept in zip(plan.launches, plan.kinds, strict=True):
        chosen = config("adafisher_step_strided" if strided else "adafisher_step", device, len(chunks) * CHUNK.value)
        launch(
            kernel, len(chunks), device,
            plan.addresses, plan.count, plan.layout, plan.geometry, chunks, corrections, skipped,
            rate, rate_factor, s.beta, s.damping, *decays, -scale if s.maximize else scale, scale_factor, s.found_inf,
            T=dtype, M=kept, A=wide, STRIDED=strided, RANDOM=s.rounding is not None,
            BLOCK=chosen.block, warps=chosen.warps,
        )  # fmt: skip
    return skipped


@trial("adafisher_step")
def _trial(device: torch.device, size: int) -> Callable[[], object]:
    columns = 1024
    shape = size // columns, columns
    param, grad, moment = (torch.randn(shape, dtype=torch.float32, device=device) for _ in range(3))
    row, column = (torch.rand(n, dtype=torch.float32, device=device) for n in shape)
    s = SimpleNamespace(
        params=[param], grads=[grad], exp_avgs=[moment], steps=[torch.zeros((), dtype=torch.float32, device=device)],
        row_factors=[row], column_factors=[column], lr=torch.zeros((), dtype=torch.float64, device="cpu"),
        beta=0.9, damping=1e-3, weight_decay=0.0, decoupled=False, maximize=False, grad_scale=None, found_inf=None,
        rounding=None, check=lambda: [(1, *shape)],
    )  # fmt: skip
    return lambda: step(s)
