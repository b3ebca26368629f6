"""The blocks of what has no Kronecker factors: normalisations, embeddings, biases apart, parameters without a rule."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from fisher_kernels.curvature.block_rules import BlockRule
from fisher_kernels.curvature.sites import Site
from fisher_kernels.ops import block_apply
from fisher_kernels.optim.fisher_blocks import FisherBlocks, Part
from fisher_kernels.optim.overlap import Overlap
from fisher_kernels.optim.vectors import Vectors


class TermBlocks(FisherBlocks):
    """Fisher blocks whose k-th average has ``decay = min(1 - 1 / k, beta2)``, as that of the factors beside them."""

    def __init__(
        self,
        sites: Sequence[Site[BlockRule]],
        state: MutableMapping[Tensor, Any],
        groups: Mapping[Parameter, dict[str, Any]],
        overlap: Overlap,
        elsewhere: Collection[Parameter],
    ) -> None:
        super().__init__(sites, state, groups, overlap, elsewhere)
        self._counts: dict[int, int] = {}

    def _decay(self, part: Part) -> float:
        return min(1 - 1 / (self._count(part) + 1), super()._decay(part))

    def _count(self, part: Part) -> int:
        """How many batches were averaged; read from the state once, since a GPU would be waited for."""
        if part.number not in self._counts:
            self._counts[part.number] = self._updates(part)
        return self._counts[part.number]

    def mark(self, part: Part, refused: Tensor | int = 0) -> None:
        self._counts[part.number] = self._count(part) + 1
        super().mark(part, refused)

    def layers(self, wanted: Callable[[Parameter], bool]) -> Iterator[tuple[Parameter, ...]]:
        """The parameters of which ``wanted`` is true, those that share blocks together."""
        for part in self.parts:
            for unit in self.units(part, wanted):
                yield unit.params

    def directions(self, vectors: Vectors) -> Iterator[tuple[Parameter, Tensor]]:
        """F^-1 v for those parameters that have a vector and are served here."""
        for part in self.parts:
            for unit in self.units(part, lambda p: p in vectors):
                count, size, _ = unit.inverse.shape
                found = vectors.of_all(unit.params)
                v = torch.cat([found[p].reshape(count, size // len(unit.params)) for p in unit.params], 1)
                product = v * unit.inverse.squeeze(2) if size == 1 else block_apply(unit.inverse, v)
                for p, d in zip(unit.params, product.chunk(len(unit.params), 1), strict=True):
                    yield p, d.reshape(p.shape)
