"""Sums over the chunks of tensors in Triton kernels."""

from __future__ import annotations

import pytest
import torch

from tests.cases import random
from tests.comparison import assert_same_bits, assert_within, unit_roundoff
from tests.interpreted import interpreted

pytestmark = [interpreted, pytest.mark.usefixtures("poisoned_memory", "one_thread")]

SIZES = (5, 0, 8192, 8193, 600 * 8192 - 1, 0, 1, 512 * 8192, 3 * 8192)
"""Around a chunk, and around the 512 partial sums that are added side by side."""


def sums_of(sizes: tuple[int, ...], partials: torch.Tensor) -> torch.Tensor:
    from fisher_kernels.triton_kernels import _lists, _sums

    tensors = [torch.empty(1, dtype=torch.bfloat16).expand(size) for size in sizes]
    layout = torch.tensor([(size, first, 7) for size, first in zip(sizes, _sums.first_chunks(tensors), strict=True)])
    none = torch.empty(0, dtype=torch.int64)
    return _sums.add_chunks(_lists.Table(len(sizes), none, layout, none, [], [], None), partials)


def test_every_chunk_counts_once() -> None:
    counts = [-(-size // 8192) for size in SIZES]
    partials = torch.stack([random((sum(counts),), torch.float64, seed) for seed in (0, 1)])
    found = sums_of(SIZES, partials)
    for of_kind, sums in zip(partials, found, strict=True):
        parts = of_kind.split(counts)
        bounds = torch.stack([len(part) * unit_roundoff(torch.float64) * part.abs().sum() for part in parts])
        assert_within(sums, torch.stack([part.sum() for part in parts]), bounds)


def test_neighbours_do_not_show() -> None:
    counts = [-(-size // 8192) for size in SIZES]
    partials = random((1, sum(counts)), torch.float64)
    found = sums_of(SIZES, partials)
    turned = torch.cat(partials.split(counts, 1)[::-1], 1)
    assert_same_bits(sums_of(SIZES[::-1], turned).flip(1), found)
    partials.split(counts, 1)[4].fill_(torch.nan)
    assert sums_of(SIZES, partials).isnan().tolist() == [[i == 4 for i in range(len(SIZES))]]
