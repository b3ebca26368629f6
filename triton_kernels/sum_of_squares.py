"""Sums of squares: one read of x, and partial sums that for many rows are a few hundredths of it.

Everything is the sum of squares of the columns of a matrix, but for long runs of one channel in few samples.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import launch
from ._lists import WIDE
from ._partial_sums import add_columns, add_rows, power_of_two
from ._windows import add_windows

_TILE = 4096  # numbers that a program reads at a time
_LANE_ROUNDS = 32  # numbers that one lane adds up in float32
_LEAST_ROUNDS = 4  # beside which writing a partial sum is cheap
_PROGRAMS = 4096  # as many keep every device busy to the end
_HEIGHTS = (32, 8, 1)  # rows of a tile: the first that the matrix has
_COLUMNS = 128  # of a tile of the first height

_FEW_SAMPLES = 16  # of which the sum by position would be no small part of x
_LONG_RUN = 2048  # positions


@triton.jit
def _squares(pointers, mask, A: tl.constexpr):
    x = tl.load(pointers, mask).to(A) if mask is None else tl.load(pointers, mask, 0).to(A)
    return x * x


@triton.jit(do_not_specialize=["rows", "columns", "stride", "last", "block"])
def _sum_columns(
    x,
    out,  # [blocks, columns]
    rows: tl.int64,
    columns: tl.int64,
    stride: tl.int64,  # from row to row, in elements
    last: tl.int64,  # columns of the last row that are there
    block: tl.int64,  # rows of a block
    A: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """The sums of squares of a block of rows of a tile of columns."""
    V: tl.constexpr = 128 // x.dtype.element_ty.primitive_bitwidth  # elements in 16 bytes
    tiles = tl.cdiv(columns, COLUMNS)
    program = tl.program_id(0).to(tl.int64)
    first, column = program // tiles * block, program % tiles * COLUMNS
    left = tl.minimum(rows - first, block).to(tl.int32)
    width = tl.minimum(columns - column, COLUMNS).to(tl.int32)
    # How much of the last row is there, if it is in this block.
    width_of_last = tl.where(first + left == rows, tl.minimum(tl.maximum(last - column, 0), width), width).to(tl.int32)
    r, c = tl.arange(0, ROWS)[:, None], tl.arange(0, COLUMNS)[None, :]
    total = tl.zeros((ROWS, COLUMNS), A)
    into = out + program // tiles * columns + column + c
    if (width == COLUMNS) & (stride % V == 0):
        step = stride // V * V  # the stride, known to be so many: 16 bytes a load
        lines = x + first * step + column + r * step  # [ROWS, 1]
        full = (left - tl.where(width_of_last == COLUMNS, 0, 1)) // ROWS
        for _ in range(full):
            total += _squares(lines + c, None, A)
            lines += ROWS * step
        rest = left - full * ROWS
        if (rest > 0) & (width_of_last == COLUMNS):
            total += _squares(lines + c, (r < rest).broadcast_to(ROWS, COLUMNS), A)
        elif rest > 0:
            total += _squares(lines + c, c < tl.where(r < rest - 1, COLUMNS, tl.where(r < rest, width_of_last, 0)), A)
        tl.store(into, tl.sum(total, 0)[None, :])
    else:
        lines = x + first * stride + column + r * stride
        for done in range(0, left, ROWS):
            live = tl.where(done + r < left - 1, width, tl.where(done + r < left, width_of_last, 0))
            total += _squares(lines + c, c < live, A)
            lines += ROWS * stride
        tl.store(into, tl.sum(total, 0)[None, :], c < width)


def _joined(rows: int, columns: int, item: int) -> int:
    """How many rows of a matrix without gaps are read as one, so that rows begin at 16 bytes and fill tiles."""
    joined = 1
    while 16 * joined <= rows and (
        joined * columns * item % 16 or 8 * (-joined * columns % _COLUMNS) > joined * columns
    ):
        joined *= 2
    return joined


def _blocks(rows: int, tiles: int, height: int) -> tuple[int, int]:
    """How many blocks the rows are cut into, and the rows of each: shapes alone decide."""
    rounds = triton.cdiv(rows, height)
    wanted = min(max(power_of_two(rounds * tiles / _PROGRAMS), _LEAST_ROUNDS), _LANE_ROUNDS)
    block = triton.cdiv(rounds, triton.cdiv(rounds, wanted))  # as even as they come
    return triton.cdiv(rounds, block), block * height


def sum_columns(x: Tensor, rows: int, columns: int, stride: int, out: Tensor) -> Tensor:
    """The sum of squares of each column of a matrix.

    Args:
        x: where the matrix, which has elements, begins; the columns of a row are side by side.
        stride: from row to row, in elements.
        out: of ``columns`` elements, contiguous, in float64 for float64 and in float32 for all else.

    Returns:
        out.
    """
    joined = _joined(rows, columns, x.element_size()) if stride == columns else 1
    wide, last = columns * joined, (rows - 1) % joined * columns + columns
    lines = triton.cdiv(rows, joined)
    height = next(height for height in _HEIGHTS if lines >= height)
    width = _TILE // height
    tiles = triton.cdiv(wide, width)
    blocks, block = _blocks(lines, tiles, height)
    partial = out if blocks * joined == 1 else torch.empty(blocks * joined, columns, dtype=out.dtype, device=x.device)
    launch(
        _sum_columns, blocks * tiles, x.device,
        x, partial, lines, wide, stride * joined, last, block, A=WIDE[x.dtype], ROWS=height, COLUMNS=width,
    )  # fmt: skip
    return out if blocks * joined == 1 else add_rows(partial, out)


@triton.jit(do_not_specialize=["size", "pieces", "rounds"])
def _sum_runs(x, out, size: tl.int64, pieces: tl.int64, rounds: tl.int64, A: tl.constexpr, TILE: tl.constexpr):
    """The sum of squares of a piece, so many tiles, of a run. Pieces begin at 16 bytes, wherever the run does."""
    V: tl.constexpr = 128 // x.dtype.element_ty.primitive_bitwidth
    program = tl.program_id(0).to(tl.int64)
    begin = program // pieces * size
    piece = rounds * TILE
    base = begin // V * V + program % pieces * piece
    ahead = tl.maximum(begin - base, 0).to(tl.int32)  # in the first tile, of the run before
    left = tl.minimum(begin + size - base, piece).to(tl.int32)
    lanes = tl.arange(0, TILE)
    first = tl.where(ahead > 0, 1, 0)
    end = tl.maximum(left // TILE, first)
    total = tl.zeros((TILE,), A)
    for i in range(first, end):
        total += _squares(x + (base + i * TILE) + lanes, None, A)
    if first == 1:
        total += _squares(x + base + lanes, (lanes >= ahead) & (lanes < left), A)
    if left > end * TILE:
        total += _squares(x + (base + end * TILE) + lanes, lanes < left - end * TILE, A)
    tl.store(out + program, tl.sum(total, 0))


def _sum_long_runs(x: Tensor, samples: int, channels: int, size: int, out: Tensor) -> Tensor:
    """The sum of squares of each channel of a contiguous x, run by run."""
    tiles = triton.cdiv(size, _TILE)
    wanted = min(max(power_of_two(tiles * samples * channels / _PROGRAMS), _LEAST_ROUNDS), _LANE_ROUNDS)
    rounds = min(wanted, tiles)
    pieces = triton.cdiv(size + 16 // x.element_size() - 1, rounds * _TILE)
    partial = torch.empty(samples, channels * pieces, dtype=out.dtype, device=x.device)
    launch(
        _sum_runs, samples * channels * pieces, x.device,
        x, partial, size, pieces, rounds, A=WIDE[x.dtype], TILE=_TILE,
    )  # fmt: skip
    if pieces == 1:
        return add_rows(partial, out)
    by_piece = partial if samples == 1 else add_rows(partial, torch.empty_like(partial[0]))
    return add_columns(by_piece.view(channels, pieces), out)


def sum_channels(x: Tensor, channels_last: bool, out: Tensor) -> Tensor:
    """The sum of squares of each channel of x (N, C, *S) that has elements, contiguous or channels_last in memory.

    Args:
        out: as that of ``sum_columns``.

    Returns:
        out.
    """
    samples, channels = x.shape[:2]
    size = x.numel() // (samples * channels)
    if channels_last or size == 1:
        return sum_columns(x, samples * size, channels, channels, out)
    if samples < _FEW_SAMPLES and size >= _LONG_RUN:
        return _sum_long_runs(x, samples, channels, size, out)
    by_position = torch.empty(channels * size, dtype=out.dtype, device=x.device)
    sum_columns(x, samples, channels * size, channels * size, by_position)
    return add_columns(by_position.view(channels, size), out)


def sum_patches(
    x: Tensor,
    channels_last: bool,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    outputs: Sequence[int],
    out: Tensor,
) -> Tensor:
    """What each offset of a sliding window reads of the squares of x (N, C, *S): samples first, then windows.

    Args:
        x: has elements; contiguous or channels_last in memory.
        padding: (before, after) of each spatial dimension, flattened.
        outputs: windows along each dimension.
        out: (C, *kernel), as that of ``sum_columns``.

    Returns:
        out.
    """
    samples, size = x.shape[0], x.numel() // x.shape[0]
    squares = torch.empty(size, dtype=out.dtype, device=x.device)
    sum_columns(x, samples, size, size, squares)
    return add_windows(squares, x.shape[1:], channels_last, kernel, stride, padding[::2], dilation, outputs, out)
