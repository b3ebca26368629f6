"""The floor of the caps: as what a layer's weights count at least, by its fan-in."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fisher_kernels import EKFAC, KFAC, MBF, EKFACAdam
from fisher_kernels.curvature.operations import linear, product
from fisher_kernels.curvature.rules import fan_in
from fisher_kernels.optim.floors import FLOOR
from tests.layer_cases import Conv1D

pytestmark = pytest.mark.usefixtures("host_backend", "one_thread")

KINDS: dict[type[Any], dict[str, Any]] = {
    MBF: {"lr": 1e3, "kl_clip": None},
    KFAC: {"lr": 1e3, "kl_clip": None, "others": "curvature"},
    EKFAC: {"lr": 1e3, "kl_clip": None, "others": "curvature"},
    EKFACAdam: {"lr": 1e3},
}
"""Steps that nothing bounds but the cap."""
every_kind = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)


# The fan-in.

DRAWN = (
    nn.Linear(12, 5),
    nn.Bilinear(3, 4, 5),
    nn.Conv1d(4, 6, 3, groups=2),
    nn.Conv2d(4, 8, (3, 2)),
    nn.ConvTranspose2d(4, 6, 3),
    nn.ConvTranspose1d(4, 6, 5, groups=2),
)
ONES = (
    nn.Embedding(7, 3),
    nn.EmbeddingBag(7, 3),
    nn.LayerNorm((4, 5)),
    nn.RMSNorm(6),
    nn.BatchNorm2d(6),
    nn.GroupNorm(2, 6),
)


@pytest.mark.parametrize("module", DRAWN, ids=str)
def test_fan_in_is_what_torch_draws_weights_relative_to(module: Any) -> None:
    wanted = nn.init._calculate_fan_in_and_fan_out(module.weight)[0]
    assert fan_in(module.weight, module) == fan_in(module.weight) == wanted


@pytest.mark.parametrize("module", ONES, ids=str)
def test_what_acts_element_by_element_has_none(module: Any) -> None:
    assert fan_in(module.weight, module) == 1


def test_fan_in_of_weights_that_lie_otherwise() -> None:
    assert fan_in(Conv1D(5, 12).weight, Conv1D(5, 12)) == 12
    experts = torch.zeros(6, 7, 3)
    flat = experts.view(42, 3)
    assert fan_in(experts, linear(flat)) == 3
    assert fan_in(experts, product(flat)) == 7


def test_fan_in_of_parameters_without_a_layer() -> None:
    wanted = {(): 1, (9,): 1, (5, 2, 3): 6, (0, 3): 3, (5, 0): 1}
    assert {shape: fan_in(torch.zeros(shape)) for shape in wanted} == wanted


# Steps.


class Adapted(nn.Module):
    """A wide layer beside an adapter of rank 3, of which the second matrix begins as zero."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.base = nn.Linear(100, 6)
        self.down, self.up = nn.Linear(100, 3, bias=False), nn.Linear(3, 6, bias=False)
        nn.init.zeros_(self.up.weight)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.base(x) + self.up(self.down(x))
        return out


def step(model: nn.Module, optimizer: Any, shape: tuple[int, ...] = (100,)) -> dict[str, Tensor]:
    """How far parameters move in a step."""
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    x = torch.randn(8, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    optimizer.zero_grad()
    F.mse_loss(out := model(x), torch.ones_like(out)).backward()
    optimizer.step()
    return {name: p.detach() - before[name] for name, p in model.named_parameters()}


def norm(*tensors: Tensor) -> float:
    return math.sqrt(sum(float(x.detach().square().sum()) for x in tensors))


@every_kind
@pytest.mark.parametrize("floor", [None, 0.0, 0.05])
def test_zeros_move_by_the_floor_of_their_layer(kind: type[Any], floor: float | None) -> None:
    """And the wide layer by what it is, weight and bias together."""
    model = Adapted()
    given = {} if floor is None else {"floor": floor}
    size = norm(model.base.weight, model.base.bias)
    assert size > FLOOR / math.sqrt(100) * math.sqrt(606)
    moved = step(model, kind(model, max_relative_step=0.1, **KINDS[kind], **given))
    wanted = 0.1 * (FLOOR if floor is None else floor) / math.sqrt(3) * math.sqrt(18)
    assert norm(moved["up.weight"]) == pytest.approx(wanted, rel=1e-9)
    assert norm(moved["base.weight"], moved["base.bias"]) == pytest.approx(0.1 * size, rel=1e-9)


@every_kind
def test_weights_below_the_floor_count_as_that(kind: type[Any]) -> None:
    """The bias has the fan-in of its weight."""
    model = Adapted()
    with torch.no_grad():
        for p in model.base.parameters():
            p.mul_(1e-3)
    moved = step(model, kind(model, max_relative_step=0.1, **KINDS[kind]))
    wanted = 0.1 * FLOOR / math.sqrt(100) * math.sqrt(606)
    assert norm(moved["base.weight"], moved["base.bias"]) == pytest.approx(wanted, rel=1e-9)


@every_kind
def test_a_bias_that_is_trained_alone_has_the_fan_in_of_its_weight(kind: type[Any]) -> None:
    model = Adapted()
    nn.init.zeros_(model.base.bias)
    moved = step(model, kind(model, params=[model.base.bias], max_relative_step=0.1, **KINDS[kind]))
    assert norm(moved["base.bias"]) == pytest.approx(0.1 * FLOOR / math.sqrt(100) * math.sqrt(6), rel=1e-9)


@pytest.mark.parametrize("kind", [MBF, KFAC], ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("transposed", [False, True])
def test_convolutions(kind: type[Any], transposed: bool) -> None:
    torch.manual_seed(0)
    model = (nn.ConvTranspose2d if transposed else nn.Conv2d)(4, 6, 3, bias=False).double()
    nn.init.zeros_(model.weight)
    moved = step(model, kind(model, max_relative_step=0.1, **KINDS[kind]), (4, 5, 5))
    fan = 9 * (6 if transposed else 4)
    assert norm(moved["weight"]) == pytest.approx(0.1 * FLOOR / math.sqrt(fan) * math.sqrt(216), rel=1e-9)


@every_kind
def test_a_floor_that_is_changed_counts_from_the_next_step_on(kind: type[Any]) -> None:
    model, other = Adapted(), Adapted()
    optimizer = kind(model, max_relative_step=0.1, **KINDS[kind])
    for group in optimizer.param_groups:
        group["floor"] = 0.02
    twin = kind(other, max_relative_step=0.1, floor=0.02, **KINDS[kind])
    torch.testing.assert_close(step(model, optimizer), step(other, twin), rtol=0, atol=0)
    optimizer.param_groups[0]["floor"] = -0.5
    with pytest.raises(ValueError, match=r"floor is -0.5, expected a finite number of at least 0"):
        step(model, optimizer)


# Groups.


def groups(model: Adapted, floor: float) -> list[dict[str, Any]]:
    beside = [*model.base.parameters(), *model.down.parameters()]
    return [{"params": beside}, {"params": [model.up.weight], "floor": floor}]


@every_kind
def test_each_group_has_its_own(kind: type[Any]) -> None:
    model = Adapted()
    moved = step(model, kind(model, params=groups(model, 2.0), max_relative_step=0.1, **KINDS[kind]))
    assert norm(moved["up.weight"]) == pytest.approx(0.1 * 2.0 / math.sqrt(3) * math.sqrt(18), rel=1e-9)
    assert norm(moved["base.weight"], moved["base.bias"]) < 0.1 * 2.0 / math.sqrt(100) * math.sqrt(606)


@every_kind
def test_the_smallest_of_a_layer_counts(kind: type[Any]) -> None:
    model = Adapted()
    for p in model.base.parameters():
        nn.init.zeros_(p)
    params = [{"params": [model.base.bias], "floor": 0.1}, {"params": [model.base.weight], "floor": 0.4}]
    moved = step(model, kind(model, params=params, max_relative_step=0.1, **KINDS[kind]))
    wanted = 0.1 * 0.1 / math.sqrt(100) * math.sqrt(606)
    assert norm(moved["base.weight"], moved["base.bias"]) == pytest.approx(wanted, rel=1e-9)


@pytest.mark.parametrize("kind", [MBF, KFAC], ids=lambda kind: kind.__name__)
def test_groups_of_other_floors_share_a_trust_region(kind: type[Any]) -> None:
    """Where no cap binds a floor of their own changes nothing at all."""
    plain, apart = Adapted(), Adapted()
    for model, params in ((plain, None), (apart, groups(apart, 0.7))):
        optimizer = kind(model, params=params, lr=0.1, kl_clip=1e-4, max_relative_step=1e6)
        step(model, optimizer)
        step(model, optimizer)
        assert {row["trust_scale"] for row in optimizer.metrics().values()} != {1.0}
    for x, y in zip(plain.parameters(), apart.parameters(), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-15)


# States.


@every_kind
@pytest.mark.parametrize("saved", [None, 1e-3])
def test_states_that_were_saved_before(kind: type[Any], saved: float | None) -> None:
    """One that says nothing of a floor has the default; a number is the one that was saved, by the fan-in now."""
    model = Adapted()
    state = copy.deepcopy(kind(model, max_relative_step=0.1, **KINDS[kind]).state_dict())
    for group in state["param_groups"]:
        del group["floor"]
        if saved is not None:
            group["floor"] = saved
    resumed = kind(model, floor=5.0)
    resumed.load_state_dict(state)
    floor = FLOOR if saved is None else saved
    assert resumed.param_groups[0]["floor"] == floor
    moved = step(model, resumed)
    assert norm(moved["up.weight"]) == pytest.approx(0.1 * floor / math.sqrt(3) * math.sqrt(18), rel=1e-9)
