"""A small network that ``fully_shard`` divides, how it is trained, and settings of optimizers for it."""

from __future__ import annotations

import threading
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as F

from fisher_kernels import EKFAC, KFAC, MBF, AdaFisher, AdaFisherW, EKFACAdam

STEPS = 20
BATCH = 16

making = threading.Lock()  # torch's random numbers are those of all threads


def empty() -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(6, 12), nn.LayerNorm(12), nn.Tanh(), nn.Linear(12, 7), nn.Tanh(), nn.Linear(7, 3)
    ).double()


def network(dtype: torch.dtype) -> nn.Sequential:
    """Rows that few numbers of processes divide, and fewer of them than processes."""
    with making:
        torch.manual_seed(0)
        return empty().to(dtype)


def batch(step: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(BATCH, 6, generator=generator, dtype=torch.float64)
    return x.to(dtype), torch.randint(3, (BATCH,), generator=generator)


def train(model: nn.Module, optimizer: Any, dtype: torch.dtype, rank: int = 0, world: int = 1, parts: int = 1) -> None:
    """On a share of each batch, in so many parts."""
    for step in range(STEPS):
        optimizer.zero_grad()
        x, y = (part.chunk(world)[rank] for part in batch(step, dtype))
        for i, (xi, yi) in enumerate(zip(x.chunk(parts), y.chunk(parts), strict=True)):
            if parts > 1:
                model.set_requires_gradient_sync(i == parts - 1)  # type: ignore[operator]
            (F.cross_entropy(model(xi), yi) / parts).backward()
        optimizer.step()


def sharded(model: nn.Module, shape: tuple[int, ...], **settings: Any) -> nn.Module:
    names = ("replicate", "shard")[-len(shape) :]
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=names)
    for layer in model.children():
        if list(layer.parameters()):
            fully_shard(layer, mesh=mesh, **settings)
    fully_shard(model, mesh=mesh, **settings)
    return model


def whole(model: nn.Module) -> list[Tensor]:
    return [p.full_tensor().detach() if hasattr(p, "full_tensor") else p.detach() for p in model.parameters()]


def assert_close(found: list[Tensor], expected: list[Tensor], dtype: torch.dtype) -> None:
    bound = 1e-12 if dtype == torch.float64 else 1e-5
    for p, q in zip(found, expected, strict=True):
        assert float((p - q).abs().max()) <= bound * float(q.abs().max())


SOFIMS: dict[str, dict[str, Any]] = {
    "momentum": {"lr": 0.05},
    "gradient": {"lr": 0.05, "direction": "gradient", "rho": 1.0},
    "without memory": {"lr": 0.05, "direction": "gradient", "rho": 1.0, "beta": 0.0},
    "by tensor": {"lr": 0.05, "scope": "tensor"},
    "decay": {"lr": 0.05, "weight_decay": 0.1},
    "l2, maximize": {"lr": 0.005, "weight_decay": 0.1, "decoupled": False, "maximize": True},
}

READERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "AdaFisher": (AdaFisher, {"lr": 1e-3}),
    "AdaFisher, release": (AdaFisher, {"lr": 1e-3, "variant": "release", "update_interval": 3}),
    "AdaFisher, relative": (AdaFisher, {"lr": 0.02, "variant": "relative"}),
    "AdaFisherW": (AdaFisherW, {"lr": 1e-3, "weight_decay": 0.1}),
    "MBF": (MBF, {"lr": 1e-3}),
    "MBF, along gradients": (
        MBF,
        {"lr": 1e-3, "linear_blocks": 3, "kl_along": "gradient", "weight_decay": 0.1, "decoupled": False},
    ),
    "MBF, packed": (
        MBF,
        {
            "lr": 1e-3,
            "linear_blocks": "per_output",
            "inverse_storage": "packed",
            "max_relative_step": 0.01,
            "maximize": True,
            "mask_zeros": True,
        },
    ),
    "KFAC": (KFAC, {"lr": 0.1}),
    "KFAC beside Adam": (KFAC, {"lr": 0.1, "others": "adam", "weight_decay": 0.1, "decoupled": False}),
    "EKFAC": (EKFAC, {"lr": 0.03}),
    "EKFACAdam": (EKFACAdam, {"lr": 0.01, "max_relative_step": 0.1}),
}
