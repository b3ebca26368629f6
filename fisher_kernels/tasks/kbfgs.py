"""K-BFGS as the package asdfghjkl has it (its module is ``asdl``), in front of SGD with momentum."""

from __future__ import annotations

from collections.abc import Callable

from asdl.precondition import KronBfgsGradientMaker, PreconditioningConfig
from torch import Tensor, nn
from torch.optim import SGD

from fisher_kernels.tasks.task import Batch


class KBFGS(SGD):
    """Gradients multiplied by BFGS estimates of the inverses of both Kronecker factors: arXiv 2006.08877.

    Linear and Conv2d layers are preconditioned, all others take the gradient as it is; Linear layers have to be called
    with matrices. A step runs the last batch through the model a second time, so it costs nearly two iterations.

    Args:
        model: what to train.
        lr: learning rate.
        momentum: of SGD.
        weight_decay: of SGD, part of the gradient.
        damping: of both factors; the authors' own code has 0.1 to 0.3.
        ema_decay: weight of the last batch in the average of the factor of the inputs.
    """

    def __init__(
        self,
        model: nn.Module,
        lr: float = 0.1,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        damping: float = 0.3,
        ema_decay: float = 0.1,
    ) -> None:
        trained = [p for p in model.parameters() if p.requires_grad]
        super().__init__(trained, lr=lr, momentum=momentum, weight_decay=weight_decay)
        others = [module for module in model.modules() if not isinstance(module, nn.Linear | nn.Conv2d)]
        self._config = PreconditioningConfig(damping=damping, ema_decay=ema_decay, ignore_modules=others)
        self._maker = KronBfgsGradientMaker(model, self._config)

    def forward_and_backward(self, model: nn.Module, criterion: Callable[..., Tensor], batch: Batch) -> Tensor:
        """Puts the preconditioned gradients in place; returns the loss."""
        inputs, targets = batch
        self._config.data_size = len(inputs)
        # The maker goes through the inputs of the last batch again, so the targets have to come with them.
        made = self._maker.setup_model_call(lambda x, y: (model(x), y), inputs, targets)
        self._maker.setup_loss_call(criterion, made[0], made[1])
        self._maker.forward_and_backward()
        loss: Tensor = self._maker.loss
        return loss
