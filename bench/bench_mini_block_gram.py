"""Sums of outer products of many small vectors. Given ones are read once; those of a convolution take a convolution's
worth of arithmetic."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from bench.baselines import outer_products_of_patches
from bench.interleaved import Case, RunCase
from bench.limits import stream_read
from fisher_kernels.ops import conv_mini_block_gram_, mini_block_gram_


@pytest.mark.parametrize(
    ("samples", "blocks", "n", "dtype", "gate"),
    [
        (128, 4096, 9, torch.float32, 12.0),
        (128, 4096, 9, torch.bfloat16, None),
        (64, 1024, 25, torch.float32, None),
        (64, 512, 49, torch.float32, None),
    ],
)
def test_mini_block_gram(
    run_case: RunCase, samples: int, blocks: int, n: int, dtype: torch.dtype, gate: float | None
) -> None:
    v, out = torch.randn(samples, blocks, n).to(dtype), torch.empty(blocks, n, n)

    def einsum() -> Tensor:
        return torch.einsum("nbi,nbj->bij", v, v)

    mini_block_gram_(out, v)
    if dtype == torch.float32:
        torch.testing.assert_close(out, einsum(), rtol=1e-4, atol=1e-3)
    run_case(
        Case(
            op="mini_block_gram_",
            shape=f"{samples} x {blocks} x {n}",
            dtype=dtype,
            ours=lambda: mini_block_gram_(out, v),
            baselines={"einsum": einsum},
            gates={} if gate is None else {"einsum": gate},
            bytes_moved=v.nbytes + out.nbytes,
            limit=lambda: stream_read(v),
        )
    )


@pytest.mark.parametrize(
    ("samples", "inputs", "outputs", "size", "kernel_size", "gate"),
    [
        (128, 64, 64, 16, 3, 3.0),
        (64, 1, 32, 8, 3, None),
        (64, 32, 64, 8, 3, None),
        (64, 64, 64, 4, 3, None),
        (32, 3, 64, 32, 5, None),
        (64, 64, 64, 16, 1, None),
    ],
)
def test_conv_mini_block_gram(
    run_case: RunCase, samples: int, inputs: int, outputs: int, size: int, kernel_size: int, gate: float | None
) -> None:
    """The limit is a matrix product of as many operations, so the fraction of the limit is one of its speed."""
    n, positions, padding = kernel_size**2, size**2, kernel_size // 2
    x, grad = torch.randn(samples, inputs, size, size), torch.randn(samples, outputs, size, size)
    out = torch.empty(outputs, inputs, n, n)

    def unfolded() -> Tensor:
        return outer_products_of_patches(x, grad, kernel_size, padding)

    def ours() -> None:
        conv_mini_block_gram_(out, x, grad, kernel_size, padding=padding)

    operations = samples * outputs * inputs * n * (positions + (n + 1) / 2)
    left, right = torch.randn(512, 512), torch.randn(512, round(operations / 512**2))
    ours()
    expected = unfolded().view_as(out)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5 * float(expected.max()))
    run_case(
        Case(
            op="conv_mini_block_gram_",
            shape=f"{samples} x {inputs} to {outputs} x {size} x {size}, kernel {kernel_size}",
            dtype=torch.float32,
            ours=ours,
            baselines={"unfold, bmm, einsum": unfolded},
            gates={} if gate is None else {"unfold, bmm, einsum": gate},
            bytes_moved=x.nbytes + grad.nbytes + out.nbytes,
            limit=lambda: left @ right,
        )
    )
