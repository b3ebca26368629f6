"""Inputs of rank_one_solve, rank_one_inverse_update_ and low_rank_inverse_update_."""

from __future__ import annotations

import torch
from torch import Tensor

from fisher_kernels.tools.samples.block_inverse import conditioned
from tests.cases import random

SIZES = (*range(1, 10), 15, 16, 17, 25, 31, 33, 49, 64, 65, 100, 130)
"""Around halves of registers, registers, and the four registers whose sums are kept at a time."""

VECTORS = (0, 1, 2, 5)

PIECES: tuple[tuple[int, ...], ...] = (
    (0,),
    (1,),
    (),
    (7, 9),
    (8191,),
    (8192,),
    (8193,),
    (3, 0, 2),
    (101, 257),
    (2, 3, 5),
)
"""Shapes of tensors that make one vector, around a partial sum of 8,192 elements."""


def inverses(count: int, n: int, dtype: torch.dtype, condition: float = 20.0, seed: int = 0) -> Tensor:
    """Symmetric positive definite, eigenvalues from 1 down to 1 / condition, exactly symmetric."""
    return conditioned(count, n, condition, dtype, seed)


def vectors(count: int, k: int, n: int, dtype: torch.dtype, seed: int = 1) -> Tensor:
    """Of about unit length, [count, k, n]."""
    return random((count, k, n), dtype, seed) / max(n, 1) ** 0.5


def pieces(dtypes: tuple[torch.dtype, ...], seed: int = 0) -> list[Tensor]:
    """A vector in tensors of all shapes, of dtypes in turn."""
    return [random(shape, dtypes[i % len(dtypes)], seed + i) for i, shape in enumerate(PIECES)]
