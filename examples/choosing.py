"""Which optimizer, and which first rate: ``python examples/choosing.py``; half a minute on one core.

A deep autoencoder of scikit-learn's digits. AdaFisherW takes the rate that a sweep suggests, MBF and KFAC, for which a
sweep says nothing, those of the list in docs/choosing.md. Then each trains for as long as AdamW takes for its steps.
"""

from __future__ import annotations

import argparse
import itertools
import math
import time
from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

from fisher_kernels import KFAC, MBF, AdaFisherW, find_lr

WIDTHS = (64, 128, 64, 32, 8, 32, 64, 128, 64)
BATCH = 256


def network() -> nn.Module:
    """The same weights each time."""
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for i, o in itertools.pairwise(WIDTHS):
        layers += [nn.Linear(i, o), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


class Loop:
    """Iterations of one optimizer, each on the next batch."""

    def __init__(self, model: nn.Module, optimizer: Any, images: Tensor) -> None:
        self.model, self.optimizer, self.images = model, optimizer, images
        self.generator = torch.Generator().manual_seed(0)

    def loss(self, x: Tensor, sampled: bool = False) -> Tensor:
        """Binary cross-entropy, summed over pixels."""
        output = self.model(x)
        if sampled and hasattr(self.optimizer, "sample"):
            self.optimizer.sample(output, "bernoulli")
        return F.binary_cross_entropy_with_logits(output, x, reduction="none").sum(1).mean()

    def step(self) -> Tensor:
        """One iteration; returns its loss, as find_lr wants it."""
        x = self.images[torch.randint(len(self.images), (BATCH,), generator=self.generator)]
        self.optimizer.zero_grad()
        loss = self.loss(x, sampled=True)
        loss.backward()
        self.optimizer.step()
        return loss


def main() -> None:
    """Give each as many seconds, with a schedule that ends with them."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=400, help="of AdamW, whose time the others have too")
    steps = parser.parse_args().steps
    images = torch.tensor(load_digits().data, dtype=torch.float32) / 16
    training, test = images[:1440], images[1440:]

    model = network()
    found = find_lr(Loop(model, optimizer := AdaFisherW(model), training).step, optimizer)
    print(f"AdaFisherW: {found.verdict}")
    makes: dict[str, Any] = {
        "AdamW": lambda model: torch.optim.AdamW(model.parameters(), lr=3e-3),
        "AdaFisherW": lambda model: AdaFisherW(model, lr=found.suggestion or 1.7e-3),
        "MBF": lambda model: MBF(model, lr=1e-2),
        "KFAC": lambda model: KFAC(model, lr=0.1, fisher="sampled"),
    }
    seconds = math.inf
    for name, make in makes.items():
        model = network()
        loop = Loop(model, make(model), training)
        rate = loop.optimizer.param_groups[0]["lr"]
        begin, made = time.process_time(), 0
        while (done := made / steps if math.isinf(seconds) else (time.process_time() - begin) / seconds) < 1:
            for group in loop.optimizer.param_groups:
                group["lr"] = rate * (1 + math.cos(math.pi * done)) / 2
            loop.step()
            made += 1
        seconds = min(seconds, time.process_time() - begin)
        with torch.no_grad():
            print(f"{name}, lr={rate:.2g}: test loss {loop.loss(test).item():.2f} after {made} steps", flush=True)


if __name__ == "__main__":
    main()
