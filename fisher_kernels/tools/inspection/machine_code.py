"""Registers, stacks and the widths of accesses, read from compiled code."""

from __future__ import annotations

import re
import subprocess
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple


class Usage(NamedTuple):
    """What one kernel needs."""

    registers: int
    stack: int
    accesses: dict[str, int]


def nvidia(file: Path, architecture: str) -> dict[str, Usage]:
    """The kernels for one compute capability in a file, by their names as the linker knows them.

    ``cuobjdump``, of which Triton has a copy, reads cubins, objects and modules.
    """
    import triton

    tool = triton.knobs.nvidia.cuobjdump.path

    def dump(option: str) -> str:
        command = [tool, "-arch", f"sm_{architecture}", option, str(file)]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    code = dict(_functions(r"Function : (\S+)", dump("-sass")))
    return {
        name: Usage(_number("REG", usage), _number("STACK", usage), count(nvidia_accesses(code[name])))
        for name, usage in _functions(r"Function (\S+):", dump("--dump-resource-usage"))
    }


def _functions(heading: str, text: str) -> Iterator[tuple[str, str]]:
    parts = re.split(heading, text)
    yield from zip(parts[1::2], parts[2::2], strict=True)


def _number(name: str, text: str) -> int:
    found = re.search(rf"\b{name}:(\d+)", text)
    assert found is not None, text
    return int(found[1])


def nvidia_accesses(code: str) -> Iterator[tuple[str, int]]:
    """LDG, STG and asynchronous copies of SASS; the width is a suffix, 4 bytes without one."""
    kinds = {"LDG": "load", "STG": "store", "LDGSTS": "load"}
    for name, suffixes in re.findall(r"\b(LDG|STG|LDGSTS)((?:\.\w+)+)", code):
        bits = re.search(r"\.(?:[US])?(8|16|64|128|256)\b", suffixes)
        yield kinds[name], int(bits[1]) // 8 if bits else 4


def amd(assembly: str) -> Usage:
    """The kernel in the assembly of an AMD GPU."""
    registers, spilled, private = (
        max((int(n) for n in re.findall(rf"\.{name}:\s*(\d+)", assembly)), default=0)
        for name in ("vgpr_count", "vgpr_spill_count", "private_segment_fixed_size")
    )
    return Usage(registers, max(private, 4 * spilled), count(_amd_accesses(assembly)))


def _amd_accesses(assembly: str) -> Iterator[tuple[str, int]]:
    widths = {"byte": 1, "ubyte": 1, "sbyte": 1, "short": 2, "ushort": 2, "sshort": 2, "dword": 4}
    for kind, what in re.findall(r"\b(?:global|buffer|flat)_(load|store)_([a-z0-9_]+)", assembly):
        words = re.match(r"dwordx(\d+)", what)
        yield kind, 4 * int(words[1]) if words else widths.get(what.split("_")[0], 4)


def count(found: Iterator[tuple[str, int]]) -> dict[str, int]:
    """How many accesses there are of each kind and width, as ``{"load 16": 6}``."""
    counts = Counter(f"{kind} {width}" for kind, width in found)
    return dict(sorted(counts.items(), key=lambda entry: (entry[0].split()[0], -int(entry[0].split()[1]))))
