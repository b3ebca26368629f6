"""K-FAC's inverses of the averaged Kronecker factors, and the directions they give."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fisher_kernels.ops import block_inverse_
from fisher_kernels.ops.block_inverse import LARGEST
from fisher_kernels.optim.kronecker_factors import (
    SIDES,
    KroneckerFactors,
    Pair,
    in_runs,
    mean_eigenvalue,
    on_the_left,
    on_the_right,
)

MOST_TOGETHER = 2**26
"""How many numbers the factors may have that are inverted together: there are two copies of them meanwhile."""


class FactorInverses(KroneckerFactors):
    r"""K-FAC: both factors are inverted with their share of the damping.

    .. math:: \pi = \sqrt{\frac{\operatorname{tr} A / d_A}{\operatorname{tr} G / d_G}}, \quad
        (A + \pi \sqrt{\lambda}\, I)^{-1}, \quad (G + \sqrt{\lambda} / \pi\, I)^{-1}

    π is 1 where a trace is 0. ``state[owner]`` has ``row_inverse`` and ``column_inverse``, identities at first. A
    factor that is not positive definite with its damping keeps the inverse it has.
    """

    state_names = ("inverse",)

    def _recipe(self, pair: Pair) -> Callable[..., tuple[Tensor, ...]]:
        return partial(_inverses, self._root(pair))

    def _renew(self, pairs: Sequence[Pair]) -> Iterator[Tensor]:
        for together in in_runs(pairs, _numbers, MOST_TOGETHER):
            found = _all_inverses([(self._root(pair), *self._sources(pair)) for pair in together])
            for pair, (*made, bad) in zip(together, found, strict=True):
                self._put_to_use(pair, made)
                yield bad

    def _root(self, pair: Pair) -> float:
        return math.sqrt(self.groups[pair.owner]["damping"])

    def sides(self, pair: Pair) -> tuple[Tensor, Tensor]:
        state = self.averages(pair)
        return state["row_inverse"], state["column_inverse"]

    def direction_of(self, pair: Pair, image: Tensor) -> Tensor:
        return image

    def by_rows(self, pair: Pair, rows: Tensor) -> Tensor:
        return on_the_right(rows, self.averages(pair)["column_inverse"])

    def by_columns(self, pair: Pair, columns: Tensor, here: slice) -> Tensor:
        return on_the_left(self.averages(pair)["row_inverse"], columns)

    def by_rows_again(self, pair: Pair, rows: Tensor) -> Tensor:
        return rows


def _numbers(pair: Pair) -> int:
    """How many its factors have."""
    return sum(math.prod(pair.rule.factor_shape(side)) for side in range(len(SIDES)))


Inverses = tuple[Tensor, Tensor, Tensor]
"""Those of both factors, the old ones where a factor is bad, and how many are."""


def _inverses(root: float, rows: Tensor, columns: Tensor, old_rows: Tensor, old_columns: Tensor) -> Inverses:
    """The inverses of one layer; ``root`` is that of the damping."""
    return _all_inverses([(root, rows, columns, old_rows, old_columns)])[0]


def _all_inverses(layers: Sequence[tuple[Any, ...]]) -> list[Inverses]:
    """The inverses of layers, each with the arguments of :func:`_inverses`.

    Factors of a size are inverted together, but for those on the CPU that its kernel takes one by one anyway.
    """
    found: dict[int, tuple[Tensor, Tensor]] = {}  # 2 layer + side -> inverses, and how many are bad
    alike: dict[tuple[Any, ...], list[tuple[int, Tensor, Tensor, Tensor]]] = defaultdict(list)
    for layer, (root, rows, columns, old_rows, old_columns) in enumerate(layers):
        ratio = (mean_eigenvalue(columns) / mean_eigenvalue(rows)).sqrt()
        pi = torch.where(ratio.isfinite() & (ratio > 0), ratio, 1.0)
        sides = ((rows, root / pi, old_rows), (columns, root * pi, old_columns))
        for side, (factor, damping, old) in enumerate(sides):
            if factor.dim() == 2:
                found[2 * layer + side] = _reciprocals(factor, damping, old)
            elif factor.is_cpu and factor.shape[-1] > LARGEST:
                found[2 * layer + side] = _inverted_alone(factor, damping, old)
            else:
                key = factor.shape[-1], factor.dtype, factor.device
                alike[key].append((2 * layer + side, factor, damping, old))
    for members in alike.values():
        numbers, factors, dampings, olds = zip(*members, strict=True)
        found.update(zip(numbers, _inverted(factors, dampings, olds), strict=True))
    both = [(found[2 * layer], found[2 * layer + 1]) for layer in range(len(layers))]
    return [(rows, columns, bad_rows + bad_columns) for (rows, bad_rows), (columns, bad_columns) in both]


def _reciprocals(diagonal: Tensor, damping: Tensor, old: Tensor) -> tuple[Tensor, Tensor]:
    """The inverses of diagonals (groups, n) with a damping for each, the old one of one that is bad, how many are."""
    new = 1 / (diagonal + damping.unsqueeze(1))
    good = (new.isfinite() & (new > 0)).all(1, keepdim=True)
    return torch.where(good, new, old), (~good).sum()


def _inverted(
    factors: Sequence[Tensor], dampings: Sequence[Tensor], olds: Sequence[Tensor]
) -> list[tuple[Tensor, Tensor]]:
    """The inverses of factors (groups, n, n), with a damping for each matrix, the old one of one that is bad.

    Returns:
        For each factor its inverses, and how many of its matrices are bad.
    """
    damped, new = torch.cat([*factors]), torch.cat([*olds])
    damped.diagonal(dim1=1, dim2=2).add_(torch.cat([*dampings]).unsqueeze(1))
    sizes = [len(factor) for factor in factors]
    bad = block_inverse_(new, damped, 0.0).split(sizes)
    return [(inverses, of_factor.sum()) for inverses, of_factor in zip(new.split(sizes), bad, strict=True)]


def _inverted_alone(factor: Tensor, damping: Tensor, old: Tensor) -> tuple[Tensor, Tensor]:
    """The same for one factor, of which nothing is copied."""
    new = old.clone()
    each = zip(new.split(1), factor.split(1), damping.tolist(), strict=True)
    bad = [block_inverse_(inverse, matrix, value) for inverse, matrix, value in each]
    return new, torch.cat(bad).sum()
