"""mini_block_gram_ against its definition in float64."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from fisher_kernels import use_backend
from fisher_kernels.ops import ACCUMULATOR, mini_block_gram_
from tests.cases import DTYPES, LAYOUTS, integers, random, sliced, unaligned, zeros_without_memory
from tests.cases.mini_block_gram import SHAPES
from tests.comparison import assert_same_bits, assert_within, surroundings, unit_roundoff
from tests.interpreted import interpreted, only_program

pytestmark = [pytest.mark.usefixtures("poisoned_memory", "one_thread"), pytest.mark.pairs_interpreted]


def lost(shape: tuple[int, int, int], dtype: torch.dtype) -> Tensor:
    """An output whose old content is not to be read."""
    _, blocks, n = shape
    return torch.full((blocks, n, n), torch.nan, dtype=ACCUMULATOR[dtype])


def defined(v: Tensor) -> Tensor:
    wide = v.double()
    return torch.einsum("nbi,nbj->bij", wide, wide)


def bound(v: Tensor, dtype: torch.dtype) -> Tensor:
    """N products and sums and the scaling, each rounded once, of the magnitudes that are added up."""
    return (len(v) + 3) * unit_roundoff(ACCUMULATOR[dtype]) * defined(v.abs())


def assert_symmetric(out: Tensor) -> None:
    assert_same_bits(out, out.mT, "the upper triangle")


def test_definition() -> None:
    v = random((3, 2, 4), torch.float64)
    out, old = random((2, 4, 4), torch.float64, 1), random((2, 4, 4), torch.float64, 1).numpy()
    with use_backend("reference"):
        mini_block_gram_(out, v, 0.5, 0.25)
    for b in range(2):
        symmetric = np.tril(old[b]) + np.tril(old[b], -1).T
        expected = 0.5 * symmetric + 0.25 * sum(np.outer(x, x) for x in v[:, b].numpy())
        assert_within(out[b], torch.from_numpy(expected), 1e-14)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout(implementation: str, layout: str, shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    v = LAYOUTS[layout](random(shape, dtype))
    before, out = v.clone(), unaligned(lost(shape, dtype))
    around = surroundings(out)
    mini_block_gram_(out, v)
    assert_within(out, defined(v), 2 * bound(v, dtype))
    assert_symmetric(out)
    assert_same_bits(v, before, "v")
    assert_same_bits(surroundings(out), around, "the memory around the result")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("decay", "gain"), [(0.9, 0.1), (1.0, 0.0), (0.0, 0.25), (2.5, 1.5)])
def test_average(
    implementation: str, decay: float, gain: float, shape: tuple[int, int, int], dtype: torch.dtype
) -> None:
    """Two products and a sum more, each rounded once; of what is there the lower triangles count."""
    v = random(shape, dtype)
    lower = random(lost(shape, dtype).shape, ACCUMULATOR[dtype], 1).tril()
    out = lower + torch.full_like(lower, torch.nan).triu(1)
    old = lower.double() + lower.double().tril(-1).mT
    mini_block_gram_(out, v, decay, gain)
    rounding = 2 * gain * bound(v, dtype) + 4 * unit_roundoff(out.dtype) * decay * old.abs()
    assert_within(out, decay * old + gain * defined(v), rounding)
    assert_symmetric(out)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_whole_numbers_are_exact(implementation: str, shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    v = integers(shape, dtype)
    out = integers(lost(shape, dtype).shape, ACCUMULATOR[dtype], 1).tril()
    expected = 0.5 * (out + out.tril(-1).mT).double() + 2 * defined(v)
    mini_block_gram_(out, v, 0.5, 2.0)
    assert_within(out, expected, 0.0)


def test_one_large_block_of_several_runs_of_samples(implementation: str) -> None:
    v = integers((70, 1, 17), torch.float32)
    out = lost((70, 1, 17), torch.float32)
    mini_block_gram_(out, v)
    assert_within(out, defined(v), 0.0)


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # of NumPy, in Triton's interpreter
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.slow_interpreted
def test_what_is_not_finite_stays_in_its_block(implementation: str, value: float, dtype: torch.dtype) -> None:
    for samples, blocks, n in ((3, 33, 9), (2, 5, 3), (34, 16, 17), (3, 2, 1)):
        good = random((samples, blocks, n), dtype)
        expected, actual = lost((samples, blocks, n), dtype), lost((samples, blocks, n), dtype)
        mini_block_gram_(expected, good)
        for b in {0, blocks // 2, blocks - 1}:
            bad = good.clone()
            bad[samples - 1, b, n - 1] = value
            mini_block_gram_(actual, bad)
            assert not actual[b, n - 1].isfinite().any()
            assert actual[b, : n - 1, : n - 1].isfinite().all()
            kept = torch.arange(blocks) != b
            assert_same_bits(actual[kept], expected[kept], "another block")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_block_does_not_know_its_neighbours(implementation: str, dtype: torch.dtype) -> None:
    if implementation == "reference":
        pytest.skip("PyTorch promises nothing of the kind")
    shape = (37, 35, 9)
    v, out = random(shape, dtype), lost(shape, dtype)
    mini_block_gram_(out, v)
    for first, end in ((0, 1), (1, 17), (16, 33), (34, 35)):
        part = lost((37, end - first, 9), dtype)
        mini_block_gram_(part, v[:, first:end])
        assert_same_bits(part, out[first:end])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_same_bits_for_every_number_of_threads(
    implementation: str, set_threads: Callable[[int], None], dtype: torch.dtype
) -> None:
    if implementation in ("reference", "triton"):
        pytest.skip("PyTorch promises nothing of the kind, and a GPU has no such threads")
    shape = (67, 300, 9)
    v, first = random(shape, dtype), lost(shape, dtype)
    mini_block_gram_(first, v)
    for threads in (1, 2, 3, 7):
        set_threads(threads)
        out = lost(shape, dtype)
        mini_block_gram_(out, v)
        assert_same_bits(out, first, f"{threads} threads")


@pytest.mark.slow_interpreted
def test_long_sums_are_added_in_runs(implementation: str) -> None:
    """2^15 equal terms, in float32: runs of 32 and their sums, where one after the other would lose far more.

    2^12 of them, in runs of 64, for Triton's interpreter.
    """
    if implementation == "reference":
        pytest.skip("PyTorch promises nothing of the kind")
    samples = 2**12 if implementation == "triton" else 2**15
    v = torch.full((samples, 1, 2), 0.1)
    out = lost((samples, 1, 2), torch.float32)
    mini_block_gram_(out, v)
    expected = defined(v)
    assert_within(out, expected, (32 + samples / 32) * unit_roundoff(torch.float32) * expected)


# CUDA: lanes, tiles of a lane, and tiles of 64 x 64; shares of 256 samples, or runs of 64 of large blocks.

CUDA_SHAPES = (
    (3, 40, 10),
    (9, 11, 15),
    (8, 3, 24),
    (7, 2, 26),
    (5, 2, 48),
    (4, 3, 50),
    (65, 2, 64),
    (9, 1, 130),
    (257, 33, 3),
    (513, 2, 13),
    (257, 1, 30),
    (129, 2, 72),
)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", CUDA_SHAPES, ids=str)
def test_sizes_and_shares(cuda_backend: str, shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    v = integers(shape, dtype)
    old = integers(lost(shape, dtype).shape, ACCUMULATOR[dtype], 1).tril()
    out = old + torch.full_like(old, torch.nan).triu(1)
    mini_block_gram_(out, unaligned(v), 0.5, 2.0)
    assert_within(out, 0.5 * (old + old.tril(-1).mT).double() + 2 * defined(v), 0.0)


@pytest.mark.parametrize("layout", [unaligned, sliced])
@pytest.mark.parametrize("n", [1, 8, 9, 16, 49, 64])
def test_same_bits_however_blocks_are_read(cuda_backend: str, n: int, layout: Callable[[Tensor], Tensor]) -> None:
    for dtype in DTYPES:
        v = random((19, 8, n), dtype)
        expected, out = lost((19, 8, n), dtype), lost((19, 8, n), dtype)
        mini_block_gram_(expected, v)
        mini_block_gram_(out, layout(v))
        assert_same_bits(out, expected, str(dtype))


@pytest.mark.parametrize("shape", [(600, 264, 26), (130, 1024, 50)], ids=str)
def test_same_bits_with_shares_apart(cuda_backend: str, shape: tuple[int, int, int]) -> None:
    """Few blocks leave sums of their shares for a second kernel, many do not."""
    v, out = random(shape, torch.float32), lost(shape, torch.float32)
    mini_block_gram_(out, v)
    for b in (0, shape[1] - 1):
        part = lost((shape[0], 1, shape[2]), torch.float32)
        mini_block_gram_(part, v[:, b : b + 1])
        assert_same_bits(part, out[b : b + 1])


# Offsets of 64 bits.


@pytest.mark.parametrize("n", [9, 17])
def test_samples_more_than_2_to_31_elements_apart(backend: str, n: int) -> None:
    samples, blocks, stride = 3, 5, 2**30 + 7
    memory = zeros_without_memory((samples - 1) * stride + blocks * n)
    v = memory.as_strided((samples, blocks, n), (stride, n, 1)).copy_(integers((samples, blocks, n), memory.dtype))
    out = lost((samples, blocks, n), v.dtype)
    mini_block_gram_(out, v)
    assert_within(out, defined(v), 0.0)


@interpreted
@pytest.mark.parametrize("n", [2, 17])
def test_blocks_more_than_2_to_31_elements_on(monkeypatch: pytest.MonkeyPatch, n: int) -> None:
    """The first program whose blocks lie so far into out, and for n = 2 into v."""
    from fisher_kernels.triton_kernels import mini_block_gram as kernels

    blocks_of_program = 256 if n == 2 else 1  # and one tile
    program = 2**31 // (n if n == 2 else n * n) // blocks_of_program + 1
    first = program * blocks_of_program
    blocks = first + blocks_of_program
    v = zeros_without_memory(blocks * n).view(1, blocks, n)
    out = zeros_without_memory(2 * blocks * n * n).view(torch.float32).view(blocks, n, n)
    v[:, first:] = integers(v[:, first:].shape, v.dtype)
    out[first:] = torch.nan
    only_program(monkeypatch, kernels, program)
    with use_backend("triton"):
        mini_block_gram_(out, v)
    assert_within(out[first:], defined(v[:, first:]), 0.0)
