"""minmax and factor_ema_ against their definition in float64."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fisher_kernels import use_backend
from fisher_kernels.backends import available
from fisher_kernels.ops import factor_ema_, minmax, minmax_
from tests.cases import random, unaligned
from tests.cases.factor_ema import LENGTHS, vectors
from tests.comparison import assert_same_bits, assert_within, surroundings, unit_roundoff

pytestmark = pytest.mark.usefixtures("poisoned_memory", "one_thread")

DTYPES = (torch.float32, torch.float64)


def double(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [x.to(torch.float64, copy=True) for x in tensors]


def defined_minmax(x: Sequence[Tensor], eps: float, weights: Sequence[Tensor] | None) -> list[Tensor]:
    with use_backend("reference"):
        return minmax(double(x), eps, None if weights is None else double(weights))


def minmax_rounding(x: Tensor, eps: float, weight: float, dtype: torch.dtype) -> Tensor | float:
    """How far minmax(x / weight) may lie from its definition.

    Four roundings of the result, which is at most 1 (difference, spread, eps added, quotient), and two of the entries
    before the smallest is taken off, which weigh as much as the largest entry over the spread. The backend and the
    definition both round when x is float64, hence twice that.
    """
    if x.numel() < 2:
        return 0.0  # nothing, or ones
    v = x.double() / weight
    spread = v.max() - v.min() + eps
    return 2 * unit_roundoff(dtype) * (4 + 4 * float(v.abs().max() / spread))


def check_minmax(x: Sequence[Tensor], eps: float = 1e-6, weights: Sequence[Tensor] | None = None) -> None:
    before = copy.deepcopy((x, weights))
    expected = defined_minmax(x, eps, weights)
    actual = minmax(x, eps, weights)
    assert len(actual) == len(x)
    for i, (got, want, v) in enumerate(zip(actual, expected, x, strict=True)):
        assert got.dtype == v.dtype
        weight = 1.0 if weights is None else float(weights[i])
        bound = 0.0 if weight == 0 or not v.isfinite().all() else minmax_rounding(v, eps, weight, v.dtype)
        assert_within(got, want, bound, f"vector {i} of {v.numel()}")
    for now, then in zip([*x, *(weights or [])], [*before[0], *(before[1] or [])], strict=True):
        assert_same_bits(now, then, "the input")


# The definition itself.


@pytest.mark.parametrize("eps", [0.0, 1e-6, 0.5])
def test_minmax_definition(eps: float) -> None:
    for x in vectors(torch.float64):
        v = x.numpy()
        expected = np.ones_like(v) if v.size < 2 else (v - np.min(v)) / (np.max(v) - np.min(v) + eps)
        (actual,) = defined_minmax([x], eps, None)
        assert_within(actual, torch.from_numpy(expected), 1e-15)


def test_ema_definition() -> None:
    state, new = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([8.0, 4.0, 6.0])
    with use_backend("reference"):
        factor_ema_([state], [new], 0.5, 0.25)
        assert state.tolist() == [2.5, 2.0, 3.0]
        factor_ema_([state], [new], 0.5, 0.25, normalize=True, eps=0.0)  # minmax(new) = [1, 0, 0.5]
    assert state.tolist() == [1.5, 1.0, 1.625]


# minmax.


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("eps", [0.0, 1e-6, 0.5])
def test_minmax(implementation: str, dtype: torch.dtype, eps: float) -> None:
    x = vectors(dtype)
    weights = [torch.tensor([0.2, 1.0, 0.0, 3e-4][i % 4], dtype=dtype).view((1,) * (i % 3)) for i in range(len(x))]
    for scale in (1.0, 1e-7, -1e6):
        scaled = [scale * v for v in x]
        check_minmax(scaled, eps)
        check_minmax(scaled, eps, weights)
        check_minmax([unaligned(v) for v in scaled], eps, weights)


def test_minmax_of_nothing(implementation: str) -> None:
    assert minmax([]) == []
    assert minmax([], 0.0, []) == []


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_minmax_of_whole_numbers_is_exact(implementation: str, dtype: torch.dtype) -> None:
    """Differences are whole numbers and the spread is a power of two: nothing is rounded."""
    for length in (2, 5, 64, 65, 1000):
        x = torch.arange(length, dtype=dtype) % 5
        x[0], x[-1] = -3.0, 5.0
        (actual,) = minmax([x], 0.0)
        assert_within(actual, (x.double() + 3) / 8, 0.0)
        (actual,) = minmax([x], 8.0, [torch.tensor([0.5], dtype=dtype)])
        assert_within(actual, (2 * x.double() + 6) / 24, unit_roundoff(dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("length", [1, 2, 7, 64, 131])
def test_minmax_of_entries_equal_to_rounding_is_ones(implementation: str, length: int, dtype: torch.dtype) -> None:
    """Constant vectors, zeros among them, and a spread on either side of 1e-5 of the largest absolute value."""
    for value in (0.0, 3.0, -7.0, 1e-30):
        (actual,) = minmax([torch.full((length,), value, dtype=dtype)])
        assert actual.tolist() == [1.0] * length
    for sign in (1.0, -1.0):
        for share, flat in ((0.9e-5, True), (1.1e-5, False)):
            x = torch.full((length,), 1000.0 * sign, dtype=dtype)
            x[-1] *= 1 - share
            (actual,) = minmax([x])
            assert (actual.tolist() == [1.0] * length) == (flat or length == 1), (sign, share)
            check_minmax([x])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_minmax_of_a_vector_that_is_not_finite_is_nan(implementation: str, value: float, dtype: torch.dtype) -> None:
    for length in (1, 2, 16, 65):
        for place in {0, length // 2, length - 1}:
            good = random((length,), dtype)
            bad = good.clone()
            bad[place] = value
            first, second, third = minmax([good, bad, good])
            assert second.isnan().all(), f"{value} at {place} of {length}: {second}"
            assert_same_bits(first, third)
            assert first.isfinite().all()
            check_minmax([good, bad], 1e-6, [torch.tensor(0.5, dtype=dtype)] * 2)
            # Nothing was averaged yet: what the vector holds does not matter.
            (ones,) = minmax([bad], 1e-6, [torch.tensor(0.0, dtype=dtype)])
            assert ones.tolist() == [1.0] * length


def test_minmax_of_a_spread_that_overflows_is_nan(implementation: str) -> None:
    check = [torch.tensor([-3e38, 0.0, 3e38]), torch.tensor([1.0, 3.0] * 40)]
    actual = minmax(check)
    assert actual[0].isnan().all()
    assert_within(actual[1], torch.tensor([0.0, 1.0] * 40, dtype=torch.float64), 1e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_minmax_into_vectors_that_are_there(implementation: str, dtype: torch.dtype) -> None:
    """To the bit what minmax gives, whatever was there."""
    x = [*vectors(dtype), torch.full((5,), math.inf, dtype=dtype), torch.ones(7, dtype=dtype)]
    weights = [torch.tensor([0.5 * (i % 3)], dtype=dtype) for i in range(len(x))]
    for given in (None, weights):
        out = [unaligned(torch.full_like(v, math.nan)) for v in x]
        around = [surroundings(v) for v in out]
        minmax_(out, x, 1e-3, given)
        for got, want, beside in zip(out, minmax(x, 1e-3, given), around, strict=True):
            assert_same_bits(got, want)
            assert_same_bits(surroundings(got), beside, "the memory around the result")


# factor_ema_.


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize(("decay", "gain"), [(0.8, 0.2), (0.08, 0.008), (0.0, 1.0), (1.0, 0.0), (2.5, 0.0)])
def test_ema(implementation: str, dtype: torch.dtype, normalize: bool, decay: float, gain: float) -> None:
    """state <- decay * state + gain * new: two coefficients, two products and a sum, each rounded once."""
    for layout in (torch.clone, unaligned):
        state = [layout(v) for v in vectors(dtype)]
        new = [layout(v) for v in vectors(dtype, 50)]
        around = [surroundings(v) for v in state]
        then, given = double(state), [v.clone() for v in new]
        expected = double(state)
        with use_backend("reference"):
            factor_ema_(expected, double(new), decay, gain, normalize, 1e-3)
        rejected = factor_ema_(state, new, decay, gain, normalize, 1e-3)
        assert_same_bits(rejected, torch.zeros(len(state), dtype=torch.int64))
        for i, (got, want, old) in enumerate(zip(state, expected, then, strict=True)):
            added = new[i].double()
            bound = 4 * unit_roundoff(dtype) * decay * old.abs()
            if normalize:
                bound += gain * (minmax_rounding(added, 1e-3, 1.0, dtype) + 4 * unit_roundoff(dtype))
            else:
                bound += 4 * unit_roundoff(dtype) * gain * added.abs()
            assert_within(got, want, 2 * bound, f"vector {i} of {got.numel()}")
            assert_same_bits(new[i], given[i], "new")
            assert_same_bits(surroundings(got), around[i], "the memory around the state")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_ema_of_whole_numbers_is_exact(implementation: str, dtype: torch.dtype) -> None:
    for length in LENGTHS:
        state = [torch.arange(length, dtype=dtype)]
        new = [torch.arange(length, dtype=dtype) % 7]
        factor_ema_(state, new, 0.5, 0.25)
        expected = 0.5 * torch.arange(length, dtype=torch.float64) + 0.25 * (torch.arange(length) % 7).double()
        assert_within(state[0], expected, 0.0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("normalize", [False, True])
def test_ema_of_sums_and_counts(implementation: str, dtype: torch.dtype, normalize: bool) -> None:
    """To the bit the average of the means, a vector that is an entry short being completed by a 1."""
    state, sums = vectors(dtype), vectors(dtype, 50)
    divisors = [float(3 + i) for i in range(len(sums))]
    short = [i for i, v in enumerate(sums) if v.numel() > 0][::2]
    means = [v / d for v, d in zip(sums, divisors, strict=True)]
    for i in short:
        sums[i] = sums[i][:-1].clone()
        means[i][-1] = 1
    expected = copy.deepcopy(state)
    factor_ema_(expected, means, 0.8, 0.2, normalize, 1e-3)
    given = copy.deepcopy(sums)
    rejected = factor_ema_(state, sums, 0.8, 0.2, normalize, 1e-3, divisors=divisors)
    assert_same_bits(rejected, torch.zeros(len(state), dtype=torch.int64))
    for i, (got, want) in enumerate(zip(state, expected, strict=True)):
        assert_same_bits(got, want, f"vector {i}")
        assert_same_bits(sums[i], given[i], "new")


@pytest.mark.parametrize("normalize", [False, True])
def test_ema_completes_a_vector_of_nothing(implementation: str, normalize: bool) -> None:
    state = [torch.zeros(1)]
    factor_ema_(state, [torch.zeros(0)], 0.5, 0.5, normalize, divisors=[4.0])
    assert state[0].tolist() == [0.5]


@pytest.mark.parametrize("divisor", [0.0, 1e-300])
def test_ema_refuses_the_mean_of_nothing(implementation: str, divisor: float) -> None:
    """0 / 0 is NaN, and 1e-300 is 0 in float32."""
    state = [torch.ones(3), torch.ones(2)]
    rejected = factor_ema_(state, [torch.zeros(3), torch.ones(2)], 0.5, 0.5, divisors=[divisor, 1.0])
    assert rejected.tolist() == [1, 0]
    assert_same_bits(state[0], torch.ones(3))


def test_ema_of_nothing(implementation: str) -> None:
    assert_same_bits(factor_ema_([], [], 0.5, 0.5), torch.zeros(0, dtype=torch.int64))
    assert_same_bits(factor_ema_([torch.ones(0)], [torch.ones(0)], 0.5, 0.5), torch.zeros(1, dtype=torch.int64))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("joint", [1, 2, 3, 12])
def test_ema_refuses_what_is_not_finite(
    implementation: str, dtype: torch.dtype, value: float, normalize: bool, joint: int
) -> None:
    """A run with one bad entry, anywhere, stays as it was to the bit; the others are updated."""
    lengths = (5, 1, 16, 65, 0, 7, 33, 2, 64, 3, 17, 4)
    spots = ((1, 0), (3, 64), (3, 20), (8, 63), (11, 1))
    if implementation == "triton":  # which is slow in its interpreter: another spot for each length of a run
        spots = (spots[joint % 5],)
    if implementation == "cuda":  # on the host likewise, though less so
        spots = spots[joint % 2 :: 2]
    for spoiled, place in spots:
        state = vectors(dtype, 0, lengths)
        new = vectors(dtype, 50, lengths)
        before, updated = copy.deepcopy(state), copy.deepcopy(state)
        factor_ema_(updated, new, 0.8, 0.2, normalize, joint=joint)
        new[spoiled][place] = value
        rejected = factor_ema_(state, new, 0.8, 0.2, normalize, joint=joint)
        expected = torch.zeros(12 // joint, dtype=torch.int64)
        expected[spoiled // joint] = 1
        assert_same_bits(rejected, expected)
        for i in range(12):
            kept = i // joint == spoiled // joint
            assert_same_bits(state[i], (before if kept else updated)[i], f"vector {i}")
            assert kept or not before[i].numel() or not torch.equal(state[i], before[i])


def test_ema_keeps_a_state_that_is_not_finite_to_itself(implementation: str) -> None:
    """Only what is new decides; a state once lost is not repaired, and does not spread."""
    state = [torch.tensor([1.0, math.nan, math.inf]), torch.ones(3)]
    rejected = factor_ema_(state, [torch.ones(3), torch.ones(3)], 0.5, 0.5)
    assert rejected.tolist() == [0, 0]
    assert_same_bits(state[0].isfinite(), torch.tensor([True, False, False]))
    assert state[1].tolist() == [1.0] * 3


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.slow_interpreted
def test_a_list_is_its_members_one_by_one(implementation: str, normalize: bool) -> None:
    state = vectors(torch.float32) + vectors(torch.float64)
    new = vectors(torch.float32, 50) + vectors(torch.float64, 50)
    one_by_one = copy.deepcopy(state)
    for s, n in zip(one_by_one, new, strict=True):
        factor_ema_([s], [n], 0.8, 0.2, normalize)
    factor_ema_(state, new, 0.8, 0.2, normalize)
    for got, want in zip(state, one_by_one, strict=True):
        assert_same_bits(got, want)
    for got, x in zip(minmax(new), new, strict=True):
        assert_same_bits(got, minmax([x])[0])


def test_a_run_of_several_dtypes(implementation: str) -> None:
    state = [torch.ones(3), torch.ones(3, dtype=torch.float64), torch.ones(2), torch.ones(2, dtype=torch.float64)]
    new = [torch.zeros_like(s) for s in state]
    new[1][2] = math.inf
    assert factor_ema_(state, new, 0.5, 0.5, joint=2).tolist() == [1, 0]
    assert [s.tolist() for s in state] == [[1.0] * 3] * 2 + [[0.5] * 2] * 2
    new[1][2] = 1e300  # which is finite, though not in the other type
    assert factor_ema_(state, new, 0.5, 0.5, joint=2).tolist() == [0, 0]
    assert state[1].tolist() == [0.5, 0.5, 0.5 + 0.5e300]


@pytest.mark.slow_on_host
@pytest.mark.parametrize("normalize", [False, True])
def test_lists_of_hundreds(implementation: str, normalize: bool) -> None:
    """More than one launch of a GPU takes, with runs across the border."""
    count = 30 if implementation == "triton" else 600
    state = [random((1 + i % 3,), torch.float32, i).square() for i in range(count)]
    new = [random((1 + i % 3,), torch.float32, 50 + i).square() for i in range(count)]
    if not normalize:
        check_minmax(new, 1e-3)
    expected = double(state)
    with use_backend("reference"):
        factor_ema_(expected, double(new), 0.75, 0.25, normalize, 1e-3)
    bad = [3 * k for k in (0, count // 6, count // 3 - 1)]
    for i in bad:
        new[i][-1] = math.inf
        for k in range(i, i + 3):
            expected[k] = state[k].double()
    rejected = factor_ema_(state, new, 0.75, 0.25, normalize, 1e-3, joint=3)
    assert rejected.nonzero().flatten().tolist() == [i // 3 for i in bad]
    for i, (got, want) in enumerate(zip(state, expected, strict=True)):
        bound = minmax_rounding(new[i], 1e-3, 1.0, torch.float32) if new[i].isfinite().all() else 0.0
        assert_within(got, want, bound + 8 * unit_roundoff(torch.float32) * want.abs(), f"vector {i}")


# On a GPU vectors are cut into chunks of 8,192 entries.

LONG = (8191, 8192, 8193, 24_600)


@pytest.mark.slow_interpreted
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_vectors_of_several_chunks(implementation: str, dtype: torch.dtype) -> None:
    """The smallest and the largest entry in chunks of their own, whole chunks read at once or entry by entry."""
    x = vectors(dtype, 0, LONG)
    x[3][10_000], x[3][24_599] = -3, 70
    weights = [torch.tensor(0.5, dtype=dtype)] * 4
    for layout in (torch.clone, unaligned):
        given = [layout(v) for v in x]
        check_minmax(given, 1e-3, weights)
        for got, want in zip(minmax(given, 1e-3, weights), minmax(x, 1e-3, weights), strict=True):
            assert_same_bits(got, want)


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("short", [False, True])
def test_average_of_several_chunks(implementation: str, normalize: bool, short: bool) -> None:
    """A short vector is completed by a 1 at the end of its last chunk, and in one of its own."""
    means = vectors(torch.float32, 50, LONG)
    sums = [(2 * v)[: len(v) - short].clone() for v in means]
    for v in means:
        v[-1] = 1 if short else v[-1]
    state = [torch.ones(n) for n in LONG]
    expected = double(state)
    with use_backend("reference"):
        factor_ema_(expected, double(means), 0.75, 0.25, normalize, 1e-3)
    assert factor_ema_(state, sums, 0.75, 0.25, normalize, 1e-3, divisors=[2.0] * 4).tolist() == [0] * 4
    for got, want, v in zip(state, expected, means, strict=True):
        assert_within(got, want, minmax_rounding(v, 1e-3, 1.0, v.dtype) + 8 * unit_roundoff(v.dtype) * want.abs())
    kept = copy.deepcopy(state)
    sums[3][24_000] = math.nan
    assert factor_ema_(state, sums, 0.75, 0.25, normalize, joint=2).tolist() == [0, 1]
    for i in (2, 3):
        assert_same_bits(state[i], kept[i])


def test_only_what_changes_is_uploaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """To Triton's tables: nothing where lists look as they did, so that a graph may hold the call."""
    if "triton" not in available():
        pytest.skip("no Triton")
    from fisher_kernels.triton_kernels import _lists

    uploads = 0
    upload = _lists._upload

    def counted(*args: Any) -> Tensor:
        nonlocal uploads
        uploads += 1
        return upload(*args)

    monkeypatch.setattr(_lists, "_upload", counted)
    state, new = [torch.zeros(3), torch.zeros(4)], [torch.ones(3), torch.ones(4)]
    with use_backend("triton"):
        for decay, divisors, expected in ((0.5, [1.0, 2.0], True), (0.25, [1.0, 2.0], False), (0.25, [1.0, 3.0], True)):
            before = uploads
            factor_ema_(state, new, decay, 0.5, divisors=divisors)
            assert (uploads > before) == expected
    assert_within(state[1], torch.full((4,), (0.25 * 0.25 + 0.25) * 0.25 + 0.5 / 3, dtype=torch.float64), 1e-7)
