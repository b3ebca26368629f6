"""What an inspection looks for in the code of a kernel, and its findings."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

TARGETS = ("cuda:80", "cuda:90", "cuda:100", "hip:gfx942")
MOST_STACK = 16
"""Bytes of stack, for spilled registers, that need no explanation."""
WIDE = {"cuda": 16, "hip": 8}
"""Bytes of a wide access: 32 lanes of 16 bytes, or 64 of 8, are the same stretch of memory."""


class Streams(NamedTuple):
    """How many arrays a kernel streams through: at least so many loads and stores must be wide."""

    loads: int
    stores: int
    unless: str = ""
    """A regular expression that the arguments of variants match which have no wide path."""


class TradeOff(NamedTuple):
    """A larger stack that is accepted: at most so many bytes, and why."""

    bytes: int
    reason: str
    arguments: str = ""
    """A regular expression that the arguments of the variants match."""


@dataclass(frozen=True)
class Row:
    """What the code of a variant needs.

    Attributes:
        kernel: file and function.
        arguments: what tells variants apart: dtypes, compile-time arguments.
        registers: of a thread.
        shared: bytes of shared memory of a program.
        stack: bytes of a thread, for spilled registers and arrays.
        accesses: how many instructions load or store so many bytes of global memory, as ``{"load 16": 6}``.
        faults: what fails the inspection; empty where all is well.
        note: why a stack above the limit is accepted.
    """

    backend: str
    target: str
    kernel: str
    arguments: str
    registers: int | None = None
    shared: int | None = None
    stack: int | None = None
    accesses: dict[str, int] = field(default_factory=dict)
    seconds: float = 0.0
    faults: tuple[str, ...] = ()
    note: str | None = None


def stack_faults(stack: int, trade_off: TradeOff | None) -> tuple[str, ...]:
    """What is wrong with so many bytes."""
    most = trade_off.bytes if trade_off else MOST_STACK
    return (f"{stack} bytes of stack, expected at most {most}",) if stack > most else ()


def width_faults(streams: Streams | None, target: str, arguments: str, accesses: Mapping[str, int]) -> tuple[str, ...]:
    """What is wrong with the widths of these accesses."""
    if streams is None or (streams.unless and re.search(streams.unless, arguments)):
        return ()
    wide = WIDE[target.split(":")[0]]
    found: Counter[str] = Counter()
    for name, number in accesses.items():
        kind, width = name.split()
        found[kind] += number if int(width) >= wide else 0
    return tuple(
        f"{found[kind]} {kind}s of {wide} bytes, expected at least {least}"
        for kind, least in (("load", streams.loads), ("store", streams.stores))
        if found[kind] < least
    )
