"""Adam's running averages, for parameters that optimizers with factors train element by element."""

from __future__ import annotations

import torch
from torch import Tensor


def average(old: Tensor, new: Tensor, decay: float, going_on: float | Tensor) -> None:
    """Average a tensor in; not where ``going_on`` is 0, which may be known on the device alone."""
    if isinstance(going_on, Tensor):
        old.copy_(torch.where(going_on.to(old.device).bool(), old.mul(decay).add_(new, alpha=1 - decay), old))
    else:
        old.mul_(decay).add_(new, alpha=1 - decay)


def unbiased(count: Tensor, decay: float) -> Tensor:
    """The share of an average that has been filled since it was zero; 1 before the first."""
    share = 1 - decay ** count.double()
    return torch.where(share > 0, share, 1.0)
