"""Bare passes over memory: what no kernel that moves the same bytes can beat on this machine, in this process."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fisher_kernels._library import CPU


def stream_update(writes: Sequence[Tensor], seconds: Sequence[Tensor], reads: Sequence[Tensor]) -> None:
    """Three reads and two writes of float32 in place, with one addition each: ``w += r, s += r``."""
    CPU.kernels.stream_update(list(writes), list(seconds), list(reads), torch.get_num_threads())


def stream_add(writes: Sequence[Tensor], reads: Sequence[Tensor]) -> None:
    """Two reads and one write of float32 in place: ``w += r``."""
    CPU.kernels.stream_update(list(writes), None, list(reads), torch.get_num_threads())


def stream_short(writes: Sequence[Tensor], shorts: Sequence[Tensor], reads: Sequence[Tensor]) -> None:
    """Three reads and two writes, of two lists of float32 and one of as many numbers in 16 bits, as wide as it is read.

    The numbers in 16 bits are half as many in float32, and go with the first half of the others.
    """
    pairs = [x.view(-1).view(torch.float32) for x in shorts]
    parts = [[x.view(-1).tensor_split([len(y)]) for x, y in zip(xs, pairs, strict=True)] for xs in (writes, reads)]
    (firsts, others), (reads_first, reads_other) = (zip(*xs, strict=True) for xs in parts)
    stream_update(firsts, pairs, reads_first)
    stream_add(others, reads_other)


def stream_read(x: Tensor) -> None:
    """One read of every byte of a contiguous tensor."""
    CPU.kernels.stream_read(x, torch.get_num_threads())
