"""The optimizer's contract: arguments, groups, closures, schedulers, checkpoints, reports."""

from __future__ import annotations

import copy
import gc
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, OneCycleLR, ReduceLROnPlateau, StepLR

from fisher_kernels import AdaFisher, AdaFisherW
from tests.naive_adafisher import NaiveAdaFisher
from tests.small_network import (
    assert_same_parameters,
    assert_same_state,
    backward,
    hooks,
    network,
    only_tensors_and_numbers,
    parameters_of,
    saved_and_loaded,
    train,
)

OPTIMIZERS = (AdaFisher, AdaFisherW)
VARIANTS = ("paper", "release", "relative")

pytestmark = pytest.mark.usefixtures("backend", "one_thread")


# Arguments.


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("lr", -1.0),
        ("lr", math.nan),
        ("lr", math.inf),
        ("lr", torch.tensor([0.1, 0.2])),
        ("lr", torch.tensor(-0.1)),
        ("beta", 1.0),
        ("beta", -0.1),
        ("beta", math.nan),
        ("gamma", 1.0),
        ("gamma", -0.1),
        ("damping", -1e-3),
        ("damping", math.inf),
        ("eps", -1e-6),
        ("weight_decay", -0.1),
        ("weight_decay", math.nan),
        ("variant", "papers"),
        ("update_interval", 0),
        ("update_interval", 1.5),
        ("fallback_curvature", 0.0),
        ("fallback_curvature", -1.0),
        ("fallback_curvature", math.inf),
    ],
)
def test_bad_argument_is_named(optimizer: type[AdaFisher], argument: str, value: Any) -> None:
    model = nn.Linear(2, 2)
    with pytest.raises(ValueError, match=rf"^{argument} (is|has) .*expected"):
        optimizer(model, **{argument: value})
    with pytest.raises(ValueError, match=rf"^{argument} (is|has) .*expected"):
        optimizer(model, params=[{"params": model.parameters(), argument: value}])


def test_model_must_be_a_module() -> None:
    with pytest.raises(TypeError, match=r"model is a generator, expected a torch\.nn\.Module"):
        AdaFisher(nn.Linear(2, 2).parameters())  # type: ignore[arg-type]


def test_empty_model_is_refused_as_torch_does() -> None:
    with pytest.raises(ValueError, match="optimizer got an empty parameter list"):
        AdaFisher(nn.ReLU())


def test_lazy_module_must_have_run() -> None:
    model = nn.Sequential(nn.LazyLinear(3))
    with pytest.raises(ValueError, match=r"parameter '0\.weight' is not initialised"):
        AdaFisher(model)
    model(torch.ones(2, 4))
    AdaFisher(model)


def test_complex_parameters_are_refused() -> None:
    with pytest.raises(TypeError, match=r"params\[0\] has dtype torch\.complex64"):
        AdaFisher(nn.Linear(2, 2, dtype=torch.complex64))


def test_a_parameter_in_two_groups_is_refused() -> None:
    model = nn.Linear(2, 2)
    with pytest.raises(ValueError, match="more than one parameter group"):
        AdaFisher(model, params=[{"params": [model.weight]}, {"params": [model.weight]}])


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize(
    ("variant", "lr", "damping", "interval"),
    [("paper", 3e-3, 1e-3, 1), ("release", 1e-3, 1e-3, 100), ("relative", 1.0, 0.1, 1)],
)
def test_defaults(optimizer: type[AdaFisher], variant: str, lr: float, damping: float, interval: int) -> None:
    wanted = {"lr": lr, "damping": damping, "update_interval": interval, "beta": 0.9, "gamma": 0.8, "eps": 1e-6}
    group = optimizer(nn.Linear(2, 2), variant=variant).param_groups[0]
    assert {name: group[name] for name in wanted} == wanted
    assert optimizer(nn.Linear(2, 2), variant=variant, lr=0.5).param_groups[0]["lr"] == 0.5


def test_defaults_of_each_group_follow_its_variant() -> None:
    model = network()
    groups = [
        {"params": model[0].parameters(), "variant": "relative"},
        {"params": model[1].parameters(), "variant": "release", "lr": 0.7},
        {"params": model[4:].parameters(), "gamma": 0.5, "update_interval": 7},
    ]
    optimizer = AdaFisher(model, params=groups, damping=0.2)
    rows = [[g[k] for k in ("variant", "lr", "damping", "gamma", "update_interval")] for g in optimizer.param_groups]
    assert rows == [["relative", 1.0, 0.2, 0.8, 1], ["release", 0.7, 0.2, 0.8, 100], ["paper", 3e-3, 0.2, 0.5, 7]]
    assert [row.group for row in optimizer.explain()] == [0, 1, 1, 2, 2, 2, 2, 2, 2]


def test_named_parameters_as_groups() -> None:
    model, twin = network(), network()
    named = AdaFisher(model, params=model.named_parameters())
    plain = AdaFisher(twin)
    train(model, named, range(2))
    train(twin, plain, range(2))
    assert_same_parameters(model, twin)
    assert named.state_dict()["param_groups"][0]["param_names"][0] == "0.weight"


def test_repr_shows_the_hyperparameters() -> None:
    text = repr(AdaFisherW(nn.Linear(2, 2), weight_decay=0.25))
    assert text.startswith("AdaFisherW (")
    assert "weight_decay: 0.25" in text
    assert "variant: paper" in text


# Steps.


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_closure(optimizer: type[AdaFisher]) -> None:
    model, twin = network(), network()
    ours, plain = optimizer(model), optimizer(twin)
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
def test_scheduler_sets_the_rate_of_each_step(scheduler: str, as_tensor: bool) -> None:
    model, twin = network(dtype=torch.float64), network(dtype=torch.float64)
    start = 2e-3
    ours = AdaFisher(model, lr=torch.tensor(start, dtype=torch.float64) if as_tensor else start)
    schedule = SCHEDULERS[scheduler](ours)
    by_hand = AdaFisher(twin, lr=start)
    rates = set()
    for step in range(4):
        by_hand.param_groups[0]["lr"] = float(ours.param_groups[0]["lr"])
        rates.add(by_hand.param_groups[0]["lr"])
        train(model, ours, range(step, step + 1))
        train(twin, by_hand, range(step, step + 1))
        schedule.step()
        assert_same_parameters(model, twin)
    assert len(rates) >= 2


def test_plateau_scheduler() -> None:
    optimizer = AdaFisher(network(), lr=0.1)
    schedule = ReduceLROnPlateau(optimizer, patience=0)
    for _ in range(3):
        schedule.step(1.0)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(1e-3)


@pytest.mark.parametrize("shape", [(), (1,)])
def test_tensor_rate(shape: tuple[int, ...]) -> None:
    model, twin = network(), network()
    rate = torch.full(shape, 2.0**-9)  # exact in float32: both then compute with the same number
    ours = AdaFisher(model, lr=rate)
    number = AdaFisher(twin, lr=2.0**-9)
    train(model, ours, range(2))
    train(twin, number, range(2))
    rate.mul_(0.5)
    number.param_groups[0]["lr"] *= 0.5
    train(model, ours, range(2, 4))
    train(twin, number, range(2, 4))
    assert_same_parameters(model, twin)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_maximize_is_minimising_the_negative(optimizer: type[AdaFisher], variant: str) -> None:
    model, twin = network(), network()
    up = optimizer(model, variant=variant, maximize=True, weight_decay=0.1)
    down = optimizer(twin, variant=variant, weight_decay=0.1)
    for step in range(3):
        up.zero_grad()
        down.zero_grad()
        backward(model, step)
        generator = torch.Generator().manual_seed(step)
        x, y = torch.randn(8, 2, 4, 4, generator=generator), torch.randint(3, (8,), generator=generator)
        (-nn.functional.cross_entropy(twin(x), y)).backward()
        up.step()
        down.step()
    assert_same_parameters(model, twin)


def test_zero_grad_can_keep_the_tensors() -> None:
    model, twin = network(), network()
    ours, plain = AdaFisher(model), AdaFisher(twin)
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


def test_sparse_gradient_is_refused_before_anything_changes() -> None:
    model = nn.Linear(3, 2)
    optimizer = AdaFisher(model)
    before = parameters_of(model)
    model.weight.grad = torch.ones(2, 3).to_sparse()
    model.bias.grad = torch.ones(2)
    with pytest.raises(ValueError, match=r"shape \(2, 3\) has a sparse gradient, expected a dense one"):
        optimizer.step()
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_step_hooks_run_around_the_step() -> None:
    model = nn.Linear(3, 2)
    optimizer = AdaFisher(model)
    seen: list[tuple[str, float]] = []
    optimizer.register_step_pre_hook(lambda *_: seen.append(("before", float(model.weight.detach().sum()))))
    optimizer.register_step_post_hook(lambda *_: seen.append(("after", float(model.weight.detach().sum()))))
    model(torch.randn(4, 3)).sum().backward()
    start = float(model.weight.detach().sum())
    optimizer.step()
    assert seen == [("before", start), ("after", float(model.weight.detach().sum()))]
    assert seen[0][1] != seen[1][1]


@pytest.mark.filterwarnings("ignore:Warning. Profiler clears events")
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_step_has_its_name_in_a_profile(optimizer: type[AdaFisher]) -> None:
    model = nn.Linear(3, 2)
    ours = optimizer(model)
    model(torch.randn(4, 3)).sum().backward()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        ours.step()
    names = [event.key for event in profile.key_averages()]
    assert f"Optimizer.step#{optimizer.__name__}.step" in names


# Checkpoints.


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("saved_after", [0, 1, 4])
def test_resumes_bit_for_bit(optimizer: type[AdaFisher], variant: str, saved_after: int) -> None:
    """Before the first step, and in the middle of an update interval of 3."""
    hyperparameters: dict[str, Any] = {"variant": variant, "update_interval": 3, "weight_decay": 0.01}
    model = network()
    ours = optimizer(model, **hyperparameters)
    train(model, ours, range(saved_after))
    state = ours.state_dict()
    assert only_tensors_and_numbers(state)
    stored = saved_and_loaded({"model": model.state_dict(), "optimizer": state})

    twin = network(seed=1)
    twin.load_state_dict(stored["model"])
    resumed = optimizer(twin, **hyperparameters)
    resumed.load_state_dict(stored["optimizer"])
    assert_same_state(resumed.state_dict(), state)
    for net, opt in ((model, ours), (twin, resumed)):
        train(net, opt, range(saved_after, saved_after + 5))
    assert_same_parameters(model, twin)
    assert_same_state(resumed.state_dict(), ours.state_dict())


def test_resumes_tied_weights_and_fallbacks_bit_for_bit() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.output = nn.Embedding(7, 4), nn.Linear(4, 7)
            self.output.weight = self.embedding.weight
            self.position = nn.Parameter(torch.randn(5, 4))

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.output(torch.tanh(self.embedding(x) + self.position))
            return out

    def run(model: nn.Module, optimizer: AdaFisher, steps: range) -> None:
        for step in steps:
            x = torch.randint(7, (3, 5), generator=torch.Generator().manual_seed(step))
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x).flatten(0, 1), x.flatten()).backward()
            optimizer.step()

    torch.manual_seed(0)
    model = Tied()
    with pytest.warns(UserWarning, match="fallback"):
        ours = AdaFisher(model, update_interval=3)
    run(model, ours, range(4))
    twin = Tied()
    twin.load_state_dict(model.state_dict())
    with pytest.warns(UserWarning, match="fallback"):
        resumed = AdaFisher(twin, update_interval=3)
    resumed.load_state_dict(ours.state_dict())
    run(model, ours, range(4, 9))
    run(twin, resumed, range(4, 9))
    assert_same_parameters(model, twin)


def test_loading_brings_the_hyperparameters_along() -> None:
    """As for every torch optimizer; here the variant decides which rule a layer has."""
    model = network()
    ours = AdaFisher(model, variant="release", update_interval=2, lr=0.01, weight_decay=0.1)
    train(model, ours, range(3))
    twin = network(seed=1)
    twin.load_state_dict(model.state_dict())
    resumed = AdaFisher(twin)
    resumed.load_state_dict(ours.state_dict())
    assert resumed.param_groups[0]["variant"] == "release"
    train(model, ours, range(3, 7))
    train(twin, resumed, range(3, 7))
    assert_same_parameters(model, twin)


def test_loading_drops_pending_statistics() -> None:
    model, twin = network(), network()
    ours, plain = AdaFisher(model), AdaFisher(twin)
    state = ours.state_dict()
    backward(model, 99)
    ours.load_state_dict(state)
    for p in model.parameters():
        p.grad = None  # by hand, so that only loading can have dropped them
    model.load_state_dict(twin.state_dict())
    train(model, ours, range(2))
    train(twin, plain, range(2))
    assert_same_parameters(model, twin)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(
    ("dtype", "wide"),
    [(torch.float64, torch.float64), (torch.bfloat16, torch.float32), (torch.float16, torch.float32)],
)
def test_resumes_on_another_dtype_without_losing_precision(dtype: torch.dtype, wide: torch.dtype, variant: str) -> None:
    model = network()
    ours = AdaFisher(model, variant=variant, update_interval=3)
    train(model, ours, range(4))
    twin = network(seed=1)
    twin.load_state_dict(model.state_dict())
    twin = twin.to(dtype)
    resumed = AdaFisher(twin, variant=variant, update_interval=3)
    resumed.load_state_dict(ours.state_dict())
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        for name, value in ours.state[p].items():
            loaded = resumed.state[q][name]
            assert loaded.dtype == (torch.float32 if name == "step" else wide)
            assert torch.equal(loaded.double(), value.double())
    train(twin, resumed, range(4, 8))
    assert all(bool(p.isfinite().all()) for p in twin.parameters())
    assert all(p.dtype == dtype for p in twin.parameters())


def test_loading_neither_changes_nor_keeps_what_it_is_given() -> None:
    model, twin = network(), network()
    ours, resumed = AdaFisher(model, lr=torch.tensor(1e-3)), AdaFisher(twin, lr=torch.tensor(1e-3))
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


def test_state_of_other_groups_is_refused() -> None:
    state = AdaFisher(nn.Linear(2, 2)).state_dict()
    with pytest.raises(ValueError, match="loaded state dict contains a parameter group"):
        AdaFisher(nn.Linear(2, 2, bias=False)).load_state_dict(state)


@pytest.mark.parametrize("flatten", [False, True])
@pytest.mark.parametrize("variant", VARIANTS)
def test_distributed_checkpoint_of_one_process(variant: str, flatten: bool) -> None:
    options = StateDictOptions(flatten_optimizer_state_dict=flatten)
    model = network()
    ours = AdaFisher(model, variant=variant, update_interval=3)
    train(model, ours, range(4))
    stored = saved_and_loaded(get_optimizer_state_dict(model, ours, options=options))
    twin = network(seed=1)
    twin.load_state_dict(model.state_dict())
    resumed = AdaFisher(twin, variant=variant, update_interval=3)
    set_optimizer_state_dict(twin, resumed, stored, options=options)
    train(model, ours, range(4, 9))
    train(twin, resumed, range(4, 9))
    assert_same_parameters(model, twin)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_first_step_with_zero_gradients_leaves_the_model_alone(optimizer: type[AdaFisher], variant: str) -> None:
    """As checkpoint tools make the state of a fresh optimizer: there are no statistics, and curvature 1 is no 0 / 0."""
    model = network()
    before = parameters_of(model)
    ours = optimizer(model, variant=variant)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    ours.step()
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    report = ours.metrics()
    rate = pytest.approx(ours.param_groups[0]["lr"])
    assert all(row["smallest_step"] == rate and row["largest_step"] == rate for row in report.values())
    assert all(bool(v.isfinite().all()) for entries in ours.state_dict()["state"].values() for v in entries.values())


# Groups in mid-run.


def test_group_added_in_mid_run_is_trained_and_watched() -> None:
    model = network()
    head, backbone = list(model[6].parameters()), list(model[:6].parameters())
    optimizer = AdaFisher(model, params=[{"params": head}])
    before = parameters_of(model)
    train(model, optimizer, range(2))
    assert [row.name for row in optimizer.explain()] == ["6.weight", "6.bias"]
    assert all(torch.equal(p, before[f"{name}"]) for name, p in model.named_parameters() if not name.startswith("6."))

    optimizer.add_param_group({"params": backbone, "lr": 1e-3})
    train(model, optimizer, range(2, 3))
    rows = {row.name: row for row in optimizer.explain()}
    assert rows["0.weight"].rule == "conv"
    assert (rows["6.weight"].group, rows["0.weight"].group) == (0, 1)
    assert all(not torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert "input_factor" in optimizer.state[model[0].weight]
    assert float(optimizer.state[model[0].weight]["step"]) == 1
    assert float(optimizer.state[model[6].weight]["step"]) == 3


def test_group_added_between_backward_and_step_keeps_what_was_collected() -> None:
    """A Linear of its own, so that nothing that is added can touch it."""

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.one, self.other = nn.Linear(3, 2), nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.one(x) + self.other(x)
            return out

    x = torch.randn(5, 3)
    models = Two(), Two()
    for model, adds in zip(models, (True, False), strict=True):
        optimizer = AdaFisher(model, params=[{"params": model.one.parameters()}])
        model(x).square().sum().backward()
        if adds:
            optimizer.add_param_group({"params": model.other.parameters()})
        optimizer.step()
    assert_same_parameters(models[0].one, models[1].one)


def test_bad_group_is_refused_and_not_added() -> None:
    model = network()
    optimizer = AdaFisher(model, params=[{"params": model[0].parameters()}])
    with pytest.raises(ValueError, match="gamma is 2, expected 0 <= gamma < 1"):
        optimizer.add_param_group({"params": model[4].parameters(), "gamma": 2})
    assert len(optimizer.param_groups) == 1
    train(model, optimizer, range(2))


def test_group_whose_layer_is_refused_is_not_added() -> None:
    model = nn.Sequential(nn.Embedding(5, 3, sparse=True), nn.Linear(3, 2))
    optimizer = AdaFisher(model, params=[{"params": model[1].parameters()}])
    with pytest.raises(ValueError, match="sparse=True"):
        optimizer.add_param_group({"params": model[0].parameters()})
    assert len(optimizer.param_groups) == 1
    assert [row.name for row in optimizer.explain()] == ["1.weight", "1.bias"]


def test_group_of_a_foreign_parameter_is_a_fallback() -> None:
    model, foreign = nn.Linear(30, 20), nn.Parameter(torch.ones(2))
    optimizer = AdaFisher(model)
    optimizer.add_param_group({"params": [foreign]})
    row = optimizer.explain()[-1]
    assert (row.name, row.fallback, row.group) == ("param_groups[1]['params'][0]", True, 1)
    model(torch.randn(4, 30)).mul(foreign.sum()).sum().backward()
    optimizer.step()
    assert not torch.equal(foreign, torch.ones(2))


def test_group_settings_can_change_between_steps() -> None:
    model, twin = network(dtype=torch.float64), network(dtype=torch.float64)
    ours, naive = AdaFisher(model), NaiveAdaFisher(twin)
    for step in range(6):
        for groups in (ours.param_groups, naive.groups):
            if step == 2:
                groups[0].update(update_interval=2, damping=0.01, beta=0.5, weight_decay=0.1)
        train(model, ours, range(step, step + 1))
        naive.zero_grad()
        backward(twin, step)
        naive.step()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-9 * float(q.detach().abs().max()))


# Reports.


def test_explain_has_a_row_for_every_parameter() -> None:
    model = nn.Sequential(nn.Conv1d(2, 4, 3), nn.PReLU(), nn.Flatten(), nn.Linear(16, 3), nn.BatchNorm1d(3))
    model[3].bias.requires_grad_(False)
    with pytest.warns(UserWarning, match=r"1% of the trained parameters have no layer rule.*\(1\.weight\)"):
        optimizer = AdaFisher(model)
    rows = {row.name: row for row in optimizer.explain()}
    assert list(rows) == [name for name, _ in model.named_parameters()]
    assert {name: row.rule for name, row in rows.items()} == {
        "0.weight": "conv",
        "0.bias": "conv",
        "1.weight": "fallback",
        "3.weight": "linear",
        "3.bias": "linear",
        "4.weight": "norm",
        "4.bias": "norm",
    }
    assert [row.name for row in rows.values() if row.frozen] == ["3.bias"]
    assert [row.name for row in rows.values() if row.fallback] == ["1.weight"]
    assert rows["0.weight"].shape == (4, 2, 3)
    assert "input factor (7)" in rows["0.weight"].detail
    assert "output factor (4)" in rows["0.weight"].detail
    assert "median" in rows["1.weight"].detail
    assert all(row.state_bytes == 0 for row in rows.values())

    model(torch.randn(5, 2, 6)).square().sum().backward()
    optimizer.step()
    rows = {row.name: row for row in optimizer.explain()}
    moment_and_step, average_weight = {n: 4 * (p.numel() + 1) for n, p in model.named_parameters()}, 4
    assert rows["0.weight"].state_bytes == moment_and_step["0.weight"] + 4 * (7 + 4) + average_weight
    assert rows["3.weight"].state_bytes == moment_and_step["3.weight"] + 4 * (17 + 3) + average_weight
    assert rows["0.bias"].state_bytes == moment_and_step["0.bias"]
    assert rows["3.bias"].state_bytes == 0


def test_explain_prints_a_table() -> None:
    model = nn.Sequential(nn.Linear(30, 20), nn.PReLU())
    model[0].bias.requires_grad_(False)
    text = str(AdaFisher(model).explain())
    lines = text.splitlines()
    assert "parameter" in text
    assert any("0.weight" in line and "20 x 30" in line and "linear" in line for line in lines)
    assert any("0.bias" in line and "linear, frozen" in line for line in lines)
    assert any("1.weight" in line and "fallback" in line for line in lines)
    assert max(map(len, lines)) <= 120


@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("variant", VARIANTS)
def test_metrics_are_figures_of_the_curvature(variant: str, maximize: bool) -> None:
    model, twin = network(dtype=torch.float64), network(dtype=torch.float64)
    hyperparameters: dict[str, Any] = {"variant": variant, "lr": 1e-3, "update_interval": 2, "maximize": maximize}
    ours, naive = AdaFisher(model, **hyperparameters), NaiveAdaFisher(twin, **hyperparameters)
    assert ours.metrics() == {}
    for step in range(4):
        train(model, ours, range(step, step + 1))
        naive.zero_grad()
        backward(twin, step)
        naive.step()
    report = ours.metrics()
    assert list(report) == [name for name, _ in model.named_parameters()]
    for name, p in twin.named_parameters():
        curvature, moment = naive.curvature(p), naive.moments[id(p)]
        assert p.grad is not None
        gradient = -p.grad if maximize else p.grad
        direction = (moment / curvature).flatten()
        expected = {
            "damping_share": float((naive.groups[0]["damping"] / curvature).mean()),
            "smallest_step": 1e-3 / float(curvature.max()),
            "largest_step": 1e-3 / float(curvature.min()),
            "cosine_with_sgd": float(direction @ gradient.flatten() / direction.norm() / gradient.norm()),
            "skipped_elements": 0.0,
            "refused_statistics": 0.0,
        }
        assert report[name] == pytest.approx(expected, rel=1e-8), name


def test_cosine_of_a_tiny_gradient_is_no_smaller() -> None:
    """The relative variant does not depend on the scale of the loss, and neither does an angle."""
    cosines = []
    for scale in (1.0, 2.0**-40):
        torch.manual_seed(0)
        model = nn.Linear(5, 4)
        optimizer = AdaFisher(model, variant="relative")
        (model(torch.randn(6, 5)).square().sum() * scale).backward()
        optimizer.step()
        cosines.append(optimizer.metrics()["weight"]["cosine_with_sgd"])
    assert cosines[1] == pytest.approx(cosines[0], rel=1e-5)
    assert cosines[0] > 0.3


def test_metrics_count_what_was_skipped_and_refused() -> None:
    model = nn.Linear(3, 2)
    optimizer = AdaFisher(model)
    x = torch.randn(4, 3)
    x[0, 1] = math.nan
    model(x).square().sum().backward()
    optimizer.step()
    row = optimizer.metrics()["weight"]
    assert row["refused_statistics"] == 1
    assert row["skipped_elements"] == 6
    assert bool(model.weight.isfinite().all())


# The life of the hooks.


def test_close_removes_the_hooks_for_good() -> None:
    model = network()
    optimizer = AdaFisher(model, update_interval=3)
    assert hooks(model) == 5
    train(model, optimizer, range(2))
    optimizer.close()
    assert hooks(model) == 0
    train(model, optimizer, range(2, 3))
    with pytest.warns(UserWarning, match="closed"):
        train(model, optimizer, range(3, 4))
    optimizer.close()
    optimizer.load_state_dict(optimizer.state_dict())
    assert hooks(model) == 0
    train(model, optimizer, range(4, 5))


def test_closed_optimizer_stays_closed_when_a_group_is_added() -> None:
    model = network()
    optimizer = AdaFisher(model, params=[{"params": model[4:].parameters()}])
    optimizer.close()
    optimizer.add_param_group({"params": model[:4].parameters()})
    assert hooks(model) == 0


def test_collection_of_the_optimizer_removes_the_hooks() -> None:
    model = network()
    optimizer = AdaFisher(model)
    train(model, optimizer, range(2))
    assert hooks(model) == 5
    del optimizer
    gc.collect()
    assert hooks(model) == 0


def test_two_optimizers_on_one_model_do_not_meet() -> None:
    model, twin = network(), network()
    first = AdaFisher(model, params=[{"params": model[:4].parameters()}])
    second = AdaFisher(model, params=[{"params": model[4:].parameters()}], update_interval=2)
    halves = AdaFisher(
        twin,
        params=[{"params": twin[:4].parameters()}, {"params": twin[4:].parameters(), "update_interval": 2}],
    )
    for step in range(4):
        first.zero_grad()
        second.zero_grad()
        backward(model, step)
        first.step()
        second.step()
        train(twin, halves, range(step, step + 1))
    assert_same_parameters(model, twin)
    first.close()
    assert hooks(model) == 3


# Does it train.


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize(("variant", "lr"), [("paper", 0.01), ("release", 1e-3), ("relative", 0.3)])
def test_learns_a_linear_classifier(optimizer: type[AdaFisher], variant: str, lr: float) -> None:
    torch.manual_seed(0)
    x = torch.randn(256, 10) * torch.logspace(-1, 0.5, 10)
    y = (x @ torch.randn(10, 3)).argmax(1)
    model = nn.Linear(10, 3)
    ours = optimizer(model, lr, variant=variant, update_interval=1)
    for _ in range(100):
        ours.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        ours.step()
    assert float((model(x).argmax(1) == y).float().mean()) > 0.95


@pytest.mark.parametrize(("variant", "lr"), [("paper", 0.05), ("release", 0.05), ("relative", 0.3)])
def test_reaches_the_minimum_of_a_quadratic(variant: str, lr: float) -> None:
    """Least squares without noise: the solution is exact, and momentum must not circle it."""
    torch.manual_seed(0)
    x = torch.randn(64, 4, dtype=torch.float64) * torch.tensor([0.5, 1.0, 1.5, 2.0])
    truth = torch.randn(3, 4, dtype=torch.float64)
    model = nn.Linear(4, 3, bias=False).double()
    optimizer = AdaFisher(model, lr, variant=variant, update_interval=1, damping=0.3)
    for _ in range(300):
        optimizer.zero_grad()
        (model(x) - x @ truth.T).square().mean().backward()
        optimizer.step()
    torch.testing.assert_close(model.weight.detach(), truth, rtol=1e-3, atol=1e-3)
