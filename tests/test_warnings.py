"""Warnings of the optimizers: where they point, how often they come, and what a state of another model says."""

from __future__ import annotations

import copy
import gc
import inspect
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from fisher_kernels import MBF, SOFIM, AdaFisher, AdaFisherW
from fisher_kernels.optim.layerwise import LayerwiseOptimizer

LAYERWISE = [AdaFisher, AdaFisherW, MBF]


class Subclass(AdaFisher):
    """With a constructor of its own, one call further away from the warning."""

    def __init__(self, model: nn.Module, **settings: Any) -> None:
        super().__init__(model, **settings)


class Odd(nn.Module):
    """Most of its parameters are in no layer."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.table = nn.Linear(2, 2), nn.Parameter(torch.ones(2, 9))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.layer(x) @ self.table
        return out


def network(width: int = 3) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(2, width), nn.Tanh(), nn.Linear(width, 1))


def sofim(model: nn.Module, **settings: Any) -> SOFIM:
    return SOFIM(model.named_parameters(), **settings)


def iterate(model: nn.Module, *optimizers: torch.optim.Optimizer) -> None:
    model(torch.ones(4, 2)).square().sum().backward()
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()


def assert_points_here(record: pytest.WarningsRecorder, line: int) -> None:
    (warning,) = record
    assert warning.filename == __file__
    assert warning.lineno == line


def line() -> int:
    frame = inspect.currentframe()
    assert frame is not None
    assert frame.f_back is not None
    return frame.f_back.f_lineno


@pytest.mark.parametrize("make", LAYERWISE)
def test_fallbacks_are_warned_of_at_the_line_that_constructs_and_once(make: type[LayerwiseOptimizer[Any]]) -> None:
    with pytest.warns(UserWarning, match=r"have no layer rule and take a fallback \(table\)") as record:
        make(Odd())
    assert_points_here(record, line() - 1)
    for _ in range(3):
        with warnings.catch_warnings():  # which makes Python forget what it has warned of
            make(Odd())


def test_a_warning_points_at_the_constructor_of_a_users_subclass() -> None:
    with pytest.warns(UserWarning, match="fallback") as record:
        Subclass(Odd())
    assert record[0].filename == __file__


def test_a_step_without_statistics_is_warned_of_at_the_step_and_once_for_a_model() -> None:
    model = network()
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer = AdaFisher(model)
    scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer)  # which wraps the step
    with pytest.warns(UserWarning, match="saw no statistics") as record:
        optimizer.step()
    assert_points_here(record, line() - 1)
    del optimizer, scheduler
    AdaFisher(model).step()
    with pytest.warns(UserWarning, match="saw no statistics"):
        MBF(model).step()


@pytest.mark.parametrize("make", LAYERWISE)
def test_optimizers_that_read_the_same_model_are_warned_of_once(make: type[LayerwiseOptimizer[Any]]) -> None:
    model = network()
    kept = [AdaFisher(model) for _ in range(3)]
    last = make(model)
    with pytest.warns(UserWarning, match=r"4 living optimizers read layers of this model.*close\(\)") as record:
        iterate(model, last)
    assert len(record) == 1
    assert record[0].filename == __file__
    kept.append(AdaFisher(model))
    iterate(model, last)


@pytest.mark.parametrize("how", ["closed", "deleted", "in a cycle", "of other layers", "of a copy"])
def test_optimizers_that_are_no_burden_are_not_warned_of(how: str) -> None:
    model = network()
    gc.disable()
    try:
        old: Any = AdaFisher(model if how != "of other layers" else model[0])
        iterate(model, old)
        if how == "closed":
            old.close()
        elif how == "in a cycle":
            old.itself = old
            del old
        elif how == "deleted":
            del old
        elif how == "of a copy":
            old, model = (old, network())
        new = MBF(model if how != "of other layers" else model[2])
        iterate(model, new)
    finally:
        gc.enable()


@pytest.mark.parametrize("other", [SOFIM, MBF, AdaFisher])
def test_two_optimizers_that_step_the_same_parameters_in_turn_are_warned_of_once(other: Any) -> None:
    model = network()
    first = AdaFisher(model)
    first.close()
    second = SOFIM(model.parameters()) if other is SOFIM else other(model)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*saw no statistics")
        iterate(model, first)
        iterate(model, second)  # one that takes over is no rival
        with pytest.warns(UserWarning, match=r"steps some of the same parameters in turn.*close\(\)") as record:
            iterate(model, first)
        assert len(record) == 1
        iterate(model, second, first)
        iterate(model, first, second)


def test_optimizers_of_other_parameters_step_in_turn_without_a_word() -> None:
    model = network()
    optimizers = SOFIM(model[0].parameters()), SOFIM(model[2].parameters()), AdaFisher(network())
    for _ in range(3):
        iterate(model, *optimizers[:2])
        iterate(optimizers[2]._model, optimizers[2])


# What is no number, no parameter, or of another model.


@pytest.mark.parametrize(
    ("make", "name"),
    [
        *((AdaFisher, name) for name in ("beta", "gamma", "damping", "eps", "weight_decay", "fallback_curvature")),
        *((MBF, name) for name in ("momentum", "beta2", "damping", "weight_decay", "kl_clip")),
        *(
            (lambda model, **settings: SOFIM(model.parameters(), **settings), name)
            for name in ("rho", "beta", "weight_decay")
        ),
    ],
)
def test_what_is_no_number_is_named(make: Any, name: str) -> None:
    with pytest.raises(TypeError, match=f"{name} is '0.5', expected a"):
        make(network(), **{name: "0.5"})
    make(network(), **{name: np.float32(0.5)})


def test_an_lr_that_is_no_number_is_named() -> None:
    with pytest.raises(TypeError, match=r"lr is '1e-3', expected a number or a tensor of one element"):
        AdaFisher(network(), lr="1e-3")  # type: ignore[arg-type]


@pytest.mark.parametrize("scaler", [1024.0, True, "x", torch.amp.GradScaler])
def test_what_is_no_scaler_is_named(scaler: Any) -> None:
    with pytest.raises(TypeError, match=r"^grad_scaler is .*, expected a torch\.amp\.GradScaler or None"):
        AdaFisher(network(), grad_scaler=scaler)


@pytest.mark.parametrize("group", [0, True, "world"])
def test_what_is_no_process_group_is_named(group: Any) -> None:
    with pytest.raises(TypeError, match=r"^process_group is .*, expected a torch\.distributed\.ProcessGroup or None"):
        MBF(network(), process_group=group)


def test_parameters_of_another_model_are_refused() -> None:
    with pytest.raises(ValueError, match=r"^params has no parameter of model: none of these 4 is in the Sequential"):
        AdaFisher(network(), params=network().parameters())


def test_parameters_that_the_model_lacks_are_told_as_such() -> None:
    model, other = network(), nn.Linear(64, 64)
    with pytest.warns(UserWarning, match=r"no layer rule .*, of which 2 are not in the model; print"):
        optimizer = AdaFisher(model, params=[*model.parameters(), *other.parameters()])
    assert [row.detail.startswith("not in the model; ") for row in optimizer.explain()] == [False] * 4 + [True] * 2


def test_a_sparse_embedding_that_is_the_model_is_named_so() -> None:
    with pytest.raises(ValueError, match=r"^the model is an Embedding with sparse=True"):
        AdaFisher(nn.Embedding(3, 2, sparse=True))


def test_a_model_in_place_of_its_parameters_is_told_what_to_write() -> None:
    with pytest.raises(TypeError, match=r"^params is a Sequential, expected .* pass model\.parameters\(\)"):
        SOFIM(network())  # type: ignore[arg-type]


@pytest.mark.parametrize("make", [*LAYERWISE, sofim])
def test_a_state_of_other_widths_names_the_parameter_and_changes_nothing(make: Any) -> None:
    wide, narrow = network(5), network(3)
    theirs, ours = make(wide), make(narrow)
    iterate(wide, theirs)
    iterate(narrow, ours)
    before = copy.deepcopy(ours.state_dict())
    with pytest.raises(ValueError, match=r"'0\.weight' .*has shape \(5, 2\), expected \(3, 2\)"):
        ours.load_state_dict(theirs.state_dict())
    after = ours.state_dict()
    assert before["param_groups"] == after["param_groups"]
    for number, state in before["state"].items():
        for name, value in state.items():
            assert torch.equal(after["state"][number][name], value)
    iterate(narrow, ours)
