"""Sums of outer products of many small vectors: the blocks of a mini-block Fisher matrix."""

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

# mini_block_gram_


def _fake(out: Tensor, v: Tensor, decay: float, gain: float) -> None:
    op = "mini_block_gram_"
    check_floating(op, "v", v.dtype)
    if v.dim() != 3:
        raise ValueError(f"{op}: v has shape {tuple(v.shape)}, expected 3 dimensions")
    blocks, n = v.shape[1:]
    if out.dtype != ACCUMULATOR[v.dtype]:
        raise TypeError(f"{op}: out has dtype {out.dtype}, expected {ACCUMULATOR[v.dtype]} for v of {v.dtype}")
    if tuple(out.shape) != (blocks, n, n):
        raise ValueError(
            f"{op}: out has shape {tuple(out.shape)}, expected {(blocks, n, n)} for v of shape {tuple(v.shape)}"
        )
    if not out.is_contiguous():
        raise ValueError(f"{op}: out is not contiguous: shape {tuple(out.shape)}, strides {out.stride()}")
    if v.device != out.device:
        raise ValueError(f"{op}: v is on {v.device}, expected {out.device}, the device of out")
    check_coefficient(op, "decay", decay)
    check_coefficient(op, "gain", gain)


def _reference(out: Tensor, v: Tensor, decay: float, gain: float) -> None:
    _fake(out, v, decay, gain)
    wide = v.to(out.dtype)
    average_lower(out, torch.einsum("nbi,nbj->bij", wide, wide), decay, gain)


def _native(on: Native, out: Tensor, v: Tensor, decay: float, gain: float) -> None:
    if v.dim() == 3 and v.stride()[1:] != (v.shape[2], 1):
        v = v.contiguous()
    on.kernels.mini_block_gram_(out, v, decay, gain, on.place(v.device))
    increment_version([out])


def _triton(out: Tensor, v: Tensor, decay: float, gain: float) -> None:
    from fisher_kernels.triton_kernels import mini_block_gram

    _fake(out, v, decay, gain)
    if v.stride()[1:] != (v.shape[2], 1):
        v = v.contiguous()
    mini_block_gram.gram(out, v, decay, gain)
    increment_version([out])


_mini_block_gram = define(
    "mini_block_gram_(Tensor(a!) out, Tensor v, float decay, float gain) -> ()",
    fake=_fake,
    reference=_reference,
    native=_native,
    triton=_triton,
)


def mini_block_gram_(out: Tensor, v: Tensor, decay: float = 0.0, gain: float = 1.0) -> None:
    r"""Sum of outer products, block by block, in place.

    .. math:: \mathrm{out}_b \leftarrow \mathrm{decay} \cdot \mathrm{out}_b + \mathrm{gain} \sum_n v_{nb}\, v_{nb}^T

    With per-sample gradients v, and a ``gain`` that is 1 / N times the weight of a moving average, these are the blocks
    of a mini-block Fisher matrix (MBF, arXiv 2202.04124). The result is symmetric to the bit.

    Args:
        out: (B, n, n), contiguous, float64 for float64 v and float32 for everything else; shares no memory with v.
            Its lower triangles are read, and nothing of it if decay is 0.
        v: (N, B, n), any strides; float32, float64, bfloat16 or float16. Where a sample is not contiguous, v is
            copied first.
        decay, gain: finite and at least 0.

    Raises:
        TypeError, ValueError: an argument has the wrong dtype, shape, strides, device or range; the message names it,
            and nothing has changed.
    """
    _mini_block_gram(out, v, decay, gain)


# conv_mini_block_gram_

_PATCHES = 2**20  # numbers of unfolded patches and gradients that the reference makes at a time, at least a sample's


class _Convolution(NamedTuple):
    """The arguments of a call, in the order of the schema."""

    out: Tensor
    x: Tensor
    grad_output: Tensor
    kernel_size: Sequence[int]
    stride: Sequence[int]
    padding: Sequence[int]  # (before, after) of each spatial dimension
    dilation: Sequence[int]
    groups: int
    decay: float
    gain: float

    def check_inputs(self) -> None:
        op, x, groups = "conv_mini_block_gram_", self.x, self.groups
        check_floating(op, "x", x.dtype)
        if not 3 <= x.dim() <= 5:
            raise ValueError(f"{op}: x has shape {tuple(x.shape)}, expected 3 to 5 dimensions")
        if self.grad_output.dtype != x.dtype:
            raise TypeError(f"{op}: grad_output has dtype {self.grad_output.dtype}, expected {x.dtype}")
        shape = tuple(self.grad_output.shape)
        if len(shape) != x.dim():
            raise ValueError(f"{op}: grad_output has shape {shape}, expected {x.dim()} dimensions")
        if shape[0] != x.shape[0]:
            raise ValueError(
                f"{op}: grad_output has shape {shape}, expected the {x.shape[0]} samples of x of shape {tuple(x.shape)}"
            )
        if groups < 1 or x.shape[1] % groups or shape[1] % groups:
            raise ValueError(
                f"{op}: groups is {groups}, expected a divisor of the {x.shape[1]} channels of x and the {shape[1]} of "
                f"grad_output"
            )
        for d, most in enumerate(windows(op, x.shape, self.kernel_size, self.stride, self.padding, self.dilation)):
            if not shape[2 + d] <= most:
                raise ValueError(
                    f"{op}: grad_output has shape {shape}, expected at most {most} positions in spatial dimension {d}, "
                    f"the windows of x of shape {tuple(x.shape)}"
                )

    def check(self) -> None:
        self.check_inputs()
        op, out, x = "conv_mini_block_gram_", self.out, self.x
        n = math.prod(self.kernel_size)
        shape = (self.grad_output.shape[1], x.shape[1] // self.groups, n, n)
        if out.dtype != ACCUMULATOR[x.dtype]:
            raise TypeError(f"{op}: out has dtype {out.dtype}, expected {ACCUMULATOR[x.dtype]} for x of {x.dtype}")
        if tuple(out.shape) != shape:
            raise ValueError(f"{op}: out has shape {tuple(out.shape)}, expected {shape}")
        if not out.is_contiguous():
            raise ValueError(f"{op}: out is not contiguous: shape {tuple(out.shape)}, strides {out.stride()}")
        for name, tensor in (("x", x), ("grad_output", self.grad_output)):
            if tensor.device != out.device:
                raise ValueError(f"{op}: {name} is on {tensor.device}, expected {out.device}, the device of out")
        check_coefficient(op, "decay", self.decay)
        check_coefficient(op, "gain", self.gain)


def _conv_fake(c: _Convolution) -> None:
    c.check()


def _conv_reference(c: _Convolution) -> None:
    c.check()
    outputs, inputs, n = c.out.shape[:3]
    positions = math.prod(c.grad_output.shape[2:])
    sums = torch.zeros_like(c.out)
    samples = max(1, _PATCHES // max(1, n * inputs * (c.groups * positions + outputs)))
    for few_x, few_grads in zip(c.x.split(samples), c.grad_output.split(samples), strict=True):
        sizes = c.grad_output.shape[2:]
        patches = unfold(few_x.to(c.out.dtype), c.kernel_size, c.stride, c.padding, c.dilation, sizes)
        patches = patches.reshape(len(few_x), c.groups, inputs, positions, n)  # from [N, I, *L, *K]
        grads = few_grads.to(c.out.dtype).reshape(len(few_x), c.groups, outputs // c.groups, positions)
        gradients = torch.einsum("sgol,sgilk->sgoik", grads, patches).reshape(len(few_x), outputs, inputs, n)
        sums += torch.einsum("soij,soik->oijk", gradients, gradients)
    average_lower(c.out, sums, c.decay, c.gain)


def _conv_native(on: Native, c: _Convolution) -> None:
    x, grad_output = c.x, c.grad_output
    if x.dim() > 2 and grad_output.dim() > 2:
        x, grad_output = with_even_positions(x), with_even_positions(grad_output)
    on.kernels.conv_mini_block_gram_(c.out, x, grad_output, *c[3:], on.place(x.device))
    increment_version([c.out])


def _conv_triton(c: _Convolution) -> None:
    from fisher_kernels.triton_kernels import conv_mini_block_gram

    c.check()
    x, grad_output = with_even_positions(c.x), with_even_positions(c.grad_output)
    conv_mini_block_gram.conv_gram(c._replace(x=x, grad_output=grad_output))
    increment_version([c.out])


_conv_mini_block_gram = define(
    "conv_mini_block_gram_(Tensor(a!) out, Tensor x, Tensor grad_output, int[] kernel_size, int[] stride, "
    "int[] padding, int[] dilation, int groups, float decay, float gain) -> ()",
    arguments=_Convolution,
    fake=_conv_fake,
    reference=_conv_reference,
    native=_conv_native,
    triton=_conv_triton,
)


def conv_mini_block_gram_(
    out: Tensor,
    x: Tensor,
    grad_output: Tensor,
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] | Sequence[tuple[int, int]] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    decay: float = 0.0,
    gain: float = 1.0,
) -> None:
    r"""As :func:`mini_block_gram_`, for the per-sample gradients of a convolution's kernels, which it computes itself.

    With d the ``grad_output``, :math:`x^{\mathrm{pad}}` the padded input and i a channel of o's group:

    .. math::

        w_{s,o,i,k} &= \sum_l d_{s,o,l}\,
            x^{\mathrm{pad}}_{s,\, i,\, l \cdot \mathrm{stride} + k \cdot \mathrm{dilation}} \\
        \mathrm{out}_{o,i} &\leftarrow \mathrm{decay} \cdot \mathrm{out}_{o,i}
            + \mathrm{gain} \sum_s w_{s,o,i}\, w_{s,o,i}^T

    The result is symmetric to the bit. These are the blocks of a mini-block Fisher matrix (MBF, arXiv 2202.04124).

    The memory needed besides the arguments does not grow with the batch. The CPU kernel copies a few channels of up to
    16 samples (at least one sample), a few MB for each thread, and has sums of about 256 KB (at least a few blocks).
    The reference unfolds as many samples at a time as make 2^20 numbers, at least one. The Triton kernels use 32 MiB
    for gradients and sums (at least one block by 1024 samples), the CUDA kernels 32 MiB for gradients (at least one
    block by 16 samples).

    Args:
        out: (O, I / groups, n, n), n being the number of offsets of the kernel in row-major order; contiguous, float64
            for float64 x and float32 for everything else; shares no memory with the others. Its lower triangles are
            read, and nothing of it if decay is 0.
        x: input of the convolution, ``(N, I, *S)``, with one to three spatial dimensions; float32, float64, bfloat16 or
            float16. Samples that are contiguous or channels_last are read in place, others are copied first.
        grad_output: derivative of the loss by the output of the convolution, ``(N, O, *L)``, like x. L may be less than
            the number of windows of the padded x; the last ones then count for nothing.
        kernel_size: one integer or one for each spatial dimension, at least 1. No number here may be more than
            2^31 - 1, nor may the number of offsets.
        stride: likewise, at least 1.
        padding: zeros around x: one integer, one for each spatial dimension, or a pair (before, after) for each.
        dilation: like stride.
        groups: divides I and O.
        decay, gain: finite and at least 0.

    Raises:
        TypeError, ValueError: an argument has the wrong dtype, shape, strides, device or range; the message names it,
            and nothing has changed.
    """
    op = "conv_mini_block_gram_"
    spatial = spatial_dimensions(op, x)
    c = _Convolution(
        out, x, grad_output,
        per_dimension(kernel_size, spatial, op, "kernel_size"), per_dimension(stride, spatial, op, "stride"),
        padding_pairs(padding, spatial, op), per_dimension(dilation, spatial, op, "dilation"),
        groups, decay, gain,
    )  # fmt: skip
    _conv_mini_block_gram(c)
