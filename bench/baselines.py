"""Optimizers of torch that steps are measured against."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


def parameters(values: Sequence[Tensor], grads: Sequence[Tensor]) -> list[nn.Parameter]:
    """Parameters in the memory of these tensors, with these gradients."""
    params = [nn.Parameter(p) for p in values]
    for p, g in zip(params, grads, strict=True):
        p.grad = g
    return params


def adamw(params: Sequence[nn.Parameter], exp_avgs: Sequence[Tensor]) -> torch.optim.AdamW:
    """Fused AdamW with these first moments: on the same memory as what is measured."""
    optimizer = torch.optim.AdamW(params, lr=1e-3, fused=True)
    for p, m in zip(params, exp_avgs, strict=True):
        optimizer.state[p] = {"step": torch.zeros(()), "exp_avg": m, "exp_avg_sq": torch.zeros_like(p)}
    return optimizer
