"""Which part of a parameter a process has, where ``fully_shard`` and ``parallelize_module`` divide its dimensions."""

from __future__ import annotations

import math
import sys
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch.distributed as dist
from torch import Tensor

from fisher_kernels.curvature.gathered import is_distributed

_ranks: weakref.WeakKeyDictionary[Any, frozenset[int]] = weakref.WeakKeyDictionary()


def ranks_of(mesh: Any) -> frozenset[int]:
    """The processes of a mesh. They are read once, as a plan makes tensors that have no numbers later on."""
    if mesh not in _ranks:
        _ranks[mesh] = frozenset(mesh.mesh.flatten().tolist())
    return _ranks[mesh]


def _kind(placement: Any) -> str:
    return type(placement).__name__


def is_known(p: Any) -> bool:
    """Whether each process has one block of a DTensor: some rows, of a matrix some columns, all in one piece.

    ``fully_shard`` divides what tensor parallel training has left to a process, so the first of two that divide the
    same dimension was the second to do so. Its placement says how many parts were there before.
    """
    for d in divided(p):
        placement = p.placements[d]
        if _kind(placement) not in ("Shard", "_StridedShard") or (placement.dim > 0 and p.dim() != 2):
            return False
        if _kind(placement) == "_StridedShard":
            others = zip(p.placements[d + 1 :], p.device_mesh.shape[d + 1 :], strict=True)
            parts = [size for q, size in others if _kind(q) == "Shard" and q.dim == placement.dim]
            if placement.split_factor != math.prod(parts):
                return False
    return True


def divided(p: Any) -> tuple[int, ...]:
    """The dimensions of its mesh among the processes of which a DTensor is divided."""
    return tuple(d for d, placement in enumerate(p.placements) if not placement.is_replicate())


def in_order(p: Any) -> list[int]:
    """These dimensions in the order in which they divided it."""
    return sorted(divided(p), key=lambda d: _kind(p.placements[d]) == "_StridedShard")


def block(p: Any, place: Callable[[int], int]) -> tuple[slice, ...]:
    """The part of a DTensor that is at a place in each dimension of its mesh: of each of its dimensions a slice."""
    bounds = [(0, n) for n in p.shape]
    for d in in_order(p):
        along = p.placements[d].dim
        begin, end = bounds[along]
        size = -(-(end - begin) // p.device_mesh.size(d))  # as torch.chunk has it: the last ones are smaller, or empty
        first = min(begin + place(d) * size, end)
        bounds[along] = first, min(first + size, end)
    return tuple(slice(begin, end) for begin, end in bounds)


def numel(part: Sequence[slice]) -> int:
    """How many numbers are in a part."""
    return math.prod(along.stop - along.start for along in part)


def part(p: Any) -> tuple[slice, ...]:
    """The part of a DTensor that this process has.

    Raises:
        RuntimeError: what is there has another size.
    """
    found = block(p, p.device_mesh.get_local_rank)
    if numel(found) != p.to_local().numel():
        raise RuntimeError(
            f"of a parameter of shape {tuple(p.shape)} with placements {p.placements} this process has "
            f"{p.to_local().numel()} numbers, expected {numel(found)}"
        )
    return found


def own_part(p: Any, x: Tensor) -> Tensor:
    """What this process has of a parameter, of a tensor that is like all of it; of a DTensor as a copy."""
    return x[part(p)].clone() if is_distributed(p) else x  # a view would keep all of it


def _groups_of(state: Any) -> list[Any]:
    """What ``fully_shard`` gathers together for a module; releases without a list of them have one or none."""
    found = getattr(state, "_fsdp_param_groups", None)
    if found is None:
        return [] if state._fsdp_param_group is None else [state._fsdp_param_group]
    return [*found]


def data_meshes(model: Any) -> dict[Any, Any]:
    """The parameters of a model that ``fully_shard`` has divided, and the mesh of processes with parts of the batch.

    None in place of a mesh that activations lie on too: they then have the whole batch.
    """
    module = sys.modules.get("torch.distributed.fsdp._fully_shard._fsdp_state")
    states = [] if module is None else [module._get_module_fsdp_state(m) for m in model.modules()]
    groups = [group for state in states if state is not None for group in _groups_of(state)]
    found = {}
    for fsdp_param in (fsdp_param for group in groups for fsdp_param in group.fsdp_params):
        info = fsdp_param.mesh_info
        found[fsdp_param.sharded_param] = None if getattr(info, "is_spmd_mesh", False) else info.mesh
    return found


def group_of(params: Iterable[Any], meshes: Mapping[Any, Any]) -> dist.ProcessGroup | None:
    """The processes that have the parts of a batch; None where no ``fully_shard`` says so.

    Args:
        meshes: as ``data_meshes`` finds them.

    Raises:
        ValueError: they are some of all processes, on a mesh of several dimensions, or there are several meshes.
    """
    found = {meshes[p] for p in params if p in meshes}
    if all(mesh.size() == dist.get_world_size() for mesh in found):
        return dist.group.WORLD if found else None
    if len(found) > 1 or next(iter(found)).ndim > 1:
        raise ValueError(
            f"process_group is None, and the parts of a batch are on {', '.join(map(str, found))}: expected the group "
            "of the processes that have them"
        )
    group: dist.ProcessGroup = next(iter(found)).get_group()
    return group


def partners(params: Iterable[Any], meshes: Mapping[Any, Any]) -> tuple[frozenset[int], list[Any]]:
    """The ranks among which layers are divided that this process has a part of, its own included, and their groups.

    They work on the same part of the batch. There is a group for each dimension of the mesh of the first such layer.
    """
    found, groups = set[int](), list[Any]()
    for p in params:
        if is_distributed(p):
            mesh, data = p.device_mesh, meshes.get(p)
            first = 0 if data is None else data.ndim  # those of the batch come before
            place = tuple(mesh.get_local_rank(d) for d in range(first))
            found.update(mesh.mesh[place].flatten().tolist())
            groups = groups or [mesh.get_group(d) for d in range(first, mesh.ndim)]
    return frozenset(found), groups
