"""A picture of what was recorded of a run: whether curvature counts, how long steps are, and what was left out."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any

from fisher_kernels.integrations.figures import COUNTS, PREFIX
from fisher_kernels.tasks.pictures import COLORS, DOTS_PER_INCH, GREY
from fisher_kernels.tasks.task import require

_PANELS = (
    ("damping share", ("damping_share",), "linear"),
    ("effective step", ("smallest_step", "largest_step"), "log"),
    ("cosine with SGD", ("cosine_with_sgd",), "linear"),
    ("skipped, refused or kept as it was, so far", COUNTS, "linear"),
)


def run_picture(figures: Mapping[str, Mapping[int, float]], title: str) -> bytes:
    """A PNG with a panel for each kind of figure; one that the optimizer has not is empty and says so.

    Args:
        figures: name -> step -> value, as :func:`fisher_kernels.integrations.figures.read` returns.
        title: what stands above.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    figure = require("matplotlib.figure", "matplotlib", "the picture of a run").Figure(
        figsize=(11, 7), dpi=DOTS_PER_INCH, layout="constrained"
    )
    for axes, (name, members, scale) in zip(figure.subplots(2, 2, sharex=True).flat, _PANELS, strict=True):
        _draw(axes, name, {member: figures.get(PREFIX + member, {}) for member in members}, scale)
    figure.suptitle(title)
    figure.supxlabel("step")
    file = io.BytesIO()
    figure.savefig(file, format="png")
    return file.getvalue()


def _draw(axes: Any, name: str, lines: Mapping[str, Mapping[int, float]], scale: str) -> None:
    shown = {member: values for member, values in lines.items() if values}
    for color, (member, values) in zip(COLORS, shown.items(), strict=False):
        axes.plot([*values], [*values.values()], color=color, label=member.replace("_", " "))
    axes.set_title(name, loc="left")
    axes.grid(alpha=0.3)
    if not shown:
        axes.text(0.5, 0.5, "not recorded", transform=axes.transAxes, ha="center", color=GREY)
        return
    if scale == "log" and all(value > 0 for values in shown.values() for value in values.values()):
        axes.set_yscale("log")
    if len(lines) > 1:
        axes.legend()
