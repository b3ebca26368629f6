"""Calls of the op conv_gram_ that are refused."""

from __future__ import annotations

import math

import torch

from tests.bad_calls import Call, Faults, Refused, argument, value


def good() -> Call:
    return {
        "out": torch.ones(2, 13, 13),
        "x": torch.ones(2, 6, 5, 7),
        "kernel_size": 2,
        "stride": 1,
        "padding": 0,
        "dilation": 1,
        "groups": 2,
        "bias": True,
        "decay": 0.9,
        "gain": 0.1,
    }


FAULTS: Faults = {
    "x dtype": (
        argument("x", lambda: torch.ones(2, 6, 5, 7, dtype=torch.int64)),
        TypeError,
        r"x has dtype (torch\.)?int64, expected float32",
    ),
    "x dimensions": (
        argument("x", lambda: torch.ones(2, 6)),
        ValueError,
        r"x has shape \(2, 6\), expected 3 to 5 dimensions",
    ),
    "x device": (
        argument("x", lambda: torch.ones(2, 6, 5, 7, device="meta")),
        ValueError,
        r"x is on meta, expected cpu",
    ),
    "groups": (value("groups", 4), ValueError, "groups is 4, expected a divisor of the 6 channels of x"),
    "no groups": (value("groups", 0), ValueError, "groups is 0, expected a divisor"),
    "kernel": (value("kernel_size", 6), ValueError, "(x of shape|kernel_size spans 6 positions)"),
    "kernel size": (value("kernel_size", (2, 2, 2)), ValueError, "kernel_size (is|has)"),
    "stride": (value("stride", 0), ValueError, "stride is"),
    "padding": (value("padding", -1), ValueError, "padding is"),
    "dilation": (value("dilation", 0), ValueError, "dilation is"),
    "out dtype": (
        argument("out", lambda: torch.ones(2, 13, 13, dtype=torch.float64)),
        TypeError,
        r"out has dtype (torch\.)?float64, expected (torch\.)?float32",
    ),
    "out of one group": (
        argument("out", lambda: torch.ones(13, 13)),
        ValueError,
        r"out has shape \(13, 13\), expected \(2, 13, 13\)",
    ),
    "out without a bias": (
        argument("out", lambda: torch.ones(2, 12, 12)),
        ValueError,
        r"out has shape \(2, 12, 12\), expected \(2, 13, 13\)",
    ),
    "out strides": (argument("out", lambda: torch.ones(2, 13, 26)[..., ::2]), ValueError, "out is not contiguous"),
    **{
        f"{name} {number}": (value(name, number), ValueError, rf"{name} is {number}(0*)?, expected a finite")
        for name in ("decay", "gain")
        for number in (-0.5, math.inf, math.nan)
    },
}

REFUSED = {"conv_gram_": Refused(good, FAULTS)}
