"""Every op on every available backend of this machine, checked against the reference in float64.

The same inputs, exactly, go to the backend under test and, converted to float64, to the reference. The difference may
be what rounding explains and no more: a tolerance is a small multiple of the unit roundoff u of the arithmetic, times
the magnitudes that are added up. NaN and infinities must be in the same places. What rounds by itself is defined to the
bit, and the reference gets it as it is.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fisher_kernels import backends
from fisher_kernels.ops import ACCUMULATOR
from fisher_kernels.tools.samples import SAMPLES, Sample, Source, Tolerance


@dataclass(frozen=True)
class Result:
    """Outcome of one sample; ``worst`` is the largest error in units of the tolerance."""

    op: str
    case: str
    backend: str
    device: str
    dtype: str
    passed: bool
    worst: float | None
    message: str | None


def run(only: str | None = None) -> Iterator[Result]:
    """Checks every sample in every dtype on every available backend, or on one of them, one result each."""
    for backend, device in _places():
        if only not in (None, backend):
            continue
        for sample in SAMPLES:
            for dtype in sample.dtypes:
                yield check(sample, dtype, backend, device)


def _places() -> list[tuple[backends.Name, torch.device]]:
    """Backends and the devices they run on."""
    kinds = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    return [
        (backend, torch.device(kind))
        for backend in backends.available()
        for kind in (kinds if backend == "reference" else [backends.device_type(backend)])
    ]


def check(sample: Sample, dtype: torch.dtype, backend: backends.Name, device: torch.device) -> Result:
    """A sample in one dtype on one backend."""

    def result(passed: bool, worst: float | None, message: str | None) -> Result:
        dtype_name = str(dtype).removeprefix("torch.")
        return Result(sample.op, sample.name, backend, device.type, dtype_name, passed, worst, message)

    inputs = sample.inputs(Source(dtype, device))
    exact = _copied(inputs, sample.widened)
    try:
        with backends.use_backend("reference"):
            expected = sample.call(_copied(exact, sample.widened))
        with backends.use_backend(backend):
            actual = sample.call(inputs)
        tolerances = sample.tolerance(exact, expected, torch.finfo(ACCUMULATOR[dtype]).eps / 2)
        worst = max((_worst(*triple) for triple in zip(actual, expected, tolerances, strict=True)), default=0.0)
    except Exception as error:  # a self-test reports whatever goes wrong and carries on
        return result(False, None, f"{type(error).__name__}: {error}")
    if worst <= 1:
        return result(True, worst, None)
    return result(False, worst if math.isfinite(worst) else None, f"error is {worst:.3g} of what rounding explains")


def _copied(value: Any, widened: bool) -> Any:
    """A copy of nested inputs on the CPU; widened, floating-point tensors are in float64 except step counters."""
    if isinstance(value, dict):
        return {name: _copied(v, widened and name != "steps") for name, v in value.items()}
    if isinstance(value, list):
        return [_copied(item, widened) for item in value]
    if isinstance(value, Tensor):
        return value.to("cpu", torch.float64 if widened and value.is_floating_point() else value.dtype, copy=True)
    return value


def _worst(actual: Tensor, expected: Tensor, tolerance: Tolerance) -> float:
    """Largest error in units of the tolerance; infinite where the shape is wrong or only one side is finite."""
    if actual.shape != expected.shape:
        return math.inf
    x = actual.to("cpu", torch.float64)
    error = (x - expected).abs() / (tolerance + _last_rounding(actual.dtype, expected, tolerance))
    error = error.masked_fill((x == expected) | (x.isnan() & expected.isnan()), 0)
    return float(error.nan_to_num(nan=math.inf).max()) if error.numel() else 0.0


def _last_rounding(dtype: torch.dtype, expected: Tensor, tolerance: Tolerance) -> Tensor | float:
    """Of a result that is stored in fewer bits than it was computed in, unless no error at all is admissible."""
    if ACCUMULATOR.get(dtype, dtype) == dtype:
        return 0.0
    info = torch.finfo(dtype)
    return (torch.as_tensor(tolerance) > 0) * (info.eps / 2) * expected.abs().clamp(min=info.smallest_normal)
