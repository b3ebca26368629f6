"""Training in bfloat16: parameters and moments that are rounded at random."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from fisher_kernels import EKFAC, KFAC, MBF, SOFIM, AdaFisher, AdaFisherW, EKFACAdam
from fisher_kernels.ops import stochastic_round
from fisher_kernels.optim.row_pieces import index_of
from fisher_kernels.optim.shares import whole
from tests.comparison import assert_same_bits, assert_within
from tests.shards import making
from tests.threads import in_threads

pytestmark = pytest.mark.usefixtures("one_thread")

ROUNDED: dict[str, Any] = {"lr": 1e-3, "moment_dtype": torch.bfloat16, "stochastic_rounding": True}


def network() -> nn.Module:
    """A grouped convolution is stepped in pieces where it is divided."""
    torch.manual_seed(0)
    layers = nn.Conv2d(4, 6, 3, groups=2), nn.ReLU(), nn.Flatten(), nn.Linear(6 * 4, 5)
    return nn.Sequential(*layers).to(torch.bfloat16)


def linears() -> nn.Module:
    with making:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(7, 5), nn.Linear(5, 2))


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for i in steps:
        x = torch.randn(8, 4, 4, 4, generator=torch.Generator().manual_seed(i)).to(torch.bfloat16)
        optimizer.zero_grad()
        model(x).float().square().mean().backward()
        optimizer.step()


def parameters(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


Make = Callable[..., torch.optim.Optimizer]


def adafisher(model: nn.Module, **settings: Any) -> torch.optim.Optimizer:
    return AdaFisherW(model, **{**ROUNDED, **settings})


def sofim(model: nn.Module, **settings: Any) -> torch.optim.Optimizer:
    return SOFIM(model.parameters(), **{**ROUNDED, "lr": 0.1, **settings})


def mbf(model: nn.Module, **settings: Any) -> torch.optim.Optimizer:
    return MBF(model, **{**ROUNDED, "lr": 0.1, **settings})


def kfac(model: nn.Module, **settings: Any) -> torch.optim.Optimizer:
    return KFAC(model, **{**ROUNDED, "lr": 0.1, **settings})


def ekfac(model: nn.Module, **settings: Any) -> torch.optim.Optimizer:
    return EKFAC(model, **{**ROUNDED, "lr": 0.1, **settings})


def ekfac_adam(model: nn.Module, **settings: Any) -> torch.optim.Optimizer:
    return EKFACAdam(model, **{**ROUNDED, "lr": 1e-2, **settings})


each = pytest.mark.parametrize("make", [adafisher, sofim, mbf, kfac, ekfac, ekfac_adam])


def trained(make: Make, **settings: Any) -> Tensor:
    model = network()
    train(model, make(model, **settings), range(4))
    return parameters(model)


@pytest.mark.filterwarnings("ignore:.*closed")
def test_small_steps_are_made_on_average() -> None:
    """A thousandth of a unit in the last place: to nearest nothing ever moves, at random one weight in a thousand."""
    means = {}
    for rounded in (False, True):
        model = nn.Linear(100, 100, bias=False).to(torch.bfloat16)
        nn.init.constant_(model.weight, 1.5)
        optimizer = AdaFisher(
            model, lr=2.0**-17, beta=0.0, damping=0.0, fallback_curvature=1.0, stochastic_rounding=rounded
        )
        optimizer.close()
        for _ in range(100):
            model.weight.grad = torch.ones_like(model.weight)
            optimizer.step()
        means[rounded] = model.weight.double().mean().item() - 1.5
    # Each of 10,000 weights has taken 100 steps of 2^-17, with a deviation of sqrt(100 * 2^-17 * 2^-7).
    assert means[False] == 0
    assert means[True] == pytest.approx(-100 * 2.0**-17, abs=4 * (100 * 2.0**-24) ** 0.5 / 100)


@each
def test_resumes_bit_for_bit(make: Make) -> None:
    model = network()
    optimizer = make(model)
    train(model, optimizer, range(2))
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    other = copy.deepcopy(model)
    resumed = make(other)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    train(model, optimizer, range(2, 4))
    train(other, resumed, range(2, 4))
    assert_same_bits(parameters(other), parameters(model))
    moment = optimizer.moment  # type: ignore[attr-defined]
    assert {state[moment].dtype for state in optimizer.state.values()} == {torch.bfloat16}


def test_moments_that_are_loaded_stay_finite() -> None:
    model = nn.Linear(3, 2)
    wide = AdaFisher(model)
    model(torch.randn(4, 3)).sum().backward()
    wide.step()
    wide.state[model.weight]["exp_avg"].fill_(torch.finfo(torch.float32).max)
    other = AdaFisher(model, moment_dtype=torch.bfloat16)
    other.load_state_dict(wide.state_dict())
    largest = torch.full((2, 3), torch.finfo(torch.bfloat16).max, dtype=torch.bfloat16)
    assert_same_bits(other.state[model.weight]["exp_avg"], largest)


@each
def test_seeds_differ_and_torch_has_no_say(make: Make) -> None:
    first = trained(make)
    torch.rand(7)
    assert_same_bits(trained(make), first)
    assert bool((trained(make, seed=1) != first).any())
    assert bool((trained(make, stochastic_rounding=False) != first).any())


@each
def test_it_may_begin_in_mid_run(make: Make) -> None:
    model = network()
    optimizer = make(model, moment_dtype=None, stochastic_rounding=False)
    train(model, optimizer, range(2))
    optimizer.param_groups[0]["stochastic_rounding"] = True
    train(model, optimizer, range(2, 4))
    assert sorted(int(state["ordinal"]) for state in optimizer.state.values()) == [0, 1, 2, 3]


def test_parameters_of_equal_values_have_integers_of_their_own() -> None:
    """What a step makes of each is what the op makes of its number in the model."""
    model = nn.ParameterList([torch.full((500,), 1.5, dtype=torch.bfloat16) for _ in range(2)])
    with pytest.warns(UserWarning, match="have no layer rule"):
        optimizer = AdaFisher(model, lr=2.0**-9, beta=0.0, fallback_curvature=1.0, stochastic_rounding=True, seed=5)
    for p in model:
        p.grad = torch.ones_like(p)
    optimizer.step()
    exact = torch.full((500,), 1.5 - 2.0**-9)
    for i, p in enumerate(model):
        assert_same_bits(p.detach(), stochastic_round(exact, seed=5, ordinal=i, step=1))
    assert bool((model[0] != model[1]).any())


@pytest.mark.filterwarnings("ignore:.*closed")
@pytest.mark.parametrize("make", [mbf, kfac, ekfac, ekfac_adam])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_a_step_is_that_in_float32_rounded_by_the_op(make: Make, memory_format: torch.memory_format) -> None:
    """Gradients are numbers of bfloat16, so that the first momentum is one: what comes of it is in float32."""
    model = network().to(memory_format=memory_format)
    wide = copy.deepcopy(model).float()
    rounded, exact = make(model, seed=3), make(wide, moment_dtype=None, stochastic_rounding=False)
    moment, averages = rounded.moment, make is ekfac_adam  # type: ignore[attr-defined]
    for optimizer in (rounded, exact):
        optimizer.close()  # type: ignore[attr-defined]
    pairs = list(zip(model.parameters(), wide.parameters(), strict=True))
    for step in (1, 2):
        for i, (p, w) in enumerate(pairs):
            g = torch.randn(p.shape, generator=torch.Generator().manual_seed(10 * step + i)).to(torch.bfloat16)
            p.grad, w.grad = g, g.float()
        for optimizer in (rounded, exact):
            optimizer.step()
        for i, (p, w) in enumerate(pairs):
            of: dict[str, int] = {"seed": 3, "ordinal": i, "step": step}
            kept, expected = rounded.state[p][moment], exact.state[w][moment]
            assert_same_bits(kept, stochastic_round(expected, half="low", **of))
            if step == 1 and averages:  # the direction is made of the average as it is kept
                return
            if step == 1 or make is mbf:
                assert_same_bits(p.detach(), stochastic_round(w.detach(), **of))
            with torch.no_grad():
                w.copy_(p)


class Multiplied(nn.Module):
    """A layer whose weight lies the other way round."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 9, generator=torch.Generator().manual_seed(0)))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight


def test_blocks_of_mbf_do_not_know_the_places_of_elements() -> None:
    model = Multiplied()
    wide = copy.deepcopy(model)
    for optimizer in (rounded := MBF(model, **ROUNDED, seed=3), exact := MBF(wide, lr=1e-3)):
        optimizer._model(torch.randn(12, 6, generator=torch.Generator().manual_seed(1))).square().mean().backward()
        optimizer.step()
    kept, expected = (o.state[o._model.weight]["momentum_buffer"] for o in (rounded, exact))  # type: ignore[index]
    assert_same_bits(kept, stochastic_round(expected, seed=3, step=1, half="low"))
    assert_same_bits(model.weight.detach(), wide.weight.detach())


@pytest.mark.filterwarnings("ignore:.*closed")
def test_groups_that_are_stepped_together_round_alike() -> None:
    model = network()
    groups = [{"params": model[0].parameters()}, {"params": model[3].parameters(), "stochastic_rounding": False}]
    optimizer = kfac(model, params=groups)
    before = parameters(model).clone()
    with pytest.raises(ValueError, match="stochastic_rounding is True in some groups and False in others"):
        train(model, optimizer, range(1))
    assert_same_bits(parameters(model), before)
    wide = nn.ModuleList([network()[0], nn.Linear(3, 2)])
    groups = [{"params": wide[0].parameters()}, {"params": wide[1].parameters(), "stochastic_rounding": False}]
    optimizer = mbf(wide, params=groups, moment_dtype=None)
    for p in wide.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()  # of the second one nothing is in bfloat16
    assert [sorted(optimizer.state[p].keys() & {"step", "ordinal"}) for p in wide.parameters()] == [
        *[["ordinal", "step"]] * 2,
        *[[]] * 2,
    ]


def test_where_parts_of_a_parameter_lie_in_it() -> None:
    for shape in ((7,), (7, 5), (6, 4, 3, 3)):
        p = torch.empty(shape)
        whole = torch.arange(p.numel()).view(shape)
        for rows in (slice(0, shape[0]), slice(2, 5), slice(5, 5)):
            for columns in (slice(0, shape[1]), slice(1, 3)) if len(shape) == 2 else (None,):
                own = (rows, *(slice(0, n) for n in shape[1:]))
                own = own if columns is None else (rows, columns)
                at, there = index_of(p, own), whole[own].flatten()
                i = torch.arange(len(there))
                assert_same_bits(at.offset + i // at.run * at.pitch + i % at.run, there, f"{own} of {shape}")
    assert index_of(torch.empty(()), ()) == (0, 1, 1)


@each
def test_sharded_parameters_have_the_integers_of_whole_ones(make: Make) -> None:
    """In one process, where all sums are the same to the bit; the path is that of many."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        model = network()
        fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
        optimizer = make(model)
        train(model, optimizer, range(4))
        wide = make(model, moment_dtype=None)
        wide.load_state_dict(optimizer.state_dict())
        optimizer.load_state_dict(wide.state_dict())
        found = torch.cat([p.detach().full_tensor().flatten() for p in model.parameters()])  # type: ignore[attr-defined]
    finally:
        dist.destroy_process_group()
    assert_same_bits(found, trained(make))


def test_the_norm_over_shards_is_that_of_one_process() -> None:
    """Of moments as each process rounds its own: to nearest they would be off by a thousandth of the norm."""

    def steps(model: nn.Module) -> Tensor:
        optimizer = SOFIM(model.parameters(), lr=1.0, rho=1e-3, moment_dtype=torch.bfloat16, stochastic_rounding=True)
        for i in range(3):
            for number, p in enumerate(model.parameters()):
                g = torch.randn(p.shape, generator=torch.Generator().manual_seed(10 * i + number))
                p.grad = distribute_tensor(g, p.device_mesh, p.placements) if isinstance(p, DTensor) else g
            optimizer.step()
        return torch.cat([whole(p.detach()).flatten() for p in model.parameters()])

    def work(rank: int) -> Tensor:
        model = linears()
        fully_shard(model, mesh=init_device_mesh("cpu", (3,)))
        return steps(model)

    expected = steps(linears())
    for found in in_threads(work, 3):
        assert_within(found, expected.double(), 4 * torch.finfo(torch.float32).eps * expected.abs().max().item())


@pytest.mark.filterwarnings("ignore:.*closed")
@pytest.mark.parametrize("make", [mbf, kfac, ekfac_adam])
def test_shards_have_the_integers_of_their_places(make: Make) -> None:
    """Of three processes, of which one has none of the rows of a layer."""

    def steps(model: nn.Module) -> Tensor:
        optimizer = make(model)
        optimizer.close()  # type: ignore[attr-defined]
        for i in range(3):
            for number, p in enumerate(model.parameters()):
                g = torch.randn(p.shape, generator=torch.Generator().manual_seed(10 * i + number)).to(p.dtype)
                p.grad = distribute_tensor(g, p.device_mesh, p.placements) if isinstance(p, DTensor) else g
            optimizer.step()
        moments = [optimizer.state[p][optimizer.moment] for p in model.parameters()]  # type: ignore[attr-defined]
        return torch.cat([whole(x.detach()).flatten() for x in (*model.parameters(), *moments)])

    def work(rank: int) -> Tensor:
        model = linears().to(torch.bfloat16)
        fully_shard(model, mesh=init_device_mesh("cpu", (3,)))
        return steps(model)

    expected = steps(linears().to(torch.bfloat16))
    for found in in_threads(work, 3):
        # Sums in another order move a number in 2^16 across the integer that decides; other integers move half of all.
        assert int((found != expected).sum()) <= 1


def test_nothing_in_bfloat16_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"stochastic_rounding is True, and nothing is in bfloat16.*torch.float32"):
        AdaFisher(nn.Linear(3, 2), stochastic_rounding=True)
    with pytest.raises(ValueError, match="nothing is in bfloat16"):
        SOFIM(nn.Linear(3, 2).parameters(), stochastic_rounding=True)
    for kind in (MBF, KFAC, EKFAC, EKFACAdam):
        with pytest.raises(ValueError, match="nothing is in bfloat16"):
            kind(nn.Linear(3, 2), stochastic_rounding=True)
    AdaFisher(nn.Linear(3, 2), stochastic_rounding=True, moment_dtype=torch.bfloat16)


@pytest.mark.parametrize("seed", [-1, 2**64, 1.5, True])
def test_a_seed_is_an_integer(seed: Any) -> None:
    with pytest.raises(ValueError, match=rf"seed is {seed!r}, expected an integer of 0 to 2\^64 - 1"):
        AdaFisher(network(), seed=seed)
