"""The step along preconditioned momentum of a list of parameters: three passes of 12 bytes a parameter in float32.

A momentum in 16 bits saves 4 bytes in the first pass and 2 in the second.
The first one advances the momentum, the second one leaves three partial sums a chunk in float64, of which two small
kernels make those of each parameter. Another one makes of these what the third pass takes off.
"""

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from ._language import is_finite
from ._launch import launch
from ._lists import CHUNK, Layout, Table, address, are_aligned, locate, number, table
from ._rounding import random_of, rounding_rows, state_of, stored
from ._steps import by_moment, is_off, of_each, rate_of, scalar, times
from ._sums import LANES, LEVELS, add_chunks, first_chunks, new_partials, total

_BLOCK = 2048  # of a pass without sums: 16 bytes of any dtype a thread, with warps of 32 lanes and of 64
_WARPS_STRIDED = 8  # four elements a thread: finding them takes many registers

_PARAMS = tl.constexpr(128)  # parameters whose coefficients one program computes
_PARAM_LEVELS = tl.constexpr(7)


# The momentum. Its lists, in order, the last one where something is rounded at random:
_PARAM, _GRAD, _MOMENT, _STEP = (tl.constexpr(k) for k in range(4))
_MOMENTUM_WIDTH = tl.constexpr(5)  # of the layout: size, rounding


@triton.jit
def _state(addresses, count, which: tl.constexpr, i, numbers, RANDOM: tl.constexpr):
    """What the random integers of a parameter come from in this step."""
    if RANDOM:
        state = state_of(numbers, address(addresses, count, which, i, tl.float32), RANDOM)
    else:
        state = tl.full((), 0, tl.uint32)
    return state


@triton.jit
def _advance(
    param, grad, moment, mask, element, numbers, state, inverse_scale, decay, momentum, taken,
    DECAYS: tl.constexpr, RANDOM: tl.constexpr,
):  # fmt: skip
    """Advance the momentum at some addresses; adds how many elements went on to what the lanes have so far."""
    A: tl.constexpr = inverse_scale.dtype
    m = tl.load(moment, mask)
    g = tl.load(grad, mask).to(A) * inverse_scale
    if DECAYS:
        g += decay * tl.load(param, mask).to(A)
    new = momentum * m.to(A) + g
    counts = is_finite(new)
    random = random_of(numbers, state, element, RANDOM)
    tl.store(moment, tl.where(counts, stored(new, random, m.dtype, True, RANDOM), m), mask)
    if mask is not None:
        counts = counts & mask
    return taken + counts.to(tl.int32)


@triton.jit(do_not_specialize=["count"])
def heavy_ball_kernel(
    addresses,  # [lists, count]
    count,
    layouts,  # [count, 5]: size, rounding
    geometry,
    chunks,  # [programs, 2]
    skipped,  # [count]
    momentum: tl.float64,
    weight_decay: tl.float64,
    scale: tl.float64,
    scale_factor,
    found_inf,
    T: tl.constexpr,
    M: tl.constexpr,
    A: tl.constexpr,
    STRIDED: tl.constexpr,
    DECAYS: tl.constexpr,
    RANDOM: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One chunk of one parameter."""
    if not is_off(found_inf):
        program = tl.program_id(0).to(tl.int64)
        i = tl.load(chunks + 2 * program)
        start = tl.load(chunks + 2 * program + 1).to(tl.int64) * CHUNK
        param = address(addresses, count, _PARAM, i, T)
        grad = address(addresses, count, _GRAD, i, T)
        moment = address(addresses, count, _MOMENT, i, M)
        if not STRIDED:
            param, grad, moment = param + start, grad + start, moment + start

        layout = layouts + i.to(tl.int64) * _MOMENTUM_WIDTH
        state = _state(addresses, count, _STEP, i, layout + 1, RANDOM)
        inverse_scale = (1 / times(scale, scale_factor)).to(A)
        decay = tl.full((), weight_decay, A)
        mu = tl.full((), momentum, A)
        lanes = tl.arange(0, BLOCK)
        left = tl.minimum(tl.load(layout) - start, CHUNK).to(tl.int32)
        taken = tl.full((BLOCK,), 0, tl.int32)

        if STRIDED:
            for first in range(0, left, BLOCK):
                whole, at_param, at_grad, at_moment = locate(geometry, i, start + first, lanes)
                taken = _advance(
                    param + at_param, grad + at_grad, moment + at_moment, first + lanes < left,
                    whole, layout + 1, state, inverse_scale, decay, mu, taken, DECAYS, RANDOM,
                )  # fmt: skip
        elif (left == CHUNK) & are_aligned(param, grad, moment):
            # No mask and known alignment: 16 bytes a load.
            wide_param, wide_grad = tl.multiple_of(param, 16), tl.multiple_of(grad, 16)
            wide_moment = tl.multiple_of(moment, 16)
            for first in range(0, CHUNK, BLOCK):
                at = first + lanes
                taken = _advance(
                    wide_param + at, wide_grad + at, wide_moment + at, None, start + at, layout + 1, state,
                    inverse_scale, decay, mu, taken, DECAYS, RANDOM,
                )  # fmt: skip
        else:
            for first in range(0, left, BLOCK):
                at = first + lanes
                taken = _advance(
                    param + at, grad + at, moment + at, at < left, start + at, layout + 1, state,
                    inverse_scale, decay, mu, taken, DECAYS, RANDOM,
                )  # fmt: skip

        not_taken = left - tl.sum(taken)
        if not_taken > 0:
            tl.atomic_add(skipped + i, not_taken.to(tl.int64), sem="relaxed")  # whole numbers: no order matters


def advance_momentum(s: Any, skipped: Tensor) -> Tensor:
    """Advance the momentum, and count in ``skipped``, zeros before, what stays as it was.

    Args:
        s: the arguments of the op by their names, found_inf on the device of the parameters. ``s.check_lists()`` checks
            the lists, which need it where they are new.
    """

    def layout() -> Layout:
        s.check_lists()
        return by_moment(rounding_rows(s.rounding, len(s.params)), s.momentum_buffers)

    decays = bool(s.weight_decay)
    # Parameters that are not read do not say in what order the others are walked, and no table is of them.
    lists: tuple[list[Tensor], ...] = (s.params if decays else s.grads, s.grads, s.momentum_buffers)
    key: Any = decays
    if random := s.rounding is not None:
        if s.steps is None:
            s.check_lists()  # refuses it
        lists, key = (*lists, s.steps), (decays, *s.rounding)
    if not decays and not all(map(_are_alike, s.params, s.grads)):
        s.check_lists()
    plan = table("heavy_ball_", lists, layout, key=key, written=(2,))
    scale, scale_factor = scalar(s.grad_scale)
    scale = -scale if s.maximize else scale
    for (dtype, wide, strided, chunks), kept in zip(plan.launches, plan.kinds, strict=True):
        launch(
            heavy_ball_kernel, len(chunks), skipped.device,
            plan.addresses, plan.count, plan.layout, plan.geometry, chunks, skipped,
            s.momentum, s.weight_decay, scale, scale_factor, s.found_inf, T=dtype, M=kept, A=wide, STRIDED=strided,
            DECAYS=decays, RANDOM=random, BLOCK=LANES.value if strided else _BLOCK, fuse=False,
            warps=_WARPS_STRIDED if strided else 4,
        )  # fmt: skip
    return skipped


def _are_alike(x: Tensor, y: Tensor) -> bool:
    """Whether two tensors are of one kind, shape and dtype, at a glance."""
    return not x.is_nested and x.layout == y.layout and x.dtype == y.dtype and x.shape == y.shape


# The sums. Their lists, in order:
_WEIGHT, _BUFFER, _ALONG = (tl.constexpr(k) for k in range(3))
_SUMS_WIDTH = tl.constexpr(2)  # of the layout: size, first chunk
_KINDS = tl.constexpr(3)


@triton.jit
def _or_zero(pointer, mask):
    """What lies there in float64, and 0 where the mask is not set."""
    if mask is None:
        x = tl.load(pointer)
    else:
        x = tl.load(pointer, mask, 0.0)
    return x.to(tl.float64)


@triton.jit
def _add_up(weight, buffer, along, mask, product, square, norm, PRODUCTS: tl.constexpr, WEIGHTS: tl.constexpr):
    """Add the products at some addresses to what the lanes have so far."""
    d = _or_zero(along, mask)
    square = tl.fma(d, d, square)
    if PRODUCTS:
        product = tl.fma(d, _or_zero(buffer, mask), product)
    if WEIGHTS:
        w = _or_zero(weight, mask)
        norm = tl.fma(w, w, norm)
    return product, square, norm


@triton.jit(do_not_specialize=["count", "total_chunks"])
def sums_kernel(
    addresses,
    count,
    layouts,
    geometry,
    chunks,
    total_chunks,
    partials,  # [3, total_chunks]
    T: tl.constexpr,
    M: tl.constexpr,
    A: tl.constexpr,
    STRIDED: tl.constexpr,
    PRODUCTS: tl.constexpr,
    WEIGHTS: tl.constexpr,
):
    """The sums of one chunk of one parameter."""
    program = tl.program_id(0).to(tl.int64)
    i = tl.load(chunks + 2 * program)
    number_of_chunk = tl.load(chunks + 2 * program + 1).to(tl.int64)
    start = number_of_chunk * CHUNK
    layout = layouts + i.to(tl.int64) * _SUMS_WIDTH
    weight = address(addresses, count, _WEIGHT, i, T)
    buffer = address(addresses, count, _BUFFER, i, M)
    along = address(addresses, count, _ALONG, i, A)
    if not STRIDED:
        weight, buffer, along = weight + start, buffer + start, along + start

    lanes = tl.arange(0, LANES)
    left = tl.minimum(tl.load(layout) - start, CHUNK).to(tl.int32)
    product = tl.full((LANES,), 0, tl.float64)
    square, norm = product, product
    if STRIDED:
        for first in range(0, left, LANES):
            _, at_weight, at_buffer, at_along = locate(geometry, i, start + first, lanes)
            product, square, norm = _add_up(
                weight + at_weight, buffer + at_buffer, along + at_along, first + lanes < left,
                product, square, norm, PRODUCTS, WEIGHTS,
            )  # fmt: skip
    elif (left == CHUNK) & are_aligned(weight, buffer, along):
        wide_weight, wide_buffer = tl.multiple_of(weight, 16), tl.multiple_of(buffer, 16)
        wide_along = tl.multiple_of(along, 16)
        for first in range(0, CHUNK, LANES):
            at = first + lanes
            product, square, norm = _add_up(
                wide_weight + at, wide_buffer + at, wide_along + at, None, product, square, norm, PRODUCTS, WEIGHTS
            )
    else:
        for first in range(0, left, LANES):
            at = first + lanes
            product, square, norm = _add_up(
                weight + at, buffer + at, along + at, at < left, product, square, norm, PRODUCTS, WEIGHTS
            )

    out = partials + tl.load(layout + 1) + number_of_chunk + tl.arange(0, 1)
    tl.store(out, total(product[None, :], LEVELS))
    tl.store(out + total_chunks, total(square[None, :], LEVELS))
    tl.store(out + 2 * total_chunks, total(norm[None, :], LEVELS))


@triton.jit(do_not_specialize=["count"])
def finish_kernel(sums, skipped, out, count, LANES: tl.constexpr):
    """From [3, count] to [count, 3]; NaN where an element was skipped."""
    i = tl.program_id(0) * LANES + tl.arange(0, LANES)
    there = i < count
    for k in tl.static_range(_KINDS):
        x = tl.load(sums + k * count + i, there, 0.0)
        if skipped is not None:
            x = tl.where(tl.load(skipped + i, there, 0) > 0, float("nan"), x)
        tl.store(out + i * _KINDS + k, x, there)


def add_up(s: Any, out: Tensor) -> Tensor:
    """Fill ``out`` with the sums of every parameter; arguments as for ``advance_momentum``."""

    def layout() -> Layout:
        s.check_lists()
        return by_moment([(first,) for first in first_chunks(s.params)], lists[1])

    # What is not read lies as the directions do.
    lists = (
        s.params if s.weights else s.directions,
        s.momentum_buffers if s.products else s.directions,
        s.directions,
    )
    plan = table("direction_sums", lists, layout, key=(s.products, s.weights), sums=True)
    partials = new_partials(plan, _KINDS.value, out.device)
    for (dtype, wide, strided, chunks), kept in zip(plan.launches, plan.kinds, strict=True):
        launch(
            sums_kernel, len(chunks), out.device,
            plan.addresses, plan.count, plan.layout, plan.geometry, chunks, partials.shape[1], partials,
            T=dtype, M=kept, A=wide, STRIDED=strided, PRODUCTS=s.products, WEIGHTS=s.weights, fuse=False,
            warps=_WARPS_STRIDED if strided else 4,
        )  # fmt: skip
    lanes = _PARAMS.value
    launch(
        finish_kernel, triton.cdiv(plan.count, lanes), out.device,
        add_chunks(plan, partials), s.skipped, out, plan.count, LANES=lanes,
    )  # fmt: skip
    return out


# The step. Its lists, in order, of which the third one is the second again, and the numbers after them:
_STEPPED, _DIRECTION = (tl.constexpr(k) for k in range(2))
_RATE_TENSOR, _COUNT, _RATE, _DECAY, _CAP, _FLOOR = (tl.constexpr(k) for k in range(3, 9))
# The layout: size, first parameter of the layer, how many it has, its number, kind of a learning rate on the device,
# rounding.
_WIDTH = tl.constexpr(9)
_SIZE, _FIRST, _MEMBERS, _LAYER, _KIND, _ROUNDING = (tl.constexpr(k) for k in range(6))
# Coefficients of the pass, float64 [2, count].
_ALONG_DIRECTION, _SHRINKAGE = (tl.constexpr(k) for k in range(2))


@triton.jit
def _rates(addresses, count, layouts, i, there, lr, lr_factor, EACH: tl.constexpr):
    """The learning rates of some parameters: one for all, or each its own."""
    if EACH:
        rate = rate_of(addresses, count, layouts + i.to(tl.int64) * _WIDTH + _KIND, _RATE_TENSOR, _RATE, i, there)
    else:
        rate = times(lr, lr_factor) + tl.zeros_like(i).to(tl.float64)
    return rate


@triton.jit
def _gather(addresses, count, layouts, sums, i, there, lr, lr_factor, most, EACH: tl.constexpr):
    """Of the layers of some parameters: lr^2 |d|^2, |w|^2, elements, the cap, and whether all sums are finite."""
    layout = layouts + i.to(tl.int64) * _WIDTH
    first_of_layer, members = tl.load(layout + _FIRST, there, 0), tl.load(layout + _MEMBERS, there, 0)
    size = tl.zeros_like(i).to(tl.float64)
    weight = size
    elements = tl.zeros_like(first_of_layer)
    finite = there
    cap = size + most
    for k in range(tl.max(members).to(tl.int32)):
        member, mine = first_of_layer + k, there & (k < members)
        product = tl.load(sums + 3 * member, mine, 0.0)
        square = tl.load(sums + 3 * member + 1, mine, 0.0)
        norm = tl.load(sums + 3 * member + 2, mine, 0.0)
        rate = _rates(addresses, count, layouts, member, mine, lr, lr_factor, EACH)
        finite = finite & is_finite(product) & is_finite(square) & is_finite(norm)
        size += tl.where(mine, rate * rate * square, 0)
        weight += norm
        elements += tl.load(layouts + member * _WIDTH + _SIZE, mine, 0)
        if EACH:
            cap = tl.minimum(cap, tl.where(mine, number(addresses, count, _CAP, member, mine), cap))
    return size, weight, elements, cap, finite


@triton.jit(do_not_specialize=["count"])
def solve_kernel(
    addresses,
    count,
    layouts,
    sums,  # [count, 3]
    coefficients,  # [2, count]
    scale_of_all,
    factors,
    skipped,
    lr: tl.float64,
    lr_factor,
    weight_decay: tl.float64,
    most: tl.float64,
    kl_clip: tl.float64,
    floor: tl.float64,
    found_inf,
    CLIPS: tl.constexpr,
    EACH: tl.constexpr,
):
    """The bounds, and what some parameters take off: coefficients of the direction and of the parameter."""
    lanes = tl.arange(0, _PARAMS)
    i = tl.program_id(0) * _PARAMS + lanes
    there = i < count
    layout = layouts + i.to(tl.int64) * _WIDTH
    layer = tl.load(layout + _LAYER, there, 0)
    begins = there & (tl.load(layout + _FIRST, there, -1) == i)
    one = tl.full((), 1, tl.float64)
    if is_off(found_inf):
        tl.store(factors + layer, one + tl.zeros_like(i).to(tl.float64), begins)
        tl.store(skipped + i, tl.zeros_like(i).to(tl.int64), there)
        scale = one
    else:
        if CLIPS:
            # Every program adds up the same numbers in the same order.
            sum_of_lanes = tl.full((_PARAMS,), 0, tl.float64)
            for first in range(0, count, _PARAMS):
                more = first + lanes
                mine = more < count
                _, _, _, _, finite = _gather(addresses, count, layouts, sums, more, mine, lr, lr_factor, most, EACH)
                rate = _rates(addresses, count, layouts, more, mine, lr, lr_factor, EACH)
                product = tl.load(sums + 3 * more.to(tl.int64), mine, 0.0)
                sum_of_lanes += tl.where(finite, rate * rate * product, 0)
            size = tl.abs(tl.sum(total(sum_of_lanes[None, :], _PARAM_LEVELS)))
            bounded = tl.where(is_finite(size), tl.sqrt(kl_clip / size), 0)
            scale = tl.where(size <= kl_clip, one, bounded)
        else:
            scale = one
        length, weight, elements, cap, finite = _gather(
            addresses, count, layouts, sums, i, there, lr, lr_factor, most, EACH
        )
        if EACH:
            lowest = number(addresses, count, _FLOOR, i, there)
        else:
            lowest = tl.full((), floor, tl.float64)
        least = lowest * tl.sqrt(elements.to(tl.float64))
        norm = tl.sqrt(weight)
        limit = cap * tl.where(norm > least, norm, least)
        length = scale * tl.sqrt(length)
        factor = tl.where(finite, tl.where(length > limit, limit / length, one), 0)
        rate = _rates(addresses, count, layouts, i, there, lr, lr_factor, EACH)
        if EACH:
            decay = number(addresses, count, _DECAY, i, there)
        else:
            decay = tl.full((), weight_decay, tl.float64)
        tl.store(factors + layer, factor, begins)
        tl.store(skipped + i, tl.where(finite, 0, tl.load(layout + _SIZE, there, 0)), there)
        tl.store(coefficients + _ALONG_DIRECTION * count + i, rate * scale * factor, there)
        tl.store(coefficients + _SHRINKAGE * count + i, rate * decay, there)
    if tl.program_id(0) == 0:
        tl.store(scale_of_all, scale)


@triton.jit
def _descend(param, direction, mask, element, numbers, state, along, shrinkage, RANDOM: tl.constexpr):
    """Step the parameters at some addresses."""
    w, d = tl.load(param, mask), tl.load(direction, mask)
    wide = w.to(d.dtype)
    change = along * d + tl.where(shrinkage != 0, shrinkage * wide, 0)
    random = random_of(numbers, state, element, RANDOM)
    tl.store(param, stored(wide - change, random, w.dtype, False, RANDOM), mask)


@triton.jit(do_not_specialize=["count"])
def descend_kernel(
    addresses,
    count,
    layouts,
    geometry,
    chunks,
    coefficients,
    skipped,
    found_inf,
    T: tl.constexpr,
    A: tl.constexpr,
    STRIDED: tl.constexpr,
    RANDOM: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One chunk of one parameter."""
    program = tl.program_id(0).to(tl.int64)
    i = tl.load(chunks + 2 * program)
    if not (is_off(found_inf) | (tl.load(skipped + i) > 0)):
        start = tl.load(chunks + 2 * program + 1).to(tl.int64) * CHUNK
        param = address(addresses, count, _STEPPED, i, T)
        direction = address(addresses, count, _DIRECTION, i, A)
        if not STRIDED:
            param, direction = param + start, direction + start

        along = tl.load(coefficients + _ALONG_DIRECTION * count + i).to(A)
        shrinkage = tl.load(coefficients + _SHRINKAGE * count + i).to(A)
        layout = layouts + i.to(tl.int64) * _WIDTH
        numbers = layout + _ROUNDING
        state = _state(addresses, count, _COUNT, i, numbers, RANDOM)
        lanes = tl.arange(0, BLOCK)
        left = tl.minimum(tl.load(layout) - start, CHUNK).to(tl.int32)
        if STRIDED:
            for first in range(0, left, BLOCK):
                whole, at_param, at_direction, _ = locate(geometry, i, start + first, lanes)
                _descend(
                    param + at_param, direction + at_direction, first + lanes < left, whole, numbers, state,
                    along, shrinkage, RANDOM,
                )  # fmt: skip
        elif (left == CHUNK) & are_aligned(param, direction, direction):
            wide_param, wide_direction = tl.multiple_of(param, 16), tl.multiple_of(direction, 16)
            for first in range(0, CHUNK, BLOCK):
                at = first + lanes
                _descend(
                    wide_param + at, wide_direction + at, None, start + at, numbers, state, along, shrinkage, RANDOM
                )
        else:
            for first in range(0, left, BLOCK):
                at = first + lanes
                _descend(param + at, direction + at, at < left, start + at, numbers, state, along, shrinkage, RANDOM)


def _plan(s: Any, each: bool) -> tuple[Table, tuple[float, Tensor | None]]:
    """The table, and the learning rate of all, which counts for nothing where each has its own."""
    count = len(s.params)
    on_device, kinds, numbers = of_each(s.lr, s.weight_decay, count, each)
    if each:
        caps = s.max_relative_step
        numbers = *numbers, caps if len(caps) == count else [*caps] * count, s.floors()

    def layout() -> list[tuple[int, ...]]:
        s.check_lists()
        firsts: dict[int, int] = {}
        members: dict[int, int] = {}
        for i, layer in enumerate(s.layers):
            firsts.setdefault(layer, i)
            members[layer] = members.get(layer, 0) + 1
        rows = zip(s.layers, kinds, rounding_rows(s.rounding, count), strict=True)
        return [(firsts[layer], members[layer], layer, kind, *rounding) for layer, kind, rounding in rows]

    if s.rounding is not None and s.steps is None:
        s.check_lists()  # refuses it
    steps = [None] * count if s.rounding is None else s.steps
    lists = s.params, s.directions, s.directions, on_device, steps
    key = tuple(s.layers), None if s.rounding is None else tuple(s.rounding)
    plan = table("capped_step_", lists, layout, key=key, numbers=numbers, written=(0,))
    return plan, (1.0, None) if each else scalar(s.lr[0])


def step(s: Any, scale: Tensor, factors: Tensor, skipped: Tensor) -> None:
    """Take the step, and fill what the op returns.

    Arguments as for ``advance_momentum``; ``s.floors()`` gives the floor of each parameter's layer.
    """
    device = s.params[0].device
    each = max(map(len, (s.lr, s.weight_decay, s.max_relative_step, s.floor))) > 1
    plan, (rate, rate_factor) = _plan(s, each)
    coefficients = s.sums.new_empty(2, plan.count)
    launch(
        solve_kernel, triton.cdiv(plan.count, _PARAMS.value), device,
        plan.addresses, plan.count, plan.layout, s.sums, coefficients, scale, factors, skipped,
        rate, rate_factor, 0.0 if each else s.weight_decay[0], float("inf") if each else s.max_relative_step[0],
        s.kl_clip or 0.0, 0.0 if each else s.floor[0], s.found_inf, CLIPS=s.kl_clip is not None, EACH=each, fuse=False,
    )  # fmt: skip
    for dtype, wide, strided, chunks in plan.launches:
        launch(
            descend_kernel, len(chunks), device,
            plan.addresses, plan.count, plan.layout, plan.geometry, chunks, coefficients, skipped, s.found_inf,
            T=dtype, A=wide, STRIDED=strided, RANDOM=s.rounding is not None,
            BLOCK=LANES.value if strided else _BLOCK, fuse=False, warps=_WARPS_STRIDED if strided else 4,
        )  # fmt: skip
