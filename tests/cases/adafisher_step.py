"""Parameters and arguments of adafisher_step_."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from fisher_kernels.ops import adafisher_step_
from fisher_kernels.tools.samples import adafisher_step
from fisher_kernels.tools.samples.adafisher_step import Parameter
from tests.cases import contiguous
from tests.cases.steps import Lists

__all__ = ["PARAMETERS", "Parameter", "Step", "step"]

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


NAMES = ("params", "grads", "exp_avgs", "steps", "row_factors", "column_factors")
"""The lists that the op takes, in order."""


@dataclass
class Step(Lists):
    """The arguments of one call."""

    params: list[Tensor]
    grads: list[Tensor]
    exp_avgs: list[Tensor]
    steps: list[Tensor]
    row_factors: list[Tensor | None]
    column_factors: list[Tensor | None]
    options: dict[str, Any]

    def run(self) -> Tensor:
        """Takes the step, in place; the counts of skipped elements."""
        return adafisher_step_(*self.lists(), **self.options)

    def tensors(self) -> list[Tensor]:
        """Every tensor among the arguments."""
        return [x for x in itertools.chain(*self.lists(), self.options.values()) if isinstance(x, Tensor)]


def step(*args: Any, **options: Any) -> Step:
    """A step of parameters in the middle of a run."""
    return Step.of(adafisher_step.step(*args, **{"layout": contiguous, **options}))
