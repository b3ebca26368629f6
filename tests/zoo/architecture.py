"""What an architecture of the zoo is: how its model is made, small and as published, and a batch and a loss for it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fisher_kernels.tools.served import differentiable

Batch = Mapping[str, Any]
"""Arguments of the model's forward by name."""


def loss_of_outputs(outputs: Any) -> Tensor:
    """The model's own loss if it has one, else one that gives every element of the outputs another derivative."""
    if (own := getattr(outputs, "loss", None)) is not None:
        loss: Tensor = own
        return loss
    return torch.stack([_fit(t) for t in differentiable(outputs)]).sum()


def _fit(output: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(output.numel())
    target = torch.randn(output.shape, generator=generator, dtype=torch.float64).to(output.dtype)
    return (output - target).square().mean()


@dataclass(frozen=True)
class Architecture:
    """One architecture.

    Attributes:
        published: the model whose parameters are counted, by the name that its authors gave it.
        source: where its configuration is from.
        build: makes the model, small (True) or as published (False), of the same layers.
        batch: arguments of the small model's forward.
        loss: what is trained; of the outputs.
        expected: share of the published model's parameters that a rule of AdaFisher serves, at least.
        exempt: why that is less than 0.95.
    """

    published: str
    source: str
    build: Callable[[bool], nn.Module]
    batch: Callable[[torch.Generator], Batch]
    loss: Callable[[Any], Tensor] = loss_of_outputs
    expected: float = 0.95
    exempt: str = ""


def seeded(seed: int, build: Callable[[], nn.Module]) -> nn.Module:
    """A model that depends on the seed alone."""
    torch.manual_seed(seed)
    return build()


def cast(batch: Batch, dtype: torch.dtype) -> Batch:
    """The batch with floating-point tensors in another dtype."""
    return {
        name: value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value
        for name, value in batch.items()
    }
