"""Build, prove and measure on a GPU, within ten minutes: what ``make gpu`` runs. Nothing is installed or fetched."""

from __future__ import annotations

import argparse
import importlib.util
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
WHOLE = 570.0
"""Seconds that everything together may take."""
SOFT = 0.85
CHOSEN = "(gpu or round_trip or triton or cuda) and not does_not_grow_with_the_batch"
"""Of the tests: all that go to the GPU, but for one that measures the memory of a host process."""
NEEDED = {"torch": "PyTorch 2.11 or newer with CUDA", "numpy": "numpy", "triton": "Triton 3.6 or newer"}
WANTED = {
    "pytest": "the GPU tests are left out",
    "rich": "tables are plain lines",
    "typer": "the table in docs/performance.md is not renewed",
    "hypothesis": "tests with generated examples are skipped",
    "pybind11": "the native module is not built, and with it neither the CPU's kernels nor those in CUDA",
    "setuptools": "the native module is not built, and with it neither the CPU's kernels nor those in CUDA",
}


class Step(NamedTuple):
    """One command, and how many seconds it may take at most.

    ``{soft}`` in its arguments stands for the seconds after which it should begin nothing new.
    """

    name: str
    command: Sequence[str]
    seconds: float
    required: bool = True
    """Whether its failure is one of the whole."""
    otherwise: Mapping[str, str] = {}
    """What the environment of later steps says where it fails."""


def _has(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def why_not() -> str | None:
    """Why nothing can be done here; None if it can."""
    for module, what in NEEDED.items():
        if not _has(module):
            return f"{what} is missing in {sys.executable}; name another interpreter with PYTHON="
    import torch

    if not torch.cuda.is_available():
        return (
            f"there is no GPU for torch {torch.__version__} in {sys.executable}: torch.cuda.is_available() is False; "
            "it takes a CUDA GPU, its driver and a PyTorch that was built for it"
        )
    return None


def capability() -> str:
    """Of the GPU, as the build counts it."""
    import torch

    return "".join(map(str, torch.cuda.get_device_capability()))


def tests() -> list[str]:
    """The files of tests that have something to show on a GPU, what only a GPU can show first."""
    stems = sorted(file.stem for file in (ROOT / "fisher_kernels" / "ops").glob("[a-z]*.py"))
    names = ["gpu", "round_trip", "cuda", "ops", *stems, "conv_mini_block_gram"]
    return [f"tests/test_{name}.py" for name in names if (ROOT / "tests" / f"test_{name}.py").exists()]


def steps(left: float) -> list[Step]:
    """What there is to do in so many seconds."""
    python = sys.executable
    testing = [
        *(python, "-m", "pytest", "-q", "--all", "-p", "no:cacheprovider", "-W", "default", "-k", CHOSEN),
        "--seconds={soft}",
        *tests(),
    ]
    build = Step("build", (python, "setup.py", "--quiet", "build_ext", "--inplace"), 0.12 * left, required=False)
    probe = Step("probe", (python, "-m", "bench.gpu.probe"), 60, otherwise={"FISHER_KERNELS_TENSOR_CORES": "0"})
    return [
        *([build] if _has("setuptools") else []),
        probe,
        Step("self-test", (python, "-m", "bench.gpu.selftest", "--compile"), 0.22 * left),
        *([Step("tests", testing, 0.33 * left)] if _has("pytest") else []),
        Step("benchmarks", (python, "-m", "bench.gpu.measure", "--seconds={soft}"), 0.5 * left),
        *([Step("documents", (python, "-m", "bench.tables"), 30, required=False)] if _has("typer") else []),
    ]


def run(todo: Sequence[Step], deadline: float, now: Callable[[], float] = time.monotonic) -> dict[str, str]:
    """Run all steps one after the other, also after one has failed; returns the outcome of each."""
    outcomes = {}
    for step in todo:
        seconds = min(step.seconds, deadline - now())
        if seconds <= 0:
            outcomes[step.name] = "left out: the time was over"
            continue
        command = [part.replace("{soft}", f"{SOFT * seconds:.0f}") for part in step.command]
        print(f"\n== {step.name}: {' '.join(command)}", flush=True)
        began = now()
        try:
            status = subprocess.run(command, cwd=ROOT, timeout=seconds, check=False).returncode
        except subprocess.TimeoutExpired:
            outcomes[step.name] = f"stopped after {seconds:.0f} s"
            status = 1
        else:
            outcomes[step.name] = f"{'done' if status == 0 else f'failed ({status})'} in {now() - began:.0f} s"
        if status != 0:
            os.environ.update(step.otherwise)
    return outcomes


def main() -> int:
    """The command: 1 if a required step failed, 2 if there is no GPU."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__)
    parser.add_argument("--seconds", type=float, default=WHOLE, help="for everything (default: %(default)g)")
    options = parser.parse_args()
    reason = why_not()
    if reason is not None:
        print(f"make gpu: {reason}", file=sys.stderr)
        return 2
    for module, what in WANTED.items():
        if not _has(module):
            print(f"{module} is missing: {what}")
    os.environ.pop("TRITON_INTERPRET", None)
    os.environ.pop("FISHER_KERNELS_CUDA_ON_HOST", None)
    os.environ.setdefault("FISHER_KERNELS_CUDA_ARCHS", capability())  # for time
    deadline = time.monotonic() + options.seconds
    todo = steps(options.seconds)
    outcomes = run(todo, deadline)
    print()
    for name, outcome in outcomes.items():
        print(f"{name}: {outcome}")
    return int(any(not outcomes[step.name].startswith("done") for step in todo if step.required))


if __name__ == "__main__":
    sys.exit(main())
