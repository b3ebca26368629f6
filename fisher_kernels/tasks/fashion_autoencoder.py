"""Task ``fashion-autoencoder``: a deep autoencoder of Fashion-MNIST.

784 pixels go through 1000, 500 and 250 units to a code of 30 and back the same way: the autoencoder of MNIST of Hinton
and Salakhutdinov (Science 313, 2006), on which second-order methods are compared, on images that are harder. Units and
loss are those of the task ``autoencoder``. The learning rates below are from a search that docs/tuning.md records,
those of AdaFisher's other variants guesses.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from fisher_kernels.tasks import fashion_images, pixels
from fisher_kernels.tasks.task import Batch, Figures, Hyperparameters, Task

WIDTHS = (784, 1000, 500, 250, 30)

HYPERPARAMETERS: dict[str, Hyperparameters] = {
    "adamw": {"lr": 1e-3, "weight_decay": 1e-2},
    "sgd": {"lr": 3e-3, "weight_decay": 5e-4},
    "adafisher": {"lr": 3e-4, "weight_decay": 5e-4},
    "adafisherw": {"lr": 3e-4, "weight_decay": 1e-2},
    "adafisher:relative": {"lr": 0.03, "weight_decay": 5e-4},
    "adafisher:release": {"lr": 1e-4, "weight_decay": 5e-4},
    "adafisherw:relative": {"lr": 0.1, "weight_decay": 1e-4},
    "adafisherw:release": {"lr": 1e-4, "weight_decay": 1e-2},
    "mbf": {"lr": 0.01, "weight_decay": 1e-2},
    "sofim": {"lr": 10, "weight_decay": 5e-4},
    "kfac": {"lr": 0.17, "weight_decay": 1e-2},
    "ekfac": {"lr": 0.03, "weight_decay": 1e-2},
    "ekfacadam": {"lr": 1e-2, "weight_decay": 1e-2},
}


def _batches(seed: int, epoch: int, batch_size: int) -> Iterator[Batch]:
    for images, _ in fashion_images.batches(seed, epoch, batch_size):
        flat = images.flatten(1)  # [N, 784]
        yield flat, flat


def _evaluate(model: nn.Module) -> Figures:
    images = fashion_images.in_float(fashion_images.load()[1][0]).flatten(1)
    return pixels.evaluate(model, images)


TASK = Task(
    name="fashion-autoencoder",
    summary="deep fully connected ReLU autoencoder of the 28 x 28 images of Fashion-MNIST",
    metric=pixels.METRIC,
    also=pixels.ALSO,
    epochs=5,
    batch_size=256,
    make_model=lambda seed: pixels.make_model(WIDTHS, seed),
    batches=_batches,
    steps_per_epoch=fashion_images.steps_per_epoch,
    criterion=pixels.cross_entropy,
    distribution="bernoulli",
    evaluate=_evaluate,
    hyperparameters=HYPERPARAMETERS,
    threads=1,
)
