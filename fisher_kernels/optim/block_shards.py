"""The step of MBF where each process has a share of the parameters.

Blocks and their inverses are whole in every process, so the momentum is brought together, the direction is made of all
of it, and each process takes the part of it that it has. The kernels make the direction: a step of length 1, with no
momentum and from zero, along the negative of what it is given.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fisher_kernels.ops import direction_sums, mbf_step_
from fisher_kernels.optim.layouts import own_part
from fisher_kernels.optim.shard_bounds import of_all_shards
from fisher_kernels.optim.shares import gathered_together, like_parameter, local
from fisher_kernels.optim.stages import bounded_step

AT_ONCE = 1 << 24
"""Of how many numbers all is gathered at a time, if a weight does not have more."""

View = Callable[[int, Tensor], Tensor]
"""The number of a parameter and a tensor of its shape -> the tensor as blocks lie in it."""


class Settings(NamedTuple):
    """Those of a step; ``lr``, ``weight_decay``, ``floor`` and ``layers`` have one entry for each parameter."""

    lr: Sequence[float | Tensor]
    weight_decay: Sequence[float]
    floor: Sequence[float]
    layers: Sequence[int]
    momentum: float
    decoupled: bool
    maximize: bool
    kl_clip: float | None
    kl_along: str
    max_relative_step: float | None
    grad_scale: Tensor | None
    found_inf: Tensor | None
    pipeline_group: Any = None


def step_shards(
    params: Sequence[Any], moments: Sequence[Any], inverses: Sequence[Tensor | None], view: View, s: Settings
) -> tuple[Tensor, Tensor, Tensor]:
    """As ``mbf_step_``; blocks that are left alone are so in all processes, which get the same results."""
    weights = [local(p) for p in params]
    gradients = [_entering(i, p, w, s) for i, (p, w) in enumerate(zip(params, weights, strict=True))]
    old = [local(m) for m in moments]
    new = [m.mul(s.momentum).add_(g) for m, g in zip(old, gradients, strict=True)]
    directions, kept, skipped = _directions(params, new, inverses, view)
    if s.found_inf is not None:
        kept = [k & ~s.found_inf.to(k.device).bool() for k in kept]
    for m, n, k in zip(old, new, kept, strict=True):
        m.copy_(torch.where(k, n, m))
    along = gradients if s.kl_along == "gradient" else old
    sums = direction_sums(
        [torch.where(w.isfinite(), w, 0.0) for w in weights],
        directions,
        [torch.where(k, x, 0.0) for k, x in zip(kept, along, strict=True)],
        products=s.kl_clip is not None,
        weights=s.max_relative_step is not None,
    )
    layers = _numbered(s.layers)
    scale, caps, _ = bounded_step(
        s.pipeline_group,
        weights,
        directions,
        of_all_shards(params, sums, layers, s.floor),
        layers,
        lr=s.lr,
        weight_decay=s.weight_decay if s.decoupled else [0.0] * len(params),
        kl_clip=s.kl_clip,
        max_relative_step=[s.max_relative_step] * len(params),
        floor=[0.0] * len(params),
        found_inf=s.found_inf,
    )
    return skipped, scale, caps[torch.tensor(layers, dtype=torch.int64, device=caps.device)]


def _entering(i: int, p: Any, weight: Tensor, s: Settings) -> Tensor:
    """What enters the momentum."""
    wide = torch.float64 if p.dtype == torch.float64 else torch.float32
    g = like_parameter(p, p.grad).to(wide)
    if s.grad_scale is not None:
        g = g / s.grad_scale.to(g.device, wide)
    g = -g if s.maximize else g
    return g if s.decoupled or not s.weight_decay[i] else g.add(weight.to(wide), alpha=s.weight_decay[i])


def _directions(
    params: Sequence[Any], vectors: Sequence[Tensor], inverses: Sequence[Tensor | None], view: View
) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """The own parts of directions, where these are not left alone, and how many blocks are, given those of vectors."""
    directions: list[Tensor] = []
    kept: list[Tensor] = []
    counts = []
    for some in _portions(params, inverses):
        found = _directions_of(some, [params[i] for i in some], [vectors[i] for i in some], inverses, view)
        directions += found[0]
        kept += found[1]
        counts.append(found[2])
    return directions, kept, torch.cat(counts)


def _portions(params: Sequence[Any], inverses: Sequence[Tensor | None]) -> Iterator[range]:
    """Numbers of parameters of which all is gathered at a time; a bias stays with its weight."""
    begin, numel = 0, 0
    for i, p in enumerate(params):
        if i > begin and inverses[i] is not None and numel + p.numel() > AT_ONCE:
            yield range(begin, i)
            begin, numel = i, 0
        numel += p.numel()
    yield range(begin, len(params))


def _directions_of(
    some: range, params: Sequence[Any], vectors: Sequence[Tensor], inverses: Sequence[Tensor | None], view: View
) -> tuple[list[Tensor], list[Tensor], Tensor]:
    whole = gathered_together(params, vectors)
    moved = [torch.zeros_like(v) for v in whole]
    # What is left alone keeps this, which is not what it would become.
    marks = [(v == -1).to(v.dtype) + 1 for v in whole]
    skipped, _, _ = mbf_step_(
        *_views(some, view, moved, whole, marks),
        [inverses[i] for i in some],
        lr=1.0,
        momentum=0.0,
        weight_decay=0.0,
        decoupled=True,
        maximize=True,
    )
    kept = [mark == -v for mark, v in zip(marks, whole, strict=True)]
    directions, kept = ([own_part(p, x) for p, x in zip(params, xs, strict=True)] for xs in (moved, kept))
    return directions, kept, skipped


def _views(some: range, view: View, *lists: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    first, second, third = ([view(i, x) for i, x in zip(some, xs, strict=True)] for xs in lists)
    return first, second, third


def _numbered(layers: Sequence[int]) -> list[int]:
    """Numbers of layers, in the order of their first parameters, as 0, 1, 2 and so on."""
    places: dict[int, int] = {}
    return [places.setdefault(layer, len(places)) for layer in layers]
