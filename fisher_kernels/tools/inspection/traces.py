"""What a trace of the CUDA kernels on the host has found, with names of kernels and lines of their sources.

A traced module (``FISHER_KERNELS_CUDA_ON_HOST=traced`` when it is built and when it runs) adds a line of JSON for each
launch to the file that ``FISHER_KERNELS_HOST_TRACE`` names; places in it are those of the module's code.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

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
class Traffic:
    """What the requests from one place in the sources cost.

    Lanes of a warp that come to a place for the same time make one request.

    Attributes:
        memory: ``"shared"`` or ``"device"``.
        write: whether it writes; an atomic does.
        bytes: that the lanes asked for.
        units: sectors of 32 bytes in memory of the device, wavefronts in shared memory.
        least: how many would hold the distinct bytes of each request.
    """

    memory: str
    write: bool
    place: str
    requests: int
    bytes: int
    units: int
    least: int


@dataclass(frozen=True)
class Launch:
    """A launch of a kernel, ``"stem.function"``, with the function's template arguments.

    ``distinct`` is how many sectors of the device's memory it read and how many it wrote, each counted once.
    """

    kernel: str
    arguments: str
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    findings: tuple[Finding, ...]
    traffic: tuple[Traffic, ...] = ()
    distinct: tuple[int, int] = (0, 0)


def read(path: Path) -> list[Launch]:
    """Every launch that a file has."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    launches = []
    for module in sorted({line["module"] for line in lines}):
        own = [line for line in lines if line["module"] == module]
        wanted = {line["kernel"] for line in own}
        # A place is where the traced access returns to.
        wanted |= {place - 1 for line in own for finding in line["findings"] for place in finding["places"]}
        wanted |= {place - 1 for line in own for place, *_ in line["traffic"]}
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
    traffic = [
        Traffic("shared" if shared else "device", bool(write), _place(found[place - 1]), *counts)
        for place, shared, write, *counts in line["traffic"]
    ]
    sizes = tuple(line["grid"]), tuple(line["block"])
    return Launch(f"{stem}.{kernel}", arguments, *sizes, tuple(findings), tuple(traffic), tuple(line["distinct"]))


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


def why_not() -> str | None:
    """Why nothing can be traced here, or None."""
    if importlib.util.find_spec("fisher_kernels._cuda_on_host_traced") is None:
        return "there is no traced module: FISHER_KERNELS_CUDA_ON_HOST=traced builds it, in a checkout"
    return None if shutil.which("addr2line") else "addr2line is missing (it comes with binutils)"


_SELF_TEST = """
import sys
from fisher_kernels.tools import selftest
sys.exit(any([not result.passed for result in selftest.run("cuda")]))
"""


def self_test() -> list[Launch]:
    """The launches of the self-test on the traced kernels, with what they cost. It takes a minute.

    Raises:
        RuntimeError: there is no traced module, or the self-test failed on it.
    """
    if reason := why_not():
        raise RuntimeError(f"the kernels cannot be traced here: {reason}")
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "trace")
        settings = {
            "FISHER_KERNELS_CUDA_ON_HOST": "traced",
            "FISHER_KERNELS_HOST_TRACE": str(report),
            "FISHER_KERNELS_HOST_TRAFFIC": "1",
        }
        command = [sys.executable, "-c", _SELF_TEST]
        done = subprocess.run(command, env={**os.environ, **settings}, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"the self-test failed on the traced kernels: {done.stderr[-2000:]}")
        return read(report)


class Cost(NamedTuple):
    """Traffic of a kernel, or of a place in it: in units a request, and how many times the least."""

    requests: int
    bytes: int
    units: int
    least: int

    @property
    def each(self) -> float:
        """Sectors or wavefronts a request."""
        return self.units / self.requests

    @property
    def ratio(self) -> float:
        """How many times as many as the distinct bytes of a request, or its words without conflicts, need."""
        return self.units / self.least


def costs(launches: Iterable[Launch], by_place: bool = False) -> dict[tuple[str, str, str], Cost]:
    """Kernel, what ("device reads", "shared writes" and so on) and place, or an empty one -> cost."""
    sums: dict[tuple[str, str, str], Cost] = {}
    for launch in launches:
        for t in launch.traffic:
            what = f"{t.memory} {'writes' if t.write else 'reads'}"
            key = (launch.kernel, what, t.place if by_place else "")
            more = (t.requests, t.bytes, t.units, t.least)
            sums[key] = Cost(*map(sum, zip(sums.get(key, Cost(0, 0, 0, 0)), more, strict=True)))
    return dict(sorted(sums.items()))
