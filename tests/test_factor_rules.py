"""Every layer type: K-FAC, EKFAC and Adam in their basis against naive float64 code that forms every Fisher block."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from torch import Tensor, nn

from fisher_kernels import EKFAC, KFAC, EKFACAdam
from fisher_kernels.curvature import factor_rules
from tests.layer_cases import (
    FALLBACKS,
    LAYERS,
    NETWORKS,
    Batch,
    Conv1D,
    SharedWeight,
    Twice,
    WithFallback,
    assert_same_moves,
    batch_of,
    convolutions,
    loss_of,
    tokens,
)
from tests.naive_kfac import NaiveKFAC

TOLERANCE = 1e-9
"""Of the distance travelled, relative to the longest move of the tensor, and of factors, relative to the largest entry.
Sums of some thousand float64 terms are good to 1e-14. Solving with a whole Fisher block multiplies that by its
condition number, 1e4 at most here (entries up to some hundreds over a damping of 0.05), and steps carry it on. A wrong
coefficient shows at 1e-2 or more."""

pytestmark = [
    pytest.mark.usefixtures("host_backend", "one_thread"),
    pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths"),
]

SETTINGS: dict[str, Any] = {
    "lr": 0.05,
    "damping": 0.05,
    "beta2": 0.6,
    "update_interval": 1,
    "inverse_interval": 1,
    "refresh": "constant",
    "max_relative_step": None,
}
"""What the tests use where they do not say otherwise: every coefficient has an effect within a few steps."""

METHODS: dict[str, tuple[type[Any], dict[str, Any]]] = {
    "kfac": (KFAC, {"momentum": 0.6, "kl_clip": None, "others": "curvature"}),
    "ekfac": (EKFAC, {"momentum": 0.6, "kl_clip": None, "others": "curvature"}),
    "adam": (EKFACAdam, {"beta1": 0.6}),
}
"""Those that have blocks beside factors make everything of the curvature, unless told otherwise."""
BY_ADAM: dict[str, Any] = {"others": "adam", "others_lr": 0.3}

Groups = Callable[[nn.Module], list[dict[str, Any]]]


def everything(model: nn.Module) -> list[dict[str, Any]]:
    return [{"params": list(model.parameters())}]


def split(batch: tuple[Any, ...], parts: int) -> list[tuple[Any, ...]]:
    return list(zip(*(x.chunk(parts) for x in batch), strict=True))


def follow(
    model: nn.Module,
    batch: Batch,
    method: str = "kfac",
    *,
    steps: int = 3,
    parts: int = 1,
    params: Groups = everything,
    before: Callable[[nn.Module, int], None] = lambda model, step: None,
    **hyperparameters: Any,
) -> tuple[Any, NaiveKFAC]:
    """Train two copies of a model, one with each implementation, and compare moves and factors after every step."""
    make, own = METHODS[method]
    hyperparameters = {**SETTINGS, **own, **hyperparameters}
    model = model.double()
    twin = copy.deepcopy(model)
    ours = make(model, params=params(model), **hyperparameters)
    hyperparameters.pop("refresh")
    naive = NaiveKFAC(twin, method, params=params(twin), **hyperparameters)
    start = {name: p.detach().clone() for name, p in twin.named_parameters()}
    partners = {id(q): p for p, q in zip(model.parameters(), twin.parameters(), strict=True)}
    for step in range(steps):
        for net, opt in ((model, ours), (twin, naive)):
            generator = torch.Generator().manual_seed(step)
            before(net, step)
            opt.zero_grad()
            for part in split(batch(generator), parts) if parts > 1 else [batch(generator)]:
                loss_of(net(*part), generator).backward()
                if opt is naive:
                    naive.backward_done()
            if opt is ours:
                ours.step()
            else:
                naive.step(bases_of(ours, naive, partners))
        assert_same_moves(model, twin, start, TOLERANCE)
        assert_same_factors(ours, twin, naive, partners)
    return ours, naive


def bases_of(ours: Any, naive: NaiveKFAC, partners: dict[int, Any]) -> dict[int, tuple[Tensor, Tensor]]:
    """What the optimizer has taken for eigenvectors; of a diagonal factor its ones."""
    found = {}
    for n, block in enumerate(naive.blocks):
        state = ours.state[partners[id(block.owner)]]
        if "row_basis" in state:
            found[n] = state["row_basis"].clone(), state["column_basis"].clone()
    return found


def assert_same_factors(ours: Any, twin: nn.Module, naive: NaiveKFAC, partners: dict[int, Any]) -> None:
    """The averages, and second moments, as they stand in the state of the parameter that owns them."""
    names = {id(q): name for name, q in twin.named_parameters()}
    for block in naive.blocks:
        state, name = ours.state[partners[id(block.owner)]], f"{block.kind} of {names[id(block.owner)]}"
        if not block.averages:
            assert not state.get("fisher_updates", 0), name
            continue
        assert int(state["fisher_updates"]) == block.updates, name
        if block.kind != "factors":
            assert_same(state["fisher_blocks"].reshape(block.averages[0][0].shape), block.averages[0][0], name)
            continue
        for g, pair in enumerate(block.averages):
            for side, wanted in zip(("row", "column"), pair, strict=True):
                factor = state[f"{side}_factor"][g]
                factor = factor.diag_embed() if factor.dim() == 1 else factor
                assert_same(factor, wanted, f"{side} {name}")
        for g, wanted in enumerate(block.moments):
            assert_same(state["second_moment"][g], wanted, f"second moments of {name}")
        if block.moments:
            assert int(state["moment_updates"]) == block.moment_updates


def assert_same(found: Tensor, wanted: Tensor, name: str) -> None:
    assert found.shape == wanted.shape, name
    largest = float(wanted.abs().max())
    error = float((found - wanted).abs().max())
    assert error <= TOLERANCE * max(largest, 1e-300), f"{name}: off by {error:.1e} beside {largest:.1e}"


def assert_no_fallback(optimizer: Any) -> None:
    assert not any(row.fallback for row in optimizer.explain())


# Every layer.


@pytest.mark.parametrize("method", ["kfac", pytest.param("ekfac", marks=pytest.mark.slow), "adam"])
@pytest.mark.parametrize("layer", LAYERS)
def test_layer(layer: str, method: str) -> None:
    build, shape = LAYERS[layer]
    torch.manual_seed(0)
    optimizer, _ = follow(build(), batch_of(*shape), method, weight_decay=0.01)
    assert_no_fallback(optimizer)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("loss_reduction", ["mean", "sum"])
@pytest.mark.parametrize("layer", ["linear-3d", "linear-4d", "hf-conv1d-3d", "linear-1d", "conv2d-groups"])
def test_reduce(layer: str, loss_reduction: str, method: str) -> None:
    build, shape = LAYERS[layer]
    torch.manual_seed(0)
    follow(build(), batch_of(*shape), method, sequence="reduce", loss_reduction=loss_reduction)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("decoupled", [True, False])
@pytest.mark.parametrize("layer", ["linear-3d", "hf-conv1d", "conv2d-groups", "deconv2d-stride-padding", "batchnorm2d"])
def test_decay_limits_and_intervals(layer: str, decoupled: bool, method: str) -> None:
    build, shape = LAYERS[layer]
    torch.manual_seed(0)
    own = {} if method == "adam" else {"kl_clip": 1e-4}
    _, naive = follow(
        build(),
        batch_of(*shape),
        method,
        steps=7,
        decoupled=decoupled,
        weight_decay=0.1,
        maximize=not decoupled,
        update_interval=2,
        inverse_interval=3,
        loss_reduction="mean" if decoupled else "sum",
        max_relative_step=1e-3,
        **own,
    )
    assert (naive.scale < 1) == (method != "adam")
    assert min(naive.caps) < 1


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("layer", "widest"), [("linear", 4), ("linear", 5), ("conv2d-groups", 10), ("deconv2d", 20)])
def test_wide_factors_are_diagonal(layer: str, widest: int, method: str) -> None:
    build, shape = LAYERS[layer]
    torch.manual_seed(0)
    optimizer, _ = follow(build(), batch_of(*shape), method, max_factor_size=widest)
    assert "diagonal" in str(optimizer.explain())


@given(case=convolutions())
def test_convolutions_of_any_geometry(case: tuple[nn.Module, tuple[int, ...]]) -> None:
    module, shape = case
    follow(module, batch_of(*shape), steps=2)


@pytest.mark.parametrize("method", ["kfac", "ekfac"])
@pytest.mark.parametrize("layer", ["conv2d-padding", "conv2d-groups", "deconv2d-stride-padding"])
def test_pieces_of_a_batch(layer: str, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A convolution is unfolded a few samples at a time."""
    monkeypatch.setattr(factor_rules, "CHUNK", 1)
    build, shape = LAYERS[layer]
    torch.manual_seed(0)
    follow(build(), batch_of(*shape), method)


@pytest.mark.parametrize(
    "layer",
    [
        "conv1d-stride-padding",
        "conv2d-dilation",
        "conv2d-groups",
        "conv2d-circular",
        "conv3d",
        "deconv2d-output-padding",
    ],
)
def test_nothing_is_unfolded_for_whole_factors(layer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: Any) -> Tensor:
        raise AssertionError("patches are written out")

    monkeypatch.setattr(factor_rules, "patches", refuse)
    build, shape = LAYERS[layer]
    torch.manual_seed(0)
    optimizer, _ = follow(build(), batch_of(*shape))
    assert_no_fallback(optimizer)


@pytest.mark.parametrize("shape", [(9,), (3, 5), (2, 3, 4)])
def test_embedding(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    for method in METHODS:
        follow(nn.Embedding(7, 4, padding_idx=2), tokens(*shape), method, weight_decay=0.01)
    follow(nn.Embedding(7, 4, padding_idx=2), tokens(*shape), weight_decay=0.01, **BY_ADAM)


# Uses and micro-batches that add up.


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("build", "shape"),
    [
        (lambda: Twice(nn.Linear(4, 3)), (5, 4)),
        (lambda: Twice(nn.Linear(4, 3)), (5, 3, 4)),
        (lambda: Twice(nn.Conv2d(2, 3, 3, padding=1)), (3, 2, 4, 5)),
        (lambda: Twice(nn.ConvTranspose2d(2, 3, 2, stride=2)), (2, 2, 3, 2)),
        (lambda: Twice(nn.LayerNorm(4)), (5, 3, 4)),
    ],
)
def test_module_called_several_times(build: Callable[[], nn.Module], shape: tuple[int, ...], method: str) -> None:
    torch.manual_seed(0)
    follow(build(), batch_of(*shape), method)


@pytest.mark.parametrize("biases", [(False, False), (True, False), (False, True)])
def test_linears_that_share_a_weight(biases: tuple[bool, bool]) -> None:
    torch.manual_seed(0)
    for method in METHODS:
        follow(SharedWeight(*biases), batch_of(5, 4), method)


class SharedKernel(nn.Module):
    """Two convolutions that share a weight, of which one has a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(2, 2, 3, padding=1), nn.Conv2d(2, 2, 3, padding=1, bias=False)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.second(torch.tanh(self.first(x)))
        return out


def test_convolutions_that_share_a_weight() -> None:
    for method in METHODS:
        torch.manual_seed(0)
        optimizer, _ = follow(SharedKernel(), batch_of(3, 2, 4, 5), method)
        assert_no_fallback(optimizer)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("layer", ["linear-3d", "conv2d", "deconv2d", "layernorm-3d", "groupnorm"])
def test_micro_batches(layer: str, method: str) -> None:
    """Their terms add up."""
    build, shape = LAYERS[layer]
    torch.manual_seed(0)
    follow(build(), batch_of(4, *shape[1:]), method, parts=2)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("network", NETWORKS)
def test_network(network: str, method: str) -> None:
    """All layers are in the units of the terms of the loss, which the last one has."""
    build, batch = NETWORKS[network]
    torch.manual_seed(0)
    own = {} if method == "adam" else {"kl_clip": 1e-3}
    optimizer, _ = follow(build(), batch, method, max_relative_step=0.05, **own)
    assert_no_fallback(optimizer)


@pytest.mark.filterwarnings("ignore:.* of the trained parameters have no layer rule")
@pytest.mark.parametrize("fallback", ["bilinear", "free-parameter", "embedding-bag"])
def test_fallback(fallback: str) -> None:
    build, call, names = FALLBACKS[fallback]
    runs: list[tuple[str, dict[str, Any]]] = [*((method, {}) for method in METHODS), ("kfac", BY_ADAM)]
    for method, own in runs:
        torch.manual_seed(0)
        optimizer, _ = follow(WithFallback(build(), call), batch_of(6, 4), method, **own)
        rows = {row.name for row in optimizer.explain() if row.fallback}
        assert rows == {f"fallback.{name}" for name in names}


# What has no factors, by Adam.


@pytest.mark.parametrize("method", ["kfac", "ekfac"])
@pytest.mark.parametrize("decoupled", [True, False])
@pytest.mark.parametrize("network", NETWORKS)
def test_others_by_adam(network: str, decoupled: bool, method: str) -> None:
    """Beside layers with factors, whose bounds do not count it."""
    build, batch = NETWORKS[network]
    torch.manual_seed(0)
    optimizer, naive = follow(
        build(),
        batch,
        method,
        steps=5,
        decoupled=decoupled,
        weight_decay=0.1,
        maximize=not decoupled,
        update_interval=2,
        inverse_interval=3,
        max_relative_step=1e-3,
        kl_clip=1e-4,
        **BY_ADAM,
    )
    assert naive.scale < 1
    assert min(naive.caps) < 1
    assert_no_fallback(optimizer)


@pytest.mark.parametrize("layer", ["batchnorm2d", "layernorm-3d", "groupnorm", "deconv2d-stride-padding"])
def test_layers_by_adam(layer: str) -> None:
    """The bias of a transposed convolution keeps its blocks."""
    build, shape = LAYERS[layer]
    torch.manual_seed(0)
    optimizer, _ = follow(build(), batch_of(4, *shape[1:]), parts=2, weight_decay=0.01, **BY_ADAM)
    by_adam = ["exp_avg_sq" in optimizer.state[p] for p in optimizer.param_groups[0]["params"]]
    assert by_adam == [not layer.startswith("deconv")] * 2


# What is trained, and in which group.

HALVES = ["linear", "hf-conv1d", "conv2d-groups", "deconv2d", "layernorm-3d"]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("frozen", ["weight", "bias"])
@pytest.mark.parametrize("layer", HALVES)
def test_half_frozen_layer(layer: str, frozen: str, method: str) -> None:
    build, shape = LAYERS[layer]
    torch.manual_seed(0)
    model = build()
    model.get_parameter(frozen).requires_grad_(False)
    follow(model, batch_of(*shape), method)


@pytest.mark.parametrize("layer", HALVES)
def test_weight_and_bias_in_different_groups(layer: str) -> None:
    def groups(model: nn.Module) -> list[dict[str, Any]]:
        bias = {"params": [model.get_parameter("bias")], "lr": 0.1}
        return [{"params": [model.get_parameter("weight")]}, bias]

    build, shape = LAYERS[layer]
    runs: list[tuple[str, dict[str, Any]]] = [*((method, {}) for method in METHODS), ("kfac", BY_ADAM)]
    for method, own in runs:
        torch.manual_seed(0)
        follow(build(), batch_of(*shape), method, params=groups, **own)


@pytest.mark.parametrize("layer", HALVES[:-1])
@pytest.mark.parametrize("held", ["weight", "bias"])
def test_half_of_a_layer_is_held(layer: str, held: str) -> None:
    """The other half is another optimizer's: what they have in common is left out, as between groups."""
    build, shape = LAYERS[layer]
    for method in METHODS:
        torch.manual_seed(0)
        follow(build(), batch_of(*shape), method, params=lambda model: [{"params": [model.get_parameter(held)]}])


# Terms of the loss.


def trained(model: nn.Module, x: Tensor, loss: Callable[[Tensor], Tensor], **settings: Any) -> KFAC:
    optimizer = KFAC(model, **{**SETTINGS, **settings})
    loss(model(x)).backward()
    optimizer.step()
    return optimizer


@pytest.mark.parametrize("method", METHODS)
def test_a_linear_is_a_convolution_of_one_position(method: str) -> None:
    """On the same numbers, whether the loss has a term for each row or for each sample."""
    make, own = METHODS[method]
    for pooled in (False, True):
        torch.manual_seed(0)
        linear, conv = nn.Linear(4, 3).double(), nn.Conv1d(4, 3, 1).double()
        conv.weight.data, conv.bias.data = linear.weight.data[..., None].clone(), linear.bias.data.clone()
        heads = [nn.Linear(3, 2).double() for _ in range(2)]
        heads[1].load_state_dict(heads[0].state_dict())
        optimizers = []
        for layer, head in ((linear, heads[0]), (conv, heads[1])):
            model = nn.ModuleList([layer, head])
            optimizers.append(make(model, **{**SETTINGS, **own}))
            for step in range(3):
                generator = torch.Generator().manual_seed(step)
                x = torch.randn(6, 1 if method == "ekfac" else 5, 4, generator=generator, dtype=torch.float64)
                y = layer(x) if layer is linear else layer(x.mT).mT
                out = head(torch.tanh(y).mean(1) if pooled else torch.tanh(y))
                optimizers[-1].zero_grad()
                (out - 1).square().sum(-1).mean().backward()
                optimizers[-1].step()
        for p, q in zip(optimizers[0].param_groups[0]["params"], optimizers[1].param_groups[0]["params"], strict=True):
            torch.testing.assert_close(p.reshape(q.shape), q, rtol=1e-9, atol=1e-12)


def test_rows_that_a_mask_leaves_out_are_no_terms() -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 6, 5, dtype=torch.float64)
    y = torch.randint(3, (4, 6))
    mask = torch.rand(4, 6) < 0.5
    whole, part = nn.Linear(5, 3).double(), nn.Linear(5, 3).double()
    part.load_state_dict(whole.state_dict())
    masked = y.masked_fill(mask, -100)
    for model, inputs, labels in ((whole, x, masked), (part, x[~mask], y[~mask])):
        optimizer = KFAC(model, **SETTINGS)
        nn.functional.cross_entropy(model(inputs).flatten(0, -2), labels.flatten()).backward()
        optimizer.step()
        state = optimizer.state[model.weight]
        # Rows that are masked widen A and dilute G: their product says as much of the loss as before.
        products = state["row_factor"][0] * state["column_factor"][0].diagonal()[-1]
        if model is whole:
            first = products
    torch.testing.assert_close(products, first, rtol=1e-12, atol=0)


def terms_seen(optimizer: KFAC, layer: nn.Module, rows: int) -> float:
    """The M of a layer with a bias, which has read so many rows: the last entry of A is their number over M."""
    return rows / float(optimizer.state[layer.weight]["column_factor"][0, -1, -1])  # type: ignore[index]


class Pooled(nn.Module):
    """A convolution whose output something changes before it is the model's."""

    def __init__(self, change: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.conv, self.change = nn.Conv1d(2, 4, 3), change

    def forward(self, x: Tensor) -> Any:
        return self.change(self.conv(x))


POOLS: dict[str, tuple[Callable[[Tensor], Any], int]] = {
    "mean": (lambda y: y.mean(2), 6),
    "in a dictionary": (lambda y: {"logits": y.mean(2), "loss": y.sum()}, 6),
    "one number each": (lambda y: y.mean((1, 2)), 6),
    "the last position": (lambda y: y[:, :, -1], 6),
    "interpolated": (lambda y: nn.functional.interpolate(y, scale_factor=2.0), 6 * 10),
    "two heads": (lambda y: (y[:, :2], y[:, 2:]), 6 * 5),
    "transposed": (lambda y: y.mT, 6 * 5),
    "nothing": (lambda y: y, 6 * 5),
}


@pytest.mark.parametrize("pool", POOLS)
def test_terms_are_those_of_the_models_output(pool: str) -> None:
    change, terms = POOLS[pool]
    torch.manual_seed(0)
    model = Pooled(change).double()

    def loss(output: Any) -> Tensor:
        output = output["logits"] if isinstance(output, dict) else output
        parts = output if isinstance(output, tuple) else (output,)
        return torch.stack([part.square().mean() for part in parts]).sum()

    optimizer = trained(model, torch.randn(6, 2, 7, dtype=torch.float64), loss)
    assert terms_seen(optimizer, model.conv, 6 * 5) == pytest.approx(terms, rel=1e-12)
    assert_no_fallback(optimizer)


@pytest.mark.parametrize("how", ["before", "after", "not held"])
@pytest.mark.parametrize("samples", [False, True])
def test_a_last_layer_that_is_not_trained_here_has_the_terms(samples: bool, how: str) -> None:
    """Each token is a term, though the layer that is trained sees one row of a sample; and the other way round."""
    torch.manual_seed(0)
    first, last = nn.Linear(5, 12), nn.Linear(12 if samples else 4, 3)
    between = nn.Identity() if samples else nn.Unflatten(1, (3, 4))
    model = nn.Sequential(nn.Flatten(1), first, nn.Tanh(), between, last).double()
    last.requires_grad_(how != "before")
    optimizer = KFAC(model, params=first.parameters() if how == "not held" else None, **SETTINGS)
    last.requires_grad_(False)
    out = model(torch.randn(6, 5, dtype=torch.float64))
    out.square().sum(-1).mean().backward()
    optimizer.step()
    assert terms_seen(optimizer, first, 6) == pytest.approx(6 if samples else 18, rel=1e-12)


def test_a_loss_that_pools_has_a_term_for_each_sample_if_so_said() -> None:
    torch.manual_seed(0)
    inside, outside = Pooled(lambda y: y.mean(2)).double(), Pooled(lambda y: y).double()
    outside.load_state_dict(inside.state_dict())
    x = torch.randn(6, 2, 7, dtype=torch.float64)
    plain = trained(inside, x, lambda out: out.square().sum(1).mean())
    for kind in METHODS:
        make, own = METHODS[kind]
        model = copy.deepcopy(outside)
        said = make(model, loss_terms="samples", **{**SETTINGS, **own})
        model(x).mean(2).square().sum(1).mean().backward()
        said.step()
        for side in ("row", "column"):
            a, b = (o.state[m.conv.weight][f"{side}_factor"] for o, m in ((plain, inside), (said, model)))
            torch.testing.assert_close(a, b, rtol=1e-12, atol=0)
    with pytest.raises(ValueError, match="loss_terms is 'pixels', expected one of 'rows', 'samples'"):
        KFAC(outside, loss_terms="pixels")  # type: ignore[arg-type]
    groups = [{"params": [outside.conv.weight]}, {"params": [outside.conv.bias], "loss_terms": "samples"}]
    with pytest.raises(ValueError, match="loss_terms is 'rows' in some groups"):
        KFAC(outside, params=groups)


def test_an_output_that_nobody_can_read_is_no_guess_at_the_terms() -> None:
    torch.manual_seed(0)
    model = Pooled(lambda y: y.mean(2).unflatten(1, (2, 2))).double()
    x = torch.randn(6, 2, 7, dtype=torch.float64)
    said = trained(copy.deepcopy(model), x, lambda out: out.square().mean(), loss_terms="samples")
    assert_no_fallback(said)
    with pytest.warns(UserWarning, match=r"output has shape \(6, 2, 2\).*\(6, 4, 5\).*loss_terms='samples'"):
        optimizer = trained(model, x, lambda out: out.square().mean())
    assert all(row.fallback for row in optimizer.explain())


def test_a_checkpoint_around_the_last_layer_has_the_terms_of_the_models_output() -> None:
    from torch.utils.checkpoint import checkpoint

    class Whole(nn.Module):
        def __init__(self, recomputed: bool) -> None:
            super().__init__()
            self.first, self.last, self.recomputed = nn.Linear(5, 4), nn.Linear(4, 3), recomputed

        def forward(self, x: Tensor) -> Tensor:
            h = torch.tanh(self.first(x)).mean(1)
            out: Tensor = checkpoint(self.last, h, use_reentrant=True) if self.recomputed else self.last(h)
            return out

    torch.manual_seed(0)
    plain, other = Whole(False).double(), Whole(True).double()
    other.load_state_dict(plain.state_dict())
    x = torch.randn(6, 2, 5, dtype=torch.float64)
    factors = []
    for model in (plain, other):
        optimizer = trained(model, x, lambda out: out.square().sum(1).mean())
        factors.append([optimizer.state[model.first.weight][f"{side}_factor"] for side in ("row", "column")])
        assert terms_seen(optimizer, model.first, 12) == pytest.approx(6, rel=1e-12)
    for a, b in zip(*factors, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=0)


def test_checkpointing_within_a_backward_has_the_terms_of_the_outer_one() -> None:
    from torch.utils.checkpoint import checkpoint

    torch.manual_seed(0)
    plain = nn.Sequential(nn.Conv1d(2, 3, 3), nn.Tanh(), nn.Flatten(), nn.Linear(15, 2)).double()
    twin = copy.deepcopy(plain)
    x = torch.randn(4, 2, 7, dtype=torch.float64, requires_grad=True)
    factors = []
    for model, recomputed in ((plain, False), (twin, True)):
        optimizer = KFAC(model, **SETTINGS)
        h = checkpoint(model[:2], x, use_reentrant=True) if recomputed else model[:2](x)
        model[2:](h).square().sum(1).mean().backward()
        optimizer.step()
        factors.append([optimizer.state[model[0].weight][f"{side}_factor"] for side in ("row", "column")])
    for a, b in zip(*factors, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=0)


def test_a_checkpoint_around_the_last_layer_is_no_guess_at_the_terms() -> None:
    from torch.utils.checkpoint import checkpoint

    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv1d(2, 3, 3), nn.Tanh(), nn.Flatten(), nn.Linear(15, 2)).double()
    optimizer = KFAC(model, **SETTINGS)
    x = torch.randn(4, 2, 7, dtype=torch.float64, requires_grad=True)
    h = checkpoint(model[:2], x, use_reentrant=True)
    checkpoint(model[2:], h, use_reentrant=True).square().sum(1).mean().backward()
    with pytest.warns(UserWarning, match=r"2 layers cannot be served.*take use_reentrant=False"):
        optimizer.step()
    assert all(row.fallback for row in optimizer.explain())
    assert all(bool(p.isfinite().all()) for p in model.parameters())


def test_a_transposed_weight_is_served_by_its_rows_and_columns() -> None:
    torch.manual_seed(0)
    linear, conv1d = nn.Linear(5, 3).double(), Conv1D(3, 5).double()
    conv1d.weight.data, conv1d.bias.data = linear.weight.data.T.clone(), linear.bias.data.clone()
    x = torch.randn(6, 5, dtype=torch.float64)
    for model in (linear, conv1d):
        trained(model, x, lambda out: out.square().sum(1).mean())
    torch.testing.assert_close(conv1d.weight.T, linear.weight, rtol=1e-12, atol=1e-14)
