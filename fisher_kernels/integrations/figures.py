"""What ``metrics()`` says, as flat numbers for loggers, and as lines of a file that ``fisher-kernels plot`` draws."""

from __future__ import annotations

import json
import math
import os
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

COUNTS = ("skipped_elements", "skipped_blocks", "bad_blocks", "bad_inverses", "refused_statistics")
"""Figures that count what happened so far; of all parameters they are added up."""

PREFIX = "fisher/"
"""What names of figures begin with."""


def scalars(optimizer: Any, each: bool = False) -> dict[str, float]:
    """The figures of ``optimizer.metrics()`` by one name each, ``"fisher/damping_share"``. Waits for the device.

    Of all parameters together: the least of ``smallest_step``, the most of ``largest_step``, sums of counts, and means
    of what else there is, over the parameters, each of which counts once. What is not finite is left out. Take them
    after the step and before gradients are cleared: cosines need gradients.

    Args:
        optimizer: the optimizer, or what a framework has wrapped around one.
        each: those of each parameter too, ``"fisher/damping_share/0.weight"``.

    Raises:
        TypeError: the optimizer has no ``metrics()``.
    """
    optimizer = getattr(optimizer, "optimizer", optimizer)
    if not callable(getattr(optimizer, "metrics", None)):
        raise TypeError(f"optimizer is a {type(optimizer).__name__}, expected one of fisher_kernels, with metrics()")
    of_all: dict[str, list[float]] = defaultdict(list)
    of_each: dict[str, float] = {}
    for parameter, figures in optimizer.metrics().items():
        for name, value in figures.items():
            if math.isfinite(value):
                of_all[name].append(value)
                of_each[f"{PREFIX}{name}/{parameter}"] = value
    together = {PREFIX + name: float(_together(name)(values)) for name, values in of_all.items()}
    return {**together, **of_each} if each else together


def _together(name: str) -> Callable[[Sequence[float]], float]:
    if name in COUNTS:
        return sum
    return {"smallest_step": min, "largest_step": max}.get(name, lambda values: sum(values) / len(values))


class Recorder:
    """Writes figures to places: ``Recorder("run.jsonl", SummaryWriter(), wandb.run)``.

    Args:
        places: paths of files, to which a line of JSON with step, name and value is added for each figure; writers of
            TensorBoard, or whatever has ``add_scalar(name, value, step)``; runs of Weights & Biases, or whatever has
            ``log(figures, step=step)``.
        each: take the figures of each parameter too.

    Raises:
        TypeError: a place is none of these.
    """

    def __init__(self, *places: Any, each: bool = False) -> None:
        self.each = each
        self._writes = [_writer(place) for place in places]

    def record(self, optimizer: Any, step: int) -> dict[str, float]:
        """Write the figures of a step that was taken, while its gradients are there; returns :func:`scalars`."""
        figures = scalars(optimizer, self.each)
        for write in self._writes:
            write(step, figures)
        return figures


def _writer(place: Any) -> Callable[[int, dict[str, float]], None]:
    if isinstance(place, str | os.PathLike):
        path = Path(place)

        def add_lines(step: int, figures: dict[str, float]) -> None:
            lines = [json.dumps({"step": step, "name": name, "value": value}) for name, value in figures.items()]
            with path.open("a") as file:
                file.write("".join(f"{line}\n" for line in lines))

        return add_lines
    if callable(getattr(place, "add_scalar", None)):

        def add_scalars(step: int, figures: dict[str, float]) -> None:
            for name, value in figures.items():
                place.add_scalar(name, value, step)

        return add_scalars
    if callable(getattr(place, "log", None)):
        return lambda step, figures: place.log(figures, step=step)
    raise TypeError(
        f"place is {place!r}, expected a path, a writer of TensorBoard (add_scalar) or a run of Weights & Biases (log)"
    )


def read(path: Path) -> dict[str, dict[int, float]]:
    """Name -> step -> value of the lines of a file; of a step that was taken again the last.

    Raises:
        OSError: the file cannot be read.
        ValueError: a line is not one of a :class:`Recorder`; the message has its number.
    """
    found: dict[str, dict[int, float]] = defaultdict(dict)
    for number, line in enumerate(path.read_text().splitlines(), 1):
        if (entry := _entry(line)) is None:
            raise ValueError(f"line {number} of {path} is {line[:60]!r}, expected step, name and value")
        step, name, value = entry
        found[name][step] = value
    return {name: dict(sorted(values.items())) for name, values in found.items()}


def _entry(line: str) -> tuple[int, str, float] | None:
    try:
        entry = json.loads(line)
        return int(entry["step"]), str(entry["name"]), float(entry["value"])
    except (ValueError, KeyError, TypeError):
        return None
