"""Task ``fashion``: a CNN with BatchNorm on Fashion-MNIST.

Three convolutions of 16, 32 and 64 channels, each with BatchNorm, ReLU and pooling, and two Linear layers. The learning
rates below are from a search that docs/tuning.md records, those of AdaFisher's other variants guesses.
"""

from __future__ import annotations

from torch import nn
from torch.nn import functional as F

from fisher_kernels.tasks import fashion_images
from fisher_kernels.tasks.task import Figures, Hyperparameters, Metric, Task, evaluation, seeded

HYPERPARAMETERS: dict[str, Hyperparameters] = {
    "adamw": {"lr": 0.0055, "weight_decay": 1e-2},
    "sgd": {"lr": 0.03, "weight_decay": 5e-4},
    "adafisher": {"lr": 0.0017, "weight_decay": 5e-4},
    "adafisherw": {"lr": 0.0017, "weight_decay": 1e-2},
    "adafisher:relative": {"lr": 0.3, "weight_decay": 5e-4},
    "adafisher:release": {"lr": 1e-3, "weight_decay": 5e-4},
    "adafisherw:relative": {"lr": 0.3, "weight_decay": 1e-4},
    "adafisherw:release": {"lr": 1e-3, "weight_decay": 1e-2},
    "mbf": {"lr": 0.0003, "weight_decay": 1e-2},
    "sofim": {"lr": 0.1, "weight_decay": 5e-4},
    "kfac": {"lr": 0.01, "weight_decay": 1e-2},
    "ekfac": {"lr": 0.001, "weight_decay": 1e-2},
    "ekfacadam": {"lr": 0.0055, "weight_decay": 1e-2},
}


def _stage(inputs: int, outputs: int) -> list[nn.Module]:
    convolution = nn.Conv2d(inputs, outputs, kernel_size=3, padding=1)
    return [convolution, nn.BatchNorm2d(outputs), nn.ReLU(inplace=True), nn.MaxPool2d(2)]


def _make_model(seed: int) -> nn.Module:
    return seeded(
        seed,
        lambda: nn.Sequential(
            *_stage(1, 16),  # [N, 16, 14, 14]
            *_stage(16, 32),  # [N, 32, 7, 7]
            *_stage(32, 64),  # [N, 64, 3, 3]
            nn.Flatten(),
            nn.Linear(576, 64),
            nn.ReLU(inplace=True),
            nn.Linear(64, fashion_images.CLASSES),
        ),
    )


def evaluate(model: nn.Module) -> Figures:
    """Share of the test images that are recognised, in per cent."""
    with evaluation(model):
        return Figures(fashion_images.accuracy(model))


TASK = Task(
    name="fashion",
    summary="CNN with BatchNorm on the 28 x 28 images of Fashion-MNIST",
    metric=Metric("test accuracy", "%", higher_is_better=True, decimals=2),
    epochs=3,
    batch_size=64,
    make_model=_make_model,
    batches=fashion_images.batches,
    steps_per_epoch=fashion_images.steps_per_epoch,
    criterion=F.cross_entropy,
    distribution="categorical",
    evaluate=evaluate,
    hyperparameters=HYPERPARAMETERS,
    # So that processor time is the time that passes.
    threads=1,
    evaluations=8,
)
