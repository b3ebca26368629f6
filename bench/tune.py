"""Measures the Triton kernels in every configuration on this GPU; the fastest goes into triton_kernels/configs.json.

``python -m bench.tune``, from a checkout, on a GPU that nothing else uses.
"""

from __future__ import annotations

import importlib
import json
import pkgutil
import sys
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from fisher_kernels import backends, triton_kernels
from fisher_kernels.triton_kernels import _configs

FILE = Path(__file__).parent.parent / "triton_kernels" / "configs.json"


def main() -> None:
    """Tune all kernels for the current device."""
    if reason := backends.reasons()["triton"]:
        sys.exit(f"nothing can be tuned: {reason}")
    for module in pkgutil.iter_modules(triton_kernels.__path__):
        importlib.import_module(f"fisher_kernels.triton_kernels.{module.name}")
    device = torch.device("cuda", torch.cuda.current_device())
    name = _configs.device_name(device)
    shown = Table("kernel", "size", "default", "fastest", "gain", title=f"{torch.cuda.get_device_name(device)}, {name}")
    for kernel in sorted(_configs.trials()):
        for size in ("small", "large"):
            times = _configs.tune(kernel, device, size)
            default = _configs.Config(*_configs.table()[kernel]["default"][size])
            best = min(times, key=lambda candidate: times[candidate])
            write(kernel, name, size, best)
            gain = f"{times[default] / times[best]:.2f} x" if default in times else ""
            shown.add_row(kernel, size, str(tuple(default)), str(tuple(best)), gain)
    Console().print(shown)


def write(kernel: str, device: str, size: str, chosen: _configs.Config, file: Path = FILE) -> None:
    """Put one entry into the table; the rest stays as it is."""
    table = json.loads(file.read_text())
    entries = table[kernel]
    entries.setdefault(device, dict(entries["default"]))[size] = list(chosen)
    file.write_text(layout(table))


def layout(table: dict[str, dict[str, dict[str, list[int]]]]) -> str:
    """The table as it stands in the file: a line for each device."""
    kernels = [
        f'  "{kernel}": {{\n'
        + ",\n".join(f'    "{device}": {json.dumps(sizes)}' for device, sizes in sorted(devices.items()))
        + "\n  }"
        for kernel, devices in sorted(table.items())
    ]
    return "{\n" + ",\n".join(kernels) + "\n}\n"


if __name__ == "__main__":
    main()
