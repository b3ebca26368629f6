"""The SOFIM step: in float32 24 bytes a parameter in two passes, against 28 of AdamW in one; 18 with short moments.

What is compared works on the same tensors: two sets of the same size, in other pages of the memory, can differ by a
sixth in speed for as long as the process lives.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from bench.baselines import adamw, parameters
from bench.interleaved import Case, Run, RunCase
from bench.limits import stream_add, stream_read
from fisher_kernels import SOFIM
from fisher_kernels.ops import Rounding, sofim_step_

OPTIONS: dict[str, Any] = {"beta": 0.9, "rho": 0.5}
PROMISED = {"AdamW(fused).step": 1.10, "eager, foreach": 2.0, "eager, fewest passes": 1.15}


class Inputs:
    """``count`` square parameters with everything that a step needs."""

    def __init__(self, count: int, size: int, dtype: torch.dtype = torch.float32) -> None:
        def make(dtype: torch.dtype) -> list[Tensor]:
            return [torch.randn(size, size, dtype=dtype) for _ in range(count)]

        self.params, self.grads, self.exp_avgs = make(dtype), make(dtype), make(torch.float32)
        self.steps = [torch.zeros(()) for _ in range(count)]
        self.lr = torch.tensor(1e-3)
        self.numel = count * size * size

    def step(self, **options: Any) -> None:
        sofim_step_(self.params, self.grads, self.exp_avgs, self.steps, lr=self.lr, **OPTIONS, **options)

    def eager_step(self) -> None:
        """The formulas in eager PyTorch one after another, a call for the whole list in each: 44 bytes a parameter."""
        torch._foreach_add_(self.steps, 1)
        torch._foreach_lerp_(self.exp_avgs, self.grads, 0.1)
        moments = torch._foreach_div(self.exp_avgs, 1 - 0.9 ** float(self.steps[0]))
        square = torch.stack(torch._foreach_norm(moments)).square().sum()
        torch._foreach_div_(moments, float(0.5 + square))
        torch._foreach_add_(self.params, moments, alpha=-float(self.lr))

    def lean_eager_step(self) -> None:
        """In as few passes as there are calls for: 28 bytes a parameter."""
        torch._foreach_add_(self.steps, 1)
        torch._foreach_lerp_(self.exp_avgs, self.grads, 0.1)
        correction = 1 - 0.9 ** float(self.steps[0])
        square = torch.stack(torch._foreach_norm(self.exp_avgs)).square().sum() / correction**2
        rate = self.lr / (correction * (0.5 + square))
        torch._foreach_add_(self.params, self.exp_avgs, alpha=-float(rate))

    def baselines(self) -> dict[str, Run]:
        return {
            "AdamW(fused).step": self.adamw().step,
            "eager, foreach": self.eager_step,
            "eager, fewest passes": self.lean_eager_step,
        }

    def limit(self) -> None:
        """Both passes bare: moments and gradients, then parameters and moments."""
        stream_add(self.exp_avgs, self.grads)
        stream_add(self.params, self.exp_avgs)

    def with_short_moments(self) -> Inputs:
        """The same with moments in bfloat16, in the first half of the memory of these."""
        short = copy.copy(self)
        short.exp_avgs = [m.view(-1).view(torch.bfloat16)[: m.numel()].view(m.shape).zero_() for m in self.exp_avgs]
        return short

    def short_limit(self) -> None:
        """Both passes bare: numbers in 16 bits go as half as many in float32, with the first half of the others."""
        moments = [m.view(-1).view(torch.float32) for m in self.exp_avgs]
        grads, params = (
            [x.view(-1).tensor_split([len(m)]) for x, m in zip(xs, moments, strict=True)]
            for xs in (self.grads, self.params)
        )
        stream_add(moments, [g for g, _ in grads])
        for _, others in grads:
            stream_read(others)
        stream_add([p for p, _ in params], moments)
        rest = [p for _, p in params]
        stream_add(rest, rest)  # which reads and writes each once

    def adamw(self) -> torch.optim.AdamW:
        return adamw(parameters(self.params, self.grads), self.exp_avgs)

    def sofim(self) -> SOFIM:
        optimizer = SOFIM(parameters(self.params, self.grads), **OPTIONS)
        for p, m, t in zip(optimizer.param_groups[0]["params"], self.exp_avgs, self.steps, strict=True):
            optimizer.state[p] = {"step": t, "exp_avg": m}
        return optimizer


def test_step_on_large_tensors(run_case: RunCase) -> None:
    ours = Inputs(25, 1024)
    run_case(
        Case(
            op="sofim_step_",
            shape="25 x 1024 x 1024",
            dtype=torch.float32,
            ours=ours.step,
            baselines=ours.baselines(),
            gates={**PROMISED, "limit": 0.90},
            bytes_moved=24 * ours.numel,
            limit=ours.limit,
            at_limit=0.95,
        )
    )


def test_step_along_the_gradient(run_case: RunCase) -> None:
    ours = Inputs(25, 1024)
    run_case(
        Case(
            op="sofim_step_",
            shape="25 x 1024 x 1024, direction gradient",
            dtype=torch.float32,
            ours=lambda: ours.step(direction="gradient"),
            baselines={"direction momentum": ours.step},
            bytes_moved=28 * ours.numel,
        )
    )


def test_step_in_bfloat16(run_case: RunCase) -> None:
    ours, in_float32 = Inputs(25, 1024, torch.bfloat16), Inputs(25, 1024)
    in_float32.exp_avgs = ours.exp_avgs
    run_case(
        Case(
            op="sofim_step_",
            shape="25 x 1024 x 1024",
            dtype=torch.bfloat16,
            ours=ours.step,
            baselines={"the same in float32": in_float32.step},
            bytes_moved=18 * ours.numel,
        )
    )


def test_step_with_moments_in_16_bits(run_case: RunCase) -> None:
    in_float32 = Inputs(25, 1024)
    ours = in_float32.with_short_moments()
    run_case(
        Case(
            op="sofim_step_",
            shape="25 x 1024 x 1024, moments in 16 bits",
            dtype=torch.float32,
            ours=ours.step,
            baselines={"AdamW(fused).step": in_float32.adamw().step, "moments in float32": in_float32.step},
            gates={"AdamW(fused).step": 1.25, "limit": 0.9},
            bytes_moved=18 * ours.numel,
            limit=ours.short_limit,
            at_limit=0.9,
        )
    )


def test_step_that_rounds_at_random(run_case: RunCase) -> None:
    """Beside rounding to nearest, of moments in 16 bits."""
    ours = Inputs(25, 1024).with_short_moments()
    rounding = [Rounding.of(0, i) for i in range(len(ours.params))]
    run_case(
        Case(
            op="sofim_step_",
            shape="25 x 1024 x 1024, moments in 16 bits, at random",
            dtype=torch.float32,
            ours=lambda: ours.step(rounding=rounding),
            baselines={"to nearest": ours.step},
            gates={"to nearest": 1 / 1.1},
            bytes_moved=18 * ours.numel,
        )
    )


def test_step_on_small_tensors(run_case: RunCase) -> None:
    ours = Inputs(100, 64)
    run_case(
        Case(
            op="sofim_step_",
            shape="100 x 64 x 64",
            dtype=torch.float32,
            ours=ours.step,
            baselines={"AdamW(fused).step": ours.adamw().step},
            gates={"AdamW(fused).step": 1.0},
            repeat=20,
        )
    )


def test_host_cost_of_a_long_list(run_case: RunCase) -> None:
    """300 tensors of one element: there is hardly any work, so this is the time of the call."""
    ours = Inputs(300, 1)
    run_case(
        Case(
            op="sofim_step_",
            shape="300 x 1 x 1",
            dtype=torch.float32,
            ours=ours.step,
            baselines={"AdamW(fused).step": ours.adamw().step},
            repeat=20,
        )
    )


@pytest.mark.parametrize(("count", "size", "promised"), [(25, 1024, PROMISED), (100, 64, {"AdamW(fused).step": 1.0})])
def test_whole_optimizer_step(run_case: RunCase, count: int, size: int, promised: dict[str, float]) -> None:
    """``SOFIM.step()``, Python included."""
    ours = Inputs(count, size)
    run_case(
        Case(
            op="SOFIM.step",
            shape=f"{count} x {size} x {size}",
            dtype=torch.float32,
            ours=ours.sofim().step,
            baselines=ours.baselines(),
            gates=promised,
            bytes_moved=24 * ours.numel,
            limit=ours.limit,
            at_limit=0.95 if size == 1024 else None,
            repeat=1 if size == 1024 else 20,
        )
    )
