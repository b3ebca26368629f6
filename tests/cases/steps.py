"""The arguments of a step, as tests handle them."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from typing_extensions import Self

SHORT_IN_TURN = (torch.bfloat16, None, torch.bfloat16)
"""Of moments, so that each dtype of parameters has both within a dozen."""


def around_ties(subnormal: bool = True) -> Tensor:
    """Numbers of float32 on ties between those of bfloat16 and around them, up to beyond the largest one.

    Without subnormal ones for Triton's interpreter, which doubles those of bfloat16 when it widens them.
    """
    eps, largest = torch.finfo(torch.bfloat16).eps, torch.finfo(torch.bfloat16).max
    starts = torch.tensor([1.0, 1 + eps, -1.0, -1 - eps, 2.0**-126, 2.0**-130, 2.0**-133, 0.0, largest, -largest])
    if not subnormal:
        starts = starts[(starts == 0) | (starts.abs() >= 2.0**-126)]
    shares = torch.tensor([0.0, 0.25, 0.5, 0.5 + 2**-9, 0.5 - 2**-9, 0.75, 1.0])
    unit = torch.maximum(starts.abs(), torch.tensor(2.0**-126)).log2().floor().exp2() * eps
    numbers = (starts[:, None] + starts.sign()[:, None] * unit[:, None] * shares).flatten()
    return numbers[numbers.isfinite()]


@dataclass
class Lists:
    """The arguments of one call: in a field each, the lists, and in the last the options.

    A subclass has the fields, and calls its op.
    """

    @classmethod
    def of(cls, inputs: dict[str, Any]) -> Self:
        """From all arguments by name."""
        names = [field.name for field in dataclasses.fields(cls)][:-1]
        options = {name: value for name, value in inputs.items() if name not in names}
        return cls(*(inputs[name] for name in names), options)

    def lists(self) -> tuple[list[Any], ...]:
        """The arguments by position."""
        return tuple(getattr(self, field.name) for field in dataclasses.fields(self))[:-1]

    def copy(self) -> Self:
        """The same in memory of its own, strides and surroundings included."""
        return copy.deepcopy(self)

    def map(self, change: Callable[[Tensor], Tensor]) -> Self:
        """The same with every tensor of the lists changed, but for the steps."""
        changed = {
            field.name: [x if x is None else x.clone() if field.name == "steps" else change(x) for x in tensors]
            for field, tensors in zip(dataclasses.fields(self), self.lists(), strict=False)
        }
        return type(self)(**changed, options=dict(self.options))

    def double(self) -> Self:
        """A copy in float64."""
        return self.map(lambda x: x.to(torch.float64, copy=True))

    def part(self, begin: int, end: int) -> Self:
        """The arguments for some parameters alone; shares memory."""
        return type(self)(*(tensors[begin:end] for tensors in self.lists()), self.options)

    def only(self, i: int) -> Self:
        """The arguments for parameter i alone; shares memory."""
        return self.part(i, i + 1)
