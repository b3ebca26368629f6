"""Inputs of conv_gram_."""

from __future__ import annotations

from fisher_kernels.tools.samples.conv_gram import Patches

__all__ = ["PATCHES", "Patches"]

# Around the sizes at which kernels change their ways: channels that are unfolded and that are shifted, panels of 4 to
# 32 channels, full, nearly full and nearly empty; pieces of windows that all, some or none of the pairs of offsets
# share, which strides and dilations move apart; the 64 or 128 windows of a run; nothing at all.
PATCHES: tuple[Patches, ...] = (
    Patches((3, 1, 6, 5), 3, padding=1, bias=True),
    Patches((5, 3, 7, 6), 3, stride=2, padding=1, bias=True),
    Patches((2, 3, 9, 9), 7, padding=3),
    Patches((9, 2, 4, 4), 5, padding=2, bias=True),
    Patches((2, 16, 6, 5), 3, padding=1, bias=True),
    Patches((3, 17, 4, 4), 3, padding=1),
    Patches((2, 33, 3, 4), 3, padding=1, bias=True),
    Patches((2, 8, 5, 5), 5, padding=2),
    Patches((2, 9, 3, 3), 5, padding=3, bias=True),  # windows fewer than offsets
    Patches((2, 12, 9, 7), 3, stride=2, padding=1, bias=True),
    Patches((2, 12, 11, 9), 4, stride=(2, 3), padding=2),
    Patches((2, 10, 9, 8), 3, padding=2, dilation=2, bias=True),
    Patches((2, 10, 5, 9), 3, stride=(1, 2), padding=3, dilation=(3, 4)),  # offsets farther apart than windows
    Patches((2, 11, 11, 6), 3, stride=(4, 1), padding=4, dilation=(6, 1)),
    Patches((4, 16, 5, 3), 1, bias=True),
    Patches((4, 19, 5, 3), 1, stride=2, padding=1),
    Patches((3, 66, 2, 2), 1),
    Patches((3, 33, 5, 5), 3, padding=1, groups=33, bias=True),
    Patches((3, 34, 5, 5), (2, 3), padding=1, groups=17),
    Patches((2, 36, 4, 5), 3, padding=1, groups=3, bias=True),
    Patches((4, 16, 9), 2, bias=True),
    Patches((4, 3, 17), 5, stride=2, padding=[(2, 0)], dilation=2, bias=True),
    Patches((2, 8, 3, 4, 5), (3, 2, 1), (1, 2, 3), (1, 0, 2), (1, 2, 1), bias=True),
    Patches((2, 2, 4, 4, 4), 3, padding=((1, 1), (0, 2), (2, 0))),
    Patches((3, 8, 3, 3, 3), 2, padding=1, bias=True),
    Patches((2, 3, 13, 12), 2, bias=True),  # several runs
    Patches((2, 8, 14, 13), 2, padding=1, bias=True),
    Patches((2, 9, 2, 2), 2, stride=9, padding=5, bias=True),  # most windows see nothing but padding
    Patches((2, 3, 2, 2), 2, stride=9, padding=5, bias=True),
    Patches((1, 1, 1), 1),
    Patches((0, 9, 4), 2, bias=True),
    Patches((0, 3, 4), 2),
    Patches((2, 0, 4), 2),
    Patches((2, 0, 4), 2, bias=True),
    Patches((2, 9, 0), 2, padding=1, bias=True),
)
