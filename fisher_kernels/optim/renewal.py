"""What is made of averages, inverses for one: when it is made, and when it is put to use.

It is made anew at the turns of a group, which its schedule says (``refresh.py``), of averages that have changed.
Without ``overlap`` that is a part of the step. With it the step begins the work and goes on, and the next turn puts to
use what it made: of the averages, and with the damping, of the turn before. The first one of all is waited for.
Whatever time the work takes, it is used in that turn, neither before nor after.

Under overlap the state has what is to be used next, beside what is in use, under the same names after ``next_``; where
nothing is on its way the two are equal. So a state that is saved, when the work has ended, is all that training needs
to go on to the bit, and it looks the same at every time. A copy of the averages would take as much room, and whoever
loads it would have to do the work again.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, MutableMapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor
from torch.nn import Parameter

from fisher_kernels.curvature.processes import Processes
from fisher_kernels.optim.base import Counters, count
from fisher_kernels.optim.inverse_sharing import ONE_OWNER, owners, send
from fisher_kernels.optim.overlap import Overlap, Task, Work

NEXT = "next_"
"""Prefix of the names of what the next turn puts to use."""


class Item(Protocol):
    """What has averages of its own."""

    @property
    def number(self) -> int: ...

    @property
    def owner(self) -> Parameter: ...


T = TypeVar("T", bound=Item)


class Renewal(Generic[T]):
    """Base of what keeps averages and what is made of them.

    Attributes:
        bad: number of an item -> how often something could not be made, and what there was stayed, on the device.
        refused: number of an item -> how often its statistics were refused as not finite, on the device.
        processes: those that have the same averages, and may share out what is to be made.
    """

    def __init__(
        self, state: MutableMapping[Tensor, Any], groups: Mapping[Parameter, dict[str, Any]], overlap: Overlap
    ) -> None:
        self.state, self.groups = state, groups
        self.bad: Counters = {}
        self.refused: Counters = {}
        self.processes = Processes()
        self._overlap = overlap
        self._made: set[int] = set()  # of which something was made
        self._stale: set[int] = set()  # whose averages have changed since
        self._coming: set[int] = set()  # that have something to put to use
        self._works: list[Work] = []
        self._working: dict[int, Work] = {}
        self._bad_next: dict[int, Tensor] = {}

    # What subclasses define.

    def _item(self, number: int) -> T:
        raise NotImplementedError

    def _made_names(self, item: T) -> Sequence[str]:
        """The names in the state of what is made."""
        raise NotImplementedError

    def _renew(self, items: Sequence[T]) -> Iterator[Tensor]:
        """Make it and put it to use; how many parts of each item were bad and stayed as they were, int64 ()."""
        raise NotImplementedError

    def _task(self, item: T, old: Sequence[Tensor]) -> tuple[Task, Sequence[Tensor]]:
        """What makes it of copies, and these; it returns what is made, ``old`` where bad, and the number of these."""
        raise NotImplementedError

    def _put_to_use(self, item: T, made: Sequence[Tensor]) -> None:
        raise NotImplementedError

    def _cost(self, item: T) -> float:
        """What it takes to make it, beside others."""
        raise NotImplementedError

    def _handed_over(self, items: Sequence[T], makers: Mapping[int, int]) -> AbstractContextManager[None]:
        """Within it processes have what they make something of, given the number of each item and who makes it."""
        return nullcontext()

    def _to_send(self, item: T) -> list[Tensor]:
        """What the one that has made something sends to the others, of the same shapes in all of them."""
        return [self.state[item.owner][name] for name in self._made_names(item)]

    def _receive(self, item: T, sent: Sequence[Tensor]) -> None:
        """Put to use what another process has made."""
        self._put_to_use(item, sent)

    def _kept(self, item: T, made: Tensor) -> Tensor:
        """What a task has made, as it lies in the state."""
        return made

    # State.

    def _add_next(self, item: T) -> list[Tensor]:
        """What the next turn puts to use, where it is kept; what is in use, if there is nothing."""
        state = self.state[item.owner]
        for name in self._made_names(item):
            if NEXT + name not in state:
                state[NEXT + name] = state[name].clone()
        return [state[NEXT + name] for name in self._made_names(item)]

    def _overlaps(self, item: T) -> bool:
        return bool(self.groups[item.owner].get("overlap", False))

    def _note_known(self, item: T) -> None:
        """Go on with the averages of a state that was loaded."""
        self._made.add(item.number)
        self._stale.add(item.number)  # it may have been saved after an update and before an inversion
        state = self.state[item.owner]
        if all(NEXT + name in state for name in self._made_names(item)):
            self._coming.add(item.number)

    # Turns.

    def renew(self, due: Collection[int], wait: bool = False) -> list[T]:
        """Make anew what is made of averages that have changed, in groups that are due or where there is nothing yet.

        Args:
            due: identities of groups.
            wait: put it to use at once, with overlap too.

        Returns:
            Items of which something was bad and stayed as it was. Always none on other devices than the CPU, where
            reading the result would wait for the device.
        """
        self.join(due)
        kept = [item for item in self._in(sorted(self._coming), due) if self._take_next(item)]
        tasks: dict[int, Task] = {}
        reads: list[Tensor] = []
        at_once: list[T] = []
        for number in sorted(self._stale):
            item = self._item(number)
            if number in self._made and id(self.groups[item.owner]) not in due:
                continue
            if number in self._made and self._overlaps(item) and not wait:
                self._stale.discard(number)
                tasks[number], read = self._task(item, self._add_next(item))
                reads += read
            else:
                at_once.append(item)
        if tasks:
            work = self._overlap.begin(tasks, reads)
            self._works.append(work)
            self._working.update(dict.fromkeys(tasks, work))
        for item, bad in zip(at_once, self._renew_together(at_once), strict=True):
            self._stale.discard(item.number)
            kept += [item] if self._count_bad(item, bad) else []
            self._made.add(item.number)
            self._forget_next(item)
        return kept

    def _renew_together(self, items: Sequence[T]) -> Iterator[Tensor]:
        """As ``_renew``; of what groups share out each process makes a part, and gets the rest from the others."""
        shared = [item for item in items if self._is_shared(item)]
        if not shared:
            yield from self._renew(items)
            return
        makers = owners([self._cost(item) for item in shared], self.processes.count)
        owner = {item.number: rank for item, rank in zip(shared, makers, strict=True)}
        mine = [item for item in items if owner.get(item.number, self.processes.rank) == self.processes.rank]
        with self._handed_over(shared, owner):
            bad = {item.number: n for item, n in zip(mine, self._renew(mine), strict=True)}
        sent = []
        for item in shared:
            none = torch.zeros((), dtype=torch.int64, device=item.owner.device)
            sent.append((owner[item.number], [*self._to_send(item), bad.get(item.number, none)]))
        for item, (*made, number) in zip(shared, send(sent, self.processes), strict=True):
            if item.number not in bad:
                self._receive(item, made)
            bad[item.number] = number
        yield from (bad[item.number] for item in items)

    def _is_shared(self, item: T) -> bool:
        return self.processes.count > 1 and self.groups[item.owner].get("inverse_sharing") == ONE_OWNER

    def _in(self, numbers: Sequence[int], due: Collection[int]) -> Iterator[T]:
        for number in numbers:
            item = self._item(number)
            if id(self.groups[item.owner]) in due:
                yield item

    def _take_next(self, item: T) -> bool:
        """Put to use what is there for it; whether something was bad."""
        self._coming.discard(item.number)
        self._put_to_use(item, self._add_next(item))
        if not self._overlaps(item):  # any more
            self._forget_next(item)
        bad = self._bad_next.pop(item.number, None)
        return bad is not None and self._count_bad(item, bad)

    def _count_bad(self, item: T, bad: Tensor) -> bool:
        """Count what was bad; whether it is known that something was."""
        if bad.is_cpu and not bool(bad):
            return False
        count(self.bad, (item.number,), bad.reshape(1))
        return bad.is_cpu

    def _forget_next(self, item: T) -> None:
        """What is in use is all there is: of work on the item the result will be ignored."""
        self._drop(item.number)
        state = self.state[item.owner]
        for name in self._made_names(item):
            state.pop(NEXT + name, None)
        if self._overlaps(item):
            self._add_next(item)

    def _drop(self, number: int) -> None:
        self._working.pop(number, None)
        self._coming.discard(number)
        self._bad_next.pop(number, None)

    def _unmake(self, number: int) -> None:
        """What was made is of no use: it is made at once in the next step."""
        self._drop(number)
        self._stale.add(number)
        self._made.discard(number)

    # Work.

    def join(self, due: Collection[int] | None = None) -> None:
        """Wait for work on groups that are due, or for all, and keep in the state what it made.

        Work that has ended is taken too. An error goes to the list of ``overlap``; its item is made again in its next
        turn.
        """
        for work in list(self._works):
            mine = [number for number in work.numbers if self._working.get(number) is work]
            if due is not None and not work.is_done() and not any(self._in(mine, due)):
                continue
            work.join()
            self._works.remove(work)
            for number in sorted(mine):
                del self._working[number]
                item = self._item(number)
                if number in work.errors:
                    self._overlap.failed.append((item.owner, work.errors[number]))
                    self._stale.add(number)
                    continue
                *made, self._bad_next[number] = work.results[number]
                names = zip(self._made_names(item), made, strict=True)
                self.state[item.owner].update({NEXT + name: self._kept(item, x) for name, x in names})
                self._coming.add(number)
