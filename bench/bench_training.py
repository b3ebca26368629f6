"""A whole training iteration of the digits CNN: forward, backward, step."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn

from bench.interleaved import Case, Run, RunCase
from fisher_kernels import MBF, AdaFisher
from fisher_kernels.tasks import find_task


def iterations(make_optimizer: Callable[[nn.Module], torch.optim.Optimizer]) -> Run:
    """One call, one iteration; batches go round."""
    task = find_task("digits")
    model = task.make_model(0)
    optimizer = make_optimizer(model)
    batches = itertools.cycle([b for b in task.batches(0, 0, task.batch_size) if len(b[0]) == task.batch_size])

    def iterate() -> None:
        optimizer.zero_grad()
        task.loss(model, next(batches)).backward()
        optimizer.step()

    return iterate


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=3e-3, fused=True)


@pytest.fixture
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("threads", "interval", "most"),
    # As the task trains, on one thread; on two the layers gain little and what hooks cost stays what it is.
    [(1, 1, 1.10), (1, 10, 1.05), (2, 1, None), (2, 10, 1.05)],
    indirect=["threads"],
)
def test_iteration_of_the_digits_cnn(run_case: RunCase, threads: int, interval: int, most: float | None) -> None:
    run_case(
        Case(
            op="training iteration",
            shape=f"digits CNN, {threads} thread{'s' * (threads > 1)}, refresh every {interval}",
            dtype=torch.float32,
            ours=iterations(lambda model: AdaFisher(model, update_interval=interval)),
            baselines={"AdamW(fused)": iterations(adamw)},
            gates={} if most is None else {"AdamW(fused)": 1 / most},
            repeat=10,
        )
    )


@pytest.mark.parametrize(
    ("threads", "options", "most"),
    [(1, {}, 1.6), (1, {"update_interval": 10}, None), (2, {}, None)],
    indirect=["threads"],
    ids=["defaults", "refresh-every-10", "two-threads"],
)
def test_iteration_of_the_digits_cnn_with_mbf(
    run_case: RunCase, threads: int, options: dict[str, Any], most: float | None
) -> None:
    interval = options.get("update_interval", 1)
    run_case(
        Case(
            op="MBF training iteration",
            shape=f"digits CNN, {threads} thread{'s' * (threads > 1)}, refresh every {interval}, inverse every 10",
            dtype=torch.float32,
            ours=iterations(lambda model: MBF(model, refresh="constant", inverse_interval=10, **options)),
            baselines={"AdamW(fused)": iterations(adamw)},
            gates={} if most is None else {"AdamW(fused)": 1 / most},
            repeat=10,
        )
    )
