"""The geometry of a convolution, as the ops that read the input of one take it."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

LARGEST = 2**31 - 1
"""The largest kernel size, stride, padding and dilation: with these the places of windows fit into 64 bits."""
MOST_WINDOWS = 2**40


def _whole(op: str, name: str, value: Any) -> int:
    """A whole number of any kind, one of numpy for example."""
    try:
        return operator.index(value)
    except TypeError:
        raise TypeError(
            f"{op}: {name} is or has a value of type {type(value).__name__}, expected an integer or a sequence of them"
        ) from None


def per_dimension(value: int | Sequence[int], spatial: int, op: str = "", name: str = "") -> tuple[int, ...]:
    """An argument of a convolution as one integer for each spatial dimension."""
    if isinstance(value, int):
        return (value,) * spatial
    if not isinstance(value, Iterable):
        return (_whole(op, name, value),) * spatial
    return tuple(v if isinstance(v, int) else _whole(op, name, v) for v in value)


def padding_pairs(
    padding: int | Sequence[int] | Sequence[tuple[int, int]], spatial: int, op: str = ""
) -> tuple[int, ...]:
    """Padding as (before, after) of each spatial dimension, flattened."""
    if isinstance(padding, int) or not isinstance(padding, Iterable):
        return per_dimension(padding, 2 * spatial, op, "padding")
    pairs = (pair if isinstance(pair, Iterable) else (pair, pair) for pair in padding)
    return tuple(p if isinstance(p, int) else _whole(op, "padding", p) for pair in pairs for p in pair)


def spatial_dimensions(op: str, x: Tensor) -> int:
    """How many x (N, C, *S) has."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{op}: x is of type {type(x).__name__}, expected a torch.Tensor")
    return x.dim() - 2


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
        if any(v > LARGEST for v in values):
            raise ValueError(f"{op}: {name} is {list(values)}, expected integers of at most {LARGEST}")
    if math.prod(kernel) > LARGEST:
        raise ValueError(f"{op}: kernel_size is {list(kernel)}, expected a product of at most {LARGEST}")
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
    if math.prod(sizes) > MOST_WINDOWS:
        raise ValueError(
            f"{op}: padding is {list(padding)}, expected at most 2^40 windows: they are {sizes} for x of shape "
            f"{tuple(shape)}"
        )
    return sizes


def pad(x: Tensor, padding: Sequence[int]) -> Tensor:
    """Zeros around x (N, C, *S), padding being (before, after) of each spatial dimension, flattened."""
    return torch.nn.functional.pad(x, [p for d in reversed(range(x.dim() - 2)) for p in padding[2 * d : 2 * d + 2]])


def unfold(
    x: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    sizes: Sequence[int],
) -> Tensor:
    """The first ``sizes`` windows of x (N, C, *S) along each dimension, as a view (N, C, *L, *K) of the padded x."""
    patches = pad(x, padding)
    for d, size in enumerate(sizes):
        extent = dilation[d] * (kernel[d] - 1) + 1
        patches = patches.unfold(2 + d, extent, stride[d]).narrow(2 + d, 0, size)[..., :: dilation[d]]
    return patches


def with_even_positions(x: Tensor) -> Tensor:
    """Return x (N, C, *S) as it is if each sample's memory is in order (C, *S) or (*S, C), else a contiguous copy."""
    sample = x[:1]
    return x if sample.is_contiguous() or sample.movedim(1, -1).is_contiguous() else x.contiguous()
