"""Task ``finetune``: low-rank adapters of a language model on text that it has not seen.

The model of the task ``text`` is trained on the first half of the corpus with AdamW, once for all runs, and stays as it
is. Each of its Linear layers within the blocks gets an adapter, W x + 2 U D x with D of 8 rows and U zero at first
(LoRA, arXiv 2106.09685), which is trained on the second half, whose last fifth is held out. The learning rates below
are from a search that docs/tuning.md records, those of AdaFisher's other variants guesses.
"""

from __future__ import annotations

import copy
import math
from functools import cache

import torch
from torch import Tensor, nn

from fisher_kernels.tasks import text
from fisher_kernels.tasks.task import Hyperparameters, Task, seeded
from fisher_kernels.tasks.training import cosine
from fisher_kernels.tasks.transformer import Attention

RANK = 8
SCALE = 2.0
HELD_OUT = 0.2

PRETRAINING_EPOCHS = 3
PRETRAINING_BATCH = 8
PRETRAINING_LR = 1e-2

HYPERPARAMETERS: dict[str, Hyperparameters] = {
    "adamw": {"lr": 0.01, "weight_decay": 1e-2},
    "sgd": {"lr": 1.0, "weight_decay": 5e-4},
    "adafisher": {"lr": 0.03, "weight_decay": 5e-4},
    "adafisherw": {"lr": 0.03, "weight_decay": 1e-2},
    "adafisher:relative": {"lr": 10.0, "weight_decay": 5e-4},
    "adafisher:release": {"lr": 1e-2, "weight_decay": 5e-4},
    "adafisherw:relative": {"lr": 3.0, "weight_decay": 1e-4},
    "adafisherw:release": {"lr": 1e-2, "weight_decay": 1e-2},
    "mbf": {"lr": 0.0055, "weight_decay": 1e-2},
    "sofim": {"lr": 0.1, "weight_decay": 5e-4},
    "kfac": {"lr": 0.1, "weight_decay": 1e-2},
    "ekfac": {"lr": 0.03, "weight_decay": 1e-2},
    "ekfacadam": {"lr": 0.017, "weight_decay": 1e-2},
}


class Adapted(nn.Module):
    """A Linear layer that stays as it is, and a product of two small ones beside it."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down = nn.Linear(base.in_features, RANK, bias=False)
        self.up = nn.Linear(RANK, base.out_features, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, x: Tensor) -> Tensor:
        """W x + b + SCALE U D x."""
        result: Tensor = self.base(x) + SCALE * self.up(self.down(x))
        return result


def halves() -> tuple[Tensor, Tensor, Tensor]:
    """The bytes of the first half, and those of the second half that train and that are held out."""
    data = text.corpus()
    first, second = data[: len(data) // 2], data[len(data) // 2 :]
    split = len(second) - int(HELD_OUT * len(second))
    return first, second[:split], second[split:]


@cache
def pretrained() -> text.LanguageModel:
    """The model that all runs start from."""
    model = text.TASK.make_model(0)
    assert isinstance(model, text.LanguageModel)
    optimizer = torch.optim.AdamW(model.parameters(), lr=PRETRAINING_LR, weight_decay=1e-2, fused=True)
    training = halves()[0]
    length = PRETRAINING_EPOCHS * math.ceil(text.count_windows(training) / PRETRAINING_BATCH)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: cosine(step, length))
    for epoch in range(1, PRETRAINING_EPOCHS + 1):
        for inputs, targets in text.batches(training, 0, epoch, PRETRAINING_BATCH):
            optimizer.zero_grad()
            text.cross_entropy(model(inputs), targets).backward()
            optimizer.step()
            schedule.step()
    return model.requires_grad_(False)


def make_model(seed: int) -> nn.Module:
    """The pretrained model with new adapters, which alone are trained."""
    base = pretrained()

    def build() -> nn.Module:
        model = copy.deepcopy(base)
        parts = [part for part in model.blocks.modules() if isinstance(part, Attention | nn.Sequential)]
        for part in parts:
            for name, layer in [*part.named_children()]:
                if isinstance(layer, nn.Linear):
                    setattr(part, name, Adapted(layer))
        return model

    return seeded(seed, build)


TASK = Task(
    name="finetune",
    summary="low-rank adapters of a byte-level language model, on the half of the text that it has not seen",
    metric=text.TASK.metric,
    epochs=2,
    batch_size=8,
    make_model=make_model,
    batches=lambda seed, epoch, batch_size: text.batches(halves()[1], seed, epoch, batch_size),
    steps_per_epoch=lambda batch_size: math.ceil(text.count_windows(halves()[1]) / batch_size),
    criterion=text.cross_entropy,
    distribution="categorical",
    evaluate=lambda model: text.evaluate(model, halves()[2]),
    hyperparameters=HYPERPARAMETERS,
)
