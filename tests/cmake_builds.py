"""Runs the native build as the tests ask for it, whatever the environment of the tests asks for."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# As in setup.py: tools installed beside the interpreter come first, whether or not its environment is active.
PATH = os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", os.defpath)])

needs_cmake = pytest.mark.skipif(
    importlib.util.find_spec("pybind11") is None
    or not all(shutil.which(tool, path=PATH) for tool in ("cmake", "ninja", "c++")),
    reason="the build's own tools are missing",
)


def run(command: list[str], **variables: str) -> subprocess.CompletedProcess[str]:
    """Run it with no settings of the build but these. The output has its lines joined."""
    ours = ("FISHER_KERNELS_", "CMAKE_", "MAKE", "MFLAGS", "CUDA", "CCACHE_")
    env = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
    env = {**env, "PATH": PATH, **variables}
    result = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    result.stderr, result.stdout = " ".join(result.stderr.split()), " ".join(result.stdout.split())
    return result


def configure(
    folder: Path, *options: str, python: str = sys.executable, **variables: str
) -> subprocess.CompletedProcess[str]:
    """Configure a whole build."""
    defines = [f"-DPython_EXECUTABLE={python}", *(f"-DFISHER_KERNELS_{option}" for option in options)]
    return run(["cmake", "-S", str(ROOT), "-B", str(folder), "-G", "Ninja", *defines], **variables)


def build(
    folder: Path, target: str, *options: str, python: str = sys.executable, **variables: str
) -> subprocess.CompletedProcess[str]:
    """Compile the CPU's part of a target, where every warning is an error. Returns what CMake said when it configured.

    The folder is kept below ``build/``: a second run compiles what has changed.
    """
    configured = configure(folder, "CUDA=off", "WERROR=ON", *options, python=python, **variables)
    assert configured.returncode == 0, configured.stderr
    built = run(["cmake", "--build", str(folder), "--parallel", "2", "--target", target], **variables)
    assert built.returncode == 0, built.stdout + built.stderr
    return configured
