"""Sends the CPU tensors of an op through a device and back, so that a GPU takes the tests that the CPU takes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from fisher_kernels import backends

ALIGNMENT = 256
"""A storage lies on the device as it does on the host, counted modulo so many bytes."""


class Luggage:
    """Copies on a device of whole storages, in which the views of a call are made again.

    Views that share memory do so there, with the same memory around them.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._storages: dict[int, tuple[Tensor, Tensor, int]] = {}  # bytes on the host, on the device, where they begin
        self._views: list[tuple[Tensor, Tensor, int]] = []  # here, there, and how often there was written before

    def pack(self, value: Any) -> Any:
        """A tensor on the device for each tensor on the CPU, in lists too; everything else as it is."""
        if isinstance(value, (list, tuple)):
            return _like(value, map(self.pack, value))
        if not (isinstance(value, Tensor) and value.device.type == "cpu"):
            return value
        _, there, begin = self._copied(value.untyped_storage())
        view = torch.empty(0, dtype=value.dtype, device=self.device)
        offset = begin // value.element_size() + value.storage_offset()
        view.set_(there.untyped_storage(), offset, value.shape, value.stride())
        if not view.is_inference():
            self._views.append((value, view, view._version))
        return view

    def _copied(self, storage: torch.UntypedStorage) -> tuple[Tensor, Tensor, int]:
        key = storage._cdata
        if key not in self._storages:
            here = torch.empty(0, dtype=torch.uint8).set_(storage)
            there = torch.empty(len(here) + ALIGNMENT, dtype=torch.uint8, device=self.device)
            begin = (storage.data_ptr() - there.data_ptr()) % ALIGNMENT
            begin -= begin % 8  # elements that lie across their own size have no place on a GPU
            there[begin : begin + len(here)] = here.to(self.device)
            self._storages[key] = here, there, begin
        return self._storages[key]

    def unpack(self) -> None:
        """Bring back what was changed: bytes, and the counts of writes that autograd looks at."""
        for here, there, begin in self._storages.values():
            now = there[begin : begin + len(here)].cpu()
            if not torch.equal(now, here):
                here.copy_(now)
        increment_version([value for value, view, writes in self._views if view._version > writes])


def _like(value: list[Any] | tuple[Any, ...], items: Iterable[Any]) -> Any:
    """A list, a tuple or a named tuple like ``value``, of other items."""
    return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)


def home(value: Any) -> Any:
    """Results as tensors on the CPU."""
    if isinstance(value, (list, tuple)):
        return _like(value, map(home, value))
    return value.to("cpu", copy=True) if isinstance(value, Tensor) else value


def round_trip(run: Callable[..., Any], device: torch.device) -> Callable[..., Any]:
    """An implementation of an op for CPU tensors out of one for tensors of a device.

    Arguments by position make the journey; those by keyword are numbers in tensors of one element (rates, scales),
    which ops take from the CPU beside tensors of any device. Errors name the CPU for the device.
    """

    def there_and_back(*args: Any, **kwargs: Any) -> Any:
        luggage = Luggage(device)
        packed = [luggage.pack(x) for x in args]
        try:
            return home(run(*packed, **kwargs))
        except Exception as error:
            error.args = tuple(x.replace(str(device), "cpu") if isinstance(x, str) else x for x in error.args)
            raise
        finally:
            luggage.unpack()

    return there_and_back


@contextmanager
def through(device: torch.device) -> Iterator[None]:
    """Inside, ``use_backend("cuda")`` and ``use_backend("triton")`` take CPU tensors, by way of ``device``."""
    choose = backends.choose

    def choose_the_way(op: str, kind: str, implemented: Iterable[str], argument: Any = None) -> str:
        selected = backends._selected
        if selected not in ("cuda", "triton") or kind != "cpu" or selected not in implemented:
            return choose(op, kind, implemented, argument)
        assert isinstance(implemented, dict)
        name = f"{selected} by way of {device}"
        implemented.setdefault(name, round_trip(implemented[selected], device))
        return name

    backends.choose = choose_the_way
    try:
        yield
    finally:
        backends.choose = choose
