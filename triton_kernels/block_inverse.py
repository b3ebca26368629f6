"""Inverses and solutions of many small damped blocks: each number is read once and each result written once.

A block is worked on in registers, by sweeps (Gauss-Jordan elimination without pivots, which positive definite blocks do
not need). Every sum over a mask that follows has one term, so that no size of a tile changes a bit.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._language import divide
from ._launch import INTERPRETED, launch

LARGEST = 64
"""Blocks of up to this size are worked on here."""

# Up to this size a thread has a block of its own. Its code is unrolled, and a block has to fit into the registers.
_ONE_THREAD = {torch.float32: 9, torch.float64: 8}
# Up to this size quotients are corrected by what rounding took from them: a few instructions make each number of an
# inverse of two rows exact to a few roundings, whatever the condition. Of larger blocks other roundings cost as much.
_LARGEST_CORRECTED = 3
_LANES = 64 if torch.version.hip else 32  # threads of a warp
# Larger blocks share a warp or more: size of the tile -> blocks of a program, warps.
_SHARED = {16: (4, 1), 32: (1, 1), 64: (1, 4)}
_INTERPRETED_BLOCKS = 32  # at most: what the interpreter takes for a program depends on their number but little


@triton.jit
def _pick(x, mask, axis: tl.constexpr):
    """The one element along an axis that a mask selects; as bits, so that masks known in advance leave no code."""
    if x.dtype == tl.float64:
        bits = x.to(tl.int64, bitcast=True)
    else:
        bits = x.to(tl.int32, bitcast=True)
    return tl.sum(tl.where(mask, bits, 0), axis).to(x.dtype, bitcast=True)


@triton.jit
def _all_finite(x):
    """Which blocks are finite: [rows, columns, blocks] -> [blocks]."""
    return tl.max(tl.max((~(tl.abs(x) < float("inf"))).to(tl.int32), 0), 0) == 0


@triton.jit
def _to_threads(x, BLOCKS: tl.constexpr, P: tl.constexpr):
    """A row of each block, [blocks, columns], as [columns, blocks] with a block in each thread.

    Loads spread a row over threads. Taking its two halves apart and together again changes nothing, but Triton does
    that only with the columns in the registers of one thread, and keeps them there in what follows.
    """
    if P == 1:
        turned = tl.trans(x)
    else:
        even, odd = tl.split(tl.permute(tl.reshape(x, (BLOCKS, P // 2, 2)), (1, 0, 2)))
        turned = tl.reshape(tl.permute(tl.join(even, odd), (0, 2, 1)), (P, BLOCKS))
    return turned


@triton.jit
def _damped(a, i, j, damping):
    """What is inverted, by the lower triangle, 0 where it is not finite; and which are finite."""
    finite = _all_finite(a)
    a = tl.where(finite[None, None, :], tl.where(i >= j, a, tl.permute(a, (1, 0, 2))), 0.0)
    return tl.where(i == j, a + damping, a), finite


@triton.jit
def _sweep(a, x, good, k, i, j, column, SOLVE: tl.constexpr, CORRECTED: tl.constexpr):
    """Sweep over pivot k: afterwards -a is the inverse in the rows and columns swept, and x solves for those.

    With c = row k, d = c_k and r = c / d: a_ij - c_i r_j, but r in row and column k, and -1 / d where they meet.
    """
    at_pivot = column == k
    c = _pick(a, i == k, 0)  # [columns, blocks]
    d = _pick(c, at_pivot, 0)
    good = good & (d > 0) & (d < float("inf"))
    d = tl.where(good, d, 1.0)
    c = tl.where(at_pivot, -1.0, c)
    wide_d = tl.broadcast_to(d[None, :], c.shape)
    r = divide(c, wide_d)
    a = tl.where((i == k) | (j == k), 0.0, a)
    if CORRECTED:
        rest = divide(tl.fma(-r, wide_d, c), wide_d)  # what rounding took
        a = tl.fma(-c[:, None, :], r[None, :, :], a) - c[:, None, :] * rest[None, :, :]
    else:
        a = a - c[:, None, :] * r[None, :, :]
    if SOLVE:
        pivot = _pick(x, at_pivot, 0)
        x = tl.where(at_pivot, 0.0, x) - pivot[None, :] * r
    return a, x, good


@triton.jit
def _finished(a, good, i, j):
    """The inverses, symmetric to the bit, and which are of use."""
    inverse = 0.0 - tl.where(i >= j, a, tl.permute(a, (1, 0, 2)))
    return inverse, good & _all_finite(inverse)


@triton.jit
def _solved(x, good):
    """The solutions, NaN where they are of no use, and which are: [columns, blocks]."""
    good = good & _all_finite(x[None, :, :])
    return tl.where(good[None, :], x, float("nan")), good


@triton.jit
def one_thread_kernel(
    blocks,  # [count, N, N]
    rhs,  # [count, N] where SOLVE
    out,  # [count, N, N], or [count, N] where SOLVE
    info,  # [count]
    count: tl.int64,
    damping: tl.float64,
    N: tl.constexpr,
    P: tl.constexpr,
    BLOCKS: tl.constexpr,
    SOLVE: tl.constexpr,
    KEEP: tl.constexpr,
    CORRECTED: tl.constexpr,
):
    """A block in each thread; rows of all of them are loaded and stored together, in the order of memory."""
    first = tl.program_id(0).to(tl.int64) * BLOCKS
    left = tl.minimum(count - first, BLOCKS).to(tl.int32)
    block, column = tl.arange(0, BLOCKS), tl.arange(0, P)
    i, j = column[:, None, None], column[None, :, None]
    there = (block < left)[:, None] & (column < N)[None, :]
    at = block[:, None] * (N * N) + column[None, :]
    T: tl.constexpr = blocks.dtype.element_ty

    a = tl.zeros((P, P, BLOCKS), T)
    for row in tl.static_range(N):
        entries = tl.load(blocks + first * (N * N) + row * N + at, there, 0.0)
        a = tl.where(i == row, _to_threads(entries, BLOCKS, P)[None, :, :], a)
    x = tl.zeros((P, BLOCKS), T)
    vector = first * N + block[:, None] * N + column[None, :]
    if SOLVE:
        x = _to_threads(tl.load(rhs + vector, there, 0.0), BLOCKS, P)
    a, good = _damped(a, i, j, tl.full((), damping, T))
    if SOLVE:
        good = good & _all_finite(x[None, :, :])
        x = tl.where(good[None, :], x, 0.0)
    for k in tl.static_range(N):
        a, x, good = _sweep(a, x, good, k, i, j, column[:, None], SOLVE, CORRECTED)
    if SOLVE:
        x, good = _solved(x, good)
        tl.store(out + vector, tl.trans(x), there)
    else:
        inverse, good = _finished(a, good, i, j)
        inverse = tl.where(good[None, None, :], inverse, float("nan"))
        if KEEP:
            there &= good[:, None]
        for row in tl.static_range(N):
            entries = tl.trans(_pick(inverse, i == row, 0))
            tl.store(out + first * (N * N) + row * N + at, entries, there)
    tl.store(info + first + block, (~good).to(tl.int64), block < left)


@triton.jit(do_not_specialize=["n"])
def shared_kernel(
    blocks,  # [count, n, n]
    rhs,  # [count, n] where SOLVE
    out,  # [count, n, n], or [count, n] where SOLVE
    info,  # [count]
    count: tl.int64,
    n,
    damping: tl.float64,
    P: tl.constexpr,
    BLOCKS: tl.constexpr,
    SOLVE: tl.constexpr,
    KEEP: tl.constexpr,
):
    """Some blocks, each in a tile of P x P that the threads share: n from P / 2 to P."""
    first = tl.program_id(0).to(tl.int64) * BLOCKS
    left = tl.minimum(count - first, BLOCKS).to(tl.int32)
    block, column = tl.arange(0, BLOCKS), tl.arange(0, P)
    i, j = column[:, None, None], column[None, :, None]
    there = (i < n) & (j < n) & (block < left)[None, None, :]
    at = block[None, None, :] * (n * n) + i * n + j
    T: tl.constexpr = blocks.dtype.element_ty

    start = first * (n * n)
    a = tl.load(blocks + start + at, there, 0.0)
    x = tl.zeros((P, BLOCKS), T)
    vector = first * n + block[None, :] * n + column[:, None]
    of_block = (column < n)[:, None] & (block < left)[None, :]
    if SOLVE:
        x = tl.load(rhs + vector, of_block, 0.0)
    a, good = _damped(a, i, j, tl.full((), damping, T))
    if SOLVE:
        good = good & _all_finite(x[None, :, :])
        x = tl.where(good[None, :], x, 0.0)
    for k in range(n):
        a, x, good = _sweep(a, x, good, k, i, j, column[:, None], SOLVE, False)
    if SOLVE:
        x, good = _solved(x, good)
        tl.store(out + vector, x, of_block)
    else:
        inverse, good = _finished(a, good, i, j)
        inverse = tl.where(good[None, None, :], inverse, float("nan"))
        if KEEP:
            there &= good[None, None, :]
        tl.store(out + start + at, inverse, there)
    tl.store(info + first + block, (~good).to(tl.int64), block < left)


def _run(blocks: Tensor, rhs: Tensor | None, out: Tensor, info: Tensor, damping: float, keep: bool) -> None:
    count, n = blocks.shape[:2]
    if n == 0 or count == 0:
        info.zero_()
        return
    tile = triton.next_power_of_2(n)
    constants = {"P": tile, "SOLVE": rhs is not None, "KEEP": keep}
    if n <= _ONE_THREAD[blocks.dtype]:
        launch(
            one_thread_kernel, triton.cdiv(count, _LANES), blocks.device,
            blocks, rhs, out, info, count, damping,
            N=n, BLOCKS=_LANES, CORRECTED=n <= _LARGEST_CORRECTED, warps=1, **constants,
        )  # fmt: skip
        return
    some, warps = _SHARED[tile]
    if INTERPRETED:
        some = min(triton.next_power_of_2(count), _INTERPRETED_BLOCKS)
    launch(
        shared_kernel, triton.cdiv(count, some), blocks.device,
        blocks, rhs, out, info, count, n, damping,
        BLOCKS=some, warps=warps, **constants,
    )  # fmt: skip


def inverse(blocks: Tensor, damping: float, out: Tensor, info: Tensor) -> None:
    """The inverses of contiguous blocks, NaN where there is none."""
    _run(blocks, None, out, info, damping, False)


def inverse_(out: Tensor, blocks: Tensor, damping: float, info: Tensor) -> None:
    """The same where there is an inverse; elsewhere ``out`` stays as it is."""
    _run(blocks, None, out, info, damping, True)


def solve(blocks: Tensor, damping: float, rhs: Tensor, x: Tensor, info: Tensor) -> None:
    """The solutions, NaN where there is none."""
    _run(blocks, rhs, x, info, damping, False)
