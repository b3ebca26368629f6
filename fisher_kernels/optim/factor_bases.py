"""The eigenbases of the averaged Kronecker factors, and the second moments that EKFAC and EKFACAdam keep in them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, MutableMapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from fisher_kernels.curvature.factor_rules import Basis, TermRule
from fisher_kernels.curvature.scattered import Division, flag, flagged
from fisher_kernels.curvature.sites import Site
from fisher_kernels.ops import ACCUMULATOR, factor_ema_
from fisher_kernels.optim.exchanged import by_way_of_rows
from fisher_kernels.optim.factor_shards import Divide
from fisher_kernels.optim.kronecker_factors import (
    SIDES,
    KroneckerFactors,
    Pair,
    mean_eigenvalue,
    on_the_left,
    on_the_right,
)
from fisher_kernels.optim.overlap import Overlap
from fisher_kernels.optim.shares import local, whole

MOMENTS = "second_moment"
"""State: second moments in the basis of the factors."""

MOMENT_UPDATES = "moment_updates"
"""State: how many batches the second moments are of, their first estimate from the factors being one."""

JITTER = 1e-6
"""Added to the diagonal of a factor of mean eigenvalue 1 before its eigenvectors are found, which it does not change: a
factor of few rows is singular to the last bit, and some solvers do not take that."""


Turn = tuple[int, Tensor, Tensor]
"""Side of a basis, the squared cosines between its new and old vectors, and whether these are the same."""


def turned(moments: Tensor, turns: Sequence[Turn]) -> Tensor:
    """Second moments (groups, rows, columns) in a new basis."""
    for side, turn, same in turns:
        moments = torch.where(same, moments, moments @ turn.mT if side else turn @ moments)
    return moments


class FactorBases(KroneckerFactors):
    r"""The eigenvectors of both factors, in float64 where float32 finds none.

    ``state[owner]`` has ``row_basis`` and ``column_basis``, identities at first, and ``second_moment`` in that basis,
    (groups, rows, columns). In a new basis a second moment becomes what it would be if its entries were uncorrelated:

    .. math:: V' = (Q_G'^T Q_G)^{\circ 2}\, V\, (Q_A'^T Q_A)^{\circ 2\, T}

    Where directions are exchanged, ``second_moment`` is a DTensor of which each process has the columns that it makes
    of directions.
    """

    state_names = ("basis",)
    on_turn: Callable[[Pair, Sequence[Turn]], None] | None = None
    """Told of turns of a basis, for second moments that are in it and not averaged yet."""

    def __init__(
        self,
        sites: Sequence[Site[TermRule]],
        state: MutableMapping[Tensor, Any],
        groups: Mapping[Parameter, dict[str, Any]],
        overlap: Overlap,
        divide: Divide = lambda params: None,
    ) -> None:
        super().__init__(sites, state, groups, overlap, divide)
        self._turning: dict[int, list[Turn]] = {}  # number of a pair -> turns of columns that are divided, to be made

    # State.

    def columns_of(self, pair: Pair) -> Division | None:
        """How the columns of second moments are divided; None where all are here, as those of fewer than processes."""
        columns = pair.rule.shape[2]
        if not pair.has_rows or pair.placed is None or columns < pair.placed.processes:
            return None
        return pair.placed.division(columns)

    def moments_divided_among(self, p: Parameter) -> int:
        for pair in self.pairs:
            if pair.placed is not None and pair.holds(p) and self.columns_of(pair) is not None:
                return pair.placed.processes
        return 0

    def _lay_out(self, pair: Pair) -> None:
        super()._lay_out(pair)
        state = self.state.get(pair.owner, {})
        if MOMENTS in state and pair.placed is not None and self.columns_of(pair) is not None:
            state[MOMENTS] = pair.placed.loaded(state[MOMENTS], pair.rule.shape, 2, "second moments")
        elif MOMENTS in state:
            state[MOMENTS] = whole(state[MOMENTS])

    def _make_more(self, pair: Pair, state: dict[str, Tensor]) -> None:
        wide, device = ACCUMULATOR[pair.owner.dtype], pair.owner.device
        if pair.placed is not None and self.columns_of(pair) is not None:
            state[MOMENTS] = pair.placed.zeros(pair.rule.shape, 2, wide, device)
        else:
            state[MOMENTS] = torch.zeros(pair.rule.shape, dtype=wide, device=device)

    def _moments(self, pair: Pair) -> Tensor:
        """The second moments (groups, rows, c) that are here."""
        return local(self.averages(pair)[MOMENTS])

    def _all_moments(self, pair: Pair) -> Tensor:
        """All of them; where they are divided every process has to ask."""
        return whole(self.averages(pair)[MOMENTS])

    # What is made of factors.

    def renew(self, due: Collection[int], wait: bool = False) -> list[Pair]:
        kept = super().renew(due, wait)
        self._turn_columns()
        return kept

    def _recipe(self, pair: Pair) -> Callable[..., tuple[Tensor, ...]]:
        return partial(_bases, bool(pair.rule.bias and pair.coupled is False))

    def _put_to_use(self, pair: Pair, made: Sequence[Tensor]) -> None:
        # Second moments are moved by the squared cosines between new and old vectors. Where a basis was made again of
        # the same factor they stay to the bit, which takes no waiting for a GPU. What processes exchange for that is no
        # matter of what each of them finds of its own numbers.
        state, is_divided = self.averages(pair), self.columns_of(pair) is not None
        turns: list[Turn] = []
        for side, (name, new) in enumerate(zip(self._made_names(pair), made, strict=True)):
            same = (new == state[name]).all()
            if new.dim() == 3 and ((side and is_divided) or not (same.is_cpu and bool(same))):
                turns.append((side, (new.mT @ state[name]).square_(), same))
        later = [turn for turn in turns if turn[0] and is_divided]
        if later:
            self._turning.setdefault(pair.number, []).extend(later)
        self._moments(pair).copy_(turned(self._moments(pair), turns[: len(turns) - len(later)]))
        if turns and self.on_turn is not None:
            self.on_turn(pair, turns)
        super()._put_to_use(pair, made)

    def _turn_columns(self) -> None:
        """Turn second moments whose columns are divided to new vectors of columns: each process turns some rows.

        All processes come here in the same order, which they do not where one has made what others get from it.
        """
        turning, self._turning = self._turning, {}

        def columns(pair: Pair) -> Tensor:
            return self._moments(pair)[0]

        def turn(pair: Pair, rows: Tensor) -> Tensor:
            return turned(rows.unsqueeze(0), turning[pair.number])[0]

        for pair, new in by_way_of_rows([self.pairs[number] for number in sorted(turning)], columns, turn):
            self._moments(pair)[0].copy_(new)

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

    def by_rows(self, pair: Pair, rows: Tensor) -> Tensor:
        columns = self.basis(pair).columns
        return rows if columns is None else on_the_right(rows, columns)

    def by_columns(self, pair: Pair, columns: Tensor, here: slice) -> Tensor:
        rows, moments = self.basis(pair).rows, self._moments(pair)[0]
        moments = moments[:, here] if self.columns_of(pair) is None else moments
        columns = columns if rows is None else on_the_left(rows.mT, columns)
        columns = columns / self._divisors(pair, moments)
        return columns if rows is None else on_the_left(rows, columns)

    def by_rows_again(self, pair: Pair, rows: Tensor) -> Tensor:
        columns = self.basis(pair).columns
        return rows if columns is None else on_the_right(rows, columns.mT)

    def _divisors(self, pair: Pair, moments: Tensor) -> Tensor:
        """What a vector is divided by in the basis, where it has these second moments, which are some or all."""
        raise NotImplementedError


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
        divide: Divide = lambda params: None,
    ) -> None:
        super().__init__(sites, state, groups, overlap, divide)
        self._spectra: dict[int, tuple[Tensor, Tensor]] = {}  # eigenvalues on their way from owners to others
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
        for key in pair.keys:
            if self._seen[pair.number]:
                bases[key] = self.basis(pair)
            else:
                bases.pop(key, None)

    def _make_more(self, pair: Pair, state: dict[str, Tensor]) -> None:
        super()._make_more(pair, state)
        state[MOMENT_UPDATES] = torch.zeros((), dtype=ACCUMULATOR[pair.owner.dtype], device=pair.owner.device)

    def divisions(self) -> dict[tuple[int, int], Division]:
        found = super().divisions()
        for index, pair in self._of_site.items():
            division = self.columns_of(pair)
            if division is not None and not self.groups[pair.owner].get("delayed"):
                found[index, len(pair.rule.blocks) + len(SIDES)] = replace(division, across=True)
        return found

    def _fold_moments(self, pair: Pair, new: Tensor) -> None:
        state, own = self.averages(pair), self._moments(pair)
        decay = min(1 - 1 / (self._seen[pair.number] + 1), self.groups[pair.owner]["beta2"])
        average = own.view(-1) if own.numel() else own.new_zeros(1)  # a number stands for it where no column is
        (refused,) = factor_ema_([average], [self._own_moments(pair, new)], decay, 1 - decay)
        state[MOMENT_UPDATES].add_(1 - refused)
        self._seen[pair.number] += 1

    def _own_moments(self, pair: Pair, new: Tensor) -> Tensor:
        """The own columns of new second moments, row after row. What comes a refresh later has come whole."""
        division, (_, rows, columns) = self.columns_of(pair), pair.rule.shape
        if division is None:
            return new
        if new.numel() == rows * columns:
            own = new.view(rows, columns)[:, division.here].flatten()
            return flagged(own if own.numel() else own.new_zeros(1), flag(new))
        return new.view(-1, rows).t().flatten() if division.own else new

    def _put_to_use(self, pair: Pair, made: Sequence[Tensor]) -> None:
        super()._put_to_use(pair, made)
        if not self._seen[pair.number]:
            state = self.averages(pair)
            if (spectra := self._spectra.pop(pair.number, None)) is None:
                spectra = self._eigenvalues(pair)
                if pair.shards is not None:
                    self._spectra[pair.number] = spectra
            rows, columns = spectra
            if (division := self.columns_of(pair)) is not None:
                columns = columns[:, division.here]
            self._moments(pair).copy_(rows.unsqueeze(2) * columns.unsqueeze(1))
            self._turning.pop(pair.number, None)  # they are in the new basis
            state[MOMENT_UPDATES].fill_(1)
            self._seen[pair.number] = 1
        self._show_basis(pair)

    def _eigenvalues(self, pair: Pair) -> tuple[Tensor, Tensor]:
        """Those of both factors, in the basis that is in use."""
        basis = self.basis(pair)
        rows, columns = self._row_factor(pair), self._column_factor(pair)
        return eigenvalues(rows, basis.rows), eigenvalues(columns, basis.columns)

    def _to_send(self, pair: Pair) -> list[Tensor]:
        sent = super()._to_send(pair)
        if pair.number in self._spectra:
            return [*sent, *self._spectra.pop(pair.number)]
        if pair.shards is None or self._seen[pair.number]:
            return sent
        return [*sent, *(x.new_zeros(x.shape[:2]) for x in sent)]  # another process has the factors

    def _receive(self, pair: Pair, sent: Sequence[Tensor]) -> None:
        if pair.shards is not None and not self._seen[pair.number]:
            *sent, rows, columns = sent
            self._spectra[pair.number] = rows, columns
        super()._receive(pair, sent)

    def _apply(self, pair: Pair, matrices: Tensor) -> Tensor:
        return super()._apply(pair, matrices) if self._seen[pair.number] else matrices

    def sides(self, pair: Pair) -> tuple[Tensor, Tensor]:
        state = self.averages(pair)
        rows = state["row_basis"]
        return rows if rows.dim() == 2 else rows.mT, state["column_basis"]

    def image(self, pair: Pair, matrices: Tensor) -> Tensor:
        return self.into(pair, matrices)

    def direction_of(self, pair: Pair, image: Tensor) -> Tensor:
        return self.out_of(pair, image / self._divisors(pair, self._all_moments(pair)))

    def by_rows(self, pair: Pair, rows: Tensor) -> Tensor:
        return super().by_rows(pair, rows) if self._seen[pair.number] else rows

    def by_columns(self, pair: Pair, columns: Tensor, here: slice) -> Tensor:
        return super().by_columns(pair, columns, here) if self._seen[pair.number] else columns

    def by_rows_again(self, pair: Pair, rows: Tensor) -> Tensor:
        return super().by_rows_again(pair, rows) if self._seen[pair.number] else rows

    def _divisors(self, pair: Pair, moments: Tensor) -> Tensor:
        damping: float = self.groups[pair.owner]["damping"]
        return moments + damping
