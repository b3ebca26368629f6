"""Stochastic rounding against its definition, to the bit, and its random integers against what chance allows."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from fisher_kernels.ops import _rounding, stochastic_round
from tests.cases import LAYOUTS, channels_last, random
from tests.cases.stochastic_round import (
    PLACES,
    SIZES,
    Array,
    Place,
    definition,
    halves,
    integers,
    special,
)
from tests.comparison import assert_same_bits

OF = {"seed": 2**40 + 5, "ordinal": 3, "step": 1000}


def wide(size: int) -> Tensor:
    """Numbers of every size, some of them special."""
    x = random((size,), torch.float32) * torch.exp2(random((size,), torch.float32, 1) * 50)
    x[::3] = special().repeat(size // 40 + 1)[: len(x[::3])]
    return x


# The definition.


@pytest.mark.parametrize("half", ["high", "low"])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("place", PLACES, ids=str)
def test_every_place(implementation: str, place: Place, size: int, half: str) -> None:
    x = wide(size)
    actual = stochastic_round(x, **place._asdict(), half=half, **OF)
    assert_same_bits(actual, definition(x, place, half, **OF))


@pytest.mark.parametrize("place", [Place(), Place(offset=1, run=13, pitch=20), Place(offset=2**32 - 11)], ids=str)
def test_the_number_of_a_step_may_lie_on_the_device(implementation: str, place: Place) -> None:
    x, count = wide(4097), torch.tensor([float(OF["step"])])
    actual = stochastic_round(x, **place._asdict(), **{**OF, "step": count})  # type: ignore[arg-type]
    assert_same_bits(actual, definition(x, place, **OF))
    assert_same_bits(count, torch.tensor([float(OF["step"])]))


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("shape", [(), (7,), (5, 9), (3, 4, 6, 5), (33, 65), (4, 0, 3)], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout(implementation: str, layout: str, shape: tuple[int, ...]) -> None:
    """Numbers are rounded by their row-major positions, wherever they lie; a result lies as its input does."""
    x = LAYOUTS[layout](random(shape, torch.float32))
    before = x.clone()
    actual = stochastic_round(x, offset=3, run=4, pitch=9)
    assert_same_bits(actual, definition(x, Place(3, 4, 9)))
    assert_same_bits(x, before)
    assert actual.stride() == torch.empty_like(x, dtype=torch.bfloat16).stride()
    if layout in ("transposed", "channels_last"):
        assert actual.stride() == x.stride()


@pytest.mark.parametrize("half", ["high", "low"])
def test_every_bit_of_the_integers(implementation: str, half: str) -> None:
    """Of each number, the least share that is rounded away from zero, and the next one, which is not."""
    random = halves(integers(4200, **OF), half)
    for short in (0, 1):
        share = torch.from_numpy(np.maximum(65536 - random - short, 0) % 65536)
        x = (share + 0x3F800000).to(torch.int32).view(torch.float32)
        up = torch.from_numpy((random > 0) & (short == 0))
        expected = torch.where(up, 1 + 2.0**-7, 1.0).to(torch.bfloat16)
        assert_same_bits(stochastic_round(x, half=half, **OF), expected)


def test_integers_never_change(implementation: str) -> None:
    """A run that is resumed with another version goes on as it would have."""
    base = _rounding.rounding_base(2**40 + 5, 3)
    assert base == 0x07625576
    found = _rounding.random_bits(torch.tensor([0, 1, 2**32, 2**40 + 7]), base, 1000).tolist()
    assert found == [0x690A4750, 0x4B0E3C21, 0x8472CC99, 0xD85C6E60]
    x = torch.full((32,), 1 + 2.0**-8)  # a tie: the upper bit of each half decides
    for half, expected in (("high", 0x76078534), ("low", 0x2123BEE8)):
        up = stochastic_round(x, half=half, **OF) > 1
        assert sum(int(bit) << i for i, bit in enumerate(up)) == expected


def test_exact_numbers_stay(implementation: str) -> None:
    """All there are of bfloat16, infinities and NaN among them, whatever the integers."""
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    for step in range(2):
        actual = stochastic_round(every.float(), step=step)
        assert torch.equal(actual.isnan(), every.isnan())
        assert_same_bits(actual[~every.isnan()], every[~every.isnan()])


def test_what_is_finite_saturates(implementation: str) -> None:
    largest = torch.finfo(torch.bfloat16).max
    x = torch.tensor([torch.finfo(torch.float32).max, -torch.finfo(torch.float32).max]).repeat(500)
    assert_same_bits(stochastic_round(x), torch.tensor([largest, -largest], dtype=torch.bfloat16).repeat(500))


def test_nan_stays_nan(implementation: str) -> None:
    """Even one whose bits are those of infinity but for the last one, which rounding drops or carries away."""
    bits = torch.tensor([0x7F800001, 0x7FFFFFFF, -0x7FFFFF, -1], dtype=torch.int32).repeat(500)
    assert bool(stochastic_round(bits.view(torch.float32)).isnan().all())


# Parts of a tensor.


def test_parts_are_rounded_as_the_whole_is(implementation: str) -> None:
    x = random((12, 35), torch.float32)
    whole = stochastic_round(x, **OF)
    rows, columns = slice(3, 8), slice(10, 31)
    assert_same_bits(stochastic_round(x[rows], offset=3 * 35, **OF), whole[rows])
    assert_same_bits(stochastic_round(x[:, columns], offset=10, run=21, pitch=35, **OF), whole[:, columns])
    assert_same_bits(
        stochastic_round(x[rows, columns], offset=3 * 35 + 10, run=21, pitch=35, **OF), whole[rows, columns]
    )
    assert stochastic_round(x[:, :0], offset=10, run=0, pitch=35, **OF).shape == (12, 0)


def test_parts_of_a_convolution_are_rounded_as_the_whole_is(implementation: str) -> None:
    """Input channels 2 to 4 of 7, in channels_last: a run is what each output channel has of them."""
    x = random((5, 7, 3, 3), torch.float32)
    whole = stochastic_round(x, **OF)
    part = channels_last(x[:, 2:5])
    assert_same_bits(stochastic_round(part, offset=2 * 9, run=3 * 9, pitch=7 * 9, **OF), whole[:, 2:5])


def test_same_bits_for_every_number_of_threads(set_threads: Callable[[int], None]) -> None:
    x = random((300_001,), torch.float32)
    first = stochastic_round(x, run=1000, pitch=1001)
    for threads in (1, 2, 3):
        set_threads(threads)
        assert_same_bits(stochastic_round(x, run=1000, pitch=1001), first)


# Chance. All is a matter of the seeds below and the same at every run. Limits are far beyond what chance leads to, and
# far below what hashes lead to that are worse.

COUNT = 2**18
LIMIT = 6.5
"""Standard deviations: a normal variable is beyond them once in 1.2e10 draws, and a test below draws up to 2^18."""
KEYS = ((0, 0, 0), (1, 3, 100), (2**63 + 12345, 7, 999))


@pytest.mark.parametrize("half", ["high", "low"])
def test_unbiased(half: str) -> None:
    """The number of those rounded up is binomial; the sum over shares of squared deviations has a chi-square law."""
    shares = torch.tensor([1, 2, 100, 0x4000, 0x7FFF, 0x8000, 0xC123, 0xFFFF])
    deviations = []
    for step, share in enumerate(shares.tolist()):
        for sign in (1, -1):
            x = torch.full((COUNT,), sign * (1 + share * 2.0**-23))
            up = int((stochastic_round(x, half=half, step=step, ordinal=sign + 1).abs() > 1).sum())
            p = share / 65536
            deviations.append((up - COUNT * p) / math.sqrt(COUNT * p * (1 - p)))
    assert max(map(abs, deviations)) < 4.5
    square, count = sum(z * z for z in deviations), len(deviations)
    assert abs(square - count) < 4 * math.sqrt(2 * count)


def test_means_converge() -> None:
    """Of sums over many steps, as moments are: rounding to nearest would never leave 1."""
    x = torch.ones(4096)
    for step in range(256):
        x = stochastic_round(x + 2.0**-11, step=step).float()  # a 16th of the distance
    up, p = (x - 1).mean().item() * 2**7, 1 / 16  # distances
    assert abs(up - 256 * p) < 5 * math.sqrt(256 * p * (1 - p) / 4096)


def bits_of(seed: int, ordinal: int, step: int, hash_: Callable[[Tensor], Tensor] = _rounding.lowbias32) -> Tensor:
    """The integers of the first indices, by a hash that may be another one."""
    key = _rounding.absorb(_rounding.absorb(_rounding.rounding_base(seed, ordinal), step), 0)
    return hash_(torch.arange(COUNT) ^ key)


def deviations(a: Tensor, b: Tensor) -> Tensor:
    """Correlations of two sequences at every lag, around the end, in standard deviations of independent ones."""
    spectra = [torch.fft.rfft(x.double() - 32767.5) for x in (a, b)]
    products = torch.fft.irfft(spectra[0].conj() * spectra[1], n=len(a))
    return products * (12 / 65536**2 / math.sqrt(len(a)))


def high(x: Tensor) -> Tensor:
    return x >> 16


def low(x: Tensor) -> Tensor:
    return x & 0xFFFF


def one_multiplication(x: Tensor) -> Tensor:
    """A cheaper hash, half as long."""
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & 0xFFFFFFFF
    return x ^ (x >> 15)


@pytest.mark.parametrize("key", KEYS, ids=str)
def test_lags(key: tuple[int, int, int]) -> None:
    """What rounds parameters has no correlation at any lag. That of moments has some, below 4 %, at a few far ones."""
    random = bits_of(*key)
    assert deviations(high(random), high(random))[1:].abs().max() < LIMIT
    of_low = deviations(low(random), low(random)).abs()
    assert of_low[1:1024].max() < LIMIT
    assert of_low[1:].max() / math.sqrt(COUNT) < 0.04


@pytest.mark.parametrize("key", KEYS, ids=str)
def test_halves_are_independent(key: tuple[int, int, int]) -> None:
    random = bits_of(*key)
    assert deviations(high(random), low(random)).abs().max() < LIMIT


@pytest.mark.parametrize("half", [high, low])
def test_lags_of_one_multiplication(half: Callable[[Tensor], Tensor]) -> None:
    """What the test of lags is for."""
    random = half(bits_of(*KEYS[0], one_multiplication))
    assert deviations(random, random)[1:].abs().max() > 30 * LIMIT


def test_single_bits() -> None:
    """Each is 1 half of the time, and no two of them, of one element or of two that are near, know of one another."""
    for key in KEYS:
        signs = ((bits_of(*key)[:, None] >> torch.arange(32)) & 1).float() * 2 - 1
        assert (signs.sum(0) / math.sqrt(COUNT)).abs().max() < 4.5
        for lag in (0, 1, 2, 3, 8, 64, 4096):
            z = signs[: COUNT - lag].T @ signs[lag:] / math.sqrt(COUNT - lag)
            if lag == 0:
                z.fill_diagonal_(0)
            assert z.abs().max() < 5.5
            assert abs(z.square().sum() - 1024) < 6 * math.sqrt(2 * 1024)  # chi-square of as many pairs


@pytest.mark.parametrize("other", ["step", "ordinal", "seed", "seed above 32 bits"])
@pytest.mark.parametrize("key", KEYS[:2], ids=str)
def test_steps_parameters_and_seeds_are_independent(key: tuple[int, int, int], other: str) -> None:
    seed, ordinal, step = key
    neighbour = {
        "step": (seed, ordinal, step + 1),
        "ordinal": (seed, ordinal + 1, step),
        "seed": (seed + 1, ordinal, step),
        "seed above 32 bits": (seed + 2**32, ordinal, step),
    }
    a, b = bits_of(*key), bits_of(*neighbour[other])
    for one, two in ((high, high), (low, low), (high, low)):
        assert deviations(one(a), two(b)).abs().max() < LIMIT


def test_steps_that_are_only_xored() -> None:
    """What the test of steps is for: half of the elements take the integers of their neighbours next time."""
    key = _rounding.rounding_base(0, 0)
    a, b = (_rounding.lowbias32(torch.arange(COUNT) ^ key ^ step) for step in (6, 7))
    assert deviations(high(a), high(b)).abs().max() > 30 * LIMIT


def test_parameters_do_not_share_sequences_of_steps() -> None:
    """Were steps not hashed, two whose bases nearly agree would have the same integers, in another order of steps."""
    ordinals = torch.arange(2**18)
    bases = _rounding.absorb(_rounding.absorb(_rounding.absorb(0x9E3779B9, 0), 0), ordinals)
    assert int(bases[5]) == _rounding.rounding_base(0, 5)
    ordered = bases.sort().values
    apart = ordered[1:] ^ ordered[:-1]
    near = ((apart > 0) & (apart < 8)).nonzero()[:, 0]
    assert len(near) > 5
    for i in near.tolist():
        one, other, distance = int(ordered[i]), int(ordered[i + 1]), int(apart[i])
        assert _rounding.lowbias32(one ^ distance) == _rounding.lowbias32(other ^ 0)
        steps = torch.arange(1024)
        keys = [_rounding.absorb(base, steps) for base in (one, other)]
        assert not bool(torch.isin(*keys).any())


def test_the_definition_of_the_integers() -> None:
    """Of the tests, in other words than that of the reference."""
    for key in KEYS:
        found: Array = integers(1000, Place(), *key)
        assert torch.equal(torch.from_numpy(found.astype(np.int64)), bits_of(*key)[:1000])


@pytest.mark.large
def test_more_elements_than_32_bits_count() -> None:
    x = torch.full((2**32 + 40,), 1 + 2.0**-8, dtype=torch.float32)
    end = stochastic_round(x)[-80:].clone()
    assert_same_bits(end, definition(x[-80:], Place(2**32 - 40)))
