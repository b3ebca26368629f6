"""Sums of outer products of many small vectors, block by block: v is read once, in order, and sums stay in registers.

Small blocks: a warp's row of 32 lanes holds as many whole neighbours as fit, one entry a lane, as they lie in memory.
Turning a block's lanes by d puts entry (i + d) mod n beside entry i, so that the turns 0 ... n // 2 make every product
of two entries once. Larger blocks are matrix products over samples, tile by tile of the lower triangle.

Samples are summed in runs, and the sums of runs one after the other, so that a block's sum follows from its vectors and
their number alone. Where blocks are few, runs are summed by programs of their own, and added by a second kernel.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._language import divmod_from
from ._launch import INTERPRETED, launch
from ._lists import WIDE

_LANES = tl.constexpr(32)
_ROWS = tl.constexpr(16)  # rows of lanes that a program works on, four a warp
_UNROLL = tl.constexpr(4)  # samples whose loads are under way together
_STEP = tl.constexpr(32)  # samples of one matrix product
_WARPS = 4
_INTERPRETED = tl.constexpr(INTERPRETED)

_RUN = 32  # samples, but
_MOST_RUNS = 64  # runs are longer where there would be more of them
_MANY = 512  # programs that keep a GPU busy: below that, runs are summed apart
_SMALL = 16  # largest block of one lane an entry

# Sizes and steps take one form whatever they are, lest the first batch of another size compile anew.
_VARYING = ["out", "partials", "samples", "sample_stride", "run", "parts", "blocks", "n", "width", "pitch"]


@triton.jit
def _average(lower, upper, total, mask, decay, gain):
    """Write decay * old + gain * total at an address and its mirror image; without decay nothing is read."""
    new = gain * total
    if decay != 0:
        new += decay * tl.load(lower, mask, 0.0)
    tl.store(lower, new, mask)
    tl.store(upper, new, mask)


@triton.jit
def _first_block(n):
    return tl.program_id(0).to(tl.int64) * (_ROWS * (_LANES // n))


@triton.jit
def _entries(blocks, n):
    """Lane, its entry in its block, its place after the program's first entry, and whether there is one: [ROWS, LANES].

    A row holds the entries of as many whole blocks as fit.
    """
    lane = tl.arange(0, _LANES)[None, :] + tl.zeros((_ROWS, _LANES), tl.int32)
    used = _LANES // n * n
    place = tl.arange(0, _ROWS)[:, None] * used + lane
    left = tl.minimum(blocks - _first_block(n), _ROWS * _LANES).to(tl.int32)
    return lane, lane % n, place, (lane < used) & (place < left * n)


@triton.jit
def _turned(lane, entry, mask, n, TURNS: tl.constexpr):
    """The lane that each turn of a block's entries puts beside a lane, and whether this pair is new: [TURNS, ...]."""
    turn = tl.arange(0, TURNS)[:, None, None] + 1
    beside = (entry[None] + turn) % n
    twice = (2 * turn == n) & (entry[None] >= turn)  # half a turn meets every pair from both sides
    is_new = mask[None] & (2 * turn <= n) & ~twice
    return tl.where(mask[None], lane[None] - entry[None] + beside, lane[None]), beside, is_new


@triton.jit
def _sum_run(v, sample_stride, first, last, mask, partner, A: tl.constexpr, TURNS: tl.constexpr):
    """Squares of entries [ROWS, LANES] and products with their partners [TURNS, ROWS, LANES], over some samples."""
    squares = tl.zeros((_ROWS, _LANES), A)
    products = tl.zeros((TURNS, _ROWS, _LANES), A)
    end = tl.where(mask, last, 0)
    for sample in range(first, last, _UNROLL):
        for k in tl.static_range(_UNROLL):
            here = (sample + k) * sample_stride.to(tl.int64)
            x = tl.load(v + here, sample + k < end, 0.0).to(A)
            squares += x * x
            wide = tl.broadcast_to(x[None], (TURNS, _ROWS, _LANES))
            products += wide * tl.gather(wide, partner, 2)
    return squares, products


@triton.jit
def _write_blocks(out, squares, products, entry, beside, place, mask, is_new, n, width, pitch, decay, gain):
    """Average the totals into the blocks of out."""
    first = _first_block(n)
    down, along = divmod_from(first % width, place // n, width)
    corner = out + ((first // width + down) * pitch + along) * n * n
    diagonal = corner + entry * (n + 1)
    _average(diagonal, diagonal, squares, mask, decay, gain)
    row, column = tl.maximum(entry[None], beside), tl.minimum(entry[None], beside)
    _average(corner[None] + row * n + column, corner[None] + column * n + row, products, is_new, decay, gain)


@triton.jit
def _partial(partials, part, blocks, n, place, TURNS: tl.constexpr):
    """Where the sums of a run lie: squares [ROWS, LANES], then products [TURNS, ROWS, LANES]."""
    size = blocks.to(tl.int64) * n
    squares = partials + part * (TURNS + 1) * size + _first_block(n) * n + place
    return squares, squares[None] + (tl.arange(0, TURNS)[:, None, None] + 1) * size


@triton.jit(do_not_specialize=_VARYING)
def small_kernel(
    out,
    partials,  # [runs, 1 + TURNS, blocks * n]
    v,  # [samples, blocks, n]
    samples,
    sample_stride: tl.int64,
    run,
    blocks: tl.int64,
    n,
    width: tl.int64,  # block b of v is block b // width * pitch + b % width of out
    pitch: tl.int64,
    decay: tl.float64,
    gain: tl.float64,
    A: tl.constexpr,
    TURNS: tl.constexpr,
    APART: tl.constexpr,
):
    """The sums of a few blocks: of one run into partials where they are kept apart, else of all into out."""
    lane, entry, place, mask = _entries(blocks, n)
    partner, beside, is_new = _turned(lane, entry, mask, n, TURNS)
    entries = v + _first_block(n) * n + place
    if APART:
        first = tl.program_id(1) * run
        last = tl.minimum(first + run, samples)
        squares, products = _sum_run(entries, sample_stride, first, last, mask, partner, A, TURNS)
        to_squares, to_products = _partial(partials, tl.program_id(1), blocks, n, place, TURNS)
        tl.store(to_squares, squares, mask)
        tl.store(to_products, products, is_new)
    else:
        squares = tl.zeros((_ROWS, _LANES), A)
        products = tl.zeros((TURNS, _ROWS, _LANES), A)
        for first in range(0, samples, run):
            last = tl.minimum(first + run, samples)
            more_squares, more_products = _sum_run(entries, sample_stride, first, last, mask, partner, A, TURNS)
            squares += more_squares
            products += more_products
        d, g = tl.full((), decay, A), tl.full((), gain, A)
        _write_blocks(out, squares, products, entry, beside, place, mask, is_new, n, width, pitch, d, g)


@triton.jit(do_not_specialize=_VARYING)
def small_finish_kernel(
    out,
    partials,
    parts,
    blocks: tl.int64,
    n,
    width: tl.int64,
    pitch: tl.int64,
    decay: tl.float64,
    gain: tl.float64,
    A: tl.constexpr,
    TURNS: tl.constexpr,
):
    """Add up the runs of a few blocks, in order."""
    lane, entry, place, mask = _entries(blocks, n)
    _, beside, is_new = _turned(lane, entry, mask, n, TURNS)
    squares = tl.zeros((_ROWS, _LANES), A)
    products = tl.zeros((TURNS, _ROWS, _LANES), A)
    for part in range(parts):
        at_squares, at_products = _partial(partials, part, blocks, n, place, TURNS)
        squares += tl.load(at_squares, mask, 0.0)
        products += tl.load(at_products, is_new, 0.0)
    d, g = tl.full((), decay, A), tl.full((), gain, A)
    _write_blocks(out, squares, products, entry, beside, place, mask, is_new, n, width, pitch, d, g)


@triton.jit
def _tile(n, TILE: tl.constexpr):
    """Block, rows and columns of a program: one tile of a lower triangle, counted row by row."""
    edge = tl.cdiv(n, TILE)
    tiles = edge * (edge + 1) // 2
    program = tl.program_id(0).to(tl.int64)
    which = (program % tiles).to(tl.int32)
    down = ((tl.sqrt(8.0 * which.to(tl.float32) + 1) - 1) / 2).to(tl.int32)
    down -= (down * (down + 1) // 2 > which).to(tl.int32)  # a root that was rounded up, or down
    down += ((down + 1) * (down + 2) // 2 <= which).to(tl.int32)
    across = which - down * (down + 1) // 2
    lanes = tl.arange(0, TILE)
    return program // tiles, down * TILE + lanes, across * TILE + lanes


@triton.jit
def add_product(left, right, total, A: tl.constexpr):
    """total + left @ right, of sums in the dtype A."""
    if _INTERPRETED and left.dtype == tl.bfloat16:
        left, right = left.to(tl.float32), right.to(tl.float32)  # whose bits the interpreter takes for whole numbers
    return tl.dot(left, right, total, input_precision="ieee", out_dtype=A)


@triton.jit
def _multiply_run(v, sample_stride, first, last, rows, columns, n, A: tl.constexpr, TILE: tl.constexpr):
    """Products of entries [TILE, TILE], over some samples."""
    total = tl.zeros((TILE, TILE), A)
    for start in range(first, last, _STEP):
        sample = start + tl.arange(0, _STEP)
        here = v + sample.to(tl.int64)[:, None] * sample_stride
        inside = (sample < last)[:, None]
        left = tl.load(here + rows[None, :], inside & (rows < n)[None, :], 0.0)  # [STEP, TILE]
        right = tl.load(here + columns[None, :], inside & (columns < n)[None, :], 0.0)
        total = add_product(tl.trans(left), right, total, A)
    return total


@triton.jit
def _write_tile(out, total, block, rows, columns, n, width, pitch, decay, gain):
    """Average a tile of a lower triangle into out, and its mirror image."""
    corner = out + (block // width * pitch + block % width) * n * n
    row, column = rows.to(tl.int64)[:, None], columns.to(tl.int64)[None, :]
    mask = (row < n) & (column <= row)
    _average(corner + row * n + column, corner + column * n + row, total, mask, decay, gain)


@triton.jit
def _partial_tile(partials, part, block, blocks, rows, columns, n):
    """Where the sums of a run lie, and which of them there are."""
    row, column = rows.to(tl.int64)[:, None], columns.to(tl.int64)[None, :]
    at = ((part * blocks.to(tl.int64) + block) * n + row) * n + column
    return partials + at, (row < n) & (column <= row)


@triton.jit(do_not_specialize=_VARYING)
def large_kernel(
    out,
    partials,  # [runs, blocks, n, n]
    v,
    samples,
    sample_stride: tl.int64,
    run,
    blocks: tl.int64,
    n,
    width: tl.int64,
    pitch: tl.int64,
    decay: tl.float64,
    gain: tl.float64,
    A: tl.constexpr,
    TILE: tl.constexpr,
    APART: tl.constexpr,
):
    """As ``small_kernel``, for one tile of a larger block."""
    block, rows, columns = _tile(n, TILE)
    entries = v + block * n
    if APART:
        first = tl.program_id(1) * run
        last = tl.minimum(first + run, samples)
        total = _multiply_run(entries, sample_stride, first, last, rows, columns, n, A, TILE)
        to, mask = _partial_tile(partials, tl.program_id(1), block, blocks, rows, columns, n)
        tl.store(to, total, mask)
    else:
        total = tl.zeros((TILE, TILE), A)
        for first in range(0, samples, run):
            last = tl.minimum(first + run, samples)
            total += _multiply_run(entries, sample_stride, first, last, rows, columns, n, A, TILE)
        d, g = tl.full((), decay, A), tl.full((), gain, A)
        _write_tile(out, total, block, rows, columns, n, width, pitch, d, g)


@triton.jit(do_not_specialize=_VARYING)
def large_finish_kernel(
    out,
    partials,
    parts,
    blocks: tl.int64,
    n,
    width: tl.int64,
    pitch: tl.int64,
    decay: tl.float64,
    gain: tl.float64,
    A: tl.constexpr,
    TILE: tl.constexpr,
):
    """Add up the runs of one tile, in order."""
    block, rows, columns = _tile(n, TILE)
    total = tl.zeros((TILE, TILE), A)
    for part in range(parts):
        at, mask = _partial_tile(partials, part, block, blocks, rows, columns, n)
        total += tl.load(at, mask, 0.0)
    d, g = tl.full((), decay, A), tl.full((), gain, A)
    _write_tile(out, total, block, rows, columns, n, width, pitch, d, g)


class _Way(NamedTuple):
    """How blocks of one size are summed."""

    kernel: object
    finish: object
    programs: int
    constants: dict[str, Any]  # TURNS or TILE
    partial: int  # sums of a run for each block


def _way(blocks: int, n: int, dtype: torch.dtype) -> _Way:
    if n <= _SMALL:
        turns = triton.next_power_of_2(max(1, n // 2))
        programs = triton.cdiv(blocks, _ROWS.value * (_LANES.value // n))
        return _Way(small_kernel, small_finish_kernel, programs, {"TURNS": turns}, (1 + turns) * n)
    tile = 32 if n <= 32 or dtype == torch.float64 else 64
    edge = triton.cdiv(n, tile)
    return _Way(large_kernel, large_finish_kernel, blocks * edge * (edge + 1) // 2, {"TILE": tile}, n * n)


def run_length(samples: int) -> int:
    """Samples that are summed one after the other, of so many in all."""
    return _RUN * triton.cdiv(max(1, samples), _RUN * _MOST_RUNS)


def partial_size(n: int, dtype: torch.dtype) -> int:
    """Sums that a run of vectors has for each block."""
    return _way(1, n, dtype).partial


def sum_runs(partials: Tensor, v: Tensor, run: int) -> None:
    """Write the sums of each run of samples of v (N, B, n), of which each is contiguous: (runs, B * partial_size)."""
    samples, blocks, n = v.shape
    way = _way(blocks, n, v.dtype)
    launch(
        way.kernel, (way.programs, triton.cdiv(samples, run)), v.device,
        partials, partials, v, samples, v.stride(0), run, blocks, n, blocks, blocks, 0.0, 0.0,
        A=WIDE[v.dtype], APART=True, warps=_WARPS, **way.constants,
    )  # fmt: skip


def add_runs(
    out: Tensor, partials: Tensor, blocks: int, n: int, dtype: torch.dtype, places: tuple[int, int],
    decay: float, gain: float,
) -> None:  # fmt: skip
    """Write decay * out + gain * the sum of all runs of vectors of this dtype.

    Args:
        out: from the first block on.
        partials: as ``sum_runs`` wrote them.
        places: (width, pitch): block b is block b // width * pitch + b % width of out.
    """
    way = _way(blocks, n, dtype)
    launch(
        way.finish, way.programs, out.device,
        out, partials, len(partials), blocks, n, *places, decay, gain,
        A=WIDE[dtype], warps=_WARPS, **way.constants,
    )  # fmt: skip


def gram(out: Tensor, v: Tensor, decay: float, gain: float, places: tuple[int, int] | None = None) -> None:
    """Write decay * out + gain * the sum over samples of v (N, B, n), of which each is contiguous.

    Args:
        out: from the first block on.
        places: as for ``add_runs``; by default block b is block b.
    """
    samples, blocks, n = v.shape
    if blocks * n == 0:
        return
    places = places or (blocks, blocks)
    way, run = _way(blocks, n, v.dtype), run_length(samples)
    if way.programs < _MANY and samples > run:
        partials = out.new_empty((triton.cdiv(samples, run), blocks * way.partial))
        sum_runs(partials, v, run)
        add_runs(out, partials, blocks, n, v.dtype, places, decay, gain)
        return
    launch(
        way.kernel, way.programs, v.device,
        out, out, v, samples, v.stride(0), run, blocks, n, *places, decay, gain,
        A=WIDE[v.dtype], APART=False, warps=_WARPS, **way.constants,
    )  # fmt: skip
