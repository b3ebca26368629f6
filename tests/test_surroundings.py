"""What a call of an op finds around it: tensors of unusual kinds, modes, defaults, and arguments of the wrong type."""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Callable, Iterator
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils import _pytree as pytree

from fisher_kernels import AdaFisher, _dispatch_keys, ops
from fisher_kernels._library import native_module
from fisher_kernels.ops._arguments import arguments_of
from fisher_kernels.optim import EKFAC, KFAC, MBF, SOFIM, EKFACAdam
from tests.bad_calls import Call
from tests.comparison import assert_same_bits
from tests.test_ops import MUTATES, PUBLIC, op

OPS = tuple(PUBLIC)
BATCHES = ("weighted_gram_", "conv_gram_", "mini_block_gram_", "conv_mini_block_gram_", "block_apply", "mbf_step_")

each_op = pytest.mark.parametrize("name", OPS)
every_optimizer = pytest.mark.parametrize(
    "make", [AdaFisher, MBF, SOFIM, KFAC, pytest.param(EKFAC, marks=pytest.mark.slow), EKFACAdam]
)


def run(name: str, call: Call) -> list[Tensor]:
    """The results of a call, and what it wrote."""
    results = getattr(ops, name)(**call)
    written = [call[argument] for argument in sorted(MUTATES.get(name, ()))]
    return [x for x in pytree.tree_leaves((results, written)) if isinstance(x, Tensor)]


def of_tensors(call: Call) -> Iterator[str]:
    """The names of the arguments that hold tensors."""
    for argument, value in call.items():
        if any(isinstance(x, Tensor) for x in pytree.tree_leaves(value)):
            yield argument


def changed(call: Call, argument: str, change: Callable[[Tensor], Tensor]) -> Call:
    """A copy with other tensors in one argument."""
    call = copy.deepcopy(call)
    return {**call, argument: pytree.tree_map_only(Tensor, change, call[argument])}


def assert_same(found: list[Tensor], expected: list[Tensor], what: str) -> None:
    for x, y in zip(found, expected, strict=True):
        assert_same_bits(x.resolve_neg(), y, what)


# Tensors.


def negated(x: Tensor) -> Tensor:
    """The same numbers, of which memory holds the opposite."""
    found = torch._neg_view(x.neg())
    assert found.is_neg()
    return found


@each_op
def test_negated_tensors(backend: str, name: str) -> None:
    for make in PUBLIC[name][:2]:
        call = make()
        expected = run(name, copy.deepcopy(call))
        for argument in of_tensors(call):
            assert_same(run(name, changed(call, argument, negated)), expected, argument)


def test_the_imaginary_part_of_a_conjugate_is_stepped(backend: str) -> None:
    z = torch.complex(torch.ones(3), torch.ones(3))
    param = torch.nn.Parameter(z.conj().imag)
    with torch.no_grad():
        ops.sofim_step_([param], [torch.ones(3)], [torch.zeros(3)], [torch.zeros(())], lr=1.0, beta=0.0, rho=1.0)
    assert_same_bits(param.detach().resolve_neg(), torch.full((3,), -1.25))
    assert_same_bits(z.imag.contiguous(), torch.full((3,), 1.25), "the memory")


@each_op
def test_zeros_without_memory(backend: str, name: str) -> None:
    """As zeros, or refused by name; those that are to be written are refused."""
    call = PUBLIC[name][0]()
    for argument in of_tensors(call):
        spoiled = changed(call, argument, lambda x: torch._efficientzerotensor(x.shape, dtype=x.dtype))
        plain = changed(call, argument, torch.zeros_like)
        try:
            found = run(name, spoiled)
        except (TypeError, ValueError, RuntimeError):
            continue
        assert argument not in MUTATES.get(name, ())
        assert_same(found, run(name, plain), argument)


def test_tensors_whose_memory_was_freed(backend: str) -> None:
    x = torch.ones(3, 4)
    x.untyped_storage().resize_(0)
    with pytest.raises(ValueError, match=r"^column_sum_of_squares: x .*memory"):
        ops.column_sum_of_squares(x)
    call = PUBLIC["sofim_step_"][0]()
    call["grads"][0].untyped_storage().resize_(0)
    with pytest.raises(ValueError, match=r"^sofim_step_: .* no memory to read") as raised:
        ops.sofim_step_(**call)
    assert raised.type is ValueError  # not the one by which a kernel asks for tensors that are resolved


@pytest.mark.parametrize("name", ["params", "grads", "momentum_buffers", "inverses"])
def test_memory_that_was_freed_under_a_shared_inverse(backend: str, name: str) -> None:
    lists = {
        "params": [torch.ones(3, 4)],
        "grads": [torch.ones(3, 4)],
        "momentum_buffers": [torch.ones(3, 4)],
        "inverses": [torch.eye(4).expand(1, 1, 4, 4).contiguous()],
    }
    lists[name][0].untyped_storage().resize_(0)
    with pytest.raises(ValueError, match=rf"^mbf_step_: ({name}\[0\]|a tensor of shape .*) has no memory"):
        ops.mbf_step_(**lists, lr=0.1, momentum=0.9, weight_decay=0.0, decoupled=True, maximize=False)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("kind", ["nested", "sparse", "mkldnn"])
@each_op
def test_tensors_without_strides(backend: str, name: str, kind: str) -> None:
    make: dict[str, Callable[[Tensor], Tensor]] = {
        "nested": lambda x: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
        "sparse": Tensor.to_sparse,
        "mkldnn": lambda x: torch.ones(2, 2).to_mkldnn(),
    }
    call = PUBLIC[name][0]()
    for argument in of_tensors(call):
        spoiled = changed(call, argument, make[kind])
        before = copy.deepcopy({a: call[a] for a in call if a != argument})
        with pytest.raises(TypeError, match=rf"^{name}: {argument}(\[\d+\])? (is a nested tensor|has layout)"):
            run(name, {**before, argument: spoiled[argument]})


# Modes.


@each_op
def test_autocast_changes_nothing(backend: str, name: str) -> None:
    for make in PUBLIC[name]:
        call = make()
        expected = run(name, copy.deepcopy(call))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert_same(run(name, copy.deepcopy(call)), expected, "the public function")
            results = [x for x in pytree.tree_leaves(getattr(ops, name)(**call)) if isinstance(x, Tensor)]
        for x, y in zip(results, expected, strict=False):
            assert_same_bits(x, y, name)


def test_products_of_large_blocks_under_autocast(backend: str) -> None:
    """Which native kernels leave to PyTorch."""
    x = torch.randn(2, 80, 80, generator=torch.Generator().manual_seed(0))
    blocks = x @ x.mT + torch.eye(80)
    shared = torch.linalg.inv(blocks[:1, None]).contiguous()
    param = torch.ones(3, 80)

    def results() -> list[Tensor]:
        w, m = param.clone(), torch.zeros_like(param)
        ops.mbf_step_(
            [w],
            [x[0, :3].clone()],
            [m],
            [shared],
            lr=0.1,
            momentum=0.9,
            weight_decay=0.0,
            decoupled=True,
            maximize=False,
        )
        return [w, m, ops.block_inverse(blocks, 0.1)[0], ops.block_solve(blocks, 0.1, x[:, 0].clone())[0]]

    expected = results()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_same(results(), expected, "under autocast")


@every_optimizer
def test_optimizers_step_as_without_autocast(host_backend: str, make: Any) -> None:
    """Its forward pass has autocast either way: statistics and step are what is compared."""

    def trained(everything: bool) -> list[Tensor]:
        torch.manual_seed(0)
        net = torch.nn.Sequential(torch.nn.Conv1d(3, 8, 3), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(48, 4))
        optimizer = make(net.parameters() if make is SOFIM else net, lr=0.01)
        x, y = torch.randn(16, 3, 8), torch.randn(16, 4)
        for _ in range(3):
            optimizer.zero_grad()
            with torch.autocast("cpu", dtype=torch.bfloat16):
                loss = torch.nn.functional.mse_loss(net(x).float(), y)
                if everything:
                    loss.backward()
                    optimizer.step()
            if not everything:
                loss.backward()
                optimizer.step()
        return [p.detach() for p in net.parameters()]

    assert_same(trained(True), trained(False), make.__name__)


@each_op
def test_the_default_device_and_dtype_mean_nothing(backend: str, name: str) -> None:
    call = PUBLIC[name][0]()
    numbers = {a: 0.01 for a in ("lr",) if a in call}
    expected = run(name, {**copy.deepcopy(call), **numbers})
    previous = torch.get_default_dtype()
    try:
        torch.set_default_device("meta")
        torch.set_default_dtype(torch.float64)
        found = run(name, {**copy.deepcopy(call), **numbers})
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(previous)
    assert_same(found, expected, name)


@every_optimizer
def test_optimizers_step_whatever_the_default_device_is(host_backend: str, make: Any) -> None:
    def trained(device: str | None) -> list[Tensor]:
        torch.manual_seed(0)
        net = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.LayerNorm(4), torch.nn.Linear(4, 2))
        x, y = torch.randn(8, 3), torch.randn(8, 2)
        try:
            torch.set_default_device(device)
            optimizer = make(net.parameters() if make is SOFIM else net, lr=0.01)
            for _ in range(3):
                optimizer.zero_grad()
                torch.nn.functional.mse_loss(net(x), y).backward()
                optimizer.step()
            optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
            torch.nn.functional.mse_loss(net(x), y).backward()
            optimizer.step()
        finally:
            torch.set_default_device(None)
        return [p.detach() for p in net.parameters()]

    assert_same(trained("meta"), trained(None), make.__name__)


@pytest.mark.parametrize("name", [name for name in MUTATES if name in PUBLIC])
def test_inference_tensors_are_not_written_outside_inference_mode(backend: str, name: str) -> None:
    call = PUBLIC[name][0]()
    expected = run(name, copy.deepcopy(call))
    for argument in MUTATES[name]:
        with torch.inference_mode():
            spoiled = changed(call, argument, Tensor.clone)
        before = copy.deepcopy(call)
        with pytest.raises(RuntimeError, match="Inplace update to inference tensor outside InferenceMode"):
            getattr(ops, name)(**spoiled)
        for x, y in zip(pytree.tree_leaves(spoiled), pytree.tree_leaves(before), strict=True):
            if isinstance(x, Tensor):
                assert_same_bits(x, y, "nothing has been written")
        with torch.inference_mode():
            assert_same(run(name, spoiled), expected, "within")


# Derivatives.


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
@each_op
def test_no_op_has_a_derivative(backend: str, name: str) -> None:
    call = PUBLIC[name][0]()
    no_derivative = rf"{name} has no derivative"
    for argument in of_tensors(call):
        leaves = [x for x in pytree.tree_leaves(call[argument]) if isinstance(x, Tensor) and x.is_floating_point()]
        if not leaves:
            continue
        asking = changed(call, argument, lambda x: x.requires_grad_())
        if name in MUTATES:
            leaf = "a leaf Variable that requires grad is being used in an in-place operation"
            with pytest.raises(RuntimeError, match=leaf if argument in MUTATES[name] else no_derivative):
                getattr(ops, name)(**asking)
        else:
            results = [x for x in run(name, asking) if x.is_floating_point()]
            assert all(x.requires_grad for x in results)
            with pytest.raises(NotImplementedError, match=no_derivative):
                sum(x.sum() for x in results).backward()

        def total(scale: Tensor, argument: str = argument) -> Tensor:
            found = run(name, changed(call, argument, lambda x: x * scale))
            return sum((x.sum() for x in found if x.is_floating_point()), torch.zeros(()))

        one = torch.ones(())
        with pytest.raises((RuntimeError, NotImplementedError), match=no_derivative):
            torch.func.grad(total)(one)
        with pytest.raises(NotImplementedError, match=no_derivative):
            torch.func.jvp(total, (one,), (one,))
        with forward_ad.dual_level(), pytest.raises(NotImplementedError, match=no_derivative):
            run(name, changed(call, argument, lambda x: forward_ad.make_dual(x, torch.ones_like(x))))


def test_what_requires_no_gradient_is_stepped_within_transforms(backend: str) -> None:
    """A function transform around an op that it does not differentiate."""

    def loss(x: Tensor) -> Tensor:
        return (x * ops.column_sum_of_squares(torch.ones(2, 3))).sum()

    assert_same_bits(torch.func.grad(loss)(torch.ones(3)), torch.full((3,), 2.0))
    with forward_ad.dual_level():
        assert_same_bits(ops.column_sum_of_squares(torch.ones(2, 3)), torch.full((3,), 2.0))


# Types.


def wrong(kind: str) -> list[Any]:
    return {"Tensor": [1.0, True, "x", None, [1.0]], "Float": ["0.1", None, [1.0]], "Int": [1.5, "1", None]}.get(
        kind, []
    )


@each_op
def test_arguments_of_the_wrong_type_are_named(backend: str, name: str) -> None:
    call = PUBLIC[name][0]()
    public = inspect.signature(getattr(ops, name)).parameters
    for argument in arguments_of(op(name)._schema):
        if argument.name not in public:  # made of others
            continue
        # None is no cap, also among those of each parameter.
        allowed = {"lr": (float, int, bool, list), "max_relative_step": (type(None),)}.get(argument.name, ())
        if argument.name in ("kernel_size", "stride", "padding", "dilation"):
            allowed = (list,)
        for value in wrong(argument.kind):
            if argument.is_list and isinstance(value, (str, list)):
                continue
            if isinstance(value, allowed) or (value is None and (argument.optional or argument.optional_entries)):
                continue
            spoils = [value]
            if argument.is_list and isinstance(call.get(argument.name), list):
                first, *rest = call[argument.name]
                spoils = [[value, first, *rest][: 1 + len(rest)], *([[first, value, *rest[1:]]] if rest else [])]
            for spoil in spoils:
                before = copy.deepcopy(call)
                with pytest.raises(TypeError, match=rf"^{name}: {argument.name}\b"):
                    getattr(ops, name)(**{**before, argument.name: spoil})
                for x, y in zip(pytree.tree_leaves(before), pytree.tree_leaves(call), strict=True):
                    if isinstance(x, Tensor):
                        assert_same_bits(x, y, "nothing has been written")


@each_op
def test_what_is_no_list_is_named(backend: str, name: str) -> None:
    call = PUBLIC[name][0]()
    for argument, value in call.items():
        if argument != "lr" and isinstance(value, list) and any(isinstance(x, Tensor) for x in value):
            with pytest.raises(TypeError, match=rf"^{name}: {argument} is of type float, expected a list"):
                getattr(ops, name)(**{**copy.deepcopy(call), argument: 1.0})


@pytest.mark.parametrize("real", [np.float32(0.25), np.float64(0.25), np.int64(1), True])
@each_op
def test_any_real_number(backend: str, name: str, real: Any) -> None:
    call = PUBLIC[name][0]()
    floats = [a for a, value in call.items() if isinstance(value, float) and a not in ("beta", "momentum")]
    if "lr" in call:
        floats.append("lr")
    for argument in floats:
        expected = run(name, {**copy.deepcopy(call), argument: float(real)})
        assert_same(run(name, {**copy.deepcopy(call), argument: real}), expected, argument)


@pytest.mark.parametrize("real", [np.float32(0.25), Fraction(1, 4)])
def test_learning_rates_and_weight_decays_of_any_kind(backend: str, real: Any) -> None:
    for name in ("adafisher_step_", "mbf_step_", "sofim_step_"):
        call = PUBLIC[name][0]()
        expected = run(name, {**copy.deepcopy(call), "lr": 0.25})
        assert_same(run(name, {**copy.deepcopy(call), "lr": real}), expected, name)
    call = {**PUBLIC["sofim_step_"][0](), "lr": 0.25}
    count = len(call["params"])
    expected = run("sofim_step_", {**copy.deepcopy(call), "weight_decay": 0.25})
    for argument in ("lr", "weight_decay"):
        for value in (real, [real] * count):
            spelled = {**copy.deepcopy(call), "weight_decay": 0.25, argument: value}
            assert_same(run("sofim_step_", spelled), expected, argument)


def test_whole_numbers_of_numpy(backend: str) -> None:
    x = torch.arange(24.0).view(1, 2, 12)
    expected = ops.patch_sum_of_squares(x, 3, 2, 1, 1)
    two = np.int64(2)
    found = ops.patch_sum_of_squares(x, (np.int32(3),), two, [(np.int8(1), np.int64(1))], np.uint8(1))  # type: ignore[arg-type, list-item]
    assert_same_bits(found, expected)


# Lists.

WRITTEN_LISTS = [
    (name, argument)
    for name in MUTATES
    for argument in sorted(MUTATES[name])
    if isinstance(PUBLIC.get(name, [dict])[0]().get(argument), list)
]


@pytest.mark.parametrize(("name", "argument"), WRITTEN_LISTS)
def test_nothing_is_written_twice(backend: str, name: str, argument: str) -> None:
    call = PUBLIC[name][0]()
    for value in call.values():
        if isinstance(value, list) and len(value) > 1:
            del value[1:]
            value += copy.deepcopy(value)
    if call.get("inverses") is not None:
        call["inverses"] = [x for x in call["inverses"] if x is not None]
    if "sums" in call:
        call["sums"] = call["sums"][:2].clone()
    run(name, copy.deepcopy(call))
    before = copy.deepcopy(call)
    first = call[argument][0]
    twice = negated(first)
    for pair in ([first, first], [first, first.detach()], [twice, twice]):
        spoiled = {**call, argument: pair}
        with pytest.raises(ValueError, match=rf"^{name}: {argument}\[1\] shares memory with {argument}\[0\]"):
            getattr(ops, name)(**spoiled)
    for x, y in zip(pytree.tree_leaves(call), pytree.tree_leaves(before), strict=True):
        if isinstance(x, Tensor):
            assert_same_bits(x, y, "nothing has been written")


# Sizes.

SIZES = [2**31, 2**62, 2**63 - 1]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("argument", ["kernel_size", "stride", "padding", "dilation"])
def test_windows_beyond_64_bits_are_refused(backend: str, argument: str, size: int) -> None:
    call: Call = {"kernel_size": 1, "stride": 1, "padding": 1, "dilation": 1, argument: size}
    with pytest.raises(ValueError, match=rf"^patch_sum_of_squares: {argument} is .*at most 2147483647"):
        ops.patch_sum_of_squares(torch.ones(1, 1, 5), **call)
    with pytest.raises(ValueError, match=rf"^conv_mini_block_gram_: {argument} is .*at most 2147483647"):
        ops.conv_mini_block_gram_(torch.ones(1, 1, 1, 1), torch.ones(1, 1, 5), torch.ones(1, 1, 5), **call)
    with pytest.raises(ValueError, match=rf"^conv_gram_: {argument} is .*at most 2147483647"):
        ops.conv_gram_(torch.ones(1, 1, 1), torch.ones(1, 1, 5), **call)


def test_offsets_and_windows_that_multiply_beyond_64_bits_are_refused(backend: str) -> None:
    x, out = torch.ones(1, 0, 1, 1, 1), torch.ones(0, 0, 0, 0)
    for kernel, padding, argument in ((2**25, 2**26, "kernel_size"), (1, 2**30, "padding")):
        with pytest.raises(ValueError, match=rf"^patch_sum_of_squares: {argument} is"):
            ops.patch_sum_of_squares(x, kernel, padding=padding)
        with pytest.raises(ValueError, match=rf"^conv_mini_block_gram_: {argument} is"):
            ops.conv_mini_block_gram_(out, x, torch.ones(1, 0, 1, 1, 1), kernel, padding=padding)
        with pytest.raises(ValueError, match=rf"^conv_gram_: {argument} is"):
            ops.conv_gram_(torch.ones(1, 0, 0), x, kernel, padding=padding)


def test_large_paddings_are_counted_right(host_backend: str) -> None:
    if host_backend == "reference":
        pytest.skip("it would make the padded tensor")
    found = ops.patch_sum_of_squares(torch.ones(1, 1, 5), 1, 3, 2**31 - 1, 1)
    # Windows begin at multiples of 3 from -(2^31 - 1), which is 1 modulo 3: two of the five places are met.
    places = [p for p in range(5) if (p + 2**31 - 1) % 3 == 0]
    assert found.item() == len(places)
    assert math.isfinite(found.item())


# How the native module tells the kinds of tensors apart.


@pytest.mark.skipif(native_module() is None, reason="there is no native module")
@pytest.mark.parametrize("known", [True, False])
def test_the_native_module_knows_negated_and_inference_tensors(known: bool) -> None:
    """Whether it was told where torch keeps that, or asks for each tensor."""
    native: Any = native_module()
    place = _dispatch_keys.find()
    assert place != _dispatch_keys.NOWHERE, "this torch keeps the keys of a tensor elsewhere: calls are slower"
    try:
        native.set_key_bits(*(place if known else _dispatch_keys.NOWHERE))
        for x in _dispatch_keys.samples():
            assert native.tensor_flags(x) == (x.is_neg(), x.is_inference())
        x = torch.ones(2, 3)
        out = ops.column_sum_of_squares(negated(x))
        assert_same_bits(out, torch.full((3,), 2.0))
    finally:
        native.set_key_bits(*place)


def test_keys_that_are_not_where_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    """One kind of tensor for which the place is wrong, and torch is asked."""
    keys = _dispatch_keys._keys
    monkeypatch.setattr(_dispatch_keys, "_keys", lambda x: keys(x) ^ int(x.is_meta))
    assert _dispatch_keys.find() == _dispatch_keys.NOWHERE
    monkeypatch.setattr(_dispatch_keys, "_keys", lambda x: 1)
    assert _dispatch_keys.find() == _dispatch_keys.NOWHERE
    monkeypatch.delattr(torch._C, "_dispatch_keys")
    monkeypatch.setattr(_dispatch_keys, "_keys", lambda x: torch._C._dispatch_keys(x).raw_repr())
    assert _dispatch_keys.find() == _dispatch_keys.NOWHERE
