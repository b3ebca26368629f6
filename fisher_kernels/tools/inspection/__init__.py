"""Registers, memory and accesses of every GPU kernel, from its machine code; the GPU need not be there.

Triton's kernels are compiled for it; those in CUDA are read from the native module, as they were built.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from fisher_kernels.tools.inspection import cuda, triton
from fisher_kernels.tools.inspection.rows import TARGETS, Row

__all__ = ["BACKENDS", "TARGETS", "Row", "run"]

BACKENDS = {"cuda": cuda, "triton": triton}


def run(
    targets: Sequence[str] = TARGETS,
    pattern: str = "",
    sample: bool = False,
    backends: Sequence[str] = tuple(BACKENDS),
) -> Iterator[Row]:
    """Inspect kernels.

    Args:
        targets: of :data:`TARGETS`.
        pattern: a regular expression that the names of kernels must match.
        sample: one variant of each kernel only.
        backends: whose kernels, of ``"cuda"`` and ``"triton"``.

    Raises:
        RuntimeError: a backend has no kernels that could be inspected here.
        ValueError: a target or backend is unknown, or the pattern matches no kernel.
    """
    for name, values, known in (("target", targets, TARGETS), ("backend", backends, tuple(BACKENDS))):
        for value in values:
            if value not in known:
                raise ValueError(f"{name} is {value!r}, expected one of {', '.join(map(repr, known))}")
    for backend in backends:
        if reason := BACKENDS[backend].why_not():
            raise RuntimeError(f"kernels of {backend} cannot be inspected here: {reason}")
    if pattern:
        names = {name for backend in backends for name in BACKENDS[backend].names()}
        if not any(re.search(pattern, name) for name in names):
            stems = sorted({name.partition(".")[0] for name in names if name[0] != "_" and name[:5] != "cuda."})
            raise ValueError(f"{pattern!r} matches no kernel; their names begin with {', '.join(stems)}")
    for backend in backends:
        yield from BACKENDS[backend].run(targets, pattern, sample)
