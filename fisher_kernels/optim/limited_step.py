"""A step along given directions: a trust region over all parameters, a cap for each layer, decay."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import Parameter

FLOOR = 1e-3
"""Root mean square that the cap takes weights to have at least, so that those that start at 0 can leave it."""


@dataclass(eq=False)
class Move:
    """How one parameter is to move.

    Attributes:
        gradient: what entered the moment, in the precision of the state.
        vector: what is multiplied by the inverse curvature: the moment.
        direction: the product; zero where the parameter stays.
        stays: where neither step nor decay takes place; None for nowhere.
    """

    param: Parameter
    group: dict[str, Any]
    gradient: Tensor
    vector: Tensor
    direction: Tensor
    stays: Tensor | None = None


class Limits(NamedTuple):
    """What the step was scaled by: the trust region, and for each layer its cap; float64 ()."""

    trust: Tensor
    caps: list[Tensor]


def trust_scale(moves: Sequence[Move]) -> Tensor:
    r"""One number for all groups.

    .. math::

        \nu = \min \left( 1,
            \sqrt{\frac{\mathrm{kl\_clip}}{\left| \sum \mathrm{lr}^2 \langle D, m \rangle \right|}} \right)

    With D = F^-1 m the sum is twice the change of the model's distribution to second order. Groups without ``kl_clip``
    have no part in it; where groups differ the smallest one holds.
    """
    bound = [move for move in moves if move.group.get("kl_clip") is not None]
    if not bound:
        device = moves[0].param.device if moves else torch.device("cpu")
        return torch.ones((), dtype=torch.float64, device=device)
    clip = min(move.group["kl_clip"] for move in bound)
    total: Any = 0.0
    for move in bound:
        product = torch.dot(move.direction.reshape(-1), move.vector.reshape(-1)).double()
        total = total + product * move.group["lr"] ** 2
    return (clip / total.abs()).sqrt().clamp(max=1.0).nan_to_num(1.0)


def cap(layer: Sequence[Move], trust: Tensor) -> Tensor:
    r"""The number that keeps the step of one layer small beside its weights.

    .. math:: \min \left( 1, \frac{\mathrm{max\_relative\_step} \cdot \max(|W|, \mathrm{floor} \sqrt{n})}
        {\mathrm{lr}\, \nu\, |D|} \right)

    Weight and bias count together, in the group of the weight.
    """
    limit = layer[0].group["max_relative_step"]
    if limit is None:
        return torch.ones_like(trust)
    size = torch.stack([torch.linalg.vector_norm(m.param, dtype=m.direction.dtype) for m in layer]).norm().double()
    step = torch.stack([torch.linalg.vector_norm(m.direction) * m.group["lr"] for m in layer]).norm().double() * trust
    least = FLOOR * sum(m.param.numel() for m in layer) ** 0.5
    return (limit * size.clamp(min=least) / step).clamp(max=1.0).nan_to_num(1.0)


def limited_step_(layers: Sequence[Sequence[Move]]) -> Limits:
    r"""Move parameters, layer by layer.

    .. math:: w \leftarrow w - \mathrm{lr}\, (\nu\, \mathrm{cap} \cdot D \quad (+\, \lambda w \text{ if decoupled}))

    Returns:
        The trust region's number, and the cap of each layer.
    """
    trust = trust_scale([move for layer in layers for move in layer])
    caps = []
    for layer in layers:
        caps.append(cap(layer, trust))
        scale = trust.to(caps[-1].device) * caps[-1]
        for move in layer:
            _take(move, scale)
    return Limits(trust, caps)


def _take(move: Move, scale: Tensor) -> None:
    p, group = move.param, move.group
    step = move.direction * (scale * group["lr"]).to(move.direction.dtype)
    if group["weight_decay"] and group["decoupled"]:
        step = step + p.to(step.dtype) * (group["lr"] * group["weight_decay"])
    if move.stays is not None:
        step = step.masked_fill(move.stays, 0.0)
    p.copy_(p.to(step.dtype) - step) if p.dtype != step.dtype else p.sub_(step)
