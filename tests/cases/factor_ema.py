"""Vectors for minmax and factor_ema_."""

from __future__ import annotations

from fisher_kernels.tools.samples.factor_ema import LENGTHS, vectors

__all__ = ["LENGTHS", "vectors"]
