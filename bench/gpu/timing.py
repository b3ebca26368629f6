"""How long work takes: on the device, by its events, and for the host. On the CPU both are one."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

Run = Callable[[], Any]

FEWEST, MOST = 10, 200
"""Timed calls of one function; of one that takes half a second or more, three."""
CYCLES = 2.0e9
"""Cycles in a second, no fewer than those of any GPU: a pause of so many is at least as long as wanted."""
LONGEST_PAUSE = 0.05


@dataclass(frozen=True)
class Times:
    """Seconds of a call."""

    median: float
    p20: float
    p80: float
    runs: int

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Times:
        fifths = statistics.quantiles(seconds, n=5, method="inclusive")
        return cls(statistics.median(seconds), fifths[0], fifths[-1], len(seconds))


class Clock:
    """Times calls on one device.

    Args:
        device: a GPU, or the CPU, for which the harness is tested.
        seconds: about how long the timed calls of one function may take together.
    """

    def __init__(self, device: torch.device, seconds: float = 0.4) -> None:
        self.device, self.seconds = device, seconds

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    def synchronize(self) -> None:
        if self.on_gpu:
            torch.cuda.synchronize(self.device)

    def _waited(self, call: Run) -> tuple[float, float]:
        """Host time of a call that finds the device idle, and the time until the device has done it."""
        self.synchronize()
        start = time.perf_counter()
        call()
        returned = time.perf_counter() - start
        self.synchronize()
        return returned, time.perf_counter() - start

    def _warm(self, calls: Sequence[Run]) -> tuple[int, float]:
        """Call everything once; how many calls to time, and the host time of one."""
        for call in calls:
            self._waited(call)
        trials = [self._waited(calls[i % len(calls)]) for i in range(3)]
        whole = statistics.median(t for _, t in trials)
        fewest = FEWEST if whole < 0.5 else 3
        return min(max(math.ceil(self.seconds / max(whole, 1e-9)), fewest), MOST), max(t for t, _ in trials)

    def device_times(self, calls: Sequence[Run]) -> Times:
        """Time on the device of calls that do the same on other memory, taken in turn.

        The device is kept busy while the host makes a call, so that gaps between launches do not count: what is
        measured is the work alone, however slow the host.
        """
        count, host = self._warm(calls)
        if not self.on_gpu:
            return Times.of([self._waited(calls[i % len(calls)])[1] for i in range(count)])
        cycles = int(min(2 * host + 2e-5, LONGEST_PAUSE) * CYCLES)
        events = []
        for i in range(count):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda._sleep(cycles)
            start.record()
            calls[i % len(calls)]()
            end.record()
            events.append((start, end))
        self.synchronize()
        return Times.of([start.elapsed_time(end) / 1e3 for start, end in events])

    def wall_times(self, calls: Sequence[Run]) -> tuple[Times, Times]:
        """Host time of calls that find the device idle, and the time until the device has done the work."""
        count, _ = self._warm(calls)
        times = [self._waited(calls[i % len(calls)]) for i in range(count)]
        return Times.of([host for host, _ in times]), Times.of([wall for _, wall in times])

    def peak_memory(self, call: Run) -> int | None:
        """Bytes that a call takes at most beside what is there already; None on the CPU."""
        if not self.on_gpu:
            return None
        self.synchronize()
        torch.cuda.reset_peak_memory_stats(self.device)
        before = torch.cuda.memory_allocated(self.device)
        call()
        self.synchronize()
        return torch.cuda.max_memory_allocated(self.device) - before
