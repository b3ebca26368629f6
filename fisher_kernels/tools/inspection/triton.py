"""Every Triton kernel compiled for GPUs that need not be there.

The launches of the self-test are recorded instead of made, so what is inspected is what runs: the same types,
alignments and compile-time arguments, in every configuration that the table lists for a target.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import pkgutil
import re
import signal
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from fisher_kernels import backends
from fisher_kernels.tools import samples
from fisher_kernels.tools.inspection import machine_code
from fisher_kernels.tools.inspection.rows import MOST_STACK, Row, Streams, TradeOff, stack_faults, width_faults

STREAMING: Mapping[str, Streams] = {
    "adafisher_step.kernel": Streams(3, 2, "STRIDED=True"),
    "sofim_step.advance_kernel": Streams(2, 1, "STRIDED=True"),
    "sofim_step.descend_kernel": Streams(2, 1, "STRIDED=True"),
    "capped_step.heavy_ball_kernel": Streams(2, 1, "STRIDED=True"),
    "capped_step.sums_kernel": Streams(2, 0, "STRIDED=True"),
    "capped_step.descend_kernel": Streams(2, 1, "STRIDED=True"),
    "rank_one_solve.subtract_kernel": Streams(2, 1),
    "stochastic_round.kernel": Streams(1, 0),
    "sum_of_squares._sum_columns": Streams(1, 0),
    "sum_of_squares._sum_runs": Streams(1, 0),
    "mbf_step.diagonals": Streams(4, 2),
    "mbf_step.descend": Streams(2, 1, "FLAT=False"),
}


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
    aligned: bool  # whether all tensors are known to begin at 16 bytes


def why_not() -> str | None:
    """Why nothing can be inspected here, or None."""
    if backends.is_interpreted():
        return "TRITON_INTERPRET is set: kernels are interpreted in this process, not compiled"
    return backends.why_no_triton()


def names() -> set[str]:
    """Those of all functions that Triton compiles, the ones that kernels call among them."""
    from triton.runtime.jit import KernelInterface

    from fisher_kernels import triton_kernels

    found = set()
    for module in pkgutil.iter_modules(triton_kernels.__path__, f"{triton_kernels.__name__}."):
        for name, value in vars(importlib.import_module(module.name)).items():
            function = getattr(value, "fn", None)
            if isinstance(value, KernelInterface) and getattr(function, "__module__", None) == module.name:
                found.add(f"{module.name.rpartition('.')[2]}.{name}")
    return found


def run(targets: Sequence[str], pattern: str, sample: bool) -> Iterator[Row]:
    """Compile and inspect, several kernels at a time."""
    work = [(target, pattern, sample, i) for target in targets for i in range(len(variants(target, pattern, sample)))]
    # Processes of their own: Triton's compiler uses one core, and a process that has compiled can crash.
    workers = min(len(work), len(os.sched_getaffinity(0))) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    if work:
        with ProcessPoolExecutor(workers, get_context("spawn"), signal.signal, (signal.SIGINT, signal.SIG_IGN)) as pool:
            yield from pool.map(_inspect_one, work, chunksize=4)


# What is launched.

_variants: dict[tuple[str, str, bool], list[Variant]] = {}


def variants(target: str, pattern: str = "", sample: bool = False) -> list[Variant]:
    """What the samples launch in the configurations of a target, each compilation once."""
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
    """Every launch of the samples, as often as the configurations of the target ask."""
    from fisher_kernels.triton_kernels import _configs, _launch

    launches: list[Any] = []
    listed = {kernel: sorted(_configs.listed(kernel, target)) for kernel in _configs.table()}
    rounds = max(map(len, listed.values()), default=1)
    with backends.assumed("triton", "cpu"), _launch.recording(launches.append):
        for i in range(rounds):
            with contextlib.ExitStack() as stack:
                for kernel, configs in listed.items():
                    stack.enter_context(_configs.forced(kernel, configs[i % len(configs)]))
                for call in samples.SAMPLES:
                    for dtype in call.dtypes:
                        call.call(call.inputs(samples.Source(dtype)))
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
        return Row("triton", target, variant.kernel, variant.arguments, faults=(message,))
    seconds = time.perf_counter() - started
    if gpu.backend == "hip":
        usage = machine_code.amd(compiled.asm["amdgcn"])
    else:
        usage = _nvidia(compiled.asm["cubin"], target.split(":")[1])
    trade_off = TRADE_OFFS.get(variant.kernel)
    streams = STREAMING.get(variant.kernel) if variant.aligned else None
    return Row(
        "triton",
        target,
        variant.kernel,
        variant.arguments,
        usage.registers,
        compiled.metadata.shared,
        usage.stack,
        usage.accesses,
        seconds,
        stack_faults(usage.stack, trade_off) + width_faults(streams, target, variant.arguments, usage.accesses),
        trade_off.reason if trade_off and usage.stack > MOST_STACK else None,
    )


def _nvidia(cubin: bytes, architecture: str) -> machine_code.Usage:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(cubin)
        (usage,) = machine_code.nvidia(file, architecture).values()
    return usage
