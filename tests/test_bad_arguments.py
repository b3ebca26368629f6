"""Every call that an op refuses: the error names the argument, and nothing has been written."""

from __future__ import annotations

import copy

import pytest
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree

from fisher_kernels import ops
from tests.bad_calls import (
    Call,
    Refused,
    adafisher_step,
    batch_norm_gradients,
    block_inverse,
    capped_step,
    conv_gram,
    conv_mini_block_gram,
    factor_ema,
    gram,
    mbf_step,
    mini_block_gram,
    rank_one,
    sofim_step,
    stochastic_round,
    sum_of_squares,
)
from tests.comparison import assert_same_bits

TABLES: dict[str, Refused] = {
    **adafisher_step.REFUSED,
    **batch_norm_gradients.REFUSED,
    **block_inverse.REFUSED,
    **capped_step.REFUSED,
    **conv_gram.REFUSED,
    **conv_mini_block_gram.REFUSED,
    **factor_ema.REFUSED,
    **gram.REFUSED,
    **mbf_step.REFUSED,
    **mini_block_gram.REFUSED,
    **rank_one.REFUSED,
    **sofim_step.REFUSED,
    **stochastic_round.REFUSED,
    **sum_of_squares.REFUSED,
}


def tensors(call: Call) -> list[Tensor]:
    return [x for x in pytree.tree_leaves(call) if isinstance(x, Tensor) and x.device.type != "meta"]


def refused(op: str, name: str) -> tuple[Call, type[Exception], str]:
    table = TABLES[op]
    call = table.good()
    spoil, error, message = {**table.faults, **table.numbers}[name]
    spoil(call)
    return call, error, f"^{op}: {message}"


def test_every_op_has_a_table() -> None:
    public = {name: getattr(ops, name) for name in ops.__all__}
    assert set(TABLES) == {name for name, x in public.items() if callable(x) and not isinstance(x, type)}


@pytest.mark.parametrize("op", TABLES)
def test_calls_are_good_before_they_are_spoiled(backend: str, op: str) -> None:
    getattr(ops, op)(**TABLES[op].good())


@pytest.mark.parametrize(("op", "name"), [(op, name) for op, t in TABLES.items() for name in {**t.faults, **t.numbers}])
def test_bad_arguments(backend: str, op: str, name: str) -> None:
    call, error, message = refused(op, name)
    before = copy.deepcopy(call)
    with pytest.raises(error, match=message):
        getattr(ops, op)(**call)
    for now, then in zip(tensors(call), tensors(before), strict=True):
        assert_same_bits(now, then, "nothing has been written")


@pytest.mark.parametrize(("op", "name"), [(op, name) for op, t in TABLES.items() for name in t.faults])
def test_bad_arguments_without_data(op: str, name: str) -> None:
    """Compilers learn of the same faults from the fakes."""
    call, error, message = refused(op, name)
    with FakeTensorMode() as mode, pytest.raises(error, match=message):
        getattr(ops, op)(**pytree.tree_map_only(Tensor, mode.from_tensor, call))
