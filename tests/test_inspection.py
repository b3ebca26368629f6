"""The inspection of compiled kernels: all of them compile for every target, and it finds what it looks for."""

from __future__ import annotations

import json
import os
import pkgutil
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from fisher_kernels import backends
from fisher_kernels._library import native_module
from fisher_kernels.cli import app
from fisher_kernels.tools import inspection
from fisher_kernels.tools.inspection import cuda, machine_code, rows, triton

ROOT = Path(__file__).parent.parent

if backends.why_no_triton():
    pytest.skip(f"no Triton: {backends.why_no_triton()}", allow_module_level=True)


def compiling(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Python in a process that compiles kernels where this one interprets them."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(ROOT)
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )


def rows_of(result: subprocess.CompletedProcess[str]) -> list[dict[str, Any]]:
    assert result.stdout, result.stderr
    return json.loads(result.stdout)["variants"]


@pytest.mark.slow
def test_one_variant_of_every_kernel_compiles_for_every_target() -> None:
    result = compiling("-m", "fisher_kernels", "inspect", "--sample", "--backend", "triton", "--json")
    found = rows_of(result)
    assert [(row["target"], row["kernel"], row["faults"]) for row in found if row["faults"]] == []
    assert result.returncode == 0
    by_target = {target: {row["kernel"] for row in found if row["target"] == target} for target in inspection.TARGETS}
    assert len({frozenset(kernels) for kernels in by_target.values()}) == 1
    from fisher_kernels import triton_kernels

    stems = {module.name for module in pkgutil.iter_modules(triton_kernels.__path__) if module.name[0] != "_"}
    assert stems == {kernel.split(".")[0] for kernel in by_target["cuda:90"] if kernel[0] != "_"}
    for row in found:
        assert 0 < row["registers"] <= 512, row
        assert row["accesses"], row


# A kernel that reads a stream in narrow pieces, one that keeps arrays in memory, one that does not compile.
FAULTY = """
import dataclasses
import torch
from fisher_kernels.tools import samples
from fisher_kernels.tools.inspection import triton
from fisher_kernels.triton_kernels import _configs, adafisher_step

plain = next(case for case in samples.SAMPLES if case.op == "adafisher_step_" and case.name == "plain")
samples.SAMPLES = [dataclasses.replace(plain, dtypes=(torch.DTYPE,))]
_configs.table()["adafisher_step"] = {"default": {"small": [BLOCK, 4], "large": [BLOCK, 4]}}
for variant in triton.variants("TARGET", "adafisher_step.kernel"):
    if variant.launch.options["STRIDED"] is False:
        row = triton.inspect(variant, "TARGET")
        print(row.faults)
"""


@pytest.mark.parametrize(
    ("target", "dtype", "block", "fault"),
    [
        ("cuda:90", "float32", 128, "loads of 16 bytes, expected at least 3"),
        pytest.param("cuda:90", "float64", 4096, "bytes of stack, expected at most 16", marks=pytest.mark.slow),
        pytest.param("hip:gfx942", "float32", 128, "loads of 8 bytes, expected at least 3", marks=pytest.mark.slow),
    ],
)
def test_faults_are_found(target: str, dtype: str, block: int, fault: str) -> None:
    code = FAULTY.replace("BLOCK", str(block)).replace("TARGET", target).replace("DTYPE", dtype)
    result = compiling("-c", code)
    assert fault in result.stdout, result.stdout + result.stderr


@pytest.mark.slow
def test_a_kernel_that_does_not_compile_is_a_fault() -> None:
    result = compiling("-c", FAULTY.replace("BLOCK", "1000").replace("TARGET", "cuda:90").replace("DTYPE", "float32"))
    assert "CompilationError" in result.stdout, result.stdout + result.stderr


# Steps of lists of several lengths, at several counts and rates; the compilations that each of them asks for.
AGAIN = """
import torch
from fisher_kernels import backends, ops
from fisher_kernels.tools.inspection import triton
from fisher_kernels.triton_kernels import _launch

def compilations(length, count, lr):
    launches = []
    def tensors(*shape):
        return [torch.rand(shape) for _ in range(length)]
    def counts():
        return [torch.tensor(float(count)) for _ in range(length)]
    common = {"weight_decay": 0.1, "decoupled": True, "maximize": False}
    with backends.assumed("triton", "cpu"), _launch.recording(launches.append):
        walked = [tensors(9, 9) for _ in range(3)]
        ops.adafisher_step_(*walked, counts(), tensors(9), tensors(9), lr=lr, beta=0.9, damping=0.1, **common)
        ops.sofim_step_(*walked, counts(), lr=lr, beta=0.9, rho=0.5, direction="momentum", scope="global", **common)
        ops.heavy_ball_(*walked, momentum=0.02 * lr, weight_decay=0.1)
        sums = ops.direction_sums(*walked)
        ops.capped_step_(*walked[:2], sums, [0] * length, lr=lr, kl_clip=0.1, max_relative_step=0.1 * lr + 0.1)
        ops.mbf_step_(*walked, tensors(9, 9, 9), lr=lr, momentum=0.9, kl_clip=0.1, **common)
        ops.factor_ema_(tensors(9), tensors(9), 0.9, 0.1 * lr)
        ops.rank_one_inverse_update_(torch.rand(length, 9, 9), torch.rand(length, 9), 0.9, 0.1 * lr)
        ops.mini_block_gram_(torch.rand(length, 9, 9), torch.rand(32 + length, length, 9), 0.9, 0.1 * lr)
        x, grad = torch.rand(length, 2 + length, 6, 6), torch.rand(length, 5, 4, 4)
        ops.conv_mini_block_gram_(torch.rand(5, 2 + length, 9, 9), x, grad, 3, decay=0.9, gain=0.1 * lr)
    return {triton._source(launch, "cuda:90")[0].hash() for launch in launches}

first = compilations(3, 5, 0.3)
print(len(first) > 8)
for length, count, lr in ((1, 0, 1.0), (2, 1, 2.0), (16, 15, 16.0), (17, 31, 0.0)):
    print(compilations(length, count, lr) == first)
"""


@pytest.mark.slow
def test_nothing_is_compiled_again_as_a_run_goes_on() -> None:
    """Triton makes special cases of 1 and of multiples of 16 unless it is told not to."""
    result = compiling("-c", AGAIN)
    assert result.stdout.split() == ["True"] * 5, result.stdout + result.stderr


SASS = """
        /*0150*/                   LDG.E.128.CONSTANT R4, desc[UR4][R2.64] ;
        /*0160*/                   LDG.E.64 R8, desc[UR4][R2.64+0x10] ;
        /*0170*/                   LDG.E R10, desc[UR4][R2.64+0x18] ;
        /*0180*/                   LDG.E.U16 R10, desc[UR4][R2.64+0x18] ;
        /*0190*/                   LDGSTS.E.BYPASS.128 [R11], desc[UR4][R12.64] ;
        /*01a0*/                   STG.E.128 desc[UR4][R2.64], R4 ;
        /*01b0*/                   LDL.64 R2, [R1] ;
"""
ASSEMBLY = """
        global_load_dwordx4 v[0:3], v[4:5], off
        buffer_load_dwordx2 v[0:1], v4, s[0:3], 0 offen
        global_load_ushort v1, v[2:3], off
        global_store_dword v[2:3], v1, off
        global_store_short v[2:3], v1, off
    .vgpr_count:     40
    .vgpr_spill_count: 3
    .private_segment_fixed_size: 8
"""


def test_widths_are_read_from_machine_code() -> None:
    found = machine_code.count(machine_code.nvidia_accesses(SASS))
    assert found == {"load 16": 2, "load 8": 1, "load 4": 1, "load 2": 1, "store 16": 1}
    assert machine_code.amd(ASSEMBLY) == (
        40, 12, {"load 16": 1, "load 8": 1, "load 2": 1, "store 4": 1, "store 2": 1}
    )  # fmt: skip


def test_a_trade_off_has_a_bound() -> None:
    accepted = rows.TradeOff(64, "a reason")
    assert rows.stack_faults(64, accepted) == ()
    assert rows.stack_faults(72, accepted) == ("72 bytes of stack, expected at most 64",)
    assert rows.stack_faults(16, None) == ()
    assert rows.stack_faults(24, None) == ("24 bytes of stack, expected at most 16",)


def test_exceptions_name_kernels_that_exist_and_are_needed() -> None:
    for part, folder, suffix in ((triton, "triton_kernels", ".py"), (cuda, "csrc/cuda", ".cu")):
        for kernel, trade_off in part.TRADE_OFFS.items():
            assert trade_off.bytes > rows.MOST_STACK, kernel
            assert len(trade_off.reason) > 20
        for kernel in {**part.TRADE_OFFS, **part.STREAMING}:
            stem, function = kernel.split(".")
            assert re.search(rf"\b{function}\(", (ROOT / folder / f"{stem}{suffix}").read_text()), kernel


def cuda_targets() -> list[str]:
    """What the native module was built for."""
    module = native_module()
    toolkit = None if module is None else module.cuda_toolkit()
    return [] if toolkit is None else [f"cuda:{x}" for x in toolkit[0].split(",") if f"cuda:{x}" in inspection.TARGETS]


@pytest.mark.slow
@pytest.mark.parametrize("target", cuda_targets())
def test_every_cuda_kernel_of_the_native_module_is_sound(target: str) -> None:
    found = list(inspection.run([target], backends=["cuda"]))
    assert [(row.kernel, row.arguments, row.faults) for row in found if row.faults] == []
    stems = {row.kernel.split(".")[0] for row in found}
    kernels = {file.stem for file in (ROOT / "csrc" / "cuda").glob("*.cu") if "__global__" in file.read_text()}
    assert kernels <= stems
    assert set(cuda.STREAMING) <= {row.kernel for row in found}
    for row in found:
        assert row.registers is not None
        assert 0 < row.registers <= 255, row


@pytest.mark.skipif(not cuda_targets(), reason="the native module has no CUDA kernels")
def test_a_target_that_the_module_was_not_built_for_is_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "native_module", lambda: Built("75"))
    (row,) = inspection.run([cuda_targets()[0]], backends=["cuda"])
    assert row.faults == ("the native module was built for 75: FISHER_KERNELS_CUDA_ARCHS names others",)


class Built:
    """A module for other GPUs."""

    __file__ = __file__

    def __init__(self, architectures: str) -> None:
        self.architectures = architectures

    def cuda_toolkit(self) -> tuple[str, int, int]:
        return self.architectures, 13000, 0


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="there is no nvcc")
def test_faults_of_cuda_kernels_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "faulty.cu"
    source.write_text("""
        namespace {
        __global__ void narrow(const float* x, float* y) { y[threadIdx.x] = 2 * x[threadIdx.x]; }
        __global__ void stacked(const int* at, float* y) {
          float kept[32] = {};
          for (int i = 0; i < 32; ++i) kept[at[i] & 31] += y[i];
          y[threadIdx.x] = kept[at[threadIdx.x] & 31];
        }
        }
        void* kernels[] = {reinterpret_cast<void*>(narrow), reinterpret_cast<void*>(stacked)};
    """)
    cubin = tmp_path / "faulty.cubin"
    subprocess.run(["nvcc", "-arch=sm_90", "-cubin", "-o", cubin, source], check=True)
    monkeypatch.setattr(cuda, "STREAMING", {"faulty.narrow": rows.Streams(1, 1)})
    found = {row.kernel: row.faults for row in cuda.inspect(cubin, "cuda:90")}
    assert found["faulty.narrow"] == (
        "0 loads of 16 bytes, expected at least 1",
        "0 stores of 16 bytes, expected at least 1",
    )
    assert re.fullmatch(r"\d+ bytes of stack, expected at most 16", "".join(found["faulty.stacked"]))


def test_an_unknown_target_is_wrong_usage(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    result = CliRunner().invoke(app, ["inspect", "--target", "tpu:5"], env={"COLUMNS": "200", "NO_COLOR": "1"})
    assert result.exit_code == 2
    assert "target is 'tpu:5', expected one of 'cuda:80'" in result.stderr


@pytest.mark.skipif(not backends.is_interpreted(), reason="nothing is interpreted")
def test_interpreted_kernels_cannot_be_inspected() -> None:
    arguments = ["inspect", "--backend", "triton"]
    result = CliRunner().invoke(app, arguments, env={"COLUMNS": "200", "NO_COLOR": "1"})
    assert result.exit_code == 1
    assert "kernels of triton cannot be inspected here: TRITON_INTERPRET is set" in result.stderr
