"""Sizes for mini_block_gram_ and conv_mini_block_gram_."""

from __future__ import annotations

from fisher_kernels.tools.samples.mini_block_gram import Convolution

__all__ = ["CONVOLUTIONS", "SHAPES", "Convolution"]

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

# Lanes of input channels, of output channels and of groups; full, nearly full and nearly empty registers; tiles of 1 to
# 8 rows and 1 to 9 offsets; more and fewer samples than a run; nothing at all.
CONVOLUTIONS: tuple[Convolution, ...] = (
    Convolution((3, 16, 6, 5), 7, 3, padding=1),
    Convolution((9, 17, 4, 4), 5, 3, padding=1),
    Convolution((17, 1, 8, 8), 33, 3, padding=1),
    Convolution((5, 3, 7, 6), 34, 3, stride=2, padding=1),
    Convolution((3, 33, 5, 5), 33, 3, padding=1, groups=33),
    Convolution((3, 34, 5, 5), 51, (2, 3), padding=1, groups=17),
    Convolution((2, 32, 5, 5), 10, 3, padding=1, groups=2),
    Convolution((2, 6, 5, 5), 32, 3, padding=1, groups=2),
    Convolution((4, 16, 5, 3), 19, 1),
    Convolution((4, 16, 5, 3), 9, 1, stride=2, padding=1),
    Convolution((3, 70, 4, 5), 19, 1),
    Convolution((3, 11, 4, 5), 33, 1),
    Convolution((3, 48, 4, 5), 64, 1, groups=16),
    Convolution((3, 40, 4, 5), 6, 1, padding=1, groups=2),
    Convolution((4, 16, 9), 5, 2),
    Convolution((4, 51, 9), 5, 2),
    Convolution((4, 16, 17), 5, 5, stride=2, padding=[(2, 0)], dilation=2),
    Convolution((2, 16, 7, 9), 4, 5, padding=2),
    Convolution((2, 2, 9, 9), 16, 7, padding=3),
    Convolution((2, 16, 3, 4, 5), 3, (3, 2, 1), (1, 2, 3), (1, 0, 2), (1, 2, 1)),
    Convolution((2, 16, 4, 4, 4), 2, 3, padding=((1, 1), (0, 2), (2, 0))),
    Convolution((2, 16, 40, 40), 2, 3, padding=1),  # more positions than are summed at a time
    Convolution((2, 16, 7, 9), 4, (1, 4), (3, 2), ((0, 1), (3, 2)), (1, 2), missing=1),
    Convolution((2, 3, 7, 9), 4, 3, stride=2, padding=(3, 5), missing=2),
    Convolution((2, 3, 2, 2), 4, 2, stride=9, padding=5),  # most windows see nothing but padding
    Convolution((2, 3, 4), 4, 2, missing=9),
    Convolution((0, 3, 4), 4, 2),
    Convolution((2, 0, 4), 4, 2),
    Convolution((2, 3, 4), 0, 2),
    Convolution((2, 3, 0), 4, 2, padding=1),
)
