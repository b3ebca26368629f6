"""When statistics are taken and inverses are made: the schedule of the optimizers that refresh curvature.

A parameter group says how often, by ``refresh``, ``ramp``, ``update_interval`` and ``inverse_interval``, and keeps how
far it is: ``iteration``, the number of its steps, ``refreshed`` and ``inverted``, those in which its statistics and its
inverses were new last. All of it is plain numbers in the group, so a checkpoint resumes the schedule as it was, and
processes that have the same groups refresh in the same steps. Nothing else is read, so a changed setting is followed
from the next decision on.

``"constant"`` refreshes in steps 0, k, 2k and so on. ``"ramp"`` lets the distance to the next refresh grow with the
steps that have been taken: after a refresh in step t the next one comes

    1 + floor((interval - 1) * min(1, t / ramp))

steps later. Parameters move most in the first steps of a run, and curvature that is old by then is worse than none.
With the ramp it is never older than about ``interval / ramp`` of the run so far, until the distance is the interval
itself. Inverses are made only in steps that bring statistics: between them there would be nothing new to invert.
"""

from __future__ import annotations

import math
from typing import Any

from fisher_kernels.optim.hyperparameters import require_choice, require_numbers

RAMP = 80
"""Steps over which intervals grow, unless told otherwise."""

NEVER = -1
"""In place of the step of the last refresh: there was none, or it is not known."""

KEPT = ("refreshed", "inverted")
"""Keys of a group: in which steps its statistics and its inverses were new last."""


def check_schedule(group: dict[str, Any]) -> None:
    """Check the settings of a group beside its intervals, and let it know where it is.

    Raises:
        TypeError, ValueError: ``refresh`` or ``ramp`` is of the wrong kind or out of range; the message names it.
    """
    require_choice(group, "refresh", ("ramp", "constant"))
    require_numbers(group, ("ramp",))
    if not 0 <= group["ramp"] < math.inf:
        raise ValueError(f"ramp is {group['ramp']}, expected a finite number of at least 0")
    for key in KEPT:
        group.setdefault(key, NEVER)


def distance(interval: int, ramp: float, step: int) -> int:
    """Steps from a refresh in a step to the next one, on a ramp."""
    if step >= ramp:
        return interval
    return 1 + math.floor((interval - 1) * step / ramp)  # one rounding: a quotient that is whole stays so


def _is_due(group: dict[str, Any], setting: str, last: str) -> bool:
    interval, step = group[setting], group["iteration"]
    if group.get("refresh", "constant") == "constant":
        return bool(step % interval == 0)
    before = group[last]
    return bool(before < 0 or step - before >= distance(interval, group["ramp"], before))


def is_due(group: dict[str, Any]) -> bool:
    """Whether the next step of a group refreshes the statistics of its layers."""
    return _is_due(group, "update_interval", "refreshed")


def inverts(group: dict[str, Any], refreshes: bool) -> bool:
    """Whether the next step of a group makes its inverses anew.

    Args:
        refreshes: whether that step brings statistics.
    """
    on_ramp = group.get("refresh", "constant") == "ramp"
    return (refreshes or not on_ramp) and _is_due(group, "inverse_interval", "inverted")


def advance(group: dict[str, Any], refreshes: bool) -> None:
    """Count a step of a group, and note what was new in it.

    Args:
        refreshes: whether the step brought statistics.
    """
    if "refresh" in group:
        if "inverse_interval" in group and inverts(group, refreshes):
            group["inverted"] = group["iteration"]
        if refreshes:
            group["refreshed"] = group["iteration"]
    group["iteration"] += 1
