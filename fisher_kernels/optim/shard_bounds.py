"""The bounds of a step of which each process takes the rows that it has."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fisher_kernels.ops._step import floors_of_layers
from fisher_kernels.optim.shares import over_processes


def of_all_shards(params: Sequence[Any], sums: Tensor, layers: Sequence[int], floors: Sequence[float]) -> Tensor:
    """What ``direction_sums`` has of all shards of parameters, given those of the shards that are here.

    The least size that weights count as follows from how many there are, of which the step sees those here. So it
    enters here: what the weights of a layer lack of it is added to the sum of their squares, and the step has no floor.
    """
    total = over_processes(params, sums)
    place = torch.tensor(layers, dtype=torch.int64, device=sums.device)
    count = max(layers, default=-1) + 1
    squares = total.new_zeros(count).index_add_(0, place, total[:, 2])
    first = [layers.index(layer) for layer in range(count)]
    least = total.new_zeros(count)
    for p, layer, floor in zip(params, layers, floors_of_layers(floors, layers), strict=True):
        least[layer] += floor**2 * p.numel()
    total[first, 2] += (least - squares).clamp(min=0)
    return total


def left_alone(params: Sequence[Any], sums: Tensor, layers: Sequence[int]) -> Tensor:
    """How many elements of each parameter, of all its shards, a step leaves alone for sums that are not finite."""
    place = torch.tensor(layers, dtype=torch.int64, device=sums.device)
    bad = (~sums.isfinite()).any(1).double()
    of_layer = bad.new_zeros(max(layers, default=-1) + 1).index_add_(0, place, bad)
    numel = torch.tensor([p.numel() for p in params], dtype=torch.int64, device=sums.device)
    return torch.where(of_layer[place] > 0, numel, 0)
