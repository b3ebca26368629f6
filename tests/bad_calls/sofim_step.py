"""Calls of the op sofim_step_ that are refused."""

from __future__ import annotations

import math

import torch

from tests.bad_calls import Call, Faults, Refused, value
from tests.bad_calls._steps import (
    BAD_STEPS,
    NO_COEFFICIENTS,
    arguments,
    bad_arrays,
    bad_lists,
    bad_numbers,
    bad_one_or_each,
    bad_rates,
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
    **bad_one_or_each(2),
}


# Fakes have no number to look at.
RATES: Faults = bad_rates([0.1, 0.1])

REFUSED = {"sofim_step_": Refused(good, FAULTS, RATES)}
