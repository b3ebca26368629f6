"""The table of what optimizers take on growing numbers of processes, for the documents."""

from __future__ import annotations

from fisher_kernels.tools.markdown import markdown_table
from fisher_kernels.tools.plan import Mesh, plan, size
from fisher_kernels.tools.plan_models import find

OPTIMIZERS = ("adamw", "adafisherw", "sofim", "mbf", "kfac")
MESHES = ("8", "64", "16x64", "256x64")
HEADER = ("optimizer", "processes", "moments", "curvature", "gathered at a time", "each step", "a refresh more")


def plans(model: str) -> str:
    """For a model of ``fisher-kernels plan``, each process's bytes on each mesh."""
    rows = []
    for name in OPTIMIZERS:
        for mesh in map(Mesh.of, MESHES):
            found = plan(find(model), name, mesh)
            share = found.received_in_a_step / found.sent_by_model
            step = (
                f"{size(found.received_in_a_step)} ({share:.0%})" if share >= 0.005 else size(found.received_in_a_step)
            )
            stay = (found.moments, found.curvature, found.largest)
            cells = (*map(size, stay), step, size(found.sent_in_a_refresh))
            rows.append((found.optimizer, f"{mesh.processes:,}", *cells))
    return markdown_table(HEADER, rows, right=range(1, len(HEADER)))
