"""Lightning on a tiny model; run by test_frameworks.py, in a process of its own."""

from __future__ import annotations

import copy
import itertools
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from fisher_kernels import KFAC, MBF, SOFIM, AdaFisher, find_lr

with warnings.catch_warnings():  # those of imports are not ours
    warnings.simplefilter("ignore")
    from lightning.pytorch import LightningModule, Trainer, seed_everything
    from lightning.pytorch.plugins.precision import MixedPrecision
    from lightning.pytorch.tuner import Tuner

from fisher_kernels.integrations.figures import read
from fisher_kernels.integrations.lightning import AllowClipping, FisherMetrics, allow_clipping

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("default")]

SCALE = 2.0**12

OPTIMIZERS: dict[str, Any] = {
    "AdaFisher": lambda model: AdaFisher(model, lr=1e-2),
    "MBF": lambda model: MBF(model, lr=1e-2),
    "KFAC": lambda model: KFAC(model, lr=1e-2),
    "SOFIM": lambda model: SOFIM(model.parameters(), lr=1e-2),
}


class Small(LightningModule):
    def __init__(self, make: Any, dropout: float = 0.2) -> None:
        super().__init__()
        self.make = make
        self.network = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Dropout(dropout), nn.Linear(8, 3))

    def training_step(self, batch: Any, index: int) -> Tensor:
        x, y = batch
        loss = F.cross_entropy(self.network(x).float(), y)
        self.log("loss", loss)
        return loss

    def validation_step(self, batch: Any, index: int) -> None:
        x, y = batch
        self.log("validation", F.cross_entropy(self.network(x).float(), y))

    def configure_optimizers(self) -> Any:
        optimizer = self.make(self.network)
        return [optimizer], [torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 8)]


def data() -> DataLoader:
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(32, 6, generator=generator), torch.randint(3, (32,), generator=generator)
    return DataLoader(TensorDataset(x, y), batch_size=4)


def small(make: Any, dropout: float = 0.2) -> Small:
    torch.manual_seed(0)
    return Small(make, dropout)


def trainer(folder: Path, scaler: torch.amp.GradScaler | None = None, **settings: Any) -> Trainer:
    plugins = [] if scaler is None else [MixedPrecision("16-mixed", "cpu", scaler)]
    defaults = {
        "default_root_dir": folder, "accelerator": "cpu", "max_epochs": 2, "logger": False, "plugins": plugins,
        "enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False,
        "accumulate_grad_batches": 2, "gradient_clip_val": 0.5,
    }  # fmt: skip
    return Trainer(**{**defaults, **settings})


def scaler() -> torch.amp.GradScaler:
    return torch.amp.GradScaler("cpu", init_scale=SCALE)


def fit(run: Trainer, model: Small, **settings: Any) -> Small:
    seed_everything(0, verbose=False)
    run.fit(model, data(), data(), **settings)
    return model


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed"])
def test_training_goes_on_bit_for_bit(name: str, precision: str, tmp_path: Path) -> None:
    """With accumulation, clipping, a schedule and evaluation, from a checkpoint after one of two epochs."""
    scaled = precision == "16-mixed"

    def run(epochs: int) -> Trainer:
        given = {} if scaled else {"precision": precision}
        given["callbacks"] = [AllowClipping()]
        return trainer(tmp_path, scaler() if scaled else None, max_epochs=epochs, **given)

    model = small(OPTIMIZERS[name], dropout=0.0)
    before = copy.deepcopy(model.state_dict())
    whole = fit(run(2), model)
    assert all((p != before[key]).any() for key, p in whole.state_dict().items())
    first = run(1)
    fit(first, small(OPTIMIZERS[name], dropout=0.0))
    first.save_checkpoint(tmp_path / "half.ckpt")
    resumed = fit(run(2), small(OPTIMIZERS[name], dropout=0.0), ckpt_path=tmp_path / "half.ckpt")
    for (key, a), b in zip(whole.state_dict().items(), resumed.state_dict().values(), strict=True):
        assert torch.equal(a, b), key


@pytest.mark.parametrize("name", ["AdaFisher", "MBF", "KFAC"])
@pytest.mark.parametrize("clip", [None, 0.1])
def test_statistics_are_those_of_unscaled_gradients(name: str, clip: float | None, tmp_path: Path) -> None:
    """A scale of a power of two changes no bit of them, whether or not gradients are clipped."""
    found = []
    for scale in (1.0, SCALE):
        scaling = torch.amp.GradScaler("cpu", init_scale=scale)
        run = trainer(tmp_path, scaling, max_epochs=1, gradient_clip_val=clip, callbacks=[AllowClipping()])
        fit(run, small(OPTIMIZERS[name], dropout=0.0))
        assert scaling.get_scale() == scale
        found.append(run.optimizers[0].state_dict()["state"])
    for number, state in found[0].items():
        for key, value in state.items():
            torch.testing.assert_close(found[1][number][key], value, rtol=2e-3, atol=1e-7)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_search_for_the_rate_leaves_no_trace(name: str, tmp_path: Path) -> None:
    """Lightning's own, and ours within a module that steps by itself; a training behind them is the same to the bit."""

    class Tuned(Small):
        lr = 0.5

        def configure_optimizers(self) -> Any:
            return type(kept := self.make(self.network))(*_arguments(kept, self.network), lr=self.lr)

    def module() -> Tuned:
        torch.manual_seed(0)
        return Tuned(OPTIMIZERS[name], 0.0)

    quiet: dict[str, Any] = {"accumulate_grad_batches": 1, "gradient_clip_val": None}
    searched, plain = module(), module()
    before = copy.deepcopy(searched.state_dict())
    run = trainer(tmp_path, **quiet)
    found = Tuner(run).lr_find(searched, data(), num_training=15, min_lr=1e-6, update_attr=False)
    assert found is not None
    assert len(found.results["lr"]) >= 10  # one stops early
    assert all(torch.equal(p, before[key]) for key, p in searched.state_dict().items())
    for model in (searched, plain):
        model.lr = 1e-2
        fit(trainer(tmp_path, **quiet) if model is plain else run, model)
    for (key, a), b in zip(searched.state_dict().items(), plain.state_dict().values(), strict=True):
        assert torch.equal(a, b), key


def _arguments(optimizer: Any, network: nn.Module) -> tuple[Any, ...]:
    """What another one of the same class is made of; the first one is closed."""
    if isinstance(optimizer, SOFIM):
        return (network.parameters(),)
    optimizer.close()
    return (network,)


@pytest.mark.parametrize("name", ["KFAC", "SOFIM"])
def test_find_lr_goes_through_what_lightning_wraps_around_optimizers(name: str, tmp_path: Path) -> None:
    class Searching(Small):
        def on_train_batch_start(self, batch: Any, index: int) -> None:
            batches = iter(list(data()) * 4)  # which draws a random number
            if index == 3 and self.searches:
                wrapped = self.optimizers()

                def step() -> Tensor:
                    x, y = next(batches)
                    wrapped.optimizer.zero_grad()
                    loss = F.cross_entropy(self.network(x), y)
                    loss.backward()
                    wrapped.optimizer.step()
                    return loss

                self.found = find_lr(step, wrapped, self, end=1e-2, steps=20)

    torch.manual_seed(0)
    models = [Searching(OPTIMIZERS[name], 0.3) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    for model in models:
        model.searches = model is models[0]
        fit(trainer(tmp_path, accumulate_grad_batches=1), model)
    assert len(models[0].found.rates) == 20
    for (key, a), b in zip(models[0].state_dict().items(), models[1].state_dict().values(), strict=True):
        assert torch.equal(a, b), key


def test_a_step_that_overflows_changes_nothing(tmp_path: Path) -> None:
    class Broken(Small):
        def training_step(self, batch: Any, index: int) -> Tensor:
            loss = super().training_step(batch, index)
            return loss * torch.inf if index == 2 else loss

        def on_train_batch_end(self, outputs: Any, batch: Any, index: int) -> None:
            kept.append(copy.deepcopy(self.state_dict()))

    kept: list[dict[str, Tensor]] = []
    torch.manual_seed(0)
    model = Broken(OPTIMIZERS["AdaFisher"], 0.0)
    scaling = scaler()
    run = trainer(tmp_path, scaling, max_epochs=1, accumulate_grad_batches=1, callbacks=[AllowClipping()])
    fit(run, model)
    moved = [any(not torch.equal(a[key], b[key]) for key in a) for a, b in itertools.pairwise(kept)]
    assert moved == [True, False, True, True, True, True, True]
    assert scaling.get_scale() == SCALE / 2
    assert all(torch.isfinite(value).all() for state in run.optimizers[0].state.values() for value in state.values())


def test_without_the_callback_lightning_refuses_to_clip(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="performs unscaling of gradients internally"):
        fit(trainer(tmp_path, scaler()), small(OPTIMIZERS["AdaFisher"]))


def test_other_optimizers_are_left_alone() -> None:
    other = torch.optim.AdamW([nn.Parameter(torch.ones(1))], fused=True)
    allow_clipping(other, scaler())
    assert other._step_supports_amp_scaling


def test_fabric_clips_too(tmp_path: Path) -> None:
    from lightning.fabric import Fabric
    from lightning.fabric.plugins.precision import MixedPrecision as OfFabric

    scaling = scaler()
    fabric = Fabric(accelerator="cpu", plugins=[OfFabric("16-mixed", "cpu", scaling)])
    torch.manual_seed(0)
    model = nn.Linear(6, 3)
    model, optimizer = fabric.setup(model, AdaFisher(model, lr=1e-2))
    allow_clipping(optimizer, scaling)
    before = copy.deepcopy(model.state_dict())
    for x, y in data():
        optimizer.zero_grad()
        fabric.backward(F.cross_entropy(model(x).float(), y))
        fabric.clip_gradients(model, optimizer, max_norm=0.1)
        optimizer.step()
    assert all((p != before[key]).any() for key, p in model.state_dict().items())
    metrics = optimizer.optimizer.metrics()["weight"]
    assert 0.0 <= metrics["damping_share"] <= 1.0


def test_figures_are_logged_and_written(tmp_path: Path) -> None:
    from lightning.pytorch.loggers import CSVLogger

    logger = CSVLogger(tmp_path, name="log")
    metrics = FisherMetrics(tmp_path / "run.jsonl", every=2)
    run = trainer(tmp_path, max_epochs=1, logger=logger, callbacks=[metrics], log_every_n_steps=1)
    fit(run, small(OPTIMIZERS["AdaFisher"]))
    found = read(tmp_path / "run.jsonl")
    assert [*found["fisher/cosine_with_sgd"]] == [2, 4]
    text = (Path(logger.log_dir) / "metrics.csv").read_text()
    assert "fisher/damping_share" in text.splitlines()[0]
