"""Task ``curves``: the deep autoencoder of images of smooth curves on which second-order methods are compared.

784 pixels go through 400, 200, 100, 50 and 25 units to a code of 6 and back the same way, twelve layers: the sizes of
Hinton and Salakhutdinov (Science 313, 2006), who made the data set CURVES for it. An image has six degrees of freedom,
as many as the code: it shows a smooth curve through three random points. Their images are not at hand; these are
generated, in about a second, and kept in memory. As there, 20,000 train; 2,000 others test.

The curve is the quadratic in t that goes through the points at t = 0, 1/2 and 1, and it is drawn with Gaussian ink: a
pixel at the distance d from it has the intensity exp(-d^2 / (2 INK^2)).

The loss is that of the task ``autoencoder``, the binary cross-entropy of the pixels in nats an image, and so are the
units: ReLU, none at the code.

The learning rates below are from a search that docs/tuning.md records, those of AdaFisher's other variants guesses.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import cache

import torch
from torch import Tensor

from fisher_kernels.tasks import pixels
from fisher_kernels.tasks.task import Batch, Hyperparameters, Task, shuffled

WIDTHS = (784, 400, 200, 100, 50, 25, 6)
SIDE = 28
TRAINING_IMAGES = 20_000
TEST_IMAGES = 2_000

# All lengths in pixels. The points keep off the edge; the curve between them may come up to it.
MARGIN = 3.0
INK = 0.9
# Of the curve, for the distance to it. It runs at most 84 along each axis in a unit of t, so they are at most 1.25
# apart, and a pixel on the curve between two of them has at least 0.78 of its ink.
POINTS = 96

HYPERPARAMETERS: dict[str, Hyperparameters] = {
    "adamw": {"lr": 0.01, "weight_decay": 1e-2},
    "sgd": {"lr": 1e-2, "weight_decay": 5e-4},
    "adafisher": {"lr": 3e-4, "weight_decay": 5e-4},
    "adafisherw": {"lr": 3e-4, "weight_decay": 1e-2},
    "adafisher:relative": {"lr": 0.03, "weight_decay": 5e-4},
    "adafisher:release": {"lr": 3e-4, "weight_decay": 5e-4},
    "adafisherw:relative": {"lr": 0.1, "weight_decay": 1e-4},
    "mbf": {"lr": 0.01, "weight_decay": 1e-2},
    "adafisherw:release": {"lr": 3e-4, "weight_decay": 1e-2},
    "sofim": {"lr": 3, "weight_decay": 5e-4},
    "kfac": {"lr": 0.17, "weight_decay": 1e-2},
    "ekfac": {"lr": 0.17, "weight_decay": 1e-2},
    "ekfacadam": {"lr": 0.017, "weight_decay": 1e-2},
}


@cache
def load() -> tuple[Tensor, Tensor]:
    """Images [N, 784] in [0, 1] for training and for testing."""
    images = draw(TRAINING_IMAGES + TEST_IMAGES, seed=0)
    return images[:TRAINING_IMAGES], images[TRAINING_IMAGES:]


def draw(count: int, seed: int) -> Tensor:
    """So many images, [count, 784]; those of a smaller count are the first of a larger one."""
    generator = torch.Generator().manual_seed(seed)
    points = MARGIN + (SIDE - 1 - 2 * MARGIN) * torch.rand(count, 3, 2, generator=generator)
    t = torch.linspace(0, 1, POINTS)
    through = torch.stack([2 * (t - 0.5) * (t - 1), 4 * t * (1 - t), 2 * t * (t - 0.5)], 1)  # Lagrange's polynomials
    curves = (through @ points).clamp_(0, SIDE - 1)  # [count, POINTS, 2]
    images = torch.empty(count, SIDE, SIDE)
    for part, image in zip(curves.split(100), images.split(100), strict=True):  # what fits into a cache
        image.fill_(math.inf)
        squares = (part.unsqueeze(-1) - torch.arange(SIDE)).square_()  # [100, POINTS, 2, SIDE]
        for at in squares.unbind(1):
            rows, columns = at.unbind(1)  # each [100, SIDE]
            torch.minimum(image, rows.unsqueeze(2) + columns.unsqueeze(1), out=image)
    return images.div_(-2 * INK**2).exp_().flatten(1)


def _batches(seed: int, epoch: int, batch_size: int) -> Iterator[Batch]:
    images = load()[0]
    for indices in torch.split(shuffled(len(images), seed, epoch), batch_size):
        batch = images[indices]
        yield batch, batch


TASK = Task(
    name="curves",
    summary="12-layer ReLU autoencoder of generated 28 x 28 images of smooth curves",
    metric=pixels.METRIC,
    also=pixels.ALSO,
    epochs=20,
    batch_size=500,
    make_model=lambda seed: pixels.make_model(WIDTHS, seed),
    batches=_batches,
    steps_per_epoch=lambda batch_size: math.ceil(TRAINING_IMAGES / batch_size),
    criterion=pixels.cross_entropy,
    distribution="bernoulli",
    evaluate=lambda model: pixels.evaluate(model, load()[1]),
    hyperparameters=HYPERPARAMETERS,
    # So that processor time is the time that passes.
    threads=1,
)
