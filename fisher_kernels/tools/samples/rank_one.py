"""Samples of rank_one_inverse_update_, low_rank_inverse_update_ and rank_one_solve."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from fisher_kernels.tools.samples.block_inverse import conditioned
from fisher_kernels.tools.samples.sample import FACTOR_DTYPES, SUM_DTYPES, Inputs, Sample, Source, Tolerance

_OPS = {"rank_one_inverse_update_": (), "low_rank_inverse_update_": (3,)}
"""How many vectors a block there are."""


def _inputs(count: int, n: int, vectors: Sequence[int], strided: bool, source: Source) -> Inputs:
    """``strided``: every other block, vectors with their entries apart."""
    inverse, u = conditioned(count, n, 8.0, source.dtype, device=source.device), source.normal(count, *vectors, n)
    inverse[3, 0, -1] = math.nan  # in the triangle that is not read, for n > 1
    if strided:
        inverse, u = inverse[::2], source.normal(*vectors, n, (count + 1) // 2).movedim(-1, 0)
    return {"inverse": inverse, "u": u, "decay": 0.9, "gain": 0.1}


def _tolerance(inputs: Inputs, expected: list[Tensor], u: float) -> list[Tolerance]:
    # v, q and the outer products round about n times relative to P, and an error in v counts by the condition number,
    # which is 8.
    n, rounds = inputs["inverse"].shape[-1], inputs["u"].shape[1] if inputs["u"].dim() == 3 else 1
    return [64 * (n + rounds) * rounds * u * expected[0].nan_to_num().abs().amax(), 0.0]


def _solve_inputs(source: Source) -> Inputs:
    shapes = ((7, 13), (), (0, 3), (20_000,))
    u, x = ([source.normal(*shape, seed=seed + i) for i, shape in enumerate(shapes)] for seed in (0, 10))
    return {"u": u, "x": x, "rho": 0.5}


def _two_dtypes(source: Source) -> Inputs:
    other = Source(torch.bfloat16, source.device)
    u, x = ([source.normal(3, 4, seed=seed), other.normal(5, seed=seed + 1)] for seed in (0, 10))
    return {"u": u, "x": x, "rho": 0.5}


def _strided(source: Source) -> Inputs:
    """One transposed, one with its entries apart."""
    return {"u": [source.normal(4, 6).t()], "x": [source.normal(6, 8, seed=1)[:, ::2]], "rho": 0.5}


def _solve_tolerance(inputs: Inputs, expected: list[Tensor], u: float) -> list[Tolerance]:
    rho = inputs["rho"]
    square = sum(v.square().sum() for v in inputs["u"])
    along = sum((v * y).abs().sum() for v, y in zip(inputs["u"], inputs["x"], strict=True)) / (rho + square)
    return [9 * u * (y.abs() + along * v.abs()) / rho for v, y in zip(inputs["u"], inputs["x"], strict=True)]


def _samples() -> Iterator[Sample]:
    for op, vectors in _OPS.items():
        for n in (1, 4, 9, 25, 64, 70):
            yield Sample(op, f"{n} x {n}", FACTOR_DTYPES, partial(_inputs, 37, n, vectors, False), _tolerance)
        yield Sample(op, "18 of 5 x 5", FACTOR_DTYPES, partial(_inputs, 18, 5, vectors, False), _tolerance)
        yield Sample(op, "strided", FACTOR_DTYPES, partial(_inputs, 6, 20, vectors, True), _tolerance)
    yield Sample("rank_one_solve", "four tensors", SUM_DTYPES, _solve_inputs, _solve_tolerance)
    yield Sample("rank_one_solve", "two dtypes", (torch.float32,), _two_dtypes, _solve_tolerance)
    yield Sample("rank_one_solve", "strided", FACTOR_DTYPES, _strided, _solve_tolerance)
    nothing = {"u": [], "x": [], "rho": 1.0}
    yield Sample("rank_one_solve", "nothing", (torch.float32,), lambda source: nothing, _solve_tolerance)


SAMPLES = tuple(_samples())
