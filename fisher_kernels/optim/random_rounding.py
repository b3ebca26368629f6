"""Rounding at random by optimizers that need no count of steps otherwise."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim.optimizer import ParamsT

from fisher_kernels.curvature.gathered import is_distributed
from fisher_kernels.ops import Rounding
from fisher_kernels.ops.stochastic_round import narrowed
from fisher_kernels.optim.base import FisherOptimizer
from fisher_kernels.optim.row_pieces import index_of, own_slices


class Roundings(NamedTuple):
    """How a step rounds its parameters and their moments, as the ops take it; all to nearest where it has nothing.

    Attributes:
        steps: the number of the step for each parameter.
        rounding: by which random integers.
    """

    steps: Sequence[Tensor] | None = None
    rounding: Sequence[Rounding] | None = None

    def narrow(self, i: int, x: Tensor, dtype: torch.dtype, *, low: bool) -> Tensor:
        """What parameter i is stored as, or by the lower halves of the integers its moment."""
        if self.steps is None or self.rounding is None:
            return narrowed(x, dtype, None, None, low=low)
        return narrowed(x, dtype, self.rounding[i], self.steps[i], low=low)


class RandomRounding(FisherOptimizer):
    """Base of the optimizers whose groups have ``stochastic_rounding`` and ``seed``, and whose steps are given both.

    With the former a parameter has in its state ``step``, how often it was stepped so far, and ``ordinal``.
    """

    later: ClassVar[Mapping[str, Any]] = {**FisherOptimizer.later, "stochastic_rounding": False, "seed": 0}

    def __init__(self, params: ParamsT, defaults: dict[str, Any]) -> None:
        self._roundings: dict[Parameter, tuple[int, Rounding]] = {}  # with the seed that they are of
        super().__init__(params, defaults)

    def _check_group(self, group: dict[str, Any]) -> None:
        super()._check_group(group)
        self._check_rounding(group)

    def _check_params(self, group: dict[str, Any]) -> None:
        super()._check_params(group)
        self._check_something_is_rounded(group)

    def _find_groups(self) -> None:
        super()._find_groups()
        self._roundings = {}  # other parameters, or another state

    def _prepare_rounding(self) -> None:
        """Make the state of it.

        Raises:
            ValueError: what is in bfloat16 is to be rounded at random in some groups and to nearest in others.
        """
        kinds = {group["stochastic_rounding"] for group, p in self._with_gradients() if self._is_short(p)}
        if len(kinds) > 1:
            raise ValueError(
                "stochastic_rounding is True in some groups and False in others that have something in bfloat16, "
                "expected one for all of these: one step takes them together"
            )
        for group, p in self._with_gradients():
            if group["stochastic_rounding"]:
                self._ordinal(p)
                if "step" not in self.state[p]:
                    self.state[p]["step"] = torch.zeros((), dtype=torch.float32, device=p.device)

    def _is_short(self, p: Parameter) -> bool:
        return torch.bfloat16 in (p.dtype, self._dtype_of(p, self.moment))

    def _count_steps(self, found_inf: Tensor | None) -> None:
        """One more step of the parameters that take it; none where a scaler has found what is not finite."""
        counts = [self.state[p]["step"] for group, p in self._with_gradients() if group["stochastic_rounding"]]
        if counts:
            taken = 1.0 if found_inf is None else 1 - found_inf.to(counts[0].device, torch.float32).reshape(())
            torch._foreach_add_(counts, taken)

    def _rounding(self, params: Sequence[Parameter]) -> Roundings:
        """That of a step of some parameters.

        Where it is asked for, parameters of which nothing is in bfloat16 may be among them: nobody looks at theirs.
        """
        asking = [self._groups[p]["stochastic_rounding"] for p in params]
        if not any(asking):
            return Roundings()
        some = self.state[params[asking.index(True)]]["step"]
        pairs = [*zip(params, asking, strict=True)]
        return Roundings(
            [self.state[p]["step"] if asks else some for p, asks in pairs],
            [self._rounding_of(p) if asks else Rounding(0) for p, asks in pairs],
        )

    def _rounding_of(self, p: Parameter) -> Rounding:
        seed = self._groups[p]["seed"]
        found = self._roundings.get(p)
        if found is None or found[0] != seed:
            # Read once: on a GPU that waits.
            whole = Rounding.of(seed, int(self._ordinal(p)))
            own = Rounding(whole.base, *index_of(p, own_slices(p))) if is_distributed(p) else whole
            found = self._roundings[p] = seed, own
        return found[1]
