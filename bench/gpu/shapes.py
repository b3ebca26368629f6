"""Shapes of the parameters of whole models, scaled to a number of parameters by width and depth."""

from __future__ import annotations

import math
from collections.abc import Sequence

Shape = tuple[int, ...]


def resnet(width: int) -> list[Shape]:
    """A ResNet-50 (He et al., arXiv 1512.03385) whose first stage has ``width`` channels; 64 are the original's."""
    shapes: list[Shape] = [(width, 3, 7, 7), (width,), (width,)]
    inputs = width
    for stage, blocks in enumerate((3, 4, 6, 3)):
        inner = width << stage
        for block in range(blocks):
            shapes += _convolution(inner, inputs, 1) + _convolution(inner, inner, 3) + _convolution(4 * inner, inner, 1)
            if block == 0:
                shapes += _convolution(4 * inner, inputs, 1)
            inputs = 4 * inner
    return [*shapes, (1000, inputs), (1000,)]


def _convolution(outputs: int, inputs: int, size: int) -> list[Shape]:
    """A convolution and the batch normalisation behind it."""
    return [(outputs, inputs, size, size), (outputs,), (outputs,)]


def transformer(width: int, depth: int, inner: int, tokens: int) -> list[Shape]:
    """Blocks of a Transformer, with queries, keys and values in one Linear, and a table of ``tokens`` rows."""
    block: list[Shape] = [
        *((width,), (width,)),
        *((3 * width, width), (3 * width,), (width, width), (width,)),
        *((width,), (width,)),
        *((inner, width), (inner,), (width, inner), (width,)),
    ]
    return [(tokens, width), *(block * depth), (width,), (width,)]


def models(tiny: bool) -> dict[str, list[Shape]]:
    """Three models of about 1e9 parameters."""
    if tiny:
        return {"ResNet": resnet(4), "ViT": transformer(8, 2, 32, 20), "GPT": transformer(8, 2, 32, 50)}
    return {
        "ResNet": resnet(416),
        "ViT": transformer(1408, 40, 6144, 257),  # ViT-g, arXiv 2106.04560
        "GPT": transformer(1536, 34, 6144, 50_257),  # GPT-2 (Radford et al., 2019), between Large and XL
    }


def size(shapes: Sequence[Shape]) -> int:
    """Parameters in all."""
    return sum(map(math.prod, shapes))
