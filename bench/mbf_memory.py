"""The state of MBF on four models, as the table of docs/optimizers/mbf.md has it: ``python -m bench.mbf_memory``.

The optimizer makes its state for models without memory (device "meta") and its sizes are added up.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fisher_kernels import MBF
from fisher_kernels.tools.markdown import markdown_table

OPTIONS: Mapping[str, dict[str, Any]] = {
    "shared": {},
    "packed": {"inverse_storage": "packed"},
    "bfloat16": {"inverse_storage": "bfloat16"},
    "128 columns": {"linear_blocks": 128},
    "16 columns": {"linear_blocks": 16},
    "per_output": {"linear_blocks": "per_output"},
}


def residual(inputs: int, outputs: int, stride: int) -> nn.ModuleList:
    """A basic block of a ResNet."""
    layers = [
        nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False),
        nn.BatchNorm2d(outputs),
        nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False),
        nn.BatchNorm2d(outputs),
    ]
    if stride != 1:
        layers += [nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)]
    return nn.ModuleList(layers)


def resnet18() -> nn.Module:
    """He et al., arXiv 1512.03385: 11,689,512 parameters."""
    stages = [(64, 64, 1), (64, 128, 2), (128, 256, 2), (256, 512, 2)]
    blocks = [block for i, o, s in stages for block in (residual(i, o, s), residual(o, o, 1))]
    return nn.ModuleList([nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64), *blocks, nn.Linear(512, 1000)])


def vgg16() -> nn.Module:
    """Simonyan and Zisserman, arXiv 1409.1556: 138,357,544 parameters."""
    channels = [3, 64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 512, 512]
    convolutions = [nn.Conv2d(i, o, 3, padding=1) for i, o in itertools.pairwise(channels)]
    return nn.ModuleList([*convolutions, nn.Linear(512 * 7 * 7, 4096), nn.Linear(4096, 4096), nn.Linear(4096, 1000)])


def mlp() -> nn.Module:
    """784-1000-1000-10."""
    return nn.Sequential(nn.Linear(784, 1000), nn.Linear(1000, 1000), nn.Linear(1000, 10))


def vit_small() -> nn.Module:
    """ViT-S/16 of 12 blocks of width 384 (arXiv 2010.11929, 2106.10270), with query, key and value in one Linear."""
    width = 384

    def block() -> nn.Module:
        return nn.Sequential(
            nn.LayerNorm(width),
            nn.Linear(width, 3 * width),
            nn.Linear(width, width),
            nn.LayerNorm(width),
            nn.Linear(width, 4 * width),
            nn.Linear(4 * width, width),
        )

    model = nn.Sequential(nn.Conv2d(3, width, 16, 16), *(block() for _ in range(12)), nn.LayerNorm(width))
    model.append(nn.Linear(width, 1000))
    model.register_parameter("positions", nn.Parameter(torch.zeros(197, width)))
    model.register_parameter("class_token", nn.Parameter(torch.zeros(width)))
    return model


MODELS: Mapping[str, Callable[[], nn.Module]] = {
    "ResNet-18": resnet18,
    "VGG-16": vgg16,
    "MLP 784-1000-1000-10": mlp,
    "ViT-S/16": vit_small,
}


@torch.no_grad()
def state_bytes(model: nn.Module, **options: Any) -> int:
    """Of all the state that the first step makes."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        optimizer = MBF(model, **options)
    for p in model.parameters():
        p.grad = torch.empty_like(p)
    optimizer._prepare()
    optimizer.close()
    states = [value for entries in optimizer.state.values() for value in entries.values()]
    return sum(v.numel() * v.element_size() for v in states if isinstance(v, Tensor))


def main() -> None:
    rows = []
    for name, build in MODELS.items():
        with torch.device("meta"):
            model = build()
        count = sum(p.numel() for p in model.parameters())
        sizes = [state_bytes(model, **options) for options in OPTIONS.values()]
        cells = [f"{size / 2**20:,.0f} ({size / count:,.1f})" for size in (8 * count, *sizes)]
        rows.append((name, f"{count:,}", *cells))
    print(markdown_table(("model", "parameters", "AdamW", *OPTIONS), rows), end="")


if __name__ == "__main__":
    main()
