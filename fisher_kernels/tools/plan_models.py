"""The layers of published architectures, on no device: what a plan needs to know of a model are its shapes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import torch
from torch import nn

from fisher_kernels.tools import user_model


def _decoder_block(width: int, kv_width: int, hidden: int) -> nn.Module:
    sizes = {"q": (width, width), "k": (width, kv_width), "v": (width, kv_width), "out": (width, width)}
    sizes |= {"gate": (width, hidden), "up": (width, hidden), "down": (hidden, width)}
    layers: dict[str, nn.Module] = {name: nn.Linear(*size, bias=False) for name, size in sizes.items()}
    return nn.ModuleDict({**layers, "attention_norm": nn.RMSNorm(width), "norm": nn.RMSNorm(width)})


def llama_8b() -> nn.Module:
    """A decoder of 32 blocks of width 4096, as Llama 3 8B has them: 8.03e9 parameters."""
    blocks = [_decoder_block(4096, 1024, 14336) for _ in range(32)]
    ends = nn.Embedding(128256, 4096), nn.RMSNorm(4096), nn.Linear(4096, 128256, bias=False)
    return nn.ModuleList([ends[0], *blocks, *ends[1:]])


def vit_l() -> nn.Module:
    """A vision transformer of 24 blocks of width 1024, as ViT-L/16 has them: 3.04e8 parameters."""

    def block() -> nn.Module:
        sizes = {"qkv": (1024, 3072), "out": (1024, 1024), "up": (1024, 4096), "down": (4096, 1024)}
        layers: dict[str, nn.Module] = {name: nn.Linear(*size) for name, size in sizes.items()}
        return nn.ModuleDict({**layers, "attention_norm": nn.LayerNorm(1024), "norm": nn.LayerNorm(1024)})

    patches, head = nn.Conv2d(3, 1024, 16, 16), nn.Linear(1024, 1000)
    return nn.ModuleList([patches, *(block() for _ in range(24)), nn.LayerNorm(1024), head])


def resnet50() -> nn.Module:
    """The 53 convolutions of ResNet-50, each with BatchNorm, and its Linear layer: 2.56e7 parameters."""

    def convolution(inputs: int, outputs: int, size: int) -> Iterator[nn.Module]:
        yield nn.Conv2d(inputs, outputs, size, bias=False)
        yield nn.BatchNorm2d(outputs)

    layers = [*convolution(3, 64, 7)]
    inputs = 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            if block == 0:
                layers += convolution(inputs, 4 * width, 1)
            for sizes in ((inputs, width, 1), (width, width, 3), (width, 4 * width, 1)):
                layers += convolution(*sizes)
            inputs = 4 * width
    return nn.ModuleList([*layers, nn.Linear(2048, 1000)])


MODELS: Mapping[str, Callable[[], nn.Module]] = {"llama-8b": llama_8b, "vit-l": vit_l, "resnet50": resnet50}


def find(target: str) -> nn.Module:
    """A model of ``MODELS``, or what a user's function makes, without memory for its parameters where it can be.

    Raises:
        ValueError: there is no such model or function, or it makes something else.
    """
    with torch.device("meta"):
        if target in MODELS:
            return MODELS[target]()
        if ":" not in target:
            raise ValueError(f"is {target!r}, expected {', '.join(MODELS)} or PACKAGE.MODULE:FUNCTION")
        return user_model.load(target).model
