"""A vision transformer and a residual network from scratch: ``python examples/vision.py vit``, or ``resnet``.

Both learn scikit-learn's images of digits, 8 x 8 pixels, with AdamW and with what docs/choosing.md has for their kind.
Half a minute on one core.
"""

from __future__ import annotations

import argparse
import math
import time
from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

from fisher_kernels import MBF, EKFACAdam

BATCH = 64


class VisionTransformer(nn.Module):
    """Sixteen patches of 2 x 2 pixels, two blocks of width 32."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, 32, 2, stride=2)
        self.position = nn.Embedding(16, 32)
        block = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True, norm_first=True)
        self.blocks = nn.TransformerEncoder(block, 2, enable_nested_tensor=False)
        self.head = nn.Linear(32, 10)

    def forward(self, images: Tensor) -> Tensor:
        """Logits (N, 10) of images (N, 1, 8, 8)."""
        x = self.patches(images).flatten(2).transpose(1, 2)
        x = self.blocks(x + self.position(torch.arange(16)))
        logits: Tensor = self.head(x.mean(1))
        return logits


class Residual(nn.Module):
    """Two convolutions beside an identity, or beside a convolution where the size changes."""

    def __init__(self, width: int, out: int, stride: int) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(width, out, 3, stride, 1, bias=False), nn.Conv2d(out, out, 3, 1, 1, bias=False)
        self.norm_one, self.norm_two = nn.BatchNorm2d(out), nn.BatchNorm2d(out)
        self.beside = nn.Identity() if stride == 1 else nn.Conv2d(width, out, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """F(x) + x."""
        y = self.norm_two(self.two(self.norm_one(self.one(x)).relu()))
        return (y + self.beside(x)).relu()


def resnet() -> nn.Module:
    """Three residual blocks of 16 and 32 channels."""
    first = [nn.Conv2d(1, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU()]
    blocks = [Residual(16, 16, 1), Residual(16, 32, 2), Residual(32, 32, 1)]
    return nn.Sequential(*first, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10))


def train(model: nn.Module, optimizer: Any, epochs: int) -> float:
    """The share of the test images that the trained model gets right."""
    data = load_digits()
    x = torch.tensor(data.images, dtype=torch.float32).div(16).unsqueeze(1)
    y = torch.tensor(data.target)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    training, test = order[:1440], order[1440:]
    steps = epochs * math.ceil(len(training) / BATCH)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for epoch in range(epochs):
        shuffled = training[torch.randperm(len(training), generator=torch.Generator().manual_seed(epoch))]
        for rows in shuffled.split(BATCH):
            optimizer.zero_grad()
            output = model(x[rows])
            if hasattr(optimizer, "sample"):
                optimizer.sample(output)  # labels that the model draws itself; nothing unless fisher="sampled"
            F.cross_entropy(output, y[rows]).backward()
            optimizer.step()
            schedule.step()
    model.eval()
    with torch.no_grad():
        return float((model(x[test]).argmax(1) == y[test]).float().mean())


def main() -> None:
    """Train with both, from the same weights and on the same batches."""
    parser = argparse.ArgumentParser()
    parser.add_argument("model", choices=("vit", "resnet"))
    parser.add_argument("--epochs", type=int, default=8)
    given = parser.parse_args()
    for ours in (False, True):
        torch.manual_seed(0)
        model = VisionTransformer() if given.model == "vit" else resnet()
        optimizer: Any = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=1e-2)
        if ours and given.model == "vit":
            optimizer = EKFACAdam(model, lr=1e-2, weight_decay=1e-2, fisher="sampled")
        elif ours:
            optimizer = MBF(model, lr=3e-4, weight_decay=1e-2)
        begin = time.perf_counter()
        right = train(model, optimizer, given.epochs)
        print(f"{type(optimizer).__name__}: {right:.1%} right, {time.perf_counter() - begin:.1f} s", flush=True)


if __name__ == "__main__":
    main()
