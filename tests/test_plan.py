"""Plans for many processes, beside what optimizers have and send in some, and what published models are."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, RowwiseParallel, parallelize_module
from typer.testing import CliRunner, Result

from bench.plans import OPTIMIZERS, REPORT
from fisher_kernels import EKFAC, KFAC, MBF, SOFIM, AdaFisher, EKFACAdam
from fisher_kernels.cli import app
from fisher_kernels.tools.collectives import Collective
from fisher_kernels.tools.plan import TENSOR, Mesh, Plan, as_numbers, passing, plans, size
from fisher_kernels.tools.plan_models import MODELS, cross_entropy, find
from fisher_kernels.tools.user_model import UserModel
from tests.collectives import noted, watch_groups
from tests.threads import in_threads

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:FSDP2-wrapped module .* returned a view tensor"),
]

REFRESHES = 3
"""Steps from one to the next. The third one, in the seventh step, is the first that looks at nothing."""


class Layers(nn.Module):
    """Convolutions, norms and Linear layers, some of fewer rows than there are processes; and classes of images."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(2, 5, 2), nn.BatchNorm2d(5), nn.Flatten(), nn.Linear(20, 7))
        self.blocks = nn.ModuleList([nn.Linear(7, 7), nn.Linear(7, 7, bias=False)])
        self.norm, self.out = nn.LayerNorm(7), nn.Linear(7, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for layer in self.blocks:
            x = torch.tanh(layer(x))
        out: Tensor = self.out(self.norm(x))
        return out


class Part(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(8), nn.Linear(8, 12), nn.Linear(12, 8)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.down(torch.tanh(self.up(self.norm(x))))
        return out


class Tokens(nn.Module):
    """A small transformer without attention; two processes do not divide its tokens and classes evenly."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(11, 8), nn.Linear(8, 3)
        self.blocks = nn.ModuleList([Part(), Part()])

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        out: Tensor = self.head(x).mean(1)
        return out


class Attending(nn.Module):
    """Weights that functions apply, which the first refresh finds."""

    def __init__(self) -> None:
        super().__init__()
        self.attention, self.head = nn.MultiheadAttention(6, 2, batch_first=True), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.attention(x, x, x, need_weights=False)[0].mean(1))
        return out


def layers() -> UserModel:
    return UserModel(Layers(), torch.randn(6, 2, 3, 3), cross_entropy)


def tokens() -> UserModel:
    divided: dict[str, ParallelStyle] = {
        "embed": RowwiseParallel(input_layouts=Replicate()),
        "blocks.*.up": ColwiseParallel(),
        "blocks.*.down": RowwiseParallel(),
        "head": ColwiseParallel(output_layouts=Replicate()),
    }
    return UserModel(Tokens(), torch.arange(24).view(6, 4) % 11, cross_entropy, divided)


def attending() -> UserModel:
    return UserModel(Attending(), torch.randn(6, 4, 6), cross_entropy)


def divided(example: UserModel, mesh: Mesh) -> nn.Module:
    names = ("data", "tensor") if mesh.parallel == TENSOR else ("replicas", "shards")[-len(mesh.shape) :]
    whole = init_device_mesh("cpu", mesh.shape, mesh_dim_names=names)
    if mesh.parallel == TENSOR:
        assert example.plan is not None
        parallelize_module(example.model, whole["tensor"], dict(example.plan))
        whole = whole["data"]
    for unit in (*getattr(example.model, "blocks", ()), example.model):
        fully_shard(unit, mesh=whole, mp_policy=MixedPrecisionPolicy(torch.float32, torch.float32))
    return example.model


Found = tuple[int, "Counter[Collective]", "Counter[Collective]"]


def trained(make: Callable[[], UserModel], kind: Any, mesh: Mesh, settings: dict[str, Any], rank: int) -> Found:
    """Bytes of state, what is sent in a step, and what in one that refreshes, forward and backward among it."""
    example = make()
    model = divided(example, mesh)
    by_layers = kind not in (SOFIM, torch.optim.AdamW)
    turns = {} if not by_layers else {"update_interval": REFRESHES}
    if by_layers and kind is not AdaFisher:
        turns |= {"inverse_interval": REFRESHES, "refresh": "constant"}
    optimizer = kind(model if by_layers else model.parameters(), **turns, **settings)
    for _ in range(2 * REFRESHES + 2):
        optimizer.zero_grad()
        with noted() as calls:
            cross_entropy(model(example.inputs)).backward()
            optimizer.step()
        before, last = Counter(calls), locals().get("before", Counter())
    tensors = [x for state in optimizer.state.values() for x in state.values()]
    state = sum(y.numel() * y.element_size() for y in (getattr(x, "to_local", lambda x=x: x)() for x in tensors))
    return state, before, last


def foreseen(make: Callable[[], UserModel], kind: Any, mesh: Mesh, settings: dict[str, Any]) -> Plan:
    name = kind.__name__.lower()
    (found,) = plans(make, [name], mesh, torch.float32, {name: settings})
    return found


def case(make: Callable[[], UserModel], kind: Any, shape: str, fast: bool = False, **settings: Any) -> Any:
    mesh = Mesh.of(shape.removeprefix("tensor "), TENSOR if "tensor" in shape else "hsdp")
    about = [make.__name__, kind.__name__, shape, *map(str, settings.values())]
    return pytest.param(make, kind, mesh, settings, id=" ".join(about), marks=() if fast else pytest.mark.slow)


KINDS = (AdaFisher, MBF, KFAC, EKFAC, EKFACAdam, SOFIM, torch.optim.AdamW)
CASES = [
    *(case(layers, kind, "2x2", kind in (AdaFisher, MBF, SOFIM)) for kind in KINDS),
    *(case(layers, kind, "3") for kind in KINDS),
    *(case(tokens, kind, "tensor 2x2", kind in (AdaFisher, KFAC)) for kind in KINDS),
    case(layers, KFAC, "3", inverse_sharing="one_owner"),
    case(layers, EKFAC, "2x2", inverse_sharing="one_owner"),
    case(layers, MBF, "2x2", inverse_sharing="one_owner"),
    case(attending, AdaFisher, "2x2"),
    case(attending, KFAC, "2x2"),
]


@pytest.mark.parametrize(("make", "kind", "mesh", "settings"), CASES)
def test_a_plan_is_what_processes_have_and_send(
    make: Callable[[], UserModel], kind: Any, mesh: Mesh, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the byte and the call, of the first process, which has the most."""
    found = foreseen(make, kind, mesh, settings)
    watch_groups(monkeypatch)
    results = in_threads(partial(trained, make, kind, mesh, settings), mesh.processes)
    state, step, refresh = results[0]
    assert found.moments + found.curvature == state == max(state for state, _, _ in results)
    assert Counter(found.passes) + Counter(found.step) == step
    assert step + Counter(found.refresh) == refresh


def of_published(name: str, *names: str, mesh: str = "8", **sizes: Any) -> list[Plan]:
    return plans(partial(find, name, **sizes), names, Mesh.of(mesh))


def test_what_a_refresh_gathers_grows_with_the_batch_where_layers_are_divided() -> None:
    def sent(rows: int, mesh: Mesh) -> float:
        def make() -> UserModel:
            return tokens()._replace(inputs=torch.zeros(rows, 4, dtype=torch.int64))

        return foreseen(make, AdaFisher, mesh, {}).sent_in_a_refresh

    divided, sharded = Mesh.of("2x2", TENSOR), Mesh.of("2x2")
    numbers = 2 * (12 + 12) + 8 + 3  # of each token: what up and down see of 12, twice; what embed and head have too
    more = (sent(16, divided) - sent(6, divided)) / 10 / 4
    assert 4 * 2 * 12 / 2 < more < 4 * numbers
    assert sent(16, sharded) == sent(6, sharded)


def test_bytes_that_pass() -> None:
    """As in a ring."""
    assert [Collective("all-gather", 6, w).passing for w in (1, 2, 3)] == [0, 6, 12]
    assert [Collective("all-reduce", 6, w).passing for w in (1, 2, 3)] == [0, 6, 8]
    assert [Collective("reduce-scatter", 6, w).passing for w in (1, 2, 3)] == [0, 3, 4]
    assert [Collective("broadcast", 6, w).passing for w in (1, 2, 3)] == [0, 6, 6]
    assert passing([Collective("all-gather", 6, 2), Collective("all-reduce", 6, 3)]) == 14


def test_models_have_the_published_numbers_of_parameters() -> None:
    """As Meta, torchvision and the papers say; positions and the class token of ViT-L, 0.2e6 numbers, are left out."""
    with torch.device("meta"):
        found = {name: sum(p.numel() for p in find(name).model.parameters()) for name in MODELS}
    assert found == {"llama-8b": 8_030_261_248, "vit-l": pytest.approx(304.3e6, rel=1e-3), "resnet50": 25_557_032}


def test_a_plan_follows_the_mesh() -> None:
    """Replicas of a model change who takes part, and nothing else."""
    (few,), (many,) = (plans(layers, ["kfac"], Mesh.of(mesh)) for mesh in ("2x4", "64x4"))
    assert (few.moments, few.curvature, few.largest) == (many.moments, many.curvature, many.largest)
    for some, others in ((few.step, many.step), (few.refresh, many.refresh), (few.passes, many.passes)):
        now = {2: 64, 4: 4, 8: 256}
        assert [(call.kind, now[call.processes]) for call in some] == [(x.kind, x.processes) for x in others]
        # Counts are sent in more parts by more processes.
        assert [call.size for call in some] == pytest.approx([call.size for call in others], rel=0.03)
    expected = few.sent_in_a_refresh * (2 - 2 / 256) / (2 - 2 / 8)
    assert many.sent_in_a_refresh == pytest.approx(expected, rel=0.03)


@pytest.mark.parametrize("text", ["", "0", "8x", "x8", "8x8x8", "-8", "8.0", "eight"])
def test_what_is_no_mesh_is_said(text: str) -> None:
    with pytest.raises(ValueError, match="expected SHARDS or REPLICASxSHARDS, 8 or 128x8 for example"):
        Mesh.of(text)
    with pytest.raises(ValueError, match="expected SHARDSxTENSOR, 128x8 for example"):
        Mesh.of(text, TENSOR)
    assert Mesh.of("128x8") == Mesh((128, 8))
    assert Mesh.of("8") == Mesh((8,))
    assert Mesh.of("128x8", TENSOR) == Mesh((128, 8), TENSOR)


def invoke(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["plan", *arguments], env={"COLUMNS": "200", "NO_COLOR": "1"})


MINE = """import torch
from torch import nn
from torch.distributed.tensor.parallel import ColwiseParallel


def made():
    return nn.Linear(4, 3), torch.randn(2, 4)


def with_loss():
    return (*made(), lambda output: output.sum())


def divided():
    return (*with_loss(), {"": ColwiseParallel(use_local_output=True)})


def alone():
    return nn.Linear(4, 3)


def strange():
    return nn.Linear(4, 3), torch.randn(2, 5)
"""


def test_the_command_shows_and_says_what_is_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine_to_plan.py").write_text(MINE)
    monkeypatch.chdir(tmp_path)
    mine = invoke("mine_to_plan:made", "--mesh", "2x2", "--optimizer", "mbf", "-o", "linear_blocks=2", "--json")
    adamw, mbf = json.loads(mine.output)["plans"]
    assert (adamw["parameters"], adamw["moments"], adamw["curvature"]) == (15, 2 * 4 * 2 * 5, 2 * 4)
    assert (mbf["moments"], mbf["curvature"]) == (4 * 2 * 5, 2 * 4 * 3 * 2 * 2 + 4)  # three blocks, of five columns
    assert mbf["step"]["calls"][0] == {"kind": "all-gather", "processes": 2, "calls": 1, "put_in": 4 * 2 * 5}
    assert [row["calls"] for row in mbf["refresh"]["calls"]] == [1]
    tensor = invoke("mine_to_plan:divided", "--mesh", "2x2", "--parallel", "fsdp-tp", "--optimizer", "sofim", "--json")
    assert [row["processes"] for row in json.loads(tensor.output)["plans"][1]["step"]["calls"]] == [2]
    shown = invoke("mine_to_plan:with_loss", "--optimizer", "kfac").output
    (kfac,) = plans(lambda: UserModel(nn.Linear(4, 3), torch.randn(2, 4)), ["kfac"], Mesh.of("8"))
    row = next(line for line in shown.splitlines() if "KFAC" in line and "│" in line)
    for bytes_of in (kfac.weights, kfac.moments, kfac.curvature, kfac.sent_in_a_step, kfac.sent_in_a_refresh):
        assert size(bytes_of) in row
    assert "15 parameters, 8 processes; fully_shard itself moves" in shown
    assert "1 all-reduce more in a refresh" in shown
    for arguments, said in (
        (["bert"], "MODEL: is 'bert', expected llama-8b, vit-l, resnet50 or PACKAGE.MODULE:FUNCTION"),
        (["vit-l", "--mesh", "8y"], "--mesh: is '8y', expected SHARDS or REPLICASxSHARDS"),
        (["vit-l", "--parallel", "fsdp-tp"], "--mesh: is '8', expected SHARDSxTENSOR"),
        (["vit-l", "--parallel", "ddp"], "--parallel: is 'ddp', expected hsdp or fsdp-tp"),
        (["vit-l", "--optimizers", "adam"], "--optimizers: has 'adam', expected some of adamw,"),
        (["vit-l", "--dtype", "int8"], "--dtype: is 'int8', expected bfloat16 or float32"),
        (["vit-l", "--seq-len", "8"], "MODEL: vit-l has no sequences, expected no --seq-len"),
        (["vit-l", "--optimizers", "mbf", "-o", "blocks=1"], "-o: mbf has no hyperparameter 'blocks'"),
        (["mine_to_plan:made", "-o", "linear_blocks=0", "--optimizers", "mbf"], "--optimizers mbf: linear_blocks is 0"),
        (["mine_to_plan:made", "--batch", "8"], "MODEL: is a function whose example inputs say how large a batch is"),
        (["mine_to_plan:alone"], "MODEL: mine_to_plan:alone returned a model alone, expected (model, example inputs)"),
        (["mine_to_plan:strange"], "MODEL: the model cannot be counted: RuntimeError: "),
        (
            ["mine_to_plan:made", "--mesh", "2x2", "--parallel", "fsdp-tp"],
            "MODEL: mine_to_plan:made does not say how its layers are divided, expected (model, example inputs, loss,",
        ),
        (
            ["resnet50", "--mesh", "2x2", "--parallel", "fsdp-tp"],
            "MODEL: resnet50 has no plan for tensor parallel training, expected --parallel hsdp",
        ),
        (
            ["llama-8b", "--mesh", "2x16", "--parallel", "fsdp-tp"],
            "MODEL: llama-8b cannot be divided by 16, expected a divisor of 8, its heads",
        ),
    ):
        result = invoke(*arguments)
        assert result.exit_code == 2, arguments
        assert said in result.output


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "mesh"),
    [("llama-8b", Mesh((2, 4))), ("llama-8b", Mesh((2, 4), TENSOR)), ("vit-l", Mesh((2, 4), TENSOR))],
)
def test_published_models_in_a_plan(name: str, mesh: Mesh) -> None:
    """AdaFisher sends what its formula says: eight bytes for each row, column and scale, with counts and flags."""
    (found,) = plans(partial(find, name, batch=1, tensor=mesh.tensor), ["adafisher"], mesh)
    assert not found.notes
    with torch.device("meta"):
        weights = [m.weight for m in find(name).model.modules() if isinstance(getattr(m, "weight", None), nn.Parameter)]
    vectors = 8 * sum(w.shape[0] + w[0].numel() if w.dim() > 1 else len(w) for w in weights)
    (statistics,) = [call for call in found.refresh if call.kind == "all-reduce"]
    assert vectors <= statistics.size <= 1.01 * vectors
    assert not found.step


@pytest.mark.slow
def test_the_tables_are_what_is_counted() -> None:
    """Those of the documents, of one model on one mesh: ``python -m bench.plans`` counts them anew."""
    rows = [row for row in json.loads(REPORT.read_text())["resnet50"] if row["mesh"] == [8]]
    found = plans(partial(find, "resnet50"), OPTIMIZERS, Mesh.of("8"))
    assert [json.loads(json.dumps(as_numbers(one))) for one in found] == rows
