"""Puts measured figures into the documents: ``python -m bench.tables build/bench.json``.

A document says where with a pair of comments. Between ``<!-- measured: OP, OP -->`` and ``<!-- end -->`` go the rows of
those ops in the report of ``make bench``, if one is given; between ``<!-- from: FILE -->`` and ``<!-- end -->`` goes a
Markdown file that ``fisher-kernels compare`` wrote, its place counted from the document; and between ``<!-- gpu -->``
and ``<!-- end -->`` the latest report of ``make gpu`` of each device, out of ``bench/results/``.
"""

from __future__ import annotations

import json
import re
import textwrap
from pathlib import Path
from typing import Annotated, Any

import typer

from bench.gpu.report import latest, markdown

ROOT = Path(__file__).parent.parent
PLACE = re.compile(r"^(<!-- measured: (?P<ops>[^>]*?) -->\n).*?^(<!-- end -->)", re.DOTALL | re.MULTILINE)
FILE = re.compile(r"^(<!-- from: (?P<file>[^>]*?) -->\n).*?^(<!-- end -->)", re.DOTALL | re.MULTILINE)
GPU = re.compile(r"^(<!-- gpu -->\n).*?^(<!-- end -->)", re.DOTALL | re.MULTILINE)
HEADER = (
    "| op | shape | dtype | baseline | baseline ms | ours ms | ratio | GB/s | of limit |\n| --- " + "| --- " * 8 + "|\n"
)


def table(report: dict[str, Any], ops: list[str]) -> str:
    """The rows of some ops as Markdown, and what they were measured on."""
    lines = []
    for row in report["rows"]:
        if row["op"] in ops and row["baseline"] != "limit":
            speed = "" if row["gigabytes_per_second"] is None else f"{row['gigabytes_per_second']:.1f}"
            fraction = "" if row["fraction_of_limit"] is None else f"{row['fraction_of_limit']:.2f}"
            lines.append(
                f"| `{row['op']}` | {row['shape']} | {row['dtype']} | {row['baseline']} | {row['baseline_ms']:.4g} | "
                f"{row['ours_ms']:.4g} | {row['ratio']:.2f} | {speed} | {fraction} |\n"
            )
    if not lines:  # the recipe for new kernels shows a place without figures
        return ""
    machine = report["environment"]
    caption = (
        f"\nMedians of interleaved runs by `make bench` on {machine['processor']} with {machine['threads']} threads "
        f"({machine['capability']}), torch {machine['torch']}, Python {machine['python']}, {report['date']}. Ratio is "
        "the baseline's time over ours, round by round; the limit, measured in that process, is a bare pass over the "
        "same bytes, or for `conv_mini_block_gram_` a matrix product of as many operations.\n"
    )
    return HEADER + "".join(lines) + "\n" + textwrap.fill(caption.strip(), 120) + "\n"


def filled(document: Path, report: dict[str, Any] | None) -> str:
    """The text of a document with the figures of today."""
    text = document.read_text()
    if report is not None:
        text = PLACE.sub(lambda place: place[1] + table(report, place["ops"].split(", ")) + place[3], text)
    text = GPU.sub(lambda place: place[1] + markdown(latest()) + place[2], text)
    return FILE.sub(lambda place: place[1] + (document.parent / place["file"]).read_text() + place[3], text)


def main(report: Annotated[Path | None, typer.Argument(help="JSON report of make bench.")] = None) -> None:
    """Rewrite the measured tables of README.md and docs/."""
    figures = json.loads(report.read_text()) if report is not None else None
    for document in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))):
        new = filled(document, figures)
        if new != document.read_text():
            document.write_text(new)
            typer.echo(f"updated {document.relative_to(ROOT)}")


if __name__ == "__main__":
    typer.run(main)
