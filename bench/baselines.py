"""What the kernels are measured against: optimizers of torch, and the ops in eager PyTorch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def parameters(values: Sequence[Tensor], grads: Sequence[Tensor]) -> list[nn.Parameter]:
    """Parameters in the memory of these tensors, with these gradients."""
    params = [nn.Parameter(p) for p in values]
    for p, g in zip(params, grads, strict=True):
        p.grad = g
    return params


def adamw(params: Sequence[nn.Parameter], exp_avgs: Sequence[Tensor]) -> torch.optim.AdamW:
    """Fused AdamW with these first moments: on the same memory as what is measured."""
    optimizer = torch.optim.AdamW(params, lr=1e-3, fused=True)
    for p, m in zip(params, exp_avgs, strict=True):
        optimizer.state[p] = {
            "step": torch.zeros((), device=p.device),
            "exp_avg": m,
            "exp_avg_sq": torch.zeros_like(p),
        }
    return optimizer


def unfold_of_the_sum(x: Tensor, kernel: int, stride: int, padding: int) -> Tensor:
    """The best simple eager form: squares summed over samples, then unfolded."""
    squares = (x * x).sum(0, keepdim=True)
    return F.unfold(squares, kernel, padding=padding, stride=stride).sum((0, 2)).view(x.shape[1], kernel, kernel)


def rows_and_slices(x: Tensor, kernel: int, stride: int, padding: int) -> Tensor:
    """The best careful eager form: ``addcmul_`` sample by sample, then one slice for each offset."""
    squares = torch.zeros_like(x[0])
    for sample in x:
        squares.addcmul_(sample, sample)
    squares = F.pad(squares, (padding,) * 4)
    height, width = ((n - kernel) // stride + 1 for n in squares.shape[1:])
    out = x.new_empty(x.shape[1], kernel, kernel)
    for i in range(kernel):
        for j in range(kernel):
            window = squares[:, i : i + (height - 1) * stride + 1 : stride, j : j + (width - 1) * stride + 1 : stride]
            out[:, i, j] = window.sum((1, 2))
    return out


def unfold_of_x(x: Tensor, kernel: int, stride: int, padding: int) -> Tensor:
    """The textbook form: every patch written out."""
    return F.unfold(x, kernel, padding=padding, stride=stride).square().sum((0, 2)).view(x.shape[1], kernel, kernel)


def columns_of_patches(x: Tensor, kernel: int, stride: int, padding: int, bias: bool) -> Tensor:
    """The patches of a convolution's input, one a column, with a 1 at the end where there is a bias: [D, N * L]."""
    patches = F.unfold(x, kernel, padding=padding, stride=stride)  # [N, D, L]
    columns = patches.transpose(0, 1).flatten(1)
    return torch.cat([columns, columns.new_ones(1, columns.shape[1])]) if bias else columns


def outer_products_of_patches(x: Tensor, grad: Tensor, kernel: int, padding: int) -> Tensor:
    """``conv_mini_block_gram_`` by unfolding: per-sample gradients of a convolution, then their outer products."""
    patches = F.unfold(x, kernel, padding=padding)  # [N, I * n, L]
    gradients = torch.bmm(grad.flatten(2), patches.mT).view(len(x), -1, kernel**2)  # [N, O * I, n]
    return torch.einsum("nbi,nbj->bij", gradients, gradients)
