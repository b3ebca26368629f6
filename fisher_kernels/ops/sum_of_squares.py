"""Sums of squares over columns, channels and the windows of a convolution: the raw diagonal factors of a layer.

Sums of float32, bfloat16 and float16 come back in float32, of float64 in float64.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fisher_kernels._library import Native
from fisher_kernels.ops._convolution import pad, padding_pairs, per_dimension, spatial_dimensions, windows
from fisher_kernels.ops._define import ACCUMULATOR, check_floating, define


def _check(op: str, shape: torch.Size, dtype: torch.dtype, least: int, most: int = 64) -> None:
    """Check dtype and number of dimensions of x; 64 is as many as torch allows."""
    check_floating(op, "x", dtype)
    if not least <= len(shape) <= most:
        wanted = f"at least {least}" if most == 64 else f"{least} to {most}"
        raise ValueError(f"{op}: x has shape {tuple(shape)}, expected {wanted} dimensions")


def _new_sums(x: Tensor, shape: tuple[int, ...]) -> Tensor:
    wide = ACCUMULATOR[x.dtype]
    return x.new_empty(shape) if wide is x.dtype else x.new_empty(shape, dtype=wide)  # a dtype costs as much again


def _contiguous_or_channels_last(x: Tensor) -> Tensor:
    """Return x (N, C, *S) as it is if its memory is in order (N, C, *S) or (N, *S, C), else a contiguous copy."""
    return x if x.is_contiguous() or x.movedim(1, -1).is_contiguous() else x.contiguous()


def _rows(x: Tensor) -> Tensor:
    """Return x (..., D) as a matrix [R, D] with the columns of a row side by side, copied only if they are not."""
    if not x.is_contiguous():
        x = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
        if x.shape[1] > 1 and x.stride(1) != 1:
            x = x.contiguous()
    return x


# column_sum_of_squares


def _column_fake(x: Tensor) -> Tensor:
    _check("column_sum_of_squares", x.shape, x.dtype, 1)
    return _new_sums(x, (x.shape[-1],))


def _column_reference(x: Tensor) -> Tensor:
    _check("column_sum_of_squares", x.shape, x.dtype, 1)
    return _squares(x).reshape(-1, x.shape[-1]).sum(0) if x.numel() else _column_fake(x).zero_()


def _squares(x: Tensor) -> Tensor:
    return x.to(ACCUMULATOR[x.dtype]).square()


def _column_native(on: Native, x: Tensor) -> Tensor:
    out = _column_fake(x)
    on.kernels.column_sum_of_squares(_rows(x), out, on.place(x.device))
    return out


def _column_triton(x: Tensor) -> Tensor:
    from fisher_kernels.triton_kernels import sum_of_squares

    out = _column_fake(x)
    if x.numel() == 0:
        return out.zero_()
    x = _rows(x)
    columns = x.shape[-1]
    rows = x.numel() // columns
    return sum_of_squares.sum_columns(x, rows, columns, columns if x.is_contiguous() else x.stride(0), out)


_column = define(
    "column_sum_of_squares(Tensor x) -> Tensor",
    fake=_column_fake,
    reference=_column_reference,
    native=_column_native,
    triton=_column_triton,
)


def column_sum_of_squares(x: Tensor) -> Tensor:
    r"""Sum of squares of each column.

    .. math:: \mathrm{out}_d = \sum_r x_{rd}^2

    This is the diagonal of the Gram matrix ``x^T x``. Divided by the number of rows it is the diagonal Kronecker factor
    of a Linear layer (Martens and Grosse, arXiv 1503.05671; AdaFisher, arXiv 2405.16397, Eq. 3).

    Args:
        x: (..., D), any strides; float32, float64, bfloat16 or float16. Leading dimensions count as rows.

    Returns:
        (D,), float64 for float64 and float32 for everything else; zeros where there are no rows.

    Raises:
        TypeError: x has another dtype.
        ValueError: x has no dimension.
    """
    return _column(x)


# channel_sum_of_squares


def _channel_fake(x: Tensor) -> Tensor:
    _check("channel_sum_of_squares", x.shape, x.dtype, 2)
    return _new_sums(x, (x.shape[1],))


def _channel_reference(x: Tensor) -> Tensor:
    _check("channel_sum_of_squares", x.shape, x.dtype, 2)
    return _squares(x).sum((0, *range(2, x.dim())))


def _channel_native(on: Native, x: Tensor) -> Tensor:
    out = _channel_fake(x)
    on.kernels.channel_sum_of_squares(_contiguous_or_channels_last(x), out, on.place(x.device))
    return out


def _channel_triton(x: Tensor) -> Tensor:
    from fisher_kernels.triton_kernels import sum_of_squares

    out = _channel_fake(x)
    if x.numel() == 0:
        return out.zero_()
    x = _contiguous_or_channels_last(x)
    return sum_of_squares.sum_channels(x, not x.is_contiguous(), out)


_channel = define(
    "channel_sum_of_squares(Tensor x) -> Tensor",
    fake=_channel_fake,
    reference=_channel_reference,
    native=_channel_native,
    triton=_channel_triton,
)


def channel_sum_of_squares(x: Tensor) -> Tensor:
    r"""Sum of squares of each channel.

    .. math:: \mathrm{out}_c = \sum_{n,s} x_{ncs}^2

    Args:
        x: ``(N, C, *S)`` with any number of spatial dimensions; float32, float64, bfloat16 or float16. Contiguous and
            channels_last tensors are read in place, others are copied first.

    Returns:
        (C,), float64 for float64 and float32 for everything else; zeros where there are no samples or positions.

    Raises:
        TypeError: x has another dtype.
        ValueError: x has fewer than two dimensions.
    """
    return _channel(x)


# patch_sum_of_squares


def _patch_fake(
    x: Tensor, kernel_size: Sequence[int], stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]
) -> Tensor:
    _check("patch_sum_of_squares", x.shape, x.dtype, 3, 5)
    windows("patch_sum_of_squares", x.shape, kernel_size, stride, padding, dilation)
    return _new_sums(x, (x.shape[1], *kernel_size))


# A layer asks with the same sizes at every step; the checks would cost more than the kernel on a small input.
@functools.lru_cache(maxsize=4096)
def _patch_shape(
    shape: torch.Size,
    dtype: torch.dtype,
    kernel: tuple[int, ...],
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    dilation: tuple[int, ...],
) -> tuple[int, ...]:
    """Shape of the result, after checking every argument."""
    _check("patch_sum_of_squares", shape, dtype, 3, 5)
    windows("patch_sum_of_squares", shape, kernel, stride, padding, dilation)
    return shape[1], *kernel


def _patch_reference(
    x: Tensor, kernel_size: Sequence[int], stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]
) -> Tensor:
    _check("patch_sum_of_squares", x.shape, x.dtype, 3, 5)
    sizes = windows("patch_sum_of_squares", x.shape, kernel_size, stride, padding, dilation)
    squares = pad(_squares(x), padding)
    sums = []
    for offset in itertools.product(*map(range, kernel_size)):
        read = squares
        for dim, (o, d, s, size) in enumerate(zip(offset, dilation, stride, sizes, strict=True), start=2):
            starts = torch.arange(size, device=x.device) * s + o * d
            read = read.index_select(dim, starts)
        sums.append(read.sum((0, *range(2, x.dim()))))  # over [N, *windows]
    return torch.stack(sums, dim=1).reshape(x.shape[1], *kernel_size)


def _patch_native(
    on: Native,
    x: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> Tensor:
    geometry = tuple(kernel_size), tuple(stride), tuple(padding), tuple(dilation)
    out = _new_sums(x, _patch_shape(x.shape, x.dtype, *geometry))
    on.kernels.patch_sum_of_squares(_contiguous_or_channels_last(x), out, *geometry, on.place(x.device))
    return out


def _patch_triton(
    x: Tensor, kernel_size: Sequence[int], stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]
) -> Tensor:
    from fisher_kernels.triton_kernels import sum_of_squares

    geometry = tuple(kernel_size), tuple(stride), tuple(padding), tuple(dilation)
    out = _new_sums(x, _patch_shape(x.shape, x.dtype, *geometry))
    if x.numel() == 0:
        return out.zero_()
    x = _contiguous_or_channels_last(x)
    outputs = windows("patch_sum_of_squares", x.shape, *geometry)
    return sum_of_squares.sum_patches(x, not x.is_contiguous(), *geometry, outputs, out)


_patch = define(
    "patch_sum_of_squares(Tensor x, int[] kernel_size, int[] stride, int[] padding, int[] dilation) -> Tensor",
    fake=_patch_fake,
    reference=_patch_reference,
    native=_patch_native,
    triton=_patch_triton,
)


def patch_sum_of_squares(
    x: Tensor,
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] | Sequence[tuple[int, int]] = 0,
    dilation: int | Sequence[int] = 1,
) -> Tensor:
    r"""Sum of squares that each offset of a sliding window reads, over all samples and windows.

    With :math:`x^{\mathrm{pad}}` the padded input:

    .. math::

        \mathrm{out}_{ck} = \sum_{n,l}
            \left( x^{\mathrm{pad}}_{n,\, c,\, l \cdot \mathrm{stride} + k \cdot \mathrm{dilation}} \right)^2

    This is the diagonal of the Gram matrix of the unfolded patches, which are never formed. Divided by the number of
    samples and windows it is the input factor of a convolution (Grosse and Martens, arXiv 1602.01407; AdaFisher, arXiv
    2405.16397).

    Args:
        x: ``(N, C, *S)`` with one to three spatial dimensions; float32, float64, bfloat16 or float16. Contiguous and
            channels_last tensors are read in place, others are copied first.
        kernel_size: one integer or one for each spatial dimension, at least 1. No number here may be more than
            2^31 - 1, nor may the number of offsets.
        stride: likewise, at least 1.
        padding: zeros around x: one integer, one for each spatial dimension, or a pair (before, after) for each.
        dilation: like stride.

    Returns:
        ``(C, *kernel_size)``, float64 for float64 and float32 for everything else.

    Raises:
        TypeError: x has another dtype.
        ValueError: a size is out of range, or the kernel is larger than the padded input.
    """
    op = "patch_sum_of_squares"
    spatial = spatial_dimensions(op, x)
    return _patch(
        x,
        per_dimension(kernel_size, spatial, op, "kernel_size"),
        per_dimension(stride, spatial, op, "stride"),
        padding_pairs(padding, spatial, op),
        per_dimension(dilation, spatial, op, "dilation"),
    )
