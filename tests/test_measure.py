"""What measuring the cost of curvature proposes, and that it leaves everything as it was."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch

from fisher_kernels import KFAC, MBF, EKFACAdam
from fisher_kernels.optim.measure import Costs
from tests.small_network import assert_same_parameters, assert_same_state, network, train


@pytest.mark.parametrize(
    ("costs", "expected"),
    [
        ((1.0, 0.1, 0.2, 0.25), (1, 2)),
        ((1.0, 1.0, 8.0, 0.25), (20, 40)),
        ((1.0, 0.0, 0.0, 0.25), (1, 2)),
        ((2.0, 1.0, 8.0, 0.5), (5, 10)),
    ],
)
def test_intervals_keep_to_the_overhead(costs: Any, expected: tuple[int, int]) -> None:
    found = Costs(*costs)
    update, inverse = found.arguments.values()
    assert (update, inverse) == expected
    assert found.statistics / update + found.inverses / inverse <= found.overhead * found.iteration
    assert f"update_interval={update}, inverse_interval={inverse}" in str(found)


@pytest.mark.parametrize("kind", [MBF, KFAC, pytest.param(EKFACAdam, marks=pytest.mark.slow)])
def test_nothing_is_changed(kind: Any) -> None:
    model, twin = network(), network()
    ours, plain = kind(model, update_interval=3), kind(twin, update_interval=3)
    for net, optimizer in ((model, ours), (twin, plain)):
        train(net, optimizer, range(5))
    before, report, random = copy.deepcopy(ours.state_dict()), ours.metrics(), torch.get_rng_state()
    seen = []

    def iteration() -> None:
        torch.rand(1)
        train(model, ours, range(99, 100))
        seen.append(float(ours.state[model[4].weight]["fisher_updates"]))

    costs = ours.measure(iteration, repeats=2)
    # Of the iterations that are timed, every third takes no statistics.
    assert [b - a for a, b in itertools.pairwise(seen[1:])] == [0, 1, 1] * 2
    assert costs.iteration > 0
    assert torch.equal(torch.get_rng_state(), random)
    assert_same_parameters(model, twin)
    assert_same_state(ours.state_dict(), before)
    assert ours.metrics() == report
    for net, optimizer in ((model, ours), (twin, plain)):
        train(net, optimizer, range(5, 9))
    assert_same_parameters(model, twin)


def test_what_is_refused() -> None:
    model = network()
    ours = MBF(model)
    with pytest.raises(TypeError, match=r"^step_fn is 3, expected a function"):
        ours.measure(3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"^overhead is 0, expected"):
        ours.measure(lambda: None, overhead=0)
    with pytest.raises(ValueError, match=r"^repeats is 0, expected"):
        ours.measure(lambda: None, repeats=0)
