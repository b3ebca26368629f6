"""Times a kernel against its baselines and the machine's limit, all in turn in every round.

A shared machine changes its speed by a factor of two from minute to minute; ratios taken round by round hold.
pytest-benchmark runs the rounds: the baselines run in its untimed set-up, so that its figure is the kernel's alone.
"""

from __future__ import annotations

import datetime
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from fisher_kernels._library import native_module
from fisher_kernels.tools.environment import describe

Run = Callable[[], Any]

WARM_UP_ROUNDS = 3

THREADS = torch.get_num_threads()  # of the process; a case may set another number for its time


@dataclass
class Case:
    """One kernel on one input: what to run, what it moves and what it is held to."""

    op: str
    shape: str
    dtype: torch.dtype
    ours: Run
    baselines: dict[str, Run]
    gates: dict[str, float] = field(default_factory=dict)
    """Baseline, or ``"limit"``, -> the least ratio of its time to ours that the project promises."""
    bytes_moved: int = 0
    limit: Run | None = None
    """A bare pass over as many bytes as the kernel must move, or a matrix product of as many operations."""
    at_limit: float | None = None
    """Fraction of the limit at which the gates of the baselines hold too: no kernel could do better. Eager forms that
    allocate take several times as long where the system has to find the pages, so their ratios are no property of
    the kernel alone."""
    repeat: int = 1
    """Calls a round, for kernels of microseconds."""
    before: Run | None = None
    """Untimed work before each timed call of a round."""


@dataclass
class Row:
    """One line of the report."""

    op: str
    shape: str
    dtype: str
    baseline: str
    baseline_ms: float
    ours_ms: float
    ratio: float
    gigabytes_per_second: float | None
    fraction_of_limit: float | None
    gate: float | None
    held: bool
    parts_ms: dict[str, float] | None = None
    """Of a training iteration: what its time is spent on, in milliseconds."""


RunCase = Callable[[Case], list[Row]]
"""What the ``run_case`` fixture is."""


def _time(run: Run, repeat: int) -> float:
    start = time.perf_counter()
    for _ in range(repeat):
        run()
    return (time.perf_counter() - start) / repeat


def measure(benchmark: Any, case: Case, rounds: int) -> list[Row]:
    """Medians over rounds, and the median over rounds of each baseline's time over ours."""
    others = dict(case.baselines)
    if case.limit is not None:
        others["limit"] = case.limit
    times: dict[str, list[float]] = {name: [] for name in (*others, "ours")}

    def prepare() -> None:
        for name, run in others.items():
            if case.before is not None:
                case.before()
            times[name].append(_time(run, case.repeat))
        if case.before is not None:
            case.before()

    def ours() -> None:
        times["ours"].append(_time(case.ours, case.repeat))

    benchmark.pedantic(ours, setup=prepare, rounds=rounds, iterations=1, warmup_rounds=WARM_UP_ROUNDS)
    kept = {name: values[WARM_UP_ROUNDS:] for name, values in times.items()}
    median = {name: statistics.median(values) for name, values in kept.items()}
    ratios = {name: statistics.median(b / o for b, o in zip(kept[name], kept["ours"], strict=True)) for name in others}
    fraction = ratios["limit"] if case.limit is not None else None
    at_limit = fraction is not None and case.at_limit is not None and fraction >= case.at_limit
    rows = [
        Row(
            op=case.op,
            shape=case.shape,
            dtype=str(case.dtype).removeprefix("torch."),
            baseline=name,
            baseline_ms=1e3 * median[name],
            ours_ms=1e3 * median["ours"],
            ratio=ratios[name],
            gigabytes_per_second=case.bytes_moved / median["ours"] / 1e9 if case.bytes_moved else None,
            fraction_of_limit=fraction,
            gate=case.gates.get(name),
            held=ratios[name] >= case.gates.get(name, 0.0) or (name != "limit" and at_limit),
        )
        for name in others
    ]
    benchmark.extra_info["rows"] = [asdict(row) for row in rows]
    return rows


def gates_apply() -> bool:
    """The promises are for two or more cores with AVX-512; elsewhere the figures are reported alone."""
    native = native_module()
    return native is not None and native.capability() == "avx512" and THREADS >= 2


def print_report(rows: list[Row]) -> None:
    """The table of all rows."""
    table = Table(title="Interleaved medians; ratio = baseline / ours")
    for column in ("op", "shape", "dtype", "baseline"):
        table.add_column(column, overflow="fold")
    for column in ("baseline ms", "ours ms", "ratio", "promised", "GB/s", "of limit"):
        table.add_column(column, justify="right")
    for row in rows:
        promised = "" if row.gate is None else f"{row.gate:.2f}"
        table.add_row(
            row.op,
            row.shape,
            row.dtype,
            row.baseline,
            f"{row.baseline_ms:.4g}",
            f"{row.ours_ms:.4g}",
            f"{row.ratio:.2f}" if row.held else f"[red]{row.ratio:.2f}[/red]",
            promised,
            "" if row.gigabytes_per_second is None else f"{row.gigabytes_per_second:.1f}",
            "" if row.fraction_of_limit is None else f"{row.fraction_of_limit:.2f}",
        )
    console = Console(width=160)
    console.print(table)
    if any(row.parts_ms for row in rows):
        console.print(_table_of_parts(rows))


def _table_of_parts(rows: list[Row]) -> Table:
    """What mean iterations are spent on; the goals are times of the baseline's."""
    table = Table(title="Iterations, mean of a run, in ms of processor time")
    table.add_column("iteration", no_wrap=True)
    names = list(dict.fromkeys(name for row in rows for name in row.parts_ms or {}))
    for column in ("baseline", "all", "times", "goal", *names):
        table.add_column(column, justify="right")
    for row in rows:
        if row.parts_ms is not None:
            goal = "" if row.gate is None else f"{1 / row.gate:.1f} {'reached' if row.held else '[red]missed[/red]'}"
            parts = (f"{row.parts_ms[name]:.2f}" if name in row.parts_ms else "" for name in names)
            times = f"{1 / row.ratio:.2f}"
            table.add_row(row.shape, f"{row.baseline_ms:.2f}", f"{row.ours_ms:.2f}", times, goal, *parts)
    return table


def write_report(rows: list[Row], path: Path) -> None:
    """The same as JSON, with the date, the machine and the versions."""
    path.parent.mkdir(parents=True, exist_ok=True)
    report = {
        "date": datetime.date.today().isoformat(),
        "environment": describe(),
        "rows": [asdict(row) for row in rows],
    }
    path.write_text(json.dumps(report, indent=1) + "\n")
