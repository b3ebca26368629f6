"""What a benchmark case is, and what it is held to."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch

from bench.gpu.timing import Run

LIMITS = ("copy", "read", "float32", "tf32", "bfloat16")
"""Rates of the device, measured in the same run: bytes a second, and operations a second of matrix products."""


@dataclass
class Work:
    """A case on one set of inputs.

    Attributes:
        run: the op, on the backend in use.
        baselines: name -> the same by other means, on the same memory where it can be.
        check: raises unless the op, on the backend in use, does what its definition says on (a sample of) the inputs.
        bytes_moved: that the op must move at least.
        flops: that the formulas ask for.
        held: bytes of the inputs and outputs, if other than ``bytes_moved``: sets are rotated past the cache.
    """

    run: Run
    baselines: dict[str, Run]
    check: Run
    bytes_moved: int
    flops: float = 0.0
    held: int | None = None


@dataclass(frozen=True)
class Case:
    """One op at one size.

    Attributes:
        prepare: makes a set of inputs on a device.
        limit: the rate that the op is measured beside, of LIMITS.
        targets: least values: of a fraction, under the name of a limit; of a baseline's time over ours, under its name;
            of wall times, under ``"wall: NAME"``; of a baseline's peak memory over ours, under ``"memory: NAME"``.
        wall: whether the host's time is measured apart: for what runs once a step.
    """

    op: str
    shape: str
    dtype: torch.dtype
    prepare: Callable[[torch.device], Work]
    limit: str = "copy"
    targets: Mapping[str, float] = field(default_factory=dict)
    wall: bool = False

    @property
    def name(self) -> str:
        return f"{self.op} {self.shape} {str(self.dtype).removeprefix('torch.')}"
