"""Work that runs beside training: on a thread of its own, and where it reads a GPU on a stream of its own there.

The thread is there on a GPU too, for solvers that wait for what they find. Nothing here decides when results are used:
that is the caller's, so that they depend on no timing.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack

import torch
from torch import Tensor
from torch._C import _DisableAutocast
from torch.nn import Parameter

from fisher_kernels import backends

Task = Callable[[], tuple[Tensor, ...]]
"""Reads tensors that nobody writes to while it runs, and returns new ones. It must not hold the optimizer."""

Lane = tuple[torch.cuda.Stream, torch.cuda.Event]
"""A stream for the work, and when on its GPU there is what the work reads."""


class Work:
    """Tasks that run one after another. After :meth:`join` their results, and errors, are there by their numbers."""

    def __init__(self, tasks: Mapping[int, Task], lanes: list[Lane]) -> None:
        self.results: dict[int, tuple[Tensor, ...]] = {}
        self.errors: dict[int, Exception] = {}
        self.numbers = frozenset(tasks)
        self._tasks = dict(tasks)  # those that have not ended
        self._lanes = lanes
        self._ends: list[torch.cuda.Event] = []
        self._backend = backends.selected()
        self._process = os.getpid()
        self._future: Future[None] | None = None

    def start(self, pool: ThreadPoolExecutor) -> None:
        """Run on a thread. Without this, and in a process that was forked meanwhile, the work runs in the join."""
        self._future = pool.submit(self._run)

    def is_done(self) -> bool:
        """Whether neither the caller nor a stream would wait in a join."""
        return not self._tasks and len(self._ends) == len(self._lanes) and all(end.query() for end in self._ends)

    def join(self) -> None:
        """Wait until all has run; on a GPU the stream in use waits, not the caller."""
        if self._future is None or self._process != os.getpid():
            self._run()
        else:
            self._future.result()
        for (stream, _), end in zip(self._lanes, self._ends, strict=True):
            current = torch.cuda.current_stream(stream.device)
            current.wait_event(end)
            for x in (x for made in self.results.values() for x in made if x.device == stream.device):
                x.record_stream(current)  # its memory is of the other stream

    def _run(self) -> None:
        with ExitStack() as stack:
            stack.enter_context(torch.no_grad())
            stack.enter_context(_DisableAutocast())
            stack.enter_context(backends.of_this_thread(self._backend))
            for stream, ready in self._lanes:
                stack.enter_context(torch.cuda.stream(stream))
                stream.wait_event(ready)
            for number in list(self._tasks):
                try:
                    self.results[number] = self._tasks[number]()
                except Exception as error:
                    self.errors[number] = error
                del self._tasks[number]  # and with it what it reads
            self._ends = [stream.record_event() for stream, _ in self._lanes]


class Overlap:
    """Begins work. Its thread ends in :meth:`close`, or when nothing refers to it any more.

    Attributes:
        failed: for its user to fill: parameters on which work raised an error, and the errors.
    """

    def __init__(self) -> None:
        self._pool: ThreadPoolExecutor | None = None
        self._made_for: tuple[int, int] | None = None
        self._streams: dict[torch.device, torch.cuda.Stream] = {}
        self._closed = False
        self.failed: list[tuple[Parameter, Exception]] = []

    def begin(self, tasks: Mapping[int, Task], reads: Iterable[Tensor]) -> Work:
        """Let tasks run beside what comes next; ``reads`` are all tensors that they read."""
        lanes: dict[torch.device, Lane] = {}
        for x in reads:
            if x.is_cuda:
                if x.device not in lanes:
                    stream = self._streams.get(x.device) or torch.cuda.Stream(x.device)
                    self._streams[x.device] = stream
                    lanes[x.device] = stream, torch.cuda.current_stream(x.device).record_event()
                x.record_stream(lanes[x.device][0])  # it may be freed before it was read
        work = Work(tasks, list(lanes.values()))
        if not self._closed:
            work.start(self._threads())
        return work

    def close(self) -> None:
        """End the thread, when it has run what was begun. What is begun later runs where it is joined."""
        self._closed = True
        if self._pool is not None:
            self._pool.shutdown(wait=False)

    def _threads(self) -> ThreadPoolExecutor:
        # A thread computes with as many as torch is told to when it starts; a forked process has none of its parent's.
        here = os.getpid(), torch.get_num_threads()
        if self._pool is None or self._made_for != here:
            self._pool, self._made_for = ThreadPoolExecutor(1, "fisher_kernels"), here
        return self._pool
