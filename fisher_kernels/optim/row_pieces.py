"""The rows of a parameter that a process has, and the factors that belong to them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

from torch import Tensor

from fisher_kernels.curvature.gathered import is_distributed
from fisher_kernels.optim.diagonal_factors import Place
from fisher_kernels.optim.shares import like_parameter, local, rows


class Piece(NamedTuple):
    """Rows of a parameter that have one vector of column factors: what a step reads and writes, and the factors."""

    number: int
    tensors: tuple[Tensor, Tensor, Tensor, Tensor]
    place: Place


def pieces_of(number: int, p: Tensor, gradient: Tensor, state: Mapping[str, Tensor], place: Place) -> Iterator[Piece]:
    """The pieces of a parameter that this process has; at least one, so that its step is counted."""
    tensors = local(p), like_parameter(p, gradient), local(state["exp_avg"])
    first, last = rows(p) if is_distributed(p) else (0, len(p) if p.dim() else 1)
    row, column = place
    if not tensors[0].numel():
        yield Piece(number, (*tensors, state["step"]), (None, None))
        return
    by_row = row is not None and row.numel() > 1
    groups = column.shape[0] if column is not None and column.dim() == 2 else 1
    height = max(len(p) // groups, 1) if p.dim() else 1
    steps = state["step"]
    for group in range(first // height, -(-last // height)) if groups > 1 else (0,):
        begin, end = (max(first, group * height), min(last, (group + 1) * height)) if groups > 1 else (first, last)
        weight, g, moment = (x[begin - first : end - first] if x.dim() else x for x in tensors)
        of_rows = row[begin:end] if by_row and row is not None else row
        of_columns = column[group] if groups > 1 and column is not None else column
        yield Piece(number, (weight, g, moment, steps), (of_rows, of_columns))
        steps = state["step"].clone()  # counted once
