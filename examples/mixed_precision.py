"""Four ways to train in 16 bits, beside float32: ``python examples/mixed_precision.py``; seconds on one core."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fisher_kernels import AdaFisherW

STEPS = 100


def network() -> nn.Module:
    """The same weights each time."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(20, 64), nn.LayerNorm(64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 5))


def batch(step: int) -> tuple[Tensor, Tensor]:
    """Inputs, and the classes that a fixed linear map finds largest."""
    teacher = torch.randn(20, 5, generator=torch.Generator().manual_seed(-1))
    x = torch.randn(128, 20, generator=torch.Generator().manual_seed(step))
    return x, (x @ teacher).argmax(1)


def train(model: nn.Module, optimizer: Any, autocast: Any = None, scaler: Any = None) -> float:
    """The mean loss of the last ten steps."""
    dtype = next(model.parameters()).dtype
    losses = []
    for step in range(STEPS):
        x, y = batch(step)
        optimizer.zero_grad()
        with nullcontext() if autocast is None else torch.autocast("cpu", dtype=autocast):
            output = model(x.to(dtype))
        loss = F.cross_entropy(output.float(), y)  # the loss in float32, whatever the model computes in
        if scaler is None:
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
        else:
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            scaler.step(optimizer)
            scaler.update()
        losses.append(loss.item())
    return sum(losses[-10:]) / 10


def main() -> None:
    """Train in each way, from the same weights and on the same batches."""
    model = network()
    print(f"float32: loss {train(model, AdaFisherW(model, lr=3e-3)):.4f}")

    model = network()
    loss = train(model, AdaFisherW(model, lr=3e-3), torch.bfloat16)
    print(f"autocast to bfloat16: loss {loss:.4f}")

    model, scaler = network(), torch.amp.GradScaler("cpu", init_scale=2.0**16)
    optimizer = AdaFisherW(model, lr=3e-3, grad_scaler=scaler)  # or its statistics would have the scale, squared
    loss = train(model, optimizer, torch.float16, scaler)
    print(f"autocast to float16, with a scaler: loss {loss:.4f}, scale {scaler.get_scale():g}")

    model = network().to(torch.bfloat16)
    optimizer = AdaFisherW(model, lr=3e-3, moment_dtype=torch.bfloat16)
    print(f"all in bfloat16, rounded to nearest: loss {train(model, optimizer):.4f}")

    model = network().to(torch.bfloat16)
    optimizer = AdaFisherW(model, lr=3e-3, moment_dtype=torch.bfloat16, stochastic_rounding=True)
    print(f"all in bfloat16, rounded at random: loss {train(model, optimizer):.4f}")


if __name__ == "__main__":
    main()
