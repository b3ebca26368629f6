"""Samples of minmax, minmax_ and factor_ema_."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fisher_kernels.tools.samples.sample import (
    FACTOR_DTYPES,
    Device,
    Inputs,
    Sample,
    Source,
    Tolerance,
    random,
    with_non_finite,
)

LENGTHS = (0, 1, 2, 5, 16, 17, 63, 64, 65, 1000)


def vectors(
    dtype: torch.dtype, seed: int = 0, lengths: Sequence[int] = LENGTHS, *, device: Device = None
) -> list[Tensor]:
    """Nonnegative vectors of many lengths, as diagonal factors are."""
    return [random((n,), dtype, seed + n, device).square() for n in lengths]


# The difference v - min v is exact to u of max |v|, so minmax has the error u * max |v| / (max v - min v) that its
# input's own rounding causes, plus a few roundings of a result that is at most 1.


def _minmax_error(v: Tensor, u: float) -> float:
    if not v.numel() or not v.isfinite().all() or v.max() == v.min():
        return u
    return 8 * u * (1 + float(v.abs().max() / (v.max() - v.min())))


def _minmax_tolerance(inputs: Inputs, expected: list[Tensor], u: float) -> list[Tolerance]:
    return [_minmax_error(v, u) for v in inputs["x"]]


def _minmax_inputs(weighted: bool, into: bool, source: Source) -> Inputs:
    x = [source.uniform(n, seed=n) for n in (1, 2, 37, 1000, 0)]
    x += [100 + source.uniform(50), torch.full_like(x[2], 0.3), with_non_finite(source.uniform(8))]
    inputs: Inputs = {"out": [torch.full_like(v, torch.nan) for v in x]} if into else {}
    inputs |= {"x": x, "eps": 1e-6}
    if weighted:
        inputs["weights"] = [1 + source.uniform(1, seed=i) for i in range(len(x))]
    return inputs


def _ema_inputs(arguments: dict[str, Any], source: Source) -> Inputs:
    sizes = (3, 37, 1000, 5, 8, 8)
    state, new = ([source.uniform(n, seed=seed + i) for i, n in enumerate(sizes)] for seed in (0, 10))
    with_non_finite(new[3])
    return {"state": state, "new": new, "decay": 0.8, "gain": 0.2, **arguments}


def _one_short(source: Source) -> Inputs:
    """The first new vector is an entry shorter than its state: a 1 comes after it."""
    state, new = [source.uniform(4), source.uniform(3)], [source.uniform(3, seed=1), source.uniform(3, seed=2)]
    return {"state": state, "new": new, "decay": 0.8, "gain": 0.2, "divisors": [2.0, 4.0]}


def _ema_tolerance(inputs: Inputs, expected: list[Tensor], u: float) -> list[Tolerance]:
    errors = []
    for state, new in zip(inputs["state"], inputs["new"], strict=True):
        of_new = _minmax_error(new, u) if inputs.get("normalize") else 0.0
        errors.append(4 * u * (inputs["decay"] * state.abs() + inputs["gain"]) + inputs["gain"] * of_new)
    return [*errors, 0.0]


_AVERAGES: dict[str, dict[str, Any]] = {
    "raw": {},
    "sums and counts": {"divisors": [7.0, 3.0, 64.0, 5.0, 1.0, 9.0]},
    "normalised": {"decay": 0.08, "gain": 0.008, "normalize": True, "eps": 1e-6},
    "in pairs": {"joint": 2},
    "normalised, in pairs": {"normalize": True, "eps": 1e-3, "joint": 2},
}


def _samples() -> Iterator[Sample]:
    for op in ("minmax", "minmax_"):
        for name, weighted in (("vectors", False), ("weights", True)):
            inputs = partial(_minmax_inputs, weighted, op == "minmax_")
            yield Sample(op, name, FACTOR_DTYPES, inputs, _minmax_tolerance)
    yield Sample(
        "minmax", "nothing", FACTOR_DTYPES[:1], lambda source: {"x": [], "eps": 0.0, "weights": []}, _minmax_tolerance
    )
    for name, arguments in _AVERAGES.items():
        yield Sample("factor_ema_", name, FACTOR_DTYPES, partial(_ema_inputs, arguments), _ema_tolerance)
    yield Sample("factor_ema_", "one short", FACTOR_DTYPES, _one_short, _ema_tolerance)


SAMPLES = tuple(_samples())
