"""Sums of outer products of many small vectors: the blocks of a mini-block Fisher matrix."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from fisher_kernels._library import native
from fisher_kernels.ops._define import ACCUMULATOR, check_coefficient, check_floating, define


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
    lower = gain * torch.einsum("nbi,nbj->bij", wide, wide).tril()
    if decay != 0:
        lower += decay * out.tril()
    out.copy_(lower + lower.tril(-1).mT)


def _cpu(out: Tensor, v: Tensor, decay: float, gain: float) -> None:
    if v.dim() == 3 and v.stride()[1:] != (v.shape[2], 1):
        v = v.contiguous()
    native().mini_block_gram_(out, v, decay, gain, torch.get_num_threads())
    increment_version([out])


_mini_block_gram = define(
    "mini_block_gram_(Tensor(a!) out, Tensor v, float decay, float gain) -> ()",
    fake=_fake,
    reference=_reference,
    cpu=_cpu,
)


def mini_block_gram_(out: Tensor, v: Tensor, decay: float = 0.0, gain: float = 1.0) -> None:
    """Sum of outer products, block by block, in place: ``out[b] <- decay * out[b] + gain * sum_n v[n, b] v[n, b]^T``.

    The blocks of a mini-block Fisher matrix (MBF, arXiv 2202.04124), v being per-sample gradients and ``gain`` the
    mean over samples times the weight of an average. The result is symmetric to the bit.

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
