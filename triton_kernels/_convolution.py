"""The input of a convolution and its geometry, as kernels take them."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import triton
import triton.language as tl  # noqa: F401 - Triton's interpreter looks for it
from torch import Tensor


@triton.jit
def place(index, second, third):
    """Coordinates of a row-major index in three dimensions, of which the first needs no size."""
    return index // (second * third), index // third % second, index % third


class Channels(NamedTuple):
    """A tensor (N, C, *S) whose samples lie in order (C, *S) or (*S, C)."""

    tensor: Tensor
    channel: int  # strides
    position: int

    @property
    def sample(self) -> int:
        return self.tensor.stride(0)

    def part(self, sample: int, channel: int) -> Tensor:
        """What begins at a sample and a channel, for its address."""
        return self.tensor[sample:, channel:]


def channels_of(x: Tensor) -> Channels:
    in_order = x[:1].is_contiguous()
    return Channels(x, math.prod(x.shape[2:]) if in_order else 1, 1 if in_order else x.shape[1])


def three(values: Sequence[int], missing: int) -> tuple[int, ...]:
    """Values of one to three spatial dimensions as those of three, of which the first are the missing ones."""
    return (missing,) * (3 - len(values)) + tuple(values)


class Geometry(NamedTuple):
    """The convolution in three spatial dimensions, in the order of the kernels' arguments."""

    size: tuple[int, ...]
    windows: tuple[int, ...]
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    before: tuple[int, ...]
    dilation: tuple[int, ...]

    @property
    def positions(self) -> int:
        return math.prod(self.windows)

    def arguments(self) -> tuple[int, ...]:
        n = math.prod(self.kernel)
        return (
            *self.size, self.positions, *self.windows[1:], n, *self.kernel[1:],
            *self.stride, *self.before, *self.dilation,
        )  # fmt: skip
