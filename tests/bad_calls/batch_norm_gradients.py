"""Calls of the op batch_norm_gradients that are refused."""

from __future__ import annotations

import torch

from tests.bad_calls import Call, Faults, Refused, argument, value


def good() -> Call:
    return {
        "x": torch.ones(2, 3, 4),
        "grad_output": torch.ones(2, 3, 4),
        "eps": 1e-5,
        "mean": torch.ones(3),
        "variance": torch.ones(3),
    }


FAULTS: Faults = {
    "x dtype": (
        argument("x", lambda: torch.ones(2, 3, 4).int()),
        TypeError,
        r"x has dtype torch.int32, expected float32",
    ),
    "grad dtype": (
        argument("grad_output", lambda: torch.ones(2, 3, 4).int()),
        TypeError,
        "grad_output has dtype torch.int32, expected float32",
    ),
    "x dimensions": (
        argument("x", lambda: torch.ones(4)),
        ValueError,
        r"x has shape \(4,\), expected at least 2 dimensions",
    ),
    "grad shape": (
        argument("grad_output", lambda: torch.ones(1, 3, 4)),
        ValueError,
        r"grad_output has shape \(1, 3, 4\), expected \(2, 3, 4\), the shape of x",
    ),
    "eps": (value("eps", -1.0), ValueError, "eps is -1.0, expected a finite number of at least 0"),
    "no variance": (value("variance", None), ValueError, "variance is None, expected a tensor, as mean is"),
    "no mean": (value("mean", None), ValueError, "variance is a tensor, expected None, as mean is"),
    "mean shape": (
        argument("mean", lambda: torch.ones(3, 4)),
        ValueError,
        r"mean has shape \(3, 4\), expected \(3,\), the channels of x",
    ),
    "variance dtype": (
        argument("variance", lambda: torch.ones(3).int()),
        TypeError,
        "variance has dtype torch.int32, expected float32",
    ),
}

REFUSED = {"batch_norm_gradients": Refused(good, FAULTS)}
