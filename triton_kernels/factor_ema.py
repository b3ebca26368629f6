"""minmax and the moving average of lists of vectors: two passes over them, one launch each for every dtype.

The first pass reads what is new and leaves the range of each chunk; the second takes the ranges of a vector together,
reads it again, out of the L2 cache at the usual sizes, and writes the result. Memory sees 8 bytes an entry in float32
for minmax and 12 for the average. Smallest and largest entries are exact in any order.
"""

import struct
from collections.abc import Callable, Sequence
from itertools import accumulate
from operator import attrgetter
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._language import divide, is_finite
from ._launch import launch
from ._lists import CHUNK, Table, address, is_aligned, one, table

# The lists, in the order of the arguments.
_X, _OUT, _WEIGHT = (tl.constexpr(k) for k in range(3))  # of minmax
_STATE, _NEW = (tl.constexpr(k) for k in range(2))  # of the average
# What the layouts have for each vector: its size, the number of its first chunk, and for the average the size of what
# is new and the bits of its divisor in float64.
_MINMAX_WIDTH, _EMA_WIDTH = tl.constexpr(2), tl.constexpr(4)

_BLOCK = tl.constexpr(1024)  # entries that a program works on at a time
_RANGES = tl.constexpr(128)  # chunks whose ranges are taken together at a time
_FLAT = tl.constexpr(1e-5)  # a spread of at most this share of the largest entry is rounding


@triton.jit
def _mean(x, at, present, divisor, mask):
    """Entries of x / divisor, ones from ``present`` on; a mask of None says that all of them are there."""
    if mask is None:
        mean = divide(tl.load(x + at), divisor)
    else:
        there = mask & (at < present)
        mean = tl.where(there, divide(tl.load(x + at, there, 0), divisor), 1)
    return mean


@triton.jit
def _include(low, high, value, mask):
    """The range of each lane with one more value in it; a NaN stretches it to both infinities."""
    known = value == value
    lower = tl.minimum(low, tl.where(known, value, -float("inf")))
    higher = tl.maximum(high, tl.where(known, value, float("inf")))
    if mask is not None:
        lower, higher = tl.where(mask, lower, low), tl.where(mask, higher, high)
    return lower, higher


@triton.jit
def _range_of(x, left, present, divisor, FULL: tl.constexpr):
    lanes = tl.arange(0, _BLOCK)
    low = tl.full((_BLOCK,), float("inf"), divisor.dtype)
    high = -low
    for first in range(0, left, _BLOCK):
        at = first + lanes
        mask = None if FULL else at < left
        low, high = _include(low, high, _mean(x, at, present, divisor, mask), mask)
    return tl.min(low), tl.max(high)


@triton.jit
def _range(x, start, left, present, divisor):
    """Smallest and largest of x / divisor in a chunk with so many entries, of which so many are in x."""
    if (present == CHUNK) & is_aligned(x):
        # No masks and known alignment: 16 bytes a load.
        low, high = _range_of(tl.multiple_of(x + start, 16), CHUNK, CHUNK, divisor, True)
    else:
        low, high = _range_of(x + start, left, present, divisor, False)
    return low, high


@triton.jit
def _store_range(ranges, chunk, low, high):
    tl.store(ranges + 2 * chunk, low.to(tl.float64))
    tl.store(ranges + 2 * chunk + 1, high.to(tl.float64))


@triton.jit
def _load_range(ranges, first, size, A: tl.constexpr):
    """Smallest and largest entry of a vector, out of the ranges of its chunks."""
    lanes = tl.arange(0, _RANGES)
    count = tl.cdiv(size, CHUNK)
    low = tl.full((_RANGES,), float("inf"), tl.float64)
    high = -low
    for k in range(0, count, _RANGES):
        there = k + lanes < count
        at = ranges + 2 * (first + k + lanes)
        low = tl.minimum(low, tl.load(at, there, float("inf")))
        high = tl.maximum(high, tl.load(at + 1, there, -float("inf")))
    return tl.min(low).to(A), tl.max(high).to(A)


@triton.jit
def _normalize(value, low, high, eps):
    """minmax of entries of a vector whose smallest and largest entries are known."""
    spread = high - low
    finite = is_finite(spread)
    flat = finite & (spread <= tl.full((), _FLAT, spread.dtype) * tl.maximum(tl.abs(low), tl.abs(high)))
    scaled = divide(value - low, spread + eps)
    return tl.where(flat, 1, tl.where(finite, scaled, float("nan")))


@triton.jit
def _chunk(chunks):
    """The vector, the chunk of it, and where that begins."""
    program = tl.program_id(0).to(tl.int64)
    i = tl.load(chunks + 2 * program)
    chunk = tl.load(chunks + 2 * program + 1).to(tl.int64)
    return i, chunk, chunk * CHUNK


@triton.jit(do_not_specialize=["count"])
def minmax_ranges(addresses, count, layouts, chunks, ranges, A: tl.constexpr):
    """The range of one chunk of x / weight."""
    i, chunk, start = _chunk(chunks)
    layout = layouts + i.to(tl.int64) * _MINMAX_WIDTH
    size = tl.load(layout)
    weight = tl.load(address(addresses, count, _WEIGHT, i, A))
    left = tl.minimum(size - start, CHUNK).to(tl.int32)
    low, high = _range(address(addresses, count, _X, i, A), start, left, left, weight)
    _store_range(ranges, tl.load(layout + 1) + chunk, low, high)


@triton.jit
def _scale(out, x, at, left, weight, low, high, eps, mask):
    scaled = _normalize(_mean(x, at, left, weight, mask), low, high, eps)
    tl.store(out + at, tl.where(weight == 0, 1, scaled), mask)


@triton.jit(do_not_specialize=["count"])
def minmax_results(addresses, count, layouts, chunks, ranges, eps: tl.float64, A: tl.constexpr):
    """One chunk of minmax(x / weight), or ones where the weight is 0."""
    i, _, start = _chunk(chunks)
    layout = layouts + i.to(tl.int64) * _MINMAX_WIDTH
    size = tl.load(layout)
    weight = tl.load(address(addresses, count, _WEIGHT, i, A))
    x, out = address(addresses, count, _X, i, A) + start, address(addresses, count, _OUT, i, A) + start
    low, high = _load_range(ranges, tl.load(layout + 1), size, A)
    e = tl.full((), eps, A)
    left = tl.minimum(size - start, CHUNK).to(tl.int32)
    lanes = tl.arange(0, _BLOCK)
    if (left == CHUNK) & is_aligned(x) & is_aligned(out):
        wide_x, wide_out = tl.multiple_of(x, 16), tl.multiple_of(out, 16)
        for first in range(0, CHUNK, _BLOCK):
            _scale(wide_out, wide_x, first + lanes, CHUNK, weight, low, high, e, None)
    else:
        for first in range(0, left, _BLOCK):
            _scale(out, x, first + lanes, left, weight, low, high, e, first + lanes < left)


@triton.jit
def _divisor(layout, A: tl.constexpr):
    return tl.load(layout + 3).to(tl.float64, bitcast=True).to(A)


@triton.jit(do_not_specialize=["count", "joint"])
def ema_ranges(addresses, count, layouts, chunks, ranges, rejected, joint, A: tl.constexpr):
    """The range of one chunk of new / divisor; marks its run where that is not finite."""
    i, chunk, start = _chunk(chunks)
    layout = layouts + i.to(tl.int64) * _EMA_WIDTH
    left = tl.minimum(tl.load(layout) - start, CHUNK).to(tl.int32)
    present = tl.minimum(tl.load(layout + 2) - start, CHUNK).to(tl.int32)
    low, high = _range(address(addresses, count, _NEW, i, A), start, left, present, _divisor(layout, A))
    _store_range(ranges, tl.load(layout + 1) + chunk, low, high)
    if not (is_finite(low) & is_finite(high)):
        tl.store(rejected + i // joint, 1)  # whoever finds it writes the same


@triton.jit
def _average(state, new, at, present, divisor, low, high, decay, gain, eps, mask, NORMALIZE: tl.constexpr):
    value = _mean(new, at, present, divisor, mask)
    if NORMALIZE:
        value = _normalize(value, low, high, eps)
    tl.store(state + at, decay * tl.load(state + at, mask) + gain * value, mask)


@triton.jit(do_not_specialize=["count", "joint"])
def ema_results(
    addresses,
    count,
    layouts,
    chunks,
    ranges,
    rejected,
    joint,
    decay: tl.float64,
    gain: tl.float64,
    eps: tl.float64,
    A: tl.constexpr,
    NORMALIZE: tl.constexpr,
):
    """One chunk of the average of a vector whose run is finite."""
    i, _, start = _chunk(chunks)
    if tl.load(rejected + i // joint) == 0:
        layout = layouts + i.to(tl.int64) * _EMA_WIDTH
        size = tl.load(layout)
        divisor = _divisor(layout, A)
        state, new = address(addresses, count, _STATE, i, A) + start, address(addresses, count, _NEW, i, A) + start
        low, high = tl.full((), 0, A), tl.full((), 0, A)
        if NORMALIZE:
            low, high = _load_range(ranges, tl.load(layout + 1), size, A)
        d, g, e = tl.full((), decay, A), tl.full((), gain, A), tl.full((), eps, A)
        left = tl.minimum(size - start, CHUNK).to(tl.int32)
        present = tl.minimum(tl.load(layout + 2) - start, CHUNK).to(tl.int32)
        lanes = tl.arange(0, _BLOCK)
        if (present == CHUNK) & is_aligned(state) & is_aligned(new):
            wide_state, wide_new = tl.multiple_of(state, 16), tl.multiple_of(new, 16)
            for first in range(0, CHUNK, _BLOCK):
                _average(wide_state, wide_new, first + lanes, CHUNK, divisor, low, high, d, g, e, None, NORMALIZE)
        else:
            for first in range(0, left, _BLOCK):
                at = first + lanes
                _average(state, new, at, present, divisor, low, high, d, g, e, at < left, NORMALIZE)


def _first_chunks(vectors: Sequence[Tensor]) -> list[int]:
    """The number of the first chunk of each vector, whatever its dtype."""
    return [0, *accumulate(triton.cdiv(x.numel(), CHUNK.value) for x in vectors)][:-1]


def _new_ranges(plan: Table, device: torch.device) -> Tensor:
    """Memory for the range of every chunk, which float64 holds exactly."""
    return torch.empty(sum(len(launches.chunks) for launches in plan.launches), 2, dtype=torch.float64, device=device)


_device = attrgetter("device")


def _devices(*lists: Sequence[Tensor]) -> tuple[tuple[torch.device, ...], ...]:
    """Of lists of vectors that look alike otherwise: what else is checked of them."""
    return tuple(tuple(map(_device, vectors)) for vectors in lists)


def minmax(
    op: str,
    out: Sequence[Tensor],
    x: Sequence[Tensor],
    eps: float,
    weights: Sequence[Tensor] | None,
    check: Callable[[], None],
) -> None:
    """Fill ``out``.

    Args:
        op: the op it is for.
        check: checks the lists; called where they are new.
    """

    def layout() -> list[tuple[int, ...]]:
        check()
        return [(first,) for first in _first_chunks(x)]

    device = x[0].device
    divisors = [one(v) for v in x] if weights is None else weights
    plan = table(op, (x, out, divisors), layout, _devices(out, x, weights or ()), written=(1,))
    ranges = _new_ranges(plan, device)
    for dtype, _, _, chunks in plan.launches:
        arguments = (plan.addresses, plan.count, plan.layout, chunks, ranges)
        launch(minmax_ranges, len(chunks), device, *arguments, A=dtype, fuse=False)
        launch(minmax_results, len(chunks), device, *arguments, eps, A=dtype, fuse=False)


def average(a: Any) -> Tensor:
    """Take the moving average.

    Args:
        a: the arguments of the op by their names. ``a.check()`` checks the lists, which need it where they are new.
    """

    def layout() -> list[tuple[int, ...]]:
        a.check()
        counts = a.divisors or [1.0] * len(a.new)
        bits = struct.unpack(f"{len(counts)}q", struct.pack(f"{len(counts)}d", *counts))
        return list(zip(_first_chunks(a.state), map(Tensor.numel, a.new), bits, strict=True))

    device = a.state[0].device
    key = _devices(a.state, a.new), None if a.divisors is None else tuple(a.divisors)
    plan = table("factor_ema_", (a.state, a.new), layout, key, written=(0,))
    rejected = torch.zeros(len(a.state) // a.joint, dtype=torch.int64, device=device)
    ranges = _new_ranges(plan, device)
    arguments = (plan.addresses, plan.count, plan.layout)
    for dtype, _, _, chunks in plan.launches:
        launch(ema_ranges, len(chunks), device, *arguments, chunks, ranges, rejected, a.joint, A=dtype, fuse=False)
    for dtype, _, _, chunks in plan.launches:  # a run may be of several dtypes: all are looked at before any is written
        launch(
            ema_results, len(chunks), device, *arguments, chunks, ranges, rejected, a.joint, a.decay, a.gain, a.eps,
            A=dtype, NORMALIZE=a.normalize, fuse=False,
        )  # fmt: skip
    return rejected
