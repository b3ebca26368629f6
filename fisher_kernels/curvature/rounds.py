"""Statistics that are used one refresh later, and are added up over processes while training goes on."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from collections.abc import Set as AbstractSet
from typing import Any, Generic, NamedTuple

from torch.nn import Parameter

from fisher_kernels.curvature.processes import Processes
from fisher_kernels.curvature.proof import Proof
from fisher_kernels.curvature.reduction import FLAGS, Reduction, Share, Verdict, heard_of, said_of
from fisher_kernels.curvature.rules import R, Sums
from fisher_kernels.curvature.sites import Site

Key = tuple[Parameter, Any]
"""What a site is known by, also where sites are found anew: its weight, and how its sums lie on it."""

Change = Callable[[Sums], Sums]


class Arrival(NamedTuple):
    """What earlier refreshes have brought.

    Attributes:
        sums: over all processes, of sites that some process used.
        verdicts: of all layers.
        unused: sites that no process used though they had a gradient.
        before: whether there was a refresh before.
    """

    sums: dict[Key, Sums]
    verdicts: list[Verdict]
    unused: set[Key]
    before: bool


def key_of(site: Site[Any]) -> Key:
    """Its key."""
    return site.owner, site.rule.layout


class Round(Generic[R]):
    """The statistics of one refresh, on their way.

    Args:
        shares: what this process has of the sites.
        proofs: of all layers, which tell what this process found of them.
        spoilt: those of layers whose sums are wrong here.
        lacking: for each share whether its site was not used here and has a gradient.
        averaged: over how many processes gradients are averaged.

    Attributes:
        left: keys of the sites whose sums were not taken yet.
    """

    def __init__(
        self,
        shares: Sequence[Share[R]],
        proofs: Sequence[Proof],
        spoilt: Collection[Proof],
        lacking: Sequence[bool],
        processes: Processes,
        averaged: int,
    ) -> None:
        self._sites, self._proofs = [share.site for share in shares], proofs
        self._of_site = [[layer.proof for layer in site.layers] for site in self._sites]
        self.left = set(map(key_of, self._sites))
        self._changes: list[tuple[Key, Change]] = []
        self._arrived: tuple[dict[Key, Sums], list[Verdict], set[Key]] | None = None
        flags = [*said_of(proofs, spoilt), *lacking]
        self._reduction: Reduction[R] | None = None
        self._here: tuple[list[Sums | None], list[bool]] = [share.sums for share in shares], flags
        if processes.count > 1:
            self._reduction = Reduction(shares, flags, processes, averaged)
            self._here = [], []
            self._reduction.begin(processes.group_beside())

    @classmethod
    def of(cls, sums: Mapping[Key, Sums]) -> Round[R]:
        """One that has come to its end, as a state has it."""
        made: Round[R] = cls.__new__(cls)
        made.left, made._changes, made._arrived = set(sums), [], (dict(sums), [], set())
        return made

    def change(self, key: Key, change: Change) -> None:
        """Have something done to the sums of a site once they are there."""
        self._changes.append((key, change))

    def wait(self) -> tuple[dict[Key, Sums], list[Verdict], set[Key]]:
        """The sums of sites that were used, verdicts on layers, and the sites that lack statistics.

        Raises:
            RuntimeError: they did not arrive.
        """
        if self._arrived is None:
            try:
                found, flags = self._here if self._reduction is None else _used(*self._reduction.add_up())
            except Exception as error:
                self.left = set()
                raise RuntimeError(
                    f"statistics that were on their way between processes did not arrive ({type(error).__name__}: "
                    f"{error}), and are left out. Was their process group destroyed? state_dict() waits for them"
                ) from error
            verdicts, lacking = heard_of(self._proofs, flags), flags[FLAGS * len(self._proofs) :]
            spoilt = {verdict.proof for verdict in verdicts if verdict.spoilt}
            sums: dict[Key, Sums] = {}
            unused: set[Key] = set()
            for site, proofs, mine, lacks in zip(self._sites, self._of_site, found, lacking, strict=True):
                if mine is None:
                    unused |= {key_of(site)} if lacks else set()
                elif spoilt.isdisjoint(proofs):
                    sums[key_of(site)] = mine
            self._arrived, self._reduction, self._here = (sums, verdicts, unused), None, ([], [])
        sums = self._arrived[0]
        for key, change in self._changes:
            if key in sums:
                sums[key] = change(sums[key])
        self._changes = []
        return self._arrived


def _used(found: list[Sums], flags: list[bool]) -> tuple[list[Sums | None], list[bool]]:
    """What was added up, None for sites that no process used."""
    return [sums if any(sums.counts) else None for sums in found], flags


class Rounds(Generic[R]):
    """Those of which some sums were not taken yet; of each site there is one."""

    def __init__(self) -> None:
        self._rounds: list[Round[R]] = []

    def __bool__(self) -> bool:
        return bool(self._rounds)

    def add(self, new: Round[R]) -> None:
        if new.left:
            self._rounds.append(new)

    def arrive(self, due: AbstractSet[Key], there: AbstractSet[Key]) -> Arrival:
        """Take the sums of the sites that are due, and forget those of sites that are not there any more."""
        found = Arrival({}, [], set(), any(not due.isdisjoint(one.left) for one in self._rounds))
        for one in list(self._rounds):
            one.left.intersection_update(there)
            if mine := one.left.intersection(due):
                try:
                    sums, verdicts, unused = one.wait()
                except RuntimeError:
                    self._rounds.remove(one)
                    raise
                found.sums.update({key: sums[key] for key in mine if key in sums})
                found.verdicts.extend(verdicts)
                verdicts.clear()  # they are given once
                found.unused.update(unused & mine)
                one.left -= mine
            if not one.left:
                self._rounds.remove(one)
        return found

    def kept(self) -> dict[Key, Sums]:
        """All sums that were not taken yet; waits for them."""
        found: dict[Key, Sums] = {}
        for one in list(self._rounds):
            try:
                sums = one.wait()[0]
            except RuntimeError:
                self._rounds.remove(one)
                raise
            found.update({key: sums[key] for key in one.left if key in sums})
        return found

    def change(self, key: Key, change: Change) -> None:
        """Have something done to the sums of a site that were not taken yet, once they are there."""
        for one in self._rounds:
            if key in one.left:
                one.change(key, change)

    def drop(self, keys: Collection[Key]) -> None:
        """Forget the sums of some sites."""
        for one in list(self._rounds):
            one.left.difference_update(keys)
            if not one.left:
                one.wait()  # what is on its way is written to
                self._rounds.remove(one)
