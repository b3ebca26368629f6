"""Architectures written in torch alone, each in two sizes."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import weight_norm

from tests.zoo.architecture import Architecture, Batch


class Tagger(nn.Module):
    """A recurrent layer between word embeddings and one label for each word."""

    def __init__(
        self, layer: type[nn.LSTM] | type[nn.GRU], vocabulary: int, width: int, hidden: int, tags: int
    ) -> None:
        super().__init__()
        self.words = nn.Embedding(vocabulary, width, padding_idx=0)
        self.recurrent = layer(width, hidden, batch_first=True, bidirectional=True)
        self.dropout = nn.Dropout(0.5)
        self.tags = nn.Linear(2 * hidden, tags)

    def forward(self, x: Tensor) -> Tensor:
        x = self.words(x)
        with torch.backends.mkldnn.flags(enabled=False):  # has no LSTM in bfloat16 for every processor
            x = self.recurrent(x)[0]
        out: Tensor = self.tags(self.dropout(x))
        return out


class Translator(nn.Module):
    """torch's Transformer between embeddings, with the positions of sines and the output tied to the target's."""

    def __init__(self, vocabulary: int, width: int, heads: int, layers: int, hidden: int) -> None:
        super().__init__()
        self.source, self.target = nn.Embedding(vocabulary, width), nn.Embedding(vocabulary, width)
        self.transformer = nn.Transformer(width, heads, layers, layers, hidden, batch_first=True)
        self.output = nn.Linear(width, vocabulary, bias=False)
        self.output.weight = self.target.weight

    def _positions(self, like: Tensor) -> Tensor:
        place = torch.arange(like.shape[1], dtype=like.dtype, device=like.device).unsqueeze(1)
        rates = 1e4 ** (-torch.arange(0, like.shape[2], 2, dtype=like.dtype, device=like.device) / like.shape[2])
        return torch.stack((torch.sin(place * rates), torch.cos(place * rates)), -1).flatten(1)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        x, y = self.source(source), self.target(target)
        mask = nn.Transformer.generate_square_subsequent_mask(y.shape[1], device=y.device, dtype=y.dtype)
        out = self.transformer(x + self._positions(x), y + self._positions(y), tgt_mask=mask, tgt_is_causal=True)
        logits: Tensor = self.output(out)
        return logits


class MixerLayer(nn.Module):
    """Two perceptrons, one over patches and one over channels."""

    def __init__(self, patches: int, width: int, over_patches: int, over_channels: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList([nn.LayerNorm(width), nn.LayerNorm(width)])
        self.patches = nn.Sequential(nn.Linear(patches, over_patches), nn.GELU(), nn.Linear(over_patches, patches))
        self.channels = nn.Sequential(nn.Linear(width, over_channels), nn.GELU(), nn.Linear(over_channels, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.patches(self.norms[0](x).mT).mT
        out: Tensor = x + self.channels(self.norms[1](x))
        return out


class Mixer(nn.Module):
    """MLP-Mixer."""

    def __init__(
        self, size: int, patch: int, width: int, layers: int, over_patches: int, over_channels: int, classes: int
    ) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, patch, stride=patch)
        patches = (size // patch) ** 2
        self.layers = nn.Sequential(*(MixerLayer(patches, width, over_patches, over_channels) for _ in range(layers)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.norm(self.layers(self.stem(x).flatten(2).mT)).mean(1))
        return out


def _twice(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, padding=1),
        nn.ReLU(inplace=True),
        nn.Conv2d(outputs, outputs, 3, padding=1),
        nn.ReLU(inplace=True),
    )


class UNet(nn.Module):
    """U-Net: down by pooling, up by transposed convolutions, and a bridge at each size."""

    def __init__(self, widths: tuple[int, ...], classes: int) -> None:
        super().__init__()
        self.down = nn.ModuleList(_twice(a, b) for a, b in zip((1, *widths), widths, strict=False))
        pairs = list(zip(widths[:0:-1], widths[-2::-1], strict=True))
        self.up = nn.ModuleList(nn.ConvTranspose2d(a, b, 2, stride=2) for a, b in pairs)
        self.merge = nn.ModuleList(_twice(a, b) for a, b in pairs)
        self.head = nn.Conv2d(widths[0], classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        bridges = []
        for block in self.down:
            x = block(F.max_pool2d(x, 2) if bridges else x)
            bridges.append(x)
        for up, merge, bridge in zip(self.up, self.merge, bridges[-2::-1], strict=True):
            x = merge(torch.cat((bridge, up(x)), 1))
        out: Tensor = self.head(x)
        return out


class CausalBlock(nn.Module):
    """Two weight-normed convolutions that see the past alone."""

    def __init__(self, inputs: int, outputs: int, kernel: int, dilation: int) -> None:
        super().__init__()
        self.past = (kernel - 1) * dilation
        self.first = weight_norm(nn.Conv1d(inputs, outputs, kernel, dilation=dilation))
        self.second = weight_norm(nn.Conv1d(outputs, outputs, kernel, dilation=dilation))
        self.across = nn.Conv1d(inputs, outputs, 1) if inputs != outputs else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        out = torch.relu(self.first(F.pad(x, (self.past, 0))))
        out = torch.relu(self.second(F.pad(out, (self.past, 0))))
        return torch.relu(out + self.across(x))


class TemporalNetwork(nn.Module):
    """A temporal convolutional network that predicts the next character."""

    def __init__(self, vocabulary: int, width: int, hidden: int, layers: int, kernel: int) -> None:
        super().__init__()
        self.characters = nn.Embedding(vocabulary, width)
        widths = (width, *[hidden] * (layers - 1), width)
        pairs = itertools.pairwise(widths)
        self.blocks = nn.Sequential(*(CausalBlock(a, b, kernel, 2**i) for i, (a, b) in enumerate(pairs)))
        self.output = nn.Linear(width, vocabulary)
        self.output.weight = self.characters.weight

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.output(self.blocks(self.characters(x).mT).mT)
        return out


class Generator(nn.Module):
    """The generator of a DCGAN."""

    def __init__(self, latent: int, width: int, doublings: int) -> None:
        super().__init__()
        widths = [width << (doublings - i) for i in range(doublings + 1)]
        layers: list[nn.Module] = [nn.ConvTranspose2d(latent, widths[0], 4, bias=False)]
        for a, b in itertools.pairwise(widths):
            layers += [nn.BatchNorm2d(a), nn.ReLU(True), nn.ConvTranspose2d(a, b, 4, 2, 1, bias=False)]
        layers += [nn.BatchNorm2d(width), nn.ReLU(True), nn.ConvTranspose2d(width, 3, 4, 2, 1, bias=False), nn.Tanh()]
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layers(x)
        return out


class VGG(nn.Module):
    """VGG: convolutions of 3 x 3 between poolings, then three wide Linear layers."""

    def __init__(self, stages: tuple[tuple[int, ...], ...], size: int, hidden: int, classes: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        inputs = 3
        for stage in stages:
            for outputs in stage:
                layers += [nn.Conv2d(inputs, outputs, 3, padding=1), nn.ReLU(inplace=True)]
                inputs = outputs
            layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers)
        flat = inputs * (size >> len(stages)) ** 2
        self.classifier = nn.Sequential(
            nn.Linear(flat, hidden),
            nn.ReLU(inplace=True),
            nn.Dropout(),
            nn.Linear(hidden, hidden),
            nn.ReLU(inplace=True),
            nn.Dropout(),
            nn.Linear(hidden, classes),
        )

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.classifier(self.features(x).flatten(1))
        return out


class StandardisedConv(nn.Conv2d):
    """A convolution with weights of mean 0 and variance 1 over each window, times a learned gain."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.gain = nn.Parameter(torch.ones(self.out_channels, 1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        variance, mean = torch.var_mean(self.weight, (1, 2, 3), keepdim=True)
        weight = self.gain * (self.weight - mean) / (variance * self.weight[0].numel() + 1e-4).sqrt()
        return F.conv2d(x, weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


class NormalizerFree(nn.Module):
    """A residual network without norms, whose convolutions standardise their weights."""

    def __init__(self, widths: tuple[int, ...], depths: tuple[int, ...], group: int, classes: int) -> None:
        super().__init__()
        self.stem = StandardisedConv(3, widths[0] // 2, 3, stride=2, padding=1)
        blocks: list[nn.Module] = []
        inputs = widths[0] // 2
        for width, depth in zip(widths, depths, strict=True):
            for i in range(depth):
                blocks.append(self._block(inputs, width, group, 2 if i == 0 else 1))
                inputs = width
        self.blocks = nn.ModuleList(blocks)
        self.head = nn.Linear(inputs, classes)

    @staticmethod
    def _block(inputs: int, width: int, group: int, stride: int) -> nn.ModuleDict:
        middle = width // 2
        path = nn.Sequential(
            nn.GELU(),
            StandardisedConv(inputs, middle, 1),
            nn.GELU(),
            StandardisedConv(middle, middle, 3, stride=stride, padding=1, groups=middle // group),
            nn.GELU(),
            StandardisedConv(middle, width, 1),
        )
        around: nn.Module = nn.Identity()
        if stride > 1 or inputs != width:
            around = nn.Sequential(nn.AvgPool2d(stride, ceil_mode=True), StandardisedConv(inputs, width, 1))
        return nn.ModuleDict({"path": path, "around": around})

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            assert isinstance(block, nn.ModuleDict)
            x = block["around"](x) + 0.2 * block["path"](x)
        out: Tensor = self.head(F.gelu(x).mean((2, 3)))
        return out


def _tokens(vocabulary: int, *shape: int) -> Callable[[torch.Generator], Batch]:
    return lambda generator: {"x": torch.randint(0, vocabulary, shape, generator=generator)}


def _numbers(*shape: int) -> Callable[[torch.Generator], Batch]:
    return lambda generator: {"x": torch.randn(shape, generator=generator)}


def _two_sequences(generator: torch.Generator) -> Batch:
    tokens = torch.randint(0, 40, (2, 2, 7), generator=generator)
    return {"source": tokens[0], "target": tokens[1, :, :6]}


RECURRENT = "torch's recurrent layers hide what their weights multiply"
REPARAMETRISED = "the weights of the convolutions are computed from the parameters"

MODELS: dict[str, Architecture] = {
    "lstm-tagger": Architecture(
        "BiLSTM tagger, 20,000 words",
        "widths of arXiv 1603.01360",
        lambda small: Tagger(nn.LSTM, *((50, 8, 6, 5) if small else (20000, 100, 100, 17))),
        _tokens(50, 3, 7),
        exempt=RECURRENT,
        expected=0.90,
    ),
    "gru-tagger": Architecture(
        "BiGRU tagger, 20,000 words",
        "widths of arXiv 1603.01360",
        lambda small: Tagger(nn.GRU, *((50, 8, 6, 5) if small else (20000, 100, 100, 17))),
        _tokens(50, 3, 7),
        exempt=RECURRENT,
        expected=0.90,
    ),
    "torch-transformer": Architecture(
        "Transformer (base)",
        "arXiv 1706.03762",
        lambda small: Translator(*((40, 16, 4, 2, 24) if small else (37000, 512, 8, 6, 2048))),
        _two_sequences,
    ),
    "mlp-mixer": Architecture(
        "Mixer-B/16",
        "arXiv 2105.01601",
        lambda small: Mixer(*((8, 4, 12, 2, 6, 20, 5) if small else (224, 16, 768, 12, 384, 3072, 1000))),
        _numbers(3, 3, 8, 8),
    ),
    "unet": Architecture(
        "U-Net",
        "arXiv 1505.04597",
        lambda small: UNet(*(((4, 8, 16), 2) if small else ((64, 128, 256, 512, 1024), 2))),
        _numbers(2, 1, 12, 12),
    ),
    "tcn": Architecture(
        "TCN (characters of the Penn Treebank)",
        "arXiv 1803.01271",
        lambda small: TemporalNetwork(*((20, 8, 10, 2, 3) if small else (49, 100, 450, 3, 3))),
        _tokens(20, 3, 9),
        exempt=REPARAMETRISED,
        expected=0.0,
    ),
    "dcgan": Architecture(
        "DCGAN generator",
        "arXiv 1511.06434",
        lambda small: Generator(*((6, 4, 2) if small else (100, 128, 3))),
        _numbers(3, 6, 1, 1),
    ),
    "vgg": Architecture(
        "VGG-16",
        "arXiv 1409.1556",
        lambda small: VGG(
            *(
                (((4,), (6, 6)), 8, 10, 5)
                if small
                else (((64,) * 2, (128,) * 2, (256,) * 3, (512,) * 3, (512,) * 3), 224, 4096, 1000)
            )
        ),
        _numbers(3, 3, 8, 8),
    ),
    "normalizer-free": Architecture(
        "ResNet without norms, of the widths of NFNet-F0",
        "arXiv 2102.06171",
        lambda small: NormalizerFree(
            *(((8, 12), (1, 2), 2, 5) if small else ((256, 512, 1536, 1536), (1, 2, 6, 3), 128, 1000))
        ),
        _numbers(3, 3, 12, 12),
        exempt=REPARAMETRISED,
        expected=0.0,
    ),
}
