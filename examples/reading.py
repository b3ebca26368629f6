"""What ``explain()`` and ``metrics()`` say of a model: ``python examples/reading.py``; a few seconds."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fisher_kernels import AdaFisherW


class Model(nn.Module):
    """Two layers with rules, a weight that a function applies, and a recurrent layer that no rule is for."""

    def __init__(self) -> None:
        super().__init__()
        self.read = nn.Linear(8, 16)
        self.mix = nn.Parameter(torch.randn(16, 16) / 4)
        self.over_time = nn.LSTM(16, 16, batch_first=True)
        self.head = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (N, 3) of sequences (N, T, 8)."""
        y, _ = self.over_time(F.linear(torch.tanh(self.read(x)), self.mix))
        logits: Tensor = self.head(y[:, -1])
        return logits


def train(model: nn.Module, optimizer: AdaFisherW, steps: int, first: int = 0) -> None:
    """Classes of sequences by the largest of three of their means."""
    for step in range(first, first + steps):
        x = torch.randn(64, 10, 8, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        F.cross_entropy(model(x), x.mean(1)[:, :3].argmax(1)).backward()
        optimizer.step()


def tell(optimizer: AdaFisherW, names: tuple[str, ...]) -> None:
    """The figures that say most."""
    figures = optimizer.metrics()
    for name in names:
        mine = figures[name]
        print(
            f"{name}: damping {mine['damping_share']:.0%} of the curvature, steps {mine['smallest_step']:.2g} to "
            f"{mine['largest_step']:.2g}, cosine with SGD {mine['cosine_with_sgd']:.2f}"
        )


def main() -> None:
    """Look before the first step, after some, and at a setting that is wrong."""
    torch.manual_seed(0)
    model = Model()
    optimizer = AdaFisherW(model, lr=3e-3)
    print("before training: by class\n")
    print(optimizer.explain())
    train(model, optimizer, 60)
    print("\nafter 60 steps: the function has been seen\n")
    print(optimizer.explain())
    served = sum(p.numel() for p, row in zip(model.parameters(), optimizer.explain(), strict=True) if not row.fallback)
    print(f"\nserved by a rule: {served / sum(p.numel() for p in model.parameters()):.0%} of the parameters")

    print("\nfigures of the last step")
    tell(optimizer, ("read.weight", "mix", "head.weight"))
    optimizer.param_groups[0]["damping"] = 10.0
    train(model, optimizer, 1, 60)
    print("\nthe same with damping=10, which is far above the curvature: SGD with momentum, and a small step")
    tell(optimizer, ("read.weight", "mix", "head.weight"))


if __name__ == "__main__":
    main()
