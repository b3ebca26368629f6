"""Directions of which each process makes its part: rows of matrices become columns in other processes, and rows again.

A direction is a product of a moment with a matrix on either side. Where ``fully_shard`` divides the rows of a weight, a
process multiplies its own rows from the right; an all-to-all gives it some columns of what all have made, which it
multiplies from the left; another one brings rows back. So nobody has the whole moment, or makes the whole direction,
and of w processes each sends 1 / w of what an all-gather would bring it, twice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import Parameter
from torch.nn import functional as F

from fisher_kernels.curvature.scattered import Division
from fisher_kernels.optim.kronecker_factors import KroneckerFactors, Pair, in_runs

Key = TypeVar("Key")

MOST_TOGETHER = 2**26
"""How many numbers a process may put into one call: there are some copies of them meanwhile."""


class Matrix(NamedTuple):
    """What a process has of a matrix: some rows, or some columns, and how both are divided among the same processes."""

    own: Tensor
    rows: Division
    columns: Division

    @property
    def parts(self) -> tuple[int, int, int]:
        """How many processes have parts, and the rows and columns of the first one; others are filled up with zeros."""
        return dist.get_world_size(self.rows.group), self.rows.size, self.columns.size


def to_columns(matrices: Mapping[Key, Matrix]) -> dict[Key, Matrix]:
    """Given own rows, own columns."""

    def cut(x: Matrix) -> Tensor:
        places, r, c = x.parts
        wide = F.pad(x.own, (0, places * c - x.own.shape[1], 0, r - len(x.own)))
        return wide.view(r, places, c).transpose(0, 1).reshape(places, r * c)

    def joined(x: Matrix, pieces: Tensor) -> Tensor:
        places, r, c = x.parts
        return pieces.reshape(places * r, c)[: x.rows.rows, : x.columns.own]

    return _exchanged(matrices, cut, joined)


def to_rows(matrices: Mapping[Key, Matrix]) -> dict[Key, Matrix]:
    """Given own columns, own rows."""

    def cut(x: Matrix) -> Tensor:
        places, r, c = x.parts
        return F.pad(x.own, (0, c - x.own.shape[1], 0, places * r - len(x.own))).view(places, r * c)

    def joined(x: Matrix, pieces: Tensor) -> Tensor:
        places, r, c = x.parts
        rows = pieces.view(places, r, c).transpose(0, 1).reshape(r, places * c)
        return rows[: x.rows.own, : x.columns.rows]

    return _exchanged(matrices, cut, joined)


def _exchanged(
    matrices: Mapping[Key, Matrix], cut: Callable[[Matrix], Tensor], joined: Callable[[Matrix, Tensor], Tensor]
) -> dict[Key, Matrix]:
    """Send each process its piece of what is here: one all-to-all for all that are divided among the same processes.

    Args:
        cut: what is here as pieces of one size, a row for each process.
        joined: what is here then, of the pieces of all.
    """
    together: dict[tuple[Any, ...], list[Key]] = {}
    for key, x in matrices.items():
        together.setdefault((x.rows.group, x.rows.device, x.own.dtype, x.own.device), []).append(key)
    found: dict[Key, Matrix] = {}
    for (group, device, _, home), keys in together.items():
        pieces = [cut(matrices[key]) for key in keys]
        flat = torch.cat(pieces, 1).to(device)
        received = torch.empty_like(flat)
        dist.all_to_all_single(received, flat, group=group)
        for key, part in zip(keys, received.to(home).split([x.shape[1] for x in pieces], 1), strict=True):
            found[key] = matrices[key]._replace(own=joined(matrices[key], part))
    return found


Vectors = dict[Parameter, Tensor]
"""What a process has of the vectors of some parameters."""


def own_directions(
    factors: KroneckerFactors, here: Callable[[Sequence[Parameter]], Vectors]
) -> Iterator[tuple[Parameter, Tensor]]:
    """What this process has of F^-1 v, of the layers whose rows ``fully_shard`` alone divides.

    Args:
        here: what it has of the vectors of those among parameters that have one.
    """
    for run in in_runs([pair for pair in factors.pairs if pair.has_rows], _numbers, MOST_TOGETHER):
        given = {pair.number: here(factors.acting_of(pair)) for pair in run}
        pairs = {pair.number: pair for pair in run if pair.weight in given[pair.number]}
        columns = _columns(factors, [*pairs.values()], given)
        made = {k: x._replace(own=factors.by_columns(pairs[k], x.own, x.columns.here)) for k, x in columns.items()}
        for k, x in to_rows(made).items():
            yield from _split(pairs[k], factors.by_rows_again(pairs[k], x.own), given[k])


def own_columns(
    factors: KroneckerFactors, pairs: Sequence[Pair], here: Callable[[Sequence[Parameter]], Vectors]
) -> Iterator[tuple[Pair, Tensor]]:
    """The own columns (rows, c) of vectors, times what they are multiplied by from the right.

    Args:
        pairs: of whose rows a process has some.
        here: what it has of the vectors of those among parameters that have one, as each of these weights has.
    """
    for run in in_runs(pairs, _numbers, MOST_TOGETHER):
        columns = _columns(factors, run, {pair.number: here(pair.params) for pair in run})
        yield from ((pair, columns[pair.number].own) for pair in run)


def _columns(factors: KroneckerFactors, pairs: Sequence[Pair], given: Mapping[int, Vectors]) -> dict[int, Matrix]:
    rows = ((pair, factors.by_rows(pair, _joined(pair, given[pair.number]))) for pair in pairs)
    return to_columns({pair.number: _matrix(pair, own) for pair, own in rows})


def by_way_of_rows(
    pairs: Sequence[Pair], columns: Callable[[Pair], Tensor], work: Callable[[Pair, Tensor], Tensor]
) -> Iterator[tuple[Pair, Tensor]]:
    """What is made of rows (r, columns) of matrices of which a process has columns (rows, c), as columns again."""
    for run in in_runs(pairs, _numbers, MOST_TOGETHER):
        rows = to_rows({pair.number: _matrix(pair, columns(pair)) for pair in run})
        made = {pair.number: x._replace(own=work(pair, x.own)) for pair in run for x in (rows[pair.number],)}
        found = to_columns(made)
        yield from ((pair, found[pair.number].own) for pair in run)


def _numbers(pair: Pair) -> int:
    """How many a process puts into a call: the same in all of them, so that all make the same runs."""
    assert pair.placed is not None
    _, n, m = pair.rule.shape
    return pair.placed.division(n).size * m


def _matrix(pair: Pair, own: Tensor) -> Matrix:
    assert pair.placed is not None
    return Matrix(own, *(pair.placed.division(n) for n in pair.rule.shape[1:]))


def _joined(pair: Pair, given: Vectors) -> Tensor:
    """The own rows of the weight, with the bias as one more column; zero where none is given."""
    assert pair.weight is not None
    body = given[pair.weight]
    body = body.reshape(len(body), pair.rule.shape[2] - pair.rule.bias)
    if not pair.rule.bias:
        return body
    beside = given.get(pair.biases[0]) if pair.biases else None
    return torch.cat([body, body.new_zeros((len(body), 1)) if beside is None else beside.reshape(-1, 1)], 1)


def _split(pair: Pair, rows: Tensor, given: Vectors) -> Iterator[tuple[Parameter, Tensor]]:
    """What rows say of the parameters that were given."""
    end = rows.shape[1] - pair.rule.bias
    for p, v in given.items():
        yield p, (rows[:, :end] if p is pair.weight else rows[:, end]).reshape(v.shape)
