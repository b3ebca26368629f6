"""How much of each published model a rule serves: counts of the published model, rules as the small one showed them."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence

import torch

from fisher_kernels.tools.served import Kind
from tests.zoo.architecture import Architecture


def pattern(name: str) -> str:
    """The name of a parameter without the numbers of its layers."""
    return re.sub(r"\d+", "*", name)


def published_sizes(architecture: Architecture) -> dict[str, int]:
    """Numbers of the published model by the pattern of the parameter that has them; without memory for them."""
    with torch.device("meta"):
        model = architecture.build(False)
    sizes: dict[str, int] = defaultdict(int)
    for name, p in model.named_parameters():
        if p.requires_grad:
            sizes[pattern(name)] += p.numel()
    return dict(sizes)


def transfer(kinds: Sequence[Kind], sizes: dict[str, int]) -> list[Kind]:
    """The kinds of a small model with the numbers of the published one.

    Raises:
        ValueError: the models have other parameters, or the layers of one place are not treated alike.
    """
    places: dict[str, Kind] = {}
    for kind in kinds:
        for name in kind.names:
            if places.setdefault(pattern(name), kind) is not kind:
                raise ValueError(f"{pattern(name)} is served here and not there: {kind.reason or kind.rule}")
    if places.keys() != sizes.keys():
        raise ValueError(f"the published model has other parameters: {sorted(places.keys() ^ sizes.keys())}")
    counted = [
        Kind(kind.rule, kind.layer, kind.reason, tuple(names), sum(sizes[name] for name in names))
        for kind in kinds
        if (names := [place for place, own in places.items() if own is kind])
    ]
    return sorted(counted, key=lambda kind: -kind.parameters)


