"""The schedule of refreshes: when statistics are taken and inverses made, and what survives a checkpoint."""

from __future__ import annotations

import itertools
import math
import warnings
from typing import Any

import pytest
import torch
from torch import nn

from fisher_kernels import MBF
from fisher_kernels.optim.refresh import NEVER, advance, distance, inverts, is_due
from tests.small_network import assert_same_parameters, assert_same_state, network, train


def group_of(**settings: Any) -> dict[str, Any]:
    before = dict.fromkeys(("refreshed", "inverted"), NEVER)
    intervals = {"update_interval": 10, "inverse_interval": 20}
    return {"iteration": 0, "refresh": "ramp", "ramp": 40, **intervals, **before, **settings}


def schedule(group: dict[str, Any], steps: int) -> tuple[list[int], list[int]]:
    """The steps that refresh statistics, and those that make inverses."""
    refreshed, inverted = [], []
    for _ in range(steps):
        refreshes = is_due(group)
        if refreshes:
            refreshed.append(group["iteration"])
        if inverts(group, refreshes):
            inverted.append(group["iteration"])
        advance(group, refreshes)
    return refreshed, inverted


def test_constant_intervals() -> None:
    group = group_of(refresh="constant", update_interval=2, inverse_interval=3)
    assert schedule(group, 8) == ([0, 2, 4, 6], [0, 3, 6])


def test_the_ramp_by_hand() -> None:
    """1 + floor(9 t / 40) steps after a refresh in step t, and 1 + floor(19 t / 40) where the next refresh is."""
    refreshed, inverted = schedule(group_of(), 100)
    assert refreshed == [0, 1, 2, 3, 4, 5, 7, 9, 12, 15, 19, 24, 30, 37, 46, 56, 66, 76, 86, 96]
    assert inverted == [0, 1, 2, 3, 5, 9, 15, 24, 37, 56, 76, 96]


@pytest.mark.parametrize(("interval", "ramp"), [(1, 40), (7, 0), (10, 40), (10, 0.5), (400, 40), (3, 1e6)])
def test_distances_grow_from_one_to_the_interval(interval: int, ramp: float) -> None:
    refreshed, inverted = schedule(group_of(update_interval=interval, inverse_interval=interval, ramp=ramp), 3000)
    assert refreshed == inverted
    steps = [b - a for a, b in itertools.pairwise(refreshed)]
    assert steps == sorted(steps)
    assert steps[0] == (1 if ramp else interval)
    assert steps[-1] == (interval if ramp < 3000 else 1)
    assert all(distance(interval, ramp, step) == interval for step in range(math.ceil(ramp), 3000))


def test_inverses_wait_for_statistics() -> None:
    refreshed, inverted = schedule(group_of(inverse_interval=1), 100)
    assert inverted == refreshed


def test_a_changed_setting_takes_effect_at_the_next_step() -> None:
    group = group_of()
    schedule(group, 60)  # the next one would be in step 66
    group["update_interval"] = 2
    assert schedule(group, 5)[0] == [60, 62, 64]
    group.update(refresh="constant", update_interval=3)
    assert schedule(group, 5)[0] == [66, 69]
    group.update(refresh="ramp", update_interval=10)
    assert schedule(group, 20)[0] == [79, 89]


def updates(model: nn.Sequential, optimizer: MBF, steps: range) -> list[int]:
    """How many batches the blocks of a layer have averaged after each step."""
    found = []
    for step in steps:
        train(model, optimizer, range(step, step + 1))
        found.append(int(optimizer.state[model[4].weight]["fisher_updates"]))
    return found


def test_an_optimizer_follows_its_ramp() -> None:
    model = network()
    assert updates(model, MBF(model, update_interval=10, ramp=40), range(12)) == [1, 2, 3, 4, 5, 6, 6, 7, 7, 8, 8, 8]


def test_an_optimizer_follows_a_changed_setting_from_the_next_step_on() -> None:
    model = network()
    ours = MBF(model, update_interval=1000, refresh="constant")
    assert updates(model, ours, range(3)) == [1, 1, 1]
    ours.param_groups[0]["update_interval"] = 1
    assert updates(model, ours, range(3, 5)) == [2, 3]
    ours.param_groups[0].update(refresh="ramp", ramp=0, update_interval=3)
    assert updates(model, ours, range(5, 9)) == [3, 3, 4, 4]


@pytest.mark.parametrize("saved", [5, 6, 8])
def test_a_ramp_resumes_bit_for_bit(saved: int) -> None:
    model, twin = network(), network()
    settings = {"update_interval": 5, "inverse_interval": 10, "ramp": 12}
    ours = MBF(model, **settings)
    train(model, ours, range(saved))
    resumed = MBF(twin)
    twin.load_state_dict(model.state_dict())
    resumed.load_state_dict(ours.state_dict())
    for net, optimizer in ((model, ours), (twin, resumed)):
        train(net, optimizer, range(saved, saved + 8))
    assert_same_parameters(model, twin)
    assert_same_state(resumed.state_dict(), ours.state_dict())


def test_groups_that_come_later_have_a_ramp_of_their_own() -> None:
    model = network()
    ours = MBF(model, params=[{"params": model[:4].parameters()}], update_interval=100, ramp=0)
    train(model, ours, range(2))
    ours.add_param_group({"params": model[4:].parameters(), "update_interval": 1})
    train(model, ours, range(2, 4))
    assert float(ours.state[model[0].weight]["fisher_updates"]) == 1
    assert float(ours.state[model[4].weight]["fisher_updates"]) == 2


def test_a_state_without_the_settings_loads_as_constant_intervals() -> None:
    model, twin = network(), network()
    ours = MBF(model, refresh="constant", update_interval=3)
    train(model, ours, range(4))
    state = ours.state_dict()
    for group in state["param_groups"]:
        for name in ("refresh", "ramp", "refreshed", "inverted"):
            del group[name]
    twin.load_state_dict(model.state_dict())
    resumed = MBF(twin)
    resumed.load_state_dict(state)
    assert resumed.param_groups[0]["refresh"] == "constant"
    for net, optimizer in ((model, ours), (twin, resumed)):
        train(net, optimizer, range(4, 8))
    assert_same_parameters(model, twin)


def test_a_step_that_is_skipped_leaves_its_refresh_due() -> None:
    model = network()
    ours = MBF(model, update_interval=1000)
    train(model, ours, range(1))
    ours.found_inf = torch.ones(())
    train(model, ours, range(1, 2))
    assert ours.param_groups[0]["iteration"] == 1
    ours.found_inf = None
    assert updates(model, ours, range(2, 3)) == [2]


def test_curvature_out_of_date_is_named_and_capped() -> None:
    """Blocks of tiny gradients, kept for long, make steps that are far too long when gradients are not."""
    model = nn.Linear(4, 3)
    ours = MBF(model, kl_clip=None, refresh="constant", update_interval=50, inverse_interval=50)
    x = torch.randn(16, 4)

    def step(scale: float) -> None:
        ours.zero_grad()
        (scale * model(x).square().mean()).backward()
        ours.step()

    step(1e-4)
    before = torch.cat([p.detach().flatten() for p in model.parameters()])
    with pytest.warns(UserWarning, match=r"steps of weight, bias were longer than the weights.*inverse_interval=50"):
        step(100.0)
    moved = torch.cat([p.detach().flatten() for p in model.parameters()]) - before
    torch.testing.assert_close(moved.norm(), 0.1 * before.norm(), rtol=1e-4, atol=0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step(100.0)  # it is said once
