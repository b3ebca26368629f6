"""The tasks themselves, the way optimizers are compared on them, and the summary of the runs."""

from __future__ import annotations

import gzip
import math
import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Literal

import pytest
import torch
from rich.console import Console
from torch import Tensor, nn
from torch.nn import functional as F

from fisher_kernels.tasks import (
    CONTESTANTS,
    OPTIMIZERS,
    TASKS,
    Comparison,
    Interrupted,
    Settings,
    Task,
    at_equal_time,
    compare,
    curves,
    digit_images,
    fashion_images,
    find_task,
    finetune,
    graph,
    recipe,
    summarize,
)
from fisher_kernels.tasks import text as text_task
from fisher_kernels.tasks import training as training_module
from fisher_kernels.tasks.comparison import TIME_POINTS, EqualTime, Reached, Spread, Summary, reached
from fisher_kernels.tasks.optimizers import Entry, Packaged, Recipe, hyperparameter
from fisher_kernels.tasks.options import options
from fisher_kernels.tasks.report import document, markdown, tables
from fisher_kernels.tasks.task import (
    EVALUATIONS,
    Batch,
    Figures,
    Metric,
    MissingDataError,
    MissingExtraError,
    evaluation,
    seeded,
    shuffled,
)
from fisher_kernels.tasks.training import Record, Timing, Training, cosine, state_bytes
from tests import idx

if TYPE_CHECKING:
    from numbers import Rational

SAMPLES = 24


@pytest.fixture(autouse=True)
def one_thread(set_threads: Callable[[int], None]) -> None:
    # Models this small train no slower on one thread, and much faster where other work shares the processor.
    set_threads(1)


@pytest.fixture(autouse=True)
def few_curves(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """All of them take a second."""
    monkeypatch.setattr(curves, "TRAINING_IMAGES", 200)
    monkeypatch.setattr(curves, "TEST_IMAGES", 50)
    curves.load.cache_clear()
    yield
    curves.load.cache_clear()


@pytest.fixture(autouse=True)
def few_images(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Fashion-MNIST need not be there."""
    monkeypatch.setattr(fashion_images, "_folders", [])
    fashion_images.look_in(idx.fashion(tmp_path_factory.mktemp("fashion")))
    yield
    fashion_images.load.cache_clear()


@pytest.fixture(autouse=True)
def little_text(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Adapters of a model that has read little."""
    first, training, held_out = finetune.halves()
    monkeypatch.setattr(finetune, "halves", lambda: (first[:6_000], training[:6_000], held_out[:3_000]))
    finetune.pretrained.cache_clear()
    yield
    finetune.pretrained.cache_clear()


class Clock:
    """Processor time that passes in iterations alone, ``cost`` seconds in each."""

    def __init__(self) -> None:
        self.now, self.cost = 0.0, 1.0

    def process_time(self) -> float:
        self.now += self.cost
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    both = SimpleNamespace(process_time=clock.process_time, perf_counter=time.perf_counter)
    monkeypatch.setattr(training_module, "time", both)
    return clock


def _line(seed: int, epoch: int, batch_size: int) -> Iterator[Batch]:
    x = torch.linspace(-1, 1, SAMPLES).unsqueeze(1)
    for indices in torch.split(shuffled(SAMPLES, seed, epoch), batch_size):
        yield x[indices], 2 * x[indices] + 1


def _evaluate_line(model: nn.Module) -> Figures:
    x, y = next(_line(0, 0, SAMPLES))
    return Figures(F.mse_loss(model(x), y).item())


LINE = Task(
    name="line",
    summary="a straight line",
    metric=Metric("squared error", "1", higher_is_better=False, decimals=3),
    epochs=3,
    batch_size=8,
    make_model=lambda seed: seeded(seed, lambda: nn.Linear(1, 1)),
    batches=_line,
    criterion=F.mse_loss,
    distribution="bernoulli",
    evaluate=_evaluate_line,
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


def test_tables_can_show_the_eighths_of_a_budget(task: Task) -> None:
    assert task.evaluations % TIME_POINTS == 0 < task.evaluations


def test_every_optimizer_has_tuned_hyperparameters(task: Task) -> None:
    for name in OPTIMIZERS:
        assert task.hyperparameters[name]["lr"] > 0
    for name in task.hyperparameters:
        assert recipe(task, name).name == name


def test_evaluation_leaves_the_model_as_it_was(task: Task) -> None:
    model = task.make_model(0)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    figures = task.evaluate(model)
    assert figures == task.evaluate(model)
    assert (figures.also is None) == (task.also is None)
    assert model.training
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    task.evaluate(model.eval())
    assert not model.training


def test_evaluation_ends_with_the_mode_it_found_whatever_happens() -> None:
    model = nn.Sequential(nn.Dropout())
    with suppress(RuntimeError), evaluation(model):
        assert not model[0].training
        assert not torch.is_grad_enabled()
        raise RuntimeError
    assert model[0].training
    assert torch.is_grad_enabled()


def test_digits_splits_all_images_once() -> None:
    digits = find_task("digits")
    batches = list(digits.batches(0, 1, 64))
    training, test = (images for images, _ in digit_images.load())
    assert (len(training), len(test)) == (1400, 397)
    # Each image of scikit-learn is in one part; none occurs twice, so no test image was trained on.
    assert len(torch.unique(torch.cat([training, test]), dim=0)) == 1797
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


def test_autoencoder_sees_the_images_of_digits_in_the_same_order() -> None:
    autoencoder, digits = find_task("autoencoder"), find_task("digits")
    for batch, (images, _) in zip(autoencoder.batches(3, 1, 64), digits.batches(3, 1, 64), strict=True):
        assert torch.equal(batch[0], images.view(-1, 64))
        assert torch.equal(batch[1], batch[0])


@pytest.mark.parametrize(
    ("name", "widths"),
    [
        ("autoencoder", [64, 500, 250, 30]),
        ("curves", [784, 400, 200, 100, 50, 25, 6]),
        ("fashion-autoencoder", [784, 1000, 500, 250, 30]),
    ],
)
def test_autoencoders_are_deep_and_linear_at_the_code_and_at_the_end(name: str, widths: list[int]) -> None:
    layers = list(find_task(name).make_model(0).children())
    linear = [layer for layer in layers if isinstance(layer, nn.Linear)]
    assert [layer.in_features for layer in linear] + [linear[-1].out_features] == widths + widths[-2::-1]
    bare = (linear[len(widths) - 2], linear[-1])
    after = ["Linear" if layer in bare else "Linear, ReLU" for layer in linear]
    assert ", ".join(type(layer).__name__ for layer in layers) == ", ".join(after)


def test_autoencoder_sums_over_pixels_and_averages_over_images() -> None:
    autoencoder = find_task("autoencoder")
    model = autoencoder.make_model(0)
    test = digit_images.load()[1][0].flatten(1)
    x = test.double()
    p = torch.sigmoid(model(test).detach().double())
    cross_entropy = -(x * p.log() + (1 - x) * (1 - p).log()).sum(dim=1).mean()
    squared_error = (p - x).square().sum(dim=1).mean()
    # A sum of 64 terms in float32, and the mean of 397 of them: relative errors of some 1e-7 each.
    assert autoencoder.loss(model, (test, test)).item() == pytest.approx(cross_entropy.item(), rel=1e-5)
    assert autoencoder.evaluate(model) == pytest.approx((cross_entropy.item(), squared_error.item()), rel=1e-5)


def test_autoencoder_learns() -> None:
    autoencoder = find_task("autoencoder")
    (record,) = compare(autoencoder, [recipe(autoencoder, "adamw")], [0], Settings(epochs=1, batch_size=32))
    assert record.metric[0] > 40
    assert record.metric[1] < 30
    assert record.also[1] < 0.6 * record.also[0]


def test_curves_go_through_three_points_in_gaussian_ink() -> None:
    images = curves.draw(3, seed=5)
    points = 3 + 21 * torch.rand(3, 3, 2, generator=torch.Generator().manual_seed(5))
    for image, (p, q, r) in zip(images.view(3, 28, 28), points.double(), strict=True):
        t = torch.linspace(0, 1, 20_000, dtype=torch.float64).unsqueeze(1)
        # Newton's form of the same quadratic.
        curve = (p + 2 * t * (q - p) + 2 * t * (t - 0.5) * (p - 2 * q + r)).clamp(0, 27)
        grid = torch.cartesian_prod(torch.arange(28.0), torch.arange(28.0)).double()
        distance = torch.stack([(curve - pixel).norm(dim=1).min() for pixel in grid]).view(28, 28)
        ink = (-(distance**2) / (2 * curves.INK**2)).exp()
        # The points that stand for the curve are on it, so never nearer, and up to 1.25 pixels apart where it runs
        # fast. Midway between two of them exp(-0.63^2 / (2 * 0.9^2)) = 0.78 of the ink is left.
        assert (image <= ink + 1e-5).all()
        assert (ink - image).max() < 0.22
        assert (ink - image).mean() < 2e-3
        assert image.max() > 0.99


def test_curves_are_generated_once_and_never_in_both_parts() -> None:
    training, test = curves.load()
    assert (len(training), len(test)) == (200, 50)
    assert len(torch.unique(torch.cat([training, test]), dim=0)) == 250
    assert curves.load()[0] is training
    # A product of matrices may round in another way in a smaller batch: coordinates up to 27 by 2e-6 or so.
    assert (curves.draw(7, seed=0) - training[:7]).abs().max() < 1e-4
    assert (curves.draw(7, seed=1) - training[:7]).abs().max() > 0.5
    batch, targets = next(find_task("curves").batches(0, 1, 20))
    assert targets is batch
    assert {tuple(row.tolist()) for row in batch} <= {tuple(row.tolist()) for row in training}


def test_curves_learn() -> None:
    task = find_task("curves")
    (record,) = compare(task, [recipe(task, "adamw")], [0], Settings(epochs=5, batch_size=20))
    assert record.metric[0] > 500
    assert record.metric[-1] < 0.6 * record.metric[0]


def test_fashion_is_read_as_it_is_in_the_files(tmp_path: Path) -> None:
    idx.fashion(tmp_path, training=30, test=20, suffix="")
    fashion_images.look_in(tmp_path)
    (images, labels), (test_images, _) = fashion_images.load()
    assert images.shape == (30, 1, 28, 28)
    assert len(test_images) == 20
    assert labels.tolist() == [*range(10)] * 3
    content = (tmp_path / "train-images-idx3-ubyte").read_bytes()
    assert bytes(images[7].flatten().tolist()) == content[16 + 7 * 784 : 16 + 8 * 784]
    batches = list(find_task("fashion").batches(0, 1, 8))
    assert sorted(torch.cat([y for _, y in batches]).tolist()) == sorted(labels.tolist())
    assert torch.equal(
        torch.cat([x for x, _ in batches]).sum().double(),
        torch.cat([(x * 255).round() for x, _ in batches]).div(255).sum().double(),
    )
    flat, targets = next(find_task("fashion-autoencoder").batches(0, 1, 8))
    assert targets is flat
    assert torch.equal(flat, batches[0][0].flatten(1))


@pytest.mark.parametrize("below", ["", "usr/share/datasets/fashion-mnist", "FashionMNIST/raw", "raw"])
@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_fashion_is_found_where_packages_have_it(
    below: str, suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    idx.fashion(tmp_path / below, training=10, test=10, suffix=suffix)
    expected = [tmp_path / below / f"{name}-images-idx3-ubyte{suffix}" for name in ("train", "t10k")]
    fashion_images.look_in(tmp_path)
    assert [images for images, _ in fashion_images.find()] == expected
    monkeypatch.setattr(fashion_images, "_folders", [])
    monkeypatch.setenv(fashion_images.VARIABLE, str(tmp_path))
    assert [images for images, _ in fashion_images.find()] == expected


def test_fashion_that_is_nowhere_says_where_it_was_looked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(MissingDataError, match=re.escape(f"{tmp_path} has no Fashion-MNIST: expected the files")):
        fashion_images.look_in(tmp_path)
    monkeypatch.setattr(fashion_images, "_folders", [])
    monkeypatch.setattr(fashion_images, "PLACES", (tmp_path / "one", tmp_path / "two"))
    monkeypatch.delenv(fashion_images.VARIABLE, raising=False)
    message = f"Fashion-MNIST is not in {tmp_path / 'one'}, {tmp_path / 'two'}: `make data` in a checkout"
    with pytest.raises(MissingDataError, match=re.escape(message)):
        fashion_images.find()
    idx.fashion(tmp_path / "two", training=10, test=10)
    assert fashion_images.find()[0][0].parent == tmp_path / "two"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "begins with , expected 00 00 08"),
        (b"\0\0\x0d\1\0\0\0\1\0", "begins with 00 00 0d 01, expected 00 00 08"),
        (b"\0\0\x08\1\0\0\0\3\1\2", "has 10 bytes, expected 11 for sizes (3,)"),
        (b"\0\0\x08\2\0\0\0\3", "has 8 bytes, expected"),
    ],
)
def test_what_is_no_idx_file_is_refused(content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=re.escape(message)):
        fashion_images.read_idx(path)
    compressed = tmp_path / "file.gz"
    compressed.write_bytes(gzip.compress(b"\0\0\x08\1\0\0\0\1\5")[:-6])
    with pytest.raises(ValueError, match="cannot be decompressed"):
        fashion_images.read_idx(compressed)


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        (
            "train-images-idx3-ubyte",
            torch.zeros(4, 27, 28, dtype=torch.uint8),
            "has shape (4, 27, 28), expected",
        ),
        ("train-labels-idx1-ubyte", torch.zeros(9, dtype=torch.uint8), "has shape (9,), expected (10,)"),
        ("t10k-labels-idx1-ubyte", torch.full((10,), 10, dtype=torch.uint8), "has the label 10, expected 0 to 9"),
    ],
)
def test_files_that_do_not_fit_together_are_refused(name: str, values: Tensor, message: str, tmp_path: Path) -> None:
    idx.fashion(tmp_path, training=10, test=10, suffix="")
    idx.write(tmp_path / name, values)
    fashion_images.look_in(tmp_path)
    with pytest.raises(ValueError, match=re.escape(f"{tmp_path / name} {message}")):
        fashion_images.load()


@pytest.mark.parametrize(("name", "epochs"), [("fashion", 8), ("vit", 12)])
def test_images_of_clothes_are_learnt(name: str, epochs: int) -> None:
    task = find_task(name)
    (record,) = compare(task, [recipe(task, "adamw")], [0], Settings(epochs=epochs, batch_size=20))
    assert record.metric[0] < 40
    assert record.metric[-1] > 60


def test_graph_averages_over_neighbours() -> None:
    count = len(graph.load()[1])
    assert count == 1797
    features = graph.load()[0].double()
    squares = features.square().sum(1)
    distances = squares[:, None] + squares - 2 * features @ features.T
    # Where several lie as far away as the tenth, any of them may be a neighbour; nothing else may differ.
    order = distances.fill_diagonal_(math.inf).sort(1).values
    found = graph.adjacency().to_dense()
    assert torch.equal(found, found.T)
    edges = found.bool().fill_diagonal_(False)
    sure = distances < order[:, 9:10] - 1e-9
    assert bool(edges[sure].all())
    allowed = distances <= order[:, 9:10] + 1e-9
    assert not bool((edges & ~(allowed | allowed.T)).any())
    degrees = found.bool().sum(1).double()
    expected = found.bool().double() / (degrees[:, None] * degrees).sqrt()
    assert (found.double() - expected).abs().max() < 1e-6
    labelled, others = graph.split()
    assert torch.cat([labelled, others]).sort().values.tolist() == [*range(count)]
    assert graph.load()[1][labelled].bincount().tolist() == [20] * 10


def test_graph_learns() -> None:
    task = find_task("graph")
    (record,) = compare(task, [recipe(task, "adamw", {"lr": 3e-3})], [0], Settings(epochs=20, batch_size=200))
    assert record.metric[0] < 30
    assert record.metric[-1] > 85


def test_adapters_alone_are_trained_and_do_nothing_at_first() -> None:
    task = find_task("finetune")
    model, base = task.make_model(3), finetune.pretrained()
    inputs, _ = next(task.batches(0, 1, 2))
    assert torch.equal(model(inputs), base(inputs))
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {name for name, _ in model.named_parameters() if ".up." in name or ".down." in name}
    assert len(trained) == 2 * 6 * text_task.BLOCKS
    frozen = {name: p.clone() for name, p in model.named_parameters() if name not in trained}
    training = Training(task, recipe(task, "kfac"), 3, Settings(epochs=1, batch_size=8))
    model = training.model
    training.run_lap()
    training.close()
    assert all(torch.equal(p, frozen[name]) for name, p in model.named_parameters() if name in frozen)
    assert all(bool(p.any()) for name, p in model.named_parameters() if name in trained)
    assert torch.equal(base(inputs), finetune.pretrained()(inputs))


def test_adapters_learn_the_other_half() -> None:
    task = find_task("finetune")
    (record,) = compare(task, [recipe(task, "adamw")], [0], Settings(epochs=2, batch_size=8))
    assert record.metric[-1] < record.metric[0]


def test_the_halves_of_the_text_do_not_meet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    first, training, held_out = finetune.halves()
    assert torch.equal(torch.cat([first, training, held_out]), text_task.corpus())
    assert abs(len(first) - len(training) - len(held_out)) <= 1
    assert len(held_out) == (len(training) + len(held_out)) // 5


@pytest.mark.filterwarnings("ignore:Using a non-full backward hook:FutureWarning")  # of asdfghjkl
@pytest.mark.parametrize("name", CONTESTANTS)
def test_optimizers_of_other_libraries_train(name: str) -> None:
    """On the CNN of digits for one epoch, at rates that are those of their papers or near."""
    constructor = CONTESTANTS[name].constructor
    if isinstance(constructor, Packaged):
        pytest.importorskip({"asdfghjkl": "asdl"}.get(constructor.distribution, constructor.distribution))
    rates = {
        "kbfgs": 0.1,
        "adagrad": 1e-2,
        "rmsprop": 1e-3,
        "lbfgs": 1.0,
        "shampoo": 0.1,
        "adahessian": 0.1,
        "muon": 0.02,
    }
    rate = rates.get(name, 3e-3)
    digits = find_task("digits")
    model = recipe(digits, name, {"lr": rate})
    (record,) = compare(digits, [model], [0], Settings(epochs=1, batch_size=64, cosine=False))
    assert record.diverged is None
    assert record.metric[-1] > record.metric[0] + 10
    assert record.title == CONTESTANTS[name].title


def test_attention_is_differentiated_twice_where_a_step_needs_that() -> None:
    """The kernels that compute it fastest have no second derivative."""
    pytest.importorskip("pytorch_optimizer")
    text = find_task("text")
    settings = Settings(epochs=1, batch_size=2, max_steps=1)
    training = Training(text, recipe(text, "adahessian", {"lr": 0.1}), 0, settings)
    before = [p.detach().clone() for p in training.model.parameters()]
    training.iterate(next(text.batches(0, 1, 2)))
    assert all(not torch.equal(p, old) for p, old in zip(training.model.parameters(), before, strict=True))


def test_muon_takes_hidden_weights_alone() -> None:
    model = find_task("digits").make_model(0)
    hidden, others = CONTESTANTS["muon"].of(model)
    names = {p: name for name, p in model.named_parameters()}
    assert {names[p] for p in hidden["params"]} == {"0.weight", "3.weight", "7.weight", "12.weight"}
    assert len(hidden["params"]) + len(others["params"]) == len(names)
    assert (hidden["use_muon"], others["use_muon"]) == (True, False)


def test_a_step_that_evaluates_the_loss_begins_with_the_one_there_is() -> None:
    """And goes on with new ones, of the parameters it has tried."""
    asked: list[float] = []

    class Twice(torch.optim.SGD):
        def step(self, closure: Any = None) -> None:
            for _ in range(2):
                asked.append(closure().item())
                super().step()

    entry = Entry("twice", Twice, lambda model: model.parameters(), {"lr": 0.1}, takes_closure=True)
    training = Training(
        LINE, Recipe("twice", "twice", entry.build, {}, takes_closure=True), 0, Settings(epochs=1, batch_size=SAMPLES)
    )
    batch = next(_line(0, 1, SAMPLES))
    before = LINE.loss(training.model, batch).item()
    assert training.iterate(batch) == asked[0] == before
    plain = LINE.make_model(0)
    for _ in range(2):
        plain.zero_grad()
        LINE.loss(plain, batch).backward()
        with torch.no_grad():
            for p in plain.parameters():
                p -= 0.1 * p.grad
    assert len(asked) == 2
    assert asked[1] < asked[0]
    for ours, theirs in zip(training.model.parameters(), plain.parameters(), strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-6, atol=1e-7)  # a few roundings of numbers of order 1


def test_a_package_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pytorch_optimizer", None)
    entry = replace(CONTESTANTS["soap"])
    message = r"the optimizer SOAP needs pytorch_optimizer.*pip install 'fisher_kernels\[compare\]'"
    with pytest.raises(MissingExtraError, match=message):
        entry.build(nn.Linear(2, 2))


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
        ("adam", {}, "unknown optimizer 'adam': choose from adamw, sgd, adafisher, adafisherw, mbf, sofim"),
        ("adafisher:fast", {}, "unknown variant 'fast' of adafisher: choose from paper, release, relative"),
        ("sgd:paper", {}, "unknown variant 'paper' of sgd: it has none"),
        (
            "sgd",
            {"damping": 1.0},
            "sgd has no hyperparameter 'damping': it takes lr, momentum, dampening, weight_decay",
        ),
        ("adafisher:release", {"variant": "paper"}, "variant is 'paper', and 'release' in the name: give one of them"),
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
    assert recipe(LINE, "adafisher", {"variant": "relative"}).name == "adafisher:relative"
    assert recipe(LINE, "sgd", {"nesterov": True}).overrides == {"nesterov": True}
    group = recipe(LINE, "sgd", {"nesterov": True}).build(nn.Linear(1, 1)).param_groups[0]
    assert (group["lr"], group["momentum"], group["nesterov"], group["fused"]) == (0.1, 0.9, True, True)


def test_find_task_names_the_alternatives() -> None:
    with pytest.raises(ValueError, match="unknown task 'mnist': choose from digits, autoencoder, curves, fashion"):
        find_task("mnist")


# Hyperparameters as text.


@pytest.mark.parametrize(
    ("optimizer", "name", "text", "value"),
    [
        ("adamw", "lr", "3e-3", 3e-3),
        ("adamw", "betas", "0.8,0.95", (0.8, 0.95)),
        ("adamw", "betas", "(0.8, 0.95)", (0.8, 0.95)),
        ("adamw", "amsgrad", "True", True),
        ("adamw", "foreach", "none", None),
        ("sgd", "momentum", "0", 0.0),
        ("mbf", "update_interval", "5", 5),
        ("mbf", "kl_clip", "None", None),
        ("mbf", "kl_clip", "1e-2", 1e-2),
        ("mbf", "linear_blocks", "64", 64),
        ("mbf", "linear_blocks", "per_output", "per_output"),
        ("mbf", "decoupled", "false", False),
        ("adafisher:relative", "fallback_curvature", "2", 2.0),
        ("sofim", "scope", "tensor", "tensor"),
    ],
)
def test_a_text_is_read_as_the_constructor_says(optimizer: str, name: str, text: str, value: Any) -> None:
    found = hyperparameter(optimizer, name, text)
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    ("optimizer", "name", "text", "message"),
    [
        ("adamw", "lr", "much", "is 'much', expected a finite number"),
        ("adamw", "lr", "nan", "is 'nan', expected a finite number"),
        ("adamw", "betas", "0.9", "is '0.9', expected 2 values with a comma between"),
        ("adamw", "amsgrad", "1", "is '1', expected true or false"),
        ("mbf", "update_interval", "2.5", "is '2.5', expected an integer"),
        ("mbf", "kl_clip", "off", "is 'off', expected none or a finite number"),
        ("mbf", "linear_blocks", "all", "is 'all', expected shared, per_output or an integer"),
        ("mbf", "betas", "1", "mbf has no hyperparameter 'betas': it takes lr, momentum, damping, kl_clip, kl_along"),
        ("mbf", "params", "1", "mbf has no hyperparameter 'params'"),
        ("lion", "lr", "1", "unknown optimizer 'lion': choose from adamw, sgd"),
    ],
)
def test_a_text_that_means_nothing_is_explained(optimizer: str, name: str, text: str, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        hyperparameter(optimizer, name, text)


def test_what_a_text_cannot_stand_for_is_no_option() -> None:
    for name in ("mbf", "adafisher"):
        assert not {"model", "params", "grad_scaler", "process_group", "rules"} & set(OPTIMIZERS[name].options)
        assert {"lr", "fallback", "maximize"} <= set(OPTIMIZERS[name].options)
    assert "params" not in OPTIMIZERS["adamw"].options


def test_options_come_from_defaults_where_there_is_no_annotation_to_read() -> None:
    def build(
        model: nn.Module,
        rate=0.5,  # type: ignore[no-untyped-def]
        count=3,  # type: ignore[no-untyped-def]
        unknown: Rational = 0.25,  # type: ignore[assignment]  # a name that only type checkers import
        pair: tuple[int, Literal["a"] | None] = (1, "a"),
        many: tuple[float, ...] = (),
        word: str = "x",
        other=None,  # type: ignore[no-untyped-def]
    ) -> None: ...

    found = options(build)
    assert [*found] == ["rate", "count", "unknown", "pair", "many", "word"]
    texts = {"rate": "2", "count": "4", "unknown": "1e-2", "pair": "2,none", "many": "1,2,3", "word": "none"}
    assert [found[name].parse(text) for name, text in texts.items()] == [
        2.0,
        4,
        0.01,
        (2, None),
        (1.0, 2.0, 3.0),
        "none",
    ]
    assert found["count"].parse("0.5") == 0.5
    assert found["many"].parse("()") == ()


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
    assert record.diverged == "parameters not finite after epoch 1, step 1"
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


def test_the_second_figure_is_recorded_and_summarized() -> None:
    def evaluate(model: nn.Module) -> Figures:
        error = _evaluate_line(model).metric
        return Figures(error, 2 * error)

    task = replace(LINE, also=Metric("doubled error", "1", higher_is_better=False, decimals=1), evaluate=evaluate)
    records = compare(task, [recipe(task, "sgd")], [0, 1], SETTINGS)
    (summary,) = summarize(records, SETTINGS.epochs)
    for record in records:
        assert record.also == [2 * error for error in record.metric]
    assert summary.also == [Spread.of([run.also[epoch] for run in records]) for epoch in range(4)]
    (row,) = (line for line in _rendered(task, records, SETTINGS).splitlines() if "│ doubled error" in line)
    last = summary.also[-1]
    assert last is not None
    assert f"{last.mean:.1f} ± {last.deviation:.1f}" in row
    data = document(task, SETTINGS, records)
    assert data["also"]["name"] == "doubled error"
    assert data["runs"][0]["also"] == records[0].also


def test_without_a_second_figure_there_is_none_anywhere() -> None:
    records = compare(LINE, [recipe(LINE, "sgd")], [0], SETTINGS)
    (summary,) = summarize(records, SETTINGS.epochs)
    assert records[0].also == summary.also == []
    assert document(LINE, SETTINGS, records)["also"] is None


def _rendered(task: Task, records: list[Record], settings: Settings) -> str:
    console = Console(width=120, no_color=True)
    with console.capture() as capture:
        epochs = settings.epochs
        console.print(tables(task, settings, summarize(records, epochs), at_equal_time(records, epochs)))
    return capture.get()


@pytest.mark.parametrize("width", [80, 120])
def test_tables_of_six_optimizers_have_whole_names_and_whole_cells(width: int) -> None:
    titles = ("AdamW", "SGD", "AdaFisher", "AdaFisherW", "MBF", "SOFIM")
    recipes = [replace(_sgd_from(title.lower(), 0.01 * i), title=title) for i, title in enumerate(titles)]
    records = compare(LINE, recipes, [0, 1], SETTINGS)
    console = Console(width=width, no_color=True)
    with console.capture() as capture:
        summaries = summarize(records, SETTINGS.epochs)
        console.print(tables(LINE, SETTINGS, summaries, at_equal_time(records, SETTINGS.epochs)))
    lines = capture.get().splitlines()
    assert max(map(len, lines)) <= width
    assert "…" not in capture.get()
    for title in titles:
        assert sum(f" {title} " in line for line in lines) >= 3
    cells = [cell.strip() for line in lines if line.startswith("│") for cell in line.split("│")]
    assert not any(cell.endswith(("±", "(")) for cell in cells)


def test_markdown_has_the_cells_of_the_tables_and_fits_on_lines() -> None:
    records = compare(LINE, [_sgd_from("wild", 1e30), _sgd_from("tame", 0.1)], [0, 1], SETTINGS)
    summaries = summarize(records, SETTINGS.epochs)
    text = markdown(tables(LINE, SETTINGS, summaries, at_equal_time(records, SETTINGS.epochs)))
    rows = [line for line in text.split("\n") if line.startswith("|")]
    assert rows[:2] == ["| epoch | SGD | SGD |", "| ---: | ---: | ---: |"]
    tame = summaries[1].metric[-1]
    assert tame is not None
    mean, deviation = (LINE.metric.format(value) for value in (tame.mean, tame.deviation))
    assert rows[1 + SETTINGS.epochs] == f"| {SETTINGS.epochs} | diverged (2 of 2) | {mean} ± {deviation} |"
    assert sum(row.startswith("| ---") for row in rows) == 3
    assert all(len(line) <= 120 for line in text.split("\n") if not line.startswith("|"))
    assert "Measured on" in text
    assert "[" not in text  # no markup of the terminal


def _run(name: str, seed: int, seconds: list[float], metric: list[float], diverged: str | None = None) -> Record:
    """A record whose lists start after the first epoch."""
    return Record(
        name,
        name.capitalize(),
        seed,
        {},
        metric=[9.0, *metric],
        training_loss=[0.0] * len(metric),
        seconds=[0.0, *seconds],
        diverged=diverged,
    )


def test_at_equal_time_a_run_stands_where_its_last_finished_epoch_left_it() -> None:
    records = [
        _run("slow", 0, [1.5, 3.0, 4.5], [6.0, 3.0, 1.0]),
        _run("fast", 0, [0.5, 1.0, 1.5], [8.0, 7.0, 6.0]),
        _run("adamw", 0, [1.0, 2.0, 3.0], [5.0, 4.0, 2.0]),
    ]
    assert at_equal_time(records, 3) == EqualTime(
        baseline="adamw",
        epochs=[1, 2, 3],
        seconds=[1.0, 2.0, 3.0],
        metric={
            "slow": [None, Spread(6.0, 0.0), Spread(3.0, 0.0)],  # an epoch that ends at that very time counts
            "fast": [Spread(7.0, 0.0), Spread(6.0, 0.0), Spread(6.0, 0.0)],  # the last epoch, however long ago
            "adamw": [Spread(5.0, 0.0), Spread(4.0, 0.0), Spread(2.0, 0.0)],
        },
    )


def test_at_equal_time_each_seed_has_its_own_clock() -> None:
    # The machine was four times as slow when it ran seed 1.
    records = [
        _run("adamw", 0, [1.0, 2.0], [5.0, 4.0]),
        _run("adamw", 1, [4.0, 8.0], [7.0, 6.0]),
        _run("sgd", 0, [0.9, 1.8], [3.0, 2.0]),
        _run("sgd", 1, [6.0, 12.0], [5.0, 1.0]),
    ]
    found = at_equal_time(records, 2)
    assert found is not None
    assert found.seconds == [2.5, 5.0]
    assert found.metric["adamw"] == [Spread.of([5.0, 7.0]), Spread.of([4.0, 6.0])]
    # Seed 1 of SGD has finished nothing at first, and a mean over the other seed alone would be one of other things.
    assert found.metric["sgd"] == [None, Spread.of([2.0, 5.0])]


def test_at_equal_time_a_run_that_diverged_is_none_from_its_last_finished_epoch_on() -> None:
    records = [
        _run("adamw", 0, [1.0, 2.0, 3.0], [5.0, 4.0, 2.0]),
        _run("sgd", 0, [0.5, 1.5], [3.0, 2.0], "loss nan in epoch 3, step 1"),
        _run("wild", 0, [], [], "loss nan in epoch 1, step 1"),
    ]
    found = at_equal_time(records, 3)
    assert found is not None
    assert found.metric["sgd"] == [Spread(3.0, 0.0), None, None]
    assert found.metric["wild"] == [None, None, None]


def test_the_baseline_of_equal_time_is_adamw_or_the_first_that_did_not_diverge() -> None:
    lost = _run("adamw", 1, [1.0], [5.0], "loss nan in epoch 2, step 1")
    records = [
        _run("wild", 0, [], [], "loss nan in epoch 1, step 1"),
        _run("sgd", 0, [1.0, 2.0], [5.0, 4.0]),
        _run("adafisher", 0, [1.0, 2.0], [5.0, 4.0]),
    ]
    adamw = _run("adamw", 0, [1.0, 2.0], [5.0, 4.0])
    for group, baseline in (([], "sgd"), ([adamw], "adamw"), ([replace(lost, seed=0)], "sgd")):
        found = at_equal_time([*records, *group], 2)
        assert found is not None
        assert found.baseline == baseline
    assert at_equal_time([lost], 2) is None


def test_equal_times_are_spread_evenly_over_the_epochs() -> None:
    for epochs, expected in (
        (1, [1]),
        (8, [1, 2, 3, 4, 5, 6, 7, 8]),
        (9, [2, 3, 4, 5, 6, 7, 8, 9]),
        (20, [3, 5, 8, 10, 13, 15, 18, 20]),
    ):
        seconds = [float(epoch) for epoch in range(1, epochs + 1)]
        found = at_equal_time([_run("sgd", 0, seconds, seconds)], epochs)
        assert found is not None
        assert found.epochs == found.seconds == [spread.mean for spread in found.metric["sgd"] if spread] == expected


def test_the_table_of_equal_time() -> None:
    records = [
        _run("adamw", 0, [1.0, 2.0], [5.0, 4.0]),
        _run("slow", 0, [1.5, 3.0], [6.0, 3.0]),
    ]
    settings = replace(SETTINGS, epochs=2)
    text = _rendered(LINE, records, settings)
    _, _, rest = text.partition("squared error in 1 at equal training time, seed 0.")
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in rest.splitlines() if line.startswith("│")]
    assert rows[:2] == [["1 (1.00 s)", "5.000", "-"], ["2 (2.00 s)", "4.000", "6.000"]]
    assert "that Adamw takes" in rest
    # One optimizer has nobody to be compared with, and no times are known where all have diverged.
    assert "equal training time" not in _rendered(LINE, records[:1], settings)
    lost = [replace(record, diverged="loss nan", seconds=[0.0], metric=[9.0]) for record in records]
    assert "equal training time" not in _rendered(LINE, lost, settings)


def test_an_optimizer_that_draws_labels_is_given_the_output_before_the_backward() -> None:
    seen: list[tuple[torch.Size, str, bool]] = []

    class Drawing(torch.optim.SGD):
        def sample(self, output: torch.Tensor, distribution: str) -> None:
            gradients = any(p.grad is not None for group in self.param_groups for p in group["params"])
            seen.append((output.shape, distribution, gradients))
            assert output.requires_grad

    chosen = replace(recipe(LINE, "sgd"), build=lambda model: Drawing(model.parameters(), lr=0.1))
    compare(LINE, [chosen], [0], replace(SETTINGS, epochs=1))
    assert seen[-3:] == 3 * [(torch.Size((8, 1)), "bernoulli", False)]


# Budgets.


def _budget(seconds: float, cosine: bool = True) -> Settings:
    return Settings(epochs=None, batch_size=8, budget=seconds, cosine=cosine)


def test_settings_are_epochs_or_a_budget() -> None:
    for epochs, budget in ((3, 1.0), (None, None)):
        with pytest.raises(ValueError, match="expected one of them"):
            Settings(epochs, 8, budget=budget)


@pytest.mark.parametrize("is_cosine", [True, False])
def test_the_learning_rate_is_planned_for_the_budget(is_cosine: bool, clock: Clock) -> None:
    settings = _budget(2.0 * EVALUATIONS, is_cosine)
    rates: list[float] = []

    def look(training: Training) -> None:
        rates.append(training.optimizer.param_groups[0]["lr"])

    (record,) = compare(LINE, [recipe(LINE, "sgd")], [0], settings, look)
    # The rate after each iteration, with which the next one steps.
    expected = [cosine(k, 2 * EVALUATIONS) if is_cosine else 1.0 for k in range(1, 2 * EVALUATIONS + 1)]
    assert rates == pytest.approx([0.1 * factor for factor in expected], abs=1e-12)
    assert record.iterations == [2 * lap for lap in range(EVALUATIONS + 1)]
    assert record.processor_seconds == [2.0 * lap for lap in range(EVALUATIONS + 1)]
    assert len(record.metric) == len(record.seconds) == EVALUATIONS + 1
    assert record.laps == EVALUATIONS
    assert record.hyperparameters["lr"] == 0.1


@pytest.mark.parametrize("cost", [0.7, 1.0, 5.0, 30.0])
def test_a_run_ends_with_the_iteration_in_which_its_budget_ends(cost: float, clock: Clock) -> None:
    clock.cost = cost
    (record,) = compare(LINE, [recipe(LINE, "sgd")], [0], _budget(12.0))
    assert 12 <= record.processor_seconds[-1] < 12 + cost
    assert record.iterations[-1] == math.ceil(12 / cost)
    # Whatever an iteration costs, there are as many evaluations, each at its part of the budget or at the end of the
    # iteration that went beyond.
    assert len(record.metric) == len(record.training_loss) + 1 == EVALUATIONS + 1
    for lap, seconds in enumerate(record.processor_seconds):
        assert 12 * lap / EVALUATIONS - 1e-9 <= seconds < 12 * lap / EVALUATIONS + cost
    for before, after in zip(range(EVALUATIONS), range(1, EVALUATIONS + 1), strict=True):
        if record.iterations[before] == record.iterations[after]:
            assert record.metric[before] == record.metric[after]


def test_a_budget_sees_the_batches_that_epochs_see(clock: Clock) -> None:
    long = compare(LINE, [recipe(LINE, "sgd")], [3], Settings(epochs=8, batch_size=8, cosine=False))
    timed = compare(LINE, [recipe(LINE, "sgd")], [3], _budget(24.0, cosine=False))
    assert timed[0].metric[3::3] == long[0].metric[1:]  # an epoch has three batches
    assert timed[0].iterations[-1] == long[0].iterations[-1] == 24


def test_only_iterations_are_in_the_budget(clock: Clock) -> None:
    def slow(model: nn.Module) -> Figures:
        clock.now += 100
        return _evaluate_line(model)

    def slow_batches(seed: int, epoch: int, batch_size: int) -> Iterator[Batch]:
        for batch in _line(seed, epoch, batch_size):
            clock.now += 10
            yield batch

    (record,) = compare(replace(LINE, evaluate=slow, batches=slow_batches), [recipe(LINE, "sgd")], [0], _budget(24.0))
    assert record.iterations[-1] == record.processor_seconds[-1] == 24


def test_a_comparison_with_a_budget_goes_on_as_if_nothing_had_happened(clock: Clock) -> None:
    recipes = [recipe(LINE, "adamw"), recipe(LINE, "sgd")]
    settings = _budget(36.0)
    whole = compare(LINE, recipes, [0, 5], settings)

    first = Comparison(LINE, recipes, [0, 5], settings)
    made: list[Training] = []

    def stop(training: Training) -> None:
        made.append(training)
        if len(made) == 101:  # in a lap of the second seed
            raise Interrupted

    with suppress(Interrupted):
        first.run(stop)
    assert sum(first.done.values()) == 101
    second = Comparison(LINE, recipes, [0, 5], settings)
    second.load_state_dict(first.state_dict())
    assert second.done == first.done
    second.run()
    assert second.done == {"adamw": 72, "sgd": 72}
    for record, again in zip(whole, second.records, strict=True):
        assert record.metric == again.metric
        assert record.training_loss == again.training_loss
        assert record.processor_seconds == again.processor_seconds


def _summary(name: str, metric: list[float], seconds: list[float], diverged: bool = False) -> Summary:
    records = [
        replace(_run(name, 0, seconds, metric), processor_seconds=[0.0, *seconds], iterations=[*range(len(metric) + 1)])
    ]
    records[0].diverged = "loss nan" if diverged else None
    return summarize(records, 3)[0]


def test_reached_is_when_a_mean_first_comes_to_where_the_baseline_ends() -> None:
    summaries = [
        _summary("fast", [5.0, 3.0, 1.0], [1.0, 2.0, 3.0]),
        _summary("adamw", [8.0, 6.0, 4.0], [1.0, 2.0, 3.5]),
        _summary("slow", [8.5, 8.0, 7.0], [1.0, 2.0, 3.0]),
        _summary("lost", [1.0], [1.0], diverged=True),
    ]
    seconds = {"fast": 1.5, "adamw": 3.5, "slow": None, "lost": None}
    assert reached(LINE.metric, summaries) == Reached("adamw", 4.0, seconds)
    # Of accuracies, which start from 9 here.
    better = Metric("accuracy", "%", higher_is_better=True, decimals=1)
    found = reached(
        better, [_summary("adamw", [10.0, 12.0, 12.0], [1.0, 2.0, 3.0]), _summary("mbf", [15.0] * 3, [1, 2, 3])]
    )
    assert found == Reached("adamw", 12.0, {"adamw": 2.0, "mbf": 0.5})
    assert reached(LINE.metric, summaries[-1:]) is None
    assert (without := reached(LINE.metric, summaries[2:])) is not None
    assert without.baseline == "slow"


@pytest.mark.parametrize("evaluations", [8, EVALUATIONS])
def test_tables_of_a_budget_are_at_its_eighths(clock: Clock, evaluations: int) -> None:
    recipes = [recipe(LINE, "adamw"), recipe(LINE, "sgd", {"lr": 0.2, "nesterov": True})]
    settings = replace(_budget(24.0), evaluations=evaluations)
    records = compare(LINE, recipes, [0, 1], settings)
    for record in records:
        record.step_ms = record.iteration_ms = Timing(median=1234.567, mean=0, p20=0, p80=0)  # of a busy machine
    for width in (80, 120):
        console = Console(width=width, no_color=True)
        with console.capture() as capture:
            console.print(tables(LINE, settings, summarize(records, evaluations), None))
        text = capture.get()
        assert "…" not in text
        assert max(map(len, text.splitlines())) <= width
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in text.splitlines() if line.startswith("│")]
    assert [row[0] for row in rows[:8]] == [f"{3 * k:.2f}" for k in range(1, 9)]
    assert "24 s of processor time for each run, batch size 8, cosine learning rate planned for that time" in text
    assert "Set by hand: SGD lr=0.2, nesterov=True." in text
    assert rows[8][:2] == ["reached after", "24.00"]
    (cost,) = (row for row in rows if row[0] == "SGD")
    assert cost[5] == "24"
    assert "epochs within the budget: AdamW 8.0, SGD 8.0" in text
    data = document(LINE, settings, records)
    assert data["equal_time"] is None
    assert data["reached"]["baseline"] == "adamw"
    assert data["settings"]["budget"] == 24.0
    assert data["runs"][3]["overrides"] == {"lr": 0.2, "nesterov": True}


def test_document_is_plain_json_without_nan() -> None:
    record = Record(
        "sgd", "SGD", 0, {"lr": 0.1, "betas": (0.9, 0.99)}, metric=[math.inf, math.nan], training_loss=[0.0]
    )
    data = document(LINE, replace(SETTINGS, epochs=1), [record])
    assert data["runs"][0]["metric"] == [None, None]
    assert data["runs"][0]["hyperparameters"]["betas"] == [0.9, 0.99]
    assert data["summary"][0]["metric"] == [{"mean": None, "deviation": 0.0}, {"mean": None, "deviation": 0.0}]
    assert data["equal_time"] is None
    data = document(LINE, replace(SETTINGS, epochs=1), [_run("sgd", 0, [2.0], [math.inf])])
    assert data["equal_time"] == {
        "baseline": "sgd",
        "epochs": [1],
        "seconds": [2.0],
        "metric": {"sgd": [{"mean": None, "deviation": 0.0}]},
    }


def test_cosine_goes_from_one_to_zero() -> None:
    assert cosine(0, 10) == 1
    assert cosine(5, 10) == pytest.approx(0.5)
    assert cosine(10, 10) == pytest.approx(0, abs=1e-15)


def test_schedule_reaches_the_optimizer() -> None:
    for is_cosine, last in ((True, 0.0), (False, 0.1)):
        training = Training(LINE, recipe(LINE, "sgd"), 0, replace(SETTINGS, cosine=is_cosine))
        training.evaluate()
        while not training.finished:
            training.run_lap()
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
