"""The tasks themselves, the way optimizers are compared on them, and the summary of the runs."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from fisher_kernels.tasks import OPTIMIZERS, TASKS, Settings, Task, compare, find_task, recipe, summarize
from fisher_kernels.tasks import text as text_task
from fisher_kernels.tasks.comparison import Spread
from fisher_kernels.tasks.optimizers import Recipe
from fisher_kernels.tasks.report import document
from fisher_kernels.tasks.task import Batch, Metric, seeded, shuffled
from fisher_kernels.tasks.training import Record, Timing, Training, cosine, state_bytes

SAMPLES = 24


@pytest.fixture(autouse=True)
def one_thread(set_threads: Callable[[int], None]) -> None:
    # Models this small train no slower on one thread, and much faster where other work shares the processor.
    set_threads(1)


def _line(seed: int, epoch: int, batch_size: int) -> Iterator[Batch]:
    x = torch.linspace(-1, 1, SAMPLES).unsqueeze(1)
    for indices in torch.split(shuffled(SAMPLES, seed, epoch), batch_size):
        yield x[indices], 2 * x[indices] + 1


def _squared_error(model: nn.Module, batch: Batch) -> Tensor:
    difference: Tensor = model(batch[0]) - batch[1]
    return difference.square().mean()


LINE = Task(
    name="line",
    summary="a straight line",
    metric=Metric("squared error", "1", higher_is_better=False, decimals=3),
    epochs=3,
    batch_size=8,
    make_model=lambda seed: seeded(seed, lambda: nn.Linear(1, 1)),
    batches=_line,
    loss=_squared_error,
    evaluate=lambda model: _squared_error(model, next(_line(0, 0, SAMPLES))).item(),
    steps_per_epoch=lambda batch_size: math.ceil(SAMPLES / batch_size),
    hyperparameters={"sgd": {"lr": 0.1}, "adamw": {"lr": 0.1}},
)
SETTINGS = Settings(epochs=3, batch_size=8)


def _sgd_from(name: str, lr: float) -> Recipe:
    return replace(recipe(LINE, "sgd", {"lr": lr}), name=name)


@pytest.fixture(params=list(TASKS.values()), ids=list(TASKS))
def task(request: pytest.FixtureRequest) -> Task:
    chosen: Task = request.param
    return chosen


def test_a_seed_fixes_the_model_and_the_batches_and_nothing_else(task: Task) -> None:
    before = torch.get_rng_state()
    same, again, other = (nn.utils.parameters_to_vector(task.make_model(s).parameters()) for s in (3, 3, 4))
    assert torch.equal(same, again)
    assert not torch.equal(same, other)
    first, repeated, next_epoch, next_seed = (
        next(task.batches(seed, epoch, 8))[0] for seed, epoch in ((3, 1), (3, 1), (3, 2), (4, 1))
    )
    assert torch.equal(first, repeated)
    assert not torch.equal(first, next_epoch)
    assert not torch.equal(first, next_seed)
    assert torch.equal(torch.get_rng_state(), before)


def test_an_epoch_has_the_announced_number_of_batches(task: Task) -> None:
    for size in (task.batch_size, 37):
        assert sum(1 for _ in task.batches(0, 1, size)) == task.steps_per_epoch(size)


def test_every_optimizer_has_tuned_hyperparameters(task: Task) -> None:
    for name in OPTIMIZERS:
        assert task.hyperparameters[name]["lr"] > 0
    for name in task.hyperparameters:
        assert recipe(task, name).name == name


def test_evaluation_leaves_the_model_as_it_was(task: Task) -> None:
    model = task.make_model(0)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    value = task.evaluate(model)
    assert value == task.evaluate(model)
    assert model.training
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_digits_splits_all_images_once() -> None:
    digits = find_task("digits")
    batches = list(digits.batches(0, 1, 64))
    images = torch.cat([batch[0] for batch in batches])
    assert images.shape == (1400, 1, 8, 8)
    assert images.min() == 0
    assert images.max() == 1
    assert len(torch.unique(torch.cat([batch[1] for batch in batches]))) == 10


def test_digits_learns() -> None:
    digits = find_task("digits")
    (record,) = compare(digits, [recipe(digits, "adamw")], [0], Settings(epochs=2, batch_size=64))
    assert record.metric[0] < 30
    assert record.metric[-1] > 90


def test_text_targets_are_the_next_bytes() -> None:
    inputs, targets = next(find_task("text").batches(0, 1, 4))
    assert inputs.shape == targets.shape == (4, text_task.CONTEXT)
    assert torch.equal(inputs[:, 1:], targets[:, :-1])
    assert bytes(inputs[0].tolist()).decode("utf-8", "ignore").isprintable() is False  # newlines, so real text
    assert targets.max() < text_task.BYTES


def test_text_held_out_paragraphs_are_not_in_the_training_text() -> None:
    training, held_out = (bytes(part.tolist()).decode("utf-8", "ignore") for part in text_task._load())
    seen = set(training.split("\n\n"))
    assert not seen & set(held_out.split("\n\n")[1:])


def test_text_model_is_causal() -> None:
    model = find_task("text").make_model(0)
    tokens = torch.randint(128, (2, 16), generator=torch.Generator().manual_seed(0))
    changed = tokens.clone()
    changed[:, 9] += 1
    difference = (model(tokens) - model(changed)).abs().amax(dim=(0, 2))
    assert difference[:9].max() == 0
    assert difference[9] > 0


@pytest.mark.parametrize(
    ("name", "overrides", "message"),
    [
        ("adam", {}, "unknown optimizer 'adam': choose from adamw, sgd, adafisher, adafisherw"),
        ("adafisher:fast", {}, "unknown variant 'fast' of adafisher: choose from paper, release, relative"),
        ("sgd:paper", {}, "unknown variant 'paper' of sgd: it has none"),
        ("sgd", {"damping": 1.0}, "sgd has no hyperparameter 'damping': it takes lr, weight_decay"),
    ],
)
def test_recipe_names_the_alternatives(name: str, overrides: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        recipe(LINE, name, overrides)


def test_recipe_puts_overrides_before_the_table() -> None:
    assert recipe(LINE, "sgd").hyperparameters == {"lr": 0.1}
    assert recipe(LINE, "sgd", {"lr": 0.2, "weight_decay": 0.0}).hyperparameters == {"lr": 0.2, "weight_decay": 0.0}
    assert recipe(LINE, "adafisher:paper").name == "adafisher"
    assert recipe(LINE, "adafisher:relative").hyperparameters["variant"] == "relative"
    assert recipe(LINE, "adafisher:relative").title == "AdaFisher (relative)"


def test_find_task_names_the_alternatives() -> None:
    with pytest.raises(ValueError, match="unknown task 'mnist': choose from digits, text"):
        find_task("mnist")


def test_compare_starts_everyone_alike_and_repeats_itself() -> None:
    recipes = [recipe(LINE, "adamw"), recipe(LINE, "sgd")]
    records = compare(LINE, recipes, [0, 5], SETTINGS)
    assert [(record.optimizer, record.seed) for record in records] == [
        ("adamw", 0),
        ("adamw", 5),
        ("sgd", 0),
        ("sgd", 5),
    ]
    assert records[0].metric[0] == records[2].metric[0] != records[1].metric[0]
    for record, again in zip(records, compare(LINE, recipes, [0, 5], SETTINGS), strict=True):
        assert record.metric == again.metric
        assert len(record.metric) == len(record.seconds) == 4
        assert len(record.training_loss) == 3
        assert record.metric[-1] < record.metric[0]
        assert record.seconds == sorted(record.seconds)
        assert record.step_ms is not None
        assert record.iteration_ms is not None
        assert record.iteration_ms.median > record.step_ms.median > 0
        assert record.parameters == 2


def test_compare_reports_every_iteration() -> None:
    seen: list[str] = []
    compare(LINE, [recipe(LINE, "sgd")], [0, 1], SETTINGS, lambda training: seen.append(training.record.optimizer))
    assert len(seen) == 2 * 3 * SETTINGS.steps_per_epoch(LINE) == 2 * 3 * 3


def test_max_steps_cuts_epochs_short() -> None:
    settings = replace(SETTINGS, max_steps=2)
    seen: list[Training] = []
    compare(LINE, [recipe(LINE, "sgd")], [0], settings, seen.append)
    assert len(seen) == 3 * settings.steps_per_epoch(LINE) == 3 * 2


def test_a_diverging_run_is_recorded_and_stops_nobody() -> None:
    records = compare(LINE, [_sgd_from("wild", 1e30), _sgd_from("tame", 0.1)], [0, 1], SETTINGS)
    summaries = summarize(records, SETTINGS.epochs)
    assert [record.diverged is None for record in records] == [False, False, True, True]
    assert "epoch 1, step" in (records[0].diverged or "")
    assert summaries[0].diverged == [0, 1]
    assert summaries[0].metric[1:] == [None, None, None]
    assert summaries[1].diverged == []
    assert None not in summaries[1].metric


def test_parameters_that_end_non_finite_count_as_diverged() -> None:
    settings = Settings(epochs=1, batch_size=SAMPLES)
    (record,) = compare(LINE, [_sgd_from("wild", math.inf)], [0], settings)
    assert record.diverged == "parameters not finite after epoch 1"
    assert record.training_loss == []


def test_summary_of_a_seed_that_diverged_is_no_mean_of_survivors() -> None:
    def run(seed: int, metric: list[float], diverged: str | None = None) -> Record:
        return Record(
            "sgd",
            "SGD",
            seed,
            {"lr": 0.1},
            metric=metric,
            training_loss=[0.0] * (len(metric) - 1),
            seconds=[float(epoch) for epoch in range(len(metric))],
            step_ms=Timing(median=seed + 1.0, mean=0, p20=0, p80=0),
            diverged=diverged,
        )

    (summary,) = summarize([run(0, [1.0, 2.0, 3.0]), run(1, [2.0, 4.0], "loss nan"), run(2, [3.0, 6.0, 9.0])], 2)
    assert summary.metric == [Spread(2.0, 1.0), Spread(4.0, 2.0), None]
    assert summary.diverged == [1]
    assert summary.seconds == [0.0, 1.0, None]
    assert summary.step_ms == 2.0
    assert summary.iteration_ms is None


def test_document_is_plain_json_without_nan() -> None:
    record = Record("sgd", "SGD", 0, {"lr": 0.1, "betas": (0.9, 0.99)}, metric=[math.inf, math.nan])
    data = document(LINE, replace(SETTINGS, epochs=1), [record])
    assert data["runs"][0]["metric"] == [None, None]
    assert data["runs"][0]["hyperparameters"]["betas"] == [0.9, 0.99]
    assert data["summary"][0]["metric"] == [{"mean": None, "deviation": 0.0}, {"mean": None, "deviation": 0.0}]


def test_cosine_goes_from_one_to_zero() -> None:
    assert cosine(0, 10) == 1
    assert cosine(5, 10) == pytest.approx(0.5)
    assert cosine(10, 10) == pytest.approx(0, abs=1e-15)


def test_schedule_reaches_the_optimizer() -> None:
    for is_cosine, last in ((True, 0.0), (False, 0.1)):
        training = Training(LINE, recipe(LINE, "sgd"), 0, replace(SETTINGS, cosine=is_cosine))
        training.evaluate()
        while not training.finished:
            training.run_epoch()
        assert training.optimizer.param_groups[0]["lr"] == pytest.approx(last)
        assert training.record.hyperparameters["lr"] == 0.1


def test_timing_leaves_out_the_first_calls() -> None:
    timing = Timing.of([1.0] * 5 + [0.001, 0.002, 0.003])
    assert timing == Timing(median=2.0, mean=2.0, p20=1.0, p80=3.0)
    assert Timing.of([0.001]) == Timing(median=1.0, mean=1.0, p20=1.0, p80=1.0)
    assert Timing.of([]) is None


def test_state_bytes_count_each_storage_once() -> None:
    weight = nn.Parameter(torch.zeros(100))
    optimizer = torch.optim.SGD([weight])
    shared = torch.zeros(100)
    optimizer.state[weight] = {"momentum": shared, "alias": [shared, {"view": shared[:10]}], "step": torch.zeros(())}
    assert state_bytes(optimizer) == 404
