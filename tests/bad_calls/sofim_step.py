"""Calls of the op sofim_step_ that are refused."""

from __future__ import annotations

import math

import torch

from tests.bad_calls import Call, Faults, Refused, argument, value
from tests.bad_calls._steps import (
    BAD_STEPS,
    NO_COEFFICIENTS,
    arguments,
    bad_arrays,
    bad_lists,
    bad_numbers,
    bad_scalars,
)
from tests.cases.sofim_step import NAMES, step


def good() -> Call:
    return arguments(step([(2, 3), (4, 6)], torch.float32), NAMES)


FAULTS: Faults = {
    **bad_lists(NAMES, 2),
    **bad_arrays("exp_avgs"),
    **BAD_STEPS,
    **bad_numbers(beta=(-0.1, 1.0, 1.5, math.nan), rho=(0.0, *NO_COEFFICIENTS)),
    **bad_scalars("grad_scale", "found_inf"),
    **{
        f"{name} {number!r}": (value(name, number), ValueError, rf"{name} is '{number}', expected one of {choices}")
        for name, choices in (("direction", "'momentum', 'gradient'"), ("scope", "'global', 'tensor'"))
        for number in ("", "Global", "moment")
    },
    **{
        f"{name} of {length}": (
            value(name, [0.1] * length),
            ValueError,
            rf"{name} has {length} entries, expected 1 or 2, the length of params",
        )
        for name in ("lr", "weight_decay")
        for length in (0, 3)
    },
    **{
        f"weight_decay[{i}] {number}": (
            value("weight_decay", [0.1] * i + [number]),
            ValueError,
            rf"weight_decay\[{i}\] is {number}, expected",
        )
        for i in (0, 1)
        for number in NO_COEFFICIENTS
    },
    "lr shape": (argument("lr", lambda: torch.ones(2)), ValueError, r"lr\[0\] has shape \(2,\), expected one element"),
    "lr dtype": (
        value("lr", [0.1, torch.tensor(1)]),
        TypeError,
        r"lr\[1\] has dtype (torch\.)?int64, expected float32",
    ),
}


# Fakes have no number to look at.
RATES: Faults = {
    **{
        f"lr {number}": (value("lr", number), ValueError, rf"lr\[0\] is {float(number)}, expected")
        for number in (*NO_COEFFICIENTS, torch.tensor(-1.0), torch.tensor(math.nan, dtype=torch.float64))
    },
    **{
        f"lr[1] {number}": (value("lr", [0.1, number]), ValueError, rf"lr\[1\] is {number}, expected")
        for number in NO_COEFFICIENTS
    },
}

REFUSED = {"sofim_step_": Refused(good, FAULTS, RATES)}
