"""What a sample is, and the tensors that samples are made of."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fisher_kernels import ops
from fisher_kernels.ops import ACCUMULATOR

Inputs = dict[str, Any]
"""Arguments of a public function of ``fisher_kernels.ops``, all by name."""

Tolerance = Tensor | float
Device = torch.device | None

SUM_DTYPES = tuple(ACCUMULATOR)
FACTOR_DTYPES = (torch.float32, torch.float64)


def random(shape: Sequence[int], dtype: torch.dtype, seed: int = 0, device: Device = None) -> Tensor:
    """Normally distributed numbers, the same at every call."""
    generator = torch.Generator("cpu" if device is None else device).manual_seed(seed)
    return torch.randn(shape, dtype=torch.float64, generator=generator, device=device).to(dtype)


def with_non_finite(x: Tensor) -> Tensor:
    """x, changed, with a NaN in its second place and an infinity in its last."""
    flat = x.view(-1)
    flat[1], flat[-1] = math.nan, -math.inf
    return x


def last(x: Tensor) -> Tensor:
    """x with its channels, dimension 1, innermost in memory."""
    return x.movedim(1, -1).contiguous().movedim(-1, 1)


@dataclass(frozen=True)
class Source:
    """Random tensors of one dtype on one device, the same numbers every time."""

    dtype: torch.dtype
    device: Device = None

    def normal(self, *shape: int, seed: int = 0) -> Tensor:
        return random(shape, self.dtype, seed, self.device)

    def uniform(self, *shape: int, seed: int = 0) -> Tensor:
        """Numbers between 0 and 1 in the accumulation dtype: factors."""
        return random(shape, torch.float64, seed, self.device).sigmoid().to(ACCUMULATOR[self.dtype])


@dataclass(frozen=True)
class Sample:
    """A call of an op, and how exact it must be.

    Attributes:
        inputs: builds the arguments; an op in place changes them.
        tolerance: (arguments in float64, what is expected, unit roundoff u of the arithmetic) -> the largest admissible
            error of each tensor that ``call`` returns, but for the last rounding, to a result in 16 bits.
        widened: whether the reference gets the arguments in float64. If not, the op is defined to the bit.
    """

    op: str
    name: str
    dtypes: Sequence[torch.dtype]
    inputs: Callable[[Source], Inputs]
    tolerance: Callable[[Inputs, list[Tensor], float], list[Tolerance]]
    widened: bool = True

    def call(self, inputs: Inputs) -> list[Tensor]:
        """Run the op; what it changed, in the order of its arguments, then what it returned."""
        returned = getattr(ops, self.op)(**inputs)
        schema = getattr(torch.ops.fisher_kernels, self.op).default._schema
        written = [inputs[a.name] for a in schema.arguments if a.alias_info is not None and a.alias_info.is_write]
        return [*_tensors(written), *_tensors(returned)]


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif value is not None:
        for item in value:
            yield from _tensors(item)
