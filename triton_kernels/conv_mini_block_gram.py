"""Mini-block Grams of a convolution's gradients by single samples, which are made on the way and soon forgotten.

The gradients of a chunk of blocks by all samples (by 1024 of them where there are more) go to a workspace that fits the
second-level cache: for each sample one matrix product over output positions, of rows of grad_output and columns of
windows that are read from x where they lie, nothing being unfolded. The Gram kernels then read the workspace.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._convolution import Channels, Geometry, channels_of, place, three
from ._language import add_product
from ._launch import launch
from ._lists import WIDE
from .mini_block_gram import add_runs, gram, partial_size, run_length, sum_runs

_SEGMENT = tl.constexpr(1024)  # positions that are summed before their sum is added to the total
_WARPS = 8

_WORKSPACE = 2**25  # bytes of gradients, and of their sums where runs are summed apart
_SAMPLES = 1024  # of which gradients are held, at most: there may always be as many as one run sums


@triton.jit(
    do_not_specialize=[
        "w", "x", "grad", "groups", "rows", "columns", "x_sample", "x_group", "x_channel", "x_position",
        "grad_sample", "grad_group", "grad_channel", "grad_position",
        "depth", "height", "width", "positions", "out_height", "out_width", "n", "kernel_height", "kernel_width",
        "stride_d", "stride_h", "stride_w", "before_d", "before_h", "before_w", "step_d", "step_h", "step_w",
    ]
)  # fmt: skip
def gradient_kernel(
    w,  # [samples, groups, rows, columns], columns being [channels, n]
    x,  # from the first channel of the chunk on
    grad,
    groups,
    rows,
    columns,
    x_sample: tl.int64,
    x_group: tl.int64,
    x_channel: tl.int64,
    x_position: tl.int64,
    grad_sample: tl.int64,
    grad_group: tl.int64,
    grad_channel: tl.int64,
    grad_position: tl.int64,
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
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    POSITIONS: tl.constexpr,
):
    """w[s, g, r, i, k] = sum over l of grad[s, g, r, l] * x[s, g, i, l * stride - before + k * step], a tile of it."""
    program = tl.program_id(0)
    column_tiles, row_tiles = tl.cdiv(columns, COLUMNS), tl.cdiv(rows, ROWS)
    column = program % column_tiles * COLUMNS + tl.arange(0, COLUMNS)
    row = program // column_tiles % row_tiles * ROWS + tl.arange(0, ROWS)
    matrix = program // column_tiles // row_tiles
    group, sample = (matrix % groups).to(tl.int64), (matrix // groups).to(tl.int64)

    # Where a window reads is the sum of where it begins and of how far into it a column reads, in every dimension.
    kernel_d, kernel_h, kernel_w = place(column % n, kernel_height, kernel_width)
    into_d, into_h, into_w = kernel_d * step_d, kernel_h * step_h, kernel_w * step_w
    into = (into_d.to(tl.int64) * height + into_h) * width + into_w
    windows = x + sample * x_sample + group * x_group + (column // n) * x_channel.to(tl.int64) + into * x_position
    grads = grad + sample * grad_sample + group * grad_group + row * grad_channel.to(tl.int64)

    DOWN: tl.constexpr = POSITIONS if ROWS == 1 else ROWS
    total = tl.zeros((DOWN, COLUMNS), A)
    for start in range(0, positions, _SEGMENT):
        segment = tl.zeros((DOWN, COLUMNS), A)
        for first in range(start, tl.minimum(start + _SEGMENT, positions), POSITIONS):
            position = first + tl.arange(0, POSITIONS)
            is_one = position < positions
            at_d, at_h, at_w = place(position, out_height, out_width)
            at_d, at_h, at_w = at_d * stride_d - before_d, at_h * stride_h - before_h, at_w * stride_w - before_w
            begin = ((at_d.to(tl.int64) * height + at_h) * width + at_w) * x_position
            d, h, v = at_d[:, None] + into_d[None], at_h[:, None] + into_h[None], at_w[:, None] + into_w[None]
            inside = (d >= 0) & (d < depth) & (h >= 0) & (h < height) & (v >= 0) & (v < width)
            inside = inside & is_one[:, None] & (column < columns)[None]
            right = tl.load(windows[None] + begin[:, None], inside, 0.0)  # [POSITIONS, COLUMNS]
            along = position * grad_position.to(tl.int64)
            if ROWS == 1:
                left = tl.load(grads + along, is_one, 0.0)
                segment += left.to(A)[:, None] * right.to(A)
            else:
                mask = (row < rows)[:, None] & is_one[None]
                left = tl.load(grads[:, None] + along[None], mask, 0.0)  # [ROWS, POSITIONS]
                segment = add_product(segment, left, right, A)
        total += segment
    to = w + (matrix.to(tl.int64) * rows + row[:, None]) * columns + column[None]  # [ROWS, COLUMNS]
    if ROWS == 1:
        tl.store(to, tl.sum(total, 0)[None], (column < columns)[None])
    else:
        tl.store(to, total, (row < rows)[:, None] & (column < columns)[None])


class Chunk(NamedTuple):
    """Blocks whose gradients are held together: of all channels of some groups, or of some channels of one."""

    group: int
    groups: int
    row: int  # output channels of each group
    rows: int
    channel: int  # input channels of each group
    channels: int


class Plan(NamedTuple):
    """How the work is divided: by shape alone."""

    run: int  # samples that are summed one after the other
    samples: int  # of which gradients are held
    chunks: list[Chunk]


def _evenly(size: int, most: int) -> Iterator[tuple[int, int]]:
    """Beginnings and sizes of parts of at most so many, as even as can be."""
    parts = -(-size // most)
    for part in range(parts):
        first = size * part // parts
        yield first, size * (part + 1) // parts - first


def plan(samples: int, groups: int, rows: int, channels: int, n: int, dtype: torch.dtype) -> Plan:
    """Chunks whose gradients and sums fit the workspace, unless those of one block do not.

    Args:
        rows, channels: output and input channels of a group.
        n: offsets of the kernel.
        dtype: of the gradients.
    """
    run = run_length(samples)
    held = min(samples, max(_SAMPLES // run * run, run))
    of_block = held * n
    if samples > run:
        of_block += -(-samples // run) * partial_size(n, dtype)
    most = max(1, _WORKSPACE // max(1, of_block * dtype.itemsize))
    if rows * channels <= most:
        whole = _evenly(groups, most // (rows * channels))
        return Plan(run, held, [Chunk(first, count, 0, rows, 0, channels) for first, count in whole])
    # A whole tile of rows, if need be at the expense of channels.
    most_rows = min(rows, max(most // channels, min(64, most)))
    chunks = [
        Chunk(group, 1, row, some_rows, channel, some_channels)
        for group in range(groups)
        for row, some_rows in _evenly(rows, most_rows)
        for channel, some_channels in _evenly(channels, max(1, most // most_rows))
    ]
    return Plan(run, held, chunks)


def _make_gradients(
    w: Tensor, x: Channels, grad: Channels, first: int, chunk: Chunk, rows: int, channels: int, geometry: Geometry
) -> None:
    """Fill w (samples, blocks of the chunk, n) from the sample ``first`` on."""
    samples, _, n = w.shape
    columns = chunk.channels * n
    tile = 64 if x.tensor.dtype != torch.float64 else 32
    column_tile = 16 if columns <= 16 else tile
    # 64 rows of 16 columns need more registers on sm_80 than a thread gets.
    row_tile = 1 if chunk.rows == 1 else 16 if chunk.rows <= 16 else min(tile, 2 * column_tile)
    positions = 2048 // column_tile if row_tile == 1 else 32
    programs = samples * chunk.groups * triton.cdiv(chunk.rows, row_tile) * triton.cdiv(columns, column_tile)
    launch(
        gradient_kernel, programs, w.device,
        w, x.part(first, chunk.group * channels + chunk.channel), grad.part(first, chunk.group * rows + chunk.row),
        chunk.groups, chunk.rows, columns,
        x.sample, channels * x.channel, x.channel, x.position,
        grad.sample, rows * grad.channel, grad.channel, grad.position,
        *geometry.arguments(),
        A=WIDE[x.tensor.dtype], ROWS=row_tile, COLUMNS=column_tile, POSITIONS=positions, warps=_WARPS,
    )  # fmt: skip


def conv_gram(c: Any) -> None:
    """Write decay * out + gain * the sum over samples, for each output channel and input channel of its group.

    Args:
        c: the arguments of the op by their names: out contiguous, each sample of x and grad_output in the order (C, *S)
            or (*S, C), padding (before, after) of each spatial dimension.
    """
    out, groups, samples = c.out, c.groups, len(c.x)
    rows, channels, n = out.shape[0] // groups, out.shape[1], out.shape[2]
    if out.numel() == 0:
        return
    geometry = Geometry(
        three(c.x.shape[2:], 1), three(c.grad_output.shape[2:], 1), three(c.kernel_size, 1), three(c.stride, 1),
        three(c.padding[::2], 0), three(c.dilation, 1),
    )  # fmt: skip
    blocks_of = out.view(-1, n, n)
    run, held, chunks = plan(samples, groups, rows, channels, n, out.dtype)
    most = max(chunk.groups * chunk.rows * chunk.channels for chunk in chunks)
    workspace = out.new_empty(held * most * n)
    inputs, outputs = channels_of(c.x), channels_of(c.grad_output)
    for chunk in chunks:
        blocks = chunk.groups * chunk.rows * chunk.channels
        to = blocks_of[(chunk.group * rows + chunk.row) * channels + chunk.channel :]
        places = chunk.channels, channels
        w = workspace[: held * blocks * n].view(held, blocks, n)
        if samples == held:
            _make_gradients(w, inputs, outputs, 0, chunk, rows, channels, geometry)
            gram(to, w, c.decay, c.gain, places)
            continue
        partials = out.new_empty((-(-samples // run), blocks * partial_size(n, out.dtype)))
        for first in range(0, samples, held):
            some = w[: samples - first]
            _make_gradients(some, inputs, outputs, first, chunk, rows, channels, geometry)
            sum_runs(partials[first // run :], some, run)
        add_runs(to, partials, blocks, n, out.dtype, places, c.decay, c.gain)
