"""Sizes for the sums of squares."""

from __future__ import annotations

from fisher_kernels.tools.samples.sum_of_squares import Patch

__all__ = ["CHANNEL_SHAPES", "COLUMN_SHAPES", "PATCHES", "Patch"]

# Rows and columns around the sizes at which kernels change their ways: registers, tiles, runs, blocks, nothing at all.
COLUMN_SHAPES: tuple[tuple[int, ...], ...] = (
    (0,),
    (1,),
    (7,),
    (5, 0),
    (0, 5),
    (3, 0, 5),
    (63, 17),
    (2, 3, 7, 9),
    (300, 1),
    (1001, 3),
    (129, 64),
    (70, 1025),
    (2, 2049),
    (530, 33),
)

CHANNEL_SHAPES: tuple[tuple[int, ...], ...] = (
    (0, 3),
    (2, 0),
    (0, 3, 4),
    (2, 3, 0),
    (1, 1, 1),
    (63, 17),
    (4, 5, 63),
    (4, 5, 64),
    (2, 3, 7, 9),
    (2, 3, 3, 4, 5),
    (2, 3, 2, 2, 2, 2),
    (2, 3, 5001),
    (300, 33, 3),
)

PATCHES: tuple[Patch, ...] = (
    Patch((2, 3, 1), 1),
    Patch((0, 3, 4), 2),
    Patch((2, 0, 4), 2),
    Patch((2, 3, 0), 2, padding=1),
    Patch((2, 3, 17), 3, stride=2, padding=[(2, 0)], dilation=2),
    Patch((3, 2, 7, 9), 3, padding=1),
    Patch((3, 2, 7, 9), (1, 4), stride=(3, 2), padding=((0, 1), (3, 2)), dilation=(1, 2)),
    Patch((2, 5, 8, 8), 2, stride=2),
    Patch((2, 5, 8, 8), 1, stride=3),
    Patch((2, 3, 2, 2), 2, stride=9, padding=5),  # most windows see nothing but padding
    Patch((63, 17, 5, 4), (5, 4)),
    Patch((2, 3, 3, 4, 5), (3, 2, 1), stride=(1, 2, 3), padding=(1, 0, 2), dilation=(1, 2, 1)),
    Patch((2, 33, 4, 4, 4), 3, padding=((1, 1), (0, 2), (2, 0))),
)
