"""Calls of the op conv_mini_block_gram_ that are refused."""

from __future__ import annotations

import math

import torch

from tests.bad_calls import Call, Faults, Refused, argument, value


def good() -> Call:
    return {
        "out": torch.ones(4, 3, 4, 4),
        "x": torch.ones(2, 6, 5, 7),
        "grad_output": torch.ones(2, 4, 4, 6),
        "kernel_size": 2,
        "stride": 1,
        "padding": 0,
        "dilation": 1,
        "groups": 2,
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
    "grad dtype": (
        argument("grad_output", lambda: torch.ones(2, 4, 4, 6, dtype=torch.float64)),
        TypeError,
        r"grad_output has dtype (torch\.)?float64, expected (torch\.)?float32",
    ),
    "grad dimensions": (
        argument("grad_output", lambda: torch.ones(2, 4, 4)),
        ValueError,
        r"grad_output has shape \(2, 4, 4\), expected 4 dimensions",
    ),
    "grad samples": (
        argument("grad_output", lambda: torch.ones(3, 4, 4, 6)),
        ValueError,
        r"grad_output has shape \(3, 4, 4, 6\), expected the 2 samples of x of shape \(2, 6, 5, 7\)",
    ),
    "grad positions": (
        argument("grad_output", lambda: torch.ones(2, 4, 4, 7)),
        ValueError,
        r"grad_output has shape \(2, 4, 4, 7\), expected at most 6 positions in spatial dimension 1",
    ),
    "grad device": (
        argument("grad_output", lambda: torch.ones(2, 4, 4, 6, device="meta")),
        ValueError,
        r"grad_output is on meta, expected cpu",
    ),
    "groups": (value("groups", 3), ValueError, "groups is 3, expected a divisor of the 6 channels of x and the 4 of"),
    "no groups": (value("groups", 0), ValueError, "groups is 0, expected a divisor"),
    "kernel": (value("kernel_size", 6), ValueError, "(x of shape|kernel_size spans 6 positions)"),
    "kernel size": (value("kernel_size", (2, 2, 2)), ValueError, "kernel_size (is|has)"),
    "stride": (value("stride", 0), ValueError, "stride is"),
    "padding": (value("padding", -1), ValueError, "padding is"),
    "dilation": (value("dilation", 0), ValueError, "dilation is"),
    "out dtype": (
        argument("out", lambda: torch.ones(4, 3, 4, 4, dtype=torch.float64)),
        TypeError,
        r"out has dtype (torch\.)?float64, expected (torch\.)?float32",
    ),
    "out shape": (
        argument("out", lambda: torch.ones(4, 6, 4, 4)),
        ValueError,
        r"out has shape \(4, 6, 4, 4\), expected \(4, 3, 4, 4\)",
    ),
    "out strides": (argument("out", lambda: torch.ones(4, 3, 4, 8)[..., ::2]), ValueError, "out is not contiguous"),
    **{
        f"{name} {number}": (value(name, number), ValueError, rf"{name} is {number}(0*)?, expected a finite")
        for name in ("decay", "gain")
        for number in (-0.5, math.inf, math.nan)
    },
}

REFUSED = {"conv_mini_block_gram_": Refused(good, FAULTS)}
