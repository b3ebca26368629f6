"""The rule of the fast tier: what it leaves out is held by what it keeps."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from typing import Any

import pytest

from tests import covering
from tests.covering import Case

pytest_plugins = ["pytester"]


def product(*sizes: int) -> list[Case]:
    return list(itertools.product(*map(range, sizes)))


# Combinations that a test has, by the kind of its parameters.
CASES: dict[str, list[Case]] = {
    "one parameter": product(7),
    "two parameters": product(4, 5),
    "one value": product(3, 1, 4),
    "five parameters": product(4, 6, 5, 2, 3),
    "many of two values": product(*[2] * 7),
    "a diagonal beside a product": [(i, i, j) for i, j in product(5, 3)],
    "unequal parts": [*product(3, 4, 2), *((3, j, 2) for j in range(9))],
    "a triangle": [case for case in product(6, 6, 3) if case[0] <= case[1]],
    "gaps": [case for case in product(5, 5, 4, 3) if sum(case) % 3 and case[0] != case[3]],
    "lonely": [case for case in product(4, 4, 4, 4) if len(set(case)) > 2] + [(9, 9, 9, 9)],
}


def held(cases: Sequence[Case], strength: int) -> set[tuple[tuple[int, int], ...]]:
    """By brute force."""
    if len(cases[0]) < strength or strength == 1:
        return {((i, value),) for case in cases for i, value in enumerate(case)}
    return {((i, case[i]), (j, case[j])) for case in cases for i in range(len(case)) for j in range(i + 1, len(case))}


@pytest.mark.parametrize("strength", [1, 2])
@pytest.mark.parametrize("name", CASES)
def test_all_pairs_are_held(name: str, strength: int) -> None:
    cases = CASES[name]
    chosen = covering.covering(cases, strength)
    assert chosen <= set(cases)
    assert held([*chosen], strength) == held(cases, strength)
    assert chosen == covering.covering(cases, strength)


def test_few_cases_are_enough() -> None:
    """The two longest parameters have so many combinations, and no more than a few have to be added."""
    for name, bound in (("two parameters", 20), ("five parameters", 6 * 5 * 1.2), ("many of two values", 12)):
        assert len(covering.covering(CASES[name])) <= bound
    assert len(covering.covering(CASES["five parameters"], 1)) == 6


MODULE = """
import pytest

class Size:
    def __init__(self, n):
        self.n = n

@pytest.fixture(params=["reference", "cpu-baseline", "cpu-avx2", "triton"])
def implementation(request):
    return request.param

@pytest.fixture(params=[object(), object(), object()])
def layout(request):
    return request.param

@pytest.mark.every_value
@pytest.mark.parametrize("size", [Size(n) for n in (1, 2, 3, 5)])
@pytest.mark.parametrize(("low", "high"), [(0, 1), (0, 2), (1, 2)])
@pytest.mark.parametrize("flag", [False, True])
def test_stacked(implementation, layout, size, low, high, flag):
    pass

@pytest.mark.parametrize("layout", ["given"], indirect=True)
@pytest.mark.parametrize("value", [pytest.param(1, marks=pytest.mark.slow), 2, pytest.param([], id="same")])
def test_indirect(layout, value):
    pass

class TestOne:
    @pytest.mark.parametrize("flag", [False, True])
    def test_method(self, flag):
        pass

class TestAnother:
    @pytest.mark.parametrize("flag", [False, True])
    def test_method(self, flag):
        pass

@pytest.mark.slow
def test_slow():
    pass

def test_plain(implementation):
    pass

def test_alone():
    pass
"""


INI = "[pytest]\nmarkers =\n    slow\n    slow_interpreted\n    pairs_interpreted\n    every_value"


@pytest.fixture
def items(pytester: pytest.Pytester) -> list[pytest.Item]:
    pytester.makeini(INI)
    return pytester.getitems(MODULE)


def parameters(items: Iterable[pytest.Item], name: str) -> list[dict[str, Any]]:
    return [item.callspec.params for item in items if item.originalname == name]  # type: ignore[attr-defined]


def pairs(cases: Iterable[dict[str, Any]]) -> set[frozenset[tuple[str, int]]]:
    """Pairs of values, by identity, of two parameters."""
    by_identity = [[(name, id(value)) for name, value in case.items()] for case in cases]
    return {frozenset(pair) for case in by_identity for pair in itertools.combinations(case, 2)}


def test_the_best_runner_takes_all_pairs(monkeypatch: pytest.MonkeyPatch, items: list[pytest.Item]) -> None:
    """The others take one case, or every value where a test says so."""
    monkeypatch.setattr(covering, "_EVERY_VALUE", {"reference": "every_value", "triton": "slow"})
    everything, chosen = (parameters(of, "test_stacked") for of in (items, covering.fast(items)))
    assert len(everything) == 4 * 3 * 4 * 3 * 2
    assert len(chosen) <= 12 + 4 + 4 + 2
    for runner in ("reference", "cpu-baseline", "cpu-avx2", "triton"):
        every, few = ([case for case in of if case["implementation"] == runner] for of in (everything, chosen))
        if runner in ("triton", "cpu-baseline"):
            assert len(few) == 1
            continue
        for name in ("layout", "size", "low", "high", "flag"):
            assert {id(case[name]) for case in few} == {id(case[name]) for case in every}
        if runner == "cpu-avx2":
            assert pairs(few) == pairs(every)


def test_what_is_slow_in_the_interpreter_is_left_out_there(pytester: pytest.Pytester) -> None:
    pytester.makeini(INI)
    items = pytester.getitems("import pytest\npytestmark = pytest.mark.slow_interpreted\n" + MODULE)
    runners = {case["implementation"] for case in parameters(covering.fast(items), "test_stacked")}
    assert runners == {"reference", "cpu-baseline", "cpu-avx2"}


def test_every_case_is_kept(items: list[pytest.Item]) -> None:
    assert covering.every(items) == set(items)


def test_pairs_will_do_in_the_interpreter_where_a_test_says_so(
    monkeypatch: pytest.MonkeyPatch, pytester: pytest.Pytester
) -> None:
    monkeypatch.setattr(covering.backends, "is_interpreted", lambda: True)
    pytester.makeini(INI)
    items = pytester.getitems("import pytest\npytestmark = pytest.mark.pairs_interpreted\n" + MODULE)
    left_out = set(items) - covering.every(items)
    assert {item.originalname for item in left_out} == {"test_stacked"}  # type: ignore[attr-defined]
    assert {item.callspec.params["implementation"] for item in left_out} == {"triton"}  # type: ignore[attr-defined]
    everything, chosen = (
        [case for case in parameters(of, "test_stacked") if case["implementation"] == "triton"]
        for of in (items, covering.every(items))
    )
    assert pairs(chosen) == pairs(everything)
    assert len(chosen) <= 12 + 4


def test_what_has_one_case_or_is_slow(items: list[pytest.Item]) -> None:
    chosen = covering.fast(items)
    names = [item.name for item in items if item in chosen and "stacked" not in item.name]
    assert names == [
        "test_indirect[2-given]",
        "test_indirect[same-given]",
        *["test_method[False]", "test_method[True]"] * 2,
        *(f"test_plain[{name}]" for name in ("reference", "cpu-baseline", "cpu-avx2", "triton")),
        "test_alone",
    ]


@pytest.mark.slow
def test_the_same_cases_at_every_run(pytester: pytest.Pytester, items: list[pytest.Item]) -> None:
    again = pytester.getitems(MODULE)
    assert [item.name for item in again if item in covering.fast(again)] == [
        item.name for item in items if item in covering.fast(items)
    ]
