"""Sums of outer products of many small vectors: one read of the vectors, beside small blocks."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from bench.interleaved import Case, RunCase
from bench.limits import stream_read
from fisher_kernels.ops import mini_block_gram_


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
