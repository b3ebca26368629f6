"""The picture of README.md, from the committed report of a comparison: ``python -m bench.picture``.

One run seen twice: the loss after as many epochs, where a better direction counts, and after as much time, where the
price of a step counts as well.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes

ROOT = Path(__file__).parent.parent
REPORT = ROOT / "docs" / "results" / "autoencoder" / "compare.json"
PICTURE = ROOT / "docs" / "results" / "overview.png"

# Okabe and Ito's colours, told apart by colour-blind readers too; the two baselines are grey and black.
COLORS = {
    "adamw": "#000000",
    "sgd": "#8a8a8a",
    "adafisher": "#009E73",
    "adafisherw": "#CC79A7",
    "mbf": "#D55E00",
    "sofim": "#0072B2",
}


def draw(report: dict[str, Any], to: Path) -> None:
    """Two panels with one axis of losses; each line has its name at its end."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.6, 4.4), dpi=160, layout="constrained")
    by_epoch, by_time = figure.subplots(1, 2, sharey=True)
    for line in report["summary"]:
        name = line["optimizer"]
        loss = [point["mean"] for point in line["metric"]][1:]
        style: dict[str, Any] = {"color": COLORS[name], "linewidth": 2.4, "solid_capstyle": "round"}
        style["linestyle"] = "--" if name in ("adamw", "sgd") else "-"
        by_epoch.plot(range(1, len(loss) + 1), loss, **style)
        by_time.plot(line["seconds"][1:], loss, **style)
        by_time.plot(line["seconds"][-1], loss[-1], "o", color=COLORS[name], markersize=5)
    metric = report["metric"]
    _label(by_epoch, report)
    by_epoch.set_title("after the same number of epochs", fontsize=13)
    by_time.set_title("after the same time", fontsize=13)
    by_epoch.set_ylabel(f"{metric['name']} ({metric['unit']})", fontsize=12)
    by_epoch.set_xlabel("epoch", fontsize=12)
    by_time.set_xlabel("training time in seconds, logarithmic", fontsize=12)
    by_epoch.set_ylim(14.5, 24)
    by_epoch.set_xlim(1, len(report["summary"][0]["metric"]) + 5.6)
    by_epoch.set_xticks([1, 5, 10, 15, 20])
    by_time.set_xscale("log")
    by_time.set_xlim(0.1, 12)
    by_time.set_xticks([0.1, 0.3, 1, 3, 10], labels=["0.1", "0.3", "1", "3", "10"])
    by_time.minorticks_off()
    for axes in (by_epoch, by_time):
        axes.grid(color="#e6e6e6")
        axes.tick_params(labelsize=11)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(to, metadata={"Software": None})


def _label(axes: Axes, report: dict[str, Any]) -> None:
    """Names at the ends of the lines, moved apart where lines end close together."""
    ends = sorted((line["metric"][-1]["mean"], line["optimizer"], line["title"]) for line in report["summary"])
    epochs = len(report["summary"][0]["metric"]) - 1
    lowest = -float("inf")
    for loss, name, title in ends:
        lowest = max(loss, lowest + 0.55)
        axes.annotate(
            title,
            (epochs, loss),
            (epochs + 0.4, lowest),
            color=COLORS[name],
            fontsize=12,
            fontweight="bold",
            va="center",
        )


if __name__ == "__main__":
    draw(json.loads(REPORT.read_text()), PICTURE)
