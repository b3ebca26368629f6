"""Inverses that one process makes for all: which one, and how the others come by them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Final

import torch
import torch.distributed as dist
from torch import Tensor

from fisher_kernels.curvature.processes import Processes

EVERY_RANK: Final = "every_rank"
ONE_OWNER: Final = "one_owner"
SHARINGS = (EVERY_RANK, ONE_OWNER)
"""Every process makes all inverses, or each is made by one, which sends it to the others."""


def owners(costs: Sequence[float], processes: int) -> list[int]:
    """Who makes what, so that all have nearly as much to do: the dearest first, to whom has least to do so far."""
    loads, found = [0.0] * processes, [0] * len(costs)
    for i in sorted(range(len(costs)), key=lambda i: -costs[i]):
        found[i] = loads.index(min(loads))
        loads[found[i]] += costs[i]
    return found


def send(made: Sequence[tuple[int, Sequence[Tensor]]], processes: Processes) -> list[list[Tensor]]:
    """What owners have made, in every process: one broadcast for each owner and dtype.

    Args:
        made: the owner of each item and its tensors, of the right shapes in all processes; of them the owner's count.
    """
    flat = [(owner, x.dtype, i, j) for i, (owner, tensors) in enumerate(made) for j, x in enumerate(tensors)]
    found: list[list[Tensor]] = [[*tensors] for _, tensors in made]
    flat.sort(key=lambda place: (place[0], str(place[1])))
    for (owner, _), places in groupby(flat, key=lambda place: place[:2]):
        members = [(i, j) for *_, i, j in places]
        together = torch.cat([made[i][1][j].reshape(-1) for i, j in members])
        dist.broadcast(together, group=processes.group, group_src=owner)
        if owner != processes.rank:
            for (i, j), part in zip(members, _parts(together, [made[i][1][j] for i, j in members]), strict=True):
                found[i][j] = part
    return found


def _parts(together: Tensor, like: Sequence[Tensor]) -> Iterator[Tensor]:
    for part, x in zip(together.split([x.numel() for x in like]), like, strict=True):
        yield part.view_as(x)
