"""Sizes, layouts and arguments that tests of the ops share, one module for each stem.

What builds inputs is that of ``fisher_kernels.tools.samples``.
"""

from __future__ import annotations

import itertools
import mmap
import sys
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from fisher_kernels.tools.samples import random as random

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def integers(shape: Sequence[int], dtype: torch.dtype, seed: int = 0, limit: int = 7) -> Tensor:
    """Whole numbers from -limit to limit: products and sums of them are exact as long as they stay small."""
    return torch.randint(-limit, limit + 1, shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


# A layout gives a tensor of the shape, dtype and (but for `expanded`) the values of x that lies differently in memory.
# What lies around its elements is NaN, so that a kernel that reads there gives itself away.


def _surroundings(x: Tensor, shape: Sequence[int]) -> Tensor:
    return torch.full(shape, torch.nan, dtype=x.dtype)


def contiguous(x: Tensor) -> Tensor:
    """Row-major order from the start of an allocation."""
    return x.clone(memory_format=torch.contiguous_format)


def unaligned(x: Tensor) -> Tensor:
    """Row-major order, from one element into an allocation."""
    around = _surroundings(x, (x.numel() + 9,))
    return around[1 : 1 + x.numel()].view(x.shape).copy_(x)


def sliced(x: Tensor) -> Tensor:
    """A block out of the middle of a larger tensor."""
    view = _surroundings(x, [size + 3 for size in x.shape])
    for dimension, size in enumerate(x.shape):
        view = view.narrow(dimension, 1, size)
    return view.copy_(x)


def spread(x: Tensor) -> Tensor:
    """Every other element along the last dimension."""
    if x.dim() == 0:
        return unaligned(x)
    return _surroundings(x, (*x.shape[:-1], 2 * x.shape[-1]))[..., ::2].copy_(x)


def transposed(x: Tensor) -> Tensor:
    """Column-major order."""
    return _surroundings(x, x.shape[::-1]).permute(tuple(range(x.dim()))[::-1]).copy_(x)


def channels_last(x: Tensor) -> Tensor:
    """Dimension 1 innermost in memory, for any number of dimensions from two up."""
    if x.dim() < 2:
        return contiguous(x)
    order = (0, *range(2, x.dim()), 1)
    return _surroundings(x, [x.shape[d] for d in order]).movedim(-1, 1).copy_(x)


def expanded(x: Tensor) -> Tensor:
    """The first slice of x in place of all of them, with a stride of 0."""
    return x[:1].clone().expand(x.shape) if x.dim() and x.shape[0] else x


WRITABLE_LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    layout.__name__: layout for layout in (contiguous, unaligned, sliced, spread, transposed, channels_last)
}
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {**WRITABLE_LAYOUTS, "expanded": expanded}


LAYOUTS_OF_A_STEP = [
    *itertools.product(("param", "moment"), WRITABLE_LAYOUTS.values()),
    *itertools.product(("grad",), LAYOUTS.values()),
]
"""Which of what a step takes lies in another way than the rest, and how."""


def layouts_of_a_step(of: str, layout: Callable[[Tensor], Tensor]) -> dict[str, Callable[[Tensor], Tensor]]:
    """The arguments of a ``step`` that say so."""
    options = {"layout" if of == "param" else f"{of}_layout": layout}
    return {**options, "grad_layout": contiguous, "moment_layout": contiguous} if of == "param" else options


_NO_RESERVE = 0x4000 if sys.platform == "linux" else 0  # mmap.MAP_NORESERVE, which Python has no name for


def zeros_without_memory(numel: int) -> Tensor:
    """Zeros in bfloat16 that take no memory until they are written: the system maps them all to the same page."""
    try:
        pages = mmap.mmap(-1, 2 * numel, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _NO_RESERVE)
    except OSError as error:
        pytest.skip(f"no address space of {2 * numel} bytes: {error}")
    return torch.frombuffer(pages, dtype=torch.bfloat16)
