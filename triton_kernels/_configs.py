"""Block sizes and warps, which change the speed of a kernel but never its results, by device and size of the work.

Only kernels without sums of floating-point numbers have entries: in a sum they would change the bits. ``configs.json``
is what ``python -m bench.tune`` measured on the devices it names; every other device gets the default. With
``FISHER_KERNELS_AUTOTUNE=1`` an unknown device is measured when a kernel first meets a size class, on tensors made for
it, and the result kept in the user's cache folder.
"""

import functools
import json
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch

from ._launch import INTERPRETED, is_recording


class Config(NamedTuple):
    """Elements that a program works on at a time, and the warps that share them."""

    block: int
    warps: int


Trial = Callable[[torch.device, int], Callable[[], object]]

SMALL = 2**20
"""Work of fewer elements is of the class "small", all other of the class "large"."""
CANDIDATES = tuple(Config(block, warps) for block in (128, 256, 512, 1024, 2048) for warps in (2, 4, 8))

_Table = dict[str, dict[str, dict[str, list[int]]]]  # kernel, device, size class -> block and warps
_trials: dict[str, Trial] = {}
_forced: dict[str, Config] = {}


def trial(kernel: str) -> Callable[[Trial], Trial]:
    """Register what makes, for a device and a number of elements, a call that runs the kernel on made-up tensors."""

    def register(make: Trial) -> Trial:
        _trials[kernel] = make
        return make

    return register


def trials() -> set[str]:
    """The kernels of the modules imported so far that can be tuned."""
    return set(_trials)


def size_class(size: int) -> str:
    """The name of a class of sizes."""
    return "small" if size < SMALL else "large"


@functools.cache
def device_name(device: torch.device) -> str:
    """``cuda:90`` or ``hip:gfx942``, what a table has entries for; ``interpreter`` for a device that is no GPU."""
    if device.type == "cpu":
        return "interpreter"
    properties = torch.cuda.get_device_properties(device)
    architecture = getattr(properties, "gcnArchName", "").split(":")[0]
    return f"hip:{architecture}" if torch.version.hip else f"cuda:{properties.major}{properties.minor}"


@functools.cache
def table() -> _Table:
    """The table that comes with the package."""
    return json.loads(Path(__file__).with_name("configs.json").read_text())


def listed(kernel: str, device: str) -> set[Config]:
    """Every configuration that a kernel may run in on a device of this name."""
    entries = table()[kernel]
    return {Config(*entry) for entry in entries.get(device, entries["default"]).values()}


def config(kernel: str, device: torch.device, size: int) -> Config:
    """The configuration of a kernel for work of so many elements on a device."""
    if kernel in _forced:
        return _forced[kernel]
    entries, name = table()[kernel], device_name(device)
    if name not in entries and _asked() and not (INTERPRETED or is_recording() or device.type == "cpu"):
        return _tuned(kernel, device, size_class(size))
    return Config(*entries.get(name, entries["default"])[size_class(size)])


@contextmanager
def forced(kernel: str, chosen: Config) -> Iterator[None]:
    """Run a kernel in one configuration whatever the table says."""
    _forced[kernel] = chosen
    try:
        yield
    finally:
        del _forced[kernel]


# Measuring.


def tune(kernel: str, device: torch.device, size: str) -> dict[Config, float]:
    """Milliseconds of a kernel in every candidate that compiles, on tensors made for it; no user data are touched."""
    from triton.testing import do_bench

    call = _trials[kernel](device, SMALL // 16 if size == "small" else 64 * SMALL)
    times = {}
    for candidate in CANDIDATES:
        with forced(kernel, candidate):
            times[candidate] = do_bench(call, return_mode="median")
    return times


def _asked() -> bool:
    return os.environ.get("FISHER_KERNELS_AUTOTUNE") == "1"


def cache_file() -> Path:
    """Where what was measured for this user is kept."""
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return folder / "fisher_kernels" / "configs.json"


@functools.cache
def _tuned(kernel: str, device: torch.device, size: str) -> Config:
    if torch.cuda.is_current_stream_capturing():
        warnings.warn(f"{kernel} is not tuned while a CUDA graph is captured; the default runs", stacklevel=2)
        return Config(*table()[kernel]["default"][size])
    name = torch.cuda.get_device_name(device)
    file = cache_file()
    kept: _Table = json.loads(file.read_text()) if file.exists() else {}
    found = kept.get(kernel, {}).get(name, {}).get(size)
    if found is None:
        times = tune(kernel, device, size)
        best = min(times, key=lambda candidate: times[candidate])
        found = kept.setdefault(kernel, {}).setdefault(name, {})[size] = list(best)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(kept, indent=2))
    return Config(*found)
