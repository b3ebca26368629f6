"""The weighted Gram matrix of the rows of a matrix: full Kronecker factors."""

from __future__ import annotations

from torch import Tensor
from torch.autograd.graph import increment_version

from fisher_kernels._library import Native
from fisher_kernels.ops._average import average_lower
from fisher_kernels.ops._define import ACCUMULATOR, check_coefficient, check_floating, define


def _fake(out: Tensor, x: Tensor, weight: Tensor | None, decay: float, gain: float) -> None:
    op = "weighted_gram_"
    check_floating(op, "x", x.dtype)
    if x.dim() != 2:
        raise ValueError(f"{op}: x has shape {tuple(x.shape)}, expected 2 dimensions")
    rows, columns = x.shape
    expected = {"out": (out, (columns, columns)), **({} if weight is None else {"weight": (weight, (rows,))})}
    for name, (tensor, shape) in expected.items():
        if tensor.dtype != ACCUMULATOR[x.dtype]:
            raise TypeError(
                f"{op}: {name} has dtype {tensor.dtype}, expected {ACCUMULATOR[x.dtype]} for x of {x.dtype}"
            )
        if tuple(tensor.shape) != shape:
            raise ValueError(
                f"{op}: {name} has shape {tuple(tensor.shape)}, expected {shape} for x of shape {tuple(x.shape)}"
            )
        if tensor.device != out.device:
            raise ValueError(f"{op}: {name} is on {tensor.device}, expected {out.device}, the device of out")
    if not out.is_contiguous():
        raise ValueError(f"{op}: out is not contiguous: shape {tuple(out.shape)}, strides {out.stride()}")
    if x.device != out.device:
        raise ValueError(f"{op}: x is on {x.device}, expected {out.device}, the device of out")
    check_coefficient(op, "decay", decay)
    check_coefficient(op, "gain", gain)


def _reference(out: Tensor, x: Tensor, weight: Tensor | None, decay: float, gain: float) -> None:
    _fake(out, x, weight, decay, gain)
    wide = x.to(out.dtype)
    weighted = wide if weight is None else wide * weight[:, None]
    average_lower(out, weighted.mT @ wide, decay, gain)


def _native(on: Native, out: Tensor, x: Tensor, weight: Tensor | None, decay: float, gain: float) -> None:
    if x.dim() == 2 and x.stride(1) != 1:
        x = x.contiguous()
    on.kernels.weighted_gram_(out, x, None if weight is None else weight.contiguous(), decay, gain, on.place(x.device))
    increment_version([out])


def _triton(out: Tensor, x: Tensor, weight: Tensor | None, decay: float, gain: float) -> None:
    from fisher_kernels.triton_kernels import gram

    _fake(out, x, weight, decay, gain)
    x = x if x.stride(1) == 1 else x.contiguous()
    gram.weighted_gram(out, x, None if weight is None else weight.contiguous(), decay, gain)
    increment_version([out])


_weighted_gram = define(
    "weighted_gram_(Tensor(a!) out, Tensor x, Tensor? weight, float decay, float gain) -> ()",
    fake=_fake,
    reference=_reference,
    native=_native,
    triton=_triton,
)


def weighted_gram_(out: Tensor, x: Tensor, weight: Tensor | None = None, decay: float = 0.0, gain: float = 1.0) -> None:
    r"""Weighted sum of the outer products of rows, in place.

    .. math:: \mathrm{out} \leftarrow \mathrm{decay} \cdot \mathrm{out} + \mathrm{gain} \sum_r w_r\, x_r\, x_r^T

    With ``gain = (1 - decay) / R`` the moving average of a Kronecker factor (Martens and Grosse, arXiv 1503.05671);
    with ``w[r] = |s_r|^2`` the shared block of a Linear layer (MBF, arXiv 2202.04124). The result is symmetric to the
    bit.

    Args:
        out: (D, D), contiguous, float64 for float64 x and float32 for everything else; shares no memory with the
            others. Its lower triangle is read, and nothing of it if decay is 0.
        x: (R, D), any strides; float32, float64, bfloat16 or float16. Where columns are not adjacent, x is copied
            first.
        weight: (R,), the dtype of out, of any sign; None for ones.
        decay, gain: finite and at least 0.

    Raises:
        TypeError, ValueError: an argument has the wrong dtype, shape, strides, device or range; the message names it,
            and nothing has changed.
    """
    _weighted_gram(out, x, weight, decay, gain)
