"""Checks that the steps on lists of parameters share."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from fisher_kernels.ops._define import ACCUMULATOR

_CPU = torch.device("cpu")


def rate_of(op: str, lr: Any, name: str = "lr") -> Tensor:
    """A learning rate as a tensor: of any real number, one of numpy for example, in float64 on the CPU."""
    if isinstance(lr, Tensor):
        return lr
    if not isinstance(lr, (float, int)):
        lr = real(op, name, lr)
    return torch.full((), lr, dtype=torch.float64, device=_CPU)


def real(op: str, name: str, value: Any) -> float:
    """A real number of any kind."""
    if not hasattr(value, "__float__"):
        raise TypeError(f"{op}: {name} is of type {type(value).__name__}, expected a number")
    return float(value)


def one_or_each(value: Any) -> list[Any]:
    """What may be one for all parameters, or a sequence of one for each."""
    if isinstance(value, (float, int, str, Tensor)) or not isinstance(value, Iterable):
        return [value]
    return list(value)


def rates_of(op: str, lr: Any) -> list[Tensor]:
    """One tensor for each of the learning rates that differ, so that none is read twice."""
    made: dict[Any, Tensor] = {}
    return [
        x if isinstance(x, Tensor) else made[x] if x in made else made.setdefault(x, rate_of(op, x, f"lr[{i}]"))
        for i, x in enumerate(one_or_each(lr))
    ]


def numbers_of(op: str, name: str, values: Any) -> list[float]:
    """Numbers as floats: one for all parameters, or one for each."""
    return [
        x if isinstance(x, (float, int)) else real(op, f"{name}[{i}]", x) for i, x in enumerate(one_or_each(values))
    ]


def floors_of_layers(floor: Sequence[float], layers: Sequence[int]) -> list[float]:
    """The floor of each parameter's layer, the smallest of its parameters."""
    of_each = floor if len(floor) == len(layers) else [*floor] * len(layers)
    least: dict[int, float] = {}
    for layer, x in zip(layers, of_each, strict=True):
        least[layer] = min(x, least.get(layer, x))
    return [least[layer] for layer in layers]


def check_lists(op: str, lists: Mapping[str, Any]) -> None:
    """Refuse, by name, what is no list; for calls that have failed to make one."""
    for name, value in lists.items():
        if not isinstance(value, Iterable):
            raise TypeError(f"{op}: {name} is of type {type(value).__name__}, expected a list")


def check_distinct(op: str, name: str, tensors: Sequence[Tensor]) -> None:
    """No tensor is there twice: it would be stepped twice. Of those that overlap in another way nothing is known."""
    seen: dict[int, int] = {}
    for i, x in enumerate(tensors):
        if not isinstance(x, FakeTensor) and (x.is_meta or x.numel() == 0):
            continue
        place = id(x) if isinstance(x, FakeTensor) else x.data_ptr()
        if seen.setdefault(place, i) != i:
            raise ValueError(
                f"{op}: {name}[{i}] shares memory with {name}[{seen[place]}], expected each to be in the list once"
            )


def check_lengths(op: str, params: Sequence[Tensor], lists: Mapping[str, Sequence[Tensor | None]]) -> None:
    """All lists are as long as that of the parameters."""
    for name, values in lists.items():
        if len(values) != len(params):
            raise ValueError(f"{op}: {name} has {len(values)} tensors, expected {len(params)}, the length of params")


def check_one_or_each(op: str, name: str, values: Sequence[object], params: Sequence[Tensor]) -> None:
    """There is one of a setting for all parameters, or one for each."""
    if len(values) not in (1, len(params)):
        raise ValueError(f"{op}: {name} has {len(values)} entries, expected 1 or {len(params)}, the length of params")


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


def check_moment(op: str, name: str, x: Tensor, i: int, param: Tensor) -> None:
    """A moment of parameter i has its shape, and the wide dtype beside its own, or bfloat16 where that is float32."""
    wide = ACCUMULATOR[param.dtype]
    check_like(op, name, x, x.dtype if x.dtype in _moment_dtypes(wide) else wide, i, param)


def _moment_dtypes(wide: torch.dtype) -> tuple[torch.dtype, ...]:
    return (wide,) if wide == torch.float64 else (wide, torch.bfloat16)


def as_moment(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Values in the dtype that a moment is kept in; what is finite stays so."""
    if dtype == x.dtype:
        return x
    largest = torch.finfo(dtype).max
    return torch.where(x.isfinite(), x.clamp(-largest, largest), x).to(dtype)


def check_one_device(op: str, params: Sequence[Tensor]) -> None:
    """All parameters are where the first one is."""
    for i, p in enumerate(params):
        if p.device != params[0].device:
            raise ValueError(
                f"{op}: params[{i}] is on {p.device}, expected {params[0].device}, the device of params[0]"
            )


def check_result(
    op: str, name: str, x: Tensor, dtype: torch.dtype, shape: tuple[int, ...], device: torch.device | None
) -> None:
    """What another op returned: contiguous, on the device of the parameters."""
    if x.dtype != dtype:
        raise TypeError(f"{op}: {name} has dtype {x.dtype}, expected {dtype}")
    if tuple(x.shape) != shape:
        raise ValueError(f"{op}: {name} has shape {tuple(x.shape)}, expected {shape}")
    if device is not None and x.device != device:
        raise ValueError(f"{op}: {name} is on {x.device}, expected {device}, the device of the parameters")
    if not x.is_contiguous():
        raise ValueError(f"{op}: {name} is not contiguous: shape {tuple(x.shape)}, strides {x.stride()}")


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


def check_rates(op: str, rates: Sequence[Tensor]) -> None:
    """The same of several; what is the same tensor as the one before is not read again."""
    for i, rate in enumerate(rates):
        if i == 0 or rate is not rates[i - 1]:
            check_rate(op, rate, f"lr[{i}]")


def check_written(op: str, name: str, x: Tensor) -> None:
    """A tensor that is written holds each element once."""
    if not all(stride != 0 or size <= 1 for stride, size in zip(x.stride(), x.shape, strict=True)):
        raise ValueError(
            f"{op}: {name} has strides {x.stride()}, expected no two elements at one address, as it is written"
        )
