"""Calls of the ops on inverses and vectors that are refused."""

from __future__ import annotations

import math

import torch

from tests.bad_calls import Call, Faults, Refused, argument, entry, shorter, value

UPDATE: Faults = {
    "dtype": (
        argument("inverse", lambda: matrices().bfloat16()),
        TypeError,
        r"inverse has dtype (torch\.)?bfloat16, expected float32 or",
    ),
    "a matrix": (
        argument("inverse", lambda: torch.eye(3)),
        ValueError,
        r"inverse has shape \(3, 3\), expected \(B, n, n\)",
    ),
    "not square": (
        argument("inverse", lambda: torch.ones(2, 3, 4)),
        ValueError,
        r"inverse has shape \(2, 3, 4\), expected \(B, n, n\)",
    ),
    **{
        f"decay {number}": (value("decay", number), ValueError, rf"decay is {number}, expected a finite number above 0")
        for number in (0.0, -0.5, math.nan, math.inf)
    },
    **{
        f"gain {number}": (value("gain", number), ValueError, rf"gain is {number}, expected a finite number")
        for number in (math.nan, math.inf, -math.inf)
    },
}
ONE: Faults = {
    "u shape": (argument("u", lambda: torch.ones(2, 4)), ValueError, r"u has shape \(2, 4\), expected \(2, 3\)"),
    "u of several vectors": (
        argument("u", lambda: torch.ones(2, 1, 3)),
        ValueError,
        r"u has shape \(2, 1, 3\), expected \(2, 3\)",
    ),
    "u dtype": (
        argument("u", lambda: torch.ones(2, 3).double()),
        TypeError,
        r"u has dtype (torch\.)?float64, expected (torch\.)?float32",
    ),
}
SEVERAL: Faults = {
    "u shape": (argument("u", lambda: torch.ones(2, 3)), ValueError, r"u has shape \(2, 3\), expected \(2, k, 3\)"),
    "u count": (
        argument("u", lambda: torch.ones(3, 1, 3)),
        ValueError,
        r"u has shape \(3, 1, 3\), expected \(2, k, 3\)",
    ),
    "u dtype": (
        argument("u", lambda: torch.ones(2, 1, 3).half()),
        TypeError,
        r"u has dtype (torch\.)?float16, expected (torch\.)?float32",
    ),
}
SOLVE: Faults = {
    "length": (shorter("x"), ValueError, r"x has 1 (tensors|entries), expected 2, the length of u"),
    "dtype": (
        entry("u", lambda: torch.ones(2).long()),
        TypeError,
        r"u\[1\] has dtype (torch\.)?int64, expected float32",
    ),
    "x dtype": (
        entry("x", lambda: torch.ones(2).double()),
        TypeError,
        r"x\[1\] has dtype (torch\.)?float64, expected (torch\.)?float32",
    ),
    "x shape": (entry("x", lambda: torch.ones(3)), ValueError, r"x\[1\] has shape \(3,\), expected \(2,\)"),
    **{
        f"rho {number}": (value("rho", number), ValueError, rf"rho is {number}, expected a finite number above 0")
        for number in (0.0, -1.0, math.nan, math.inf)
    },
}


def matrices() -> torch.Tensor:
    return torch.eye(3).repeat(2, 1, 1)


def one() -> Call:
    return {"inverse": matrices(), "u": torch.ones(2, 3)}


def several() -> Call:
    return {"inverse": matrices(), "u": torch.ones(2, 4, 3)}


def solve() -> Call:
    return {"u": [torch.ones(3), torch.ones(2)], "x": [torch.ones(3), torch.ones(2)], "rho": 1.0}


REFUSED = {
    "rank_one_inverse_update_": Refused(one, {**UPDATE, **ONE}),
    "low_rank_inverse_update_": Refused(several, {**UPDATE, **SEVERAL}),
    "rank_one_solve": Refused(solve, SOLVE),
}
