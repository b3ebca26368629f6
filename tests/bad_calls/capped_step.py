"""Calls of the ops heavy_ball_, direction_sums and capped_step_ that are refused."""

from __future__ import annotations

import math

import torch

from tests.bad_calls import Call, Faults, Refused, argument, entry, shorter, value
from tests.bad_calls._steps import (
    NO_COEFFICIENTS,
    arguments,
    bad_arrays,
    bad_lists,
    bad_numbers,
    bad_roundings,
    bad_scalars,
    dtypes,
    shapes,
)
from tests.cases.capped_step import momentum, step, sums

SHAPES = [(2, 3), (4, 6)]


def good_momentum() -> Call:
    return arguments(momentum(SHAPES, torch.float32), ("params", "grads", "momentum_buffers"))


def good_sums() -> Call:
    call = arguments(sums(SHAPES, torch.float32), ("params", "directions", "momentum_buffers"))
    return {**call, "skipped": torch.zeros(2, dtype=torch.int64)}


def good_step() -> Call:
    return arguments(step(SHAPES, torch.float32), ("params", "directions"))


def _without(faults: Faults, *names: str) -> Faults:
    return {name: fault for name, fault in faults.items() if name not in names}


def bad_wide(name: str, dtype: torch.dtype = torch.bfloat16) -> Faults:
    """What has the wide dtype, or is a moment, but not of this dtype, and is only read."""
    return {
        f"{name} shape": (entry(name, lambda: torch.ones(4, 7)), ValueError, rf"{name}\[1\]" + shapes("4, 7", "4, 6")),
        f"{name} dtype": (
            entry(name, lambda: torch.ones(4, 6, dtype=dtype)),
            TypeError,
            rf"{name}\[1\]" + dtypes(str(dtype).removeprefix("torch."), "float32"),
        ),
        f"{name} device": (
            entry(name, lambda: torch.ones(4, 6, device="meta")),
            ValueError,
            rf"{name}\[1\] is on meta, expected cpu",
        ),
    }


def bad_result(name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> Faults:
    """What another op returned, of the wrong kind."""
    wanted = str(shape).replace("(", r"\(").replace(")", r"\)")
    return {
        f"{name} dtype": (
            argument(name, lambda: torch.zeros(shape)),
            TypeError,
            rf"{name} has dtype (torch\.)?float32, expected (torch\.)?{str(dtype).removeprefix('torch.')}",
        ),
        f"{name} shape": (
            argument(name, lambda: torch.zeros(3, dtype=dtype)),
            ValueError,
            rf"{name} has shape \(3,\), expected {wanted}",
        ),
        f"{name} device": (
            argument(name, lambda: torch.zeros(shape, dtype=dtype, device="meta")),
            ValueError,
            rf"{name} is on meta, expected cpu",
        ),
        f"{name} strides": (
            argument(name, lambda: torch.zeros(*shape, 2, dtype=dtype)[..., 0]),
            ValueError,
            rf"{name} is not contiguous",
        ),
    }


def twice(name: str) -> Faults:
    """One tensor in two places of a list that is written."""

    def spoil(call: Call) -> None:
        for tensors in call.values():
            if isinstance(tensors, list) and isinstance(tensors[0], torch.Tensor):
                tensors[0] = torch.ones(4, 6)
        call[name][0] = call[name][1]

    return {f"{name} twice": (spoil, ValueError, rf"{name}\[1\] shares memory with {name}\[0\]")}


MOMENTUM_FAULTS: Faults = {
    **bad_lists(("params", "grads", "momentum_buffers"), 2),
    **_without(bad_arrays("momentum_buffers"), "params expanded"),
    **twice("momentum_buffers"),
    **bad_numbers(momentum=(-0.1, 1.0, 1.5, math.nan), weight_decay=NO_COEFFICIENTS),
    **bad_scalars("grad_scale", "found_inf"),
    **bad_roundings(2),
}

SUMS_FAULTS: Faults = {
    **bad_lists(("params", "directions", "momentum_buffers"), 2),
    "params dtype": (
        entry("params", lambda: torch.ones(4, 6, dtype=torch.int64)),
        TypeError,
        r"params\[1\]" + dtypes("int64", "float32"),
    ),
    **bad_wide("directions"),
    **bad_wide("momentum_buffers", torch.float16),
    **bad_result("skipped", torch.int64, (2,)),
}

STEP_FAULTS: Faults = {
    "params dtype": (
        entry("params", lambda: torch.ones(4, 6, dtype=torch.int64)),
        TypeError,
        r"params\[1\]" + dtypes("int64", "float32"),
    ),
    "params expanded": (
        entry("params", lambda: torch.ones(6).expand(4, 6)),
        ValueError,
        r"params\[1\] has strides \(0, 1\)",
    ),
    **twice("params"),
    "directions length": (shorter("directions"), ValueError, r"directions has 1 \w+, expected 2"),
    **bad_wide("directions"),
    **bad_result("sums", torch.float64, (2, 3)),
    **{
        f"layers {given}": (value("layers", given), ValueError, message)
        for given, message in (
            ([0], r"layers has 1 entries, expected 2, the length of params"),
            ([1, 1], r"layers\[0\] is 1, expected 0"),
            ([-1, 0], r"layers\[0\] is -1, expected 0"),
            ([0, 2], r"layers\[1\] is 2, expected 0 or 1, as layers are numbered in order"),
            ([0, -1], r"layers\[1\] is -1, expected 0 or 1"),
        )
    },
    **bad_numbers(kl_clip=(0.0, *NO_COEFFICIENTS)),
    **{
        f"{name} of {length}": (
            value(name, [0.1] * length),
            ValueError,
            rf"{name} has {length} entries, expected 1 or 2, the length of params",
        )
        for name in ("lr", "weight_decay", "max_relative_step", "floor")
        for length in (0, 3)
    },
    **{
        f"{name}[{i}] {number}": (
            value(name, [0.1] * i + [number]),
            ValueError,
            rf"{name}\[{i}\] is {number}, expected",
        )
        for i in (0, 1)
        for name, numbers in (
            ("weight_decay", NO_COEFFICIENTS),
            ("max_relative_step", (0.0, -1.0, math.nan)),
            ("floor", NO_COEFFICIENTS),
        )
        for number in numbers
    },
    **bad_scalars("found_inf"),
    **bad_roundings(2),
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

REFUSED = {
    "heavy_ball_": Refused(good_momentum, MOMENTUM_FAULTS),
    "direction_sums": Refused(good_sums, SUMS_FAULTS),
    "capped_step_": Refused(good_step, STEP_FAULTS, RATES),
}
