"""Samples of block_inverse, block_inverse_, block_solve and block_apply."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from fisher_kernels.tools.samples.sample import FACTOR_DTYPES, Device, Inputs, Sample, Source, Tolerance, random

_DAMPING = 1e-2


def blocks(count: int, n: int, dtype: torch.dtype, seed: int = 0, *, device: Device = None) -> Tensor:
    """Means of squares, as Fisher blocks are: symmetric, and positive definite with any damping."""
    x = random((count, n, n + 2), torch.float64, seed, device)
    return (x @ x.mT / (n + 2)).to(dtype)


def conditioned(
    count: int, n: int, condition: float, dtype: torch.dtype, seed: int = 0, *, device: Device = None
) -> Tensor:
    """Symmetric blocks whose eigenvalues go from 1 down to 1 / condition."""
    q, _ = torch.linalg.qr(random((count, n, n), torch.float64, seed, device))
    values = torch.logspace(0, -math.log10(condition), n, dtype=torch.float64, device=device)
    a = (q * values) @ q.mT
    return ((a + a.mT) / 2).to(dtype)


# A factorisation moves the block by (n + 1) u of its norm at most, which the condition number amplifies; forming the
# inverse costs as much again, twice.


def _errors(inputs: Inputs, u: float) -> Tensor:
    """Error of the inverse of each block in its 2-norm, and a number that counts for nothing where there is none."""
    n = inputs["blocks"].shape[-1]
    values = torch.linalg.eigvalsh(inputs["blocks"].nan_to_num() + _DAMPING * torch.eye(n, dtype=torch.float64))
    return 8 * (n + 1) * u * values[:, -1] / values[:, 0].square()


def _of_inverse(inputs: Inputs, expected: list[Tensor], u: float) -> list[Tolerance]:
    return [_errors(inputs, u)[:, None, None], 0.0]


def _of_solution(inputs: Inputs, expected: list[Tensor], u: float) -> list[Tolerance]:
    return [(_errors(inputs, u) * inputs["rhs"].norm(dim=1))[:, None], 0.0]


def _of_product(inputs: Inputs, expected: list[Tensor], u: float) -> list[Tolerance]:
    n = inputs["inverse"].shape[-1]
    return [2 * (n + 1) * u * (inputs["inverse"].abs() @ inputs["vectors"].abs()[..., None])[..., 0]]


_OPS: dict[str, tuple[tuple[str, ...], Callable[..., list[Tolerance]]]] = {
    "block_inverse": (("blocks", "damping"), _of_inverse),
    "block_inverse_": (("out", "blocks", "damping"), _of_inverse),
    "block_solve": (("blocks", "damping", "rhs"), _of_solution),
    "block_apply": (("inverse", "vectors"), _of_product),
}


def _inputs(names: tuple[str, ...], count: int, n: int, strided: bool, source: Source) -> Inputs:
    """``strided``: every other block, blocks with their columns one after another, vectors with their entries apart."""
    a, inverse = blocks(count, n, source.dtype, device=source.device), source.normal(count, n, n, seed=1)
    v = source.normal(count, n, seed=2)
    if count > 3:
        a[3, 0, -1] = math.nan  # for n > 1 in the triangle that is not inverted
    if strided:
        a, inverse = a.mT[::2], inverse.mT[::2]
        v = source.normal(n, len(a), seed=2).t()
    every = {"blocks": a, "inverse": inverse, "out": inverse.mT, "rhs": v, "vectors": v, "damping": _DAMPING}
    return {name: every[name] for name in names}


def _samples() -> Iterator[Sample]:
    for n in (1, 9, 16, 25, 64):
        for op, (names, tolerance) in _OPS.items():
            yield Sample(op, f"{n} x {n}", FACTOR_DTYPES, partial(_inputs, names, 37, n, False), tolerance)
    for op, (names, tolerance) in _OPS.items():
        yield Sample(op, "18 of 5 x 5", FACTOR_DTYPES, partial(_inputs, names, 18, 5, False), tolerance)
        yield Sample(op, "2 of 65 x 65", FACTOR_DTYPES, partial(_inputs, names, 2, 65, False), tolerance)
        yield Sample(op, "4 of 130 x 130", FACTOR_DTYPES, partial(_inputs, names, 4, 130, False), tolerance)
        yield Sample(op, "strided", FACTOR_DTYPES, partial(_inputs, names, 5, 4, True), tolerance)


SAMPLES = tuple(_samples())
