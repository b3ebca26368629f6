"""Layers and networks of every kind, inputs and a loss for them, and how their moves are compared."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm


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


def assert_same_moves(model: nn.Module, twin: nn.Module, start: dict[str, Tensor], tolerance: float) -> None:
    """How far each parameter of a model has moved from its start, against its twin's."""
    for (name, p), (_, q) in zip(model.named_parameters(), twin.named_parameters(), strict=True):
        ours, wanted = (p - start[name]).detach(), (q - start[name]).detach()
        longest = wanted.abs().max()
        assert bool(wanted.isfinite().all()), name
        error = float((ours - wanted).abs().max() / longest.clamp(min=1e-300))
        assert error <= tolerance, f"{name}: off by {error:.1e} of its longest move {float(longest):.1e}"


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


def tokens(*shape: int, vocabulary: int = 7) -> Batch:
    return lambda generator: (torch.randint(0, vocabulary, shape, generator=generator),)


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


class TwoLengths(nn.Module):
    """Calls one layer on sequences of two lengths."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layer(x[:, :2]).sum(1) + self.layer(x).mean(1) + self.layer(x[:, 1:]).mean(1)
        return out


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


class Matrix(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.randn(6, 6))

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("oi,...i->...o", self.matrix, x)


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
    "matrix": (Matrix, lambda m, x: m(x), ("matrix",)),
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
