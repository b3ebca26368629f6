"""Sums are added up over processes in one flat buffer, and read from it when all have put theirs in.

Sums are sent in the precision in which they are kept: 4 bytes a number, or 8 where a parameter is float64 or a rule
asks for them. The numbers of terms and yes or no are in the same buffer, and an all-reduce has one dtype. float32 has
whole numbers up to 2^24, so a number of terms is sent in parts, so small that those of all processes add up to no more
than that: no count is rounded.

A derivative of the global mean loss is the local one over the number of processes, whose powers are divided out before
anything is added. So nothing overflows that would not in one process, which has the same sum: no part of a sum of
squares is larger than the whole, nor one of products than those of the squares. And a quotient is lost below the
smallest number of float32 only where the squares of a joint batch are smaller still. AdaFisher has sums of derivatives
with either sign too, and sends all of its sums in float64.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Sequence
from typing import Any, Generic, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from fisher_kernels.curvature.processes import Processes
from fisher_kernels.curvature.proof import Proof
from fisher_kernels.curvature.rules import R, Sums
from fisher_kernels.curvature.sites import Site
from fisher_kernels.ops import ACCUMULATOR

DIGITS = {torch.float32: 24, torch.float64: 53}
"""Bits of the whole numbers that a dtype has without a gap. Counts are those of float64, which Python has."""


class Share(NamedTuple, Generic[R]):
    """What a process has of the sums of a site, and the lengths of these; None where it saw nothing."""

    site: Site[R]
    lengths: Sequence[int]
    sums: Sums | None


def dtype_of(sites: Iterable[Site[Any]]) -> torch.dtype:
    """That of the buffer: the same in all processes, whatever they saw."""
    wide = (torch.float64 if site.rule.sends_doubles else ACCUMULATOR[site.owner.dtype] for site in sites)
    return torch.float64 if torch.float64 in wide else torch.float32


def parts_of_counts(dtype: torch.dtype, processes: int) -> tuple[int, int]:
    """In how many parts a count is sent, and of how many bits each is, so that the sum over processes is exact."""
    if dtype == torch.float64:
        return 1, DIGITS[dtype]
    bits = DIGITS[dtype] - math.ceil(math.log2(processes))
    return math.ceil(DIGITS[torch.float64] / bits), bits


def size_of(lengths: Sequence[Sequence[int]], layers: int, dtype: torch.dtype, processes: int) -> int:
    """Bytes of the buffer for sums of these lengths of each site, of so many layers."""
    parts, _ = parts_of_counts(dtype, processes)
    return dtype.itemsize * (sum(sum(of_site) + parts * len(of_site) for of_site in lengths) + FLAGS * layers)


class Verdict(NamedTuple):
    """What processes have found of a layer together.

    Attributes:
        misfit: whether any found that it is not what its class documents.
        inner: whether functions serve it.
        failed: whether its statistics raised an error in any.
        spoilt: whether the sums of any are those of a misfit, and not of the functions in it.
    """

    proof: Proof
    misfit: bool
    inner: bool
    failed: bool
    spoilt: bool


FLAGS = 4
"""How many flags there are of a layer."""


def said_of(proofs: Sequence[Proof], spoilt: Collection[Proof]) -> list[bool]:
    """The flags of layers: what this process has found of them."""
    return [flag for proof in proofs for flag in (bool(proof.reason), proof.inner, proof.failed, proof in spoilt)]


def heard_of(proofs: Sequence[Proof], flags: Sequence[bool]) -> list[Verdict]:
    """What these flags of any process say."""
    return [Verdict(proof, *flags[FLAGS * i : FLAGS * (i + 1)]) for i, proof in enumerate(proofs)]


class Reduction(Generic[R]):
    """The sums of some sites over all processes.

    Args:
        shares: the same sites, with the same lengths, in all processes.
        flags: questions, in the same order, and whether this process says yes.
        averaged: over how many processes gradients are averaged.
    """

    def __init__(self, shares: Sequence[Share[R]], flags: Sequence[bool], processes: Processes, averaged: int) -> None:
        self._sites, self._lengths = [share.site for share in shares], [share.lengths for share in shares]
        self._processes, self._flags = processes, len(flags)
        self._work: Any = None
        dtype, device = dtype_of(self._sites), self._sites[0].owner.device
        self._parts, self._bits = parts_of_counts(dtype, processes.count)
        vectors: list[Tensor] = []
        small: list[float] = []
        for site, lengths, sums in shares:
            if sums is None:
                vectors += site.rule.without_use(lengths)
                small += [0.0] * (self._parts * len(lengths))
                continue
            for v, power in zip(sums.padded(lengths), site.rule.powers, strict=True):
                vectors.append(v.to(dtype) / averaged**power if power and averaged > 1 else v)
            for n in sums.counts:
                small += self._divided(n)
        small += map(float, flags)
        flat = [v.to(device, dtype) for v in vectors]
        self._total = torch.cat([*flat, torch.tensor(small, dtype=dtype, device="cpu").to(device)])

    def _divided(self, count: float) -> list[float]:
        """A count in its parts, the lowest first."""
        parts = []
        for _ in range(self._parts - 1):
            count, part = divmod(count, 1 << self._bits)
            parts.append(part)
        return [*parts, count]

    def begin(self, group: Any) -> None:
        """Let the sums be added up beside what comes next, over a group that nothing else uses."""
        self._work = dist.all_reduce(self._total, group=group, async_op=True)

    def add_up(self) -> tuple[list[Sums], list[bool]]:
        """The sums of each site over all processes, and of each flag whether any process says yes.

        Where this has begun, it waits for the end; on a GPU the stream in use does.
        """
        if self._work is None:
            dist.all_reduce(self._total, group=self._processes.group)
        else:
            self._work.wait()
        return self._found()

    def _found(self) -> tuple[list[Sums], list[bool]]:
        sizes = [n for lengths in self._lengths for n in lengths]
        *vectors, small = self._total.split([*sizes, len(self._total) - sum(sizes)])
        numbers, of_site, found = iter(small.tolist()), iter(vectors), []
        for site, lengths in zip(self._sites, self._lengths, strict=True):
            wide = ACCUMULATOR[site.owner.dtype]
            mine = [next(of_site).to(site.owner.device, wide) for _ in lengths]
            counts = [sum(next(numbers) * 2.0 ** (self._bits * i) for i in range(self._parts)) for _ in lengths]
            found.append(Sums(mine, counts))
        return found, [bool(next(numbers)) for _ in range(self._flags)]
