"""What every optimizer of this library promises, most of it as torch's own do: each test runs on all of them."""

from __future__ import annotations

import copy
import gc
import io
import math
import pickle
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import functional as F
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, OneCycleLR, ReduceLROnPlateau, StepLR
from torch.optim.swa_utils import SWALR, AveragedModel, get_ema_multi_avg_fn, update_bn

from fisher_kernels import EKFAC, KFAC, MBF, SOFIM, AdaFisher, AdaFisherW, EKFACAdam
from fisher_kernels.optim.base import FisherOptimizer
from fisher_kernels.optim.kronecker import KroneckerOptimizer
from fisher_kernels.optim.layerwise import LayerwiseOptimizer
from tests.comparison import assert_same_bits
from tests.small_network import (
    Tied,
    assert_same_parameters,
    assert_same_state,
    backward,
    loss_of,
    network,
    only_tensors_and_numbers,
    parameters_of,
    saved_and_loaded,
    train,
)


@dataclass(frozen=True)
class Make:
    """Makes one kind of optimizer for a model.

    Attributes:
        settings: hyperparameters that it always has.
        count: entry of a weight's state that counts its steps, or its batches.
        unserved: what ``explain`` calls a parameter that is in no layer.
        others: hyperparameters that give the same state another meaning.
        apart: hyperparameters with which groups, but for their own settings, do not matter.
        bad: hyperparameters out of range, beside those of :data:`BAD`.
    """

    optimizer: type[FisherOptimizer]
    settings: dict[str, Any] = field(default_factory=dict)
    count: str = "step"
    unserved: str = "fallback"
    others: dict[str, Any] = field(default_factory=dict)
    apart: dict[str, Any] = field(default_factory=dict)
    bad: tuple[tuple[str, Any], ...] = ()

    def __call__(self, model: nn.Module, *, params: Any = None, **settings: Any) -> Any:
        settings = {**self.settings, **settings}
        if issubclass(self.optimizer, LayerwiseOptimizer):
            return self.optimizer(model, params=params, **settings)
        return self.optimizer(model.parameters() if params is None else params, **settings)

    def every(self, interval: int) -> dict[str, Any]:
        """The setting that takes statistics every so many steps, for optimizers that take any."""
        constant = {"refresh": "constant"} if issubclass(self.optimizer, (MBF, KroneckerOptimizer)) else {}
        return {"update_interval": interval, **constant} if issubclass(self.optimizer, LayerwiseOptimizer) else {}


BAD: tuple[tuple[str, Any], ...] = (
    ("lr", -1.0),
    ("lr", math.nan),
    ("lr", math.inf),
    ("lr", torch.tensor([0.1, 0.2])),
    ("lr", torch.tensor(-0.1)),
    ("weight_decay", -0.1),
    ("weight_decay", math.nan),
    ("moment_dtype", torch.float16),
    ("moment_dtype", torch.float64),
    ("moment_dtype", torch.float32),
    ("moment_dtype", "bfloat16"),
)
ADAFISHER = Make(
    AdaFisher,
    others={"variant": "release", "update_interval": 2, "lr": 0.01, "weight_decay": 0.1},
    bad=(
        ("beta", 1.0),
        ("beta", -0.1),
        ("beta", math.nan),
        ("gamma", 1.0),
        ("gamma", -0.1),
        ("damping", -1e-3),
        ("damping", math.inf),
        ("eps", -1e-6),
        ("variant", "papers"),
        ("update_interval", 0),
        ("update_interval", 1.5),
        ("fallback_curvature", 0.0),
        ("fallback_curvature", -1.0),
        ("fallback_curvature", math.inf),
    ),
)
FREE = {"kl_clip": None, "max_relative_step": None}
"""No bound shortens a step."""
CIRCLING = {"lr": 0.1, "damping": 0.3, "momentum": 0.9, **FREE}
"""Momentum enough to circle a minimum."""
MINI_BLOCKS = Make(
    MBF,
    count="fisher_updates",
    others={"linear_blocks": "per_output", "inverse_storage": "packed", "lr": 2e-3},
    apart=FREE,  # which are about all parameters, and those of a layer
    bad=(
        ("momentum", 1.0),
        ("momentum", -0.1),
        ("damping", -1e-3),
        ("damping", math.inf),
        ("kl_clip", 0.0),
        ("kl_clip", -1.0),
        ("kl_clip", math.inf),
        ("kl_along", "moment"),
        ("max_relative_step", 0.0),
        ("max_relative_step", math.inf),
        ("floor", -1e-3),
        ("floor", math.nan),
        ("refresh", "sometimes"),
        ("ramp", -1.0),
        ("ramp", math.inf),
        ("beta2", 1.0),
        ("beta2", math.nan),
        ("update_interval", 0),
        ("update_interval", 1.5),
        ("inverse_interval", 0),
        ("linear_blocks", "whole"),
        ("linear_blocks", 0),
        ("linear_blocks", 2.0),
        ("linear_blocks", True),
        ("sequence", "flatten"),
        ("loss_reduction", "none"),
        ("inverse_storage", "half"),
    ),
)
KRONECKER = Make(
    KFAC,
    count="fisher_updates",
    others={"sequence": "reduce", "max_factor_size": 5, "others": "curvature", "lr": 2e-3},
    bad=(
        ("momentum", 1.0),
        ("momentum", -0.1),
        ("damping", -1e-3),
        ("damping", math.inf),
        ("kl_clip", 0.0),
        ("kl_clip", math.inf),
        ("max_relative_step", 0.0),
        ("max_relative_step", math.nan),
        ("floor", -1e-3),
        ("floor", math.inf),
        ("beta2", 1.0),
        ("beta2", math.nan),
        ("update_interval", 0),
        ("update_interval", 1.5),
        ("inverse_interval", 0),
        ("max_factor_size", 0),
        ("ramp", -1.0),
        ("refresh", "never"),
        ("fisher", "true"),
        ("sequence", "flatten"),
        ("loss_reduction", "none"),
        ("others", "sgd"),
        ("others_lr", -0.1),
        ("others_lr", math.nan),
        ("others_lr", math.inf),
        ("directions", "sparse"),
    ),
)
ADAM_BASIS = replace(
    KRONECKER,
    optimizer=EKFACAdam,
    others={"sequence": "reduce", "max_factor_size": 5, "lr": 2e-3},
    bad=(
        ("beta1", 1.0),
        ("beta1", -0.1),
        *(x for x in KRONECKER.bad if x[0] not in ("momentum", "kl_clip", "others", "others_lr", "directions")),
    ),
)
RANK_ONE = Make(
    SOFIM,
    unserved="rank one",
    others={"direction": "gradient", "rho": 2.0, "beta": 0.5, "weight_decay": 0.1},
    bad=(
        ("rho", 0.0),
        ("rho", -1.0),
        ("rho", math.inf),
        ("rho", math.nan),
        ("beta", 1.0),
        ("beta", -0.1),
        ("beta", math.nan),
        ("direction", "moment"),
        ("scope", "layer"),
    ),
)

OPTIMIZERS = {
    "AdaFisher": ADAFISHER,
    "AdaFisherW": replace(ADAFISHER, optimizer=AdaFisherW),
    "MBF": MINI_BLOCKS,
    "KFAC": KRONECKER,
    "EKFAC": replace(KRONECKER, optimizer=EKFAC),
    "EKFACAdam": ADAM_BASIS,
    "SOFIM": RANK_ONE,
    "SOFIM-tensor": replace(RANK_ONE, settings={"scope": "tensor"}),
}

RARE = ("EKFAC", "EKFAC-overlap", "AdaFisherW-paper", "AdaFisherW-relative")
"""Those of which others have every part."""


def _configurations() -> Iterator[tuple[str, Make]]:
    for variant in ("paper", "release", "relative"):
        settings = {"variant": variant, "update_interval": 3, "weight_decay": 0.01}
        for optimizer in (AdaFisher, AdaFisherW):
            yield f"{optimizer.__name__}-{variant}", replace(ADAFISHER, optimizer=optimizer, settings=settings)
    yield "AdaFisher-delayed", replace(ADAFISHER, settings={"update_interval": 3, "delayed": True})
    intervals = {"update_interval": 3, "inverse_interval": 2, "refresh": "constant"}
    l2 = {"weight_decay": 0.01, "decoupled": False}
    yield "MBF", MINI_BLOCKS
    yield "MBF-intervals", replace(MINI_BLOCKS, settings={**intervals, "weight_decay": 0.01})
    packed = {"inverse_storage": "packed", "linear_blocks": "per_output", "inverse_interval": 4}
    yield "MBF-packed", replace(MINI_BLOCKS, settings=packed)
    halves = {"inverse_storage": "bfloat16", "linear_blocks": 5, "sequence": "reduce", **l2}
    beside = {"update_interval": 2, "inverse_interval": 3, "refresh": "constant", "overlap": True}
    yield "MBF-overlap", replace(MINI_BLOCKS, settings=beside)
    yield "KFAC-overlap-delayed", replace(KRONECKER, settings={**beside, "delayed": True})
    yield "EKFAC-overlap", replace(KRONECKER, optimizer=EKFAC, settings=beside)
    yield "EKFACAdam-overlap", replace(ADAM_BASIS, settings=beside)
    yield "MBF-bfloat16", replace(MINI_BLOCKS, settings=halves)
    yield "KFAC", KRONECKER
    blocks = {"others": "curvature", "weight_decay": 0.01}
    yield "KFAC-intervals", replace(KRONECKER, settings={**intervals, **blocks})
    yield "KFAC-diagonal", replace(KRONECKER, settings={"max_factor_size": 6, "sequence": "reduce", **l2})
    yield "EKFAC", replace(KRONECKER, optimizer=EKFAC, settings={**intervals, "weight_decay": 0.01})
    yield "EKFACAdam", replace(ADAM_BASIS, settings={**intervals, **l2})
    yield "SOFIM", replace(RANK_ONE, settings={"weight_decay": 0.01})
    yield "SOFIM-tensor", replace(RANK_ONE, settings={"scope": "tensor", **l2})
    yield "SOFIM-gradient", replace(RANK_ONE, settings={"direction": "gradient", "rho": 1.0})


def _cases(makes: dict[str, Make]) -> list[Any]:
    """The fast tier leaves out the rare: EKFAC has the bases of EKFACAdam and the step of K-FAC, for one."""
    return [pytest.param(make, id=name, marks=pytest.mark.slow if name in RARE else ()) for name, make in makes.items()]


CONFIGURATIONS = dict(_configurations())
every_configuration = pytest.mark.parametrize("make", _cases(CONFIGURATIONS))
"""In place of the fixture, for tests of what settings bear on: an interval of 3 has a middle to be saved in."""

pytestmark = [
    pytest.mark.usefixtures("host_backend", "one_thread"),
    pytest.mark.filterwarnings("ignore:.* of the trained parameters have no layer rule"),
]


@pytest.fixture(params=_cases(OPTIMIZERS))
def make(request: pytest.FixtureRequest) -> Make:
    """Every optimizer."""
    return request.param


def assert_unchanged(model: nn.Module, before: dict[str, Tensor]) -> None:
    """Bit for bit."""
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]), name


def state_of(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """A copy of the state alone; what groups say may differ."""
    return {"param_groups": [], "state": copy.deepcopy(optimizer.state_dict()["state"])}


def twins(
    make: Make, *, dtype: torch.dtype = torch.float32, **settings: Any
) -> tuple[nn.Sequential, Any, nn.Sequential, Any]:
    """Two equal networks, each with an optimizer."""
    model, twin = network(dtype=dtype), network(dtype=dtype)
    return model, make(model, **settings), twin, make(twin, **settings)


# Arguments.


@pytest.mark.parametrize(
    ("make", "argument", "value"),
    [
        pytest.param(make, argument, value, id=f"{name}-{argument}-{value}")
        for name, make in OPTIMIZERS.items()
        for argument, value in (*BAD, *make.bad)
    ],
)
def test_bad_argument_is_named(make: Make, argument: str, value: Any) -> None:
    model = nn.Linear(2, 2)
    with pytest.raises(ValueError, match=rf"^{argument} (is|has) .*expected"):
        make(model, **{argument: value})
    with pytest.raises(ValueError, match=rf"^{argument} (is|has) .*expected"):
        make(model, params=[{"params": model.parameters(), argument: value}])


@pytest.mark.parametrize(
    ("argument", "value", "error"),
    [
        ("maximize", "False", TypeError),
        ("maximize", 2, TypeError),
        ("maximize", None, TypeError),
        ("lr", True, TypeError),
        ("lr", 1j, TypeError),
        ("lr", 10**400, ValueError),
        ("lr", torch.tensor(1), TypeError),
        ("lr", torch.tensor(True), TypeError),
        ("lr", torch.tensor(1j), TypeError),
        ("weight_decay", torch.zeros(2), ValueError),
    ],
    ids=lambda value: str(value)[:20],
)
def test_an_argument_of_another_kind_is_named(make: Make, argument: str, value: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match=rf"^{argument} (is|has) .*expected"):
        make(nn.Linear(2, 2), **{argument: value})


def test_every_switch_takes_bools_alone(make: Make) -> None:
    switches = [name for name, value in make(nn.Linear(2, 2)).defaults.items() if isinstance(value, bool)]
    assert "maximize" in switches
    for name in switches:
        with pytest.raises(TypeError, match=rf"^{name} is 'no', expected True or False"):
            make(nn.Linear(2, 2), **{name: "no"})


def test_every_word_is_one_of_those_there_are(make: Make) -> None:
    words = [name for name, value in make(nn.Linear(2, 2)).defaults.items() if isinstance(value, str)]
    for name in words:
        with pytest.raises(ValueError, match=rf"^{name} is \['a word'\], expected one of"):
            make(nn.Linear(2, 2), **{name: ["a word"]})


def test_numbers_of_numpy_are_kept_as_those_of_python(make: Make) -> None:
    model = network()
    settings = {name: np.int64(2) for name in make.every(2) if name != "refresh"}
    optimizer = make(model, lr=np.float64(1e-3), weight_decay=np.float32(0.5), **settings)
    train(model, optimizer, range(1))
    optimizer.param_groups[0]["lr"] = np.float32(0.25)  # as a schedule may
    train(model, optimizer, range(1))
    (group,) = saved_and_loaded(optimizer.state_dict())["param_groups"]
    assert type(group["lr"]) is type(group["weight_decay"]) is float
    assert (group["lr"], group["weight_decay"]) == (0.25, 0.5)
    assert all(type(group[name]) is int for name in settings)


def test_a_setting_that_is_bad_later_is_refused(make: Make) -> None:
    model, rate = network(), torch.tensor(0.0078125)
    optimizer = make(model, lr=rate)
    train(model, optimizer, range(2))
    rate.neg_()  # the same tensor, with another number in it
    with pytest.raises(ValueError, match=r"^lr is -0\.0078125"):
        train(model, optimizer, range(1))
    optimizer.param_groups[0]["lr"] = 0.01
    train(model, optimizer, range(2))
    optimizer.param_groups[0]["lr"] = -1.0
    with pytest.raises(ValueError, match=r"^lr is -1\.0"):
        train(model, optimizer, range(1))


def test_a_parameter_that_is_twice_in_a_group_is_refused(make: Make) -> None:
    model = nn.Linear(2, 2)
    with (
        pytest.raises(ValueError, match=r"^params\[2\] is the same parameter as params\[0\]"),
        pytest.warns(UserWarning, match="duplicate parameters"),  # torch's
    ):
        make(model, params=[model.weight, model.bias, model.weight])


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
def test_nested_parameters_are_refused(make: Make, layout: torch.layout) -> None:
    model = nn.Linear(2, 2)
    model.nested = nn.Parameter(torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=layout))
    with pytest.raises(TypeError, match=r"^params\[2\] is a nested tensor, expected"):
        make(model)


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("freed", ["gradient", "parameter"])
def test_freed_memory_is_refused(make: Make, freed: str, first: bool) -> None:
    """Functions of torch read it all the same, and crash the process."""
    model = network()
    optimizer = make(model)
    if not first:
        train(model, optimizer, range(1))
    model.zero_grad()
    backward(model, 1)
    weight = model[0].weight
    tensor = weight.grad if freed == "gradient" else weight
    assert tensor is not None
    tensor.untyped_storage().resize_(0)
    with pytest.raises(ValueError, match="no memory to read"):
        optimizer.step()


def test_empty_model_is_refused_as_torch_does(make: Make) -> None:
    with pytest.raises(ValueError, match="optimizer got an empty parameter list"):
        make(nn.ReLU())


def test_complex_parameters_are_refused(make: Make) -> None:
    with pytest.raises(TypeError, match=r"params\[0\] has dtype torch\.complex64"):
        make(nn.Linear(2, 2, dtype=torch.complex64))


def test_a_parameter_in_two_groups_is_refused(make: Make) -> None:
    model = nn.Linear(2, 2)
    with pytest.raises(ValueError, match="more than one parameter group"):
        make(model, params=[{"params": [model.weight]}, {"params": [model.weight]}])


def test_named_parameters_as_groups(make: Make) -> None:
    model, twin = network(), network()
    named, plain = make(model, params=model.named_parameters()), make(twin)
    train(model, named, range(2))
    train(twin, plain, range(2))
    assert_same_parameters(model, twin)
    assert named.state_dict()["param_groups"][0]["param_names"][0] == "0.weight"
    assert [row.name for row in named.explain()] == [name for name, _ in model.named_parameters()]


def test_repr_shows_the_hyperparameters(make: Make) -> None:
    optimizer = make(nn.Linear(2, 2), weight_decay=0.25)
    text = repr(optimizer)
    assert text.startswith(f"{make.optimizer.__name__} (")
    assert "weight_decay: 0.25" in text
    for name in optimizer.defaults:
        assert f"{name}: {optimizer.param_groups[0][name]}" in text


# Groups.


def test_groups_have_settings_of_their_own(make: Make) -> None:
    model = network()
    grouped = make(model, params=[{"params": model[:4].parameters()}, {"params": model[4:].parameters(), "lr": 0.0}])
    before = parameters_of(model)
    train(model, grouped, range(2))
    moved = {name: not torch.equal(p, before[name]) for name, p in model.named_parameters()}
    assert moved == {name: name.startswith(("0.", "1.")) for name in before}


def test_groups_of_equal_settings_are_as_one(make: Make) -> None:
    model, twin = network(), network()
    whole = make(model, **make.apart)
    split = make(twin, params=[{"params": twin[:4].parameters()}, {"params": twin[4:].parameters()}], **make.apart)
    train(model, whole, range(3))
    train(twin, split, range(3))
    assert_same_parameters(model, twin)


def test_group_added_in_mid_run_is_trained(make: Make) -> None:
    model = network()
    head, backbone = list(model[6].parameters()), list(model[:6].parameters())
    optimizer = make(model, params=[{"params": head}])
    before = parameters_of(model)
    train(model, optimizer, range(2))
    assert [(row.group, row.shape) for row in optimizer.explain()] == [(0, (3, 6)), (0, (3,))]
    assert_unchanged(model[:6], before)

    optimizer.add_param_group({"params": backbone, "lr": 1e-3})
    train(model, optimizer, range(2, 3))
    rows = optimizer.explain()
    assert [row.group for row in rows] == [0, 0, *[1] * 7]
    from_the_start = make(network()).explain()
    assert [row.rule for row in rows] == [row.rule for row in (*from_the_start[-2:], *from_the_start[:-2])]
    assert all(not torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert float(optimizer.state[model[4].weight][make.count]) == 1
    assert float(optimizer.state[model[6].weight][make.count]) == 3
    # Whatever belongs to a Linear, statistics among it, the new one has too.
    assert optimizer.state[model[4].weight].keys() == optimizer.state[model[6].weight].keys()


def test_bad_group_is_refused_and_not_added(make: Make) -> None:
    model, twin = network(), network()
    ours, plain = (make(net, params=[{"params": net[0].parameters()}]) for net in (model, twin))
    for net, optimizer in ((model, ours), (twin, plain)):
        train(net, optimizer, range(2))
    for name, value in (BAD[0], make.bad[0]):
        with pytest.raises(ValueError, match=rf"^{name} is {value}, expected"):
            ours.add_param_group({"params": model[4].parameters(), name: value})
    with pytest.raises(TypeError, match=r"^params\[1\] has dtype torch\.complex64"):
        ours.add_param_group({"params": [model[4].bias, nn.Parameter(torch.ones(2, dtype=torch.complex64))]})
    with pytest.raises(ValueError, match="more than one parameter group"):
        ours.add_param_group({"params": model[0].parameters()})
    assert len(ours.param_groups) == 1
    assert [row.shape for row in ours.explain()] == [(4, 2, 3, 3)]
    train(model, ours, range(2, 4))
    train(twin, plain, range(2, 4))
    assert_same_parameters(model, twin)
    ours.add_param_group({"params": model[4].parameters()})  # the refused one left no trace of its parameters


def test_group_of_a_foreign_parameter(make: Make) -> None:
    torch.manual_seed(0)
    model, foreign = nn.Linear(30, 20), nn.Parameter(torch.ones(2))
    optimizer = make(model)
    optimizer.add_param_group({"params": [foreign]})
    row = optimizer.explain()[-1]
    assert (row.name, row.rule, row.group) == ("param_groups[1]['params'][0]", make.unserved, 1)
    model(torch.randn(4, 30)).mul(foreign.sum()).sum().backward()
    optimizer.step()
    assert not torch.equal(foreign, torch.ones(2))


def test_scalars_and_empty_parameters(make: Make) -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.linear = nn.Linear(5, 3)
            self.scale = nn.Parameter(torch.tensor(0.5))
            self.nothing = nn.Parameter(torch.empty(0, 3))

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.linear(x) * self.scale + self.nothing.sum()
            return out

    model = Odd()
    optimizer = make(model)
    for step in range(3):
        optimizer.zero_grad()
        model(torch.randn(6, 5, generator=torch.Generator().manual_seed(step))).square().sum(1).mean().backward()
        assert model.nothing.grad is not None
        optimizer.step()
    assert model.scale.item() != 0.5
    assert all(bool(p.isfinite().all()) for p in model.parameters())
    assert [row.shape for row in optimizer.explain()][:2] == [(), (0, 3)]
    assert "scalar" in str(optimizer.explain())
    assert optimizer.metrics()
    resumed = make(Odd())
    resumed.load_state_dict(saved_and_loaded(optimizer.state_dict()))
    assert_same_state(resumed.state_dict(), optimizer.state_dict())


# Steps.


def test_closure(make: Make) -> None:
    model, ours, twin, plain = twins(make)
    for step in range(3):
        calls = []

        def closure(step: int = step, calls: list[bool] = calls) -> Tensor:
            calls.append(torch.is_grad_enabled())
            ours.zero_grad()
            return backward(model, step)

        with torch.no_grad():
            loss = ours.step(closure)
        plain.zero_grad()
        expected = backward(twin, step)
        assert plain.step() is None
        assert calls == [True]
        assert torch.equal(loss, expected)
        assert_same_parameters(model, twin)


SCHEDULERS: dict[str, Callable[[torch.optim.Optimizer], Any]] = {
    "step": lambda opt: StepLR(opt, 2, 0.1),
    "lambda": lambda opt: LambdaLR(opt, lambda t: 1 / (1 + t)),
    "cosine": lambda opt: CosineAnnealingLR(opt, 5),
    "one-cycle": lambda opt: OneCycleLR(opt, max_lr=0.01, total_steps=10, cycle_momentum=False),
}


@pytest.mark.parametrize("as_tensor", [False, True])
@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_scheduler_sets_the_rate_of_each_step(make: Make, scheduler: str, as_tensor: bool) -> None:
    model, twin = network(dtype=torch.float64), network(dtype=torch.float64)
    start = 2e-3
    ours = make(model, lr=torch.tensor(start, dtype=torch.float64) if as_tensor else start)
    schedule = SCHEDULERS[scheduler](ours)
    by_hand = make(twin, lr=start)
    rates = set()
    for step in range(4):
        by_hand.param_groups[0]["lr"] = float(ours.param_groups[0]["lr"])
        rates.add(by_hand.param_groups[0]["lr"])
        train(model, ours, range(step, step + 1))
        train(twin, by_hand, range(step, step + 1))
        schedule.step()
        assert_same_parameters(model, twin)
    assert len(rates) >= 2


def test_plateau_scheduler(make: Make) -> None:
    optimizer = make(network(), lr=0.1)
    schedule = ReduceLROnPlateau(optimizer, patience=0)
    for _ in range(3):
        schedule.step(1.0)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(1e-3)


@pytest.mark.parametrize("shape", [(), (1,)])
def test_tensor_rate(make: Make, shape: tuple[int, ...]) -> None:
    model, twin = network(), network()
    rate = torch.full(shape, 2.0**-9)  # exact in float32: both then compute with the same number
    ours = make(model, lr=rate)
    number = make(twin, lr=2.0**-9)
    train(model, ours, range(2))
    train(twin, number, range(2))
    rate.mul_(0.5)
    number.param_groups[0]["lr"] *= 0.5
    train(model, ours, range(2, 4))
    train(twin, number, range(2, 4))
    assert_same_parameters(model, twin)


@pytest.mark.parametrize("as_tensor", [False, True])
def test_rate_of_zero_changes_nothing_but_the_state(make: Make, as_tensor: bool) -> None:
    model = network()
    optimizer = make(model, lr=torch.tensor(0.0) if as_tensor else 0.0, weight_decay=0.1)
    before = parameters_of(model)
    train(model, optimizer, range(3))
    assert_unchanged(model, before)
    assert all(bool(optimizer.state[p][optimizer.moment].any()) for p in model.parameters())
    assert float(optimizer.state[model[4].weight][make.count]) == 3


@every_configuration
def test_maximize_is_minimising_the_negative(make: Make) -> None:
    model, twin = network(), network()
    up, down = make(model, maximize=True), make(twin)
    for step in range(4):
        up.zero_grad()
        down.zero_grad()
        backward(model, step)
        (-loss_of(twin, step)).backward()
        up.step()
        down.step()
    assert_same_parameters(model, twin)


def test_zero_grad_can_keep_the_tensors(make: Make) -> None:
    model, ours, twin, plain = twins(make)
    for step in range(3):
        ours.zero_grad(set_to_none=False)
        backward(model, step)
        kept = model[0].weight.grad
        ours.step()
        ours.zero_grad(set_to_none=False)
        assert model[0].weight.grad is kept
        assert not bool(kept.any())
        train(twin, plain, range(step, step + 1))
    assert_same_parameters(model, twin)


@every_configuration
def test_gradients_of_micro_batches_add_up(make: Make) -> None:
    """Two halves of a batch, each with half the loss, are one batch; the layers are such that samples do not meet."""

    def build() -> nn.Sequential:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.LayerNorm(8), nn.Linear(8, 4)).double()

    whole, parts = build(), build()
    one, many = make(whole), make(parts)
    for step in range(4):
        generator = torch.Generator().manual_seed(step)
        x, y = torch.randn(16, 6, generator=generator).double(), torch.randint(4, (16,), generator=generator)
        one.zero_grad()
        F.cross_entropy(whole(x), y).backward()
        many.zero_grad()
        for half in (slice(8), slice(8, 16)):
            (F.cross_entropy(parts(x[half]), y[half]) / 2).backward()
        one.step()
        many.step()
    # Sums of float64 in another order; inverses that are kept in 8 bits may round to a neighbour.
    rtol = 2**-8 if make.settings.get("inverse_storage") == "bfloat16" else 1e-8
    for p, q in zip(whole.parameters(), parts.parameters(), strict=True):
        assert one.state[p].keys() == many.state[q].keys()
        for expected, actual in (
            (p.detach(), q.detach()),
            *((one.state[p][n], many.state[q][n]) for n in one.state[p]),
        ):
            torch.testing.assert_close(actual, expected, rtol=rtol, atol=rtol * float(expected.abs().max()))


@every_configuration
def test_gradients_are_only_read(make: Make) -> None:
    model = network()
    ours = make(model, maximize=True)
    for step in range(3):
        ours.zero_grad()
        backward(model, step)
        gradients = [p.grad.clone() for p in model.parameters()]
        ours.step()
        for p, gradient in zip(model.parameters(), gradients, strict=True):
            assert_same_bits(p.grad, gradient)


def test_autograd_knows_that_parameters_have_changed(make: Make) -> None:
    model = network()
    ours = make(model)
    backward(model, 0)
    loss = loss_of(model, 1)
    ours.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_nothing_is_kept_alive(make: Make) -> None:
    """Neither gradients that were cleared, nor a model that is gone with its optimizer."""
    model = network()
    ours = make(model)
    train(model, ours, range(2))
    gradients = [StorageWeakRef(p.grad.untyped_storage()) for p in model.parameters()]
    parameters = [StorageWeakRef(p.untyped_storage()) for p in model.parameters()]
    assert not any(reference.expired() for reference in gradients)
    ours.zero_grad()
    assert all(reference.expired() for reference in gradients)
    del model, ours
    gc.collect()
    assert all(reference.expired() for reference in parameters)


def test_step_hooks_run_around_the_step(make: Make) -> None:
    model = network()
    optimizer = make(model)
    seen = []
    optimizer.register_step_pre_hook(lambda *_: seen.append(("before", parameters_of(model))))
    optimizer.register_step_post_hook(lambda *_: seen.append(("after", parameters_of(model))))
    start = parameters_of(model)
    train(model, optimizer, range(1))
    assert [when for when, _ in seen] == ["before", "after"]
    assert all(torch.equal(seen[0][1][name], p) for name, p in start.items())
    assert not any(torch.equal(seen[1][1][name], p) for name, p in start.items())
    assert_unchanged(model, seen[1][1])


@pytest.mark.filterwarnings("ignore:Warning. Profiler clears events")
def test_step_has_its_name_in_a_profile(make: Make) -> None:
    model = nn.Linear(3, 2)
    ours = make(model)
    model(torch.randn(4, 3)).sum().backward()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        ours.step()
    names = [event.key for event in profile.key_averages()]
    assert f"Optimizer.step#{make.optimizer.__name__}.step" in names


def test_two_optimizers_on_one_model_do_not_meet(make: Make) -> None:
    """As if each had a copy of the model to itself, with what the other has done put in by hand."""
    model, front, back = network(), network(), network()
    rare = make.every(2)
    first, second = make(model, params=model[:4].parameters()), make(model, params=model[4:].parameters(), **rare)
    alone = make(front, params=front[:4].parameters()), make(back, params=back[4:].parameters(), **rare)
    for step in range(4):
        model.zero_grad()
        backward(model, step)
        first.step()
        second.step()
        for net, optimizer in zip((front, back), alone, strict=True):
            net.zero_grad()
            backward(net, step)
            optimizer.step()
        front[4:].load_state_dict(back[4:].state_dict())
        back[:4].load_state_dict(front[:4].state_dict())
        assert_same_parameters(model, front)


# Gradients that are missing, zero or not finite.


def test_step_without_gradients_does_nothing(make: Make) -> None:
    model, ours, twin, plain = twins(make)
    for step in range(3):
        before, state = parameters_of(model), state_of(ours)
        ours.zero_grad()
        assert ours.step() is None
        assert_unchanged(model, before)
        assert_same_state(state_of(ours), state)
        train(model, ours, range(step, step + 1))
        train(twin, plain, range(step, step + 1))
    assert_same_parameters(model, twin)


@pytest.mark.parametrize("how", ["frozen", "unused"])
def test_parameters_without_a_gradient_are_left_alone_and_join_later(make: Make, how: str) -> None:
    """A layer that is trained, is not, and is again; another that joins late."""
    model = network()
    optimizer = make(model)
    layer, late = model[4], model[0].weight
    for step in range(5):
        layer.requires_grad_(not (how == "frozen" and step in (1, 2)))
        late.requires_grad_(step >= 3)
        before = parameters_of(model)
        states = [copy.deepcopy(dict(optimizer.state[p])) for p in layer.parameters() if p in optimizer.state]
        optimizer.zero_grad()
        backward(model, step)
        if how == "unused" and step in (1, 2):
            for p in layer.parameters():
                p.grad = None
        optimizer.step()
        rests = {"4.weight", "4.bias"} if step in (1, 2) else set()
        rests |= set() if step >= 3 else {"0.weight"}
        assert {name for name, p in model.named_parameters() if torch.equal(p, before[name])} == rests
        if step in (1, 2):
            for p, state in zip(layer.parameters(), states, strict=True):
                now = dict(optimizer.state[p])
                if how == "unused":  # the layer did run, and is measured
                    now, state = ({k: v for k, v in s.items() if k == optimizer.moment} for s in (now, state))
                assert_same_state({"param_groups": [], "state": {0: now}}, {"param_groups": [], "state": {0: state}})
        assert (late in optimizer.state) == (step >= 3)
    assert float(optimizer.state[late][make.count]) == 2
    assert float(optimizer.state[layer.weight][make.count]) == (3 if how == "frozen" or make.count == "step" else 5)


@every_configuration
def test_first_step_with_zero_gradients_leaves_the_model_alone(make: Make) -> None:
    """As checkpoint tools make the state of a fresh optimizer: there are no statistics, and nothing is 0 / 0."""
    model = network()
    before = parameters_of(model)
    ours = make(model, weight_decay=0.0)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    ours.step()
    assert_unchanged(model, before)
    assert all(bool(v.isfinite().all()) for entries in ours.state_dict()["state"].values() for v in entries.values())


def test_zero_gradients_let_the_moment_run_out(make: Make) -> None:
    model = network()
    ours = make(model)
    train(model, ours, range(2))
    before, moments = parameters_of(model), [ours.state[p][ours.moment].clone() for p in model.parameters()]
    ours.zero_grad()
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    ours.step()
    for (name, p), moment in zip(model.named_parameters(), moments, strict=True):
        assert not torch.equal(p, before[name])
        assert bool(p.isfinite().all())
        torch.testing.assert_close(ours.state[p][ours.moment], ours.defaults.get("momentum", 0.9) * moment)


def test_gradients_that_are_not_finite_change_nothing_but_counts(make: Make) -> None:
    model = network()
    ours = make(model)
    train(model, ours, range(2))
    before, state = parameters_of(model), state_of(ours)["state"]
    ours.zero_grad()
    backward(model, 5)
    for p in model.parameters():
        assert p.grad is not None
        p.grad.fill_(math.nan)
    ours.step()
    assert_unchanged(model, before)
    moments = {number: {ours.moment: entries[ours.moment]} for number, entries in state.items()}
    now = {number: {ours.moment: entries[ours.moment]} for number, entries in ours.state_dict()["state"].items()}
    assert_same_state({"param_groups": [], "state": now}, {"param_groups": [], "state": moments})
    assert all(row.get("skipped_elements", 0) + row.get("skipped_blocks", 0) > 0 for row in ours.metrics().values())
    train(model, ours, range(2, 4))
    assert all(bool(p.isfinite().all()) for p in model.parameters())


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_gradient_that_is_not_finite_stays_where_it_is(make: Make, bad: float) -> None:
    model = network()
    ours = make(model)
    for step in range(3):
        before = parameters_of(model)
        ours.zero_grad()
        backward(model, step)
        if step == 1:
            model[4].weight.grad[2, 3] = bad
        ours.step()
        assert all(bool(p.isfinite().all()) for p in model.parameters())
        assert all(not torch.equal(p, before[name]) for name, p in model.named_parameters())
        assert (model[4].weight[2, 3].item() == before["4.weight"][2, 3].item()) == (step == 1)
        assert not torch.equal(model[4].weight[0], before["4.weight"][0])
    assert all(bool(v.isfinite().all()) for entries in ours.state_dict()["state"].values() for v in entries.values())


# Refusals in mid-step: nothing has changed, and repaired it goes on as if it had not been.


def _sparse(model: nn.Sequential, optimizer: Any) -> Callable[[], None]:
    dense = model[6].weight.grad
    model[6].weight.grad = dense.to_sparse()
    return lambda: setattr(model[6].weight, "grad", dense)


def _moved(model: nn.Sequential, optimizer: Any) -> Callable[[], None]:
    model.double()
    return model.float


def _set(name: str, value: Any) -> Callable[..., Callable[[], None]]:
    """As a schedule does, in the second of two groups."""

    def spoil(model: nn.Sequential, optimizer: Any) -> Callable[[], None]:
        group = optimizer.param_groups[1]
        previous, group[name] = group[name], value
        return lambda: group.update({name: previous})

    return spoil


REFUSALS: dict[str, tuple[Callable[..., Callable[[], None]], type[Exception], str]] = {
    "sparse gradient": (_sparse, ValueError, r"shape \(3, 6\) has a sparse gradient, expected a dense one"),
    "moved model": (_moved, RuntimeError, r"model was moved to torch\.float64.*load_state_dict"),
    "rate": (_set("lr", -0.5), ValueError, r"^lr is -0\.5, expected a finite number of at least 0"),
    "rate in a tensor": (_set("lr", torch.tensor(math.nan)), ValueError, r"^lr is nan, expected a finite number"),
    "weight decay": (_set("weight_decay", -0.5), ValueError, r"^weight_decay is -0\.5, expected a finite number"),
}


@pytest.mark.parametrize(
    ("what", "after"),
    # Before the first step a model may be moved.
    [(what, after) for what in REFUSALS for after in (0, 2) if (what, after) != ("moved model", 0)],
)
def test_refused_step_changes_nothing(make: Make, what: str, after: int) -> None:
    spoil, error, message = REFUSALS[what]
    model, twin = network(), network()
    ours, plain = (
        make(net, params=[{"params": net[:4].parameters()}, {"params": net[4:].parameters()}]) for net in (model, twin)
    )
    for net, optimizer in ((model, ours), (twin, plain)):
        train(net, optimizer, range(after))
        optimizer.zero_grad()
        backward(net, after)
    before, state = parameters_of(model), state_of(ours)
    repair = spoil(model, ours)
    for _ in range(2):
        with pytest.raises(error, match=message):
            ours.step()
    assert_same_state(state_of(ours), state)
    repair()
    assert_unchanged(model, before)
    assert after or ours.metrics() == {}
    for net, optimizer in ((model, ours), (twin, plain)):
        optimizer.step()
        train(net, optimizer, range(after + 1, after + 3))
    assert_same_parameters(model, twin)
    assert_same_state(state_of(ours), state_of(plain))


# Scaled losses.


@pytest.mark.parametrize("unscaled", [False, True])
@pytest.mark.parametrize("overflows_at", [0, 1])
def test_grad_scaler(make: Make, overflows_at: int, unscaled: bool) -> None:
    """A step whose gradients overflow does not take place; the others are those without a scale, clipped or not."""
    model, twin = network(), network()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=2)
    # What was unscaled before the step, a layer's statistics are not.
    ours, plain = make(model, **({"grad_scaler": scaler} if unscaled and make.every(1) else {})), make(twin)
    for step in range(5):
        ours.zero_grad()
        overflow = step == overflows_at
        scaler.scale(loss_of(model, step) * (math.inf if overflow else 1.0)).backward()
        before, state = parameters_of(model), copy.deepcopy(ours.state_dict())
        if unscaled:
            scaler.unscale_(ours)
            nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        scaler.step(ours)
        scaler.update()
        if overflow:
            assert_unchanged(model, before)
            assert_same_state(ours.state_dict(), state)
            continue
        plain.zero_grad()
        backward(twin, step)
        if unscaled:
            nn.utils.clip_grad_norm_(twin.parameters(), 0.5)
        plain.step()
    assert scaler.get_scale() == 2.0 ** (11 - overflows_at)  # halved once and doubled once or twice, so exact
    assert_same_parameters(model, twin)
    assert_same_state(ours.state_dict(), plain.state_dict())


def test_grad_scaler_of_two_optimizers(make: Make) -> None:
    """One of which has gradients that overflow: the other one's step takes place."""
    model, twin = network(), network()
    front, back = make(model, params=model[:4].parameters()), make(model, params=model[4:].parameters())
    alone = make(twin, params=twin[4:].parameters())
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    before = parameters_of(model)
    for step in range(2):
        model.zero_grad()
        scaler.scale(loss_of(model, step)).backward()
        model[0].weight.grad[0, 0, 0, 0] = math.inf
        scaler.step(front)
        scaler.step(back)
        scaler.update()
        train(twin, alone, range(step, step + 1))
    assert_unchanged(model[:4], before)
    assert not front.state
    assert_same_parameters(model, twin)


# Checkpoints.


@every_configuration
@pytest.mark.parametrize("saved_after", [0, 1, 4])
def test_resumes_bit_for_bit(make: Make, saved_after: int) -> None:
    """Before the first step, and in the middle of an update interval of 3."""
    model = network()
    ours = make(model)
    train(model, ours, range(saved_after))
    state = ours.state_dict()
    assert only_tensors_and_numbers(state)
    stored = saved_and_loaded({"model": model.state_dict(), "optimizer": state})

    twin = network(seed=1)
    twin.load_state_dict(stored["model"])
    resumed = make(twin)
    resumed.load_state_dict(stored["optimizer"])
    assert_same_state(resumed.state_dict(), state)
    for net, opt in ((model, ours), (twin, resumed)):
        train(net, opt, range(saved_after, saved_after + 6))
    assert_same_parameters(model, twin)
    assert_same_state(resumed.state_dict(), ours.state_dict())


@every_configuration
def test_resumes_tied_weights_and_parameters_of_no_layer_bit_for_bit(make: Make) -> None:
    def run(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
        for step in steps:
            x = torch.randint(7, (3, 5), generator=torch.Generator().manual_seed(step))
            optimizer.zero_grad()
            F.cross_entropy(model(x).flatten(0, 1), x.flatten()).backward()
            optimizer.step()

    torch.manual_seed(0)
    model = Tied()
    ours = make(model)
    run(model, ours, range(4))
    twin = Tied()
    twin.load_state_dict(model.state_dict())
    resumed = make(twin)
    resumed.load_state_dict(ours.state_dict())
    run(model, ours, range(4, 9))
    run(twin, resumed, range(4, 9))
    assert_same_parameters(model, twin)


@every_configuration
@pytest.mark.parametrize("saved_after", [0, 2])
def test_loading_goes_back_in_time(make: Make, saved_after: int) -> None:
    """Into the optimizer that made the state, which has gone on since and has more to forget."""
    model = network()
    ours = make(model)
    train(model, ours, range(saved_after))
    stored = saved_and_loaded({"model": model.state_dict(), "optimizer": ours.state_dict()})
    train(model, ours, range(saved_after, saved_after + 4))
    once, state = parameters_of(model), copy.deepcopy(ours.state_dict())
    model.load_state_dict(stored["model"])
    ours.load_state_dict(stored["optimizer"])
    train(model, ours, range(saved_after, saved_after + 4))
    assert_unchanged(model, once)
    assert_same_state(ours.state_dict(), state)


def test_a_state_is_loaded_by_an_optimizer_that_has_loaded_another(make: Make) -> None:
    """Torch adds to the defaults of an optimizer when it loads a state."""
    model, twin = network(), network(seed=1)
    ours, others = make(model), make(twin)
    others.load_state_dict(others.state_dict())
    train(model, ours, range(2))
    others.load_state_dict(ours.state_dict())
    assert_same_state(others.state_dict(), ours.state_dict())


def test_loading_brings_the_hyperparameters_along(make: Make) -> None:
    """As for every torch optimizer; here they decide what the state means."""
    model = network()
    ours = make(model, **make.others)
    train(model, ours, range(3))
    twin = network(seed=1)
    twin.load_state_dict(model.state_dict())
    resumed = make(twin)
    resumed.load_state_dict(ours.state_dict())
    assert {name: resumed.param_groups[0][name] for name in make.others} == make.others
    train(model, ours, range(3, 7))
    train(twin, resumed, range(3, 7))
    assert_same_parameters(model, twin)


def test_loading_drops_what_is_pending(make: Make) -> None:
    model, ours, twin, plain = twins(make)
    state = ours.state_dict()
    backward(model, 99)
    ours.load_state_dict(state)
    model.load_state_dict(twin.state_dict())
    for p in model.parameters():
        p.grad.zero_()  # not by zero_grad, nor to None, so that only loading can have dropped anything else
    backward(model, 0)
    ours.step()
    train(twin, plain, range(1))
    assert_same_parameters(model, twin)
    assert_same_state(ours.state_dict(), plain.state_dict())


@every_configuration
@pytest.mark.parametrize(
    ("dtype", "wide"),
    [(torch.float64, torch.float64), (torch.bfloat16, torch.float32), (torch.float16, torch.float32)],
)
def test_resumes_on_another_dtype_without_losing_precision(make: Make, dtype: torch.dtype, wide: torch.dtype) -> None:
    model = network()
    ours = make(model)
    train(model, ours, range(4))
    twin = network(seed=1)
    twin.load_state_dict(model.state_dict())
    twin = twin.to(dtype)
    resumed = make(twin)
    resumed.load_state_dict(ours.state_dict())
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        for name, value in ours.state[p].items():
            loaded = resumed.state[q][name]
            # Of a dtype that no parameter decides.
            own = name in (make.count, "pending_counts") or value.dtype == torch.bfloat16
            assert loaded.dtype == (value.dtype if own else wide)
            assert torch.equal(loaded.double(), value.double())
    train(twin, resumed, range(4, 8))
    assert all(bool(p.isfinite().all()) for p in twin.parameters())
    assert all(p.dtype == dtype for p in twin.parameters())


def test_state_of_a_wide_model_becomes_narrow_with_it(make: Make) -> None:
    model = network(dtype=torch.float64)
    ours = make(model)
    train(model, ours, range(2))
    twin = network()
    resumed = make(twin)
    resumed.load_state_dict(ours.state_dict())
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        for name, value in ours.state[p].items():
            assert torch.equal(resumed.state[q][name], value.float())
    train(twin, resumed, range(2, 4))


def test_loading_neither_changes_nor_keeps_what_it_is_given(make: Make) -> None:
    model, twin = network(), network()
    ours, resumed = make(model, lr=torch.tensor(1e-3)), make(twin, lr=torch.tensor(1e-3))
    train(model, ours, range(2))
    given = copy.deepcopy(ours.state_dict())
    original = copy.deepcopy(given)
    resumed.load_state_dict(given)
    assert_same_state(given, original)
    train(twin, resumed, range(2, 4))
    resumed.param_groups[0]["lr"].fill_(5.0)
    assert_same_state(given, original)
    before = copy.deepcopy(resumed.state_dict())
    for entries in given["state"].values():
        for value in entries.values():
            value.fill_(7)
    given["param_groups"][0]["lr"].fill_(7)
    given["param_groups"][0]["params"].clear()
    assert_same_state(resumed.state_dict(), before)


def test_load_hooks_may_put_another_state_in_place(make: Make) -> None:
    model, ours, twin, resumed = twins(make)
    train(model, ours, range(2))
    given = ours.state_dict()

    def double(_: torch.optim.Optimizer, state: dict[str, Any]) -> dict[str, Any]:
        entries = {n: {**s, ours.moment: s[ours.moment].double() * 2} for n, s in state["state"].items()}
        return {**state, "state": entries}

    resumed.register_load_state_dict_pre_hook(double)
    resumed.load_state_dict(given)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(resumed.state[q][ours.moment], 2 * ours.state[p][ours.moment])


def test_state_of_another_optimizer_is_refused_and_changes_nothing(make: Make) -> None:
    model = network()
    ours, other = make(model), torch.optim.AdamW(model.parameters())
    train(model, ours, range(2))
    before = copy.deepcopy(ours.state_dict())
    backward(model, 2)
    other.step()
    with pytest.raises(ValueError, match="that of another optimizer"):
        ours.load_state_dict(other.state_dict())
    assert_same_state(ours.state_dict(), before)
    train(model, ours, range(2, 3))


def test_state_of_other_groups_is_refused(make: Make) -> None:
    state = make(nn.Linear(2, 2)).state_dict()
    other = nn.Linear(2, 2, bias=False)
    ours = make(other)
    with pytest.raises(ValueError, match="loaded state dict contains a parameter group"):
        ours.load_state_dict(state)
    other(torch.randn(4, 2)).square().sum().backward()
    ours.step()


@every_configuration
@pytest.mark.parametrize("flatten", [False, True])
@pytest.mark.parametrize("on_disk", [False, True])
@pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")
def test_distributed_checkpoint_of_one_process(make: Make, flatten: bool, on_disk: bool, tmp_path: Path) -> None:
    options = StateDictOptions(flatten_optimizer_state_dict=flatten)
    model = network()
    ours = make(model)
    train(model, ours, range(4))
    stored = get_optimizer_state_dict(model, ours, options=options)
    twin = network(seed=1)
    twin.load_state_dict(model.state_dict())
    resumed = make(twin)
    if on_disk:
        dcp.save({"optimizer": stored}, checkpoint_id=tmp_path, no_dist=True)
        stored = get_optimizer_state_dict(twin, resumed, options=options)  # what is loaded into
        dcp.load({"optimizer": stored}, checkpoint_id=tmp_path, no_dist=True)
    else:
        stored = saved_and_loaded(stored)
    set_optimizer_state_dict(twin, resumed, stored, options=options)
    assert_same_state(resumed.state_dict(), ours.state_dict())
    train(model, ours, range(4, 9))
    train(twin, resumed, range(4, 9))
    assert_same_parameters(model, twin)
    assert_same_state(resumed.state_dict(), ours.state_dict())


@every_configuration
def test_being_asked_for_its_state_changes_nothing(make: Make) -> None:
    """torch.distributed.checkpoint takes a step with gradients of zero where there is no state yet."""
    model, ours, twin, asked = twins(make)
    before, groups = parameters_of(twin), copy.deepcopy(asked.state_dict()["param_groups"])
    state = get_optimizer_state_dict(twin, asked)["state"]
    assert state.keys() == before.keys()
    assert all(torch.equal(p, before[name]) for name, p in twin.named_parameters())
    assert asked.state_dict()["param_groups"] == groups
    assert all(math.isfinite(x) or math.isnan(x) for row in asked.metrics().values() for x in row.values())
    train(model, ours, range(7))
    train(twin, asked, range(7))
    assert_same_parameters(model, twin)
    assert_same_state(asked.state_dict(), ours.state_dict())
    assert asked.metrics() == ours.metrics()


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
def test_model_and_optimizer_copied_together_train_on_alike(make: Make, how: str) -> None:
    model = network()
    optimizer = make(model, **make.every(2))
    train(model, optimizer, range(2))
    optimizer.zero_grad()
    backward(model, 2)
    model[4].weight.grad[0, 0] = math.nan  # which is counted
    optimizer.step()
    if how == "deepcopy":
        twin, copied = copy.deepcopy((model, optimizer))
    elif how == "pickle":
        twin, copied = pickle.loads(pickle.dumps((model, optimizer)))
    else:
        buffer = io.BytesIO()
        torch.save((model, optimizer), buffer)
        buffer.seek(0)
        twin, copied = torch.load(buffer, weights_only=False)
    assert copied.param_groups[0]["params"][0] is twin[0].weight
    assert [(row.name, row.rule) for row in copied.explain()] == [(row.name, row.rule) for row in optimizer.explain()]
    train(model, optimizer, range(3, 6))
    train(twin, copied, range(3, 6))
    assert_same_parameters(model, twin)
    assert_same_state(copied.state_dict(), optimizer.state_dict())
    assert copied.metrics() == optimizer.metrics()
    assert float(copied.state[twin[0].weight][make.count]) == (6 if make.count == "step" else 3)


# Dtypes and layouts.


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_models_of_other_dtypes(make: Make, dtype: torch.dtype) -> None:
    model = network(dtype=dtype)
    optimizer = make(model)
    before = parameters_of(model)
    train(model, optimizer, range(3))
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    for name, p in model.named_parameters():
        assert p.dtype == dtype
        assert bool(p.isfinite().all())
        if p.dim() > 1:  # to move a 1 takes more in 8 bits
            assert not torch.equal(p, before[name])
        for entry, value in optimizer.state[p].items():
            assert value.dtype == (torch.float32 if entry == make.count else wide), entry


SHORT = {"moment_dtype": torch.bfloat16}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_moments_alone_are_in_16_bits(make: Make, dtype: torch.dtype) -> None:
    """Those of the first step are what they are without, rounded to nearest."""
    model, twin = network(dtype=dtype), network(dtype=dtype)
    ours, plain = make(model, **SHORT), make(twin)
    train(model, ours, range(1))
    train(twin, plain, range(1))
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert_same_bits(ours.state[p][ours.moment], plain.state[q][ours.moment].to(torch.bfloat16))
    train(model, ours, range(1, 4))
    train(twin, plain, range(1, 4))
    for (name, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert ours.state[p].keys() == plain.state[q].keys()
        assert bool(p.isfinite().all())
        for entry, value in ours.state[p].items():
            wanted = torch.bfloat16 if entry == ours.moment else plain.state[q][entry].dtype
            assert value.dtype == wanted, (name, entry)


def test_moments_in_16_bits_resume_bit_for_bit(make: Make) -> None:
    model = network()
    ours = make(model, **SHORT)
    train(model, ours, range(4))
    stored = saved_and_loaded({"model": model.state_dict(), "optimizer": ours.state_dict()})
    assert [group["moment_dtype"] for group in stored["optimizer"]["param_groups"]] == [torch.bfloat16]
    twin = network(seed=1)
    twin.load_state_dict(stored["model"])
    resumed = make(twin, **SHORT)
    resumed.load_state_dict(stored["optimizer"])
    assert_same_state(resumed.state_dict(), ours.state_dict())
    for net, opt in ((model, ours), (twin, resumed)):
        train(net, opt, range(4, 10))
    assert_same_parameters(model, twin)
    assert_same_state(resumed.state_dict(), ours.state_dict())


@pytest.mark.parametrize(("saved", "loaded"), [(None, torch.bfloat16), (torch.bfloat16, None)], ids=str)
def test_a_state_takes_the_dtype_of_moments_of_what_loads_it(
    make: Make, saved: torch.dtype | None, loaded: torch.dtype | None
) -> None:
    """Rounded to nearest, or widened; nothing else changes."""
    model = network()
    ours = make(model, moment_dtype=saved)
    train(model, ours, range(4))
    state = saved_and_loaded(ours.state_dict())
    twin = network(seed=1)
    twin.load_state_dict(model.state_dict())
    resumed = make(twin, moment_dtype=loaded)
    resumed.load_state_dict(state)
    assert resumed.param_groups[0]["moment_dtype"] == loaded
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert ours.state[p].keys() == resumed.state[q].keys()
        for entry, value in ours.state[p].items():
            wanted = value.to(loaded or torch.float32) if entry == ours.moment else value
            assert_same_bits(resumed.state[q][entry], wanted, entry)
    train(twin, resumed, range(4, 6))
    assert all(s[resumed.moment].dtype == (loaded or torch.float32) for s in resumed.state.values())


def test_moments_of_groups_may_be_of_two_dtypes(make: Make) -> None:
    """A weight and its bias among them; set in mid run, the state has to be loaded anew."""
    model = network()
    weights = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": weights, **SHORT}, {"params": others}]
    optimizer = make(model, params=groups)
    train(model, optimizer, range(3))

    def check(short: list[Tensor]) -> None:
        for p, state in optimizer.state.items():
            is_short = any(p is q for q in short)
            assert state[optimizer.moment].dtype == (torch.bfloat16 if is_short else torch.float32)

    check(weights)
    optimizer.param_groups[1]["moment_dtype"] = torch.bfloat16
    optimizer.zero_grad()
    backward(model, 3)
    with pytest.raises(RuntimeError, match=r"moment_dtype set to torch.bfloat16.*load_state_dict"):
        optimizer.step()
    optimizer.load_state_dict(optimizer.state_dict())
    train(model, optimizer, range(3, 5))
    check([*weights, *others])
    assert all(bool(p.isfinite().all()) for p in model.parameters())


def test_moments_of_float64_are_never_in_16_bits(make: Make) -> None:
    wide, narrow = network(dtype=torch.float64), network()
    with pytest.raises(ValueError, match=r"^moment_dtype is torch.bfloat16, and params\[0\] has dtype torch.float64"):
        make(wide, **SHORT)
    with pytest.raises(ValueError, match=r"^moment_dtype is torch.bfloat16, and params\[0\] has dtype torch.float64"):
        make(wide, params=[{"params": wide.parameters(), **SHORT}])
    optimizer = make(narrow, **SHORT)
    train(narrow, optimizer, range(1))
    narrow.double()
    optimizer.zero_grad()
    backward(narrow, 1)
    with pytest.raises((RuntimeError, ValueError), match="float64"):
        optimizer.step()


def test_explain_counts_the_bytes_of_moments_in_16_bits(make: Make) -> None:
    model, twin = network(), network()
    rows = []
    for net, settings in ((model, SHORT), (twin, {})):
        optimizer = make(net, **settings)
        train(net, optimizer, range(2))
        rows.append(optimizer.explain())
    for short, plain, p in zip(*rows, model.parameters(), strict=True):
        assert plain.state_bytes - short.state_bytes == 2 * p.numel(), short.name


def test_model_moved_before_the_first_step_works(make: Make) -> None:
    model, twin = network(), network().double()
    ours, plain = make(model), make(twin)
    model.double()
    train(model, ours, range(2))
    train(twin, plain, range(2))
    assert_same_parameters(model, twin)
    assert_same_state(ours.state_dict(), plain.state_dict())


def test_model_moved_in_mid_training_goes_on_once_its_state_is_moved(make: Make) -> None:
    model = network()
    optimizer = make(model)
    train(model, optimizer, range(2))
    model.double()
    optimizer.zero_grad()
    backward(model, 2)
    with pytest.raises(RuntimeError, match=r"moved.*load_state_dict"):
        optimizer.step()
    optimizer.load_state_dict(optimizer.state_dict())
    train(model, optimizer, range(2, 4))
    assert all(s[optimizer.moment].dtype == torch.float64 for s in optimizer.state.values())


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "channels last": lambda w: w.to(memory_format=torch.channels_last) if w.dim() == 4 else w,
    "transposed": lambda w: w.transpose(0, 1).contiguous().transpose(0, 1) if w.dim() > 1 else w,
    "with gaps": lambda w: w.repeat_interleave(2, dim=-1)[..., ::2],
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_parameters_of_other_layouts(make: Make, layout: str) -> None:
    """Trained, saved, and gone on with as they should be: contiguous."""
    model, twin, third = (network(dtype=torch.float64) for _ in range(3))
    for module in model.modules():
        for name, p in module.named_parameters(recurse=False):
            setattr(module, name, nn.Parameter(LAYOUTS[layout](p.detach())))
    strides = [p.stride() for p in model.parameters()]
    assert strides != [p.stride() for p in twin.parameters()]
    # Eigenvectors of what no sample has shown are arbitrary. Every gradient is to be among those of the factors, and
    # where second moments come before the eigenvectors, factors are to have seen more samples than they are wide.
    every = {
        EKFAC: {"inverse_interval": 1, "max_factor_size": 20},
        EKFACAdam: {"inverse_interval": 1},
    }.get(make.optimizer, {})
    ours, plain, resumed = (make(net, **every) for net in (model, twin, third))
    train(model, ours, range(3))
    train(twin, plain, range(3))
    third.load_state_dict(model.state_dict())
    resumed.load_state_dict(saved_and_loaded(ours.state_dict()))
    for net, optimizer in ((model, ours), (twin, plain), (third, resumed)):
        train(net, optimizer, range(3, 5))
    assert [p.stride() for p in model.parameters()] == strides
    for p, q, r in zip(model.parameters(), twin.parameters(), third.parameters(), strict=True):
        for other in (p, r):  # sums of float64 in another order
            torch.testing.assert_close(other, q, rtol=1e-8, atol=1e-8 * float(q.detach().abs().max()))


# Compilers and averages.


def compiling(test: Callable[..., None]) -> Callable[..., None]:
    """The marks of a test that compiles. One backend will do: all the compiler can see is what lies before it."""
    test = pytest.mark.usefixtures("fresh_compiler")(test)
    test = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")(test)
    return pytest.mark.parametrize("host_backend", ["reference"], indirect=True)(test)


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@compiling
def test_compiled_step_is_right_and_stays_outside_the_graph(make: Make) -> None:
    model, ours, twin, plain = twins(make)
    graphs = []

    def backend(graph: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(graph)
        return graph

    @torch.compile(backend=backend)
    def update(x: Tensor) -> Tensor:
        x = x + 1
        ours.step()
        return x * 2

    for step in range(3):
        ours.zero_grad()
        backward(model, step)
        assert float(update(torch.ones(()))) == 4
        train(twin, plain, range(step, step + 1))
    assert_same_parameters(model, twin)
    assert len(graphs) == 2, "one before the step, one behind it"
    assert not any("fisher_kernels" in graph.code for graph in graphs)
    ours.zero_grad()
    backward(model, 3)
    torch.compile(ours.step, backend="eager")()
    train(twin, plain, range(3, 4))
    assert_same_parameters(model, twin)

    @torch.compile(fullgraph=True, backend="eager")
    def refuses() -> None:
        ours.step()

    with pytest.raises(torch._dynamo.exc.Unsupported):
        refuses()


@compiling
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # the compiler looks at all
def test_compiled_training_is_that_of_eager_mode(make: Make) -> None:
    """One function that does it all: gradients, the step, and what comes behind it."""
    model, ours, twin, plain = twins(make, dtype=torch.float64)

    def iteration(model: nn.Module, optimizer: Any, x: Tensor, y: Tensor) -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        return loss.detach() * 2

    # The compiler takes the derivative of a graph in another order. Inverses kept in 8 bits may round to a neighbour.
    rtol = 2**-8 if make.settings.get("inverse_storage") == "bfloat16" else 1e-8
    compiled = torch.compile(iteration, backend="aot_eager")
    for step in range(3):
        generator = torch.Generator().manual_seed(step)
        x, y = torch.randn(8, 2, 4, 4, generator=generator).double(), torch.randint(3, (8,), generator=generator)
        torch.testing.assert_close(compiled(model, ours, x, y), iteration(twin, plain, x, y), rtol=rtol, atol=0)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=rtol, atol=rtol * float(q.detach().abs().max()))


@pytest.mark.parametrize("average", ["equal", "exponential"])
def test_weight_averaging(make: Make, average: str) -> None:
    """A copy of the model that averages does not disturb it, nor do passes through the copy or to renew its buffers."""
    model, ours, twin, plain = twins(make)
    averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5) if average == "exponential" else None)
    schedule = SWALR(ours, swa_lr=1e-4, anneal_epochs=2)
    expected = parameters_of(model)
    batches = [(torch.randn(8, 2, 4, 4, generator=torch.Generator().manual_seed(9)),)]
    for step in range(4):
        plain.param_groups[0]["lr"] = ours.param_groups[0]["lr"]
        train(model, ours, range(step, step + 1))
        averaged.update_parameters(model)
        schedule.step()
        update_bn(batches, averaged)
        averaged(batches[0][0]).sum().backward()  # a copy, with gradients of its own
        train(twin, plain, range(step, step + 1))
        share = 1 / (step + 1) if average == "equal" else 0.5 if step else 1.0
        for name, p in twin.named_parameters():
            expected[name] += share * (p.detach() - expected[name])
    assert_same_parameters(model, twin)
    assert ours.param_groups[0]["lr"] == pytest.approx(1e-4)
    for name, p in averaged.module.named_parameters():
        torch.testing.assert_close(p.detach(), expected[name])


# Reports.


def test_explain_has_a_row_for_every_parameter(make: Make) -> None:
    model = nn.Sequential(nn.Conv1d(2, 4, 3), nn.PReLU(), nn.Flatten(), nn.Linear(16, 3), nn.BatchNorm1d(3))
    model[3].bias.requires_grad_(False)
    optimizer = make(model, params=model.named_parameters())
    rows = optimizer.explain()
    named = dict(model.named_parameters())
    assert [row.name for row in rows] == list(named)
    assert [row.shape for row in rows] == [tuple(p.shape) for p in named.values()]
    assert [row.name for row in rows if row.frozen] == ["3.bias"]
    assert {row.name: row.rule for row in rows}["1.weight"] == make.unserved
    assert all(row.group == 0 and row.state_bytes == 0 and row.detail for row in rows)


@every_configuration
def test_explain_adds_up_the_bytes_of_the_state(make: Make) -> None:
    model = network()
    model[6].bias.requires_grad_(False)
    optimizer = make(model)
    train(model, optimizer, range(2))
    state = optimizer.state_dict()["state"]  # with what was on its way
    rows = optimizer.explain()
    assert [row.state_bytes > 0 for row in rows] == [p.requires_grad for p in model.parameters()]
    sizes = {v.untyped_storage().data_ptr(): v.untyped_storage().nbytes() for s in state.values() for v in s.values()}
    assert sum(row.state_bytes for row in rows) == sum(sizes.values())  # no tensor is a view of a larger one


def test_explain_prints_a_table(make: Make) -> None:
    model = nn.Sequential(nn.Linear(30, 20), nn.PReLU())
    model[0].bias.requires_grad_(False)
    optimizer = make(model, params=model.named_parameters())
    rule = optimizer.explain()[0].rule
    text = str(optimizer.explain())
    lines = text.splitlines()
    assert "parameter" in text
    assert any("0.weight" in line and "20 x 30" in line and rule in line for line in lines)
    assert any("0.bias" in line and f"{rule}, frozen" in line for line in lines)
    assert any("1.weight" in line and make.unserved in line for line in lines)
    assert max(map(len, lines)) <= 120


def test_metrics_only_read(make: Make) -> None:
    model, ours, twin, plain = twins(make)
    assert ours.metrics() == {}
    for step in range(3):
        train(model, ours, range(step, step + 1))
        train(twin, plain, range(step, step + 1))
        report = ours.metrics()
        assert report
        assert all(type(x) in (int, float) and math.isfinite(x) for row in report.values() for x in row.values())
        assert ours.metrics() == report
    assert_same_parameters(model, twin)
    assert_same_state(ours.state_dict(), plain.state_dict())
    ours.zero_grad()
    later = ours.metrics()
    assert list(later) == list(report)
    assert all(math.isnan(row.pop("cosine_with_sgd")) for row in later.values())
    assert all(later[name].items() <= row.items() for name, row in report.items())


# Do they train.


@dataclass(frozen=True)
class Learner:
    """Settings that suit two tasks."""

    make: Make
    classifier: dict[str, Any]
    quadratic: dict[str, Any]


LEARNERS = {
    **{
        f"{name}-{variant}": Learner(
            replace(OPTIMIZERS[name], settings={"variant": variant, "update_interval": 1}),
            {"lr": rates[0]},
            {"lr": rates[1], "damping": 0.3},
        )
        for name in ("AdaFisher", "AdaFisherW")
        for variant, rates in (("paper", (0.01, 0.05)), ("release", (1e-3, 0.05)), ("relative", (0.3, 0.3)))
    },
    "MBF": Learner(MINI_BLOCKS, {"lr": 0.05, "damping": 0.01}, {"lr": 0.05, "damping": 0.3, **FREE}),
    # Without noise the empirical Fisher matrix vanishes at the minimum, and damping alone is left.
    "KFAC": Learner(KRONECKER, {"lr": 0.1, **FREE}, CIRCLING),
    "EKFAC": Learner(replace(KRONECKER, optimizer=EKFAC), {"lr": 0.1, **FREE}, CIRCLING),
    "EKFACAdam": Learner(ADAM_BASIS, {"lr": 0.03}, {"lr": 0.05, "beta2": 0.999}),
    "SOFIM": Learner(replace(RANK_ONE, settings={"rho": 0.1}), {"lr": 0.5}, {"lr": 0.5}),
    "SOFIM-tensor": Learner(replace(RANK_ONE, settings={"scope": "tensor", "rho": 0.1}), {"lr": 0.5}, {"lr": 0.5}),
    "SOFIM-gradient": Learner(
        replace(RANK_ONE, settings={"direction": "gradient", "rho": 1.0}), {"lr": 2.0}, {"lr": 0.5}
    ),
}


@pytest.mark.parametrize("learner", LEARNERS.values(), ids=LEARNERS.keys())
def test_learns_a_linear_classifier(learner: Learner) -> None:
    torch.manual_seed(0)
    x = torch.randn(256, 10) * torch.logspace(-1, 0.5, 10)
    y = (x @ torch.randn(10, 3)).argmax(1)
    model = nn.Linear(10, 3)
    ours = learner.make(model, **learner.classifier)
    for _ in range(100):
        ours.zero_grad()
        F.cross_entropy(model(x), y).backward()
        ours.step()
    assert float((model(x).argmax(1) == y).float().mean()) > 0.95


@pytest.mark.parametrize("learner", LEARNERS.values(), ids=LEARNERS.keys())
def test_reaches_the_minimum_of_a_quadratic(learner: Learner) -> None:
    """Least squares without noise: the solution is exact, and momentum must not circle it."""
    torch.manual_seed(0)
    x = torch.randn(64, 4, dtype=torch.float64) * torch.tensor([0.5, 1.0, 1.5, 2.0])
    truth = torch.randn(3, 4, dtype=torch.float64)
    model = nn.Linear(4, 3, bias=False).double()
    optimizer = learner.make(model, **learner.quadratic)
    for _ in range(300):
        optimizer.zero_grad()
        (model(x) - x @ truth.T).square().mean().backward()
        optimizer.step()
    torch.testing.assert_close(model.weight.detach(), truth, rtol=1e-3, atol=1e-3)
