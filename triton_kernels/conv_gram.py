"""The factor of a convolution's input: products of tiles of the lower triangle, whose rows are patches of x.

Patches are read from x where it lies, nothing being unfolded in memory: where a window begins and how far into it a
column reads are added up, once for all numbers of a row or a column. As for the Gram matrix of given rows, a first
kernel leaves sums over a share of the windows in a workspace, and that one's second kernel averages them.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from ._convolution import Geometry, channels_of, place, three
from ._language import add_product, divmod_from, narrow, tile_of_triangle
from ._launch import launch
from ._lists import WIDE
from .gram import add_shares

_PROGRAMS = 528
"""Windows are shared out until there are about so many tiles to sum: four for each multiprocessor of an H200."""
_LEAST_ROWS = 512
"""A share has at least so many windows."""
_STEP = 32  # windows at a time
_RUN = 256  # windows whose products are added to a sum that starts at 0
_WARPS = 8


@triton.jit
def _columns(first, x_channel, x_position, height, width, n, kernel_height, kernel_width, step_d, step_h, step_w,
             BLOCK: tl.constexpr):  # fmt: skip
    """Columns [BLOCK]: which they are, how far into a window they read in each dimension, and in memory."""
    column = first + tl.arange(0, BLOCK)
    d, h, w = place(column % n, kernel_height, kernel_width)
    d, h, w = d * step_d, h * step_h, w * step_w
    at = (column // n) * x_channel.to(tl.int64) + ((d.to(tl.int64) * height + h) * width + w) * x_position
    return column, d, h, w, at


@triton.jit
def _patches(
    x, begin, d, h, w, there, columns, column, into_d, into_h, into_w, at, depth, height, width, BIAS: tl.constexpr
):
    """What columns read through windows [STEP, BLOCK]: zeros outside x, and ones in the last column for a bias."""
    d, h, w = d[:, None] + into_d[None], h[:, None] + into_h[None], w[:, None] + into_w[None]
    inside = (d >= 0) & (d < depth) & (h >= 0) & (h < height) & (w >= 0) & (w < width) & there[:, None]
    if BIAS:
        one = there[:, None] & (column == columns - 1)[None]
        other = narrow(tl.where(one, 1.0, 0.0), x.dtype.element_ty)
        return tl.load(x + begin[:, None] + at[None], inside & (column < columns - 1)[None], other)
    else:
        return tl.load(x + begin[:, None] + at[None], inside & (column < columns)[None], 0.0)


@triton.jit(
    do_not_specialize=[
        "x", "rows", "columns", "share", "tiles", "x_sample", "x_group", "x_channel", "x_position",
        "depth", "height", "width", "positions", "out_height", "out_width", "n", "kernel_height", "kernel_width",
        "stride_d", "stride_h", "stride_w", "before_d", "before_h", "before_w", "step_d", "step_h", "step_w",
    ]
)  # fmt: skip
def patch_sums(
    x,
    shares,  # [shares, groups * tiles, BLOCK, BLOCK]
    rows: tl.int64,  # windows of all samples
    columns,
    share,
    tiles,
    x_sample: tl.int64,
    x_group: tl.int64,
    x_channel: tl.int64,
    x_position: tl.int64,
    depth,
    height,
    width,
    positions,
    out_height,
    out_width,
    n,
    kernel_height,
    kernel_width,
    stride_d,
    stride_h,
    stride_w,
    before_d,
    before_h,
    before_w,
    step_d,  # dilations
    step_h,
    step_w,
    A: tl.constexpr,
    BLOCK: tl.constexpr,
    STEP: tl.constexpr,
    RUN: tl.constexpr,
    BIAS: tl.constexpr,
):
    """Products of two ranges of columns of a group, summed over a share of the windows."""
    program = tl.program_id(0)
    row_tile, column_tile = tile_of_triangle(program % tiles)
    x += (program // tiles) * x_group
    left, left_d, left_h, left_w, left_at = _columns(
        row_tile * BLOCK, x_channel, x_position, height, width, n, kernel_height, kernel_width,
        step_d, step_h, step_w, BLOCK,
    )  # fmt: skip
    right, right_d, right_h, right_w, right_at = _columns(
        column_tile * BLOCK, x_channel, x_position, height, width, n, kernel_height, kernel_width,
        step_d, step_h, step_w, BLOCK,
    )  # fmt: skip
    lanes = tl.arange(0, STEP)
    begin = tl.program_id(1).to(tl.int64) * share
    count = tl.minimum(rows - begin, share).to(tl.int32)
    total = tl.zeros((BLOCK, BLOCK), A)
    for run in range(0, count, RUN):
        of_run = tl.zeros((BLOCK, BLOCK), A)
        for at in range(run, tl.minimum(run + RUN, count), STEP):
            there = at + lanes < count
            first = begin + at
            many = positions.to(tl.int64)
            samples, position = divmod_from(first % many, lanes, many)
            d, h, w = place(position.to(tl.int32), out_height, out_width)
            d, h, w = d * stride_d - before_d, h * stride_h - before_h, w * stride_w - before_w
            window = (first // many + samples) * x_sample + ((d.to(tl.int64) * height + h) * width + w) * x_position
            of_left = _patches(x, window, d, h, w, there, columns, left, left_d, left_h, left_w, left_at,
                               depth, height, width, BIAS)  # fmt: skip
            of_right = _patches(x, window, d, h, w, there, columns, right, right_d, right_h, right_w, right_at,
                                depth, height, width, BIAS)  # fmt: skip
            of_run = add_product(of_run, tl.trans(of_left), of_right, A)
        total += of_run
    at = (tl.program_id(1).to(tl.int64) * tl.num_programs(0) + program) * (BLOCK * BLOCK)
    entries = tl.arange(0, BLOCK)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    tl.store(shares + at + entries, total)


class Plan(NamedTuple):
    """How the work is divided: by the dtype and by shape alone."""

    block: int  # rows and columns of a tile
    tiles: int  # of a group
    share: int  # windows
    shares: int


def plan(windows: int, groups: int, columns: int, dtype: torch.dtype) -> Plan:
    """Shares of the windows of all samples, and tiles of the lower triangles."""
    block = 32 if columns <= 32 or dtype == torch.float64 else 64
    ranges = triton.cdiv(columns, block)
    tiles = ranges * (ranges + 1) // 2
    count = max(1, min(_PROGRAMS // (groups * tiles), windows // _LEAST_ROWS))
    share = triton.cdiv(triton.cdiv(windows, count), _STEP) * _STEP
    return Plan(block, tiles, share, triton.cdiv(windows, share) if windows else 0)


def conv_gram(c: Any, sizes: Sequence[int]) -> None:
    """Write decay * out + gain * the sum of the outer products of all patches, for each group.

    Args:
        c: the arguments of the op by their names: out contiguous, each sample of x in the order (C, *S) or (*S, C),
            padding (before, after) of each spatial dimension.
        sizes: how many windows each dimension has.
    """
    out, x = c.out, channels_of(c.x)
    if out.numel() == 0:
        return
    geometry = Geometry(
        three(c.x.shape[2:], 1), three(sizes, 1), three(c.kernel_size, 1), three(c.stride, 1),
        three(c.padding[::2], 0), three(c.dilation, 1),
    )  # fmt: skip
    groups, columns = out.shape[:2]
    windows = len(c.x) * geometry.positions
    block, tiles, share, count = plan(windows, groups, columns, c.x.dtype)
    shares = torch.empty(count, groups * tiles, block, block, dtype=out.dtype, device=out.device)
    launch(
        patch_sums, (groups * tiles, count), out.device,
        c.x, shares, windows, columns, share, tiles,
        x.sample, c.x.shape[1] // groups * x.channel, x.channel, x.position, *geometry.arguments(),
        A=WIDE[c.x.dtype], BLOCK=block, STEP=_STEP, RUN=_RUN, BIAS=bool(c.bias), warps=_WARPS,
    )  # fmt: skip
    add_shares(out, shares, c.decay, c.gain)
