"""How every kernel is started: on the device of its tensors, with floating-point fusion set, or only recorded."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import triton

INTERPRETED = bool(triton.knobs.runtime.interpret)
"""Whether kernels run in Triton's interpreter, on CPU tensors: what TRITON_INTERPRET was when this was imported."""


@dataclass(frozen=True)
class Launch:
    """What a kernel would have been started with."""

    kernel: Any
    args: tuple[Any, ...]
    options: dict[str, Any]  # compile-time arguments, num_warps, num_stages, enable_fp_fusion


_record: Callable[[Launch], None] | None = None


@contextmanager
def recording(record: Callable[[Launch], None]) -> Iterator[None]:
    """Inside, no kernel runs: each launch goes to ``record`` instead, whatever device the tensors are on."""
    global _record
    previous, _record = _record, record
    try:
        yield
    finally:
        _record = previous


def is_recording() -> bool:
    """Whether launches are recorded rather than made."""
    return _record is not None


def launch(
    kernel: Any,
    programs: int | tuple[int, ...],
    device: torch.device,
    *args: Any,
    warps: int = 4,
    stages: int = 3,
    fuse: bool = True,
    **constants: Any,
) -> None:
    """Start ``kernel`` on the current stream of ``device``.

    Args:
        kernel: a function under ``triton.jit``.
        programs: the grid; nothing happens where it is empty.
        device: where the tensors among the arguments are.
        args: the arguments that are not ``tl.constexpr``, in order.
        warps, stages: ``num_warps`` and ``num_stages``.
        fuse: whether a product and a sum may become one operation with one rounding.
        constants: the ``tl.constexpr`` arguments.
    """
    grid = (programs,) if isinstance(programs, int) else programs
    if 0 in grid:
        return
    options = {**constants, "num_warps": warps, "num_stages": stages, "enable_fp_fusion": fuse}
    if _record is not None:
        _record(Launch(kernel, args, options))
    elif device.type == "cpu" or device.index == torch.cuda.current_device():
        kernel[grid](*args, **options)
    else:
        with torch.cuda.device(device):
            kernel[grid](*args, **options)
