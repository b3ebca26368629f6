"""Hugging Face's Trainer: optimizers that read layers, with the parameter groups that the Trainer makes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves
from transformers import Trainer, TrainerCallback

from fisher_kernels.integrations.accelerate import take_up_parameters
from fisher_kernels.integrations.figures import Recorder
from fisher_kernels.optim.layerwise import LayerwiseOptimizer
from fisher_kernels.optim.warn import warn

_COUNT = "num_items_in_batch"


class FisherTrainerMixin:
    """Lets a Trainer take an optimizer that reads layers as it takes any other.

    ``class Mine(FisherTrainerMixin, Yours)``, or :class:`FisherTrainer` where ``Yours`` is ``transformers.Trainer``.
    The class of the optimizer and its arguments go into ``optimizer_cls_and_kwargs``. It gets the model, and the
    Trainer's own groups as ``params``: those with the weight decay of ``TrainingArguments``, and those without (biases,
    normalisations). The scaler of ``fp16=True`` is handed over. Other optimizers, and one that is given as an instance,
    are left to the Trainer. :class:`AccumulationCheck` is added to its callbacks.

    Raises:
        ValueError: the arguments of the optimizer name ``model``, which comes from the Trainer.
    """

    model: Any
    optimizer: Any
    optimizer_cls_and_kwargs: tuple[Any, dict[str, Any]] | None
    accelerator: Any
    callback_handler: Any
    add_callback: Callable[[Any], None]

    def create_optimizer(self, model: nn.Module | None = None) -> Optimizer:
        """The optimizer, which is made at the first call."""
        given = self.optimizer_cls_and_kwargs
        if self.optimizer is None and given is not None and _reads_layers(given[0]):
            kind, arguments = given
            if "model" in arguments:
                raise ValueError(
                    "optimizer_cls_and_kwargs names model, expected the other arguments alone: the Trainer's model is "
                    f"the one that {kind.__name__} reads"
                )
            scaler = getattr(self.accelerator, "scaler", None)
            bound = _bound(kind, self.model if model is None else model)
            self.optimizer_cls_and_kwargs = (bound, {"grad_scaler": scaler, **arguments})
            try:
                super().create_optimizer(model)  # type: ignore[misc]
            finally:
                self.optimizer_cls_and_kwargs = given
        made: Optimizer = super().create_optimizer(model)  # type: ignore[misc]
        if isinstance(made, LayerwiseOptimizer) and not any(
            isinstance(callback, AccumulationCheck) for callback in self.callback_handler.callbacks
        ):
            self.add_callback(AccumulationCheck())
            self.add_callback(_TakeUp())
        return made

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log, where the loss is logged, with the last figures of :class:`FisherMetrics`."""
        if "loss" in logs:
            for callback in self.callback_handler.callbacks:
                if isinstance(callback, FisherMetrics):
                    logs.update(callback.take())
        super().log(logs, *args, **kwargs)  # type: ignore[misc]


class FisherTrainer(FisherTrainerMixin, Trainer):
    """``transformers.Trainer`` with :class:`FisherTrainerMixin`."""


def _reads_layers(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, LayerwiseOptimizer)


def _bound(kind: type[LayerwiseOptimizer[Any]], model: nn.Module) -> type[Optimizer]:
    """A class that is called with parameter groups, as the Trainer calls one, and makes an optimizer of ``model``."""

    class Bound(Optimizer):
        def __new__(cls, params: ParamsT, **arguments: Any) -> Any:
            return kind(model, params=params, **arguments)

    return Bound


class AccumulationCheck(TrainerCallback):
    """Warns where gradients of micro-batches are added up, and not averaged.

    A model whose ``forward`` takes any keyword is handed ``num_items_in_batch``, the number of labels in all k
    micro-batches of a step, and the Trainer leaves it to the model to divide the sum of its losses by it. Where a model
    takes the keyword and makes a mean of its own all the same, gradients are k times those of the joint batch, and
    statistics k^2 times. The first forward of a training with k > 1 shows whether anything reads the number. A compiled
    model (``torch_compile=True``) is not looked at.
    """

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if args.gradient_accumulation_steps > 1 and not args.torch_compile and isinstance(model, nn.Module):
            _watch_first_forward(model, args.gradient_accumulation_steps)


class FisherMetrics(TrainerCallback):
    """Takes what the optimizer measures, which a :class:`FisherTrainerMixin` logs beside the loss.

    Args:
        places, each: as for :class:`fisher_kernels.integrations.figures.Recorder`, to write to besides.
        every: so many steps; None takes the Trainer's ``logging_steps``. Reading figures waits for the device.
    """

    def __init__(self, *places: Any, every: int | None = None, each: bool = False) -> None:
        if every is not None and every < 1:
            raise ValueError(f"every is {every}, expected at least 1, or None")
        self.every = every
        self._recorder = Recorder(*places, each=each)
        self._figures: dict[str, float] = {}

    def take(self) -> dict[str, float]:
        """The figures since they were last taken, if there are any."""
        figures, self._figures = self._figures, {}
        return figures

    def on_optimizer_step(self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any) -> None:
        step = state.global_step + 1  # which is counted when gradients are gone
        if step % (self.every or max(int(state.logging_steps), 1)) == 0:
            self._figures = self._recorder.record(optimizer, step)


class _TakeUp(TrainerCallback):
    """Lets the optimizer find the shards that Accelerate has put in the place of parameters, before the first step."""

    def on_train_begin(self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any) -> None:
        take_up_parameters(optimizer)


def _watch_first_forward(model: nn.Module, micro_batches: int) -> None:
    watching: list[_Reads] = []

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        first.remove()
        # Labels that the Trainer keeps go into a loss of its own, which divides.
        if isinstance(count := kwargs.get(_COUNT), Tensor) and kwargs.get("labels") is not None:
            watching.append(_Reads(count))
            watching[0].__enter__()

    def after(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        last.remove()
        if watching:
            watching[0].__exit__(None, None, None)
            if not watching[0].seen and output is not None:
                warn(
                    f"{type(model).__name__} is handed {_COUNT} and does not divide its loss by it, so that gradients "
                    f"of {micro_batches} accumulated micro-batches are added up, {micro_batches} times their mean: set "
                    "model.accepts_loss_kwargs = False before the Trainer is made, which then divides, or give it a "
                    "compute_loss_func"
                )

    first = model.register_forward_pre_hook(before, with_kwargs=True)
    last = model.register_forward_hook(after, always_call=True)


class _Reads(TorchFunctionMode):
    """Sees whether any function of torch is called with a tensor."""

    def __init__(self, x: Tensor) -> None:
        super().__init__()
        self.x, self.seen = x, False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen = self.seen or any(leaf is self.x for leaf in tree_leaves((args, kwargs)))
        return func(*args, **(kwargs or {}))
