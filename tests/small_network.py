"""Small networks, one of them of several layer types, and what tests of optimizers do with it."""

from __future__ import annotations

import io
from typing import Any

import torch
from torch import Tensor, nn


def network(seed: int = 0, dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1, bias=False),  # in front of a BatchNorm a bias has no gradient
        nn.BatchNorm2d(4),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(4 * 4 * 4, 6),
        nn.LayerNorm(6),
        nn.Linear(6, 3),
    ).to(dtype)


class Tied(nn.Module):
    """An output layer that shares its weight with an embedding, and a parameter that no layer has."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.output = nn.Embedding(7, 4), nn.Linear(4, 7)
        self.output.weight = self.embedding.weight
        self.position = nn.Parameter(torch.randn(5, 4))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.output(torch.tanh(self.embedding(x) + self.position))
        return out


def loss_of(model: nn.Module, step: int) -> Tensor:
    """On the batch of that step."""
    generator = torch.Generator().manual_seed(step)
    dtype = next(model.parameters()).dtype
    x = torch.randn(8, 2, 4, 4, generator=generator).to(dtype)
    y = torch.randint(3, (8,), generator=generator)
    return nn.functional.cross_entropy(model(x).to(torch.promote_types(dtype, torch.float32)), y)


def backward(model: nn.Module, step: int) -> Tensor:
    loss = loss_of(model, step)
    loss.backward()
    return loss


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        optimizer.zero_grad()
        backward(model, step)
        optimizer.step()


def parameters_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def assert_same_parameters(model: nn.Module, twin: nn.Module) -> None:
    """Bit for bit."""
    for (name, p), (_, q) in zip(model.named_parameters(), twin.named_parameters(), strict=True):
        assert torch.equal(p, q), name


def assert_same_state(actual: dict[str, Any], expected: dict[str, Any]) -> None:
    """Two state dicts, bit for bit."""
    assert actual["param_groups"] == expected["param_groups"]
    assert actual["state"].keys() == expected["state"].keys()
    for number, entries in expected["state"].items():
        assert actual["state"][number].keys() == entries.keys()
        for name, value in entries.items():
            assert actual["state"][number][name].dtype == value.dtype
            assert torch.equal(actual["state"][number][name], value), (number, name)


def hooks(model: nn.Module) -> int:
    """How many hooks there are: one on each layer, and two of each optimizer on the model."""
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


def only_tensors_and_numbers(value: Any) -> bool:
    if isinstance(value, dict):
        return all(only_tensors_and_numbers(v) for v in value.values())
    if isinstance(value, (list, tuple)):
        return all(only_tensors_and_numbers(v) for v in value)
    return value is None or isinstance(value, (Tensor, bool, int, float, str))


def saved_and_loaded(state: dict[str, Any]) -> dict[str, Any]:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    loaded: dict[str, Any] = torch.load(buffer, weights_only=True)
    return loaded
