"""Accelerate: parameters that ``prepare`` replaces by shards."""

from __future__ import annotations

from typing import Any

from accelerate import Accelerator

from fisher_kernels.optim.base import FisherOptimizer


def prepare(accelerator: Accelerator, *objects: Any, **settings: Any) -> Any:
    """``accelerator.prepare(*objects)``, for optimizers that read layers and models that FSDP2 shards.

    Accelerate shards the model after the optimizer was made, and puts the shards into its parameter groups. An
    optimizer finds them there in its next step, too late for the statistics of that step; here it finds them before the
    first forward. Where nothing is replaced this is ``accelerator.prepare``.

    Args:
        accelerator: the Accelerator.
        objects, settings: as for its ``prepare``.

    Returns:
        What ``prepare`` returns.
    """
    prepared = accelerator.prepare(*objects, **settings)
    for thing in prepared if isinstance(prepared, list | tuple) else (prepared,):
        take_up_parameters(thing)
    return prepared


def take_up_parameters(optimizer: Any) -> None:
    """Let an optimizer, or what Accelerate has wrapped around one, go on with what its groups hold now."""
    optimizer = getattr(optimizer, "optimizer", optimizer)
    if isinstance(optimizer, FisherOptimizer):
        optimizer._take_up_groups()
