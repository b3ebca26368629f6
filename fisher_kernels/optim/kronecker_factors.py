"""The averaged Kronecker factors of layers, kept in the optimizer's state, and the directions they give."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import Parameter

from fisher_kernels.curvature.factor_rules import Basis, FactorRule, Means, TermRule
from fisher_kernels.curvature.sites import Site
from fisher_kernels.ops import ACCUMULATOR, block_inverse_, factor_ema_
from fisher_kernels.optim.base import count
from fisher_kernels.optim.overlap import Overlap, Task
from fisher_kernels.optim.renewal import NEXT, Renewal

SIDES = ("row", "column")

UPDATES = "fisher_updates"
"""State: how many batches were averaged."""

MOMENTS = "second_moment"
"""State: second moments in the basis of the factors."""

MOMENT_UPDATES = "moment_updates"
"""State: how many batches the second moments are of, their first estimate from the factors being one."""


def factor_state(made: str) -> tuple[str, ...]:
    """The names in the state of both factors, and of what is made of them."""
    found = [f"{side}_{made}" for side in SIDES]
    return (*(f"{side}_factor" for side in SIDES), *found, *(NEXT + name for name in found))


JITTER = 1e-6
"""Added to the diagonal of a factor of mean eigenvalue 1 before its eigenvectors are found, which it does not change: a
factor of few rows is singular to the last bit, and some solvers do not take that."""

MOST_TOGETHER = 2**26
"""How many numbers the factors may have that are inverted together: there are two copies of them meanwhile."""


@dataclass(eq=False)
class Pair:
    """Both factors of a site, and the parameters that they serve.

    Attributes:
        weight: None where the optimizer does not hold it.
        coupled: whether weight and bias are stepped together. If not, they are taken for uncorrelated. None before it
            is known.
    """

    number: int
    owner: Parameter
    rule: FactorRule
    weight: Parameter | None
    biases: tuple[Parameter, ...]
    key: int
    coupled: bool | None = None

    @property
    def params(self) -> tuple[Parameter, ...]:
        return (*(() if self.weight is None else (self.weight,)), *self.biases)

    def holds(self, p: Parameter) -> bool:
        """Whether it serves a parameter."""
        return any(p is q for q in self.params)

    def matrices(self, of: Callable[[Parameter], Tensor | None], bias: int = 0) -> Tensor:
        """What is given for the weight and one bias, as (groups, rows, columns); zero for None."""
        weight = None if self.weight is None or bias else of(self.weight)
        beside = of(self.biases[bias]) if self.biases else None
        groups, rows, columns = self.rule.shape
        if weight is not None:
            body = self.rule.to_matrices(weight)
        else:
            assert beside is not None
            body = beside.new_zeros((groups, rows, columns - self.rule.bias))
        if not self.rule.bias:
            return body
        last = body.new_zeros((groups, rows, 1)) if beside is None else beside.reshape(groups, rows, 1)
        return torch.cat([body, last], 2)

    def given(self, of: Callable[[Parameter], Tensor | None]) -> Iterator[tuple[int, Tensor]]:
        """For each bias for which, or for whose weight, anything is given: its number, and that as matrices.

        The first bias lies beside the weight, the others alone.
        """
        for bias in range(max(1, len(self.biases))):
            members = (*(() if bias or self.weight is None else (self.weight,)), *self.biases[bias : bias + 1])
            if any(of(p) is not None for p in members):
                yield bias, self.matrices(of, bias)

    def split(self, matrices: Tensor, bias: int = 0) -> Iterator[tuple[Parameter, Tensor]]:
        """What matrices say of the weight and one bias."""
        columns = self.rule.shape[2] - self.rule.bias
        if self.weight is not None and not bias:
            yield self.weight, self.rule.from_matrices(matrices[..., :columns], self.weight)
        if self.biases:
            yield self.biases[bias], matrices[..., columns].reshape(self.biases[bias].shape)


class KroneckerFactors(Renewal[Pair]):
    """Moving averages of the factors of every layer, and what directions are made of them.

    ``state[owner]`` has ``row_factor`` and ``column_factor``, (groups, n, n) or (groups, n) for diagonals, and
    ``fisher_updates``, how many batches were averaged. Subclasses add what they make of the factors.

    Attributes:
        pairs: all of them; their positions are their numbers.
        version: counts the changes of what serves which parameter.
        known_sites: indices of the sites that have statistics.
        bad: number of a pair -> how often a factor could not be used, and what there was stayed.
    """

    state_names: ClassVar[tuple[str, ...]] = ()
    """What subclasses keep for each side, after the side."""

    def __init__(
        self,
        sites: Sequence[Site[TermRule]],
        state: MutableMapping[Tensor, Any],
        groups: Mapping[Parameter, dict[str, Any]],
        overlap: Overlap,
    ) -> None:
        super().__init__(state, groups, overlap)
        self.pairs: list[Pair] = []
        self.version = 0
        self._aside: frozenset[Parameter] = frozenset()
        self._acting: dict[int, tuple[Parameter, ...]] = {}  # number of a pair -> whom it gives directions
        self._acting_as_of = -1  # the version they are of
        self._of_site: dict[int, Pair] = {}
        self.served: set[Parameter] = set()
        factored = [index for index, site in enumerate(sites) if isinstance(site.rule, FactorRule)]
        for index in factored:
            self._add(index, sites[index])
        self._counts = {pair.number: self._updates(pair) for pair in self.pairs}
        self.known_sites = {
            index for index in factored if (pair := self._of_site.get(index)) is None or self._counts[pair.number]
        }
        for pair in self.pairs:
            if self._counts[pair.number]:
                self._note_known(pair)

    def _add(self, index: int, site: Site[TermRule]) -> None:
        """The pair of one site. A parameter that another one serves already is not served twice."""
        assert isinstance(site.rule, FactorRule)
        held: dict[str, list[Parameter]] = {"weight": [], "bias": []}
        for layer in site.layers:
            for role, p in layer.parameters.items():
                if p not in self.served and (role == "weight" or site.rule.bias):
                    self.served.add(p)
                    held[role].append(p)
        if not any(held.values()):
            return
        weight, biases = next(iter(held["weight"]), None), tuple(held["bias"])
        key = id(site.module._parameters["weight"])
        owner = biases[0] if weight is None else weight
        self._of_site[index] = Pair(len(self.pairs), owner, site.rule, weight, biases, key)
        self.pairs.append(self._of_site[index])

    # State.

    def _updates(self, pair: Pair) -> int:
        updates = self.state.get(pair.owner, {}).get(UPDATES)
        return 0 if updates is None else int(updates)

    def is_known(self, pair: Pair) -> bool:
        """Whether a pair has statistics."""
        return self._counts[pair.number] > 0

    def averages(self, pair: Pair) -> dict[str, Tensor]:
        """The state of a pair; made on first use."""
        state: dict[str, Tensor] = self.state[pair.owner]
        if "row_factor" not in state:
            wide, device = ACCUMULATOR[pair.owner.dtype], pair.owner.device
            for side, name in enumerate(SIDES):
                shape = pair.rule.factor_shape(side)
                state[f"{name}_factor"] = torch.zeros(shape, dtype=wide, device=device)
                for kept in self.state_names:
                    state[f"{name}_{kept}"] = torch.zeros(shape, dtype=wide, device=device)
                    diagonal = state[f"{name}_{kept}"]
                    (diagonal if len(shape) == 2 else diagonal.diagonal(dim1=1, dim2=2)).fill_(1.0)
            state[UPDATES] = torch.zeros((), dtype=torch.float32, device=pair.owner.device)
            self._make_more(pair, state)
            if self._overlaps(pair):
                self._add_next(pair)
        return state

    def _make_more(self, pair: Pair, state: dict[str, Tensor]) -> None:
        """Make what a subclass keeps besides."""

    # Averages.

    def fold(self, new: Sequence[tuple[int, Means]]) -> None:
        """Average new factors in: the k-th with ``decay = min(1 - 1 / k, beta2)``."""
        batches: dict[tuple[Any, ...], list[tuple[int, Pair, Means]]] = defaultdict(list)
        for index, means in new:
            pair = self._of_site.get(index)
            if pair is not None and means.rows is not None:
                decay = min(1 - 1 / (self._counts[pair.number] + 1), self.groups[pair.owner]["beta2"])
                state = self.averages(pair)
                batches[decay, state["row_factor"].dtype, state["row_factor"].device].append((index, pair, means))
        for (decay, dtype, _), batch in batches.items():
            averages = [self.averages(pair)[f"{side}_factor"].view(-1) for _, pair, _ in batch for side in SIDES]
            values = [v.to(dtype) for _, _, means in batch for v in (means.rows, means.columns) if v is not None]
            flags = factor_ema_(averages, values, decay, 1 - decay, joint=2)
            # A GPU is waited for only where there may be no average yet.
            known = flags.tolist() if flags.is_cpu or decay == 0 else None
            for i, (index, pair, means) in enumerate(batch):
                if known is None or not known[i]:
                    self._mark(index, pair, flags[i])
                    if means.moments is not None:
                        self._fold_moments(pair, means.moments.to(dtype).view(pair.rule.shape))
            if known is None or any(known):
                count(self.refused, tuple(pair.number for _, pair, _ in batch), flags)

    def _mark(self, index: int, pair: Pair, refused: Tensor) -> None:
        self.averages(pair)[UPDATES].add_(1 - refused)
        self._counts[pair.number] += 1
        self.known_sites.add(index)
        self._stale.add(pair.number)

    def _fold_moments(self, pair: Pair, new: Tensor) -> None:
        """Average second moments in."""
        raise NotImplementedError

    # What is made of them.

    def couple(self) -> None:
        """Find out which weights and biases are stepped together: those of one group that both have a gradient."""
        for pair in self.pairs:
            if not pair.rule.bias:
                continue
            live = [p for p in pair.params if p.grad is not None and p not in self._aside]
            groups = {id(self.groups[p]) for p in live}
            coupled = len(live) == len(pair.params) == 2 and len(groups) == 1
            if live and pair.coupled is not coupled:
                if pair.coupled is not None and self.is_known(pair):
                    self._unmake(pair.number)
                pair.coupled = coupled
                self.version += 1

    def _item(self, number: int) -> Pair:
        return self.pairs[number]

    def pair_of(self, index: int) -> Pair | None:
        """The pair of a site, by the index of that one; None where others serve its parameters."""
        return self._of_site.get(index)

    def _made_names(self, pair: Pair) -> Sequence[str]:
        return [f"{side}_{kept}" for side in SIDES for kept in self.state_names]

    def in_use(self, pair: Pair) -> list[Tensor]:
        """What is made of the factors, as directions use it now."""
        return [self.averages(pair)[name] for name in self._made_names(pair)]

    def _renew(self, pairs: Sequence[Pair]) -> Iterator[Tensor]:
        for pair in pairs:
            *made, bad = self._recipe(pair)(*self._sources(pair))
            self._put_to_use(pair, made)
            yield bad

    def _sources(self, pair: Pair) -> list[Tensor]:
        """Both factors, and what was made of them before."""
        return [self.averages(pair)["row_factor"], self._column_factor(pair), *self.in_use(pair)]

    def _task(self, pair: Pair, old: Sequence[Tensor]) -> tuple[Task, Sequence[Tensor]]:
        rows, columns = self.averages(pair)["row_factor"], self._column_factor(pair)
        copies = rows.clone(), columns if columns is not self.averages(pair)["column_factor"] else columns.clone()
        return partial(self._recipe(pair), *copies, *old), (*copies, *old)

    def _recipe(self, pair: Pair) -> Callable[..., tuple[Tensor, ...]]:
        """What makes new tensors of both factors, taking the place of others: of those where a factor is of no use.

        It refers to nothing here, since it may run beside training; it returns how many factors were bad as well.
        """
        raise NotImplementedError

    def _put_to_use(self, pair: Pair, made: Sequence[Tensor]) -> None:
        for name, x in zip(self._made_names(pair), made, strict=True):
            self.state[pair.owner][name].copy_(x)

    def _column_factor(self, pair: Pair) -> Tensor:
        """That of the columns, without what weight and bias have in common where they are stepped apart."""
        factor = self.averages(pair)["column_factor"]
        if not pair.rule.bias or pair.coupled is not False or factor.dim() == 2:
            return factor
        factor = factor.clone()
        corner = factor[:, -1, -1].clone()
        factor[:, -1, :] = 0
        factor[:, :, -1] = 0
        factor[:, -1, -1] = corner
        return factor

    # Directions.

    def set_aside(self, params: Collection[Parameter]) -> None:
        """Let these parameters, whose layers were not used, be served by others."""
        if self._aside != params:
            self._aside = frozenset(params)
            self.version += 1

    def serves(self, p: Parameter) -> bool:
        """Whether a parameter takes its direction from here."""
        return p in self.served and p not in self._aside

    def directions(self, pair: Pair, vectors: Mapping[Parameter, Tensor]) -> Iterator[tuple[Parameter, Tensor]]:
        """F^-1 v for those parameters of a pair that have a vector and take their direction from here."""
        given = {p: v for p in self._acting_of(pair) if (v := vectors.get(p)) is not None}
        for bias, matrices in pair.given(given.get):
            for p, d in pair.split(self._apply(pair, matrices), bias):
                if p in given:
                    yield p, d

    def _acting_of(self, pair: Pair) -> tuple[Parameter, ...]:
        """The parameters of a pair that take their directions from here."""
        if self._acting_as_of != self.version:
            self._acting = {pair.number: tuple(filter(self.serves, pair.params)) for pair in self.pairs}
            self._acting_as_of = self.version
        return self._acting[pair.number]

    def _apply(self, pair: Pair, matrices: Tensor) -> Tensor:
        """F^-1 of matrices (groups, rows, columns)."""
        return self.direction_of(pair, self.image(pair, matrices))

    def sides(self, pair: Pair) -> tuple[Tensor, Tensor]:
        """What the image is made with: ``left @ matrices @ right``, a diagonal having two dimensions."""
        raise NotImplementedError

    def image(self, pair: Pair, matrices: Tensor) -> Tensor:
        """That part of F^-1 which is linear in matrices and the same until it is made anew; a new tensor."""
        return multiplied(*self.sides(pair), matrices)

    def direction_of(self, pair: Pair, image: Tensor) -> Tensor:
        """F^-1 of what has an image."""
        raise NotImplementedError


def multiplied(left: Tensor, right: Tensor, matrices: Tensor) -> Tensor:
    """``left @ matrices @ right``, where a factor of two dimensions is a diagonal."""
    if len(matrices) == 1 and left.dim() == right.dim() == 3:  # products of batches are slower on the CPU
        return (left[0] @ matrices[0] @ right[0]).unsqueeze(0)
    matrices = left.unsqueeze(2) * matrices if left.dim() == 2 else left @ matrices
    return matrices * right.unsqueeze(1) if right.dim() == 2 else matrices @ right


def mean_eigenvalue(factor: Tensor) -> Tensor:
    """Of each matrix of a factor, or of each diagonal: (groups,)."""
    return (factor if factor.dim() == 2 else factor.diagonal(dim1=1, dim2=2)).mean(1)


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
        for together in _in_runs(pairs):
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


def _in_runs(pairs: Sequence[Pair]) -> Iterator[list[Pair]]:
    """Pairs one after another, as many at a time as are inverted together."""
    run: list[Pair] = []
    size = 0
    for pair in pairs:
        numbers = sum(math.prod(pair.rule.factor_shape(side)) for side in range(len(SIDES)))
        if run and size + numbers > MOST_TOGETHER:
            yield run
            run, size = [], 0
        run.append(pair)
        size += numbers
    if run:
        yield run


Inverses = tuple[Tensor, Tensor, Tensor]
"""Those of both factors, the old ones where a factor is bad, and how many are."""


def _inverses(root: float, rows: Tensor, columns: Tensor, old_rows: Tensor, old_columns: Tensor) -> Inverses:
    """The inverses of one layer; ``root`` is that of the damping."""
    return _all_inverses([(root, rows, columns, old_rows, old_columns)])[0]


def _all_inverses(layers: Sequence[tuple[Any, ...]]) -> list[Inverses]:
    """The inverses of layers, each with the arguments of :func:`_inverses`. Factors of a size are inverted together."""
    found: dict[int, tuple[Tensor, Tensor]] = {}  # 2 layer + side -> inverses, and how many are bad
    alike: dict[tuple[Any, ...], list[tuple[int, Tensor, Tensor, Tensor]]] = defaultdict(list)
    for layer, (root, rows, columns, old_rows, old_columns) in enumerate(layers):
        ratio = (mean_eigenvalue(columns) / mean_eigenvalue(rows)).sqrt()
        pi = torch.where(ratio.isfinite() & (ratio > 0), ratio, 1.0)
        sides = ((rows, root / pi, old_rows), (columns, root * pi, old_columns))
        for side, (factor, damping, old) in enumerate(sides):
            if factor.dim() == 2:
                found[2 * layer + side] = _reciprocals(factor, damping, old)
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


class FactorBases(KroneckerFactors):
    r"""The eigenvectors of both factors, in float64 where float32 finds none.

    ``state[owner]`` has ``row_basis`` and ``column_basis``, identities at first, and ``second_moment`` in that basis,
    (groups, rows, columns). In a new basis a second moment becomes what it would be if its entries were uncorrelated:

    .. math:: V' = (Q_G'^T Q_G)^{\circ 2}\, V\, (Q_A'^T Q_A)^{\circ 2\, T}
    """

    state_names = ("basis",)

    def _make_more(self, pair: Pair, state: dict[str, Tensor]) -> None:
        state[MOMENTS] = torch.zeros(pair.rule.shape, dtype=ACCUMULATOR[pair.owner.dtype], device=pair.owner.device)

    def _recipe(self, pair: Pair) -> Callable[..., tuple[Tensor, ...]]:
        return partial(_bases, bool(pair.rule.bias and pair.coupled is False))

    def _put_to_use(self, pair: Pair, made: Sequence[Tensor]) -> None:
        # Second moments are moved by the squared cosines between new and old vectors. Where a basis was made again of
        # the same factor they stay to the bit, which takes no waiting for a GPU.
        state = self.averages(pair)
        moments = state[MOMENTS]
        for side, (name, new) in enumerate(zip(self._made_names(pair), made, strict=True)):
            same = (new == state[name]).all()
            if new.dim() == 3 and not (same.is_cpu and bool(same)):
                turn = (new.mT @ state[name]).square_()
                moments = torch.where(same, moments, moments @ turn.mT if side else turn @ moments)
        state[MOMENTS].copy_(moments)
        super()._put_to_use(pair, made)

    def basis(self, pair: Pair) -> Basis:
        """The eigenvectors; None for those of a diagonal."""
        state = self.averages(pair)
        found = [state[f"{side}_basis"] if pair.rule.is_whole(i) else None for i, side in enumerate(SIDES)]
        return Basis(*found)

    def into(self, pair: Pair, matrices: Tensor) -> Tensor:
        """Matrices (groups, rows, columns) in the basis."""
        rows, columns = self.basis(pair)
        matrices = matrices if rows is None else rows.mT @ matrices
        return matrices if columns is None else matrices @ columns

    def out_of(self, pair: Pair, matrices: Tensor) -> Tensor:
        """Undoes :meth:`into`."""
        rows, columns = self.basis(pair)
        matrices = matrices if rows is None else rows @ matrices
        return matrices if columns is None else matrices @ columns.mT


def _bases(
    apart: bool, rows: Tensor, columns: Tensor, old_rows: Tensor, old_columns: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The eigenvectors of both factors, the old ones where there are none, and how many factors are without.

    Args:
        apart: whether the last column has nothing to do with the others.
    """
    new = [
        old if factor.dim() == 2 else _eigenvectors(factor, apart=apart and old is old_columns)
        for factor, old in ((rows, old_rows), (columns, old_columns))
    ]
    bad = torch.full((), sum(x is None for x in new), dtype=torch.int64, device=rows.device)
    found = [old if x is None else x for x, old in zip(new, (old_rows, old_columns), strict=True)]
    return found[0], found[1], bad


def _eigenvectors(factor: Tensor, apart: bool) -> Tensor | None:
    """Those of each matrix, as columns; None if they cannot be found.

    Args:
        apart: whether the last column has nothing to do with the others, so that the last vector is its own.
    """
    if apart:
        body = _eigenvectors(factor[:, :-1, :-1], False) if factor.shape[1] > 1 else factor[:, :-1, :-1]
        if body is None:
            return None
        whole = torch.zeros_like(factor)
        whole[:, :-1, :-1] = body
        whole[:, -1, -1] = 1
        return whole
    mean = mean_eigenvalue(factor)[:, None, None]
    scaled = torch.where(mean == 0, 0.0, factor / mean)
    scaled.diagonal(dim1=1, dim2=2).add_(JITTER)
    for dtype in (factor.dtype, torch.float64):
        try:
            vectors = torch.linalg.eigh(scaled.to(dtype)).eigenvectors
        except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
            continue
        if bool(vectors.isfinite().all()):
            return vectors.to(factor.dtype)
    return None


def eigenvalues(factor: Tensor, basis: Tensor | None) -> Tensor:
    """The diagonal of a factor in a basis: (groups, n)."""
    if basis is None:
        return factor
    return (basis * (factor @ basis)).sum(1).clamp_(min=0)


class FactorMoments(FactorBases):
    r"""EKFAC: second moments V of per-sample gradients in the eigenbasis in place of products of eigenvalues.

    .. math:: D = Q_G \left( \frac{Q_G^T m\, Q_A}{V + \lambda} \right) Q_A^T

    V is averaged as the factors are, and begins as the products of their eigenvalues. ``state[owner]`` has
    ``moment_updates``, how many estimates it is of.
    """

    def __init__(
        self,
        sites: Sequence[Site[TermRule]],
        state: MutableMapping[Tensor, Any],
        groups: Mapping[Parameter, dict[str, Any]],
        overlap: Overlap,
    ) -> None:
        super().__init__(sites, state, groups, overlap)
        self._seen = {pair.number: self._estimates(pair) for pair in self.pairs}
        for pair in self.pairs:
            pair.rule.context.bases.clear()  # of weights that may be there no more
        for pair in self.pairs:
            self._show_basis(pair)

    def _estimates(self, pair: Pair) -> int:
        seen = self.state.get(pair.owner, {}).get(MOMENT_UPDATES)
        return 0 if seen is None else int(seen)

    def _show_basis(self, pair: Pair) -> None:
        """Let the rule take second moments in the basis, if there is one."""
        bases = pair.rule.context.bases
        if self._seen[pair.number]:
            bases[pair.key] = self.basis(pair)
        else:
            bases.pop(pair.key, None)

    def _make_more(self, pair: Pair, state: dict[str, Tensor]) -> None:
        super()._make_more(pair, state)
        state[MOMENT_UPDATES] = torch.zeros((), dtype=ACCUMULATOR[pair.owner.dtype], device=pair.owner.device)

    def _fold_moments(self, pair: Pair, new: Tensor) -> None:
        state = self.averages(pair)
        decay = min(1 - 1 / (self._seen[pair.number] + 1), self.groups[pair.owner]["beta2"])
        (refused,) = factor_ema_([state[MOMENTS].view(-1)], [new.reshape(-1)], decay, 1 - decay)
        state[MOMENT_UPDATES].add_(1 - refused)
        self._seen[pair.number] += 1

    def _put_to_use(self, pair: Pair, made: Sequence[Tensor]) -> None:
        super()._put_to_use(pair, made)
        if not self._seen[pair.number]:
            state, basis = self.averages(pair), self.basis(pair)
            rows = eigenvalues(state["row_factor"], basis.rows)
            columns = eigenvalues(self._column_factor(pair), basis.columns)
            state[MOMENTS].copy_(rows.unsqueeze(2) * columns.unsqueeze(1))
            state[MOMENT_UPDATES].fill_(1)
            self._seen[pair.number] = 1
        self._show_basis(pair)

    def _apply(self, pair: Pair, matrices: Tensor) -> Tensor:
        return super()._apply(pair, matrices) if self._seen[pair.number] else matrices

    def sides(self, pair: Pair) -> tuple[Tensor, Tensor]:
        state = self.averages(pair)
        rows = state["row_basis"]
        return rows if rows.dim() == 2 else rows.mT, state["column_basis"]

    def image(self, pair: Pair, matrices: Tensor) -> Tensor:
        return self.into(pair, matrices)

    def direction_of(self, pair: Pair, image: Tensor) -> Tensor:
        state, damping = self.averages(pair), self.groups[pair.owner]["damping"]
        return self.out_of(pair, image / (state[MOMENTS] + damping))
