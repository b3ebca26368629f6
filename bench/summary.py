"""The table of README.md, from the committed report of the demo.

``make readme`` runs the demo into ``docs/results/demo/`` and puts its picture and this table in place.
"""

from __future__ import annotations

import json
import textwrap
from pathlib import Path
from typing import Any

from fisher_kernels.tools.markdown import markdown_table

ROOT = Path(__file__).parent.parent
SPEED = ROOT / "bench" / "results" / "cpu.json"
DEMO = ROOT / "docs" / "results" / "demo" / "compare.json"

BUSY = 1.25
"""Time on the wall by processor time above which a machine was not idle."""


def summary() -> str:
    """The table as Markdown, with the machine below."""
    report = json.loads(DEMO.read_text())
    metric, machine = report["metric"], report["environment"]
    goal = report["reached"]
    titles = {line["optimizer"]: line["title"] for line in report["summary"]}
    baseline = titles[goal["baseline"]]
    header = (
        "optimizer",
        f"{metric['name']} after {report['settings']['budget']:g} s",
        f"reaches {baseline}'s last after",
        "steps",
        "ms a step",
        "state B/param",
    )
    rows = [_row(line, goal, report["settings"]["budget"], metric["decimals"]) for line in report["summary"]]
    seeds = ", ".join(map(str, report["summary"][0]["seeds"]))
    threads = machine["threads"]
    caption = (
        f"In {metric['unit']}, {'higher' if metric['higher_is_better'] else 'lower'} is better: means and deviations "
        f"over the seeds {seeds}, batches of {report['settings']['batch_size']}. Seconds are of processor time, for "
        "which each run was planned, and its steps are counted in it, new curvature included. Measured on "
        f"{machine['processor']} with {threads} thread{'s' * (threads > 1)} ({machine['capability']}), torch "
        f"{machine['torch']}, Python {machine['python']}, {report['date']}."
    )
    wall = max(line["seconds"][-1] or 0.0 for line in report["summary"])
    if wall > BUSY * report["settings"]["budget"]:
        caption += (
            f" Other work shared the machine: a run took up to {wall:.0f} s on the wall, and an idle one makes more "
            "steps in its time."
        )
    return markdown_table(header, rows, right=range(1, 6)) + "\n" + textwrap.fill(caption, 120) + "\n"


def _row(line: dict[str, Any], goal: dict[str, Any], budget: float, decimals: int) -> tuple[str, ...]:
    last, steps = line["metric"][-1], line["iterations"][-1]
    seconds, base = goal["seconds"][line["optimizer"]], goal["seconds"][goal["baseline"]]
    if last is None:
        return line["title"], "diverged", "", "", "", f"{line['state_bytes_per_parameter']:.1f}"
    return (
        line["title"],
        f"{last['mean']:.{decimals}f} ± {last['deviation']:.{decimals}f}",
        "never" if seconds is None else f"{seconds:.2f} s" + f" ({seconds / base:.2f})" * (seconds != base),
        f"{steps:.0f}",
        f"{1e3 * budget / steps:.1f}",
        f"{line['state_bytes_per_parameter']:.1f}",
    )
