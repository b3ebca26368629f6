"""Inputs of mini_block_gram_."""

from __future__ import annotations

# (samples, blocks, n) around the sizes at which kernels change their ways: the 4, 8 or 16 lanes of a register, the 32
# samples of a run, the 2 or 4 entries of a transposed piece, the 3 or 5 of a panel, nothing at all.
SHAPES: tuple[tuple[int, int, int], ...] = (
    (0, 3, 2),
    (5, 0, 3),
    (5, 3, 0),
    (1, 1, 1),
    (17, 33, 1),
    (33, 15, 2),
    (16, 16, 3),
    (3, 17, 4),
    (1, 33, 5),
    (15, 16, 6),
    (31, 5, 7),
    (64, 17, 8),
    (70, 35, 9),
    (32, 16, 16),
    (33, 7, 17),
    (5, 18, 25),
    (3, 17, 49),
)
