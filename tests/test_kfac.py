"""K-FAC, EKFAC and Adam in their basis beyond the contract of all optimizers: what the mathematics promises."""

from __future__ import annotations

import copy
import functools
import math
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._functorch import config as functorch_config
from torch.nn import functional as F

from fisher_kernels import EKFAC, KFAC, MBF, EKFACAdam
from fisher_kernels.curvature import reduction, statistics
from fisher_kernels.curvature.processes import Processes
from fisher_kernels.optim import factor_inverses
from fisher_kernels.optim.kronecker import KroneckerOptimizer
from fisher_kernels.optim.kronecker_factors import mean_eigenvalue
from tests.processes import in_two_processes, needs_processes
from tests.small_network import assert_same_parameters, assert_same_state, network, parameters_of, train

pytestmark = pytest.mark.usefixtures("host_backend", "one_thread")

EVERY = [KFAC, EKFAC, EKFACAdam]
every_kind = pytest.mark.parametrize("kind", EVERY)
every_sampler = pytest.mark.parametrize("kind", [*EVERY, MBF])

ALWAYS: dict[str, Any] = {"refresh": "constant", "update_interval": 1, "inverse_interval": 1}
BARE: dict[str, Any] = {**ALWAYS, "kl_clip": None, "max_relative_step": None, "momentum": 0.0}
"""A step of lr times the natural gradient, with new curvature in each."""


def gaussian_residuals(outputs: int) -> Tensor:
    """Residuals whose second moment is the identity, as that of a Gaussian is, and whose mean is zero."""
    scaled = math.sqrt(outputs) * torch.eye(outputs, dtype=torch.float64)
    return torch.cat([scaled, -scaled])


def natural_gradient_of(model: nn.Linear, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """The gradient of half the mean squared error, and the Fisher matrix of the Gaussian model, both of [W, b]."""
    h = torch.cat([x, torch.ones_like(x[:, :1])], 1)
    gradient = (model(x) - y).T @ h / len(x)
    jacobians = [torch.kron(torch.eye(model.out_features, dtype=x.dtype), row) for row in h]
    fisher = sum(J.T @ J for J in (j.reshape(model.out_features, -1) for j in jacobians))
    return gradient.detach(), torch.as_tensor(fisher) / len(x)


@pytest.mark.parametrize("kind", [KFAC, EKFAC])
def test_it_is_the_natural_gradient_of_a_linear_gaussian_model(kind: type[KFAC]) -> None:
    """There the Fisher matrix is a Kronecker product: one step of rate 1 reaches the solution of least squares."""
    torch.manual_seed(0)
    model = nn.Linear(4, 3).double()
    x, y = torch.randn(9, 4, dtype=torch.float64), torch.randn(9, 3, dtype=torch.float64)
    gradient, fisher = natural_gradient_of(model, x, y)
    before = torch.cat([model.weight, model.bias[:, None]], 1).detach()
    optimizer = kind(model, lr=1.0, **{**BARE, "damping": 1e-14})
    noise = gaussian_residuals(3)
    inputs = x.repeat_interleave(len(noise), 0)
    out = model(inputs)
    ((out - (out.detach() + noise.repeat(len(x), 1))).square().sum(1) / 2).mean().backward()
    model.weight.grad, model.bias.grad = gradient[:, :4].clone(), gradient[:, 4].clone()
    optimizer.step()
    after = torch.cat([model.weight, model.bias[:, None]], 1).detach()
    step = torch.linalg.solve(fisher, gradient.flatten()).reshape(before.shape)
    # The condition of F is below 1e3, and the damping of the factors, 1e-7 each, moves their inverses by as much.
    torch.testing.assert_close(after, before - step, rtol=0, atol=1e-5 * float(step.abs().max()))
    h = torch.cat([x, torch.ones(9, 1, dtype=torch.float64)], 1)
    torch.testing.assert_close(after.T, torch.linalg.lstsq(h, y).solution, rtol=0, atol=1e-5)


def test_ekfac_scales_its_basis_as_no_other_diagonal_does() -> None:
    """Proposition 1 of George et al.: the nearest matrix to F of a given basis has the second moments in it."""
    torch.manual_seed(0)
    model = nn.Linear(4, 3).double()
    x = torch.randn(20, 4, dtype=torch.float64) * torch.tensor([0.3, 1.0, 2.0, 0.7], dtype=torch.float64)
    optimizer = EKFAC(model, lr=0.0, **{**BARE, "beta2": 0.0})
    for _ in range(2):  # the second one has a basis to measure in
        optimizer.zero_grad()
        out = model(x)
        (out.sin() * x.sum(1, keepdim=True)).sum(1).mean().backward()
        optimizer.step()
    out = model(x)
    (s,) = torch.autograd.grad((out.sin() * x.sum(1, keepdim=True)).sum(), out)
    h = torch.cat([x, torch.ones_like(x[:, :1])], 1)
    gradients = torch.einsum("no,ni->noi", s, h).flatten(1)
    fisher = gradients.T @ gradients / len(x)
    state = optimizer.state[model.weight]
    basis = torch.kron(state["row_basis"][0], state["column_basis"][0])
    moments = state["second_moment"].flatten()
    torch.testing.assert_close(moments, (basis.T @ fisher @ basis).diagonal(), rtol=1e-9, atol=1e-12)

    def distance(diagonal: Tensor) -> float:
        return float((fisher - basis @ diagonal.diag() @ basis.T).norm())

    factored = torch.kron(state["row_factor"][0], state["column_factor"][0])
    assert distance(moments) < 0.99 * float((fisher - factored).norm())
    for _ in range(20):
        assert distance(moments) < distance(moments * (1 + 0.1 * torch.randn_like(moments)))


class TwoLayers(nn.Module):
    """Two layers behind a fixed affine map of the input."""

    def __init__(self, matrix: Tensor, shift: Tensor) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 3), nn.Linear(3, 2)
        self.register_buffer("matrix", matrix)
        self.register_buffer("shift", shift)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.second(torch.tanh(self.first(x @ self.matrix.T + self.shift)))
        return out


def test_an_affine_map_of_a_layers_input_does_not_matter() -> None:
    """With a damping of zero, no trust region and no cap: the same function before, the same function after."""
    torch.manual_seed(0)
    eye, zero = torch.eye(4, dtype=torch.float64), torch.zeros(4, dtype=torch.float64)
    matrix = eye + 0.3 * torch.randn(4, 4, dtype=torch.float64)
    shift = torch.randn(4, dtype=torch.float64)
    plain = TwoLayers(eye, zero).double()
    mapped = TwoLayers(matrix, shift).double()
    mapped.second.load_state_dict(plain.second.state_dict())
    with torch.no_grad():
        mapped.first.weight.copy_(plain.first.weight @ torch.linalg.inv(matrix))
        mapped.first.bias.copy_(plain.first.bias - mapped.first.weight @ shift)
    x, y = torch.randn(30, 4, dtype=torch.float64), torch.randn(30, 2, dtype=torch.float64)
    outputs = []
    for damping in (0.0, 0.1):
        for model in (copy.deepcopy(plain), copy.deepcopy(mapped)):
            optimizer = KFAC(model, lr=0.02, **{**BARE, "damping": damping, "momentum": 0.5})
            for _ in range(4):
                optimizer.zero_grad()
                (model(x) - y).square().sum(1).mean().backward()
                optimizer.step()
            outputs.append(model(x).detach())
    # Factors of 30 samples have condition numbers below 1e4.
    torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-8, atol=1e-8)
    assert float((outputs[0] - plain(x).detach()).abs().max()) > 1e-2
    assert float((outputs[2] - outputs[3]).abs().max()) > 1e-4  # with damping it does matter


# Limits.


@every_kind
def test_weights_that_start_at_zero_learn(kind: type[KroneckerOptimizer]) -> None:
    """A cap relative to nothing would hold them there: LoRA's B, biases and shifts."""
    torch.manual_seed(0)
    model = nn.Linear(4, 3).double()
    nn.init.zeros_(model.weight)
    nn.init.zeros_(model.bias)
    wide = {} if kind is EKFACAdam else {"kl_clip": 0.1, "momentum": 0.9}  # the cap is what binds at first
    optimizer = kind(model, lr=0.05, max_relative_step=0.1, **wide)
    x = torch.randn(16, 4, dtype=torch.float64)
    y = x @ torch.randn(4, 3, dtype=torch.float64)
    losses = []
    for _ in range(200):
        optimizer.zero_grad()
        loss = (model(x) - y).square().sum(1).mean()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[1] < losses[0]
    assert losses[-1] < 0.1 * losses[0]


def test_the_cap_bounds_each_layer() -> None:
    model = network(dtype=torch.float64)
    optimizer = KFAC(model, lr=10.0, kl_clip=None, max_relative_step=0.01)
    before = parameters_of(model)
    train(model, optimizer, range(1))
    report = optimizer.metrics()
    for layer in ("0", "4", "6"):
        moved, size, n = 0.0, 0.0, 0
        fan_in = model.get_submodule(layer).weight[0].numel()
        for name, p in model.named_parameters():
            if name.startswith(layer):
                moved += float((p.detach() - before[name]).square().sum())
                size += float(before[name].square().sum())
                n += p.numel()
        bound = 0.01 * max(math.sqrt(size), 0.3 * math.sqrt(n / fan_in))
        assert math.sqrt(moved) == pytest.approx(bound, rel=1e-9)
        assert report[f"{layer}.weight"]["cap"] < 1
        assert report[f"{layer}.weight"]["capped_share"] == 1
        beside = {row["cap"] for name, row in report.items() if name.startswith(layer)}
        assert len(beside) == 1, "weight and bias are shortened together"


def test_one_trust_region_over_all_groups() -> None:
    """Groups with decay and without are stepped as one."""
    model, twin = network(dtype=torch.float64), network(dtype=torch.float64)
    settings: dict[str, Any] = {"kl_clip": 1e-6, "momentum": 0.0, "others": "curvature"}
    whole = KFAC(model, **settings)
    norms = [p for p in twin.parameters() if p.dim() == 1]
    weights = [p for p in twin.parameters() if p.dim() > 1]
    split = KFAC(twin, **settings, params=[{"params": weights}, {"params": norms}])
    for net, optimizer in ((model, whole), (twin, split)):
        train(net, optimizer, range(1))
    scales = {row["trust_scale"] for optimizer in (whole, split) for row in optimizer.metrics().values()}
    assert max(scales) < 1
    assert len({row["trust_scale"] for row in split.metrics().values()}) == 1


# What has no factors, by Adam.


class Words(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.norm, self.head = nn.Embedding(7, 4), nn.LayerNorm(4), nn.Linear(4, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        out: Tensor = self.head(self.norm(self.table(tokens)))
        return out


@pytest.mark.parametrize("decoupled", [True, False])
@pytest.mark.parametrize("kind", [KFAC, EKFAC])
def test_others_by_adam_are_stepped_as_adam_steps(kind: type[KFAC], decoupled: bool) -> None:
    """At its share of the rate, and no bound counts them; the head, which has factors, stays where it is."""
    torch.manual_seed(0)
    model = Words().double()
    twin = copy.deepcopy(model)
    groups: list[dict[str, Any]] = [
        {"params": [*model.table.parameters(), *model.norm.parameters()]},
        {"params": model.head.parameters(), "lr": 0.0, "weight_decay": 0.0},
    ]
    decay = {"weight_decay": 0.1, "decoupled": decoupled}
    bounds = {"kl_clip": 1e-9, "max_relative_step": 1e-9}
    decays = {"momentum": 0.9, "beta2": 0.8}
    ours = kind(model, lr=0.2, params=groups, others="adam", others_lr=0.05, **decays, **decay, **bounds)
    adam = torch.optim.AdamW if decoupled else torch.optim.Adam
    rest = [*twin.table.parameters(), *twin.norm.parameters()]
    theirs = adam(rest, lr=0.01, betas=(0.9, 0.8), eps=1e-8, weight_decay=0.1)
    for step in range(5):
        tokens = torch.randint(7, (6, 5), generator=torch.Generator().manual_seed(step))
        for net, optimizer in ((model, ours), (twin, theirs)):
            optimizer.zero_grad()
            net(tokens).square().sum(-1).mean().backward()
            optimizer.step()
        assert_close_parameters(model, twin)
    rows = {row.name: row.rule for row in ours.explain()}
    assert rows["table.weight"] == rows["norm.bias"] == "element-wise"
    assert rows["head.weight"] == "linear"
    assert {"momentum_buffer", "exp_avg_sq", "exp_avg_updates"} == ours.state[model.norm.weight].keys()
    assert ours.metrics()["norm.weight"]["cap"] == 1


def assert_close_parameters(model: nn.Module, twin: nn.Module) -> None:
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kind", [KFAC, EKFAC])
def test_others_by_adam_resume_and_take_over_what_a_layer_served(kind: type[KFAC]) -> None:
    class Gated(nn.Linear):
        gate = 1.0

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x, self.weight * self.gate, self.bias)

    def build() -> tuple[nn.Sequential, KFAC]:
        torch.manual_seed(0)
        model = nn.Sequential(Gated(4, 4), nn.LayerNorm(4), nn.Linear(4, 3))
        return model, kind(model, lr=0.01, others="adam")

    def go(model: nn.Sequential, optimizer: KFAC, steps: range) -> None:
        for step in steps:
            model[0].gate = 1.0 if step < 2 else 2.0  # type: ignore[assignment]
            optimizer.zero_grad()
            model(torch.randn(8, 4, generator=torch.Generator().manual_seed(step))).square().mean().backward()
            optimizer.step()

    (model, ours), (twin, resumed) = build(), build()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        go(model, ours, range(4))
    assert [row.name for row in ours.explain() if row.detail.startswith("Adam")] == ["0.weight", "0.bias"]
    assert "exp_avg_sq" in ours.state[model[0].weight]
    twin.load_state_dict(model.state_dict())
    resumed.load_state_dict(ours.state_dict())
    go(model, ours, range(4, 7))
    go(twin, resumed, range(4, 7))
    assert_same_parameters(model, twin)
    assert_same_state(resumed.state_dict(), ours.state_dict())
    assert all(bool(p.isfinite().all()) for p in model.parameters())


@pytest.mark.parametrize("kind", [KFAC, EKFAC])
@pytest.mark.parametrize("others", ["adam", "curvature"])
def test_a_layer_is_trained_as_the_group_of_its_weight_says(kind: type[KFAC], others: str) -> None:
    """As its curvature has the settings of that group; what explain() says is what is done."""
    torch.manual_seed(0)
    model = Words()
    other = "curvature" if others == "adam" else "adam"
    rest = [*model.table.parameters(), *model.head.parameters()]
    groups = [{"params": [model.norm.weight], "others": others}, {"params": [model.norm.bias], "others": other}]
    ours = kind(model, params=[*groups, {"params": rest}])
    for _ in range(2):
        ours.zero_grad()
        model(torch.randint(7, (6, 5))).square().mean().backward()
        ours.step()
    by_adam = {row.name: row.detail.endswith(": Adam") for row in ours.explain() if row.name.startswith("norm")}
    assert by_adam == dict.fromkeys(("norm.weight", "norm.bias"), others == "adam")
    for p in model.norm.parameters():
        assert ("exp_avg_sq" in ours.state[p]) == (others == "adam")
        assert (ours.metrics()[f"norm.{'weight' if p is model.norm.weight else 'bias'}"]["trust_scale"] == 1) == (
            others == "adam"
        )


class Queries(nn.Module):
    """An Embedding that is not called: its table is what is looked up with."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(5, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(torch.tanh(x + self.table.weight))
        return out


@every_kind
def test_what_adam_trains_needs_no_use_of_its_layer(kind: type[KroneckerOptimizer]) -> None:
    """It takes no fallback, and nothing is refused or warned of; with blocks it does."""
    for others in ("adam", "curvature"):
        own = {} if kind is EKFACAdam else {"others": others}
        for fallback in ("error", "warn"):
            torch.manual_seed(0)
            model = Queries()
            optimizer = kind(model, fallback=fallback, **own)  # type: ignore[call-arg,arg-type]
            model(torch.randn(2, 5, 4)).square().mean().backward()
            if kind is EKFACAdam or others == "adam":
                with warnings.catch_warnings():
                    warnings.simplefilter("error")
                    optimizer.step()
                assert optimizer.explain()[0].rule == "element-wise"
            elif fallback == "error":
                with pytest.raises(RuntimeError, match=r"table\.weight"):
                    optimizer.step()
            else:
                with pytest.warns(UserWarning, match=r"saw no use of them: table\."):
                    optimizer.step()
                assert optimizer.explain()[0].fallback


@pytest.mark.parametrize("said", [True, False])
@pytest.mark.parametrize("kind", [KFAC, EKFAC])
def test_a_state_from_before_adam_was_the_default_keeps_its_meaning(kind: type[KFAC], said: bool) -> None:
    """Its groups say "curvature", or nothing of it."""
    torch.manual_seed(0)
    model, twin = Words(), Words()
    ours, resumed = kind(model, others="curvature"), kind(twin)

    def go(net: nn.Module, optimizer: KFAC, steps: range) -> None:
        for step in steps:
            optimizer.zero_grad()
            net(torch.randint(7, (6, 5), generator=torch.Generator().manual_seed(step))).square().mean().backward()
            optimizer.step()

    go(model, ours, range(3))
    go(twin, resumed, range(1))
    saved = ours.state_dict()
    if not said:
        for group in saved["param_groups"]:
            del group["others"], group["others_lr"]
    twin.load_state_dict(model.state_dict())
    resumed.load_state_dict(saved)
    assert resumed.param_groups[0]["others"] == "curvature"
    go(model, ours, range(3, 6))
    go(twin, resumed, range(3, 6))
    assert_same_parameters(model, twin)
    assert "exp_avg_sq" not in resumed.state[twin.norm.weight]
    assert int(resumed.state[twin.norm.weight]["fisher_updates"]) == 6


@pytest.mark.parametrize("kind", [KFAC, EKFAC, EKFACAdam])
def test_others_by_adam_stay_where_gradients_are_not_finite(kind: type[KroneckerOptimizer]) -> None:
    """One element, which goes on as if the step had not been, and then all."""
    torch.manual_seed(0)
    model = Words()
    ours = kind(model)
    bad = None
    for step in range(3):
        ours.zero_grad()
        model(torch.randint(7, (6, 5))).square().mean().backward()
        before = [{k: v.clone() for k, v in ours.state[model.norm.weight].items()}, parameters_of(model)]
        bad = (slice(1, 2), slice(None))[step - 1] if step else slice(0)
        for p in (model.norm.weight, model.norm.bias):
            p.grad[bad] = math.nan  # type: ignore[index]
        ours.step()
        state, counted = ours.state[model.norm.weight], 2 if step == 2 else step + 1
        for name, value in state.items():
            if name == "exp_avg_updates":
                assert int(value) == counted
            elif step:
                assert torch.equal(value[bad], before[0][name][bad]), name
                assert step == 2 or not torch.equal(value, before[0][name])
        if step:
            assert torch.equal(model.norm.weight[bad], before[1]["norm.weight"][bad])
    assert all(bool(p.isfinite().all()) for p in model.parameters())
    assert ours.metrics()["norm.weight"]["skipped_elements"] == 5


def test_moments_in_a_basis_learn_nothing_of_a_gradient_that_is_nowhere_finite() -> None:
    """Of a layer in which anything is finite they take that; all of the rest of the model goes on."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    optimizer = EKFACAdam(model, refresh="constant")  # with one basis for all steps
    states = [optimizer.state[layer.weight] for layer in model]
    bad_ones = [[], [model[0].weight, model[0].bias], [model[0].weight]]
    learnt = []
    for bad in bad_ones:
        optimizer.zero_grad()
        model(torch.randn(8, 4)).square().mean().backward()
        for p in bad:
            p.grad.fill_(math.nan)
        before = [state["second_moment"].clone() if state else None for state in states]
        optimizer.step()
        pairs = zip(states, before, strict=True)
        learnt.append([then is None or not torch.equal(now["second_moment"], then) for now, then in pairs])
    assert learnt == [[True, True], [False, True], [True, True]]
    assert [int(state["moment_updates"]) for state in states] == [2, 3]
    assert all(bool(p.isfinite().all()) for p in model.parameters())


@pytest.mark.parametrize("kind", [KFAC, EKFAC])
def test_a_layer_that_is_used_later_is_preconditioned_at_once(kind: type[KFAC]) -> None:
    torch.manual_seed(0)
    model = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)]).double()
    optimizer = kind(model, refresh="constant", update_interval=10, inverse_interval=10)
    x = torch.randn(8, 4, dtype=torch.float64)
    for used in (1, 2):
        optimizer.zero_grad()
        out = x
        for layer in list(model)[:used]:
            out = torch.tanh(layer(out))
        out.square().sum(1).mean().backward()
        optimizer.step()
    state = optimizer.state[model[1].weight]
    assert int(state["fisher_updates"]) == 1
    made = state["row_inverse" if kind is KFAC else "row_basis"][0]
    assert not torch.equal(made, torch.eye(4, dtype=torch.float64))


# Factors that cannot be used.


@pytest.mark.parametrize("zeros", ["inputs", "derivatives"])
def test_a_factor_of_zeros_takes_an_equal_share_of_the_damping(zeros: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3, bias=False), nn.Linear(3, 2, bias=False)).double()
    x = torch.randn(8, 4, dtype=torch.float64)
    if zeros == "inputs":
        x.zero_()
    else:
        nn.init.zeros_(model[1].weight)
    optimizer = KFAC(model, damping=0.01, **ALWAYS)
    (model(x) - 1).square().sum(1).mean().backward()
    optimizer.step()
    state = optimizer.state[model[0].weight]
    assert sorted(bool(state[f"{side}_factor"].any()) for side in ("row", "column")) == [False, True]
    for side in ("row", "column"):
        factor = state[f"{side}_factor"][0]
        inverse = torch.linalg.inv(factor + 0.1 * torch.eye(len(factor), dtype=torch.float64))
        torch.testing.assert_close(state[f"{side}_inverse"][0], inverse, rtol=1e-9, atol=1e-12)


def test_factors_of_a_size_are_inverted_together_as_they_are_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """With some room for copies and with none, those of one matrix and of several groups."""
    sizes: list[tuple[int, ...]] = []
    inverted = factor_inverses.block_inverse_

    def counting(out: Tensor, blocks: Tensor, damping: float) -> Tensor:
        sizes.append(tuple(blocks.shape))
        return inverted(out, blocks, damping)

    monkeypatch.setattr(factor_inverses, "block_inverse_", counting)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv1d(4, 4, 1, groups=2), nn.Flatten(), *(nn.Linear(4, 4) for _ in range(3)))
    states = []
    for room in (2**26, 50, 1):
        monkeypatch.setattr(factor_inverses, "MOST_TOGETHER", room)
        sizes.clear()
        twin = copy.deepcopy(model)
        ours = KFAC(twin, damping=0.1, **ALWAYS)
        twin(torch.randn(9, 4, 1, generator=torch.Generator().manual_seed(1))).square().sum().backward()
        ours.step()
        states.append(ours.state_dict())
        # Rows of 2 in 2 groups, columns of 3 in 2, and of each linear layer rows of 4 and columns of 5.
        expected = {
            2**26: [(2, 2, 2), (2, 3, 3), (3, 4, 4), (3, 5, 5)],
            50: [(2, 2, 2), (2, 3, 3), *3 * [(1, 4, 4), (1, 5, 5)]],
        }
        assert sizes == expected.get(room, expected[50])
    assert_same_state(states[0], states[1])
    assert_same_state(states[0], states[2])


@pytest.mark.usefixtures("in_float64")
def test_large_factors_are_inverted_where_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """One by one, without a copy: together they would be no faster."""
    seen: list[Tensor] = []
    inverted = factor_inverses.block_inverse_

    def looking(out: Tensor, blocks: Tensor, damping: float) -> Tensor:
        seen.append(blocks)
        return inverted(out, blocks, damping)

    monkeypatch.setattr(factor_inverses, "block_inverse_", looking)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv1d(140, 6, 1, groups=2), nn.Flatten(), nn.Linear(6, 70))
    ours = KFAC(model, damping=0.1, **ALWAYS)
    model(torch.randn(9, 140, 1)).square().sum().backward()
    ours.step()
    of_groups, of_layer = (ours.state[model[layer].weight] for layer in (0, 2))
    large = [*of_groups["column_factor"].split(1), of_layer["row_factor"]]
    assert [x.data_ptr() for x in seen if x.shape[-1] > 64] == [x.data_ptr() for x in large]
    for state, side, other in ((of_groups, "column", "row"), (of_layer, "row", "column")):
        factor = state[f"{side}_factor"]
        ratio = mean_eigenvalue(factor) / mean_eigenvalue(state[f"{other}_factor"])
        damping = (0.1 * ratio).sqrt()[:, None, None] * torch.eye(factor.shape[-1])
        torch.testing.assert_close(state[f"{side}_inverse"], torch.linalg.inv(factor + damping), rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("kind", [KFAC, EKFAC])
def test_a_bad_factor_keeps_what_there_was_is_counted_and_warns_once(kind: type[KFAC]) -> None:
    model = network()
    ours = kind(model, **ALWAYS)
    train(model, ours, range(2))
    name = "row_inverse" if kind is KFAC else "row_basis"
    state = ours.state[model[4].weight]
    good, other = state[name].clone(), ours.state[model[6].weight][name].clone()

    def spoil() -> None:
        state["row_factor"].fill_(math.nan) if kind is EKFAC else state["row_factor"].copy_(-100 * torch.eye(6))

    spoil()
    with pytest.warns(UserWarning, match=r"4\.weight cannot be inverted with damping 0\.001.*damping="):
        train(model, ours, range(2, 3))
    assert torch.equal(state[name], good)
    assert not torch.equal(ours.state[model[6].weight][name], other)
    assert ours.metrics()["4.weight"]["bad_inverses"] == 1
    assert ours.metrics()["6.weight"]["bad_inverses"] == 0
    spoil()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(model, ours, range(3, 4))
    assert all(bool(p.isfinite().all()) for p in model.parameters())


@every_kind
def test_statistics_that_are_not_finite_are_left_out(kind: type[KroneckerOptimizer]) -> None:
    model = network()
    ours = kind(model, **ALWAYS)
    train(model, ours, range(2))
    factor = ours.state[model[4].weight]["column_factor"].clone()
    ours.zero_grad()
    F.cross_entropy(model(torch.randn(8, 2, 4, 4)), torch.randint(3, (8,))).backward()
    for site in ours.statistics.sites:
        assert site.sums is not None
        site.sums.vectors[0][0] = math.nan
    ours.step()
    assert torch.equal(ours.state[model[4].weight]["column_factor"], factor)
    assert ours.metrics()["4.weight"]["refused_statistics"] == 1
    assert all(bool(p.isfinite().all()) for p in model.parameters())


# Reports.


@every_kind
def test_explain_says_what_serves_each_parameter(kind: type[KroneckerOptimizer]) -> None:
    embedding, head = nn.Embedding(7, 4), nn.Linear(4, 7)
    head.weight = embedding.weight
    model = nn.ModuleDict({"embedding": embedding, "norm": nn.LayerNorm(4), "head": head})
    rows = {row.name: row for row in kind(model, max_factor_size=6).explain()}  # type: ignore[call-arg]
    tied = rows["embedding.weight"]
    assert tied.rule == "linear"
    assert "head.weight: factors of 7, diagonal and 5, without the statistics of its use by Embedding" in tied.detail
    assert rows["head.bias"].detail == "head.bias: factors of 7, diagonal and 5"
    assert (rows["norm.weight"].rule, rows["norm.weight"].detail) == ("element-wise", "norm.weight: Adam")
    assert not any(row.fallback for row in rows.values())
    if kind is not EKFACAdam:
        by_blocks = {row.name: row for row in kind(model, others="curvature").explain()}  # type: ignore[call-arg]
        assert by_blocks["norm.weight"].rule == "norm"


# State.


@every_kind
@pytest.mark.parametrize("bias", [True, False])
def test_a_step_leaves_the_gradients_alone(kind: type[KroneckerOptimizer], bias: bool) -> None:
    for widest in (4096, 1):
        model = nn.Linear(4, 3, bias=bias)
        optimizer = kind(model, max_factor_size=widest)  # type: ignore[call-arg]
        for _ in range(2):
            optimizer.zero_grad()
            model(torch.randn(8, 4)).square().sum(1).mean().backward()
            before = [p.grad.clone() for p in model.parameters() if p.grad is not None]
            optimizer.step()
            assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), before, strict=True))  # type: ignore[arg-type]


@every_kind
@pytest.mark.parametrize("layer", [nn.Linear(4, 4), nn.ConvTranspose1d(4, 4, 1), nn.LayerNorm(4)])
def test_a_frozen_weight_beside_a_trained_bias_is_saved_and_loaded(
    kind: type[KroneckerOptimizer], layer: nn.Module
) -> None:
    model = nn.Sequential(
        nn.Linear(4, 4),
        nn.Unflatten(1, (4, 1)) if isinstance(layer, nn.ConvTranspose1d) else nn.Tanh(),
        copy.deepcopy(layer),
    )
    model[2].weight.requires_grad_(False)
    twin = copy.deepcopy(model)
    ours, resumed = kind(model), kind(twin)

    def go(net: nn.Module, optimizer: Any, steps: range) -> None:
        for step in steps:
            optimizer.zero_grad()
            net(torch.randn(8, 4, generator=torch.Generator().manual_seed(step))).square().sum(1).mean().backward()
            optimizer.step()

    go(model, ours, range(2))
    twin.load_state_dict(model.state_dict())
    resumed.load_state_dict(ours.state_dict())
    go(model, ours, range(2, 4))
    go(twin, resumed, range(2, 4))
    assert_same_parameters(model, twin)


# Labels drawn from the model.


def classify(model: nn.Module, x: Tensor, optimizer: Any, labels: Tensor | None = None) -> None:
    out = model(x)
    optimizer.sample(out)
    F.cross_entropy(out, torch.zeros(len(x), dtype=torch.int64) if labels is None else labels).backward()


def true_factor(distribution: str, out: Tensor) -> Tensor:
    """The mean of the covariance of the derivative by the output."""
    p = out.softmax(1) if distribution == "categorical" else out.sigmoid()
    if distribution == "categorical":
        return torch.diag(p.mean(0)) - p.T @ p / len(p)
    return torch.diag((p * (1 - p)).mean(0)) if distribution == "bernoulli" else torch.eye(out.shape[1]).to(out)


@pytest.mark.parametrize(
    ("distribution", "loss_reduction"),
    [
        ("categorical", "mean"),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in (("bernoulli", "mean"), ("gaussian", "sum"))),
    ],
)
def test_sampled_fisher_is_the_true_one_in_the_mean(distribution: str, loss_reduction: str) -> None:
    torch.manual_seed(0)
    model = nn.Linear(4, 3).double()
    x = torch.randn(16, 4, dtype=torch.float64)
    settings = {**ALWAYS, "beta2": 1 - 1e-9, "fisher": "sampled", "loss_reduction": loss_reduction}
    optimizer = KFAC(model, lr=0.0, **settings)
    draws = 400
    for _ in range(draws):
        optimizer.zero_grad()
        out = model(x)
        optimizer.sample(out, distribution)  # type: ignore[arg-type]
        out.square().sum().backward()  # whatever the loss is
        optimizer.step()
    truth = true_factor(distribution, model(x).detach())
    # Products of derivatives have a standard deviation of at most 1.5, and there are 6,400 of each: 5 of its own.
    torch.testing.assert_close(optimizer.state[model.weight]["row_factor"][0], truth, rtol=0, atol=5 * 1.5 / 80)
    h = torch.cat([x, torch.ones_like(x[:, :1])], 1)
    torch.testing.assert_close(optimizer.state[model.weight]["column_factor"][0], h.T @ h / 16, rtol=1e-9, atol=0)


@every_sampler
def test_sampling_leaves_gradients_and_random_numbers_alone(kind: Any) -> None:
    model = network()
    optimizer = kind(model, fisher="sampled")
    x = torch.randn(8, 2, 4, 4)
    state = torch.get_rng_state()
    out = model(x)
    optimizer.sample(out)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(p.grad is None for p in model.parameters())
    assert all(site.sums is not None for site in optimizer.statistics.sites)
    pending = [copy.deepcopy(site.sums) for site in optimizer.statistics.sites]
    F.cross_entropy(out, torch.zeros(8, dtype=torch.int64)).backward()
    for site, sums in zip(optimizer.statistics.sites, pending, strict=True):
        assert site.sums is not None
        assert sums is not None
        assert all(torch.equal(a, b) for a, b in zip(site.sums.vectors, sums.vectors, strict=True))


def test_sampling_does_nothing_in_other_steps_and_for_the_empirical_fisher() -> None:
    model = nn.Linear(4, 3)
    sampled = KFAC(model, **{**ALWAYS, "update_interval": 3, "fisher": "sampled"})
    x = torch.randn(8, 4)
    for _ in range(4):
        sampled.zero_grad()
        classify(model, x, sampled)
        sampled.step()
    assert sampled.param_groups[0]["draws"] == 2
    sampled.close()
    empirical, twin = KFAC(model, **ALWAYS), copy.deepcopy(model)
    plain = KFAC(twin, **ALWAYS)
    for step in range(2):
        empirical.zero_grad()
        classify(model, x, empirical)
        empirical.step()
        plain.zero_grad()
        F.cross_entropy(twin(x), torch.zeros(8, dtype=torch.int64)).backward()
        plain.step()
        assert empirical.param_groups[0]["draws"] == 0, step
    assert_same_parameters(model, twin)


@every_sampler
def test_sampling_resumes_bit_for_bit(kind: Any) -> None:
    def go(model: nn.Module, optimizer: Any, steps: range) -> None:
        for step in steps:
            optimizer.zero_grad()
            classify(model, torch.randn(8, 2, 4, 4, generator=torch.Generator().manual_seed(step)), optimizer)
            optimizer.step()

    model, twin = network(), network(seed=1)
    ours, resumed = kind(model, fisher="sampled"), kind(twin)
    go(model, ours, range(3))
    twin.load_state_dict(model.state_dict())
    resumed.load_state_dict(ours.state_dict())
    go(model, ours, range(3, 6))
    go(twin, resumed, range(3, 6))
    assert_same_parameters(model, twin)
    assert_same_state(resumed.state_dict(), ours.state_dict())
    assert ours.param_groups[0]["draws"] > 3


def test_sampling_under_a_scaler_and_over_micro_batches() -> None:
    """Neither the loss's scale nor its division has a part in them."""
    model, twin = (nn.Linear(4, 3).double() for _ in range(2))
    twin.load_state_dict(model.state_dict())
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    scaled = KFAC(model, fisher="sampled", grad_scaler=scaler, **ALWAYS)
    plain = KFAC(twin, fisher="sampled", **ALWAYS)
    x, y = torch.randn(8, 4, dtype=torch.float64), torch.randint(3, (8,))
    derivatives: list[Tensor] = []
    for part, labels in zip(x.chunk(2), y.chunk(2), strict=True):
        out = model(part)
        scaled.sample(out)
        scaler.scale(F.cross_entropy(out, labels) / 2).backward()
        out = twin(part)
        out.register_hook(derivatives.append)
        plain.sample(out)
        (F.cross_entropy(out, labels) / 2).backward()
    scaler.step(scaled)
    plain.step()
    drawn = torch.cat(derivatives[::2])  # each is followed by that of the loss
    torch.testing.assert_close(plain.state[twin.weight]["row_factor"][0], drawn.T @ drawn / 8, rtol=1e-9, atol=1e-12)
    for side in ("row", "column"):
        a, b = (o.state[p.weight][f"{side}_factor"] for o, p in ((scaled, model), (plain, twin)))
        torch.testing.assert_close(a, b, rtol=1e-12, atol=0)
    h = torch.cat([x, torch.ones_like(x[:, :1])], 1)
    torch.testing.assert_close(plain.state[twin.weight]["column_factor"][0], h.T @ h / 8, rtol=1e-12, atol=0)


def test_terms_of_which_the_model_is_certain_count() -> None:
    """Their derivative is exactly zero, as that of what a mask leaves out: the output says how many there are."""
    model = nn.Linear(4, 3).double()
    x = torch.randn(8, 4, dtype=torch.float64)
    x[::2] *= 1e4
    optimizer = KFAC(model, fisher="sampled", **ALWAYS)
    out = model(x)
    assert int((out.softmax(1).amax(1) == 1).sum()) >= 3
    optimizer.sample(out)
    out.square().sum().backward()
    optimizer.step()
    h = torch.cat([x, torch.ones_like(x[:, :1])], 1)
    torch.testing.assert_close(optimizer.state[model.weight]["column_factor"][0], h.T @ h / 8, rtol=1e-12, atol=0)


@pytest.mark.parametrize("distribution", ["categorical", "bernoulli"])
def test_statistics_of_an_output_that_is_not_finite_are_refused(distribution: str) -> None:
    model = nn.Linear(4, 3)
    optimizer = KFAC(model, fisher="sampled", **ALWAYS)
    x = torch.randn(8, 4)
    for bad in (False, True):
        optimizer.zero_grad()
        out = model(x)
        optimizer.sample(out * math.inf if bad else out, distribution)  # type: ignore[arg-type]
        out.square().mean().backward()
        before = {k: v.clone() for k, v in optimizer.state[model.weight].items() if k.endswith("factor")}
        optimizer.step()
    assert all(torch.equal(optimizer.state[model.weight][k], v) for k, v in before.items())
    assert optimizer.metrics()["weight"]["refused_statistics"] == 1
    assert bool(model.weight.isfinite().all())


@pytest.mark.parametrize("host_backend", ["reference"], indirect=True)
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_sampling_from_a_compiled_model() -> None:
    torch._dynamo.reset()
    model, twin = network(dtype=torch.float64), network(dtype=torch.float64)
    with functorch_config.patch(donated_buffer=False):
        for net, call in ((model, torch.compile(model, backend="aot_eager")), (twin, twin)):
            optimizer = KFAC(net, fisher="sampled", **ALWAYS)
            for step in range(2):
                x = torch.randn(8, 2, 4, 4, generator=torch.Generator().manual_seed(step)).double()
                optimizer.zero_grad()
                classify(call, x, optimizer)
                optimizer.step()
            assert int(optimizer.state[net[0].weight]["fisher_updates"]) == 2
    torch._dynamo.reset()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):  # derivatives in another order
        torch.testing.assert_close(p, q, rtol=1e-8, atol=1e-8 * float(q.detach().abs().max()))


@pytest.mark.parametrize("kind", [KFAC, MBF])
def test_whose_labels_count_can_change(kind: Any) -> None:
    """From the next zero_grad() on, and in the units of either: as if it had been so from the start."""
    x = torch.randn(8, 4)
    factor = "row_factor" if kind is KFAC else "fisher_blocks"
    for first, then in (("empirical", "sampled"), ("sampled", "empirical")):
        model, twin = nn.Linear(4, 3), nn.Linear(4, 3)
        twin.load_state_dict(model.state_dict())
        always = {"refresh": "constant", "update_interval": 1, "inverse_interval": 1, "lr": 0.0, "beta2": 0.0}
        changed, plain = kind(model, fisher=first, **always), kind(twin, fisher=then, **always)
        for net, optimizer in ((model, changed), (twin, plain)):
            for step in range(2):
                if step == 1:
                    optimizer.param_groups[0].update(fisher=then, draws=0)
                optimizer.zero_grad()
                classify(net, x, optimizer)
                optimizer.step()
        assert torch.equal(changed.state[model.weight][factor], plain.state[twin.weight][factor])
    with pytest.raises(ValueError, match=r"fisher is 'sampled' in some groups.*expected one for all"):
        changed.add_param_group({"params": [nn.Parameter(torch.zeros(2))], "fisher": "sampled"})


def test_a_step_without_samples_says_so() -> None:
    model = nn.Linear(4, 3)
    optimizer = KFAC(model, fisher="sampled")
    model(torch.randn(8, 4)).square().sum(1).mean().backward()
    with pytest.warns(UserWarning, match=r"fisher='sampled'.*sample\(output\)"):
        optimizer.step()


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((torch.ones(2, 3, requires_grad=True), "poisson"), ValueError, "distribution is 'poisson', expected one of"),
        ((torch.ones(2, 3, requires_grad=True), "gaussian", 2), ValueError, "dim is 2, expected a dimension"),
        ((torch.ones(2, 3),), ValueError, "output has no graph"),
        ((torch.ones(2, 3, dtype=torch.int64),), TypeError, "output is Tensor, expected a floating-point tensor"),
        (("logits",), TypeError, "output is str, expected a floating-point tensor"),
    ],
)
def test_bad_arguments_of_sample_are_named(arguments: tuple[Any, ...], error: type[Exception], message: str) -> None:
    optimizer = KFAC(nn.Linear(4, 3), fisher="sampled")
    output, distribution, dim = (*arguments, "categorical", -1)[:3] if len(arguments) == 1 else (*arguments, -1)[:3]
    with pytest.raises(error, match=message):
        optimizer.sample(output, distribution, dim=dim)


def test_classes_may_be_in_any_dimension() -> None:
    """A convolution's classes are its channels; the draws are the same."""
    torch.manual_seed(0)
    linear, conv = nn.Linear(4, 3).double(), nn.Conv1d(4, 3, 1).double()
    conv.weight.data, conv.bias.data = linear.weight.data[..., None].clone(), linear.bias.data.clone()
    x = torch.randn(6, 5, 4, dtype=torch.float64)
    factors = []
    for model, inputs, dim in ((linear, x, -1), (conv, x.mT, 1)):
        optimizer = KFAC(model, fisher="sampled", **ALWAYS)
        out = model(inputs)
        optimizer.sample(out, dim=dim)
        out.square().mean().backward()
        optimizer.step()
        factors.append(optimizer.state[model.weight]["row_factor"])
    torch.testing.assert_close(*factors, rtol=1e-12, atol=1e-15)


# Several processes.


def _all_reduce(x: Tensor, op: Any = dist.ReduceOp.SUM, group: Any = None) -> None:
    if op == dist.ReduceOp.SUM:
        x *= 2


def _all_gather_object(everywhere: list[Any], x: Any, group: Any = None) -> None:
    everywhere[:] = [x, x]


TWINS = SimpleNamespace(ReduceOp=dist.ReduceOp, all_reduce=_all_reduce, all_gather_object=_all_gather_object)
"""In place of torch.distributed: this process and another one that has the same data."""


@pytest.mark.parametrize("fisher", ["empirical", "sampled"])
def test_processes_of_the_same_data_have_the_statistics_of_one(fisher: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """DistributedDataParallel averages the gradients of the loss, and not those of drawn labels."""
    found = []
    for processes in (1, 2):
        if processes == 2:
            for module in (statistics, reduction):
                monkeypatch.setattr(module, "dist", TWINS)
            monkeypatch.setattr(Processes, "count", 2)
        model = network(dtype=torch.float64)
        optimizer = KFAC(model, fisher=fisher, others="curvature", **ALWAYS)  # type: ignore[arg-type]
        out = model(torch.randn(8, 2, 4, 4, generator=torch.Generator().manual_seed(0)).double())
        optimizer.sample(out)
        F.cross_entropy(out, torch.arange(8) % 3).backward()
        optimizer.step()
        kept = {
            (i, name): value for i, p in enumerate(model.parameters()) for name, value in optimizer.state[p].items()
        }
        found.append({key: kept[key] for key in kept if key[1].endswith(("_factor", "fisher_blocks"))})
    assert len(found[0]) == 2 * 3 + 2  # layers with factors, and normalisations
    for key, value in found[0].items():
        torch.testing.assert_close(found[1][key], value, rtol=1e-12, atol=1e-15)


def test_every_draw_and_every_process_has_labels_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: dict[int, list[Tensor]] = {}
    for number, rank in enumerate((0, 1, 1)):
        monkeypatch.setattr(Processes, "rank", rank)
        torch.manual_seed(0)
        model = nn.Linear(4, 3)
        optimizer = KFAC(model, fisher="sampled")
        out = model(torch.randn(64, 4))
        out.register_hook(drawn.setdefault(number, []).append)
        for _ in range(2):
            optimizer.sample(out)
    assert all(torch.equal(a, b) for a, b in zip(drawn[1], drawn[2], strict=True))
    first, second = drawn[0]
    assert len({tuple(x.flatten().tolist()) for x in (first, second, *drawn[1])}) == 4


def _train_a_part(rank: int, kind: type[KroneckerOptimizer], fisher: str) -> tuple[list[Any], list[Any]]:
    model = network(dtype=torch.float64)
    model[1] = nn.Identity()  # batch statistics are those of each process
    parallel = nn.parallel.DistributedDataParallel(model)
    optimizer = kind(model, fisher=fisher)  # type: ignore[call-arg]
    for step in range(4):
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(8, 2, 4, 4, generator=generator).double()[4 * rank : 4 * rank + 4]
        y = torch.randint(3, (8,), generator=generator)[4 * rank : 4 * rank + 4]
        optimizer.zero_grad()
        out = parallel(x)
        optimizer.sample(out)
        F.cross_entropy(out, y).backward()
        optimizer.step()
    factors = [optimizer.state[model[i].weight]["row_factor"].tolist() for i in (0, 4, 6)]
    return [p.detach().tolist() for p in model.parameters()], factors


@pytest.mark.slow
@needs_processes
@every_kind
def test_data_parallel_equals_one_process(kind: type[KroneckerOptimizer], tmp_path: Path) -> None:
    first, second = in_two_processes(functools.partial(_train_a_part, kind=kind, fisher="empirical"), tmp_path)
    assert first == second, "every rank holds the same bits"
    model = network(dtype=torch.float64)
    model[1] = nn.Identity()
    optimizer = kind(model)
    train(model, optimizer, range(4))
    # Sums in another order; a basis of fewer samples than columns is any in its null space, where steps are longest.
    tolerance = 1e-9 if kind is KFAC else 1e-3
    for p, values in zip(model.parameters(), first[0], strict=True):
        torch.testing.assert_close(torch.tensor(values, dtype=p.dtype), p.detach(), rtol=tolerance, atol=tolerance)


@pytest.mark.slow
@needs_processes
def test_processes_that_draw_labels_hold_the_same_bits(tmp_path: Path) -> None:
    first, second = in_two_processes(functools.partial(_train_a_part, kind=KFAC, fisher="sampled"), tmp_path)
    assert first == second
