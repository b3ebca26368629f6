"""The search for a learning rate, which takes as many trials for each optimizer.

Rates lie on a grid of quarters of a decade: 1, 1.7, 3, 5.5, 10 and so on. Three rates half a decade apart come first,
around a guess; then one at a time, as many as are asked for: half a decade beyond the best one where that is at an end
of those tried, else a quarter of a decade from it, towards the better of its neighbours. Where the best of all these
still lies at an end, whichever optimizer it is, up to ``BEYOND`` more rates follow, each half a decade further out.
"""

from __future__ import annotations

import math
from collections.abc import Callable

STEPS = (1.0, 1.7, 3.0, 5.5)
HALF = 2
"""Quarters in half a decade."""
BEYOND = 2


def rate(quarter: int) -> float:
    """The rate at a place of the grid; 0 is 1."""
    decade, step = divmod(quarter, len(STEPS))
    return float(f"{STEPS[step]}e{decade}")


def quarters(lr: float) -> int:
    """The place of the grid that a rate is nearest to."""
    return round(len(STEPS) * math.log10(lr))


def search(guess: int, trials: int, loss: Callable[[float], float]) -> dict[float, float]:
    """``loss`` of so many rates, at least three, and of up to ``BEYOND`` more while the best one is at an end.

    It is infinite for a rate that diverges.
    """
    tried: dict[int, float] = {}

    def attempt(quarter: int) -> None:
        tried[quarter] = loss(rate(quarter))

    for quarter in (guess, guess - HALF, guess + HALF):
        attempt(quarter)
    while len(tried) < trials:
        attempt(_next(tried))
    while len(tried) < trials + BEYOND and _best_is_at_an_end(tried):
        attempt(_next(tried))
    return {rate(quarter): tried[quarter] for quarter in sorted(tried)}


def best(losses: dict[float, float]) -> float:
    """The rate of the least loss, the lowest of those that are equal.

    Raises:
        ValueError: all have diverged.
    """
    chosen = min(losses, key=lambda lr: losses[lr])
    if not math.isfinite(losses[chosen]):
        raise ValueError(f"all rates diverge: {', '.join(f'{lr:g}' for lr in losses)}")
    return chosen


def _best_is_at_an_end(tried: dict[int, float]) -> bool:
    return min(tried.values()) < math.inf and _chosen(tried) in (min(tried), max(tried))


def _chosen(tried: dict[int, float]) -> int:
    return min(sorted(tried), key=lambda quarter: tried[quarter])


def _next(tried: dict[int, float]) -> int:
    lowest, highest = min(tried), max(tried)
    if all(map(math.isinf, tried.values())):
        return lowest - HALF
    chosen = _chosen(tried)
    if chosen == lowest:
        return chosen - HALF
    if chosen == highest:
        return chosen + HALF
    below = max(quarter for quarter in tried if quarter < chosen)
    above = min(quarter for quarter in tried if quarter > chosen)
    sides = [below, above] if tried[below] <= tried[above] else [above, below]
    for side in sides:
        if abs(side - chosen) == HALF:
            return (side + chosen) // 2
    return lowest - HALF if sides[0] == below else highest + HALF  # all quarters around the best one are known
