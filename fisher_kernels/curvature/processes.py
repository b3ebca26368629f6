"""Which processes train a model together, so that their statistics are added up."""

from __future__ import annotations

import math
import weakref
from collections.abc import Collection, Sequence
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import Parameter
from torch.nn.parallel import DistributedDataParallel


class Processes:
    """Those of a group that is given, or of the DistributedDataParallel that averages the gradients of parameters.

    That there are processes says nothing about what they train: without either, each is on its own.

    Args:
        given: the group, if it is known.

    Attributes:
        partners: the ranks among which layers are divided, this one among them; they have the same part of the batch.
        partner_groups: their groups, one for each dimension of their mesh.
    """

    def __init__(self, given: dist.ProcessGroup | None = None) -> None:
        self.given = given
        self.partners: frozenset[int] = frozenset()
        self.partner_groups: Sequence[Any] = ()
        self._found: list[tuple[weakref.ref[DistributedDataParallel], Any]] = []  # with their groups
        self._beside: tuple[Any, Any] | None = None  # a group, and another one of the same processes
        self._strangers: weakref.WeakSet[DistributedDataParallel] = weakref.WeakSet()

    def note(self, params: Collection[Parameter]) -> None:
        """In a forward: note what averages the gradients of these parameters, if it is within its own."""
        if self.given is None and (ddp := getattr(DistributedDataParallel, "_active_ddp_module", None)) is not None:
            self._add(ddp, params)

    def look_in(self, model: nn.Module, params: Collection[Parameter]) -> None:
        """Look for the same in a model, which may be one or have some.

        Raises:
            ValueError: several were found, of different groups.
        """
        if self.given is None and _is_initialized():
            for module in model.modules():
                if isinstance(module, DistributedDataParallel):
                    self._add(module, params)
        if len({id(group) for _, group in self._found}) > 1:
            raise ValueError(
                "process_group is None, and DistributedDataParallel averages the gradients of some parameters over "
                "other processes than those of others: expected the group over which statistics are to be added up"
            )

    def _add(self, ddp: DistributedDataParallel, params: Collection[Parameter]) -> None:
        if ddp in self._strangers or any(known() is ddp for known, _ in self._found):
            return
        if not any(p in params for p in ddp.parameters()):
            self._strangers.add(ddp)
            return
        # It may be in the place of one that is gone.
        living = [(known, group) for known, group in self._found if known() is not None]
        self._found = [*living, (weakref.ref(ddp), ddp.process_group)]

    @property
    def group(self) -> Any:
        """The group, or None if there is none."""
        return self._found[-1][1] if self.given is None and self._found else self.given

    @property
    def count(self) -> int:
        """How many there are."""
        return dist.get_world_size(self.group) if self.group is not None and _is_initialized() else 1

    @property
    def rank(self) -> int:
        """The number of this one."""
        return dist.get_rank(self.group) if self.group is not None and _is_initialized() else 0

    def group_beside(self) -> Any:
        """Another group of the same processes, for what is sent beside training; all ask for it in the same step."""
        if self._beside is None or self._beside[0] is not self.group:
            ranks = dist.get_process_group_ranks(self.group)
            # Whoever is not of the group does not know of it.
            made = dist.new_group(ranks, backend=dist.get_backend(self.group), use_local_synchronization=True)
            self._beside = self.group, made
        return self._beside[1]

    @property
    def ranks(self) -> frozenset[int]:
        """Their numbers among all processes."""
        if self.group is None or not _is_initialized():
            return frozenset()
        return frozenset(dist.get_process_group_ranks(self.group))

    @property
    def strangers(self) -> int:
        """How many processes there are of which nobody has said whether they train the same model."""
        known = max(1, len(self.partners))
        return dist.get_world_size() - known if self.group is None and _is_initialized() else 0

    @property
    def shared(self) -> set[int]:
        """Those of the group that have the same part of the batch as this process, which would count twice."""
        if not self.partners or self.group is None or not _is_initialized():
            return set()
        return (set(dist.get_process_group_ranks(self.group)) & self.partners) - {dist.get_rank()}

    def over_partners(self, figures: Tensor) -> Tensor:
        """The mean of figures over the processes that divide layers with this one."""
        total = figures.clone()
        for group in self.partner_groups:
            dist.all_reduce(total, group=group)
        return total / max(1, math.prod(map(dist.get_world_size, self.partner_groups)))

    @property
    def may_leave(self) -> bool:
        """Whether others may be without a batch, as ``Join`` allows."""
        found = (known() for known, _ in self._found)
        return any(ddp is not None and ddp._join_config.enable for ddp in found)


def _is_initialized() -> bool:
    return dist.is_available() and dist.is_initialized()
