"""Inputs of weighted_gram_."""

from __future__ import annotations

# (rows, columns) around the sizes at which kernels change their ways: the 8, 16 or 32 columns of a panel, the 64 rows
# of a run or of a task, the 512 to 8192 rows of a block, nothing at all.
SHAPES: tuple[tuple[int, int], ...] = (
    (0, 3),
    (5, 0),
    (1, 1),
    (15, 16),
    (16, 17),
    (17, 33),
    (33, 7),
    (63, 64),
    (64, 65),
    (131, 130),
    (8193, 3),
)
