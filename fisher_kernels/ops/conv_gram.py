"""The Gram matrix of the unfolded patches of a convolution's input: its factor in K-FAC."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from fisher_kernels._library import Native
from fisher_kernels.ops._average import average_lower
from fisher_kernels.ops._convolution import (
    padding_pairs,
    per_dimension,
    spatial_dimensions,
    unfold,
    windows,
    with_even_positions,
)
from fisher_kernels.ops._define import ACCUMULATOR, check_coefficient, check_floating, define

_PATCHES = 2**20  # numbers of unfolded patches that the reference makes at a time, at least a sample's


class _Convolution(NamedTuple):
    """The arguments of a call, in the order of the schema."""

    out: Tensor
    x: Tensor
    kernel_size: Sequence[int]
    stride: Sequence[int]
    padding: Sequence[int]  # (before, after) of each spatial dimension
    dilation: Sequence[int]
    groups: int
    bias: bool
    decay: float
    gain: float

    def windows(self) -> list[int]:
        return windows("conv_gram_", self.x.shape, self.kernel_size, self.stride, self.padding, self.dilation)

    def check(self) -> None:
        op, out, x, groups = "conv_gram_", self.out, self.x, self.groups
        check_floating(op, "x", x.dtype)
        if not 3 <= x.dim() <= 5:
            raise ValueError(f"{op}: x has shape {tuple(x.shape)}, expected 3 to 5 dimensions")
        if groups < 1 or x.shape[1] % groups:
            raise ValueError(f"{op}: groups is {groups}, expected a divisor of the {x.shape[1]} channels of x")
        self.windows()
        columns = x.shape[1] // groups * math.prod(self.kernel_size) + bool(self.bias)
        shape = (groups, columns, columns)
        if out.dtype != ACCUMULATOR[x.dtype]:
            raise TypeError(f"{op}: out has dtype {out.dtype}, expected {ACCUMULATOR[x.dtype]} for x of {x.dtype}")
        if tuple(out.shape) != shape:
            raise ValueError(f"{op}: out has shape {tuple(out.shape)}, expected {shape}")
        if not out.is_contiguous():
            raise ValueError(f"{op}: out is not contiguous: shape {tuple(out.shape)}, strides {out.stride()}")
        if x.device != out.device:
            raise ValueError(f"{op}: x is on {x.device}, expected {out.device}, the device of out")
        check_coefficient(op, "decay", self.decay)
        check_coefficient(op, "gain", self.gain)


def _fake(c: _Convolution) -> None:
    c.check()


def _reference(c: _Convolution) -> None:
    c.check()
    sizes, n = c.windows(), math.prod(c.kernel_size)
    channels, positions = c.x.shape[1] // c.groups, math.prod(sizes)
    sums = torch.zeros_like(c.out)
    samples = max(1, _PATCHES // max(1, c.groups * channels * n * positions))
    for few in c.x.split(samples):
        patches = unfold(few.to(c.out.dtype), c.kernel_size, c.stride, c.padding, c.dilation, sizes)
        patches = patches.reshape(len(few), c.groups, channels, positions, n)  # from [N, C, *L, *K]
        rows = patches.permute(1, 0, 3, 2, 4).reshape(c.groups, len(few) * positions, channels * n)
        if c.bias:
            rows = torch.nn.functional.pad(rows, (0, 1), value=1.0)
        sums += rows.mT @ rows
    average_lower(c.out, sums, c.decay, c.gain)


def _native(on: Native, c: _Convolution) -> None:
    x = with_even_positions(c.x) if c.x.dim() > 2 else c.x
    on.kernels.conv_gram_(c.out, x, *c[2:], on.place(x.device))
    increment_version([c.out])


def _triton(c: _Convolution) -> None:
    from fisher_kernels.triton_kernels import conv_gram

    c.check()
    conv_gram.conv_gram(c._replace(x=with_even_positions(c.x)), c.windows())
    increment_version([c.out])


_conv_gram = define(
    "conv_gram_(Tensor(a!) out, Tensor x, int[] kernel_size, int[] stride, int[] padding, int[] dilation, int groups, "
    "bool bias, float decay, float gain) -> ()",
    arguments=_Convolution,
    fake=_fake,
    reference=_reference,
    native=_native,
    triton=_triton,
)


def conv_gram_(
    out: Tensor,
    x: Tensor,
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] | Sequence[tuple[int, int]] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    bias: bool = False,
    decay: float = 0.0,
    gain: float = 1.0,
) -> None:
    r"""Sum of the outer products of the patches that a convolution reads, in place; nothing is unfolded.

    With :math:`x^{\mathrm{pad}}` the padded input and i a channel of group g:

    .. math::

        h_{s,l,(i,k)} &= x^{\mathrm{pad}}_{s,\, i,\, l \cdot \mathrm{stride} + k \cdot \mathrm{dilation}} \\
        \mathrm{out}_g &\leftarrow \mathrm{decay} \cdot \mathrm{out}_g
            + \mathrm{gain} \sum_{s,l} h_{s,l}\, h_{s,l}^T

    over the samples s and the output positions l, with a 1 appended to h if there is a bias. With
    ``gain = (1 - decay) / N`` this is the moving average of the factor of a convolution's input in K-FAC (Grosse and
    Martens, arXiv 1602.01407, theorem 1). The result is symmetric to the bit.

    Args:
        out: (groups, D, D) with D = C / groups * n, one more with a bias; n is the number of offsets of the kernel.
            Entry i * n + k belongs to channel i of the group and offset k, as in ``weight.flatten(1)``, and the last
            to the bias. Contiguous, float64 for float64 x and float32 for everything else; shares no memory with x.
            Its lower triangles are read, and nothing of it if decay is 0.
        x: input of the convolution, ``(N, C, *S)``, with one to three spatial dimensions; float32, float64, bfloat16 or
            float16. Samples that are contiguous or channels_last are read in place, others are copied first.
        kernel_size: one integer or one for each spatial dimension, at least 1. No number here may be more than
            2^31 - 1, nor may the number of offsets.
        stride: likewise, at least 1.
        padding: zeros around x: one integer, one for each spatial dimension, or a pair (before, after) for each.
        dilation: like stride.
        groups: divides C.
        bias: whether a 1 is appended to h.
        decay, gain: finite and at least 0.

    Raises:
        TypeError, ValueError: an argument has the wrong dtype, shape, strides, device or range; the message names it,
            and nothing has changed.
    """
    op = "conv_gram_"
    spatial = spatial_dimensions(op, x)
    c = _Convolution(
        out, x,
        per_dimension(kernel_size, spatial, op, "kernel_size"), per_dimension(stride, spatial, op, "stride"),
        padding_pairs(padding, spatial, op), per_dimension(dilation, spatial, op, "dilation"),
        groups, bias, decay, gain,
    )  # fmt: skip
    _conv_gram(c)
