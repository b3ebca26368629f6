"""Calls of the sums of squares that are refused."""

from __future__ import annotations

import torch

from tests.bad_calls import Call, Faults, Refused, argument, value


def matrix() -> Call:
    return {"x": torch.ones(3, 2)}


def image() -> Call:
    return {"x": torch.ones(2, 3, 5, 5), "kernel_size": 2}


COLUMN: Faults = {
    "dtype": (
        argument("x", lambda: torch.ones(3, 2, dtype=torch.int64)),
        TypeError,
        r"x has dtype torch.int64, expected float32, float64, bfloat16 or float16$",
    ),
    "complex": (
        argument("x", lambda: torch.ones(3, 2, dtype=torch.complex64)),
        TypeError,
        r"x has dtype torch.complex64, expected float32",
    ),
    "shape": (
        argument("x", lambda: torch.tensor(1.0)),
        ValueError,
        r"x has shape \(\), expected at least 1 dimensions$",
    ),
}
CHANNEL: Faults = {
    "dtype": (
        argument("x", lambda: torch.ones(3, 2, dtype=torch.bool)),
        TypeError,
        r"x has dtype torch.bool, expected float32",
    ),
    "shape": (argument("x", lambda: torch.ones(3)), ValueError, r"x has shape \(3,\), expected at least 2 dimensions$"),
}
PATCH: Faults = {
    "dtype": (
        argument("x", lambda: torch.ones(2, 3, 4, dtype=torch.uint8)),
        TypeError,
        r"x has dtype torch.uint8, expected float32",
    ),
    "too few dimensions": (
        argument("x", lambda: torch.ones(2, 3)),
        ValueError,
        r"x has shape \(2, 3\), expected 3 to 5 dimensions$",
    ),
    "too many dimensions": (
        argument("x", lambda: torch.ones(1, 1, 2, 2, 2, 2)),
        ValueError,
        r"x has shape \(1, 1, 2, 2, 2, 2\), expected 3 to 5 dimensions$",
    ),
    **{
        f"{name} {values}": (
            value(name, values),
            ValueError,
            rf"{name} is {found}, expected {count} integers of at least {least} for x of shape \(2, 3, 5, 5\)$",
        )
        for name, values, found, count, least in (
            ("kernel_size", 0, r"\[0, 0\]", 2, 1),
            ("kernel_size", (2, 2, 2), r"\[2, 2, 2\]", 2, 1),
            ("stride", 0, r"\[0, 0\]", 2, 1),
            ("stride", (1, -1), r"\[1, -1\]", 2, 1),
            ("dilation", (1,), r"\[1\]", 2, 1),
            ("dilation", 0, r"\[0, 0\]", 2, 1),
            ("padding", -1, r"\[-1, -1, -1, -1\]", 4, 0),
            ("padding", ((0, 1), (2, -2)), r"\[0, 1, 2, -2\]", 4, 0),
            ("padding", (1,), r"\[1, 1\]", 4, 0),
        )
    },
    "kernel too large": (
        lambda call: call.update(x=torch.ones(2, 3, 9, 4), kernel_size=3, padding=((0, 0), (1, 0)), dilation=3),
        ValueError,
        r"x of shape \(2, 3, 9, 4\) is 5 long after padding in spatial dimension 1, "
        r"expected at least 7, the extent of kernel_size 3 with dilation 3$",
    ),
}

REFUSED = {
    "column_sum_of_squares": Refused(matrix, COLUMN),
    "channel_sum_of_squares": Refused(matrix, CHANNEL),
    "patch_sum_of_squares": Refused(image, PATCH),
}
