"""What forwards show of the pipeline of which a model is a stage: how its schedule goes about gradients."""

from __future__ import annotations

import sys
from typing import Any

from fisher_kernels.curvature.caller import calling, is_running


class Pipeline:
    """The schedule of ``torch.distributed.pipelining`` that ran the last forward, as far as statistics depend on it.

    Attributes:
        schedule: the name of its class; None where forwards are called without one.
        processes: how many have stages.
        divisor: what it divides the gradients of a step by, once the backward passes of all micro-batches are over.
        has_end_alone: whether this process has the last stage and no other.
        is_trial: whether that forward is one of no data, by which a stage finds out about shapes.
        is_split: whether it has backward passes for inputs, and others for parameters, which no layer sees.
    """

    def __init__(self) -> None:
        self.schedule: str | None = None
        self.processes, self.divisor = 1, 1
        self.has_end_alone, self.is_split, self.is_trial = True, False, False

    def note(self) -> None:
        """In a forward: note what runs it."""
        module = sys.modules.get("torch.distributed.pipelining.schedules")  # which nothing else imports
        found: Any = None if module is None else calling(module._PipelineSchedule)
        if found is None:
            self.schedule, self.divisor, self.is_trial = None, 1, False
            return
        stages = [found._stage] if hasattr(found, "_stage") else found._stages
        self.schedule = type(found).__name__
        self.processes = stages[0].group_size
        self.divisor = found._n_microbatches if found.scale_grads else 1
        self.has_end_alone = all(stage.is_last for stage in stages)
        self.is_split = _is_split(found)
        self.is_trial = not is_running(type(stages[0]).forward_one_chunk)


def running_stage() -> int | None:
    """In a forward: the number of the stage of a pipeline that runs it. A process may have several."""
    module = sys.modules.get("torch.distributed.pipelining.stage")  # which nothing else imports
    stage: Any = None if module is None else calling(module._PipelineStageBase)
    return None if stage is None else int(stage.stage_index)


def _is_split(schedule: Any) -> bool:
    orders = (getattr(schedule, name, None) or {} for name in ("pipeline_order", "pipeline_order_with_comms"))
    actions = (action for order in orders for of_rank in order.values() for action in of_rank if action is not None)
    return any(action.computation_type.name == "BACKWARD_INPUT" for action in actions)
