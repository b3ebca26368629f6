"""Task ``graph``: a graph convolution network on the nearest neighbours of scikit-learn's digits.

A node is one of the 1,797 images, its features are the 64 pixels, and it is joined to its ten nearest neighbours. The
network has three layers of arXiv 1609.02907: H <- ReLU(S H W), S being the adjacency with loops, made symmetric and
normalised by the degrees. Twenty nodes of each class are labelled, and all others test. The learning rates below are
from a search that docs/tuning.md records, those of AdaFisher's other variants guesses.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import cache
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fisher_kernels.tasks import digit_images
from fisher_kernels.tasks.task import (
    Batch,
    Figures,
    Hyperparameters,
    Metric,
    Task,
    evaluation,
    require,
    seeded,
    shuffled,
)

NEIGHBOURS = 10
LABELLED = 20
"""Nodes of each class that train."""

CLASSES = 10
WIDTH = 128

HYPERPARAMETERS: dict[str, Hyperparameters] = {
    "adamw": {"lr": 0.0017, "weight_decay": 1e-2},
    "sgd": {"lr": 0.1, "weight_decay": 5e-4},
    "adafisher": {"lr": 0.001, "weight_decay": 5e-4},
    "adafisherw": {"lr": 0.001, "weight_decay": 1e-2},
    "adafisher:relative": {"lr": 1.0, "weight_decay": 5e-4},
    "adafisher:release": {"lr": 1e-3, "weight_decay": 5e-4},
    "adafisherw:relative": {"lr": 0.3, "weight_decay": 1e-4},
    "adafisherw:release": {"lr": 1e-3, "weight_decay": 1e-2},
    "mbf": {"lr": 0.0001, "weight_decay": 1e-2},
    "sofim": {"lr": 0.03, "weight_decay": 5e-4},
    "kfac": {"lr": 0.1, "weight_decay": 1e-2},
    "ekfac": {"lr": 0.055, "weight_decay": 1e-2},
    "ekfacadam": {"lr": 0.003, "weight_decay": 1e-2},
}


@cache
def load() -> tuple[Tensor, Tensor]:
    """The pixels [nodes, 64] and the labels [nodes]."""
    halves = digit_images.load()
    images, labels = (torch.cat(parts) for parts in zip(*halves, strict=True))
    return images.flatten(1), labels


@cache
def adjacency() -> Tensor:
    """S, sparse (nodes, nodes): with A the edges in either direction and loops, D^-1/2 A D^-1/2."""
    neighbors = require("sklearn.neighbors", "scikit-learn", "the task graph")
    edges = neighbors.kneighbors_graph(load()[0].numpy(), NEIGHBOURS).tocoo()
    indices = torch.stack([torch.from_numpy(edges.row), torch.from_numpy(edges.col)]).long()
    count = len(load()[1])
    loops = torch.arange(count).expand(2, -1)
    both = torch.cat([indices, indices.flip(0), loops], 1)
    rows, columns = torch.unique(both, dim=1)  # an edge counts once, found from one end or both
    scale = torch.bincount(rows, minlength=count).float().rsqrt()
    values = scale[rows] * scale[columns]
    return torch.sparse_coo_tensor(
        torch.stack([rows, columns]), values, (count, count), is_coalesced=True, check_invariants=True
    )


@cache
def split() -> tuple[Tensor, Tensor]:
    """The nodes that are labelled, and those that test."""
    labels = load()[1]
    labelled = torch.cat([(labels == c).nonzero()[:LABELLED, 0] for c in range(CLASSES)])
    others = torch.ones(len(labels), dtype=torch.bool).index_fill(0, labelled, False)
    return labelled, others.nonzero()[:, 0]


class GraphNetwork(nn.Module):
    """Linear maps of the nodes, each followed by an average over neighbours; its input are the nodes to classify."""

    def __init__(self) -> None:
        super().__init__()
        widths = (load()[0].shape[1], WIDTH, WIDTH, CLASSES)
        self.layers = nn.ModuleList(nn.Linear(*sizes) for sizes in pairwise(widths))

    def forward(self, nodes: Tensor) -> Tensor:
        """Logits [N, 10] of nodes [N]."""
        first, *others = self.layers
        x = torch.sparse.mm(adjacency(), first(load()[0]))
        for layer in others:
            x = torch.sparse.mm(adjacency(), layer(F.relu(x)))
        return x[nodes]


def _batches(seed: int, epoch: int, batch_size: int) -> Iterator[Batch]:
    nodes, labels = split()[0], load()[1]
    for indices in torch.split(shuffled(len(nodes), seed, epoch), batch_size):
        yield nodes[indices], labels[nodes[indices]]


def _evaluate(model: nn.Module) -> Figures:
    """Share of the other nodes that are recognised, in per cent."""
    nodes, labels = split()[1], load()[1]
    with evaluation(model):
        accuracy: Tensor = (model(nodes).argmax(1) == labels[nodes]).float().mean()
    return Figures(100 * float(accuracy))


TASK = Task(
    name="graph",
    summary="graph convolution network on the nearest neighbours of scikit-learn's digits, 200 of them labelled",
    metric=Metric("test accuracy", "%", higher_is_better=True, decimals=2),
    epochs=100,
    batch_size=LABELLED * CLASSES,
    make_model=lambda seed: seeded(seed, GraphNetwork),
    batches=_batches,
    steps_per_epoch=lambda batch_size: math.ceil(LABELLED * CLASSES / batch_size),
    criterion=F.cross_entropy,
    distribution="categorical",
    evaluate=_evaluate,
    hyperparameters=HYPERPARAMETERS,
    threads=1,
)
