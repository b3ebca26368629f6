"""The geometry of a convolution, as the ops that read the input of one take it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def per_dimension(value: int | Sequence[int], spatial: int) -> tuple[int, ...]:
    return (value,) * spatial if isinstance(value, int) else tuple(value)


def padding_pairs(padding: int | Sequence[int] | Sequence[tuple[int, int]], spatial: int) -> tuple[int, ...]:
    """Padding as (before, after) of each spatial dimension, flattened."""
    if isinstance(padding, int):
        return (padding,) * (2 * spatial)
    return tuple(p for pair in padding for p in ((pair, pair) if isinstance(pair, int) else pair))


def windows(
    op: str,
    shape: Sequence[int],
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> list[int]:
    """Number of windows along each spatial dimension of x, after checking every argument."""
    spatial = len(shape) - 2
    arguments = (("kernel_size", kernel, 1, 1), ("stride", stride, 1, 1), ("dilation", dilation, 1, 1))
    for name, values, least, per in (*arguments, ("padding", padding, 0, 2)):
        if not (len(values) == per * spatial and all(v >= least for v in values)):
            raise ValueError(
                f"{op}: {name} is {list(values)}, expected {per * spatial} integers of at least {least} "
                f"for x of shape {tuple(shape)}"
            )
    sizes = []
    for d in range(spatial):
        padded = shape[2 + d] + padding[2 * d] + padding[2 * d + 1]
        extent = dilation[d] * (kernel[d] - 1) + 1
        if not padded >= extent:
            raise ValueError(
                f"{op}: x of shape {tuple(shape)} is {padded} long after padding in spatial dimension {d}, expected "
                f"at least {extent}, the extent of kernel_size {kernel[d]} with dilation {dilation[d]}"
            )
        sizes.append((padded - extent) // stride[d] + 1)
    return sizes


def pad(x: Tensor, padding: Sequence[int]) -> Tensor:
    """Zeros around x (N, C, *S), padding being (before, after) of each spatial dimension, flattened."""
    return torch.nn.functional.pad(x, [p for d in reversed(range(x.dim() - 2)) for p in padding[2 * d : 2 * d + 2]])
