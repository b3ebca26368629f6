"""Puts the measured figures of a report into the documents: ``python -m bench.tables build/bench.json``.

A document says where with a pair of comments, ``<!-- measured: OP, OP -->`` and ``<!-- end -->``; what stands between
them is replaced by the rows of those ops.
"""

from __future__ import annotations

import json
import re
import textwrap
from pathlib import Path
from typing import Annotated, Any

import typer

ROOT = Path(__file__).parent.parent
PLACE = re.compile(r"^(<!-- measured: (?P<ops>[^>]*?) -->\n).*?^(<!-- end -->)", re.DOTALL | re.MULTILINE)
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


def main(report: Annotated[Path, typer.Argument(help="JSON report of make bench")]) -> None:
    """Rewrite the measured tables of README.md and docs/."""
    figures = json.loads(report.read_text())
    for document in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))):
        old = document.read_text()
        new = PLACE.sub(lambda place: place[1] + table(figures, place["ops"].split(", ")) + place[3], old)
        if new != old:
            document.write_text(new)
            typer.echo(f"updated {document.relative_to(ROOT)}")


if __name__ == "__main__":
    typer.run(main)
