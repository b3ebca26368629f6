"""Updates of inverses, compared to a bare pass over them and to inverting again; and solutions of long vectors."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from bench.bench_block_inverse import DAMPING, SHAPES, blocks
from bench.interleaved import Case, RunCase
from bench.limits import stream_read
from fisher_kernels.ops import block_inverse_, low_rank_inverse_update_, rank_one_inverse_update_, rank_one_solve

DECAY, GAIN = 0.95, 0.05
BEYOND_THE_CACHES = torch.zeros(48 << 20)  # 192 MiB


def forget() -> None:
    """Leaves nothing of the inverses in the caches: between two updates an optimizer goes through all its memory."""
    stream_read(BEYOND_THE_CACHES)


each_shape = pytest.mark.parametrize(("n", "count"), SHAPES.items())


def eager_update(inverse: Tensor, u: Tensor) -> None:
    """With one temporary of the size of the inverses."""
    v = torch.bmm(inverse, u[:, :, None])[..., 0]
    den = DECAY + GAIN * torch.einsum("bi,bi->b", u, v)
    inverse.sub_(torch.einsum("bi,bj->bij", v, v * (GAIN / den)[:, None])).div_(DECAY)


def eager_formula(inverse: Tensor, u: Tensor) -> Tensor:
    """As the formula is written."""
    v = torch.einsum("bij,bj->bi", inverse, u)
    den = DECAY + GAIN * torch.einsum("bi,bi->b", u, v)
    return (inverse - (GAIN / den)[:, None, None] * torch.einsum("bi,bj->bij", v, v)) / DECAY


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
                "eager, einsum": lambda: eager_formula(inverse, u),
                "eager, in place": lambda: eager_update(inverse, u),
                "block_inverse_": lambda: block_inverse_(inverse, a, DAMPING),
            },
            gates={"eager, einsum": 10.0, "block_inverse_": {9: 0.0, 25: 1.0, 49: 1.5}[n], "limit": 0.6},
            bytes_moved=2 * inverse.nbytes + u.nbytes,
            limit=lambda: inverse.mul_(1.0),
            at_limit=0.6,
            before=forget,
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
            before=forget,
        )
    )


@pytest.mark.parametrize(("count", "size", "promised"), [(25, 1024, {}), (100, 64, {"eager, foreach": 1.0})])
def test_rank_one_solve(run_case: RunCase, count: int, size: int, promised: dict[str, float]) -> None:
    """Both allocate their results; of large ones that is most of the time, as the system has to find the pages."""
    u, x = ([torch.randn(size, size) for _ in range(count)] for _ in range(2))

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
            shape=f"{count} x {size} x {size}",
            dtype=torch.float32,
            ours=lambda: rank_one_solve(u, x, 0.5),
            baselines={"eager, foreach": eager},
            gates=promised,
            bytes_moved=5 * sum(v.nbytes for v in u),
        )
    )
