"""Plans for many processes, beside what optimizers have and what published models are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as F
from typer.testing import CliRunner, Result

from fisher_kernels import EKFAC, KFAC, MBF, SOFIM, AdaFisher, EKFACAdam
from fisher_kernels.cli import app
from fisher_kernels.tools.plan import Mesh, plan, size
from fisher_kernels.tools.plan_models import MODELS, find
from tests.threads import in_threads

pytestmark = pytest.mark.usefixtures("one_thread")


def network() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(2, 5, 2), nn.BatchNorm2d(5), nn.Flatten(), nn.Linear(20, 7), nn.LayerNorm(7), nn.Linear(7, 3)
    )


@pytest.mark.parametrize("shape", [(3,), (2, 2)])
@pytest.mark.parametrize("kind", [AdaFisher, MBF, KFAC, EKFAC, EKFACAdam, SOFIM, torch.optim.AdamW])
def test_the_state_is_as_large_as_foreseen(kind: Any, shape: tuple[int, ...]) -> None:
    """On the first process, which has the most; of convolutions, norms and Linear layers, some of fewer rows."""

    def work(rank: int) -> int:
        torch.manual_seed(0)
        model = network()
        fully_shard(model, mesh=init_device_mesh("cpu", shape, mesh_dim_names=("replicate", "shard")[-len(shape) :]))
        takes_model = kind not in (SOFIM, torch.optim.AdamW)
        optimizer = kind(model if takes_model else model.parameters())
        F.cross_entropy(model(torch.randn(6, 2, 3, 3)), torch.arange(6) % 3).backward()
        optimizer.step()
        tensors = [x for state in optimizer.state.values() for x in state.values()]
        return sum(y.numel() * y.element_size() for y in (getattr(x, "to_local", lambda x=x: x)() for x in tensors))

    sizes = in_threads(work, torch.Size(shape).numel())
    replicas = shape[0] if len(shape) > 1 else 1
    found = plan(network(), kind.__name__.lower(), Mesh(replicas, shape[-1]))
    assert found.moments + found.curvature == max(sizes) == sizes[0]


def test_models_have_the_published_numbers_of_parameters() -> None:
    """As Meta, torchvision and the papers say; positions and the class token of ViT-L, 0.2e6 numbers, are left out."""
    found = {name: plan(find(name), "adamw", Mesh(1, 8)).parameters for name in MODELS}
    assert found == {"llama-8b": 8_030_261_248, "vit-l": pytest.approx(304.3e6, rel=1e-3), "resnet50": 25_557_032}


def test_a_plan_follows_the_mesh() -> None:
    one, many = (plan(find("resnet50"), "kfac", mesh) for mesh in (Mesh(1, 8), Mesh(128, 8)))
    assert (one.moments, one.curvature, one.gathers) == (many.moments, many.curvature, many.gathers)
    # Counts are sent in more parts by more processes.
    expected = one.sent_in_a_refresh * (2 - 2 / 1024) / (2 - 2 / 8)
    assert many.sent_in_a_refresh == pytest.approx(expected, rel=1e-5)
    assert one.received_in_a_step < many.received_in_a_step < 1.001 * one.received_in_a_step
    whole = plan(find("resnet50"), "kfac", Mesh(8, 1))
    assert whole.gathers[1] == 0
    assert whole.moments > 7 * one.moments


@pytest.mark.parametrize("text", ["", "0", "8x", "x8", "8x8x8", "-8", "8.0", "eight"])
def test_what_is_no_mesh_is_said(text: str) -> None:
    with pytest.raises(ValueError, match="expected SHARDS or REPLICASxSHARDS, 8 or 128x8 for example"):
        Mesh.of(text)
    assert Mesh.of("128x8") == Mesh(128, 8)
    assert Mesh.of("8") == Mesh(1, 8)


def invoke(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["plan", *arguments], env={"COLUMNS": "200", "NO_COLOR": "1"})


def test_the_command_shows_and_says_what_is_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine_to_plan.py").write_text("from torch import nn\n\n\ndef made():\n    return nn.Linear(4, 3)\n")
    monkeypatch.chdir(tmp_path)
    mine = invoke("mine_to_plan:made", "--mesh", "2x2", "--optimizers", "adamw,mbf", "-o", "linear_blocks=2", "--json")
    adamw, mbf = json.loads(mine.output)["plans"]
    assert (adamw["parameters"], adamw["moments"], adamw["curvature"]) == (15, 2 * 4 * 2 * 5, 2 * 4)
    assert (mbf["moments"], mbf["curvature"]) == (4 * 2 * 5, 2 * 4 * 3 * 2 * 2 + 4)  # three blocks, of five columns
    shown = invoke("resnet50", "--mesh", "64", "--optimizers", "adamw,kfac").output
    kfac = plan(find("resnet50"), "kfac", Mesh(1, 64))
    row = next(line for line in shown.splitlines() if "KFAC" in line)
    for bytes_of in (kfac.weights, kfac.moments, kfac.curvature, kfac.received_in_a_step, kfac.sent_in_a_refresh):
        assert size(bytes_of) in row
    assert "25,557,032 parameters; fully_shard itself moves" in shown
    for arguments, said in (
        (["bert"], "MODEL: is 'bert', expected llama-8b, vit-l, resnet50 or PACKAGE.MODULE:FUNCTION"),
        (["vit-l", "--mesh", "8y"], "--mesh: is '8y', expected SHARDS or REPLICASxSHARDS"),
        (["vit-l", "--optimizers", "adam"], "--optimizers: has 'adam', expected some of adamw,"),
        (["vit-l", "--dtype", "int8"], "--dtype: is 'int8', expected bfloat16 or float32"),
        (["vit-l", "--optimizers", "mbf", "-o", "linear_blocks=0"], "--optimizers mbf: linear_blocks is 0, expected"),
    ):
        result = invoke(*arguments)
        assert result.exit_code == 2
        assert said in result.output
