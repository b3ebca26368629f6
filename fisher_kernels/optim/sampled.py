"""The Fisher matrix of a model's own distribution: statistics of labels that are drawn from its output."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

import torch
from torch import Tensor
from torch._C import _DisableAutocast

from fisher_kernels.curvature.gathered import is_distributed
from fisher_kernels.curvature.rules import R
from fisher_kernels.curvature.sites import Layer
from fisher_kernels.ops import ACCUMULATOR
from fisher_kernels.optim.hyperparameters import require_choice
from fisher_kernels.optim.layerwise import LayerwiseOptimizer

DRAWS = "draws"
"""Key of a group: how often labels were drawn, which says where the random numbers of the next draw begin."""

RANKS = 1 << 20
"""More processes than there are: each draws other labels."""


def _categorical(y: Tensor, generator: torch.Generator) -> Tensor:
    probabilities = y.softmax(-1)
    labels = torch.multinomial(probabilities.nan_to_num(1.0), 1, generator=generator)
    return probabilities.scatter_add(1, labels, probabilities.new_full(labels.shape, -1.0))


def _bernoulli(y: Tensor, generator: torch.Generator) -> Tensor:
    probabilities = y.sigmoid()
    return probabilities - torch.bernoulli(probabilities.nan_to_num(0.5), generator=generator)


def _gaussian(y: Tensor, generator: torch.Generator) -> Tensor:
    return torch.empty_like(y).normal_(generator=generator)


DISTRIBUTIONS: Mapping[str, Callable[[Tensor, torch.Generator], Tensor]] = {
    "categorical": _categorical,
    "bernoulli": _bernoulli,
    "gaussian": _gaussian,
}
"""Name -> the derivative, by outputs (terms, features), of the negative log-likelihood of labels drawn from them. Where
outputs are not finite it is not either, and the statistics are refused: drawing from those would end the program."""


class SampledLabels(LayerwiseOptimizer[R]):
    """Base of the optimizers that take their statistics of drawn labels where ``fisher="sampled"``."""

    _ruled_for: bool | None = None
    """Whether the rules take derivatives for those of drawn labels; None where that is not known."""

    def _check_group(self, group: dict[str, Any]) -> None:
        super()._check_group(group)
        require_choice(group, "fisher", ("empirical", "sampled"))
        group.setdefault(DRAWS, 0)

    def _find_layers(self) -> list[Layer[R]]:
        self._ruled_for = self._samples()
        return super()._find_layers()

    def _samples(self) -> bool:
        """Whether the groups ask for drawn labels."""
        kinds = {group["fisher"] for group in self.param_groups}
        if len(kinds) > 1:
            raise ValueError("fisher is 'sampled' in some groups and 'empirical' in others, expected one for all")
        return kinds == {"sampled"}

    def _arm(self) -> None:
        sampled = self._samples()
        if self._ruled_for is not None and self._ruled_for != sampled:
            # Changed since: the rules are to undo another reduction, and what is pending has that of before.
            self.statistics.clear()
            self._drop_pending()
            self._watch(self.statistics.grad_scaler, self.statistics.processes.given)
            return
        self._ruled_for = self.statistics.sampled = sampled
        super()._arm()

    def _schedules(self) -> list[tuple[Any, ...]]:
        kinds = [group.get("fisher") for group in self.param_groups]  # none in a list that took its place
        return [(*schedule, kind) for schedule, kind in zip(super()._schedules(), kinds, strict=True)]

    def _reduction(self, group: dict[str, Any]) -> str:
        """That of the loss whose derivatives count; of drawn labels they are those of a sum."""
        reduction: str = group["loss_reduction"]
        return "sum" if group["fisher"] == "sampled" else reduction

    def _loss_scale(self, grad_scale: Tensor | None, found_inf: Tensor | None) -> Tensor | None:
        # The derivatives of drawn labels are not scaled.
        return None if self.statistics.sampled else super()._loss_scale(grad_scale, found_inf)

    def _silence(self) -> str:
        if not self.statistics.sampled:
            return super()._silence()
        return (
            "fisher='sampled', and a refresh step with gradients saw no samples: call sample(output) between the "
            "forward and the backward of the loss. The step goes on with the statistics it has"
        )

    def sample(
        self,
        output: Tensor,
        distribution: Literal["categorical", "bernoulli", "gaussian"] = "categorical",
        *,
        dim: int = -1,
    ) -> None:
        """Take statistics of labels that are drawn from the model's output, in the steps that refresh them.

        Call it between the forward and the backward of the loss, whose own statistics do not count then::

            output = model(x)
            optimizer.sample(output)
            F.cross_entropy(output, y).backward()

        It runs a backward pass of the sum over the terms through the same graph, for the layers' hooks alone: no
        gradient is accumulated, and neither a loss scale nor a division by micro-batches has a part in it. In all other
        steps, and under ``fisher="empirical"``, it does nothing. Labels come from a generator of its own that is part
        of the state, differs between processes, and leaves the random numbers of torch alone.

        Args:
            output: of the model, with its graph; of a part of the terms of the loss where others are masked.
            distribution: whose parameters it has: ``"categorical"``, logits, for a cross-entropy; ``"bernoulli"``,
                logits, for a binary cross-entropy summed over the features of a term; ``"gaussian"``, means of unit
                variance, for half the squared error summed over them.
            dim: of the classes or features; all others count terms. A vector of single features has none.

        Raises:
            TypeError, ValueError: an argument is of the wrong kind or out of range; the message names it.
        """
        if distribution not in DISTRIBUTIONS:
            raise ValueError(f"distribution is {distribution!r}, expected one of {', '.join(map(repr, DISTRIBUTIONS))}")
        if not isinstance(output, Tensor) or not output.is_floating_point():
            raise TypeError(f"output is {type(output).__name__}, expected a floating-point tensor: a model's output")
        if is_distributed(output):
            raise TypeError("output is a DTensor, expected all of it in every process: output.full_tensor()")
        if not output.requires_grad:
            raise ValueError("output has no graph, expected the output of a forward with gradients on")
        if output.dim() and not -output.dim() <= dim < output.dim():
            raise ValueError(f"dim is {dim}, expected a dimension of output, which has {output.dim()}")
        if self.statistics.sampled and self.statistics.armed and output.numel():
            self._sample(output, distribution, dim)

    def _sample(self, output: Tensor, distribution: str, dim: int) -> None:
        with torch.no_grad(), _DisableAutocast():
            y = output.detach().to(ACCUMULATOR[output.dtype])
            single = y.dim() == 0 or (y.dim() == 1 and distribution != "categorical")
            y = y.reshape(-1, 1) if single else y.movedim(dim, -1)
            derivative = DISTRIBUTIONS[distribution](y.reshape(-1, y.shape[-1]), self._generator(y.device))
            derivative = derivative.reshape(output.shape if single else y.shape)
            derivative = derivative if single else derivative.movedim(-1, dim)
        sites = [self.statistics.sites[index] for index in sorted(self.statistics.armed)]
        layers = [layer for site in sites for layer in site.layers]
        wanted = list(dict.fromkeys(p for layer in layers for p in _cheapest(layer.parameters)))
        if not wanted:
            return
        wanted = [self.statistics.present(p) for p in wanted]
        with self.statistics.sampling(), self._of_terms(y.shape[:-1].numel()):
            torch.autograd.grad(output, wanted, derivative.to(output.dtype), retain_graph=True, allow_unused=True)

    def _of_terms(self, number: int) -> AbstractContextManager[None]:
        """A time in which a backward pass has so many terms, for statistics that need to know."""
        return nullcontext()

    def _generator(self, device: torch.device) -> torch.Generator:
        """That of the next draw."""
        group, processes = self.param_groups[0], self.statistics.processes
        processes.look_in(self._model, self._groups)
        seed, group[DRAWS] = group[DRAWS] * RANKS + processes.rank, group[DRAWS] + 1
        return torch.Generator(device).manual_seed(seed)


def _cheapest(parameters: Mapping[str, Tensor]) -> list[Tensor]:
    """Of the trained parameters of a layer the one whose gradient makes least work; it has the layer's node run."""
    trained = [p for p in parameters.values() if p.requires_grad]
    return [min(trained, key=Tensor.numel)] if trained else []
