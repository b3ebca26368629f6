"""Samples of conv_gram_."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

from torch import Tensor

from fisher_kernels import backends, ops
from fisher_kernels.ops._convolution import padding_pairs, per_dimension, windows
from fisher_kernels.tools.samples.sample import SUM_DTYPES, Inputs, Sample, Source, Tolerance, last


class Patches(NamedTuple):
    """The input of a convolution and its geometry."""

    shape: tuple[int, ...]
    kernel_size: int | Sequence[int]
    stride: int | Sequence[int] = 1
    padding: int | Sequence[int] | Sequence[tuple[int, int]] = 0
    dilation: int | Sequence[int] = 1
    groups: int = 1
    bias: bool = False

    @property
    def geometry(self) -> tuple[Any, ...]:
        """The arguments after the tensors."""
        return self[1:]

    def windows(self) -> int:
        """Windows of all samples."""
        spatial = len(self.shape) - 2
        kernel, stride, dilation = (per_dimension(v, spatial) for v in (self.kernel_size, self.stride, self.dilation))
        padding = padding_pairs(self.padding, spatial)
        return self.shape[0] * math.prod(windows("conv_gram_", self.shape, kernel, stride, padding, dilation))

    def out_shape(self) -> tuple[int, int, int]:
        n = math.prod(per_dimension(self.kernel_size, len(self.shape) - 2))
        columns = self.shape[1] // self.groups * n + self.bias
        return self.groups, columns, columns


def _inputs(patches: Patches, decay: float, channels_last: bool, source: Source) -> Inputs:
    x = source.normal(*patches.shape, seed=1)
    return {
        "out": source.uniform(*patches.out_shape()),
        "x": last(x) if channels_last else x,
        **dict(zip(Patches._fields[1:], patches.geometry, strict=True)),
        "decay": decay,
        "gain": 0.1,
    }


def _tolerance(patches: Patches, inputs: Inputs, expected: list[Tensor], u: float) -> list[Tolerance]:
    """Each entry is a sum of as many products as there are windows; their magnitudes stand for their sum."""
    magnitudes: Inputs = {name: x.abs() if isinstance(x, Tensor) else x for name, x in inputs.items()}
    with backends.use_backend("reference"):
        ops.conv_gram_(**magnitudes)
    return [(patches.windows() + 5) * u * magnitudes["out"]]


# Decay, and whether channels lie side by side. Few channels are unfolded on the CPU, many shifted.
_PATCHES = {
    "few channels with a bias": (Patches((3, 2, 7, 6), 3, padding=1, bias=True), 0.0, False),
    "average of many channels": (Patches((3, 19, 7, 6), 3, padding=1, bias=True), 0.9, False),
    "channels last": (Patches((2, 12, 6, 5), (2, 3), bias=True), 0.0, True),
    "strides and dilation": (Patches((2, 9, 11, 12), 3, (2, 3), ((1, 1), (2, 0)), (3, 2)), 0.9, False),
    "groups": (Patches((2, 6, 5, 5), 3, padding=1, groups=3, bias=True), 0.9, False),
    "groups of many channels": (Patches((2, 24, 4, 5), (2, 1), groups=2), 0.0, False),
    "one dimension": (Patches((5, 2, 9), 3, 2, [(1, 0)], bias=True), 0.0, False),
    "three dimensions": (Patches((2, 10, 3, 4, 3), (1, 2, 2), padding=1), 0.0, False),
    "many columns": (Patches((2, 34, 3, 3), 3, padding=1), 0.0, False),
    "several shares": (Patches((5, 1, 20, 15), 2), 0.0, False),
    "no samples": (Patches((0, 3, 4), 2, bias=True), 0.9, False),
}


def _samples() -> Iterator[Sample]:
    for name, (patches, decay, channels_last) in _PATCHES.items():
        inputs = partial(_inputs, patches, decay, channels_last)
        yield Sample("conv_gram_", name, SUM_DTYPES, inputs, partial(_tolerance, patches))


SAMPLES = tuple(_samples())
