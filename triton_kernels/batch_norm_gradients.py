"""Gradients of a batch normalisation's scale and shift by samples.

x and grad_output are read once, and x once more before that for its mean, where none is given.
That mean, the pivot, need not be exact: with d = x - pivot the sums of d tell what it missed (Chan, Golub and LeVeque's
corrected two-pass algorithm), and nothing cancels.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import launch
from ._lists import WIDE
from ._partial_sums import add_rows

_TILE = 1024  # numbers of x, and as many of grad_output, that a program reads at a time
_ROUNDS = tl.constexpr(8)  # tiles along the positions that it adds up
_CHANNELS = 32  # side by side, of channels_last samples
_POSITIONS = (512, 64, 8)  # of a tile of contiguous samples: the first that is not much longer than the run
_LAST_POSITIONS = (32, 8, 1)  # the same for channels_last
_FINISHED = 1024


@triton.jit
def _add_tile(x, grad, sums, mask, pivot, GRAD: tl.constexpr, OWN: tl.constexpr):
    """Add the elements at some addresses, [ROWS, POSITIONS, CHANNELS], to the sums of g, g * d, d and d^2."""
    gradients, products, distances, squares = sums
    A: tl.constexpr = pivot.dtype
    if mask is None:
        d = tl.load(x).to(A) - pivot
    else:
        d = tl.where(mask, tl.load(x, mask, 0).to(A) - pivot, 0)
    if GRAD:
        g = tl.load(grad, mask).to(A) if mask is None else tl.load(grad, mask, 0).to(A)
        gradients += g
        products += g * d
    if OWN:
        distances += d
        if GRAD:
            squares += d * d
    return gradients, products, distances, squares


@triton.jit
def _offsets(channel, block, first, s, lanes, step, LAST: tl.constexpr, POSITIONS: tl.constexpr):
    """Where in a sample a tile begins to be read, what is side by side, and how far the next tile lies."""
    if LAST:
        at, across, jump = (first + s) * step + block, lanes, POSITIONS * step
    else:
        at, across, jump = (channel * step + first)[:, :, None], s, tl.full((), POSITIONS, tl.int64)
    return at, across, jump


@triton.jit(do_not_specialize=["samples", "channels", "size", "x_stride", "grad_stride"])
def _sum_samples(
    x,
    grad,
    mean,  # [channels], or None for 0
    of_samples,  # [2, pieces, samples, channels]: sums of g and g * d
    of_channels,  # [pieces, samples, 2, channels]: sums of d and d^2, or [pieces, samples, channels] of d without GRAD
    samples: tl.int64,
    channels: tl.int64,
    size: tl.int64,  # positions
    x_stride: tl.int64,  # from sample to sample
    grad_stride: tl.int64,
    A: tl.constexpr,
    GRAD: tl.constexpr,
    OWN: tl.constexpr,
    LAST: tl.constexpr,  # a row is a sample with channels side by side, else a channel of a sample
    ROWS: tl.constexpr,
    POSITIONS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """Sums over a piece of the positions, for some rows."""
    V: tl.constexpr = 16  # elements: 16 bytes or more
    rows = samples if LAST else samples * channels
    row_tiles = tl.cdiv(rows, ROWS)
    pieces = tl.cdiv(size, POSITIONS * _ROUNDS)
    program = tl.program_id(0).to(tl.int64)
    row = program % row_tiles * ROWS + tl.arange(0, ROWS)
    piece = program // row_tiles % pieces
    first = piece * POSITIONS * _ROUNDS
    left = tl.minimum(size - first, POSITIONS * _ROUNDS).to(tl.int32)
    s, lanes = tl.arange(0, POSITIONS)[None, :, None], tl.arange(0, CHANNELS)[None, None, :]
    if LAST:
        block = program // row_tiles // pieces * CHANNELS
        sample, channel = row, block + tl.arange(0, CHANNELS)[None, :]  # [ROWS], [1, CHANNELS]
        full_channels = block + CHANNELS <= channels
    else:
        block = tl.zeros_like(program)
        sample, channel = row // channels, (row % channels)[:, None]
        full_channels = rows > 0
    live = (row < rows)[:, None] & (channel < channels)  # [ROWS, CHANNELS]
    pivot = tl.zeros_like(live.to(A))[:, None, :]
    if mean is not None:
        pivot += tl.load(mean + channel, live, 0)[:, None, :]
    zeros = tl.zeros((ROWS, POSITIONS, CHANNELS), A)
    sums = zeros, zeros, zeros, zeros
    whole = (program % row_tiles * ROWS + ROWS <= rows) & full_channels & (left % POSITIONS == 0)
    step = channels if LAST else size
    if whole & (step % V == 0) & (x_stride % V == 0) & (grad_stride % V == 0):
        # No mask, and strides that are known to be multiples of 16.
        wide = step // V * V
        at, across, jump = _offsets(channel, block, first, s, lanes, wide, LAST, POSITIONS)
        xs = x + (sample[:, None, None] * (x_stride // V * V) + at)
        gs = grad + (sample[:, None, None] * (grad_stride // V * V) + at)
        for _ in range(0, left, POSITIONS):
            sums = _add_tile(xs + across, gs + across, sums, None, pivot, GRAD, OWN)
            xs += jump
            gs += jump
    else:
        at, across, jump = _offsets(channel, block, first, s, lanes, step, LAST, POSITIONS)
        xs = x + (sample[:, None, None] * x_stride + at)
        gs = grad + (sample[:, None, None] * grad_stride + at)
        for done in range(0, left, POSITIONS):
            mask = live[:, None, :] & (done + s < left)
            sums = _add_tile(xs + across, gs + across, sums, mask, pivot, GRAD, OWN)
            xs += jump
            gs += jump
    gradients, products, distances, squares = sums
    line = piece * samples + sample[:, None]  # [ROWS, 1]
    if GRAD:
        into = of_samples + line * channels + channel
        tl.store(into, tl.sum(gradients, 1), live)
        tl.store(into + pieces * samples * channels, tl.sum(products, 1), live)
        if OWN:
            into = of_channels + 2 * line * channels + channel
            tl.store(into, tl.sum(distances, 1), live)
            tl.store(into + channels, tl.sum(squares, 1), live)
    else:
        tl.store(of_channels + line * channels + channel, tl.sum(distances, 1), live)


@triton.jit(do_not_specialize=["count", "channels", "pieces", "numbers", "eps"])
def _finish(
    of_samples,  # [2, pieces, count]: sums of g and g * d
    of_channels,  # [2, channels] in float64: sums of d and d^2, or None
    variance,  # [channels], or None
    scale,  # [count]
    shift,
    count: tl.int64,  # samples * channels
    channels: tl.int64,
    pieces: tl.int64,
    numbers: tl.float64,  # of x in a channel
    eps: tl.float64,
    BLOCK: tl.constexpr,
):
    """The gradients from all sums."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    there = i < count
    channel = i % channels
    gradient, product = tl.zeros((BLOCK,), tl.float64), tl.zeros((BLOCK,), tl.float64)
    for piece in range(pieces.to(tl.int32)):
        at = of_samples + piece * count + i
        gradient += tl.load(at, there, 0).to(tl.float64)
        product += tl.load(at + pieces * count, there, 0).to(tl.float64)
    if variance is None:
        rest = tl.load(of_channels + channel, there, 0) / numbers  # of the mean, beyond the pivot
        centred = tl.load(of_channels + channels + channel, there, 1) / numbers - rest * rest
        own = tl.where(centred < 0, 0, centred)  # a NaN stays one
        # An infinite gradient stays one.
        product -= tl.where(gradient - gradient == 0, rest * gradient, 0)
    else:
        own = tl.load(variance + channel, there, 1).to(tl.float64)
    tl.store(shift + i, gradient.to(shift.dtype.element_ty), there)
    tl.store(scale + i, (product / tl.sqrt(own + eps)).to(scale.dtype.element_ty), there)


def _tile(size: int, channels_last: bool) -> tuple[int, int, int]:
    """Rows, positions and channels of a tile."""
    sizes = _LAST_POSITIONS if channels_last else _POSITIONS
    positions = next((n for n in sizes if 2 * size >= n), sizes[-1])
    channels = _CHANNELS if channels_last else 1
    return _TILE // (positions * channels), positions, channels


def batch_norm_gradients(
    x: Tensor,
    grad_output: Tensor,
    channels_last: bool,
    eps: float,
    mean: Tensor | None,
    variance: Tensor | None,
    scale: Tensor,
    shift: Tensor,
) -> None:
    """Write the gradients of scale and shift by samples.

    Args:
        x, grad_output: (N, C, *S) with elements, the samples of both contiguous or those of both channels_last in
            memory, any number of elements apart.
        mean, variance: (C,) contiguous, in the dtype of the results; or None for those of x.
        scale, shift: (N, C), contiguous, in float64 if x and grad_output are, else in float32.
    """
    samples, channels = x.shape[:2]
    count, device = samples * channels, x.device
    size = x.numel() // count
    side_by_side = channels_last or size == 1
    rows, positions, width = _tile(size, side_by_side)
    pieces = triton.cdiv(size, positions * _ROUNDS.value)
    programs = pieces * (
        triton.cdiv(samples, rows) * triton.cdiv(channels, width) if side_by_side else triton.cdiv(count, rows)
    )
    own = mean is None

    def workspace(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=scale.dtype, device=device)

    def sum_samples(pivot: Tensor | None, of_samples: Tensor | None, of_channels: Tensor | None) -> None:
        launch(
            _sum_samples, programs, device,
            x, grad_output, pivot, of_samples, of_channels,
            samples, channels, size, x.stride(0), grad_output.stride(0),
            A=WIDE[scale.dtype], GRAD=of_samples is not None, OWN=of_channels is not None, LAST=side_by_side,
            ROWS=rows, POSITIONS=positions, CHANNELS=width,
        )  # fmt: skip

    pivot, of_channels, sums = mean, None, None
    if own:
        of_mean = workspace(pieces * samples, channels)
        sum_samples(None, None, of_mean)
        pivot = add_rows(of_mean, workspace(channels), divisor=float(samples * size))
        of_channels = workspace(pieces * samples, 2 * channels)
    of_samples = workspace(2, pieces, count)
    sum_samples(pivot, of_samples, of_channels)
    if of_channels is not None:
        sums = add_rows(of_channels, torch.empty(2 * channels, dtype=torch.float64, device=device))
    launch(
        _finish, triton.cdiv(count, _FINISHED), device,
        of_samples, sums, variance, scale, shift, count, channels, pieces, float(samples * size), eps, BLOCK=_FINISHED,
    )  # fmt: skip
