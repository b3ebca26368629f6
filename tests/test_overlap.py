"""Inverses and bases that are made beside training: one turn late to the bit, whatever the timing."""

from __future__ import annotations

import copy
import functools
import gc
import itertools
import os
import pickle
import random
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from fisher_kernels import EKFAC, KFAC, MBF, EKFACAdam, backends
from fisher_kernels.optim import factor_bases, factor_inverses, fisher_blocks
from fisher_kernels.optim.overlap import Overlap, Work
from tests import test_block_rules, test_factor_rules
from tests.layer_cases import NETWORKS
from tests.processes import in_two_processes, needs_processes
from tests.small_network import assert_same_parameters, assert_same_state, network, parameters_of, train

pytestmark = pytest.mark.usefixtures("one_thread")

KINDS: list[Any] = [MBF, KFAC, EKFAC, EKFACAdam]
every_kind = pytest.mark.parametrize("kind", KINDS)

BESIDE: dict[str, Any] = {"overlap": True, "refresh": "constant", "update_interval": 1, "inverse_interval": 3}
"""Work is in flight after every step but those before turns 0, 3, 6 and so on; the first begins in step 3."""


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Work does not begin before this is set."""
    event, run = threading.Event(), Work._run

    def later(work: Work) -> None:
        assert event.wait(60)
        run(work)

    monkeypatch.setattr(Work, "_run", later)
    yield event
    event.set()


def threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("fisher_kernels")]


# What is used when.


@pytest.mark.usefixtures("host_backend")
@pytest.mark.parametrize("storage", ["full", "packed"])
@pytest.mark.parametrize(
    "schedule", [{"refresh": "constant"}, {"refresh": "ramp", "ramp": 6}], ids=["constant", "ramp"]
)
def test_mini_blocks_are_one_turn_late(schedule: dict[str, Any], storage: str) -> None:
    build, batch = NETWORKS["convolutional"]
    torch.manual_seed(0)
    settings: dict[str, Any] = {**schedule, "update_interval": 2, "inverse_interval": 3, "overlap": True}
    # As in tests/test_block_rules.py, whose steps of networks pass on what rounding there was before.
    test_block_rules.follow(build(), batch, steps=9, inverse_storage=storage, tolerance=1e-8, **settings)


@pytest.mark.usefixtures("host_backend")
@pytest.mark.parametrize("method", test_factor_rules.METHODS)
@pytest.mark.parametrize("intervals", [(1, 1), (2, 3)])
def test_factors_are_one_turn_late(intervals: tuple[int, int], method: str) -> None:
    build, shape = test_factor_rules.LAYERS["linear-3d"]
    torch.manual_seed(0)
    settings: dict[str, Any] = {"update_interval": intervals[0], "inverse_interval": intervals[1], "overlap": True}
    test_factor_rules.follow(build(), test_factor_rules.batch_of(*shape), method, steps=8, **settings)


def test_it_is_not_what_is_used_without() -> None:
    """Or the tests above would pass whatever came."""
    model, twin = network(), network()
    ours, plain = MBF(model, **BESIDE), MBF(twin, **{**BESIDE, "overlap": False})
    for steps in (range(3), range(3, 4)):
        for net, optimizer in ((model, ours), (twin, plain)):
            train(net, optimizer, steps)
        same = all(torch.equal(p, q) for p, q in zip(model.parameters(), twin.parameters(), strict=True))
        assert same == (steps.stop == 3)


@every_kind
@pytest.mark.parametrize("schedule", [{}, {"refresh": "ramp", "update_interval": 2, "ramp": 6}])
def test_timing_does_not_matter(kind: Any, schedule: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    model, twin = network(), network()
    ours, other = kind(model, **{**BESIDE, **schedule}), kind(twin, **{**BESIDE, **schedule})
    train(model, ours, range(8))
    run, late = Work._run, random.Random(0)

    def later(work: Work) -> None:
        time.sleep(late.choice((0.0, 0.002, 0.02)))
        run(work)

    monkeypatch.setattr(Work, "_run", later)
    for step in range(8):
        train(twin, other, range(step, step + 1))
        time.sleep(late.choice((0.0, 0.01)))
    assert_same_parameters(model, twin)
    assert_same_state(ours.state_dict(), other.state_dict())


@every_kind
def test_no_step_waits_before_its_turn(kind: Any, held: threading.Event) -> None:
    model = network()
    ours = kind(model, **BESIDE)
    train(model, ours, range(6))  # or it would hang
    timer = threading.Timer(0.05, held.set)
    timer.start()
    train(model, ours, range(6, 7))
    assert held.is_set()
    timer.join()


def test_groups_have_turns_of_their_own(held: threading.Event) -> None:
    model = network()
    groups = [{"params": model[:4].parameters()}, {"params": model[4:].parameters(), "overlap": False}]
    ours = KFAC(model, params=groups, **{**BESIDE, "inverse_interval": 100})
    train(model, ours, range(2))
    ours.param_groups[0]["inverse_interval"] = 2
    train(model, ours, range(2, 3))
    ours.param_groups[1]["inverse_interval"] = 1
    train(model, ours, range(3, 4))  # the work on the other group is held
    states = [ours.state[model[i].weight] for i in (0, 4)]
    assert [any(name.startswith("next_") for name in state) for state in states] == [True, False]


# State.


@every_kind
@pytest.mark.parametrize("saved", [4, 6])
def test_resumes_bit_for_bit_with_work_in_flight(kind: Any, saved: int, held: threading.Event) -> None:
    model, twin = network(), network()
    ours, resumed = kind(model, **BESIDE), kind(twin)
    train(model, ours, range(saved))
    threading.Timer(0.05, held.set).start()
    state = copy.deepcopy(ours.state_dict())  # waits
    assert held.is_set()
    twin.load_state_dict(model.state_dict())
    resumed.load_state_dict(state)
    for net, optimizer in ((model, ours), (twin, resumed)):
        train(net, optimizer, range(saved, saved + 7))
    assert_same_parameters(model, twin)
    assert_same_state(resumed.state_dict(), ours.state_dict())
    unsaved = network()
    train(unsaved, kind(unsaved, **BESIDE), range(saved + 7))
    assert_same_parameters(model, unsaved)


@every_kind
def test_copies_go_on_bit_for_bit(kind: Any, held: threading.Event) -> None:
    model = network()
    ours = kind(model, **BESIDE)
    train(model, ours, range(4))
    threading.Timer(0.05, held.set).start()
    pairs = [(model, ours), copy.deepcopy((model, ours)), pickle.loads(pickle.dumps((model, ours)))]
    for net, optimizer in pairs:
        train(net, optimizer, range(4, 9))
    for net, _ in pairs[1:]:
        assert_same_parameters(net, model)


def test_the_state_has_the_same_entries_at_every_time() -> None:
    model = network()
    ours = KFAC(model, **BESIDE)
    entries = []
    for step in range(6):
        train(model, ours, range(step, step + 1))
        entries.append({i: sorted(state) for i, state in ours.state_dict()["state"].items()})
    assert all(found == entries[0] for found in entries)
    assert "next_row_inverse" in entries[0][0]


@every_kind
def test_a_changed_setting_takes_effect_in_the_next_turn(kind: Any) -> None:
    model, twin = network(), network()
    ours, plain = kind(model, **BESIDE), kind(twin, **{**BESIDE, "overlap": False})
    for net, optimizer in ((model, ours), (twin, plain)):
        train(net, optimizer, range(3))
    for settings in (ours.param_groups[0], plain.param_groups[0]):
        settings["overlap"] = not settings["overlap"]
    train(model, ours, range(3, 5))
    train(twin, plain, range(3, 5))
    has_next = [any("next_" in name for state in x.state.values() for name in state) for x in (ours, plain)]
    assert has_next == [False, True]


def test_a_group_that_is_added_joins_what_is_in_flight(held: threading.Event) -> None:
    model = network()
    ours = MBF(model, params=[{"params": model[:4].parameters()}], **BESIDE)
    train(model, ours, range(4))
    threading.Timer(0.05, held.set).start()
    ours.add_param_group({"params": model[4:].parameters()})
    assert held.is_set()
    state = ours.state[model[0].weight]
    assert not torch.equal(state["next_inverse_blocks"], state["inverse_blocks"])
    expected = state["next_inverse_blocks"].clone()
    train(model, ours, range(4, 7))
    assert torch.equal(state["inverse_blocks"], expected)


def test_warm_start_puts_its_inverses_to_use_at_once() -> None:
    model, twin = network(), network()
    ours, plain = MBF(model, **BESIDE), MBF(twin, **{**BESIDE, "overlap": False})
    train(model, ours, range(4))
    train(twin, plain, range(4))
    twin.load_state_dict(model.state_dict())
    batches = [torch.randn(8, 2, 4, 4) for _ in range(3)]
    for net, optimizer in ((model, ours), (twin, plain)):
        loss = functools.partial(lambda net, x: net(x).square().mean(), net)
        optimizer.warm_start(batches, loss, progress=False)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        for name in ("fisher_blocks", "inverse_blocks"):
            assert (name in ours.state[p]) == (name in plain.state[q])
            if name in ours.state[p]:
                assert torch.equal(ours.state[p][name], plain.state[q][name])


def test_a_cuda_graph_holds_nothing_that_runs_beside_it() -> None:
    with pytest.raises(ValueError, match=r"^overlap is True and so is capturable, expected one"):
        MBF(network(), overlap=True, capturable=True)


# Failures.


def failing(monkeypatch: pytest.MonkeyPatch, kind: Any, size: int) -> list[bool]:
    """Work on what has so many columns fails while the list has a True."""
    broken = [True]
    others = {MBF: (fisher_blocks, "_inverted"), KFAC: (factor_inverses, "_inverses")}
    where, name = others.get(kind, (factor_bases, "_bases"))
    make = getattr(where, name)

    def fail(*arguments: Any) -> Any:
        factors = [x for x in arguments if isinstance(x, Tensor)]
        if broken[0] and threading.current_thread() in threads() and any(x.shape[-1] == size for x in factors):
            raise MemoryError("none left")
        return make(*arguments)

    monkeypatch.setattr(where, name, fail)
    return broken


def one_block(kind: Any) -> dict[str, Any]:
    """Settings with which all of a Linear layer is in one matrix."""
    return {"linear_blocks": "shared"} if kind is MBF else {}


@every_kind
def test_a_failure_surfaces_with_the_name_of_the_layer(kind: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = network()
    ours = kind(model, **BESIDE, **one_block(kind))
    broken = failing(monkeypatch, kind, 65)  # [W, b] of the Linear of 64 inputs
    train(model, ours, range(4))
    assert ours.state_dict()["state"]  # does not lose a checkpoint
    before, updates = parameters_of(model), float(ours.state[model[4].weight]["fisher_updates"])
    with pytest.raises(RuntimeError, match=r"curvature of 4\.weight could not be made beside.*MemoryError: none left"):
        train(model, ours, range(4, 5))
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name])
    broken[0] = False
    ours.step()  # with the statistics and gradients that are there
    assert float(ours.state[model[4].weight]["fisher_updates"]) == updates + 1
    train(model, ours, range(5, 10))
    state = ours.state_dict()["state"][3]  # of 4.weight
    (made, *_) = [name for name in state if name.startswith("next_") and "row" not in name]
    assert float(state["fisher_updates"]) == 10
    assert not torch.equal(state[made], state[made.removeprefix("next_")])  # it was made again, and again


@every_kind
def test_a_bad_factor_keeps_what_it_has_and_is_counted(kind: Any) -> None:
    model = network()
    ours = kind(model, **{**BESIDE, "inverse_interval": 1}, **one_block(kind))
    train(model, ours, range(2))
    weight = model[4].weight
    name, made = ("fisher_blocks", "inverse_blocks") if kind is MBF else ("column_factor", "column_inverse")
    made = made if kind in (MBF, KFAC) else "column_basis"
    state = ours.state[weight]
    state[name].fill_(torch.nan)  # which no average gets rid of
    train(model, ours, range(2, 3))
    in_use, figure = state[made].clone(), "bad_blocks" if kind is MBF else "bad_inverses"
    assert ours.metrics()["4.weight"][figure] == 0
    with pytest.warns(UserWarning, match=r"of 4\.weight (are not|cannot)"):
        train(model, ours, range(3, 4))
    assert ours.metrics()["4.weight"][figure] == 1
    assert torch.equal(state[made], in_use)


# The thread.


@pytest.mark.filterwarnings("ignore:MBF. a refresh step has gradients but saw no statistics")
def test_its_thread_ends(held: threading.Event) -> None:
    gc.collect()
    before = set(threads())
    model = network()
    ours, other = MBF(model, **BESIDE), KFAC(network(), **BESIDE)
    train(model, ours, range(4))
    train(other._model, other, range(4))  # type: ignore[arg-type]
    (mine, others) = sorted(set(threads()) - before, key=lambda thread: thread.ident or 0)
    threading.Timer(0.05, held.set).start()
    ours.close()
    del other
    gc.collect()
    for thread in (mine, others):
        thread.join(10)
        assert not thread.is_alive()
    state = ours.state[model[4].weight]
    coming = state["next_inverse_blocks"].clone()
    train(model, ours, range(4, 10))  # with what it has
    assert torch.equal(state["inverse_blocks"], coming)
    assert set(threads()) <= before


def test_a_thread_computes_as_torch_is_told_to() -> None:
    beside = Overlap()
    for number in (1, 2):
        torch.set_num_threads(number)
        for select in ("auto", "reference"):
            with backends.use_backend(select):  # type: ignore[arg-type]
                work = beside.begin({0: lambda: (torch.tensor(torch.get_num_threads()),), 1: selected}, [])
            work.join()
            assert int(work.results[0][0]) == number
            assert bool(work.results[1][0]) == (select == "reference")
            assert work.is_done()
    beside.close()


def selected() -> tuple[Tensor]:
    time.sleep(0.01)  # the main thread has selected another one by now
    assert not torch.is_grad_enabled()
    return (torch.tensor(backends.selected() == "reference"),)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded")
def test_a_forked_process_goes_on() -> None:
    """It has none of its parent's threads: work that was in flight runs where it is joined, new work on new threads."""
    beside, event = Overlap(), threading.Event()

    def wait() -> tuple[Tensor]:
        assert os.getpid() != parent or event.wait(60)
        return (torch.ones(3) * 2,)

    parent = os.getpid()
    work = beside.begin({7: wait}, [])
    if (child := os.fork()) == 0:
        code = 1
        try:
            work.join()
            more = beside.begin({8: wait}, [])
            more.join()
            code = int(not (work.results[7][0].sum() == more.results[8][0].sum() == 6))
        finally:
            os._exit(code)
    assert os.waitpid(child, 0)[1] == 0
    event.set()
    work.join()
    assert work.results[7][0].sum() == 6
    beside.close()


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="workers are forked on Linux")
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded")
def test_workers_of_a_data_loader_are_forked_with_work_in_flight(held: threading.Event) -> None:
    model = network()
    ours = KFAC(model, **BESIDE)
    train(model, ours, range(4))
    data = DataLoader(torch.randn(8, 2, 4, 4), batch_size=4, num_workers=2, multiprocessing_context="fork")  # type: ignore[arg-type]
    threading.Timer(0.3, held.set).start()
    for x in itertools.chain(data, data):
        ours.zero_grad()
        model(x).square().mean().backward()
        ours.step()


# Streams, of a GPU that is played.


class Played:
    """What is called on ``torch.cuda``, in order."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.current = self.stream_of("main")

    def stream_of(self, name: str) -> Any:
        def record_event() -> str:
            self.calls.append(f"{name} records")
            return f"event {len(self.calls)} of {name}"

        def wait_event(event: str) -> None:
            self.calls.append(f"{name} waits for {event}")

        return SimpleNamespace(
            name=name, device=torch.device("cuda:0"), record_event=record_event, wait_event=wait_event
        )

    def tensor(self, name: str) -> Any:
        record = lambda stream: self.calls.append(f"{name} is used by {stream.name}")  # noqa: E731
        return SimpleNamespace(is_cuda=True, device=torch.device("cuda:0"), record_stream=record)


def test_what_streams_wait_for(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = Played()
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: gpu.stream_of("side"))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: gpu.current)

    class On:
        def __init__(self, stream: Any) -> None:
            self.stream = stream

        def __enter__(self) -> None:
            gpu.calls.append(f"on {self.stream.name}")

        def __exit__(self, *_: object) -> None:
            gpu.calls.append("off")

    monkeypatch.setattr(torch.cuda, "stream", On)

    def task() -> Any:
        gpu.calls.append("work")
        return (gpu.tensor("result"),)

    beside = Overlap()
    work = beside.begin({0: task}, [gpu.tensor("copy")])
    work.join()
    assert gpu.calls == [
        "main records",  # after the copy was made
        "copy is used by side",
        "on side",
        "side waits for event 1 of main",
        "work",
        "side records",
        "off",
        "main waits for event 6 of side",
        "result is used by main",
    ]
    beside.close()


# Processes.


def _train_a_part(rank: int, kind: Callable[..., Any]) -> list[Any]:
    model = network(dtype=torch.float64)
    model[1] = nn.Identity()  # whose statistics of a batch are not those of its parts
    parallel = DistributedDataParallel(model)
    optimizer = kind(model, **BESIDE)
    for step in range(8):
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(8, 2, 4, 4, generator=generator).double()[4 * rank : 4 * rank + 4]
        y = torch.randint(3, (8,), generator=generator)[4 * rank : 4 * rank + 4]
        optimizer.zero_grad()
        nn.functional.cross_entropy(parallel(x), y).backward()
        optimizer.step()
        time.sleep(0.01 * rank)
    return [p.detach().tolist() for p in model.parameters()]


@pytest.mark.slow
@needs_processes
@pytest.mark.parametrize("kind", [MBF, KFAC])
def test_every_process_takes_the_same_turn(kind: Any, tmp_path: Path) -> None:
    first, second = in_two_processes(functools.partial(_train_a_part, kind=kind), tmp_path)
    assert first == second
    model = network(dtype=torch.float64)
    model[1] = nn.Identity()
    train(model, kind(model, **BESIDE), range(8))
    for p, values in zip(model.parameters(), first, strict=True):
        torch.testing.assert_close(torch.tensor(values, dtype=p.dtype), p.detach(), rtol=1e-9, atol=1e-9)
