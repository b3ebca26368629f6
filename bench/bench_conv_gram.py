"""The factor of a convolution's input: half of the matrix product of all patches, or less where they share products."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from bench.baselines import columns_of_patches
from bench.interleaved import Case, RunCase
from fisher_kernels.ops import conv_gram_, weighted_gram_

F32, BF16 = torch.float32, torch.bfloat16


@pytest.mark.parametrize(
    ("samples", "channels", "size", "kernel_size", "stride", "dtype"),
    [
        (128, 1, 28, 5, 1, F32),
        (128, 3, 32, 3, 1, F32),
        (128, 16, 16, 3, 1, F32),
        (128, 64, 16, 3, 1, F32),
        (128, 64, 16, 3, 1, BF16),
        (64, 256, 4, 3, 1, F32),
        (64, 64, 16, 3, 2, F32),
        (32, 32, 16, 5, 1, F32),
        (64, 256, 8, 1, 1, F32),
    ],
)
def test_conv_gram(
    run_case: RunCase, samples: int, channels: int, size: int, kernel_size: int, stride: int, dtype: torch.dtype
) -> None:
    """The limit is a matrix product of as many operations as the lower triangle of the definition takes."""
    padding = kernel_size // 2
    x = torch.randn(samples, channels, size, size).to(dtype)
    columns = channels * kernel_size**2 + 1
    out, other = torch.empty(1, columns, columns), torch.empty(columns, columns)

    def ours() -> None:
        conv_gram_(out, x, kernel_size, stride, padding, bias=True)

    def product() -> Tensor:
        h = columns_of_patches(x.float(), kernel_size, stride, padding, True)
        return h @ h.mT

    def unfolded() -> None:
        weighted_gram_(other, columns_of_patches(x, kernel_size, stride, padding, True).mT)

    rows = samples * ((size + 2 * padding - kernel_size) // stride + 1) ** 2
    operations = rows * columns * (columns + 1) / 2
    left, right = torch.randn(512, 512), torch.randn(512, round(operations / 512**2))
    ours()
    expected = product()
    torch.testing.assert_close(out[0], expected, rtol=1e-4, atol=1e-5 * float(expected.max()))
    run_case(
        Case(
            op="conv_gram_",
            shape=f"{samples} x {channels} x {size} x {size}, kernel {kernel_size}, stride {stride}",
            dtype=dtype,
            ours=ours,
            baselines={"unfold, matmul": product, "unfold, weighted_gram_": unfolded},
            bytes_moved=x.nbytes + out.nbytes,
            limit=lambda: left @ right,
        )
    )
