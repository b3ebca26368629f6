"""The fused step: 20 bytes a parameter in float32, 16 with moments in 16 bits, against 28 of AdamW.

What is compared works on the same tensors as far as it can: two sets of the same size, in other pages of the memory,
can differ by a sixth in speed for as long as the process lives.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bench.baselines import adamw, parameters
from bench.interleaved import Case, RunCase
from bench.limits import stream_short, stream_update
from fisher_kernels import AdaFisher
from fisher_kernels.ops import Rounding, adafisher_step_

OPTIONS: dict[str, Any] = {
    "lr": 1e-3,
    "beta": 0.9,
    "damping": 1e-3,
    "weight_decay": 0.0,
    "decoupled": True,
    "maximize": False,
}


class Inputs:
    """``count`` square parameters with everything that a step needs."""

    def __init__(self, count: int, size: int) -> None:
        def make(*shape: int) -> list[Tensor]:
            return [torch.randn(*shape) for _ in range(count)]

        self.params = make(size, size)
        self.grads = make(size, size)
        self.exp_avgs = [m * 0 for m in make(size, size)]
        self.steps = [torch.zeros(()) for _ in range(count)]
        self.rows = [r.square() for r in make(size)]
        self.columns = [c.square() for c in make(size)]
        self.numel = count * size * size

    def step(self, rounding: Sequence[Rounding] | None = None) -> None:
        tensors = self.params, self.grads, self.exp_avgs, self.steps, self.rows, self.columns
        adafisher_step_(*tensors, **OPTIONS, rounding=rounding)

    def step_at_random(self) -> None:
        """What has 16 bits is rounded by random integers."""
        self.step([Rounding.of(0, i) for i in range(len(self.params))])

    def eager_step(self) -> None:
        """The same in eager PyTorch with the Kronecker product formed at every step."""
        for p, g, m, t, r, c in zip(
            self.params, self.grads, self.exp_avgs, self.steps, self.rows, self.columns, strict=True
        ):
            t += 1
            m.mul_(0.9).add_(g, alpha=0.1)
            curvature = torch.kron(r.unsqueeze(1), c.unsqueeze(0)) + 1e-3
            p.sub_(1e-3 * (m / (1 - 0.9 ** float(t))) / curvature)

    def in_bfloat16(self) -> Inputs:
        """Parameters and gradients in the first half of the memory of these, with the same moments and factors."""
        half = copy.copy(self)
        half.params, half.grads = (
            [x.view(-1).view(torch.bfloat16)[: x.numel()].view(x.shape).normal_() for x in tensors]
            for tensors in (self.params, self.grads)
        )
        return half

    def with_short_moments(self) -> Inputs:
        """The same with moments in bfloat16, in the first half of the memory of these."""
        short = copy.copy(self)
        short.exp_avgs = [m.view(-1).view(torch.bfloat16)[: m.numel()].view(m.shape).zero_() for m in self.exp_avgs]
        return short

    def limit(self) -> None:
        stream_update(self.params, self.exp_avgs, self.grads)

    def short_limit(self) -> None:
        """Of moments in 16 bits."""
        stream_short(self.params, self.exp_avgs, self.grads)

    def adamw(self) -> torch.optim.AdamW:
        return adamw(parameters(self.params, self.grads), self.exp_avgs)


def test_step_on_large_tensors(run_case: RunCase) -> None:
    ours = Inputs(25, 1024)
    run_case(
        Case(
            op="adafisher_step_",
            shape="25 x 1024 x 1024",
            dtype=torch.float32,
            ours=ours.step,
            baselines={
                "AdamW(fused).step": ours.adamw().step,
                "eager, Kronecker product": ours.eager_step,
            },
            gates={"AdamW(fused).step": 1.30, "eager, Kronecker product": 5.0, "limit": 0.95},
            bytes_moved=20 * ours.numel,
            limit=ours.limit,
            at_limit=0.95,
        )
    )


def test_step_in_bfloat16(run_case: RunCase) -> None:
    in_float32 = Inputs(25, 1024)
    ours = in_float32.in_bfloat16()
    run_case(
        Case(
            op="adafisher_step_",
            shape="25 x 1024 x 1024",
            dtype=torch.bfloat16,
            ours=ours.step,
            baselines={"the same in float32": in_float32.step},
            gates={"the same in float32": 1 / 0.75},
            bytes_moved=14 * ours.numel,
        )
    )


def test_step_with_moments_in_16_bits(run_case: RunCase) -> None:
    in_float32 = Inputs(25, 1024)
    ours = in_float32.with_short_moments()
    run_case(
        Case(
            op="adafisher_step_",
            shape="25 x 1024 x 1024, moments in 16 bits",
            dtype=torch.float32,
            ours=ours.step,
            baselines={"AdamW(fused).step": in_float32.adamw().step, "moments in float32": in_float32.step},
            gates={"AdamW(fused).step": 1.55, "limit": 0.9},
            bytes_moved=16 * ours.numel,
            limit=ours.short_limit,
            at_limit=0.9,
        )
    )


@pytest.mark.parametrize("what", ["moments in 16 bits", "parameters in bfloat16"])
def test_step_that_rounds_at_random(run_case: RunCase, what: str) -> None:
    """Beside rounding to nearest, of moments in 16 bits or of parameters."""
    whole = Inputs(25, 1024)
    ours = whole.with_short_moments() if what == "moments in 16 bits" else whole.in_bfloat16()
    run_case(
        Case(
            op="adafisher_step_",
            shape=f"25 x 1024 x 1024, {what}, at random",
            dtype=ours.params[0].dtype,
            ours=ours.step_at_random,
            baselines={"to nearest": ours.step},
            gates={"to nearest": 1 / 1.1},
            bytes_moved=(16 if what == "moments in 16 bits" else 14) * ours.numel,
        )
    )


def test_step_on_small_tensors(run_case: RunCase) -> None:
    ours = Inputs(100, 64)
    run_case(
        Case(
            op="adafisher_step_",
            shape="100 x 64 x 64",
            dtype=torch.float32,
            ours=ours.step,
            baselines={"AdamW(fused).step": ours.adamw().step},
            repeat=20,
        )
    )


def test_host_cost_of_a_long_list(run_case: RunCase) -> None:
    """300 tensors of one element: there is hardly any work, so this is the time of the call."""
    ours = Inputs(300, 1)
    run_case(
        Case(
            op="adafisher_step_",
            shape="300 x 1 x 1",
            dtype=torch.float32,
            ours=ours.step,
            baselines={"AdamW(fused).step": ours.adamw().step},
            repeat=20,
        )
    )


@pytest.mark.parametrize(
    ("count", "size", "interval", "promised"), [(25, 1024, 1, 1.25), (100, 64, 1000, 1.0), (100, 64, 1, 0.0)]
)
def test_whole_optimizer_step(run_case: RunCase, count: int, size: int, interval: int, promised: float) -> None:
    """``AdaFisher.step()``, Python included, each after a backward: with a refresh of all factors or between two."""
    layers = [nn.Linear(size, size, bias=False) for _ in range(count)]
    model = nn.Sequential(*layers)
    x = torch.randn(8, size)
    optimizer = AdaFisher(model, update_interval=interval)

    def backward() -> None:
        optimizer.zero_grad()
        model(x).square().mean().backward()

    backward()
    optimizer.step()
    params = list(model.parameters())
    other = adamw(params, [optimizer.state[p]["exp_avg"] for p in params])

    run_case(
        Case(
            op="AdaFisher.step",
            shape=f"{count} x {size} x {size}, {'refresh' if interval == 1 else 'no refresh'}",
            dtype=torch.float32,
            ours=optimizer.step,
            baselines={"AdamW(fused).step": other.step},
            gates={"AdamW(fused).step": promised} if promised else {},
            before=backward,
        )
    )
    assert float(optimizer.state[layers[0].weight]["step"]) > 1
