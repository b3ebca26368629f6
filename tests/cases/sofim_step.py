"""Inputs of sofim_step_."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fisher_kernels.ops import ACCUMULATOR, sofim_step_
from tests.cases import contiguous, random

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

OPTIONS: dict[str, Any] = {"lr": 0.1, "beta": 0.9, "rho": 0.5}


@dataclass
class Step:
    """The arguments of one call."""

    params: list[Tensor]
    grads: list[Tensor]
    exp_avgs: list[Tensor]
    steps: list[Tensor]
    options: dict[str, Any] = field(default_factory=lambda: dict(OPTIONS))

    def run(self) -> tuple[Tensor, Tensor]:
        """Takes the step, in place; the counts of skipped elements, and what each parameter adds to |u|^2."""
        return sofim_step_(*self.lists(), **self.options)

    def lists(self) -> tuple[list[Tensor], ...]:
        return self.params, self.grads, self.exp_avgs, self.steps

    def copy(self) -> Step:
        """The same in memory of its own, strides and surroundings included."""
        return copy.deepcopy(self)

    def map(self, change: Callable[[Tensor], Tensor]) -> Step:
        """The same with every tensor of the lists but the steps changed."""
        changed = ([change(x) for x in tensors] for tensors in (self.params, self.grads, self.exp_avgs))
        return Step(*changed, [t.clone() for t in self.steps], dict(self.options))

    def double(self) -> Step:
        """A copy in float64."""
        return self.map(lambda x: x.to(torch.float64, copy=True))

    def only(self, i: int) -> Step:
        """The arguments for parameter i alone, options that are lists included; shares memory."""
        chosen = {k: v[i] if isinstance(v, list) and len(v) > 1 else v for k, v in self.options.items()}
        return Step(*([tensors[i]] for tensors in self.lists()), chosen)


def step(
    shapes: Sequence[tuple[int, ...]],
    dtype: torch.dtype | Sequence[torch.dtype],
    *,
    layout: Callable[[Tensor], Tensor] = contiguous,
    grad_layout: Callable[[Tensor], Tensor] | None = None,
    moment_layout: Callable[[Tensor], Tensor] | None = None,
    **options: Any,
) -> Step:
    """A step of parameters in the middle of a run; dtypes in turn if there are several."""
    dtypes = [dtype] if isinstance(dtype, torch.dtype) else dtype
    result = Step([], [], [], [], {**OPTIONS, **options})
    for i, (shape, storage) in enumerate(zip(shapes, itertools.cycle(dtypes), strict=False)):
        result.params.append(layout(random(shape, storage, 7 * i)))
        result.grads.append((grad_layout or layout)(random(shape, storage, 7 * i + 1)))
        result.exp_avgs.append((moment_layout or layout)(random(shape, ACCUMULATOR[storage], 7 * i + 2)))
        result.steps.append(torch.tensor(float(i % 5)))
    return result
