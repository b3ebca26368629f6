"""Stochastic rounding of one array: 6 bytes an element."""

import triton
import triton.language as tl
from torch import Tensor

from ._language import divmod_from
from ._launch import launch
from ._rounding import absorb, lowbias32, random_bits, round_stochastically

_BLOCK = 2048
"""Elements of a program."""


@triton.jit
def _random(start, lanes, offset, run, pitch, state, RUNS: tl.constexpr, WIDE: tl.constexpr):
    """Random bits of the elements ``start + lanes``."""
    if RUNS:
        row, column = divmod_from(start % run, lanes, run)
        index = offset + (start // run + row) * pitch + column
    else:
        index = offset + start + lanes
    if WIDE:
        random = random_bits(index, state)
    else:
        random = lowbias32(index.to(tl.uint32) ^ absorb(state, (offset >> 32).to(tl.uint32)))
    return random


@triton.jit(do_not_specialize=["size", "base", "step", "offset_upper", "offset_lower", "run", "pitch"])
def kernel(
    x,
    out,
    size: tl.int64,
    base: tl.int64,
    step: tl.int64,
    offset_upper: tl.int64,
    offset_lower: tl.int64,  # its lower 31 bits: the interpreter takes a number of 32 for one of a narrower type
    run: tl.int64,
    pitch: tl.int64,
    count,  # None, or in the place of the step
    RUNS: tl.constexpr,  # whether there is more than one run
    WIDE: tl.constexpr,  # whether indices differ in their upper halves
    LOW: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Round one block."""
    start = tl.program_id(0).to(tl.int64) * BLOCK
    lanes = tl.arange(0, BLOCK)
    if count is None:
        number = step.to(tl.uint32)
    else:
        number = tl.load(count).to(tl.uint32)
    state = absorb(base.to(tl.uint32), number)
    offset = (offset_upper.to(tl.int64) << 31) + offset_lower
    random = _random(start, lanes, offset, run, pitch, state, RUNS, WIDE)
    if size - start >= BLOCK:
        tl.store(out + start + lanes, round_stochastically(tl.load(x + start + lanes), random, LOW))
    else:
        mask = lanes < size - start
        tl.store(out + start + lanes, round_stochastically(tl.load(x + start + lanes, mask, 0.0), random, LOW), mask)


def stochastic_round(
    x: Tensor, out: Tensor, base: int, step: int, offset: int, run: int, pitch: int, low: bool, count: Tensor | None
) -> None:
    """Fill ``out``; both are contiguous."""
    size = x.numel()
    last = offset + (max(size, 1) - 1) // run * pitch + min(run, max(size, 1)) - 1  # at least the last index
    launch(
        kernel, triton.cdiv(size, _BLOCK), x.device, x, out, size, base, step, offset >> 31, offset % 2**31, run, pitch,
        count, RUNS=run < size, WIDE=offset >> 32 != last >> 32, LOW=low, BLOCK=_BLOCK,
    )  # fmt: skip
