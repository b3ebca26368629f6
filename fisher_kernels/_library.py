"""The project's one ``torch.library`` handle, and the native module or the reason why there is none."""

from __future__ import annotations

import importlib
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch

from fisher_kernels import _dispatch_keys

# A wheel that pip made on another machine may lie in its cache.
INSTALL_AGAIN = "Install again on this machine (pip install --no-cache-dir --force-reinstall --no-deps)"

LIBRARY = torch.library.Library("fisher_kernels", "DEF")


def _import(name: str) -> ModuleType:
    """A native module, which loads without torch, told how torch hands out its tensors."""
    module = importlib.import_module(f"fisher_kernels.{name}")
    module.load_exchange_api()
    return module


def _load() -> tuple[ModuleType | None, str | None]:
    if not hasattr(torch.Tensor, "__dlpack_c_exchange_api__"):
        return None, f"torch {torch.__version__} has no DLPack exchange API; torch >= 2.11 is needed"
    try:
        return _import("_native"), None
    except ModuleNotFoundError:
        note = Path(__file__).with_name("_native_missing.txt")  # left by the build
        return None, note.read_text().strip() if note.exists() else "the native module was not built for this Python"
    except ImportError as error:
        return None, f"the native module does not load: {error}"


def _load_cuda_on_host() -> ModuleType | None:
    chosen = os.environ.get("FISHER_KERNELS_CUDA_ON_HOST") or "0"
    names = {"0": None, "1": "_cuda_on_host", "sanitized": "_cuda_on_host_sanitized", "traced": "_cuda_on_host_traced"}
    if chosen not in names:
        raise ValueError(f"FISHER_KERNELS_CUDA_ON_HOST is {chosen!r}, expected '0', '1', 'sanitized' or 'traced'")
    name = names[chosen]
    return None if name is None else _import(name)


_NATIVE, _REASON = _load()


def unused_capability(native: ModuleType) -> str | None:
    """What this processor has and no CPU kernel was compiled for, and how to get it; None if nothing."""
    built, best = native.built_capabilities(), native.processor_capabilities()[-1]
    if best in built:
        return None
    return (
        f"the CPU kernels were compiled for {' and '.join(built)}, and this processor has {best}: they run as "
        f"{native.capabilities()[-1]}, which is slower. {INSTALL_AGAIN}, or with FISHER_KERNELS_CPU=all"
    )


def _warn_of_another_processor() -> None:
    """Where the module was meant for the processor it runs on; what somebody chose is no news."""
    if _NATIVE is not None and _NATIVE.is_for_processor_of_build() and (note := unused_capability(_NATIVE)) is not None:
        warnings.warn(f"fisher_kernels was built on another processor: {note}", RuntimeWarning, stacklevel=2)


_warn_of_another_processor()
_ON_HOST = _load_cuda_on_host()


def native_module() -> ModuleType | None:
    """The compiled module, or None where it is missing; :func:`native_reason` says why."""
    return _NATIVE


def _threads(_: torch.device | None) -> int:
    return torch.get_num_threads()


Place = int | tuple[int, int]
"""Where a native kernel runs: a number of threads, or the index of a CUDA device and the address of its stream."""


def _current_stream(device: torch.device | None) -> Place:
    if device is None:  # an empty list, whose results are on the CPU
        return _threads(device)
    index = torch.cuda.current_device() if device.index is None else device.index
    return index, torch._C._cuda_getCurrentRawStream(index)


def _host(_: torch.device | None) -> Place:
    return -1, 0


def runs_cuda_on_host() -> bool:
    """Whether the CUDA kernels run as they were compiled for the CPU, on CPU tensors: slow, for tests without a GPU."""
    return _ON_HOST is not None


class Native(NamedTuple):
    """The compiled kernels of one backend, for callers that know that they are there."""

    kernels: Any
    place: Callable[[torch.device | None], Place]


CPU = Native(_NATIVE, _threads)
CUDA = Native(_ON_HOST, _host) if _ON_HOST is not None else Native(_NATIVE, _current_stream)


for _module in (_NATIVE, _ON_HOST):
    if _module is not None:
        _module.set_key_bits(*_dispatch_keys.find())


class UnresolvedError(ValueError):
    """A tensor's memory does not hold its numbers."""


UNRESOLVED: tuple[type[Exception], ...] = (
    UnresolvedError,
    *(module.UnresolvedError for module in (_NATIVE, _ON_HOST) if module is not None),
)
"""The same as each compiled module raises it."""


def native_reason() -> str | None:
    """Why there is no native module, or None where there is one."""
    return _REASON
