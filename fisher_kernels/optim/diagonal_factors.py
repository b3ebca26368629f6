"""The averaged diagonal factors of AdaFisher, kept in the optimizer's state, and the curvature they give."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Collection, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import Parameter

from fisher_kernels.curvature.diagonal_rules import DiagonalRule, Factors
from fisher_kernels.curvature.rules import Sums
from fisher_kernels.curvature.sites import Site
from fisher_kernels.ops import ACCUMULATOR, factor_ema_, minmax, minmax_
from fisher_kernels.optim.base import Counters, count


class Variant(NamedTuple):
    """Defaults of one variant, and how its factors are averaged."""

    lr: float
    damping: float
    update_interval: int
    normalize: bool
    """Whether factors go through minmax before the average (the release) rather than after it."""

    def coefficients(self, gamma: float) -> tuple[float, float]:
        """Decay and gain of the moving average of the factors."""
        return (gamma / 10, gamma / 100) if self.normalize else (gamma, 1 - gamma)


VARIANTS = {
    "paper": Variant(lr=3e-3, damping=1e-3, update_interval=1, normalize=False),
    "release": Variant(lr=1e-3, damping=1e-3, update_interval=100, normalize=True),
    "relative": Variant(lr=1.0, damping=0.1, update_interval=1, normalize=False),
}

WEIGHT = "factor_weight"
"""State: the moving average of the number 1. It corrects the bias of the other averages, and is 0 before the first."""

MOST_PLANS = 64

Place = tuple[Tensor | None, Tensor | None]
"""Row and column factor of a parameter; None stands for 1."""


@dataclass
class _Batch:
    """Sites that share settings, as the lists that one call on all of them takes."""

    variant: str
    gamma: float
    eps: float
    joint: int
    one: Tensor
    indices: tuple[int, ...] = ()
    averages: list[Tensor] = field(default_factory=list)  # of each site its vectors, then its weight
    vectors: list[Tensor] = field(default_factory=list)
    weights: list[Tensor] = field(default_factory=list)  # one for each vector
    normal: list[Tensor] = field(default_factory=list)  # minmax of the vectors
    arrivals: list[Tensor] = field(default_factory=list)  # where new values are put, on a GPU

    def settle(self, values: list[Tensor]) -> list[Tensor]:
        """New values where they were at the last refresh, on a GPU: a captured graph knows them by their addresses."""
        if self.one.is_cpu:
            return values
        if [x.shape for x in self.arrivals] != [x.shape for x in values]:
            self.arrivals = [torch.empty_like(x) for x in values]
        torch._foreach_copy_(self.arrivals, values)
        return self.arrivals


class DiagonalFactors:
    """Averages of H and S of every site, and the row and column factors of every parameter made from them.

    Averages live in ``state[owner]`` under ``input_factor``, ``output_factor``, ``bias_factor`` and ``factor_weight``;
    a second orientation of a tied weight has them under ``tied_...``. All else here is derived from them.

    Attributes:
        placed: parameter -> its row and column factor, once its layer has statistics.
        version: counts the changes of what :meth:`place_of` and :meth:`constant` return.
        known: indices of the sites that have statistics.
        refused: indices of sites -> how often their statistics were refused as not finite, on the device.
    """

    def __init__(
        self,
        sites: Sequence[Site[DiagonalRule]],
        state: MutableMapping[Tensor, Any],
        groups: Mapping[Parameter, dict[str, Any]],
    ) -> None:
        self.sites, self.state, self.groups = sites, state, groups
        self.placed: dict[Parameter, Place] = {}
        self.version = 0
        self._aside: frozenset[Parameter] = frozenset()
        self.refused: Counters = {}
        self._averages: dict[int, dict[str, Tensor]] = {}
        self._plans: dict[tuple[Any, ...], list[_Batch]] = {}
        self._settings = list({id(groups[site.owner]): groups[site.owner] for site in sites}.values())
        self._normal: dict[int, Factors] = {}
        self._constants: dict[tuple[int, torch.device, torch.dtype], tuple[dict[str, Any], Tensor | None]] = {}
        self._joined: dict[Parameter, Place] = {}
        self._served = {p for site in sites for layer in site.layers for p in layer.parameters.values()}
        self._orientations: dict[Parameter, list[int]] = defaultdict(list)
        for index, site in enumerate(sites):
            self._orientations[site.owner].append(index)
        self._tied = {owner: indices for owner, indices in self._orientations.items() if len(indices) > 1}
        self.known = {index for index in range(len(sites)) if self._has_statistics(index)}
        self._form(self._batches(tuple(sorted(self.known))))

    def _has_statistics(self, index: int) -> bool:
        weight = self.state.get(self.sites[index].owner, {}).get(self._prefix(index) + WEIGHT)
        return weight is not None and float(weight) > 0

    def _prefix(self, index: int) -> str:
        return "tied_" * self._orientations[self.sites[index].owner].index(index)

    def averages(self, index: int) -> dict[str, Tensor]:
        """The averages of one site by name, the weight last; made in the state on first use."""
        if index not in self._averages:
            self._averages[index] = self._in_state(index)
        return self._averages[index]

    def _in_state(self, index: int) -> dict[str, Tensor]:
        site = self.sites[index]
        state = self.state[site.owner]
        start = 1.0 if self.groups[site.owner]["variant"] == "release" else 0.0
        found = {}
        for name, length in {**site.rule.shapes(site.module), WEIGHT: 1}.items():
            key = self._prefix(index) + name
            if key not in state:
                state[key] = torch.full(
                    (length,),
                    0.0 if name == WEIGHT else start,
                    dtype=ACCUMULATOR[site.owner.dtype],
                    device=site.owner.device,
                )
            found[name] = state[key]
        return found

    def fold(self, taken: Sequence[tuple[int, Sums]]) -> None:
        """Average new statistics in, one call for all sites that share coefficients, and form the curvature."""
        sums_of = {index: sums for index, sums in taken if any(sums.counts)}  # the others are of empty batches
        batches = self._batches(tuple(sums_of))
        refused: set[int] = set()
        for batch in batches:
            values: list[Tensor] = []
            divisors: list[float] = []
            for index in batch.indices:
                site = self.sites[index]
                for vector, divisor in site.rule.means(site.module, sums_of[index]).values():
                    values.append(vector)
                    divisors.append(divisor)
                values.append(batch.one)
                divisors.append(1.0)
            if {x.dtype for x in values} != {batch.one.dtype}:
                values = [x.to(batch.one.dtype) for x in values]
            variant = VARIANTS[batch.variant]
            decay, gain = variant.coefficients(batch.gamma)
            flags = factor_ema_(
                batch.averages, batch.settle(values), decay, gain, variant.normalize, batch.eps, batch.joint, divisors
            )
            # Elsewhere reading what was refused would wait for the device; minmax makes ones of an average of weight 0.
            if not flags.is_cpu or any(flags.tolist()):
                count(self.refused, batch.indices, flags)
                if flags.is_cpu:
                    refused.update(itertools.compress(batch.indices, flags.tolist()))
        if refused:
            batches = self._batches(tuple(index for index in sums_of if index not in refused))
        for batch in batches:
            self.known.update(batch.indices)
        self._form(batches)

    def _batches(self, indices: tuple[int, ...]) -> list[_Batch]:
        """Sites that share settings, with the lists that the calls on all of them take; kept until settings change."""
        settings = tuple((g["variant"], g["gamma"], g["eps"]) for g in self._settings)
        if (indices, settings) not in self._plans:
            if len(self._plans) >= MOST_PLANS:  # a model that uses other layers at every step
                self._plans.clear()
            batches: dict[tuple[Any, ...], _Batch] = {}
            for index in indices:
                owner = self.sites[index].owner
                group = self.groups[owner]
                averages = self.averages(index)
                *vectors, weight = averages.values()
                key = (group["variant"], group["gamma"], group["eps"], len(averages), weight.dtype, weight.device)
                batch = batches.setdefault(key, _Batch(*key[:4], torch.ones_like(weight)))
                batch.indices += (index,)
                batch.averages += averages.values()
                batch.vectors += vectors
                batch.weights += [weight] * len(vectors)
            self._plans[indices, settings] = list(batches.values())
        return self._plans[indices, settings]

    def _form(self, batches: Sequence[_Batch]) -> None:
        """The row and column factors of the parameters of some sites."""
        for batch in batches:
            if batch.variant == "paper":
                self._normalize(batch)
            else:
                for index in batch.indices:
                    *factors, (_, weight) = self.averages(index).items()
                    if batch.variant == "relative":
                        self._renew(index, _relative(self.sites[index], {name: f / weight for name, f in factors}))
                    elif index not in self._normal:  # later refreshes change these averages where they are
                        self._place(index, dict(factors))
        formed = {index for batch in batches for index in batch.indices} if self._tied else set()
        for owner, orientations in self._tied.items():
            if not formed.isdisjoint(orientations):
                self._join(owner)
        self._renew_constants()

    def _normalize(self, batch: _Batch) -> None:
        """Minmax of all averages of a batch, into the same tensors at every refresh, so they are placed only once."""
        if not batch.normal:
            for index in batch.indices:
                if index not in self._normal:
                    averages = self.averages(index)
                    self._place(index, {n: torch.empty_like(a) for n, a in averages.items() if n != WEIGHT})
                batch.normal += self._normal[index].values()
        minmax_(batch.normal, batch.vectors, batch.eps, batch.weights)

    def _place(self, index: int, factors: Factors) -> None:
        self.version += 1
        self._normal[index] = factors
        site = self.sites[index]
        placed = site.rule.place(site.module, factors)
        for layer in site.layers:
            self.placed.update({p: placed[role] for role, p in layer.parameters.items()})

    def _renew(self, index: int, factors: Factors) -> None:
        """Place factors. Later ones go where the first ones are: plans and captured graphs know their addresses."""
        if (placed := self._normal.get(index)) is None:
            self._place(index, factors)
        else:
            for name, factor in factors.items():
                placed[name].copy_(factor)

    def _join(self, owner: Parameter) -> None:
        """Place the common factors of a weight that is used in two orientations, at the same addresses every time."""
        new = self._tie(owner)
        for old, factor in zip(self._joined.setdefault(owner, new), new, strict=True):
            if old is not factor and old is not None and factor is not None:
                old.copy_(factor)
        if self.placed[owner] is not self._joined[owner]:
            self.placed[owner] = self._joined[owner]
            self.version += 1

    def _tie(self, owner: Parameter) -> Place:
        """One row and one column vector for a weight that its uses see in different orientations.

        Use k with vectors r_k and c_k has the weight ``w_k = mean(r_k) mean(c_k)``, its mean curvature. The weighted
        mean of ``r_k / mean(r_k)`` is the row, the weighted sum of ``c_k / mean(c_k)`` the column; their product has
        the mean ``sum_k w_k``. Both are normalised afterwards as the variant says.
        """
        group = self.groups[owner]
        rows, columns = [], []
        for index in self._orientations[owner]:
            if index in self.known:
                *averages, (_, weight) = self.averages(index).items()
                factors = {name: a if group["variant"] == "release" else a / weight for name, a in averages}
                row, column = self.sites[index].rule.place(self.sites[index].module, factors)["weight"]
                assert row is not None
                assert column is not None
                rows.append(row * column.mean())
                columns.append(column.flatten() * row.mean())
        row, column = torch.stack(rows).sum(0), torch.stack(columns).sum(0)
        mean = column.mean()
        row = torch.where(mean > 0, row / mean, 1.0)
        if group["variant"] == "paper":
            row, column = minmax([row, column], group["eps"])
        elif group["variant"] == "relative":
            column = torch.where(mean > 0, column / mean, 1.0)
        return row, column

    def set_aside(self, params: Collection[Parameter]) -> None:
        """Let these parameters, and no others that a layer serves, have the curvature of a fallback."""
        if self._aside != params:
            self._aside = frozenset(params)
            self.version += 1

    def place_of(self, p: Parameter) -> Place | None:
        """The row and column factor of a parameter, if its layer has statistics and it is not set aside."""
        return None if p in self._aside else self.placed.get(p)

    def constant(self, p: Parameter) -> Tensor | None:
        """The curvature of a parameter that has no factors, as a factor of one element; None for 1.

        That is 1 where a layer serves it but has no statistics yet; for a fallback the group's ``fallback_curvature``,
        1 in the release, or else the median over the group's layers of ``mean(S') mean(H') + damping``.
        """
        if p in self._served and p not in self._aside:
            return None
        group = self.groups[p]
        key = id(group), p.device, ACCUMULATOR[p.dtype]
        if key not in self._constants:
            self._constants[key] = group, self._fallback(group, *key[1:])
        return self._constants[key][1]

    def _fallback(self, group: dict[str, Any], device: torch.device, dtype: torch.dtype) -> Tensor | None:
        given = group["fallback_curvature"]
        if given is not None:
            return torch.full((1,), given, dtype=dtype, device=device)
        median = None if group["variant"] == "release" else self._median(group)
        return None if median is None else median.to(device, dtype)

    def _renew_constants(self) -> None:
        """Bring constants up to date after a refresh, where they are."""
        for key, (group, old) in self._constants.items():
            new = self._fallback(group, *key[1:])
            if old is not None and new is not None:
                old.copy_(new)
            elif old is not new:
                self._constants[key] = group, new
                self.version += 1

    def _median(self, group: dict[str, Any]) -> Tensor | None:
        means = []
        for index in sorted(self.known):
            if self.groups[self.sites[index].owner] is group:
                factors = self._normal[index]
                inputs = factors.get("input_factor")
                means.append(factors["output_factor"].mean() * (1.0 if inputs is None else inputs.mean()))
        return (torch.stack(means).quantile(0.5) + group["damping"]).reshape(1) if means else None


def _relative(site: Site[DiagonalRule], factors: Factors) -> Factors:
    """Factors whose products average to 1 over all entries of the layer's parameters; ones where that average is 0."""
    total: Tensor | float = 0.0
    entries = 0
    for role, (row, column) in site.rule.place(site.module, factors).items():
        if (parameter := getattr(site.module, role, None)) is not None and row is not None:
            groups = 1 if column is None or column.dim() == 1 else column.shape[0]
            columns = row.new_ones(groups) if column is None else column.reshape(groups, -1).sum(1)
            total = total + row.reshape(groups, -1).sum(1) @ columns
            entries += parameter.numel()
    mean = total / max(entries, 1)
    scaled = {name: f / mean if name != "input_factor" else f for name, f in factors.items()}
    return {
        name: torch.where(mean > 0, f, 1.0) if isinstance(mean, Tensor) else torch.ones_like(f)
        for name, f in scaled.items()
    }
