"""Every layer type: MBF against a naive float64 implementation that forms the gradient of every sample."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn.utils.parametrizations import weight_norm

from fisher_kernels import MBF
from fisher_kernels.curvature import block_rules
from tests.layer_cases import (
    FALLBACKS,
    LAYERS,
    NETWORKS,
    Attention,
    Batch,
    Branches,
    Conv1D,
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
)
from tests.naive_mbf import NaiveMBF

TOLERANCE = 1e-9
"""Of the distance travelled, relative to the longest move of the tensor, and of blocks, relative to the largest entry.
Sums of some thousand float64 terms are good to 1e-14. An inverse multiplies that by the condition number of a damped
block, 1e4 at most here (entries up to some hundreds over a damping of 0.05), and steps carry it on. A wrong
coefficient shows at 1e-2 or more."""

pytestmark = [
    pytest.mark.usefixtures("host_backend", "one_thread"),
    pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths"),
]

SETTINGS: dict[str, Any] = {
    "lr": 0.05,
    "damping": 0.05,
    "beta2": 0.7,
    "momentum": 0.6,
    "inverse_interval": 1,
    "refresh": "constant",
}
"""What the tests use where they do not say otherwise: every coefficient has an effect within a few steps."""


def everything(model: nn.Module) -> list[dict[str, Any]]:
    return [{"params": list(model.parameters())}]


def split(batch: tuple[Any, ...], parts: int) -> list[tuple[Any, ...]]:
    return list(zip(*(x.chunk(parts) for x in batch), strict=True))


def follow(
    model: nn.Module,
    batch: Batch,
    *,
    steps: int = 3,
    parts: int = 1,
    tolerance: float = TOLERANCE,
    params: Callable[[nn.Module], list[dict[str, Any]]] = everything,
    before: Callable[[nn.Module, int], None] = lambda model, step: None,
    **hyperparameters: Any,
) -> tuple[MBF, NaiveMBF]:
    """Train two copies of a model, one with each implementation, and compare moves and blocks after every step."""
    hyperparameters = {**SETTINGS, **hyperparameters}
    model = model.double()
    twin = copy.deepcopy(model)
    ours = MBF(model, params=params(model), **hyperparameters)
    hyperparameters.pop("inverse_storage", None)
    naive = NaiveMBF(twin, params=params(twin), **hyperparameters)
    start = {name: p.detach().clone() for name, p in twin.named_parameters()}
    for step in range(steps):
        for net, opt in ((model, ours), (twin, naive)):
            generator = torch.Generator().manual_seed(step)
            before(net, step)
            opt.zero_grad()
            for part in split(batch(generator), parts) if parts > 1 else [batch(generator)]:
                loss_of(net(*part), generator).backward()
                if opt is naive:
                    naive.backward_done()
            opt.step()
        assert_same_moves(model, twin, start, tolerance)
        assert_same_blocks(model, ours, twin, naive, tolerance)
    return ours, naive


def assert_same_blocks(model: nn.Module, ours: MBF, twin: nn.Module, naive: NaiveMBF, tolerance: float) -> None:
    """The averages as they stand in the state of the parameter that owns them."""
    partners = {id(q): p for p, q in zip(model.parameters(), twin.parameters(), strict=True)}
    names = {id(q): name for name, q in twin.named_parameters()}
    for block in naive.blocks:
        state, name = ours.state[partners[id(block.owner)]], f"{block.role} blocks of {names[id(block.owner)]}"
        if block.average is None:
            assert not state.get("fisher_updates", 0), name
            continue
        assert state["fisher_blocks"].shape == block.average.shape, name
        error = float((state["fisher_blocks"] - block.average).abs().max())
        largest = float(block.average.abs().max())
        assert error <= tolerance * max(largest, 1e-300), f"{name}: off by {error:.1e} beside {largest:.1e}"


def assert_no_fallback(optimizer: MBF) -> None:
    assert not any(row.fallback for row in optimizer.explain())


# Every layer.


@pytest.mark.parametrize("sequence", ["expand", "reduce"])
@pytest.mark.parametrize("layer", LAYERS)
def test_layer(layer: str, sequence: str) -> None:
    build, shape = LAYERS[layer]
    torch.manual_seed(0)
    optimizer, _ = follow(build(), batch_of(*shape), sequence=sequence, weight_decay=0.01)
    assert_no_fallback(optimizer)


@pytest.mark.parametrize("loss_reduction", ["mean", "sum"])
@pytest.mark.parametrize("linear_blocks", ["shared", "per_output", 1, 2, 5, 9])
@pytest.mark.parametrize("sequence", ["expand", "reduce"])
@pytest.mark.parametrize(
    "layer", ["linear", "linear-3d", "linear-1d", "linear-one-input-no-bias", "linear-one-output", "hf-conv1d-3d"]
)
def test_blocks_of_linear_layers(layer: str, sequence: str, linear_blocks: str | int, loss_reduction: str) -> None:
    build, shape = LAYERS[layer]
    torch.manual_seed(0)
    follow(
        build(),
        batch_of(*shape),
        steps=2,
        sequence=sequence,
        linear_blocks=linear_blocks,
        loss_reduction=loss_reduction,
    )


@pytest.mark.filterwarnings("ignore:MBF. steps of .* were longer than the weights")  # without a trust region
@pytest.mark.parametrize("loss_reduction", ["mean", "sum"])
@pytest.mark.parametrize("kl_clip", [None, 1e-3])
@pytest.mark.parametrize("decoupled", [True, False])
@pytest.mark.parametrize(
    "layer", ["linear-3d", "hf-conv1d", "conv2d-groups", "deconv2d-stride-padding", "batchnorm2d", "layernorm-3d"]
)
def test_decay_trust_region_and_intervals(
    layer: str, decoupled: bool, kl_clip: float | None, loss_reduction: str
) -> None:
    build, shape = LAYERS[layer]
    torch.manual_seed(0)
    _, naive = follow(
        build(),
        batch_of(*shape),
        steps=7,
        decoupled=decoupled,
        kl_clip=kl_clip,
        loss_reduction=loss_reduction,
        weight_decay=0.1,
        maximize=not decoupled,
        update_interval=2,
        inverse_interval=3,
        lr=0.02,
    )
    assert (naive.groups[0]["scale"] < 1) == (kl_clip is not None)


@given(case=convolutions(), sequence=st.sampled_from(["expand", "reduce"]))
def test_convolutions_of_any_geometry(case: tuple[nn.Module, tuple[int, ...]], sequence: str) -> None:
    module, shape = case
    follow(module, batch_of(*shape), steps=2, sequence=sequence)


# Embeddings.


@pytest.mark.parametrize("sequence", ["expand", "reduce"])
@pytest.mark.parametrize("padding_idx", [None, 0, -2])
@pytest.mark.parametrize("shape", [(9,), (3, 5), (2, 3, 4), ()])
def test_embedding(sequence: str, padding_idx: int | None, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    model = nn.Embedding(7, 4, padding_idx=padding_idx)
    batch = tokens(*shape) if shape else (lambda generator: (torch.tensor(3),))
    optimizer, _ = follow(model, batch, sequence=sequence, weight_decay=0.01)
    assert_no_fallback(optimizer)
    if padding_idx is not None:
        assert not optimizer.state[model.weight]["fisher_blocks"].view(7, 4)[padding_idx].any()


# Weights that several uses share.


class Pair(nn.Module):
    """Two layers with one weight, one after the other."""

    def __init__(self, first: nn.Module, second: nn.Module) -> None:
        super().__init__()
        self.first, self.second = first, second
        second.weight = first.weight

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.second(torch.tanh(self.first(x)))
        return out


class TiedConv1D(Conv1D):
    """Without a bias."""

    def __init__(self, nf: int, nx: int) -> None:
        super().__init__(nf, nx)
        self.bias = None  # type: ignore[assignment]

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight


TiedConv1D.__name__ = "Conv1D"


@pytest.mark.parametrize("sequence", ["expand", "reduce"])
@pytest.mark.parametrize(
    ("build", "shape"),
    [
        (lambda: Twice(nn.Linear(4, 3)), (5, 4)),
        (lambda: Twice(nn.Linear(4, 3)), (5, 3, 4)),
        (lambda: Twice(nn.Conv2d(2, 3, 3, padding=1)), (3, 2, 4, 5)),
        (lambda: Twice(nn.Conv2d(2, 3, 3, padding=1)), (2, 2, 4, 5)),
        (lambda: Twice(nn.ConvTranspose2d(2, 3, 2, stride=2)), (2, 2, 3, 2)),
        (lambda: Twice(nn.BatchNorm1d(4)), (5, 4)),
        (lambda: Twice(nn.BatchNorm1d(4)), (2, 4)),
        (lambda: Twice(nn.LayerNorm(4)), (5, 3, 4)),
        (lambda: Twice(nn.LayerNorm(4)), (2, 3, 4)),
    ],
)
def test_module_called_several_times(build: Callable[[], nn.Module], shape: tuple[int, ...], sequence: str) -> None:
    """On as many samples, where its gradients add up under "reduce", or on others."""
    torch.manual_seed(0)
    follow(build(), batch_of(*shape), sequence=sequence)


class InTurn(nn.Module):
    """Calls one layer on all samples, on other ones, and on all of them again."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        first, other = self.layer(x).square(), self.layer(x[:2, :1])
        out: Tensor = first - other.sum(0) + self.layer(x.flip(1))
        return out


@pytest.mark.parametrize("sequence", ["expand", "reduce"])
def test_calls_on_different_samples_in_turn(sequence: str) -> None:
    torch.manual_seed(0)
    follow(InTurn(nn.Embedding(5, 3, padding_idx=1)), tokens(4, 3, vocabulary=5), sequence=sequence)
    follow(InTurn(nn.Linear(4, 3)), batch_of(4, 3, 4), sequence=sequence)
    follow(InTurn(nn.LayerNorm(4)), batch_of(4, 3, 4), sequence=sequence)


@pytest.mark.parametrize("linear_blocks", ["shared", "per_output", 2])
@pytest.mark.parametrize("sequence", ["expand", "reduce"])
@pytest.mark.parametrize("biases", [(False, False), (True, True), (True, False), (False, True)])
def test_linears_that_share_a_weight(biases: tuple[bool, bool], sequence: str, linear_blocks: str | int) -> None:
    torch.manual_seed(0)
    follow(SharedWeight(*biases), batch_of(5, 4), sequence=sequence, linear_blocks=linear_blocks)
    pair = Pair(nn.Linear(4, 4, bias=biases[0]), nn.Linear(4, 4, bias=biases[1]))
    follow(pair, batch_of(5, 3, 4), sequence=sequence, linear_blocks=linear_blocks)


PAIRS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "convs": (lambda: Pair(nn.Conv2d(2, 2, 3, padding=1), nn.Conv2d(2, 2, 3, padding=1)), (3, 2, 4, 5)),
    "convs-first-bias": (lambda: Pair(nn.Conv1d(2, 2, 3), nn.Conv1d(2, 2, 3, bias=False)), (3, 2, 7)),
    "convs-second-bias": (lambda: Pair(nn.Conv1d(2, 2, 3, bias=False), nn.Conv1d(2, 2, 3)), (3, 2, 7)),
    "deconvs-first-bias": (
        lambda: Pair(nn.ConvTranspose1d(2, 2, 3), nn.ConvTranspose1d(2, 2, 3, bias=False)),
        (3, 2, 7),
    ),
    "conv-deconv": (lambda: Pair(nn.Conv2d(2, 3, 3), nn.ConvTranspose2d(3, 2, 3)), (3, 2, 5, 6)),
    "conv-deconv-no-bias": (lambda: Pair(nn.Conv1d(2, 3, 3, bias=False), nn.ConvTranspose1d(3, 2, 3)), (3, 2, 7)),
    "norms": (lambda: Pair(nn.LayerNorm(4), nn.LayerNorm(4)), (3, 5, 4)),
    "norms-first-bias": (lambda: Pair(nn.LayerNorm(4), nn.LayerNorm(4, bias=False)), (3, 5, 4)),
    "norms-second-bias": (lambda: Pair(nn.RMSNorm(4), nn.LayerNorm(4)), (3, 5, 4)),
    "hf-conv1ds": (lambda: Pair(Conv1D(4, 4), Conv1D(4, 4)), (3, 5, 4)),
    "hf-conv1d-no-bias": (lambda: TiedConv1D(3, 5), (4, 5)),
    "hf-conv1d-no-bias-square": (lambda: TiedConv1D(4, 4), (3, 4)),
    "hf-conv1d-linear": (lambda: Pair(Conv1D(3, 5), nn.Linear(3, 5)), (3, 5)),
    "linear-no-bias-hf-conv1d": (lambda: Pair(nn.Linear(5, 3, bias=False), Conv1D(5, 3)), (3, 4, 5)),
    "linear-hf-conv1d-no-bias": (lambda: Pair(nn.Linear(5, 3), TiedConv1D(5, 3)), (3, 4, 5)),
}


@pytest.mark.filterwarnings("ignore:MBF.* of the trained parameters have no layer rule")
@pytest.mark.parametrize("sequence", ["expand", "reduce"])
@pytest.mark.parametrize("pair", PAIRS)
def test_layers_that_share_a_weight(pair: str, sequence: str) -> None:
    """A use without a bias has no part in the blocks of another's."""
    build, shape = PAIRS[pair]
    torch.manual_seed(0)
    follow(build(), batch_of(*shape), sequence=sequence)


@pytest.mark.filterwarnings("ignore:MBF.* of the trained parameters have no layer rule")
@pytest.mark.parametrize("linear_blocks", ["shared", "per_output", 3])
@pytest.mark.parametrize("sequence", ["expand", "reduce"])
@pytest.mark.parametrize(
    ("build", "batch"),
    [
        (lambda: TiedLanguageModel(bias=False), tokens(3, 5)),
        (lambda: TiedLanguageModel(bias=True, padding_idx=0), tokens(3, 5)),
        (lambda: TiedLanguageModel(bias=True), tokens(6)),
        (TiedAutoencoder, batch_of(5, 6)),
        (TiedAutoencoder, batch_of(3, 4, 6)),
    ],
    ids=["language-model", "language-model-bias-padding", "language-model-rows", "autoencoder", "autoencoder-3d"],
)
def test_weight_shared_in_both_orientations(
    build: Callable[[], nn.Module], batch: Batch, sequence: str, linear_blocks: str | int
) -> None:
    torch.manual_seed(0)
    follow(build(), batch, steps=4, sequence=sequence, linear_blocks=linear_blocks, weight_decay=0.01)


@pytest.mark.parametrize("sequence", ["expand", "reduce"])
@pytest.mark.parametrize("build", [lambda: nn.LayerNorm(4), lambda: nn.RMSNorm(4), lambda: nn.Linear(4, 3)])
def test_sequences_of_several_lengths(build: Callable[[], nn.Module], sequence: str) -> None:
    torch.manual_seed(0)
    follow(TwoLengths(build()), batch_of(3, 5, 4), sequence=sequence)


@pytest.mark.parametrize("sequence", ["expand", "reduce"])
@pytest.mark.parametrize("layer", ["linear", "conv2d-padding", "deconv2d-stride-padding", "layernorm", "embedding"])
def test_batch_without_rows_leaves_the_blocks_alone(layer: str, sequence: str) -> None:
    """As an expert sees it that no token was sent to; its gradient is 0, and the momentum goes on."""
    build, shape = (lambda: nn.Embedding(7, 4), ()) if layer == "embedding" else LAYERS[layer]

    def batch(generator: torch.Generator) -> tuple[Tensor]:
        empty = generator.initial_seed() == 2  # the seed is the number of the step
        if layer == "embedding":
            return tokens(0 if empty else 5)(generator)
        return batch_of(0 if empty else shape[0], *shape[1:])(generator)

    torch.manual_seed(0)
    follow(build(), batch, steps=4, sequence=sequence)


# What is trained, and in which group.

HALVES = ["linear", "linear-3d", "hf-conv1d", "conv2d-groups", "deconv2d", "batchnorm2d", "layernorm-3d"]
HALVES_AND_BLOCKS = [
    (layer, blocks)
    for layer in HALVES
    for blocks in (("shared", "per_output", 2, 5) if layer.startswith(("linear", "hf")) else ("shared",))
]


@pytest.mark.parametrize("storage", ["full", "packed"])
@pytest.mark.parametrize("frozen", ["weight", "bias"])
@pytest.mark.parametrize(("layer", "linear_blocks"), HALVES_AND_BLOCKS)
def test_half_frozen_layer(layer: str, frozen: str, storage: str, linear_blocks: str | int) -> None:
    build, shape = LAYERS[layer]
    torch.manual_seed(0)
    model = build()
    model.get_parameter(frozen).requires_grad_(False)
    follow(model, batch_of(*shape), inverse_storage=storage, linear_blocks=linear_blocks)


@pytest.mark.parametrize(("layer", "linear_blocks"), HALVES_AND_BLOCKS)
def test_bias_frozen_for_some_steps(layer: str, linear_blocks: str | int) -> None:
    def freeze(model: nn.Module, step: int) -> None:
        model.get_parameter("bias").requires_grad_(step not in (1, 2))

    build, shape = LAYERS[layer]
    torch.manual_seed(0)
    follow(build(), batch_of(*shape), steps=5, before=freeze, linear_blocks=linear_blocks)


@pytest.mark.parametrize("held", ["weight", "bias"])
@pytest.mark.parametrize("layer", HALVES)
def test_half_held_layer(layer: str, held: str) -> None:
    build, shape = LAYERS[layer]
    torch.manual_seed(0)
    follow(build(), batch_of(*shape), params=lambda model: [{"params": [model.get_parameter(held)]}])


@pytest.mark.parametrize(("layer", "linear_blocks"), HALVES_AND_BLOCKS)
def test_weight_and_bias_in_different_groups(layer: str, linear_blocks: str | int) -> None:
    def groups(model: nn.Module) -> list[dict[str, Any]]:
        bias = {"params": [model.get_parameter("bias")], "lr": 0.1, "momentum": 0.3, "kl_clip": 1e-4}
        bias |= {"damping": 0.2, "beta2": 0.2, "inverse_interval": 2}  # these for a convolution's only
        return [bias, {"params": [model.get_parameter("weight")], "kl_clip": 1e-5}]

    build, shape = LAYERS[layer]
    torch.manual_seed(0)
    _, naive = follow(build(), batch_of(*shape), params=groups, linear_blocks=linear_blocks)
    first, second = (group["scale"] for group in naive.groups)
    assert max(first, second) < 1
    assert first != second


def test_a_group_has_settings_of_its_own() -> None:
    def groups(model: nn.Module) -> list[dict[str, Any]]:
        first, second, last = (model.get_submodule(name).parameters() for name in ("0", "2", "4"))
        return [
            {"params": first, "beta2": 0.3, "update_interval": 2, "linear_blocks": "per_output", "maximize": True},
            {"params": second, "inverse_interval": 3, "loss_reduction": "sum", "linear_blocks": 3, "weight_decay": 0.1},
            {"params": last, "damping": 0.3, "sequence": "reduce", "kl_clip": None, "lr": 1e-3},
        ]

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3))
    follow(model, batch_of(4, 3, 5), steps=6, params=groups)


def test_frozen_layers_cost_nothing() -> None:
    model = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.Linear(4, 3)).double()
    for p in model[:2].parameters():
        p.requires_grad_(False)
    optimizer = MBF(model, **SETTINGS)
    model(torch.randn(5, 6, dtype=torch.float64)).sum().backward()
    optimizer.step()
    optimizer.metrics()
    assert not any(optimizer.state[p] for p in model[:2].parameters())


# Inputs that do not stay as they were.


@pytest.mark.parametrize("sequence", ["expand", "reduce"])
@pytest.mark.parametrize(("layer", "autocast"), [("linear", True), ("conv2d", True), ("conv2d-circular", False)])
def test_input_written_to_before_the_backward_is_refused(
    layer: str, autocast: bool, sequence: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Autograd notices by itself, unless it keeps a copy of the input, cast or padded."""
    monkeypatch.setenv("FISHER_KERNELS_RAISE", "1")
    build, shape = LAYERS[layer]
    model = build()
    optimizer = MBF(model, sequence=sequence)
    x = torch.randn(*shape)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        out = model(x)
    x.mul_(2)
    with pytest.raises(RuntimeError, match="the input of module '' was modified in place before its backward"):
        out.float().sum().backward()
    assert optimizer.statistics.take() == []


def test_input_written_to_before_the_step_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where all uses of a sample are waited for, as between micro-batches that are read into one place."""
    monkeypatch.setenv("FISHER_KERNELS_RAISE", "1")
    model = nn.Sequential(nn.Linear(5, 4))
    optimizer = MBF(model, sequence="reduce")
    before = copy.deepcopy(model)
    x = torch.randn(3, 5)
    model(x).sum().backward()
    x.mul_(2)
    with pytest.raises(RuntimeError, match="the input of module '0' was modified in place before the step"):
        optimizer.step()
    for p, q in zip(model.parameters(), before.parameters(), strict=True):
        assert torch.equal(p, q)
    monkeypatch.delenv("FISHER_KERNELS_RAISE")
    model(x).sum().backward()
    x.mul_(2)
    with pytest.warns(UserWarning, match=r"take a fallback: 0 \(its statistics raise RuntimeError: the input"):
        optimizer.step()
    assert all(row.fallback for row in optimizer.explain())
    optimizer = MBF(model)
    model(x).sum().backward()
    x.mul_(2)
    optimizer.step()


# Networks.


@pytest.mark.parametrize("sequence", ["expand", "reduce"])
@pytest.mark.parametrize("network", NETWORKS)
def test_network(network: str, sequence: str) -> None:
    build, batch = NETWORKS[network]
    torch.manual_seed(0)
    # Steps of one layer move what the next one sees, so rounding grows from step to step as it does in training.
    follow(
        build(),
        batch,
        steps=5,
        sequence=sequence,
        update_interval=2,
        inverse_interval=2,
        weight_decay=0.05,
        tolerance=1e-8,
    )


@pytest.mark.parametrize("intervals", [(3, 6), (4, 2)])
def test_ramp(intervals: tuple[int, int]) -> None:
    update, inverse = intervals
    build, batch = NETWORKS[next(iter(NETWORKS))]
    torch.manual_seed(0)
    settings = {"refresh": "ramp", "ramp": 6, "update_interval": update, "inverse_interval": inverse}
    follow(build(), batch, steps=12, tolerance=1e-8, **settings)


@pytest.mark.parametrize("kl_along", ["momentum", "gradient"])
@pytest.mark.parametrize("floor", [1e-3, 1e4])
def test_bounds_over_groups(kl_along: str, floor: float) -> None:
    """One trust region over groups of other rates and decays, and a cap for each layer of them."""

    def groups(model: nn.Module) -> list[dict[str, Any]]:
        biases = [p for name, p in model.named_parameters() if name.endswith("bias")]
        weights = [p for name, p in model.named_parameters() if not name.endswith("bias")]
        return [{"params": weights, "weight_decay": 0.1}, {"params": biases, "lr": 0.02}]

    build, batch = NETWORKS[next(iter(NETWORKS))]
    torch.manual_seed(0)
    settings = {"kl_clip": 0.1, "kl_along": kl_along, "max_relative_step": 1e-3, "floor": floor}
    ours, _ = follow(build(), batch, steps=4, params=groups, tolerance=1e-8, **settings)
    shares = {row["capped_share"] for row in ours.metrics().values()}
    assert (max(shares) > 0) == (floor < 1)


@pytest.mark.parametrize(("update_interval", "inverse_interval"), [(1, 1), (2, 1), (1, 3), (2, 4)])
def test_layer_unused_in_some_steps(update_interval: int, inverse_interval: int) -> None:
    torch.manual_seed(0)
    intervals = {"update_interval": update_interval, "inverse_interval": inverse_interval}
    follow(Branches(), batch_of(6, 4), steps=8, weight_decay=0.01, **intervals)


@pytest.mark.filterwarnings("ignore:MBF.* of the trained parameters have no layer rule")
@pytest.mark.parametrize("loss_reduction", ["mean", "sum"])
@pytest.mark.parametrize("fallback", FALLBACKS)
def test_fallback(fallback: str, loss_reduction: str) -> None:
    build, call, names = FALLBACKS[fallback]
    torch.manual_seed(0)
    model = WithFallback(build(), call)
    optimizer, _ = follow(model, batch_of(6, 4), loss_reduction=loss_reduction, update_interval=2)
    rows = {row.name: row for row in optimizer.explain()}
    assert {name for name, row in rows.items() if row.fallback} == {f"fallback.{name}" for name in names}


@pytest.mark.filterwarnings("ignore:MBF.* of the trained parameters have no layer rule")
def test_fallback_with_an_interval_of_its_own() -> None:
    def groups(model: nn.Module) -> list[dict[str, Any]]:
        fallback = list(model.get_submodule("fallback").parameters())
        others = [p for p in model.parameters() if not any(p is q for q in fallback)]
        return [{"params": others}, {"params": fallback, "update_interval": 2}]

    build, call, _ = FALLBACKS["free-parameter"]
    torch.manual_seed(0)
    follow(WithFallback(build(), call), batch_of(6, 4), params=groups)


@pytest.mark.filterwarnings("ignore:MBF.* of the trained parameters have no layer rule")
def test_parametrized_weight_and_its_bias() -> None:
    torch.manual_seed(0)
    follow(WithFallback(weight_norm(nn.Linear(6, 6)), lambda m, x: m(x)), batch_of(6, 4))


# Batches in parts.


@pytest.mark.parametrize("sequence", ["expand", "reduce"])
@pytest.mark.parametrize(
    "layer", ["linear-3d", "hf-conv1d-3d", "conv2d-groups", "deconv2d-stride-padding", "layernorm-3d", "groupnorm"]
)
def test_accumulation(layer: str, sequence: str) -> None:
    """Blocks of micro-batches are those of one batch of all their samples, whose mean has the derivatives they have."""
    build, shape = LAYERS[layer]
    torch.manual_seed(0)
    model = build().double()
    (x,) = batch_of(6, *shape[1:])(torch.Generator().manual_seed(0))
    states = []
    for parts in (1, 2, 3):
        net = copy.deepcopy(model)
        optimizer = MBF(net, **SETTINGS, sequence=sequence)
        for part in x.chunk(parts):
            (net(part).sin().flatten(1).sum(1).mean() / parts).backward()
        optimizer.step()
        states.append([value for p in net.parameters() for value in (*optimizer.state[p].values(), p.detach())])
    for other in states[1:]:
        for ours, wanted in zip(other, states[0], strict=True):
            torch.testing.assert_close(ours, wanted, rtol=TOLERANCE, atol=TOLERANCE * float(wanted.abs().max()))


@pytest.mark.parametrize("sequence", ["expand", "reduce"])
def test_accumulation_against_the_naive(sequence: str) -> None:
    torch.manual_seed(0)
    follow(Twice(nn.Linear(4, 3)), batch_of(6, 3, 4), parts=2, sequence=sequence)
    follow(nn.Conv1d(4, 3, 2), batch_of(6, 4, 5), parts=3, sequence=sequence)


@pytest.mark.parametrize("layer", ["linear-3d", "conv2d-groups", "deconv2d", "batchnorm2d", "layernorm-two-dims"])
@pytest.mark.parametrize("linear_blocks", ["per_output", 4])
def test_samples_in_pieces(monkeypatch: pytest.MonkeyPatch, layer: str, linear_blocks: str | int) -> None:
    """As many as memory is set aside for, and blocks so large that they go to matrix products."""
    monkeypatch.setattr(block_rules, "CHUNK", 50)
    monkeypatch.setattr(block_rules, "PIECE", 30)
    monkeypatch.setattr(block_rules, "SMALL", 2)
    build, shape = LAYERS[layer]
    torch.manual_seed(0)
    follow(build(), batch_of(5, *shape[1:]), sequence="reduce", linear_blocks=linear_blocks)


# How inverses are stored.


@pytest.mark.parametrize("linear_blocks", ["shared", "per_output", 2])
def test_packed_inverses_step_as_full_ones(linear_blocks: str | int) -> None:
    """They are the same numbers; the kernels may add them in another order."""
    build, batch = NETWORKS["convolutional"]
    torch.manual_seed(0)
    follow(build(), batch, inverse_storage="packed", linear_blocks=linear_blocks, tolerance=1e-8)


@pytest.mark.parametrize("layer", ["linear", "conv2d", "batchnorm2d", "hf-conv1d"])
@pytest.mark.parametrize("linear_blocks", ["shared", "per_output", 2])
def test_bfloat16_inverses_are_within_their_bound(layer: str, linear_blocks: str | int) -> None:
    """One step of P m, every entry of P rounded by at most 2^-8 of itself, the unit roundoff."""
    build, shape = LAYERS[layer]
    torch.manual_seed(0)
    model = build().double()
    twin = copy.deepcopy(model)
    settings = {**SETTINGS, "kl_clip": None, "max_relative_step": None, "linear_blocks": linear_blocks}
    ours = MBF(model, **settings, inverse_storage="bfloat16")
    naive = NaiveMBF(twin, **settings)
    start = [p.detach().clone() for p in twin.parameters()]
    for net, opt in ((model, ours), (twin, naive)):
        generator = torch.Generator().manual_seed(0)
        loss_of(net(*batch_of(*shape)(generator)), generator).backward()
        opt.step()
    # The error of P m is at most 2^-8 |P| |m|: the largest sum of a row of any block, times the largest entry.
    largest = max(
        float(torch.linalg.inv(b.average + 0.05 * torch.eye(b.average.shape[-1])).abs().sum(-1).max())
        for b in naive.blocks
        if b.average is not None
    )
    steepest = max(float(q.grad.abs().max()) for q in twin.parameters() if q.grad is not None)
    bound = 2**-8 * settings["lr"] * largest * steepest
    moved = False
    for p, q, before in zip(model.parameters(), twin.parameters(), start, strict=True):
        error = float((p - q).detach().abs().max())
        assert error <= bound, f"off by {error:.1e}, where {bound:.1e} is allowed"
        moved |= error > 0
        assert not torch.equal(q, before)
    assert moved, "nothing was rounded"


# Against the definition itself, and what it is good for.


def test_reduce_is_the_gradient_of_each_sample() -> None:
    """End to end, with no word of layers: vmap(grad) of the loss of a whole network gives every block."""
    torch.manual_seed(0)
    model = Attention().double()
    x = tokens(4, 5)(torch.Generator().manual_seed(0))[0]

    def loss(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        out: Tensor = functional_call(model, parameters, (x.unsqueeze(0),))
        return out.sin().sum()

    of_samples = vmap(grad(loss), in_dims=(None, 0))({n: p.detach() for n, p in model.named_parameters()}, x)
    optimizer = MBF(model, sequence="reduce", lr=0.0)
    model(x).sin().flatten(1).sum(1).mean().backward()
    optimizer.step()

    def blocks(name: str) -> Tensor:
        found: Tensor = optimizer.state[model.get_parameter(name)]["fisher_blocks"]
        return found

    for name in ("up", "down", "head", "project"):
        weight, bias = of_samples[f"{name}.weight"], of_samples[f"{name}.bias"]
        rows = torch.cat([weight.mT if name == "project" else weight, bias.unsqueeze(-1)], -1)
        wanted = torch.einsum("noi,noj->ij", rows, rows) / (len(x) * rows.shape[1])
        torch.testing.assert_close(blocks(f"{name}.weight")[0], wanted, rtol=1e-11, atol=1e-13)
    for name in ("query", "key", "value"):
        rows = of_samples[f"{name}.weight"]
        wanted = torch.einsum("noi,noj->ij", rows, rows) / (len(x) * rows.shape[1])
        torch.testing.assert_close(blocks(f"{name}.weight")[0], wanted, rtol=1e-11, atol=1e-13)
    both = torch.stack([of_samples["norm1.weight"], of_samples["norm1.bias"]], -1)
    wanted = torch.einsum("nci,ncj->cij", both, both) / len(x)
    torch.testing.assert_close(blocks("norm1.weight"), wanted, rtol=1e-11, atol=1e-13)
    for name in ("norm2.weight", "embedding.weight"):
        wanted = of_samples[name].square().mean(0).reshape(-1, 1, 1)
        torch.testing.assert_close(blocks(name), wanted, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("samples", [1, 3])
@pytest.mark.parametrize("loss_reduction", ["mean", "sum"])
@pytest.mark.parametrize(("outputs", "linear_blocks"), [(1, "shared"), (1, "per_output"), (3, "shared")])
def test_one_step_solves_one_equation(outputs: int, linear_blocks: str, loss_reduction: str, samples: int) -> None:
    """Least squares with one input lands on its minimum in one step, as damping goes to 0.

    With residuals r = W h + b - y and the loss |r|^2 / 2 of a sample, s = r and a shared block is
    G = (|r|^2 / O) h h^T, h with its 1. A gradient r h^T then becomes r h^T / (q |h|^2 + damping), q = |r|^2 / O, and
    the step changes the residuals to r (1 - lr |h|^2 / (q |h|^2 + damping)): with lr = q they are
    r damping / (q |h|^2 + damping), whatever the input is. The same sample several times leaves the mean of losses and
    G as they are; of a sum the gradient is so many times as long, and lr = q / samples.
    """
    torch.manual_seed(0)
    h, y = torch.randn(5, dtype=torch.float64), torch.randn(outputs, dtype=torch.float64)
    x, square = h.expand(samples, 5), float(h.square().sum()) + 1
    reduce = {"mean": torch.mean, "sum": torch.sum}[loss_reduction]
    for damping in (1.0, 1e-2, 1e-6):
        model = nn.Linear(5, outputs).double()
        before = (model(h) - y).detach()
        q = float(before.square().mean())
        optimizer = MBF(
            model,
            lr=q if loss_reduction == "mean" else q / samples,
            momentum=0.0,
            damping=damping,
            kl_clip=None,
            max_relative_step=None,
            loss_reduction=loss_reduction,
            linear_blocks=linear_blocks,
        )
        reduce(0.5 * (model(x) - y).square().sum(1)).backward()
        optimizer.step()
        after = (model(h) - y).detach()
        # Rounding is magnified by the condition number of G + damping, q |h|^2 / damping: at most 1e8 here.
        wanted = before * damping / (q * square + damping)
        torch.testing.assert_close(after, wanted, rtol=0, atol=1e-15 * float(before.abs().max()) * square / damping)


def quadratic(condition: float) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs, targets and the weight of least error: inputs come twice, with residuals of 1 and of -1 there.

    Half the second derivative of the error is then the mean of h h^T, of the given condition number, and so is the
    Fisher matrix at the minimum.
    """
    generator = torch.Generator().manual_seed(0)
    basis, _ = torch.linalg.qr(torch.randn(6, 6, generator=generator, dtype=torch.float64))
    scales = torch.logspace(0, -0.5 * float(torch.tensor(condition).log10()), 6, dtype=torch.float64)
    x = (basis * scales).repeat(2, 1)
    weight = torch.randn(1, 6, generator=generator, dtype=torch.float64)
    return x, x @ weight.T + torch.tensor([1.0, -1.0]).repeat_interleave(6).unsqueeze(1), weight


@pytest.mark.parametrize("linear_blocks", ["shared", "per_output"])
@pytest.mark.parametrize("condition", [1.0, 1e2, 1e4])
def test_convergence_does_not_depend_on_the_condition_of_a_block(condition: float, linear_blocks: str) -> None:
    """A quadratic whose Fisher matrix is its second derivative: the error to go is (1 - lr)^2 of itself at each step.

    The blocks are taken at the minimum, where that holds. Damping of 1e-9 changes a factor of 1 - lr by
    1e-9 / (smallest eigenvalue of G) at most.
    """
    x, y, weight = quadratic(condition)
    model = nn.Linear(6, 1, bias=False).double()
    with torch.no_grad():
        model.weight.copy_(weight)
    settings: dict[str, Any] = {"momentum": 0.0, "damping": 1e-9, "linear_blocks": linear_blocks}
    settings |= {"kl_clip": None, "max_relative_step": None, "refresh": "constant"}
    optimizer = MBF(model, lr=0.0, update_interval=1000, inverse_interval=1, **settings)

    def excess() -> Tensor:
        optimizer.zero_grad()
        loss: Tensor = 0.5 * (model(x) - y).square().mean() - 0.5
        loss.backward()
        return loss.detach()

    excess()
    optimizer.step()
    torch.testing.assert_close(optimizer.state[model.weight]["fisher_blocks"][0], x.T @ x / 12, rtol=1e-12, atol=1e-15)
    with torch.no_grad():
        model.weight.zero_()
    lr = optimizer.param_groups[0]["lr"] = 0.4
    errors = []
    for _ in range(12):
        errors.append(float(excess()))
        optimizer.step()
    for old, new in itertools.pairwise(errors):
        assert new / old == pytest.approx((1 - lr) ** 2, rel=1e-4)


@pytest.mark.parametrize("linear_blocks", ["shared", "per_output"])
def test_training_does_not_depend_on_the_units_of_the_inputs(linear_blocks: str) -> None:
    """Inputs A h in place of h: without damping gradients become g A^T, blocks A G A^T, and predictions stay the same.

    In every step and for any loss, here with A of condition 1e3. Blocks then have one of 1e6 times that of the first,
    which magnifies the rounding of 1e-16.
    """
    torch.manual_seed(0)
    x = torch.randn(40, 5, dtype=torch.float64)
    y = torch.randint(3, (40,))
    basis, _ = torch.linalg.qr(torch.randn(5, 5, dtype=torch.float64))
    change = basis * torch.logspace(0, 3, 5, dtype=torch.float64) @ basis.T.flip(0)
    losses = []
    for inputs in (x, x @ change.T):
        model = nn.Linear(5, 3).double()
        with torch.no_grad():
            model.weight.zero_()
            model.bias.zero_()
        # The cap is about weights as they are: it knows units.
        settings: dict[str, Any] = {"damping": 0.0, "kl_clip": 0.01, "max_relative_step": None}
        optimizer = MBF(model, lr=0.02, linear_blocks=linear_blocks, inverse_interval=2, **settings)
        losses.append([])
        for _ in range(15):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(inputs), y)
            loss.backward()
            optimizer.step()
            losses[-1].append(float(loss.detach()))
    assert losses[0][-1] < losses[0][0] - 0.03
    assert losses[1] == pytest.approx(losses[0], rel=1e-7)


# Whether the tests above would see a mistake.

MISTAKES: dict[str, tuple[str, Callable[[list[float], Any], list[float]]]] = {
    "samples for rows": ("linear-3d", lambda divisors, sums: [d * 4 for d in divisors]),
    "outputs not averaged": ("linear", lambda divisors, sums: [d / 4 for d in divisors]),
    "sum for mean": ("conv2d", lambda divisors, sums: list(sums.counts)),
    "one sample too few": (
        "layernorm-3d",
        lambda divisors, sums: [d * n / (n - 1) for d, n in zip(divisors, sums.counts, strict=True)],
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_wrong_coefficient_is_seen(mistake: str, monkeypatch: pytest.MonkeyPatch) -> None:
    layer, wrong = MISTAKES[mistake]
    right = block_rules.BlockRule.divisors
    build, shape = LAYERS[layer]
    follow(build(), batch_of(*shape), steps=1)
    monkeypatch.setattr(block_rules.BlockRule, "divisors", lambda self, sums: wrong(right(self, sums), sums))
    with pytest.raises(AssertionError, match=r"off by \d\.\de[-+]0[012] of its longest move"):
        follow(build(), batch_of(*shape), steps=1)


@pytest.mark.parametrize("count", [0, 1, 2, 100])
def test_distinct_numbers_without_knowing_how_many(count: int) -> None:
    keys = torch.randint(9, (count,), generator=torch.Generator().manual_seed(count))
    expected, places = keys.unique(return_inverse=True)
    distinct, where = block_rules.distinct_padded(keys)
    assert torch.equal(where, places)
    assert torch.equal(distinct[: len(expected)], expected)
    assert not distinct[len(expected) :].any()
