r"""The dot products of SOFIM where each process has a shard of the parameters.

The kernel of a step makes ``|u|^2`` and ``u^T g`` of the tensors it is given, and takes them for the whole. So it is
given one number more, in float64, that stands for the shards of the other processes: with :math:`s` and :math:`p` what
they add to the two products,

.. math:: u = \sqrt{s}, \qquad g = p / \sqrt{s} \qquad \Longrightarrow \qquad u^2 = s, \quad u g = p

Everything else of the step, elements that are not finite among it, is the kernel's. What the products are is summed
over all shards beforehand, in float64, in one pass over gradients and moments and one all-reduce.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from fisher_kernels.curvature.gathered import is_distributed
from fisher_kernels.ops import ACCUMULATOR, Rounding
from fisher_kernels.ops._rounding import Rounder
from fisher_kernels.ops._step import as_moment
from fisher_kernels.optim import stages
from fisher_kernels.optim.shares import copies, sum_over_mesh

TOO_LARGE = 1e200
"""Its square overflows."""


class Shard(NamedTuple):
    """A parameter, and what this process has of it, its gradient and its moment; then the weight decay in g."""

    whole: Tensor
    weight: Tensor
    gradient: Tensor
    moment: Tensor
    step: Tensor
    decay: float
    rounding: Rounding | None

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """What a step reads and writes."""
        return self.weight, self.gradient, self.moment, self.step


def products(shard: Shard, settings: dict[str, Any], grad_scale: Tensor | None) -> Tensor:
    """``|u|^2``, and ``u^T g`` where that is asked for, of one shard as the step is going to have them: float64."""
    dtype, beta = ACCUMULATOR[shard.weight.dtype], settings["beta"]
    g = shard.gradient.to(dtype)
    if grad_scale is not None:
        g = g / grad_scale.to(g.device, dtype).reshape(())
    g = -g if settings["maximize"] else g
    if shard.decay:
        g = g.add(shard.weight.to(dtype), alpha=shard.decay)
    advanced = beta * shard.moment.to(dtype) + (1 - beta) * g
    if shard.rounding is None:
        new = as_moment(advanced, shard.moment.dtype)
    else:
        numbers = shard.rounding.numbers(shard.moment.numel())
        new = Rounder(shard.moment, numbers, shard.step.long() + 1).round(advanced, shard.moment.dtype, low=True)
    correction = 1 - beta ** (shard.step.double().reshape(()) + 1)
    finite = new.isfinite()
    u = new.masked_fill(~finite, 0.0).double() / correction
    square = u.square().sum().reshape(1)
    if settings["direction"] == "momentum":
        return square
    return torch.cat((square, (u * g.masked_fill(~finite, 0.0).double()).sum().reshape(1)))


def of_others(
    batches: Sequence[Sequence[tuple[Shard, Tensor]]], groups: Sequence[dist.ProcessGroup | None]
) -> list[Tensor]:
    """What other processes add to the products of each batch, given those of its shards here.

    Args:
        groups: for each batch the processes with the other stages of a pipeline, of which each has parameters of it.
    """
    here = [torch.stack([own for _, own in batch]).sum(0) for batch in batches]
    totals = [torch.zeros_like(x) for x in here]
    by_mesh: dict[Any, list[Tensor]] = {}
    for i, batch in enumerate(batches):
        for shard, own in batch:
            if is_distributed(shard.whole):
                mesh = shard.whole.device_mesh  # type: ignore[attr-defined]
                by_mesh.setdefault(mesh, [torch.zeros_like(x) for x in here])[i] += own / copies(shard.whole)
            else:
                totals[i] += own  # which every process has
    for mesh, parts in by_mesh.items():
        summed = sum_over_mesh(torch.cat(parts), mesh).split([len(x) for x in here])
        for total, part in zip(totals, summed, strict=True):
            total += part
    for total, group in zip(totals, groups, strict=True):
        if group is not None:
            total += stages.of_others(group, total)
    return [_difference(total, own) for total, own in zip(totals, here, strict=True)]


def _difference(total: Tensor, own: Tensor) -> Tensor:
    others = total - own
    others[0].clamp_(min=0)  # the rounding of nothing
    return torch.where(total.isfinite().all(), others, torch.inf)


def stand_in(
    others: Tensor, settings: dict[str, Any], grad_scale: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The number that stands for other processes: its parameter, gradient, moment and count."""
    u = others[0].sqrt().clamp(max=TOO_LARGE).reshape(1)
    g = u
    if settings["direction"] == "gradient":
        g = torch.where(u > 0, others[1].clamp(max=TOO_LARGE) / u, 0.0)
    beta = settings["beta"]
    moment = (u - g) * ((1 - beta) / beta) if beta > 0 else torch.zeros_like(u)
    given = -g if settings["maximize"] else g
    if grad_scale is not None:
        given = given * grad_scale.to(g.device, g.dtype).reshape(())
    return torch.zeros_like(u), given, moment, torch.zeros((), dtype=torch.float32, device=u.device)
