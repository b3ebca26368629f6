"""The tiers of tests. The fast one has few cases of each test, with every value and every pair of values in them.

Faults in numerical code show at one value, or where two meet: a size and a dtype, a layout and an instruction set.
Cases that cover all pairs find those, and are few: as many as the two longest parameters have combinations.

A *case* is what pytest makes of one test function: a value of each of its parameters, be they arguments of a mark or
fixtures. Cases are chosen from those that pytest collected, so combinations that a test does not have are never asked
for. A generator that makes cases from lists of values (allpairspy) would have to be told of the gaps; on this suite it
finds no fewer.

What runs a test counts apart: see :data:`RUNNERS`.
"""

from __future__ import annotations

import heapq
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from itertools import combinations
from typing import Any

import pytest

from fisher_kernels import backends

Case = tuple[int, ...]
"""The place of each parameter's value among those that it takes."""
Part = tuple[tuple[int, int], ...]
"""A value of one parameter, or values of two: which parameter, and which value."""


def parts(case: Case, strength: int = 2) -> Iterator[Part]:
    """What a case covers: its values, or its pairs of values."""
    return combinations(enumerate(case), min(strength, len(case)))


def covering(cases: Sequence[Case], strength: int = 2) -> set[Case]:
    """Some of the cases, that hold all values (1) or pairs of values (2) that all of them hold; one of them (0).

    One after the other the case that brings most of what is missing, the first of several: the same at every call.
    """
    missing = {part for case in cases for part in parts(case, strength)}
    chosen: set[Case] = set()
    # What a case brings only shrinks: the first whose count still holds is the one with most.
    counts = [(-len(missing.intersection(parts(case, strength))), turn) for turn, case in enumerate(cases)]
    heapq.heapify(counts)
    while missing:
        count, turn = heapq.heappop(counts)
        new = missing.intersection(parts(cases[turn], strength))
        if len(new) < -count:
            heapq.heappush(counts, (-len(new), turn))
            continue
        chosen.add(cases[turn])
        missing -= new
    return chosen


RUNNERS = ("implementation", "backend", "host_backend", "cuda_backend")
"""Fixtures whose value is what runs a test."""


_LEADING = ("cpu-avx512", "cpu-avx2", "cpu-baseline", "cpu", "reference", "cuda", "triton")
"""The first of them that a test has takes all pairs: the CPU's best kernels, where it runs on them. The rest take one
case: the reference, which is the definition, older instruction sets, which are the same source, and kernels for GPUs
where there is none, which take long.
"""
_EVERY_VALUE = {"cuda": "every_value_on_host"}
"""The mark by which a test says that it takes every value of its parameters on this runner, if it does not lead."""
_SLOW = {"triton": "slow_interpreted", "cuda": "slow_on_host"}
"""The mark by which a test says that it is not for this runner there."""


def fast(items: Sequence[pytest.Item]) -> set[pytest.Item]:
    """Of the cases of each test those of the fast tier: none of a test that is marked slow."""
    chosen: set[pytest.Item] = set()
    for runners in _functions([item for item in items if not item.get_closest_marker("slow")]):
        lead = next((name for name in _LEADING if name in runners), next(iter(runners)))
        for turn, (name, cases) in enumerate(runners.items()):
            # No two runners begin with the same case, where one of many will do.
            first = turn * len(cases) // len(runners)
            rotated = [*cases][first:] + [*cases][:first]
            values = name in _EVERY_VALUE and cases[rotated[0]].get_closest_marker(_EVERY_VALUE[name])
            strength = 2 if name == lead else 1 if values else 0
            if name != lead and name in _SLOW and cases[rotated[0]].get_closest_marker(_SLOW[name]):
                continue
            chosen.update(cases[case] for case in covering(rotated, strength))
    return chosen


def every(items: Sequence[pytest.Item]) -> set[pytest.Item]:
    """All cases; of tests that are marked so, all pairs where Triton's interpreter runs them."""
    left_out: set[pytest.Item] = set()
    if backends.is_interpreted():
        for runners in _functions([item for item in items if item.get_closest_marker("pairs_interpreted")]):
            cases = runners.get("triton", {})
            left_out.update(cases[case] for case in cases.keys() - covering([*cases]))
    return set(items) - left_out


def _functions(items: Iterable[pytest.Item]) -> Iterator[dict[str, dict[Case, pytest.Item]]]:
    """The cases of one test after the other, by what runs them."""
    functions: dict[tuple[Any, ...], list[pytest.Item]] = defaultdict(list)
    for item in items:
        # A function may be parametrised twice, by marks of its own and by a hook: those are two.
        functions[item.parent, getattr(item, "originalname", item.name), tuple(_parameters(item))].append(item)
    for cases in functions.values():
        runner = next((name for name in RUNNERS if name in _parameters(cases[0])), "")
        by_runner: dict[str, dict[Case, pytest.Item]] = defaultdict(dict)
        for item, case in zip(cases, _cases(cases, runner), strict=True):
            by_runner[str(_parameters(item).get(runner, ""))][case] = item
        yield by_runner


def _parameters(item: pytest.Item) -> dict[str, Any]:
    return item.callspec.params if hasattr(item, "callspec") else {}


def _cases(items: Sequence[pytest.Item], runner: str) -> Iterator[Case]:
    """A value is told by the object that it is: many cannot be compared, and pytest hands the same on to all cases."""
    numbers: dict[str, dict[int, int]] = defaultdict(dict)
    for item in items:
        values = ((numbers[name], id(value)) for name, value in _parameters(item).items() if name != runner)
        yield tuple(seen.setdefault(value, len(seen)) for seen, value in values)
