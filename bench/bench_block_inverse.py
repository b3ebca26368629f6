"""Inverses of many small blocks, and of a few, where the time of the call matters most."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from bench.interleaved import Case, RunCase
from fisher_kernels.ops import block_apply, block_inverse, block_inverse_, block_solve

SHAPES = {9: 65_536, 25: 8_192, 49: 2_048}
"""Size -> number of blocks: 20 MB each."""

DAMPING = 0.1
GATES = {9: 20.0, 25: 16.0, 49: 16.0}

LARGE_GATES = {65: 2.0, 128: 2.5, 256: 2.0, 512: 1.5, 1024: 1.3}
"""Size of a single block -> the least ratio to LAPACK."""

each_shape = pytest.mark.parametrize(("n", "count"), SHAPES.items())


def blocks(count: int, n: int) -> Tensor:
    x = torch.randn(count, n, n + 2)
    return x @ x.mT / (n + 2)


def damped(a: Tensor) -> Tensor:
    return a + DAMPING * torch.eye(a.shape[-1])


@each_shape
def test_block_inverse(run_case: RunCase, n: int, count: int) -> None:
    a = blocks(count, n)
    ready = damped(a)
    run_case(
        Case(
            op="block_inverse",
            shape=f"{count} x {n} x {n}",
            dtype=torch.float32,
            ours=lambda: block_inverse(a, DAMPING),
            baselines={
                "cholesky_inverse(cholesky)": lambda: torch.cholesky_inverse(torch.linalg.cholesky(ready)),
                "linalg.inv": lambda: torch.linalg.inv(ready),
            },
            gates={"cholesky_inverse(cholesky)": GATES[n], "linalg.inv": 1.0},
            bytes_moved=2 * a.nbytes,
        )
    )


@each_shape
def test_block_inverse_in_place(run_case: RunCase, n: int, count: int) -> None:
    a = blocks(count, n)
    ready, out, copied = damped(a), torch.empty_like(a), torch.empty_like(a)
    run_case(
        Case(
            op="block_inverse_",
            shape=f"{count} x {n} x {n}",
            dtype=torch.float32,
            ours=lambda: block_inverse_(out, a, DAMPING),
            baselines={"cholesky_inverse(cholesky)": lambda: torch.cholesky_inverse(torch.linalg.cholesky(ready))},
            gates={"cholesky_inverse(cholesky)": GATES[n]},
            bytes_moved=2 * a.nbytes,
            limit=lambda: copied.copy_(a),
        )
    )


@pytest.mark.parametrize(("count", "least"), [(1, 1 / 1.1), (16, 1.0)])
@pytest.mark.parametrize("n", [1, 9, 25, 64])
def test_few_blocks(run_case: RunCase, n: int, count: int, least: float) -> None:
    a = blocks(count, n)
    ready = damped(a)
    run_case(
        Case(
            op="block_inverse",
            shape=f"{count} x {n} x {n}",
            dtype=torch.float32,
            ours=lambda: block_inverse(a, DAMPING),
            baselines={"linalg.inv": lambda: torch.linalg.inv(ready)},
            gates={"linalg.inv": least},
            repeat=20,
        )
    )


@pytest.mark.parametrize(("n", "least"), LARGE_GATES.items())
def test_large_blocks(run_case: RunCase, n: int, least: float) -> None:
    """As K-FAC's factors; the limit is a matrix product of n^3 operations."""
    a = blocks(1, n)
    ready = damped(a)
    left, right = a[0, :, : n // 2].contiguous(), a[0, : n // 2].contiguous()
    run_case(
        Case(
            op="block_inverse",
            shape=f"1 x {n} x {n}",
            dtype=torch.float32,
            ours=lambda: block_inverse(a, DAMPING),
            baselines={
                "cholesky_inverse(cholesky)": lambda: torch.cholesky_inverse(torch.linalg.cholesky(ready)),
                "linalg.inv": lambda: torch.linalg.inv(ready),
            },
            gates={"cholesky_inverse(cholesky)": least, "linalg.inv": 1.0},
            limit=lambda: left @ right,
            repeat=max(1, 2048 // n),
        )
    )


@each_shape
def test_block_solve(run_case: RunCase, n: int, count: int) -> None:
    a, rhs = blocks(count, n), torch.randn(count, n)
    ready = damped(a)
    run_case(
        Case(
            op="block_solve",
            shape=f"{count} x {n} x {n}",
            dtype=torch.float32,
            ours=lambda: block_solve(a, DAMPING, rhs),
            baselines={
                "cholesky_solve(cholesky)": lambda: torch.cholesky_solve(rhs[..., None], torch.linalg.cholesky(ready))
            },
            bytes_moved=a.nbytes + 2 * rhs.nbytes,
        )
    )


@each_shape
def test_block_apply(run_case: RunCase, n: int, count: int) -> None:
    a, v = blocks(count, n), torch.randn(count, n)
    run_case(
        Case(
            op="block_apply",
            shape=f"{count} x {n} x {n}",
            dtype=torch.float32,
            ours=lambda: block_apply(a, v),
            baselines={"bmm": lambda: torch.bmm(a, v[..., None])},
            bytes_moved=a.nbytes + 2 * v.nbytes,
        )
    )
