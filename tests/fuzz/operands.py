"""Tensors that a fuzzer hands to an op: numbers that are hard on arithmetic, in memory with guards around."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import hypothesis.strategies as st
import numpy as np
import torch
from torch import Tensor

Array = np.ndarray[Any, Any]
Draw = Callable[[Any], Any]

SIZES = (1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 33, 64, 65, 0)
"""Around the widths of vectors, tiles and runs; the first is what a failure shrinks to."""
SUM_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
FACTOR_DTYPES = (torch.float32, torch.float64)
SPECIALS = (math.nan, math.inf, -math.inf, -0.0, 0.0)
GUARD = 64
"""Bytes before and after a tensor. Each has all bits set, as have those between its elements: a NaN in every dtype."""


def accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def wide(x: Tensor) -> Array:
    """The same numbers in a format in which the definition's own rounding does not count."""
    array = x.detach().to(torch.float64).numpy()
    return array.astype(np.longdouble) if x.dtype == torch.float64 else array


@dataclass(frozen=True)
class Layout:
    """How elements lie in memory; as it is by default, one after the other in row-major order."""

    order: str = "rows"  # or "columns", reversed, or "channels", with dimension 1 innermost
    step: int = 1  # from an element to the next one
    gap: int = 0  # elements left out after each row, plane and so on
    offset: int = 0  # elements left out at the start
    ones: int = 0  # the stride of dimensions of one element, on top of what it would be
    repeated: bool = False  # the first dimension has a stride of 0
    negated: bool = False  # torch's negative bit is set: memory has the numbers with the other sign

    def strides(self, shape: Sequence[int]) -> list[int]:
        dims = list(range(len(shape)))
        if self.order == "columns":
            dims.reverse()
        elif self.order == "channels" and len(dims) > 1:
            dims = [0, *dims[2:], 1]
        strides, here = [0] * len(shape), self.step
        for d in reversed(dims):
            strides[d] = here + (self.ones if shape[d] == 1 else 0)
            here = here * max(1, shape[d]) + self.gap
        if self.repeated and shape:
            strides[0] = 0
        return strides

    def __repr__(self) -> str:
        changed = [f"{k}={v!r}" for k, v in vars(self).items() if v != getattr(Layout, k)]
        return f"Layout({', '.join(changed)})"


PLAIN = Layout()


@dataclass(frozen=True)
class Operand:
    """Numbers and a layout."""

    values: Tensor
    layout: Layout = PLAIN

    def placed(self) -> Placed:
        return Placed(self.values, self.layout)

    @property
    def wide(self) -> Array:
        return wide(self.values)

    def __repr__(self) -> str:
        x = self.values
        numbers = x.tolist() if x.numel() <= 24 else f"{x.flatten()[:4].tolist()} and so on"
        at = "" if self.layout == PLAIN else f", {self.layout}"
        return f"<{str(x.dtype).removeprefix('torch.')} {list(x.shape)}: {numbers}{at}>"


class Placed:
    """A tensor in memory of its own, which knows what was around it and in it."""

    def __init__(self, values: Tensor, layout: Layout) -> None:
        shape, width = values.shape, values.element_size()
        self._strides = layout.strides(shape)
        span = sum((size - 1) * stride for size, stride in zip(shape, self._strides, strict=True)) + 1
        first = GUARD + layout.offset * width
        self._memory = torch.full((first + max(span, 0) * width + GUARD,), 255, dtype=torch.uint8, device="cpu")
        self._first, self._shape, self._dtype = first, shape, values.dtype
        plain = self._view(self._memory)
        self.tensor = torch._neg_view(plain) if layout.negated else plain  # type: ignore[attr-defined]
        if layout.repeated:
            self.tensor[:1].copy_(values[:1])
        else:
            self.tensor.copy_(values)
        self._before = self._memory.clone()

    def _view(self, memory: Tensor) -> Tensor:
        width = torch.empty((), dtype=self._dtype, device="cpu").element_size()
        rest = memory[self._first % width :]
        numbers = rest[: len(rest) // width * width].view(self._dtype)
        return numbers.as_strided(self._shape, self._strides, self._first // width)

    @property
    def is_unchanged(self) -> bool:
        return torch.equal(self._memory, self._before)

    @property
    def is_guarded(self) -> bool:
        """Whether nothing was written but elements."""
        after = self._memory.clone()
        self._view(after).copy_(self._view(self._before))
        return torch.equal(after, self._before)


# What is drawn.


@dataclass(frozen=True)
class Numbers:
    """A kind of numbers; a seed tells which."""

    kind: str
    seed: int
    specials: tuple[tuple[int, float], ...] = ()

    def fill(self, shape: Sequence[int], dtype: torch.dtype, salt: int = 0) -> Tensor:
        """As many as there are elements."""
        rng = np.random.default_rng((self.seed, salt))
        limits = torch.finfo(dtype)
        whole = self.kind == "whole"
        x = rng.integers(-7, 8, shape).astype(np.float64) if whole else rng.standard_normal(shape)
        if self.kind == "wide":
            x *= np.exp2(rng.integers(-12, 13, shape))
        elif self.kind == "large":
            x *= math.sqrt(limits.max) / 16
        elif self.kind == "huge":
            x = np.clip(x, -1, 1) * limits.max
        elif self.kind == "tiny":
            x *= np.exp2(rng.integers(-4, 4, shape)) * limits.smallest_normal
        elif self.kind == "small":
            x *= math.sqrt(limits.smallest_normal)
        flat = x.reshape(-1)
        for place, value in self.specials:
            if flat.size:
                flat[(place + salt) % flat.size] = value
        return torch.from_numpy(np.asarray(x)).to(dtype)


KINDS = ("whole", "normal", "wide", "large", "huge", "tiny", "small")

_seeds = st.integers(0, 2**16)
_special = st.tuples(st.integers(0, 63), st.sampled_from(SPECIALS))


@st.composite
def numbers(draw: Draw, kinds: Sequence[str] = KINDS, specials: bool = True) -> Numbers:
    kind, seed = draw(st.sampled_from(kinds)), draw(_seeds)
    some = tuple(draw(st.lists(_special, max_size=2))) if specials and draw(st.integers(0, 3)) == 3 else ()
    return Numbers(kind, seed, some)


_written = st.one_of(
    st.just(PLAIN),
    st.builds(Layout, offset=st.integers(1, 3)),
    st.builds(
        Layout,
        order=st.sampled_from(("rows", "columns", "channels")),
        step=st.integers(1, 2),
        gap=st.sampled_from((0, 1, 3)),
        offset=st.integers(0, 1),
    ),
    st.builds(Layout, order=st.sampled_from(("columns", "channels")), ones=st.sampled_from((0, 5))),
)
_negated = st.builds(Layout, offset=st.integers(0, 1), negated=st.just(True))
_read = st.one_of(_written, st.builds(Layout, gap=st.integers(0, 1), repeated=st.just(True)))


@st.composite
def layouts(draw: Draw, written: bool = False, lazy: bool = True) -> Layout:
    """``written`` leaves out those in which elements share memory."""
    if lazy and draw(st.integers(0, 15)) == 15:
        return draw(_negated)
    return draw(_written if written else _read)


def contiguous_layouts() -> Any:
    return st.one_of(st.just(PLAIN), st.builds(Layout, offset=st.integers(1, 3)), _negated)


def laid(values: Tensor, layout: Layout) -> Operand:
    """An operand; where the layout repeats the first of its slices, with the numbers that it then has."""
    if layout.repeated:
        if values.dim() == 0 or values.shape[0] == 0:
            return Operand(values, replace(layout, repeated=False))
        values = values[:1].expand(values.shape).clone()
    return Operand(values, layout)


def sizes(tiny: bool, least: int = 0, most: int = 65) -> Any:
    most = min(most, 9) if tiny else most
    return st.sampled_from([n for n in SIZES if least <= n <= most])
