"""What this installation and this machine are, as plain data: for `fisher-kernels info` and for result files."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from pathlib import Path
from typing import Any

import torch

from fisher_kernels import __version__, backends
from fisher_kernels._library import native_module, unused_capability


def describe() -> dict[str, Any]:
    """Versions, processor, threads and backends.

    ``backends`` maps every backend to None if it is available and else to the reason why it is not.
    """
    native = native_module()
    return {
        "fisher_kernels": __version__,
        "torch": torch.__version__,
        "triton": version("triton"),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": processor(),
        "capability": native.capability() if native else None,
        "cpu": _cpu(),
        "openmp": native.openmp() if native else None,
        "cuda": _cuda(),
        "threads": torch.get_num_threads(),
        "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "backend": default_backend(),
        "gpu backends measured on": backends.measured_on(),
        "backends": backends.reasons(),
    }


def _cpu() -> dict[str, Any] | None:
    """What the CPU kernels inside the native module were compiled for, and what that leaves unused here."""
    native = native_module()
    if native is None:
        return None
    return {"built": native.built_capabilities(), "left out": unused_capability(native)}


def _cuda() -> dict[str, Any] | None:
    """What the CUDA kernels inside the native module were built for and with."""
    native = native_module()
    toolkit = native.cuda_toolkit() if native else None
    if toolkit is None:
        return None
    architectures, runtime, driver = toolkit
    return {
        "architectures": architectures.split(","),
        "runtime": backends.cuda_version(runtime),
        "driver": backends.cuda_version(driver) if driver else None,
    }


def default_backend() -> str:
    """What ``FISHER_KERNELS_BACKEND`` asks for, whether or not there is such a backend."""
    return os.environ.get("FISHER_KERNELS_BACKEND") or "auto"


def version(distribution: str) -> str | None:
    """The installed version, or None."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def processor() -> str:
    """The processor's name where the system tells, else its architecture."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
