"""The step of MBF where each process has a share of the parameters.

Blocks that rows share are whole in every process, and so are their inverses: there the momentum is brought together,
the direction is made of all of it, and each process takes the part of it that it has. Blocks that belong to rows are
where these are, and so is all that a direction is made of. The kernels make the direction: a step of length 1, with no
momentum and from zero, along the negative of what it is given.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fisher_kernels.ops import direction_sums, mbf_step_
from fisher_kernels.optim.layouts import own_part
from fisher_kernels.optim.random_rounding import Roundings
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
    roundings: Roundings = Roundings()
    pipeline_group: Any = None


def step_shards(
    params: Sequence[Any],
    moments: Sequence[Any],
    inverses: Sequence[Tensor | None],
    view: View,
    by_rows: Collection[int],
    s: Settings,
) -> tuple[Tensor, Tensor, Tensor]:
    """As ``mbf_step_``; all processes get the same, but each counts what is left alone of blocks that are divided.

    Args:
        by_rows: the numbers of parameters whose inverses are those of the rows that are here.
    """
    weights = [local(p) for p in params]
    gradients = [_entering(i, p, w, s) for i, (p, w) in enumerate(zip(params, weights, strict=True))]
    old = [local(m) for m in moments]
    new = [m.to(g.dtype).mul(s.momentum).add_(g) for m, g in zip(old, gradients, strict=True)]
    directions, kept, skipped = _directions(params, new, inverses, view, by_rows)
    if s.found_inf is not None:
        kept = [k & ~s.found_inf.to(k.device).bool() for k in kept]
    for i, (m, n, k) in enumerate(zip(old, new, kept, strict=True)):
        m.copy_(torch.where(k, s.roundings.narrow(i, n, m.dtype, low=True), m))
    along = gradients if s.kl_along == "gradient" else new
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
        **s.roundings._asdict(),
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
    params: Sequence[Any],
    vectors: Sequence[Tensor],
    inverses: Sequence[Tensor | None],
    view: View,
    by_rows: Collection[int],
) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """The own parts of directions, where these are not left alone, and how many blocks are, given those of vectors."""
    found: dict[int, tuple[Tensor, Tensor, Tensor]] = {}
    for some in _portions(params, inverses, by_rows):
        own, of_some = [vectors[i] for i in some], [params[i] for i in some]
        gathers = some[0] not in by_rows
        whole = gathered_together(of_some, own) if gathers else own
        parts = _directions_of(some, whole, [inverses[i] for i in some], view)
        if gathers:
            parts = [(own_part(p, d), own_part(p, k), n) for p, (d, k, n) in zip(of_some, parts, strict=True)]
        found.update(zip(some, parts, strict=True))
    directions, kept, skipped = zip(*(found[i] for i in range(len(params))), strict=True)
    return list(directions), list(kept), torch.stack(skipped)


def _portions(
    params: Sequence[Any], inverses: Sequence[Tensor | None], by_rows: Collection[int]
) -> Iterator[Sequence[int]]:
    """Numbers of parameters that are gathered at a time, a bias with its weight; first those that need not be."""
    if by_rows:
        yield sorted(by_rows)
    some: list[int] = []
    numel = 0
    for i, p in enumerate(params):
        if i in by_rows:
            continue
        if some and inverses[i] is not None and numel + p.numel() > AT_ONCE:
            yield some
            some, numel = [], 0
        some.append(i)
        numel += p.numel()
    if some:
        yield some


def _directions_of(
    some: Sequence[int], vectors: Sequence[Tensor], inverses: Sequence[Tensor | None], view: View
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Of each vector the direction, where it is not left alone, and how many blocks are."""
    moved = [torch.zeros_like(v) for v in vectors]
    # What is left alone keeps this, which is not what it would become.
    marks = [(v == -1).to(v.dtype) + 1 for v in vectors]
    skipped, _, _ = mbf_step_(
        *_views(some, view, moved, vectors, marks),
        inverses,
        lr=1.0,
        momentum=0.0,
        weight_decay=0.0,
        decoupled=True,
        maximize=True,
    )
    kept = [mark == -v for mark, v in zip(marks, vectors, strict=True)]
    return list(zip(moved, kept, skipped, strict=True))


def _views(
    some: Sequence[int], view: View, *lists: Sequence[Tensor]
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    first, second, third = ([view(i, x) for i, x in zip(some, xs, strict=True)] for xs in lists)
    return first, second, third


def _numbered(layers: Sequence[int]) -> list[int]:
    """Numbers of layers, in the order of their first parameters, as 0, 1, 2 and so on."""
    places: dict[int, int] = {}
    return [places.setdefault(layer, len(places)) for layer in layers]
