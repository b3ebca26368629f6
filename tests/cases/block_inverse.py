"""Sizes of block_inverse, block_solve and block_apply."""

from __future__ import annotations

from fisher_kernels.tools.samples.block_inverse import blocks, conditioned

__all__ = ["COUNTS", "LARGE", "SIZES", "blocks", "conditioned"]

SIZES = (*range(1, 10), 16, 17, 25, 31, 33, 49, 63, 64, 65, 100)
"""Around the sizes of squares, of registers and of what is too large for lanes."""

LARGE = (65, 66, 67, 95, 96, 97, 127, 128, 129, 130, 191, 200, 256)
"""Too large for lanes, around whole tiles, strips and panels of sweeps."""

COUNTS = (0, 1, 15, 16, 17, 100)
"""Around a group of one block in each lane."""
