"""Tensor cores: the probe of what kernels take them to do, and Gram matrices made on them and without."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from bench.gpu.probe import WRAPPERS, wrong_numbers
from fisher_kernels.ops import ACCUMULATOR, weighted_gram_
from tests.cases import integers, random
from tests.comparison import assert_within, unit_roundoff

SETTING = "FISHER_KERNELS_TENSOR_CORES"
U = unit_roundoff(torch.float32)
KINDS = [  # dtype, whether rows have weights, and rows whose products are added to a sum that starts at 0
    (torch.bfloat16, False, 32),
    (torch.float16, False, 32),
    (torch.bfloat16, True, 16),
    (torch.float32, False, 16),
    (torch.float32, True, 16),
]


def gram(x: Tensor, weight: Tensor | None = None) -> Tensor:
    out = torch.full((x.shape[1], x.shape[1]), torch.nan, dtype=ACCUMULATOR[x.dtype])
    weighted_gram_(out, x, weight)
    return out


def defined(x: Tensor, weight: Tensor | None = None) -> Tensor:
    wide = x.double()
    return (wide if weight is None else wide * weight.double()[:, None]).mT @ wide


def test_the_wrappers_do_what_they_say(cuda_backend: str) -> None:
    assert wrong_numbers() == dict.fromkeys(WRAPPERS, 0)


@pytest.mark.parametrize("text", ["off", "2"])
def test_a_setting_that_is_none_is_an_error(cuda_backend: str, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv(SETTING, text)
    with pytest.raises(RuntimeError, match=f"{SETTING} is '{text}', expected '0' or '1'"):
        gram(torch.ones(2, 40))


@pytest.mark.parametrize(("dtype", "weighted", "chain"), KINDS, ids=str)
@pytest.mark.parametrize("columns", [33, 300])
def test_as_good_as_float32_and_another_sum(
    cuda_backend: str, monkeypatch: pytest.MonkeyPatch, columns: int, dtype: torch.dtype, weighted: bool, chain: int
) -> None:
    """Of one row a product, of several what rows lose: eight products are cut off together, twice in sixteen rows."""
    differs = False
    for rows in (1, 16, 100):
        x = random((rows, columns), dtype).abs()
        weight = random((rows,), torch.float32, 2).abs() if weighted else None
        magnitude = defined(x, weight)
        # Two parts of a chain, or four: eight products, the sum before and the sum after, each cut off by 2 u at most.
        lost = min(2 * (rows + chain // 8), 20 * chain // 8) + 2
        results = []
        for setting in "10":
            monkeypatch.setenv(SETTING, setting)
            out = gram(x, weight)
            assert_within(out, magnitude, (lost + rows / chain + 3 if setting == "1" else rows + 4) * U * magnitude)
            results.append(out)
        differs = differs or not torch.equal(*results)
    assert differs  # or one of them was made on the way of the other


@pytest.mark.parametrize(("dtype", "weighted", "chain"), KINDS, ids=str)
def test_long_sums_are_not_cut_off(cuda_backend: str, dtype: torch.dtype, weighted: bool, chain: int) -> None:
    """Equal terms of many bits: tensor cores alone would lose a part of each that grows with the sum.

    Of a chain of c terms each loses at most 2 u of the sum before it, which is c u of the whole, and so does a sum of
    each eight, (c / 8 + 1) u; then chains are added up.
    """
    rows = 1000
    x = torch.full((rows, 33), 1.0078125 if dtype == torch.bfloat16 else 1.0009765625, dtype=dtype)
    weight = torch.full((rows,), 1.1) if weighted else None
    expected = defined(x, weight)
    assert_within(gram(x, weight), expected, (chain + chain // 8 + rows / chain + 6) * U * expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_numbers_at_the_ends_of_the_range(cuda_backend: str, dtype: torch.dtype) -> None:
    """Parts that would be rounded to infinity, and parts that get too small."""
    largest = torch.finfo(torch.float32).max
    for size in (largest, -largest, 0.99 * largest, 1e-30):
        other = 2.0**-100 if dtype == torch.float32 and abs(size) > 1 else 1.0
        x = torch.full((1, 40), other, dtype=dtype)
        weight = torch.full((1,), size) if dtype == torch.bfloat16 else None
        if weight is None:
            x[0, 7] = size
        out, expected = gram(x, weight), defined(x, weight)
        wanted = expected[7, :7] if weight is None else expected
        assert_within(out[7, :7] if weight is None else out, wanted, 6 * U * wanted.abs())


def test_shares_of_large_tiles_are_added_up(cuda_backend: str) -> None:
    x = integers((1100, 257), torch.bfloat16)
    assert_within(gram(x), defined(x), 0.0)


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
def test_an_infinite_weight_is_one(cuda_backend: str, value: float) -> None:
    out = gram(torch.ones(1, 40, dtype=torch.bfloat16), torch.tensor([value]))
    assert (out.isnan() if math.isnan(value) else out == value).all()
