"""Symmetric blocks of a known condition, and what they are the inverses of, in numpy's widest format."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from tests.fuzz.operands import Array


def positive(count: int, n: int, condition: float, scale: float, dtype: torch.dtype, seed: int) -> Tensor:
    """Blocks with eigenvalues from ``scale`` down to ``scale / condition``."""
    rng = np.random.default_rng(seed)
    q = np.linalg.qr(rng.standard_normal((count, n, n)))[0] if count and n else np.zeros((count, n, n))
    values = scale * condition ** -np.linspace(0, 1, n) if n > 1 else np.full(n, scale)
    a = (q * values) @ np.swapaxes(q, 1, 2)
    x = torch.from_numpy((a + np.swapaxes(a, 1, 2)) / 2).to(dtype)
    return x.tril() + x.tril(-1).mT


def inverse(a: Array) -> Array:
    """By elimination with the largest pivot of each column, one column after the other."""
    count, n = a.shape[:2]
    work = np.concatenate([a, np.broadcast_to(np.eye(n), a.shape)], 2).astype(np.longdouble)
    each = np.arange(count)
    for k in range(n):
        pivot = k + np.abs(work[:, k:, k]).argmax(1)
        work[each, k], work[each, pivot] = work[each, pivot].copy(), work[each, k].copy()
        work[:, k] /= work[:, k, k, None]
        others = work[:, :, k].copy()
        others[:, k] = 0
        work -= others[:, :, None] * work[:, k, None, :]
    return work[:, :, n:]


def lower(a: Array) -> Array:
    """The symmetric blocks that lower triangles stand for."""
    return np.where(np.tri(a.shape[-1], dtype=bool), a, np.swapaxes(a, 1, 2))


def eigenvalues(a: Array) -> Array:
    """In ascending order; zeros for what is not finite."""
    return np.linalg.eigvalsh(np.nan_to_num(a.astype(np.float64), nan=0, posinf=0, neginf=0))


def norms(a: Array, axes: Sequence[int] = (1, 2)) -> Array:
    """Frobenius's, which is not below the 2-norm."""
    return np.sqrt((a * a).sum(tuple(axes)))
