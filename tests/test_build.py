"""What a build compiles: instruction sets, CUDA architectures, modules for tests; and what a module says it lacks here.

No kernel is compiled: CMake configures, or runs a part of it as a script, beside stand-ins for a GPU's driver, nvcc and
what else is installed elsewhere.
"""

from __future__ import annotations

import importlib.machinery
import os
import re
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from fisher_kernels import _library
from fisher_kernels._library import native_module
from tests.cmake_builds import PATH, ROOT, configure, needs_cmake, run


def script(file: Path, part: str, *defines: str, **variables: str) -> list[str]:
    """Run a part of the build description as a script; the values that it leaves in two variables, or the error."""
    name, *shown = part.split()
    values = " | ".join(f"${{{variable}}}" for variable in shown)
    file.write_text(f"""
        cmake_minimum_required(VERSION 3.20)
        include({ROOT}/cmake/{name}.cmake)
        message(STATUS "{values}")
    """)
    found = run(["cmake", *(f"-D{each}" for each in defines), "-P", str(file)], **variables)
    if found.returncode:
        return [found.stderr, ""]
    return [value.strip() for value in found.stdout.removeprefix("--").split("|")]


def choose_cuda(folder: Path, *options: str, **variables: str) -> list[str]:
    """Why a build has no CUDA kernels, and else the architectures that CMake gets; the folder has the driver."""
    settings = [f"FISHER_KERNELS_{option}" for option in ("CUDA=auto", *options)]
    variables = {"LD_LIBRARY_PATH": str(folder), **variables}
    part = "cuda why_no_cuda CMAKE_CUDA_ARCHITECTURES"
    return script(folder / "script.cmake", part, f"Python_EXECUTABLE={sys.executable}", *settings, **variables)


def driver(folder: Path, *capabilities: int, error: int = 0) -> None:
    """A CUDA driver with GPUs of these compute capabilities, or one that does not start."""
    listed = ", ".join(map(str, capabilities)) or "0"
    source = folder / "driver.c"
    source.write_text(f"""
        #include <stdlib.h>
        static const int capabilities[] = {{{listed}}};
        int cuInit(unsigned flags) {{ return {error}; }}
        int cuDeviceGetCount(int* count) {{
          *count = getenv("CUDA_VISIBLE_DEVICES") ? 0 : {len(capabilities)};
          return 0;
        }}
        int cuDeviceGet(int* device, int index) {{ *device = index; return 0; }}
        int cuDeviceGetAttribute(int* value, int attribute, int device) {{
          *value = attribute == 75 ? capabilities[device] / 10 : attribute == 76 ? capabilities[device] % 10 : -1;
          return 0;
        }}
    """)
    subprocess.run(["c++", "-x", "c", "-shared", "-fPIC", source, "-o", folder / "libcuda.so.1"], check=True)


def tools_without(folder: Path, *left_out: str) -> str:
    """A PATH that has what a build needs but for some tools."""
    folder.mkdir()
    for tool in {"cmake", "ninja", "c++", "g++", "cc", "ld", "as", "ar", "ranlib", "uname", "sh"} - set(left_out):
        if found := shutil.which(tool, path=PATH):
            (folder / tool).symlink_to(found)
    return str(folder)


@pytest.mark.slow
@needs_cmake
@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("CPU=avx3", "FISHER_KERNELS_CPU is 'avx3', expected 'native', 'all' or a list of: baseline"),
        ("CUDA_ON_HOST=1", "FISHER_KERNELS_CUDA_ON_HOST is '1', expected 'OFF', 'ON', 'sanitized', 'traced' or 'all'"),
    ],
)
def test_options_are_checked(tmp_path: Path, option: str, message: str) -> None:
    found = configure(tmp_path / "build", option)
    assert found.returncode != 0
    assert message in found.stderr


def test_the_setting_of_before_names_the_one_of_now() -> None:
    commands = [[sys.executable, "setup.py", "--version"], *([["make", "-n", "demo"]] if shutil.which("make") else [])]
    for command in commands:
        found = run(command, FISHER_KERNELS_PORTABLE="ON")
        assert found.returncode != 0, command
        assert "FISHER_KERNELS_CPU=baseline says the same" in found.stderr


# Instruction sets.


@needs_cmake
@pytest.mark.skipif(native_module() is None, reason="there is no native module")
def test_a_build_is_for_this_processor_unless_told_otherwise(tmp_path: Path) -> None:
    native = native_module()
    assert native is not None
    here = native.processor_capabilities()
    best = ["baseline", *here[1:][-1:]]
    folder = tmp_path / "build"
    assert f"CPU kernels: {', '.join(best)} (FISHER_KERNELS_CPU=native)" in configure(folder).stdout
    if len(here) == 1:
        return
    for choice, built in (
        ("all", "baseline, avx2, avx512"),
        ("baseline", "baseline"),
        ("avx512", "baseline, avx512"),
        ("avx512,avx2,baseline", "baseline, avx2, avx512"),
    ):
        assert f"CPU kernels: {built} (" in configure(folder, f"CPU={choice}").stdout
        targets = set(re.findall(r"cpu_(\w+)\.dir", (folder / "build.ninja").read_text()))
        assert targets == set(built.split(", "))


def test_where_all_instruction_sets_are_asked_for_they_are_there() -> None:
    native = native_module()
    if os.environ.get("FISHER_KERNELS_CPU") != "all" or native is None:
        pytest.skip("nobody asks for them")
    assert native.built_capabilities() == ["baseline", "avx2", "avx512"]


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("c++") is None, reason="there is no compiler")
def test_a_processor_runs_what_was_built_and_it_can_run(tmp_path: Path) -> None:
    (tmp_path / "main.cpp").write_text("""
        #include <cstdio>
        #include "common/processor.h"
        int main(int count, char** names) {
          const std::vector<std::string> here(names + 1, names + count);
          for (const auto& name : fisher_kernels::usable_capabilities(fisher_kernels::built_capabilities(), here)) {
            std::printf("%s ", name.c_str());
          }
        }
    """)
    avx2, avx512 = "-DFISHER_KERNELS_HAS_AVX2", "-DFISHER_KERNELS_HAS_AVX512"
    plain, old, new = ("baseline",), ("baseline", "avx2"), ("baseline", "avx2", "avx512")
    for built, runs in (
        ((), (plain, plain, plain)),
        ((avx2,), (plain, old, old)),
        ((avx512,), (plain, plain, ("baseline", "avx512"))),
        ((avx2, avx512), (plain, old, new)),
    ):
        program = tmp_path / "program"
        command = ["c++", "-std=c++17", "-I", ROOT / "csrc", *built, tmp_path / "main.cpp", "-o", program]
        subprocess.run(command, check=True)
        for here, expected in zip((plain, old, new), runs, strict=True):
            found = subprocess.run([program, *here], capture_output=True, text=True, check=True).stdout.split()
            assert found == list(expected), (built, here)


class Module:
    """A native module of another build, on another processor."""

    def __init__(self, built: str, here: str, native: bool) -> None:
        self.built, self.here, self.native = built.split(), here.split(), native

    def built_capabilities(self) -> list[str]:
        return self.built

    def processor_capabilities(self) -> list[str]:
        return self.here

    def capabilities(self) -> list[str]:
        return [name for name in self.built if name in self.here]

    def is_for_processor_of_build(self) -> bool:
        return self.native


@pytest.mark.parametrize(
    ("built", "here", "runs"),
    [
        ("baseline", "baseline", None),
        ("baseline avx2", "baseline avx2", None),
        ("baseline avx2 avx512", "baseline", None),
        ("baseline avx512", "baseline avx2", "baseline"),
        ("baseline avx2", "baseline avx2 avx512", "avx2"),
    ],
)
@pytest.mark.parametrize("native", [True, False])
def test_what_was_not_compiled_for_this_processor_is_told(
    monkeypatch: pytest.MonkeyPatch, built: str, here: str, runs: str | None, native: bool
) -> None:
    module = Module(built, here, native)
    note = _library.unused_capability(module)  # type: ignore[arg-type]
    monkeypatch.setattr(_library, "_NATIVE", module)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        _library._warn_of_another_processor()
    assert len(caught) == (native and runs is not None)
    if runs is None:
        assert note is None
        return
    assert f"compiled for {' and '.join(built.split())}, and this processor has {here.split()[-1]}" in str(note)
    assert f"they run as {runs}" in str(note)
    assert "FISHER_KERNELS_CPU=all" in str(note)


# CUDA.


@pytest.fixture
def machine(tmp_path: Path) -> Path:
    """A folder with an nvcc that knows GPUs up to 120; where the driver and the tools of a machine may be put."""
    path = tools_without(tmp_path / "tools")
    nvcc = Path(path, "nvcc")
    nvcc.write_text("#!/bin/sh\nprintf 'compute_%s\\n' 75 80 86 90 100 120\n")
    nvcc.chmod(0o755)
    return tmp_path


@needs_cmake
@pytest.mark.parametrize(
    ("gpus", "why", "architectures"),
    [
        ((90,), "", "90-real;90-virtual"),
        ((120, 86, 86), "", "86-real;120-real;120-virtual"),
        ((75, 80), "", "80-real;80-virtual"),
        ((110,), "", "100-real;100-virtual"),  # newer than this nvcc: what comes before it
        ((130, 121), "", "120-real;120-virtual"),
        ((75,), "no GPU of compute capability 80 or newer was there at build time, only 75", ""),
        ((), "there was no NVIDIA GPU at build time", ""),
    ],
)
def test_cuda_is_compiled_for_the_gpus_of_this_machine(
    machine: Path, gpus: tuple[int, ...], why: str, architectures: str
) -> None:
    driver(machine, *gpus)
    # Hidden GPUs count: whoever builds need not be who runs.
    found = choose_cuda(machine, PATH=str(machine / "tools"), CUDA_VISIBLE_DEVICES="")
    assert found == [why, architectures]


@needs_cmake
def test_a_driver_that_fails_is_told(machine: Path) -> None:
    driver(machine, error=803)
    why = "there was no NVIDIA GPU at build time, or none that works: cuInit fails with error 803"
    assert choose_cuda(machine) == [why, ""]


@needs_cmake
@pytest.mark.parametrize(
    ("options", "why", "architectures"),
    [
        (("CUDA=on",), "", "80-real;90-real;100-real;100-virtual"),
        (("CUDA=on", "CUDA_ARCHS=90"), "", "90-real;90-virtual"),
        (("CUDA_ARCHS=90,80",), "", "80-real;90-real;90-virtual"),
        (("CUDA=off", "CUDA_ARCHS=90"), "FISHER_KERNELS_CUDA was off", ""),
        (("CUDA=maybe",), "FISHER_KERNELS_CUDA is 'maybe', expected 'auto', 'on' or 'off'", ""),
        (("CUDA_ARCHS=80,hopper",), "FISHER_KERNELS_CUDA_ARCHS is '80,hopper', expected compute capabilities", ""),
    ],
)
def test_cuda_is_compiled_where_it_is_asked_for(
    machine: Path, options: tuple[str, ...], why: str, architectures: str
) -> None:
    driver(machine, error=100)
    found = choose_cuda(machine, *options, PATH=str(machine / "tools"))
    assert why in found[0]
    assert found[1] == architectures


@needs_cmake
@pytest.mark.parametrize(
    ("version", "is_old"), [("11.8", True), ("12.0", True), ("12.1", False), ("12.10", False), ("13.0", False)]
)
def test_an_nvcc_whose_kernels_take_fewer_parameters_is_not_used(machine: Path, version: str, is_old: bool) -> None:
    driver(machine, 90)
    path = str(machine / "tools")
    nvcc = Path(path, "nvcc")
    said = f"echo 'Cuda compilation tools, release {version}, V{version}.1'"
    nvcc.write_text(f"#!/bin/sh\ncase $1 in --list-gpu-arch) echo compute_90;; *) {said};; esac\n")
    why, architectures = choose_cuda(machine, PATH=path, CUDA_HOME="", CUDACXX="")
    message = f"nvcc ({nvcc}) is that of CUDA {version}, expected 12.1 or newer"
    assert (message in why, architectures) == ((True, "") if is_old else (False, "90-real;90-virtual"))
    # One that CUDACXX names, with a flag.
    Path(path, "nvcc").rename(machine / "other")
    why = choose_cuda(machine, PATH=path, CUDA_HOME="", CUDACXX=f"{machine}/other -O1")[0]
    assert (f"is that of CUDA {version}" in why) == is_old
    asked = choose_cuda(machine, "CUDA=on", PATH=path, CUDA_HOME="", CUDACXX=f"{machine}/other")[0]
    assert ("FISHER_KERNELS_CUDA is 'on', but nvcc" in asked) == is_old


@needs_cmake
@pytest.mark.slow
def test_without_nvcc_a_gpu_is_left_out_and_asking_for_it_is_an_error(tmp_path: Path) -> None:
    driver(tmp_path, 90)
    path = tools_without(tmp_path / "tools")
    variables = {"PATH": path, "CUDA_HOME": "/nonexistent/cuda", "CUDACXX": "", "CUDA_PATH": ""}
    found = configure(tmp_path / "on", "CUDA=on", **variables)
    assert found.returncode != 0
    assert "FISHER_KERNELS_CUDA is 'on', but no nvcc that works was found: looked at CUDACXX ('')" in found.stderr
    assert f"CUDA_HOME ('/nonexistent/cuda') and PATH ('{path}')" in found.stderr
    variables["LD_LIBRARY_PATH"] = str(tmp_path)
    found = configure(tmp_path / "auto", **variables)
    assert found.returncode == 0, found.stderr
    assert "No CUDA kernels: no nvcc that works was in CUDACXX, CUDA_HOME or PATH at build time" in found.stdout
    assert "which GPUs of compute capability 90 need" in found.stdout


@needs_cmake
@pytest.mark.slow
def test_the_kernels_on_the_host_need_headers_alone(tmp_path: Path) -> None:
    (tmp_path / "include").mkdir()
    (tmp_path / "include" / "cuda_bf16.h").touch()
    variables = {"CUDA_HOME": str(tmp_path)}
    for choice, modules in (
        ("OFF", set()),
        ("ON", {""}),
        ("sanitized", {"", "_sanitized"}),
        ("all", {"", "_sanitized", "_traced"}),
    ):
        found = configure(tmp_path / "build", "CUDA=off", f"CUDA_ON_HOST={choice}", **variables)
        assert found.returncode == 0, found.stderr
        build = (tmp_path / "build" / "build.ninja").read_text()
        assert set(re.findall(r"CMakeFiles/_cuda_on_host(\w*)\.dir", build)) == modules
        assert (f"-isystem {tmp_path}/include" in build) == bool(modules)


@pytest.mark.slow
def test_a_module_for_tests_that_is_older_than_the_build_is_removed(tmp_path: Path) -> None:
    code = f"""
import runpy, sys
from pathlib import Path
sys.argv = ["setup.py", "--version"]
copy = runpy.run_path("setup.py")["copy_modules_for_tests"]
copy.__globals__["ROOT"] = Path({str(tmp_path)!r})
copy(Path({str(tmp_path)!r}))
"""
    suffix = importlib.machinery.EXTENSION_SUFFIXES[0]
    plain, sanitized = f"_cuda_on_host{suffix}", f"_cuda_on_host_sanitized{suffix}"
    package = tmp_path / "fisher_kernels"
    package.mkdir()
    (tmp_path / plain).write_text("new")
    traced = f"_cuda_on_host_traced{suffix}"
    (tmp_path / sanitized).write_text("new")
    (tmp_path / traced).write_text("new")
    for choice, expected in (
        ("", {plain: "old", sanitized: "old", traced: "old"}),
        ("ON", {plain: "new"}),
        ("sanitized", {plain: "new", sanitized: "new"}),
        ("all", {plain: "new", sanitized: "new", traced: "new"}),
    ):
        for name in (plain, sanitized, traced):
            (package / name).write_text("old")
        found = run([sys.executable, "-c", code], FISHER_KERNELS_CUDA_ON_HOST=choice)
        assert found.returncode == 0, found.stderr
        assert {file.name: file.read_text() for file in package.iterdir()} == expected


# Compiler caches.


@needs_cmake
@pytest.mark.parametrize("cache", ["ccache", "sccache", None])
def test_a_compiler_cache_is_used_where_there_is_one(tmp_path: Path, cache: str | None) -> None:
    path = tools_without(tmp_path / "tools")
    if cache:
        Path(path, cache).write_text("#!/bin/sh\n")
        Path(path, cache).chmod(0o755)

    def launchers(*defines: str) -> list[str]:
        part = "compiler_cache CMAKE_CXX_COMPILER_LAUNCHER CMAKE_CUDA_COMPILER_LAUNCHER"
        return script(tmp_path / "script.cmake", part, "CMAKE_CXX_COMPILER=/usr/bin/c++", *defines, PATH=path)

    both = launchers()
    assert both[0] == both[1]
    assert both[0].split(";")[-1] == (f"{path}/{cache}" if cache else "")
    assert ("CCACHE_BASEDIR=" in both[0]) == (cache == "ccache")
    if cache is None:
        return
    # What was named comes first, and a compiler that is a cache itself needs no other.
    assert launchers("CMAKE_CXX_COMPILER_LAUNCHER=") == ["", both[1]]
    assert launchers("CMAKE_CUDA_COMPILER_LAUNCHER=other") == [both[0], "other"]
    Path(path, "masked").symlink_to(f"{path}/{cache}")
    assert launchers(f"CMAKE_CXX_COMPILER={path}/masked") == ["", ""]


# What make does.


@pytest.mark.skipif(shutil.which("make") is None, reason="there is no make")
@pytest.mark.parametrize(
    ("target", "wanted", "unwanted"),
    [
        (
            "demo",
            ("requirements.py demo", "compare autoencoder"),
            ("requirements.py dev", "CUDA_ON_HOST", "--all", "_CPU="),
        ),
        ("build", ("requirements.py dev", "--no-deps --editable"), ("CUDA_ON_HOST", "_CPU=")),
        ("test", ("requirements.py test", "FISHER_KERNELS_CUDA_ON_HOST=ON"), ("=all", "--all")),
        ("test-all", ("requirements.py dev", "FISHER_KERNELS_CUDA_ON_HOST=all", "pytest", "--all"), ()),
        ("dist", ("FISHER_KERNELS_CPU=all FISHER_KERNELS_CUDA=on", "FISHER_KERNELS_CUDA_ARCHS=80,90,100"), ()),
        ("inspect", ("FISHER_KERNELS_CPU=all FISHER_KERNELS_CUDA=on", "FISHER_KERNELS_CUDA_ARCHS=80,90,100"), ()),
    ],
)
def test_targets_build_what_they_need(target: str, wanted: tuple[str, ...], unwanted: tuple[str, ...]) -> None:
    found = run(["make", "-n", target, "PYTHON=/nonexistent/python"])
    assert found.returncode == 0, found.stderr
    for part in wanted:
        assert part in found.stdout, part
    for part in unwanted:
        assert part not in found.stdout, part
