"""Blocks that lie where the rows of their parameters do, and how they are saved.

Where ``fully_shard`` alone divides the rows of a weight, blocks that belong to rows are divided with them. In the state
they are DTensors (rows, blocks of a row, n, n), or (rows, n, n) where each row has one, of which a process has those of
its rows, however many these are.

Checkpoints have (count, n, n), as one process has them. Of these ``Shard(0)`` gives each process an equal share of
blocks. They are those of its rows where the number of processes divides that of rows, or each row has one block;
elsewhere blocks are gathered for a checkpoint, layer by layer, and each process takes its share.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fisher_kernels.curvature.block_rules import Blocks
from fisher_kernels.curvature.gathered import is_distributed
from fisher_kernels.curvature.scattered import Division
from fisher_kernels.optim.layouts import divided, ranks_of
from fisher_kernels.optim.shares import whole


@dataclass(frozen=True)
class RowShards:
    """Where the blocks of the rows of a parameter are.

    Attributes:
        mesh: the processes.
        placements: of the parameter on it: rows are divided among the processes of one dimension.
        rows: how many there are.
        each: how many blocks a row has.
    """

    mesh: Any
    placements: tuple[Any, ...]
    rows: int
    each: int

    @property
    def division(self) -> Division:
        """How the rows are divided."""
        dimension = next(d for d, placement in enumerate(self.placements) if not placement.is_replicate())
        return Division.over(self.rows, self.mesh, dimension)

    @property
    def count(self) -> int:
        """How many blocks are here."""
        return self.division.own * self.each

    def placed(self, own: Tensor) -> Tensor:
        """The blocks that are here, (count, ...), as they lie in the state."""
        form = (self.rows,) if self.each == 1 else (self.rows, self.each)
        return self._dtensor(own.reshape(-1, *form[1:], *own.shape[1:]), (*form, *own.shape[1:]))

    def here(self, x: Any) -> Tensor:
        """A view of the blocks that are here, (count, ...), of what lies in the state or is that already."""
        if not is_distributed(x):
            return x
        own: Tensor = x.to_local()
        return own.view(-1, *own.shape[2:]) if self._has_rows(x) else own

    def whole(self, own: Tensor) -> Tensor:
        """All blocks, given those that are here; every process has to ask."""
        return whole(self.placed(own)).reshape(-1, *own.shape[1:])

    def saved(self, x: Any) -> Tensor:
        """As a checkpoint has it: (blocks, ...), of which each process has an equal share."""
        if not self._has_rows(x):
            return x
        shape = (self.rows * self.each, *x.shape[2:])
        if self._is_equal:
            return self._dtensor(self.here(x), shape)
        share = -(-shape[0] // dist.get_world_size(self.division.group))
        first = dist.get_rank(self.division.group) * share
        return self._dtensor(whole(x).reshape(shape)[first : first + share].clone(), shape)

    def loaded(self, x: Any) -> Tensor:
        """As the state has it, given that, or all blocks as one process has them.

        Raises:
            ValueError: there are not as many blocks.
        """
        if is_distributed(x) and x.device_mesh == self.mesh and tuple(x.placements) == self.placements:
            if self._has_rows(x) or self.each == 1:
                return x
            if self._is_equal and len(x) == self.rows * self.each:
                return self.placed(x.to_local())
        x = whole(x)
        if len(x) != self.rows * self.each:
            raise ValueError(
                f"the state has {len(x):,} blocks of a weight, expected {self.rows * self.each:,}: it is that of "
                "another model"
            )
        rows = self.division.here
        return self.placed(x[rows.start * self.each : rows.stop * self.each].clone())

    @property
    def _is_equal(self) -> bool:
        """Whether an equal share of the blocks is that of the rows."""
        processes = dist.get_world_size(self.division.group)
        return self.division.size * self.each == -(-self.rows * self.each // processes)

    def _has_rows(self, x: Tensor) -> bool:
        return self.each > 1 and tuple(x.shape[:2]) == (self.rows, self.each)

    def _dtensor(self, own: Tensor, shape: tuple[int, ...]) -> Any:
        return as_dtensor(own, shape, self.mesh, self.placements)


def as_dtensor(own: Tensor, shape: tuple[int, ...], mesh: Any, placements: Sequence[Any]) -> Any:
    """What this process has of a tensor, as one that lies on a mesh."""
    from torch.distributed.tensor import DTensor  # whoever has a mesh has imported it

    strides = [math.prod(shape[d + 1 :]) for d in range(len(shape))]
    found = DTensor.from_local(own, mesh, placements, run_check=False, shape=torch.Size(shape), stride=tuple(strides))
    # It puts parts on the device of the mesh, also those of parameters that are kept on the CPU beside a GPU.
    return found if found.device.type == own.device.type else found.to(own.device)


def in_each_row(blocks: Blocks, params: Sequence[Tensor]) -> int | None:
    """How many blocks belong to each row of all of these parameters; None where blocks belong to no row.

    Those that rows share do not, nor do those of a weight that lies the other way round.
    """
    rows = {p.shape[0] if p.dim() else 0 for p in params}
    if blocks.shared_by is not None or blocks.transposed or len(rows) != 1 or not blocks.count:
        return None
    (count,) = rows
    return blocks.count // count if count and blocks.count % count == 0 else None


def row_shards(
    blocks: Blocks, params: Sequence[Any], meshes: Mapping[Any, Any], ranks: Collection[int]
) -> RowShards | None:
    """Where the blocks of these parameters are divided with their rows; None where all are whole in every process.

    Args:
        meshes: as ``data_meshes`` finds them.
        ranks: the processes over which statistics are added up.
    """
    each, first = in_each_row(blocks, params), params[0]
    if each is None or not is_distributed(first):
        return None
    mesh, placements = first.device_mesh, tuple(first.placements)
    if any(meshes.get(p) != mesh or tuple(p.placements) != placements for p in params):
        return None  # parallelize_module divides some of them too, or not all are divided
    found = divided(first)
    if len(found) != 1 or not placements[found[0]].is_shard(0) or ranks_of(mesh) != set(ranks):
        return None
    return RowShards(mesh, placements, first.shape[0], each)
