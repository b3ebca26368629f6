"""Inputs of minmax and factor_ema_."""

from __future__ import annotations

import torch
from torch import Tensor

from tests.cases import random

LENGTHS = (0, 1, 2, 5, 16, 17, 63, 64, 65, 1000)


def vectors(dtype: torch.dtype, seed: int = 0, lengths: tuple[int, ...] = LENGTHS) -> list[Tensor]:
    """Nonnegative vectors of many lengths, as diagonal factors are."""
    return [random((n,), dtype, seed + n).square() for n in lengths]
