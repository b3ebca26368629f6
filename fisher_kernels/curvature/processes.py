"""Which processes train a model together, so that their statistics are added up."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Collection
from typing import Any

import torch.distributed as dist
from torch.nn import Parameter
from torch.nn.parallel import DistributedDataParallel


class Processes:
    """Those of a group that is given, or of the DistributedDataParallel that averages the gradients of parameters.

    That there are processes says nothing about what they train: without either, each is on its own.

    Args:
        given: the group, if it is known.
    """

    def __init__(self, given: dist.ProcessGroup | None = None) -> None:
        self.given = given
        self._wrapper: weakref.ref[Any] | None = None
        self._looks = 0

    def look(self, params: Collection[Parameter]) -> None:
        """Look for what averages the gradients of these parameters, where nothing is known.

        All objects are gone through for that, so it happens in the first call that finds nothing, in the second, the
        fourth and so on, which are the same ones in all processes.

        Raises:
            ValueError: there are several of them, of different groups.
        """
        if self.given is not None or self.wrapper is not None or not _is_initialized():
            return
        self._looks += 1
        if self._looks & (self._looks - 1):
            return
        found = [o for o in gc.get_objects() if issubclass(type(o), DistributedDataParallel)]
        found = [ddp for ddp in found if any(p in params for p in ddp.parameters())]
        if len({id(ddp.process_group) for ddp in found}) > 1:
            raise ValueError(
                "process_group is None, and DistributedDataParallel averages the gradients of some parameters over "
                "other processes than those of others: expected the group over which statistics are to be added up"
            )
        self._wrapper = weakref.ref(found[0]) if found else None

    @property
    def wrapper(self) -> Any:
        """The DistributedDataParallel that was found, or None."""
        return None if self._wrapper is None else self._wrapper()

    @property
    def group(self) -> Any:
        """The group, or None if there is none."""
        if self.given is not None or self.wrapper is None:
            return self.given
        return self.wrapper.process_group

    @property
    def count(self) -> int:
        """How many there are."""
        return dist.get_world_size(self.group) if self.group is not None and _is_initialized() else 1

    @property
    def rank(self) -> int:
        """The number of this one."""
        return dist.get_rank(self.group) if self.group is not None and _is_initialized() else 0

    @property
    def strangers(self) -> int:
        """How many processes there are of which nobody has said whether they train the same model."""
        return dist.get_world_size() - 1 if self.group is None and _is_initialized() else 0

    @property
    def may_leave(self) -> bool:
        """Whether others may be without a batch, as ``Join`` allows."""
        return self.wrapper is not None and self.wrapper._join_config.enable


def _is_initialized() -> bool:
    return dist.is_available() and dist.is_initialized()
