"""Task ``autoencoder``: a deep fully connected autoencoder of the 8 x 8 handwritten digits of scikit-learn.

64 pixels go through 500 and 250 units to a code of 30 and back the same way. As in the autoencoders of Hinton and
Salakhutdinov (Science 313, 2006), on which second-order methods are compared, the mini-block Fisher method among them
(arXiv 2202.04124), the code is linear and the loss is the binary cross-entropy of the pixels, whose intensities in
[0, 1] count as probabilities: summed over the pixels of an image, averaged over images. The hidden units are ReLU. A
sum over pixels has gradients 64 times those of their mean.

The learning rates below are the best of a grid that docs/tuning.md records in full.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fisher_kernels.tasks import digit_images
from fisher_kernels.tasks.task import Batch, Figures, Metric, Task, evaluation, seeded

WIDTHS = (64, 500, 250, 30)

HYPERPARAMETERS = {
    "adamw": {"lr": 3e-3, "weight_decay": 1e-2},
    "sgd": {"lr": 3e-2, "weight_decay": 5e-4},
    "adafisher": {"lr": 3e-3, "weight_decay": 5e-4},
    "adafisherw": {"lr": 3e-3, "weight_decay": 1e-2},
    "adafisher:relative": {"lr": 0.3, "weight_decay": 5e-4},
    "adafisher:release": {"lr": 3e-4, "weight_decay": 5e-4},
    "adafisherw:relative": {"lr": 0.3, "weight_decay": 1e-4},
    "mbf": {"lr": 1e-4, "weight_decay": 1e-2},
    "adafisherw:release": {"lr": 3e-4, "weight_decay": 1e-2},
    "sofim": {"lr": 0.3, "weight_decay": 5e-4},
}


def _perceptron(widths: tuple[int, ...]) -> list[nn.Module]:
    """Linear layers with a ReLU after each, of which the caller drops the last."""
    return [layer for sizes in pairwise(widths) for layer in (nn.Linear(*sizes), nn.ReLU(inplace=True))]


def _make_model(seed: int) -> nn.Module:
    encoder, decoder = WIDTHS, WIDTHS[::-1]
    # Neither the code nor the logits of the pixels pass through a ReLU.
    return seeded(seed, lambda: nn.Sequential(*_perceptron(encoder)[:-1], *_perceptron(decoder)[:-1]))


def _batches(seed: int, epoch: int, batch_size: int) -> Iterator[Batch]:
    for images, _ in digit_images.batches(seed, epoch, batch_size):
        pixels = images.flatten(1)  # [N, 64]
        yield pixels, pixels


def _cross_entropy(logits: Tensor, pixels: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(logits, pixels, reduction="sum") / len(pixels)


def _loss(model: nn.Module, batch: Batch) -> Tensor:
    pixels, targets = batch
    return _cross_entropy(model(pixels), targets)


def _evaluate(model: nn.Module) -> Figures:
    """Cross-entropy and squared error of the test images."""
    pixels = digit_images.load()[1][0].flatten(1)
    with evaluation(model):
        logits = model(pixels)
        squared_error = F.mse_loss(torch.sigmoid(logits), pixels, reduction="sum") / len(pixels)
        return Figures(float(_cross_entropy(logits, pixels)), float(squared_error))


TASK = Task(
    name="autoencoder",
    summary="deep fully connected ReLU autoencoder of the 8 x 8 digits of scikit-learn",
    metric=Metric("test loss", "nats/image", higher_is_better=False, decimals=2),
    also=Metric("test squared error", "per image", higher_is_better=False, decimals=2),
    epochs=20,
    batch_size=32,
    make_model=_make_model,
    batches=_batches,
    steps_per_epoch=digit_images.steps_per_epoch,
    loss=_loss,
    evaluate=_evaluate,
    hyperparameters=HYPERPARAMETERS,
    # As for the other task on these images.
    threads=1,
)
