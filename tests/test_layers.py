"""Every layer type: AdaFisher against a naive float64 implementation that forms the whole curvature."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from fisher_kernels import AdaFisher, AdaFisherW
from tests.naive_adafisher import NaiveAdaFisher

TOLERANCE = 1e-10
"""Of the distance travelled, relative to the longest move of the tensor. Sums of some thousand float64 terms are good
to 1e-14; min-max normalisation subtracts, which costs a factor max / spread, and dividing by a curvature near its
damping of 1e-3 at most another 1e3 of what is left, carried through a few steps. A wrong coefficient shows at 1e-3 or
more."""

pytestmark = [
    pytest.mark.usefixtures("backend", "one_thread"),
    pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths"),
]


VARIANTS = ("paper", "release", "relative")
LR = {"paper": 2e-3, "release": 1e-3, "relative": 0.1}


def inputs_of(shape: Sequence[int], generator: torch.Generator) -> Tensor:
    """Entries of different size along the last and the second dimension, so that no factor is flat."""
    x = torch.randn(*shape, generator=generator, dtype=torch.float64) + 0.3
    x = x * torch.linspace(0.2, 1.5, shape[-1], dtype=torch.float64)
    if len(shape) > 2:
        scale = torch.linspace(1.3, 0.4, shape[1], dtype=torch.float64)
        x = x * scale.reshape(-1, *[1] * (len(shape) - 2))
    return x


def loss_of(out: Tensor, generator: torch.Generator) -> Tensor:
    target = torch.randn(out.shape, generator=generator, dtype=out.dtype)
    target = target * torch.linspace(0.5, 2.0, max(out.shape[-1], 1), dtype=out.dtype)
    if out.dim() > 1:
        target = target * torch.linspace(1.5, 0.5, out.shape[1], dtype=out.dtype).reshape(-1, *[1] * (out.dim() - 2))
    return (0.25 * out.square() + out * target).sum() / math.sqrt(out.numel())


Batch = Callable[[torch.Generator], tuple[Any, ...]]


def batch_of(*shape: int) -> Batch:
    return lambda generator: (inputs_of(shape, generator),)


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


def assert_same_moves(
    model: nn.Module, twin: nn.Module, start: dict[str, Tensor], tolerance: float = TOLERANCE
) -> None:
    for (name, p), (_, q) in zip(model.named_parameters(), twin.named_parameters(), strict=True):
        ours, wanted = (p - start[name]).detach(), (q - start[name]).detach()
        longest = wanted.abs().max()
        assert bool(wanted.isfinite().all()), name
        error = float((ours - wanted).abs().max() / longest.clamp(min=1e-300))
        assert error <= tolerance, f"{name}: off by {error:.1e} of its longest move {float(longest):.1e}"


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


class Conv1D(nn.Module):
    """A Linear with a transposed weight, as Hugging Face's GPT-2 has it."""

    def __init__(self, nf: int, nx: int) -> None:
        super().__init__()
        self.nf = nf
        self.weight = nn.Parameter(torch.randn(nx, nf) * 0.3)
        self.bias = nn.Parameter(torch.zeros(nf))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight + self.bias


class OutputSize(nn.Module):
    """Gives a transposed convolution its ``output_size`` argument."""

    def __init__(self, layer: nn.Module, size: Sequence[int]) -> None:
        super().__init__()
        self.layer, self.size = layer, size

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layer(x, output_size=self.size)
        return out


class Named(nn.Module):
    """Calls a layer with keyword arguments only, the input not the first of them."""

    def __init__(self, layer: nn.Module, **arguments: Any) -> None:
        super().__init__()
        self.layer, self.arguments = layer, arguments

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layer(**self.arguments, input=x)
        return out


class MyLinear(nn.Linear):
    pass


class MyConv(nn.Conv2d):
    pass


class MyNorm(nn.LayerNorm):
    pass


def evaluated(module: nn.Module, *shape: int) -> nn.Module:
    """A norm with running statistics that differ from the batch's, in eval mode."""
    with torch.no_grad():
        module.double()(inputs_of(shape, torch.Generator().manual_seed(99)))
    return module.eval()


def channels_last(module: nn.Module) -> nn.Module:
    return module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(5, 4), (7, 5)),
    "linear-no-bias": (lambda: nn.Linear(5, 4, bias=False), (7, 5)),
    "linear-3d": (lambda: nn.Linear(5, 4), (3, 4, 5)),
    "linear-4d": (lambda: nn.Linear(5, 4), (2, 3, 2, 5)),
    "linear-1d": (lambda: nn.Linear(5, 4), (5,)),
    "linear-one-row": (lambda: nn.Linear(5, 4), (1, 5)),
    "linear-one-output": (lambda: nn.Linear(5, 1), (7, 5)),
    "linear-one-input": (lambda: nn.Linear(1, 4), (7, 1)),
    "linear-one-input-no-bias": (lambda: nn.Linear(1, 4, bias=False), (7, 1)),
    "linear-keywords": (lambda: Named(nn.Linear(5, 4)), (7, 5)),
    "linear-subclass": (lambda: MyLinear(5, 4), (7, 5)),
    "hf-conv1d": (lambda: Conv1D(4, 5), (7, 5)),
    "hf-conv1d-3d": (lambda: Conv1D(4, 5), (3, 4, 5)),
    "conv1d": (lambda: nn.Conv1d(3, 4, 3), (3, 3, 9)),
    "conv1d-stride-padding": (lambda: nn.Conv1d(3, 4, 3, stride=2, padding=2), (3, 3, 10)),
    "conv1d-same-even": (lambda: nn.Conv1d(3, 4, 4, padding="same", dilation=3), (2, 3, 9)),
    "conv1d-unbatched": (lambda: nn.Conv1d(3, 4, 3), (3, 9)),
    "conv1d-one-position": (lambda: nn.Conv1d(3, 4, 9), (3, 3, 9)),
    "conv2d": (lambda: nn.Conv2d(3, 4, 3), (3, 3, 6, 7)),
    "conv2d-no-bias": (lambda: nn.Conv2d(3, 4, 3, bias=False), (3, 3, 6, 7)),
    "conv2d-pointwise": (lambda: nn.Conv2d(3, 4, 1), (3, 3, 4, 5)),
    "conv2d-stride": (lambda: nn.Conv2d(3, 4, (3, 2), stride=(2, 3)), (3, 3, 8, 7)),
    "conv2d-stride-over-kernel": (lambda: nn.Conv2d(3, 4, 2, stride=3), (3, 3, 8, 7)),
    "conv2d-padding": (lambda: nn.Conv2d(3, 4, 3, padding=(2, 1)), (3, 3, 5, 6)),
    "conv2d-padding-over-kernel": (lambda: nn.Conv2d(3, 4, 2, padding=3), (2, 3, 4, 3)),
    "conv2d-valid": (lambda: nn.Conv2d(3, 4, 3, padding="valid"), (3, 3, 5, 6)),
    "conv2d-same": (lambda: nn.Conv2d(3, 4, 3, padding="same"), (3, 3, 5, 6)),
    "conv2d-same-even": (lambda: nn.Conv2d(3, 4, (2, 4), padding="same"), (3, 3, 5, 6)),
    "conv2d-same-dilated": (lambda: nn.Conv2d(3, 4, (2, 3), padding="same", dilation=(3, 2)), (3, 3, 7, 6)),
    "conv2d-reflect": (lambda: nn.Conv2d(3, 4, 3, padding=(2, 1), padding_mode="reflect"), (3, 3, 5, 6)),
    "conv2d-replicate": (lambda: nn.Conv2d(3, 4, 3, padding=2, padding_mode="replicate"), (3, 3, 5, 6)),
    "conv2d-circular": (lambda: nn.Conv2d(3, 4, 3, padding=(1, 2), padding_mode="circular"), (3, 3, 5, 6)),
    "conv2d-same-circular": (
        lambda: nn.Conv2d(3, 4, (2, 3), padding="same", padding_mode="circular"),
        (3, 3, 5, 6),
    ),
    "conv2d-strided-reflect": (
        lambda: nn.Conv2d(4, 4, 3, stride=2, padding=1, dilation=2, groups=2, padding_mode="reflect"),
        (2, 4, 7, 8),
    ),
    "conv2d-dilation": (lambda: nn.Conv2d(3, 4, 3, dilation=(2, 1), padding=1), (3, 3, 7, 6)),
    "conv2d-groups": (lambda: nn.Conv2d(4, 6, 3, groups=2, padding=1), (3, 4, 5, 6)),
    "conv2d-groups-no-bias": (lambda: nn.Conv2d(4, 6, 3, groups=2, bias=False), (3, 4, 5, 6)),
    "conv2d-depthwise": (lambda: nn.Conv2d(4, 4, 3, groups=4, padding=1), (3, 4, 5, 6)),
    "conv2d-depthwise-multiplied": (lambda: nn.Conv2d(3, 6, 3, groups=3, stride=2), (3, 3, 7, 6)),
    "conv2d-depthwise-pointwise": (lambda: nn.Conv2d(4, 4, 1, groups=4), (3, 4, 3, 4)),
    "conv2d-unbatched": (lambda: nn.Conv2d(3, 4, 3, padding=1), (3, 5, 6)),
    "conv2d-unbatched-circular": (lambda: nn.Conv2d(3, 4, 3, padding=1, padding_mode="circular"), (3, 5, 6)),
    "conv2d-subclass": (lambda: MyConv(3, 4, 3), (3, 3, 5, 6)),
    "conv2d-channels-last": (lambda: channels_last(nn.Conv2d(3, 4, 3, padding=1)), (3, 3, 5, 6)),
    "conv2d-groups-channels-last": (lambda: channels_last(nn.Conv2d(4, 6, 3, groups=2)), (3, 4, 5, 6)),
    "conv3d": (lambda: nn.Conv3d(2, 3, (2, 3, 2)), (2, 2, 4, 5, 4)),
    "conv3d-everything": (
        lambda: nn.Conv3d(4, 4, (2, 3, 2), stride=(1, 2, 1), padding=(1, 0, 2), dilation=(1, 1, 2), groups=2),
        (2, 4, 3, 5, 4),
    ),
    "conv3d-replicate": (lambda: nn.Conv3d(2, 3, 2, padding=1, padding_mode="replicate"), (2, 2, 3, 3, 3)),
    "conv3d-unbatched": (lambda: nn.Conv3d(2, 3, 2), (2, 3, 4, 3)),
    "deconv1d": (lambda: nn.ConvTranspose1d(3, 4, 3), (3, 3, 6)),
    "deconv1d-unbatched": (lambda: nn.ConvTranspose1d(3, 4, 3, stride=2), (3, 6)),
    "deconv1d-output-padding": (
        lambda: nn.ConvTranspose1d(3, 4, 2, stride=4, padding=1, output_padding=3),
        (3, 3, 5),
    ),
    "deconv1d-extra-windows": (lambda: nn.ConvTranspose1d(3, 4, 2, output_padding=2, dilation=3), (3, 3, 5)),
    "deconv1d-padded-past-the-end": (lambda: nn.ConvTranspose1d(3, 4, 3, padding=2), (3, 3, 6)),
    "deconv2d": (lambda: nn.ConvTranspose2d(3, 4, 3), (3, 3, 4, 5)),
    "deconv2d-no-bias": (lambda: nn.ConvTranspose2d(3, 4, 3, bias=False), (3, 3, 4, 5)),
    "deconv2d-stride-padding": (
        lambda: nn.ConvTranspose2d(3, 4, (3, 4), stride=(2, 3), padding=(1, 2)),
        (3, 3, 4, 3),
    ),
    "deconv2d-stride-over-kernel": (lambda: nn.ConvTranspose2d(3, 4, 2, stride=3), (3, 3, 3, 4)),
    "deconv2d-output-padding": (
        lambda: nn.ConvTranspose2d(3, 4, 3, stride=2, padding=1, output_padding=1),
        (3, 3, 3, 4),
    ),
    "deconv2d-dilation": (
        lambda: nn.ConvTranspose2d(3, 4, 2, dilation=(3, 2), padding=1, output_padding=(2, 1)),
        (3, 3, 3, 4),
    ),
    "deconv2d-groups": (lambda: nn.ConvTranspose2d(4, 6, 3, groups=2, stride=2), (3, 4, 3, 4)),
    "deconv2d-depthwise": (lambda: nn.ConvTranspose2d(4, 4, 2, groups=4, stride=2), (3, 4, 3, 4)),
    "deconv2d-channels-last": (lambda: channels_last(nn.ConvTranspose2d(3, 4, 3, stride=2)), (3, 3, 3, 4)),
    "deconv2d-output-size": (
        lambda: OutputSize(nn.ConvTranspose2d(3, 4, 3, stride=2, padding=1), [6, 7]),
        (3, 3, 3, 4),
    ),
    "deconv2d-keywords": (
        lambda: Named(nn.ConvTranspose2d(3, 4, 3, stride=2), output_size=[8, 9]),
        (3, 3, 3, 4),
    ),
    "deconv2d-unbatched": (lambda: nn.ConvTranspose2d(3, 4, 3), (3, 4, 5)),
    "deconv3d": (
        lambda: nn.ConvTranspose3d(2, 4, 2, stride=(2, 1, 3), padding=(0, 1, 1), output_padding=(1, 0, 2), groups=2),
        (2, 2, 3, 2, 3),
    ),
    "deconv3d-unbatched": (lambda: nn.ConvTranspose3d(2, 3, 2, bias=False), (2, 2, 3, 2)),
    "batchnorm1d": (lambda: nn.BatchNorm1d(5), (7, 5)),
    "batchnorm1d-3d": (lambda: nn.BatchNorm1d(5), (4, 5, 3)),
    "batchnorm1d-eval": (lambda: evaluated(nn.BatchNorm1d(5), 9, 5), (7, 5)),
    "batchnorm2d": (lambda: nn.BatchNorm2d(4), (3, 4, 3, 2)),
    "batchnorm2d-eval": (lambda: evaluated(nn.BatchNorm2d(4), 5, 4, 3, 2), (3, 4, 3, 2)),
    "batchnorm2d-no-running": (lambda: nn.BatchNorm2d(4, track_running_stats=False), (3, 4, 3, 2)),
    "batchnorm2d-channels-last": (lambda: channels_last(nn.BatchNorm2d(4)), (3, 4, 3, 2)),
    "batchnorm3d": (lambda: nn.BatchNorm3d(3), (3, 3, 2, 2, 3)),
    "syncbatchnorm": (lambda: nn.SyncBatchNorm(4), (3, 4, 3, 2)),
    "syncbatchnorm-eval": (lambda: evaluated(nn.SyncBatchNorm(4), 5, 4, 3), (3, 4, 3)),
    "layernorm": (lambda: nn.LayerNorm(5), (7, 5)),
    "layernorm-3d": (lambda: nn.LayerNorm(5), (3, 4, 5)),
    "layernorm-two-dims": (lambda: nn.LayerNorm((4, 5)), (3, 2, 4, 5)),
    "layernorm-all-dims": (lambda: nn.LayerNorm((4, 5)), (3, 4, 5)),
    "layernorm-one-sample": (lambda: nn.LayerNorm((4, 5)), (4, 5)),
    "layernorm-one-vector": (lambda: nn.LayerNorm(5), (5,)),
    "layernorm-no-bias": (lambda: nn.LayerNorm(5, bias=False), (3, 4, 5)),
    "layernorm-subclass": (lambda: MyNorm(5), (7, 5)),
    "groupnorm": (lambda: nn.GroupNorm(2, 4), (3, 4, 3, 2)),
    "groupnorm-2d": (lambda: nn.GroupNorm(2, 6), (5, 6)),
    "instancenorm1d": (lambda: nn.InstanceNorm1d(4, affine=True), (3, 4, 5)),
    "instancenorm1d-unbatched": (lambda: nn.InstanceNorm1d(4, affine=True), (4, 5)),
    "instancenorm2d": (lambda: nn.InstanceNorm2d(4, affine=True), (3, 4, 3, 2)),
    "instancenorm2d-unbatched": (lambda: nn.InstanceNorm2d(4, affine=True), (4, 3, 2)),
    "instancenorm2d-eval": (
        lambda: evaluated(nn.InstanceNorm2d(4, affine=True, track_running_stats=True), 5, 4, 3, 2),
        (3, 4, 3, 2),
    ),
    "instancenorm3d": (lambda: nn.InstanceNorm3d(3, affine=True), (2, 3, 2, 2, 3)),
    "instancenorm3d-unbatched": (lambda: nn.InstanceNorm3d(3, affine=True), (3, 2, 2, 3)),
    "rmsnorm": (lambda: nn.RMSNorm(5), (3, 4, 5)),
    "rmsnorm-two-dims": (lambda: nn.RMSNorm((4, 5)), (3, 2, 4, 5)),
}


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


@st.composite
def convolutions(draw: st.DrawFn) -> tuple[nn.Module, tuple[int, ...]]:
    """A convolution, transposed or not, of any geometry, and the shape of an input that it takes."""
    spatial = draw(st.integers(1, 2))

    def sizes(low: int, high: int) -> tuple[int, ...]:
        return tuple(draw(st.lists(st.integers(low, high), min_size=spatial, max_size=spatial)))

    kernel, stride, dilation = sizes(1, 3), sizes(1, 3), sizes(1, 3)
    groups = draw(st.integers(1, 3))
    channels = groups * draw(st.integers(1, 2)), groups * draw(st.integers(1, 2))
    common = {"stride": stride, "dilation": dilation, "groups": groups, "bias": draw(st.booleans())}
    positions = sizes(7, 9)
    if draw(st.booleans()):
        padding = tuple(min(p, d * (k - 1)) for p, d, k in zip(sizes(0, 2), dilation, kernel, strict=True))
        extra = tuple(min(e, max(s, d) - 1) for e, s, d in zip(sizes(0, 2), stride, dilation, strict=True))
        transposed = (nn.ConvTranspose1d, nn.ConvTranspose2d)[spatial - 1]
        module: nn.Module = transposed(*channels, kernel, padding=padding, output_padding=extra, **common)  # type: ignore[arg-type]
        positions = tuple(n - 4 for n in positions)
    else:
        mode = draw(st.sampled_from(["zeros", "reflect", "replicate", "circular"]))
        forward = (nn.Conv1d, nn.Conv2d)[spatial - 1]
        module = forward(*channels, kernel, padding=sizes(0, 2), padding_mode=mode, **common)  # type: ignore[arg-type]
    return module, (draw(st.integers(1, 3)), channels[0], *positions)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(case=convolutions(), variant=st.sampled_from(VARIANTS))
def test_convolutions_of_any_geometry(case: tuple[nn.Module, tuple[int, ...]], variant: str) -> None:
    module, shape = case
    follow(module, batch_of(*shape), steps=2, variant=variant, update_interval=1)


# Embeddings.


def tokens(*shape: int, vocabulary: int = 7) -> Batch:
    return lambda generator: (torch.randint(0, vocabulary, shape, generator=generator),)


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


class Twice(nn.Module):
    """Calls one layer on two inputs of different length."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        first: Tensor = self.layer(x)
        return first + 0.5 * self.layer(x[:2].square()).sum(0)


class SharedWeight(nn.Module):
    """Two Linears with one weight; the second may have a bias of its own."""

    def __init__(self, first_bias: bool, second_bias: bool) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4, bias=first_bias), nn.Linear(4, 4, bias=second_bias)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.second(torch.tanh(self.first(x))[:3])
        return out


class TiedLanguageModel(nn.Module):
    """An Embedding whose weight is also that of the output Linear."""

    def __init__(self, bias: bool, padding_idx: int | None = None) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 4, padding_idx=padding_idx)
        self.hidden = nn.Linear(4, 4)
        self.output = nn.Linear(4, 7, bias=bias)
        self.output.weight = self.embedding.weight

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.output(torch.tanh(self.hidden(self.embedding(x))))
        return out


class TiedAutoencoder(nn.Module):
    """The decoder's Linear-like layer has the encoder's weight, transposed."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = nn.Linear(6, 3), Conv1D(6, 3)
        self.decoder.weight = self.encoder.weight  # type: ignore[assignment]

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.decoder(torch.tanh(self.encoder(x)))
        return out


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


class TwoLengths(nn.Module):
    """Calls one layer on sequences of two lengths."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layer(x[:, :2]).sum(1) + self.layer(x).mean(1) + self.layer(x[:, 1:]).mean(1)
        return out


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


class Attention(nn.Module):
    """A block with everything a transformer has, in separate Linears."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 6, padding_idx=0)
        self.norm1, self.norm2 = nn.LayerNorm(6), nn.RMSNorm(6)
        self.query, self.key, self.value = (nn.Linear(6, 6, bias=False) for _ in range(3))
        self.project = Conv1D(6, 6)
        self.up, self.down = nn.Linear(6, 8), nn.Linear(8, 6)
        self.head = nn.Linear(6, 7)

    def forward(self, x: Tensor) -> Tensor:
        h = self.embedding(x)
        n = self.norm1(h)
        attended = nn.functional.scaled_dot_product_attention(self.query(n), self.key(n), self.value(n), is_causal=True)
        h = h + self.project(attended)
        h = h + self.down(nn.functional.gelu(self.up(self.norm2(h))))
        out: Tensor = self.head(h)
        return out


def convolutional() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1, bias=False),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Conv2d(4, 4, 3, stride=2, groups=2, padding=1, padding_mode="circular"),
        nn.GroupNorm(2, 4),
        nn.ReLU(),
        nn.ConvTranspose2d(4, 3, 2, stride=2, bias=False),
        nn.InstanceNorm2d(3, affine=True),
        nn.Flatten(),
        nn.Linear(3 * 6 * 6, 5),
    )


def without_affine() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, bias=False),
        nn.BatchNorm2d(4, affine=False),
        nn.Tanh(),
        nn.Conv2d(4, 3, 2, bias=False),
        nn.InstanceNorm2d(3),
        nn.GroupNorm(1, 3, affine=False),
        nn.Flatten(),
        nn.Linear(3 * 3 * 3, 5),
        nn.LayerNorm(5, elementwise_affine=False),
        nn.Linear(5, 4),
        nn.RMSNorm(4, elementwise_affine=False),
    )


NETWORKS: dict[str, tuple[Callable[[], nn.Module], Batch]] = {
    "convolutional": (convolutional, batch_of(4, 2, 6, 6)),
    "without-affine": (without_affine, batch_of(4, 2, 6, 6)),
    "transformer": (Attention, tokens(3, 5)),
}


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


class Branches(nn.Module):
    """Trunk and two branches, one of which is used in alternate steps."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk, self.left, self.right = nn.Linear(4, 4), nn.Linear(4, 3), nn.Linear(4, 3)
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        branch = self.left if self.calls % 3 else self.right
        out: Tensor = branch(torch.tanh(self.trunk(x)))
        return out


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("interval", [1, 2])
def test_layer_unused_in_some_steps(variant: str, interval: int) -> None:
    torch.manual_seed(0)
    follow(Branches(), batch_of(6, 4), steps=8, variant=variant, update_interval=interval, weight_decay=0.01)


def test_layer_first_used_between_refreshes_has_curvature_1() -> None:
    model = Branches().double()
    optimizer, _ = follow(model, batch_of(6, 4), steps=4, update_interval=4)
    metrics = optimizer.metrics()
    assert metrics["right.weight"]["largest_step"] == metrics["right.weight"]["smallest_step"] == LR["paper"]
    assert metrics["left.weight"]["largest_step"] > LR["paper"]


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


class WithFallback(nn.Module):
    """Three served layers and one that no rule serves."""

    def __init__(self, fallback: nn.Module, call: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.second, self.norm = nn.Linear(4, 6), nn.Conv1d(2, 2, 3, padding=1), nn.LayerNorm(6)
        self.fallback, self.call = fallback, call
        self.last = nn.Linear(6, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(torch.tanh(self.first(x)))
        h = h + self.second(h.unflatten(0, (-1, 2))).flatten(0, 1)
        out: Tensor = self.last(self.call(self.fallback, h))
        return out


class Free(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.randn(6))
        self.scalar = nn.Parameter(torch.tensor(1.5))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale * self.scalar


class Bag(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bag = nn.EmbeddingBag(5, 6)

    def forward(self, x: Tensor) -> Tensor:
        index = torch.arange(len(x) * 2).reshape(-1, 2) % 5
        return x + self.bag(index)


FALLBACKS: dict[str, tuple[Callable[[], nn.Module], Callable[[Any, Tensor], Tensor], tuple[str, ...]]] = {
    "bilinear": (lambda: nn.Bilinear(6, 6, 6), lambda m, x: m(x, x), ("weight", "bias")),
    "embedding-bag": (Bag, lambda m, x: m(x), ("bag.weight",)),
    "attention": (
        lambda: nn.MultiheadAttention(6, 2),
        lambda m, x: m(x, x, x)[0],
        ("in_proj_weight", "in_proj_bias", "out_proj.weight", "out_proj.bias"),
    ),
    "lstm": (
        lambda: nn.LSTM(6, 6),
        lambda m, x: m(x)[0],
        ("weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0"),
    ),
    "free-parameter": (Free, lambda m, x: m(x), ("scale", "scalar")),
    "parametrized": (
        lambda: weight_norm(nn.Linear(6, 6, bias=False)),
        lambda m, x: m(x),
        ("parametrizations.weight.original0", "parametrizations.weight.original1"),
    ),
}


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
