"""Which implementation of an op runs: ``auto``, ``reference``, ``cpu``, ``cuda`` or ``triton``.

``auto``, the default, takes the native kernels for CPU tensors, for tensors on a GPU the faster of CUDA's and Triton's,
as ``auto.json`` has it, and the reference wherever these are missing.
``FISHER_KERNELS_BACKEND`` sets another default; :func:`use_backend` overrides it for a while.
"""

from __future__ import annotations

import functools
import importlib.metadata
import json
import os
import re
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from fisher_kernels._library import INSTALL_AGAIN, native_module, native_reason, runs_cuda_on_host

Name = Literal["reference", "cpu", "cuda", "triton"]
"""A backend."""

NAMES: tuple[Name, ...] = get_args(Name)


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


def cuda_version(number: int) -> str:
    """A version as CUDA counts them, 1000 major + 10 minor, as people write it."""
    return f"{number // 1000}.{number % 1000 // 10}"


def _why_no_cuda() -> str | None:
    if runs_cuda_on_host():
        return None
    module = native_module()
    if module is None:
        return native_reason()
    toolkit = module.cuda_toolkit()
    if toolkit is None:
        return (
            f"the native module was built without CUDA kernels: {module.why_no_cuda()}. "
            "Built with FISHER_KERNELS_CUDA=on it has them, or the build says what it lacks"
        )
    _, runtime, driver = toolkit
    if not torch.cuda.is_available():
        return "there is no GPU: torch.cuda.is_available() is False"
    if driver < runtime:
        return (
            f"the CUDA kernels were built with CUDA {cuda_version(runtime)}, and the driver knows no more than CUDA "
            f"{cuda_version(driver)}: a newer driver is needed, or a build with an older toolkit"
        )
    return None


@functools.cache
def _why_not_these_gpus() -> str | None:
    """Whether the CUDA kernels were built for the GPUs here. Asking starts CUDA, so it is not done on import."""
    module = native_module()
    toolkit = None if module is None or runs_cuda_on_host() else module.cuda_toolkit()
    if toolkit is None:
        return None
    for index in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(index)
        if not _runs_on(toolkit[0].split(","), 10 * major + minor):
            reason = (
                f"the CUDA kernels were built for compute capabilities {toolkit[0]}, and a GPU here has "
                f"{10 * major + minor}. {INSTALL_AGAIN}, or with FISHER_KERNELS_CUDA_ARCHS={10 * major + minor}"
            )
            warnings.warn(f"backend 'cuda' is not available: {reason}", RuntimeWarning, stacklevel=2)
            return reason
    return None


def _runs_on(architectures: Sequence[str], capability: int) -> bool:
    """Whether a GPU has machine code or PTX among architectures such as 80, 90a (for 90 alone) and 100f (to 109).

    The newest of them is there as PTX, which GPUs from its own capability on compile when they load it.
    """
    newest = max(map(_order, architectures))
    for number, kind in map(_order, architectures):
        same_family = capability // 10 == number // 10 and capability >= number
        if capability == number or (kind != "a" and same_family):
            return True
        if not kind and (number, kind) == newest and capability > number:
            return True
    return False


def _order(architecture: str) -> tuple[int, str]:
    number = architecture.rstrip("af")
    return int(number), architecture[len(number) :]


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

_OF_A_GPU = ("cuda", "triton")

# Which of them is faster, where that was measured: op -> [largest size, backend] of each class of sizes, in order, null
# for no limit. ``python -m bench.gpu.choose`` makes it.
_AUTO: dict[str, Any] = json.loads(Path(__file__).with_name("auto.json").read_text())

# Process-wide, not per thread: autograd runs backward hooks in threads of its own.
_selected = os.environ.get("FISHER_KERNELS_BACKEND") or "auto"


class _Own(threading.local):
    """What a thread has of its own: work that goes on beside a program keeps what was selected when it began."""

    selected: str | None = None


_own = _Own()


def _reason(name: str) -> str | None:
    return _REASONS[name] or (_why_not_these_gpus() if name == "cuda" else None)


def available() -> list[Name]:
    """Names of the backends that can run here, the reference first."""
    return [name for name in NAMES if _reason(name) is None]


def reasons() -> dict[str, str | None]:
    """For every backend, why it cannot run here; None where it can."""
    return {name: _reason(name) for name in NAMES}


def device_type(name: str) -> str:
    """The type of device that a backend runs on; the reference runs on all."""
    return _DEVICES[name]


def require(name: str) -> None:
    """Check that ``use_backend`` would take a name.

    Raises:
        ValueError: it is unknown.
        RuntimeError: the backend is not available here.
    """
    if name != "auto" and name not in NAMES:
        raise ValueError(f"backend is {name!r}, expected one of 'auto', {', '.join(map(repr, NAMES))}")
    if name != "auto" and (reason := _reason(name)) is not None:
        raise RuntimeError(f"backend {name!r} is not available: {reason}")


@contextmanager
def use_backend(name: Name | Literal["auto"]) -> Iterator[None]:
    """Run every op of this process on the named backend inside a ``with`` block.

    Args:
        name: ``"auto"``, ``"reference"``, ``"cpu"``, ``"cuda"`` or ``"triton"``.

    Raises:
        ValueError: the name is unknown.
        RuntimeError: the backend is not available here; the message says why.
    """
    global _selected
    require(name)
    previous, _selected = _selected, name
    try:
        yield
    finally:
        _selected = previous


def selected() -> str:
    """The backend that is selected here, ``"auto"`` or a name."""
    return _own.selected or _selected


@contextmanager
def of_this_thread(name: str) -> Iterator[None]:
    """Run every op of this thread on a backend, whatever the process selects meanwhile."""
    previous, _own.selected = _own.selected, name
    try:
        yield
    finally:
        _own.selected = previous


@contextmanager
def assumed(name: Name, device: str) -> Iterator[None]:
    """Behave as if the named backend ran on a type of device and were selected; for recording its launches."""
    kept = _REASONS[name], _DEVICES[name]
    _REASONS[name], _DEVICES[name] = None, device
    try:
        with use_backend(name):
            yield
    finally:
        _REASONS[name], _DEVICES[name] = kept


_calls: list[tuple[str, int]] | None = None


@contextmanager
def recorded() -> Iterator[list[tuple[str, int]]]:
    """Within the block, the op and the size of every call are added to a list; for benchmarks."""
    global _calls
    previous, _calls = _calls, []
    try:
        yield _calls
    finally:
        _calls = previous


def size_of(argument: Tensor | Sequence[Tensor]) -> int:
    """The size of an op's work, from its first argument: n of matrices (B, n, n), else the number of elements."""
    if not isinstance(argument, Tensor):
        return sum(map(size_of, argument))
    square = argument.dim() == 3 and argument.shape[1] == argument.shape[2]
    return argument.shape[2] if square else argument.numel()


def _fastest(op: str, device: str, argument: Any) -> tuple[str, ...]:
    """What ``auto`` takes, the first that runs here: never Triton's interpreter, nor CUDA kernels on the CPU."""
    if device == "cpu":
        return ("cpu",)
    return order_on_a_gpu(op, lambda: size_of(argument)) if device == "cuda" else ()


def order_on_a_gpu(op: str, size: Callable[[], int]) -> tuple[str, ...]:
    """CUDA and Triton, the faster one for an op and a size first; the size is computed only where it matters."""
    classes = _AUTO["ops"].get(op)
    if not classes:
        return _OF_A_GPU
    counted = size() if len(classes) > 1 else 0
    fast = next(backend for most, backend in classes if most is None or counted <= most)
    return fast, *(name for name in _OF_A_GPU if name != fast)


def measured_on() -> str | None:
    """The device and day of the measurement from which ``auto`` chooses on a GPU; None if there was none yet."""
    return f"{_AUTO['device']}, {_AUTO['date']}" if _AUTO["device"] else None


def choose(op: str, device: str, implemented: Iterable[str], argument: Any = None) -> str:
    """The backend that runs ``op`` on tensors of a device type, out of those that implement it.

    ``argument`` is the first one of the call, which says how large it is.
    """
    if _calls is not None and argument is not None:
        _calls.append((op, size_of(argument)))
    name = selected()
    if name == "auto":
        for fast in _fastest(op, device, argument):
            if _reason(fast) is None and _DEVICES[fast] == device and fast in implemented:
                return fast
        return "reference"
    require(name)
    if name not in implemented:
        raise RuntimeError(f"{op}: backend {name!r} does not implement this op")
    if name != "reference" and _DEVICES[name] != device:
        raise RuntimeError(
            f"{op}: backend {name!r} runs on {_DEVICES[name]} tensors, not on {device} tensors; "
            "use_backend('auto') chooses by device"
        )
    return name
