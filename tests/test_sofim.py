"""SOFIM beyond the contract of all optimizers: against its definition, its limits and symmetries, its metrics."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import functional_call

from fisher_kernels import SOFIM
from tests.small_network import (
    assert_same_parameters,
    assert_same_state,
    backward,
    loss_of,
    network,
    parameters_of,
    train,
)

pytestmark = pytest.mark.usefixtures("host_backend", "one_thread")

DIRECTIONS = ("momentum", "gradient")
SCOPES = ("global", "tensor")


def joined(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([x.detach().double().flatten() for x in tensors])


class Naive:
    """SOFIM in float64 on one vector, its Fisher matrix formed and solved with: it shares no code with the package.

    Groups of scope "global" are one vector; where the scope is "tensor" every parameter is one.
    """

    def __init__(self, groups: Sequence[dict[str, Any]], **settings: Any) -> None:
        defaults = {
            "lr": 0.1,
            "rho": 0.01,
            "beta": 0.9,
            "direction": "momentum",
            "scope": "global",
            "weight_decay": 0.0,
            "decoupled": True,
            "maximize": False,
        }
        groups = [{**defaults, **settings, **g, "params": list(g["params"])} for g in groups]
        whole = [(p, g) for g in groups if g["scope"] == "global" for p in g["params"]]
        each = [[(p, g)] for g in groups if g["scope"] == "tensor" for p in g["params"]]
        self.vectors = [v for v in (whole, *each) if v]
        self.moments = [0.0 * joined([p for p, _ in vector]) for vector in self.vectors]
        self.steps = 0
        self.directions: list[Tensor] = []  # of the last step, F^-1 x of each vector
        self.norms: list[float] = []

    @torch.no_grad()
    def step(self) -> None:
        self.steps += 1
        self.directions, self.norms = [], []
        for vector, moment in zip(self.vectors, self.moments, strict=True):
            params, settings = [p for p, _ in vector], vector[0][1]
            sizes = [p.numel() for p in params]
            lr, decay = (
                torch.cat([torch.full((p.numel(),), float(g[name]), dtype=torch.float64) for p, g in vector])
                for name in ("lr", "weight_decay")
            )
            w, g = joined(params), joined([p.grad for p in params])
            if settings["maximize"]:
                g = -g
            if not settings["decoupled"]:
                g = g + decay * w
            moment.mul_(settings["beta"]).add_((1 - settings["beta"]) * g)
            u = moment / (1 - settings["beta"] ** self.steps)
            fisher = torch.outer(u, u) + settings["rho"] * torch.eye(len(u), dtype=torch.float64)
            direction = torch.linalg.solve(fisher, u if settings["direction"] == "momentum" else g)
            w = w - lr * direction
            if settings["decoupled"]:
                w = w - lr * decay * joined(params)
            for p, new in zip(params, w.split(sizes), strict=True):
                p.copy_(new.view_as(p))
            self.directions.append(direction)
            self.norms.append(float(u.norm()))


def train_naively(model: nn.Module, naive: Naive, steps: range) -> None:
    for step in steps:
        model.zero_grad()
        backward(model, step)
        naive.step()


def assert_close(model: nn.Module, twin: nn.Module, rtol: float = 1e-9) -> None:
    """Rounding of float64 times the conditions of the matrices, which are below 1e4 here, and of the network."""
    for (name, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
        scale = float(q.detach().abs().max())
        torch.testing.assert_close(p, q, rtol=rtol, atol=rtol * scale, msg=lambda m, name=name: f"{name}: {m}")


def test_defaults() -> None:
    group = SOFIM([nn.Parameter(torch.ones(2))]).param_groups[0]
    expected = {
        "lr": 0.1,
        "rho": 0.01,
        "beta": 0.9,
        "direction": "momentum",
        "scope": "global",
        "weight_decay": 0.0,
        "decoupled": True,
        "maximize": False,
    }
    assert {name: group[name] for name in expected} == expected


def test_takes_no_more_memory_than_sgd_with_momentum() -> None:
    model = network()
    optimizer = SOFIM(model.parameters())
    train(model, optimizer, range(1))
    for p in model.parameters():
        assert {name: value.shape for name, value in optimizer.state[p].items()} == {"step": (), "exp_avg": p.shape}


# The definition.


@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("decoupled", [True, False])
@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_against_the_definition(direction: str, scope: str, decoupled: bool, maximize: bool) -> None:
    settings: dict[str, Any] = {
        "direction": direction,
        "scope": scope,
        "decoupled": decoupled,
        "maximize": maximize,
        "rho": 0.5,
        "beta": 0.8,
        "weight_decay": 0.1,
    }
    model, twin = network(dtype=torch.float64), network(dtype=torch.float64)
    ours, naive = (
        SOFIM(model.parameters(), 0.05, **settings),
        Naive([{"params": twin.parameters()}], lr=0.05, **settings),
    )
    for step in range(8):
        train(model, ours, range(step, step + 1))
        train_naively(twin, naive, range(step, step + 1))
        assert_close(model, twin)


@pytest.mark.parametrize("decoupled", [True, False])
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_groups_against_the_definition(direction: str, decoupled: bool) -> None:
    """Two groups that share a matrix, each with its own rate and decay, one of them a schedule's; and two that do not,
    between them and behind them, with settings of their own."""

    def groups(model: nn.Sequential) -> list[dict[str, Any]]:
        return [
            {"params": model[0].parameters(), "lr": 0.05, "weight_decay": 0.2},
            {"params": model[1].parameters(), "scope": "tensor", "rho": 2.0, "beta": 0.5, "maximize": True},
            {"params": model[4].parameters(), "lr": 0.02},
            {"params": model[5:].parameters(), "scope": "tensor", "direction": "momentum", "weight_decay": 0.1},
        ]

    settings: dict[str, Any] = {"direction": direction, "decoupled": decoupled, "rho": 0.5, "lr": 0.1}
    model, twin = network(dtype=torch.float64), network(dtype=torch.float64)
    ours, naive = SOFIM(groups(model), **settings), Naive(groups(twin), **settings)
    for step in range(8):
        for shared in (ours.param_groups[2], naive.vectors[0][-1][1]):
            shared["lr"] = 0.02 / (1 + step)
        train(model, ours, range(step, step + 1))
        train_naively(twin, naive, range(step, step + 1))
        assert_close(model, twin)


def test_scope_of_a_group_may_change_between_steps() -> None:
    model, twin = network(dtype=torch.float64), network(dtype=torch.float64)
    ours = SOFIM([{"params": model[:4].parameters()}, {"params": model[4:].parameters()}])
    naive = Naive([{"params": twin.parameters()}])
    train(model, ours, range(2))
    train_naively(twin, naive, range(2))
    ours.param_groups[1]["scope"] = "tensor"
    later = Naive([{"params": twin[:4].parameters()}, {"params": twin[4:].parameters(), "scope": "tensor"}])
    moments = naive.moments[0].split([p.numel() for p in twin.parameters()])
    later.moments, later.steps = [torch.cat(moments[:3]), *(m.clone() for m in moments[3:])], 2
    train(model, ours, range(2, 5))
    train_naively(twin, later, range(2, 5))
    assert_close(model, twin)


# Limits and symmetries.


def test_large_rho_is_sgd_to_first_order() -> None:
    """Without momentum ``F^-1 g = g / (rho + |g|^2)``: at equal lr / rho the difference goes as 1 / rho."""
    start = network(dtype=torch.float64)
    sgd = copy.deepcopy(start)
    rate = 0.1
    train(sgd, torch.optim.SGD(sgd.parameters(), rate), range(5))
    moved = joined(list(sgd.parameters())) - joined(list(start.parameters()))
    rhos = (1e2, 1e3, 1e4, 1e5)
    for direction in DIRECTIONS:
        differences = []
        for rho in rhos:
            model = copy.deepcopy(start)
            train(model, SOFIM(model.parameters(), rate * rho, rho=rho, beta=0.0, direction=direction), range(5))
            difference = joined(list(model.parameters())) - joined(list(sgd.parameters()))
            differences.append(float(difference.norm() / moved.norm()))
        assert 1e-6 < differences[0] < 0.1
        for rho, coarse, fine in zip(rhos, differences, differences[1:], strict=False):
            # The next order is as |g|^2 / rho, and |g|^2 is below 10 here.
            assert coarse / fine == pytest.approx(10, rel=10 / rho), (direction, rho)


def flat_network(cuts: Sequence[int]) -> tuple[list[nn.Parameter], Callable[[int], None]]:
    """The parameters of the network as one vector that is cut in pieces, and the backward pass of a step."""
    model = network(dtype=torch.float64)
    shapes = {name: p.shape for name, p in model.named_parameters()}
    vector = joined(list(model.parameters()))
    pieces = [nn.Parameter(piece.clone()) for piece in vector.tensor_split(list(cuts))]

    class Whole(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            parts = torch.cat(pieces).split([shape.numel() for shape in shapes.values()])
            values = {name: part.view(shape) for (name, shape), part in zip(shapes.items(), parts, strict=True)}
            out: Tensor = functional_call(model, values, (x,))
            return out

        def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
            return iter(pieces)

    return pieces, lambda step: loss_of(Whole(), step).backward()


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("cuts", [(), (1,), (100, 200, 300, 400), (3, 250, 251)], ids=str)
def test_global_scope_does_not_depend_on_how_parameters_are_cut(
    cuts: tuple[int, ...], direction: str, grouped: bool
) -> None:
    model = network(dtype=torch.float64)
    settings: dict[str, Any] = {"direction": direction, "rho": 0.5, "weight_decay": 0.1}
    ours = SOFIM(model.parameters(), **settings)
    pieces, backward_of = flat_network(cuts)
    cut = SOFIM([{"params": [p]} for p in pieces] if grouped else pieces, **settings)
    for step in range(6):
        train(model, ours, range(step, step + 1))
        cut.zero_grad()
        backward_of(step)
        cut.step()
    expected = joined(list(model.parameters()))
    torch.testing.assert_close(joined(pieces), expected, rtol=1e-10, atol=1e-10 * float(expected.abs().max()))


def test_tensor_scope_is_one_optimizer_for_each_parameter() -> None:
    model, twin = network(), network()
    ours, each = SOFIM(model.parameters(), scope="tensor"), [SOFIM([p]) for p in twin.parameters()]
    for step in range(4):
        train(model, ours, range(step, step + 1))
        twin.zero_grad()
        backward(twin, step)
        for optimizer in each:
            optimizer.step()
    assert_same_parameters(model, twin)


finite = st.floats(-1e6, 1e6, allow_subnormal=False)


@hypothesis.given(
    gradients=st.lists(st.tuples(finite, finite, finite), min_size=1, max_size=6),
    beta=st.sampled_from([0.0, 0.5, 0.9, 0.99]),
    rho=st.floats(1e-4, 1e4),
    lr=st.floats(1e-3, 10),
)
def test_longest_step(gradients: list[tuple[float, float, float]], beta: float, rho: float, lr: float) -> None:
    """Of the moment's direction, ``lr |u| / (rho + |u|^2)``, at most ``lr / (2 sqrt(rho))`` whatever the gradients."""
    params = [nn.Parameter(torch.zeros(n, dtype=torch.float64)) for n in (2, 1)]
    optimizer = SOFIM(params, lr, rho=rho, beta=beta)
    bound = lr / (2 * math.sqrt(rho))
    for gradient in gradients:
        with torch.no_grad():
            for p, g in zip(params, (gradient[:2], gradient[2:]), strict=True):
                p.zero_()  # so that what it becomes is the step
                p.grad = torch.tensor(g, dtype=torch.float64)
        optimizer.step()
        assert float(joined(params).norm()) <= bound * (1 + 1e-12)


def test_longest_step_is_reached_at_the_root_of_rho() -> None:
    for length, share in ((0.5, 0.8), (1.0, 1.0), (2.0, 0.8)):  # 2 x / (1 + x^2)
        p = nn.Parameter(torch.zeros(2, dtype=torch.float64))
        p.grad = torch.tensor([0.6, -0.8], dtype=torch.float64) * 0.3 * length
        SOFIM([p], 0.7, rho=0.09).step()
        assert float(p.detach().norm()) == pytest.approx(share * 0.7 / (2 * 0.3), rel=1e-12)


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("exponent", [-5, 3])
def test_scale_of_the_loss_goes_with_rho_and_lr(exponent: int, direction: str, scope: str) -> None:
    """c times the loss at c^2 rho and c lr is the same step; with a power of two it has the same bits."""
    c = 2.0**exponent
    model, twin = network(), network()
    settings: dict[str, Any] = {"direction": direction, "scope": scope}
    ours = SOFIM(model.parameters(), 0.1, rho=0.5, weight_decay=0.1, **settings)
    scaled = SOFIM(twin.parameters(), 0.1 * c, rho=0.5 * c * c, weight_decay=0.1 / c, **settings)
    for step in range(4):
        train(model, ours, range(step, step + 1))
        scaled.zero_grad()
        (loss_of(twin, step) * c).backward()
        scaled.step()
        assert_same_parameters(model, twin)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_global_scope_turns_with_the_coordinates(direction: str) -> None:
    """In rotated coordinates the path is the rotated one; coordinate by coordinate methods have no such symmetry."""
    generator = torch.Generator().manual_seed(0)
    rotation, _ = torch.linalg.qr(torch.randn(12, 12, generator=generator, dtype=torch.float64))
    curvature, start = (torch.randn(12, generator=generator, dtype=torch.float64) for _ in range(2))
    plain, turned = nn.Parameter(start.clone()), nn.Parameter(rotation @ start)
    settings: dict[str, Any] = {"direction": direction, "rho": 0.5, "weight_decay": 0.1}
    optimizers = SOFIM([plain], **settings), SOFIM([turned], **settings)
    for _ in range(20):
        for w, point, optimizer in zip((plain, turned), (plain, rotation.T @ turned), optimizers, strict=True):
            optimizer.zero_grad()
            (curvature * point).sin().sum().backward(inputs=[w])
            optimizer.step()
    torch.testing.assert_close(turned, rotation @ plain, rtol=1e-10, atol=1e-10)


# Groups of one matrix.

UNLIKE: list[tuple[str, Any]] = [
    ("rho", 0.7),
    ("beta", 0.3),
    ("direction", "gradient"),
    ("decoupled", False),
    ("maximize", True),
]


@pytest.mark.parametrize(("name", "value"), UNLIKE)
def test_groups_of_global_scope_must_agree(name: str, value: Any) -> None:
    def groups(**settings: Any) -> list[dict[str, Any]]:
        return [{"params": model[:4].parameters()}, {"params": model[4:].parameters(), **settings}]

    message = rf"^{name} is {value!r} in one group and .* in another, expected one value: .*scope='tensor'"
    model = network()
    with pytest.raises(ValueError, match=message):
        SOFIM(groups(**{name: value}))

    ours = SOFIM(groups()[:1])
    with pytest.raises(ValueError, match=message):
        ours.add_param_group(groups(**{name: value})[1])
    assert len(ours.param_groups) == 1
    assert [row.group for row in ours.explain()] == [0, 0, 0]
    train(model, ours, range(1))
    ours.add_param_group(groups()[1])
    train(model, ours, range(1, 2))

    backward(model, 2)
    before, state = parameters_of(model), copy.deepcopy(ours.state_dict()["state"])
    previous, ours.param_groups[1][name] = ours.param_groups[1][name], value
    with pytest.raises(ValueError, match=message):
        ours.step()
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    assert_same_state({"param_groups": [], "state": ours.state_dict()["state"]}, {"param_groups": [], "state": state})
    ours.param_groups[1][name] = previous
    ours.step()


@pytest.mark.parametrize(("name", "value"), UNLIKE)
def test_groups_of_tensor_scope_need_not_agree(name: str, value: Any) -> None:
    """Nor need a group of one scope with that of the other."""
    for scopes in (("tensor", "tensor"), ("tensor", "global"), ("global", "tensor")):
        model, twin = network(), network()
        halves = [
            {"params": net[part].parameters(), "scope": scope, **settings}
            for net in (model, twin)
            for part, scope, settings in zip((slice(4), slice(4, 7)), scopes, ({}, {name: value}), strict=True)
        ]
        ours, apart = SOFIM(halves[:2]), [SOFIM([half]) for half in halves[2:]]
        for step in range(3):
            train(model, ours, range(step, step + 1))
            twin.zero_grad()
            backward(twin, step)
            for optimizer in apart:
                optimizer.step()
        assert_same_parameters(model, twin)


def test_a_group_that_is_set_wrongly_stops_all_others() -> None:
    """Also those that a call of their own would have stepped before it."""
    model = network()
    ours = SOFIM([{"params": model[:4].parameters()}, {"params": model[4:].parameters(), "scope": "tensor"}])
    train(model, ours, range(1))
    backward(model, 1)
    before = parameters_of(model)
    for name, value in (("rho", 0.0), ("beta", 1.0), ("direction", "up"), ("scope", "layer")):
        previous, ours.param_groups[1][name] = ours.param_groups[1][name], value
        with pytest.raises(ValueError, match=rf"^{name} is {value!r}, expected"):
            ours.step()
        ours.param_groups[1][name] = previous
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


# Reports.


def test_explain_says_what_the_matrix_is() -> None:
    model = network()
    groups = [
        {"params": model[:4].parameters(), "rho": 0.25},
        {"params": model[4:].parameters(), "scope": "tensor", "direction": "gradient"},
    ]
    rows = SOFIM(groups).explain()
    assert {row.detail for row in rows[:3]} == {"u u^T + 0.25 I of all groups of this scope, x is the momentum"}
    assert {row.detail for row in rows[3:]} == {"u u^T + 0.01 I of this parameter, x is the gradient"}
    assert not any(row.fallback for row in rows)


@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_metrics_are_those_of_the_definition(direction: str, scope: str, maximize: bool) -> None:
    settings: dict[str, Any] = {"direction": direction, "scope": scope, "maximize": maximize, "rho": 0.5}
    model, twin = network(dtype=torch.float64), network(dtype=torch.float64)
    ours = SOFIM(model.named_parameters(), 0.05, **settings)
    naive = Naive([{"params": twin.parameters()}], lr=0.05, **settings)
    for step in range(4):
        train(model, ours, range(step, step + 1))
        train_naively(twin, naive, range(step, step + 1))
        report = ours.metrics()
        assert list(report) == (["global"] if scope == "global" else [name for name, _ in model.named_parameters()])
        for row, vector, direction_of, norm in zip(
            report.values(), naive.vectors, naive.directions, naive.norms, strict=True
        ):
            gradient = joined([p.grad for p, _ in vector]) * (-1 if maximize else 1)
            expected = {
                "moment_norm": norm,
                "shrinkage": 1 / (0.5 + norm**2),
                "cosine_with_sgd": float(direction_of @ gradient / direction_of.norm() / gradient.norm()),
                "skipped_elements": 0,
            }
            assert row == pytest.approx(expected, rel=1e-8)


def test_metrics_of_mixed_scopes() -> None:
    model = network()
    groups = [
        {"params": model[:1].named_parameters(prefix="front")},
        {"params": model[4:5].named_parameters(prefix="middle"), "scope": "tensor"},
        {"params": model[6:].named_parameters(prefix="back")},
    ]
    ours = SOFIM(groups)
    train(model, ours, range(1))
    ours.zero_grad()
    backward(model, 1)
    model[4].weight.grad[[1, 3], 5] = math.nan
    ours.step()
    report = ours.metrics()
    assert list(report) == ["global", "middle.4.weight", "middle.4.bias"]
    assert [row["skipped_elements"] for row in report.values()] == [0, 2, 0]
    moments = [ours.state[p]["exp_avg"] for p in (model[0].weight, model[6].weight, model[6].bias)]
    assert report["global"]["moment_norm"] == pytest.approx(float(joined(moments).norm()) / (1 - 0.9**2), rel=1e-6)
    own = float(ours.state[model[4].bias]["exp_avg"].norm()) / (1 - 0.9**2)
    assert report["middle.4.bias"]["moment_norm"] == pytest.approx(own, rel=1e-6)


def test_metrics_after_loading_wait_for_a_step() -> None:
    model, twin = network(), network()
    ours, resumed = SOFIM(model.parameters()), SOFIM(twin.parameters())
    train(model, ours, range(2))
    train(twin, resumed, range(1))
    twin.load_state_dict(model.state_dict())
    resumed.load_state_dict(ours.state_dict())
    assert resumed.metrics() == {}
    train(model, ours, range(2, 3))
    train(twin, resumed, range(2, 3))
    assert resumed.metrics() == ours.metrics() != {}


@pytest.mark.parametrize("scope", SCOPES)
def test_metrics_when_some_parameters_have_no_gradient(scope: str) -> None:
    """They speak of the parameters of the last step; a cosine needs all of their gradients."""
    model = network()
    model[4].requires_grad_(False)
    ours = SOFIM(model.named_parameters(), scope=scope)
    train(model, ours, range(1))
    report = ours.metrics()
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    assert list(report) == (["global"] if scope == "global" else names)
    model[6].weight.grad = None
    later = ours.metrics()
    assert math.isnan(later["global" if scope == "global" else "6.weight"]["cosine_with_sgd"])
    if scope == "tensor":
        assert later["6.bias"] == report["6.bias"]


# Numbers that are not finite, or large.


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_elements_whose_gradient_is_not_finite_are_left_out(direction: str, scope: str) -> None:
    """The others move as if these were not there, and they themselves not at all."""
    generator = torch.Generator().manual_seed(0)
    values, gradients = (torch.randn(3, 9, generator=generator, dtype=torch.float64) for _ in range(2))
    bad = torch.zeros(9, dtype=torch.bool)
    bad[[2, 3, 7]] = True
    poison = torch.tensor([math.nan, math.inf, -math.inf], dtype=torch.float64)
    first, second = nn.Parameter(values[0].clone()), nn.Parameter(values[1].clone())
    kept, other = nn.Parameter(values[0][~bad].clone()), nn.Parameter(values[1].clone())
    settings: dict[str, Any] = {"direction": direction, "scope": scope, "rho": 0.5}
    ours, without = SOFIM({"a": first, "b": second}.items(), **settings), SOFIM([kept, other], **settings)
    for step in range(3):
        first.grad = gradients[0] * (step + 1)
        first.grad[bad] = poison
        kept.grad = gradients[0][~bad] * (step + 1)
        second.grad = gradients[1] - step
        other.grad = gradients[1] - step
        ours.step()
        without.step()
    assert torch.equal(first[bad], values[0][bad])
    assert not bool(ours.state[first]["exp_avg"][bad].any())
    torch.testing.assert_close(first[~bad], kept, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(second, other, rtol=1e-12, atol=1e-12)
    skipped = {name: row["skipped_elements"] for name, row in ours.metrics().items()}
    assert skipped == ({"global": 9} if scope == "global" else {"a": 9, "b": 0})


@pytest.mark.parametrize("scope", SCOPES)
def test_large_gradients_shorten_the_step(scope: str) -> None:
    """|u|^2 of 1e61 overflows float32 and not the sum of squares: the step is as 1 / |u|, and no longer."""
    large, small = nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(2))
    ours = SOFIM([large, small], 2.0, rho=0.5, scope=scope)
    for _ in range(3):
        with torch.no_grad():
            large.zero_()
            small.zero_()
        large.grad, small.grad = torch.tensor([3e30, -4e30, 0.0]), torch.tensor([1.0, -2.0])
        ours.step()
        for p, square in ((large, 25e60), (small, 25e60 if scope == "global" else 5.0)):
            expected = -2.0 * p.grad.double() / (0.5 + square)
            # 1 / |u|^2 ends at 1e-45 in float32, where steps are 1e-22.
            torch.testing.assert_close(p.detach().double(), expected, rtol=1e-5, atol=1e-22)
    assert ours.metrics()["global" if scope == "global" else "param_groups[0]['params'][0]"]["moment_norm"] == (
        pytest.approx(5e30, rel=1e-5)
    )


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_squares_that_overflow_stop_the_step(direction: str) -> None:
    p = nn.Parameter(torch.ones(2, dtype=torch.float64))
    ours = SOFIM([p], direction=direction)
    p.grad = torch.tensor([1e200, 1.0], dtype=torch.float64)
    ours.step()
    assert torch.equal(p, torch.ones(2, dtype=torch.float64))
