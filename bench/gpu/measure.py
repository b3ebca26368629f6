"""Measures every case: ``python -m bench.gpu.measure``. Exit status 1 if a result was wrong or a target missed."""

from __future__ import annotations

import argparse
import gc
import re
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, cast

import torch

from bench.gpu import limits, op_cases, report, step_cases
from bench.gpu.case import Case, Work
from bench.gpu.timing import Clock, Run, Times
from fisher_kernels import backends, use_backend
from tests.checkout import nest_triton_kernels

BUDGET = 240.0
"""Seconds that all cases may take together; those for which no time is left are listed."""
MOST_SETS = 32
"""Sets of inputs that are rotated at most."""


@dataclass
class Baseline:
    """The time of another way to do the same."""

    times: Times | None = None
    wall: Times | None = None
    peak_bytes: int | None = None
    error: str | None = None


@dataclass
class Row:
    """One case on one backend."""

    op: str
    shape: str
    dtype: str
    backend: str
    limit: str
    size: int | None = None
    """Of the op's work, as the choice of a backend counts it; None for what is more than one op."""
    bytes_moved: int = 0
    flops: float = 0.0
    sets: int = 0
    times: Times | None = None
    host: Times | None = None
    wall: Times | None = None
    peak_bytes: int | None = None
    fraction: float | None = None
    """Of the rate of the limit."""
    baselines: dict[str, Baseline] = field(default_factory=dict)
    ratios: dict[str, float] = field(default_factory=dict)
    """Name of a target -> what was reached."""
    targets: dict[str, float] = field(default_factory=dict)
    error: str | None = None

    @property
    def missed(self) -> list[str]:
        """Targets that were not reached; one that could not be measured is not reached either."""
        return [name for name, least in self.targets.items() if self.ratios.get(name, 0.0) < least]


def _short(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0] if text else ''}"[:300]


def _sets(case: Case, device: torch.device, cache: int) -> list[Work]:
    """Enough sets of inputs that each is out of the cache when its turn comes."""
    works = [case.prepare(device)]
    held = max(works[0].bytes_moved if works[0].held is None else works[0].held, 1)
    count = 1 if held > 2 * cache else min(2 * cache // held + 1, MOST_SETS)
    works += [case.prepare(device) for _ in range(count - 1)]
    return works


def _baselines(clock: Clock, works: list[Work], wall: bool, memory: bool) -> Iterator[tuple[str, Baseline]]:
    for name in works[0].baselines:
        calls = [work.baselines[name] for work in works]
        found = Baseline()
        try:
            found.times = clock.device_times(calls)
            if wall:
                found.wall = clock.wall_times(calls)[1]
            if memory:
                found.peak_bytes = clock.peak_memory(calls[0])
        except Exception as error:  # out of memory, or no compiler for torch.compile: the case goes on without it
            found = Baseline(error=_short(error))
        yield name, found


def _fill(row: Row, case: Case, clock: Clock, works: list[Work], rates: dict[str, float]) -> None:
    """Time our side; what the reference and the baselines took is known."""
    calls: list[Run] = [work.run for work in works]
    row.bytes_moved, row.flops, row.sets = works[0].bytes_moved, works[0].flops, len(works)
    row.times = clock.device_times(calls)
    row.peak_bytes = clock.peak_memory(calls[0])
    if case.wall:
        row.host, row.wall = clock.wall_times(calls)
    amount = row.bytes_moved if case.limit in ("copy", "read") else row.flops
    row.fraction = row.ratios[case.limit] = amount / row.times.median / rates[case.limit]
    for name, baseline in row.baselines.items():
        if baseline.times is not None:
            row.ratios[name] = baseline.times.median / row.times.median
        if baseline.wall is not None and row.wall is not None:
            row.ratios[f"wall: {name}"] = baseline.wall.median / row.wall.median
        if baseline.peak_bytes is not None and row.peak_bytes is not None:
            row.ratios[f"memory: {name}"] = baseline.peak_bytes / max(row.peak_bytes, 1)


def measure(case: Case, clock: Clock, rates: dict[str, float], names: Iterable[str], cache: int) -> Iterator[Row]:
    """One row for each backend. A wrong result is reported as that, without figures."""
    works: list[Work] = []
    try:
        works = _sets(case, clock.device, cache)
        memory = any(name.startswith("memory: ") for name in case.targets)
        others = dict(_baselines(clock, works, case.wall, memory))
        failure = None
    except Exception as error:
        others, failure = {}, _short(error)
    for name in names:
        row = Row(
            case.op, case.shape, str(case.dtype).removeprefix("torch."), name, case.limit,
            baselines=dict(others), targets=dict(case.targets), error=failure,
        )  # fmt: skip
        if failure is None:
            try:
                with use_backend(cast(backends.Name, name)):
                    with backends.recorded() as called:
                        works[0].run()
                    row.size = next((size for op, size in called if op == case.op), None)
                    works[0].check()
                    if name == "reference":
                        row.targets = {}
                    _fill(row, case, clock, works, rates)
            except Exception as error:
                row.error = _short(error)
        yield row


def ours(device: torch.device) -> list[str]:
    """The backends that are measured: all that have kernels for this device, then the reference in PyTorch."""
    kinds = ("cuda", "triton") if device.type == "cuda" else ("cpu",)
    return [*(name for name in kinds if backends.reasons()[name] is None), "reference"]


def run(
    device: torch.device, *, tiny: bool, compile_: bool, seconds: float, only: str, wait: float
) -> tuple[dict[str, Any], bool]:
    """Measure the cases whose names match; the report, and whether all is as promised.

    Args:
        tiny: sizes for a test of the harness.
        compile_: whether torch.compile is among the baselines.
        seconds: for everything.
        only: regular expression.
        wait: seconds of timed calls of one function.
    """
    began = time.monotonic()
    clock = Clock(device, wait)
    torch.manual_seed(0)
    rates = limits.measure(clock, tiny)
    cache = torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else 0
    rows: list[Row] = []
    left_out = []
    for case in chain(step_cases.cases(tiny, compile_), op_cases.cases(tiny, compile_)):
        if not re.search(only, case.name):
            continue
        if time.monotonic() - began > seconds:
            left_out.append(case.name)
            continue
        rows += measure(case, clock, rates, ours(device), cache)
        gc.collect()  # optimizers and their models refer to each other
        if device.type == "cuda":
            torch.cuda.empty_cache()
        print(f"{time.monotonic() - began:6.1f} s  {case.name}", file=sys.stderr, flush=True)
    facts = {
        **report.describe(device),
        "limits": rates,
        "l2_bytes": cache,
        "seconds": round(time.monotonic() - began, 1),
        "rows": [{**asdict(row), "missed": row.missed} for row in rows],
        "left_out": left_out,
    }
    slower = _slower_choices(rows)
    for name in slower:
        print(f"auto takes the slower backend: {name}; python -m bench.gpu.choose mends it", file=sys.stderr)
    return facts, bool(rows) and not slower and all(row.error is None and not row.missed for row in _best(rows))


def _slower_choices(rows: list[Row]) -> list[str]:
    """Cases in which what ``auto`` takes on a GPU is clearly slower than the other: beyond the spread of both."""
    cases: dict[tuple[str, str, str], dict[str, Row]] = {}
    for row in rows:
        if row.times is not None and row.size is not None:
            cases.setdefault((row.op, row.shape, row.dtype), {})[row.backend] = row
    found = []
    for case, by_backend in cases.items():
        if not {"cuda", "triton"} <= by_backend.keys():
            continue
        size = by_backend["cuda"].size or 0
        first, *others = backends.order_on_a_gpu(case[0], partial(int, size))
        times = {name: by_backend[name].times for name in (first, *others)}
        if any(times[first].p20 > times[other].p80 for other in others):  # type: ignore[union-attr]
            found.append(", ".join(case))
    return found


def _best(rows: list[Row]) -> list[Row]:
    """Of each case all rows that failed, and the fastest of the others: the reference need not reach anything."""
    fastest: dict[tuple[str, str, str], Row] = {}
    failed = []
    for row in rows:
        if row.backend == "reference":
            continue
        key = row.op, row.shape, row.dtype
        if row.times is None:
            failed.append(row)
        elif key not in fastest or row.times.median < fastest[key].times.median:  # type: ignore[union-attr]
            fastest[key] = row
    return [*failed, *fastest.values()]


def main(arguments: list[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu.measure", description=__doc__)
    parser.add_argument("--seconds", type=float, default=BUDGET, help="for all cases together (default: %(default)g)")
    parser.add_argument("--only", default="", help="regular expression that the names of cases are searched for")
    parser.add_argument("--out", type=Path, default=report.RESULTS, help="folder of the JSON file")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out of the baselines")
    parser.add_argument("--tiny", action="store_true", help="tiny sizes on the CPU, to try the harness")
    options = parser.parse_args(arguments)
    if not options.tiny and not torch.cuda.is_available():
        print("there is no GPU: torch.cuda.is_available() is False", file=sys.stderr)
        return 2
    nest_triton_kernels()
    facts, good = run(
        torch.device("cpu" if options.tiny else "cuda"),
        tiny=options.tiny,
        compile_=not (options.no_compile or options.tiny),
        seconds=options.seconds,
        only=options.only,
        wait=0.0 if options.tiny else 0.3,
    )
    file = report.write(facts, options.out)
    report.show(facts)
    print(f"written: {file}")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
