"""Samples of weighted_gram_."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from fisher_kernels.ops import ACCUMULATOR
from fisher_kernels.tools.samples.sample import SUM_DTYPES, Inputs, Sample, Source, Tolerance


@dataclass(frozen=True)
class _Gram:
    rows: int
    columns: int
    decay: float = 0.0
    weighted: bool = True

    def inputs(self, source: Source) -> Inputs:
        return {
            "out": source.uniform(self.columns, self.columns),
            "x": source.normal(self.rows, self.columns, seed=1),
            "weight": source.uniform(self.rows, seed=2) if self.weighted else None,
            "decay": self.decay,
            "gain": 0.1,
        }


def _transposed(source: Source) -> Inputs:
    """Columns one after another."""
    weight = torch.arange(4.0, dtype=ACCUMULATOR[source.dtype], device=source.device)
    return {"out": source.uniform(3, 3), "x": source.normal(3, 4).mT, "weight": weight, "decay": 0.0, "gain": 1.0}


def _tolerance(inputs: Inputs, expected: list[Tensor], u: float) -> list[Tolerance]:
    """Each entry is a sum of as many products as there are rows; their magnitudes stand for their sum."""
    x, old = inputs["x"].abs(), inputs["out"].abs()
    weighted = x if inputs["weight"] is None else x * inputs["weight"][:, None]
    magnitude = inputs["gain"] * weighted.mT @ x + inputs["decay"] * (old.tril() + old.tril(-1).mT)
    return [(len(x) + 5) * u * magnitude]


_GRAMS = {
    "weighted": _Gram(131, 67),
    "average": _Gram(600, 33, decay=0.9),
    "without weights": _Gram(17, 130, weighted=False),
    "no rows": _Gram(0, 5, decay=0.9),
    "weighted, columns in sixteens": _Gram(131, 144),
    "columns in sixteens": _Gram(70, 48, weighted=False),
    "more columns in sixteens": _Gram(70, 144, weighted=False),
    "few rows": _Gram(4, 5, decay=0.9, weighted=False),
}


def _samples() -> Iterator[Sample]:
    for name, gram in _GRAMS.items():
        yield Sample("weighted_gram_", name, SUM_DTYPES, gram.inputs, _tolerance)
    yield Sample("weighted_gram_", "transposed", SUM_DTYPES, _transposed, _tolerance)


SAMPLES = tuple(_samples())
