"""Which implementation of an op runs: ``auto``, ``reference``, ``cpu``, ``cuda`` or ``triton``.

``auto``, the default, takes the native kernels for CPU tensors, CUDA's or else Triton's for tensors on a GPU, and the
reference wherever these are missing.
``FISHER_KERNELS_BACKEND`` sets another default; :func:`use_backend` overrides it for a while.
"""

from __future__ import annotations

import importlib.metadata
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch

from fisher_kernels._library import native_module, native_reason, runs_cuda_on_host

NAMES = ("reference", "cpu", "cuda", "triton")


def is_interpreted() -> bool:
    """Whether Triton's kernels run in its interpreter, on CPU tensors: slow, for tests where there is no GPU."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "on", "y")


def why_no_triton() -> str | None:
    """Why Triton cannot compile kernels here, GPU or not; None where it can."""
    try:
        found = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return "Triton is not installed (pip install 'triton>=3.6', or a PyTorch with CUDA or ROCm, which brings it)"
    if tuple(int(part) for part in re.findall(r"\d+", found)[:2]) < (3, 6):
        return f"Triton {found} is installed; triton >= 3.6 is needed"
    return None


def _why_not_here() -> str | None:
    if (reason := why_no_triton()) is not None:
        return reason
    if not (is_interpreted() or torch.cuda.is_available()):
        return "there is no GPU: torch.cuda.is_available() is False"
    return None


def _version(number: int) -> str:
    return f"{number // 1000}.{number % 1000 // 10}"


def _why_no_cuda() -> str | None:
    if runs_cuda_on_host():
        return None
    module = native_module()
    if module is None:
        return native_reason()
    toolkit = module.cuda_toolkit()
    if toolkit is None:
        return "the native module was built without CUDA kernels: no nvcc was found then, or FISHER_KERNELS_CUDA=off"
    architectures, runtime, driver = toolkit
    if not torch.cuda.is_available():
        return "there is no GPU: torch.cuda.is_available() is False"
    if driver < runtime:
        return (
            f"the CUDA kernels were built with CUDA {_version(runtime)}, and the driver knows no more than CUDA "
            f"{_version(driver)}: a newer driver is needed, or a build with an older toolkit"
        )
    built = [int(re.sub("[a-z]", "", architecture)) for architecture in architectures.split(",")]
    for index in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(index)
        capability = 10 * major + minor
        if not any(x // 10 == capability // 10 and x <= capability for x in built) and capability < max(built):
            return (
                f"the CUDA kernels were built for compute capabilities {architectures}, and a GPU here has "
                f"{capability}: FISHER_KERNELS_CUDA_ARCHS names others when the module is built"
            )
    return None


_REASONS: dict[str, str | None] = {
    "reference": None,
    "cpu": native_reason(),
    "cuda": _why_no_cuda(),
    "triton": _why_not_here(),
}
_DEVICES = {
    "cpu": "cpu",
    "cuda": "cpu" if runs_cuda_on_host() else "cuda",
    "triton": "cpu" if is_interpreted() else "cuda",
}

# What ``auto`` takes for tensors of a type of device, the first that runs there: never Triton's interpreter, nor CUDA
# kernels on the CPU.
_FASTEST = {"cpu": ("cpu",), "cuda": ("cuda", "triton")}

# Process-wide, not per thread: autograd runs backward hooks in threads of its own.
_selected = os.environ.get("FISHER_KERNELS_BACKEND") or "auto"


def available() -> list[str]:
    """Names of the backends that can run here, the reference first."""
    return [name for name in NAMES if _REASONS[name] is None]


def reasons() -> dict[str, str | None]:
    """For every backend, why it cannot run here; None where it can."""
    return dict(_REASONS)


def device_type(name: str) -> str:
    """The type of device that a backend runs on; the reference runs on all."""
    return _DEVICES[name]


def _check(name: str) -> None:
    if name != "auto" and name not in NAMES:
        raise ValueError(f"backend is {name!r}, expected one of 'auto', {', '.join(map(repr, NAMES))}")
    if name != "auto" and _REASONS[name] is not None:
        raise RuntimeError(f"backend {name!r} is not available: {_REASONS[name]}")


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Run every op of this process on the named backend inside a ``with`` block.

    Args:
        name: ``"auto"``, ``"reference"``, ``"cpu"``, ``"cuda"`` or ``"triton"``.

    Raises:
        ValueError: the name is unknown.
        RuntimeError: the backend is not available here; the message says why.
    """
    global _selected
    _check(name)
    previous, _selected = _selected, name
    try:
        yield
    finally:
        _selected = previous


@contextmanager
def assumed(name: str, device: str) -> Iterator[None]:
    """As if the named backend ran on a type of device, and selected: for those who only look at its launches."""
    kept = _REASONS[name], _DEVICES[name]
    _REASONS[name], _DEVICES[name] = None, device
    try:
        with use_backend(name):
            yield
    finally:
        _REASONS[name], _DEVICES[name] = kept


def choose(op: str, device: str, implemented: Iterable[str]) -> str:
    """The backend that runs ``op`` on tensors of a device type, out of those that implement it."""
    if _selected == "auto":
        for fast in _FASTEST.get(device, ()):
            if _REASONS[fast] is None and _DEVICES[fast] == device and fast in implemented:
                return fast
        return "reference"
    _check(_selected)
    if _selected not in implemented:
        raise RuntimeError(f"{op}: backend {_selected!r} does not implement this op")
    if _selected != "reference" and _DEVICES[_selected] != device:
        raise RuntimeError(
            f"{op}: backend {_selected!r} runs on {_DEVICES[_selected]} tensors, not on {device} tensors; "
            "use_backend('auto') chooses by device"
        )
    return _selected
