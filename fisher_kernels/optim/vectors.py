"""What directions are made of: a vector for each parameter, made when it is asked for and not kept."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence

from torch import Tensor
from torch.nn import Parameter


class Vectors(Mapping[Parameter, Tensor]):
    """Of DTensors all is gathered for a vector, of which there is room for one layer at a time.

    Args:
        params: those that have one.
        of: makes those of some parameters, which are gathered together.
    """

    def __init__(self, params: Collection[Parameter], of: Callable[[Sequence[Parameter]], Iterable[Tensor]]) -> None:
        self._params, self._of = dict.fromkeys(params), of

    def of_all(self, params: Iterable[Parameter]) -> dict[Parameter, Tensor]:
        """The vectors of those among parameters that have one."""
        there = [p for p in params if p in self._params]
        return dict(zip(there, self._of(there), strict=True)) if there else {}

    def only(self, wanted: Callable[[Parameter], bool]) -> Vectors:
        """The vectors of some parameters."""
        return Vectors([p for p in self._params if wanted(p)], self._of)

    def __getitem__(self, p: Parameter) -> Tensor:
        return self.of_all([p])[p]

    def __contains__(self, p: object) -> bool:
        return p in self._params

    def __iter__(self) -> Iterator[Parameter]:
        return iter(self._params)

    def __len__(self) -> int:
        return len(self._params)
