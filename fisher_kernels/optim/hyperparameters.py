"""Hyperparameters of a parameter group: of what kind they are, said by name, and kept as plain Python values.

A number of numpy, kept as such, would be in every checkpoint, which then loads with ``weights_only=False`` alone.
"""

from __future__ import annotations

import numbers
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor


def require_numbers(group: dict[str, Any], names: Iterable[str], expected: str = "a number") -> None:
    """Refuse hyperparameters that are no real numbers, and those beyond the range of float64."""
    for name in names:
        value = group[name]
        if type(value) is float:
            continue
        if isinstance(value, Tensor):
            _require_scalar(name, value, expected)
        elif isinstance(value, bool) or not isinstance(value, numbers.Real):
            raise TypeError(f"{name} is {value!r}, expected {expected}")
        else:
            try:
                number = float(value)
            except OverflowError:
                raise ValueError(f"{name} is beyond the range of float64, expected {expected} within it") from None
            group[name] = int(value) if isinstance(value, numbers.Integral) else number


def _require_scalar(name: str, value: Tensor, expected: str) -> None:
    if value.is_nested or value.numel() != 1:
        shape = "that of a nested tensor" if value.is_nested else tuple(value.shape)
        raise ValueError(f"{name} has shape {shape}, expected {expected}")
    if value.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"{name} has dtype {value.dtype}, expected {expected}: float32 or float64 if it is a tensor")


def require_counts(group: dict[str, Any], names: Iterable[str]) -> None:
    """Refuse hyperparameters that are no integers of at least 1."""
    for name in names:
        value = group[name]
        if isinstance(value, bool) or not isinstance(value, numbers.Integral) or value < 1:
            raise ValueError(f"{name} is {value!r}, expected an integer of at least 1")
        group[name] = int(value)


def require_bools(group: dict[str, Any], names: Iterable[str]) -> None:
    """Refuse hyperparameters that are neither True nor False: the text ``"False"`` would count as true."""
    for name in names:
        if not isinstance(group[name], bool):
            raise TypeError(f"{name} is {group[name]!r}, expected True or False")


def require_moment_dtype(group: dict[str, Any]) -> None:
    """Refuse a dtype of moments that no step takes."""
    dtype = group["moment_dtype"]
    if not (dtype is None or dtype == torch.bfloat16):
        raise ValueError(f"moment_dtype is {dtype!r}, expected torch.bfloat16, or None for float32")


def require_seed(group: dict[str, Any]) -> None:
    """Refuse a seed that is no integer of 64 bits."""
    seed = group["seed"]
    if isinstance(seed, bool) or not isinstance(seed, numbers.Integral) or not 0 <= int(seed) < 2**64:
        raise ValueError(f"seed is {seed!r}, expected an integer of 0 to 2^64 - 1")
    group["seed"] = int(seed)


def require_choice(group: dict[str, Any], name: str, choices: Iterable[str], others: str = "") -> None:
    """Refuse a hyperparameter that is none of these words."""
    value = group[name]
    if not isinstance(value, str) or value not in choices:
        expected = " ".join([", ".join(map(repr, choices)), *filter(None, [others])])
        raise ValueError(f"{name} is {value!r}, expected one of {expected}")
    group[name] = next(choice for choice in choices if choice == value)  # not a subclass of str
