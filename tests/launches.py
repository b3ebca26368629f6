"""Which kernels of the GPU backends a run has launched, of those that there are: conftest.py reports what is missing.

Triton's interpreter is asked in this process. The CUDA kernels on the host note themselves in a file, as places in
their module, and so do those of processes that a test starts; other modules' (sanitized ones, probes) are left out.
"""

from __future__ import annotations

import ast
import atexit
import functools
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fisher_kernels import _library, backends

ROOT = Path(__file__).parent.parent
_triton: set[str] = set()


def record() -> None:
    """From here on; before a CUDA kernel is launched."""
    if _library.runs_cuda_on_host() and "FISHER_KERNELS_HOST_LAUNCHES" not in os.environ:
        descriptor, path = tempfile.mkstemp(prefix="launches-")
        os.close(descriptor)
        atexit.register(os.unlink, path)
        os.environ["FISHER_KERNELS_HOST_LAUNCHES"] = path
    if not (backends.is_interpreted() and "triton" in backends.available()):
        return
    from triton.runtime.interpreter import InterpretedFunction

    run = InterpretedFunction.run

    def noted(self: Any, *args: Any, **kwargs: Any) -> Any:
        _triton.add(f"triton {self.fn.__module__.rpartition('.')[2]}.{self.fn.__name__}")
        return run(self, *args, **kwargs)

    InterpretedFunction.run = noted


def launched() -> set[str]:
    """By names such as ``triton gram.sums`` and ``cuda gram.gram_kernel``."""
    notes = Path(os.environ.get("FISHER_KERNELS_HOST_LAUNCHES", os.devnull)).read_text().splitlines()
    places = [place for place, _, module in (note.partition(" ") for note in notes) if module == _module()]
    return _triton | {_cuda_kernels()[int(place, 16)] for place in places}


def defined() -> set[str]:
    """Those of the backends that run on the processor here."""
    triton = _triton_kernels() if backends.is_interpreted() and "triton" in backends.available() else ()
    return {*triton, *_cuda_kernels().values()}


def _triton_kernels() -> Iterator[str]:
    """Functions under ``triton.jit`` that no other one calls."""
    functions: set[tuple[str, str]] = set()
    called: set[str] = set()
    for path in (ROOT / "triton_kernels").glob("*.py"):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.FunctionDef) and any("triton.jit" in ast.unparse(d) for d in node.decorator_list):
                functions.add((path.stem, node.name))
                called |= {
                    x.func.id for x in ast.walk(node) if isinstance(x, ast.Call) and isinstance(x.func, ast.Name)
                }
    return (f"triton {stem}.{name}" for stem, name in functions if name not in called)


_KERNEL = re.compile(r"__global__\s+void\s+(?:__launch_bounds__\((?:[^()]|\([^()]*\))*\)\s*)?(\w+)\s*\(")
_INSTANCE = re.compile(r"(?:void )?fisher_kernels::cuda::(?:\w+::)*(\w+)[<(]")


def _module() -> str:
    return str(_library.CUDA.kernels.__file__)


@functools.cache
def _cuda_kernels() -> dict[int, str]:
    """Place in the module -> file and name, of every kernel that was compiled for the host."""
    if not _library.runs_cuda_on_host() or shutil.which("readelf") is None:
        return {}
    names = {name for path in (ROOT / "csrc/cuda").glob("*.cu*") for name in _KERNEL.findall(path.read_text())}
    command = ["readelf", "--symbols", "--wide", "--demangle", _module()]
    kernels, stem = {}, ""
    for line in subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines():
        fields = line.split(maxsplit=7)  # number, value, size, kind, binding, visibility, section, name
        if len(fields) < 8:
            continue
        if fields[3] == "FILE":
            stem = Path(fields[7]).stem
        elif (found := _INSTANCE.match(fields[7].replace("(anonymous namespace)::", ""))) and found[1] in names:
            # A kernel of a header, which several files share, belongs to none of them.
            kernels[int(fields[1], 16)] = f"cuda {stem}.{found[1]}" if fields[4] == "LOCAL" else f"cuda {found[1]}"
    return kernels
