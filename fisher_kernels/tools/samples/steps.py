"""What the samples of the three optimizers' steps share."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from fisher_kernels.tools.samples.sample import Device, last

Layout = Callable[[Tensor], Tensor]


def as_made(x: Tensor) -> Tensor:
    """Row-major order."""
    return x


def in_all_orders(x: Tensor) -> Tensor:
    """Row-major order; for the tensors that the samples have for it, columns or channels innermost."""
    if x.shape == (10, 12):
        return x.t().contiguous().t()
    return last(x) if x.shape == (4, 6, 3, 3) else x


def in_turn(dtype: torch.dtype | Sequence[torch.dtype]) -> Iterator[torch.dtype]:
    """A dtype, or several in turn, without end."""
    return itertools.cycle([dtype] if isinstance(dtype, torch.dtype) else dtype)


def on(device: Device, options: dict[str, Any]) -> dict[str, Any]:
    """Options, those that are tensors on a device."""
    return {name: x.to(device) if isinstance(x, Tensor) else x for name, x in options.items()}


def kept_where_not_finite(bounds: Sequence[Tensor], grads: Sequence[Tensor]) -> list[Tensor]:
    """Bounds of what a step changes: an element whose gradient is not finite keeps its value exactly."""
    return [torch.where(g.isfinite(), bound, 0) for bound, g in zip(bounds, grads, strict=True)]
