"""The 8 x 8 handwritten digits that come with scikit-learn, in the one split that all tasks on them share.

1,400 images train, the other 397 test. The 1,797 images are shuffled once, with a fixed seed of their own, because the
file is ordered by writer.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import cache

import torch

from fisher_kernels.tasks.task import Batch, require, shuffled

TRAINING_IMAGES = 1400


@cache
def load() -> tuple[Batch, Batch]:
    """(images [N, 1, 8, 8] in [0, 1], labels [N]) for training and for testing.

    Raises:
        MissingExtraError: scikit-learn is not installed.
    """
    bunch = require("sklearn.datasets", "scikit-learn", "a task on the digits").load_digits()
    images = torch.from_numpy(bunch.images).float().div_(16).unsqueeze(1)
    labels = torch.from_numpy(bunch.target).long()
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    training, test = order[:TRAINING_IMAGES], order[TRAINING_IMAGES:]
    return (images[training], labels[training]), (images[test], labels[test])


def batches(seed: int, epoch: int, batch_size: int) -> Iterator[Batch]:
    """The training images and their labels, once each."""
    images, labels = load()[0]
    for indices in torch.split(shuffled(len(labels), seed, epoch), batch_size):
        yield images[indices], labels[indices]


def steps_per_epoch(batch_size: int) -> int:
    """How many ``batches`` there are."""
    return math.ceil(TRAINING_IMAGES / batch_size)
