"""MBF beyond the contract of all optimizers: what blocks are, bad ones, storage, the trust region, the warm start."""

from __future__ import annotations

import copy
import math
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from fisher_kernels import MBF
from tests.naive_mbf import DEFAULTS, NaiveMBF
from tests.small_network import (
    Tied,
    assert_same_parameters,
    assert_same_state,
    backward,
    hooks,
    network,
    parameters_of,
    train,
)

pytestmark = pytest.mark.usefixtures("host_backend", "one_thread")

FREE: dict[str, Any] = {"kl_clip": None, "max_relative_step": None}
"""No bound shortens a step."""

# Arguments.


def test_defaults() -> None:
    group = MBF(nn.Linear(2, 2)).param_groups[0]
    expected = {**DEFAULTS, "inverse_storage": "full"}
    assert {name: group[name] for name in expected} == expected


# Labels drawn from the model.


def drawn(model: nn.Module, optimizer: MBF, x: Tensor, y: Tensor, divisor: int = 1, scaler: Any = None) -> Tensor:
    """A forward, samples, and the backward of the loss; returns the derivative of the labels that were drawn."""
    out = model(x)
    derivatives: list[Tensor] = []
    out.register_hook(derivatives.append)
    optimizer.sample(out)
    loss = F.cross_entropy(out, y) / divisor
    (loss if scaler is None else scaler.scale(loss)).backward()
    assert len(derivatives) == 2, "one backward of the drawn labels, one of the loss"
    return derivatives[0]


@pytest.mark.parametrize("settings", [{}, {"linear_blocks": "per_output"}, {"sequence": "reduce"}])
@pytest.mark.parametrize("loss_reduction", ["mean", "sum"])
def test_blocks_of_drawn_labels_are_theirs(loss_reduction: str, settings: dict[str, Any]) -> None:
    """Naive code is given the very labels that were drawn, as the derivative of a sum."""
    model = network(dtype=torch.float64)
    twin = copy.deepcopy(model)
    ours = MBF(model, lr=0.0, fisher="sampled", loss_reduction=loss_reduction, beta2=0.6, **settings)
    naive = NaiveMBF(twin, lr=0.0, loss_reduction="sum", beta2=0.6, **settings)
    for step in range(3):
        generator = torch.Generator().manual_seed(step)
        x, y = torch.randn(8, 2, 4, 4, generator=generator).double(), torch.randint(3, (8,), generator=generator)
        ours.zero_grad()
        naive.zero_grad()
        labels = drawn(model, ours, x, y)
        # Of one class for each row: the softmax less that class.
        chosen = (model(x).softmax(1) - labels).detach()
        torch.testing.assert_close(chosen.amax(1), torch.ones(8).double())
        torch.testing.assert_close(chosen.abs().sum(1), torch.ones(8).double())
        (twin(x) * labels).sum().backward()
        before = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        ours.step()
        naive.step()
        names = {id(q): p for p, q in zip(model.parameters(), twin.parameters(), strict=True)}
        for block in naive.blocks:
            assert block.average is not None
            found = ours.state[names[id(block.owner)]]["fisher_blocks"]
            # Sums of some hundred float64 terms.
            atol = 1e-12 * float(block.average.abs().max())
            torch.testing.assert_close(found, block.average.view_as(found), rtol=0, atol=atol)
        for p, gradient in zip(model.parameters(), before, strict=True):
            assert p.grad is not None
            assert torch.equal(p.grad, gradient)
            if step == 0:  # that of the data, not of the draws
                torch.testing.assert_close(ours.state[p]["momentum_buffer"], gradient, rtol=1e-12, atol=1e-15)


def test_drawn_labels_know_no_scale_and_no_division() -> None:
    model, twin = network(dtype=torch.float64), network(dtype=torch.float64)
    for net in (model, twin):
        net[1] = nn.Identity()  # samples by themselves
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    scaled = MBF(model, lr=0.0, fisher="sampled", grad_scaler=scaler)
    naive = NaiveMBF(twin, lr=0.0, loss_reduction="sum")
    x, y = torch.randn(8, 2, 4, 4, dtype=torch.float64), torch.randint(3, (8,))
    parts = zip(x.chunk(2), y.chunk(2), strict=True)
    labels = torch.cat([drawn(model, scaled, part, few, 2, scaler) for part, few in parts])
    scaler.step(scaled)
    (twin(x) * labels).sum().backward()
    naive.step()
    names = {id(q): p for p, q in zip(model.parameters(), twin.parameters(), strict=True)}
    for block in naive.blocks:
        assert block.average is not None
        found = scaled.state[names[id(block.owner)]]["fisher_blocks"]
        atol = 1e-12 * float(block.average.abs().max())
        torch.testing.assert_close(found, block.average.view_as(found), rtol=0, atol=atol)


def test_warm_start_of_drawn_labels() -> None:
    model = nn.Linear(4, 3).double()
    optimizer = MBF(model, fisher="sampled")
    x, y = torch.randn(8, 4, dtype=torch.float64), torch.randint(3, (8,))
    with pytest.raises(ValueError, match=r"does loss_fn call sample\(output\)\?"):
        optimizer.warm_start([x], lambda x: F.cross_entropy(model(x), y), progress=False)
    labels: list[Tensor] = []

    def loss_of(x: Tensor) -> Tensor:
        out = model(x)
        out.register_hook(labels.append)
        optimizer.sample(out)
        return F.cross_entropy(out, y)

    optimizer.warm_start([x, 2 * x], loss_of, progress=False)
    h = torch.cat([torch.cat([z, torch.ones_like(z[:, :1])], 1) for z in (x, 2 * x)])
    weights = torch.cat(labels[::2]).square().sum(1) / 3
    expected = h.T @ (weights[:, None] * h) / 16
    torch.testing.assert_close(optimizer.state[model.weight]["fisher_blocks"][0], expected, rtol=1e-12, atol=1e-12)


# Checkpoints.


class TwoBiases(nn.Module):
    """Two Linears with one weight and a bias each, and a normalisation."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.second = nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 4)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.second(self.norm(self.first(x)))
        return out


@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("storage", ["full", "packed", "bfloat16"])
@pytest.mark.parametrize("linear_blocks", ["shared", "per_output", 2])
def test_resumes_biases_apart_from_their_weight_bit_for_bit(
    linear_blocks: str | int, storage: str, apart: bool
) -> None:
    """Saved between an update and the inversion that is due to it; what a bias is stepped with is as old as ever."""

    def build() -> tuple[TwoBiases, MBF]:
        torch.manual_seed(0)
        model = TwoBiases()
        biases = [p for name, p in model.named_parameters() if name.endswith("bias") and apart]
        others = [p for p in model.parameters() if not any(p is bias for bias in biases)]
        groups = [{"params": others}, *([{"params": biases}] if apart else [])]
        settings = {"linear_blocks": linear_blocks, "inverse_storage": storage, "inverse_interval": 3}
        return model, MBF(model, lr=0.1, params=groups, refresh="constant", **settings)

    def go(model: nn.Module, optimizer: MBF, steps: range) -> None:
        for step in steps:
            x = torch.randn(6, 4, generator=torch.Generator().manual_seed(step))
            optimizer.zero_grad()
            model(x).sin().sum(1).mean().backward()
            optimizer.step()

    (model, ours), (twin, resumed) = build(), build()
    go(model, ours, range(5))
    twin.load_state_dict(model.state_dict())
    resumed.load_state_dict(ours.state_dict())
    go(model, ours, range(5, 9))
    go(twin, resumed, range(5, 9))
    assert_same_parameters(model, twin)
    assert_same_state(resumed.state_dict(), ours.state_dict())


# Groups.


def test_weight_and_bias_in_groups_of_their_own() -> None:
    """The usual split for weight decay: their blocks then have no entries in common."""
    model = nn.Linear(4, 3)
    ours = MBF(
        model,
        **FREE,
        momentum=0.0,
        params=[{"params": [model.weight]}, {"params": [model.bias], "lr": 0.1}],
    )
    before = parameters_of(model)
    x, y = torch.randn(8, 4), torch.randn(8, 3)
    F.mse_loss(model(x), y).backward()
    ours.step()
    block = ours.state[model.weight]["fisher_blocks"][0].double()
    assert model.weight.grad is not None
    assert model.bias.grad is not None
    inverse = torch.linalg.inv(block[:4, :4] + 1e-3 * torch.eye(4, dtype=torch.float64))
    weight = before["weight"].double() - 1e-3 * model.weight.grad.double() @ inverse
    bias = before["bias"].double() - 0.1 * model.bias.grad.double() / (block[4, 4] + 1e-3)
    # Condition numbers below 1e4, in float32.
    torch.testing.assert_close(model.weight.double(), weight, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(model.bias.double(), bias, rtol=1e-4, atol=1e-5)


def test_a_weight_that_is_frozen_in_mid_run_leaves_its_bias_a_block_of_its_own_at_once() -> None:
    """The inverse of the whole block, due for renewal in seven steps, is of no use to a bias alone."""
    model = nn.Linear(4, 3).double()
    ours = MBF(model, **FREE, momentum=0.0, inverse_interval=10, refresh="constant")
    x, y = torch.randn(8, 4, dtype=torch.float64), torch.randn(8, 3, dtype=torch.float64)
    for step in range(3):
        model.weight.requires_grad_(step < 2)
        ours.zero_grad()
        F.mse_loss(model(x), y).backward()
        before = model.bias.detach().clone()
        ours.step()
    assert model.bias.grad is not None
    corner = ours.state[model.weight]["fisher_blocks"][0, -1, -1]
    torch.testing.assert_close(model.bias, before - 1e-3 * model.bias.grad / (corner + 1e-3), rtol=1e-9, atol=0)


# Statistics that no block can be made of.


def test_a_bad_block_keeps_its_inverse_is_counted_and_warns_once() -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(8, 3))
    ours = MBF(model, inverse_interval=1)

    def step() -> None:
        ours.zero_grad()
        x = torch.randn(6, 1, 4, 4, generator=torch.Generator().manual_seed(0))
        model(x).square().mean().backward()
        ours.step()

    step()
    state = ours.state[model[0].weight]
    good = state["inverse_blocks"].clone()
    state["fisher_blocks"][1] = -torch.eye(9)  # what rounding might do to a block without damping
    with pytest.warns(UserWarning, match=r"0\.weight are not positive definite with damping 0\.001.*damping="):
        step()
    assert torch.equal(state["inverse_blocks"][1], good[1])
    assert not torch.equal(state["inverse_blocks"][0], good[0])
    report = ours.metrics()
    assert report["0.weight"]["bad_blocks"] == 1
    assert report["2.weight"]["bad_blocks"] == 0
    state["fisher_blocks"][1] = -torch.eye(9)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step()
    assert ours.metrics()["0.weight"]["bad_blocks"] == 2
    assert all(bool(p.isfinite().all()) for p in model.parameters())


@pytest.mark.parametrize("storage", ["packed", "bfloat16"])
def test_a_bad_block_keeps_its_inverse_in_other_storage(storage: str) -> None:
    model = nn.Conv2d(1, 3, 2)
    ours = MBF(model, inverse_storage=storage, inverse_interval=1)
    for bad in (False, True):
        if bad:
            ours.state[model.weight]["fisher_blocks"][1, 0, 0] = -7.0
            good = ours.state[model.weight]["inverse_blocks"].clone()
        ours.zero_grad()
        model(torch.randn(4, 1, 5, 5)).square().mean().backward()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            ours.step()
    inverse = ours.state[model.weight]["inverse_blocks"]
    assert torch.equal(inverse[1], good[1])
    assert not torch.equal(inverse[0], good[0])


def test_one_nan_poisons_nothing() -> None:
    model = network()
    ours = MBF(model, inverse_interval=1)
    train(model, ours, range(2))
    before = copy.deepcopy(ours.state_dict()["state"])
    parameters = parameters_of(model)
    ours.zero_grad()
    (backward(model, 5) * 1).item()
    for p in model.parameters():
        assert p.grad is not None
        p.grad.fill_(math.nan)
    for site in ours.statistics.sites:
        assert site.sums is not None
        for vector in site.sums.vectors:
            vector[0] = math.nan
    ours.step()
    assert_same_state({"param_groups": [], "state": ours.state_dict()["state"]}, {"param_groups": [], "state": before})
    assert all(torch.equal(p, parameters[name]) for name, p in model.named_parameters())
    report = ours.metrics()
    assert all(row["refused_statistics"] == 1 and row["skipped_blocks"] > 0 for row in report.values())
    train(model, ours, range(2, 4))
    assert all(bool(p.isfinite().all()) for p in model.parameters())


# Storage.


def test_storage_of_inverses() -> None:
    models = {storage: network() for storage in ("full", "packed", "bfloat16")}
    optimizers = {
        storage: MBF(model, inverse_storage=storage, linear_blocks="shared") for storage, model in models.items()
    }
    for storage, model in models.items():
        train(model, optimizers[storage], range(1))
    inverses = {s: optimizers[s].state[models[s][0].weight]["inverse_blocks"] for s in models}
    assert inverses["full"].shape == (8, 9, 9)
    assert inverses["packed"].shape == (8, 45)
    assert inverses["bfloat16"].shape == (8, 9, 9)
    assert inverses["bfloat16"].dtype == torch.bfloat16
    rows, columns = torch.tril_indices(9, 9)
    assert torch.equal(inverses["packed"], inverses["full"][:, rows, columns])
    torch.testing.assert_close(inverses["bfloat16"].float(), inverses["full"], rtol=2**-8, atol=0)
    shared = optimizers["packed"].state[models["packed"][4].weight]["inverse_blocks"]
    assert shared.shape == (1, 65, 65)  # there is but one
    for p, q in zip(models["full"].parameters(), models["packed"].parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-7)


# Trust region.


def test_kl_clip_bounds_the_step() -> None:
    """lr^2 |<d, g>| is the model's change in KL divergence, to second order; without momentum it can be seen."""
    for clip in (1e-6, 1e6):
        model, free = network(dtype=torch.float64), network(dtype=torch.float64)
        settings: dict[str, Any] = {"max_relative_step": None, "momentum": 0.0}
        optimizers = MBF(model, kl_clip=clip, **settings), MBF(free, kl_clip=None, **settings)
        start = parameters_of(model)
        for net, opt in zip((model, free), optimizers, strict=True):
            train(net, opt, range(1))
        product = 0.0
        for name, p in free.named_parameters():
            assert p.grad is not None
            product += float(((start[name] - p.detach()) / 1e-3 * p.grad).sum())
        scale = min(1.0, math.sqrt(clip / (1e-6 * abs(product))))
        assert (scale < 1) == (clip < 1)
        for (name, p), q in zip(model.named_parameters(), free.parameters(), strict=True):
            torch.testing.assert_close(start[name] - p, scale * (start[name] - q), rtol=1e-9, atol=1e-15)
        assert all(row["trust_scale"] == pytest.approx(scale) for row in optimizers[0].metrics().values())


def test_groups_do_not_change_the_trust_region() -> None:
    """Decay and no-decay groups, and others, are bounded as one."""
    results = []
    for cut in (None, 4):
        model = network(dtype=torch.float64)
        params = None if cut is None else [{"params": model[:cut].parameters()}, {"params": model[cut:].parameters()}]
        ours = MBF(model, kl_clip=1e-6, params=params)
        train(model, ours, range(4))
        results.append(parameters_of(model))
        scales = {row["trust_scale"] for row in ours.metrics().values()}
        assert len(scales) == 1
        assert scales.pop() < 0.5
    for name, p in results[0].items():
        torch.testing.assert_close(p, results[1][name], rtol=1e-9, atol=1e-12)


def test_groups_of_other_bounds_have_a_trust_region_of_their_own() -> None:
    model = network()
    params = [{"params": model[:4].parameters()}, {"params": model[4:].parameters(), "kl_clip": 1e6}]
    ours = MBF(model, kl_clip=1e-6, params=params)
    train(model, ours, range(2))
    report = ours.metrics()
    assert report["0.weight"]["trust_scale"] < 1 == report["4.weight"]["trust_scale"]


# The cap.


class Adapted(nn.Module):
    """A Linear that is frozen, and beside it a product of two that begins as zero."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.base, self.a, self.b = (nn.Linear(6, 6, bias=False) for _ in range(3))
        self.base.requires_grad_(False)
        nn.init.zeros_(self.b.weight)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.base(x) + self.b(self.a(x))
        return out


@pytest.mark.parametrize("floor", [0.0, 0.3])
def test_layers_that_begin_as_zero_learn(floor: float) -> None:
    """By the floor of the cap: |W| is 0, and no multiple of it is a step."""
    model = Adapted()
    ours = MBF(
        model,
        lr=0.1,
        kl_clip=None,
        max_relative_step=0.1,
        floor=floor,
        params=[*model.a.parameters(), *model.b.parameters()],
    )
    x = torch.randn(64, 6, generator=torch.Generator().manual_seed(1))
    y = x.roll(1, 1)
    losses = []
    for _ in range(150):
        ours.zero_grad()
        loss = F.mse_loss(model(x), y)
        loss.backward()
        ours.step()
        losses.append(loss.item())
    assert bool(model.b.weight.any()) is (floor > 0)
    assert (losses[-1] < 0.7 * losses[0]) is (floor > 0)


def test_the_cap_holds_for_weight_and_bias_together() -> None:
    """Of a convolution too, whose bias has blocks of its own, and where the bias is in another group."""
    for apart in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.Flatten(), nn.Linear(12, 3)).double()
        weights, biases = ([p for n, p in model.named_parameters() if n.endswith(of)] for of in ("weight", "bias"))
        params = [{"params": weights}, {"params": biases, "lr": 0.5}] if apart else None
        ours = MBF(model, lr=1.0, kl_clip=None, max_relative_step=1e-3, params=params)
        for step in range(3):
            before = parameters_of(model)
            train(model, ours, range(step, step + 1))
            for name in ("0", "2"):
                pairs = [(p.detach(), before[n]) for n, p in model.named_parameters() if n.startswith(name)]
                moved = math.sqrt(sum(float((p - then).square().sum()) for p, then in pairs))
                size = math.sqrt(sum(float(then.square().sum()) for _, then in pairs))
                assert moved == pytest.approx(1e-3 * size, rel=1e-9)
        assert all(row["capped_share"] == 1 for row in ours.metrics().values())


def test_the_cap_shortens_weight_and_bias_alike() -> None:
    moves = []
    for cap in (None, 1e-3):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.Flatten(), nn.Linear(12, 3)).double()
        ours, before = MBF(model, lr=1.0, kl_clip=None, max_relative_step=cap), parameters_of(model)
        train(model, ours, range(1))
        moves.append({n: float((p.detach() - before[n]).norm()) for n, p in model.named_parameters()})
    free, capped = moves
    for name in ("0", "2"):
        weight, bias = (capped[f"{name}.{role}"] / free[f"{name}.{role}"] for role in ("weight", "bias"))
        assert weight == pytest.approx(bias, rel=1e-9)
        assert weight < 1


def test_the_share_of_capped_steps() -> None:
    model = network()
    ours = MBF(model, max_relative_step=1e6)
    train(model, ours, range(3))
    assert all(row["capped_share"] == 0 for row in ours.metrics().values())
    ours.param_groups[0]["max_relative_step"] = 1e-9
    train(model, ours, range(3, 4))
    assert all(row["capped_share"] == 0.25 for row in ours.metrics().values())


# Warm start.


def batches(count: int = 3) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(3)
    sizes = [6, 4, 5][:count]
    return [(torch.randn(n, 2, 4, 4, generator=generator), torch.randint(3, (n,), generator=generator)) for n in sizes]


def test_warm_start_is_the_mean_over_all_samples() -> None:
    """The blocks of a model without batch statistics are those of one large batch."""

    def build() -> nn.Sequential:
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(2, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(16, 3)).double()

    model, whole = build(), build()
    data = [(x.double(), y) for x, y in batches()]
    ours, other = MBF(model), MBF(whole)
    ours.warm_start(data, lambda batch: F.cross_entropy(model(batch[0]), batch[1]), progress=False)
    x, y = torch.cat([x for x, _ in data]), torch.cat([y for _, y in data])
    F.cross_entropy(whole(x), y).backward()
    other.step()
    for p, q in zip(model.parameters(), whole.parameters(), strict=True):
        for name in ("fisher_blocks", "inverse_blocks"):
            if name in other.state[q]:
                torch.testing.assert_close(ours.state[p][name], other.state[q][name], rtol=1e-9, atol=1e-12)
    # The next batch is averaged in.
    first = ours.state[model[0].weight]["fisher_blocks"].clone()
    F.cross_entropy(model(x), y).backward()
    ours.step()
    torch.testing.assert_close(ours.state[model[0].weight]["fisher_blocks"], first, rtol=1e-9, atol=1e-12)
    assert float(ours.state[model[0].weight]["fisher_updates"]) == 2


def test_warm_start_counts_the_samples_of_each_layer() -> None:
    """Of sequences of several lengths an Embedding sees as many samples as there are, a Linear as there are rows."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(5, 4), nn.LayerNorm(4), nn.Linear(4, 3)).double()
    ours = MBF(model)
    generator = torch.Generator().manual_seed(0)
    data = [torch.randint(0, 5, shape, generator=generator) for shape in ((6, 2), (4, 5))]
    ours.warm_start(data, lambda x: model(x).sin().flatten(1).sum(1).mean(), progress=False)
    squares = torch.zeros(5, 4, dtype=torch.float64)
    for sample in (row for x in data for row in x):
        (gradient,) = torch.autograd.grad(model(sample.unsqueeze(0)).sin().sum(), model[0].weight)
        squares += gradient.square()
    torch.testing.assert_close(
        ours.state[model[0].weight]["fisher_blocks"].view(5, 4), squares / 10, rtol=1e-12, atol=1e-15
    )


def test_warm_start_names_a_loss_function_that_returns_none() -> None:
    ours = MBF(nn.Linear(2, 2))
    with pytest.raises(TypeError, match=r"^loss_fn returned None, expected a loss"):
        ours.warm_start([torch.ones(3, 2)], lambda x: None, progress=False)  # type: ignore[arg-type,return-value]


def test_warm_start_leaves_all_else_alone(capsys: pytest.CaptureFixture[str]) -> None:
    model = network()
    ours = MBF(model, update_interval=5, refresh="constant")
    train(model, ours, range(1))
    backward(model, 7)
    gradients = [p.grad for p in model.parameters()]
    values = copy.deepcopy(model.state_dict())
    momentum = [ours.state[p]["momentum_buffer"].clone() for p in model.parameters()]
    ours.warm_start(batches(), lambda batch: F.cross_entropy(model(batch[0]), batch[1]))
    assert "Fisher blocks" in capsys.readouterr().out
    assert all(p.grad is g for p, g in zip(model.parameters(), gradients, strict=True))
    assert all(torch.equal(value, values[name]) for name, value in model.state_dict().items())
    assert all(
        torch.equal(ours.state[p]["momentum_buffer"], m) for p, m in zip(model.parameters(), momentum, strict=True)
    )
    assert all(site.sums is None for site in ours.statistics.sites)
    ours.step()


@pytest.mark.parametrize("data", [[], [(torch.full((2, 2, 4, 4), math.nan), torch.zeros(2, dtype=torch.long))]])
def test_warm_start_without_statistics_is_refused(data: list[tuple[Tensor, Tensor]]) -> None:
    model = network()
    ours = MBF(model)
    values = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="batches gave no finite statistics"):
        ours.warm_start(data, lambda batch: F.cross_entropy(model(batch[0]), batch[1]), progress=False)
    assert all(torch.equal(value, values[name]) for name, value in model.state_dict().items())


def test_warm_start_that_fails_half_way_changes_nothing() -> None:
    model = network()
    ours = MBF(model)
    train(model, ours, range(1))
    before = copy.deepcopy(ours.state_dict())

    def loss(batch: tuple[Tensor, Tensor]) -> Tensor:
        if len(batch[0]) == 4:
            raise RuntimeError("no more")
        return F.cross_entropy(model(batch[0]), batch[1])

    with pytest.raises(RuntimeError, match="no more"):
        ours.warm_start(batches(), loss, progress=False)
    assert_same_state(ours.state_dict(), before)
    train(model, ours, range(1, 2))


@pytest.mark.filterwarnings("ignore:MBF.* of the trained parameters have no layer rule")
def test_blocks_of_a_fallback_do_not_depend_on_the_scale_of_a_scaler() -> None:
    results = []
    for scaler in (None, torch.amp.GradScaler("cpu", init_scale=1024.0)):
        torch.manual_seed(0)
        model = Tied()
        ours = MBF(model)
        loss = model(torch.arange(5)).square().mean()
        if scaler is None:
            loss.backward()
            ours.step()
        else:
            scaler.scale(loss).backward()
            scaler.step(ours)
        results.append(ours.state[model.position]["fisher_blocks"])
    assert bool(results[0].any())
    assert torch.equal(results[0], results[1])


def test_warm_start_ignores_the_scale_of_a_scaler() -> None:
    results = []
    for scaler in (None, torch.amp.GradScaler("cpu", init_scale=1024.0)):
        model = network()
        if scaler is not None:
            scaler.scale(torch.ones(()))
        ours = MBF(model, grad_scaler=scaler)
        ours.warm_start(batches(), lambda b, model=model: F.cross_entropy(model(b[0]), b[1]), progress=False)
        results.append(ours.state[model[0].weight]["fisher_blocks"])
    assert torch.equal(results[0], results[1])


# Memory.


@pytest.mark.parametrize("checkpointed", [False, True])
def test_checkpointing_keeps_no_inputs(checkpointed: bool) -> None:
    """What a rule keeps of a forward goes the way of what autograd keeps: checkpointing drops and recomputes it."""
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 1))
    ours = MBF(model)
    inputs: list[StorageWeakRef] = []  # of the memory: what is kept is another tensor on it
    model[2].register_forward_pre_hook(lambda _, args: inputs.append(StorageWeakRef(args[0].untyped_storage())))
    x = torch.randn(4, 8)
    out = checkpoint(model, x, use_reentrant=False) if checkpointed else model(x)
    assert inputs[0].expired() == checkpointed
    out.sum().backward()
    ours.step()
    assert float(ours.state[model[2].weight]["fisher_updates"]) == 1


@pytest.mark.parametrize("sequence", ["expand", "reduce"])
@pytest.mark.parametrize("kept", [False, True])
def test_inputs_are_freed_when_autograd_frees_its_own(sequence: Any, kept: bool) -> None:
    """A loss that is still bound, as in ``total += loss``, keeps no activations once its graph has been freed."""
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Tanh(), nn.Flatten(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 1))
    ours = MBF(model, sequence=sequence)
    inputs: list[StorageWeakRef] = []
    for layer in (model[3], model[5]):
        layer.register_forward_pre_hook(lambda _, args: inputs.append(StorageWeakRef(args[0].untyped_storage())))
    loss = model(torch.randn(4, 1, 4, 4)).sum()
    loss.backward(retain_graph=kept)
    if kept:
        assert not any(ref.expired() for ref in inputs)
        loss.backward()
    ours.step()
    assert all(ref.expired() for ref in inputs)
    assert float(ours.state[model[5].weight]["fisher_updates"]) == 1


def test_inputs_outlive_a_backward_that_ends_above_their_layer() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 1))
    ours = MBF(model)
    h = model[0](torch.randn(4, 8))
    (derivative,) = torch.autograd.grad(model[2](h.tanh()).sum(), h)
    h.backward(derivative)
    ours.step()
    assert float(ours.state[model[0].weight]["fisher_updates"]) == 1


# Reports.


@pytest.mark.filterwarnings("ignore:MBF.* of the trained parameters have no layer rule")
def test_explain_names_blocks_and_fallbacks() -> None:
    model = network()
    rows = {row.name: row for row in MBF(model, linear_blocks="shared").explain()}
    assert rows["0.weight"].detail == "0.weight: 8 blocks of 9 x 9"
    assert rows["1.bias"].detail == "1.bias: beside its weight, 4 blocks of 2 x 2"
    assert rows["4.weight"].detail == "4.weight: beside its bias, 1 block of 65 x 65, shared by 6 rows"
    assert not any(row.fallback for row in rows.values())
    tied = {row.name: row for row in MBF(Tied()).explain()}
    assert tied["position"].rule == "fallback"
    assert "squared gradient" in tied["position"].detail
    assert tied["embedding.weight"].rule == "embedding + linear"


def test_metrics_are_figures_of_the_inverses() -> None:
    model = network(dtype=torch.float64)
    ours = MBF(model, inverse_interval=1)
    assert ours.metrics() == {}
    train(model, ours, range(3))
    report = ours.metrics()
    assert list(report) == [name for name, _ in model.named_parameters()]
    inverse = ours.state[model[0].weight]["inverse_blocks"]
    eigenvalues = torch.linalg.eigvalsh(inverse)
    row = report["0.weight"]
    assert row["damping_share"] == pytest.approx(1e-3 * float(eigenvalues.mean()))
    assert row["smallest_step"] == pytest.approx(1e-3 * float(eigenvalues.min()))
    assert row["largest_step"] == pytest.approx(1e-3 * float(eigenvalues.max()))
    weight = model[0].weight
    assert weight.grad is not None
    moment = ours.state[weight]["momentum_buffer"].reshape(8, 9, 1)
    direction, gradient = (inverse @ moment).flatten(), weight.grad.flatten()
    expected = float(direction @ gradient / direction.norm() / gradient.norm())
    assert row["cosine_with_sgd"] == pytest.approx(expected)
    assert report["4.weight"] == report["4.bias"]
    assert all(0 < row["damping_share"] <= 1 for row in report.values())
    ours.zero_grad()
    later = ours.metrics()
    assert list(later) == list(report)
    assert all(math.isnan(row.pop("cosine_with_sgd")) for row in later.values())
    assert all(later[name].items() <= row.items() for name, row in report.items())


def test_a_wide_linear_is_cut_and_named() -> None:
    with pytest.warns(UserWarning, match=r"model\.weight has 10,001 columns.*400,080,004 bytes.*linear_blocks="):
        ours = MBF(nn.Linear(10_000, 2, device="meta"), linear_blocks="shared")
    assert "10 blocks of 1024 x 1024" in ours.explain()[0].detail


def test_blocks_that_take_much_memory_are_named() -> None:
    with pytest.warns(UserWarning, match=r"the blocks of model\.weight take 4,202,500,000 bytes.*linear_blocks="):
        MBF(nn.Linear(1024, 1000, device="meta"), linear_blocks="per_output")


def test_mask_zeros_keeps_pruned_weights() -> None:
    model = nn.Linear(4, 3)
    mask = torch.rand(3, 4) < 0.5
    mask[0, 0] = True
    with torch.no_grad():
        model.weight.masked_fill_(mask, 0)
    for kept in (False, True):
        twin = copy.deepcopy(model)
        ours = MBF(twin, mask_zeros=kept)
        for _ in range(2):
            ours.zero_grad()
            twin(torch.randn(8, 4)).square().mean().backward()
            assert twin.weight.grad is not None
            twin.weight.grad.masked_fill_(mask, 0)
            ours.step()
        assert bool((twin.weight[mask] == 0).all()) is kept


# The life of the hooks.


def test_close_removes_the_hooks_for_good() -> None:
    model = network()
    ours = MBF(model)
    assert hooks(model) == 5 + 2
    ours.close()
    assert hooks(model) == 0
