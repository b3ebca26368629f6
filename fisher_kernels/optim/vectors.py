"""What directions are made of: a vector for each parameter, made when it is asked for and not kept."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping

from torch import Tensor
from torch.nn import Parameter


class Vectors(Mapping[Parameter, Tensor]):
    """Of DTensors all is gathered for a vector, of which there is room for one layer at a time.

    Args:
        params: those that have one.
        of: makes it.
    """

    def __init__(self, params: Collection[Parameter], of: Callable[[Parameter], Tensor]) -> None:
        self._params, self._of = dict.fromkeys(params), of

    def __getitem__(self, p: Parameter) -> Tensor:
        if p not in self._params:
            raise KeyError(p)
        return self._of(p)

    def __contains__(self, p: object) -> bool:
        return p in self._params

    def __iter__(self) -> Iterator[Parameter]:
        return iter(self._params)

    def __len__(self) -> int:
        return len(self._params)


def only(vectors: Mapping[Parameter, Tensor], wanted: Callable[[Parameter], bool]) -> Vectors:
    """The vectors of some parameters."""
    return Vectors([p for p in vectors if wanted(p)], vectors.__getitem__)
