"""The three passes of the step along preconditioned momentum: in float32 12 bytes a parameter each.

What is compared works on the same tensors. A matrix product comes between the first pass and the second one, so each
pass finds its arrays in memory; the whole is measured as well, without the product.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from bench.interleaved import Case, Run, RunCase
from bench.limits import stream_add, stream_read
from fisher_kernels.ops import capped_step_, direction_sums, heavy_ball_

LR, MOMENTUM, CLIP, MOST, FLOOR, DECAY = 1e-3, 0.9, 1e-3, 0.02, 1e-3, 0.01


class Inputs:
    """``count`` square weights, in layers of two, with gradients, momentum and directions."""

    def __init__(self, count: int, size: int, dtype: torch.dtype = torch.float32) -> None:
        def make(dtype: torch.dtype) -> list[Tensor]:
            return [torch.randn(size, size, dtype=dtype) for _ in range(count)]

        self.params, self.grads = make(dtype), make(dtype)
        self.momentum_buffers, self.directions = make(torch.float32), make(torch.float32)
        self.layers = [i // 2 for i in range(count)]
        self.numel = count * size * size
        self.sums = self.add_up()
        self.joined = torch.stack(self.directions)  # the same bytes in one tensor, for a bare read

    # Ours.

    def advance(self) -> None:
        heavy_ball_(self.params, self.grads, self.momentum_buffers, momentum=MOMENTUM)

    def add_up(self) -> Tensor:
        return direction_sums(self.params, self.directions, self.momentum_buffers)

    def descend(self) -> None:
        capped_step_(
            self.params, self.directions, self.sums, self.layers,
            lr=LR, weight_decay=DECAY, kl_clip=CLIP, max_relative_step=MOST, floor=FLOOR,
        )  # fmt: skip

    def step(self) -> None:
        self.advance()
        self.sums = self.add_up()
        self.descend()

    # The same in calls of torch for whole lists, as few as there are.

    def eager_advance(self) -> None:
        """20 bytes a parameter."""
        torch._foreach_mul_(self.momentum_buffers, MOMENTUM)
        torch._foreach_add_(self.momentum_buffers, self.grads)

    def eager_add_up(self) -> tuple[Tensor, Tensor, Tensor]:
        """24 bytes a parameter, in float32: what its squares do not hold is infinite."""
        products = torch._foreach_mul(self.directions, self.momentum_buffers)
        product = torch.stack([x.sum() for x in products])
        return product, torch.stack(torch._foreach_norm(self.directions)), torch.stack(torch._foreach_norm(self.params))

    def eager_descend(self, product: Tensor, length: Tensor, weight: Tensor) -> None:
        """20 bytes a parameter, and a number read on the host for each layer."""
        scale = min(1.0, (CLIP / (LR**2 * abs(float(product.sum())))) ** 0.5)
        lengths, weights = (x.square().view(-1, 2).sum(1).sqrt() for x in (length, weight))
        floor = FLOOR * (2 * self.params[0].numel()) ** 0.5
        factors = (MOST * weights.clamp(min=floor) / (LR * scale * lengths)).clamp(max=1)
        steps = torch._foreach_mul(self.directions, (-LR * scale * factors).repeat_interleave(2).tolist())
        torch._foreach_mul_(self.params, 1 - LR * DECAY)
        torch._foreach_add_(self.params, steps)

    def eager_step(self) -> None:
        self.eager_advance()
        self.eager_descend(*self.eager_add_up())

    # Bare passes.

    def limit_of_an_update(self) -> None:
        stream_add(self.momentum_buffers, self.grads)

    def limit_of_sums(self) -> None:
        for _ in range(3):
            stream_read(self.joined)

    def limit(self) -> None:
        stream_add(self.momentum_buffers, self.grads)
        self.limit_of_sums()
        stream_add(self.params, self.directions)


def passes(x: Inputs) -> dict[str, tuple[Run, Run, Run, int]]:
    """Ours, that of torch, a bare one, and bytes a parameter."""
    sums = x.eager_add_up()
    return {
        "heavy_ball_": (x.advance, x.eager_advance, x.limit_of_an_update, 12),
        "direction_sums": (x.add_up, x.eager_add_up, x.limit_of_sums, 12),
        "capped_step_": (x.descend, lambda: x.eager_descend(*sums), x.limit_of_an_update, 12),
        "all three": (x.step, x.eager_step, x.limit, 36),
    }


@pytest.mark.parametrize("op", ["heavy_ball_", "direction_sums", "capped_step_", "all three"])
def test_large_tensors(run_case: RunCase, op: str) -> None:
    x = Inputs(24, 1024)
    ours, eager, limit, bytes_each = passes(x)[op]
    run_case(
        Case(
            op=op,
            shape="24 x 1024 x 1024",
            dtype=torch.float32,
            ours=ours,
            baselines={"eager, foreach": eager},
            gates={"eager, foreach": 1.2, "limit": 0.85},
            bytes_moved=bytes_each * x.numel,
            limit=limit,
            at_limit=0.95,
        )
    )


@pytest.mark.parametrize("op", ["heavy_ball_", "direction_sums", "capped_step_"])
def test_bfloat16(run_case: RunCase, op: str) -> None:
    """10, 10 and 8 bytes a parameter."""
    x, in_float32 = Inputs(24, 1024, torch.bfloat16), Inputs(24, 1024)
    in_float32.momentum_buffers, in_float32.directions = x.momentum_buffers, x.directions
    run_case(
        Case(
            op=op,
            shape="24 x 1024 x 1024",
            dtype=torch.bfloat16,
            ours=passes(x)[op][0],
            baselines={"the same in float32": passes(in_float32)[op][0]},
            bytes_moved={"heavy_ball_": 10, "direction_sums": 10, "capped_step_": 8}[op] * x.numel,
        )
    )


def test_momentum_and_directions_in_one_matrix_with_the_bias(run_case: RunCase) -> None:
    """As a product of matrices leaves them: rows of [W | b], of which the weight has all columns but the last."""
    x = Inputs(24, 1024)

    def widened(values: Tensor) -> Tensor:
        matrix = torch.randn(1024, 1025)
        return matrix[:, :-1].copy_(values)

    rows, whole = x, Inputs(24, 1024)
    whole.params, whole.grads = rows.params, rows.grads
    rows.momentum_buffers = list(map(widened, rows.momentum_buffers))
    rows.directions = list(map(widened, rows.directions))
    run_case(
        Case(
            op="all three",
            shape="24 x 1024 x 1024, in rows of 1025",
            dtype=torch.float32,
            ours=rows.step,
            baselines={"contiguous": whole.step},
            bytes_moved=36 * rows.numel,
        )
    )


def test_small_tensors(run_case: RunCase) -> None:
    x = Inputs(100, 64)
    run_case(
        Case(
            op="all three",
            shape="100 x 64 x 64",
            dtype=torch.float32,
            ours=x.step,
            baselines={"eager, foreach": x.eager_step},
            gates={"eager, foreach": 1.2},
            repeat=20,
        )
    )


def test_host_cost_of_a_long_list(run_case: RunCase) -> None:
    """300 tensors of one element: there is hardly any work, so this is the time of the calls."""
    x = Inputs(300, 1)
    run_case(
        Case(
            op="all three",
            shape="300 x 1 x 1",
            dtype=torch.float32,
            ours=x.step,
            baselines={"eager, foreach": x.eager_step},
            repeat=20,
        )
    )
