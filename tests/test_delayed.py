"""Statistics that the next refresh takes: one refresh late, whatever processes and checkpoints there are."""

from __future__ import annotations

import copy
import functools
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from fisher_kernels import EKFAC, KFAC, MBF, AdaFisher, AdaFisherW, EKFACAdam
from fisher_kernels.curvature.proof import Verdict
from tests.processes import in_two_processes, needs_processes
from tests.shards import READERS, assert_close, sharded, whole
from tests.shards import network as linears
from tests.shards import train as train_shards
from tests.small_network import assert_same_parameters, assert_same_state, backward, network, train
from tests.threads import in_threads

pytestmark = pytest.mark.usefixtures("one_thread")

KINDS: list[Any] = [AdaFisher, AdaFisherW, MBF, KFAC, EKFAC, EKFACAdam]
every_kind = pytest.mark.parametrize("kind", KINDS)


def settings(kind: Any, **more: Any) -> dict[str, Any]:
    """A refresh in steps 0, 2, 4 and so on, and inverses then too."""
    if issubclass(kind, AdaFisher):
        return {"update_interval": 2, "delayed": True}
    return {"update_interval": 2, "inverse_interval": 2, "refresh": "constant", "delayed": True, **more}


def delayed_by_hand(optimizer: Any) -> None:
    """Let an optimizer average what it had in the refresh before; the first is averaged at once, and not again."""
    fold, kept = optimizer._fold, [None]

    def bases() -> dict[int, list[Tensor]]:
        names = ("row_basis", "column_basis")
        owners = {i: optimizer.state[site.owner] for i, site in enumerate(optimizer.statistics.sites)}
        return {i: [s[name].clone() for name in names] for i, s in owners.items() if "moment_updates" in s}

    def late(taken: list[tuple[int, Any]], grad_scale: Any) -> None:
        if taken:
            now = (taken, {}) if kept[0] is None else kept[0]
            kept[0] = ([], {}) if kept[0] is None else (taken, bases())  # type: ignore[call-overload]
            taken = now[0]
            if type(optimizer) is EKFAC:  # its second moments are in the basis of then
                here = bases()
                for i, (rows, columns) in now[1].items():
                    (sums,) = [sums for index, sums in taken if index == i]
                    v = sums.vectors[-2].view(len(rows), rows.shape[-1], columns.shape[-1])
                    for side, (old, new) in enumerate(zip((rows, columns), here[i], strict=True)):
                        turn = (new.mT @ old).square()
                        v = v @ turn.mT if side else turn @ v
                    sums.vectors[-2] = v.flatten()
        fold(taken, grad_scale)

    optimizer._fold = late


@pytest.mark.parametrize("beside", [{}, {"overlap": True}, {"refresh": "ramp", "ramp": 6, "inverse_interval": 4}])
@every_kind
def test_statistics_are_one_refresh_late(kind: Any, beside: dict[str, Any]) -> None:
    if beside and kind in (AdaFisher, AdaFisherW):
        pytest.skip("it has no inverses")
    model, twin, plain = (linears(torch.float64) for _ in range(3))
    made = settings(kind, **beside)
    ours, other, undelayed = kind(model, **made), *(kind(m, **{**made, "delayed": False}) for m in (twin, plain))
    delayed_by_hand(other)
    for net, optimizer in ((model, ours), (twin, other), (plain, undelayed)):
        train_shards(net, optimizer, torch.float64)
    assert_close(whole(model), whole(twin), torch.float64)
    assert not torch.allclose(whole(model)[0], whole(plain)[0], rtol=1e-6)


# Several processes.


MANY = [
    ("AdaFisher", (2, 2)),
    ("MBF", (2,)),
    ("EKFAC", (2,)),
    *(
        pytest.param(name, shape, marks=pytest.mark.slow)
        for name, shape in (
            ("AdaFisher, relative", (4,)),
            ("AdaFisherW", (2,)),
            ("MBF, packed", (2, 2)),
            ("KFAC", (2, 2)),
            ("KFAC beside Adam", (4,)),
            ("EKFACAdam", (8,)),
        )
    ),
]


@pytest.mark.parametrize(("name", "shape"), MANY)
def test_many_processes_are_as_one(name: str, shape: tuple[int, ...]) -> None:
    kind, made = READERS[name]
    world = torch.Size(shape).numel()

    def work(rank: int) -> list[Tensor]:
        model = sharded(linears(torch.float64), shape)
        train_shards(model, kind(model, **made, delayed=True), torch.float64, rank, world)
        return whole(model)

    model = linears(torch.float64)
    train_shards(model, kind(model, **made, delayed=True), torch.float64)
    for found in in_threads(work, world):
        assert_close(found, whole(model), torch.float64)


def test_a_refresh_waits_for_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    """From the second one on there is one call, on a group that has no other calls, and its end is not waited for."""
    calls: list[tuple[bool, bool]] = []
    all_reduce = dist.all_reduce

    def noting(x: Tensor, *args: Any, group: Any = None, async_op: bool = False, **kwargs: Any) -> Any:
        if dist.get_rank() == 0 and x.numel() > 8:
            calls.append((async_op, group in (None, dist.group.WORLD)))
        return all_reduce(x, *args, group=group, async_op=async_op, **kwargs)

    def work(rank: int) -> None:
        model = sharded(linears(torch.float64), (2,))
        optimizer = AdaFisher(model, update_interval=5, delayed=True)
        train_shards(model, optimizer, torch.float64, rank, 2)

    monkeypatch.setattr(dist, "all_reduce", noting)
    in_threads(work, 2)
    assert [asynchronous for asynchronous, _ in calls] == [False, True, True, True]
    assert not any(of_all for asynchronous, of_all in calls if asynchronous)


class Branches(nn.Module):
    """Two layers, of which a row of the batch goes through the first, the second or both."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(4, 5), nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor, through: str) -> Tensor:
        parts = [layer(x) for layer, name in ((self.first, "a"), (self.second, "b")) if name in through]
        found: Tensor = self.head(torch.tanh(torch.stack(parts).sum(0)))
        return found


def branches() -> Branches:
    model = Branches().double()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator, dtype=torch.float64) / 2)
    return model


WAYS = [("ab", "ab"), ("a", "b"), ("ab", "a"), ("a", "a"), ("a", "a"), ("b", "ab"), ("ab", "ab"), ("b", "a")]
"""Through which layers each half of a batch goes, in each step."""


def averaged(model: nn.Module) -> None:
    """Gradients as data parallel training makes them."""
    for p in model.parameters():
        gradient = torch.zeros_like(p) if p.grad is None else p.grad
        dist.all_reduce(gradient)
        p.grad = gradient / dist.get_world_size()


def branch_steps(
    model: Branches, optimizer: Any, ranks: Any, average: Callable[[], None], rows: tuple[int, int] = (6, 6)
) -> list[str]:
    """Steps on some halves; how each parameter is served after each step."""
    told = []
    for step, ways in enumerate(WAYS):
        optimizer.zero_grad()
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(sum(rows), 4, generator=generator, dtype=torch.float64).split(rows)
        y = torch.randint(3, (sum(rows),), generator=generator).split(rows)
        for rank in ranks:
            loss = F.cross_entropy(model(x[rank], ways[rank]), y[rank], reduction="sum") / sum(rows)
            (loss * (2 if len(ranks) == 1 else 1)).backward()
        average()
        with torch.no_grad():
            for p in model.parameters():
                assert p.grad is not None
                p.grad += 0.1 * p  # of a layer that is not used there is one too
        optimizer.step()
        told.append(str([(row.name, row.rule) for row in optimizer.explain()]))
    return told


@pytest.mark.filterwarnings("ignore:.*layers have a gradient, and a refresh saw no use of them")
@pytest.mark.parametrize("rows", [(6, 6), (7, 5)])
@pytest.mark.parametrize("kind", [AdaFisher, MBF, pytest.param(KFAC, marks=pytest.mark.slow)])
def test_layers_that_some_do_not_use(kind: Any, rows: tuple[int, int]) -> None:
    made = {**settings(kind), "update_interval": 1}

    def zeros(model: nn.Module) -> None:
        for p in model.parameters():
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad

    def work(rank: int) -> tuple[list[Tensor], list[str]]:
        model = branches()
        optimizer = kind(model, process_group=dist.group.WORLD, **made)
        told = branch_steps(model, optimizer, [rank], functools.partial(averaged, model), rows)
        return whole(model), told

    model = branches()
    expected = branch_steps(model, kind(model, **made), [0, 1], functools.partial(zeros, model), rows)
    # Steps 3 and 4 do not use it, which the next ones learn; what step 5 gives comes in step 6.
    assert ["fallback" in row for row in expected] == [False] * 4 + [True] * 2 + [False] * 2
    for found, told in in_threads(work, 2):
        assert told == expected
        assert_close(found, whole(model), torch.float64)


class Gated(nn.Linear):
    """What is no Linear any more once the gate is open, though one in it still is."""

    gate = False

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x) if self.gate else super().forward(x)


@pytest.mark.filterwarnings("ignore:.*cannot be served by a rule and take a fallback")
@pytest.mark.filterwarnings("ignore:.*have no layer rule and take a fallback")
@pytest.mark.filterwarnings("ignore:.*a refresh saw no use of them")
@pytest.mark.parametrize(
    ("kind", "found", "delayed"),
    [
        (AdaFisher, "fails", True),
        (KFAC, "fails", True),
        (AdaFisher, "fails inside", True),
        (AdaFisher, "fails inside", False),
        (AdaFisher, "is served inside", True),
        (AdaFisher, "is served inside", False),
        (AdaFisher, "is found out late", True),
        (AdaFisher, "is found out late", False),
    ],
)
def test_what_one_process_finds_of_a_layer_all_act_upon_together(kind: Any, found: str, delayed: bool) -> None:
    """One refresh later, where statistics come then, and what is on its way of that layer is left out."""

    def work(rank: int) -> tuple[list[Tensor], list[str]]:
        first = Gated(4, 5)
        model = nn.Sequential(first, nn.Tanh(), nn.Linear(5, 3)).double()
        with torch.no_grad():
            for p in model.parameters():
                p.copy_(torch.linspace(-1, 1, p.numel(), dtype=torch.float64).view_as(p))
        made = {**settings(kind), "update_interval": 1, "delayed": delayed}
        optimizer = kind(model, process_group=dist.group.WORLD, **made)
        told = []
        for step in range(8):
            if rank == 1 and step == 4:
                gated, last = (layer.proof for layer in optimizer.statistics.layers())
                if found.startswith("fails"):
                    proof = last if found == "fails" else gated
                    proof.reason, proof.failed = "its statistics raise an error", True
                first.gate = found == "is served inside"
            optimizer.zero_grad()
            x = torch.randn(6, 4, generator=torch.Generator().manual_seed(2 * step + rank), dtype=torch.float64)
            model(x).square().mean().backward()
            averaged(model)
            if (
                rank == 1 and step == 4 and found == "is found out late"
            ):  # as on a GPU, where a verdict waits for a step
                gated.pending[True, 2, torch.float64, None] = 1, Verdict(torch.ones(2), "float64")
            optimizer.step()
            told.append(optimizer.explain()[2 if found == "fails" else 0].rule)
        return whole(model), told

    (first, told), (second, also) = in_threads(work, 2)
    assert told == also
    if found.startswith("fails"):
        assert told == ["linear"] * (4 + delayed) + ["fallback"] * (4 - delayed)
    assert all(torch.equal(p, q) for p, q in zip(first, second, strict=True))


def over_gloo(rank: int, state: Any) -> dict[str, Any]:
    """A run with a checkpoint of one process alone in its middle, and one that begins at a state."""
    found: dict[str, Any] = {}
    for kind in (AdaFisher, EKFAC):
        model = linears(torch.float64)
        optimizer = kind(DistributedDataParallel(model), **settings(kind))
        train_shards(optimizer._model, optimizer, torch.float64, rank, 2)
        kept = copy.deepcopy((model.state_dict(), optimizer.state_dict())) if rank == 0 else None
        train_shards(optimizer._model, optimizer, torch.float64, rank, 2)
        resumed = linears(torch.float64)
        resumed.load_state_dict(state[kind][0])
        again = kind(DistributedDataParallel(resumed), **settings(kind))
        again.load_state_dict(state[kind][1])
        train_shards(again._model, again, torch.float64, rank, 2)
        found[kind.__name__] = whole(model), kept, whole(resumed)
    return found


@needs_processes
def test_two_processes_and_checkpoints_between_them_and_one(tmp_path: Path) -> None:
    """What is saved has waited for what was on its way, also where one process saves and the others go on."""
    kinds = (AdaFisher, EKFAC)
    models = {kind: linears(torch.float64) for kind in kinds}
    ours = {kind: kind(models[kind], **settings(kind)) for kind in kinds}
    states = {}
    for kind in kinds:
        train_shards(models[kind], ours[kind], torch.float64)
        states[kind] = copy.deepcopy((models[kind].state_dict(), ours[kind].state_dict()))
        assert any(float(s["pending_counts"].sum()) for s in ours[kind].state.values() if "pending_counts" in s)
        train_shards(models[kind], ours[kind], torch.float64)
    both = in_two_processes(functools.partial(over_gloo, state=states), tmp_path)
    for found in both:
        for kind in kinds:
            through, _, resumed = found[kind.__name__]
            assert_close(through, whole(models[kind]), torch.float64)
            assert_close(resumed, whole(models[kind]), torch.float64)
    for kind in kinds:
        twin = linears(torch.float64)
        kept, state = both[0][kind.__name__][1]
        twin.load_state_dict(kept)
        resumed = kind(twin, **settings(kind))
        resumed.load_state_dict(state)
        train_shards(twin, resumed, torch.float64)
        assert_close(whole(twin), whole(models[kind]), torch.float64)


# State.


@every_kind
@pytest.mark.parametrize("saved", [1, 4, 5])
def test_resumes_bit_for_bit(kind: Any, saved: int) -> None:
    """Before there is anything on its way, in a refresh, and between two."""
    model, twin, unsaved = network(), network(), network()
    ours, resumed = kind(model, **settings(kind)), kind(twin)
    train(model, ours, range(saved))
    state = copy.deepcopy(ours.state_dict())
    twin.load_state_dict(model.state_dict())
    resumed.load_state_dict(state)
    for net, optimizer in ((model, ours), (twin, resumed)):
        train(net, optimizer, range(saved, saved + 6))
    train(unsaved, kind(unsaved, **settings(kind)), range(saved + 6))
    assert_same_parameters(model, unsaved)
    assert_same_parameters(twin, unsaved)
    assert_same_state(resumed.state_dict(), ours.state_dict())


@pytest.mark.parametrize("kind", [AdaFisher, EKFAC])
def test_copies_go_on_bit_for_bit(kind: Any) -> None:
    model = network()
    ours = kind(model, **settings(kind))
    train(model, ours, range(5))
    pairs = [(model, ours), copy.deepcopy((model, ours)), pickle.loads(pickle.dumps((model, ours)))]
    for net, optimizer in pairs:
        train(net, optimizer, range(5, 9))
    for net, _ in pairs[1:]:
        assert_same_parameters(net, model)


def test_the_state_has_the_same_entries_at_every_time() -> None:
    model = network()
    ours = KFAC(model, **settings(KFAC))
    entries = []
    for step in range(6):
        train(model, ours, range(step, step + 1))
        entries.append({i: sorted(state) for i, state in ours.state_dict()["state"].items()})
    assert all(found == entries[0] for found in entries)
    assert "pending_sums" in entries[0][0]


def test_counts_that_are_saved_are_exact() -> None:
    model = nn.Linear(4, 3)
    ours = AdaFisher(model, delayed=True)
    for _ in range(2):
        model(torch.ones(2, 4)).sum().backward()
        ours.step()
    (key,) = ours.statistics.rounds.kept()
    many = float(2**24 + 1)
    ours.statistics.rounds.kept()[key].counts[:] = [many, many]
    twin = AdaFisher(model)
    ours._keep_pending()
    twin.load_state_dict(ours.state_dict())
    assert twin.state[model.weight]["pending_counts"].tolist() == [many, many]
    assert twin.statistics.rounds.kept()[key].counts == [many, many]


def test_parameters_that_are_replaced_keep_what_is_on_its_way() -> None:
    model, twin = network(), network()
    ours, other = MBF(model, **settings(MBF)), MBF(twin, **settings(MBF))
    train(model, ours, range(5))
    train(twin, other, range(5))
    model.load_state_dict({name: p.clone() for name, p in model.state_dict().items()}, assign=True)
    ours.zero_grad()
    for p in model.parameters():
        p.grad = None
    train(model, ours, range(5, 6))  # no refresh; it follows
    train(twin, other, range(5, 6))
    kept = [ours.statistics.rounds.kept(), other.statistics.rounds.kept()]
    assert len(kept[0]) == len(kept[1]) > 0


# What may happen in between.


@pytest.mark.parametrize("kind", [AdaFisher, MBF])
def test_what_is_not_finite_is_refused_when_it_comes(kind: Any) -> None:
    model = network()
    ours = kind(model, **settings(kind))
    train(model, ours, range(2))
    ours.zero_grad()
    loss = backward(model, 2)
    assert loss.isfinite()
    for site in ours.statistics.sites:
        if site.sums is not None:
            site.sums.vectors[-1].fill_(torch.nan)
    ours.step()
    assert not any(row["refused_statistics"] for row in ours.metrics().values())
    train(model, ours, range(3, 5))
    assert all(row["refused_statistics"] == 1 for row in ours.metrics().values())


def test_an_empty_batch_has_no_statistics() -> None:
    model, twin = nn.Linear(4, 3).double(), nn.Linear(4, 3).double()
    twin.load_state_dict(model.state_dict())
    pair = [(net, AdaFisher(net, delayed=True)) for net in (model, twin)]
    for step, rows in enumerate((5, 5, 0, 5, 5)):
        x = torch.randn(rows, 4, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
        for net, optimizer in pair:
            optimizer.zero_grad()
            net(x).square().sum().backward()
            optimizer.step()
    assert float(pair[0][1].state[model.weight]["factor_weight"]) == pytest.approx(1 - 0.8**3)  # of steps 0, 1 and 3


def test_zero_grad_evaluation_and_a_skipped_step_lose_nothing() -> None:
    model, twin = network(), network()
    ours, other = AdaFisher(model, **settings(AdaFisher)), AdaFisher(twin, **settings(AdaFisher))
    for net, optimizer in ((model, ours), (twin, other)):
        train(net, optimizer, range(3))
    buffers = copy.deepcopy(dict(model.named_buffers()))
    model.eval()
    backward(model, 7)
    ours.zero_grad()
    model.train()
    backward(model, 7)
    ours.found_inf = torch.ones(())
    ours.step()
    del ours.found_inf
    ours.zero_grad()
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            buffer.copy_(buffers[name])
    for net, optimizer in ((model, ours), (twin, other)):
        train(net, optimizer, range(3, 8))
    assert_same_parameters(model, twin)


@pytest.mark.filterwarnings("ignore:.*a refresh step has gradients but saw no statistics")
def test_a_closed_optimizer_takes_what_was_on_its_way() -> None:
    model = network()
    ours = AdaFisher(model, **settings(AdaFisher))
    train(model, ours, range(3))
    ours.close()
    weight = ours.state[model.get_parameter("4.weight")]["factor_weight"]
    for step, expected in ((3, 0.2), (4, 0.36), (5, 0.36), (6, 0.36)):
        train(model, ours, range(step, step + 1))
        assert float(weight) == pytest.approx(expected)


@pytest.mark.parametrize("kind", [AdaFisher, KFAC])
def test_a_changed_setting_counts_from_the_next_refresh(kind: Any) -> None:
    model, twin = network(), network()
    ours, plain = kind(model, **settings(kind)), kind(twin, **{**settings(kind), "delayed": False})
    for net, optimizer in ((model, ours), (twin, plain)):
        train(net, optimizer, range(4))
    ours.param_groups[0]["delayed"], plain.param_groups[0]["delayed"] = False, True
    for net, optimizer in ((model, ours), (twin, plain)):
        train(net, optimizer, range(4, 6))
    assert not ours.statistics.rounds
    assert plain.statistics.rounds


def test_warm_start_takes_the_place_of_what_was_on_its_way() -> None:
    model = network()
    ours = MBF(model, **settings(MBF))
    train(model, ours, range(4))
    ours.warm_start([torch.randn(8, 2, 4, 4)], lambda x: model(x).square().mean(), progress=False)
    assert not ours.statistics.rounds


def test_what_does_not_arrive_is_said_and_left_out() -> None:
    """Of a group that is gone, for one."""

    class Lost:
        def add_up(self) -> Any:
            raise RuntimeError("connection closed by peer")

    model = network()
    ours = MBF(model, **settings(MBF))
    train(model, ours, range(3))
    ours.statistics.rounds._rounds[0]._reduction = Lost()  # type: ignore[assignment]
    train(model, ours, range(3, 4))
    with pytest.raises(RuntimeError, match=r"did not arrive \(RuntimeError: connection closed by peer\), and are left"):
        train(model, ours, range(4, 5))
    train(model, ours, range(5, 9))
    assert float(ours.state[model.get_parameter("4.weight")]["fisher_updates"]) == 2  # of steps 0 and 6


def test_what_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^delayed is True and so is capturable, expected one"):
        MBF(network(), delayed=True, capturable=True)
    with pytest.raises(ValueError, match=r"^delayed is True, and only the data tell how long the statistics of 5 are"):
        AdaFisher(network(), variant="release", delayed=True)
    with pytest.raises(TypeError, match="delayed"):
        KFAC(network(), delayed=1)  # type: ignore[arg-type]


def test_a_second_refresh_is_not_called_silent(recwarn: pytest.WarningsRecorder) -> None:
    model = network()
    train(model, MBF(model, **settings(MBF)), range(6))
    assert not [w for w in recwarn if "saw no statistics" in str(w.message)]
