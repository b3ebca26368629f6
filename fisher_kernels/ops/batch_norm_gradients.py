"""Per-sample gradients of the scale and shift of a batch normalisation."""

from __future__ import annotations

import torch
from torch import Tensor

from fisher_kernels._library import Native
from fisher_kernels.ops._define import ACCUMULATOR, check_coefficient, check_floating, define


def _fake(
    x: Tensor, grad_output: Tensor, eps: float, mean: Tensor | None = None, variance: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    op = "batch_norm_gradients"
    check_floating(op, "x", x.dtype)
    check_floating(op, "grad_output", grad_output.dtype)
    if x.dim() < 2:
        raise ValueError(f"{op}: x has shape {tuple(x.shape)}, expected at least 2 dimensions")
    if grad_output.shape != x.shape:
        raise ValueError(
            f"{op}: grad_output has shape {tuple(grad_output.shape)}, expected {tuple(x.shape)}, the shape of x"
        )
    check_coefficient(op, "eps", eps)
    if (mean is None) != (variance is None):
        given, wanted = ("None", "a tensor") if variance is None else ("a tensor", "None")
        raise ValueError(f"{op}: variance is {given}, expected {wanted}, as mean is")
    for name, vector in (("mean", mean), ("variance", variance)):
        if vector is not None:
            check_floating(op, name, vector.dtype)
            if tuple(vector.shape) != (x.shape[1],):
                raise ValueError(
                    f"{op}: {name} has shape {tuple(vector.shape)}, expected {(x.shape[1],)}, the channels of x"
                )
    for name, tensor in (("grad_output", grad_output), ("mean", mean), ("variance", variance)):
        if tensor is not None and tensor.device != x.device:
            raise ValueError(f"{op}: {name} is on {tensor.device}, expected {x.device}, the device of x")
    dtype = torch.promote_types(ACCUMULATOR[x.dtype], ACCUMULATOR[grad_output.dtype])
    scale, shift = (x.new_empty(x.shape[:2], dtype=dtype) for _ in range(2))
    return scale, shift


def _reference(
    x: Tensor, grad_output: Tensor, eps: float, mean: Tensor | None = None, variance: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    scale, shift = _fake(x, grad_output, eps, mean, variance)
    if x.numel() == 0:
        return scale.zero_(), shift.zero_()
    wide, grad = (v.to(scale.dtype).reshape(*x.shape[:2], -1) for v in (x, grad_output))
    if mean is None or variance is None:
        centred = wide - wide.mean((0, 2), keepdim=True)
        centred -= centred.mean((0, 2), keepdim=True)  # what rounding left of a large mean
        variance = centred.square().mean((0, 2))
    else:
        centred = wide - mean.to(scale.dtype).view(1, -1, 1)
    return (grad * centred).sum(2) * (variance.to(scale.dtype) + eps).rsqrt(), grad.sum(2)


def _is_contiguous(x: Tensor) -> bool:
    return x.is_contiguous() or x[:1].is_contiguous()


def _is_channels_last(x: Tensor) -> bool:
    return x[:1].movedim(1, -1).is_contiguous()


def _in_one_order(x: Tensor, grad_output: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Both of one dtype, with contiguous samples or with channels_last ones; copied only if they are not."""
    if x.dtype != grad_output.dtype:
        x, grad_output = x.to(dtype), grad_output.to(dtype)
    if not (_is_contiguous(x) and _is_contiguous(grad_output)):
        if _is_channels_last(x):  # the order of x, which is the larger where there is a difference
            if not _is_channels_last(grad_output):
                grad_output = grad_output.movedim(1, -1).contiguous().movedim(-1, 1)
        else:
            x, grad_output = x.contiguous(), grad_output.contiguous()
    return x, grad_output


def _statistics(
    mean: Tensor | None, variance: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor] | tuple[None, None]:
    if mean is None or variance is None:
        return None, None
    return mean.to(dtype).contiguous(), variance.to(dtype).contiguous()


def _native(
    on: Native, x: Tensor, grad_output: Tensor, eps: float, mean: Tensor | None = None, variance: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    scale, shift = _fake(x, grad_output, eps, mean, variance)
    if x.numel() == 0:
        return scale.zero_(), shift.zero_()
    x, grad_output = _in_one_order(x, grad_output, scale.dtype)
    mean, variance = _statistics(mean, variance, scale.dtype)
    on.kernels.batch_norm_gradients(x, grad_output, eps, mean, variance, scale, shift, on.place(x.device))
    return scale, shift


def _triton(
    x: Tensor, grad_output: Tensor, eps: float, mean: Tensor | None = None, variance: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    from fisher_kernels.triton_kernels import batch_norm_gradients

    scale, shift = _fake(x, grad_output, eps, mean, variance)
    if x.numel() == 0:
        return scale.zero_(), shift.zero_()
    x, grad_output = _in_one_order(x, grad_output, scale.dtype)
    mean, variance = _statistics(mean, variance, scale.dtype)
    channels_last = not (_is_contiguous(x) and _is_contiguous(grad_output))
    batch_norm_gradients.batch_norm_gradients(x, grad_output, channels_last, eps, mean, variance, scale, shift)
    return scale, shift


_batch_norm_gradients = define(
    "batch_norm_gradients(Tensor x, Tensor grad_output, float eps, Tensor? mean=None, Tensor? variance=None) "
    "-> (Tensor, Tensor)",
    fake=_fake,
    reference=_reference,
    native=_native,
    triton=_triton,
)


def batch_norm_gradients(
    x: Tensor, grad_output: Tensor, eps: float, mean: Tensor | None = None, variance: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    r"""Per-sample gradients of the scale and shift of a batch normalisation.

    With d the ``grad_output``:

    .. math::

        \mathrm{shift}_{nc} = \sum_s d_{ncs} \qquad
        \mathrm{scale}_{nc} = \sum_s d_{ncs}\,
            \frac{x_{ncs} - \mathrm{mean}_c}{\sqrt{\mathrm{variance}_c + \mathrm{eps}}}

    Summed over n, they are the gradients that autograd gives. The mini-block Fisher matrix of a normalisation (MBF,
    arXiv 2202.04124) is made of them.

    Args:
        x: the input of the normalisation, ``(N, C, *S)``, any strides; float32, float64, bfloat16 or float16. Where the
            samples of x and grad_output are contiguous, or those of both channels_last, they are read in place;
            otherwise one or both are copied first.
        grad_output: the derivative of the loss by the output, of the same shape; dtype as x, or another of the four.
        eps: finite and at least 0.
        mean, variance: (C,), what the normalisation used, read in the dtype of the result; or None for the mean and
            biased variance of x over N and S. Those are computed in two passes.

    Returns:
        scale and shift, both (N, C), float64 where x or grad_output is and float32 otherwise; zeros where S is empty.

    Raises:
        TypeError, ValueError: an argument has the wrong dtype, shape, device or range; the message names it.
    """
    return _batch_norm_gradients(x, grad_output, eps, mean, variance)
