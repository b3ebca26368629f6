"""What the examples train: a network that learns to imitate another one, of whose outputs each process has a share."""

from __future__ import annotations

import os
import sys
from typing import NoReturn

import torch
import torch.distributed as dist
from torch import Tensor, nn


def network() -> nn.Sequential:
    """The same weights in every process."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(20, 64), nn.LayerNorm(64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 5))


def batch(step: int, share: int, shares: int) -> tuple[Tensor, Tensor]:
    """Part ``share`` of the batch of a step: inputs, and the classes that a fixed linear map finds largest."""
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(256, 20, generator=generator)
    teacher = torch.randn(20, 5, generator=torch.Generator().manual_seed(-1))
    return x.chunk(shares)[share], (x @ teacher).argmax(1).chunk(shares)[share]


def tell(step: int, loss: Tensor) -> None:
    """Print the mean loss of all processes, once."""
    mean = loss.detach().clone()
    dist.all_reduce(mean)
    if dist.get_rank() == 0:
        print(f"step {step}: loss {float(mean) / dist.get_world_size():.4f}", flush=True)


def leave() -> NoReturn:
    """Leave the other processes, as the last thing that this one does.

    The threads of gloo end with the last object that knows their group, and what DTensors cache is never gone. A thread
    that gives back a tensor while Python ends waits for a lock that is not freed any more, and aborts the process. So
    the process ends, and Python does not.
    """
    dist.barrier()  # nobody closes what another one still reads from
    dist.destroy_process_group()
    sys.stdout.flush()
    os._exit(0)
