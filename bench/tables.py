"""Puts measured figures into the documents: ``python -m bench.tables build/bench.json``.

A document says where with a pair of comments, of which the second is ``<!-- end -->``:

- ``<!-- measured: OP, OP -->``: the rows of those ops in the report of ``make bench``, ``bench/results/cpu.json``.
  A report that is named on the command line takes its place first.
- ``<!-- from: FILE -->``: a Markdown file that ``fisher-kernels compare`` wrote; its path is relative to the document.
- ``<!-- plan: MODEL -->`` or ``<!-- plan: MODEL fsdp-tp -->``: what ``fisher-kernels plan`` counts for a model on
  growing numbers of processes, ``bench/results/plans.json`` of ``python -m bench.plans``.
- ``<!-- gpu -->``: the latest report of ``make gpu`` for each device in ``bench/results/``.
- ``<!-- summary -->``: the table of README.md, from the report of the demo in ``docs/results/demo/``.
"""

from __future__ import annotations

import json
import re
import textwrap
from pathlib import Path
from typing import Annotated, Any

import typer

from bench import plans
from bench.gpu.report import latest, markdown
from bench.summary import SPEED, summary
from fisher_kernels.tools.markdown import markdown_table

ROOT = Path(__file__).parent.parent
PLACE = re.compile(r"^(<!-- measured: (?P<ops>[^>]*?) -->\n).*?^(<!-- end -->)", re.DOTALL | re.MULTILINE)
FILE = re.compile(r"^(<!-- from: (?P<file>[^>]*?) -->\n).*?^(<!-- end -->)", re.DOTALL | re.MULTILINE)
PLAN = re.compile(r"^(<!-- plan: (?P<model>[^>]*?) -->\n).*?^(<!-- end -->)", re.DOTALL | re.MULTILINE)
GPU = re.compile(r"^(<!-- gpu -->\n).*?^(<!-- end -->)", re.DOTALL | re.MULTILINE)
SUMMARY = re.compile(r"^(<!-- summary -->\n).*?^(<!-- end -->)", re.DOTALL | re.MULTILINE)
HEADER = ("op", "shape", "dtype", "baseline", "baseline ms", "ours ms", "ratio", "GB/s", "of limit")


def table(report: dict[str, Any], ops: list[str]) -> str:
    """The rows of some ops as Markdown, and what they were measured on."""
    rows = []
    for row in report["rows"]:
        if row["op"] in ops and row["baseline"] != "limit":
            speed = "" if row["gigabytes_per_second"] is None else f"{row['gigabytes_per_second']:.1f}"
            fraction = "" if row["fraction_of_limit"] is None else f"{row['fraction_of_limit']:.2f}"
            times = f"{row['baseline_ms']:.4g}", f"{row['ours_ms']:.4g}", f"{row['ratio']:.2f}"
            rows.append((f"`{row['op']}`", row["shape"], row["dtype"], row["baseline"], *times, speed, fraction))
    if not rows:  # the recipe for new kernels shows a place without figures
        return ""
    machine = report["environment"]
    caption = (
        f"\nMedians of interleaved runs by `make bench` on {machine['processor']} with {machine['threads']} threads "
        f"({machine['capability']}), torch {machine['torch']}, Python {machine['python']}, {report['date']}. Ratio is "
        "the baseline's time over ours, round by round; the limit, measured in that process, is a bare pass over the "
        "same bytes, or for a convolution's Gram matrices a matrix product of as many operations.\n"
    )
    return markdown_table(HEADER, rows) + "\n" + textwrap.fill(caption.strip(), 120) + "\n"


def filled(document: Path) -> str:
    """The text of a document with the figures of the committed reports."""
    report = json.loads(SPEED.read_text())
    text = PLACE.sub(lambda place: place[1] + table(report, place["ops"].split(", ")) + place[3], document.read_text())
    text = GPU.sub(lambda place: place[1] + markdown(latest()) + place[2], text)
    text = PLAN.sub(lambda place: place[1] + plans.table(place["model"]) + place[3], text)
    text = SUMMARY.sub(lambda place: place[1] + summary() + place[2], text)
    return FILE.sub(lambda place: place[1] + (document.parent / place["file"]).read_text() + place[3], text)


def _ops(report: Path) -> set[str]:
    return {row["op"] for row in json.loads(report.read_text())["rows"]}


def main(report: Annotated[Path | None, typer.Argument(help="JSON report of make bench.")] = None) -> None:
    """Rewrite the measured tables of README.md and docs/."""
    if report is not None:
        lost = _ops(SPEED) - _ops(report)
        if lost:  # of a run of some benchmarks only
            raise typer.BadParameter(f"{report} has no figures for {', '.join(sorted(lost))}")
        SPEED.write_text(report.read_text())
    update()


def update() -> None:
    """Puts the figures of the committed reports into all documents."""
    for document in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))):
        new = filled(document)
        if new != document.read_text():
            document.write_text(new)
            typer.echo(f"updated {document.relative_to(ROOT)}")


if __name__ == "__main__":
    typer.run(main)
