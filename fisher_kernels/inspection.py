"""Every Triton kernel compiled for GPUs that need not be there, and what the machine code says about it.

The launches of the self-test are recorded instead of made, so what is inspected is what runs: the same types,
alignments and compile-time arguments, in every configuration that the table lists for a target. Registers, stack and
access widths are read from the compiled code.
"""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import torch

from fisher_kernels import backends, selftest

TARGETS = ("cuda:80", "cuda:90", "cuda:100", "hip:gfx942")
MOST_STACK = 16
"""Bytes of stack, for spilled registers, that nobody needs to explain."""


WIDE = {"cuda": 16, "hip": 8}
"""Bytes of a wide access: 32 lanes of 16 bytes, or 64 of 8, are the same stretch of memory."""


class Streams(NamedTuple):
    """How many arrays a kernel streams through: at least so many loads and stores must be wide."""

    loads: int
    stores: int
    unless: Mapping[str, Any] = {}  # compile-time arguments of variants that have no wide path


STREAMING: Mapping[str, Streams] = {
    "adafisher_step.kernel": Streams(3, 2, {"STRIDED": True}),
    "sofim_step.advance_kernel": Streams(2, 1, {"STRIDED": True}),
    "sofim_step.descend_kernel": Streams(2, 1, {"STRIDED": True}),
    "rank_one_solve.subtract_kernel": Streams(2, 1),
    "sum_of_squares._sum_columns": Streams(1, 0),
    "sum_of_squares._sum_runs": Streams(1, 0),
    "mbf_step.diagonals": Streams(4, 2),
    "mbf_step.descend": Streams(2, 1, {"FLAT": False}),
}


class TradeOff(NamedTuple):
    """A stack that is the lesser evil: at most so many bytes, and why."""

    bytes: int
    reason: str


TRADE_OFFS: Mapping[str, TradeOff] = {
    "gram.sums": TradeOff(
        32,
        "weighted bfloat16 on cuda:80 multiplies in three parts and keeps 8 of 255 registers in memory; tiles half as "
        "large would read every number twice as often",
    ),
}


@dataclass(frozen=True)
class Variant:
    """One compilation of a kernel."""

    kernel: str  # file and function
    arguments: str  # the dtypes of its pointers, and its compile-time arguments
    launch: Any  # what the self-test recorded
    constants: Mapping[str, Any]
    aligned: bool  # whether all tensors are known to begin at 16 bytes


@dataclass(frozen=True)
class Row:
    """What the code of a variant needs.

    Attributes:
        registers: of a thread.
        shared: bytes of shared memory of a program.
        stack: bytes of a thread, for spilled registers and arrays.
        accesses: how many instructions load or store so many bytes of global memory, as ``{"load 16": 6}``.
        faults: what fails the inspection; empty where all is well.
        note: why a stack above the limit is accepted.
    """

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


def why_not() -> str | None:
    """Why nothing can be inspected here, or None."""
    if backends.is_interpreted():
        return "TRITON_INTERPRET is set: kernels are interpreted in this process, not compiled"
    return backends.why_no_triton()


def run(targets: Sequence[str] = TARGETS, pattern: str = "", sample: bool = False) -> Iterator[Row]:
    """Inspect kernels, several at a time.

    Args:
        targets: of :data:`TARGETS`.
        pattern: a regular expression that the names of kernels must match.
        sample: one variant of each kernel only.

    Raises:
        RuntimeError: Triton is missing, or interprets kernels.
        ValueError: a target is unknown.
    """
    if reason := why_not():
        raise RuntimeError(f"kernels cannot be compiled here: {reason}")
    for target in targets:
        if target not in TARGETS:
            raise ValueError(f"target is {target!r}, expected one of {', '.join(map(repr, TARGETS))}")
    work = [(target, pattern, sample, i) for target in targets for i in range(len(variants(target, pattern, sample)))]
    # Processes of their own: Triton's compiler uses one core, and a process that has compiled can crash.
    workers = min(len(work), len(os.sched_getaffinity(0))) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    if work:
        with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
            yield from pool.map(_inspect_one, work, chunksize=4)


# What is launched.

_variants: dict[tuple[str, str, bool], list[Variant]] = {}


def variants(target: str, pattern: str = "", sample: bool = False) -> list[Variant]:
    """What the self-test launches in the configurations of a target, each compilation once."""
    key = target, pattern, sample
    if key not in _variants:
        found: dict[tuple[str, str], Variant] = {}
        names: set[str] = set()
        for launch in _launches(target):
            variant = _variant(launch, target)
            if re.search(pattern, variant.kernel) and not (sample and variant.kernel in names):
                found.setdefault((variant.kernel, variant.arguments), variant)
                names.add(variant.kernel)
        _variants[key] = list(found.values())
    return _variants[key]


def _launches(target: str) -> list[Any]:
    """Every launch of the self-test, as often as the configurations of the target ask."""
    from fisher_kernels.triton_kernels import _configs, _launch

    launches: list[Any] = []
    listed = {kernel: sorted(_configs.listed(kernel, target)) for kernel in _configs.table()}
    rounds = max(map(len, listed.values()), default=1)
    with backends.assumed("triton", "cpu"), _launch.recording(launches.append):
        for i in range(rounds):
            with contextlib.ExitStack() as stack:
                for kernel, configs in listed.items():
                    stack.enter_context(_configs.forced(kernel, configs[i % len(configs)]))
                for case in selftest.CASES:
                    for dtype in case.dtypes:
                        source = selftest.Source(dtype, torch.device("cpu"), torch.Generator().manual_seed(0))
                        case.call(case.inputs(source))
    return launches


def _source(launch: Any, target: str) -> tuple[Any, Any, Any]:
    """What Triton would compile for a launch on a target, its options, and the target."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, make_backend
    from triton.runtime.jit import create_function_from_signature

    family, architecture = target.split(":")
    gpu = GPUTarget("hip", architecture, 64) if family == "hip" else GPUTarget("cuda", int(architecture), 32)
    backend, kernel = make_backend(gpu), launch.kernel
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, specialization, options = bind(*launch.args, **launch.options)
    chosen, signature, constants, attributes = kernel._pack_args(
        backend, dict(launch.options), bound, specialization, options
    )
    return ASTSource(kernel, signature, constants, attributes), chosen, gpu


def _variant(launch: Any, target: str) -> Variant:
    source, _, _ = _source(launch, target)
    function = launch.kernel.fn
    pointers = Counter(kind for kind in source.signature.values() if kind.startswith("*"))
    # What Triton is not told to be a multiple of 16 bytes: a tensor that is not, or any that it takes for one.
    unaligned = [
        name
        for i, (name, kind) in enumerate(source.signature.items())
        if kind.startswith("*") and ["tt.divisibility", 16] not in source.attrs.get((i,), [])
    ]
    absent = [name for name, kind in source.signature.items() if kind == "constexpr" and name not in launch.options]
    words = [
        *(kind if count == 1 else f"{count} {kind}" for kind, count in sorted(pointers.items())),
        *(f"{name}={_plain(value)}" for name, value in launch.options.items() if name != "enable_fp_fusion"),
        *(f"no {name}" for name in absent),
        *(f"unaligned {name}" for name in unaligned),
    ]
    return Variant(
        f"{function.__module__.rsplit('.', 1)[1]}.{function.__name__}",
        " ".join(words),
        launch,
        launch.options,
        not unaligned,
    )


def _plain(value: Any) -> str:
    return str(getattr(value, "name", value))


# What its code says.


def _inspect_one(item: tuple[str, str, bool, int]) -> Row:
    target, pattern, sample, index = item
    return inspect(variants(target, pattern, sample)[index], target)


def inspect(variant: Variant, target: str) -> Row:
    """Compile a variant for a target and read its code."""
    import triton

    source, options, gpu = _source(variant.launch, target)
    started = time.perf_counter()
    try:
        compiled = triton.compile(source, target=gpu, options=options.__dict__)
    except Exception as error:  # an inspection reports whatever goes wrong and carries on
        message = f"{type(error).__name__}: {str(error).strip().splitlines()[-1] if str(error).strip() else ''}"
        return Row(target, variant.kernel, variant.arguments, faults=(message,))
    seconds = time.perf_counter() - started
    if gpu.backend == "hip":
        registers, stack, accesses = _amd(compiled.asm["amdgcn"])
    else:
        registers, stack, accesses = _nvidia(compiled.asm["cubin"])
    trade_off = TRADE_OFFS.get(variant.kernel)
    faults = [*_stack_faults(stack, trade_off), *_width_faults(variant, accesses, WIDE[gpu.backend])]
    return Row(
        target,
        variant.kernel,
        variant.arguments,
        registers,
        compiled.metadata.shared,
        stack,
        accesses,
        seconds,
        tuple(faults),
        trade_off.reason if trade_off and stack > MOST_STACK else None,
    )


def _stack_faults(stack: int, trade_off: TradeOff | None) -> list[str]:
    most = trade_off.bytes if trade_off else MOST_STACK
    return [f"{stack} bytes of stack, expected at most {most}"] if stack > most else []


def _width_faults(variant: Variant, accesses: Mapping[str, int], wide: int) -> list[str]:
    streams = STREAMING.get(variant.kernel)
    if (
        streams is None
        or not variant.aligned
        or any(variant.constants.get(name) == value for name, value in streams.unless.items())
    ):
        return []
    found: Counter[str] = Counter()
    for name, number in accesses.items():
        kind, width = name.split()
        found[kind] += number if int(width) >= wide else 0
    return [
        f"{found[kind]} {kind}s of {wide} bytes, expected at least {least}"
        for kind, least in (("load", streams.loads), ("store", streams.stores))
        if found[kind] < least
    ]


def _count(found: Iterator[tuple[str, int]]) -> dict[str, int]:
    counts = Counter(f"{kind} {width}" for kind, width in found)
    return dict(sorted(counts.items(), key=lambda entry: (entry[0].split()[0], -int(entry[0].split()[1]))))


def _nvidia(cubin: bytes) -> tuple[int, int, dict[str, int]]:
    """Registers, bytes of stack and accesses, from Triton's copy of cuobjdump."""
    import triton

    tool = triton.knobs.nvidia.cuobjdump.path
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(cubin)

        def dump(option: str) -> str:
            return subprocess.run([tool, option, str(file)], capture_output=True, text=True, check=True).stdout

        usage, code = dump("--dump-resource-usage"), dump("-sass")
    registers, stack = (int(re.search(rf"{name}:(\d+)", usage)[1]) for name in ("REG", "STACK"))  # type: ignore[index]
    return registers, stack, _count(_nvidia_accesses(code))


def _nvidia_accesses(code: str) -> Iterator[tuple[str, int]]:
    """LDG, STG and asynchronous copies of SASS; the width is a suffix, 4 bytes without one."""
    kinds = {"LDG": "load", "STG": "store", "LDGSTS": "load"}
    for name, suffixes in re.findall(r"\b(LDG|STG|LDGSTS)((?:\.\w+)+)", code):
        bits = re.search(r"\.(?:[US])?(8|16|64|128|256)\b", suffixes)
        yield kinds[name], int(bits[1]) // 8 if bits else 4


def _amd(assembly: str) -> tuple[int, int, dict[str, int]]:
    """The same from the assembly of an AMD GPU."""
    registers, spilled, private = (
        max((int(n) for n in re.findall(rf"\.{name}:\s*(\d+)", assembly)), default=0)
        for name in ("vgpr_count", "vgpr_spill_count", "private_segment_fixed_size")
    )
    return registers, max(private, 4 * spilled), _count(_amd_accesses(assembly))


def _amd_accesses(assembly: str) -> Iterator[tuple[str, int]]:
    widths = {"byte": 1, "ubyte": 1, "sbyte": 1, "short": 2, "ushort": 2, "sshort": 2, "dword": 4}
    for kind, what in re.findall(r"\b(?:global|buffer|flat)_(load|store)_([a-z0-9_]+)", assembly):
        words = re.match(r"dwordx(\d+)", what)
        yield kind, 4 * int(words[1]) if words else widths.get(what.split("_")[0], 4)
