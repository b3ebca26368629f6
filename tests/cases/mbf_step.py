"""Parameters and arguments of mbf_step_."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fisher_kernels.ops import mbf_step_
from fisher_kernels.tools.samples import mbf_step
from fisher_kernels.tools.samples.mbf_step import OPTIONS, Parameter, block_size
from tests.cases import contiguous, unaligned
from tests.cases.steps import Lists

__all__ = ["PARAMETERS", "Parameter", "Step", "packed", "step", "unpack"]


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
    Parameter((19, 100), (1, 2, 64, 64)),  # rows and columns that fill no tile of a product
    Parameter((19,), None),
    Parameter((17, 40), (1, 1, 40, 40)),
    Parameter((2, 300), (1, 2, 257, 257)),  # larger than the CPU's kernel takes
)


def unpack(inverse: Tensor) -> Tensor:
    """Packed lower triangles as whole blocks."""
    n = block_size(inverse.shape[1])
    blocks = inverse.new_zeros(inverse.shape[0], n, n)
    i, j = torch.tril_indices(n, n)
    blocks[:, i, j] = inverse
    blocks[:, j, i] = inverse
    return blocks


NAMES = ("params", "grads", "momentum_buffers", "inverses")
"""The lists that the op takes, in order."""


@dataclass
class Step(Lists):
    """The arguments of one call."""

    params: list[Tensor]
    grads: list[Tensor]
    momentum_buffers: list[Tensor]
    inverses: list[Tensor | None]
    options: dict[str, Any] = field(default_factory=lambda: dict(OPTIONS))

    def run(self) -> tuple[Tensor, Tensor]:
        """Takes the step, in place; the counts of skipped blocks, and the scale."""
        return self.run_with_caps()[:2]

    def run_with_caps(self) -> tuple[Tensor, Tensor, Tensor]:
        """The same, and what each parameter's layer is shortened by."""
        return mbf_step_(*self.lists(), **self.options)


def step(*args: Any, **options: Any) -> Step:
    """A step of parameters in the middle of a run."""
    return Step.of(mbf_step.step(*args, **{"layout": contiguous, "inverse_layout": unaligned, **options}))
