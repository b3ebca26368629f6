"""Builds fisher_kernels: pyproject.toml has the metadata, CMakeLists.txt the native build, this file joins them."""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py
from setuptools.errors import CompileError

ROOT = Path(__file__).resolve().parent
SUFFIX = sysconfig.get_config_var("EXT_SUFFIX")
NOTE = "_native_missing.txt"
OPTIONS = {  # of CMakeLists.txt, from the environment
    "FISHER_KERNELS_WERROR": "OFF",
    "FISHER_KERNELS_CPU": "native",
    "FISHER_KERNELS_CUDA": "auto",
    "FISHER_KERNELS_CUDA_ARCHS": "",
    "FISHER_KERNELS_CUDA_ON_HOST": "OFF",
}
# Tools installed beside the interpreter come first, whether or not its environment is active.
PATH = os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", os.defpath)])


def missing() -> list[str]:
    """What the native build needs and this machine lacks."""
    compilers = shlex.split(os.environ.get("CXX", ""))[:1] or ["c++", "g++", "clang++"]
    headers = Path(sysconfig.get_path("include"))
    found = {
        f"a C++17 compiler ({' or '.join(compilers)})": any(shutil.which(name) for name in compilers),
        f"Python.h in {headers} (package python3-dev or alike)": (headers / "Python.h").exists(),
        "cmake (pip install cmake)": shutil.which("cmake", path=PATH),
        "ninja (pip install ninja)": shutil.which("ninja", path=PATH),
        "pybind11 (pip install pybind11)": importlib.util.find_spec("pybind11"),
    }
    return [need for need, there in found.items() if not there]


def why_no_native() -> str | None:
    """Why this build leaves the native module out, or None."""
    if old := os.environ.get("FISHER_KERNELS_PORTABLE"):
        raise SystemExit(
            f"FISHER_KERNELS_PORTABLE is {old!r}, but is no more: FISHER_KERNELS_CPU=baseline says the same"
        )
    choice = os.environ.get("FISHER_KERNELS_NATIVE") or "auto"
    if choice not in ("auto", "on", "off"):
        raise SystemExit(f"FISHER_KERNELS_NATIVE is {choice!r}, expected 'auto', 'on' or 'off'")
    asked_for_cuda = os.environ.get("FISHER_KERNELS_CUDA") == "on"
    if choice == "off" and asked_for_cuda:
        raise SystemExit("FISHER_KERNELS_CUDA is 'on' and FISHER_KERNELS_NATIVE 'off': CUDA is in the native module")
    if choice == "off":
        return "the native module was left out: FISHER_KERNELS_NATIVE=off when fisher_kernels was installed"
    if choice == "auto" and not asked_for_cuda and missing():
        return f"the native module was not built when fisher_kernels was installed; missing: {', '.join(missing())}"
    return None


class BuildNative(build_ext):
    """Compiles with CMake in a folder that stays, so that a second build compiles only what has changed."""

    def build_extension(self, ext: Extension) -> None:
        if missing():
            raise CompileError(f"the native module cannot be built; missing: {', '.join(missing())}")
        # CMake keeps the compiler it first saw, so another one gets another folder.
        compiler = re.sub(r"\W+", "-", os.environ.get("CXX", ""))
        folder = ROOT / "build" / f"native{SUFFIX.removesuffix('.so')}{compiler and '-' + compiler.strip('-')}"
        configure = [
            *("cmake", "-S", str(ROOT), "-B", str(folder), "-G", "Ninja"),
            f"-DCMAKE_MAKE_PROGRAM={shutil.which('ninja', path=PATH)}",
            f"-DPython_EXECUTABLE={sys.executable}",
            *(f"-D{option}={os.environ.get(option) or default}" for option, default in OPTIONS.items()),
        ]
        # Ninja would share the jobs of a make that runs this, through files that Python does not hand on.
        env = {name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "MFLAGS")}
        for command in (configure, ["cmake", "--build", str(folder)]):
            if subprocess.call(command, env={**env, "PATH": PATH}):
                raise CompileError(f"{shlex.join(command)} failed; its messages are above")
        self.force = True  # copies even over a newer module, which another compiler may have made
        self.mkpath(str(Path(self.get_ext_fullpath(ext.name)).parent))
        self.copy_file(str(folder / f"_native{SUFFIX}"), self.get_ext_fullpath(ext.name))
        copy_modules_for_tests(folder)


def copy_modules_for_tests(folder: Path) -> None:
    """Copies the CUDA kernels on the host, which no wheel has; those that this build leaves out would be old ones."""
    choice = os.environ.get("FISHER_KERNELS_CUDA_ON_HOST") or "OFF"
    if choice == "OFF":
        return
    besides = {"sanitized", "traced"} if choice == "all" else {choice}
    names = {"_cuda_on_host": True, **{f"_cuda_on_host_{kind}": kind in besides for kind in ("sanitized", "traced")}}
    for name, wanted in names.items():
        module = ROOT / "fisher_kernels" / f"{name}{SUFFIX}"
        module.unlink(missing_ok=True)
        if wanted and (folder / module.name).exists():
            shutil.copy2(folder / module.name, module)


class BuildPackage(build_py):
    """Leaves a note in a package without native module, which fisher_kernels reports at run time."""

    def run(self) -> None:
        super().run()
        package = Path(ROOT if self.editable_mode else self.build_lib) / "fisher_kernels"
        (package / NOTE).unlink(missing_ok=True)
        if WHY_NO_NATIVE:
            (package / NOTE).write_text(f"{WHY_NO_NATIVE}\n")
            (package / f"_native{SUFFIX}").unlink(missing_ok=True)


WHY_NO_NATIVE = why_no_native()
if WHY_NO_NATIVE:
    print(f"fisher_kernels: {WHY_NO_NATIVE}", file=sys.stderr)

setup(
    packages=[*find_packages(include=["fisher_kernels", "fisher_kernels.*"]), "fisher_kernels.triton_kernels"],
    # Only ever importable under this nested name: other software ships a top-level triton_kernels.
    package_dir={"fisher_kernels.triton_kernels": "triton_kernels"},
    ext_modules=[] if WHY_NO_NATIVE else [Extension("fisher_kernels._native", sources=[])],
    cmdclass={"build_ext": BuildNative, "build_py": BuildPackage},
)
