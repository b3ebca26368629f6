"""The rows and columns of a parameter that a process has, and the factors that belong to them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from torch import Tensor

from fisher_kernels.curvature.gathered import is_distributed
from fisher_kernels.optim.diagonal_factors import Place
from fisher_kernels.optim.layouts import part
from fisher_kernels.optim.shares import like_parameter, local


class Index(NamedTuple):
    """Where the elements of a piece are in the whole parameter, in row-major order.

    Element i of the piece is element ``offset + i // run * pitch + i % run``.
    """

    offset: int
    run: int
    pitch: int


def index_of(p: Tensor, own: Sequence[slice]) -> Index:
    """That of the part of a parameter that this process has: rows, of a matrix columns, or both."""
    if not own:
        return Index(0, 1, 1)
    pitch = max(math.prod(p.shape[1:]), 1)
    if len(own) == 1:
        return Index(own[0].start, p.numel(), p.numel())
    inner = max(math.prod(p.shape[2:]), 1)
    columns = own[1]
    return Index(own[0].start * pitch + columns.start * inner, max((columns.stop - columns.start) * inner, 1), pitch)


def own_slices(p: Tensor) -> tuple[slice, ...]:
    """The part of a parameter that this process has, which is all of one that is not divided."""
    return part(p) if is_distributed(p) else tuple(slice(0, n) for n in p.shape)


class Piece(NamedTuple):
    """Rows of a parameter that have one vector of column factors: what a step reads and writes, and the factors."""

    number: int
    tensors: tuple[Tensor, Tensor, Tensor, Tensor]
    place: Place
    at: Index


def pieces_of(number: int, p: Tensor, gradient: Tensor, state: Mapping[str, Tensor], place: Place) -> Iterator[Piece]:
    """The pieces of a parameter that this process has; at least one, so that its step is counted."""
    tensors = local(p), like_parameter(p, gradient), local(state["exp_avg"])
    if not tensors[0].numel():
        yield Piece(number, (*tensors, state["step"]), (None, None), Index(0, 1, 1))
        return
    own = own_slices(p)
    first, last = (own[0].start, own[0].stop) if own else (0, 1)
    index = index_of(p, own)
    row, column = place
    if row is not None and row.numel() == p.numel() and p.dim():  # one for each element
        row = row.view(p.shape)[own].reshape(-1)
    elif row is not None and row.numel() > 1:
        row = row[first:last]
    if column is not None and column.dim() == 1 and p.dim() == 2 and column.numel() == p.shape[1]:
        column = column[own[1]]
    groups = column.shape[0] if column is not None and column.dim() == 2 else 1
    if groups == 1:
        yield Piece(number, (*tensors, state["step"]), (row, column), index)
        return
    assert column is not None
    height, steps = max(len(p) // groups, 1), state["step"]
    for group in range(first // height, -(-last // height)):
        begin, end = max(first, group * height) - first, min(last, (group + 1) * height) - first
        weight, g, moment = (x[begin:end] for x in tensors)
        of_rows = row[begin:end] if row is not None and row.numel() > 1 else row
        below = index._replace(offset=index.offset + begin * math.prod(p.shape[1:]))
        yield Piece(number, (weight, g, moment, steps), (of_rows, column[group]), below)
        steps = state["step"].clone()  # counted once
