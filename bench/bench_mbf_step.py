"""The step of MBF: for 3 x 3 kernels in float32, 36 bytes of inverse for each parameter, besides the 20 of a step."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from bench.interleaved import Case, RunCase
from bench.limits import stream_read, stream_update
from fisher_kernels.ops import mbf_step_
from fisher_kernels.ops._blocks import pack

OPTIONS: dict[str, Any] = {"lr": 1e-3, "momentum": 0.9, "weight_decay": 0.0, "decoupled": True, "maximize": False}


class Inputs:
    """A convolution of 3 x 3, a block for each kernel."""

    def __init__(self, channels: int, memory_format: torch.memory_format = torch.contiguous_format) -> None:
        def make() -> Tensor:
            return torch.randn(channels, channels, 3, 3).to(memory_format=memory_format)

        self.param, self.grad, self.momentum = make(), make(), make()
        x = torch.randn(channels * channels, 9, 9)
        self.inverse = x @ x.mT / 9
        self.packed = pack(self.inverse)

    def step(self, inverse: Tensor, **options: Any) -> None:
        mbf_step_([self.param], [self.grad], [self.momentum], [inverse], **{**OPTIONS, **options})

    def eager_step(self) -> None:
        """The same in eager PyTorch."""
        torch._foreach_mul_([self.momentum], 0.9)
        torch._foreach_add_([self.momentum], [self.grad])
        d = torch.einsum("bij,bj->bi", self.inverse, self.momentum.view(-1, 9))
        torch._foreach_add_([self.param], [d.view_as(self.param)], alpha=-1e-3)

    def limit(self, inverse: Tensor) -> None:
        stream_read(inverse)
        stream_update([self.param], [self.momentum], [self.grad])

    def bytes_moved(self, inverse: Tensor) -> int:
        return inverse.nbytes + 5 * self.param.nbytes


@pytest.mark.parametrize("clip", [False, True])
def test_step_of_a_convolution(run_case: RunCase, clip: bool) -> None:
    ours = Inputs(512)
    options = {"kl_clip": 1e-3} if clip else {}
    run_case(
        Case(
            op="mbf_step_",
            shape="512 x 512 x 3 x 3" + (", kl_clip" if clip else ""),
            dtype=torch.float32,
            ours=lambda: ours.step(ours.inverse, **options),
            baselines={"eager, einsum": ours.eager_step},
            gates={} if clip else {"eager, einsum": 5.0, "limit": 0.85},
            bytes_moved=ours.bytes_moved(ours.inverse),
            limit=lambda: ours.limit(ours.inverse),
            at_limit=0.85,
        )
    )


@pytest.mark.parametrize("storage", ["packed", "bfloat16", "packed bfloat16"])
def test_smaller_inverses(run_case: RunCase, storage: str) -> None:
    ours = Inputs(512)
    inverse = ours.packed if "packed" in storage else ours.inverse
    if "bfloat16" in storage:
        inverse = inverse.bfloat16()
    run_case(
        Case(
            op="mbf_step_",
            shape=f"512 x 512 x 3 x 3, {storage}",
            dtype=torch.float32,
            ours=lambda: ours.step(inverse),
            baselines={"whole blocks in float32": lambda: ours.step(ours.inverse)},
            bytes_moved=ours.bytes_moved(inverse),
            limit=lambda: ours.limit(inverse),
        )
    )


def test_channels_last(run_case: RunCase) -> None:
    ours, plain = Inputs(512, torch.channels_last), Inputs(512)
    run_case(
        Case(
            op="mbf_step_",
            shape="512 x 512 x 3 x 3, channels last",
            dtype=torch.float32,
            ours=lambda: ours.step(ours.inverse),
            baselines={"contiguous": lambda: plain.step(plain.inverse)},
            bytes_moved=ours.bytes_moved(ours.inverse),
        )
    )


def test_a_list_of_small_parameters(run_case: RunCase) -> None:
    all_of_them = [Inputs(16) for _ in range(100)]
    params, grads, momentum, inverses = (
        [getattr(x, name) for x in all_of_them] for name in ("param", "grad", "momentum", "inverse")
    )

    def eager() -> None:
        torch._foreach_mul_(momentum, 0.9)
        torch._foreach_add_(momentum, grads)
        directions = [
            torch.einsum("bij,bj->bi", p, m.view(-1, 9)).view_as(m) for p, m in zip(inverses, momentum, strict=True)
        ]
        torch._foreach_add_(params, directions, alpha=-1e-3)

    run_case(
        Case(
            op="mbf_step_",
            shape="100 x 16 x 16 x 3 x 3",
            dtype=torch.float32,
            ours=lambda: mbf_step_(params, grads, momentum, inverses, **OPTIONS),
            baselines={"eager, einsum": eager},
            repeat=20,
        )
    )
