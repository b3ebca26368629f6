"""Sums over lists of tensors in float64, whose bits follow from shapes alone.

A program adds up its chunk in ``LANES`` lanes, then the lanes, and leaves one partial sum; ``add_chunks`` adds those of
each tensor. Every addition has two terms and a place of its own in a tree: neither alignment nor the number of warps
nor how a compiler lays numbers out in registers shows.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import INTERPRETED, launch
from ._lists import CHUNK, Table

_INTERPRETED = tl.constexpr(INTERPRETED)

LANES = tl.constexpr(1024)
"""Lanes of a chunk; with four warps of 32 a thread has 8 of them, 16 bytes of any dtype."""
LEVELS = tl.constexpr(10)
"""Halvings from ``LANES`` lanes to one."""

# Partial sums of several tensors at once, as most have few.
_TENSORS = tl.constexpr(4)
_PARTIALS = tl.constexpr(512)
_PARTIAL_LEVELS = tl.constexpr(9)


@triton.jit
def total(x, HALVINGS: tl.constexpr):
    """Sums of the rows of x, [rows, 2^HALVINGS] -> [rows]."""
    for _ in tl.static_range(HALVINGS):
        halves = tl.reshape(x, (x.shape[0], 2, x.shape[1] // 2))
        if _INTERPRETED:  # which takes half a millisecond for tl.sum; split needs too many registers elsewhere
            left, right = tl.split(tl.permute(halves, (0, 2, 1)))
            x = left + right
        else:
            x = tl.sum(halves, 1)
    return tl.reshape(x, (x.shape[0],))


@triton.jit(do_not_specialize=["count", "chunks"])
def _add_chunks(layouts, count, partials, chunks, sums, WIDTH: tl.constexpr):
    i = tl.program_id(0) * _TENSORS + tl.arange(0, _TENSORS)
    which = tl.program_id(1).to(tl.int64)
    there = i < count
    layout = layouts + i.to(tl.int64) * WIDTH
    size, first = tl.load(layout, there, 0), tl.load(layout + 1, there, 0)
    number = ((size + CHUNK - 1) // CHUNK)[:, None]  # [tensors, 1]
    own = partials + (which * chunks + first)[:, None]
    lanes = tl.arange(0, _PARTIALS)[None, :]
    sum_of_lanes = tl.full((_TENSORS, _PARTIALS), 0, tl.float64)
    for k in range(0, tl.max(number).to(tl.int32), _PARTIALS):
        sum_of_lanes += tl.load(own + k + lanes, k + lanes < number, 0.0)
    tl.store(sums + which * count + i, total(sum_of_lanes, _PARTIAL_LEVELS), there)


def first_chunks(tensors: Sequence[Tensor]) -> list[int]:
    """The number of each tensor's first chunk, where the chunks of all are numbered in order."""
    firsts, chunks = [], 0
    for x in tensors:
        firsts.append(chunks)
        chunks += triton.cdiv(x.numel(), CHUNK.value)
    return firsts


def new_partials(plan: Table, kinds: int, device: torch.device) -> Tensor:
    """Room for the partial sums of every chunk, float64 (kinds, chunks)."""
    chunks = sum(len(entry.chunks) for entry in plan.launches)
    return torch.empty(kinds, chunks, dtype=torch.float64, device=device)


def add_chunks(plan: Table, partials: Tensor) -> Tensor:
    """The sums of each tensor, float64 (kinds, tensors).

    Args:
        plan: whose layout has the ``first_chunks`` after the sizes.
        partials: float64 (kinds, chunks), numbered as ``first_chunks`` does.
    """
    kinds, chunks = partials.shape
    sums = partials.new_empty(kinds, plan.count)
    launch(
        _add_chunks, (triton.cdiv(plan.count, _TENSORS.value), kinds), partials.device,
        plan.layout, plan.count, partials, chunks, sums, WIDTH=plan.layout.shape[1],
    )  # fmt: skip
    return sums
