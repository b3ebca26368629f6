"""Solutions with a damped outer product over lists of tensors: 20 bytes a number in float32, in two passes.

The first pass leaves partial dot products, two float64 numbers a chunk; two small kernels make one coefficient of them;
the second pass reads u and x once more and writes the solution.
"""

from collections.abc import Callable, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._language import divide, narrow
from ._launch import launch
from ._lists import CHUNK, TYPES, address, are_aligned, table
from ._sums import LANES, LEVELS, add_chunks, first_chunks, new_partials, total

# The lists, in the order of the arguments.
_U, _X = (tl.constexpr(k) for k in range(2))
# The layout: size, first chunk, where the solution begins among those of its dtype.
_WIDTH = tl.constexpr(3)

_BLOCK = tl.constexpr(2048)  # of the second pass: 16 bytes of any dtype a thread, with warps of 32 lanes and of 64
_PLACE = 16  # elements whose multiples solutions begin at: 32 bytes of the shortest dtype


@triton.jit(do_not_specialize=["count", "total_chunks"])
def multiply_kernel(
    addresses,  # [2, count]
    count,
    layouts,  # [count, 3]: size, first chunk, beginning of the solution
    chunks,  # [programs, 2]
    total_chunks,
    partials,  # [2, total_chunks]: u.u and u.x
    T: tl.constexpr,
):
    """The dot products of one chunk of one tensor."""
    program = tl.program_id(0).to(tl.int64)
    i = tl.load(chunks + 2 * program)
    number_of_chunk = tl.load(chunks + 2 * program + 1).to(tl.int64)
    start = number_of_chunk * CHUNK
    layout = layouts + i.to(tl.int64) * _WIDTH
    u = address(addresses, count, _U, i, T) + start
    x = address(addresses, count, _X, i, T) + start
    lanes = tl.arange(0, LANES)
    left = tl.minimum(tl.load(layout) - start, CHUNK).to(tl.int32)
    square = tl.full((LANES,), 0, tl.float64)
    along = tl.full((LANES,), 0, tl.float64)
    if (left == CHUNK) & are_aligned(u, x, x):
        # No mask and known alignment: 16 bytes a load.
        wide_u, wide_x = tl.multiple_of(u, 16), tl.multiple_of(x, 16)
        for first in range(0, CHUNK, LANES):
            at = first + lanes
            v, y = tl.load(wide_u + at).to(tl.float64), tl.load(wide_x + at).to(tl.float64)
            square, along = tl.fma(v, v, square), tl.fma(v, y, along)
    else:
        for first in range(0, left, LANES):
            at = first + lanes
            v = tl.load(u + at, at < left, 0.0).to(tl.float64)
            y = tl.load(x + at, at < left, 0.0).to(tl.float64)
            square, along = tl.fma(v, v, square), tl.fma(v, y, along)
    chunk = partials + tl.load(layout + 1) + number_of_chunk + tl.arange(0, 1)
    tl.store(chunk, total(square[None, :], LEVELS))
    tl.store(chunk + total_chunks, total(along[None, :], LEVELS))


@triton.jit(do_not_specialize=["count"])
def solve_kernel(
    sums,  # [2, count]: u.u and u.x
    count,
    coefficient,  # [1]
    rho: tl.float64,
):
    """By what u enters the solution."""
    lanes = tl.arange(0, LANES)
    square = tl.full((LANES,), 0, tl.float64)
    along = tl.full((LANES,), 0, tl.float64)
    for first in range(0, count, LANES):
        i = first + lanes
        square += tl.load(sums + i, i < count, 0.0)
        along += tl.load(sums + count + i, i < count, 0.0)
    whole = total(along[None, :], LEVELS) / (rho + total(square[None, :], LEVELS))
    tl.store(coefficient + tl.arange(0, 1), whole)


@triton.jit(do_not_specialize=["count"])
def subtract_kernel(
    addresses,
    count,
    layouts,
    chunks,
    coefficient,
    outs,
    rho: tl.float64,
    T: tl.constexpr,
    A: tl.constexpr,
):
    """The solution of one chunk of one tensor."""
    program = tl.program_id(0).to(tl.int64)
    i = tl.load(chunks + 2 * program)
    start = tl.load(chunks + 2 * program + 1).to(tl.int64) * CHUNK
    layout = layouts + i.to(tl.int64) * _WIDTH
    u = address(addresses, count, _U, i, T) + start
    x = address(addresses, count, _X, i, T) + start
    # As an address of its own: beside an argument compilers forget that it is aligned.
    out = (outs.to(tl.int64) + (tl.load(layout + 2) + start) * (T.primitive_bitwidth // 8)).to(tl.pointer_type(T))
    along = tl.load(coefficient).to(A)
    damping = tl.full((), rho, tl.float64).to(A)
    lanes = tl.arange(0, _BLOCK)
    left = tl.minimum(tl.load(layout) - start, CHUNK).to(tl.int32)
    if (left == CHUNK) & are_aligned(u, x, out):
        wide_u, wide_x, wide_out = tl.multiple_of(u, 16), tl.multiple_of(x, 16), tl.multiple_of(out, 16)
        for first in range(0, CHUNK, _BLOCK):
            at = first + lanes
            v, y = tl.load(wide_u + at).to(A), tl.load(wide_x + at).to(A)
            tl.store(wide_out + at, narrow(divide(y - along * v, damping), T))
    else:
        for first in range(0, left, _BLOCK):
            at = first + lanes
            v, y = tl.load(u + at, at < left).to(A), tl.load(x + at, at < left).to(A)
            tl.store(out + at, narrow(divide(y - along * v, damping), T), at < left)


def _places(tensors: Sequence[Tensor]) -> tuple[list[int], dict[torch.dtype, int]]:
    """Where the solution of each tensor begins among those of its dtype, and how many elements these have."""
    places: list[int] = []
    sizes: dict[torch.dtype, int] = {}
    for x in tensors:
        places.append(sizes.get(x.dtype, 0))
        sizes[x.dtype] = places[-1] + triton.cdiv(x.numel(), _PLACE) * _PLACE
    return places, sizes


def _contiguous_strides(shape: Sequence[int]) -> list[int]:
    strides, step = [], 1
    for size in reversed(shape):
        strides.append(step)
        step *= max(size, 1)
    return strides[::-1]


def solve(u: Sequence[Tensor], x: Sequence[Tensor], rho: float, check: Callable[[], None]) -> list[Tensor]:
    """``(u u^T + rho I)^-1 x``.

    The solutions of a dtype share a stretch of memory, so that their addresses are one argument: a table of them would
    change at every call.

    Args:
        u, x: contiguous; at least one tensor.
        check: of the lists, called where they are new.
    """
    places, sizes = _places(u)

    def layout() -> list[tuple[int, ...]]:
        check()
        return list(zip(first_chunks(u), places, strict=True))

    device = u[0].device
    plan = table("rank_one_solve", (u, x), layout)
    partials = new_partials(plan, 2, device)
    for dtype, _, _, chunks in plan.launches:
        launch(
            multiply_kernel, len(chunks), device,
            plan.addresses, plan.count, plan.layout, chunks, partials.shape[1], partials, T=dtype,
        )  # fmt: skip
    coefficient = torch.empty(1, dtype=torch.float64, device=device)
    launch(solve_kernel, 1, device, add_chunks(plan, partials), plan.count, coefficient, rho)
    memory = {dtype: torch.empty(size, dtype=dtype, device=device) for dtype, size in sizes.items()}
    solutions = {TYPES[dtype]: outs for dtype, outs in memory.items()}
    for dtype, wide, _, chunks in plan.launches:
        launch(
            subtract_kernel, len(chunks), device,
            plan.addresses, plan.count, plan.layout, chunks, coefficient, solutions[dtype], rho, T=dtype, A=wide,
        )  # fmt: skip
    # Tensors of their own, no views of one another: what happens to one is no change of the others.
    return [
        y.new_empty(0).set_(memory[y.dtype].untyped_storage(), place, y.shape, _contiguous_strides(y.shape))
        for y, place in zip(x, places, strict=True)
    ]
