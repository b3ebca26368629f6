"""Calls of the op weighted_gram_ that are refused."""

from __future__ import annotations

import math

import torch

from tests.bad_calls import Call, Faults, Refused, argument, value


def good() -> Call:
    return {"out": torch.ones(4, 4), "x": torch.ones(3, 4), "weight": torch.ones(3), "decay": 0.9, "gain": 0.1}


FAULTS: Faults = {
    "x dtype": (argument("x", lambda: torch.ones(3, 4).long()), TypeError, r"x has dtype (torch\.)?int64, expected"),
    "x dimensions": (
        argument("x", lambda: torch.ones(3, 4, 1)),
        ValueError,
        r"x has shape \(3, 4, 1\), expected 2 dimensions",
    ),
    "x device": (argument("x", lambda: torch.ones(3, 4, device="meta")), ValueError, r"x is on meta, expected cpu"),
    "weight dtype": (
        argument("weight", lambda: torch.ones(3).double()),
        TypeError,
        r"weight has dtype (torch\.)?float64, expected (torch\.)?float32",
    ),
    "weight shape": (
        argument("weight", lambda: torch.ones(4)),
        ValueError,
        r"weight has shape \(4,\), expected \(3,\)",
    ),
    "weight device": (
        argument("weight", lambda: torch.ones(3, device="meta")),
        ValueError,
        r"weight is on meta, expected cpu",
    ),
    "out dtype": (
        argument("out", lambda: torch.ones(4, 4).double()),
        TypeError,
        r"out has dtype (torch\.)?float64, expected (torch\.)?float32",
    ),
    "out shape": (argument("out", lambda: torch.ones(4, 5)), ValueError, r"out has shape \(4, 5\), expected \(4, 4\)"),
    "out strides": (argument("out", lambda: torch.ones(4, 8)[:, ::2]), ValueError, r"out is not contiguous"),
    **{
        f"{name} {number}": (value(name, number), ValueError, rf"{name} is {number}(0*)?, expected a finite")
        for name in ("decay", "gain")
        for number in (-0.5, math.inf, math.nan)
    },
}

REFUSED = {"weighted_gram_": Refused(good, FAULTS)}
