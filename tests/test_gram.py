"""weighted_gram_ against its definition in float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
import pytest
import torch
from torch import Tensor

from fisher_kernels import use_backend
from fisher_kernels.backends import available
from fisher_kernels.ops import ACCUMULATOR, weighted_gram_
from tests.cases import DTYPES, LAYOUTS, integers, random, spread, unaligned
from tests.cases.gram import SHAPES
from tests.comparison import assert_same_bits, assert_within, surroundings, unit_roundoff

pytestmark = [pytest.mark.usefixtures("poisoned_memory", "one_thread"), pytest.mark.pairs_interpreted]

T = TypeVar("T")


def lost(columns: int, dtype: torch.dtype) -> Tensor:
    """An output whose old content is not to be read."""
    return torch.full((columns, columns), torch.nan, dtype=ACCUMULATOR[dtype])


def weights(rows: int, dtype: torch.dtype) -> Tensor:
    """Of either sign."""
    return random((rows,), ACCUMULATOR[dtype], 2)


def defined(x: Tensor, weight: Tensor | None) -> Tensor:
    wide = x.double()
    return (wide if weight is None else wide * weight.double()[:, None]).mT @ wide


def bound(x: Tensor, weight: Tensor | None, dtype: torch.dtype) -> Tensor:
    """R weighted products and sums and the scaling, each rounded once, of the magnitudes that are added up."""
    magnitude = defined(x.abs(), None if weight is None else weight.abs())
    return (len(x) + 4) * unit_roundoff(ACCUMULATOR[dtype]) * magnitude


def assert_symmetric(out: Tensor) -> None:
    assert_same_bits(out, out.mT, "the upper triangle")


def test_definition() -> None:
    x, weight = random((5, 3), torch.float64), torch.tensor([1.0, 0.0, -2.0, 3.0, 0.5], dtype=torch.float64)
    out, old = random((3, 3), torch.float64, 1), random((3, 3), torch.float64, 1).numpy()
    with use_backend("reference"):
        weighted_gram_(out, x, weight, 0.5, 0.25)
    outer = sum(w * np.outer(row, row) for w, row in zip(weight.tolist(), x.numpy(), strict=True))
    expected = 0.5 * (np.tril(old) + np.tril(old, -1).T) + 0.25 * outer
    assert_within(out, torch.from_numpy(expected), 1e-14)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout(implementation: str, layout: str, shape: tuple[int, int], dtype: torch.dtype) -> None:
    x = LAYOUTS[layout](random(shape, dtype))
    for weight in (None, weights(shape[0], dtype), spread(weights(shape[0], dtype))):
        before, out = x.clone(), unaligned(lost(shape[1], dtype))
        around = surroundings(out)
        weighted_gram_(out, x, weight)
        assert_within(out, defined(x, weight), 2 * bound(x, weight, dtype))
        assert_symmetric(out)
        assert_same_bits(x, before, "x")
        assert_same_bits(surroundings(out), around, "the memory around the result")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("decay", "gain"), [(0.9, 0.1), (1.0, 0.0), (0.0, 0.25), (2.5, 1.5)])
def test_average(implementation: str, decay: float, gain: float, shape: tuple[int, int], dtype: torch.dtype) -> None:
    """Two products and a sum more, each rounded once; of what is there the lower triangle counts."""
    x, weight = random(shape, dtype), weights(shape[0], dtype)
    lower = random((shape[1], shape[1]), ACCUMULATOR[dtype], 1).tril()
    out = lower + torch.full_like(lower, torch.nan).triu(1)
    old = lower.double() + lower.double().tril(-1).mT
    weighted_gram_(out, x, weight, decay, gain)
    rounding = 2 * gain * bound(x, weight, dtype) + 4 * unit_roundoff(out.dtype) * decay * old.abs()
    assert_within(out, decay * old + gain * defined(x, weight), rounding)
    assert_symmetric(out)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_whole_numbers_are_exact(implementation: str, shape: tuple[int, int], dtype: torch.dtype) -> None:
    x, weight = integers(shape, dtype), integers((shape[0],), ACCUMULATOR[dtype], 2)
    out = integers((shape[1], shape[1]), ACCUMULATOR[dtype], 1).tril()
    expected = 0.5 * (out + out.tril(-1).mT).double() + 2 * defined(x, weight)
    weighted_gram_(out, x, weight, 0.5, 2.0)
    assert_within(out, expected, 0.0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_stays_in_its_column(implementation: str, value: float, dtype: torch.dtype) -> None:
    if implementation == "reference":
        pytest.skip("PyTorch promises no bits")
    for rows, columns in ((3, 33), (70, 67), (2, 2)):
        good = random((rows, columns), dtype)
        expected, actual = lost(columns, dtype), lost(columns, dtype)
        weighted_gram_(expected, good)
        for column in {0, columns // 2, columns - 1}:
            bad = good.clone()
            bad[rows - 1, column] = value
            weighted_gram_(actual, bad)
            assert not actual[column].isfinite().any()
            assert_symmetric(actual)
            kept = torch.arange(columns) != column
            assert_same_bits(actual[kept][:, kept], expected[kept][:, kept], "another column")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_same_bits_for_every_number_of_threads(
    implementation: str, set_threads: Callable[[int], None], dtype: torch.dtype
) -> None:
    if not implementation.startswith("cpu"):
        pytest.skip("no threads that this package starts")
    x, weight, first = random((600, 200), dtype), weights(600, dtype), lost(200, dtype)
    weighted_gram_(first, x, weight)
    for threads in (1, 2, 3, 7):
        set_threads(threads)
        out = lost(200, dtype)
        weighted_gram_(out, x, weight)
        assert_same_bits(out, first, f"{threads} threads")


@pytest.mark.slow_interpreted
def test_long_sums_are_added_in_runs(implementation: str) -> None:
    """2^15 equal terms, in float32: runs, blocks and their sums, where one after the other would lose far more."""
    if implementation == "reference":
        pytest.skip("PyTorch promises nothing of the kind")
    rows = 2**15
    x, out = torch.full((rows, 2), 0.1), lost(2, torch.float32)
    weighted_gram_(out, x)
    expected = defined(x, None)
    assert_within(out, expected, (64 + 8192 / 64 + rows / 8192) * unit_roundoff(torch.float32) * expected)


# CUDA: tiles of 32, 64 and 128 columns, read 16 bytes or a number at a time; runs of 128 rows, shares of one or more.

# On tensor cores slabs of 16 or 32 rows.
CUDA_SHAPES = ((1, 32), (17, 256), (9, 257), (257, 264), (513, 384), (1025, 8), (1024, 33), (1541, 65))


def padded(x: Tensor) -> Tensor:
    """Rows that begin at multiples of 64 numbers, with NaN between them."""
    return torch.full((len(x), x.shape[1] // 64 * 64 + 64), torch.nan, dtype=x.dtype)[:, : x.shape[1]].copy_(x)


@pytest.fixture(params=["0", "1"], ids=["float32 units", "tensor cores"])
def units(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FISHER_KERNELS_TENSOR_CORES", request.param)


@pytest.mark.usefixtures("units")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", CUDA_SHAPES, ids=str)
def test_tiles_runs_and_shares(cuda_backend: str, shape: tuple[int, int], dtype: torch.dtype) -> None:
    x, weight = integers(shape, dtype), integers((shape[0],), ACCUMULATOR[dtype], 2)
    old = integers((shape[1], shape[1]), ACCUMULATOR[dtype], 1).tril()
    for weight_or_none in (weight, None):
        out = old + torch.full_like(old, torch.nan).triu(1)
        expected = 0.5 * (old + old.tril(-1).mT).double() + 2 * defined(x, weight_or_none)
        weighted_gram_(out, padded(x), weight_or_none, 0.5, 2.0)
        assert_within(out, expected, 0.0)


@pytest.mark.usefixtures("units")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("columns", [24, 64, 264])
def test_same_bits_however_rows_are_read(cuda_backend: str, columns: int, dtype: torch.dtype) -> None:
    x = random((290, columns), dtype)
    for weight in (weights(290, dtype), None):
        expected = lost(columns, dtype)
        weighted_gram_(expected, x, weight)
        for layout in (padded, unaligned):
            out = lost(columns, dtype)
            weighted_gram_(out, layout(x), weight)
            assert_same_bits(out, expected, layout.__name__)


# Triton: how rows are cut, and which tiles there are.


def gram_kernels() -> Any:
    if "triton" not in available():
        pytest.skip("no Triton")
    from fisher_kernels.triton_kernels import gram

    return gram


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_runs_within_a_share(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, weighted: bool) -> None:
    """Shares of the rows that are several runs and a part of one, and runs that are several steps."""
    gram = gram_kernels()
    monkeypatch.setattr(gram, "_sizes", lambda *_: gram._Sizes(64, 16, 48, 4, 2))
    monkeypatch.setattr(gram, "_LEAST_ROWS", 100)
    x, weight = integers((301, 70), dtype), integers((301,), ACCUMULATOR[dtype], 2) if weighted else None
    out = lost(70, dtype)
    with use_backend("triton"):
        weighted_gram_(out, x, weight)
    assert_within(out, defined(x, weight), 0.0)
    assert_symmetric(out)


def test_weights_in_bfloat16_keep_the_precision_of_float32(implementation: str) -> None:
    """One row of ones: the weight itself, which is three numbers of 8 bits."""
    for value in (1 / 3, 16_777_215.0, -1e-30, 3.4028235e38, math.inf, -math.inf, math.nan):
        weight, out = torch.tensor([value]), lost(2, torch.bfloat16)
        weighted_gram_(out, torch.ones(1, 2, dtype=torch.bfloat16), weight)
        assert_within(out, weight.double().expand(2, 2), 0.0)  # a NaN of a GPU has other bits


@pytest.mark.large
@pytest.mark.parametrize("rows", [5, 20])
def test_rows_far_from_each_other(implementation: str, rows: int) -> None:
    """Offsets beyond 2^31 within the rows that are read at a time, and beyond 2^32 between them."""
    storage = torch.zeros(19 * 2**27 + 3, dtype=torch.bfloat16)
    x, out = storage.as_strided((rows, 3), (19 * 2**27 // (rows - 1), 1)), lost(3, torch.bfloat16)
    x.copy_(integers((rows, 3), x.dtype))
    weighted_gram_(out, x)
    assert_within(out, defined(x, None), 0.0)


def test_tiles_of_the_lower_triangle() -> None:
    """Found by a root, which is rounded: around the ends of rows of a matrix of six million columns."""
    gram_kernels()
    from tests.gram_places import places

    row = torch.cat([torch.arange(1, 129), torch.randint(129, 46_000, (128,))])
    first = row * (row + 1) // 2
    tiles = torch.cat([first - 1, first, first + 1, first + row]).int()
    found = torch.empty(2, 1024, dtype=torch.int32)
    if torch.cuda.is_available():
        tiles, found = tiles.cuda(), found.cuda()
    places[(1,)](found[0], found[1], tiles, COUNT=1024)
    assert torch.equal(found[0].cpu(), torch.cat([row - 1, row, row, row]).int())
    assert torch.equal(found[1].cpu(), torch.cat([row - 1, 0 * row, 0 * row + 1, row]).int())
