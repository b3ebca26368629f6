"""Task ``digits``: a small CNN with BatchNorm on the 8 x 8 handwritten digits that come with scikit-learn.

1,400 images train, the other 397 test. The 1,797 images are shuffled once, with a fixed seed of their own, because the
file is ordered by writer. The learning rates below are the best of a grid that docs/tuning.md records in full.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import cache

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fisher_kernels.tasks.task import Batch, Metric, Task, require, seeded, shuffled

TRAINING_IMAGES = 1400

HYPERPARAMETERS = {
    "adamw": {"lr": 3e-3, "weight_decay": 1e-2},
    "sgd": {"lr": 3e-2, "weight_decay": 5e-4},
    "adafisher": {"lr": 3e-3, "weight_decay": 5e-4},
    "adafisherw": {"lr": 3e-3, "weight_decay": 1e-2},
    "adafisher:relative": {"lr": 0.3, "weight_decay": 5e-4},
    "adafisher:release": {"lr": 1e-3, "weight_decay": 5e-4},
    "adafisherw:relative": {"lr": 0.3, "weight_decay": 1e-4},
    "adafisherw:release": {"lr": 1e-3, "weight_decay": 1e-2},
}


@cache
def _load() -> tuple[Batch, Batch]:
    """(images [N, 1, 8, 8] in [0, 1], labels [N]) for training and for testing."""
    bunch = require("sklearn.datasets", "scikit-learn", "the digits task").load_digits()
    images = torch.from_numpy(bunch.images).float().div_(16).unsqueeze(1)
    labels = torch.from_numpy(bunch.target).long()
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    training, test = order[:TRAINING_IMAGES], order[TRAINING_IMAGES:]
    return (images[training], labels[training]), (images[test], labels[test])


def _convolution(inputs: int, outputs: int) -> list[nn.Module]:
    return [nn.Conv2d(inputs, outputs, kernel_size=3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)]


def _make_model(seed: int) -> nn.Module:
    return seeded(
        seed,
        lambda: nn.Sequential(
            *_convolution(1, 32),
            *_convolution(32, 64),
            nn.MaxPool2d(2),  # [N, 64, 4, 4]
            *_convolution(64, 64),
            nn.MaxPool2d(2),  # [N, 64, 2, 2]
            nn.Flatten(),
            nn.Linear(256, 64),
            nn.ReLU(inplace=True),
            nn.Linear(64, 10),
        ),
    )


def _batches(seed: int, epoch: int, batch_size: int) -> Iterator[Batch]:
    images, labels = _load()[0]
    for indices in torch.split(shuffled(len(labels), seed, epoch), batch_size):
        yield images[indices], labels[indices]


def _steps_per_epoch(batch_size: int) -> int:
    return math.ceil(TRAINING_IMAGES / batch_size)


def _loss(model: nn.Module, batch: Batch) -> Tensor:
    images, labels = batch
    return F.cross_entropy(model(images), labels)


@torch.no_grad()
def _evaluate(model: nn.Module) -> float:
    """Share of the test images that are recognised, in per cent."""
    images, labels = _load()[1]
    was_training = model.training
    model.eval()
    accuracy: Tensor = (model(images).argmax(dim=1) == labels).float().mean()
    model.train(was_training)
    return 100 * float(accuracy)


TASK = Task(
    name="digits",
    summary="CNN with BatchNorm on the 8 x 8 digits of scikit-learn",
    metric=Metric("test accuracy", "%", higher_is_better=True, decimals=2),
    epochs=8,
    batch_size=64,
    make_model=_make_model,
    batches=_batches,
    steps_per_epoch=_steps_per_epoch,
    loss=_loss,
    evaluate=_evaluate,
    hyperparameters=HYPERPARAMETERS,
    # Layers this small gain little from a second thread, and wait for it long where other work shares the processor.
    threads=1,
)
