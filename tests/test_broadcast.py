"""Embeddings whose output is broadcast over a batch: their statistics are those of every row that they serve."""

from __future__ import annotations

import copy
import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fisher_kernels import KFAC, MBF, AdaFisher
from tests.processes import in_two_processes, needs_processes

BATCH, LENGTH, WIDTH = 8, 5, 6

PLACES = {
    "(1, T)": lambda batch: torch.arange(LENGTH).unsqueeze(0),
    "(T)": lambda batch: torch.arange(LENGTH),
    "(B, T)": lambda batch: torch.arange(LENGTH).expand(batch, LENGTH),
}


class Net(nn.Module):
    """Tokens and positions are added, in place as BERT does or not, and dropped or not before the next layer."""

    def __init__(self, places: str, in_place: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.tokens, self.positions = nn.Embedding(11, WIDTH), nn.Embedding(LENGTH, WIDTH)
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 3)
        self.places, self.in_place = places, in_place

    def forward(self, x: Tensor) -> Tensor:
        h, where = self.tokens(x), self.positions(PLACES[self.places](len(x)))
        if self.in_place:
            h += where
        else:
            h = where + h
        return self.head(self.norm(nn.functional.dropout(h, 0.0)))


def statistics(model: nn.Module, optimizer: Any, splits: tuple[int, ...]) -> list[Tensor]:
    """Those of the positions after one step on a batch in several parts."""
    x = torch.randint(11, (BATCH, LENGTH), generator=torch.Generator().manual_seed(1))
    for part in x.split(list(splits)):
        (model(part).square().sum() / x.numel()).backward()
    optimizer.step()
    return statistics_of(model, optimizer)


def statistics_of(model: nn.Module, optimizer: Any) -> list[Tensor]:
    state = optimizer.state[model.positions.weight]  # type: ignore[union-attr, index]
    return [state[name].clone() for name in sorted(state) if "factor" in name or name == "fisher_blocks"]


@pytest.mark.usefixtures("in_float64")
@pytest.mark.parametrize("places", ["(1, T)", "(T)"])
@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("make", [AdaFisher, MBF, KFAC])
def test_each_row_counts_however_the_batch_is_split(make: Any, in_place: bool, places: str) -> None:
    """MBF takes the mean over micro-batches as if the loss were the mean of each, so equal ones are compared."""
    for splits in ((BATCH,), (BATCH // 2, BATCH // 2)):
        expanded, broadcast = Net("(B, T)", in_place), Net(places, in_place)
        expected = statistics(expanded, make(expanded), splits)
        found = statistics(broadcast, make(broadcast), splits)
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-14)


@pytest.mark.usefixtures("in_float64")
def test_micro_batches_of_any_size_give_the_factors_of_the_whole() -> None:
    whole, parts = Net("(1, T)"), Net("(1, T)")
    expected = statistics(whole, AdaFisher(whole), (BATCH,))
    for a, b in zip(statistics(parts, AdaFisher(parts), (3, 5)), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=0)


def _statistics_of_a_part(rank: int, make: Any) -> list[Any]:
    torch.set_default_dtype(torch.float64)
    model = Net("(1, T)")
    x = torch.randint(11, (BATCH, LENGTH), generator=torch.Generator().manual_seed(1)).chunk(2)[rank]
    optimizer = make(model)
    parallel = nn.parallel.DistributedDataParallel(model)
    parallel(x).square().mean().backward()
    optimizer.step()
    return [t.tolist() for t in statistics_of(model, optimizer)]


@pytest.mark.slow
@needs_processes
@pytest.mark.usefixtures("in_float64")
@pytest.mark.parametrize("make", [AdaFisher, MBF, KFAC])
def test_processes_count_the_rows_of_the_joint_batch(make: Any, tmp_path: Path) -> None:
    model = Net("(1, T)")
    optimizer = make(model)
    x = torch.randint(11, (BATCH, LENGTH), generator=torch.Generator().manual_seed(1))
    model(x).square().mean().backward()
    optimizer.step()
    first, second = in_two_processes(functools.partial(_statistics_of_a_part, make=make), tmp_path)
    assert first == second
    for ours, expected in zip(first, statistics_of(model, optimizer), strict=True):
        torch.testing.assert_close(torch.tensor(ours), expected, rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize("make", [AdaFisher, MBF, KFAC])
def test_an_output_that_is_read_twice_is_taken_as_it_is(make: Any) -> None:
    """What one addition is handed is then not all of the derivative."""

    class Twice(Net):
        def forward(self, x: Tensor) -> Tensor:
            where = self.positions(PLACES[self.places](len(x)))
            return self.head(self.norm(self.tokens(x) + where)) + where.sum()

    model = Twice("(1, T)")
    optimizer = make(model)
    twin = copy.deepcopy(model)
    tokens = PLACES["(1, T)"](BATCH)
    derivatives: list[Tensor] = []
    model.positions.register_forward_hook(lambda m, args, out: out.register_hook(derivatives.append) and None)
    found = statistics(model, optimizer, (BATCH,))
    plain = make(twin)
    twin.positions(tokens).backward(derivatives[0])
    plain.step()
    state = plain.state[twin.positions.weight]
    for name, value in zip(sorted(n for n in state if "factor" in n or n == "fisher_blocks"), found, strict=True):
        # K-FAC's are in units of the terms of the loss: the rows of the last layer, which is this one in the twin.
        torch.testing.assert_close(value, state[name] * (BATCH if make is KFAC else 1))
