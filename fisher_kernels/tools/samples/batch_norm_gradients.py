"""Samples of batch_norm_gradients."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from fisher_kernels.tools.samples.sample import SUM_DTYPES, Inputs, Sample, Source, Tolerance, last


@dataclass(frozen=True)
class _Norm:
    shape: tuple[int, ...]
    last: bool = False
    given: bool = False

    def inputs(self, source: Source) -> Inputs:
        x, grad = (source.normal(*self.shape, seed=seed) for seed in (0, 1))
        if self.last:
            x, grad = last(x), last(grad)
        mean, variance = (source.uniform(self.shape[1], seed=s) if self.given else None for s in (2, 3))
        return {"x": x, "grad_output": grad, "eps": 1e-3, "mean": mean, "variance": variance}


def _two_dtypes(source: Source) -> Inputs:
    return {
        "x": source.normal(3, 4, 5, 6),
        "grad_output": Source(torch.bfloat16, source.device).normal(3, 4, 5, 6),
        "eps": 1e-5,
    }


def _apart(source: Source) -> Inputs:
    """Two layouts; statistics of two dtypes."""
    x, grad = last(source.normal(3, 20, 5, 2)), source.normal(3, 20, 5, 4, seed=1)[..., ::2]
    mean = torch.arange(20.0, device=source.device)
    return {"x": x, "grad_output": grad, "eps": 0.1, "mean": mean, "variance": mean.double()}


def _tolerance(inputs: Inputs, expected: list[Tensor], u: float) -> list[Tolerance]:
    samples, channels, *spatial = inputs["x"].shape
    x, size = (inputs[name].reshape(samples, channels, math.prod(spatial)) for name in ("x", "grad_output"))
    if not x.numel():
        return [0.0, 0.0]
    own_variance, own_mean = torch.var_mean(x, (0, 2), correction=0)
    given = inputs.get("mean") is not None
    mean, variance = (inputs["mean"], inputs["variance"]) if given else (own_mean, own_variance)
    distance = (x - mean[:, None]).abs() + own_variance.sqrt()[:, None]
    roundings = x.numel() // channels + 20
    products = (size.abs() * distance).sum(2) * (variance + inputs["eps"]).rsqrt()
    return [2 * roundings * u * products, roundings * u * size.abs().sum(2)]


_NORMS = {
    "images": _Norm((7, 5, 5, 7)),
    "channels last": _Norm((5, 37, 3, 3), last=True),
    "short runs": _Norm((9, 21, 2, 3)),
    "given statistics": _Norm((9, 37), given=True),
    "vectors": _Norm((9, 37)),
    "long runs": _Norm((2, 3, 1030)),
    "long runs, channels last": _Norm((2, 5, 70), last=True),
}


def _samples() -> Iterator[Sample]:
    for name, norm in _NORMS.items():
        yield Sample("batch_norm_gradients", name, SUM_DTYPES, norm.inputs, _tolerance)
    for name, inputs, dtypes in (
        ("two dtypes", _two_dtypes, (torch.float32,)),
        ("in two orders", _apart, SUM_DTYPES),
        ("nothing", _Norm((3, 4, 0)).inputs, SUM_DTYPES),
    ):
        yield Sample("batch_norm_gradients", name, dtypes, inputs, _tolerance)


SAMPLES = tuple(_samples())
