"""Task ``text``: a small transformer language model of bytes, on the English of Python's own ``pydoc_data.topics``.

The last tenth of the text is held out. Paragraphs that Python's documentation repeats are kept once, in their first
place, so that the held-out part is not a copy of the rest. The text differs a little from one Python version to the
next, and so do the losses. The learning rates below are the best of a grid that docs/tuning.md records in full.
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
    "sofim": {"lr": 0.1, "weight_decay": 5e-4},
    "kfac": {"lr": 0.1, "weight_decay": 1e-2},
    "ekfac": {"lr": 0.03, "weight_decay": 1e-2},
    "ekfacadam": {"lr": 1e-2, "weight_decay": 1e-2},
}


@cache
def _load() -> tuple[Tensor, Tensor]:
    """The bytes for training and those held out, int64 vectors."""
    from pydoc_data.topics import topics

    paragraphs = "\n\n".join(topics[name] for name in sorted(topics)).split("\n\n")
    unique = dict.fromkeys(paragraph.strip("\n") for paragraph in paragraphs)
    data = torch.frombuffer(bytearray("\n\n".join(unique), "utf-8"), dtype=torch.uint8).long()
    split = len(data) - int(HELD_OUT * len(data))
    return data[:split], data[split:]


def _windows(data: Tensor, offset: int = 0) -> Batch:
    """Inputs and targets, both [windows, CONTEXT], of the consecutive windows that start at ``offset``."""
    count = (len(data) - offset - 1) // CONTEXT
    end = offset + count * CONTEXT
    return data[offset:end].view(count, CONTEXT), data[offset + 1 : end + 1].view(count, CONTEXT)


class Attention(nn.Module):
    """Causal self-attention from four Linear layers, each with its own factors, unlike ``nn.MultiheadAttention``."""

    def __init__(self) -> None:
        super().__init__()
        self.query = nn.Linear(WIDTH, WIDTH)
        self.key = nn.Linear(WIDTH, WIDTH)
        self.value = nn.Linear(WIDTH, WIDTH)
        self.out = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        """Mix positions; x and the result are [N, T, WIDTH]."""

        def heads(projection: nn.Linear) -> Tensor:
            split: Tensor = projection(x).unflatten(-1, (HEADS, WIDTH // HEADS))  # [N, T, HEADS, WIDTH / HEADS]
            return split.transpose(1, 2)

        mixed = F.scaled_dot_product_attention(heads(self.query), heads(self.key), heads(self.value), is_causal=True)
        result: Tensor = self.out(mixed.transpose(1, 2).flatten(-2))
        return result


class Block(nn.Module):
    """Attention and a two-layer perceptron, each after a LayerNorm and with a residual connection."""

    def __init__(self) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(WIDTH)
        self.attention = Attention()
        self.mlp_norm = nn.LayerNorm(WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        """One layer of the transformer; x and the result are [N, T, WIDTH]."""
        x = x + self.attention(self.attention_norm(x))
        x = x + self.mlp(self.mlp_norm(x))
        return x


class LanguageModel(nn.Module):
    """A decoder-only transformer over single bytes, with learned positions."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(BYTES, WIDTH)
        self.position = nn.Embedding(CONTEXT, WIDTH)
        self.blocks = nn.Sequential(*(Block() for _ in range(BLOCKS)))
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, BYTES)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits [N, T, 256] of the byte after each of tokens [N, T], T at most CONTEXT."""
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        logits: Tensor = self.head(self.norm(self.blocks(self.embedding(tokens) + self.position(positions))))
        return logits


def _make_model(seed: int) -> nn.Module:
    return seeded(seed, LanguageModel)


def _batches(seed: int, epoch: int, batch_size: int) -> Iterator[Batch]:
    training = _load()[0]
    # Windows start somewhere else in every epoch; one window is given up so that their number stays the same.
    offset = int(torch.randint(CONTEXT, (), generator=generator(seed, epoch)))
    inputs, targets = _windows(training, offset)
    for indices in torch.split(shuffled(_training_windows(), seed, epoch), batch_size):
        yield inputs[indices], targets[indices]


def _training_windows() -> int:
    return (len(_load()[0]) - 1) // CONTEXT - 1


def _steps_per_epoch(batch_size: int) -> int:
    return math.ceil(_training_windows() / batch_size)


def _cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def _evaluate(model: nn.Module) -> Figures:
    """Mean cross-entropy of the held-out bytes, in nats per byte."""
    inputs, targets = _windows(_load()[1])
    parts = zip(torch.split(inputs, 64), torch.split(targets, 64), strict=True)
    with evaluation(model):
        total = sum(_cross_entropy(model(x), y).item() * len(x) for x, y in parts)
    return Figures(total / len(inputs))


TASK = Task(
    name="text",
    summary="transformer language model, byte by byte, on the English text of pydoc_data.topics",
    metric=Metric("validation loss", "nats/byte", higher_is_better=False, decimals=3),
    epochs=3,
    batch_size=8,
    make_model=_make_model,
    batches=_batches,
    steps_per_epoch=_steps_per_epoch,
    criterion=_cross_entropy,
    distribution="categorical",
    evaluate=_evaluate,
    hyperparameters=HYPERPARAMETERS,
)
