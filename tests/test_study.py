"""The study of all tasks: the search for rates, runs that are kept, and the tables made of them."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.study import overviews, pages, pictures, plan, rates, results, runs, tuning
from bench.study.runs import Line, Run
from fisher_kernels.tasks import CONTESTANTS, TASKS, MissingDataError, find_task

STEPS = Run("digits", "sgd", 0.01, 64, 5, epochs=2, max_steps=2)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where lines are kept instead of those of the project."""
    monkeypatch.setattr(runs, "FOLDER", tmp_path)
    return tmp_path


def _line(run: Run, metric: list[float], **facts: Any) -> Line:
    laps = range(len(metric))
    known = {
        "key": run.key,
        "run": run.configuration,
        "machine": {"processor": "P", "capability": "c", "torch": "2", "python": "3", "fisher_kernels": "0"},
        "title": plan.titles()[run.optimizer],
        "metric": metric,
        "also": [],
        "iterations": [10 * lap for lap in laps],
        "seconds": [2.0 * lap for lap in laps],
        "processor_seconds": [1.0 * lap for lap in laps],
        "step_ms": 1.0,
        "iteration_ms": 2.0,
        "state_bytes_per_parameter": 8.0,
        "diverged": None,
        "took": 3.0,
    }
    return Line(**{**known, **facts})


# The search for rates.


def test_the_grid_of_rates() -> None:
    assert [rates.rate(quarter) for quarter in range(-4, 6)] == [0.1, 0.17, 0.3, 0.55, 1, 1.7, 3, 5.5, 10, 17]
    for quarter in range(-20, 9):
        assert rates.quarters(rates.rate(quarter)) == quarter


@given(guess=st.integers(-16, 4), center=st.floats(-18, 6), trials=st.integers(3, 8), lost=st.floats(-20, 20))
def test_a_search_makes_so_many_trials_and_closes_in(guess: int, center: float, trials: int, lost: float) -> None:
    """On a valley in the logarithm of the rate, beyond some rate of which everything diverges."""
    seen = []

    def loss(lr: float) -> float:
        seen.append(lr)
        place = 4 * math.log10(lr)
        return math.inf if place > lost else abs(place - center)

    found = rates.search(guess, trials, loss)
    made = len(seen)
    assert len(set(seen)) == made <= trials + rates.BEYOND
    assert [*found] == sorted(seen)
    assert all(found[lr] == loss(lr) for lr in found)
    finite = [lr for lr in found if math.isfinite(found[lr])]
    if not finite:
        assert made == trials
        assert min(found) == rates.rate(guess - 2 * (trials - 2))
        return
    best = rates.best(found)
    if best in (min(found), max(found)):  # half a decade in each trial from the guess on
        assert made == trials + rates.BEYOND
        assert abs(rates.quarters(best) - guess) == 2 * (made - 2)
    elif made > trials:  # as many as it took to find the end that was best to be inside, and not one more
        before = {lr: found[lr] for lr in seen[: made - 1]}
        assert rates.best(before) in (min(before), max(before))
    elif trials >= 5 and len(finite) == trials and abs(center - guess) < 2:
        assert abs(rates.quarters(best) - center) < 1


def test_all_rates_that_diverge_are_named() -> None:
    with pytest.raises(ValueError, match=r"all rates diverge: 0\.1, 0\.3"):
        rates.best({0.1: math.inf, 0.3: math.inf})
    assert rates.best({0.1: 2.0, 0.3: 1.0, 1.0: 1.0}) == 0.3


@pytest.mark.parametrize("falls", [False, True])
def test_every_optimizer_gets_as_many_trials(falls: bool) -> None:
    """And as many more where the best of them is at an end."""
    trials = {}
    for name in plan.contestants("autoencoder", 32):
        made: list[float] = []

        def line_of(run: Run, made: list[float] = made) -> Line:
            made.append(run.lr)
            assert run.seed in plan.TUNING_SEEDS
            off = abs(math.log(run.lr / plan.GUESSES[run.optimizer]))
            return _line(run, [5.0, 1 + (run.lr if falls else off)])

        tuning.search("autoencoder", 32, name, line_of)
        trials[name] = len(made)
    assert set(trials.values()) == {(tuning.TRIALS + falls * rates.BEYOND) * len(plan.TUNING_SEEDS)}
    assert not set(plan.TUNING_SEEDS) & set(plan.SEEDS)


def test_every_contestant_is_somewhere() -> None:
    assert {*plan.LENGTHS} == {*TASKS}
    assert {name for task in plan.FROM_OUTSIDE for name in plan.contestants(task, plan.own_batch_size(task))} == {
        *plan.OURS,
        *CONTESTANTS,
    }
    for task, lengths in plan.LENGTHS.items():
        assert plan.own_batch_size(task) == find_task(task).batch_size or task == "graph"
        assert all(length.seconds > 0 for length in lengths.values())


# Runs that are kept.


@pytest.mark.parametrize(
    "change",
    [{"task": "autoencoder"}, {"optimizer": "adamw"}, {"lr": 0.02}, {"batch_size": 32}, {"seed": 6}, {"epochs": 3}],
)
def test_the_key_is_of_all_that_makes_the_figures(change: dict[str, Any]) -> None:
    assert replace(STEPS, **change).key != STEPS.key == replace(STEPS).key


def test_hyperparameters_of_the_task_are_in_the_key(monkeypatch: pytest.MonkeyPatch) -> None:
    before = STEPS.key
    task = find_task("digits")
    table = {**task.hyperparameters, "sgd": {"lr": 7.0, "weight_decay": 0.5}}
    monkeypatch.setattr(runs, "find_task", lambda _: replace(task, hyperparameters=table))
    changed = replace(STEPS)
    assert changed.configuration["hyperparameters"] == {"lr": 0.01, "weight_decay": 0.5}
    assert changed.key != before


def test_a_run_is_carried_out_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = runs.ensure(STEPS)
    assert first.iterations == [0, 2, 4]
    assert len(first.metric) == len(first.seconds) == 3
    assert first.diverged is None
    (text,) = (folder / "digits.jsonl").read_text().splitlines()
    assert Line(**json.loads(text)) == first == runs.look_up(STEPS)
    monkeypatch.setattr(Run, "carry_out", lambda self: pytest.fail(f"{self} is known"))
    assert runs.ensure(STEPS) == first
    with pytest.raises(LookupError, match=r"digits, sgd at 0\.01, seed 6: has not been run"):
        runs.look_up(replace(STEPS, seed=6))


def test_only_figures_by_the_clock_are_of_a_machine(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    timed = replace(STEPS, epochs=None, max_steps=None, seconds=1.0)
    for run in (STEPS, timed):
        runs.keep(_line(run, [1.0, 2.0]))
    made: list[Run] = []

    def carry_out(run: Run) -> Line:
        made.append(run)
        return _line(run, [1.0, 3.0], machine=runs.machine())

    monkeypatch.setattr(Run, "carry_out", carry_out)
    assert runs.ensure(STEPS).metric == runs.ensure(timed, here=False).metric == [1.0, 2.0]
    assert not made
    for _ in range(2):
        assert runs.ensure(timed).metric == [1.0, 3.0]  # the line that came last
    assert made == [timed]


@pytest.mark.parametrize("stop", ["loss", "error"])
def test_what_stops_a_run_is_kept(folder: Path, monkeypatch: pytest.MonkeyPatch, stop: str) -> None:
    run = replace(STEPS, lr=1e30)
    if stop == "error":

        def lap(training: Any, on_step: Any = None) -> None:
            raise RuntimeError("linalg.eigh: it did not converge\nand more")

        monkeypatch.setattr(runs.Training, "run_lap", lap)
    line = runs.ensure(run)
    assert line.loss == math.inf
    assert line.diverged is not None
    assert line.diverged.startswith("loss nan in epoch" if stop == "loss" else "RuntimeError: linalg.eigh: it did not")
    assert "more" not in line.diverged


def test_data_that_is_missing_stops_the_study(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is no property of an optimizer."""

    def missing(run: Run, *_: Any) -> None:
        raise MissingDataError("Fashion-MNIST is not there")

    monkeypatch.setattr(runs, "Training", missing)
    with pytest.raises(MissingDataError):
        runs.ensure(STEPS)
    assert not [*folder.iterdir()]


def test_a_long_curve_is_thinned() -> None:
    assert Line.of(STEPS, _record(200), 1.0).iterations == [round(200 * i / 24) for i in range(25)]
    assert Line.of(STEPS, _record(24), 1.0).iterations == [*range(25)]


def _record(laps: int) -> Any:
    record = runs.Record("sgd", "SGD", 0, {})
    record.iterations = [*range(laps + 1)]
    return record


def test_losses_are_the_smaller_the_better() -> None:
    assert _line(STEPS, [10.0, 99.0]).loss == -99.0
    assert _line(replace(STEPS, task="text"), [5.0, 2.0]).loss == 2.0
    assert _line(STEPS, [10.0, math.nan]).loss == _line(STEPS, []).loss == math.inf
    assert _line(STEPS, [10.0, 99.0], diverged="loss nan").loss == math.inf


# Tables and pictures.


def _fill(metric: Callable[[Run], list[float]], **facts: Any) -> None:
    """Lines of all runs of the autoencoder at batches of 32."""
    name, size = "autoencoder", 32

    def line_of(run: Run) -> Line:
        lost = run.optimizer == "lbfgs"
        line = _line(run, [9.0, 5.0 + abs(math.log10(run.lr / 0.01))], diverged="loss nan" if lost else None)
        runs.keep(line)
        return line

    for optimizer in plan.contestants(name, size):
        tuning.search(name, size, optimizer, line_of)
    lrs = tuning.chosen(name, size)
    assert "lbfgs" not in lrs
    for run in (*plan.runs_at_equal_time(name, size, lrs), *plan.runs_at_equal_steps(name, size, lrs)):
        runs.keep(_line(run, metric(run), **facts))


def _falling(run: Run) -> list[float]:
    """MBF is where AdamW ends after half of its time, Muon never, all others with it."""
    ends = {"mbf": 4.0, "muon": 9.0}
    end = ends.get(run.optimizer, 6.0) + 0.1 * (run.seed - 1)
    return [8.0 + (end - 8.0) * lap / 24 for lap in range(25)]


def test_tables_of_what_was_run(folder: Path) -> None:
    _fill(_falling)
    found = results.results("autoencoder", 32)
    assert found.lost == ["lbfgs"]
    text = pages.tables(found)
    lines = text.splitlines()
    by_time, by_steps = [line for line in lines if line.startswith("| MBF |")]
    assert "| 4.00 ± 0.10 | 12.00 s (0.50) | 240 | 100.00 | 48.0 | 24.0 | 8.0 |" in by_time
    assert "| 7.00 ± 0.03 | 6.00 ± 0.05 | 4.00 ± 0.10 | 48.0 | 24.0 |" in by_steps
    assert any(line.startswith("| Muon |") and "| never |" in line for line in lines)
    assert "| L-BFGS |  | fails at every rate tried |" in text
    order = [line.split(" | ")[0] for line in lines if " s (" in line or "| never |" in line]
    assert order[0] == "| MBF"
    assert order[-1] == "| Muon"
    assert "torch 2, Python 3" in text
    (row,) = [line for line in overviews.overview([found]).splitlines() if "autoencoder" in line]
    assert "MBF 4.00 ± 0.10 | MBF in 0.50 of its time | SGD 6.00 ± 0.10 | 6.00 ± 0.10 | MBF 4.00 ± 0.10" in row
    made = overviews.pages_of_all([found])
    (row,) = [line for line in made["of-sofim.md"].splitlines() if "autoencoder" in line]
    assert row == ("| `autoencoder`, nats/image | 32 | 4 | 6.00 ± 0.10 | 6.00 ± 0.10 | 1.00 | 6.00 ± 0.10 | 1.00 |")
    (row,) = [line for line in made["of-mbf.md"].splitlines() if "autoencoder" in line]
    assert row.endswith("| 6.00 ± 0.10 | 4.00 ± 0.10 | 0.50 |")
    assert pictures.picture(found).startswith(b"\x89PNG")
    shown = pages.rates_table("autoencoder", 32)
    (sgd,) = [line for line in shown.splitlines() if line.startswith("| SGD |")]
    assert "**0.01: 5.00**" in sgd
    assert sgd.count(": ") == tuning.TRIALS
    (lbfgs,) = [line for line in shown.splitlines() if line.startswith("| L-BFGS |")]
    assert lbfgs.count("diverges") == tuning.TRIALS


def test_what_is_best_in_either_table_is_in_the_picture(folder: Path) -> None:
    _fill(lambda run: [x - 3.0 * (run.epochs is not None) for x in _falling(run)])
    for axes in pictures.draw(results.results("autoencoder", 32)).axes:
        ends = [line.get_ydata()[-1] for line in axes.lines]
        assert axes.get_ylim()[0] < min(ends)


def test_who_diverged_is_last_and_has_no_figure(folder: Path) -> None:
    """One seed is enough: a mean over the others would flatter it."""

    def metric(run: Run) -> list[float]:
        return [8.0, 0.5, 0.4] if run.optimizer == "kfac" and run.seed == 1 else _falling(run)

    _fill(metric)
    lrs = tuning.chosen("autoencoder", 32)
    for run in plan.runs_at_equal_time("autoencoder", 32, lrs):
        if run.optimizer == "kfac" and run.seed == 1:
            runs.keep(_line(run, metric(run), diverged="loss nan"))
    found = results.results("autoencoder", 32)
    (kfac,) = [s for s in found.at_equal_time if s.optimizer == "kfac"]
    assert kfac.metric[1] is not None
    assert kfac.metric[2:] == [None] * 23
    assert found.goal is not None
    assert found.goal.seconds["kfac"] is None
    rows = [line for line in pages.tables(found).splitlines() if line.startswith("| ")]
    assert any("KFAC" in row and "diverged (1 of 3) | never" in row for row in rows)
    assert pictures.picture(found).startswith(b"\x89PNG")


def test_a_table_is_of_one_machine_and_of_all_runs(folder: Path) -> None:
    _fill(_falling)
    lrs = tuning.chosen("autoencoder", 32)
    run = next(plan.runs_at_equal_time("autoencoder", 32, lrs))
    runs.keep(_line(run, _falling(run), machine={"processor": "Q"}))
    with pytest.raises(ValueError, match="are of several machines: run them again"):
        results.results("autoencoder", 32)
    with pytest.raises(LookupError, match="has not been run"):
        results.results("autoencoder", 256)


@pytest.mark.parametrize("task", plan.LENGTHS)
def test_tasks_have_the_rates_that_were_found(task: str) -> None:
    """Those of their own batch size."""
    table = find_task(task).hyperparameters
    chosen = tuning.chosen(task, plan.own_batch_size(task))
    assert {name: table[name]["lr"] for name in plan.OURS} == {name: chosen[name] for name in plan.OURS}


@pytest.mark.parametrize(
    ("task", "size"),
    [(task, size) for task, lengths in plan.LENGTHS.items() for size in lengths],
)
def test_pages_have_the_figures_of_the_runs(task: str, size: int) -> None:
    """The committed tables are made of the committed lines."""
    folder = Path(pages.__file__).parents[2] / "docs" / "results" / "study"
    rates_page, page = folder / f"rates-{task}-{size}.md", folder / f"{task}-{size}.md"
    for path, make in (
        (rates_page, lambda: pages.rates_table(task, size)),
        (page, lambda: pages.tables(results.results(task, size))),
    ):
        if path.exists():
            assert path.read_text() == make()
        else:
            with pytest.raises(LookupError):
                make()


def test_pages_over_all_tasks_have_the_figures_of_the_runs() -> None:
    """As those of each task."""
    found = []
    for task, lengths in plan.LENGTHS.items():
        for size in lengths:
            with contextlib.suppress(LookupError):
                found.append(results.results(task, size))
    folder = Path(pages.__file__).parents[2] / "docs" / "results" / "study"
    for name, text in overviews.pages_of_all(found).items():
        assert (folder / name).read_text() == text
