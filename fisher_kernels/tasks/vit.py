"""Task ``vit``: a small vision transformer on Fashion-MNIST.

Sixteen patches of 7 x 7 pixels, width 64, four blocks of attention and perceptron, and the mean over positions into a
Linear layer: the plan of arXiv 2010.11929, small, without a class token. The learning rates below are from a search
that docs/tuning.md records, those of AdaFisher's other variants guesses.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fisher_kernels.tasks import fashion, fashion_images
from fisher_kernels.tasks.task import Hyperparameters, Task, seeded
from fisher_kernels.tasks.transformer import Block

PATCH = 7
WIDTH = 64
HEADS = 4
BLOCKS = 4
POSITIONS = (fashion_images.SIDE // PATCH) ** 2

HYPERPARAMETERS: dict[str, Hyperparameters] = {
    "adamw": {"lr": 0.003, "weight_decay": 1e-2},
    "sgd": {"lr": 0.3, "weight_decay": 5e-4},
    "adafisher": {"lr": 0.0017, "weight_decay": 5e-4},
    "adafisherw": {"lr": 0.0017, "weight_decay": 1e-2},
    "adafisher:relative": {"lr": 1.0, "weight_decay": 5e-4},
    "adafisher:release": {"lr": 3e-3, "weight_decay": 5e-4},
    "adafisherw:relative": {"lr": 1.0, "weight_decay": 1e-4},
    "adafisherw:release": {"lr": 3e-3, "weight_decay": 1e-2},
    "mbf": {"lr": 0.001, "weight_decay": 1e-2},
    "sofim": {"lr": 0.1, "weight_decay": 5e-4},
    "kfac": {"lr": 0.003, "weight_decay": 1e-2},
    "ekfac": {"lr": 0.01, "weight_decay": 1e-2},
    "ekfacadam": {"lr": 0.01, "weight_decay": 1e-2},
}


class VisionTransformer(nn.Module):
    """A transformer of patches, with learned positions."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, WIDTH, kernel_size=PATCH, stride=PATCH)
        self.position = nn.Embedding(POSITIONS, WIDTH)
        self.blocks = nn.Sequential(*(Block(WIDTH, HEADS, causal=False) for _ in range(BLOCKS)))
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, fashion_images.CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        """Logits [N, 10] of images [N, 1, 28, 28]."""
        x = self.patches(images).flatten(2).transpose(1, 2)  # [N, POSITIONS, WIDTH]
        x = x + self.position(torch.arange(POSITIONS, device=images.device))
        logits: Tensor = self.head(self.norm(self.blocks(x)).mean(1))
        return logits


TASK = Task(
    name="vit",
    summary="small vision transformer on the 28 x 28 images of Fashion-MNIST",
    metric=fashion.TASK.metric,
    epochs=3,
    batch_size=64,
    make_model=lambda seed: seeded(seed, VisionTransformer),
    batches=fashion_images.batches,
    steps_per_epoch=fashion_images.steps_per_epoch,
    criterion=F.cross_entropy,
    distribution="categorical",
    evaluate=fashion.evaluate,
    hyperparameters=HYPERPARAMETERS,
    threads=1,
    evaluations=8,
)
