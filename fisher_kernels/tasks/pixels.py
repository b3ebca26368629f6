"""What the autoencoders of images share: their layers, and the loss in nats.

The code is linear and the other units are ReLU. The loss is the binary cross-entropy of the pixels, whose intensities
in [0, 1] count as probabilities: summed over the pixels of an image, averaged over images. A sum over pixels has
gradients as many times those of their mean.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fisher_kernels.tasks.task import Figures, Metric, evaluation, seeded

METRIC = Metric("test loss", "nats/image", higher_is_better=False, decimals=2)
ALSO = Metric("test squared error", "per image", higher_is_better=False, decimals=2)


def make_model(widths: tuple[int, ...], seed: int) -> nn.Module:
    """Linear layers from the pixels to the code, ``widths``, and back; it yields the logits of the pixels."""
    # Neither the code nor the logits of the pixels pass through a ReLU.
    return seeded(seed, lambda: nn.Sequential(*_perceptron(widths)[:-1], *_perceptron(widths[::-1])[:-1]))


def _perceptron(widths: tuple[int, ...]) -> list[nn.Module]:
    """Linear layers with a ReLU after each, of which the caller drops the last."""
    return [layer for sizes in pairwise(widths) for layer in (nn.Linear(*sizes), nn.ReLU(inplace=True))]


def cross_entropy(logits: Tensor, pixels: Tensor) -> Tensor:
    """The loss, in nats per image."""
    return F.binary_cross_entropy_with_logits(logits, pixels, reduction="sum") / len(pixels)


def evaluate(model: nn.Module, pixels: Tensor) -> Figures:
    """Cross-entropy and squared error of images [N, pixels]."""
    with evaluation(model):
        logits = model(pixels)
        squared_error = F.mse_loss(torch.sigmoid(logits), pixels, reduction="sum") / len(pixels)
        return Figures(float(cross_entropy(logits, pixels)), float(squared_error))
