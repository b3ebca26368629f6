"""Samples of mini_block_gram_ and conv_mini_block_gram_."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fisher_kernels import backends, ops
from fisher_kernels.ops._convolution import padding_pairs, per_dimension
from fisher_kernels.tools.samples.sample import SUM_DTYPES, Inputs, Sample, Source, Tolerance


class Convolution(NamedTuple):
    """The input of a convolution, its output channels and its geometry."""

    shape: tuple[int, ...]
    outputs: int
    kernel_size: int | Sequence[int]
    stride: int | Sequence[int] = 1
    padding: int | Sequence[int] | Sequence[tuple[int, int]] = 0
    dilation: int | Sequence[int] = 1
    groups: int = 1
    missing: int = 0
    """How many windows at the end of each dimension grad_output does not have."""

    @property
    def geometry(self) -> tuple[Any, ...]:
        """The arguments after the tensors."""
        return self.kernel_size, self.stride, self.padding, self.dilation, self.groups

    def windows(self) -> tuple[int, ...]:
        """Sizes of the output."""
        spatial = len(self.shape) - 2
        paddings = padding_pairs(self.padding, spatial)
        kernel, stride, dilation = (per_dimension(v, spatial) for v in (self.kernel_size, self.stride, self.dilation))
        return tuple(
            (size + paddings[2 * d] + paddings[2 * d + 1] - dilation[d] * (kernel[d] - 1) - 1) // stride[d] + 1
            for d, size in enumerate(self.shape[2:])
        )

    def grad_shape(self) -> tuple[int, ...]:
        return self.shape[0], self.outputs, *(max(0, size - self.missing) for size in self.windows())

    def out_shape(self) -> tuple[int, int, int, int]:
        n = math.prod(per_dimension(self.kernel_size, len(self.shape) - 2))
        return self.outputs, self.shape[1] // self.groups, n, n


# Each entry is a sum of as many products as there are samples, rounded as sums of squares are but for signs: the
# magnitudes of the products stand for their sum. Gradients of a convolution are sums over positions before that.


class _Blocks(NamedTuple):
    samples: int
    blocks: int
    n: int
    decay: float = 0.0
    strided: bool = False


def _inputs(blocks: _Blocks, source: Source) -> Inputs:
    samples, count, n, decay, strided = blocks
    v = source.normal(samples, count, 2 * n)[..., ::2] if strided else source.normal(samples, count, n)
    return {"out": source.uniform(count, n, n, seed=1), "v": v, "decay": decay, "gain": 0.1}


def _tolerance(inputs: Inputs, expected: list[Tensor], u: float) -> list[Tolerance]:
    v, old = inputs["v"].abs(), inputs["out"].abs()
    magnitude = inputs["gain"] * torch.einsum("nbi,nbj->bij", v, v)
    return [(len(v) + 4) * u * (magnitude + inputs["decay"] * (old.tril() + old.tril(-1).mT))]


def _convolution_inputs(convolution: Convolution, decay: float, source: Source) -> Inputs:
    names = ("kernel_size", "stride", "padding", "dilation", "groups")
    return {
        "out": source.uniform(*convolution.out_shape(), seed=1),
        "x": source.normal(*convolution.shape, seed=2),
        "grad_output": source.normal(*convolution.grad_shape(), seed=3),
        **dict(zip(names, convolution.geometry, strict=True)),
        "decay": decay,
        "gain": 0.1,
    }


def _convolution_tolerance(inputs: Inputs, expected: list[Tensor], u: float) -> list[Tolerance]:
    magnitudes: Inputs = {name: x.abs() if isinstance(x, Tensor) else x for name, x in inputs.items()}
    with backends.use_backend("reference"):
        ops.conv_mini_block_gram_(**magnitudes)
    samples, positions = len(inputs["x"]), inputs["grad_output"][0, 0].numel()
    return [(2 * (positions + 1) + samples + 4) * u * magnitudes["out"]]


_BLOCKS = {
    "3 x 3 kernels": _Blocks(65, 35, 9),
    "no samples": _Blocks(0, 3, 4, decay=0.9),
    **{f"one run of {n}": _Blocks(7, 5, n, decay=0.9) for n in (1, 5, 9, 12, 25, 40)},
    **{f"runs of {n}": _Blocks(33, 5, n) for n in (1, 5, 12, 25, 40)},
    "every other entry": _Blocks(4, 3, 2, strided=True),
}

_CONVOLUTIONS = {
    "many input channels": (Convolution((3, 35, 6, 6), 7, 3, padding=1), 0.0),
    "average of few input channels": (Convolution((9, 3, 6, 6), 37, 3, padding=1), 0.9),
    "channel by channel": (Convolution((3, 18, 6, 6), 18, 3, padding=1, groups=18), 0.0),
    "one input channel": (Convolution((3, 1, 6, 6), 7, 3, padding=1), 0.0),
    "one input channel, average of many output channels": (Convolution((3, 1, 6, 6), 37, 3, padding=1), 0.9),
    "one output channel": (Convolution((3, 5, 6, 6), 1, 3, padding=1), 0.0),
    "groups": (Convolution((2, 6, 5, 7), 4, (2, 2), groups=2), 0.9),
    "one dimension": (Convolution((5, 2, 8), 3, (3,), 2, [(1, 0)]), 0.9),
}


def _samples() -> Iterator[Sample]:
    for name, blocks in _BLOCKS.items():
        yield Sample("mini_block_gram_", name, SUM_DTYPES, partial(_inputs, blocks), _tolerance)
    for name, (convolution, decay) in _CONVOLUTIONS.items():
        inputs = partial(_convolution_inputs, convolution, decay)
        yield Sample("conv_mini_block_gram_", name, SUM_DTYPES, inputs, _convolution_tolerance)


SAMPLES = tuple(_samples())
