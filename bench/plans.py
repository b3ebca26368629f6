"""What optimizers take on growing numbers of processes, for the documents: ``python -m bench.plans`` counts it anew.

That takes some minutes for each model, and writes ``bench/results/plans.json``, of which the tables are made.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from fisher_kernels.tools.markdown import markdown_table
from fisher_kernels.tools.plan import HSDP, TENSOR, Mesh, Plan, as_numbers, plans, size
from fisher_kernels.tools.plan_models import find

REPORT = Path(__file__).parent / "results" / "plans.json"
PLACES = ("llama-8b", "llama-8b fsdp-tp", "vit-l", "resnet50")
OPTIMIZERS = ("adamw", "adafisherw", "sofim", "mbf", "kfac")
SHARDS = 64
REPLICAS = (1, 16, 256)
TENSOR_MESHES = ("8x8", "128x8")
HEADER = (
    "optimizer",
    "processes",
    "moments",
    "curvature",
    "gathered at a time",
    "each step",
    "calls",
    "a refresh more",
)


def counted(place: str) -> Iterator[Plan]:
    """The plans of a model, and of how processes divide it if that is not ``fully_shard`` alone."""
    model, _, parallel = place.partition(" ")
    if parallel == TENSOR:
        for mesh in (Mesh.of(text, parallel) for text in TENSOR_MESHES):
            yield from plans(partial(find, model, tensor=mesh.tensor), OPTIMIZERS, mesh)
        return
    yield from plans(partial(find, model), OPTIMIZERS, Mesh.of("8"))
    pair = plans(partial(find, model), OPTIMIZERS, Mesh((2, SHARDS)))
    for replicas in REPLICAS:
        yield from (of_replicas(found, replicas) for found in pair)


def of_replicas(found: Plan, replicas: int) -> Plan:
    """What a plan for two replicas is for so many: the same calls, among other numbers of processes."""
    now = {2: replicas, SHARDS: SHARDS, 2 * SHARDS: replicas * SHARDS}
    calls: dict[str, Any] = {
        name: tuple(call._replace(processes=now[call.processes]) for call in getattr(found, name))
        for name in ("passes", "step", "refresh")
    }
    calls = {name: tuple(call for call in some if call.processes > 1) for name, some in calls.items()}
    return dataclasses.replace(found, mesh=Mesh((replicas, SHARDS), HSDP), **calls)


def table(place: str) -> str:
    """A table of the report."""
    rows = json.loads(REPORT.read_text())[place]
    order = list(dict.fromkeys(row["optimizer"] for row in rows))
    rows.sort(key=lambda row: order.index(row["optimizer"]))
    return markdown_table((*HEADER, "calls"), map(_cells, rows), right=range(1, len(HEADER) + 1))


def _cells(row: dict[str, Any]) -> list[str]:
    step, refresh = row["step"], row["refresh"]
    share = step["bytes"] / max(row["passes"]["bytes"], 1)
    moved = f"{size(step['bytes'])} ({share:.0%})" if share >= 0.005 else size(step["bytes"])
    sent = moved, _number_of_calls(step), size(refresh["bytes"]), _number_of_calls(refresh)
    return [
        row["optimizer"],
        f"{math.prod(row['mesh']):,}",
        *(size(row[n]) for n in ("moments", "curvature", "largest")),
        *sent,
    ]


def _number_of_calls(sent: dict[str, Any]) -> str:
    return str(sum(group["calls"] for group in sent["calls"]))


def main(places: Annotated[list[str] | None, typer.Argument(help=f"Of {', '.join(PLACES)}.")] = None) -> None:
    """Count plans for the documents, all of them or some."""
    for place in places or PLACES:
        report = json.loads(REPORT.read_text()) if REPORT.exists() else {}
        report[place] = [as_numbers(found) for found in counted(place)]
        REPORT.write_text(json.dumps(report, indent=1) + "\n")
        typer.echo(f"counted {place}")


if __name__ == "__main__":
    typer.run(main)
