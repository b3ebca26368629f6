"""Shapes and arguments of heavy_ball_, direction_sums and capped_step_."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from fisher_kernels.ops import capped_step_, direction_sums, heavy_ball_
from fisher_kernels.tools.samples import capped_step
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


@dataclass
class Momentum(Lists):
    """The arguments of one call of heavy_ball_."""

    params: list[Tensor]
    grads: list[Tensor]
    momentum_buffers: list[Tensor]
    options: dict[str, Any] = field(default_factory=dict)

    def run(self) -> Tensor:
        """Advances the momentum, in place; the counts of skipped elements."""
        return heavy_ball_(*self.lists(), **self.options)


@dataclass
class Sums(Lists):
    """The arguments of one call of direction_sums."""

    params: list[Tensor]
    directions: list[Tensor]
    momentum_buffers: list[Tensor]
    options: dict[str, Any] = field(default_factory=dict)

    def run(self) -> Tensor:
        return direction_sums(*self.lists(), **self.options)


@dataclass
class Step(Lists):
    """The arguments of one call of capped_step_."""

    params: list[Tensor]
    directions: list[Tensor]
    options: dict[str, Any] = field(default_factory=dict)

    def run(self) -> tuple[Tensor, Tensor, Tensor]:
        """Takes the step, in place; the scale, the factors and the counts of skipped elements."""
        return capped_step_(*self.lists(), **self.options)


def momentum(*args: Any, **options: Any) -> Momentum:
    """Momentum in the middle of a run."""
    return Momentum.of(capped_step.momentum(*args, **{"layout": contiguous, **options}))


def sums(*args: Any, **options: Any) -> Sums:
    """Directions that have come of momentum."""
    return Sums.of(capped_step.sums(*args, **{"layout": contiguous, **options}))


def step(*args: Any, **options: Any) -> Step:
    """A step along directions, with the sums that belong to them."""
    return Step.of(capped_step.step(*args, **{"layout": contiguous, **options}))
