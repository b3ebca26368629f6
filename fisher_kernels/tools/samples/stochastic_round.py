"""Samples of stochastic_round."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from fisher_kernels.tools.samples.sample import Inputs, Sample, Source, Tolerance, last, with_non_finite
from fisher_kernels.tools.samples.steps import on

_CASES: dict[str, tuple[tuple[int, ...], dict[str, Any]]] = {
    "vector": ((5000,), {"seed": 3, "ordinal": 2, "step": 7}),
    "matrix": ((31, 65), {"half": "low", "step": 2**32 - 1}),
    "columns of a matrix": ((40, 100), {"offset": 3, "run": 100, "pitch": 120}),
    "a column": ((300,), {"offset": 5, "run": 1, "pitch": 7, "half": "low"}),
    "rows beyond 2^32": ((3000,), {"offset": 2**32 - 1000, "ordinal": 1}),
    "runs far apart": ((70, 50), {"offset": 2**31, "run": 50, "pitch": 2**31 + 3}),
    "channels last": ((6, 5, 3, 3), {"seed": 2**64 - 1}),
    "every other column": ((9, 40), {}),
    "one number": ((), {}),
    "the number of the step on the device": ((31, 65), {"step": torch.tensor(5.0)}),
    "empty": ((0,), {}),
}


def _inputs(name: str, source: Source) -> Inputs:
    shape, options = _CASES[name]
    x = source.normal(*shape)
    if name == "vector":
        x = with_non_finite(x)
    elif name == "channels last":
        x = last(x)
    elif name == "every other column":
        x = x[:, ::2]
    return {"x": x, **on(source.device, options)}


def _tolerance(inputs: Inputs, expected: list[Tensor], u: float) -> list[Tolerance]:
    return [0.0]


SAMPLES = tuple(
    Sample("stochastic_round", name, (torch.float32,), partial(_inputs, name), _tolerance, widened=False)
    for name in _CASES
)
