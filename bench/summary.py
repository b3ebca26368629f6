"""The table of README.md, in eight rows, from the committed reports.

How fast things are is in ``bench/results/cpu.json``, a report of ``make bench``; how training went is in
``docs/results/*/compare.json``, which ``make results`` writes.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from fisher_kernels.tools.markdown import markdown_table

ROOT = Path(__file__).parent.parent
SPEED = ROOT / "bench" / "results" / "cpu.json"
TRAINING = ROOT / "docs" / "results"
ADAMW = "adamw"

Report = dict[str, Any]


class Row(NamedTuple):
    """One line of the table."""

    measured: str
    adamw: str
    here: str
    command: str
    threads: int


def summary() -> str:
    """The table as Markdown, with the machine below."""
    speed = _read(SPEED)
    autoencoder, text = (_read(TRAINING / task / "compare.json") for task in ("autoencoder", "text"))
    rows = [*_speed_rows(speed), *_training_rows(autoencoder, text)]
    machine = speed["environment"]
    return (
        markdown_table(
            ("measured", "fused AdamW", "here", "measure it again", "threads"),
            (row._replace(command=f"`{row.command}`") for row in rows),
            right=(1, 4),
        )
        + f"\nMachine: {machine['processor']} ({machine['capability'].upper().replace('AVX', 'AVX-')}), "
        f"torch {machine['torch']}, {speed['date']}; medians, means over three seeds.\n"
    )


def _read(file: Path) -> Report:
    report: Report = json.loads(file.read_text())
    return report


# Speed.


def _speed_rows(speed: Report) -> Iterable[Row]:
    def ratio(op: str, shape: str, baseline: str = "AdamW(fused).step") -> str:
        wanted = (op, shape, baseline, "float32")
        (row,) = (r for r in speed["rows"] if (r["op"], r["shape"], r["baseline"], r["dtype"]) == wanted)
        return f"{row['ratio']:.2f}x"

    def iteration(op: str, interval: int) -> str:
        inverse = ", inverse every 10" if op.startswith("MBF") else ""
        return ratio(op, f"digits CNN, 1 thread, refresh every {interval}{inverse}", "AdamW(fused)")

    threads = speed["environment"]["threads"]
    yield Row(
        "Speed of a step, 25 tensors of 1024 x 1024",
        "1",
        f"AdaFisher {ratio('AdaFisher.step', '25 x 1024 x 1024, refresh')}, "
        f"SOFIM {ratio('SOFIM.step', '25 x 1024 x 1024')}",
        "make bench",
        threads,
    )
    yield Row(
        "The same, 100 tensors of 64 x 64",
        "1",
        f"AdaFisher {ratio('AdaFisher.step', '100 x 64 x 64, no refresh')}, with new statistics "
        f"{ratio('AdaFisher.step', '100 x 64 x 64, refresh')}, SOFIM {ratio('SOFIM.step', '100 x 64 x 64')}",
        "make bench",
        threads,
    )
    for interval, what in (
        (1, "Speed of a training iteration, small CNN, statistics at every step"),
        (10, "The same, statistics every 10 steps"),
    ):
        yield Row(
            what,
            "1",
            f"AdaFisher {iteration('training iteration', interval)}, "
            f"MBF {iteration('MBF training iteration', interval)}",
            "make bench ARGS=bench/bench_training.py",
            1,
        )


# Training.


def _training_rows(autoencoder: Report, text: Report) -> Iterable[Row]:
    yield _training_row("Optimizer state, bytes a parameter (autoencoder)", autoencoder, _state(autoencoder), ".1f")
    yield _training_row("Test loss, autoencoder, after 20 epochs", autoencoder, _final(autoencoder), ".2f")
    yield _training_row("The same, in the time AdamW takes", autoencoder, _in_adamws_time(autoencoder), ".2f")
    yield _training_row("Test loss, language model, after 3 epochs", text, _final(text), ".2f")


def _training_row(what: str, report: Report, figures: dict[str, float], form: str) -> Row:
    titles = {s["optimizer"]: s["title"] for s in report["summary"]}
    ours = {name: figures[name] for name in ("adafisherw", "mbf", "sofim")}
    best = format(min(figures[ADAMW], *ours.values()), form)

    def shown(value: float) -> str:
        text = format(value, form)
        return f"**{text}**" if text == best else text

    here = ", ".join(f"{titles[name]} {shown(value)}" for name, value in sorted(ours.items(), key=lambda x: x[1]))
    command = f"fisher-kernels compare {report['task']}"
    return Row(what, shown(figures[ADAMW]), here, command, report["environment"]["threads"])


def _state(report: Report) -> dict[str, float]:
    return {s["optimizer"]: s["state_bytes_per_parameter"] for s in report["summary"]}


def _final(report: Report) -> dict[str, float]:
    return {s["optimizer"]: s["metric"][-1]["mean"] for s in report["summary"]}


def _in_adamws_time(report: Report) -> dict[str, float]:
    assert report["equal_time"]["baseline"] == ADAMW
    return {name: spreads[-1]["mean"] for name, spreads in report["equal_time"]["metric"].items()}
