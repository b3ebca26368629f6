"""The SOFIM update of a list of parameters: 24 bytes a parameter in float32, in two passes.

The first pass advances the moments and leaves partial dot products, one or two float64 numbers a chunk. Two small
kernels make coefficients of them, three for each parameter; the second pass takes the step.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._language import is_finite
from ._launch import launch
from ._lists import CHUNK, Layout, Table, address, are_aligned, locate, number, table
from ._rounding import random_of, rounding_rows, state_of, stored
from ._steps import advance, by_moment, is_off, of_each, rate_of, scalar, times
from ._sums import LANES, LEVELS, add_chunks, first_chunks, new_partials, total

# The lists, in the order of the arguments, and the numbers after them.
_PARAM, _GRAD, _MOMENT, _STEP, _RATE_TENSOR, _RATE, _DECAY = (tl.constexpr(k) for k in range(7))
# The layout: size, first chunk, what a learning rate on the device is, and the rounding.
_WIDTH = tl.constexpr(7)
_ROUNDING = tl.constexpr(3)
# Coefficients of the second pass, float64 [3, count].
_ALONG_MOMENT, _ALONG_GRADIENT, _ALONG_DECAY = (tl.constexpr(k) for k in range(3))

_BLOCK = 2048  # of the second pass: 16 bytes of any dtype a thread, with warps of 32 lanes and of 64
_WARPS_STRIDED = 8  # four elements a thread: finding them takes many registers

_PARAMS = tl.constexpr(128)  # parameters whose coefficients one program computes
_PARAM_LEVELS = tl.constexpr(7)


@triton.jit
def _decay_of(addresses, count, i, weight_decay, EACH: tl.constexpr):
    """The weight decay of parameter i: one for all, or one for each."""
    if EACH:
        decay = number(addresses, count, _DECAY, i)
    else:
        decay = tl.full((), weight_decay, tl.float64)
    return decay


@triton.jit
def _gradient(grad, param, mask, inverse_scale, decay, COUPLED: tl.constexpr):
    """What enters the moment."""
    g = tl.load(grad, mask).to(inverse_scale.dtype) * inverse_scale
    if COUPLED:
        g += tl.where(decay != 0, decay * tl.load(param, mask).to(inverse_scale.dtype), 0)
    return g


@triton.jit
def _advance_moments(
    param, grad, moment, mask, element, layout, state, inverse_scale, decay, beta, gain, square, product, taken,
    ALONG_GRADIENT: tl.constexpr, COUPLED: tl.constexpr, RANDOM: tl.constexpr,
):  # fmt: skip
    """Advance the moments at some addresses, and add them to what the lanes have so far.

    A moment that would not be finite stays as it was and is in no sum.
    """
    m = tl.load(moment, mask)
    g = _gradient(grad, param, mask, inverse_scale, decay, COUPLED)
    random = random_of(layout + _ROUNDING, state, element, RANDOM)
    kept = stored(beta * m.to(g.dtype) + gain * g, random, m.dtype, True, RANDOM)
    new = kept.to(g.dtype)
    counts = is_finite(new)
    tl.store(moment, tl.where(counts, kept, m), mask)
    if mask is not None:
        counts = counts & mask
    new = tl.where(counts, new, 0).to(tl.float64)
    square = tl.fma(new, new, square)
    if ALONG_GRADIENT:
        product = tl.fma(new, tl.where(counts, g, 0).to(tl.float64), product)
    return square, product, taken + counts.to(tl.int32)


@triton.jit(do_not_specialize=["count", "total_chunks"])
def advance_kernel(
    addresses,  # [lists and numbers, count]
    count,
    layouts,  # [count, 3]: size, first chunk, dtype of the learning rate
    geometry,
    chunks,  # [programs, 2]
    total_chunks,
    partials,  # [1 or 2, total_chunks]: m.m and m.g
    left_out,  # [total_chunks]: how many elements are in no sum
    skipped,  # [count]
    beta: tl.float64,
    weight_decay: tl.float64,
    scale: tl.float64,
    scale_factor,
    found_inf,
    T: tl.constexpr,
    M: tl.constexpr,
    A: tl.constexpr,
    STRIDED: tl.constexpr,
    ALONG_GRADIENT: tl.constexpr,
    COUPLED: tl.constexpr,
    EACH: tl.constexpr,
    RANDOM: tl.constexpr,
):
    """The first pass over one chunk of one parameter."""
    if not is_off(found_inf):
        program = tl.program_id(0).to(tl.int64)
        i = tl.load(chunks + 2 * program)
        number_of_chunk = tl.load(chunks + 2 * program + 1).to(tl.int64)
        start = number_of_chunk * CHUNK
        layout = layouts + i.to(tl.int64) * _WIDTH
        param = address(addresses, count, _PARAM, i, T)
        grad = address(addresses, count, _GRAD, i, T)
        moment = address(addresses, count, _MOMENT, i, M)
        if not STRIDED:
            param, grad, moment = param + start, grad + start, moment + start

        state = state_of(layout + _ROUNDING, address(addresses, count, _STEP, i, tl.float32), RANDOM)
        inverse_scale = (1 / times(scale, scale_factor)).to(A)
        decay = _decay_of(addresses, count, i, weight_decay, EACH).to(A)
        b = tl.full((), beta, A)
        gain = (1 - tl.full((), beta, tl.float64)).to(A)
        lanes = tl.arange(0, LANES)
        left = tl.minimum(tl.load(layout) - start, CHUNK).to(tl.int32)
        square = tl.full((LANES,), 0, tl.float64)
        product = tl.full((LANES,), 0, tl.float64)
        taken = tl.full((LANES,), 0, tl.int32)

        if STRIDED:
            for first in range(0, left, LANES):
                whole, at_param, at_grad, at_moment = locate(geometry, i, start + first, lanes)
                square, product, taken = _advance_moments(
                    param + at_param, grad + at_grad, moment + at_moment, first + lanes < left, whole, layout, state,
                    inverse_scale, decay, b, gain, square, product, taken, ALONG_GRADIENT, COUPLED, RANDOM,
                )  # fmt: skip
        elif (left == CHUNK) & are_aligned(param, grad, moment):
            # No mask and known alignment: 16 bytes a load.
            wide_param, wide_grad = tl.multiple_of(param, 16), tl.multiple_of(grad, 16)
            wide_moment = tl.multiple_of(moment, 16)
            for first in range(0, CHUNK, LANES):
                at = first + lanes
                square, product, taken = _advance_moments(
                    wide_param + at, wide_grad + at, wide_moment + at, None, start + at, layout, state,
                    inverse_scale, decay, b, gain, square, product, taken, ALONG_GRADIENT, COUPLED, RANDOM,
                )  # fmt: skip
        else:
            for first in range(0, left, LANES):
                at = first + lanes
                square, product, taken = _advance_moments(
                    param + at, grad + at, moment + at, at < left, start + at, layout, state,
                    inverse_scale, decay, b, gain, square, product, taken, ALONG_GRADIENT, COUPLED, RANDOM,
                )  # fmt: skip

        chunk = tl.load(layout + 1) + number_of_chunk
        here = tl.arange(0, 1)
        tl.store(partials + chunk + here, total(square[None, :], LEVELS))
        if ALONG_GRADIENT:
            tl.store(partials + total_chunks + chunk + here, total(product[None, :], LEVELS))
        not_taken = left - tl.sum(taken)
        tl.store(left_out + chunk, not_taken)
        if not_taken > 0:
            tl.atomic_add(skipped + i, not_taken.to(tl.int64), sem="relaxed")  # whole numbers: no order matters


@triton.jit
def _corrected(sums, corrections, count, i, there, ALONG_GRADIENT: tl.constexpr):
    """u.u and u.g of some parameters."""
    correction = tl.load(corrections + i, there, 1.0)
    square = tl.load(sums + i, there, 0.0) / (correction * correction)
    if ALONG_GRADIENT:
        product = tl.load(sums + count + i, there, 0.0) / correction
    else:
        product = tl.zeros_like(square)
    return square, product


@triton.jit(do_not_specialize=["count"])
def solve_kernel(
    addresses,
    count,
    layouts,
    sums,  # [1 or 2, count]: m.m and m.g
    corrections,  # [count]: 1 - beta^t
    squares,  # [count]: u.u
    coefficients,  # [3, count]
    lr: tl.float64,
    lr_factor,
    rho: tl.float64,
    found_inf,
    GLOBAL: tl.constexpr,
    ALONG_GRADIENT: tl.constexpr,
    EACH: tl.constexpr,
):
    """What some parameters take off: coefficients of the moment as it is stored, the gradient and the parameter."""
    lanes = tl.arange(0, _PARAMS)
    i = tl.program_id(0) * _PARAMS + lanes
    there = i < count
    if is_off(found_inf):
        tl.store(squares + i, tl.zeros_like(i).to(tl.float64), there)
    else:
        square, product = _corrected(sums, corrections, count, i, there, ALONG_GRADIENT)
        tl.store(squares + i, square, there)
        if GLOBAL:
            # Every program adds up the same numbers in the same order.
            square_of_lanes = tl.full((_PARAMS,), 0, tl.float64)
            product_of_lanes = tl.full((_PARAMS,), 0, tl.float64)
            for first in range(0, count, _PARAMS):
                more = first + lanes
                its_square, its_product = _corrected(sums, corrections, count, more, more < count, ALONG_GRADIENT)
                square_of_lanes += its_square
                product_of_lanes += its_product
            square = total(square_of_lanes[None, :], _PARAM_LEVELS)
            product = total(product_of_lanes[None, :], _PARAM_LEVELS)
        correction = tl.load(corrections + i, there, 1.0)
        if EACH:
            rate = rate_of(addresses, count, layouts + i.to(tl.int64) * _WIDTH + 2, _RATE_TENSOR, _RATE, i, there)
        else:
            rate = times(lr, lr_factor) + tl.zeros_like(i).to(tl.float64)
        bottom = rho + square
        if ALONG_GRADIENT:
            fits = is_finite(square) & is_finite(product)  # if not, the solution counts as 0
            along_moment = tl.where(fits, -rate * product / (correction * rho * bottom), 0)
            along_gradient = tl.where(fits, rate / rho, 0)
        else:
            along_moment = rate / (correction * bottom)
            along_gradient = tl.zeros_like(rate)
        tl.store(coefficients + _ALONG_MOMENT * count + i, along_moment, there)
        tl.store(coefficients + _ALONG_GRADIENT * count + i, along_gradient, there)
        tl.store(coefficients + _ALONG_DECAY * count + i, rate, there)


@triton.jit
def _descend(
    param, grad, moment, mask, suspect, element, layout, state, inverse_scale, decay, beta, gain, rates,
    ALONG_GRADIENT: tl.constexpr, COUPLED: tl.constexpr, RANDOM: tl.constexpr,
):  # fmt: skip
    """Step the parameters at some addresses, but for suspects that the first pass left out.

    Those show by their gradients, as their moments have not changed. (One that has cannot overflow now, between itself
    and g, unless both are within rounding of the largest number.)
    """
    along_moment, along_gradient, rate = rates
    A: tl.constexpr = inverse_scale.dtype
    w, m = tl.load(param, mask), tl.load(moment, mask).to(A)
    wide = w.to(A)
    change = along_moment * m
    if ALONG_GRADIENT:
        g = _gradient(grad, param, mask, inverse_scale, decay, COUPLED)
        change += along_gradient * g
    elif suspect is not None:
        g = _gradient(grad, param, suspect, inverse_scale, decay, COUPLED)
    if not COUPLED:
        # Not even a NaN of the parameter gets into the change where there is no decay.
        change += tl.where(decay != 0, rate * (decay * wide), 0)
    random = random_of(layout + _ROUNDING, state, element, RANDOM)
    new = stored(wide - change, random, w.dtype, False, RANDOM)
    if suspect is not None:
        new = tl.where(is_finite(beta * m + gain * g) | ~suspect, new, w)
    tl.store(param, new, mask)


@triton.jit(do_not_specialize=["count"])
def descend_kernel(
    addresses,
    count,
    layouts,
    geometry,
    chunks,
    left_out,
    coefficients,
    beta: tl.float64,
    weight_decay: tl.float64,
    scale: tl.float64,
    scale_factor,
    found_inf,
    T: tl.constexpr,
    M: tl.constexpr,
    A: tl.constexpr,
    STRIDED: tl.constexpr,
    ALONG_GRADIENT: tl.constexpr,
    COUPLED: tl.constexpr,
    EACH: tl.constexpr,
    RANDOM: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The second pass over one chunk of one parameter; arguments as for the first."""
    if not is_off(found_inf):
        program = tl.program_id(0).to(tl.int64)
        i = tl.load(chunks + 2 * program)
        number_of_chunk = tl.load(chunks + 2 * program + 1).to(tl.int64)
        start = number_of_chunk * CHUNK
        layout = layouts + i.to(tl.int64) * _WIDTH
        param = address(addresses, count, _PARAM, i, T)
        grad = address(addresses, count, _GRAD, i, T)
        moment = address(addresses, count, _MOMENT, i, M)
        if not STRIDED:
            param, grad, moment = param + start, grad + start, moment + start

        state = state_of(layout + _ROUNDING, address(addresses, count, _STEP, i, tl.float32), RANDOM)
        inverse_scale = (1 / times(scale, scale_factor)).to(A)
        decay = _decay_of(addresses, count, i, weight_decay, EACH).to(A)
        b = tl.full((), beta, A)
        gain = (1 - tl.full((), beta, tl.float64)).to(A)
        along_moment = tl.load(coefficients + _ALONG_MOMENT * count + i).to(A)
        along_gradient = tl.load(coefficients + _ALONG_GRADIENT * count + i).to(A)
        rates = along_moment, along_gradient, tl.load(coefficients + _ALONG_DECAY * count + i).to(A)
        lanes = tl.arange(0, BLOCK)
        left = tl.minimum(tl.load(layout) - start, CHUNK).to(tl.int32)
        suspects = tl.where(tl.load(left_out + tl.load(layout + 1) + number_of_chunk) > 0, left, 0)

        if STRIDED:
            for first in range(0, left, BLOCK):
                whole, at_param, at_grad, at_moment = locate(geometry, i, start + first, lanes)
                _descend(
                    param + at_param, grad + at_grad, moment + at_moment,
                    first + lanes < left, first + lanes < suspects, whole, layout, state,
                    inverse_scale, decay, b, gain, rates, ALONG_GRADIENT, COUPLED, RANDOM,
                )  # fmt: skip
        elif (left == CHUNK) & (suspects == 0) & are_aligned(param, grad, moment):
            wide_param, wide_grad = tl.multiple_of(param, 16), tl.multiple_of(grad, 16)
            wide_moment = tl.multiple_of(moment, 16)
            for first in range(0, CHUNK, BLOCK):
                at = first + lanes
                _descend(
                    wide_param + at, wide_grad + at, wide_moment + at, None, None, start + at, layout, state,
                    inverse_scale, decay, b, gain, rates, ALONG_GRADIENT, COUPLED, RANDOM,
                )  # fmt: skip
        else:
            for first in range(0, left, BLOCK):
                at = first + lanes
                _descend(
                    param + at, grad + at, moment + at, at < left, at < suspects, start + at, layout, state,
                    inverse_scale, decay, b, gain, rates, ALONG_GRADIENT, COUPLED, RANDOM,
                )  # fmt: skip


def _plan(s: Any, each: bool) -> tuple[Table, tuple[float, Tensor | None], float]:
    """The table; and learning rate and weight decay of all, which count for nothing where each has its own."""
    on_device, kinds, numbers = of_each(s.lr, s.weight_decay, len(s.params), each)

    def layout() -> Layout:
        s.check_lists()
        rows = zip(first_chunks(s.params), kinds, rounding_rows(s.rounding, len(kinds)), strict=True)
        return by_moment([(first, kind, *rounding) for first, kind, rounding in rows], s.exp_avgs)

    lists = s.params, s.grads, s.exp_avgs, s.steps, on_device
    key = None if s.rounding is None else tuple(s.rounding)
    plan = table("sofim_step_", lists, layout, key, numbers, sums=True, places=key is not None, written=(0, 2, 3))
    return plan, (1.0, None) if each else scalar(s.lr[0]), 0.0 if each else s.weight_decay[0]


def step(s: Any) -> tuple[Tensor, Tensor]:
    """Take the step.

    Args:
        s: the arguments of the op by their names, found_inf on the device of the parameters. ``s.check_lists()`` checks
            the lists, which need it where they are new.
    """
    device = s.params[0].device
    along_gradient = s.direction == "gradient"
    each = len(s.lr) > 1 or len(s.weight_decay) > 1
    plan, (rate, rate_factor), decay = _plan(s, each)
    scale, scale_factor = scalar(s.grad_scale)
    scale = -scale if s.maximize else scale
    corrections, skipped = advance(plan, _STEP.value, s.beta, s.found_inf, device)
    partials = new_partials(plan, 2 if along_gradient else 1, device)
    total_chunks = partials.shape[1]
    left_out = torch.empty(total_chunks, dtype=torch.int32, device=device)
    form = {"ALONG_GRADIENT": along_gradient, "COUPLED": not s.decoupled and any(s.weight_decay), "EACH": each}
    form["RANDOM"] = s.rounding is not None
    # Products and sums round apart, and sums are made of pairs: neither what a compiler would fuse nor the number of
    # warps tells one layout from another.
    for (dtype, wide, strided, chunks), kept in zip(plan.launches, plan.kinds, strict=True):
        launch(
            advance_kernel, len(chunks), device,
            plan.addresses, plan.count, plan.layout, plan.geometry, chunks, total_chunks, partials, left_out, skipped,
            s.beta, decay, scale, scale_factor, s.found_inf, T=dtype, M=kept, A=wide, STRIDED=strided,
            fuse=False, warps=_WARPS_STRIDED if strided else 4, **form,
        )  # fmt: skip
    sums = add_chunks(plan, partials)
    squares = torch.empty(plan.count, dtype=torch.float64, device=device)
    coefficients = torch.empty(3, plan.count, dtype=torch.float64, device=device)
    launch(
        solve_kernel, triton.cdiv(plan.count, _PARAMS.value), device,
        plan.addresses, plan.count, plan.layout, sums, corrections, squares, coefficients,
        rate, rate_factor, s.rho, s.found_inf,
        GLOBAL=s.scope == "global", ALONG_GRADIENT=along_gradient, EACH=each, fuse=False,
    )  # fmt: skip
    for (dtype, wide, strided, chunks), kept in zip(plan.launches, plan.kinds, strict=True):
        launch(
            descend_kernel, len(chunks), device,
            plan.addresses, plan.count, plan.layout, plan.geometry, chunks, left_out, coefficients,
            s.beta, decay, scale, scale_factor, s.found_inf, T=dtype, M=kept, A=wide, STRIDED=strided,
            BLOCK=LANES.value if strided else _BLOCK, fuse=False, warps=_WARPS_STRIDED if strided else 4, **form,
        )  # fmt: skip
    return skipped, squares
