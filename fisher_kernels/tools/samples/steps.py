"""What the samples of the three optimizers' steps share."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from fisher_kernels.ops import ACCUMULATOR
from fisher_kernels.tools.samples.sample import Device, last

Layout = Callable[[Tensor], Tensor]
Moments = torch.dtype | Sequence[torch.dtype | None] | None
"""Dtypes of moments, in turn if there are several: None is the wide one of a parameter."""


def as_made(x: Tensor) -> Tensor:
    """Row-major order."""
    return x


def in_all_orders(x: Tensor) -> Tensor:
    """Row-major order; for the tensors that the samples have for it, columns or channels innermost."""
    if x.shape == (10, 12):
        return x.t().contiguous().t()
    return last(x) if x.shape == (4, 6, 3, 3) else x


def of_moment(storage: torch.dtype, kept: torch.dtype | None) -> torch.dtype:
    """The dtype of a moment: the one that is asked for, or the wide one of the parameter, as always beside float64."""
    wide = ACCUMULATOR[storage]
    return wide if kept is None or wide == torch.float64 else kept


def in_turn(one_or_several: Any) -> Iterator[Any]:
    """One thing, or several in turn, without end."""
    return itertools.cycle(one_or_several if isinstance(one_or_several, Sequence) else [one_or_several])


def on(device: Device, options: dict[str, Any]) -> dict[str, Any]:
    """Options, those that are tensors on a device."""
    return {name: x.to(device) if isinstance(x, Tensor) else x for name, x in options.items()}


def kept_where_not_finite(bounds: Sequence[Tensor], grads: Sequence[Tensor]) -> list[Tensor]:
    """Bounds of what a step changes: an element whose gradient is not finite keeps its value exactly."""
    return [torch.where(g.isfinite(), bound, 0) for bound, g in zip(bounds, grads, strict=True)]
