"""What all ops share: registration, fakes, compilation, choice of backend; and the tests' own tools."""

from __future__ import annotations

import copy
import functools
import importlib
import math
import os
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils import _pytree as pytree
from torch.utils._mode_utils import no_dispatch
from torch.utils._python_dispatch import TorchDispatchMode

import fisher_kernels
from fisher_kernels import _library, backends, ops, use_backend
from fisher_kernels.curvature import tap
from fisher_kernels.tools.samples import SAMPLES, Inputs, Sample, Source, random
from tests.comparison import assert_same_bits, assert_within, surroundings

Arguments = tuple[tuple[Any, ...], dict[str, Any]]


class Recorded(BaseException):
    """Ends a call at the op, with what the op was called with."""


class Recorder(TorchDispatchMode):
    """Stops at the first op of this library."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "fisher_kernels":
            raise Recorded(func.name().removeprefix("fisher_kernels::"), args, kwargs or {})
        return func(*args, **(kwargs or {}))


def op_arguments(name: str, inputs: Inputs) -> Arguments:
    """What a call of the public function gives to its op."""
    with Recorder(), pytest.raises(Recorded) as caught:
        getattr(ops, name)(**inputs)
    called, args, kwargs = caught.value.args
    assert called == name
    return args, kwargs


def token_arguments() -> Arguments:
    return (random((3, 4), torch.float32), [random((3, 2), torch.float32)], torch.zeros(1), [0, 0, 0, 1]), {}


def tap_arguments() -> Arguments:
    (output, *rest), _ = token_arguments()
    return (output, random((3, 5), torch.float32), *rest), {}


def small_samples() -> dict[str, list[Sample]]:
    """What the ops are called with here, by op: the samples of at most 9,000 numbers."""

    def size(sample: Sample) -> int:
        leaves = pytree.tree_leaves(sample.inputs(Source(sample.dtypes[0])))
        return sum(x.numel() for x in leaves if isinstance(x, Tensor))

    found: dict[str, list[Sample]] = {}
    for sample in SAMPLES:
        if size(sample) <= 9000:
            found.setdefault(sample.op, []).append(sample)
    return found


def finite(sample: Sample, dtype: torch.dtype) -> Inputs:
    """The inputs of a sample, with 1 for what is not finite: opcheck finds that NaN differs from NaN."""
    inputs = sample.inputs(Source(dtype))
    for x in pytree.tree_leaves(inputs):
        if isinstance(x, Tensor):
            x.nan_to_num_(1.0, 1.0, 1.0)
    return inputs


# At least one call of every op there is: a new op has none, and fails the test of the namespace. Samples take their
# dtypes in turn.
PUBLIC: dict[str, list[Callable[[], Inputs]]] = {
    name: [functools.partial(finite, s, s.dtypes[i % len(s.dtypes)]) for i, s in enumerate(samples)]
    for name, samples in small_samples().items()
}
ARGUMENTS: dict[str, list[Callable[[], Arguments]]] = {
    **{
        name: [lambda name=name, inputs=inputs: op_arguments(name, inputs()) for inputs in calls]
        for name, calls in PUBLIC.items()
    },
    "tap": [tap_arguments],
    "commit_": [token_arguments],
}
CALLS = [
    pytest.param(name, call, id=f"{name}-{i}") for name, calls in ARGUMENTS.items() for i, call in enumerate(calls)
]
CHECKED = [
    pytest.param(name, call, id=f"{name}-{i}", marks=[pytest.mark.slow] if i else [])  # opcheck compiles
    for name, calls in ARGUMENTS.items()
    for i, call in enumerate(calls)
]
MUTATES = {
    "block_inverse_": {"out"},
    "rank_one_inverse_update_": {"inverse"},
    "low_rank_inverse_update_": {"inverse"},
    "minmax_": {"out"},
    "factor_ema_": {"state"},
    "adafisher_step_": {"params", "exp_avgs", "steps"},
    "mbf_step_": {"params", "momentum_buffers"},
    "sofim_step_": {"params", "exp_avgs", "steps"},
    "heavy_ball_": {"momentum_buffers"},
    "capped_step_": {"params"},
    "weighted_gram_": {"out"},
    "conv_gram_": {"out"},
    "mini_block_gram_": {"out"},
    "conv_mini_block_gram_": {"out"},
    "commit_": {"token"},
}


def op(name: str) -> Any:
    return getattr(torch.ops.fisher_kernels, name).default


# Registration.


def test_every_op_has_a_sample() -> None:
    prefix = "fisher_kernels::"
    names = {name.removeprefix(prefix) for name in torch._C._dispatch_get_all_op_names() if name.startswith(prefix)}
    assert names == set(ARGUMENTS)
    assert tap.__name__ == "fisher_kernels.curvature.tap"  # imported for its ops


@pytest.mark.parametrize("name", ARGUMENTS)
def test_schema(name: str) -> None:
    """Changes what it says it changes and nothing else; an op in place has a name that ends in an underscore."""
    schema = op(name)._schema
    written = {a.name for a in schema.arguments if a.alias_info is not None and a.alias_info.is_write}
    assert written == MUTATES.get(name, set())
    assert name.endswith("_") == bool(written)
    assert all(result.alias_info is None for result in schema.returns)
    assert torch.Tag.pt2_compliant_tag in op(name).tags


@pytest.mark.parametrize(("name", "sample"), CHECKED)
def test_opcheck(backend: str, name: str, sample: Callable[[], Arguments]) -> None:
    args, kwargs = sample()
    assert not any(x.requires_grad for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor))
    torch.library.opcheck(op(name), args, kwargs)


@pytest.mark.parametrize(("name", "sample"), CALLS)
def test_fakes_foretell_shapes_dtypes_and_strides(backend: str, name: str, sample: Callable[[], Arguments]) -> None:
    args, kwargs = sample()
    mode = FakeTensorMode()
    fake_args, fake_kwargs = pytree.tree_map_only(Tensor, mode.from_tensor, (args, kwargs))
    with mode:
        foretold = pytree.tree_leaves(op(name)(*fake_args, **fake_kwargs))
    found = pytree.tree_leaves(op(name)(*args, **kwargs))
    assert len(foretold) == len(found)
    for f, x in zip(foretold, found, strict=True):
        if isinstance(x, Tensor):
            assert (f.shape, f.dtype, f.stride(), f.device) == (x.shape, x.dtype, x.stride(), x.device)


READ = {
    "capped_step_": "directions",
    "direction_sums": "directions",
    "batch_norm_gradients": "grad_output",
    "block_apply": "vectors",
    "block_solve": "rhs",
    "block_inverse": "blocks",
}
"""What is doubled before a compiled call, of ops that have none of ``new``, ``grads``, ``v``, ``u`` and ``x``."""


def public(name: str) -> Callable[..., Any]:
    """A function with a computation before the op and one after it."""

    def around(**inputs: Any) -> list[Tensor]:
        read = next(a for a in (READ.get(name), "new", "grads", "v", "u", "x") if a in inputs)
        doubled = [2 * x for x in inputs[read]] if isinstance(inputs[read], list) else 2 * inputs[read]
        results = getattr(ops, name)(**{**inputs, read: doubled})
        written = [inputs[argument] for argument in sorted(MUTATES.get(name, ()))]
        return [x + 1 for x in pytree.tree_leaves((results, written)) if isinstance(x, Tensor)]

    return around


COMPILED = (
    "batch_norm_gradients",
    "block_apply",
    "column_sum_of_squares",
    "channel_sum_of_squares",
    "minmax",
    "minmax_",
    "factor_ema_",
    "adafisher_step_",
    "mbf_step_",
    "mini_block_gram_",
    "rank_one_solve",
    "rank_one_inverse_update_",
    "low_rank_inverse_update_",
    "sofim_step_",
    "heavy_ball_",
    "direction_sums",
    "capped_step_",
    "stochastic_round",
    "weighted_gram_",
)


@pytest.mark.slow_on_host
@pytest.mark.parametrize("name", COMPILED)
def test_compiles_without_graph_breaks(backend: str, name: str) -> None:
    """Mutation included; a second call with other sizes compiles no more than one graph for all sizes."""
    torch._dynamo.reset()
    compiled = torch.compile(public(name), fullgraph=True, backend="aot_eager")
    for call in PUBLIC[name][:2]:
        inputs = call()
        expected_inputs = copy.deepcopy(inputs)
        expected = public(name)(**expected_inputs)
        actual = compiled(**inputs)
        for got, want in zip(
            pytree.tree_leaves((actual, inputs)),
            pytree.tree_leaves((expected, expected_inputs)),
            strict=True,
        ):
            if isinstance(want, Tensor):
                assert_same_bits(got, want, name)


@pytest.mark.parametrize("dynamic", [False, True])
def test_patches_compile_without_graph_breaks(backend: str, dynamic: bool) -> None:
    def patches(x: Tensor) -> Tensor:
        return ops.patch_sum_of_squares(2 * x, 3, stride=2, padding=(1, (0, 2)), dilation=1) + 1  # type: ignore[arg-type]

    torch._dynamo.reset()
    compiled = torch.compile(patches, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for shape in ((2, 3, 6, 7), (3, 2, 5, 9)):
        x = random(shape, torch.float32)
        assert_same_bits(compiled(x), patches(x))


@pytest.mark.parametrize("dynamic", [False, True])
def test_gradients_of_convolutions_compile_without_graph_breaks(backend: str, dynamic: bool) -> None:
    def average(out: Tensor, x: Tensor, grad: Tensor) -> Tensor:
        ops.conv_mini_block_gram_(out, 2 * x, grad, (3, 2), 2, [(1, 0), (2, 2)], 1, 2, decay=0.9, gain=0.1)
        return out + 1

    torch._dynamo.reset()
    compiled = torch.compile(average, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for samples, size in ((2, 6), (3, 5)):
        x, grad = random((samples, 4, size, 7), torch.float32), random((samples, 6, 2, 4), torch.float32, 1)
        outs = [torch.ones(6, 2, 6, 6) for _ in range(2)]
        assert_same_bits(compiled(outs[0], x, grad), average(outs[1], x, grad))
        assert_same_bits(outs[0], outs[1])


@pytest.mark.parametrize("dynamic", [False, True])
def test_factors_of_convolutions_compile_without_graph_breaks(backend: str, dynamic: bool) -> None:
    def average(out: Tensor, x: Tensor) -> Tensor:
        ops.conv_gram_(out, 2 * x, (3, 2), 2, [(1, 0), (2, 2)], 1, 2, True, decay=0.9, gain=0.1)
        return out + 1

    torch._dynamo.reset()
    compiled = torch.compile(average, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for samples, size in ((2, 6), (3, 5)):
        x = random((samples, 4, size, 7), torch.float32)
        outs = [torch.ones(2, 13, 13) for _ in range(2)]
        assert_same_bits(compiled(outs[0], x), average(outs[1], x))
        assert_same_bits(outs[0], outs[1])


def test_lr_as_a_tensor_compiles_once(backend: str) -> None:
    torch._dynamo.reset()
    graphs = 0

    def count(module: torch.fx.GraphModule, inputs: Any) -> Any:
        nonlocal graphs
        graphs += 1
        return module

    compiled = torch.compile(public("adafisher_step_"), fullgraph=True, backend=count)
    inputs = PUBLIC["adafisher_step_"][0]()
    for rate in (0.1, 0.01, 0.001):
        compiled(**{**inputs, "lr": torch.tensor(rate)})
    assert graphs == 1


def test_arguments_that_require_a_gradient_are_stepped_under_no_grad(backend: str) -> None:
    """As optimizers call it: leaves that require a gradient change in place, and autograd sees nothing of it."""
    inputs = PUBLIC["adafisher_step_"][0]()
    stepped = copy.deepcopy(inputs)
    ops.adafisher_step_(**stepped)
    for param in inputs["params"]:
        param.requires_grad_()
    with torch.no_grad():
        ops.adafisher_step_(**inputs)
    for param, expected in zip(inputs["params"], stepped["params"], strict=True):
        assert param.is_leaf
        assert_same_bits(param, expected)


@pytest.mark.parametrize(
    "name",
    [
        "minmax_",
        "factor_ema_",
        "adafisher_step_",
        "block_inverse_",
        "mbf_step_",
        "mini_block_gram_",
        "conv_gram_",
        "conv_mini_block_gram_",
        "rank_one_inverse_update_",
        "low_rank_inverse_update_",
        "sofim_step_",
        "capped_step_",
        "weighted_gram_",
    ],
)
def test_autograd_knows_what_was_changed(backend: str, name: str) -> None:
    """A backward pass that needs the old parameters must fail rather than take the new ones."""
    args, kwargs = ARGUMENTS[name][0]()
    leaf = torch.ones((), requires_grad=True)
    products = [(leaf * x).sum() for x in args[0]]  # each keeps its x for the backward pass
    op(name)(*args, **kwargs)
    for product in products:
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            product.backward()


# The way around the dispatcher.


class Seen(TorchDispatchMode):
    """The ops that the dispatcher is asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


class Subclass(Tensor):
    """A tensor that tells which ops it was given to."""

    seen: ClassVar[list[str]] = []

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        cls.seen.append(func.name())
        with no_dispatch():
            return func(*args, **(kwargs or {}))


@pytest.fixture
def dispatched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the ops that are called through the dispatcher from here on."""
    names: list[str] = []
    call = torch._ops.OpOverload.__call__

    def counted(self: Any, /, *args: Any, **kwargs: Any) -> Any:
        names.append(self.name())
        return call(self, *args, **kwargs)

    monkeypatch.setattr(torch._ops.OpOverload, "__call__", counted)
    return names


def test_plain_calls_go_around_the_dispatcher(backend: str, dispatched: list[str]) -> None:
    x, leaf = torch.arange(4.0).view(2, 2), torch.nn.Parameter(torch.ones(2, 2))
    ops.column_sum_of_squares(x)
    ops.minmax([x[0], x[1]], 1e-6, [x[0, :1], x[1, :1]])
    inputs = PUBLIC["adafisher_step_"][0]()
    ops.adafisher_step_(**{**inputs, "grad_scale": torch.tensor(2.0)})
    with torch.inference_mode():
        ops.column_sum_of_squares(x)
    with torch.no_grad():
        ops.column_sum_of_squares(leaf)
        ops.minmax([leaf[0], leaf[1]])
    assert dispatched == []


def test_calls_that_the_dispatcher_has_work_for_go_through_it(backend: str, dispatched: list[str]) -> None:
    name = "fisher_kernels::column_sum_of_squares"
    x, leaf = torch.arange(4.0).view(2, 2), torch.nn.Parameter(torch.ones(2, 2))

    def through(op: str, call: Callable[[], Any]) -> bool:
        dispatched.clear()
        call()
        return f"fisher_kernels::{op}" in dispatched

    assert through("column_sum_of_squares", lambda: ops.column_sum_of_squares(leaf))
    assert through("minmax", lambda: ops.minmax([x[0], leaf[0]]))
    assert through("minmax", lambda: ops.minmax([x[0]], 1e-6, [leaf[0, :1]]))
    inputs = PUBLIC["adafisher_step_"][0]()
    rate = torch.tensor(0.01, requires_grad=True)
    with pytest.raises(RuntimeError, match="adafisher_step_ has no derivative, and lr requires grad"):
        ops.adafisher_step_(**{**inputs, "lr": rate})
    assert through("column_sum_of_squares", lambda: ops.column_sum_of_squares(x.as_subclass(Subclass)))
    assert name in Subclass.seen
    with Seen() as seen:
        ops.column_sum_of_squares(x)
    assert name in seen.names
    with torch.profiler.profile(acc_events=True) as profile:
        ops.column_sum_of_squares(x)
    assert name in {event.name for event in profile.events()}
    with FakeTensorMode() as mode:
        assert isinstance(ops.column_sum_of_squares(mode.from_tensor(x)), FakeTensor)
    assert through("column_sum_of_squares", lambda: torch.func.functionalize(ops.column_sum_of_squares)(x))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        traced = torch.jit.trace(ops.column_sum_of_squares, x)
    assert_same_bits(traced(2 * x), ops.column_sum_of_squares(2 * x))


@pytest.mark.skipif(_library.native_module() is None, reason="there is no native module")
def test_empty_lists_take_no_gpu() -> None:
    """No tensor says which: the CPU's kernels make the results, which are empty and on the CPU."""
    on_a_gpu = _library.Native(_library.native_module(), _library._current_stream)
    common: dict[str, Any] = {"lr": torch.ones(()), "weight_decay": 0.1, "decoupled": True, "maximize": False}
    each = {**common, "lr": [common["lr"]], "weight_decay": [0.1]}
    found = (
        ops.adafisher_step._native(
            on_a_gpu, ops.adafisher_step._Step([], [], [], [], [], [], beta=0.9, damping=0.1, **common)
        ),
        *ops.mbf_step._native(on_a_gpu, ops.mbf_step._Step([], [], [], [], momentum=0.9, kl_clip=0.1, **each)),
        *ops.sofim_step._native(
            on_a_gpu,
            ops.sofim_step._Step(
                [], [], [], [], beta=0.9, rho=1.0, direction="momentum", scope="global",
                **each,
            ),
        ),
        ops.factor_ema._ema_native(on_a_gpu, ops.factor_ema._Average([], [], 0.9, 0.1)),
        ops.capped_step._momentum_native(on_a_gpu, ops.capped_step._Momentum([], [], [], 0.9, 0.1, False)),
        ops.capped_step._sums_native(on_a_gpu, ops.capped_step._Sums([], [], [])),
        *ops.capped_step._step_native(
            on_a_gpu,
            ops.capped_step._Step(
                [], [], torch.zeros(0, 3, dtype=torch.float64), [], [common["lr"]], [0.1], 0.1, [0.1], [1e-3]
            ),
        ),
    )  # fmt: skip
    assert all(x.is_cpu for x in found)
    assert [x.tolist() for x in found] == [[], [], 1.0, [], [], [], [], [], [], 1.0, [], []]


# The choice of backend.

ALL = ("reference", "cpu", "cuda", "triton")


@pytest.fixture
def every_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if every backend were there; nothing runs on them here."""
    monkeypatch.setattr(backends, "_REASONS", dict.fromkeys(ALL))


@pytest.fixture
def no_native(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(backends._REASONS, "cpu", "no compiler was found")


def test_available_backends_have_no_reason_against_them() -> None:
    assert tuple(backends.reasons()) == ALL
    assert backends.available() == [name for name, reason in backends.reasons().items() if reason is None]
    assert backends.available()[0] == "reference"
    assert all(reason is None or len(reason) > 20 for reason in backends.reasons().values())
    backends.reasons()["reference"] = "a copy"
    assert backends.reasons()["reference"] is None


@pytest.mark.usefixtures("every_backend")
def test_auto_chooses_by_device() -> None:
    with use_backend("auto"):
        assert backends.choose("op", "cpu", ("reference", "cpu")) == "cpu"
        assert backends.choose("op", "cpu", ("reference",)) == "reference"
        assert backends.choose("op", "cuda", ("reference", "cpu")) == "reference"
        assert backends.choose("op", "mps", ("reference", "cpu")) == "reference"


def test_what_auto_takes_on_a_gpu_is_measured_or_says_so() -> None:
    auto = backends._AUTO
    assert (backends.measured_on() is None) == (auto["device"] is None) == (not auto["ops"])
    for name, classes in auto["ops"].items():
        assert name in ARGUMENTS
        assert [most for most, _ in classes[:-1]] == sorted(most for most, _ in classes[:-1])
        assert classes[-1][0] is None
        assert {backend for _, backend in classes} <= {"cuda", "triton"}


@pytest.mark.usefixtures("every_backend")
def test_auto_takes_the_faster_of_cuda_and_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "_DEVICES", {"cpu": "cpu", "cuda": "cuda", "triton": "cuda"})
    monkeypatch.setattr(backends, "_AUTO", {"ops": {"op": [[9, "cuda"], [64, "triton"], [None, "cuda"]]}})

    def chosen(argument: Any, op: str = "op") -> str:
        return backends.choose(op, "cuda", ALL, argument)

    with use_backend("auto"):
        for n, backend in ((1, "cuda"), (9, "cuda"), (10, "triton"), (64, "triton"), (65, "cuda")):
            assert chosen(torch.empty(1000, n, n)) == backend
        assert [chosen([torch.empty(4), torch.empty(n, 1)]) for n in (5, 6, 61)] == ["cuda", "triton", "cuda"]
        assert chosen(torch.empty(10), "another") == "cuda"
        monkeypatch.setitem(backends._REASONS, "triton", "it was left out")
        assert chosen(torch.empty(10)) == "cuda"
        monkeypatch.setitem(backends._REASONS, "cuda", "it was left out")
        assert chosen(torch.empty(10)) == "reference"


@pytest.mark.usefixtures("every_backend")
def test_auto_takes_triton_on_a_gpu_and_never_its_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    all_of_them = ("reference", "cpu", "triton")
    with use_backend("auto"):
        monkeypatch.setitem(backends._DEVICES, "triton", "cuda")
        assert backends.choose("op", "cuda", all_of_them) == "triton"
        assert backends.choose("op", "cpu", all_of_them) == "cpu"
        monkeypatch.setitem(backends._DEVICES, "triton", "cpu")
        assert backends.choose("op", "cuda", all_of_them) == "reference"
        assert backends.choose("op", "cpu", all_of_them) == "cpu"
        monkeypatch.setitem(backends._DEVICES, "triton", "cuda")
        monkeypatch.setitem(backends._REASONS, "triton", "it was left out")
        assert backends.choose("op", "cuda", all_of_them) == "reference"


@pytest.mark.usefixtures("no_native")
def test_auto_falls_back_to_the_reference() -> None:
    with use_backend("auto"):
        assert backends.choose("op", "cpu", ("reference", "cpu")) == "reference"
        assert ops.column_sum_of_squares(torch.tensor([3.0])).item() == 9.0


@pytest.mark.usefixtures("every_backend")
def test_a_backend_is_used_inside_the_block_only() -> None:
    both = ("reference", "cpu")
    with use_backend("reference"):
        assert backends.choose("op", "cpu", both) == "reference"
        with use_backend("cpu"):
            assert backends.choose("op", "cpu", both) == "cpu"
            # Backward hooks run in threads of autograd's own.
            seen: list[str] = []
            thread = threading.Thread(target=lambda: seen.append(backends.choose("op", "cpu", both)))
            thread.start()
            thread.join()
            assert seen == ["cpu"]
        assert backends.choose("op", "cpu", both) == "reference"
        with pytest.raises(ZeroDivisionError), use_backend("cpu"):
            raise ZeroDivisionError
        assert backends.choose("op", "cpu", both) == "reference"


def test_an_unknown_backend_is_refused_with_the_alternatives() -> None:
    alternatives = "'auto', 'reference', 'cpu', 'cuda', 'triton'"
    for name in ("fast", "", "CPU"):
        with (
            pytest.raises(ValueError, match=rf"^backend is '{name}', expected one of {alternatives}$"),
            use_backend(name),
        ):
            pytest.fail("the block was entered")


@pytest.mark.usefixtures("no_native")
def test_a_missing_backend_is_refused_with_the_reason() -> None:
    for name, reason in backends.reasons().items():
        if reason is not None:
            with pytest.raises(RuntimeError) as caught, use_backend(name):
                pytest.fail("the block was entered")
            assert str(caught.value) == f"backend {name!r} is not available: {reason}"
    assert backends.choose("op", "cpu", ("reference", "cpu")) == "reference"


@pytest.mark.usefixtures("every_backend")
def test_a_backend_that_does_not_suit_the_call_is_refused() -> None:
    with use_backend("triton"), pytest.raises(RuntimeError, match=r"^op: backend 'triton' does not implement this op$"):
        backends.choose("op", "cuda", ("reference", "cpu"))
    with (
        use_backend("cpu"),
        pytest.raises(RuntimeError, match=r"^op: backend 'cpu' runs on cpu tensors, not on cuda"),
    ):
        backends.choose("op", "cuda", ("reference", "cpu"))
    with use_backend("reference"):
        assert backends.choose("op", "cuda", ("reference", "cpu")) == "reference"


@pytest.mark.parametrize("name", COMPILED)
def test_the_backend_in_use_is_the_one_that_runs(backend: str, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """The native module is entered on "cpu" and only there."""
    native = _library.native_module()
    if native is None:
        pytest.skip("there is nothing but the reference")
    entered: list[str] = []
    original = getattr(native, name)

    def spy(*args: Any) -> None:
        entered.append(name)
        original(*args)

    monkeypatch.setattr(native, name, spy)
    args, kwargs = ARGUMENTS[name][0]()
    op(name)(*args, **kwargs)
    assert entered == ([name] if backend == "cpu" else [])


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    root = os.path.dirname(os.path.dirname(fisher_kernels.__file__))
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": root, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


USE = """
import torch
from fisher_kernels import backends, ops
try:
    ops.column_sum_of_squares(torch.ones(2))
    print(backends.choose("op", "cpu", ("reference", "cpu")))
except Exception as error:
    print(type(error).__name__, error)
with backends.use_backend("reference"):
    print(ops.column_sum_of_squares(torch.tensor([3.0])).item())
"""


@pytest.mark.parametrize(
    ("value", "line"),
    [
        ("reference", "reference"),
        pytest.param(
            "fast",
            "ValueError backend is 'fast', expected one of 'auto', 'reference', 'cpu', 'cuda', 'triton'",
            marks=pytest.mark.slow,
        ),
        ("cuda", "RuntimeError backend 'cuda' is not available: "),
    ],
)
def test_the_environment_sets_the_default(value: str, line: str) -> None:
    """A name that cannot be used is refused at the first call; another choice still works."""
    result = run_python(USE, FISHER_KERNELS_BACKEND=value, FISHER_KERNELS_CUDA_ON_HOST="0", CUDA_VISIBLE_DEVICES="")
    assert result.returncode == 0, result.stderr
    first, nine = result.stdout.splitlines()
    assert first.startswith(line)
    assert nine == "9.0"


def test_without_the_native_module_the_reference_runs() -> None:
    code = "import sys; sys.modules['fisher_kernels._native'] = None\n" + USE + "print(backends.reasons()['cpu'])"
    result = run_python(code, FISHER_KERNELS_BACKEND="auto")
    assert result.returncode == 0, result.stderr
    chosen, nine, reason = result.stdout.splitlines()
    assert (chosen, nine) == ("reference", "9.0")
    assert len(reason) > 20


def test_why_there_is_no_native_module(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(name: str) -> Any:
        raise ImportError("libgomp.so.1: cannot open shared object file")

    with monkeypatch.context() as patch:
        patch.setattr(importlib, "import_module", fail)
        module, reason = _library._load()
    assert module is None
    assert reason is not None
    assert "libgomp.so.1: cannot open shared object file" in reason
    with monkeypatch.context() as patch:
        patch.delattr(torch.Tensor, "__dlpack_c_exchange_api__")
        module, reason = _library._load()
    assert module is None
    assert reason is not None
    assert "torch >= 2.11" in reason


def test_capabilities_of_the_native_module() -> None:
    native = _library.native_module()
    if native is None:
        pytest.skip("there is no native module")
    names = native.capabilities()
    assert names[0] == "baseline"
    assert native.capability() == names[-1]
    for wrong in ("sse9", "", "AVX2"):
        with pytest.raises(ValueError, match=f"set_capability: name is '{wrong}', expected .*baseline"):
            native.set_capability(wrong)
    assert native.capability() == names[-1]
    assert isinstance(native.openmp(), bool)


# The tools of the tests have teeth.


def test_comparison_rejects_what_is_off() -> None:
    expected = torch.tensor([1.0, -2.0, 0.0, math.inf, math.nan], dtype=torch.float64)
    good = expected.float()
    assert_within(good, expected, 0.0)
    for i, wrong in (
        (0, 1.0001),
        (1, 2.0),
        (2, 1e-6),
        (2, math.nan),
        (3, -math.inf),
        (3, 3e38),
        (4, 0.0),
        (0, math.inf),
    ):
        bad = good.clone()
        bad[i] = wrong
        with pytest.raises(AssertionError):
            assert_within(bad, expected, 1e-7)
    assert_within(good + 1e-4, expected, torch.tensor([1.1e-4] * 5))
    with pytest.raises(AssertionError, match="1 of 3 entries are off"):
        assert_within(good + 1e-4, expected, torch.tensor([1.1e-4, 0.9e-4, 1.1e-4, 0.0, 0.0]))
    with pytest.raises(AssertionError, match="a bound that nothing can exceed"):
        assert_within(good, expected, math.inf)
    with pytest.raises(AssertionError, match="shape"):
        assert_within(good[:4], expected, 1.0)
    with pytest.raises(AssertionError, match="dtype"):
        assert_within(good, good, 1.0)


def test_bits_tell_apart_what_compares_equal() -> None:
    assert_same_bits(torch.tensor([math.nan]), torch.tensor([math.nan]))
    for a, b in (
        (torch.tensor([0.0]), torch.tensor([-0.0])),
        (torch.tensor([1.0]), torch.tensor([1.0], dtype=torch.float64)),
        (torch.ones(1), torch.ones(2)),
        (torch.ones(1), torch.ones(1, 1)),
    ):
        with pytest.raises(AssertionError):
            assert_same_bits(a, b)


def test_surroundings_are_what_lies_around() -> None:
    storage = torch.arange(12.0)
    view = storage[1:11].view(5, 2)[::2, 1]  # elements 2, 6 and 10
    before = surroundings(view)
    assert before.numel() == 9
    view.fill_(100.0)
    assert_same_bits(surroundings(view), before)
    storage[3] = 0.0
    with pytest.raises(AssertionError):
        assert_same_bits(surroundings(view), before)


@pytest.mark.usefixtures("poisoned_memory")
def test_memory_is_poisoned() -> None:
    """An implementation that leaves an entry of its output unwritten hands back NaN."""
    x = torch.ones(3)
    for fresh in (torch.empty(3), torch.empty_like(x), x.new_empty((3,)), x.new_empty((3,), dtype=torch.float64)):
        assert fresh.isnan().all()
    assert (torch.empty(3, dtype=torch.int64) == torch.iinfo(torch.int64).max).all()
    if sys.platform == "linux" and os.confstr("CS_GNU_LIBC_VERSION"):
        assert (np.empty(5000, dtype=np.float32) > 1e38).all()
