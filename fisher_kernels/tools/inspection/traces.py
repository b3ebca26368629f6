"""What a trace of the CUDA kernels on the host has found, with names of kernels and lines of their sources.

A traced module (``FISHER_KERNELS_CUDA_ON_HOST=traced`` when it is built and when it runs) adds a line of JSON for each
launch to the file that ``FISHER_KERNELS_HOST_TRACE`` names; places in it are those of the module's code.
"""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MOST_AT_ONCE = 2000
"""Places that one call of a program is asked for."""

UNWRITTEN: Mapping[str, str] = {
    "block_inverse.kernel": "at the end, threads without a block work on what is there: warps stay together",
    "conv_gram.patch_kernel": "a struct is copied with the bytes between its members",
    "mini_block_gram.small_kernel": "numbers behind a block give sums that nobody reads",
    "rank_one.update_kernel": "at the end, threads without a block work on what is there: barriers are of all",
}
"""Kernels that read shared memory which they have not written, and why no result depends on it."""


@dataclass(frozen=True)
class Finding:
    """Accesses that do not go together.

    Attributes:
        what: ``"race"``, ``"copy under way"`` or ``"unwritten"``.
        memory: ``"shared"`` or ``"device"``.
        places: where in the sources the two accesses are, or twice the same; callers after what they inlined.
        count: how often.
        first: threads and bytes of the first one.
    """

    what: str
    memory: str
    places: tuple[str, str]
    count: int
    first: str


@dataclass(frozen=True)
class Launch:
    """A launch of a kernel, ``"stem.function"``, with the function's template arguments."""

    kernel: str
    arguments: str
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    findings: tuple[Finding, ...]


def read(path: Path) -> list[Launch]:
    """Every launch that a file has."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    launches = []
    for module in sorted({line["module"] for line in lines}):
        own = [line for line in lines if line["module"] == module]
        wanted = {line["kernel"] for line in own}
        # A place is where the traced access returns to.
        wanted |= {place - 1 for line in own for finding in line["findings"] for place in finding["places"]}
        found = _look_up(module, sorted(wanted))
        launches += [_launch(line, found) for line in own]
    return launches


def _launch(line: dict[str, Any], found: dict[int, list[tuple[str, str]]]) -> Launch:
    function, source = found[line["kernel"]][-1]
    kernel, arguments = _kernel(function)
    findings = [
        Finding(
            what=finding["what"],
            memory=finding["memory"],
            places=(_place(found[finding["places"][0] - 1]), _place(found[finding["places"][1] - 1])),
            count=finding["count"],
            first=finding["first"],
        )
        for finding in line["findings"]
    ]
    stem = Path(source.partition(":")[0]).stem
    return Launch(f"{stem}.{kernel}", arguments, tuple(line["grid"]), tuple(line["block"]), tuple(findings))


def _kernel(function: str) -> tuple[str, str]:
    """Its name and its template arguments."""
    plain = re.sub(r"\(anonymous namespace\)::", "", function).removeprefix("void ")
    found = re.match(r"(?:\w+::)*(\w+)(?:<(.*?)>)?(?:\(|$)", plain)
    return (found[1], re.sub(r"\w+::", "", found[2] or "")) if found else (plain, "")


def _place(frames: Sequence[tuple[str, str]]) -> str:
    """Lines of sources, from the innermost to that of the kernel; the stand-in's own are left out."""
    files = [(Path(path), line) for path, _, line in (source.partition(":") for _, source in frames)]
    kept = [f"{path.name}:{line.split()[0]}" for path, line in files if "cuda_on_host" not in path.parts]
    return " < ".join(kept) or "?"


def _look_up(module: str, places: Sequence[int]) -> dict[int, list[tuple[str, str]]]:
    """Function and source line of each place in a module, and of those that it is inlined into."""
    found: dict[int, list[tuple[str, str]]] = {}
    for start in range(0, len(places), MOST_AT_ONCE):
        command = ["addr2line", "-a", "-i", "-f", "-C", "-e", module, *map(hex, places[start : start + MOST_AT_ONCE])]
        lines = iter(subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines())
        for line in lines:
            if re.fullmatch(r"0x[0-9a-f]+", line):
                frames = found.setdefault(int(line, 16), [])
            else:
                frames.append((line, next(lines)))
    return found


def summary(launches: Iterable[Launch]) -> list[str]:
    """A line for each finding that :data:`UNWRITTEN` does not explain, the same ones of a kernel joined."""
    counts: dict[tuple[str, str, str, tuple[str, str]], tuple[int, str]] = {}
    for launch in launches:
        for finding in launch.findings:
            if finding.what == "unwritten" and launch.kernel in UNWRITTEN:
                continue
            key = (launch.kernel, finding.what, finding.memory, finding.places)
            count, first = counts.get(key, (0, finding.first))
            counts[key] = (count + finding.count, first)
    return [
        f"{kernel}: {what} ({memory} memory), {count} times: {places[0]} and {places[1]}; first: {first}"
        for (kernel, what, memory, places), (count, first) in counts.items()
    ]
