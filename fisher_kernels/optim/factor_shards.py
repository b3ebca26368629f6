"""Kronecker factors of which each process has some rows, and how those that invert them come by all of them.

Where ``fully_shard`` alone divides the parameters of a layer, and each inverse is made by one process for all, a
refresh need not give every process the whole factors. A reduce-scatter gives each the sums of its own rows, which it
averages; in an inversion the rows of a factor go to the process that makes its inverse, one all-to-all for all factors
together. A process that owned whole factors instead would have its largest layer, however many processes there are,
and a reduce-scatter sends as much to each as to whom has most.

In the state a factor is then a DTensor (1, n, n), of which each process has its rows, so a checkpoint of it is that of
one process, whatever the number of processes that save and load it. Second moments in a basis, (1, rows, columns), lie
there by their columns in the same way.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from fisher_kernels.curvature.gathered import is_distributed
from fisher_kernels.curvature.scattered import Division
from fisher_kernels.optim.layouts import divided, ranks_of
from fisher_kernels.optim.row_shards import as_dtensor
from fisher_kernels.optim.shares import whole

Key = TypeVar("Key")


@dataclass(frozen=True)
class FactorShards:
    """The processes that have rows of the factors of a layer, or columns of its second moments.

    Attributes:
        mesh: the processes.
        dimension: of the mesh, along which they are divided; along the others there are copies.
    """

    mesh: Any
    dimension: int

    @property
    def processes(self) -> int:
        """How many have different rows."""
        size: int = self.mesh.size(self.dimension)
        return size

    def has_rows_of(self, params: Sequence[Any]) -> bool:
        """Whether it is the rows of parameters that are divided there."""
        return all(p.placements[self.dimension].is_shard(0) for p in params)

    def division(self, n: int) -> Division:
        """How n rows are divided."""
        return Division.over(n, self.mesh, self.dimension)

    def zeros(self, shape: tuple[int, ...], along: int, dtype: torch.dtype, device: torch.device) -> Any:
        """A matrix (1, rows, columns) of zeros, whose rows (1) or columns (2) are divided."""
        own = list(shape)
        own[along] = self.division(shape[along]).own
        return self._placed(torch.zeros(own, dtype=dtype, device=device), shape, along)

    def loaded(self, x: Any, shape: tuple[int, ...], along: int, what: str = "a factor") -> Any:
        """Such a matrix, wherever it lies, as the state has it; every process has to ask.

        Raises:
            ValueError: it has another shape.
        """
        if tuple(x.shape) != shape:
            raise ValueError(
                f"the state has {what} of shape {tuple(x.shape)}, expected {shape}: it is that of another model"
            )
        if is_distributed(x) and x.device_mesh == self.mesh and tuple(x.placements) == self._placements(along):
            return x
        own = self.division(shape[along])
        return self._placed(whole(x).narrow(along, own.here.start, own.own).clone(), shape, along)

    def _placed(self, own: Tensor, shape: tuple[int, ...], along: int) -> Any:
        return as_dtensor(own, shape, self.mesh, self._placements(along))

    def _placements(self, along: int) -> tuple[Any, ...]:
        from torch.distributed.tensor import Replicate, Shard  # whoever has a mesh has imported it

        return tuple(Shard(along) if d == self.dimension else Replicate() for d in range(self.mesh.ndim))


Divide = Callable[[Sequence[Any]], FactorShards | None]
"""The parameters of a layer -> how its factors may be divided."""


def factor_shards(params: Sequence[Any], meshes: Mapping[Any, Any], ranks: Collection[int]) -> FactorShards | None:
    """Where the factors of a layer may be divided; None where they are whole in every process.

    Args:
        params: its parameters.
        meshes: as ``data_meshes`` finds them.
        ranks: the processes over which statistics are added up.
    """
    first = params[0]
    if not is_distributed(first) or any(meshes.get(p) != first.device_mesh for p in params):
        return None  # parallelize_module divides some of them too, or not all are divided
    mesh, dimensions = first.device_mesh, divided(first)
    if len(dimensions) != 1 or mesh.size(dimensions[0]) == 1 or ranks_of(mesh) != set(ranks):
        return None
    return FactorShards(mesh, dimensions[0])


class Rows(NamedTuple):
    """The own rows (rows, n) of a matrix, how all are divided, and the rank of its owner among all processes."""

    own: Tensor
    division: Division
    owner: int


def to_owners(rows: Mapping[Key, Rows]) -> dict[Key, Tensor]:
    """The matrices (n, n) that this process owns, of the rows that all have.

    One all-to-all for all that are divided among the same processes in one precision. Where there are copies an owner
    takes part in that of its own.
    """
    together: dict[tuple[Any, ...], list[Key]] = {}
    for key, (own, division, _) in rows.items():
        together.setdefault((division.group, division.device, own.dtype, own.device), []).append(key)
    found: dict[Key, Tensor] = {}
    for (group, device, _, home), keys in together.items():
        ranks = dist.get_process_group_ranks(group)
        of_each = [[key for key in keys if rows[key].owner == rank] for rank in ranks]
        if not any(of_each):
            continue
        mine, places = of_each[dist.get_rank(group)], range(len(ranks))
        numbers = [[rows[key].division.of(place) * rows[key].own.shape[1] for key in mine] for place in places]
        flat = torch.cat([rows[key].own.reshape(-1) for of_one in of_each for key in of_one]).to(device)
        received = flat.new_empty(sum(map(sum, numbers)))
        given = [sum(rows[key].own.numel() for key in of_one) for of_one in of_each]
        dist.all_to_all_single(received, flat, [sum(of_one) for of_one in numbers], given, group=group)
        parts = iter(received.to(home).split([n for of_one in numbers for n in of_one]))
        pieces = [[next(parts) for _ in mine] for _ in places]
        for i, key in enumerate(mine):
            found[key] = torch.cat([of_one[i] for of_one in pieces]).view(-1, rows[key].own.shape[1])
    return found
