"""How much of each published model a rule serves: counts of the published model, rules as the small one showed them."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace

import torch

from fisher_kernels.tools.served import Kind
from tests.zoo.architecture import Architecture

Place = tuple[str, str]
"""A parameter's name without the numbers of its layers, and the class of the module that has it."""


def place_of(name: str, layer: str) -> Place:
    return re.sub(r"\d+", "*", name), layer


def published_sizes(architecture: Architecture) -> dict[Place, int]:
    """Numbers of the published model in each place, without memory for them."""
    with torch.device("meta"):
        model = architecture.build(False)
    sizes: dict[Place, int] = defaultdict(int)
    layers = {p: type(module).__name__ for module in reversed([*model.modules()]) for p in module._parameters.values()}
    for name, p in model.named_parameters():
        if p.requires_grad:
            sizes[place_of(name, layers[p])] += p.numel()
    return dict(sizes)


def transfer(kinds: Sequence[Kind], sizes: dict[Place, int]) -> list[Kind]:
    """The kinds of a small model with the numbers of the published one.

    Raises:
        ValueError: the models have other parameters, or the layers of one place are not treated alike.
    """
    places: dict[Place, Kind] = {}
    for kind in kinds:
        for name in kind.names:
            place = place_of(name, kind.layer)
            if places.setdefault(place, kind).rule != kind.rule:
                raise ValueError(f"{place} is served by {places[place].rule} here and by {kind.rule} there")
    if places.keys() != sizes.keys():
        raise ValueError(f"the published model has other parameters: {sorted(places.keys() ^ sizes.keys())}")
    counted = []
    for kind in kinds:
        mine = [place for place, own in places.items() if own is kind]
        if mine:
            names = tuple(name for name, _ in mine)
            counted.append(replace(kind, names=names, parameters=sum(sizes[place] for place in mine)))
    return sorted(counted, key=lambda kind: -kind.parameters)
