"""What is bounded over all parameters, where other processes have the other stages of a pipeline.

As with shards of parameters (``shard_products.py``), a kernel is given one number more, which stands for theirs.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Collection, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import Parameter

from fisher_kernels.ops import Rounding, capped_step_

LARGE = 1e300
"""In the place of a product that is not finite: no step is taken with it, and its sum with others is finite."""


def require_group(name: str, group: Any) -> None:
    """Refuse what is neither a process group nor None."""
    if group is None or (dist.is_available() and group is dist.GroupMember.NON_GROUP_MEMBER):
        return
    if not dist.is_available() or not isinstance(group, dist.ProcessGroup):
        raise TypeError(f"{name} is {group!r}, expected a torch.distributed.ProcessGroup or None")


def of_others(group: dist.ProcessGroup, own: Tensor) -> Tensor:
    """What the processes with the other stages add to sums, given what this one does: one all-reduce."""
    total = own.clone()
    dist.all_reduce(total, group=group)
    return total - own


def bounded_step(
    group: dist.ProcessGroup | None,
    params: Sequence[Tensor],
    directions: Sequence[Tensor],
    sums: Tensor,
    layers: Sequence[int],
    *,
    lr: Sequence[float | Tensor],
    weight_decay: Sequence[float],
    kl_clip: float | None,
    max_relative_step: Sequence[float | None],
    floor: Sequence[float],
    found_inf: Tensor | None,
    steps: Sequence[Tensor] | None = None,
    rounding: Sequence[Rounding] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """As ``capped_step_`` with settings of each parameter; the trust region is over the parameters of all stages.

    Args:
        group: the processes that have one stage each; None where this one has all parameters.
    """
    if group is None or kl_clip is None:
        return capped_step_(
            params,
            directions,
            sums,
            layers,
            lr=lr,
            weight_decay=weight_decay,
            kl_clip=kl_clip,
            max_relative_step=max_relative_step,
            floor=floor,
            found_inf=found_inf,
            steps=steps,
            rounding=rounding,
        )
    others = of_others(group, _product(sums, layers, lr).reshape(1)).nan_to_num(LARGE, LARGE, -LARGE)
    scale, caps, skipped = capped_step_(
        [*params, params[0].new_zeros(1)],
        [*directions, directions[0].new_zeros(1)],
        torch.cat((sums, torch.stack((others, *[torch.zeros_like(others)] * 2), 1))),
        [*layers, layers[-1] + 1],
        lr=[*lr, 1.0],
        weight_decay=[*weight_decay, 0.0],
        kl_clip=kl_clip,
        max_relative_step=[*max_relative_step, None],
        floor=[*floor, 0.0],
        found_inf=found_inf,
        steps=None if steps is None else [*steps, steps[0]],
        rounding=None if rounding is None else [*rounding, Rounding(0)],
    )
    return scale, caps[:-1], skipped[:-1]


def _product(sums: Tensor, layers: Sequence[int], lr: Sequence[float | Tensor]) -> Tensor:
    """``sum lr^2 <d, m>`` of the layers that are stepped: those of which all sums are finite."""
    place = torch.tensor(layers, dtype=torch.int64, device=sums.device)
    bad = (~sums.isfinite()).any(1).double()
    of_layer = bad.new_zeros(layers[-1] + 1).index_add_(0, place, bad)
    rates = torch.stack([torch.as_tensor(rate, dtype=torch.float64, device=sums.device).reshape(()) for rate in lr])
    return (rates**2 * sums[:, 0]).masked_fill(of_layer[place] > 0, 0.0).sum()


def take_part(group: dist.ProcessGroup | None, numbers: int, device: torch.device) -> None:
    """Add nothing to the sums of the other stages, in a step that moves no parameter of this one."""
    if group is not None:
        of_others(group, torch.zeros(numbers, dtype=torch.float64, device=device))


def are_of_a_stage(params: Collection[Parameter]) -> bool:
    """Whether parameters are those of a stage of a pipeline over several processes, of torch.distributed.pipelining.

    Its stages are looked for among all objects: they know their module, and nothing leads there from a parameter.
    """
    module = sys.modules.get("torch.distributed.pipelining.stage")  # which nothing else imports
    if module is None:
        return False
    stages = [x for x in gc.get_objects() if issubclass(type(x), module._PipelineStageBase) and x.group_size > 1]
    return any(p in params for stage in stages for p in stage.submod.parameters())
