"""What a run found: as a JSON file, on the terminal, and as Markdown for docs/performance.md."""

from __future__ import annotations

import datetime
import json
import platform
import re
import shutil
import subprocess
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from fisher_kernels import __version__
from fisher_kernels.tools.environment import processor, version
from fisher_kernels.tools.markdown import markdown_table

RESULTS = Path(__file__).parents[1] / "results"
NOT_YET = "Not yet measured on a GPU.\n"
COLUMNS = (
    "case",
    "dtype",
    "backend",
    "ms (p20 to p80)",
    "moved, computed",
    "of limit",
    "against",
    "host and wall ms",
    "targets",
)


def describe(device: torch.device) -> dict[str, Any]:
    """The device, versions, today."""
    return {
        "kind": "gpu",
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else processor(),
        "date": datetime.date.today().isoformat(),
        "versions": {
            "fisher_kernels": __version__,
            "torch": torch.__version__,
            "triton": version("triton"),
            "cuda": torch.version.cuda,
            "driver": _driver(),
            "python": platform.python_version(),
        },
    }


def _driver() -> str | None:
    command = shutil.which("nvidia-smi")
    if command is None:
        return None
    query = [command, "--query-gpu=driver_version", "--format=csv,noheader"]
    found = subprocess.run(query, capture_output=True, text=True, check=False).stdout.split()
    return found[0] if found else None


def slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def write(facts: dict[str, Any], folder: Path) -> Path:
    """The file of a run, named after the device and the date."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{slug(facts['device'])}-{facts['date']}.json"
    file.write_text(json.dumps(facts, indent=1) + "\n")
    return file


# Cells.


def _milliseconds(times: dict[str, Any]) -> str:
    return f"{1e3 * times['median']:.4g} ({1e3 * times['p20']:.4g} to {1e3 * times['p80']:.4g})"


def _work(row: dict[str, Any]) -> str:
    """Bytes and operations, and how many of them a second."""
    seconds = row["times"]["median"]
    moved = f"{row['bytes_moved'] / 1e9:.3g} GB, {row['bytes_moved'] / 1e9 / seconds:,.0f} GB/s"
    computed = f"{row['flops'] / 1e12:.3g} TFLOP, {row['flops'] / 1e12 / seconds:,.1f} TFLOP/s"
    return f"{moved}; {computed}" if row["flops"] else moved


def _targets(row: dict[str, Any]) -> str:
    return "; ".join(
        f"{name} {least:g} {'**missed**' if name in row['missed'] else 'met'}" for name, least in row["targets"].items()
    )


def _against(row: dict[str, Any]) -> str:
    shares = [f"{name} {x:.2f} x" for name, x in row["ratios"].items() if name != row["limit"]]
    return "; ".join(shares + [f"{name}: failed" for name, b in row["baselines"].items() if b["error"]])


def _cells(row: dict[str, Any]) -> list[str]:
    case = f"`{row['op']}` {row['shape']}"
    if row["error"] is not None:
        return [
            case,
            row["dtype"],
            row["backend"],
            "no result",
            "",
            "",
            row["error"].replace("|", "/"),
            "",
            _targets(row),
        ]
    wall = "" if row["wall"] is None else f"{1e3 * row['host']['median']:.3g} and {1e3 * row['wall']['median']:.3g}"
    fraction = f"{row['fraction']:.2f} of {row['limit']}"
    return [
        case, row["dtype"], row["backend"], _milliseconds(row["times"]), _work(row), fraction, _against(row), wall,
        _targets(row),
    ]  # fmt: skip


def limits_line(facts: dict[str, Any]) -> str:
    """The rates of the same run, in words."""
    rates = facts["limits"]
    units = {"copy": "GB/s copied (read and written)", "read": "GB/s read"}
    parts = [f"{rates[name] / 1e9:,.0f} {text}" for name, text in units.items()]
    parts += [f"{rates[name] / 1e12:,.1f} TFLOP/s of {name} products" for name in ("float32", "tf32", "bfloat16")]
    return ", ".join(parts)


def caption(facts: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {found}" for name, found in facts["versions"].items() if found is not None)
    return f"{facts['device']}, {facts['date']}: {versions}. Limits of that run: {limits_line(facts)}."


# On the terminal.


def show(facts: dict[str, Any]) -> None:
    """Print all rows, what was missed and what was left out."""
    rows = [_cells(row) for row in facts["rows"]]
    try:
        from rich.console import Console
        from rich.table import Table
    except ModuleNotFoundError:  # plain lines where it is missing
        for cells in (COLUMNS, *rows):
            print(" | ".join(cells))
    else:
        table = Table(*COLUMNS, show_lines=True)
        for cells in rows:
            table.add_row(*(cell.replace("[", r"\[") for cell in cells))
        Console(width=200).print(table)
    print(caption(facts))
    for row in facts["rows"]:
        for name in row["missed"] if row["backend"] != "reference" else ():
            reached = row["ratios"].get(name)
            print(
                f"missed: {row['op']} {row['shape']} {row['dtype']} on {row['backend']}: {name} is "
                f"{'not measured' if reached is None else f'{reached:.3f}'}, promised {row['targets'][name]:g}"
            )
    for name in facts["left_out"]:
        print(f"left out, as the time was over: {name}")


# In the documents.


def latest(folder: Path = RESULTS) -> list[dict[str, Any]]:
    """The latest report of each device."""
    found: dict[str, dict[str, Any]] = {}
    for file in sorted(folder.glob("*.json")):
        facts = json.loads(file.read_text())
        if facts.get("kind") == "gpu" and facts["date"] >= found.get(facts["device"], facts)["date"]:
            found[facts["device"]] = facts
    return [found[name] for name in sorted(found)]


def markdown(reports: Sequence[dict[str, Any]]) -> str:
    """A section for each device."""
    if not reports:
        return NOT_YET
    parts = []
    for facts in reports:
        left_out = "".join(f"\n- {name}" for name in facts["left_out"])
        table = markdown_table(COLUMNS, map(_cells, facts["rows"]))
        parts.append(
            f"### {facts['device']}\n\n{_wrapped(caption(facts))}\n{table}"
            + (f"\nLeft out, as the time was over:\n{left_out}\n" if left_out else "")
        )
    return "\n".join(parts)


def _wrapped(text: str) -> str:
    return textwrap.fill(text, 120) + "\n"
