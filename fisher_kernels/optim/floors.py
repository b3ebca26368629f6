"""The least size that the cap of a step takes the weights of a layer to have.

Weights that begin at zero, as the second matrix of a low-rank adapter does, have no size for a step to be relative to.
They count as ``floor / sqrt(fan_in)`` each: torch draws the weights of a layer with a root mean square of
``1 / sqrt(3 fan_in)``, so that one floor suits narrow layers and wide ones.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch.nn import Parameter

from fisher_kernels.curvature.rules import fan_in
from fisher_kernels.curvature.sites import Site

FLOOR = 0.3
"""Unless told otherwise: half of what torch draws, 0.58."""


def fan_ins(sites: Sequence[Site[Any]], params: Iterable[Parameter]) -> dict[Parameter, int]:
    """The fan-in of the layer of each parameter, that of its weight; of a parameter that no layer has, its own."""
    found: dict[Parameter, int] = {}
    for site in sites:
        for layer in site.layers:
            weight = layer.parameters.get("weight", layer.operation._parameters.get("weight"))
            for p in layer.parameters.values():
                found.setdefault(p, 1 if weight is None else fan_in(weight, layer.operation))
    return {p: found[p] if p in found else fan_in(p) for p in params}
