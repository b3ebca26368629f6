"""Stochastic rounding: a read of 4 and a write of 2 bytes a number, as rounding to nearest has.

Beside that, the random integer of a number is a hash of eight operations, and rounding takes as many.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from bench.interleaved import Case, RunCase
from bench.limits import stream_add
from fisher_kernels.ops import stochastic_round


def eager(x: Tensor) -> Tensor:
    """As it is usually written: 16 random bits are added, and what is below bfloat16 is cut off."""
    random = torch.randint(1 << 16, x.shape, dtype=torch.int32)
    return random.add_(x.view(torch.int32)).bitwise_and_(-(1 << 16)).view(torch.float32).to(torch.bfloat16)


PLACES: dict[str, dict[str, Any]] = {
    "4096 x 4096": {},
    "512 x 512": {},
    "8192 x 2048, half of the columns": {"offset": 2048, "run": 2048, "pitch": 4096},
}


@pytest.mark.parametrize("shape", PLACES)
def test_stochastic_round(run_case: RunCase, shape: str) -> None:
    rows, columns = (int(word) for word in shape.partition(",")[0].split(" x "))
    x = torch.randn(rows, columns)
    written, read = torch.zeros(x.numel() // 2), torch.ones(x.numel() // 2)
    run_case(
        Case(
            op="stochastic_round",
            shape=shape,
            dtype=torch.float32,
            ours=lambda: stochastic_round(x, step=1, **PLACES[shape]),
            baselines={
                "x.to(bfloat16), to nearest": lambda: x.to(torch.bfloat16),
                "randint, add, cut off": lambda: eager(x),
            },
            bytes_moved=6 * x.numel(),
            limit=lambda: stream_add([written], [read]),
        )
    )
