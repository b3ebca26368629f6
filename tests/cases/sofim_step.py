"""Shapes and arguments of sofim_step_."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from fisher_kernels.ops import sofim_step_
from fisher_kernels.tools.samples import sofim_step
from fisher_kernels.tools.samples.sofim_step import OPTIONS
from tests.cases import contiguous
from tests.cases.steps import Lists

# What layers have, scalars and nothing at all; then sizes around registers and around the chunks of 1024 elements that
# have a partial sum each.
SHAPES: tuple[tuple[int, ...], ...] = (
    (3, 5),
    (5,),
    (),
    (1,),
    (0,),
    (3, 0, 5),
    *((n,) for n in (2, 4, 7, 8, 9, 15, 16, 17, 31, 33)),
    (6, 4, 3, 3),
    (1, 3, 1, 7),
    (1023,),
    (1024,),
    (1025,),
    (2, 1030),
    (63, 65),
    (8, 12, 5, 7),
    (4, 3, 2, 20, 9),
)


NAMES = ("params", "grads", "exp_avgs", "steps")
"""The lists that the op takes, in order."""


@dataclass
class Step(Lists):
    """The arguments of one call."""

    params: list[Tensor]
    grads: list[Tensor]
    exp_avgs: list[Tensor]
    steps: list[Tensor]
    options: dict[str, Any] = field(default_factory=lambda: dict(OPTIONS))

    def run(self) -> tuple[Tensor, Tensor]:
        """Takes the step, in place; the counts of skipped elements, and what each parameter adds to |u|^2."""
        return sofim_step_(*self.lists(), **self.options)

    def only(self, i: int) -> Step:
        """The arguments for parameter i alone, options that are lists included; shares memory."""
        alone = super().only(i)
        alone.options = {k: v[i] if isinstance(v, list) and len(v) > 1 else v for k, v in self.options.items()}
        return alone


def step(*args: Any, **options: Any) -> Step:
    """A step of parameters in the middle of a run."""
    return Step.of(sofim_step.step(*args, **{"layout": contiguous, **options}))
