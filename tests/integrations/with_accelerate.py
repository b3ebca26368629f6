"""Accelerate on tiny models; run by test_frameworks.py, in a process of its own."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from fisher_kernels import KFAC, MBF, SOFIM, AdaFisher

with warnings.catch_warnings():  # those of imports are not ours
    warnings.simplefilter("ignore")
    from accelerate import Accelerator, FullyShardedDataParallelPlugin
    from accelerate.state import AcceleratorState, GradientState, PartialState
    from accelerate.utils import DistributedType

from fisher_kernels.integrations.accelerate import prepare

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("default")]

OPTIMIZERS: dict[str, Any] = {
    "AdaFisher": lambda model, **given: AdaFisher(model, lr=1e-2, **given),
    "MBF": lambda model, **given: MBF(model, lr=1e-2, **given),
    "KFAC": lambda model, **given: KFAC(model, lr=1e-2, **given),
    "SOFIM": lambda model, **given: SOFIM(model.parameters(), lr=1e-2),
}


@pytest.fixture(autouse=True)
def _nothing_left() -> Iterator[None]:
    """Accelerate keeps its state in classes."""
    yield
    for kind in (AcceleratorState, GradientState, PartialState):
        kind._reset_state()


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))


def samples(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(32, 6, generator=generator, dtype=dtype), torch.randint(3, (32,), generator=generator)


def data(batch_size: int = 4) -> DataLoader:
    return DataLoader(TensorDataset(*samples()), batch_size=batch_size)


def epoch(accelerator: Accelerator, model: Any, optimizer: Any, batches: Any, clip: float | None = 0.5) -> None:
    for x, y in batches:
        with accelerator.accumulate(model):
            accelerator.backward(F.cross_entropy(model(x).float(), y))
            if clip is not None and accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), clip)
            optimizer.step()
            optimizer.zero_grad()


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_training_goes_on_bit_for_bit(name: str, precision: str, tmp_path: Path) -> None:
    """With accumulation and clipping, from a checkpoint after one of two epochs."""
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2, mixed_precision=precision)

    def prepared() -> tuple[Any, ...]:
        accelerator.free_memory()
        model = network()
        return accelerator.prepare(model, OPTIMIZERS[name](model), data())

    model, optimizer, batches = prepared()
    epoch(accelerator, model, optimizer, batches)
    accelerator.save_state(str(tmp_path))
    epoch(accelerator, model, optimizer, batches)
    expected = copy.deepcopy(accelerator.unwrap_model(model).state_dict())
    model, optimizer, batches = prepared()
    accelerator.load_state(str(tmp_path))
    epoch(accelerator, model, optimizer, batches)
    for key, value in accelerator.unwrap_model(model).state_dict().items():
        assert torch.equal(value, expected[key]), key


def with_scaler(monkeypatch: pytest.MonkeyPatch, scale: float) -> Accelerator:
    """An Accelerator of fp16, which it offers on a GPU alone, on the CPU."""
    accelerator = Accelerator(cpu=True, mixed_precision="bf16")
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    monkeypatch.setattr(Accelerator, "mixed_precision", "fp16")
    return accelerator


@pytest.mark.parametrize("name", ["AdaFisher", "MBF", "KFAC"])
@pytest.mark.parametrize("clip", [None, 0.1])
def test_statistics_are_those_of_unscaled_gradients(
    name: str, clip: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether or not gradients are clipped, and whether the optimizer was told of the scaler or finds it."""
    found = []
    for scale, told in ((1.0, True), (2.0**12, True), (2.0**12, False)):
        accelerator = with_scaler(monkeypatch, scale)
        model = network()
        made = OPTIMIZERS[name](model, grad_scaler=accelerator.scaler if told else None)
        model, optimizer, batches = accelerator.prepare(model, made, data())
        epoch(accelerator, model, optimizer, batches, clip)
        assert accelerator.scaler.get_scale() == scale
        found.append(made.state_dict()["state"])
        accelerator.free_memory()
    for scaled in found[1:]:
        for number, state in found[0].items():
            for key, value in state.items():
                # The scale is a power of two: it is divided out without rounding, but not of every cast in autocast.
                torch.testing.assert_close(scaled[number][key], value, rtol=1e-5, atol=0)


@pytest.fixture
def sharding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Accelerator]:
    """One that shards by ``fully_shard``, which it offers on GPUs alone, in a group of one process on the CPU."""
    store = f"file://{tmp_path / 'store'}"
    torch.distributed.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "ACCELERATE_USE_CPU"):
        monkeypatch.setenv(name, {"WORLD_SIZE": "1", "MASTER_ADDR": "localhost"}.get(name, "0"))
    accelerator = Accelerator(cpu=True)
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="size_based_wrap", min_num_params=1, state_dict_type="SHARDED_STATE_DICT"
    )
    PartialState._shared_state["distributed_type"] = DistributedType.FSDP
    accelerator.state._shared_state.update(distributed_type=DistributedType.FSDP, fsdp_plugin=plugin)
    yield accelerator
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_shards_in_the_place_of_parameters_are_trained(name: str, sharding: Accelerator, tmp_path: Path) -> None:
    """From the first step on as parameters that are not divided; from a checkpoint bit for bit."""
    x, y = samples(torch.float64)
    batches = list(zip(x.split(4), y.split(4), strict=True))

    def prepared() -> tuple[Any, Any]:
        model = network().double()
        model, optimizer = prepare(sharding, model, OPTIMIZERS[name](model))
        assert all(isinstance(p, DTensor) for p in model.parameters())
        return model, optimizer

    def train(model: Any, optimizer: Any, clip: Any = sharding.clip_grad_norm_) -> dict[str, Tensor]:
        for x, y in batches:
            sharding.backward(F.cross_entropy(model(x), y))
            clip(model.parameters(), 0.5)
            optimizer.step()
            optimizer.zero_grad()
        return {key: getattr(p, "full_tensor", lambda p=p: p)().clone() for key, p in model.state_dict().items()}

    model, optimizer = prepared()
    train(model, optimizer)
    sharding.save_state(str(tmp_path / "state"))
    expected = train(model, optimizer)
    alone = network().double()
    ours = OPTIMIZERS[name](alone)
    for _ in range(2):
        plain = train(alone, ours, nn.utils.clip_grad_norm_)
    for key, value in expected.items():
        # Two networks' worth of roundings of float64, times what eight steps of curvature make of them.
        torch.testing.assert_close(value, plain[key], rtol=1e-9, atol=1e-11)
    sharding.free_memory()
    model, optimizer = prepared()
    train(model, optimizer)
    sharding.load_state(str(tmp_path / "state"))
    found = train(model, optimizer)
    for key, value in expected.items():
        assert torch.equal(found[key], value), key
