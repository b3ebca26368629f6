"""The self-test by its Python interface, for environments without the command line's packages: one line an op.

``--compile`` first compiles the kernels in several processes, which fills Triton's cache.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys

import torch

from fisher_kernels import backends
from fisher_kernels.tools import selftest
from fisher_kernels.tools.samples import SAMPLES
from tests.checkout import nest_triton_kernels

MOST_PROCESSES = 12


def launch(which: int, processes: int) -> None:
    """Run one of the cases on Triton, to compile its kernels; its result is judged elsewhere."""
    nest_triton_kernels()
    device = torch.device(backends.device_type("triton"))
    jobs = [(case, dtype) for case in SAMPLES for dtype in case.dtypes]
    for case, dtype in jobs[which::processes]:
        selftest.check(case, dtype, "triton", device)


def compile_all() -> None:
    """Compile what the self-test launches, a case at a time on each processor core."""
    processes = min(os.cpu_count() or 1, MOST_PROCESSES)
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=launch, args=(i, processes)) for i in range(processes)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()


def main() -> int:
    """The command: 1 on any failure, 2 if the backend is not there."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu.selftest", description=__doc__)
    parser.add_argument("--compile", action="store_true", help="first compile the kernels in several processes")
    parser.add_argument("--backend", choices=backends.NAMES, help="one backend only (default: all that are available)")
    options = parser.parse_args()
    nest_triton_kernels()
    if options.backend is not None and (reason := backends.reasons()[options.backend]) is not None:
        print(f"not tested: {options.backend}: {reason}", file=sys.stderr)
        return 2
    if options.compile and backends.reasons()["triton"] is None:
        compile_all()
    groups: dict[tuple[str, str, str], list[selftest.Result]] = {}
    for result in selftest.run(options.backend):
        groups.setdefault((result.op, result.backend, result.device), []).append(result)
        if not result.passed:
            print(f"failed: {result.op}, {result.case}, {result.dtype} on {result.backend}: {result.message}")
    for (op, backend, device), results in sorted(groups.items()):
        worst = max((r.worst for r in results if r.worst is not None), default=0.0)
        passed = sum(r.passed for r in results)
        print(f"{op} on {backend} ({device}): {passed} of {len(results)} passed, largest error {worst:.2f}")
    for name, reason in backends.reasons().items():
        if reason is not None and options.backend is None:
            print(f"not tested: {name}: {reason}")
    return int(any(not r.passed for results in groups.values() for r in results))


if __name__ == "__main__":
    sys.exit(main())
