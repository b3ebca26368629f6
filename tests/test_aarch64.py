"""The portable CPU kernels on Linux aarch64: cross-compiled, and run in an emulator where there is one."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from tests.cmake_builds import ROOT, build, needs_cmake

COMPILER = "aarch64-linux-gnu-g++"
EMULATORS = ("qemu-aarch64-static", "qemu-aarch64")


@pytest.mark.slow
@needs_cmake
@pytest.mark.skipif(shutil.which(COMPILER) is None, reason=f"there is no {COMPILER}")
def test_kernels_for_aarch64_compile_and_agree_with_their_definitions(tmp_path: Path) -> None:
    folder = ROOT / "build" / "aarch64"
    configured = build(folder, "cpu_baseline", "CPU=all", CXX=COMPILER)
    assert "CPU kernels: baseline (FISHER_KERNELS_CPU=all)" in configured.stdout  # none of x86-64's
    objects = sorted(folder.glob("CMakeFiles/cpu_baseline.dir/csrc/cpu/*.o"))
    kernels = sorted((ROOT / "csrc" / "cpu").glob("*.cpp"))
    assert [file.stem for file in objects] == [file.name for file in kernels]

    program = tmp_path / "smoke"
    options = ("-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", "-fopenmp", "-static")
    command = [COMPILER, *options, "-I", ROOT / "csrc", ROOT / "tests" / "aarch64" / "smoke.cpp", *objects]
    subprocess.run([*command, "-o", program], check=True)
    emulator = next(filter(shutil.which, EMULATORS), None)
    if emulator is None:
        pytest.skip(f"compiled and linked, but not run: there is no {EMULATORS[0]}")
    result = subprocess.run([emulator, program], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.startswith("0 of ")
