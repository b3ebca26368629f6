"""Sums over processes: nothing is lost in the precision in which they are sent."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from fisher_kernels import KFAC, MBF, AdaFisher
from fisher_kernels.curvature.reduction import Reduction, Share, parts_of_counts
from fisher_kernels.curvature.rules import Rule, Sums
from fisher_kernels.curvature.sites import Site

pytestmark = pytest.mark.usefixtures("one_thread")


class Counted(Rule):
    """Two sums, of which the second is of squares of derivatives."""


class Doubled(Counted):
    sends_doubles = True


def site(dtype: torch.dtype = torch.float32, rule: type[Rule] = Counted) -> Site[Any]:
    return Site(nn.Parameter(torch.zeros(1, dtype=dtype)), rule())


def added_up(of_each: Sequence[Sequence[Share[Any]]], flags: Sequence[Sequence[bool]] = (), averaged: int = 1) -> Any:
    """What processes would have that sent these, in the order in which they are added up here."""
    processes: Any = SimpleNamespace(count=len(of_each), group=None)
    flags = flags or [[]] * len(of_each)
    reductions = [Reduction(shares, said, processes, averaged) for shares, said in zip(of_each, flags, strict=True)]
    reductions[0]._total = functools.reduce(torch.add, [reduction._total for reduction in reductions])
    return reductions[0]._found()


def sums(first: Any, second: Any, counts: Sequence[float], dtype: torch.dtype = torch.float32) -> Sums:
    return Sums([torch.tensor(x, dtype=dtype) for x in (first, second)], list(counts))


MOST = 2**53


@given(st.lists(st.tuples(st.integers(0, MOST), st.integers(0, 2**26)), min_size=1, max_size=40), st.booleans())
def test_no_count_is_rounded(counts: list[tuple[int, int]], doubled: bool) -> None:
    """Nor where they are beyond what float32 has: together as many as Python's numbers have without a gap."""
    counts = [(a // len(counts), b) for a, b in counts]
    here = site(rule=Doubled if doubled else Counted)
    (found,), _ = added_up([[Share(here, (1, 1), sums([0.0], [0.0], pair))] for pair in counts])
    assert found.counts == [float(sum(of_one)) for of_one in zip(*counts, strict=True)]


@pytest.mark.parametrize("processes", [1, 2, 3, 8, 1000, 1024, 16384, 10**6])
def test_parts_of_all_processes_are_exact(processes: int) -> None:
    parts, bits = parts_of_counts(torch.float32, processes)
    assert processes * (2**bits - 1) <= 2**24
    assert 53 <= parts * bits < 53 + bits
    assert parts_of_counts(torch.float64, processes)[0] == 1


def test_whoever_says_yes_is_heard() -> None:
    shares = [[Share(site(), (1, 1), None)]] * 3
    _, flags = added_up(shares, [[True, False, True], [False, False, True], [False, False, True]])
    assert flags == [True, False, True]


@pytest.mark.parametrize("processes", [4, 7])
def test_what_is_in_range_in_one_process_stays_there(processes: int) -> None:
    """The sum of all squares, which is one over the number of processes of each, and the smallest numbers."""
    top, least = torch.finfo(torch.float32).max, torch.finfo(torch.float32).tiny
    shares = [[Share(site(), (1, 3), sums([1.0], [top, processes * least, 1.0], [1, 1]))]] * processes
    (found,), _ = added_up(shares, averaged=processes)
    expected = torch.tensor([top, processes * least, 1.0], dtype=torch.float64) / processes
    torch.testing.assert_close(found.vectors[1].double(), expected, rtol=processes * 2.0**-24, atol=0)
    assert found.vectors[0].tolist() == [processes]


def test_sums_keep_their_precision() -> None:
    """Of float64 parameters, also beside others, and where a rule asks for it."""
    small = 1.0 + 2.0**-50
    for sites in ([site(torch.float64)], [site(), site(torch.float64)], [site(rule=Doubled)]):
        shares = [[Share(s, (1, 1), sums([x], [x], [1, 1], torch.float64)) for s in sites] for x in (small, -1.0)]
        found, _ = added_up(shares)
        assert found[-1].vectors[0].tolist() == [2.0**-50]
        assert found[0].vectors[0].dtype == (torch.float32 if sites[0].owner.dtype == torch.float32 else torch.float64)
    (found,), _ = added_up([[Share(site(torch.bfloat16), (1, 1), sums([x], [x], [1, 1]))] for x in (1 + 2.0**-20, -1)])
    assert found.vectors[0].tolist() == [2.0**-20]


@pytest.mark.parametrize("kind", [AdaFisher, MBF, KFAC])
def test_what_a_rule_sends(kind: Any) -> None:
    model = nn.Linear(4, 3)
    (here,) = kind(model).statistics.sites
    lengths = [n or 0 for n in here.rule.sum_lengths(model)]
    processes: Any = SimpleNamespace(count=2)
    sent = Reduction([Share(here, lengths, None)], [], processes, 2)._total
    assert sent.dtype == (torch.float64 if kind is AdaFisher else torch.float32)
