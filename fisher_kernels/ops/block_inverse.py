"""Inverses of many small symmetric positive definite matrices, and products with them."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from fisher_kernels._library import CPU, Native
from fisher_kernels.ops._arguments import without_autocast
from fisher_kernels.ops._blocks import check_blocks, check_partner, new_info
from fisher_kernels.ops._define import define

LARGEST = 64
"""Blocks of up to this size are inverted and solved with many at a time.

Of larger ones the CPU kernel inverts one after the other. Solutions with them, and on a GPU their inverses, are left to
LAPACK or to the solvers of the GPU.
"""


def _check_damping(op: str, damping: float) -> None:
    if not 0 <= damping < math.inf:
        raise ValueError(f"{op}: damping is {damping}, expected a finite number of at least 0")


def _factor(blocks: Tensor, damping: float) -> tuple[Tensor, Tensor]:
    """Cholesky factors, the identity where there is none, and where that is."""
    identity = torch.eye(blocks.shape[-1], dtype=blocks.dtype, device=blocks.device)
    damped = blocks + damping * identity if damping else blocks
    bad = _not_finite(damped)
    factors, info = torch.linalg.cholesky_ex(_replaced(damped, bad, identity))
    bad |= info != 0
    return _replaced(factors, bad, identity), bad


def _not_finite(blocks: Tensor) -> Tensor:
    """Which matrices hold a NaN or an infinity."""
    # A sum that is finite has no other terms; one that overflows though none of them is infinite costs a second look.
    if blocks.is_cpu and bool(blocks.sum().isfinite()):
        return torch.zeros(len(blocks), dtype=torch.bool, device=blocks.device)
    return ~blocks.isfinite().flatten(1).all(1)


def _replaced(values: Tensor, bad: Tensor, others: Tensor) -> Tensor:
    """Others in the place of bad matrices; on the CPU, where that is known, nothing is copied if there are none."""
    if bad.is_cpu and not bool(bad.any()):
        return values
    return torch.where(bad[:, None, None], others, values)


def _invert(blocks: Tensor, damping: float) -> tuple[Tensor, Tensor]:
    """The inverses, and which of them are of no use."""
    if blocks.numel() == 0:
        return torch.empty_like(blocks, memory_format=torch.contiguous_format), new_info(blocks).zero_() != 0
    factors, bad = _factor(blocks, damping)
    inverse = torch.cholesky_inverse(factors)
    if inverse.is_cpu:  # LAPACK makes one triangle, of which torch makes the other
        inverse = inverse.mT
    else:
        lower = inverse.tril()
        inverse = lower + lower.tril(-1).mT
    return inverse.contiguous(), bad | _not_finite(inverse)


def _kernel_inverts(on: Native, blocks: Tensor) -> bool:
    return blocks.dim() == 3 and (on is CPU or blocks.shape[-1] <= LARGEST)


# block_inverse


def _fake(blocks: Tensor, damping: float) -> tuple[Tensor, Tensor]:
    check_blocks("block_inverse", "blocks", blocks)
    _check_damping("block_inverse", damping)
    return blocks.new_empty(blocks.shape), new_info(blocks)


@without_autocast  # native kernels leave large blocks to it
def _reference(blocks: Tensor, damping: float) -> tuple[Tensor, Tensor]:
    _fake(blocks, damping)
    inverse, bad = _invert(blocks, damping)
    return inverse.masked_fill_(bad[:, None, None], math.nan), bad.to(torch.int64)


def _native(on: Native, blocks: Tensor, damping: float) -> tuple[Tensor, Tensor]:
    if not _kernel_inverts(on, blocks):
        return _reference(blocks, damping)
    blocks = blocks.contiguous()
    inverse, info = torch.empty_like(blocks), new_info(blocks)
    on.kernels.block_inverse(blocks, damping, inverse, info, on.place(blocks.device))
    return inverse, info


def _triton(blocks: Tensor, damping: float) -> tuple[Tensor, Tensor]:
    from fisher_kernels.triton_kernels import block_inverse

    inverse, info = _fake(blocks, damping)
    if blocks.shape[-1] > LARGEST:
        return _reference(blocks, damping)
    block_inverse.inverse(blocks.contiguous(), damping, inverse, info)
    return inverse, info


_block_inverse = define(
    "block_inverse(Tensor blocks, float damping) -> (Tensor inverse, Tensor info)",
    fake=_fake,
    reference=_reference,
    native=_native,
    triton=_triton,
)


def block_inverse(blocks: Tensor, damping: float) -> tuple[Tensor, Tensor]:
    r"""Inverses of damped blocks.

    .. math:: \mathrm{out}_b = (\mathrm{blocks}_b + \mathrm{damping}\, I)^{-1}

    Args:
        blocks: (B, n, n), symmetric, any strides; float32 or float64. The lower triangle is what is inverted; both are
            looked at for NaN and infinities.
        damping: added to the diagonal, finite and at least 0.

    Returns:
        The inverses, (B, n, n), contiguous and exactly symmetric, and ``info``, int64 (B,): 0 for a good block, 1 for
        one that is not positive definite with its damping, that holds a NaN or an infinity, or whose inverse does. The
        inverse of such a block is NaN throughout, and the others do not depend on it.

    Raises:
        TypeError, ValueError: an argument has the wrong dtype, shape or range; the message names it.
    """
    return _block_inverse(blocks, damping)


# block_inverse_


def _into_fake(out: Tensor, blocks: Tensor, damping: float) -> Tensor:
    op = "block_inverse_"
    check_blocks(op, "blocks", blocks)
    _check_damping(op, damping)
    check_partner(op, "out", out, blocks.shape, "blocks", blocks)
    return new_info(blocks)


@without_autocast  # native kernels leave large blocks to it
def _into_reference(out: Tensor, blocks: Tensor, damping: float) -> Tensor:
    _into_fake(out, blocks, damping)
    inverse, bad = _invert(blocks, damping)
    out.copy_(_replaced(inverse, bad, out))
    return bad.to(torch.int64)


def _into_native(on: Native, out: Tensor, blocks: Tensor, damping: float) -> Tensor:
    if not _kernel_inverts(on, blocks):
        return _into_reference(out, blocks, damping)
    info, dense = new_info(blocks), out.contiguous()
    on.kernels.block_inverse_(dense, blocks.contiguous(), damping, info, on.place(blocks.device))
    if dense is out:
        increment_version(out)  # for backward passes that kept it
    else:
        out.copy_(dense)
    return info


def _into_triton(out: Tensor, blocks: Tensor, damping: float) -> Tensor:
    from fisher_kernels.triton_kernels import block_inverse

    info = _into_fake(out, blocks, damping)
    if blocks.shape[-1] > LARGEST:
        return _into_reference(out, blocks, damping)
    dense = out.contiguous()
    block_inverse.inverse_(dense, blocks.contiguous(), damping, info)
    if dense is out:
        increment_version(out)
    else:
        out.copy_(dense)
    return info


_into = define(
    "block_inverse_(Tensor(a!) out, Tensor blocks, float damping) -> Tensor",
    fake=_into_fake,
    reference=_into_reference,
    native=_into_native,
    triton=_into_triton,
)


def block_inverse_(out: Tensor, blocks: Tensor, damping: float) -> Tensor:
    r""":func:`block_inverse` into a tensor that exists already.

    .. math:: \mathrm{out}_b \leftarrow (\mathrm{blocks}_b + \mathrm{damping}\, I)^{-1}

    Args:
        out: (B, n, n), any strides, with the dtype of blocks; it shares no memory with blocks. Where ``info`` is 1 it
            stays as it was, to the bit: the last good inverse remains in use.
        blocks, damping: as :func:`block_inverse`.

    Returns:
        ``info``, as :func:`block_inverse`.

    Raises:
        TypeError, ValueError: as :func:`block_inverse`; nothing is changed.
    """
    return _into(out, blocks, damping)


# block_solve


def _solve_fake(blocks: Tensor, damping: float, rhs: Tensor) -> tuple[Tensor, Tensor]:
    op = "block_solve"
    check_blocks(op, "blocks", blocks)
    _check_damping(op, damping)
    check_partner(op, "rhs", rhs, blocks.shape[:2], "blocks", blocks)
    return rhs.new_empty(rhs.shape), new_info(blocks)


@without_autocast  # native kernels leave large blocks to it
def _solve_reference(blocks: Tensor, damping: float, rhs: Tensor) -> tuple[Tensor, Tensor]:
    x, info = _solve_fake(blocks, damping, rhs)
    if rhs.numel() == 0:
        return x, info.zero_()
    factors, bad = _factor(blocks, damping)
    x.copy_(torch.cholesky_solve(rhs.contiguous()[..., None], factors)[..., 0])
    bad |= ~x.isfinite().all(1)
    return x.masked_fill_(bad[:, None], math.nan), bad.to(torch.int64)


def _solve_native(on: Native, blocks: Tensor, damping: float, rhs: Tensor) -> tuple[Tensor, Tensor]:
    if blocks.dim() != 3 or blocks.shape[-1] > LARGEST:
        return _solve_reference(blocks, damping, rhs)
    rhs = rhs.contiguous()
    x, info = torch.empty_like(rhs), new_info(blocks)
    on.kernels.block_solve(blocks.contiguous(), damping, rhs, x, info, on.place(blocks.device))
    return x, info


def _solve_triton(blocks: Tensor, damping: float, rhs: Tensor) -> tuple[Tensor, Tensor]:
    from fisher_kernels.triton_kernels import block_inverse

    _, info = _solve_fake(blocks, damping, rhs)
    if blocks.shape[-1] > LARGEST:
        return _solve_reference(blocks, damping, rhs)
    rhs = rhs.contiguous()
    x = torch.empty_like(rhs)
    block_inverse.solve(blocks.contiguous(), damping, rhs, x, info)
    return x, info


_block_solve = define(
    "block_solve(Tensor blocks, float damping, Tensor rhs) -> (Tensor x, Tensor info)",
    fake=_solve_fake,
    reference=_solve_reference,
    native=_solve_native,
    triton=_solve_triton,
)


def block_solve(blocks: Tensor, damping: float, rhs: Tensor) -> tuple[Tensor, Tensor]:
    r"""Solutions of linear systems with damped blocks; no inverse is formed.

    .. math:: \mathrm{out}_b = (\mathrm{blocks}_b + \mathrm{damping}\, I)^{-1}\, \mathrm{rhs}_b

    Args:
        blocks, damping: as :func:`block_inverse`.
        rhs: (B, n), any strides, with the dtype of blocks.

    Returns:
        The solutions, (B, n), contiguous, and ``info`` as :func:`block_inverse`; 1 also where rhs or the solution is
        not finite. There the solution is NaN.

    Raises:
        TypeError, ValueError: as :func:`block_inverse`.
    """
    return _block_solve(blocks, damping, rhs)


# block_apply


def _apply_fake(inverse: Tensor, vectors: Tensor) -> Tensor:
    check_blocks("block_apply", "inverse", inverse)
    check_partner("block_apply", "vectors", vectors, inverse.shape[:2], "inverse", inverse)
    return vectors.new_empty(vectors.shape)


def _apply_reference(inverse: Tensor, vectors: Tensor) -> Tensor:
    return _apply_fake(inverse, vectors).copy_((inverse.contiguous() @ vectors.contiguous()[..., None])[..., 0])


def _apply_native(on: Native, inverse: Tensor, vectors: Tensor) -> Tensor:
    vectors = vectors.contiguous()
    out = torch.empty_like(vectors)
    on.kernels.block_apply(inverse.contiguous(), vectors, out, on.place(out.device))
    return out


def _apply_triton(inverse: Tensor, vectors: Tensor) -> Tensor:
    from fisher_kernels.triton_kernels import block_apply

    out = _apply_fake(inverse, vectors)
    block_apply.apply(inverse.contiguous(), vectors.contiguous(), out)
    return out


_block_apply = define(
    "block_apply(Tensor inverse, Tensor vectors) -> Tensor",
    fake=_apply_fake,
    reference=_apply_reference,
    native=_apply_native,
    triton=_apply_triton,
)


def block_apply(inverse: Tensor, vectors: Tensor) -> Tensor:
    r"""Products of matrices and vectors, one by one.

    .. math:: \mathrm{out}_b = \mathrm{inverse}_b\, \mathrm{vectors}_b

    Args:
        inverse: (B, n, n), any strides; float32 or float64. It need not be symmetric.
        vectors: (B, n), any strides, with the dtype of inverse.

    Returns:
        The products, (B, n), contiguous.

    Raises:
        TypeError, ValueError: an argument has the wrong dtype, shape or device; the message names it.
    """
    return _block_apply(inverse, vectors)
