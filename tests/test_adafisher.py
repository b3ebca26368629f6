"""AdaFisher beyond the contract of all optimizers: variants, groups of layers, reports of the curvature, hooks."""

from __future__ import annotations

import gc
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fisher_kernels import AdaFisher, AdaFisherW
from tests.naive_adafisher import NaiveAdaFisher
from tests.small_network import (
    assert_same_parameters,
    backward,
    hooks,
    network,
    train,
)

OPTIMIZERS = (AdaFisher, AdaFisherW)
VARIANTS = ("paper", "release", "relative")

pytestmark = pytest.mark.usefixtures("host_backend", "one_thread")


# Arguments.


def test_model_must_be_a_module() -> None:
    with pytest.raises(TypeError, match=r"model is a generator, expected a torch\.nn\.Module"):
        AdaFisher(nn.Linear(2, 2).parameters())  # type: ignore[arg-type]


def test_lazy_module_must_have_run() -> None:
    model = nn.Sequential(nn.LazyLinear(3))
    with pytest.raises(ValueError, match=r"parameter '0\.weight' is not initialised"):
        AdaFisher(model)
    model(torch.ones(2, 4))
    AdaFisher(model)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize(
    ("variant", "lr", "damping", "interval"),
    [("paper", 3e-3, 1e-3, 1), ("release", 1e-3, 1e-3, 100), ("relative", 1.0, 0.1, 1)],
)
def test_defaults(optimizer: type[AdaFisher], variant: str, lr: float, damping: float, interval: int) -> None:
    wanted = {"lr": lr, "damping": damping, "update_interval": interval, "beta": 0.9, "gamma": 0.8, "eps": 1e-6}
    group = optimizer(nn.Linear(2, 2), variant=variant).param_groups[0]
    assert {name: group[name] for name in wanted} == wanted
    assert optimizer(nn.Linear(2, 2), variant=variant, lr=0.5).param_groups[0]["lr"] == 0.5


def test_defaults_of_each_group_follow_its_variant() -> None:
    model = network()
    groups = [
        {"params": model[0].parameters(), "variant": "relative"},
        {"params": model[1].parameters(), "variant": "release", "lr": 0.7},
        {"params": model[4:].parameters(), "gamma": 0.5, "update_interval": 7},
    ]
    optimizer = AdaFisher(model, params=groups, damping=0.2)
    rows = [[g[k] for k in ("variant", "lr", "damping", "gamma", "update_interval")] for g in optimizer.param_groups]
    assert rows == [["relative", 1.0, 0.2, 0.8, 1], ["release", 0.7, 0.2, 0.8, 100], ["paper", 3e-3, 0.2, 0.5, 7]]
    assert [row.group for row in optimizer.explain()] == [0, 1, 1, 2, 2, 2, 2, 2, 2]


# Groups.


def test_layers_without_tokens_are_not_refused() -> None:
    """A router sends an expert nothing, or nothing but padding."""

    class Expert(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.norm, self.out = nn.Embedding(5, 3, padding_idx=0), nn.LayerNorm(3), nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.out(self.norm(self.embed(x)))
            return out

    model = nn.ModuleList(Expert() for _ in range(3))
    optimizer = AdaFisher(model)
    for tokens in (torch.randint(1, 5, (6,)), torch.randint(1, 5, (4,))):
        optimizer.zero_grad()
        parts = (tokens, tokens[:0], torch.zeros_like(tokens))
        sum(expert(part).sum() for expert, part in zip(model, parts, strict=True)).backward()
        optimizer.step()
    assert all(row["refused_statistics"] == 0 for row in optimizer.metrics().values())
    known = [float(optimizer.state[expert.embed.weight]["factor_weight"]) > 0 for expert in model]
    assert known == [True, False, False]


def test_group_added_between_backward_and_step_keeps_what_was_collected() -> None:
    """A Linear of its own, so that nothing that is added can touch it."""

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.one, self.other = nn.Linear(3, 2), nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.one(x) + self.other(x)
            return out

    x = torch.randn(5, 3)
    models = Two(), Two()
    for model, adds in zip(models, (True, False), strict=True):
        optimizer = AdaFisher(model, params=[{"params": model.one.parameters()}])
        model(x).square().sum().backward()
        if adds:
            optimizer.add_param_group({"params": model.other.parameters()})
        optimizer.step()
    assert_same_parameters(models[0].one, models[1].one)


def test_group_whose_layer_is_refused_is_not_added() -> None:
    model = nn.Sequential(nn.Embedding(5, 3, sparse=True), nn.Linear(3, 2))
    optimizer = AdaFisher(model, params=[{"params": model[1].parameters()}])
    with pytest.raises(ValueError, match="sparse=True"):
        optimizer.add_param_group({"params": model[0].parameters()})
    assert len(optimizer.param_groups) == 1
    assert [row.name for row in optimizer.explain()] == ["1.weight", "1.bias"]


def test_group_settings_can_change_between_steps() -> None:
    model, twin = network(dtype=torch.float64), network(dtype=torch.float64)
    ours, naive = AdaFisher(model), NaiveAdaFisher(twin)
    for step in range(6):
        for groups in (ours.param_groups, naive.groups):
            if step == 2:
                groups[0].update(update_interval=2, damping=0.01, beta=0.5, weight_decay=0.1)
        train(model, ours, range(step, step + 1))
        naive.zero_grad()
        backward(twin, step)
        naive.step()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-9 * float(q.detach().abs().max()))


def test_gamma_may_change_between_steps() -> None:
    torch.manual_seed(0)
    model = nn.Linear(3, 2, dtype=torch.float64)
    optimizer = AdaFisher(model)
    expected = torch.zeros(3, dtype=torch.float64)
    for gamma in (0.8, 0.5):
        optimizer.param_groups[0]["gamma"] = gamma
        x = torch.randn(5, 3, dtype=torch.float64)
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()
        expected = gamma * expected + (1 - gamma) * x.square().mean(0)
    torch.testing.assert_close(optimizer.state[model.weight]["input_factor"][:-1], expected, rtol=1e-12, atol=0)


# Reports.


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_curvature_is_one_before_there_are_statistics(optimizer: type[AdaFisher], variant: str) -> None:
    """As after the zero gradients with which checkpoint tools make the state of a fresh optimizer."""
    model = network()
    ours = optimizer(model, variant=variant)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    ours.step()
    rate = pytest.approx(ours.param_groups[0]["lr"])
    assert all(row["smallest_step"] == rate and row["largest_step"] == rate for row in ours.metrics().values())


def test_explain_names_rules_and_factors() -> None:
    model = nn.Sequential(nn.Conv1d(2, 4, 3), nn.PReLU(), nn.Flatten(), nn.Linear(16, 3), nn.BatchNorm1d(3))
    model[3].bias.requires_grad_(False)
    with pytest.warns(UserWarning, match=r"1% of the trained parameters have no layer rule.*\(1\.weight\)"):
        optimizer = AdaFisher(model)
    rows = {row.name: row for row in optimizer.explain()}
    assert {name: row.rule for name, row in rows.items()} == {
        "0.weight": "conv",
        "0.bias": "conv",
        "1.weight": "fallback",
        "3.weight": "linear",
        "3.bias": "linear",
        "4.weight": "norm",
        "4.bias": "norm",
    }
    assert [row.name for row in rows.values() if row.fallback] == ["1.weight"]
    assert "input factor (7)" in rows["0.weight"].detail
    assert "output factor (4)" in rows["0.weight"].detail
    assert "median" in rows["1.weight"].detail

    model(torch.randn(5, 2, 6)).square().sum().backward()
    optimizer.step()
    rows = {row.name: row for row in optimizer.explain()}
    moment_and_step, average_weight = {n: 4 * (p.numel() + 1) for n, p in model.named_parameters()}, 4
    assert rows["0.weight"].state_bytes == moment_and_step["0.weight"] + 4 * (7 + 4) + average_weight
    assert rows["3.weight"].state_bytes == moment_and_step["3.weight"] + 4 * (17 + 3) + average_weight
    assert rows["0.bias"].state_bytes == moment_and_step["0.bias"]
    assert rows["3.bias"].state_bytes == 0


@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("variant", VARIANTS)
def test_metrics_are_figures_of_the_curvature(variant: str, maximize: bool) -> None:
    model, twin = network(dtype=torch.float64), network(dtype=torch.float64)
    hyperparameters: dict[str, Any] = {"variant": variant, "lr": 1e-3, "update_interval": 2, "maximize": maximize}
    ours, naive = AdaFisher(model, **hyperparameters), NaiveAdaFisher(twin, **hyperparameters)
    assert ours.metrics() == {}
    for step in range(4):
        train(model, ours, range(step, step + 1))
        naive.zero_grad()
        backward(twin, step)
        naive.step()
    report = ours.metrics()
    assert list(report) == [name for name, _ in model.named_parameters()]
    for name, p in twin.named_parameters():
        curvature, moment = naive.curvature(p), naive.moments[id(p)]
        assert p.grad is not None
        gradient = -p.grad if maximize else p.grad
        direction = (moment / curvature).flatten()
        expected = {
            "damping_share": float((naive.groups[0]["damping"] / curvature).mean()),
            "smallest_step": 1e-3 / float(curvature.max()),
            "largest_step": 1e-3 / float(curvature.min()),
            "cosine_with_sgd": float(direction @ gradient.flatten() / direction.norm() / gradient.norm()),
            "skipped_elements": 0.0,
            "refused_statistics": 0.0,
        }
        assert report[name] == pytest.approx(expected, rel=1e-8), name


def test_cosine_of_a_tiny_gradient_is_no_smaller() -> None:
    """The relative variant does not depend on the scale of the loss, and neither does an angle."""
    cosines = []
    for scale in (1.0, 2.0**-40):
        torch.manual_seed(0)
        model = nn.Linear(5, 4)
        optimizer = AdaFisher(model, variant="relative")
        (model(torch.randn(6, 5)).square().sum() * scale).backward()
        optimizer.step()
        cosines.append(optimizer.metrics()["weight"]["cosine_with_sgd"])
    assert cosines[1] == pytest.approx(cosines[0], rel=1e-5)
    assert cosines[0] > 0.3


def test_metrics_count_what_was_skipped_and_refused() -> None:
    model = nn.Linear(3, 2)
    optimizer = AdaFisher(model)
    x = torch.randn(4, 3)
    x[0, 1] = math.nan
    model(x).square().sum().backward()
    optimizer.step()
    row = optimizer.metrics()["weight"]
    assert row["refused_statistics"] == 1
    assert row["skipped_elements"] == 6
    assert bool(model.weight.isfinite().all())


# The life of the hooks.


def test_close_removes_the_hooks_for_good() -> None:
    model = network()
    optimizer = AdaFisher(model, update_interval=3)
    assert hooks(model) == 5
    train(model, optimizer, range(2))
    optimizer.close()
    assert hooks(model) == 0
    train(model, optimizer, range(2, 3))
    with pytest.warns(UserWarning, match="closed"):
        train(model, optimizer, range(3, 4))
    optimizer.close()
    optimizer.load_state_dict(optimizer.state_dict())
    assert hooks(model) == 0
    train(model, optimizer, range(4, 5))


def test_closed_optimizer_stays_closed_when_a_group_is_added() -> None:
    model = network()
    optimizer = AdaFisher(model, params=[{"params": model[4:].parameters()}])
    optimizer.close()
    optimizer.add_param_group({"params": model[:4].parameters()})
    assert hooks(model) == 0


def test_collection_of_the_optimizer_removes_the_hooks() -> None:
    model = network()
    optimizer = AdaFisher(model)
    train(model, optimizer, range(2))
    assert hooks(model) == 5
    del optimizer
    gc.collect()
    assert hooks(model) == 0


def test_close_leaves_the_hooks_of_another_optimizer() -> None:
    model = network()
    first = AdaFisher(model, params=[{"params": model[:4].parameters()}])
    second = AdaFisher(model, params=[{"params": model[4:].parameters()}])
    assert hooks(model) == 5
    first.close()
    assert hooks(model) == 3
    train(model, second, range(1))
    assert "input_factor" in second.state[model[4].weight]
