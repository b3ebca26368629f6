"""Losses that are sums in data parallel training: statistics are those of the loss whose gradient is taken."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from fisher_kernels import EKFAC, KFAC, MBF, EKFACAdam
from tests.threads import in_threads

pytestmark = pytest.mark.usefixtures("one_thread")

RANKS = 2
NO_BOUND = {"max_relative_step": None, "refresh": "constant", "update_interval": 1, "inverse_interval": 1}
KINDS: dict[Any, dict[str, Any]] = {
    MBF: {"lr": 1e-3, "kl_clip": None, **NO_BOUND},
    KFAC: {"lr": 1e-3, "kl_clip": None, **NO_BOUND},
    EKFAC: {"lr": 1e-3, "kl_clip": None, **NO_BOUND},
    EKFACAdam: {"lr": 1e-3, **NO_BOUND},
}
"""Damping is not relative to the loss in the first three: a statistic in other units makes other steps."""


def built() -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator, dtype=torch.float64) / 2)
    return model


def train(model: nn.Module, optimizer: Any, factor: float, rank: int = 0, world: int = 1) -> list[Tensor]:
    """On a share of each batch, with gradients that are averaged as in data parallel training."""
    for step in range(4):
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(12, 6, generator=generator, dtype=torch.float64).chunk(world)[rank]
        y = torch.randint(3, (12,), generator=generator).chunk(world)[rank]
        optimizer.zero_grad()
        (factor * F.cross_entropy(model(x), y, reduction="sum")).backward()
        for p in model.parameters() if world > 1 else ():
            assert p.grad is not None
            dist.all_reduce(p.grad)
            p.grad /= world
        optimizer.step()
    return [p.detach() for p in model.parameters()]


@pytest.mark.parametrize("factor", [1, RANKS])
@pytest.mark.parametrize("kind", KINDS)
def test_it_is_the_loss_of_the_mean_gradient(kind: Any, factor: int) -> None:
    def work(rank: int) -> list[Tensor]:
        model = built()
        made = {**KINDS[kind], "process_group": dist.group.WORLD}
        return train(model, kind(model, loss_reduction="sum", **made), factor, rank, RANKS)

    model = built()
    expected = train(model, kind(model, loss_reduction="sum", **KINDS[kind]), factor / RANKS)
    for found in in_threads(work, RANKS):
        for p, q in zip(found, expected, strict=True):
            torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-9)
