"""Inputs of block_inverse, block_solve and block_apply."""

from __future__ import annotations

import torch
from torch import Tensor

from tests.cases import random

SIZES = (*range(1, 10), 16, 17, 25, 31, 33, 49, 63, 64, 65, 100)
"""Around the sizes of squares, of registers and of what goes to LAPACK."""

COUNTS = (0, 1, 15, 16, 17, 100)
"""Around a group of one block in each lane."""

INTERPRETED_COUNTS = (0, 33)
"""More than a program of a Triton kernel works on; its interpreter is slow."""


def blocks(count: int, n: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Means of squares, as Fisher blocks are: symmetric, and positive definite with any damping."""
    x = random((count, n, n + 2), torch.float64, seed)
    return (x @ x.mT / (n + 2)).to(dtype)


def conditioned(count: int, n: int, condition: float, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Symmetric blocks whose eigenvalues go from 1 down to 1 / condition."""
    q, _ = torch.linalg.qr(random((count, n, n), torch.float64, seed))
    values = torch.logspace(0, -1, n, dtype=torch.float64) ** torch.tensor(condition, dtype=torch.float64).log10()
    a = (q * values) @ q.mT
    return ((a + a.mT) / 2).to(dtype)
