"""Rates that no kernel of the same run could exceed by much: copying, reading, multiplying matrices."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from bench.gpu.timing import Clock


@contextmanager
def matmul_precision(name: str) -> Iterator[None]:
    """Products of float32 matrices in float32 (``"highest"``) or in TF32 (``"high"``)."""
    previous = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(name)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(previous)


def copy_rate(clock: Clock, bytes_each: int) -> float:
    """Bytes a second, read and written, of a copy."""
    source = torch.empty(bytes_each // 4, device=clock.device).normal_()
    target = torch.empty_like(source)
    return 2 * source.nbytes / clock.device_times([lambda: target.copy_(source)]).median


def read_rate(clock: Clock, bytes_each: int) -> float:
    """Bytes a second of the fastest reduction that torch has."""
    x = torch.empty(bytes_each // 4, device=clock.device).normal_()
    whole = x.view(torch.int32)
    candidates = (x.sum, x.amax, whole.amax)
    return max(x.nbytes / clock.device_times([candidate]).median for candidate in candidates)


def matmul_rate(clock: Clock, size: int, dtype: torch.dtype, precision: str = "highest") -> float:
    """Operations a second of a square matrix product on random numbers."""
    a, b = (torch.empty(size, size, device=clock.device).normal_().to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    with matmul_precision(precision):
        return 2 * size**3 / clock.device_times([lambda: torch.mm(a, b, out=out)]).median


def measure(clock: Clock, tiny: bool) -> dict[str, float]:
    """All limits by name."""
    held, size = (1 << 16, 64) if tiny else (1 << 31, 8192)
    return {
        "copy": copy_rate(clock, held),
        "read": read_rate(clock, held),
        "float32": matmul_rate(clock, size, torch.float32),
        "tf32": matmul_rate(clock, size, torch.float32, "high"),
        "bfloat16": matmul_rate(clock, size, torch.bfloat16),
    }
