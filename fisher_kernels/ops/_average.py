"""Averages of symmetric matrices, as references write them."""

from __future__ import annotations

from torch import Tensor


def average_lower(out: Tensor, sums: Tensor, decay: float, gain: float) -> None:
    """Write decay * out + gain * sums, for both triangles from the lower ones; without decay nothing of out is read."""
    lower = gain * sums.tril()
    if decay != 0:
        lower += decay * out.tril()
    out.copy_(lower + lower.tril(-1).mT)
