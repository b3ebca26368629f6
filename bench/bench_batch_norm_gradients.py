"""Per-sample gradients of a batch normalisation; the limit is one read of its input and its output's derivative."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from bench.interleaved import Case, RunCase
from bench.limits import stream_read
from fisher_kernels.ops import batch_norm_gradients

EPS = 1e-5


@pytest.mark.parametrize(
    ("shape", "channels_last", "gate"),
    [
        ((64, 64, 8, 8), False, 2.5),
        ((64, 64, 8, 8), True, None),
        ((64, 64, 32, 32), False, None),
        ((64, 512, 2, 2), False, None),
        ((512, 512, 1, 1), False, None),
    ],
)
def test_batch_norm_gradients(
    run_case: RunCase, shape: tuple[int, ...], channels_last: bool, gate: float | None
) -> None:
    order = torch.channels_last if channels_last else torch.contiguous_format
    x, grad = (torch.randn(shape).to(memory_format=order) for _ in range(2))
    arrays = [v.permute(0, 2, 3, 1) if channels_last else v for v in (x, grad)]

    def eager() -> tuple[Tensor, Tensor]:
        variance, mean = torch.var_mean(x, (0, 2, 3), correction=0, keepdim=True)
        scale = (x - mean).mul_(grad).sum((2, 3)) * (variance[0, :, 0, 0] + EPS).rsqrt()
        return scale, grad.sum((2, 3))

    def limit() -> None:
        for v in arrays:
            stream_read(v)

    torch.testing.assert_close(batch_norm_gradients(x, grad, EPS), eager(), rtol=1e-4, atol=1e-3)
    name = "x".join(map(str, shape)).replace("x", " x ")
    run_case(
        Case(
            op="batch_norm_gradients",
            shape=name + (", channels_last" if channels_last else ""),
            dtype=torch.float32,
            ours=lambda: batch_norm_gradients(x, grad, EPS),
            baselines={"var_mean, products, sums": eager},
            gates={} if gate is None else {"var_mean, products, sums": gate},
            bytes_moved=x.nbytes + grad.nbytes + 2 * 4 * shape[0] * shape[1],
            limit=limit,
            repeat=5,
        )
    )
