"""Updates of inverses: blocks of up to 64 x 64 stay in registers, read and written once; small ones share a program."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._language import is_finite
from ._launch import launch
from ._lists import TYPES

LARGEST = 64
"""Rows of the largest block that is held in registers."""
_ENTRIES, _MOST_BLOCKS = 512, 32  # of a program, where blocks are not larger

# What becomes of a block.
_NOT_POSITIVE, _NOT_FINITE = tl.constexpr(1), tl.constexpr(2)


@triton.jit
def _judge(q, size, decay, gain, unit):
    """What is asked of every vector before its update, with q = u^T P u and size = n sum of u_i^2 P_ii; and den."""
    den = decay + gain * q
    # By how much rounding the entries of P moves q: each is at most the root of P_ii P_jj.
    noise = unit * size
    of_den = tl.abs(gain) * noise
    lost = (den <= of_den) | ((decay * q < den * noise) & (of_den > unit * unit * decay))
    finite = is_finite(den) & is_finite(noise)
    return tl.where(finite, tl.where(lost, _NOT_POSITIVE, 0), _NOT_FINITE), den


@triton.jit(do_not_specialize=["blocks", "vectors"])
def inverse_update(
    inverse,  # [blocks, N, N]
    u,  # [blocks, vectors, N]
    info,  # [blocks]
    blocks,
    vectors,
    decay: tl.float64,
    gain: tl.float64,
    unit: tl.float64,
    T: tl.constexpr,
    N: tl.constexpr,
    SIDE: tl.constexpr,  # N, rounded up to a power of two
    COUNT: tl.constexpr,  # blocks of a program
):
    """P <- (P - sum over j of sign(gain) w_j w_j^T) / decay, with w_j = sqrt(|gain| / den_j) v_j and v_j = P u_j."""
    first = tl.program_id(0).to(tl.int64) * COUNT
    block = tl.arange(0, COUNT)
    there = block < tl.minimum(blocks - first, COUNT)
    i = tl.arange(0, SIDE)
    row, column = i[None, :, None], i[None, None, :]
    inside = there[:, None, None] & (row < N) & (column < N)
    on_diagonal = (row == column) & (row < N)
    in_vector = there[:, None] & (i < N)[None, :]

    entries = inverse + first * (N * N) + (block[:, None, None] * (N * N) + row * N + column)
    p = tl.load(entries, inside, 0)  # [COUNT, SIDE, SIDE]
    diagonal = tl.sum(tl.where(on_diagonal, p, 0), 1)  # [COUNT, SIDE]
    size = diagonal  # of it: at first, or what it has grown to
    status = tl.zeros((COUNT,), tl.int32)
    d, g = tl.full((), decay, tl.float64), tl.full((), gain, tl.float64)
    roundoff = tl.full((), unit, tl.float64)
    sign = tl.where(gain < 0, -1.0, 1.0).to(T)
    of_block = u + first * vectors * N + block.to(tl.int64)[:, None] * vectors * N + i[None, :]
    for _ in range(vectors):
        x = tl.load(of_block, in_vector, 0)
        v = tl.sum(p * x[:, :, None], 1)  # the sum of rows, P being symmetric
        q = tl.sum(x * v, 1)
        fault, den = _judge(q.to(tl.float64), N * tl.sum(x * (x * size), 1).to(tl.float64), d, g, roundoff)
        status = tl.where(status != 0, status, fault)
        w = v * tl.sqrt(tl.abs(g) / den).to(T)[:, None]
        p -= sign * (w[:, :, None] * w[:, None, :])
        if gain < 0:
            size = tl.sum(tl.where(on_diagonal, p, 0), 1)
        of_block += N
    p *= (1 / d).to(T)

    positive = tl.where(on_diagonal, p, 1) > 0
    of_entries = tl.where(is_finite(p), tl.where(positive, 0, _NOT_POSITIVE), _NOT_FINITE)
    fault = tl.max(tl.max(tl.where(inside, of_entries, 0), 1), 1)
    was_positive = tl.min((tl.where(in_vector, diagonal, 1) > 0).to(tl.int32), 1)
    fault = tl.maximum(fault, tl.where(was_positive != 0, 0, _NOT_POSITIVE))
    status = tl.where(status != 0, status, fault)
    tl.store(info + first + block, status.to(tl.int64), there)
    tl.store(entries, p, inside & (status == 0)[:, None, None])


def update(inverse: Tensor, u: Tensor, info: Tensor, decay: float, gain: float) -> None:
    """Update contiguous blocks (B, n, n) of up to LARGEST rows by u (B, k, n)."""
    count, n = inverse.shape[:2]
    side = triton.next_power_of_2(n)
    of_program = min(max(_ENTRIES // side**2, 1), _MOST_BLOCKS)
    unit = torch.finfo(inverse.dtype).eps / 2
    launch(
        inverse_update, triton.cdiv(count, of_program), inverse.device,
        inverse, u, info, count, u.shape[1], decay, gain, unit,
        T=TYPES[inverse.dtype], N=n, SIDE=side, COUNT=of_program, warps=4 if side > 32 else 1,
    )  # fmt: skip
