"""Task ``digits``: a small CNN with BatchNorm on the 8 x 8 handwritten digits that come with scikit-learn.

The learning rates below are from a search that docs/tuning.md records, those of AdaFisher's other variants guesses.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from fisher_kernels.tasks import digit_images
from fisher_kernels.tasks.task import Figures, Hyperparameters, Metric, Task, evaluation, seeded

HYPERPARAMETERS: dict[str, Hyperparameters] = {
    "adamw": {"lr": 1.7e-3, "weight_decay": 1e-2},
    "sgd": {"lr": 0.01, "weight_decay": 5e-4},
    "adafisher": {"lr": 1.7e-3, "weight_decay": 5e-4},
    "adafisherw": {"lr": 3e-3, "weight_decay": 1e-2},
    "adafisher:relative": {"lr": 0.3, "weight_decay": 5e-4},
    "adafisher:release": {"lr": 1e-3, "weight_decay": 5e-4},
    "adafisherw:relative": {"lr": 0.3, "weight_decay": 1e-4},
    "mbf": {"lr": 3e-4, "weight_decay": 1e-2},
    "adafisherw:release": {"lr": 1e-3, "weight_decay": 1e-2},
    "sofim": {"lr": 0.03, "weight_decay": 5e-4},
    "kfac": {"lr": 3e-3, "weight_decay": 1e-2},
    "ekfac": {"lr": 0.03, "weight_decay": 1e-2},
    "ekfacadam": {"lr": 0.017, "weight_decay": 1e-2},
}


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


def _evaluate(model: nn.Module) -> Figures:
    """Share of the test images that are recognised, in per cent."""
    images, labels = digit_images.load()[1]
    with evaluation(model):
        accuracy: Tensor = (model(images).argmax(dim=1) == labels).float().mean()
    return Figures(100 * float(accuracy))


TASK = Task(
    name="digits",
    summary="CNN with BatchNorm on the 8 x 8 digits of scikit-learn",
    metric=Metric("test accuracy", "%", higher_is_better=True, decimals=2),
    epochs=8,
    batch_size=64,
    make_model=_make_model,
    batches=digit_images.batches,
    steps_per_epoch=digit_images.steps_per_epoch,
    criterion=F.cross_entropy,
    distribution="categorical",
    evaluate=_evaluate,
    hyperparameters=HYPERPARAMETERS,
    # Layers this small gain little from a second thread, and wait for it long where other work shares the processor.
    threads=1,
)
