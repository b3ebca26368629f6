"""States that torch.distributed.checkpoint saves and loads, of which a fresh optimizer does not know everything yet."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.nn import functional as F

from fisher_kernels import EKFAC, KFAC, MBF, AdaFisher, AdaFisherW, EKFACAdam
from fisher_kernels.optim import momentum_image
from fisher_kernels.optim.layerwise import FUNCTIONS, UNSERVED
from fisher_kernels.optim.momentum_image import HOLDS
from tests.comparison import assert_same_bits
from tests.small_network import Tied, assert_same_parameters, assert_same_state

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning"),
    pytest.mark.filterwarnings("ignore:.* of the trained parameters have no layer rule"),
]

every_kind = pytest.mark.parametrize("kind", [AdaFisher, MBF, KFAC, EKFAC, EKFACAdam])
however_laid_out = pytest.mark.parametrize("flatten", [False, True])


class ByFunction(nn.Module):
    """A weight that a function applies, beside a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 8)
        self.second = nn.Parameter(torch.randn(5, 8) / 3)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(torch.tanh(self.first(x)), self.second)


class Standardised(nn.Linear):
    """Not what its class documents."""

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, self.weight - self.weight.mean(1, keepdim=True), self.bias)


def misfit() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), Standardised(8, 5))


def plain() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 5))


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        x, y = torch.randn(4, 6, generator=generator), torch.randint(5, (4,), generator=generator)
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()


def built(make: Callable[[], nn.Module], weights: dict[str, Tensor] | None = None) -> nn.Module:
    torch.manual_seed(0)
    model = make()
    if weights is not None:
        model.load_state_dict(weights)
    return model


def through_disk(
    model: nn.Module, optimizer: Any, twin: nn.Module, fresh: Any, folder: Path, flatten: bool = False
) -> None:
    """Save the state of one optimizer, and load it into that of another."""
    options = StateDictOptions(flatten_optimizer_state_dict=flatten)
    saved = {"optimizer": get_optimizer_state_dict(model, optimizer, options=options)}
    dcp.save(saved, checkpoint_id=folder, no_dist=True)
    loaded = {"optimizer": get_optimizer_state_dict(twin, fresh, options=options)}
    dcp.load(loaded, checkpoint_id=folder, no_dist=True)
    set_optimizer_state_dict(twin, fresh, loaded["optimizer"], options=options)


@however_laid_out
@pytest.mark.parametrize("kind", [KFAC, EKFAC])
def test_images_of_the_momentum_are_loaded(
    kind: type[KFAC], flatten: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(momentum_image, "LEAST", 0)
    monkeypatch.setattr(momentum_image, "SHARE", 2.0)
    settings: dict[str, Any] = {"refresh": "constant", "update_interval": 2, "inverse_interval": 4}
    model = built(plain)
    optimizer = kind(model, **settings)
    for begin in range(5):  # in front of the first images, of steps that carry them on, and of a turn
        train(model, optimizer, range(begin, begin + 1))
        twin = built(plain, model.state_dict())
        fresh = kind(twin, **settings)
        through_disk(model, optimizer, twin, fresh, tmp_path / str(begin), flatten)
        holds = {bool(state[HOLDS]) for state in fresh.state.values() if HOLDS in state}
        assert holds == {begin > 0}
        other = built(plain, model.state_dict())
        undisturbed = kind(other, **settings)
        undisturbed.load_state_dict(optimizer.state_dict())
        for net, its in ((twin, fresh), (other, undisturbed)):
            train(net, its, range(begin + 1, begin + 4))
        assert_same_parameters(twin, other)
        assert_same_state(fresh.state_dict(), undisturbed.state_dict())


@every_kind
@however_laid_out
def test_what_a_step_has_found_out_is_loaded_into_an_optimizer_that_has_taken_one(
    kind: Any, flatten: bool, tmp_path: Path
) -> None:
    model = built(ByFunction)
    optimizer = kind(model, update_interval=1)
    train(model, optimizer, range(3))
    assert optimizer.param_groups[0][FUNCTIONS].keys() == {"second"}
    twin = built(ByFunction)
    fresh = kind(twin, update_interval=1)
    train(twin, fresh, range(20, 21))
    twin.load_state_dict(model.state_dict())
    through_disk(model, optimizer, twin, fresh, tmp_path, flatten)
    assert_same_state(fresh.state_dict(), optimizer.state_dict())
    train(model, optimizer, range(3, 6))
    train(twin, fresh, range(3, 6))
    assert_same_parameters(model, twin)


@pytest.mark.parametrize("kind", [AdaFisher, AdaFisherW])
def test_what_a_fresh_optimizer_does_not_load_is_named(kind: type[AdaFisher], tmp_path: Path) -> None:
    model = built(ByFunction)
    optimizer = kind(model)
    train(model, optimizer, range(2))
    twin = built(ByFunction, model.state_dict())
    fresh = kind(twin)
    with pytest.warns(UserWarning, match=f"{kind.__name__}: the state .* no statistics of second, which begin anew"):
        through_disk(model, optimizer, twin, fresh, tmp_path)
    assert fresh.param_groups[0][FUNCTIONS] == optimizer.param_groups[0][FUNCTIONS]
    train(twin, fresh, range(2, 4))
    assert not list(fresh._without_statistics())


@pytest.mark.parametrize("kind", [MBF, KFAC, EKFAC, EKFACAdam])
def test_what_a_fresh_optimizer_cannot_load_is_refused(kind: Any, tmp_path: Path) -> None:
    """Its state is that of a weight without a rule."""
    model = built(ByFunction)
    optimizer = kind(model)
    train(model, optimizer, range(2))
    twin = built(ByFunction, model.state_dict())
    with pytest.raises(CheckpointException, match=r"optimizer\.state\.second"):
        through_disk(model, optimizer, twin, kind(twin), tmp_path)


@every_kind
def test_nothing_is_lost_on_the_way_through_memory(kind: Any) -> None:
    model = built(ByFunction)
    optimizer = kind(model)
    train(model, optimizer, range(2))
    twin = built(ByFunction, model.state_dict())
    fresh = kind(twin)
    set_optimizer_state_dict(twin, fresh, get_optimizer_state_dict(model, optimizer))
    assert_same_state(fresh.state_dict(), optimizer.state_dict())
    train(model, optimizer, range(2, 5))
    train(twin, fresh, range(2, 5))
    assert_same_parameters(model, twin)


@pytest.mark.filterwarnings("ignore:.*cannot be served by a rule")
@every_kind
def test_layers_that_are_not_served_stay_so(kind: Any, tmp_path: Path) -> None:
    model = built(misfit)
    optimizer = kind(model)
    train(model, optimizer, range(2))
    assert optimizer.param_groups[0][UNSERVED].keys() == {"2"}
    twin = built(misfit)
    fresh = kind(twin)
    train(twin, fresh, range(20, 21))
    twin.load_state_dict(model.state_dict())
    fresh.param_groups[0][UNSERVED] = {}  # it comes with the state
    through_disk(model, optimizer, twin, fresh, tmp_path)
    assert fresh.param_groups[0][UNSERVED] == optimizer.param_groups[0][UNSERVED]
    train(model, optimizer, range(2, 5))
    train(twin, fresh, range(2, 5))
    assert_same_parameters(model, twin)


def test_statistics_of_a_frozen_weight_are_named() -> None:
    """Those of its bias are there, and torch leaves out the state of what has no gradient."""
    model = built(plain)
    model[0].weight.requires_grad_(False)  # type: ignore[index]
    optimizer = AdaFisher(model)
    train(model, optimizer, range(2))
    twin = built(plain, model.state_dict())
    twin[0].weight.requires_grad_(False)  # type: ignore[index]
    fresh = AdaFisher(twin)
    with pytest.warns(UserWarning, match=r"no statistics of 0\.weight, which begin anew"):
        set_optimizer_state_dict(twin, fresh, get_optimizer_state_dict(model, optimizer))
    train(twin, fresh, range(2, 3))


@pytest.mark.filterwarnings("ignore:.*layers have a gradient, and a refresh saw no use of them")
@pytest.mark.parametrize("kind", [MBF, KFAC, EKFAC])
def test_blocks_of_a_layer_that_is_not_used_are_named(kind: Any, tmp_path: Path) -> None:
    class Skipped(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return torch.einsum("oi,bi->bo", self[1].weight, self[0](x)) + self[1].bias

    model = built(lambda: Skipped(nn.Linear(6, 8), nn.Linear(8, 5)))
    optimizer = kind(model)
    train(model, optimizer, range(2))
    assert optimizer.state[model[1].weight].keys() >= {"unused_fisher_blocks", "fisher_updates"}  # type: ignore[index]
    twin = built(lambda: Skipped(nn.Linear(6, 8), nn.Linear(8, 5)), model.state_dict())
    fresh = kind(twin)
    with pytest.warns(UserWarning, match=r"no statistics of 1\.weight, 1\.bias, which begin anew"):
        through_disk(model, optimizer, twin, fresh, tmp_path)
    assert fresh.param_groups[0][UNSERVED].keys() == {"1"}
    train(twin, fresh, range(2, 4))
    assert not list(fresh._without_statistics())


@pytest.mark.parametrize("kind", [AdaFisher, MBF])
def test_a_weight_that_is_used_twice(kind: Any, tmp_path: Path) -> None:
    def step(model: nn.Module, optimizer: torch.optim.Optimizer, number: int) -> None:
        x = torch.randint(7, (3, 5), generator=torch.Generator().manual_seed(number))
        optimizer.zero_grad()
        F.cross_entropy(model(x).flatten(0, 1), x.roll(1).flatten()).backward()
        optimizer.step()

    model, twin = built(Tied), built(Tied)
    optimizer, fresh = kind(model), kind(twin)
    for number in range(3):
        step(model, optimizer, number)
    twin.load_state_dict(model.state_dict())
    through_disk(model, optimizer, twin, fresh, tmp_path)
    assert_same_state(fresh.state_dict(), optimizer.state_dict())
    for number in range(3, 6):
        step(model, optimizer, number)
        step(twin, fresh, number)
    assert_same_parameters(model, twin)


def test_a_learning_rate_in_a_tensor_stays_the_same_one() -> None:
    lr = torch.tensor(1e-2)
    model = built(plain)
    optimizer = AdaFisher(model, lr=lr)
    get_optimizer_state_dict(model, optimizer)
    assert optimizer.param_groups[0]["lr"] is lr
    assert_same_bits(lr, torch.tensor(1e-2))


def test_a_step_with_gradients_of_zero_counts_otherwise() -> None:
    """It is known by who takes it, not by its gradients."""
    model = built(plain)
    optimizer = AdaFisher(model, lr=0.0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        optimizer.step()
    assert optimizer.param_groups[0]["iteration"] == 1
    assert float(optimizer.state[next(model.parameters())]["step"]) == 1
