"""The project's one ``torch.library`` handle, and the native module or the reason why there is none."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType
from typing import Any

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


_NATIVE, _REASON = _load()


def native_module() -> ModuleType | None:
    """The compiled module, or None where it is missing; :func:`native_reason` says why."""
    return _NATIVE


def native() -> Any:
    """The compiled module, where it is known to be there: its functions are checked when they are called."""
    return _NATIVE


def native_reason() -> str | None:
    """Why there is no native module, or None where there is one."""
    return _REASON
