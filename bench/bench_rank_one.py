"""Inverses kept current, beside a bare pass over them and beside inverting anew; and solutions of long vectors."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from bench.bench_block_inverse import DAMPING, SHAPES, blocks
from bench.interleaved import Case, RunCase
from fisher_kernels.ops import block_inverse_, low_rank_inverse_update_, rank_one_inverse_update_, rank_one_solve

DECAY, GAIN = 0.95, 0.05

each_shape = pytest.mark.parametrize(("n", "count"), SHAPES.items())


def eager_update(inverse: Tensor, u: Tensor) -> None:
    v = torch.bmm(inverse, u[:, :, None])[..., 0]
    den = DECAY + GAIN * torch.einsum("bi,bi->b", u, v)
    inverse.sub_(torch.einsum("bi,bj->bij", v, v * (GAIN / den)[:, None])).div_(DECAY)


def eager_woodbury(inverse: Tensor, u: Tensor) -> None:
    w = torch.bmm(u, inverse)
    s = DECAY * torch.eye(u.shape[1]) + GAIN * torch.bmm(w, u.mT)
    inverse.baddbmm_(w.mT, torch.linalg.solve(s, w), beta=1 / DECAY, alpha=-GAIN / DECAY)


@each_shape
def test_rank_one_inverse_update(run_case: RunCase, n: int, count: int) -> None:
    """All work on the same inverses, which stay those of averages of such vectors."""
    a = blocks(count, n)
    inverse, u = torch.linalg.inv(a + DAMPING * torch.eye(n)), torch.randn(count, n)
    inverse = ((inverse + inverse.mT) / 2).contiguous()  # LAPACK returns columns
    run_case(
        Case(
            op="rank_one_inverse_update_",
            shape=f"{count} x {n} x {n}",
            dtype=torch.float32,
            ours=lambda: rank_one_inverse_update_(inverse, u, DECAY, GAIN),
            baselines={
                "bmm, einsum, sub_": lambda: eager_update(inverse, u),
                "block_inverse_": lambda: block_inverse_(inverse, a, DAMPING),
            },
            gates={"bmm, einsum, sub_": 2.5, "block_inverse_": {9: 0.0, 25: 1.0, 49: 1.5}[n]},
            bytes_moved=2 * inverse.nbytes + u.nbytes,
            limit=lambda: inverse.mul_(1.0),
            at_limit=0.6,
            before=lambda: inverse.mul_(1.0),  # that all find as much of it in the caches
        )
    )


@each_shape
def test_low_rank_inverse_update(run_case: RunCase, n: int, count: int) -> None:
    a = blocks(count, n)
    inverse, u = torch.linalg.inv(a + DAMPING * torch.eye(n)), torch.randn(count, 4, n)
    inverse = ((inverse + inverse.mT) / 2).contiguous()  # LAPACK returns columns
    run_case(
        Case(
            op="low_rank_inverse_update_",
            shape=f"{count} x {n} x {n}, 4 vectors",
            dtype=torch.float32,
            ours=lambda: low_rank_inverse_update_(inverse, u, DECAY, GAIN),
            baselines={
                "bmm, solve, baddbmm_": lambda: eager_woodbury(inverse, u),
                "block_inverse_": lambda: block_inverse_(inverse, a, DAMPING),
            },
            bytes_moved=2 * inverse.nbytes + u.nbytes,
            limit=lambda: inverse.mul_(1.0),
            before=lambda: inverse.mul_(1.0),
        )
    )


def test_rank_one_solve(run_case: RunCase) -> None:
    u, x = ([torch.randn(1024, 1024) for _ in range(25)] for _ in range(2))

    def eager() -> list[Tensor]:
        square = torch.stack([torch.dot(v.view(-1), v.view(-1)) for v in u]).sum()
        along = torch.stack([torch.dot(v.view(-1), y.view(-1)) for v, y in zip(u, x, strict=True)]).sum()
        out = torch._foreach_mul(u, -float(along / (0.5 + square)))
        torch._foreach_add_(out, x)
        torch._foreach_div_(out, 0.5)
        return list(out)

    run_case(
        Case(
            op="rank_one_solve",
            shape="25 x 1024 x 1024",
            dtype=torch.float32,
            ours=lambda: rank_one_solve(u, x, 0.5),
            baselines={"dot, _foreach_mul, add, div": eager},
            gates={"dot, _foreach_mul, add, div": 1.0},
            bytes_moved=5 * sum(v.nbytes for v in u),
        )
    )
