"""Collects the rows of all benchmarks into one table and one JSON file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.interleaved import Case, Row, RunCase, gates_apply, measure, print_report, write_report

_ROWS = pytest.StashKey[list[Row]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--report", type=Path, default=Path("build/bench.json"), help="where the JSON report goes")
    parser.addoption("--rounds", type=int, default=30, help="rounds of each case")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_ROWS] = []


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def run_case(benchmark: Any, request: pytest.FixtureRequest) -> RunCase:
    """Measure a case, report it, and fail if it does not reach what is promised."""

    def run(case: Case) -> list[Row]:
        rows = measure(benchmark, case, request.config.getoption("--rounds"))
        request.config.stash[_ROWS].extend(rows)
        missed = [f"{r.baseline}: {r.ratio:.3f}, promised {r.gate}" for r in rows if not r.held]
        if missed and gates_apply():
            pytest.fail(f"{case.op} {case.shape}: " + "; ".join(missed))
        return rows

    return run


@pytest.fixture
def report(request: pytest.FixtureRequest) -> Callable[[list[Row]], None]:
    """Take up rows that were measured in another way."""
    return request.config.stash[_ROWS].extend


def pytest_sessionfinish(session: pytest.Session) -> None:
    rows = session.config.stash[_ROWS]
    if rows:
        print_report(rows)
        write_report(rows, session.config.getoption("--report"))
