"""What a user writes, with every optimizer; a test has mypy --strict and pyright read it."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

import fisher_kernels
from fisher_kernels import MBF, SOFIM, AdaFisher, AdaFisherW, use_backend

Kind = Literal["adafisher", "adafisherw", "mbf", "sofim"]


def make(kind: Kind, model: nn.Module) -> torch.optim.Optimizer:
    if kind == "adafisher":
        groups = [{"params": [*model.parameters()], "lr": 1e-3}]
        return AdaFisher(model, lr=torch.tensor(1e-3), variant="relative", params=groups)
    if kind == "adafisherw":
        return AdaFisherW(model, 3e-3, update_interval=10, weight_decay=1e-2, params=model.named_parameters())
    if kind == "mbf":
        return MBF(model, linear_blocks=64, sequence="reduce", loss_reduction="sum", inverse_storage="packed")
    return SOFIM(model.parameters(), lr=0.1, direction="momentum", scope="tensor")


def train(model: nn.Module, x: Tensor, kind: Kind) -> float:
    optimizer = make(kind, model)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1e-3, total_steps=10, cycle_momentum=False)

    def closure() -> float:
        optimizer.zero_grad()
        loss: Tensor = model(x).square().mean()
        loss.backward()  # type: ignore[no-untyped-call]  # torch's own
        return loss.item()

    for _ in range(10):
        optimizer.step(closure)
        scheduler.step()
    return closure()


def reports(model: nn.Module) -> list[str]:
    adafisher = AdaFisher(model, maximize=False)
    sofim = SOFIM(model.named_parameters(), rho=1e-2)
    nothing: None = adafisher.step()
    loss: float = sofim.step(lambda: 1.0)
    figures: dict[str, dict[str, float]] = adafisher.metrics()
    names = [row.name for row in adafisher.explain() if row.fallback]
    adafisher.close()
    state = sofim.state_dict()
    sofim.load_state_dict(state)
    with use_backend("reference"):
        sums: Tensor = fisher_kernels.ops.column_sum_of_squares(torch.ones(3, 2))
    why = fisher_kernels.backends.reasons()["cpu"]
    return [*names, *figures, str(nothing), str(loss), str(sums), why or "", fisher_kernels.__version__]


def warm(model: nn.Module, batches: list[Tensor]) -> None:
    mbf = MBF(model, lr=1e-3)
    mbf.warm_start(batches, lambda batch: model(batch).square().mean(), progress=False)


if __name__ == "__main__":
    network = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    kinds: tuple[Kind, ...] = ("adafisher", "adafisherw", "mbf", "sofim")
    print([train(network, torch.ones(5, 3), kind) for kind in kinds])
    warm(network, [torch.ones(5, 3)])
