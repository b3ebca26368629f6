"""Every layer type: AdaFisher against a naive float64 implementation that forms the whole curvature."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from fisher_kernels import AdaFisher, AdaFisherW
from tests.layer_cases import (
    FALLBACKS,
    LAYERS,
    NETWORKS,
    Batch,
    Branches,
    Free,
    SharedWeight,
    TiedAutoencoder,
    TiedLanguageModel,
    Twice,
    TwoLengths,
    WithFallback,
    assert_same_moves,
    batch_of,
    convolutions,
    loss_of,
    tokens,
)  # fmt: skip
from tests.naive_adafisher import NaiveAdaFisher

TOLERANCE = 1e-10
"""Of the distance travelled, relative to the longest move of the tensor. Sums of some thousand float64 terms are good
to 1e-14; min-max normalisation subtracts, which costs a factor max / spread, and dividing by a curvature near its
damping of 1e-3 at most another 1e3 of what is left, carried through a few steps. A wrong coefficient shows at 1e-3 or
more."""

pytestmark = [
    pytest.mark.usefixtures("host_backend", "one_thread"),
    pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths"),
]


VARIANTS = ("paper", "release", "relative")
LR = {"paper": 2e-3, "release": 1e-3, "relative": 0.1}


def follow(
    model: nn.Module,
    batch: Batch,
    *,
    steps: int = 4,
    optimizer: type[AdaFisher] = AdaFisher,
    tolerance: float = TOLERANCE,
    params: Callable[[nn.Module], list[dict[str, Any]]] = lambda model: [{"params": list(model.parameters())}],
    **hyperparameters: Any,
) -> tuple[AdaFisher, NaiveAdaFisher]:
    """Train two copies of a model, one with each implementation, and compare what moved after every step."""
    variant = hyperparameters.setdefault("variant", "paper")
    hyperparameters.setdefault("lr", LR[variant])
    model = model.double()
    twin = copy.deepcopy(model)
    ours = optimizer(model, params=params(model), **hyperparameters)
    naive = NaiveAdaFisher(twin, params=params(twin), decoupled=ours.decoupled, **hyperparameters)
    start = {name: p.detach().clone() for name, p in twin.named_parameters()}
    for step in range(steps):
        for net, opt in ((model, ours), (twin, naive)):
            generator = torch.Generator().manual_seed(step)
            opt.zero_grad()
            loss_of(net(*batch(generator)), generator).backward()
            opt.step()
        assert_same_moves(model, twin, start, tolerance)
    assert_same_averages(model, ours, twin, naive, tolerance)
    return ours, naive


def assert_same_averages(
    model: nn.Module, ours: AdaFisher, twin: nn.Module, naive: NaiveAdaFisher, tolerance: float
) -> None:
    """The averages of H and S as they stand in the state of the weight, before any correction."""
    seen: dict[int, int] = {}
    partners = {id(q): p for p, q in zip(model.parameters(), twin.parameters(), strict=True)}
    for site in naive.sites.values():
        orientation = seen[id(site.owner)] = seen.get(id(site.owner), -1) + 1
        state = ours.state[partners[id(site.owner)]]
        for name, average in site.averages.items():
            key = "tied_" * orientation + {"H": "input_factor", "S": "output_factor", "B": "bias_factor"}[name]
            error = float((state[key] - average).abs().max() / average.abs().max().clamp(min=1e-300))
            assert error <= tolerance, f"{site.kind} {key}: off by {error:.1e}"


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("layer", LAYERS)
def test_layer(layer: str, variant: str) -> None:
    build, shape = LAYERS[layer]
    torch.manual_seed(0)
    optimizer, _ = follow(build(), batch_of(*shape), variant=variant, update_interval=1, weight_decay=0.01)
    assert not any(row.fallback for row in optimizer.explain())


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("layer", ["linear", "conv2d-groups", "deconv2d-stride-padding", "batchnorm2d", "layernorm-3d"])
def test_decoupled_decay_and_update_interval(layer: str, variant: str) -> None:
    build, shape = LAYERS[layer]
    torch.manual_seed(0)
    hyperparameters: dict[str, Any] = {
        "update_interval": 3,
        "weight_decay": 0.1,
        "beta": 0.7,
        "gamma": 0.6,
        "maximize": True,
    }
    follow(
        build(),
        batch_of(*shape),
        steps=8,
        optimizer=AdaFisherW,
        variant=variant,
        eps=1e-4,
        damping=0.02,
        **hyperparameters,
    )


@given(case=convolutions(), variant=st.sampled_from(VARIANTS))
def test_convolutions_of_any_geometry(case: tuple[nn.Module, tuple[int, ...]], variant: str) -> None:
    module, shape = case
    follow(module, batch_of(*shape), steps=2, variant=variant, update_interval=1)


# Embeddings.


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("padding_idx", [None, 0, -2])
@pytest.mark.parametrize("shape", [(9,), (3, 5), ()])
def test_embedding(variant: str, padding_idx: int | None, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    model = nn.Embedding(7, 4, padding_idx=padding_idx)
    batch = tokens(*shape) if shape else (lambda generator: (torch.tensor(3),))
    follow(model, batch, variant=variant, update_interval=1, weight_decay=0.01)


def test_embedding_of_padding_only_changes_no_other_row() -> None:
    model = nn.Embedding(4, 3, padding_idx=1).double()
    before = model.weight.detach().clone()
    optimizer = AdaFisher(model)
    model(torch.ones(5, dtype=torch.int64)).sum().backward()
    optimizer.step()
    torch.testing.assert_close(model.weight.detach(), before, rtol=0, atol=0)


def test_sparse_embedding_is_refused() -> None:
    model = nn.Sequential(nn.Embedding(5, 3, sparse=True), nn.Linear(3, 2))
    with pytest.raises(ValueError, match=r"module '0' is an Embedding with sparse=True"):
        AdaFisher(model)
    AdaFisher(model, params=[{"params": model[1].parameters()}])


# Weights that several uses share.


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(
    ("build", "shape"),
    [
        (lambda: Twice(nn.Linear(4, 3)), (5, 4)),
        (lambda: Twice(nn.Conv2d(2, 3, 3, padding=1)), (3, 2, 4, 5)),
        (lambda: Twice(nn.ConvTranspose2d(2, 3, 2, stride=2)), (3, 2, 3, 2)),
        (lambda: Twice(nn.BatchNorm1d(4)), (5, 4)),
        (lambda: Twice(nn.LayerNorm(4)), (5, 3, 4)),
    ],
    ids=["linear", "conv", "deconv", "batchnorm", "layernorm"],
)
def test_module_called_several_times(build: Callable[[], nn.Module], shape: tuple[int, ...], variant: str) -> None:
    torch.manual_seed(0)
    follow(build(), batch_of(*shape), variant=variant, update_interval=1)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("biases", [(False, False), (True, True), (True, False), (False, True)])
def test_linears_that_share_a_weight(biases: tuple[bool, bool], variant: str) -> None:
    torch.manual_seed(0)
    follow(SharedWeight(*biases), batch_of(5, 4), variant=variant, update_interval=1)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(
    ("build", "batch"),
    [
        (lambda: TiedLanguageModel(bias=False), tokens(3, 5)),
        (lambda: TiedLanguageModel(bias=True, padding_idx=0), tokens(3, 5)),
        (TiedAutoencoder, batch_of(5, 6)),
    ],
    ids=["language-model", "language-model-bias-padding", "autoencoder"],
)
def test_weight_shared_in_both_orientations(build: Callable[[], nn.Module], batch: Batch, variant: str) -> None:
    torch.manual_seed(0)
    optimizer, _ = follow(build(), batch, variant=variant, update_interval=2, steps=5, weight_decay=0.01)
    rules = {row.name: row.rule for row in optimizer.explain()}
    assert any(" + " in rule for rule in rules.values())


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("build", [lambda: nn.LayerNorm(4), lambda: nn.RMSNorm(4), lambda: nn.Linear(4, 3)])
def test_sequences_of_several_lengths(build: Callable[[], nn.Module], variant: str) -> None:
    torch.manual_seed(0)
    follow(TwoLengths(build()), batch_of(3, 5, 4), variant=variant, update_interval=1)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("layer", ["linear", "conv2d-padding", "deconv2d-stride-padding", "layernorm", "embedding"])
def test_batch_without_rows_leaves_the_factors_alone(layer: str, variant: str) -> None:
    """As an expert sees it that no token was sent to; its gradient is 0, and the momentum goes on."""
    build, shape = (lambda: nn.Embedding(7, 4), ()) if layer == "embedding" else LAYERS[layer]

    def batch(generator: torch.Generator) -> tuple[Tensor]:
        empty = generator.initial_seed() == 2  # the seed is the number of the step
        if layer == "embedding":
            return tokens(0 if empty else 5)(generator)
        return batch_of(0 if empty else shape[0], *shape[1:])(generator)

    torch.manual_seed(0)
    follow(build(), batch, steps=5, variant=variant, update_interval=1)


# Networks.


@pytest.mark.parametrize("optimizer", [AdaFisher, AdaFisherW])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("network", NETWORKS)
def test_network(network: str, variant: str, optimizer: type[AdaFisher]) -> None:
    build, batch = NETWORKS[network]
    torch.manual_seed(0)
    # Steps of one layer move what the next one sees, so rounding grows from step to step as it does in training.
    follow(
        build(),
        batch,
        lr=0.1 * LR[variant],
        steps=6,
        optimizer=optimizer,
        variant=variant,
        update_interval=2,
        weight_decay=0.05,
        tolerance=1e-8,
    )


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("interval", [1, 2])
def test_layer_unused_in_some_steps(variant: str, interval: int) -> None:
    torch.manual_seed(0)
    follow(Branches(), batch_of(6, 4), steps=8, variant=variant, update_interval=interval, weight_decay=0.01)


def test_layer_first_used_between_refreshes_is_served_at_once() -> None:
    """It would have curvature 1 until a refresh happens to meet a use, which need not be for long."""
    model = Branches().double()
    optimizer, _ = follow(model, batch_of(6, 4), steps=4, update_interval=4)
    metrics = optimizer.metrics()
    for branch in ("left", "right"):
        assert metrics[f"{branch}.weight"]["largest_step"] > LR["paper"]
        assert optimizer.state[model.get_parameter(f"{branch}.weight")]["factor_weight"] > 0


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("frozen", ["weight", "bias"])
@pytest.mark.parametrize("layer", ["linear", "conv2d-groups", "deconv2d", "batchnorm2d", "layernorm-3d"])
def test_half_frozen_layer(layer: str, frozen: str, variant: str) -> None:
    build, shape = LAYERS[layer]
    torch.manual_seed(0)
    model = build()
    model.get_parameter(frozen).requires_grad_(False)
    follow(model, batch_of(*shape), variant=variant, update_interval=1)


@pytest.mark.parametrize("held", ["weight", "bias"])
def test_half_held_layer(held: str) -> None:
    torch.manual_seed(0)
    follow(nn.Linear(5, 4), batch_of(7, 5), params=lambda model: [{"params": [model.get_parameter(held)]}])


@pytest.mark.parametrize("variant", VARIANTS)
def test_flat_factors_become_ones(variant: str) -> None:
    """Equal entries have no shape to normalise; minmax alone would make them 0 and the step lr / damping."""
    batch: Batch = lambda generator: (torch.ones(6, 5, dtype=torch.float64),)  # noqa: E731
    follow(nn.Linear(5, 3), batch, variant=variant, update_interval=1)
    follow(nn.Linear(5, 1, bias=False), batch, variant=variant, update_interval=1)


def test_no_output_derivative_at_all_is_relative_curvature_1() -> None:
    """mean(S H) = 0: the ratio is taken as 1."""
    model = nn.Linear(3, 2).double()
    optimizer = AdaFisher(model, lr=0.1, variant="relative", damping=0.25)
    (model(torch.ones(4, 3, dtype=torch.float64)) * 0.0).sum().backward()
    optimizer.step()
    assert optimizer.metrics()["weight"]["largest_step"] == pytest.approx(0.1 / 1.25, rel=1e-12)


# Fallbacks.


@pytest.mark.parametrize("given_curvature", [None, 0.3])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("fallback", FALLBACKS)
def test_fallback(fallback: str, variant: str, given_curvature: float | None) -> None:
    build, call, names = FALLBACKS[fallback]
    torch.manual_seed(0)
    model = WithFallback(build(), call)
    with pytest.warns(UserWarning, match="have no layer rule and take a fallback"):
        # Slowly: a Bilinear of this size, squared, diverges in three steps.
        optimizer, _ = follow(
            model,
            batch_of(6, 4),
            variant=variant,
            update_interval=1,
            fallback_curvature=given_curvature,
            lr=0.1 * LR[variant],
        )
    rows = {row.name: row for row in optimizer.explain()}
    assert {name for name, row in rows.items() if row.fallback} == {f"fallback.{name}" for name in names}
    wanted = {None: "curvature 1" if variant == "release" else "median", 0.3: "curvature 0.3"}[given_curvature]
    assert all(wanted in rows[f"fallback.{name}"].detail for name in names)


@pytest.mark.parametrize("variant", VARIANTS)
def test_bias_of_a_parametrized_weight_keeps_its_rule(variant: str) -> None:
    torch.manual_seed(0)
    model = WithFallback(weight_norm(nn.Linear(6, 6)), lambda m, x: m(x))
    with pytest.warns(UserWarning, match="fallback"):
        optimizer, _ = follow(model, batch_of(6, 4), variant=variant, update_interval=1)
    assert {row.name: row.rule for row in optimizer.explain()}["fallback.bias"] == "linear"


def test_a_norm_without_a_scale_takes_the_fallback() -> None:
    norm = nn.BatchNorm1d(4)
    norm.register_parameter("weight", None)
    model = nn.Sequential(nn.Linear(4, 4), norm)
    with pytest.warns(UserWarning, match=r"fallback \(1\.bias\)"):
        optimizer = AdaFisher(model)
    model(torch.randn(5, 4)).square().mean().backward()
    optimizer.step()


def test_fallbacks_alone_have_curvature_1() -> None:
    """There is no layer to take a median of."""
    torch.manual_seed(0)
    with pytest.warns(UserWarning, match="100% of the trained parameters"):
        optimizer, _ = follow(Free(), batch_of(4, 6))
    assert optimizer.metrics()["scale"]["largest_step"] == LR["paper"]


def test_few_fallbacks_do_not_warn() -> None:
    model = nn.Sequential(nn.Linear(40, 20), nn.PReLU())
    AdaFisher(model)


# Parameter groups.


@pytest.mark.parametrize("optimizer", [AdaFisher, AdaFisherW])
def test_settings_of_a_layer_come_from_the_group_of_its_weight(optimizer: type[AdaFisher]) -> None:
    """And lr, decay and beta from each parameter's own."""

    def groups(model: nn.Module) -> list[dict[str, Any]]:
        weights = {"params": [model.get_parameter("0.weight")], "variant": "relative", "gamma": 0.5, "lr": 0.05}
        biases = [model.get_parameter(f"{i}.bias") for i in (0, 2)]
        others = {"params": [model.get_parameter("2.weight")], "update_interval": 2, "eps": 1e-3, "damping": 0.05}
        return [weights, {"params": biases, "lr": 1e-3, "weight_decay": 0.3, "beta": 0.5}, others]

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))
    follow(model, batch_of(6, 5), steps=6, optimizer=optimizer, params=groups, weight_decay=0.1)
