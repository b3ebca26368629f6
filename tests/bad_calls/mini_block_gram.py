"""Calls of the op mini_block_gram_ that are refused."""

from __future__ import annotations

import math

import torch

from tests.bad_calls import Call, Faults, Refused, argument, value


def good() -> Call:
    return {"out": torch.ones(3, 4, 4), "v": torch.ones(2, 3, 4), "decay": 0.9, "gain": 0.1}


FAULTS: Faults = {
    "v dtype": (
        argument("v", lambda: torch.ones(2, 3, 4, dtype=torch.int64)),
        TypeError,
        r"v has dtype (torch\.)?int64, expected",
    ),
    "v dimensions": (
        argument("v", lambda: torch.ones(3, 4)),
        ValueError,
        r"v has shape \(3, 4\), expected 3 dimensions",
    ),
    "v device": (argument("v", lambda: torch.ones(2, 3, 4, device="meta")), ValueError, r"v is on meta, expected cpu"),
    "out dtype": (
        argument("out", lambda: torch.ones(3, 4, 4, dtype=torch.float64)),
        TypeError,
        r"out has dtype (torch\.)?float64, expected (torch\.)?float32",
    ),
    "out shape": (
        argument("out", lambda: torch.ones(3, 4, 5)),
        ValueError,
        r"out has shape \(3, 4, 5\), expected \(3, 4, 4\)",
    ),
    "out strides": (argument("out", lambda: torch.ones(3, 4, 8)[..., ::2]), ValueError, r"out is not contiguous"),
    **{
        f"{name} {number}": (value(name, number), ValueError, rf"{name} is {number}(0*)?, expected a finite")
        for name in ("decay", "gain")
        for number in (-0.5, math.inf, math.nan)
    },
}

REFUSED = {"mini_block_gram_": Refused(good, FAULTS)}
