"""The mini-block Fisher update of a list of parameters: one pass over gradient, momentum, parameter and inverse.

In float32 that is 20 + 4 n bytes a parameter under blocks of n x n. Directions are kept in memory only where the step
must wait for them: with a clip, under shared inverses, and where a block has more rows than a program has lanes.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._language import divmod_from, is_finite, narrow
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
    table,
)
from ._steps import is_off, scalar, times

_OP = "mbf_step_"

# The lists, in the order of the arguments.
_PARAM, _GRAD, _MOMENT, _INVERSE = (tl.constexpr(k) for k in range(4))
# What the layout has for each parameter, seen with its bias as (rows, columns): its size, rows, columns, rows of a
# block, blocks in a row, how far rows of directions are apart, and where in the workspace, in bytes, they begin.
_WIDTH = tl.constexpr(7)
_ROWS, _COLUMNS, _SIZE, _BLOCKS, _PITCH, _PLACE = (tl.constexpr(k) for k in range(1, 7))

# Sums of floating-point numbers are cut by these alone.
_LANES = tl.constexpr(512)
"""Elements that one program holds: as many whole blocks as fit, or a part of one block."""
_STEPS = tl.constexpr(4)
"""Rows of the inverses that are read together."""
_LARGE_STEPS = tl.constexpr(8)
"""The same of a block of which a program holds a part."""
_BLOCK = tl.constexpr(1024)
"""Elements of a chunk at a time where each stands for itself."""
_SUMS = tl.constexpr(4096)
"""Partial sums at a time."""
_MOST_CONSTANT = 16  # rows of a block up to which each size has an instance of its own
_ALIGNMENT = 16  # of directions, in bytes


@triton.jit
def _joined(bias, is_bias, of_bias, of_weight):
    """Addresses in [W | b]."""
    return tl.where(is_bias, bias + of_bias, of_weight)


@triton.jit
def _pointers(
    addresses, count, geometry, i, row, down, first, inside, is_bias,
    T: tl.constexpr, A: tl.constexpr, STRIDED: tl.constexpr, BIASED: tl.constexpr,
):  # fmt: skip
    """Where elements of [W | b] lie in the parameter, the gradient and the momentum.

    Args:
        row, down: the row, as a number and what is to be added to it.
        first, inside: the same for the index in W.
        is_bias: whether an element is one of b; of no meaning unless BIASED.
    """
    param = address(addresses, count, _PARAM, i, T)
    grad = address(addresses, count, _GRAD, i, T)
    moment = address(addresses, count, _MOMENT, i, A)
    if STRIDED:
        at_param, at_grad, at_moment = locate_in_order(geometry, i, first, inside)
        params, grads, moments = param + at_param, grad + at_grad, moment + at_moment
    else:
        params, grads, moments = param + first + inside, grad + first + inside, moment + first + inside
    if BIASED:
        b_param = address(addresses, count, _PARAM, i + 1, T)
        b_grad = address(addresses, count, _GRAD, i + 1, T)
        b_moment = address(addresses, count, _MOMENT, i + 1, A)
        if STRIDED:
            by_param, by_grad, by_moment = locate_in_order(geometry, i + 1, row, down)
        else:
            by_param, by_grad, by_moment = row + down, row + down, row + down
        params = _joined(b_param, is_bias, by_param, params)
        grads = _joined(b_grad, is_bias, by_grad, grads)
        moments = _joined(b_moment, is_bias, by_moment, moments)
    return params, grads, moments


@triton.jit
def _coefficients(scale: tl.float64, scale_factor, momentum: tl.float64, weight_decay: tl.float64, A: tl.constexpr):
    """What the new momentum is made with: of the gradient, of the old momentum, of the parameter."""
    inverse_scale = (1 / times(scale, scale_factor)).to(A)
    return inverse_scale, tl.full((), momentum, A), tl.full((), weight_decay, A)


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
def _rates(lr: tl.float64, lr_factor, shrinkage: tl.float64, A: tl.constexpr):
    """The learning rate, and that times the decoupled decay."""
    rate = times(lr, lr_factor)
    return rate.to(A), (rate * shrinkage).to(A)


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


@triton.jit(do_not_specialize=["count", "first_sum"])
def blocks(
    addresses, count, layouts, geometry, chunks, skipped, workspace, sums, first_sum,
    lr: tl.float64, lr_factor, shrinkage: tl.float64, momentum: tl.float64, weight_decay: tl.float64,
    scale: tl.float64, scale_factor, found_inf,
    T: tl.constexpr, A: tl.constexpr, S: tl.constexpr, N: tl.constexpr, PACKED: tl.constexpr,
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
            addresses, count, geometry, i, row, down, row * width, inside, column == width, T, A, STRIDED, BIASED
        )
        coefficients = _coefficients(scale, scale_factor, momentum, weight_decay, A)
        g = _gradient(param, grad, mask, coefficients, A)
        new = coefficients[1] * tl.load(moment, mask) + g
        inverse = address(addresses, count, _INVERSE, i, S) + row * _numbers(n, PACKED)
        d = _product(inverse, new, down, column, n, mask, A, PACKED)
        kept = mask & _whole(d, mask, down, n)
        tl.store(moment, new, kept)
        if sums is None:
            rate, shrink = _rates(lr, lr_factor, shrinkage, A)
            w = tl.load(param, kept)
            tl.store(param, _stepped(w, d, rate, shrink, A), kept)
        else:
            at = _stored(workspace, layout, A) + row * n + lanes
            tl.store(at, tl.where(kept, d, float("nan")), mask)
            product = tl.where(kept, d.to(tl.float64) * g.to(tl.float64), 0)
            tl.store(sums + first_sum + program, tl.sum(product))
        _count(skipped, i, tl.sum((mask & ~kept & (column == 0)).to(tl.int32)))


@triton.jit
def _scale_by_diagonal(
    param, grad, moment, inverse, stored, mask, coefficients, rate, shrink, CLIP: tl.constexpr, A: tl.constexpr
):
    """The step of blocks of one element at some addresses: which stayed, and their parts of <d, g>."""
    g = _gradient(param, grad, mask, coefficients, A)
    old = tl.load(moment, mask)
    new = coefficients[1] * old + g
    d = tl.load(inverse, mask).to(A) * new
    kept = is_finite(d)
    tl.store(moment, tl.where(kept, new, old), mask)
    if CLIP:
        tl.store(stored, tl.where(kept, d, float("nan")), mask)
        product = tl.where(kept, d.to(tl.float64) * g.to(tl.float64), 0)
    else:
        w = tl.load(param, mask)
        tl.store(param, tl.where(kept, _stepped(w, d, rate, shrink, A), w), mask)
        product = tl.zeros_like(d).to(tl.float64)
    return kept, product


@triton.jit(do_not_specialize=["count", "first_sum"])
def diagonals(
    addresses, count, layouts, chunks, skipped, workspace, sums, first_sum,
    lr: tl.float64, lr_factor, shrinkage: tl.float64, momentum: tl.float64, weight_decay: tl.float64,
    scale: tl.float64, scale_factor, found_inf,
    T: tl.constexpr, A: tl.constexpr, S: tl.constexpr,
):  # fmt: skip
    """As ``blocks``, for a chunk of blocks of one element in row-major order."""
    if not is_off(found_inf):
        program = tl.program_id(0).to(tl.int64)
        i = tl.load(chunks + 2 * program)
        start = tl.load(chunks + 2 * program + 1).to(tl.int64) * CHUNK
        layout = layouts + i.to(tl.int64) * _WIDTH
        param = address(addresses, count, _PARAM, i, T) + start
        grad = address(addresses, count, _GRAD, i, T) + start
        moment = address(addresses, count, _MOMENT, i, A) + start
        inverse = address(addresses, count, _INVERSE, i, S) + start
        if sums is None:
            stored = moment  # not used
        else:
            stored = _stored(workspace, layout, A) + start
        coefficients = _coefficients(scale, scale_factor, momentum, weight_decay, A)
        rate, shrink = _rates(lr, lr_factor, shrinkage, A)
        left = tl.minimum(tl.load(layout) - start, CHUNK).to(tl.int32)
        lanes = tl.arange(0, _BLOCK)
        found, total = tl.zeros((_BLOCK,), tl.int32), tl.zeros((_BLOCK,), tl.float64)
        aligned = are_aligned(param, grad, moment) & is_aligned(inverse)
        if (left == CHUNK) & aligned:
            # No mask and known alignment: 16 bytes a load.
            wide_param, wide_grad = tl.multiple_of(param, 16), tl.multiple_of(grad, 16)
            wide_moment, wide_inverse = tl.multiple_of(moment, 16), tl.multiple_of(inverse, 16)
            wide_stored = tl.multiple_of(stored, 16)
            for first in range(0, CHUNK, _BLOCK):
                at = first + lanes
                kept, product = _scale_by_diagonal(
                    wide_param + at, wide_grad + at, wide_moment + at, wide_inverse + at, wide_stored + at, None,
                    coefficients, rate, shrink, sums is not None, A,
                )  # fmt: skip
                found += (~kept).to(tl.int32)
                total += product
        else:
            for first in range(0, left, _BLOCK):
                at = first + lanes
                mask = at < left
                kept, product = _scale_by_diagonal(
                    param + at, grad + at, moment + at, inverse + at, stored + at, mask,
                    coefficients, rate, shrink, sums is not None, A,
                )  # fmt: skip
                found += (mask & ~kept).to(tl.int32)
                total += tl.where(mask, product, 0)
        if sums is not None:
            tl.store(sums + first_sum + program, tl.sum(total))
        _count(skipped, i, tl.sum(found))


@triton.jit(do_not_specialize=["count"])
def multiply(
    addresses, count, layouts, geometry, chunks, workspace,
    momentum: tl.float64, weight_decay: tl.float64, scale: tl.float64, scale_factor, found_inf,
    T: tl.constexpr, A: tl.constexpr, S: tl.constexpr, PACKED: tl.constexpr,
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
        coefficients = _coefficients(scale, scale_factor, momentum, weight_decay, A)
        inverse = address(addresses, count, _INVERSE, i, S) + row * _numbers(n, PACKED)
        steps = tl.arange(0, _LARGE_STEPS)
        d = tl.zeros((_LANES,), A)
        for k in range(0, n, _LARGE_STEPS):
            source = k + steps
            there = source < n
            param, grad, moment = _pointers(
                addresses, count, geometry, i, row, tl.zeros_like(steps), row * width + k, steps, source == width,
                T, A, STRIDED, BIASED,
            )  # fmt: skip
            g = _gradient(param, grad, there, coefficients, A)
            new = coefficients[1] * tl.load(moment, there) + g
            entry = _entry_of(source[:, None].to(tl.int64), column[None, :], n, PACKED)
            both = there[:, None] & mask[None, :]
            p = tl.load(inverse + entry, both).to(A)
            d += tl.sum(tl.where(both, p * new[:, None], 0), 0)
        tl.store(_stored(workspace, layout, A) + row * n + column, d, mask)


@triton.jit
def _step_along(
    param, grad, moment, stored, d, kept, mask, coefficients, rate, shrink, CLIP: tl.constexpr, A: tl.constexpr
):
    """The step along known directions, or the momentum alone: the parts of <d, g>."""
    g = _gradient(param, grad, kept, coefficients, A)
    tl.store(moment, coefficients[1] * tl.load(moment, kept) + g, kept)
    if CLIP:
        tl.store(stored, float("nan"), mask & ~kept)
        product = tl.where(kept, d.to(tl.float64) * g.to(tl.float64), 0)
    else:
        w = tl.load(param, kept)
        tl.store(param, _stepped(w, d, rate, shrink, A), kept)
        product = tl.zeros_like(d).to(tl.float64)
    return product


@triton.jit(do_not_specialize=["count", "first_sum"])
def along(
    addresses, count, layouts, geometry, chunks, skipped, workspace, sums, first_sum,
    lr: tl.float64, lr_factor, shrinkage: tl.float64, momentum: tl.float64, weight_decay: tl.float64,
    scale: tl.float64, scale_factor, found_inf,
    T: tl.constexpr, A: tl.constexpr, LONG: tl.constexpr, STRIDED: tl.constexpr, BIASED: tl.constexpr,
):  # fmt: skip
    """As ``blocks``, for directions that are in the workspace: a run of blocks, or one that is LONG."""
    if not is_off(found_inf):
        program = tl.program_id(0).to(tl.int64)
        i = tl.load(chunks + 2 * program)
        layout = layouts + i.to(tl.int64) * _WIDTH
        columns, n, in_row = tl.load(layout + _COLUMNS), tl.load(layout + _SIZE), tl.load(layout + _BLOCKS)
        pitch = tl.load(layout + _PITCH)
        width = columns - 1 if BIASED else columns
        coefficients = _coefficients(scale, scale_factor, momentum, weight_decay, A)
        rate, shrink = _rates(lr, lr_factor, shrinkage, A)
        lanes = tl.arange(0, _LANES)
        whole_run = tl.full((), 1, tl.int64) if LONG else _LANES // n
        block = tl.load(chunks + 2 * program + 1).to(tl.int64) * whole_run
        row, start = block // in_row, block % in_row * n
        stored = _stored(workspace, layout, A) + row * pitch + start
        total = tl.zeros((_LANES,), tl.float64)
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
                    start + k + lanes == width, T, A, STRIDED, BIASED,
                )  # fmt: skip
                at = stored + k + lanes
                d = tl.load(at, mask, 0.0)
                total += _step_along(
                    param, grad, moment, at, d, mask & whole, mask, coefficients, rate, shrink, sums is not None, A
                )
        else:
            size = n.to(tl.int32)
            unit, element = lanes // size, lanes % size
            down, place = divmod_from(block % in_row, unit, in_row)
            column = place * n + element
            mask = (unit < whole_run) & (row + down < tl.load(layout + _ROWS)) & (column < columns)
            param, grad, moment = _pointers(
                addresses, count, geometry, i, row, down, row * width + start,
                (down * width + column - start).to(tl.int32), column == width, T, A, STRIDED, BIASED,
            )  # fmt: skip
            at = stored + (down * pitch + column - start)
            d = tl.load(at, mask, 0.0)
            kept = mask & _whole(d, mask, unit, size)
            total += _step_along(
                param, grad, moment, at, d, kept, mask, coefficients, rate, shrink, sums is not None, A
            )
            number = tl.sum((mask & ~kept & (element == 0)).to(tl.int32))
        if sums is not None:
            tl.store(sums + first_sum + program, tl.sum(total))
        _count(skipped, i, number)


@triton.jit(do_not_specialize=["count"])
def prepare(skipped, scale, count, LANES: tl.constexpr):
    """Nothing skipped, and a scale of 1."""
    i = tl.program_id(0) * LANES + tl.arange(0, LANES)
    tl.store(skipped + i, tl.zeros_like(i).to(tl.int64), i < count)
    if tl.program_id(0) == 0:
        tl.store(scale, tl.full((), 1, tl.float64))


@triton.jit(do_not_specialize=["count"])
def clip(sums, count, scale, lr: tl.float64, lr_factor, kl_clip: tl.float64, found_inf):
    """The scale at which lr^2 |sum of <d, g>| keeps to its bound."""
    if not is_off(found_inf):
        lanes = tl.arange(0, _SUMS)
        parts = tl.zeros((_SUMS,), tl.float64)
        for first in range(0, count, _SUMS):
            parts += tl.load(sums + first + lanes, first + lanes < count, 0.0)
        rate = times(lr, lr_factor)
        size = rate * rate * tl.abs(tl.sum(parts))
        bound = tl.full((), kl_clip, tl.float64)
        if size > bound:
            tl.store(scale, tl.sqrt(bound / size))


@triton.jit(do_not_specialize=["count"])
def descend(
    addresses, count, layouts, geometry, chunks, workspace, clipped,
    lr: tl.float64, lr_factor, shrinkage: tl.float64, found_inf,
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
        rate, shrink = _rates(lr, lr_factor, shrinkage, A)
        rate = (times(lr, lr_factor) * tl.load(clipped)).to(A)
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


def _cuts(i: int, view: View, inverse: Tensor, strided: bool, clipped: bool) -> Iterator[Cut]:
    """How a parameter goes through the kernels."""

    def cut(kernel: str, programs: int, **constants: Any) -> Cut:
        return Cut(i, _Kind(kernel, tuple(constants.items())), programs)

    rows, columns, n, in_row, biased = view
    lies = {"STRIDED": strided, "BIASED": biased}
    stored, packed = TYPES[inverse.dtype], inverse.dim() == 2
    if rows * columns == 0:
        return
    shared, long = inverse.dim() == 4, n > _LANES.value
    if long and not shared:
        yield cut("multiply", rows * triton.cdiv(n, _LANES.value), S=stored, PACKED=packed, **lies)
    if long or shared:
        run = max(1, _LANES.value // n)
        yield cut("along", triton.cdiv(rows * in_row, run), LONG=long, **lies)
    elif n == 1 and not (strided or biased):
        yield cut("diagonals", element_chunks(rows), S=stored)
    else:
        constant = n if n <= _MOST_CONSTANT else 0
        yield cut("blocks", triton.cdiv(rows, _LANES.value // n), S=stored, N=constant, PACKED=packed, **lies)
    if clipped:
        flat = not (strided or biased) and view.pitch == columns
        yield cut("descend", element_chunks(rows * columns), FLAT=flat, **lies)


def _lay_out(s: Any) -> Layout:
    rows, cuts, shared, size = [(0,) * (_WIDTH.value - 1)] * len(s.params), [], [], 0
    for entry in s.check():
        i, inverse, biased = entry.position, entry.inverse, entry.biased
        view = View(entry.layout.rows, entry.layout.columns, entry.layout.size, entry.layout.blocks, biased)
        together = [x for tensors in (s.params, s.grads, s.momentum_buffers) for x in tensors[i : i + 1 + biased]]
        made = list(_cuts(i, view, inverse, is_strided(together), s.kl_clip is not None))
        rows[i] = (view.rows, view.columns, view.size, view.blocks, view.pitch, size)
        cuts += made
        if made and inverse.dim() == 4:
            shared.append(_Shared(i, view, size))
        if any(cut.kind.kernel in ("along", "descend") for cut in made):
            taken = view.rows * view.pitch * s.momentum_buffers[i].element_size()
            size += triton.cdiv(taken, _ALIGNMENT) * _ALIGNMENT
    return Layout(rows, cuts, _Notes(shared, size))


def _directions(workspace: Tensor, of: _Shared, dtype: torch.dtype) -> Tensor:
    """The place of directions under a shared inverse, as (blocks, rows, size)."""
    rows, size = of.view.rows, of.view.pitch * dtype.itemsize
    kept = workspace[of.place : of.place + rows * size].view(dtype)
    return kept.view(rows, of.view.blocks, of.view.size).transpose(0, 1)


def _of(plan: Table, *kernels: str) -> Iterator[tuple[_Kind, Launches]]:
    """The launches of some of the kernels."""
    return (pair for pair in zip(plan.kinds, plan.launches, strict=True) if pair[0].kernel in kernels)


_KERNELS = {"blocks": blocks, "diagonals": diagonals, "along": along}


def step(s: Any) -> tuple[Tensor, Tensor]:
    """Take the step.

    Args:
        s: the arguments of the op by their names, found_inf on the device of the parameters. ``s.check()`` checks the
            lists, which need it where they are new, and lists the parameters that have an inverse: their positions,
            inverses, layouts and whether a bias follows. ``s.multiply_shared(i, out)`` writes the directions of
            parameter i, which has a shared inverse, to a tensor (blocks, rows, size).

    Returns:
        How many blocks of each parameter were skipped, and the scale.
    """
    device, clips = s.params[0].device, s.kl_clip is not None
    plan = table(_OP, (s.params, s.grads, s.momentum_buffers, s.inverses), lambda: _lay_out(s), clips, written=(0, 2))
    rate, rate_factor = scalar(s.lr)
    scale, scale_factor = scalar(s.grad_scale)
    rates = rate, rate_factor, s.weight_decay if s.decoupled else 0.0
    coefficients = s.momentum, s.coupled_decay, -scale if s.maximize else scale, scale_factor, s.found_inf
    lists_on_device = plan.addresses, plan.count, plan.layout
    notes: _Notes = plan.notes
    workspace = torch.empty(notes.size, dtype=torch.uint8, device=device) if notes.size else None

    skipped = torch.empty(plan.count, dtype=torch.int64, device=device)
    clipped = torch.empty((), dtype=torch.float64, device=device)
    launch(prepare, triton.cdiv(plan.count, 128), device, skipped, clipped, plan.count, LANES=128)
    for shared in notes.shared:
        assert workspace is not None
        i = shared.parameter
        s.multiply_shared(i, _directions(workspace, shared, s.momentum_buffers[i].dtype))
    for kind, (dtype, wide, _, chunks) in _of(plan, "multiply"):
        launch(
            multiply, len(chunks), device, *lists_on_device, plan.geometry, chunks, workspace, *coefficients,
            T=dtype, A=wide, **dict(kind.constants),
        )  # fmt: skip
    count = sum(len(launches.chunks) for _, launches in _of(plan, *_KERNELS))
    sums = torch.empty(count, dtype=torch.float64, device=device) if clips else None
    first_sum = 0
    for kind, (dtype, wide, _, chunks) in _of(plan, *_KERNELS):
        where = () if kind.kernel == "diagonals" else (plan.geometry,)
        stored = workspace if kind.kernel == "along" or sums is not None else None
        launch(
            _KERNELS[kind.kernel], len(chunks), device, *lists_on_device, *where, chunks, skipped, stored, sums,
            first_sum, *rates, *coefficients, T=dtype, A=wide, **dict(kind.constants),
        )  # fmt: skip
        first_sum += len(chunks)
    if sums is not None:
        launch(clip, 1, device, sums, count, clipped, rate, rate_factor, s.kl_clip, s.found_inf, warps=8)
    for kind, (dtype, wide, _, chunks) in _of(plan, "descend"):
        launch(
            descend, len(chunks), device, *lists_on_device, plan.geometry, chunks, workspace, clipped, *rates,
            s.found_inf, T=dtype, A=wide, **dict(kind.constants),
        )  # fmt: skip
    return skipped, clipped
