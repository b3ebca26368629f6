"""Every CPython at hand compiles the sources; the oldest and the newest of them load the native module."""

from __future__ import annotations

import subprocess
import sys
from types import ModuleType

import pytest

from tests.checkout import load_script
from tests.cmake_builds import ROOT, build, needs_cmake

FOLDERS = ("fisher_kernels", "triton_kernels", "tests", "bench", "cmake", "docs")

# Warnings of the compiler, of an escape that means nothing, say, are errors. Nothing is written.
COMPILE = """
import sys, warnings
warnings.simplefilter("error")
for name in sys.stdin.read().splitlines():
    with open(name, "rb") as file:
        compile(file.read(), name, "exec", dont_inherit=True)
"""


@pytest.fixture(scope="module")
def wheels() -> ModuleType:
    """The script behind `make wheels`, which knows how to find interpreters."""
    return load_script("cmake/wheels.py")


@pytest.mark.slow
def test_every_python_compiles_the_sources(wheels: ModuleType) -> None:
    sources = [ROOT / "setup.py", *(file for folder in FOLDERS for file in (ROOT / folder).rglob("*.py"))]
    found = wheels.interpreters()
    assert found
    for tag, python in found.items():
        names = "\n".join(map(str, sources))
        result = subprocess.run([python, "-I", "-c", COMPILE], input=names, capture_output=True, text=True, check=False)
        assert result.returncode == 0, f"CPython {tag}: {result.stderr}"


@pytest.mark.slow
@needs_cmake
@pytest.mark.parametrize("which", ["oldest", "newest"])
def test_the_oldest_and_the_newest_python_load_the_native_module(wheels: ModuleType, which: str) -> None:
    """Compiled in haste, without optimization: what another Python changes is what reads its arguments."""
    pybind11 = pytest.importorskip("pybind11")
    found = wheels.interpreters()
    tag = list(found)[0 if which == "oldest" else -1]
    if tag == f"{sys.version_info[0]}{sys.version_info[1]}":
        pytest.skip(f"the {which} CPython at hand is the one that runs the tests")
    folder = ROOT / "build" / f"python{tag}"
    variables = {"CMAKE_BUILD_TYPE": "None", "pybind11_DIR": pybind11.get_cmake_dir()}
    build(folder, "_native", "CPU=baseline", python=found[tag], **variables)
    (module,) = folder.glob(f"_native.cpython-{tag}-*.so")
    command = [found[tag], "-I", "-c", wheels.LOAD_MODULE, str(module)]
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("loaded without torch: baseline | OpenMP"), result.stdout
