"""Builds CUDA sources for the processor, with the stand-in for the CUDA runtime in ``csrc/cuda_on_host``."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterable, Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
STAND_IN = ROOT / "csrc" / "cuda_on_host"


def _include_folders() -> Iterator[Path]:
    if home := os.environ.get("CUDA_HOME"):
        yield Path(home, "include")
    if nvcc := shutil.which("nvcc"):
        # Asked, for what is on PATH may be a script that calls the real one.
        plan = subprocess.run([nvcc, "--dryrun", "-E", "-x", "cu", os.devnull], capture_output=True, text=True)
        includes = re.search(r"^#\$ INCLUDES=(.*)$", plan.stderr, re.MULTILINE)
        yield from (Path(folder) for folder in re.findall(r'"-I([^"]+)"', includes[1] if includes else ""))
    yield Path("/usr/local/cuda/include")


def toolkit_include() -> Path | None:
    """The include folder of a CUDA toolkit, of which its headers are all that is needed."""
    return next((folder for folder in _include_folders() if (folder / "cuda_bf16.h").is_file()), None)


def missing() -> str:
    """What this machine lacks to build CUDA sources for the processor; empty if nothing."""
    lacking = [] if shutil.which("g++") else ["g++"]
    return " and ".join([*lacking, *([] if toolkit_include() else ["the headers of a CUDA toolkit"])])


def _command(*flags: str) -> list[str]:
    return [
        *("g++", "-std=c++17", "-fopenmp", "-fvisibility=hidden", "-Wall", "-Wextra", "-Werror", *flags),
        *("-DFISHER_KERNELS_CUDA_ON_HOST", "-I", str(STAND_IN), "-I", str(STAND_IN.parent)),
        *("-isystem", str(toolkit_include())),
    ]


def _joined(output: Path, paths: Iterable[Path]) -> str:
    output.write_text("".join(f'#include "{path}"\n' for path in paths))
    return str(output)


def build(output: Path, sources: Iterable[Path], *flags: str) -> Path:
    """Compile CUDA sources as one, the stand-in as another, and link them: most of each is the toolkit's headers."""
    parts = {"sources": sources, "stand_in": sorted(STAND_IN.glob("*.cpp"))}
    files = [_joined(output.with_name(f"{name}.cpp"), paths) for name, paths in parts.items()]
    subprocess.run([*_command(*flags), *files, "-o", str(output)], check=True)
    return output


def build_library(output: Path, sources: Iterable[Path], *flags: str) -> Path:
    """The same as a shared library, of which nothing may be missing."""
    return build(output, sources, "-fPIC", "-shared", "-Wl,-z,defs", *flags)


def build_traced(output: Path, sources: Iterable[Path]) -> Path:
    """A shared library whose kernels are traced, the stand-in not: it follows them."""
    traced = ("-fPIC", "-O1", "-g1", "-DFISHER_KERNELS_HOST_TRACE")
    kernels, stand_in = output.with_name("sources.o"), output.with_name("stand_in.cpp")
    joined = _joined(output.with_name("sources.cpp"), sources)
    subprocess.run([*_command(*traced, "-fsanitize=thread", "-Wno-tsan"), "-c", joined, "-o", str(kernels)], check=True)
    rest = _joined(stand_in, sorted([*STAND_IN.glob("*.cpp"), *STAND_IN.glob("trace/*.cpp")]))
    command = [*_command(*traced, "-shared", "-Wl,-z,defs"), rest, str(kernels), "-ldl"]
    subprocess.run([*command, "-o", str(output)], check=True)
    return output
