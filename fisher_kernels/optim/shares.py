"""Parameters of which each process has a share: what torch divides, and what is to be said of it.

An optimizer that reads a norm over all parameters, or statistics of whole layers, would take those of its share for the
whole, and nothing would tell. Torch's own optimizers work on one number at a time and need not ask.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import Parameter

from fisher_kernels.curvature.gathered import is_distributed
from fisher_kernels.optim.caller import calling

_ZERO = ("torch.distributed.optim.zero_redundancy_optimizer", "ZeroRedundancyOptimizer")
_REMOTE = ("torch.distributed.optim.optimizer", "_LocalOptimizer")


def local(x: Any) -> Tensor:
    """What this process has of a tensor; gradients are to be off."""
    return x.to_local() if is_distributed(x) else x


def whole(x: Any) -> Tensor:
    """All of a tensor; of a DTensor every process has to ask."""
    return x.full_tensor() if is_distributed(x) else x


def gathered(p: Any, x: Tensor) -> Tensor:
    """All of a tensor like a parameter, given what this process has of it; of a DTensor every process has to ask."""
    return gathered_together([p], [x])[0]


def gathered_together(params: Sequence[Any], tensors: Sequence[Tensor]) -> list[Tensor]:
    """The same of several at once: one all-gather for those that lie on one mesh in one dtype.

    Rows are divided as ``fully_shard`` divides them, into pieces of which the last ones may be smaller or empty: these
    are filled up to the length of the first one.
    """
    found = list(tensors)
    together: dict[tuple[Any, int, torch.dtype], list[int]] = {}
    for i, (p, x) in enumerate(zip(params, tensors, strict=True)):
        if is_distributed(p):
            divided = [d for d, placement in enumerate(p.placements) if not placement.is_replicate()]
            for dimension in divided:  # one at the most
                together.setdefault((p.device_mesh, dimension, x.dtype), []).append(i)
    for (mesh, dimension, _), members in together.items():
        pieces = mesh.size(dimension)
        lengths = [-(-len(params[i]) // pieces) for i in members]  # in rows
        filled = [_filled_up(found[i], rows).reshape(-1) for i, rows in zip(members, lengths, strict=True)]
        flat = torch.cat(filled)
        everything = flat.new_empty(pieces * len(flat))
        gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # the name before torch 2.13
        gather(everything, flat, group=mesh.get_group(dimension))
        parts = everything.view(pieces, -1).split([len(part) for part in filled], 1)
        for i, rows, part in zip(members, lengths, parts, strict=True):
            shape = params[i].shape
            found[i] = part.reshape(pieces * rows, *shape[1:])[: shape[0]]
    return found


def _filled_up(x: Tensor, rows: int) -> Tensor:
    return x if len(x) == rows else torch.cat([x, x.new_zeros(rows - len(x), *x.shape[1:])])


def own_rows(p: Any, x: Tensor) -> Tensor:
    """What this process has of a parameter, of a tensor that is like all of it; of a DTensor as a copy."""
    return x[slice(*rows(p))].clone() if is_distributed(p) else x  # a view would keep all of it


def rows(p: Any) -> tuple[int, int]:
    """The rows of a DTensor parameter that this process has, as the first and the one behind the last."""
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    shape, offset = compute_local_shape_and_global_offset(p.shape, p.device_mesh, p.placements)
    return (offset[0], offset[0] + shape[0]) if math.prod(shape) else (0, 0)


def is_by_rows(p: Any) -> bool:
    """Whether a DTensor has its rows divided among the processes of one dimension of its mesh, or none."""
    kinds = [placement for placement in p.placements if not placement.is_replicate()]
    return all(type(kind).__name__ == "Shard" and kind.dim == 0 for kind in kinds) and len(kinds) < 2


def group_of(params: Iterable[Any]) -> dist.ProcessGroup | None:
    """The processes that have the shards of parameters; None where there are no shards.

    Raises:
        ValueError: they are some of all processes, on a mesh of several dimensions, or there are several meshes.
    """
    meshes = {p.device_mesh for p in params if is_distributed(p)}
    if all(mesh.size() == dist.get_world_size() for mesh in meshes):
        return dist.group.WORLD if meshes else None
    if len(meshes) > 1 or next(iter(meshes)).ndim > 1:
        raise ValueError(
            f"process_group is None, and the parameters are on {', '.join(map(str, meshes))}: expected the group of "
            "the processes that train the model"
        )
    group: dist.ProcessGroup = next(iter(meshes)).get_group()
    return group


def _groups_of(state: Any) -> list[Any]:
    """What ``fully_shard`` gathers together for a module; releases without a list of them have one or none."""
    found = getattr(state, "_fsdp_param_groups", None)
    if found is None:
        return [] if state._fsdp_param_group is None else [state._fsdp_param_group]
    return [*found]


def gathered_by(model: Any) -> set[Any]:
    """The parameters of a model that ``fully_shard`` has divided."""
    module = sys.modules.get("torch.distributed.fsdp._fully_shard._fsdp_state")
    states = [] if module is None else [module._get_module_fsdp_state(m) for m in model.modules()]
    groups = [group for state in states if state is not None for group in _groups_of(state)]
    return {fsdp_param.sharded_param for group in groups for fsdp_param in group.fsdp_params}


def like_parameter(p: Any, gradient: Any) -> Tensor:
    """What this process has of the gradient of a parameter, where it has that of the parameter."""
    if is_distributed(gradient) and gradient.placements != p.placements:
        gradient = gradient.redistribute(placements=p.placements)
    return local(gradient)


def copies(p: Any) -> int:
    """How many processes of the mesh of a DTensor have the same shard."""
    sizes = zip(p.placements, p.device_mesh.shape, strict=True)
    return math.prod(size for placement, size in sizes if placement.is_replicate())


def sum_over_mesh(x: Tensor, mesh: Any) -> Tensor:
    """The sum over all processes of a mesh: one all-reduce for each of its dimensions."""
    total = x.to(mesh.device_type)
    for dimension in range(mesh.ndim):
        dist.all_reduce(total, group=mesh.get_group(dimension))
    return total.to(x.device)


def over_processes(params: Sequence[Any], sums: Tensor) -> Tensor:
    """Sums over what this process has of parameters, a row for each, as sums over all of them.

    One all-reduce for each dimension of each mesh; every process gets the same to the bit.
    """
    total = sums.clone()
    by_mesh: dict[Any, list[int]] = {}
    for i, p in enumerate(params):
        if is_distributed(p):
            by_mesh.setdefault(p.device_mesh, []).append(i)
    for mesh, members in by_mesh.items():
        times = sums.new_tensor([copies(params[i]) for i in members]).reshape(-1, *[1] * (sums.dim() - 1))
        total[members] = sum_over_mesh(sums[members] / times, mesh)
    return total


def some_anywhere(params: Sequence[Any], flags: Sequence[Tensor | float]) -> list[Tensor]:
    """1 for each parameter of which any process that has a part of it says so, else 0."""
    if not params:
        return []
    each = zip(params, flags, strict=True)
    here = torch.stack([torch.as_tensor(flag, dtype=torch.float64, device=p.device) for p, flag in each])
    return list((over_processes(params, here) > 0).double())


def is_flattened(p: Parameter) -> bool:
    """Whether a parameter is one of FullyShardedDataParallel over several processes, or a part of one."""
    return getattr(p, "_fsdp_flattened", False) and dist.is_initialized() and dist.get_world_size() > 1


def divider() -> str | None:
    """The optimizer that is making one for a share of the parameters right now, by name, or None."""
    if (zero := _class(*_ZERO)) is not None and (found := calling(zero)) is not None and found.world_size > 1:
        return "ZeroRedundancyOptimizer"
    if (remote := _class(*_REMOTE)) is not None and calling(remote) is not None:
        return "DistributedOptimizer"
    return None


def _class(module: str, name: str) -> type | None:
    """A class of torch, if its module was imported: nobody uses it otherwise."""
    return getattr(sys.modules.get(module), name, None)
