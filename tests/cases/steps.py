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
