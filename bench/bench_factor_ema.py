"""Averages and normalisation of factors: the vectors are small, so the time of a call matters most."""

from __future__ import annotations

import torch
from torch import Tensor

from bench.interleaved import Case, RunCase
from fisher_kernels.ops import factor_ema_, minmax

LENGTHS = [64, 576, 128, 1152, 256, 2304, 512, 4608] * 12


def vectors() -> list[Tensor]:
    return [torch.rand(n) for n in LENGTHS]


def test_minmax(run_case: RunCase) -> None:
    x = vectors()

    def eager() -> list[Tensor]:
        return [(v - v.min()) / (v.max() - v.min() + 1e-6) for v in x]

    run_case(
        Case(
            op="minmax",
            shape=f"{len(x)} vectors, {sum(LENGTHS)} entries",
            dtype=torch.float32,
            ours=lambda: minmax(x),
            baselines={"eager, vector by vector": eager},
            repeat=10,
        )
    )


def test_factor_ema(run_case: RunCase) -> None:
    state, other, new = vectors(), vectors(), vectors()

    def eager() -> None:
        if all(bool(v.isfinite().all()) for v in new):
            torch._foreach_mul_(other, 0.8)
            torch._foreach_add_(other, new, alpha=0.2)

    run_case(
        Case(
            op="factor_ema_",
            shape=f"{len(state)} vectors, {sum(LENGTHS)} entries",
            dtype=torch.float32,
            ours=lambda: factor_ema_(state, new, 0.8, 0.2, joint=2),
            baselines={"eager, foreach with a finite check": eager},
            repeat=10,
        )
    )
