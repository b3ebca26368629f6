"""What each offset of a sliding window reads of an image that is read once.

Offset k reads position p if window ``(p + before - k * dilation) / stride`` is there, in each dimension: a box of
positions, so that a tile is summed over its width for each offset in that dimension, and what is left over the lines.
"""

from collections.abc import Sequence
from math import prod

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import launch
from ._partial_sums import add_rows

_OFFSETS = 4  # in depth and height, side by side
# Lines, positions in a line and channels of a tile, by whether channels are last and whether there is one line only.
_TILES = {
    (False, False): (32, 32, 4),
    (False, True): (1, 1024, 4),
    (True, False): (8, 16, 16),
    (True, True): (1, 128, 16),
}


@triton.jit
def _is_read(position, offset, before, stride, dilation, outputs):
    """Whether a kernel offset reads a position in one of its windows."""
    shift = position + before - offset * dilation
    return (shift >= 0) & (shift % stride == 0) & (shift < outputs * stride)


@triton.jit(
    do_not_specialize=[
        "channels", "height", "lines", "width",
        "depth_kernel", "depth_before", "depth_stride", "depth_dilation", "depth_outputs",
        "height_kernel", "height_before", "height_stride", "height_dilation", "height_outputs",
        "width_kernel", "width_before", "width_stride", "width_dilation", "width_outputs",
    ]
)  # fmt: skip
def _add_windows(
    x,  # [channels, lines, width], or [lines, width, channels] with channels last
    out,  # [tiles, channels, kernel]
    channels: tl.int64,
    height: tl.int64,
    lines: tl.int64,  # depth * height
    width: tl.int64,
    depth_kernel: tl.int64,
    depth_before: tl.int64,
    depth_stride: tl.int64,
    depth_dilation: tl.int64,
    depth_outputs: tl.int64,
    height_kernel: tl.int64,
    height_before: tl.int64,
    height_stride: tl.int64,
    height_dilation: tl.int64,
    height_outputs: tl.int64,
    width_kernel: tl.int64,
    width_before: tl.int64,
    width_stride: tl.int64,
    width_dilation: tl.int64,
    width_outputs: tl.int64,
    LAST: tl.constexpr,
    LINES: tl.constexpr,
    WIDTH: tl.constexpr,
    CHANNELS: tl.constexpr,
    OFFSETS: tl.constexpr,
):
    """A tile of some channels of the image."""
    across = tl.cdiv(width, WIDTH)
    tiles = tl.cdiv(lines, LINES) * across
    program = tl.program_id(0).to(tl.int64)
    tile = program % tiles
    line = tile // across * LINES + tl.arange(0, LINES)
    column = tile % across * WIDTH + tl.arange(0, WIDTH)
    channel = program // tiles * CHANNELS + tl.arange(0, CHANNELS)

    positions = line[:, None, None] * width + column[None, :, None]
    there = (line < lines)[:, None, None] & (column < width)[None, :, None] & (channel < channels)[None, None, :]
    if LAST:
        at = positions * channels + channel[None, None, :]
    else:
        at = channel[None, None, :] * (lines * width) + positions
    values = tl.load(x + at, there, 0)  # [LINES, WIDTH, CHANNELS]

    offsets = depth_kernel * height_kernel
    into = out + (tile * channels + channel[None, :]) * (offsets * width_kernel)  # [1, CHANNELS]
    for first in range(0, offsets.to(tl.int32), OFFSETS):
        offset = first + tl.arange(0, OFFSETS)
        read_lines = (
            _is_read(
                (line // height)[:, None], (offset // height_kernel)[None, :],
                depth_before, depth_stride, depth_dilation, depth_outputs,
            )
            & _is_read(
                (line % height)[:, None], (offset % height_kernel)[None, :],
                height_before, height_stride, height_dilation, height_outputs,
            )
        )  # [LINES, OFFSETS]  # fmt: skip
        wanted = (offset < offsets)[:, None] & (channel < channels)[None, :]
        for k in range(width_kernel.to(tl.int32)):
            read = _is_read(column, k, width_before, width_stride, width_dilation, width_outputs)
            # Never a product with 0: an infinity stays where it is read.
            sums = tl.sum(tl.where(read[None, :, None], values, 0), 1)  # [LINES, CHANNELS]
            totals = tl.sum(tl.where(read_lines[:, :, None], sums[:, None, :], 0), 0)  # [OFFSETS, CHANNELS]
            tl.store(into + offset[:, None] * width_kernel + k, totals, wanted)


def add_windows(
    x: Tensor,
    shape: Sequence[int],
    channels_last: bool,
    kernel: Sequence[int],
    stride: Sequence[int],
    before: Sequence[int],
    dilation: Sequence[int],
    outputs: Sequence[int],
    out: Tensor,
) -> Tensor:
    """``out[c, k] = sum_l x_padded[c, l * stride + k * dilation]``.

    Args:
        x: an image in float32 or float64.
        shape: (C, *S) with up to three spatial dimensions; in memory in that order, or with the channels last.
        before: zeros before x in each dimension.
        outputs: windows l in each dimension.
        out: (C, *kernel), contiguous.

    Returns:
        out.
    """
    channels, *sizes = shape
    depth, height, width = *[1] * (3 - len(sizes)), *sizes
    geometry = [(1, 0, 1, 1, 1)] * (3 - len(sizes)) + list(zip(kernel, before, stride, dilation, outputs, strict=True))
    lines = depth * height
    tile_lines, tile_width, tile_channels = _TILES[channels_last, lines == 1]
    tiles = triton.cdiv(lines, tile_lines) * triton.cdiv(width, tile_width)
    into = out if tiles == 1 else torch.empty(tiles, channels * prod(kernel), dtype=x.dtype, device=x.device)
    launch(
        _add_windows, tiles * triton.cdiv(channels, tile_channels), x.device,
        x, into, channels, height, lines, width, *geometry[0], *geometry[1], *geometry[2],
        LAST=channels_last, LINES=tile_lines, WIDTH=tile_width, CHANNELS=tile_channels, OFFSETS=_OFFSETS,
    )  # fmt: skip
    return out if tiles == 1 else add_rows(into, out)
