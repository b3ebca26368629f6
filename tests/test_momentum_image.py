"""The image of the momentum that K-FAC and EKFAC carry on between renewals: the dense product, or nothing."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import functional as F

from fisher_kernels import EKFAC, KFAC
from fisher_kernels.curvature.factor_rules import Context, Factoring, LinearFactors
from fisher_kernels.optim import momentum_image
from fisher_kernels.optim.momentum_image import HOLDS, IMAGE, MomentumImages
from tests.small_network import assert_same_parameters, assert_same_state, parameters_of, saved_and_loaded

pytestmark = pytest.mark.usefixtures("one_thread")

every_kind = pytest.mark.parametrize("kind", [KFAC, EKFAC])

TURNS: dict[str, Any] = {"refresh": "constant", "update_interval": 2, "inverse_interval": 4}
"""Turns are in steps 0, 4 and 8. The first image is of the momentum of step 1, and goes on in 2, 3, 5, 6, 7 and 9."""

MOMENTUM = 0.9


@pytest.fixture(autouse=True)
def small_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let layers have images that are too small to gain anything."""
    monkeypatch.setattr(momentum_image, "LEAST", 0)


@pytest.fixture
def went_on(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """For each image that rows were there for, in order, whether they were those of the gradient."""
    found: list[bool] = []
    advance = MomentumImages._advance

    def record(self: MomentumImages, *args: Any) -> bool:
        found.append(advance(self, *args))
        return found[-1]

    monkeypatch.setattr(MomentumImages, "_advance", record)
    return found


class Twice(nn.Module):
    """One layer that is used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(24, 24)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layer(torch.tanh(self.layer(x)))
        return out


def linear(bias: bool = True) -> nn.Module:
    return nn.Sequential(nn.Linear(24, 20, bias=bias), nn.Tanh(), nn.Linear(20, 24, bias=bias))


def convolutional() -> nn.Module:
    return nn.Sequential(nn.Conv2d(4, 20, 3), nn.Tanh(), nn.Flatten(), nn.Linear(80, 20))


LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], dict[str, Any]]] = {
    "linear": (linear, (5, 24), {}),
    "without bias": (lambda: linear(bias=False), (5, 24), {}),
    "sequences": (linear, (2, 3, 24), {}),
    "sequences, reduced": (linear, (2, 3, 24), {"sequence": "reduce"}),
    "one row": (linear, (24,), {}),
    "convolution": (convolutional, (2, 4, 4, 4), {}),
    "twice": (Twice, (4, 24), {}),
    "a diagonal factor": (linear, (4, 24), {"max_factor_size": 22}),
    "maximize": (linear, (5, 24), {"maximize": True}),
    "decay": (linear, (5, 24), {"weight_decay": 0.1}),
}


def built(name: str = "linear", dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(0)
    return LAYERS[name][0]().to(dtype)


def batch(step: int, shape: tuple[int, ...] = (5, 24), dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(step), dtype=torch.float64).to(dtype)


def loss_of(model: nn.Module, x: Tensor) -> Tensor:
    return (model(x) - 1).square().sum(-1).mean()


def step_with(
    model: nn.Module, optimizer: KFAC, step: int, shape: tuple[int, ...] = (5, 24), dtype: torch.dtype = torch.float64
) -> None:
    optimizer.zero_grad()
    loss_of(model, batch(step, shape, dtype)).backward()
    optimizer.step()


def images_of(optimizer: KFAC) -> dict[int, Tensor]:
    """Those that are in use."""
    return {i: state[IMAGE] for i, state in optimizer.state_dict()["state"].items() if state.get(HOLDS, 0)}


def assert_as_dense(optimizer: KFAC) -> int:
    """Every image is the product it stands for; returns how many there are.

    A product of n terms is off by n eps of the product of their norms at most. There are four of them, and the image
    adds up those of 1 / (1 - momentum) steps.
    """
    images = 0
    for pair in optimizer._factors.pairs:
        if not optimizer.state[pair.owner].get(HOLDS, 0):
            continue
        image = optimizer.state[pair.owner][IMAGE]
        matrices = pair.matrices(lambda p: optimizer.state[p]["momentum_buffer"])
        left, right = optimizer._factors.sides(pair)
        norms = math.prod(float(x.norm()) for x in (left, matrices, right))
        terms = 2 * sum(matrices.shape) / (1 - MOMENTUM)
        expected = optimizer._factors.image(pair, matrices)
        assert float((image - expected).norm()) <= terms * torch.finfo(image.dtype).eps * norms
        images += 1
    return images


@every_kind
@pytest.mark.parametrize("name", LAYERS)
def test_it_is_the_product_of_all_of_the_momentum(name: str, kind: type[KFAC], went_on: list[bool]) -> None:
    _, shape, settings = LAYERS[name]
    model, twin = built(name), built(name)
    optimizer = kind(model, **TURNS, **settings)
    dense = kind(twin, **TURNS, **settings, directions="dense")
    for step in range(10):
        step_with(model, optimizer, step, shape)
        images = assert_as_dense(optimizer)
        if step >= 4:  # bases of singular factors are made anew, which differ in what they make of rounding
            continue
        step_with(twin, dense, step, shape)
        for p, q in zip(model.parameters(), twin.parameters(), strict=True):
            # Rounding of four steps times the condition of the factors, whose traces over the root of the damping are
            # below 1e4.
            torch.testing.assert_close(p, q, rtol=1e-10, atol=1e-10)
    layers = len(optimizer._factors.pairs)
    assert images == layers
    assert went_on == [True] * 6 * layers  # in steps 2, 3, 5, 6, 7, 9
    assert not images_of(dense)


def clip(model: nn.Module) -> None:
    nn.utils.clip_grad_norm_(model.parameters(), 0.01)


def shrink(model: nn.Module) -> None:
    for number, module in enumerate(m for m in model.modules() if isinstance(m, nn.Linear)):
        for p in module.parameters():
            assert p.grad is not None
            p.grad *= -0.5 - number


@pytest.mark.parametrize("treat", [clip, shrink])
def test_gradients_that_were_scaled(treat: Callable[[nn.Module], None], went_on: list[bool]) -> None:
    model = built()
    optimizer = KFAC(model, **TURNS)
    for step in range(8):
        optimizer.zero_grad()
        loss_of(model, batch(step)).backward()
        treat(model)
        optimizer.step()
        assert_as_dense(optimizer)
    assert went_on == [True] * 10


def test_a_gradient_scaler_and_a_step_it_skips(went_on: list[bool]) -> None:
    model = built()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=2)
    optimizer = KFAC(model, **TURNS, grad_scaler=scaler)
    for step in range(8):
        optimizer.zero_grad()
        loss = loss_of(model, batch(step))
        scaler.scale(loss * (math.inf if step == 5 else 1)).backward()
        scaler.step(optimizer)
        scaler.update()
        assert_as_dense(optimizer)
    assert went_on == [True] * 8  # the group takes seven steps


def test_micro_batches_and_what_comes_between(went_on: list[bool]) -> None:
    """Rows live as long as the gradient, and only those count that are part of it."""
    model = built()
    optimizer = KFAC(model, **TURNS)
    for step in range(8):
        loss_of(model, batch(100 + step)).backward()
        if step % 2:
            optimizer.zero_grad()
        else:
            model.zero_grad()
        for part in batch(step).split(2):
            (loss_of(model, part) / 3).backward()
            torch.autograd.grad(loss_of(model, part), list(model.parameters()))
            with torch.no_grad():
                model(part)
            model(part)
        optimizer.step()
        assert_as_dense(optimizer)
        model.zero_grad()
    assert went_on == [True] * 10


def test_a_graph_that_is_gone_through_twice(went_on: list[bool]) -> None:
    model = built()
    optimizer = KFAC(model, **TURNS)
    for step in range(8):
        optimizer.zero_grad()
        loss = loss_of(model, batch(step, (3, 24)))
        loss.backward(retain_graph=True)
        loss.backward()
        optimizer.step()
        assert_as_dense(optimizer)
    assert went_on == [True] * 10


def test_a_backward_of_drawn_labels_is_not_the_losss(went_on: list[bool]) -> None:
    model = built()
    optimizer = KFAC(model, **TURNS, fisher="sampled")
    for step in range(8):
        optimizer.zero_grad()
        out = model(batch(step))
        optimizer.sample(out)
        F.cross_entropy(out, torch.arange(5)).backward()
        optimizer.step()
        assert_as_dense(optimizer)
    assert went_on == [True] * 10


# What is noticed.


def one_element(model: Any, step: int) -> Tensor:
    g = model[0].weight.grad
    g[3, 4] += 1e-9 * float(g.norm())
    return torch.zeros((), dtype=torch.float64)


def bias_alone(model: Any, step: int) -> Tensor:
    model[0].bias.grad *= 0.5
    return torch.zeros((), dtype=torch.float64)


def swapped_columns(model: Any, step: int) -> Tensor:
    model[0].weight.grad[:, :2] = model[0].weight.grad[:, :2].flip(1).clone()
    return torch.zeros((), dtype=torch.float64)


def penalty(model: Any, step: int) -> Tensor:
    penalty: Tensor = 1e-6 * model[0].weight.square().sum()
    penalty.backward()
    return penalty


def input_written_to(model: Any, step: int) -> Tensor:
    optimizer_input = model.seen
    with torch.no_grad():
        optimizer_input[0, 0] += 1
    return torch.zeros((), dtype=torch.float64)


@every_kind
@pytest.mark.parametrize("change", [one_element, bias_alone, swapped_columns, penalty, input_written_to])
def test_another_gradient_is_noticed(
    change: Callable[[Any, int], Tensor], kind: type[KFAC], went_on: list[bool]
) -> None:
    model = built()
    optimizer = kind(model, **TURNS)
    for step in range(8):
        optimizer.zero_grad()
        x = batch(step)
        loss_of(model, x).backward()
        model.seen = x  # type: ignore[assignment]
        change(model, step)
        optimizer.step()
        assert assert_as_dense(optimizer) == (2 if step else 0)
    assert went_on == [False, True] * 5  # that of the first layer alone is another one


def test_a_hook_on_the_gradient_and_a_second_use_are_noticed(went_on: list[bool]) -> None:
    model: Any = built()
    optimizer = KFAC(model, **TURNS)
    model[0].weight.register_hook(lambda g: g.clamp(-0.01, 0.01))
    for step in range(8):
        optimizer.zero_grad()
        x = batch(step)
        (loss_of(model, x) + F.linear(x[:, :20], model[2].weight).square().mean()).backward()
        optimizer.step()
        assert_as_dense(optimizer)
    assert went_on == [False] * 10


def test_elements_that_stay(went_on: list[bool]) -> None:
    model: Any = built()
    optimizer = KFAC(model, **TURNS)
    for step in range(8):
        optimizer.zero_grad()
        loss_of(model, batch(step)).backward()
        if step == 2:
            model[0].weight.grad[1, 2] = math.nan
        optimizer.step()
        assert assert_as_dense(optimizer) == (0 if step == 0 else 1 if step == 2 else 2)
    assert went_on == [True] + [True] + [True] * 6  # step 2: the second layer; step 3: likewise; then both


@pytest.mark.parametrize("what", ["momentum_buffer", "row_inverse", "another buffer"])
def test_a_state_that_was_written_to_is_noticed(what: str, went_on: list[bool]) -> None:
    model: Any = built()
    optimizer = KFAC(model, **TURNS)
    for step in range(4):
        if step == 3:
            state = optimizer.state[model[0].weight]
            if what == "another buffer":
                state["momentum_buffer"] = 2 * state["momentum_buffer"]
            else:
                state[what].mul_(2)
        step_with(model, optimizer, step)
        assert_as_dense(optimizer)
    assert went_on == [True] * 3


def test_a_step_that_ends_in_an_error_leaves_no_image(monkeypatch: pytest.MonkeyPatch) -> None:
    model = built()
    optimizer = KFAC(model, **TURNS)
    for step in range(3):
        step_with(model, optimizer, step)
    with monkeypatch.context() as patched:
        patched.setattr(KFAC, "_observe", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            step_with(model, optimizer, 3)
    assert not images_of(optimizer)
    step_with(model, optimizer, 3)
    assert assert_as_dense(optimizer) == 2


def test_a_momentum_that_changes(went_on: list[bool]) -> None:
    model = built()
    optimizer = KFAC(model, **TURNS)
    for step in range(8):
        optimizer.param_groups[0]["momentum"] = (0.9, 0.5, 0.0, 0.7)[step % 4]
        step_with(model, optimizer, step)
        assert_as_dense(optimizer)
    assert went_on == [True] * 10


# Where there is none.


def test_a_bias_that_is_frozen_or_has_settings_of_its_own() -> None:
    for own, images in (({"lr": 0.01}, 2), ({"momentum": 0.5}, 0), ({"weight_decay": 0.1, "decoupled": False}, 0)):
        model: Any = built()
        weights, biases = [model[0].weight, model[2].weight], [model[0].bias, model[2].bias]
        optimizer = KFAC(model, **TURNS, params=[{"params": weights}, {"params": biases, **own}])
        for step in range(6):
            step_with(model, optimizer, step)
        assert assert_as_dense(optimizer) == images
    model = built()
    model[0].bias.requires_grad_(False)
    optimizer = KFAC(model, **TURNS)
    for step in range(6):
        step_with(model, optimizer, step)
    assert assert_as_dense(optimizer) == 1


def test_many_rows_are_not_kept() -> None:
    model = built()
    optimizer = KFAC(model, **TURNS)
    for step in range(5):
        step_with(model, optimizer, step)
    assert len(images_of(optimizer)) == 2
    assert optimizer._images is not None
    optimizer.zero_grad()
    for part in batch(5, (64, 24)).split(4):  # 7 are of use
        loss_of(model, part).backward()
        assert all(len(pending.pieces) <= 1 for pending in optimizer._images.rows._pending.values())
    optimizer.step()
    assert not images_of(optimizer)
    step_with(model, optimizer, 6)
    assert len(images_of(optimizer)) == 2
    step_with(model, optimizer, 7, (64, 24))
    assert not images_of(optimizer)


def test_nothing_is_kept_beyond_the_step() -> None:
    model = built()
    optimizer = KFAC(model, **TURNS)
    step_with(model, optimizer, 0)
    hidden: list[StorageWeakRef] = []
    model[1].register_forward_hook(  # type: ignore[index]
        lambda module, args, out: hidden.append(StorageWeakRef(out.untyped_storage()))
    )
    optimizer.zero_grad()
    out = model(batch(1))
    out.square().mean().backward()
    assert not hidden[0].expired()
    optimizer.step()
    assert hidden[0].expired()
    assert out.grad_fn is not None
    optimizer.close()
    assert not any(module._forward_hooks for module in model[:1])  # type: ignore[index]


def test_several_processes_have_none() -> None:
    model = built()
    optimizer = KFAC(model, **TURNS)
    images = optimizer._images
    assert images is not None
    images._statistics = SimpleNamespace(processes=SimpleNamespace(count=2))  # type: ignore[assignment]
    for step in range(4):
        step_with(model, optimizer, step)
    assert optimizer._images is images
    assert not images_of(optimizer)


def test_a_compiled_model_has_none_and_is_not_compiled_again() -> None:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    model = built()
    optimizer = KFAC(model, **TURNS)
    compiled = torch.compile(model, backend=counter)
    for step in range(6):
        optimizer.zero_grad()
        loss_of(compiled, batch(step)).backward()
        optimizer.step()
    assert counter.frame_count <= 2
    assert not images_of(optimizer)


# Going on.


@every_kind
@pytest.mark.parametrize(
    "schedule",
    [{}, {"overlap": True}, {"update_interval": 4, "inverse_interval": 3}, {"refresh": "ramp", "ramp": 4}],
    ids=["plain", "overlap", "turns with nothing new", "ramp"],
)
def test_a_state_that_is_loaded_goes_on_to_the_bit(schedule: dict[str, Any], kind: type[KFAC]) -> None:
    settings = {**TURNS, **schedule}
    model = built(dtype=torch.float32)
    optimizer = kind(model, **settings)
    saved = []
    for step in range(10):
        saved.append((copy.deepcopy(model.state_dict()), saved_and_loaded(optimizer.state_dict())))
        step_with(model, optimizer, step, dtype=torch.float32)
    assert len(images_of(optimizer)) == 2
    for begin, (weights, state) in enumerate(saved):
        twin = built(dtype=torch.float32)
        twin.load_state_dict(weights)
        other = kind(twin, **settings)
        other.load_state_dict(state)
        for step in range(begin, 10):
            step_with(twin, other, step, dtype=torch.float32)
        assert_same_parameters(model, twin)
        assert_same_state(other.state_dict(), optimizer.state_dict())


def test_a_copy_goes_on_to_the_bit() -> None:
    model = built()
    optimizer = KFAC(model, **TURNS)
    for step in range(3):
        step_with(model, optimizer, step)
    twin, other = copy.deepcopy((model, optimizer))
    for step in range(3, 8):
        step_with(model, optimizer, step)
        step_with(twin, other, step)
    assert_same_parameters(model, twin)
    assert_same_state(other.state_dict(), optimizer.state_dict())


def test_random_numbers_of_torch_are_left_alone() -> None:
    model = built()
    optimizer = KFAC(model, **TURNS)
    before = torch.get_rng_state()
    for step in range(4):
        step_with(model, optimizer, step)
    assert torch.equal(torch.get_rng_state(), before)


def test_dense_is_as_it_always_was(monkeypatch: pytest.MonkeyPatch) -> None:
    """It makes the same of the momentum as where no layer is large enough."""
    model, twin = built(), built()
    dense = KFAC(model, **TURNS, directions="dense")
    monkeypatch.setattr(momentum_image, "LEAST", math.inf)
    plain = KFAC(twin, **TURNS)
    for step in range(6):
        step_with(model, dense, step)
        step_with(twin, plain, step)
    assert parameters_of(model).keys() == parameters_of(twin).keys()
    assert_same_parameters(model, twin)


# The bound.


def gradient_and_rows(rows: int, outputs: int, inputs: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Of a layer behind a ReLU, with rows that are alike, in float32."""
    generator = torch.Generator().manual_seed(seed)
    read = torch.randn(inputs, generator=generator) + 0.3 * torch.randn(rows, inputs, generator=generator)
    made = torch.randn(outputs, generator=generator) + 0.3 * torch.randn(rows, outputs, generator=generator)
    read = F.pad(read.relu(), (0, 1), value=1.0)
    return made.T @ read, made, read


def scale_of(gradient: Tensor, made: Tensor, read: Tensor, step: int) -> float | None:
    weight, bias = nn.Parameter(gradient[:, :-1].clone()), nn.Parameter(gradient[:, -1].clone())
    weight.grad, bias.grad = gradient[:, :-1], gradient[:, -1]
    shape = (gradient.shape[0], gradient.shape[1] - 1)
    rule = LinearFactors(Factoring("expand", "mean", 4096, False), Context(), shape, True, False)
    pair: Any = SimpleNamespace(params=(weight, bias), rule=rule, owner=weight, number=0)
    images = object.__new__(MomentumImages)
    images._groups, images._pairs, images._drawn = {weight: {"iteration": step}}, {0: pair}, None
    return images._scale_of(pair, made, read)


@pytest.mark.parametrize("sizes", [(1, 30, 20), (32, 250, 500), (100, 500, 250), (300, 64, 1000)])
def test_rounding_passes_and_what_is_larger_does_not(sizes: tuple[int, int, int]) -> None:
    for seed in range(20):
        gradient, made, read = gradient_and_rows(*sizes, seed)
        scale = scale_of(0.37 * gradient, made, read, seed)
        assert scale is not None
        assert abs(scale - 0.37) < 1e-5
        in_order = sum((torch.outer(s, h) for s, h in zip(made, read, strict=True)), torch.zeros_like(gradient))
        assert scale_of(in_order, made, read, seed) is not None
        other = gradient.clone()
        other[3, 5] += 1e-3 * float(gradient[3].norm())
        assert scale_of(other, made, read, seed) is None
        assert scale_of(gradient + 1e-3 * torch.randn_like(gradient) * gradient.std(), made, read, seed) is None
    assert scale_of(torch.zeros_like(gradient), made, read, 0) == 0
    assert scale_of(gradient, torch.zeros_like(made), read, 0) is None
    assert scale_of(gradient * math.nan, made, read, 0) is None


def test_bad_settings_are_refused() -> None:
    with pytest.raises(ValueError, match="directions is 'sparse', expected one of 'auto', 'dense'"):
        KFAC(built(), directions="sparse")  # type: ignore[arg-type]
