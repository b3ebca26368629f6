"""Sizes of block_inverse, block_solve and block_apply."""

from __future__ import annotations

from fisher_kernels.tools.samples.block_inverse import blocks, conditioned

__all__ = ["COUNTS", "INTERPRETED_COUNTS", "SIZES", "blocks", "conditioned"]

SIZES = (*range(1, 10), 16, 17, 25, 31, 33, 49, 63, 64, 65, 100)
"""Around the sizes of squares, of registers and of what goes to LAPACK."""

COUNTS = (0, 1, 15, 16, 17, 100)
"""Around a group of one block in each lane."""

INTERPRETED_COUNTS = (0, 33)
"""More than a program of a Triton kernel works on; its interpreter is slow."""
