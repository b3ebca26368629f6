"""The averaged Fisher blocks of MBF and their inverses, kept in the optimizer's state."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from fisher_kernels.curvature.block_rules import BlockRule, Blocks
from fisher_kernels.curvature.rules import Sums
from fisher_kernels.curvature.scattered import Division
from fisher_kernels.curvature.sites import Site
from fisher_kernels.ops import ACCUMULATOR, block_inverse, block_inverse_, factor_ema_
from fisher_kernels.ops._blocks import pack, unpack
from fisher_kernels.optim.base import count
from fisher_kernels.optim.overlap import Overlap, Task
from fisher_kernels.optim.renewal import NEXT, Renewal
from fisher_kernels.optim.row_shards import RowShards, in_each_row
from fisher_kernels.optim.shares import whole

STORAGES = ("full", "packed", "bfloat16")
"""How inverses are stored: as they are, one triangle of each where there are many small ones, or in 16 bits."""

STATE = ("fisher_blocks", "inverse_blocks", "fisher_updates")
"""State: averaged blocks, their inverses, how many batches were averaged."""

ASIDE = "unused_"
"""Prefix of the same where a layer was not used, beside those of the layer."""

BLOCK_STATE = tuple(prefix + name for prefix in ("", ASIDE, NEXT, NEXT + ASIDE) for name in STATE)
"""All names that there may be of these."""

CHUNK = 1 << 20
"""How many numbers of inverses are held on their way into another form of storage."""


@dataclass(eq=False)
class Part:
    """Blocks that are kept together, and the parameters that they serve.

    Attributes:
        owner: the parameter that keeps them in its state.
        weight, biases: the two columns of joint blocks; the first bias lies beside the weight, the others alone.
        alone: parameters that have all of the blocks to themselves, one by one.
        address: site and position of the raw sum among its sums; None for a fallback.
        prefix: of the names of its state.
        coupled: whether weight and bias are stepped together. If not, the inverse is that of the blocks without the
            entries in which they meet; None before it is known.
        shards: where its blocks are divided with the rows of the parameters; None where all are here.
    """

    number: int
    owner: Parameter
    blocks: Blocks
    weight: Parameter | None = None
    biases: tuple[Parameter, ...] = ()
    alone: tuple[Parameter, ...] = ()
    address: tuple[int, int] | None = None
    coupled: bool | None = None
    prefix: str = ""
    shards: RowShards | None = None

    @property
    def params(self) -> tuple[Parameter, ...]:
        """All parameters that it serves."""
        return (*(() if self.weight is None else (self.weight,)), *self.biases, *self.alone)

    @property
    def goes_with_rows(self) -> bool:
        """Whether the blocks are divided where ``fully_shard`` divides the parameters."""
        return in_each_row(self.blocks, self.params) is not None

    def here(self, x: Tensor) -> Tensor:
        """Those of the blocks that are here, (count, ...), of what lies in the state."""
        return x if self.shards is None else self.shards.here(x)

    def placed(self, own: Tensor) -> Tensor:
        """The blocks that are here as they lie in the state."""
        return own if self.shards is None else self.shards.placed(own)

    def all_of(self, own: Tensor) -> Tensor:
        """All blocks, given those that are here; where they are divided every process has to ask."""
        return own if self.shards is None else self.shards.whole(own)

    def loaded(self, x: Tensor) -> Tensor:
        """Blocks of a checkpoint as they lie in the state."""
        return whole(x) if self.shards is None else self.shards.loaded(x)


@dataclass
class Unit:
    """One entry of the step: a parameter, or a weight and its bias side by side, and the inverse of its blocks."""

    params: tuple[Parameter, ...]
    inverse: Tensor
    transposed: bool = False
    part: Part | None = None

    @property
    def layer(self) -> int:
        """A number that the units of one layer have in common, weight and bias among them."""
        if self.part is None:
            raise ValueError("part is None, expected the blocks that the unit is of")
        return -1 - self.part.number if self.part.address is None else self.part.address[0]

    @property
    def is_stack(self) -> bool:
        """Whether a stack of matrices is stepped as one matrix of all their rows, which share blocks."""
        return self.inverse.dim() == 4 and self.params[0].dim() == 3

    @property
    def is_divided(self) -> bool:
        """Whether the inverse is that of the rows which are here."""
        return self.part is not None and self.part.shards is not None

    def whole(self) -> Unit:
        """The same with all of the inverse; where it is divided every process has to ask."""
        return self if self.part is None else replace(self, inverse=self.part.all_of(self.inverse))


New = tuple[Part, Tensor, float, float]
"""A part, raw sums of its blocks, end to end, what they are divided by to be a mean, and over how many samples.

Where blocks are divided they are those that are here, and one number that is finite if all are where there is none.
"""

Divide = Callable[[Blocks, Sequence[Parameter]], RowShards | None]
"""Blocks and the parameters that they serve -> how they are divided."""


def packs(blocks: Blocks) -> bool:
    """Whether blocks can be stored as triangles: they are neither shared nor single numbers."""
    return blocks.shared_by is None and blocks.size > 1


class FisherBlocks(Renewal[Part]):
    """Moving averages of the blocks of every layer, their inverses, and what the step reads of them.

    Parameters that something else serves (``elsewhere``) have none, but for those that are set aside.

    ``state[owner]`` has ``fisher_blocks`` (count, size, size), ``inverse_blocks`` of that shape or (count, size (size +
    1) / 2) if packed, identities at first, and ``fisher_updates``, how many batches were averaged. All else here is
    derived from them. Blocks that are divided lie there as ``row_shards.py`` says.

    Attributes:
        parts: all of them; their positions are their numbers.
        version: counts the changes of what :meth:`units` returns.
        known_sites: indices of the sites that have statistics.
        bad: part -> how many blocks kept an older inverse so far, on the device.
    """

    def __init__(
        self,
        sites: Sequence[Site[BlockRule]],
        state: MutableMapping[Tensor, Any],
        groups: Mapping[Parameter, dict[str, Any]],
        overlap: Overlap,
        elsewhere: Collection[Parameter] = (),
        divide: Divide = lambda blocks, params: None,
    ) -> None:
        super().__init__(state, groups, overlap)
        self._divide = divide
        self.parts: list[Part] = []
        self.version = 0
        self._of_site: dict[int, list[Part]] = defaultdict(list)
        served: set[Parameter] = set(elsewhere)
        for index, site in enumerate(sites):
            for part in self._parts_of(index, site, served):
                self._of_site[index].append(part)
        self.unruled = [self._add_single(p) for p in groups if p not in served]
        self._aside: dict[Parameter, Part] = {}  # parts of parameters whose layers are not used now
        self._all_aside: dict[Parameter, Part] = {}  # or were not at some time
        self._averaged: set[int] = set()
        for part in self.parts:
            self._note_if_known(part)
        self.known_sites = {p.address[0] for p in self.parts if p.address and p.number in self._averaged}
        self._slices: dict[tuple[int, str], Tensor] = {}
        self._arrivals: dict[int, Tensor] = {}

    def _add(self, owner: Parameter, blocks: Blocks, **kept: Any) -> Part:
        part = Part(len(self.parts), owner, blocks, **kept)
        part.shards = self._divide(blocks, part.params)
        self.parts.append(part)
        return part

    def _add_single(self, p: Parameter, prefix: str = "") -> Part:
        return self._add(p, Blocks(("weight",), p.numel(), 1), alone=(p,), prefix=prefix)

    def set_aside(self, params: Collection[Parameter]) -> None:
        """Let these parameters, and no others that a layer serves, have 1 x 1 blocks of their own."""
        if self._aside.keys() != set(params):
            for p in params:
                if p not in self._all_aside:
                    self._all_aside[p] = self._add_single(p, ASIDE)
                    self._note_if_known(self._all_aside[p])
            self._aside = {p: self._all_aside[p] for p in params}
            self.version += 1

    def fallbacks(self) -> list[Part]:
        """The parts that take their blocks from gradients."""
        return [*self.unruled, *self._aside.values()]

    def aside_without_state(self) -> list[Parameter]:
        """The parameters set aside whose own blocks are not in the state."""
        name = ASIDE + "fisher_updates"
        return [p for p in self._aside if p in self.state and name not in self.state[p]]

    def is_averaged(self, part: Part) -> bool:
        """Whether a part has statistics."""
        return part.number in self._averaged

    def by_rows(self) -> set[Parameter]:
        """The parameters whose blocks are divided where ``fully_shard`` divides them."""
        acting = [(part, p) for part in self.parts for p in part.params if self._acts(part, p)]
        return {p for part, p in acting if part.goes_with_rows}

    def divided_state(self, p: Parameter) -> list[str]:
        """The names of such blocks in its state, and of their inverses."""
        parts = (part for part in self.parts if part.owner is p and part.goes_with_rows)
        return [name for part in parts for name in self._names(part)]

    def share_of(self, p: Parameter) -> str:
        """How many of the blocks of a parameter are here, in words, if they are divided."""
        for part in self.parts:
            if part.shards is not None and self._acts(part, p) and any(p is q for q in part.params):
                return f", {part.shards.count:,} of them in this process"
        return ""

    def _acts(self, part: Part, p: Parameter) -> bool:
        """Whether a parameter is stepped with a part."""
        return self._aside.get(p, part) is part and (not part.prefix or p in self._aside)

    def _parts_of(self, index: int, site: Site[BlockRule], served: set[Parameter]) -> Iterator[Part]:
        """The parts of one site. A parameter that another site serves already is not served twice."""
        for position, blocks in enumerate(site.rule.blocks):
            held = {}
            for role in blocks.roles:
                found = [_held(layer, role) for layer in site.layers]
                held[role] = tuple(dict.fromkeys(p for p in found if p is not None and p not in served))
            params = [p for of_role in held.values() for p in of_role]
            if not params:
                continue
            served.update(params)
            if len(blocks.roles) == 2:
                weight = next(iter(held["weight"]), None)
                yield self._add(
                    params[0], blocks, weight=weight, biases=held["bias"], address=(index, position), coupled=None
                )
            else:
                yield self._add(params[0], blocks, alone=tuple(params), address=(index, position))

    # State.

    def _updates(self, part: Part) -> int:
        updates = self.state.get(part.owner, {}).get(part.prefix + "fisher_updates")
        return 0 if updates is None else int(updates)

    def _names(self, part: Part) -> list[str]:
        """The names of its blocks and inverses in the state."""
        state, names = self.state.get(part.owner, {}), (part.prefix + name for name in STATE[:2])
        return [kept for name in names for kept in (name, NEXT + name) if kept in state]

    def saved(self) -> Iterator[tuple[Parameter, dict[str, Tensor]]]:
        """What checkpoints have otherwise than the state; where blocks are divided every process has to ask."""
        for part in self.parts:
            if part.shards is not None:
                state = self.state.get(part.owner, {})
                yield part.owner, {name: part.shards.saved(state[name]) for name in self._names(part)}

    def _note_if_known(self, part: Part) -> None:
        for name in self._names(part):
            self.state[part.owner][name] = part.loaded(self.state[part.owner][name])
        if self._updates(part) > 0:
            self._averaged.add(part.number)
            self._note_known(part)

    def averages(self, part: Part) -> tuple[Tensor, Tensor, Tensor]:
        """Of a part the averaged blocks that are here, their inverses and the number of updates; made on first use."""
        state = self.state[part.owner]
        blocks, inverses, updates = (part.prefix + name for name in STATE)
        if blocks not in state:
            state[blocks], state[inverses] = self._new_averages(part)
            state[updates] = torch.zeros((), dtype=torch.float32, device=part.owner.device)
            if self._overlaps(part):
                self._add_next(part)
        return part.here(state[blocks]), part.here(state[inverses]), state[updates]

    def _new_averages(self, part: Part) -> tuple[Tensor, Tensor]:
        blocks, owner = part.blocks, part.owner
        wide = ACCUMULATOR[owner.dtype]
        count = blocks.count if part.shards is None else part.shards.count
        averages = torch.zeros((count, blocks.size, blocks.size), dtype=wide, device=owner.device)
        storage = self.groups[owner].get("inverse_storage", "full")
        identity = torch.eye(
            blocks.size, dtype=torch.bfloat16 if storage == "bfloat16" else wide, device=owner.device
        ).unsqueeze(0)
        if storage == "packed" and packs(blocks):
            return part.placed(averages), part.placed(pack(identity).repeat(count, 1))
        return part.placed(averages), part.placed(identity.repeat(count, 1, 1))

    # Averages.

    def divisions(self) -> dict[tuple[int, int], Division]:
        """How raw sums are divided, by site and position."""
        return {part.address: part.shards.division for part in self.parts if part.address and part.shards}

    def new_blocks(self, sites: Sequence[Site[BlockRule]], taken: Sequence[tuple[int, Sums]]) -> Iterator[New]:
        """The parts that have raw sums."""
        for index, sums in taken:
            if not all(sums.counts):
                continue  # an empty batch
            divisors = sites[index].rule.divisors(sums)
            for part in self._of_site[index]:
                assert part.address is not None
                position = part.address[1]
                yield part, sums.vectors[position], divisors[position], sums.counts[position]

    def fold(self, new: Sequence[New]) -> None:
        """Average new blocks in, one call for all that share coefficients; the first ones are taken as they are."""
        batches: dict[tuple[Any, ...], list[tuple[Part, Tensor, float]]] = defaultdict(list)
        for part, vector, divisor, _ in new:
            average = self.averages(part)[0]
            first = part.number not in self._averaged
            decay = 0.0 if first else self._decay(part)
            batches[first, decay, average.dtype, average.device].append(
                (part, self._settle(part, vector.to(average.dtype)), divisor)
            )
        for (first, decay, _, _), batch in batches.items():
            parts = [part for part, _, _ in batch]
            flags = factor_ema_(
                [self._folded(part) for part in parts],
                [vector for _, vector, _ in batch],
                decay,
                1 - decay,
                divisors=[divisor for _, _, divisor in batch],
            )
            # A GPU is waited for only where there may be no average yet: then the inverse must stay the identity.
            known = flags.tolist() if flags.is_cpu or first else None
            for i, part in enumerate(parts):
                if known is None:
                    self.mark(part, flags[i])
                elif not known[i]:
                    self.mark(part)
            if known is None or any(known):
                count(self.refused, tuple(part.number for part in parts), flags)

    def _folded(self, part: Part) -> Tensor:
        """The averages that are here, end to end, or a number that stands for them where none are."""
        averages = self.averages(part)[0]
        return averages.view(-1) if averages.numel() or part.shards is None else averages.new_zeros(1)

    def _decay(self, part: Part) -> float:
        """That of the averages of a part that has some."""
        decay: float = self.groups[part.owner]["beta2"]
        return decay

    def _settle(self, part: Part, vector: Tensor) -> Tensor:
        """New sums where they were at the last refresh, if a captured graph is to know them by their address."""
        if vector.is_cpu or not self.groups[part.owner].get("capturable", False):
            return vector
        if part.number not in self._arrivals:
            self._arrivals[part.number] = torch.empty_like(vector)
        return self._arrivals[part.number].copy_(vector)

    def mark(self, part: Part, refused: Tensor | int = 0) -> None:
        """Note that the average of a part has changed, or on a GPU that it may have."""
        self.averages(part)[2].add_(1 - refused)
        self._averaged.add(part.number)
        if part.address is not None:
            self.known_sites.add(part.address[0])
        self._stale.add(part.number)
        self._renew_slices(part, ("further bias",))

    # Inverses.

    def couple(self) -> None:
        """Find out which weights and biases are stepped together: those of one group that both have a gradient."""
        for part in self.parts:
            if len(part.blocks.roles) == 2:
                both = (part.weight, *part.biases[:1])
                live = [p for p in both if p is not None and p.grad is not None and self._acts(part, p)]
                coupled = len(live) == 2 and self.groups[live[0]] is self.groups[live[1]]
                if live and part.coupled is not coupled:
                    if part.coupled is not None and part.number in self._averaged:
                        self._unmake(part.number)
                    part.coupled = coupled
                    self.version += 1

    def _item(self, number: int) -> Part:
        return self.parts[number]

    def _made_names(self, part: Part) -> Sequence[str]:
        return (part.prefix + "inverse_blocks",)

    def _renew(self, parts: Sequence[Part]) -> Iterator[Tensor]:
        for part in parts:
            averages, inverses, _ = self.averages(part)
            if part.coupled is False:
                averages = self._without_cross_terms(part, averages)
            bad = invert_into(inverses, averages, self.groups[part.owner]["damping"]).sum()
            self._renew_slices(part, ("weight", "bias"))
            yield bad

    def _is_shared(self, item: Part) -> bool:
        return item.shards is None and super()._is_shared(item)

    def _kept(self, item: Part, made: Tensor) -> Tensor:
        return item.placed(made)

    def _cost(self, part: Part) -> float:
        return part.blocks.count * part.blocks.size**3

    def _task(self, part: Part, old: Sequence[Tensor]) -> tuple[Task, Sequence[Tensor]]:
        averages = self.averages(part)[0]
        averages = self._without_cross_terms(part, averages) if part.coupled is False else averages.clone()
        inverses = part.here(old[0])
        damping = float(self.groups[part.owner]["damping"])
        return partial(_inverted, averages, inverses, damping), (averages, inverses)

    def _put_to_use(self, part: Part, made: Sequence[Tensor]) -> None:
        self.averages(part)[1].copy_(part.here(made[0]))
        self._renew_slices(part, ("weight", "bias"))

    def _without_cross_terms(self, part: Part, averages: Tensor) -> Tensor:
        averages = averages.clone()
        blocks, column = (slice(None), -1) if part.blocks.shared_by is None else part.blocks.last_column
        corner = averages[blocks, column, column].clone()
        averages[blocks, column, :] = 0
        averages[blocks, :, column] = 0
        averages[blocks, column, column] = corner
        return averages

    # What the step reads.

    def units(self, part: Part, wanted: Callable[[Parameter], bool]) -> Iterator[Unit]:
        """The entries of the step for those parameters of a part of which ``wanted`` is true."""

        def steps(p: Parameter) -> bool:
            return self._acts(part, p) and wanted(p)

        if not any(map(steps, part.params)) or (len(part.blocks.roles) == 2 and part.coupled is None):
            return  # the latter before the first step of a state that was loaded
        inverse = self.averages(part)[1]
        shared = part.blocks.shared_by is not None
        whole = inverse.unsqueeze(0) if shared else inverse
        for p in part.alone:
            if steps(p):
                yield Unit((p,), whole, part.blocks.transposed, part)
        if part.coupled:
            assert part.weight is not None
            yield Unit((part.weight, part.biases[0]), whole, part.blocks.transposed, part)
        elif part.weight is not None and steps(part.weight):
            yield Unit((part.weight,), self._slice(part, "weight"), part.blocks.transposed, part)
        for p in part.biases[bool(part.coupled) :]:
            if steps(p):
                yield Unit((p,), self._slice(part, "further bias" if part.coupled else "bias"), part=part)

    def _slice(self, part: Part, role: str) -> Tensor:
        key = part.number, role
        if key not in self._slices:
            self._slices[key] = self._make_slice(part, role)
        return self._slices[key]

    def _make_slice(self, part: Part, role: str) -> Tensor:
        """The inverse for a weight or a bias that is stepped without the other."""
        averages, inverses, _ = self.averages(part)
        block, column = part.blocks.last_column
        shared = part.blocks.shared_by is not None
        if role == "weight":
            if shared:
                return inverses[: block + (column > 0)].unsqueeze(0)  # the bias's column is no more than padding
            full = unpack(inverses, part.blocks.size) if inverses.dim() == 2 else inverses
            return full[:, :-1, :-1].contiguous()
        if role == "bias":
            # In a triangle the corner is the last entry.
            lasts = inverses[:, -1] if inverses.dim() == 2 else inverses[:, -1, -1]
            corner = inverses[block, column, column] if shared else lasts
        elif part.number not in self._averaged:
            corner = averages.new_ones(1 if shared else len(averages))
        else:
            # Beside a weight that is stepped with another bias, a further one has no part in the inverse.
            corner = averages[block, column, column] if shared else averages[:, -1, -1]
            corner = 1 / (corner + self.groups[part.owner]["damping"])
        corner = corner.to(inverses.dtype).contiguous()
        return corner.reshape(1, 1, 1, 1) if shared else corner.reshape(-1, 1, 1)

    def _renew_slices(self, part: Part, roles: Sequence[str]) -> None:
        """Bring copies of an inverse up to date, where they are."""
        for role in roles:
            if (old := self._slices.get((part.number, role))) is not None:
                new = self._make_slice(part, role)
                if new.data_ptr() != old.data_ptr():
                    old.copy_(new)


def invert_into(inverses: Tensor, averages: Tensor, damping: float) -> Tensor:
    """Invert blocks, in whatever form inverses are stored.

    Returns:
        Which blocks are not positive definite with their damping, int64 (count,): they keep the inverse they have.
    """
    if inverses.shape == averages.shape and inverses.dtype == averages.dtype:
        return block_inverse_(inverses, averages, damping)
    infos = []
    step = max(1, CHUNK // averages.shape[-1] ** 2)
    for old, blocks in zip(inverses.split(step), averages.split(step), strict=True):
        new, info = block_inverse(blocks, damping)
        stored = (pack(new) if old.dim() == 2 else new).to(old.dtype)
        good = (info == 0).view(-1, *[1] * (old.dim() - 1))
        old.copy_(torch.where(good, stored, old))
        infos.append(info)
    return torch.cat(infos)


def _inverted(averages: Tensor, old: Tensor, damping: float) -> tuple[Tensor, Tensor]:
    """Inverses, the old ones where blocks are bad, and how many of them are."""
    new = old.clone()
    return new, invert_into(new, averages, damping).sum()


def _held(layer: Any, role: str) -> Parameter | None:
    """The parameter that a layer has in a role and the optimizer holds; a use in the other orientation has no bias."""
    if role == "bias" and getattr(layer.rule, "swapped", False):
        return None
    parameter: Parameter | None = layer.parameters.get(role)
    return parameter
