"""Task ``autoencoder``: a deep fully connected autoencoder of the 8 x 8 handwritten digits of scikit-learn.

64 pixels go through 500 and 250 units to a code of 30 and back the same way, a smaller relative of the autoencoders of
Hinton and Salakhutdinov (Science 313, 2006), on which second-order methods are compared, the mini-block Fisher method
among them (arXiv 2202.04124). ``pixels`` has the layers and the loss.

The learning rates below are from a search that docs/tuning.md records, those of AdaFisher's other variants guesses.
"""

from __future__ import annotations

from collections.abc import Iterator

from fisher_kernels.tasks import digit_images, pixels
from fisher_kernels.tasks.task import Batch, Hyperparameters, Task

WIDTHS = (64, 500, 250, 30)

HYPERPARAMETERS: dict[str, Hyperparameters] = {
    "adamw": {"lr": 3e-3, "weight_decay": 1e-2},
    "sgd": {"lr": 0.017, "weight_decay": 5e-4},
    "adafisher": {"lr": 1.7e-3, "weight_decay": 5e-4},
    "adafisherw": {"lr": 1.7e-3, "weight_decay": 1e-2},
    "adafisher:relative": {"lr": 0.17, "weight_decay": 5e-4},
    "adafisher:release": {"lr": 3e-4, "weight_decay": 5e-4},
    "adafisherw:relative": {"lr": 0.3, "weight_decay": 1e-4},
    "mbf": {"lr": 3e-4, "weight_decay": 1e-2},
    "adafisherw:release": {"lr": 3e-4, "weight_decay": 1e-2},
    "sofim": {"lr": 0.17, "weight_decay": 5e-4},
    "kfac": {"lr": 0.055, "weight_decay": 1e-2},
    "ekfac": {"lr": 0.03, "weight_decay": 1e-2},
    "ekfacadam": {"lr": 0.017, "weight_decay": 1e-2},
}


def _batches(seed: int, epoch: int, batch_size: int) -> Iterator[Batch]:
    for images, _ in digit_images.batches(seed, epoch, batch_size):
        flat = images.flatten(1)  # [N, 64]
        yield flat, flat


TASK = Task(
    name="autoencoder",
    summary="deep fully connected ReLU autoencoder of the 8 x 8 digits of scikit-learn",
    metric=pixels.METRIC,
    also=pixels.ALSO,
    epochs=20,
    batch_size=32,
    make_model=lambda seed: pixels.make_model(WIDTHS, seed),
    batches=_batches,
    steps_per_epoch=digit_images.steps_per_epoch,
    criterion=pixels.cross_entropy,
    distribution="bernoulli",
    evaluate=lambda model: pixels.evaluate(model, digit_images.load()[1][0].flatten(1)),
    hyperparameters=HYPERPARAMETERS,
    # As for the other task on these images.
    threads=1,
)
