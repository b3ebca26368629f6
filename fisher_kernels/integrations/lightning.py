"""Lightning: gradients that are clipped under mixed precision, and figures of optimizers in its loggers."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import Callback
from torch.optim import Optimizer

from fisher_kernels.integrations.figures import Recorder
from fisher_kernels.optim.base import FisherOptimizer
from fisher_kernels.optim.layerwise import LayerwiseOptimizer


def allow_clipping(optimizer: Optimizer, scaler: torch.amp.GradScaler | None = None) -> None:
    """Let Lightning clip gradients under mixed precision, with statistics in the units of unscaled gradients.

    The optimizers of this library can divide by a scale within their step, as torch's fused ones do, and tell scalers
    so; Lightning does not clip then, with a scaler or without. Here they take it back: the scaler divides before the
    step, and they are told which one it is, whose scale is in all that reaches their hooks. For Fabric, whose scaler is
    that of the plugin ``MixedPrecision``; :class:`AllowClipping` does it for the Trainer. Other optimizers are left as
    they are.

    Args:
        optimizer: the optimizer, or what Fabric has wrapped around one.
        scaler: the scaler in use, if any.
    """
    optimizer = getattr(optimizer, "optimizer", optimizer)
    if isinstance(optimizer, FisherOptimizer):
        optimizer._step_supports_amp_scaling = False
    if isinstance(optimizer, LayerwiseOptimizer) and scaler is not None:
        optimizer.statistics.grad_scaler = scaler


class AllowClipping(Callback):
    """``Trainer(precision="16-mixed", gradient_clip_val=1.0, callbacks=[AllowClipping()])``, or ``"bf16-mixed"``.

    Does :func:`allow_clipping` to all optimizers of a training, with the scaler of its precision plugin.
    """

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        for optimizer in trainer.optimizers:
            allow_clipping(optimizer, trainer.scaler)


class FisherMetrics(Callback):
    """Logs what optimizers measure, as ``self.log`` of the module does, and writes it to other places.

    Args:
        places, each: as for :class:`fisher_kernels.integrations.figures.Recorder`.
        every: so many steps; reading figures waits for the device.
    """

    def __init__(self, *places: Any, every: int = 50, each: bool = False) -> None:
        if every < 1:
            raise ValueError(f"every is {every}, expected at least 1")
        self.every = every
        self._recorder = Recorder(*places, each=each)
        self._last = -1

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        step = trainer.global_step
        if step % self.every or step in (0, self._last):
            return
        self._last = step
        for number, optimizer in enumerate(trainer.optimizers):
            if isinstance(optimizer, FisherOptimizer):
                figures = self._recorder.record(optimizer, step)
                names = {name: f"{name}/{number}" if len(trainer.optimizers) > 1 else name for name in figures}
                pl_module.log_dict({names[name]: value for name, value in figures.items()})
