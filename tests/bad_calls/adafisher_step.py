"""Calls of the op adafisher_step_ that are refused."""

from __future__ import annotations

import math
import re

import torch

from fisher_kernels.ops import Rounding
from tests.bad_calls import Call, Faults, Refused, entry, value
from tests.bad_calls._steps import (
    BAD_STEPS,
    NO_COEFFICIENTS,
    arguments,
    bad_arrays,
    bad_lists,
    bad_numbers,
    bad_scalars,
    dtypes,
)
from tests.cases.adafisher_step import NAMES, Parameter, step


def good() -> Call:
    return arguments(step([Parameter((2, 3), (2,), (3,)), Parameter((4, 6), (4,), (6,))], torch.float32), NAMES)


FAULTS: Faults = {
    **bad_lists(NAMES, 2),
    **bad_arrays("exp_avgs"),
    **BAD_STEPS,
    **{
        f"rounding {what}": (
            value("rounding", [Rounding.of(0, 0), bad]),
            ValueError,
            rf"rounding\[1\].{what} is {re.escape(str(found))}, expected {expected}",
        )
        for what, bad, found, expected in (
            ("base", Rounding(-1), -1, "0 to"),
            ("base", Rounding(2**32), 2**32, "0 to"),
            ("offset", Rounding.of(0, 1, offset=-1), -1, "at least 0"),
            ("pitch", Rounding.of(0, 1, run=6, pitch=5), 5, "at least 6"),
        )
    },
    "rounding length": (
        value("rounding", [Rounding.of(0, 0)]),
        ValueError,
        "rounding has 1 entries, expected 2",
    ),
    "row_factors shape": (
        entry("row_factors", lambda: torch.ones(5)),
        ValueError,
        r"(row|column)_factors\[1\] .*params\[1\]",
    ),
    "row_factors empty": (
        entry("row_factors", lambda: torch.ones(0)),
        ValueError,
        r"(row|column)_factors\[1\] .*params\[1\]",
    ),
    "row_factors dtype": (
        entry("row_factors", lambda: torch.ones(4, dtype=torch.float64)),
        TypeError,
        r"row_factors\[1\]" + dtypes("float64", "float32"),
    ),
    "row_factors strides": (
        entry("row_factors", lambda: torch.ones(8)[::2]),
        ValueError,
        r"row_factors\[1\] .*contiguous",
    ),
    "row_factors dimensions": (
        entry("row_factors", lambda: torch.ones(2, 2)),
        ValueError,
        r"row_factors\[1\] has shape \(2, 2\)",
    ),
    "column_factors shape": (
        entry("column_factors", lambda: torch.ones(5)),
        ValueError,
        r"(row|column)_factors\[1\] .*params\[1\]",
    ),
    "column_factors empty": (
        entry("column_factors", lambda: torch.ones(0)),
        ValueError,
        r"(row|column)_factors\[1\] .*params\[1\]",
    ),
    "column_factors without groups": (
        entry("column_factors", lambda: torch.ones(0, 6)),
        ValueError,
        r"(row|column)_factors\[1\] .*params\[1\]",
    ),
    "column_factors groups": (
        entry("column_factors", lambda: torch.ones(3, 6)),
        ValueError,
        r"(row|column)_factors\[1\] .*params\[1\]",
    ),
    "column_factors dtype": (
        entry("column_factors", lambda: torch.ones(6, dtype=torch.float16)),
        TypeError,
        r"column_factors\[1\]" + dtypes("float16", "float32"),
    ),
    "column_factors strides": (
        entry("column_factors", lambda: torch.ones(1).expand(6)),
        ValueError,
        r"column_factors\[1\] .*contiguous",
    ),
    "column_factors dimensions": (
        entry("column_factors", lambda: torch.ones(1, 1, 6)),
        ValueError,
        r"column_factors\[1\] has shape \(1, 1, 6\)",
    ),
    "column_factors device": (
        entry("column_factors", lambda: torch.ones(6, device="meta")),
        ValueError,
        r"column_factors\[1\] is on meta, expected cpu",
    ),
    **bad_numbers(beta=(-0.1, 1.0, 1.5, math.nan), damping=NO_COEFFICIENTS, weight_decay=NO_COEFFICIENTS),
    **bad_scalars("lr", "grad_scale", "found_inf"),
}


# Fakes have no number to look at.
RATES: Faults = {
    f"lr {number}": (value("lr", number), ValueError, rf"lr is {float(number)}, expected")
    for number in (-1.0, math.inf, math.nan, torch.tensor(-1.0), torch.tensor(math.nan, dtype=torch.float64))
}

REFUSED = {"adafisher_step_": Refused(good, FAULTS, RATES)}
