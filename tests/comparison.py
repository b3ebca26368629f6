"""How tests compare a result with its definition in float64."""

from __future__ import annotations

import torch
from torch import Tensor

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def unit_roundoff(dtype: torch.dtype) -> float:
    """The largest relative error of rounding to nearest."""
    return torch.finfo(dtype).eps / 2


def assert_within(actual: Tensor, expected: Tensor, bound: Tensor | float, what: str = "") -> None:
    """Every entry of ``actual`` is within an absolute ``bound`` of ``expected``, given in float64.

    NaN goes with NaN only, and infinity with what rounds to the same infinity in the dtype of ``actual``.
    """
    assert expected.dtype == torch.float64, f"{what}: expected has dtype {expected.dtype}"
    assert actual.shape == expected.shape, f"{what}: shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    rounded = expected.to(actual.dtype)
    assert torch.equal(actual.isnan(), rounded.isnan()), f"{what}: NaN at other places\n{actual}\n{expected}"
    infinite = rounded.isinf()
    assert torch.equal(actual.isinf(), infinite), f"{what}: infinity at other places\n{actual}\n{expected}"
    assert torch.equal(actual[infinite], rounded[infinite]), f"{what}: infinity of the other sign"
    finite = rounded.isfinite()
    error = (actual.double() - expected).abs()[finite]
    limit = torch.as_tensor(bound, dtype=torch.float64).expand(expected.shape)[finite]
    assert bool(limit.isfinite().all()), f"{what}: a bound that nothing can exceed"
    off = int((error > limit).sum())
    worst = (error - limit).argmax() if off else 0
    assert not off, (
        f"{what}: {off} of {error.numel()} entries are off, the worst by {float(error[worst]):.3e} where "
        f"{float(limit[worst]):.3e} is allowed: {float(actual[finite][worst]):.9e}, "
        f"expected {float(expected[finite][worst]):.9e}"
    )


def bits(x: Tensor) -> Tensor:
    """The representation of x as whole numbers, by which NaN equals itself and -0.0 differs from 0.0."""
    return x.detach().contiguous().view(_BITS[x.element_size()])


def assert_same_bits(actual: Tensor, expected: Tensor, what: str = "") -> None:
    """Equal in dtype, shape and every bit."""
    assert actual.dtype == expected.dtype, f"{what}: {actual.dtype}, expected {expected.dtype}"
    assert torch.equal(bits(actual), bits(expected)), f"{what}: bits differ\n{actual}\n{expected}"


def surroundings(x: Tensor) -> Tensor:
    """The bits of the storage of x that lie around and between its elements."""
    storage = torch.empty(0, dtype=x.dtype).set_(x.untyped_storage())
    around = torch.ones(storage.shape, dtype=torch.bool)
    around.as_strided(x.shape, x.stride(), x.storage_offset()).fill_(False)
    return bits(storage[around])
