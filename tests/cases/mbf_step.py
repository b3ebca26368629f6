"""Inputs of mbf_step_."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fisher_kernels.ops import ACCUMULATOR, mbf_step_
from tests.cases import contiguous, random, unaligned


class Parameter(NamedTuple):
    """Shapes of a parameter and of its inverse; None for a bias, which belongs to the one before it."""

    shape: tuple[int, ...]
    inverse: tuple[int, ...] | None


def packed(shape: tuple[int, ...], count: int, n: int) -> Parameter:
    return Parameter(shape, (count, n * (n + 1) // 2))


# Blocks of every size around the registers of each instruction set, more and fewer than a chunk holds; shared blocks
# that end with the row and past it; biases in all three ways.
PARAMETERS = (
    *(Parameter((3, 5, n), (15, n, n)) for n in (1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 25, 27, 32, 33, 49)),
    *(packed((5, 3, n), 15, n) for n in (1, 2, 3, 4, 5, 8, 9, 16, 17, 25, 33)),
    Parameter((40, 30, 3, 3), (1200, 9, 9)),
    packed((40, 30, 3, 3), 1200, 9),
    Parameter((3001,), (3001, 1, 1)),
    Parameter((2, 3, 2, 6), (8, 9, 9)),  # blocks across the dimensions
    Parameter((2, 65), (2, 65, 65)),
    packed((2, 131), 2, 131),
    Parameter((3, 150), (3, 150, 150)),
    Parameter((), (1, 1, 1)),
    Parameter((), (1, 1, 1, 1)),
    Parameter((0, 4), (0, 4, 4)),
    Parameter((0, 3), (0, 6)),
    Parameter((0, 3), (1, 1, 3, 3)),
    Parameter((70,), (70, 2, 2)),  # scale and shift of a normalisation
    Parameter((70,), None),
    packed((9,), 9, 2),
    Parameter((9,), None),
    Parameter((6, 4), (6, 5, 5)),  # a linear layer, a block for each output
    Parameter((6,), None),
    packed((300, 16), 300, 17),
    Parameter((300,), None),
    Parameter((0, 2), (0, 3, 3)),
    Parameter((0,), None),
    Parameter((7, 11), (1, 1, 11, 11)),
    Parameter((7, 11), (1, 3, 4, 4)),
    Parameter((7, 3, 2, 2), (1, 2, 6, 6)),
    Parameter((5,), (1, 1, 3, 3)),
    Parameter((7, 11), (1, 4, 3, 3)),
    Parameter((7,), None),
    Parameter((4, 12), (1, 5, 3, 3)),  # the bias has the last block for itself
    Parameter((4,), None),
    Parameter((130, 33), (1, 1, 34, 34)),
    Parameter((130,), None),
    Parameter((3, 2100), (1, 21, 100, 100)),
)

OPTIONS: dict[str, Any] = {
    "lr": 0.01,
    "momentum": 0.9,
    "weight_decay": 0.0,
    "decoupled": False,
    "maximize": False,
}


def unpack(inverse: Tensor) -> Tensor:
    """Packed lower triangles as whole blocks."""
    n = next(n for n in itertools.count() if n * (n + 1) // 2 >= inverse.shape[1])
    blocks = inverse.new_zeros(inverse.shape[0], n, n)
    i, j = torch.tril_indices(n, n)
    blocks[:, i, j] = inverse
    blocks[:, j, i] = inverse
    return blocks


def pack(blocks: Tensor) -> Tensor:
    """The lower triangles of blocks, row after row."""
    n = blocks.shape[-1]
    i, j = torch.tril_indices(n, n)
    return blocks[:, i, j].contiguous()


def symmetric(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    """Symmetric positive definite blocks, in the layout that the shape tells."""
    if len(shape) == 2:
        n = next(n for n in itertools.count() if n * (n + 1) // 2 >= shape[1])
        return pack(symmetric((shape[0], n, n), dtype, seed))
    x = random(shape, torch.float64, seed)
    return (x @ x.mT / max(1, shape[-1]) + 0.1 * torch.eye(shape[-1], dtype=torch.float64)).to(dtype).contiguous()


@dataclass
class Step:
    """The arguments of one call."""

    params: list[Tensor]
    grads: list[Tensor]
    momentum_buffers: list[Tensor]
    inverses: list[Tensor | None]
    options: dict[str, Any] = field(default_factory=lambda: dict(OPTIONS))

    def run(self) -> tuple[Tensor, Tensor]:
        """Takes the step, in place; the counts of skipped blocks, and the scale."""
        return mbf_step_(*self.lists(), **self.options)

    def lists(self) -> tuple[list[Any], ...]:
        return self.params, self.grads, self.momentum_buffers, self.inverses

    def copy(self) -> Step:
        """The same in memory of its own, strides and surroundings included."""
        return copy.deepcopy(self)

    def map(self, change: Callable[[Tensor], Tensor]) -> Step:
        """The same with every tensor of the lists changed."""
        changed = ([None if x is None else change(x) for x in tensors] for tensors in self.lists())
        return Step(*changed, dict(self.options))

    def double(self) -> Step:
        """A copy in float64."""
        return self.map(lambda x: x.to(torch.float64, copy=True))

    def part(self, begin: int, end: int) -> Step:
        """The arguments for some parameters alone; shares memory."""
        return Step(*(tensors[begin:end] for tensors in self.lists()), self.options)


def step(
    parameters: Sequence[Parameter],
    dtype: torch.dtype | Sequence[torch.dtype],
    *,
    layout: Callable[[Tensor], Tensor] = contiguous,
    grad_layout: Callable[[Tensor], Tensor] | None = None,
    moment_layout: Callable[[Tensor], Tensor] | None = None,
    storage: torch.dtype | None = None,
    **options: Any,
) -> Step:
    """A step of parameters in the middle of a run; dtypes in turn if there are several, biases as what they go with.
    ``storage`` is the dtype of the inverses where it is not that of the momentum."""
    dtypes = itertools.cycle([dtype] if isinstance(dtype, torch.dtype) else dtype)
    result = Step([], [], [], [], {**OPTIONS, **options})
    current = torch.float32
    for i, (shape, inverse) in enumerate(parameters):
        current = current if inverse is None else next(dtypes)
        wide = ACCUMULATOR[current]
        result.params.append(layout(random(shape, current, 7 * i)))
        result.grads.append((grad_layout or layout)(random(shape, current, 7 * i + 1)))
        result.momentum_buffers.append((moment_layout or layout)(random(shape, wide, 7 * i + 2)))
        result.inverses.append(None if inverse is None else unaligned(symmetric(inverse, storage or wide, 7 * i + 3)))
    return result
