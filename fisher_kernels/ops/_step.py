"""Checks that the steps on lists of parameters share."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor


def check_lengths(op: str, params: Sequence[Tensor], lists: Mapping[str, Sequence[Tensor | None]]) -> None:
    """All lists are as long as that of the parameters."""
    for name, values in lists.items():
        if len(values) != len(params):
            raise ValueError(f"{op}: {name} has {len(values)} tensors, expected {len(params)}, the length of params")


def check_beside(op: str, name: str, x: Tensor, dtype: torch.dtype, i: int, param: Tensor) -> None:
    """A tensor is on the device of parameter i and has the dtype that goes with it."""
    if x.dtype != dtype:
        raise TypeError(f"{op}: {name} has dtype {x.dtype}, expected {dtype} beside params[{i}] of dtype {param.dtype}")
    if x.device != param.device:
        raise ValueError(f"{op}: {name} is on {x.device}, expected {param.device}, the device of params[{i}]")


def check_like(op: str, name: str, x: Tensor, dtype: torch.dtype, i: int, param: Tensor) -> None:
    """As ``check_beside``, and of the shape of the parameter."""
    if x.shape != param.shape:
        raise ValueError(
            f"{op}: {name} has shape {tuple(x.shape)}, expected {tuple(param.shape)}, the shape of params[{i}]"
        )
    check_beside(op, name, x, dtype, i, param)


def check_one_element(op: str, name: str, x: Tensor | None, device: torch.device | None) -> None:
    """A scalar is a float of one element, on the device of the parameters or where it costs nothing to read."""
    if x is None:
        return
    if x.numel() != 1:
        raise ValueError(f"{op}: {name} has shape {tuple(x.shape)}, expected one element")
    if x.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"{op}: {name} has dtype {x.dtype}, expected float32 or float64")
    if not (x.device.type == "cpu" or x.device == device):
        raise ValueError(f"{op}: {name} is on {x.device}, expected cpu or the device of the parameters, {device}")


def check_count(op: str, i: int, t: Tensor, param: Tensor) -> None:
    """A number of steps is one float32 element."""
    check_one_element(op, f"steps[{i}]", t, param.device)
    if t.dtype != torch.float32:
        raise TypeError(f"{op}: steps[{i}] has dtype {t.dtype}, expected float32")


def found_on_device(found_inf: Tensor | None, device: torch.device | None) -> tuple[bool, Tensor | None]:
    """Whether the host knows that a step does nothing, and what its kernels have to check on their device."""
    if found_inf is None or found_inf.device == device:
        return False, found_inf
    return bool(found_inf), None


def check_rate(op: str, lr: Tensor, name: str = "lr") -> None:
    """A learning rate is finite and not negative."""
    # Not on another device: reading it would wait for all the work queued there.
    if lr.device.type == "cpu" and not 0 <= lr.item() < math.inf:
        raise ValueError(f"{op}: {name} is {lr.item()}, expected a finite number of at least 0")


def check_written(op: str, name: str, x: Tensor) -> None:
    """A tensor that is written holds each element once."""
    if not all(stride != 0 or size <= 1 for stride, size in zip(x.stride(), x.shape, strict=True)):
        raise ValueError(
            f"{op}: {name} has strides {x.stride()}, expected no two elements at one address, as it is written"
        )
