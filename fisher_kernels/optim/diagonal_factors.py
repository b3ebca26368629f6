"""The averaged diagonal factors of AdaFisher, kept in the optimizer's state, and the curvature they give."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, MutableMapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import Parameter

from fisher_kernels.layers import Factors, Sums
from fisher_kernels.ops import ACCUMULATOR, factor_ema_, minmax
from fisher_kernels.statistics import Site


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

Place = tuple[Tensor | None, Tensor | None]
"""Row and column factor of a parameter; None stands for 1."""


class DiagonalFactors:
    """Averages of H and S of every site, and the row and column factors of every parameter made from them.

    Averages live in ``state[owner]`` under ``input_factor``, ``output_factor``, ``bias_factor`` and ``factor_weight``;
    a second orientation of a tied weight has them under ``tied_...``. All else here is derived from them.

    Attributes:
        placed: parameter -> its row and column factor, once its layer has statistics.
        refused: indices of sites -> how often their statistics were refused as not finite, on the device.
    """

    def __init__(
        self,
        sites: Sequence[Site],
        state: MutableMapping[Tensor, Any],
        groups: Mapping[Parameter, dict[str, Any]],
    ) -> None:
        self.sites, self.state, self.groups = sites, state, groups
        self.placed: dict[Parameter, Place] = {}
        self.refused: dict[tuple[int, ...], Tensor] = {}
        self._averages: dict[int, dict[str, Tensor]] = {}
        self._ones: dict[tuple[torch.dtype, torch.device], Tensor] = {}
        self._normal: dict[int, Factors] = {}
        self._central: dict[int, Tensor | None] = {}
        self._served = {p for site in sites for layer in site.layers for p in layer.parameters.values()}
        self._orientations: dict[Parameter, list[int]] = defaultdict(list)
        for index, site in enumerate(sites):
            self._orientations[site.owner].append(index)
        self._known = {index for index in range(len(sites)) if self._has_statistics(index)}
        self._form(sorted(self._known))

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

    def _factors(self, index: int) -> tuple[Factors, Tensor]:
        """The averages of one site without their weight, and the weight."""
        *factors, (_, weight) = self.averages(index).items()
        return dict(factors), weight

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

    def _one(self, like: Tensor) -> Tensor:
        """The number 1 in the dtype and on the device of a weight."""
        key = (like.dtype, like.device)
        if key not in self._ones:
            self._ones[key] = torch.ones_like(like)
        return self._ones[key]

    def fold(self, taken: Sequence[tuple[int, Sums]]) -> None:
        """Average new statistics in, one call for all sites that share coefficients, and form the curvature."""
        batches: dict[tuple[Any, ...], tuple[list[int], list[Tensor], list[Tensor]]] = defaultdict(lambda: ([], [], []))
        for index, sums in taken:
            site = self.sites[index]
            group = self.groups[site.owner]
            averages = self.averages(index)
            new = site.rule.factors(site.module, sums)
            new[WEIGHT] = self._one(averages[WEIGHT])
            key = (group["variant"], group["gamma"], group["eps"], len(averages), site.owner.device)
            indices, old, values = batches[key]
            indices.append(index)
            old += averages.values()
            values += [
                v if v.dtype == a.dtype else v.to(a.dtype) for v, a in ((new[n], a) for n, a in averages.items())
            ]
        for (name, gamma, eps, joint, device), (indices, old, values) in batches.items():
            decay, gain = VARIANTS[name].coefficients(gamma)
            refused = factor_ema_(old, values, decay, gain, VARIANTS[name].normalize, eps, joint)
            count(self.refused, tuple(indices), refused)
            # On a GPU nobody waits to learn what was refused; minmax makes ones of an average whose weight is 0.
            accepted = [not r for r in refused.tolist()] if device.type == "cpu" else [True] * len(indices)
            self._known.update(index for index, ok in zip(indices, accepted, strict=True) if ok)
        self._form([index for index, _ in taken if index in self._known])

    def _form(self, indices: Sequence[int]) -> None:
        """The row and column factors of the parameters of some sites."""
        if not indices:
            return
        for index, factors in self._normalized(indices).items():
            site = self.sites[index]
            self._normal[index] = factors
            placed = site.rule.place(site.module, factors)
            for layer in site.layers:
                self.placed.update({p: placed[role] for role, p in layer.parameters.items()})
        for owner in {self.sites[index].owner for index in indices}:
            if len(self._orientations[owner]) > 1:
                self.placed[owner] = self._tie(owner)
        self._central.clear()

    def _normalized(self, indices: Sequence[int]) -> dict[int, Factors]:
        """The factors of each site as its variant uses them; every minmax of one eps in one call."""
        result: dict[int, Factors] = {}
        batches: dict[tuple[float, torch.device], list[tuple[int, str, Tensor, Tensor]]] = defaultdict(list)
        for index in indices:
            site = self.sites[index]
            group = self.groups[site.owner]
            factors, weight = self._factors(index)
            if group["variant"] == "paper":
                rows = [(index, name, factor, weight) for name, factor in factors.items()]
                batches[group["eps"], site.owner.device] += rows
                result[index] = {}
            elif group["variant"] == "relative":
                result[index] = _relative(site, {name: factor / weight for name, factor in factors.items()})
            else:
                result[index] = factors
        for (eps, _), rows in batches.items():
            vectors = minmax([row[2] for row in rows], eps, [row[3] for row in rows])
            for (index, name, _, _), vector in zip(rows, vectors, strict=True):
                result[index][name] = vector
        return result

    def _tie(self, owner: Parameter) -> Place:
        """One row and one column vector for a weight that its uses see in different orientations.

        Use k with vectors r_k and c_k has the weight ``w_k = mean(r_k) mean(c_k)``, its mean curvature. The weighted
        mean of ``r_k / mean(r_k)`` is the row, the weighted sum of ``c_k / mean(c_k)`` the column; their product has
        the mean ``sum_k w_k``. Both are normalised afterwards as the variant says.
        """
        group = self.groups[owner]
        rows, columns = [], []
        for index in self._orientations[owner]:
            if index in self._known:
                factors, weight = self._factors(index)
                if group["variant"] != "release":
                    factors = {name: factor / weight for name, factor in factors.items()}
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

    def constant(self, p: Parameter) -> Tensor | None:
        """The curvature of a parameter that has no factors, as a factor of one element; None for 1.

        That is 1 where a layer serves it but has no statistics yet; for a fallback the group's ``fallback_curvature``,
        1 in the release, or else the median over the group's layers of ``mean(S') mean(H') + damping``.
        """
        group = self.groups[p]
        given = group["fallback_curvature"]
        if p in self._served or (given is None and group["variant"] == "release"):
            return None
        if id(group) not in self._central:
            self._central[id(group)] = (
                self._median(group) if given is None else torch.tensor([given], dtype=torch.float64)
            )
        value = self._central[id(group)]
        return None if value is None else value.to(p.device, ACCUMULATOR[p.dtype])

    def _median(self, group: dict[str, Any]) -> Tensor | None:
        means = []
        for index in sorted(self._known):
            if self.groups[self.sites[index].owner] is group:
                factors = self._normal[index]
                inputs = factors.get("input_factor")
                means.append(factors["output_factor"].mean() * (1.0 if inputs is None else inputs.mean()))
        return (torch.stack(means).quantile(0.5) + group["damping"]).reshape(1) if means else None


def _relative(site: Site, factors: Factors) -> Factors:
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
    return {name: torch.where(torch.as_tensor(mean) > 0, f, 1.0) for name, f in scaled.items()}


def count(counters: dict[tuple[int, ...], Tensor], key: tuple[int, ...], new: Tensor) -> None:
    """Add counts where they are, without waiting for the device."""
    if key in counters:
        counters[key].add_(new)
    else:
        counters[key] = new
