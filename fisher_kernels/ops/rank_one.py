"""Matrices that change by a few outer products: solutions with them, and updates of their inverses."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from fisher_kernels._library import Native, Place
from fisher_kernels.ops._blocks import check_blocks, check_partner, new_info
from fisher_kernels.ops._define import ACCUMULATOR, check_floating, define
from fisher_kernels.ops._step import check_lists

NOT_POSITIVE = 1
NOT_FINITE = 2
"""Why a block was left as it was."""

# rank_one_solve


def _check_rho(rho: float) -> None:
    if not 0 < rho < math.inf:
        raise ValueError(f"rank_one_solve: rho is {rho}, expected a finite number above 0")


def _check_solve(u: Sequence[Tensor], x: Sequence[Tensor], rho: float) -> None:
    op = "rank_one_solve"
    if len(x) != len(u):
        raise ValueError(f"{op}: x has {len(x)} tensors, expected {len(u)}, the length of u")
    _check_rho(rho)
    for i, (v, y) in enumerate(zip(u, x, strict=True)):
        check_floating(op, f"u[{i}]", v.dtype)
        if v.device != u[0].device:
            raise ValueError(f"{op}: u[{i}] is on {v.device}, expected {u[0].device}, the device of u[0]")
        check_partner(op, f"x[{i}]", y, v.shape, f"u[{i}]", v)


def _solve_fake(u: Sequence[Tensor], x: Sequence[Tensor], rho: float) -> list[Tensor]:
    _check_solve(u, x, rho)
    return [y.new_empty(y.shape) for y in x]


def _solve_reference(u: Sequence[Tensor], x: Sequence[Tensor], rho: float) -> list[Tensor]:
    out = _solve_fake(u, x, rho)
    if not u:
        return out
    square = torch.stack([v.double().square().sum() for v in u]).sum()
    product = torch.stack([(v.double() * y.double()).sum() for v, y in zip(u, x, strict=True)]).sum()
    along = product / (rho + square)
    for z, v, y in zip(out, u, x, strict=True):
        wide = ACCUMULATOR[v.dtype]
        z.copy_((y.to(wide) - along.to(wide) * v.to(wide)) / rho)
    return out


def _solve_native(on: Native, u: Sequence[Tensor], x: Sequence[Tensor], rho: float) -> list[Tensor]:
    u, x = [v.contiguous() for v in u], [y.contiguous() for y in x]
    out = [torch.empty_like(y) for y in x]
    on.kernels.rank_one_solve(u, x, rho, out, on.place(u[0].device if u else None))
    return out


def _solve_triton(u: Sequence[Tensor], x: Sequence[Tensor], rho: float) -> list[Tensor]:
    from fisher_kernels.triton_kernels import rank_one_solve

    def check() -> None:
        _check_solve(u, x, rho)

    if not u:
        check()
        return []
    _check_rho(rho)  # at every call; the lists where they are new
    return rank_one_solve.solve([v.contiguous() for v in u], [y.contiguous() for y in x], rho, check)


_rank_one_solve = define(
    "rank_one_solve(Tensor[] u, Tensor[] x, float rho) -> Tensor[]",
    fake=_solve_fake,
    reference=_solve_reference,
    native=_solve_native,
    triton=_solve_triton,
)


def rank_one_solve(u: Sequence[Tensor], x: Sequence[Tensor], rho: float) -> list[Tensor]:
    r"""Solution of a linear system with a damped outer product.

    .. math::

        (u u^T + \rho I)^{-1} x = \frac{1}{\rho} \left( x - \frac{u^T x}{\rho + u^T u}\, u \right)

    Each list stands for one long vector; how it is cut into tensors does not matter (Sherman and Morrison; SOFIM,
    arXiv 2403.02833, section 3).

    Args:
        u: any shapes and strides; float32, float64, bfloat16 or float16, tensor by tensor.
        x: of the shapes and dtypes of u.
        rho: finite and above 0.

    Returns:
        The solution in the shapes and dtypes of x, contiguous. NaN and infinities go where the formula takes them.

    Raises:
        TypeError, ValueError: an argument has the wrong dtype, shape, device, length or range; the message names it.
    """
    try:
        lists = list(u), list(x)
    except TypeError:
        check_lists("rank_one_solve", {"u": u, "x": x})
        raise
    return _rank_one_solve(*lists, rho)


# low_rank_inverse_update_ and rank_one_inverse_update_


def _check_coefficients(op: str, decay: float, gain: float) -> None:
    if not 0 < decay < math.inf:
        raise ValueError(f"{op}: decay is {decay}, expected a finite number above 0")
    if not math.isfinite(gain):
        raise ValueError(f"{op}: gain is {gain}, expected a finite number")


def _update(inverse: Tensor, u: Tensor, decay: float, gain: float) -> Tensor:
    """The definition: one vector after the other, the decay at the end; u is (B, k, n)."""
    info = new_info(inverse).zero_()
    if inverse.numel() == 0:
        return info
    unit = torch.finfo(inverse.dtype).eps / 2
    updated = inverse.clone(memory_format=torch.contiguous_format)
    before, now = (p.diagonal(dim1=1, dim2=2) for p in (inverse, updated))
    for x in u.unbind(1):
        v = (updated @ x[:, :, None])[..., 0]
        q = (x * v).sum(1).double()
        den = decay + gain * q
        noise = inverse.shape[-1] * unit * (x * (x * torch.maximum(before, now))).sum(1).double()
        lost = den <= abs(gain) * noise
        lost |= (decay * q < den * noise) & (abs(gain) * noise > unit**2 * decay)
        finite = den.isfinite() & noise.isfinite()
        info = torch.where(info != 0, info, torch.where(finite, torch.where(lost, NOT_POSITIVE, 0), NOT_FINITE))
        updated -= (gain / den).to(v.dtype)[:, None, None] * (v[:, :, None] * v[:, None, :])
    updated /= decay
    positive, finite = torch.minimum(before, now).amin(1) > 0, updated.isfinite().flatten(1).all(1)
    info = torch.where(info != 0, info, torch.where(finite, torch.where(positive, 0, NOT_POSITIVE), NOT_FINITE))
    inverse.copy_(torch.where(info[:, None, None] != 0, inverse, updated))
    return info


def _update_natively(
    kernel: Callable[..., None], place: Place, inverse: Tensor, u: Tensor, decay: float, gain: float
) -> Tensor:
    info, dense = new_info(inverse), inverse.contiguous()
    kernel(dense, u.contiguous(), decay, gain, info, place)
    if dense is inverse:
        increment_version(inverse)  # for backward passes that kept it
    else:
        inverse.copy_(dense)
    return info


def _update_on_triton(inverse: Tensor, u: Tensor, decay: float, gain: float) -> Tensor:
    from fisher_kernels.triton_kernels import rank_one

    dense, u = inverse.contiguous(), u.contiguous()
    if inverse.numel() == 0 or inverse.shape[-1] > rank_one.LARGEST:
        info = _update(dense, u, decay, gain)
    else:
        info = new_info(inverse)
        rank_one.update(dense, u, info, decay, gain)
    if dense is inverse:
        increment_version(inverse)
    else:
        inverse.copy_(dense)
    return info


def _low_rank_fake(inverse: Tensor, u: Tensor, decay: float = 1.0, gain: float = 1.0) -> Tensor:
    op = "low_rank_inverse_update_"
    check_blocks(op, "inverse", inverse)
    count, n = inverse.shape[:2]
    if not (u.dim() == 3 and u.shape[0] == count and u.shape[2] == n):
        raise ValueError(f"{op}: u has shape {tuple(u.shape)}, expected ({count}, k, {n})")
    check_partner(op, "u", u, u.shape, "inverse", inverse)
    _check_coefficients(op, decay, gain)
    return new_info(inverse)


def _low_rank_reference(inverse: Tensor, u: Tensor, decay: float = 1.0, gain: float = 1.0) -> Tensor:
    _low_rank_fake(inverse, u, decay, gain)
    return _update(inverse, u, decay, gain)


def _low_rank_native(on: Native, inverse: Tensor, u: Tensor, decay: float = 1.0, gain: float = 1.0) -> Tensor:
    if u.dim() == 3 and u.shape[1] == 0:
        u = u.new_zeros((u.shape[0], 1, u.shape[2]))  # the decay alone
    return _update_natively(on.kernels.low_rank_inverse_update_, on.place(inverse.device), inverse, u, decay, gain)


def _low_rank_triton(inverse: Tensor, u: Tensor, decay: float = 1.0, gain: float = 1.0) -> Tensor:
    _low_rank_fake(inverse, u, decay, gain)
    return _update_on_triton(inverse, u, decay, gain)


_low_rank = define(
    "low_rank_inverse_update_(Tensor(a!) inverse, Tensor u, float decay=1.0, float gain=1.0) -> Tensor",
    fake=_low_rank_fake,
    reference=_low_rank_reference,
    native=_low_rank_native,
    triton=_low_rank_triton,
)


def low_rank_inverse_update_(inverse: Tensor, u: Tensor, decay: float = 1.0, gain: float = 1.0) -> Tensor:
    r"""Update inverses for several outer products each, in place.

    Where ``inverse[b]`` is the inverse P of a symmetric positive definite A, and the k vectors are the rows of U, it
    becomes that of the new A (Woodbury):

    .. math::

        A &\leftarrow \mathrm{decay}\, A + \mathrm{gain}\, U^T U \\
        W &= U P \qquad S = \mathrm{decay}\, I + \mathrm{gain}\, U P U^T \\
        P &\leftarrow (P - \mathrm{gain}\, W^T S^{-1} W) / \mathrm{decay}

    Args:
        inverse: (B, n, n), symmetric positive definite, any strides; float32 or float64. It stays exactly symmetric.
        u: (B, k, n), any strides, with the dtype of inverse; it shares no memory with it. k = 0 leaves the decay alone.
        decay: finite and above 0.
        gain: finite, of either sign: a negative one takes vectors out again.

    Returns:
        ``info``, int64 (B,): 0 where the inverse was updated. Elsewhere it stays as it was, to the bit, because of the
        first fault that shows, vector by vector and then in the result:

        - 1: the result would not be positive definite as far as the precision can tell. Per vector, with
          ``q = u^T P u`` and ``den = decay + gain q``, P being what the vectors before it have left, and
          ``noise = n * unit roundoff * sum_i u_i^2 P_ii``, by which rounding the entries of P may change q: den is not
          above ``|gain| noise``, or what remains along u, ``q decay / den``, is below the noise (unless the whole
          update is below the rounding of P). Or the diagonal is not positive, before or after.
        - 2: an entry of P or u, a den, a noise or an entry of the result is not finite.

    Raises:
        TypeError, ValueError: an argument has the wrong dtype, shape, device or range; the message names it, and
            nothing is changed.
    """
    return _low_rank(inverse, u, decay, gain)


def _rank_one_fake(inverse: Tensor, u: Tensor, decay: float = 1.0, gain: float = 1.0) -> Tensor:
    op = "rank_one_inverse_update_"
    check_blocks(op, "inverse", inverse)
    check_partner(op, "u", u, inverse.shape[:2], "inverse", inverse)
    _check_coefficients(op, decay, gain)
    return new_info(inverse)


def _rank_one_reference(inverse: Tensor, u: Tensor, decay: float = 1.0, gain: float = 1.0) -> Tensor:
    _rank_one_fake(inverse, u, decay, gain)
    return _update(inverse, u[:, None], decay, gain)


def _rank_one_native(on: Native, inverse: Tensor, u: Tensor, decay: float = 1.0, gain: float = 1.0) -> Tensor:
    return _update_natively(on.kernels.rank_one_inverse_update_, on.place(inverse.device), inverse, u, decay, gain)


def _rank_one_triton(inverse: Tensor, u: Tensor, decay: float = 1.0, gain: float = 1.0) -> Tensor:
    _rank_one_fake(inverse, u, decay, gain)
    return _update_on_triton(inverse, u[:, None], decay, gain)


_rank_one = define(
    "rank_one_inverse_update_(Tensor(a!) inverse, Tensor u, float decay=1.0, float gain=1.0) -> Tensor",
    fake=_rank_one_fake,
    reference=_rank_one_reference,
    native=_rank_one_native,
    triton=_rank_one_triton,
)


def rank_one_inverse_update_(inverse: Tensor, u: Tensor, decay: float = 1.0, gain: float = 1.0) -> Tensor:
    r"""Update inverses for one outer product each, in place.

    Where ``inverse[b]`` is the inverse P of a symmetric positive definite A, it becomes that of the new A (Sherman and
    Morrison):

    .. math::

        A &\leftarrow \mathrm{decay}\, A + \mathrm{gain}\, u u^T \\
        v &= P u \\
        P &\leftarrow \frac{1}{\mathrm{decay}}
            \left( P - \frac{\mathrm{gain}}{\mathrm{decay} + \mathrm{gain}\, u^T v}\, v v^T \right)

    Args:
        inverse, decay, gain: as :func:`low_rank_inverse_update_`.
        u: (B, n), any strides, with the dtype of inverse; it shares no memory with it.

    Returns:
        ``info``, as :func:`low_rank_inverse_update_`.

    Raises:
        TypeError, ValueError: as :func:`low_rank_inverse_update_`; nothing is changed.
    """
    return _rank_one(inverse, u, decay, gain)
