"""The last part of a sum that many programs share.

Partial sums are added in float64, in an order that shapes alone decide.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import launch

ROUNDS = tl.constexpr(8)
"""Tiles that one program adds up."""

_FEW_ROWS = 64
_GROUPS = 4  # summed side by side
_POSITIONS = 512  # of each of them at a time


def power_of_two(x: float) -> int:
    """The largest power of two that is at most x, and 1 below that."""
    return 1 << max(int(x), 1).bit_length() - 1


@triton.jit(do_not_specialize=["rows", "columns", "divisor"])
def _add_rows(
    x, out, rows: tl.int64, columns: tl.int64, divisor: tl.float64, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    """One part of the rows, of a tile of columns: into a row of out."""
    tiles = tl.cdiv(columns, COLUMNS)
    program = tl.program_id(0).to(tl.int64)
    part = program // tiles
    first, column = part * ROWS * ROUNDS, program % tiles * COLUMNS
    left = tl.minimum(rows - first, ROWS * ROUNDS).to(tl.int32)
    r, c = tl.arange(0, ROWS)[:, None], tl.arange(0, COLUMNS)[None, :]
    there = column + c < columns
    lines = x + (first + r) * columns + column  # [ROWS, 1]
    total = tl.zeros((ROWS, COLUMNS), tl.float64)
    for done in range(0, left, ROWS):
        total += tl.load(lines + c, (done + r < left) & there, 0).to(tl.float64)
        lines += ROWS * columns
    sums = tl.sum(total, 0)[None, :] / divisor
    tl.store(out + part * columns + column + c, sums.to(out.dtype.element_ty), there)


def add_rows(x: Tensor, out: Tensor, divisor: float = 1.0) -> Tensor:
    """``out[c] = sum_r x[r, c] / divisor``.

    Args:
        x: (R, C), contiguous, in float32 or float64.
        out: of C elements, contiguous; zeros where there are no rows.

    Returns:
        out.
    """
    rows, columns = x.shape
    tile = (8, 512) if rows <= _FEW_ROWS else (512, 8)
    parts = triton.cdiv(rows, tile[0] * ROUNDS.value) if rows else 1
    into = out if parts == 1 else torch.empty(parts, columns, dtype=x.dtype, device=x.device)
    launch(
        _add_rows, parts * triton.cdiv(columns, tile[1]), x.device,
        x, into, rows, columns, divisor if parts == 1 else 1.0, ROWS=tile[0], COLUMNS=tile[1],
    )  # fmt: skip
    return out if parts == 1 else add_rows(into, out, divisor)


@triton.jit(do_not_specialize=["groups", "size"])
def _add_columns(x, out, groups: tl.int64, size: tl.int64, GROUPS: tl.constexpr, SIZE: tl.constexpr):
    """One part of the columns, of a few rows: into a row of out."""
    tiles = tl.cdiv(groups, GROUPS)
    program = tl.program_id(0).to(tl.int64)
    part = program // tiles
    first = part * SIZE * ROUNDS
    group = program % tiles * GROUPS + tl.arange(0, GROUPS)
    left = tl.minimum(size - first, SIZE * ROUNDS).to(tl.int32)
    s = tl.arange(0, SIZE)[None, :]
    there = group < groups
    lines = x + (group * size + first)[:, None]
    total = tl.zeros((GROUPS, SIZE), tl.float64)
    for done in range(0, left, SIZE):
        total += tl.load(lines + (done + s), there[:, None] & (done + s < left), 0).to(tl.float64)
    tl.store(out + part * groups + group, tl.sum(total, 1).to(out.dtype.element_ty), there)


def add_columns(x: Tensor, out: Tensor) -> Tensor:
    """``out[r] = sum_c x[r, c]``, of what ``add_rows`` takes.

    Returns:
        out.
    """
    groups, size = x.shape
    parts = triton.cdiv(size, _POSITIONS * ROUNDS.value) if size else 1
    into = out if parts == 1 else torch.empty(parts, groups, dtype=x.dtype, device=x.device)
    launch(
        _add_columns, parts * triton.cdiv(groups, _GROUPS), x.device,
        x, into, groups, size, GROUPS=_GROUPS, SIZE=_POSITIONS,
    )  # fmt: skip
    return out if parts == 1 else add_rows(into, out)
