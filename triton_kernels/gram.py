"""The weighted Gram matrix of rows: products of tiles of the lower triangle, half the operations of a matrix product.

A first kernel leaves sums over a share of the rows in a workspace, a second adds the shares in order, scales, averages
and mirrors them. Numbers of 16 bits go to the matrix units as they are, whose products are exact, or as three parts
that make up a weighted number; float32 and float64 are multiplied as such.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._language import add_product, tile_of_triangle
from ._launch import launch
from ._lists import WIDE

_PROGRAMS = 528
"""Rows are shared out until there are about so many tiles to sum: four for each multiprocessor of an H200."""
_LEAST_ROWS = 512
"""A share has at least so many rows."""
_STORED_ROWS = tl.constexpr(32)  # of a tile, that a program of the second kernel works on


class _Sizes(NamedTuple):
    """What a program of the first kernel works on: a matter of the dtypes and of the shape alone."""

    block: int  # columns of x, rows and columns of a tile
    step: int  # rows of x at a time
    run: int  # rows whose products are added to a sum that starts at 0
    warps: int
    stages: int


@triton.jit
def _head(x):
    """The leading 8 bits of the significands of float32 numbers; what is left is exact."""
    head = (x.to(tl.uint32, bitcast=True) & 0xFFFF0000).to(tl.float32, bitcast=True)
    return head, tl.where(x - x == 0, x - head, 0)


@triton.jit
def _add_products(total, left, right, weight, A: tl.constexpr):
    """total + left^T diag(weight) right."""
    if weight is None:
        total = add_product(total, tl.trans(left), right, A)
    elif right.dtype == tl.bfloat16:
        # A number of float32 is the sum of three of bfloat16, and their products are exact.
        first, rest = _head(left.to(A) * weight[:, None])
        second, third = _head(rest)
        total = add_product(total, tl.trans(third.to(tl.bfloat16)), right, A)
        total = add_product(total, tl.trans(second.to(tl.bfloat16)), right, A)
        total = add_product(total, tl.trans(first.to(tl.bfloat16)), right, A)
    else:
        left, right = left.to(A) * weight[:, None], right.to(A)
        total = add_product(total, tl.trans(left), right, A)  # transposed last, or the compiler spills registers
    return total


@triton.jit(do_not_specialize=["rows", "share", "tiles"])
def sums(
    x,
    weight,
    shares,  # [shares, tiles, BLOCK, BLOCK]
    rows,
    columns,
    stride,
    share,
    tiles,
    A: tl.constexpr,
    BLOCK: tl.constexpr,
    STEP: tl.constexpr,
    RUN: tl.constexpr,
    FAR: tl.constexpr,  # whether the rows of a step reach beyond offsets of 32 bits
):
    """Products of two ranges of columns, summed over a share of the rows."""
    tile = tl.program_id(0)
    row, column = tile_of_triangle(tile)
    begin = tl.program_id(1).to(tl.int64) * share
    left_columns = row * BLOCK + tl.arange(0, BLOCK)
    right_columns = column * BLOCK + tl.arange(0, BLOCK)
    is_left, is_right = (left_columns < columns)[None, :], (right_columns < columns)[None, :]
    lanes = tl.arange(0, STEP)
    left_rows = tl.minimum(rows - begin, share).to(tl.int32)
    row_offsets = (lanes.to(tl.int64) if FAR else lanes)[:, None] * stride
    left, right = row_offsets + left_columns[None, :], row_offsets + right_columns[None, :]
    total = tl.zeros((BLOCK, BLOCK), A)
    for run in range(0, left_rows, RUN):
        of_run = tl.zeros((BLOCK, BLOCK), A)
        for at in range(run, tl.minimum(run + RUN, left_rows), STEP):
            there = at + lanes < left_rows
            weights = None
            if weight is not None:
                weights = tl.load(weight + begin + at + lanes, there, 0)
            first = x + (begin + at) * stride
            of_left = tl.load(first + left, there[:, None] & is_left, 0)
            of_right = tl.load(first + right, there[:, None] & is_right, 0)
            of_run = _add_products(of_run, of_left, of_right, weights, A)
        total += of_run
    at = (tl.program_id(1).to(tl.int64) * tiles + tile) * (BLOCK * BLOCK)
    entries = tl.arange(0, BLOCK)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    tl.store(shares + at + entries, total)


@triton.jit(do_not_specialize=["columns", "tiles", "count"])
def results(
    out, shares, columns, tiles, count, decay: tl.float64, gain: tl.float64, A: tl.constexpr, BLOCK: tl.constexpr
):
    """Some rows of a tile of a matrix, and their mirror image."""
    program = tl.program_id(0)  # a tile of a matrix
    row, column = tile_of_triangle(program % tiles)
    out += (program // tiles).to(tl.int64) * columns * columns
    lanes = tl.program_id(1) * _STORED_ROWS + tl.arange(0, _STORED_ROWS)
    entries = lanes[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    total = tl.zeros((_STORED_ROWS, BLOCK), A)
    size = tl.full((), BLOCK * BLOCK, tl.int64)
    share = shares + program * size
    for _ in range(count):
        total += tl.load(share + entries)
        share += tl.num_programs(0) * size
    i, j = (row * BLOCK + lanes)[:, None], (column * BLOCK + tl.arange(0, BLOCK))[None, :]
    lower = (i < columns) & (j <= i)
    at = out + i.to(tl.int64) * columns + j
    value = tl.full((), gain, A) * total
    if decay != 0:
        value += tl.full((), decay, A) * tl.load(at, lower, 0)
    tl.store(at, value, lower)
    i, j = tl.trans(i), tl.trans(j)
    tl.store(out + j.to(tl.int64) * columns + i, tl.trans(value), (i < columns) & (j < i))


def _sizes(dtype: torch.dtype, weighted: bool, columns: int) -> _Sizes:
    narrow = columns <= 64 or columns % 8 != 0  # rows of odd lengths are read number by number, which takes registers
    if dtype == torch.float64:
        return _Sizes(64, 16, 256, 8, 2)
    if dtype == torch.float32 or (dtype == torch.float16 and weighted):
        return _Sizes(64, 16, 256, 4, 3) if narrow else _Sizes(128, 16, 256, 8, 3)
    if narrow:
        return _Sizes(64, 32, 4096, 4, 2)
    return _Sizes(128, 32 if weighted else 64, 4096, 8, 3)


def add_shares(out: Tensor, shares: Tensor, decay: float, gain: float) -> None:
    """Average what ``sums`` left, [shares, matrices * tiles, block, block], into ``out`` (..., columns, columns)."""
    columns, (count, programs, block, _) = out.shape[-1], shares.shape
    ranges = triton.cdiv(columns, block)
    launch(
        results, (programs, block // _STORED_ROWS.value), out.device,
        out, shares, columns, ranges * (ranges + 1) // 2, count, decay, gain,
        A=WIDE[out.dtype], BLOCK=block,
    )  # fmt: skip


def weighted_gram(out: Tensor, x: Tensor, weight: Tensor | None, decay: float, gain: float) -> None:
    """Average the Gram matrix of the rows of x, whose columns are adjacent, into ``out``."""
    rows, columns = x.shape
    block, step, run, warps, stages = _sizes(x.dtype, weight is not None, columns)
    ranges = triton.cdiv(columns, block)
    tiles = ranges * (ranges + 1) // 2
    count = max(1, min(_PROGRAMS // max(tiles, 1), rows // _LEAST_ROWS))
    share = triton.cdiv(triton.cdiv(rows, count), step) * step
    count = triton.cdiv(rows, share) if rows else 0
    wide = WIDE[x.dtype]
    shares = torch.empty(count, tiles, block, block, dtype=out.dtype, device=out.device)
    launch(
        sums, (tiles, count), out.device, x, weight, shares, rows, columns, x.stride(0), share, tiles,
        A=wide, BLOCK=block, STEP=step, RUN=run, FAR=step * x.stride(0) + columns >= 2**31, warps=warps, stages=stages,
    )  # fmt: skip
    add_shares(out, shares, decay, gain)
