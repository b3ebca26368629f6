"""Where torch keeps the dispatch keys of a tensor, for the native module.

A tensor may be negated when it is read, or an inference tensor, which may not be written; DLPack tells neither. Torch
does, at a price that shows in a call with ten tensors. The same bits lie in the tensor, at a place that no interface
names. So the place is looked for when the module is loaded, and is used only if what lies there is right for tensors of
every kind; otherwise torch is asked.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable

import torch
from torch import Tensor
from torch.nn import Parameter

Place = tuple[int, int, int, int]
"""Offset of the pointer in the Python object, offset of the keys, bit of negated tensors, bits of tracked ones."""

NOWHERE: Place = (0, 0, 0, 0)
_WORD = 8
_MOST_WORDS = 26  # of a tensor, as long as it has been 64 bits wide


def _word(address: int) -> int:
    return ctypes.c_uint64.from_address(address).value


def _keys(x: Tensor) -> int:
    return int(torch._C._dispatch_keys(x).raw_repr())


def _first(words: Iterable[int], base: int, value: int) -> int | None:
    """The offset of the first word of a value."""
    return next((k * _WORD for k in words if _word(base + k * _WORD) == value), None)


def samples() -> list[Tensor]:
    """Tensors of every kind that kernels are given."""
    plain = torch.ones(2, 3, dtype=torch.float32, device="cpu")
    complex_ones = torch.ones(2, 3, dtype=torch.complex64, device="cpu")
    with torch.inference_mode():
        inference = torch.ones(2, 3, dtype=torch.float64, device="cpu")
        both = torch._neg_view(inference)
    return [
        plain, torch._neg_view(plain), complex_ones.conj().imag, complex_ones.conj(), inference, both, plain[:, 1],
        plain.clone().requires_grad_(), Parameter(plain), torch.ones((), dtype=torch.bfloat16, device="cpu"),
        torch.empty(0, dtype=torch.int64, device="cpu"), torch.empty(1, device="meta", dtype=torch.float16),
        torch._efficientzerotensor((2,), dtype=torch.float32, device="cpu"),
    ]  # fmt: skip


def find() -> Place:
    """The place, or NOWHERE where this torch keeps the keys in another way."""
    try:
        found = samples()
        plain, negated, inference = found[0], found[1], found[4]
        pointer = _first(range(2, Tensor.__basicsize__ // _WORD), id(plain), plain._cdata)
        keys = _first(range(_MOST_WORDS), plain._cdata, _keys(plain))
        if pointer is None or keys is None:
            return NOWHERE
        negative = _keys(negated) & ~_keys(plain)
        tracked = _keys(plain) & ~_keys(inference)
        for x in found:
            if _word(id(x) + pointer) != x._cdata or _word(x._cdata + keys) != _keys(x):
                return NOWHERE
            if bool(_keys(x) & negative) != x.is_neg() or (not _keys(x) & tracked) != x.is_inference():
                return NOWHERE
    except (AttributeError, RuntimeError, TypeError):  # a torch that has no such thing
        return NOWHERE
    return pointer, keys, negative, tracked
