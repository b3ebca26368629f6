"""Parameters of which each process has a share: what torch divides, and what is to be said of it.

An optimizer that reads a norm over all parameters, or statistics of whole layers, would take those of its share for the
whole, and nothing would tell. Torch's own optimizers work on one number at a time and need not ask.
"""

from __future__ import annotations

import itertools
import math
import sys
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import Parameter

from fisher_kernels.curvature.caller import calling
from fisher_kernels.curvature.gathered import is_distributed
from fisher_kernels.optim.layouts import block, divided, in_order, is_known, numel

_ZERO = ("torch.distributed.optim.zero_redundancy_optimizer", "ZeroRedundancyOptimizer")
_REMOTE = ("torch.distributed.optim.optimizer", "_LocalOptimizer")


def local(x: Any) -> Tensor:
    """What this process has of a tensor; gradients are to be off."""
    return x.to_local() if is_distributed(x) else x


def whole(x: Any) -> Tensor:
    """All of a tensor; of a DTensor every process has to ask."""
    if not is_distributed(x):
        return x
    return gathered(x, local(x)) if is_known(x) else x.full_tensor()  # which adds up what is a sum over processes


def gathered(p: Any, x: Tensor) -> Tensor:
    """All of a tensor like a parameter, given what this process has of it; of a DTensor every process has to ask."""
    return gathered_together([p], [x])[0]


def gathered_together(params: Sequence[Any], tensors: Sequence[Tensor]) -> list[Tensor]:
    """The same of several at once: one all-gather for those that lie on one mesh in one dtype.

    Where several dimensions of the mesh divide them it is one for each of these. Parts that are smaller than the first
    one, or empty, are filled up to its size.
    """
    found = list(tensors)
    together: dict[tuple[Any, tuple[int, ...], torch.dtype], list[int]] = {}
    for i, (p, x) in enumerate(zip(params, tensors, strict=True)):
        if is_distributed(p) and divided(p):
            together.setdefault((p.device_mesh, divided(p), x.dtype), []).append(i)
    for (mesh, dimensions, _), members in together.items():
        sizes = [numel(block(params[i], lambda d: 0)) for i in members]
        flat = torch.cat([_filled_up(found[i].reshape(-1), size) for i, size in zip(members, sizes, strict=True)])
        for dimension in reversed(dimensions):
            flat = _all_gathered(flat, mesh, dimension)
        count = math.prod(mesh.size(dimension) for dimension in dimensions)
        parts = flat.view(count, sum(sizes)).split(sizes, 1)
        for i, of_each in zip(members, parts, strict=True):
            found[i] = _put_together(params[i], dimensions, of_each)
    return found


def _filled_up(x: Tensor, size: int) -> Tensor:
    return x if len(x) == size else torch.cat([x, x.new_zeros(size - len(x))])


def _all_gathered(x: Tensor, mesh: Any, dimension: int) -> Tensor:
    everything = x.new_empty(mesh.size(dimension) * len(x))
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # the name before torch 2.13
    gather(everything, x, group=mesh.get_group(dimension))
    return everything


def _put_together(p: Any, dimensions: Sequence[int], parts: Tensor) -> Tensor:
    """A tensor like a parameter of its parts, a row of numbers for each."""
    if (found := _put_together_at_once(p, dimensions, parts)) is not None:
        return found
    found = parts.new_empty(p.shape)
    places = itertools.product(*(range(p.device_mesh.size(d)) for d in dimensions))
    for place, row in zip(places, parts, strict=True):
        there = block(p, dict(zip(dimensions, place, strict=True)).__getitem__)
        found[there] = row[: numel(there)].view_as(found[there])
    return found


def _put_together_at_once(p: Any, dimensions: Sequence[int], parts: Tensor) -> Tensor | None:
    """The same in one copy, however many parts there are; None where they are not all alike.

    Some rows may be lacking at the end, as the last of what divides rows leaves it.
    """
    mesh, left = p.device_mesh, [*p.shape]  # the shape of a part
    of_axis = [[d for d in in_order(p) if p.placements[d].dim == along] for along in range(p.dim())]
    for along, of_one in enumerate(of_axis):
        for d in of_one:
            if left[along] % mesh.size(d) and (along > 0 or d != of_one[-1]):
                return None
            left[along] = -(-left[along] // mesh.size(d))
    x = parts.view(*(mesh.size(d) for d in dimensions), *left)
    # For each axis the places along it, then what is of a part: [rows' places, rows, columns' places, columns].
    axes = [[*(dimensions.index(d) for d in of_axis[a]), len(dimensions) + a] for a in range(len(left))]
    x = x.permute([i for of_one in axes for i in of_one])
    if of_axis[0]:
        blocks = math.prod(mesh.size(d) for d in of_axis[0][:-1])
        x = x.reshape(blocks, mesh.size(of_axis[0][-1]) * left[0], *x.shape[len(axes[0]) :])[:, : len(p) // blocks]
    return x.reshape(p.shape)


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
