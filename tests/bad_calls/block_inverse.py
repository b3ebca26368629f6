"""Calls of the ops on blocks that are refused."""

from __future__ import annotations

import math

import torch

from tests.bad_calls import Call, Faults, Refused, argument, value

INVERSE: Faults = {
    "dtype": (
        argument("blocks", lambda: torch.ones(2, 3, 3, dtype=torch.bfloat16)),
        TypeError,
        r"blocks has dtype (torch\.)?bfloat16",
    ),
    "whole numbers": (
        argument("blocks", lambda: torch.ones(2, 3, 3, dtype=torch.int64)),
        TypeError,
        r"blocks has dtype .*int64",
    ),
    "a matrix": (
        argument("blocks", lambda: torch.ones(3, 3)),
        ValueError,
        r"blocks has shape \(3, 3\), expected \(B, n, n\)",
    ),
    "not square": (
        argument("blocks", lambda: torch.ones(2, 3, 4)),
        ValueError,
        r"blocks has shape \(2, 3, 4\), expected \(B, n, n\)",
    ),
    **{
        f"damping {number}": (value("damping", number), ValueError, rf"damping is {number}, expected a finite number")
        for number in (-0.5, math.nan, math.inf)
    },
}
RHS: Faults = {
    "rhs shape": (
        argument("rhs", lambda: torch.ones(2, 4)),
        ValueError,
        r"rhs has shape \(2, 4\), expected \(2, 3\)",
    ),
    "rhs dtype": (
        argument("rhs", lambda: torch.ones(2, 3).double()),
        TypeError,
        r"rhs has dtype (torch\.)?float64, expected",
    ),
}
OUT: Faults = {
    "out shape": (
        argument("out", lambda: torch.ones(3, 3, 3)),
        ValueError,
        r"out has shape \(3, 3, 3\), expected \(2, 3, 3\)",
    ),
    "out dtype": (
        argument("out", lambda: torch.ones(2, 3, 3).double()),
        TypeError,
        r"out has dtype (torch\.)?float64, expected",
    ),
}
VECTORS: Faults = {
    "dtype": (
        argument("inverse", lambda: torch.ones(2, 3, 3).half()),
        TypeError,
        r"inverse has dtype (torch\.)?float16",
    ),
    "not square": (
        argument("inverse", lambda: torch.ones(2, 3, 4)),
        ValueError,
        r"inverse has shape \(2, 3, 4\), expected \(B, n, n\)",
    ),
    "vectors shape": (
        argument("vectors", lambda: torch.ones(3)),
        ValueError,
        r"vectors has shape \(3,\), expected \(2, 3\)",
    ),
    "vectors dtype": (
        argument("vectors", lambda: torch.ones(2, 3).double()),
        TypeError,
        r"vectors has dtype (torch\.)?float64",
    ),
}


def matrices() -> torch.Tensor:
    return torch.eye(3).repeat(2, 1, 1)


def inverse() -> Call:
    return {"blocks": matrices(), "damping": 0.5}


def into() -> Call:
    return {"out": 2 * matrices(), **inverse()}


def solve() -> Call:
    return {**inverse(), "rhs": torch.ones(2, 3)}


def apply() -> Call:
    return {"inverse": matrices(), "vectors": torch.ones(2, 3)}


REFUSED = {
    "block_inverse": Refused(inverse, INVERSE),
    "block_inverse_": Refused(into, {**INVERSE, **OUT}),
    "block_solve": Refused(solve, {**INVERSE, **RHS}),
    "block_apply": Refused(apply, VECTORS),
}
