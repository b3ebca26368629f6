"""The trace of the CUDA kernels on the host: it names every seeded fault, and finds none in the project's kernels."""

from __future__ import annotations

import ctypes
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from fisher_kernels.cli import app
from fisher_kernels.tools.inspection import traces
from tests import cuda_builds

ROOT = Path(__file__).parents[1]
lacking = cuda_builds.missing() or ("" if shutil.which("addr2line") else "addr2line")
pytestmark = pytest.mark.skipif(bool(lacking), reason=f"needs {lacking}")

FAULTS = {  # of gpu_trace/faults.cu: what is found, and in which memory
    "barrier": ("race unwritten", "shared"),  # in this order of threads, some read first
    "barrier_after_reading": ("race", "shared"),
    "two_buffers": ("race", "shared"),
    "warp": ("race unwritten", "shared"),
    "shuffle": ("race", "shared"),
    "half_a_warp": ("race", "shared"),
    "half_words": ("race", "shared"),
    "unwritten": ("unwritten", "shared"),
    "wait_for_enough": ("copy under way race", "shared"),
    "barrier_after_the_wait": ("copy under way race", "shared"),
    "refill": ("race", "shared"),
    "within_a_block": ("race", "device"),
    "output_of_another": ("race", "device"),
    "one_place": ("race", "device"),
    "input_of_another": ("race", "device"),
    "count": ("race", "device"),
    "first_fence": ("race", "device"),
    "second_fence": ("race", "device"),
    "fence_of_the_device": ("race", "device"),
    "fence_after_writing": ("race", "device"),
}

Run = Callable[[str, bool], traces.Launch]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("gpu_trace")
    library = ctypes.CDLL(str(cuda_builds.build_traced(folder / "kernels.so", [ROOT / "tests/gpu_trace/faults.cu"])))
    library.last_message.restype = ctypes.c_char_p
    report = folder / "trace"

    settings = {"FISHER_KERNELS_HOST_TRACE": str(report), "FISHER_KERNELS_HOST_TRAFFIC": "1"}

    def launched(kernel: str, fault: bool) -> traces.Launch:
        report.write_text("")
        out, numbers, counter = (torch.zeros(size, dtype=torch.int32) for size in (256, 256, 1))
        places = (ctypes.c_void_p(tensor.data_ptr()) for tensor in (out, numbers, counter))
        with pytest.MonkeyPatch.context() as patch:
            for name, value in settings.items():
                patch.setenv(name, value)  # read at the first launch
            assert getattr(library, kernel)(*places, int(fault)) == 0, library.last_message()
        (launch,) = traces.read(report)
        return launch

    return launched


@pytest.mark.parametrize("kernel", FAULTS)
def test_a_seeded_fault_is_named_and_nothing_else(run: Run, kernel: str) -> None:
    right, wrong = run(kernel, False), run(kernel, True)
    assert (right.kernel, right.arguments) == (f"faults.{kernel}", "false")
    assert traces.summary([right]) == []
    what = " ".join(sorted({finding.what for finding in wrong.findings}))
    assert (what, {finding.memory for finding in wrong.findings}) == (FAULTS[kernel][0], {FAULTS[kernel][1]})
    assert all("faults.cu:" in place for finding in wrong.findings for place in finding.places)


def test_sectors_and_wavefronts_are_counted(run: Run) -> None:
    """Four blocks of two warps: 32 numbers of 4 bytes are four sectors, and at every second place eight."""
    cost = {fault: traces.costs([run("neighbours", fault)]) for fault in (False, True)}
    kernel = "faults.neighbours"
    assert cost[False][kernel, "device reads", ""] == (8, 1024, 32, 32)
    assert cost[True][kernel, "device reads", ""] == (8, 1024, 64, 32)
    assert cost[True][kernel, "device writes", ""] == (8, 1024, 32, 32)
    assert run("neighbours", False).distinct == (8, 32)
    assert run("neighbours", True).distinct == (16, 32)


def test_bank_conflicts_are_counted(run: Run) -> None:
    """A warp of each of four blocks: one wavefront where every word has a bank, eight where eight share one."""
    for fault, wavefronts in ((False, 4), (True, 32)):
        cost = traces.costs([run("pads", fault)])
        for what in ("shared reads", "shared writes"):
            assert cost["faults.pads", what, ""] == (4, 512, wavefronts, 4)
    places = traces.costs([run("pads", True)], by_place=True)
    assert all(place.startswith("faults.cu:") for _, _, place in places)


def test_copies_are_reads_of_one_memory_and_writes_of_the_other(run: Run) -> None:
    """Two copies of a number by each thread of four blocks of two warps."""
    launch = run("wait_for_enough", False)
    copies = [t for t in launch.traffic if t.write == (t.memory == "shared")]
    assert {(t.memory, t.requests, t.bytes) for t in copies} == {("device", 16, 2048), ("shared", 16, 2048)}
    assert [t.units for t in copies if t.memory == "device"] == [64]


@pytest.mark.parametrize("fault", [False, True])
def test_what_is_found_is_shown(run: Run, monkeypatch: pytest.MonkeyPatch, fault: bool) -> None:
    launches = [run("barrier", fault), run("neighbours", False)]
    monkeypatch.setattr(traces, "self_test", lambda: launches)
    shown = CliRunner().invoke(app, ["inspect", "--traffic", "--kernels", "barrier", "--json"])
    assert shown.exit_code == fault
    result = json.loads(shown.stdout)
    assert result["passed"] != fault
    assert {finding.split(":")[0] for finding in result["findings"]} == ({"faults.barrier"} if fault else set())
    assert {row["kernel"] for row in result["traffic"]} == {"faults.barrier"}
    table = CliRunner().invoke(app, ["inspect", "--traffic"]).stdout
    assert "faults.neighbours" in table
    assert ("in no order with" in " ".join(table.split())) == fault


SELF_TEST = """
from functools import partial
import torch
from fisher_kernels import ops, use_backend
from fisher_kernels.tools import selftest
from fisher_kernels.tools.samples import mbf_step
from bench.gpu.probe import wrong_numbers

print([result for result in selftest.run("cuda") if not result.passed])
packed = partial(mbf_step._inputs, (mbf_step.Parameter((513,), (1, 513 * 514 // 2)),), False, {})
of_many = partial(mbf_step._inputs, (mbf_step.Parameter((1025, 257), (1, 1, 257, 257)),), False, {"kl_clip": 1e-3})
with use_backend("cuda"):  # what small inputs do not reach
    assert not any(wrong_numbers().values())
    ops.minmax([torch.randn(30000), torch.randn(9)])
    ops.mini_block_gram_(torch.zeros(2, 9, 9), torch.randn(600, 2, 9))
    ops.rank_one_inverse_update_(torch.eye(200).repeat(2, 1, 1), torch.randn(2, 200))
    x, gradient = torch.randn(2, 3, 40, 40), torch.randn(2, 2, 40, 40)
    ops.conv_mini_block_gram_(torch.zeros(2, 3, 9, 9), x, gradient, 3, padding=1)
    for inputs in (packed, of_many):
        mbf_step.SAMPLES[0].call(inputs(mbf_step.Source(torch.float32, torch.device("cpu"))))
"""


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("fisher_kernels._cuda_on_host_traced") is None, reason="not built")
def test_no_kernel_has_a_race_in_the_self_test(tmp_path: Path) -> None:
    """Every kernel in every dtype of the self-test. A reason for reading what nobody wrote that has gone is stale."""
    report = tmp_path / "trace"
    settings = {
        "FISHER_KERNELS_CUDA_ON_HOST": "traced",
        "FISHER_KERNELS_HOST_TRACE": str(report),
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
    }
    command = [sys.executable, "-c", SELF_TEST]
    result = subprocess.run(command, env={**os.environ, **settings}, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stdout.strip()) == (0, "[]"), result.stderr
    launches = traces.read(report)
    assert traces.summary(launches) == []
    assert {launch.kernel for launch in launches if launch.findings} == set(traces.UNWRITTEN)
    assert {launch.kernel.partition(".")[2] for launch in launches} == kernels()


def kernels() -> set[str]:
    """Those of the sources."""
    files = (ROOT / "csrc/cuda").glob("*.cu*")
    pattern = re.compile(r"__global__\s+void\s+(?:__launch_bounds__\((?:[^()]|\([^()]*\))*\)\s*)?(\w+)\s*\(")
    return {name for file in files for name in pattern.findall(file.read_text())}
