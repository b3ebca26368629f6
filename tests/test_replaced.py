"""Parameters, modules and parameter groups that are put in place of those an optimizer was made for."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

from fisher_kernels import MBF, SOFIM, AdaFisher

Make = Callable[..., Any]


def sofim(model: nn.Module, **settings: Any) -> SOFIM:
    return SOFIM(model.parameters())


@pytest.fixture(params=[AdaFisher, MBF])
def make(request: Any) -> Any:
    return request.param


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.LayerNorm(6), nn.Linear(6, 3))


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for t in steps:
        optimizer.zero_grad()
        model(torch.randn(8, 4, generator=torch.Generator().manual_seed(t))).square().mean().backward()
        optimizer.step()


def assert_same_parameters(a: nn.Module, b: nn.Module) -> None:
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


def test_parameters_that_a_loaded_state_brings_are_followed(make: Make) -> None:
    """Between refreshes, where not even one step's statistics are missing, nothing differs to the bit."""
    model = network()
    optimizer = make(model, update_interval=4, **({"refresh": "constant"} if make is MBF else {}))
    train(model, optimizer, range(2))
    twin, other = copy.deepcopy((model, optimizer))
    model.load_state_dict(copy.deepcopy(model.state_dict()), assign=True)
    assert not any(p in optimizer.state for p in model.parameters())
    for net, steps in ((model, optimizer), (twin, other)):
        train(net, steps, range(2, 4))
    assert_same_parameters(model, twin)
    train(model, optimizer, range(4, 6))
    assert [p for group in optimizer.param_groups for p in group["params"]] == list(model.parameters())
    assert len(optimizer.state) == len(list(model.parameters()))
    assert not any(row.fallback for row in optimizer.explain())


def test_groups_with_other_parameters_are_followed_before_a_step(make: Make) -> None:
    """As Accelerate puts shards there: they are reported, a state is loaded into them, and goes on to the bit."""
    model = network()
    optimizer = make(model)
    train(model, optimizer, range(2))
    twin = network()
    loaded = make(twin)
    for name, p in list(twin.named_parameters()):
        twin.get_submodule(name[0])._parameters[name[2:]] = nn.Parameter(p.detach().clone())
    loaded.param_groups[0]["params"] = list(twin.parameters())
    assert not any(row.fallback for row in loaded.explain())
    for name, p in list(twin.named_parameters()):
        twin.get_submodule(name[0])._parameters[name[2:]] = nn.Parameter(p.detach().clone())
    loaded.param_groups[0]["params"] = list(twin.parameters())
    loaded.load_state_dict(optimizer.state_dict())
    twin.load_state_dict(model.state_dict())
    for net, steps in ((model, optimizer), (twin, loaded)):
        train(net, steps, range(2, 4))
    assert_same_parameters(model, twin)


def test_a_model_that_is_given_memory_later_is_followed(make: Make) -> None:
    with torch.device("meta"):
        model = network()
    optimizer = make(model)
    model.to_empty(device="cpu")
    model.load_state_dict(network().state_dict())
    train(model, optimizer, range(3))
    fresh = network()
    assert all(not torch.equal(p, q) for p, q in zip(model.parameters(), fresh.parameters(), strict=True))
    known = "factor_weight" if make is AdaFisher else "fisher_updates"
    assert float(optimizer.state[model[0].weight][known]) > 0


def test_a_layer_in_place_of_another_is_followed_or_named(make: Make) -> None:
    model = network()
    optimizer = make(model)
    train(model, optimizer, range(1))
    model[3] = nn.Linear(6, 3)
    before = model[3].weight.detach().clone()
    train(model, optimizer, range(1, 4))
    assert not torch.equal(model[3].weight, before)
    assert not any(row.fallback for row in optimizer.explain())
    model[3] = nn.Linear(6, 2)
    with pytest.warns(UserWarning, match=r"no such parameters any more.*not trained: 3\.weight, 3\.bias\."):
        train(model, optimizer, range(4, 6))


def test_a_parameter_that_has_gone_is_named(make: Make) -> None:
    model = nn.Sequential(nn.Linear(4, 6, bias=False), nn.Linear(6, 3))
    optimizer = make(model)
    train(model, optimizer, range(1))
    weight_norm(model[0])
    with pytest.warns(UserWarning, match=r"no such parameters any more.*not trained: 0\.weight\.") as said:
        train(model, optimizer, range(1, 4))
    assert len(said) == 1


@pytest.mark.parametrize("make", [AdaFisher, MBF])
def test_a_module_that_is_none_is_nothing_new(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 3))
    model[0].register_module("head", None)
    model[0].register_parameter("scale", None)
    optimizer = make(model)
    monkeypatch.setattr(optimizer, "_follow", lambda: pytest.fail("nothing has been replaced"))
    train(model, optimizer, range(2))


@pytest.mark.parametrize("make", [AdaFisher, MBF, sofim])
def test_lists_of_parameters_may_be_replaced(make: Make) -> None:
    model = network()
    optimizer = make(model)
    train(model, optimizer, range(1))
    half = list(model[0].parameters())
    rest = list(model[2:].parameters())
    optimizer.param_groups[0]["params"] = half
    optimizer.param_groups.append({"params": rest, "lr": 0.0})
    before = [p.detach().clone() for p in model.parameters()]
    train(model, optimizer, range(1, 3))
    moved = [not torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True)]
    assert moved == [True] * len(half) + [False] * len(rest)


def test_parameters_that_are_not_of_the_model_are_named(make: Make) -> None:
    model = network()
    optimizer = make(model)
    copies = [nn.Parameter(p.detach().clone()) for p in model.parameters()]
    optimizer.param_groups[0]["params"] = copies
    with pytest.warns(UserWarning, match=r"100% of the trained.*param_groups\[0\]\['params'\]\[0\]"):
        optimizer.step()
