"""Task ``text``: a small transformer language model of bytes, on the English of Python's own ``pydoc_data.topics``.

The last tenth of the text is held out. Paragraphs that Python's documentation repeats are kept once, in their first
place, so that the held-out part is not a copy of the rest. The text differs a little from one Python version to the
next, and so do the losses. The learning rates below are from a search that docs/tuning.md records, those of
AdaFisher's other variants guesses.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import cache

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fisher_kernels.tasks.task import (
    Batch,
    Figures,
    Hyperparameters,
    Metric,
    Task,
    evaluation,
    generator,
    seeded,
    shuffled,
)
from fisher_kernels.tasks.transformer import Block

CONTEXT = 128
WIDTH = 64
HEADS = 4
BLOCKS = 2
BYTES = 256
HELD_OUT = 0.1

HYPERPARAMETERS: dict[str, Hyperparameters] = {
    "adamw": {"lr": 1e-2, "weight_decay": 1e-2},
    "sgd": {"lr": 0.3, "weight_decay": 5e-4},
    "adafisher": {"lr": 1e-2, "weight_decay": 5e-4},
    "adafisherw": {"lr": 1e-2, "weight_decay": 1e-2},
    "adafisher:relative": {"lr": 3.0, "weight_decay": 5e-4},
    "adafisher:release": {"lr": 1e-2, "weight_decay": 5e-4},
    "adafisherw:relative": {"lr": 3.0, "weight_decay": 1e-4},
    "mbf": {"lr": 3e-3, "weight_decay": 1e-2},
    "adafisherw:release": {"lr": 1e-2, "weight_decay": 1e-2},
    "sofim": {"lr": 0.17, "weight_decay": 5e-4},
    "kfac": {"lr": 0.1, "weight_decay": 1e-2},
    "ekfac": {"lr": 0.1, "weight_decay": 1e-2},
    "ekfacadam": {"lr": 0.03, "weight_decay": 1e-2},
}


@cache
def corpus() -> Tensor:
    """The bytes of the text, an int64 vector."""
    from pydoc_data.topics import topics

    paragraphs = "\n\n".join(topics[name] for name in sorted(topics)).split("\n\n")
    unique = dict.fromkeys(paragraph.strip("\n") for paragraph in paragraphs)
    return torch.frombuffer(bytearray("\n\n".join(unique), "utf-8"), dtype=torch.uint8).long()


def _load() -> tuple[Tensor, Tensor]:
    """The bytes for training and those held out."""
    data = corpus()
    split = len(data) - int(HELD_OUT * len(data))
    return data[:split], data[split:]


def _windows(data: Tensor, offset: int = 0) -> Batch:
    """Inputs and targets, both [windows, CONTEXT], of the consecutive windows that start at ``offset``."""
    count = (len(data) - offset - 1) // CONTEXT
    end = offset + count * CONTEXT
    return data[offset:end].view(count, CONTEXT), data[offset + 1 : end + 1].view(count, CONTEXT)


class LanguageModel(nn.Module):
    """A decoder-only transformer over single bytes, with learned positions."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(BYTES, WIDTH)
        self.position = nn.Embedding(CONTEXT, WIDTH)
        self.blocks = nn.Sequential(*(Block(WIDTH, HEADS, causal=True) for _ in range(BLOCKS)))
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, BYTES)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits [N, T, 256] of the byte after each of tokens [N, T], T at most CONTEXT."""
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        logits: Tensor = self.head(self.norm(self.blocks(self.embedding(tokens) + self.position(positions))))
        return logits


def _make_model(seed: int) -> nn.Module:
    return seeded(seed, LanguageModel)


def batches(training: Tensor, seed: int, epoch: int, batch_size: int) -> Iterator[Batch]:
    """Windows of bytes and of those that follow each, [N, CONTEXT], in an order that the seed and the epoch fix."""
    # Windows start somewhere else in every epoch; one window is given up so that their number stays the same.
    offset = int(torch.randint(CONTEXT, (), generator=generator(seed, epoch)))
    inputs, targets = _windows(training, offset)
    for indices in torch.split(shuffled(count_windows(training), seed, epoch), batch_size):
        yield inputs[indices], targets[indices]


def count_windows(training: Tensor) -> int:
    """How many windows an epoch has."""
    return (len(training) - 1) // CONTEXT - 1


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """In nats per byte."""
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def evaluate(model: nn.Module, held_out: Tensor) -> Figures:
    """Mean cross-entropy of bytes, in nats per byte."""
    inputs, targets = _windows(held_out)
    parts = zip(torch.split(inputs, 64), torch.split(targets, 64), strict=True)
    with evaluation(model):
        total = sum(cross_entropy(model(x), y).item() * len(x) for x, y in parts)
    return Figures(total / len(inputs))


TASK = Task(
    name="text",
    summary="transformer language model, byte by byte, on the English text of pydoc_data.topics",
    metric=Metric("validation loss", "nats/byte", higher_is_better=False, decimals=3),
    epochs=3,
    batch_size=8,
    make_model=_make_model,
    batches=lambda seed, epoch, batch_size: batches(_load()[0], seed, epoch, batch_size),
    steps_per_epoch=lambda batch_size: math.ceil(count_windows(_load()[0]) / batch_size),
    criterion=cross_entropy,
    distribution="categorical",
    evaluate=lambda model: evaluate(model, _load()[1]),
    hyperparameters=HYPERPARAMETERS,
)
