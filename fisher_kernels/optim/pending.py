"""Statistics that the next refresh takes, in the state of the weights that they are of.

In ``state[owner]`` they are the sums of one refresh over all processes, end to end, and how many terms went into each;
zeros where there are none. They are put there when a state is asked for: until then they may be on their way.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from typing import Any, Final

import torch
from torch import Tensor
from torch.nn import Parameter

from fisher_kernels.curvature.rounds import Key, key_of
from fisher_kernels.curvature.rules import Sums
from fisher_kernels.curvature.sites import Site
from fisher_kernels.ops import ACCUMULATOR

SUMS: Final = "pending_sums"
COUNTS: Final = "pending_counts"

PENDING = tuple(prefix + name for prefix in ("", "tied_") for name in (SUMS, COUNTS))
"""All names in the state; those of a second site of one weight begin with ``tied_``."""


def _places(sites: Sequence[Site[Any]]) -> Iterator[tuple[Site[Any], str, list[int]]]:
    """Each site with the prefix of its names and the lengths of its sums."""
    seen: dict[Parameter, int] = {}
    for site in sites:
        number = seen[site.owner] = seen.get(site.owner, -1) + 1
        yield site, "tied_" * number, [n or 0 for n in site.rule.sum_lengths(site.module)]


def keep(
    sums: Mapping[Key, Sums],
    sites: Sequence[Site[Any]],
    state: MutableMapping[Tensor, Any],
    groups: Mapping[Parameter, dict[str, Any]],
) -> None:
    """Put sums into the state; zeros where there are none and may be some, so that a state has the same entries always.

    Args:
        groups: of each parameter, with the setting ``delayed``.
    """
    for site, prefix, lengths in _places(sites):
        found, owner = sums.get(key_of(site)), site.owner
        if found is None and not (groups[owner].get("delayed") and state.get(owner)):
            continue
        wide = ACCUMULATOR[owner.dtype]
        if found is None:
            flat, counts = torch.zeros(sum(lengths), dtype=wide, device=owner.device), [0.0] * len(lengths)
        else:
            flat, counts = torch.cat([v.to(owner.device, wide) for v in found.vectors]), found.counts
        state[owner][prefix + SUMS] = flat
        state[owner][prefix + COUNTS] = torch.tensor(counts, dtype=torch.float64, device=owner.device)


def read(sites: Sequence[Site[Any]], state: Mapping[Tensor, Any]) -> dict[Key, Sums]:
    """The sums that a state has."""
    found: dict[Key, Sums] = {}
    for site, prefix, lengths in _places(sites):
        kept = state.get(site.owner, {})
        if prefix + COUNTS in kept and len(kept[prefix + SUMS]) == sum(lengths):
            counts = kept[prefix + COUNTS].tolist()
            if any(counts):
                found[key_of(site)] = Sums([*kept[prefix + SUMS].clone().split(lengths)], counts)
    return found
