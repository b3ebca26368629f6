"""The project's one ``torch.library`` handle, and the native module or the reason why there is none."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch

LIBRARY = torch.library.Library("fisher_kernels", "DEF")


def _load() -> tuple[ModuleType | None, str | None]:
    if not hasattr(torch.Tensor, "__dlpack_c_exchange_api__"):
        return None, f"torch {torch.__version__} has no DLPack exchange API; torch >= 2.11 is needed"
    try:
        return importlib.import_module("fisher_kernels._native"), None
    except ModuleNotFoundError:
        note = Path(__file__).with_name("_native_missing.txt")  # left by the build
        return None, note.read_text().strip() if note.exists() else "the native module was not built for this Python"
    except ImportError as error:
        return None, f"the native module does not load: {error}"


def runs_cuda_on_host() -> bool:
    """Whether the CUDA kernels run as they were compiled for the CPU, on CPU tensors: slow, for tests without a GPU."""
    return os.environ.get("FISHER_KERNELS_CUDA_ON_HOST", "").lower() in ("1", "true", "yes", "on")


_NATIVE, _REASON = _load()
_ON_HOST = importlib.import_module("fisher_kernels._cuda_on_host") if runs_cuda_on_host() else None


def native_module() -> ModuleType | None:
    """The compiled module, or None where it is missing; :func:`native_reason` says why."""
    return _NATIVE


def _threads(_: torch.device | None) -> int:
    return torch.get_num_threads()


def _current_stream(device: torch.device | None) -> tuple[int, int]:
    index = torch.cuda.current_device() if device is None or device.index is None else device.index
    return index, torch._C._cuda_getCurrentRawStream(index)


def _host(_: torch.device | None) -> tuple[int, int]:
    return -1, 0


Place = int | tuple[int, int]
"""Where a native kernel runs: a number of threads, or the index of a CUDA device and the address of its stream."""


class Native(NamedTuple):
    """The compiled kernels of one backend, where they are known to be there."""

    kernels: Any
    place: Callable[[torch.device | None], Place]


CPU = Native(_NATIVE, _threads)
CUDA = Native(_ON_HOST, _host) if _ON_HOST is not None else Native(_NATIVE, _current_stream)


def native_reason() -> str | None:
    """Why there is no native module, or None where there is one."""
    return _REASON
