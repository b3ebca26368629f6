"""The weighted Gram matrix: half of a matrix product."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from bench.interleaved import Case, RunCase
from fisher_kernels.ops import weighted_gram_


@pytest.mark.parametrize(
    ("rows", "columns", "dtype", "gate"),
    [(1024, 1024, torch.float32, 1.7), (8192, 256, torch.float32, None), (1024, 1024, torch.float64, None)],
)
def test_weighted_gram(run_case: RunCase, rows: int, columns: int, dtype: torch.dtype, gate: float | None) -> None:
    x, weight = torch.randn(rows, columns, dtype=dtype), torch.rand(rows, dtype=dtype)
    out = torch.empty(columns, columns, dtype=dtype)

    def product() -> Tensor:
        return (x * weight[:, None]).T @ x

    weighted_gram_(out, x, weight)
    torch.testing.assert_close(out, product(), rtol=1e-4, atol=1e-2)
    run_case(
        Case(
            op="weighted_gram_",
            shape=f"{rows} x {columns}",
            dtype=dtype,
            ours=lambda: weighted_gram_(out, x, weight),
            baselines={"(x * w[:, None]).T @ x": product},
            gates={} if gate is None else {"(x * w[:, None]).T @ x": gate},
        )
    )
