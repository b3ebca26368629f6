"""Inputs of adafisher_step_."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fisher_kernels.ops import ACCUMULATOR, adafisher_step_
from tests.cases import contiguous, random

Shape = tuple[int, ...]


class Parameter(NamedTuple):
    """The shapes of a parameter and of its factors; None where there is none."""

    shape: Shape
    row: Shape | None = None
    column: Shape | None = None


# What layers have, and every way of leaving a factor out; then sizes around those at which kernels change their ways.
PARAMETERS: tuple[Parameter, ...] = (
    Parameter((3, 5), (3,), (5,)),
    Parameter((5,), (5,), (1,)),
    Parameter((5,), (5,)),
    Parameter((5,), None, (5,)),
    Parameter((3, 5), (3,), (1,)),
    Parameter((3, 5), (1,), (5,)),
    Parameter((3, 5), (1,), (1,)),
    Parameter((3, 5), (3,)),
    Parameter((3, 5), None, (5,)),
    Parameter((3, 5)),
    Parameter((3, 1), (3,), (1,)),
    Parameter((1, 5), (1,), (5,)),
    Parameter(()),
    Parameter((), (1,), (1,)),
    Parameter((1,), (1,), (1,)),
    Parameter((0,)),
    Parameter((0,), (0,), (1,)),
    Parameter((0, 4), (0,), (4,)),
    Parameter((3, 0), (3,), (0,)),
    Parameter((3, 0, 5), (3,)),
    Parameter((6, 2, 3), (6,), (2, 6)),  # groups
    Parameter((6, 2, 3), None, (3, 6)),
    Parameter((6, 1), (6,), (3, 1)),
    Parameter((1, 4), (1,), (1, 4)),
    Parameter((6, 4, 3, 3), (6,), (36,)),
    Parameter((2, 3, 7, 9), (6,), (63,)),
    Parameter((4, 3, 2, 2, 3), (4,), (2, 36)),
    Parameter((63, 17), (63,), (17,)),
    Parameter((1023,), (1023,)),
    Parameter((1025,), None, (1025,)),
    Parameter((2, 1030), (2,), (1030,)),
    Parameter((130, 33), (130,), (2, 33)),
    Parameter((2, 4099), (2,), (4099,)),
    Parameter((6, 1, 3, 3), (6,), (6, 9)),  # a depthwise convolution: a group for each row
    Parameter((700, 1, 3), (700,), (700, 3)),
    Parameter((5, 70), (5,), (5, 70)),
    Parameter((1300, 2), (1300,), (2,)),
    Parameter((500, 9), (500,), (9,)),
    Parameter((300, 13), (300,), (60, 13)),
    Parameter((120, 7), None, (4, 7)),
    Parameter((90, 16), (90,), (16,)),
    # Rows that fill whole registers, and are long enough to be worked on without a buffer.
    Parameter((9, 64), (9,), (64,)),
    Parameter((6, 5, 16), (6,), (3, 80)),
    Parameter((7, 1, 128), (7,), (7, 128)),
    Parameter((5, 384), (5,)),
    Parameter((4, 320), None, (2, 320)),
    Parameter((2, 4096), (2,), (4096,)),
    Parameter((2048,), (2048,), (1,)),
)

OPTIONS: dict[str, Any] = {
    "lr": 0.01,
    "beta": 0.9,
    "damping": 1e-3,
    "weight_decay": 0.0,
    "decoupled": False,
    "maximize": False,
}


@dataclass
class Step:
    """The arguments of one call."""

    params: list[Tensor]
    grads: list[Tensor]
    exp_avgs: list[Tensor]
    steps: list[Tensor]
    row_factors: list[Tensor | None]
    column_factors: list[Tensor | None]
    options: dict[str, Any] = field(default_factory=lambda: dict(OPTIONS))

    def run(self) -> Tensor:
        """Takes the step, in place; the counts of skipped elements."""
        return adafisher_step_(*self.lists(), **self.options)

    def lists(self) -> tuple[list[Any], ...]:
        return self.params, self.grads, self.exp_avgs, self.steps, self.row_factors, self.column_factors

    def tensors(self) -> list[Tensor]:
        """Every tensor among the arguments."""
        return [x for x in itertools.chain(*self.lists(), self.options.values()) if isinstance(x, Tensor)]

    def copy(self) -> Step:
        """The same in memory of its own, strides and surroundings included."""
        return copy.deepcopy(self)

    def map(self, change: Callable[[Tensor], Tensor]) -> Step:
        """The same with every tensor of the lists but the steps changed."""

        def changed(tensors: Sequence[Any]) -> list[Any]:
            return [None if x is None else change(x) for x in tensors]

        return Step(
            changed(self.params),
            changed(self.grads),
            changed(self.exp_avgs),
            [t.clone() for t in self.steps],
            changed(self.row_factors),
            changed(self.column_factors),
            dict(self.options),
        )

    def double(self) -> Step:
        """A copy in float64."""
        return self.map(lambda x: x.to(torch.float64, copy=True))

    def only(self, i: int) -> Step:
        """The arguments for parameter i alone; shares memory."""
        params, grads, exp_avgs, steps, rows, columns = ([tensors[i]] for tensors in self.lists())
        return Step(params, grads, exp_avgs, steps, rows, columns, self.options)


def step(
    parameters: Sequence[Parameter],
    dtype: torch.dtype | Sequence[torch.dtype],
    *,
    layout: Callable[[Tensor], Tensor] = contiguous,
    grad_layout: Callable[[Tensor], Tensor] | None = None,
    moment_layout: Callable[[Tensor], Tensor] | None = None,
    **options: Any,
) -> Step:
    """A step of parameters in the middle of a run; dtypes in turn if there are several."""
    dtypes = [dtype] if isinstance(dtype, torch.dtype) else dtype
    result = Step([], [], [], [], [], [], {**OPTIONS, **options})
    for i, ((shape, row, column), storage) in enumerate(zip(parameters, itertools.cycle(dtypes), strict=False)):
        wide = ACCUMULATOR[storage]
        result.params.append(layout(random(shape, storage, 7 * i)))
        result.grads.append((grad_layout or layout)(random(shape, storage, 7 * i + 1)))
        result.exp_avgs.append((moment_layout or layout)(random(shape, wide, 7 * i + 2)))
        result.steps.append(torch.tensor(float(i % 5)))
        result.row_factors.append(None if row is None else random(row, wide, 7 * i + 3).square())
        result.column_factors.append(None if column is None else random(column, wide, 7 * i + 4).square())
    return result
