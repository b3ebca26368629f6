"""Raw sums of which each process keeps the rows that it has of a weight: a reduce-scatter adds them up.

What is made of the rows is then the business of the process that has them. Whether all of a sum is finite is not: one
that is not is refused as a whole. So each process tells the others whether its rows are, by one number for each sum. Of
a matrix it may be columns that are divided, which are then sent as if they were rows.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

Key = TypeVar("Key")

ROOM = 2.0**-32
"""Part of the largest number that sums are to be below: what they are divided by is at least one over the samples."""


@dataclass(frozen=True)
class Division:
    """How the rows of a sum are divided among processes: in their order, as ``torch.chunk`` divides them.

    Attributes:
        rows: how many there are.
        group: the processes that have the rows of one copy.
        copies: groups of processes that have the same rows.
        device: the type of device on which they send.
        across: whether what is called a row here is a column of a sum that lies row after row.
    """

    rows: int
    group: Any
    copies: tuple[Any, ...]
    device: str
    across: bool = False

    @classmethod
    def over(cls, rows: int, mesh: Any, dimension: int) -> Division:
        """That of so many rows over one dimension of a mesh, of which the others have copies."""
        groups = [mesh.get_group(d) for d in range(mesh.ndim)]
        return cls(rows, groups.pop(dimension), tuple(groups), mesh.device_type)

    @property
    def size(self) -> int:
        """Rows of the first process; the last ones have fewer, or none."""
        return -(-self.rows // dist.get_world_size(self.group))

    @property
    def own(self) -> int:
        """Rows of this process."""
        return self.of(dist.get_rank(self.group))

    def of(self, place: int) -> int:
        """Rows of a process of the group."""
        return max(0, min(self.size, self.rows - place * self.size))

    @property
    def here(self) -> slice:
        """The rows of this process among all."""
        first = min(dist.get_rank(self.group) * self.size, self.rows)
        return slice(first, first + self.own)


def scatter(sums: Mapping[Key, Tensor], divisions: Mapping[Key, Division]) -> dict[Key, Tensor]:
    """The own rows of sums over all processes, given the sums of this one: each is flat, row after row.

    One reduce-scatter for all that are divided among the same processes in one precision, and where there are copies an
    all-reduce of the own rows. Rows are filled up with zeros to equal shares.

    Returns:
        The own rows, flat, or the own columns, one after another; of a sum of which this process has none one zero in
        their place.
    """
    together: dict[tuple[Any, ...], list[Key]] = {}
    for key, x in sums.items():
        division = divisions[key]
        together.setdefault((division.group, division.copies, division.device, x.dtype, x.device), []).append(key)
    found: dict[Key, Tensor] = {}
    for (group, copies, device, _, home), keys in together.items():
        shares = [_shares(sums[key], divisions[key]) for key in keys]
        flat = torch.cat(shares, 1).to(device)
        own = flat.new_empty(flat.shape[1])
        reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor  # before torch 2.13
        reduce_scatter(own, flat.flatten(), group=group)
        for others in copies:
            dist.all_reduce(own, group=others)
        for key, part in zip(keys, own.to(home).split([share.shape[1] for share in shares]), strict=True):
            rows = divisions[key].own
            # A part of the whole would keep all of it.
            found[key] = part.view(divisions[key].size, -1)[:rows].flatten().clone() if rows else part.new_zeros(1)
    return found


def _shares(x: Tensor, division: Division) -> Tensor:
    """Flat rows as (processes, numbers of each)."""
    x = x.view(-1, division.rows).t().flatten() if division.across else x
    padded = dist.get_world_size(division.group) * division.size * (x.numel() // division.rows)
    if padded > x.numel():
        x = torch.cat([x, x.new_zeros(padded - x.numel())])
    return x.view(-1, padded // dist.get_world_size(division.group))


def flag(own: Tensor) -> Tensor:
    """0 of rows that are finite, else NaN, as one number: a sum of them over processes is 0 where all are.

    What is so large that it may overflow where it is divided by less than 1, for a mean, counts as not finite.
    """
    small = (own.abs() < ROOM * torch.finfo(own.dtype).max).all()
    return torch.where(small, 0.0, math.nan).to(own).reshape(1)


def flagged(own: Tensor, total: Tensor) -> Tensor:
    """Own rows if the sum of all flags is 0, else NaN in place of each number."""
    return torch.where(total.to(own).isfinite(), own, math.nan)
