"""The mini-block Fisher update of a list of parameters: one pass over gradient, momentum, parameter and inverse.

In float32 that is 20 + 4 n bytes a parameter under blocks of n x n, 16 + 4 n with a momentum in 16 bits. Directions are
kept in memory only where the step must wait for them: with a clip, under shared inverses, and where a block has more
rows than a program has lanes.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._language import as_moment, divmod_from, is_finite, narrow
from ._launch import launch
from ._lists import (
    CHUNK,
    TYPES,
    Cut,
    Launches,
    Layout,
    Table,
    address,
    are_aligned,
    element_chunks,
    is_aligned,
    is_strided,
    locate_in_order,
    number,
    table,
    wide_dtype,
)
from ._steps import is_off, of_each, rate_of, scalar, times

_OP = "mbf_step_"

# The lists, in the order of the arguments, and the numbers after them.
_PARAM, _GRAD, _MOMENT, _INVERSE, _RATE_TENSOR, _RATE, _DECAY = (tl.constexpr(k) for k in range(7))
# What the layout has for each parameter, seen with its bias as (rows, columns): its size, rows, columns, rows of a
# block, blocks in a row, how far rows of directions are apart, and where in the workspace, in bytes, they begin; its
# first partial sum and how many there are, its layer, whether it has an inverse, and what a learning rate on the
# device is.
_WIDTH = tl.constexpr(12)
_ROWS, _COLUMNS, _SIZE, _BLOCKS, _PITCH, _PLACE, _FIRST_SUM, _SUM_COUNT, _LAYER, _ACTS, _KIND = (
    tl.constexpr(k) for k in range(1, 12)
)
# What is found of each parameter before the first pass: learning rate and decay, float64 [2, count]. After it, sums
# over its tiles: of lr^2 d m or lr^2 d g, of lr^2 d^2 and of w^2, float64 [3, ...].
_CHANGE, _SQUARE, _WEIGHT = (tl.constexpr(k) for k in range(3))

# Sums of floating-point numbers are cut by these alone.
_LANES = tl.constexpr(512)
"""Elements that one program holds: as many whole blocks as fit, or a part of one block."""
_STEPS = tl.constexpr(4)
"""Rows of the inverses that are read together."""
_LARGE_STEPS = tl.constexpr(8)
"""The same of a block of which a program holds a part."""
_BLOCK = tl.constexpr(1024)
"""Elements of a chunk at a time where each stands for itself."""
_SUMS = tl.constexpr(1024)
"""Partial sums at a time."""
_PARAMS = tl.constexpr(128)
"""Parameters at a time."""
_MOST_CONSTANT = 16  # rows of a block up to which each size has an instance of its own
_ALIGNMENT = 16  # of directions, in bytes


@triton.jit
def _joined(bias, is_bias, of_bias, of_weight):
    """Addresses in [W | b]."""
    return tl.where(is_bias, bias + of_bias, of_weight)


@triton.jit
def _pointers(
    addresses, count, geometry, i, row, down, first, inside, is_bias,
    T: tl.constexpr, M: tl.constexpr, STRIDED: tl.constexpr, BIASED: tl.constexpr,
):  # fmt: skip
    """Where elements of [W | b] lie in the parameter, the gradient and the momentum.

    Args:
        row, down: the row, as a number and what is to be added to it.
        first, inside: the same for the index in W.
        is_bias: whether an element is one of b; of no meaning unless BIASED.
    """
    param = address(addresses, count, _PARAM, i, T)
    grad = address(addresses, count, _GRAD, i, T)
    moment = address(addresses, count, _MOMENT, i, M)
    if STRIDED:
        at_param, at_grad, at_moment = locate_in_order(geometry, i, first, inside)
        params, grads, moments = param + at_param, grad + at_grad, moment + at_moment
    else:
        params, grads, moments = param + first + inside, grad + first + inside, moment + first + inside
    if BIASED:
        b_param = address(addresses, count, _PARAM, i + 1, T)
        b_grad = address(addresses, count, _GRAD, i + 1, T)
        b_moment = address(addresses, count, _MOMENT, i + 1, M)
        if STRIDED:
            by_param, by_grad, by_moment = locate_in_order(geometry, i + 1, row, down)
        else:
            by_param, by_grad, by_moment = row + down, row + down, row + down
        params = _joined(b_param, is_bias, by_param, params)
        grads = _joined(b_grad, is_bias, by_grad, grads)
        moments = _joined(b_moment, is_bias, by_moment, moments)
    return params, grads, moments


@triton.jit
def _coefficients(
    rates, count, i, scale: tl.float64, scale_factor, momentum: tl.float64, A: tl.constexpr, COUPLED: tl.constexpr
):
    """What the new momentum is made with: of the gradient, of the old momentum, of the parameter."""
    inverse_scale = (1 / times(scale, scale_factor)).to(A)
    if COUPLED:
        decay = tl.load(rates + count + i).to(A)
    else:
        decay = tl.full((), 0, A)
    return inverse_scale, tl.full((), momentum, A), decay


@triton.jit
def _gradient(param, grad, mask, coefficients, A: tl.constexpr):
    """The gradient that enters the momentum."""
    inverse_scale, _, decay = coefficients
    g = tl.load(grad, mask).to(A) * inverse_scale
    if decay != 0:  # else nothing of the parameter enters, not even a NaN
        g += decay * tl.load(param, mask).to(A)
    return g


@triton.jit
def _stepped(w, d, rate, shrinkage, A: tl.constexpr):
    """The parameter after a step along d."""
    wide = w.to(A)
    change = rate * d + tl.where(shrinkage != 0, shrinkage * wide, 0)
    return narrow(wide - change, w.dtype)


@triton.jit
def _rates(rates, count, i, A: tl.constexpr, COUPLED: tl.constexpr):
    """The learning rate of a parameter, and that times its decoupled decay."""
    rate = tl.load(rates + i)
    if COUPLED:
        shrink = tl.full((), 0, A)
    else:
        shrink = (rate * tl.load(rates + count + i)).to(A)
    return rate.to(A), shrink


@triton.jit
def _add_up(d, g, m, w, kept, mask, ALONG_GRADIENT: tl.constexpr, CAPS: tl.constexpr):
    """What lanes add to the sums: of d m or d g, of d^2, of w^2 without what is not finite."""
    wide = tl.where(kept, d, 0).to(tl.float64)
    change = wide * tl.where(kept, g if ALONG_GRADIENT else m, 0).to(tl.float64)
    if CAPS:
        weight = tl.where(mask & is_finite(w), w, 0).to(tl.float64)
    else:
        weight = tl.zeros_like(wide)
    return change, wide * wide, weight * weight


@triton.jit
def _store_sums(sums, all_sums, at, rates, i, change, square, weight, CAPS: tl.constexpr):
    """The sums of a program, those over directions times lr^2."""
    rate = tl.load(rates + i)
    tl.store(sums + _CHANGE * all_sums + at, rate * rate * tl.sum(change))
    if CAPS:
        tl.store(sums + _SQUARE * all_sums + at, rate * rate * tl.sum(square))
        tl.store(sums + _WEIGHT * all_sums + at, tl.sum(weight))


@triton.jit
def _stored(workspace, layout, A: tl.constexpr):
    """Where the directions of a parameter are kept."""
    return (workspace.to(tl.int64) + tl.load(layout + _PLACE)).to(tl.pointer_type(A))


@triton.jit
def _whole(d, mask, block, n):
    """For each lane, whether all of its block, on lanes block * n and on, is finite."""
    bad = (mask & ~is_finite(d)).to(tl.int32)
    whole = bad == 0
    if tl.sum(bad) > 0:
        first = tl.minimum(block * n, _LANES - 1)
        upto = tl.cumsum(bad)
        whole = tl.gather(upto, tl.minimum(first + n - 1, _LANES - 1), 0) == tl.gather(upto - bad, first, 0)
    return whole


@triton.jit
def _count(skipped, i, number):
    """Add to the blocks of a parameter that were skipped."""
    if number > 0:
        tl.atomic_add(skipped + i, number.to(tl.int64), sem="relaxed")  # whole numbers: no order matters


@triton.jit
def _entry_of(row, column, n, PACKED: tl.constexpr):
    """Where an entry of a symmetric block is, counted from the beginning of it."""
    if PACKED:
        high = tl.maximum(row, column)
        at = high * (high + 1) // 2 + tl.minimum(row, column)
    else:
        at = row * n + column  # lanes are columns: neighbours in memory
    return at


@triton.jit
def _numbers(n, PACKED: tl.constexpr):
    """Of a block."""
    return n * (n + 1) // 2 if PACKED else n * n


@triton.jit
def _product(inverse, new, down, column, n, mask, A: tl.constexpr, PACKED: tl.constexpr):
    """P m of whole blocks; lanes are elements, in block ``down`` at ``column``."""
    d = tl.zeros((_LANES,), A)
    block = inverse + down * _numbers(n, PACKED)
    steps = tl.arange(0, _STEPS)[:, None]
    for k in range(0, n, _STEPS):
        row = k + steps
        there = mask[None, :] & (row < n)
        p = tl.load(block[None, :] + _entry_of(row, column[None, :], n, PACKED), there).to(A)
        source = tl.minimum(down[None, :] * n + tl.minimum(row, n - 1), _LANES - 1)
        m = tl.gather(new, tl.reshape(source, [_STEPS * _LANES]), 0)
        d += tl.sum(tl.where(there, p * tl.reshape(m, [_STEPS, _LANES]), 0), 0)
    return d


@triton.jit(do_not_specialize=["count", "all_sums"])
def blocks(
    addresses, count, layouts, geometry, chunks, skipped, workspace, sums, all_sums, rates,
    momentum: tl.float64, scale: tl.float64, scale_factor, found_inf,
    COUPLED: tl.constexpr, ALONG_GRADIENT: tl.constexpr, CAPS: tl.constexpr,
    T: tl.constexpr, M: tl.constexpr, A: tl.constexpr, S: tl.constexpr, N: tl.constexpr, PACKED: tl.constexpr,
    STRIDED: tl.constexpr, BIASED: tl.constexpr,
):  # fmt: skip
    """A run of whole blocks: the step, or where there are ``sums`` the momentum, directions and a part of <d, g>.

    N is the number of rows of a block, 0 where the layout tells it.
    """
    if not is_off(found_inf):
        program = tl.program_id(0).to(tl.int64)
        i = tl.load(chunks + 2 * program)
        layout = layouts + i.to(tl.int64) * _WIDTH
        if N > 0:
            n = N
        else:
            n = tl.load(layout + _SIZE).to(tl.int32)
        row = tl.load(chunks + 2 * program + 1).to(tl.int64) * (_LANES // n)
        lanes = tl.arange(0, _LANES)
        down, column = lanes // n, lanes % n
        mask = lanes < tl.minimum(tl.load(layout + _ROWS) - row, _LANES // n).to(tl.int32) * n
        width = n - 1 if BIASED else n
        inside = down * width + column if BIASED else lanes
        param, grad, moment = _pointers(
            addresses, count, geometry, i, row, down, row * width, inside, column == width, T, M, STRIDED, BIASED
        )
        coefficients = _coefficients(rates, count, i, scale, scale_factor, momentum, A, COUPLED)
        g = _gradient(param, grad, mask, coefficients, A)
        new = coefficients[1] * tl.load(moment, mask).to(A) + g
        inverse = address(addresses, count, _INVERSE, i, S) + row * _numbers(n, PACKED)
        d = _product(inverse, new, down, column, n, mask, A, PACKED)
        kept = mask & _whole(d, mask, down, n)
        tl.store(moment, as_moment(new, M), kept)
        if sums is None:
            rate, shrink = _rates(rates, count, i, A, COUPLED)
            w = tl.load(param, kept)
            tl.store(param, _stepped(w, d, rate, shrink, A), kept)
        else:
            at = _stored(workspace, layout, A) + row * n + lanes
            tl.store(at, tl.where(kept, d, float("nan")), mask)
            w = tl.load(param, mask).to(A) if CAPS else g
            change, square, weight = _add_up(d, g, new, w, kept, mask, ALONG_GRADIENT, CAPS)
            at_sum = tl.load(layout + _FIRST_SUM) + tl.load(chunks + 2 * program + 1)
            _store_sums(sums, all_sums, at_sum, rates, i, change, square, weight, CAPS)
        _count(skipped, i, tl.sum((mask & ~kept & (column == 0)).to(tl.int32)))


@triton.jit
def _scale_by_diagonal(
    param, grad, moment, inverse, stored, mask, coefficients, rate, shrink,
    WAITS: tl.constexpr, ALONG_GRADIENT: tl.constexpr, CAPS: tl.constexpr, A: tl.constexpr,
):  # fmt: skip
    """The step of blocks of one element at some addresses: which stayed, and what they add to the sums."""
    g = _gradient(param, grad, mask, coefficients, A)
    old = tl.load(moment, mask)
    new = coefficients[1] * old.to(A) + g
    d = tl.load(inverse, mask).to(A) * new
    kept = is_finite(d)
    tl.store(moment, tl.where(kept, as_moment(new, old.dtype), old), mask)
    if WAITS:
        tl.store(stored, tl.where(kept, d, float("nan")), mask)
        w = tl.load(param, mask).to(A) if CAPS else g
        change, square, weight = _add_up(d, g, new, w, kept, kept | ~kept, ALONG_GRADIENT, CAPS)
    else:
        w = tl.load(param, mask)
        tl.store(param, tl.where(kept, _stepped(w, d, rate, shrink, A), w), mask)
        change = tl.zeros_like(d).to(tl.float64)
        square, weight = change, change
    return kept, change, square, weight


@triton.jit(do_not_specialize=["count", "all_sums"])
def diagonals(
    addresses, count, layouts, chunks, skipped, workspace, sums, all_sums, rates,
    momentum: tl.float64, scale: tl.float64, scale_factor, found_inf,
    COUPLED: tl.constexpr, ALONG_GRADIENT: tl.constexpr, CAPS: tl.constexpr,
    T: tl.constexpr, M: tl.constexpr, A: tl.constexpr, S: tl.constexpr,
):  # fmt: skip
    """As ``blocks``, for a chunk of blocks of one element in row-major order."""
    if not is_off(found_inf):
        program = tl.program_id(0).to(tl.int64)
        i = tl.load(chunks + 2 * program)
        start = tl.load(chunks + 2 * program + 1).to(tl.int64) * CHUNK
        layout = layouts + i.to(tl.int64) * _WIDTH
        param = address(addresses, count, _PARAM, i, T) + start
        grad = address(addresses, count, _GRAD, i, T) + start
        moment = address(addresses, count, _MOMENT, i, M) + start
        inverse = address(addresses, count, _INVERSE, i, S) + start
        if sums is None:
            stored = moment  # not used
        else:
            stored = _stored(workspace, layout, A) + start
        coefficients = _coefficients(rates, count, i, scale, scale_factor, momentum, A, COUPLED)
        rate, shrink = _rates(rates, count, i, A, COUPLED)
        left = tl.minimum(tl.load(layout) - start, CHUNK).to(tl.int32)
        lanes = tl.arange(0, _BLOCK)
        found = tl.zeros((_BLOCK,), tl.int32)
        change = tl.zeros((_BLOCK,), tl.float64)
        square, weight = change, change
        aligned = are_aligned(param, grad, moment) & is_aligned(inverse)
        if (left == CHUNK) & aligned:
            # No mask and known alignment: 16 bytes a load.
            wide_param, wide_grad = tl.multiple_of(param, 16), tl.multiple_of(grad, 16)
            wide_moment, wide_inverse = tl.multiple_of(moment, 16), tl.multiple_of(inverse, 16)
            wide_stored = tl.multiple_of(stored, 16)
            for first in range(0, CHUNK, _BLOCK):
                at = first + lanes
                kept, more_change, more_square, more_weight = _scale_by_diagonal(
                    wide_param + at, wide_grad + at, wide_moment + at, wide_inverse + at, wide_stored + at, None,
                    coefficients, rate, shrink, sums is not None, ALONG_GRADIENT, CAPS, A,
                )  # fmt: skip
                found += (~kept).to(tl.int32)
                change += more_change
                square += more_square
                weight += more_weight
        else:
            for first in range(0, left, _BLOCK):
                at = first + lanes
                mask = at < left
                kept, more_change, more_square, more_weight = _scale_by_diagonal(
                    param + at, grad + at, moment + at, inverse + at, stored + at, mask,
                    coefficients, rate, shrink, sums is not None, ALONG_GRADIENT, CAPS, A,
                )  # fmt: skip
                found += (mask & ~kept).to(tl.int32)
                change += tl.where(mask, more_change, 0)
                square += tl.where(mask, more_square, 0)
                weight += tl.where(mask, more_weight, 0)
        if sums is not None:
            at_sum = tl.load(layout + _FIRST_SUM) + tl.load(chunks + 2 * program + 1)
            _store_sums(sums, all_sums, at_sum, rates, i, change, square, weight, CAPS)
        _count(skipped, i, tl.sum(found))


@triton.jit(do_not_specialize=["count"])
def multiply(
    addresses, count, layouts, geometry, chunks, workspace, rates,
    momentum: tl.float64, scale: tl.float64, scale_factor, found_inf, COUPLED: tl.constexpr,
    T: tl.constexpr, M: tl.constexpr, A: tl.constexpr, S: tl.constexpr, PACKED: tl.constexpr,
    STRIDED: tl.constexpr, BIASED: tl.constexpr,
):  # fmt: skip
    """Directions of some rows of a large block."""
    if not is_off(found_inf):
        program = tl.program_id(0).to(tl.int64)
        i = tl.load(chunks + 2 * program)
        layout = layouts + i.to(tl.int64) * _WIDTH
        n = tl.load(layout + _SIZE)
        parts = tl.cdiv(n, _LANES)
        part = tl.load(chunks + 2 * program + 1).to(tl.int64)
        row = part // parts
        column = part % parts * _LANES + tl.arange(0, _LANES)
        mask = column < n
        width = n - 1 if BIASED else n
        coefficients = _coefficients(rates, count, i, scale, scale_factor, momentum, A, COUPLED)
        inverse = address(addresses, count, _INVERSE, i, S) + row * _numbers(n, PACKED)
        steps = tl.arange(0, _LARGE_STEPS)
        d = tl.zeros((_LANES,), A)
        for k in range(0, n, _LARGE_STEPS):
            source = k + steps
            there = source < n
            param, grad, moment = _pointers(
                addresses, count, geometry, i, row, tl.zeros_like(steps), row * width + k, steps, source == width,
                T, M, STRIDED, BIASED,
            )  # fmt: skip
            g = _gradient(param, grad, there, coefficients, A)
            new = coefficients[1] * tl.load(moment, there).to(A) + g
            entry = _entry_of(source[:, None].to(tl.int64), column[None, :], n, PACKED)
            both = there[:, None] & mask[None, :]
            p = tl.load(inverse + entry, both).to(A)
            d += tl.sum(tl.where(both, p * new[:, None], 0), 0)
        tl.store(_stored(workspace, layout, A) + row * n + column, d, mask)


@triton.jit
def _step_along(
    param, grad, moment, stored, d, kept, mask, coefficients, rate, shrink,
    WAITS: tl.constexpr, ALONG_GRADIENT: tl.constexpr, CAPS: tl.constexpr, A: tl.constexpr,
):  # fmt: skip
    """The step along known directions, or the momentum alone: what lanes add to the sums."""
    g = _gradient(param, grad, kept, coefficients, A)
    old = tl.load(moment, kept)
    new = coefficients[1] * old.to(A) + g
    tl.store(moment, as_moment(new, old.dtype), kept)
    if WAITS:
        tl.store(stored, float("nan"), mask & ~kept)
        w = tl.load(param, mask).to(A) if CAPS else g
        change, square, weight = _add_up(d, g, new, w, kept, mask, ALONG_GRADIENT, CAPS)
    else:
        w = tl.load(param, kept)
        tl.store(param, _stepped(w, d, rate, shrink, A), kept)
        change = tl.zeros_like(d).to(tl.float64)
        square, weight = change, change
    return change, square, weight


@triton.jit(do_not_specialize=["count", "all_sums"])
def along(
    addresses, count, layouts, geometry, chunks, skipped, workspace, sums, all_sums, rates,
    momentum: tl.float64, scale: tl.float64, scale_factor, found_inf,
    COUPLED: tl.constexpr, ALONG_GRADIENT: tl.constexpr, CAPS: tl.constexpr,
    T: tl.constexpr, M: tl.constexpr, A: tl.constexpr, LONG: tl.constexpr, STRIDED: tl.constexpr, BIASED: tl.constexpr,
):  # fmt: skip
    """As ``blocks``, for directions that are in the workspace: a run of blocks, or one that is LONG."""
    if not is_off(found_inf):
        program = tl.program_id(0).to(tl.int64)
        i = tl.load(chunks + 2 * program)
        layout = layouts + i.to(tl.int64) * _WIDTH
        columns, n, in_row = tl.load(layout + _COLUMNS), tl.load(layout + _SIZE), tl.load(layout + _BLOCKS)
        pitch = tl.load(layout + _PITCH)
        width = columns - 1 if BIASED else columns
        coefficients = _coefficients(rates, count, i, scale, scale_factor, momentum, A, COUPLED)
        rate, shrink = _rates(rates, count, i, A, COUPLED)
        lanes = tl.arange(0, _LANES)
        whole_run = tl.full((), 1, tl.int64) if LONG else _LANES // n
        block = tl.load(chunks + 2 * program + 1).to(tl.int64) * whole_run
        row, start = block // in_row, block % in_row * n
        stored = _stored(workspace, layout, A) + row * pitch + start
        change = tl.zeros((_LANES,), tl.float64)
        square, weight = change, change
        if LONG:
            length = tl.minimum(n, columns - start)
            bad = tl.zeros((_LANES,), tl.int32)
            for k in range(0, length, _LANES):
                mask = k + lanes < length
                bad += (mask & ~is_finite(tl.load(stored + k + lanes, mask, 0.0))).to(tl.int32)
            number = (tl.sum(bad) > 0).to(tl.int32)
            whole = number + tl.zeros_like(lanes) == 0
            for k in range(0, length, _LANES):
                mask = k + lanes < length
                param, grad, moment = _pointers(
                    addresses, count, geometry, i, row, tl.zeros_like(lanes), row * width + start + k, lanes,
                    start + k + lanes == width, T, M, STRIDED, BIASED,
                )  # fmt: skip
                at = stored + k + lanes
                d = tl.load(at, mask, 0.0)
                more_change, more_square, more_weight = _step_along(
                    param, grad, moment, at, d, mask & whole, mask, coefficients, rate, shrink,
                    sums is not None, ALONG_GRADIENT, CAPS, A,
                )  # fmt: skip
                change += more_change
                square += more_square
                weight += more_weight
        else:
            size = n.to(tl.int32)
            unit, element = lanes // size, lanes % size
            down, place = divmod_from(block % in_row, unit, in_row)
            column = place * n + element
            mask = (unit < whole_run) & (row + down < tl.load(layout + _ROWS)) & (column < columns)
            param, grad, moment = _pointers(
                addresses, count, geometry, i, row, down, row * width + start,
                (down * width + column - start).to(tl.int32), column == width, T, M, STRIDED, BIASED,
            )  # fmt: skip
            at = stored + (down * pitch + column - start)
            d = tl.load(at, mask, 0.0)
            kept = mask & _whole(d, mask, unit, size)
            change, square, weight = _step_along(
                param, grad, moment, at, d, kept, mask, coefficients, rate, shrink,
                sums is not None, ALONG_GRADIENT, CAPS, A,
            )  # fmt: skip
            number = tl.sum((mask & ~kept & (element == 0)).to(tl.int32))
        if sums is not None:
            at_sum = tl.load(layout + _FIRST_SUM) + tl.load(chunks + 2 * program + 1)
            _store_sums(sums, all_sums, at_sum, rates, i, change, square, weight, CAPS)
        _count(skipped, i, number)


@triton.jit(do_not_specialize=["count"])
def prepare(
    addresses, count, layouts, skipped, scale, caps, rates, lr: tl.float64, lr_factor, weight_decay: tl.float64,
    EACH: tl.constexpr,
):  # fmt: skip
    """Nothing skipped and nothing shortened; learning rates and decays: one for all, or one for each."""
    i = tl.program_id(0) * _PARAMS + tl.arange(0, _PARAMS)
    there = i < count
    tl.store(skipped + i, tl.zeros_like(i).to(tl.int64), there)
    ones = tl.full((_PARAMS,), 1, tl.float64)
    tl.store(caps + i, ones, there)
    if tl.program_id(0) == 0:
        tl.store(scale, tl.full((), 1, tl.float64))
    if EACH:
        rate = rate_of(addresses, count, layouts + i.to(tl.int64) * _WIDTH + _KIND, _RATE_TENSOR, _RATE, i, there)
        decay = number(addresses, count, _DECAY, i, there)
    else:
        rate, decay = times(lr, lr_factor) * ones, tl.full((), weight_decay, tl.float64) * ones
    tl.store(rates + i, rate, there)
    tl.store(rates + count + i, decay, there)


@triton.jit(do_not_specialize=["count", "all_sums"])
def add_tiles(layouts, count, sums, all_sums, totals, found_inf, CAPS: tl.constexpr):
    """The sums over all programs of a parameter: float64 [3, count]."""
    if not is_off(found_inf):
        i = tl.program_id(0).to(tl.int64)
        layout = layouts + i * _WIDTH
        first, number_of_sums = tl.load(layout + _FIRST_SUM), tl.load(layout + _SUM_COUNT)
        lanes = tl.arange(0, _SUMS)
        for which in tl.static_range(3 if CAPS else 1):
            parts = tl.zeros((_SUMS,), tl.float64)
            for k in range(0, number_of_sums, _SUMS):
                parts += tl.load(sums + which * all_sums + first + k + lanes, k + lanes < number_of_sums, 0.0)
            tl.store(totals + which * count + i, tl.sum(parts))


@triton.jit(do_not_specialize=["count"])
def clip(totals, count, scale, kl_clip: tl.float64, found_inf):
    """The scale at which the change keeps to its bound."""
    if not is_off(found_inf):
        lanes = tl.arange(0, _SUMS)
        parts = tl.zeros((_SUMS,), tl.float64)
        for first in range(0, count, _SUMS):
            parts += tl.load(totals + first + lanes, first + lanes < count, 0.0)
        size = tl.abs(tl.sum(parts))
        bound = tl.full((), kl_clip, tl.float64)
        if size > bound:
            tl.store(scale, tl.sqrt(bound / size))


@triton.jit(do_not_specialize=["count"])
def shorten(
    addresses, count, layouts, totals, scale, caps, max_relative_step: tl.float64, floor: tl.float64, found_inf,
    FLOORS: tl.constexpr,
):  # fmt: skip
    """What the layer of a parameter is shortened by. All programs of a layer add up the same in the same order.

    FLOORS says which of the numbers are the floors of layers; 0 where all have one.
    """
    if not is_off(found_inf):
        i = tl.program_id(0).to(tl.int64)
        layer = tl.load(layouts + i * _WIDTH + _LAYER)
        lanes = tl.arange(0, _PARAMS)
        square = tl.zeros((_PARAMS,), tl.float64)
        weight, elements = square, square
        for first in range(0, count, _PARAMS):
            other = first + lanes
            at = layouts + other.to(tl.int64) * _WIDTH
            its = (tl.load(at + _LAYER, other < count, -1) == layer) & (tl.load(at + _ACTS, other < count, 0) != 0)
            square += tl.load(totals + _SQUARE * count + other, its, 0.0)
            weight += tl.load(totals + _WEIGHT * count + other, its, 0.0)
            elements += tl.where(its, tl.load(at + _ROWS, its, 0) * tl.load(at + _COLUMNS, its, 0), 0).to(tl.float64)
        if FLOORS:
            lowest = number(addresses, count, FLOORS, i)
        else:
            lowest = tl.full((), floor, tl.float64)
        least = lowest * tl.sqrt(tl.sum(elements))
        size = tl.sqrt(tl.sum(weight))
        bound = tl.full((), max_relative_step, tl.float64) * tl.where(size > least, size, least)
        length = tl.load(scale) * tl.sqrt(tl.sum(square))  # not finite if the sum overflows
        share = tl.where(is_finite(length), bound / tl.where(length > 0, length, 1), 0)
        tl.store(caps + i, tl.where(length <= bound, 1, share))


@triton.jit(do_not_specialize=["count"])
def descend(
    addresses, count, layouts, geometry, chunks, workspace, clipped, caps, rates, found_inf, COUPLED: tl.constexpr,
    T: tl.constexpr, A: tl.constexpr, FLAT: tl.constexpr, STRIDED: tl.constexpr, BIASED: tl.constexpr,
):  # fmt: skip
    """The step of a chunk along directions that are kept, but for those that are NaN.

    FLAT is for a parameter whose elements and directions lie in the same order.
    """
    if not is_off(found_inf):
        program = tl.program_id(0).to(tl.int64)
        i = tl.load(chunks + 2 * program)
        start = tl.load(chunks + 2 * program + 1).to(tl.int64) * CHUNK
        layout = layouts + i.to(tl.int64) * _WIDTH
        _, shrink = _rates(rates, count, i, A, COUPLED)
        rate = (tl.load(rates + i) * tl.load(clipped) * tl.load(caps + i)).to(A)
        lanes = tl.arange(0, _BLOCK)
        rows, columns, pitch = tl.load(layout + _ROWS), tl.load(layout + _COLUMNS), tl.load(layout + _PITCH)
        left = tl.minimum(rows * columns - start, CHUNK).to(tl.int32)
        stored = _stored(workspace, layout, A)
        if FLAT:
            param = address(addresses, count, _PARAM, i, T) + start
            if (left == CHUNK) & is_aligned(param):
                wide_param, wide_stored = tl.multiple_of(param, 16), tl.multiple_of(stored + start, 16)
                for first in range(0, CHUNK, _BLOCK):
                    w, d = tl.load(wide_param + first + lanes), tl.load(wide_stored + first + lanes)
                    stepped = tl.where(d == d, _stepped(w, d, rate, shrink, A), w)
                    tl.store(wide_param + first + lanes, stepped)
            else:
                for first in range(0, left, _BLOCK):
                    mask = first + lanes < left
                    d = tl.load(stored + start + first + lanes, mask, float("nan"))
                    w = tl.load(param + first + lanes, mask)
                    tl.store(param + first + lanes, _stepped(w, d, rate, shrink, A), mask & (d == d))
        else:
            width = columns - 1 if BIASED else columns
            for first in range(0, left, _BLOCK):
                mask = first + lanes < left
                row, from_column = (start + first) // columns, (start + first) % columns
                down, column = divmod_from(from_column, lanes, columns)
                # Never below 0: only a bias in the first column has nothing of W before it.
                inside = (down * width + column - from_column).to(tl.int32)
                param, _, _ = _pointers(
                    addresses, count, geometry, i, row, down, row * width + from_column, inside, column == width,
                    T, A, STRIDED, BIASED,
                )  # fmt: skip
                d = tl.load(stored + (row + down) * pitch + column, mask, float("nan"))
                w = tl.load(param, mask)
                tl.store(param, _stepped(w, d, rate, shrink, A), mask & (d == d))


# On the host.


class View(NamedTuple):
    """A parameter that has an inverse, with the bias that may follow it, as rows of blocks."""

    rows: int
    columns: int
    size: int  # of a block
    blocks: int  # in each row
    biased: bool

    @property
    def pitch(self) -> int:
        """How far rows of directions are apart: shared blocks may reach past the end."""
        return self.blocks * self.size


class _Kind(NamedTuple):
    """An instance of a kernel."""

    kernel: str
    constants: tuple[tuple[str, Any], ...]


class _Shared(NamedTuple):
    """Directions that are one product of matrices: which parameter they are of, and their place."""

    parameter: int
    view: View
    place: int


class _Notes(NamedTuple):
    shared: list[_Shared]
    size: int  # of the workspace, in bytes
    sums: int  # how many partial ones of each kind there are


def _cuts(i: int, view: View, inverse: Tensor, moment: Tensor, strided: bool, waits: bool) -> Iterator[Cut]:
    """How a parameter goes through the kernels."""

    def cut(kernel: str, programs: int, **constants: Any) -> Cut:
        return Cut(i, _Kind(kernel, tuple(constants.items())), programs)

    rows, columns, n, in_row, biased = view
    lies = {"STRIDED": strided, "BIASED": biased}
    kept, stored, packed = TYPES[moment.dtype], TYPES[inverse.dtype], inverse.dim() == 2
    if rows * columns == 0:
        return
    shared, long = inverse.dim() == 4, n > _LANES.value
    if long and not shared:
        yield cut("multiply", rows * triton.cdiv(n, _LANES.value), M=kept, S=stored, PACKED=packed, **lies)
    if long or shared:
        run = max(1, _LANES.value // n)
        yield cut("along", triton.cdiv(rows * in_row, run), M=kept, LONG=long, **lies)
    elif n == 1 and not (strided or biased):
        yield cut("diagonals", element_chunks(rows), M=kept, S=stored)
    else:
        constant = n if n <= _MOST_CONSTANT else 0
        programs = triton.cdiv(rows, _LANES.value // n)
        yield cut("blocks", programs, M=kept, S=stored, N=constant, PACKED=packed, **lies)
    if waits:
        flat = not (strided or biased) and view.pitch == columns
        yield cut("descend", element_chunks(rows * columns), FLAT=flat, **lies)


def _lay_out(s: Any, kinds: Sequence[int]) -> Layout:
    rows, cuts, shared, size, first_sum = [(0,) * (_WIDTH.value - 1)] * len(s.params), [], [], 0, 0
    # Any numbers tell layers apart.
    layers = {layer: number for number, layer in enumerate(dict.fromkeys(map(s.layer, range(len(s.params)))))}
    for entry in s.check():
        i, inverse, biased = entry.position, entry.inverse, entry.biased
        view = View(entry.layout.rows, entry.layout.columns, entry.layout.size, entry.layout.blocks, biased)
        together = [x for tensors in (s.params, s.grads, s.momentum_buffers) for x in tensors[i : i + 1 + biased]]
        made = list(_cuts(i, view, inverse, s.momentum_buffers[i], is_strided(together), s.waits))
        programs = sum(cut.programs for cut in made if cut.kind.kernel in _KERNELS)
        of_layer = layers[s.layer(i)]
        rows[i] = (
            view.rows, view.columns, view.size, view.blocks, view.pitch, size, first_sum, programs, of_layer, 1,
            kinds[i],
        )  # fmt: skip
        if biased:  # which has no sums of its own, and the cap of its layer
            rows[i + 1] = (0,) * 8 + (of_layer, 0, kinds[i])
        cuts += made
        first_sum += programs
        if made and inverse.dim() == 4:
            shared.append(_Shared(i, view, size))
        if any(cut.kind.kernel in ("along", "descend") for cut in made):
            taken = view.rows * view.pitch * wide_dtype(s.params[i]).itemsize
            size += triton.cdiv(taken, _ALIGNMENT) * _ALIGNMENT
    return Layout(rows, cuts, _Notes(shared, size, first_sum))


def _directions(workspace: Tensor, of: _Shared, dtype: torch.dtype) -> Tensor:
    """The place of directions under a shared inverse, as (blocks, rows, size)."""
    rows, size = of.view.rows, of.view.pitch * dtype.itemsize
    kept = workspace[of.place : of.place + rows * size].view(dtype)
    return kept.view(rows, of.view.blocks, of.view.size).transpose(0, 1)


def _of(plan: Table, *kernels: str) -> Iterator[tuple[_Kind, Launches]]:
    """The launches of some of the kernels."""
    return (pair for pair in zip(plan.kinds, plan.launches, strict=True) if pair[0].kernel in kernels)


_KERNELS = {"blocks": blocks, "diagonals": diagonals, "along": along}


def _plan(s: Any, each: bool) -> tuple[Table, tuple[float, Tensor | None], float, int]:
    """The table, and the numbers of all.

    These are learning rate and weight decay, which count for nothing where each has its own; then comes which of the
    table's numbers are the floors of layers, 0 where all have one.
    """
    on_device, kinds, numbers = of_each(s.lr, s.weight_decay, len(s.params), each)
    lists = s.params, s.grads, s.momentum_buffers, s.inverses, on_device
    floors = 0
    if len(s.floor) > 1:
        floors, numbers = len(lists) + len(numbers), (*numbers, s.floors())
    key = s.waits, None if s.layers is None else tuple(s.layers)
    plan = table(_OP, lists, lambda: _lay_out(s, kinds), key, numbers=numbers, written=(0, 2))
    return plan, (1.0, None) if each else scalar(s.lr[0]), 0.0 if each else s.weight_decay[0], floors


def step(s: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Take the step.

    Args:
        s: the arguments of the op by their names, found_inf on the device of the parameters. ``s.check()`` checks the
            lists, which need it where they are new, and lists the parameters that have an inverse: their positions,
            inverses, layouts and whether a bias follows. ``s.multiply_shared(i, out)`` writes the directions of
            parameter i, which has a shared inverse, to a tensor (blocks, rows, size). ``s.waits`` says whether the step
            waits for sums, ``s.layer(i)`` which layer parameter i is of, ``s.floors()`` the floor of each one's layer.

    Returns:
        How many blocks of each parameter were skipped, the scale, and the cap of the layer of each.
    """
    device, bounded = s.params[0].device, s.max_relative_step is not None
    each = len(s.lr) > 1 or len(s.weight_decay) > 1
    plan, (rate, rate_factor), decay, floors = _plan(s, each)
    scale, scale_factor = scalar(s.grad_scale)
    coupled = not s.decoupled and any(s.weight_decay)
    coefficients = s.momentum, -scale if s.maximize else scale, scale_factor, s.found_inf
    lists_on_device = plan.addresses, plan.count, plan.layout
    notes: _Notes = plan.notes
    workspace = torch.empty(notes.size, dtype=torch.uint8, device=device) if notes.size else None

    skipped = torch.empty(plan.count, dtype=torch.int64, device=device)
    clipped = torch.empty((), dtype=torch.float64, device=device)
    caps = torch.empty(plan.count, dtype=torch.float64, device=device)
    rates = torch.empty(2, plan.count, dtype=torch.float64, device=device)
    programs = triton.cdiv(plan.count, _PARAMS.value)
    launch(
        prepare, programs, device, *lists_on_device, skipped, clipped, caps, rates, rate, rate_factor, decay, EACH=each
    )
    for shared in notes.shared:
        assert workspace is not None
        i = shared.parameter
        s.multiply_shared(i, _directions(workspace, shared, wide_dtype(s.params[i])))
    for kind, (dtype, wide, _, chunks) in _of(plan, "multiply"):
        launch(
            multiply, len(chunks), device, *lists_on_device, plan.geometry, chunks, workspace, rates, *coefficients,
            COUPLED=coupled, T=dtype, A=wide, **dict(kind.constants),
        )  # fmt: skip
    sums = torch.empty(3, notes.sums, dtype=torch.float64, device=device) if s.waits else None
    form = {"COUPLED": coupled, "ALONG_GRADIENT": s.kl_along == "gradient", "CAPS": bounded}
    for kind, (dtype, wide, _, chunks) in _of(plan, *_KERNELS):
        where = () if kind.kernel == "diagonals" else (plan.geometry,)
        stored = workspace if kind.kernel == "along" or sums is not None else None
        launch(
            _KERNELS[kind.kernel], len(chunks), device, *lists_on_device, *where, chunks, skipped, stored, sums,
            notes.sums, rates, *coefficients, T=dtype, A=wide, **form, **dict(kind.constants),
        )  # fmt: skip
    if sums is not None:
        totals = torch.empty(3, plan.count, dtype=torch.float64, device=device)
        launch(
            add_tiles, plan.count, device, plan.layout, plan.count, sums, notes.sums, totals, s.found_inf, CAPS=bounded
        )
        if s.kl_clip is not None:
            launch(clip, 1, device, totals, plan.count, clipped, s.kl_clip, s.found_inf, warps=8)
        if bounded:
            launch(
                shorten, plan.count, device, *lists_on_device, totals, clipped, caps, s.max_relative_step,
                s.floor[0], s.found_inf, FLOORS=floors,
            )  # fmt: skip
    for kind, (dtype, wide, _, chunks) in _of(plan, "descend"):
        launch(
            descend, len(chunks), device, *lists_on_device, plan.geometry, chunks, workspace, clipped, caps, rates,
            s.found_inf, COUPLED=coupled, T=dtype, A=wide, **dict(kind.constants),
        )  # fmt: skip
    return skipped, clipped, caps
