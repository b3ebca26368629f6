"""The command line: what it prints, what it writes, and its exit status."""

from __future__ import annotations

import errno
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import matplotlib.image
import pytest
import torch
from rich.console import Console
from torch import Tensor
from typer.testing import CliRunner, Result

import fisher_kernels
from fisher_kernels import runs, terminal
from fisher_kernels.cli import app
from fisher_kernels.ops import ACCUMULATOR
from fisher_kernels.tasks import CONTESTANTS, TASKS, Comparison, Settings, digit_images, find_task, recipe, training
from fisher_kernels.tasks.training import WARM_UP_STEPS, Record, Training
from fisher_kernels.tools import selftest
from fisher_kernels.tools.samples.sample import Sample

ROOT = Path(fisher_kernels.__file__).parent.parent
SHORT = ("--epochs", "2", "--max-steps", "2")


@pytest.fixture(autouse=True)
def one_thread(set_threads: Callable[[int], None]) -> None:
    # Models this small train no slower on one thread, and much faster where other work shares the processor.
    set_threads(1)


def invoke(*arguments: str, **environment: str) -> Result:
    return CliRunner().invoke(app, arguments, env={"COLUMNS": "200", "NO_COLOR": "1", **environment})


def run_python(folder: Path, *arguments: str, output: str | None = None) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with nullcontext(subprocess.PIPE) if output is None else open(output, "w") as stdout:
        return subprocess.run(
            [sys.executable, *arguments],
            cwd=folder,
            env=environment,
            stdout=stdout,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )


def assert_picture(path: Path) -> None:
    pixels = matplotlib.image.imread(path)
    assert pixels.shape[0] >= 600
    assert pixels.shape[1] >= 1200
    assert pixels[..., :3].std() > 0.05
    # Curves are drawn in colour; axes and text are grey.
    colour = pixels[..., :3].max(axis=-1) - pixels[..., :3].min(axis=-1)
    assert (colour > 0.3).sum() > 200


def test_info_as_json() -> None:
    result = invoke("info", "--json")
    assert result.exit_code == 0
    facts = json.loads(result.stdout)
    assert facts["fisher_kernels"] == fisher_kernels.__version__
    assert facts["backends"]["reference"] is None
    assert set(facts["backends"]) == {"reference", "cpu", "cuda", "triton"}
    assert facts["threads"] >= 1
    assert {"torch", "triton", "python", "processor", "capability", "openmp", "backend"} <= set(facts)


def test_info_says_why_a_backend_is_missing() -> None:
    result = invoke("info")
    assert result.exit_code == 0
    for name, reason in fisher_kernels.backends.reasons().items():
        line = next(line for line in result.stdout.splitlines() if line.startswith(f"│ {name} "))
        assert ("yes" if reason is None else reason[:30]) in line


def test_module_runs_in_the_repository_root() -> None:
    result = run_python(ROOT, "-m", "fisher_kernels", "info", "--json")
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    assert json.loads(result.stdout)["fisher_kernels"] == fisher_kernels.__version__


@pytest.mark.slow
def test_module_runs_elsewhere_and_without_the_demo_extra(tmp_path: Path) -> None:
    code = (
        "import runpy, sys\n"
        "sys.modules.update(dict.fromkeys(('matplotlib', 'sklearn')))\n"
        "sys.argv = ['fisher_kernels', 'info']\n"
        "runpy.run_module('fisher_kernels', run_name='__main__')\n"
    )
    result = run_python(tmp_path, "-c", code)
    assert result.returncode == 0, result.stderr
    assert "reference" in result.stdout


def test_version() -> None:
    result = invoke("--version")
    assert result.exit_code == 0
    assert result.stdout == f"fisher_kernels {fisher_kernels.__version__}\n"


@pytest.fixture
def one_sample_an_op(monkeypatch: pytest.MonkeyPatch) -> None:
    """In one dtype: Triton's interpreter takes a minute for all of them."""
    first = {sample.op: replace(sample, dtypes=sample.dtypes[:1]) for sample in reversed(selftest.SAMPLES)}
    monkeypatch.setattr(selftest, "SAMPLES", [*first.values()])


@pytest.fixture
def few_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the reference alone."""
    names = ("minmax", "column_sum_of_squares")
    monkeypatch.setattr(selftest, "_places", lambda: [("reference", torch.device("cpu"))])
    monkeypatch.setattr(selftest, "SAMPLES", [sample for sample in selftest.SAMPLES if sample.op in names])


@pytest.mark.slow
def test_the_whole_selftest_passes() -> None:
    result = invoke("selftest", "--json")
    assert result.exit_code == 0, result.stdout
    counts = Counter(check["op"] for check in json.loads(result.stdout)["checks"])
    backends = len(fisher_kernels.backends.available())
    assert counts == Counter({op: backends * n for op, n in samples_by_op().items()})
    assert {dtype for sample in selftest.SAMPLES for dtype in sample.dtypes} == set(ACCUMULATOR)


def samples_by_op() -> Counter[str]:
    return Counter(sample.op for sample in selftest.SAMPLES for _ in sample.dtypes)


@pytest.mark.usefixtures("one_sample_an_op")
def test_selftest_checks_every_op_on_every_backend() -> None:
    result = invoke("selftest", "--json")
    assert result.exit_code == 0, result.stdout
    data = json.loads(result.stdout)
    assert data["passed"] is True
    checked = {(check["op"], check["backend"]) for check in data["checks"]}
    # Every op is a public function of fisher_kernels.ops, and the other way round.
    names = [name for name in fisher_kernels.ops.__all__ if name.islower()]
    assert checked == {(name, backend) for name in names for backend in fisher_kernels.backends.available()}


@pytest.mark.usefixtures("few_samples")
def test_selftest_prints_a_table() -> None:
    result = invoke("selftest")
    assert result.exit_code == 0
    assert "column_sum_of_squares" in result.stdout
    assert "failed" not in result.stdout


@pytest.mark.usefixtures("few_samples")
@pytest.mark.parametrize("wrong", ["value", "shape", "exception", "silent"])
def test_selftest_has_teeth(wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    right = fisher_kernels.ops.minmax

    def broken(x: list[Tensor], eps: float, **rest: Any) -> list[Tensor]:
        if not x or x[0].dtype == torch.float64:
            return right(x, eps, **rest)
        if wrong == "exception":
            raise RuntimeError("no [such] kernel")
        if wrong == "value":
            return [v * (1 + 1e-4) for v in right(x, eps, **rest)]
        if wrong == "shape":
            return [v[:-1] for v in right(x, eps, **rest)]
        return [v.nan_to_num() for v in right(x, eps, **rest)]  # NaN swallowed

    monkeypatch.setattr(fisher_kernels.ops, "minmax", broken)
    result = invoke("selftest")
    assert result.exit_code == 1
    assert "failed: minmax, vectors, float32 on reference (cpu):" in result.stdout
    if wrong == "exception":
        assert "RuntimeError: no [such] kernel" in result.stdout
    data = json.loads(invoke("selftest", "--json").stdout)
    assert data["passed"] is False
    assert {check["op"] for check in data["checks"] if not check["passed"]} == {"minmax"}


def test_help_lists_commands_tasks_and_optimizers() -> None:
    top = invoke("--help").stdout
    for command in ("info", "train", "compare", "selftest"):
        assert command in top
    text = invoke("compare", "--help").stdout
    for name in ("digits", "autoencoder", "curves", "text", "adamw", "adafisherw", "adafisher:relative", "--budget"):
        assert name in text


def test_compare_writes_tables_a_picture_and_json(tmp_path: Path) -> None:
    result = invoke("compare", "digits", "--optimizers", "adamw,sgd", "--seeds", "2", *SHORT, "--out", str(tmp_path))
    assert result.exit_code == 0, result.output
    for word in (
        "AdamW",
        "SGD",
        "test accuracy",
        "equal training time",
        "AdamW epoch",
        "step ms",
        "state B/param",
        "compare.json, .md and .png",
    ):
        assert word in result.stdout
    assert "| AdamW epoch | AdamW | SGD |\n" in (tmp_path / "compare.md").read_text()
    data = json.loads((tmp_path / "compare.json").read_text())
    assert data["task"] == "digits"
    assert data["metric"]["unit"] == "%"
    assert data["settings"] == {
        "epochs": 2,
        "batch_size": 64,
        "cosine": True,
        "max_steps": 2,
        "budget": None,
        "evaluations": 24,
    }
    assert data["reached"] is None
    assert data["environment"]["threads"] == 1
    assert [(run["optimizer"], run["seed"]) for run in data["runs"]] == [
        ("adamw", 0),
        ("adamw", 1),
        ("sgd", 0),
        ("sgd", 1),
    ]
    for run in data["runs"]:
        assert run["diverged"] is None
        assert len(run["metric"]) == len(run["seconds"]) == 3
        assert len(run["training_loss"]) == 2
        assert 0 < run["step_ms"]["median"] < run["iteration_ms"]["median"]
        assert run["hyperparameters"]["lr"] > 0
    adamw, sgd = data["summary"]
    assert adamw["metric"][2]["mean"] == pytest.approx(
        (data["runs"][0]["metric"][2] + data["runs"][1]["metric"][2]) / 2
    )
    equal_time = data["equal_time"]
    assert equal_time["baseline"] == "adamw"
    assert equal_time["epochs"] == [1, 2]
    assert equal_time["seconds"] == adamw["seconds"][1:]
    assert equal_time["metric"]["adamw"] == adamw["metric"][1:]
    assert len(equal_time["metric"]["sgd"]) == 2
    assert data["also"] is None
    assert adamw["state_bytes_per_parameter"] == pytest.approx(8, rel=1e-2)
    assert sgd["state_bytes_per_parameter"] == pytest.approx(4, rel=1e-2)
    assert_picture(tmp_path / "compare.png")


def test_compare_autoencoder_reports_both_figures(tmp_path: Path) -> None:
    result = invoke("compare", "autoencoder", "--optimizers", "adafisher,sgd", *SHORT, "--out", str(tmp_path))
    assert result.exit_code == 0, result.output
    for words in ("test loss in nats/image per epoch", "test squared error (per image)", "AdaFisher epoch"):
        assert words in result.stdout
    data = json.loads((tmp_path / "compare.json").read_text())
    assert data["metric"]["higher_is_better"] is data["also"]["higher_is_better"] is False
    assert data["equal_time"]["baseline"] == "adafisher"
    for run in data["runs"]:
        assert len(run["metric"]) == len(run["also"]) == 3
        assert run["also"][-1] < run["also"][0] < run["metric"][0]
    assert [len(summary["also"]) for summary in data["summary"]] == [3, 3]
    assert_picture(tmp_path / "compare.png")


@pytest.mark.parametrize("optimizer", ["adafisher", "adafisherw"])
def test_train_adafisher(optimizer: str, tmp_path: Path) -> None:
    arguments = ("--variant", "relative", "--lr", "0.5", "--update-interval", "2", "--damping", "0.2")
    result = invoke("train", "digits", "--optimizer", optimizer, *arguments, *SHORT, "--out", str(tmp_path))
    assert result.exit_code == 0, result.output
    (run,) = json.loads((tmp_path / f"{optimizer}-relative.json").read_text())["runs"]
    assert run["optimizer"] == f"{optimizer}:relative"
    expected = {"variant": "relative", "lr": 0.5, "update_interval": 2, "damping": 0.2}
    assert {name: run["hyperparameters"][name] for name in expected} == expected
    # One moment a parameter, and one number a row and a column.
    assert 4 < run["state_bytes_per_parameter"] < 5
    assert_picture(tmp_path / f"{optimizer}-relative.png")


def test_train_finds_a_learning_rate(tmp_path: Path) -> None:
    """The sweep's model is another one: training begins where it would without."""
    where = ("--optimizer", "adafisherw", *SHORT, "--force", "--out", str(tmp_path))
    result = invoke("train", "autoencoder", *where, "--find-lr", "--json")
    assert result.exit_code == 0, result.output
    (found,) = json.loads(result.stdout)["runs"]
    rate = found["overrides"]["lr"]
    assert 3e-4 < rate < 5e-3
    assert f"try lr={rate:.2g}" in result.stderr
    (given,) = json.loads(invoke("train", "autoencoder", *where, "--lr", str(rate), "--json").stdout)["runs"]
    assert given["metric"] == found["metric"]


def test_train_says_where_no_learning_rate_is_found(tmp_path: Path) -> None:
    where = ("--optimizer", "kfac", *SHORT, "--out", str(tmp_path))
    result = invoke("train", "autoencoder", *where, "--find-lr")
    assert result.exit_code == 1
    assert "error: --find-lr: the loss falls fastest at " in result.stderr
    assert "no suggestion; give --lr" in result.stderr


def test_compare_with_a_budget(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With as many evaluations as the task has in one."""
    monkeypatch.setitem(TASKS, "autoencoder", replace(find_task("autoencoder"), evaluations=8))
    result = invoke(
        "compare", "autoencoder", "--optimizers", "adamw,sgd", "--seeds", "2", "--budget", "0.06", "--batch-size", "16",
        "-o", "adamw.betas=0.8,0.99", "-o", "sgd.nesterov=true", "--out", str(tmp_path),
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    for words in (
        "0.06 s of processor time for each run, batch size 16, cosine learning rate planned for that time",
        "Set by hand: AdamW betas=(0.8, 0.99); SGD nesterov=True.",
        "test loss in nats/image at equal training time",
        "reached after",
        "epochs within the budget: AdamW ",
    ):
        assert words in result.stdout
    assert "| seconds | AdamW | SGD |\n" in (tmp_path / "compare.md").read_text()
    data = json.loads((tmp_path / "compare.json").read_text())
    assert data["settings"] == {
        "epochs": None, "batch_size": 16, "cosine": True, "max_steps": None, "budget": 0.06, "evaluations": 8
    }  # fmt: skip
    assert data["equal_time"] is None
    assert set(data["reached"]["seconds"]) == {"adamw", "sgd"}
    for run in data["runs"]:
        assert len(run["metric"]) == len(run["processor_seconds"]) == len(run["iterations"]) == 9
        assert run["processor_seconds"][-1] >= 0.06
        assert run["metric"][-1] < run["metric"][0]
    assert data["runs"][0]["hyperparameters"]["betas"] == [0.8, 0.99]
    assert data["runs"][-1]["overrides"] == {"nesterov": True}
    assert_picture(tmp_path / "compare.png")


def test_train_text_prints_json_alone(tmp_path: Path) -> None:
    result = invoke(
        "train", "text", "--optimizer", "sgd", "--epochs", "1", "--max-steps", "1", "--batch-size", "2", "--seed", "7",
        "--schedule", "constant", "--threads", "2", "--out", str(tmp_path), "--json",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    data: dict[str, Any] = json.loads(result.stdout)
    assert data == json.loads((tmp_path / "sgd.json").read_text())
    assert data["runs"][0]["seed"] == 7
    assert data["environment"]["threads"] == 2
    assert data["settings"]["batch_size"] == 2
    assert data["settings"]["cosine"] is False
    # An untrained model knows nothing about 256 byte values.
    assert 5 < data["runs"][0]["metric"][0] < 7


def test_results_go_to_a_folder_of_the_task_by_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert invoke("train", "digits", "--optimizer", "sgd", *SHORT).exit_code == 0
    assert sorted(path.name for path in (tmp_path / "results" / "digits").iterdir()) == [
        "sgd.json",
        "sgd.md",
        "sgd.png",
    ]


@pytest.mark.slow
def test_a_diverging_training_is_reported_and_fails(tmp_path: Path) -> None:
    result = invoke("train", "digits", "--optimizer", "sgd", "--lr", "1e30", "--epochs", "2", "--out", str(tmp_path))
    assert result.exit_code == 1
    assert "diverged (1 of 1)" in result.stdout
    assert "SGD, seed 0, diverged: loss" in result.stdout
    (run,) = json.loads((tmp_path / "sgd.json").read_text())["runs"]
    assert run["diverged"].startswith("loss")
    assert (tmp_path / "sgd.png").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("compare", "mnist"), "unknown task 'mnist': choose from digits, autoencoder, curves, fashion"),
        (("compare", "digits", "--optimizers", "adamw,lion"), "unknown optimizer 'lion': choose from adamw, sgd"),
        (("train", "digits", "--optimizer", "adafisher:fast"), "unknown variant 'fast' of adafisher"),
        (("train", "digits", "--optimizer", "sgd", "--damping", "1"), "sgd has no hyperparameter 'damping'"),
        (("train", "digits", "--optimizer", "sgd", "--schedule", "step"), "choose from cosine, constant"),
        (("compare", "digits", "--seeds", "many"), "seeds is 'many', expected how many (3) or a list (4,7)"),
        (("compare", "digits", "--seeds", "0"), "seeds is '0'"),
        (("compare", "digits", "--seeds", "3,18446744073709551616"), "--seeds: seeds is '3,18446744073709551616'"),
        (("compare", "digits", "--seeds", "1000000000"), "at most 1000"),
        (("compare", "digits", "--optimizers", ","), "--optimizers: is ',', expected names"),
        (("compare",), "TASK: is missing, expected one of digits, autoencoder, curves, fashion"),
        (("train", "digits", "--optimizer", "sgd", "--seed", "99999999999999"), "--seed"),
        (("train", "digits", "--optimizer", "sgd", "--lr", "much"), "--lr"),
        (("train", "digits", "--optimizer", "sofim", "--rho", "0"), "--rho: is 0.0, expected a finite number above 0"),
        (("train", "digits", "--optimizer", "adamw", "--lr", "inf"), "--lr: is inf, expected a finite number"),
        (
            ("train", "digits", "--optimizer", "mbf", "-o", "beta1=1"),
            "-o beta1: mbf has no hyperparameter 'beta1': it takes",
        ),
        (
            ("train", "digits", "--optimizer", "mbf", "-o", "kl_clip=off"),
            "-o kl_clip: is 'off', expected none or a finite",
        ),
        (("train", "digits", "--optimizer", "mbf", "-o", "beta2=2"), "-o beta2: is 2.0, expected 0 <= beta2 < 1"),
        (("train", "digits", "--optimizer", "mbf", "-o", "lr"), "-o: is 'lr', expected NAME=VALUE"),
        (("train", "digits", "--optimizer", "mbf", "-o", "lr=1", "--lr", "1"), "-o lr: is given twice"),
        (
            ("train", "digits", "--optimizer", "adamw", "-o", "foreach=true"),
            "--optimizer: `fused` and `foreach` cannot",
        ),
        (("compare", "digits", "-o", "lr=1"), "-o lr: is of no optimizer, expected OPTIMIZER.NAME=VALUE"),
        (("compare", "digits", "-o", "lion.lr=1"), "-o lion.lr: unknown optimizer 'lion': choose from adamw"),
        (
            ("compare", "digits", "--optimizers", "sgd", "-o", "mbf.lr=1"),
            "-o mbf.lr: is not of an optimizer that is compar",
        ),
        (
            ("compare", "digits", "-o", "mbf.beta1=1"),
            "-o mbf.beta1: mbf has no hyperparameter 'beta1': it takes lr, mom",
        ),
        (("compare", "digits", "-o", "mbf.damping=-1"), "-o mbf.damping: is -1.0, expected"),
        (("compare", "digits", "-o", "mbf.lr=1", "-o", "mbf.lr=2"), "-o mbf.lr: is given twice"),
        (
            ("compare", "digits", "-o", "adafisher.variant=relative"),
            "goes into the name of the optimizer, as adafisher:r",
        ),
        (("compare", "digits", "--budget", "3", "--epochs", "2"), "--budget: goes without --epochs"),
        (("train", "digits", "--optimizer", "sgd", "--find-lr", "--lr", "0.1"), "--find-lr: goes without --lr"),
        (("train", "digits", "--optimizer", "sgd", "--find-lr", "-o", "lr=0.1"), "--find-lr: goes without -o lr"),
        (("train", "digits", "--optimizer", "sgd", "--budget", "0"), "--budget: is 0.0, expected seconds above 0"),
        (("inspect", "--kernels", "("), "--kernels: is '(', expected a regular expression"),
        (("prove",), "No such command 'prove'"),
        (("train", "digits", "--optimizer", "sgd", "--epochs", "0"), "epochs"),
        (("train", "digits"), "optimizer"),
    ],
)
def test_wrong_usage_is_explained(arguments: tuple[str, ...], message: str) -> None:
    result = invoke(*arguments)
    assert result.exit_code == 2
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ")
    assert message in line


def test_a_backend_that_cannot_run_is_explained() -> None:
    result = invoke("train", "digits", "--optimizer", "sgd", *SHORT, FISHER_KERNELS_BACKEND="fpga")
    assert result.exit_code == 1
    assert "FISHER_KERNELS_BACKEND: backend is 'fpga', expected one of 'auto', 'reference'" in result.stderr


@pytest.mark.parametrize("setting", [(), ("-o", "betas=0.9,0.95")])
def test_a_missing_package_of_a_contestant_is_named(
    setting: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pytorch_optimizer", None)
    monkeypatch.setitem(
        cast("dict[str, Any]", CONTESTANTS), "soap", replace(CONTESTANTS["soap"])
    )  # one that has not loaded its class yet
    result = invoke("train", "digits", "--optimizer", "soap", *setting, "--out", str(tmp_path))
    assert result.exit_code == 1
    assert "error: the optimizer SOAP needs pytorch_optimizer" in result.stderr
    assert "pip install 'fisher_kernels[compare]'" in result.stderr


def test_a_folder_without_the_data_is_named(tmp_path: Path) -> None:
    result = invoke("train", "fashion", "--optimizer", "adamw", "--data", str(tmp_path))
    assert result.exit_code == 2
    assert f"error: --data: {tmp_path} has no Fashion-MNIST" in result.stderr


def test_a_missing_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    digit_images.load.cache_clear()
    result = invoke("train", "digits", "--optimizer", "sgd", *SHORT, "--out", str(tmp_path))
    assert result.exit_code == 1
    assert "scikit-learn" in result.stderr
    assert "pip install 'fisher_kernels[demo]'" in result.stderr


def test_without_matplotlib_all_but_the_picture_is_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    result = invoke("train", "digits", "--optimizer", "sgd", *SHORT, "--out", str(tmp_path))
    assert result.exit_code == 0, result.output
    assert "files: " + str(tmp_path / "sgd") + ".json and .md\n" in result.stdout
    (line,) = [line for line in result.stderr.splitlines() if "matplotlib" in line]
    assert line.startswith("no picture: ")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["sgd.json", "sgd.md"]


# What may be wrong with the place of the files, or with the output.


def lines_of(result: Result) -> list[str]:
    """The lines on standard error, without those of the progress display."""
    return [line for line in result.stderr.splitlines() if "%" not in line and "━" not in line]


def test_a_file_in_place_of_the_folder_is_refused_before_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Training, "iterate", None)  # nobody trains
    place = tmp_path / "taken"
    place.touch()
    for out, reason in ((place, "is a file, expected a folder"), (place / "below", "Not a directory")):
        result = invoke("train", "digits", "--optimizer", "sgd", *SHORT, "--out", str(out))
        assert result.exit_code == 1
        (line,) = lines_of(result)
        assert line.startswith("error: --out: ")
        assert reason in line


def test_results_that_are_there_are_kept_unless_forced(tmp_path: Path) -> None:
    arguments = ("train", "digits", "--optimizer", "sgd", *SHORT, "--out", str(tmp_path))
    assert invoke(*arguments).exit_code == 0
    first = (tmp_path / "sgd.json").read_bytes()
    assert f"{tmp_path / 'sgd'}-2.json, .md and .png" in invoke(*arguments).stdout
    assert (tmp_path / "sgd.json").read_bytes() == first
    assert invoke(*arguments, "--force").exit_code == 0
    assert (tmp_path / "sgd.json").read_bytes() != first
    assert len([*tmp_path.iterdir()]) == 6


def test_a_write_that_fails_names_the_file_and_loses_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = Path.write_bytes

    def full(self: Path, content: bytes) -> int:
        if ".md" in self.name:
            write(self, content[:10])
            raise OSError(errno.ENOSPC, "No space left on device", str(self))
        return write(self, content)

    monkeypatch.setattr(Path, "write_bytes", full)
    result = invoke("train", "digits", "--optimizer", "sgd", *SHORT, "--out", str(tmp_path))
    assert result.exit_code == 1
    assert "step ms" in result.stdout
    assert f"error: {tmp_path / 'sgd.md'} cannot be written: No space left on device" in lines_of(result)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["sgd.json", "sgd.png"]


@pytest.mark.slow
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")
def test_an_output_that_is_full_is_told_in_one_line_and_files_are_written(tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments = ("-m", "fisher_kernels", "train", "digits", "--optimizer", "sgd", *SHORT, "--out", str(out))
    result = run_python(tmp_path, *arguments, output="/dev/full")
    assert result.returncode == 1
    errors = [line for line in result.stderr.splitlines() if "%" not in line]
    assert errors == ["error: standard output: No space left on device"]
    assert (out / "sgd.json").stat().st_size > 0


# Interruption.


@pytest.fixture
def interrupted_at(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int], None]]:
    """Lets Ctrl-C come in the iteration of that number, also where the tests run in the background."""
    right = Training.iterate
    before = signal.signal(signal.SIGINT, signal.default_int_handler)

    def interrupt(number: int) -> None:
        made = 0

        def iterate(self: Training, batch: Any) -> float:
            nonlocal made
            made += 1
            if made == number:
                signal.raise_signal(signal.SIGINT)
            return right(self, batch)

        monkeypatch.setattr(Training, "iterate", iterate)

    yield interrupt
    signal.signal(signal.SIGINT, before)


WARM_UP = 2 * WARM_UP_STEPS  # of two optimizers
PAIR = ("digits", "--optimizers", "adamw,adafisher", "--seeds", "2", *SHORT)


def runs_of(path: Path) -> list[dict[str, Any]]:
    """What does not depend on time."""
    kept = ("optimizer", "seed", "metric", "training_loss", "hyperparameters")
    return [{name: run[name] for name in kept} for run in json.loads(path.read_text())["runs"]]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("whole")
    assert invoke("compare", *PAIR, "--out", str(folder)).exit_code == 0
    return runs_of(folder / "compare.json")


@pytest.mark.parametrize(
    "iteration",
    [
        pytest.param(4, id="between epochs", marks=pytest.mark.slow),
        pytest.param(5, id="in epoch"),
        pytest.param(8, id="between seeds", marks=pytest.mark.slow),
        pytest.param(11, id="next seed"),
    ],
)
def test_an_interrupted_comparison_goes_on_as_if_nothing_had_happened(
    iteration: int, tmp_path: Path, interrupted_at: Callable[[int], None], uninterrupted: list[dict[str, Any]]
) -> None:
    interrupted_at(WARM_UP + iteration)
    result = invoke("compare", *PAIR, "--out", str(tmp_path))
    assert result.exit_code == 130, result.output
    assert "Partial results: interrupted" in result.stdout
    (line,) = lines_of(result)
    assert f"to go on: fisher-kernels compare --resume {tmp_path / 'compare.resume.pt'}" in line
    data = json.loads((tmp_path / "compare.json").read_text())
    assert data["partial"].startswith("interrupted")
    assert data["summary"][0]["seeds"] == [0]
    assert len(data["summary"][0]["metric"]) == (2 if iteration < 8 else 3)
    assert (tmp_path / "compare.md").read_text().startswith("Partial results: interrupted")
    assert_picture(tmp_path / "compare.png")

    interrupted_at(0)
    result = invoke("compare", "--resume", str(tmp_path))
    assert result.exit_code == 0, result.output
    assert "Partial" not in result.stdout
    assert runs_of(tmp_path / "compare.json") == uninterrupted
    assert json.loads((tmp_path / "compare.json").read_text())["partial"] is None
    assert sorted(path.name for path in tmp_path.glob("compare*")) == ["compare.json", "compare.md", "compare.png"]


def test_a_run_interrupted_before_its_first_epoch_has_no_results_and_can_go_on(
    tmp_path: Path, interrupted_at: Callable[[int], None]
) -> None:
    interrupted_at(WARM_UP_STEPS + 1)
    chosen = ("--optimizer", "mbf", "--lr", "0.001", "-o", "linear_blocks=64", "-o", "kl_clip=none")
    result = invoke("train", "digits", *chosen, *SHORT, "--out", str(tmp_path))
    assert result.exit_code == 130
    assert result.stdout == ""
    assert [path.name for path in tmp_path.iterdir()] == ["mbf.resume.pt"]
    interrupted_at(0)
    assert invoke("train", "digits", "--resume", str(tmp_path)).exit_code == 0
    (run,) = runs_of(tmp_path / "mbf.json")
    assert run["hyperparameters"]["lr"] == 0.001
    assert run["hyperparameters"]["linear_blocks"] == 64
    assert run["hyperparameters"]["kl_clip"] is None
    assert len(run["metric"]) == 3


def test_an_interrupted_budget_goes_on_with_what_is_left_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, interrupted_at: Callable[[int], None]
) -> None:
    ticks = itertools.count()  # a second for each iteration
    monkeypatch.setattr(
        training, "time", SimpleNamespace(process_time=lambda: next(ticks), perf_counter=time.perf_counter)
    )
    arguments = ("train", "autoencoder", "--optimizer", "sgd", "--budget", "24")
    assert invoke(*arguments, "--out", str(tmp_path / "whole")).exit_code == 0
    interrupted_at(WARM_UP_STEPS + 10)
    result = invoke(*arguments, "--out", str(tmp_path))
    assert result.exit_code == 130, result.output
    assert "Partial results: interrupted after 9 of 24 s, seed 0." in result.stdout
    assert_picture(tmp_path / "sgd.png")
    interrupted_at(0)
    assert invoke("train", "--resume", str(tmp_path)).exit_code == 0
    whole, resumed = (json.loads((folder / "sgd.json").read_text()) for folder in (tmp_path / "whole", tmp_path))
    assert resumed["settings"] == whole["settings"]
    for name in ("metric", "training_loss", "processor_seconds", "iterations"):
        assert resumed["runs"][0][name] == whole["runs"][0][name]
    assert resumed["runs"][0]["iterations"][-1] == 24


def test_what_an_exception_ends_is_shown_as_well(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right, calls = Training.run_lap, []

    def breaks(self: Training, *rest: Any) -> None:
        calls.append(1)
        if len(calls) == 3:
            raise RuntimeError("out of memory")
        right(self, *rest)

    monkeypatch.setattr(Training, "run_lap", breaks)
    result = invoke("compare", *PAIR, "--out", str(tmp_path))
    assert isinstance(result.exception, RuntimeError)
    assert "Partial results: ended by RuntimeError in epoch 2 of 2, seed 0 (1 of 2)." in result.stdout
    assert (tmp_path / "compare.json").exists()


@pytest.mark.slow
def test_a_signal_to_the_process_ends_it_cleanly(tmp_path: Path) -> None:
    code = (
        "import os, signal, sys\n"
        "from fisher_kernels.tasks.training import Training\n"
        "from fisher_kernels.__main__ import main\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "right, made = Training.iterate, []\n"
        "def iterate(self, batch):\n"
        "    made.append(1)\n"
        "    if len(made) == 9: os.kill(os.getpid(), signal.SIGINT)\n"
        "    return right(self, batch)\n"
        "Training.iterate = iterate\n"
        "main()\n"
    )
    arguments = ("train", "digits", "--optimizer", "sgd", *SHORT, "--out", str(tmp_path))
    result = run_python(tmp_path, "-c", code, *arguments)
    assert result.returncode == 130, result.stderr
    assert "Traceback" not in result.stderr
    assert "Partial results: interrupted in epoch 2 of 2, seed 0" in result.stdout


@pytest.mark.usefixtures("few_samples")
def test_an_interrupted_selftest_shows_its_checks(monkeypatch: pytest.MonkeyPatch) -> None:
    right, made = selftest.check, []

    def check(sample: Sample, *others: Any) -> selftest.Result:
        made.append(sample.op)
        if len(made) == 3:
            raise KeyboardInterrupt
        return right(sample, *others)

    monkeypatch.setattr(selftest, "check", check)
    result = invoke("selftest")
    assert result.exit_code == 130
    assert made[0] in result.stdout
    assert result.stderr == "interrupted after 2 checks\n"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "there is nothing in"),
        (b"nonsense", "cannot be read"),
        ({"a": 1}, "is not a checkpoint of this command line"),
        ({"command": "train", "task": "digits", "state": {}}, "there is nothing in"),
    ],
)
def test_what_cannot_be_resumed_is_explained(content: Any, message: str, tmp_path: Path) -> None:
    path = tmp_path / "compare.resume.pt"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        torch.save(content, path)
    result = invoke("compare", "--resume", str(tmp_path))
    assert result.exit_code == 2
    (line,) = lines_of(result)
    assert line.startswith("error: --resume: ")
    assert message in line


def test_settings_are_not_given_again_on_resuming(tmp_path: Path) -> None:
    result = invoke("compare", "--resume", str(tmp_path), "--batch-size", "8")
    assert result.exit_code == 2
    assert "leave out --batch-size" in result.stderr


# Progress.


@pytest.mark.parametrize("width", [60, 120])
def test_progress_shows_the_figure_of_the_epoch_it_names_in_60_columns(
    width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    display = terminal.training_progress(width)
    monkeypatch.setattr(terminal, "training_progress", lambda: display)
    task = find_task("text")
    recipes = [recipe(task, name) for name in ("adamw", "adafisherw:relative")]
    comparison = Comparison(task, recipes, [0], Settings(epochs=2, batch_size=8, max_steps=1))
    seen: list[str] = []
    with runs._progress(comparison) as (on_step, on_lap):
        for epoch, figure in ((1, 2.5), (2, 1.9375)):
            for chosen in recipes:
                record = Record(chosen.name, chosen.title, 4294967295, {}, metric=[5.0, *[figure] * epoch])
                record.training_loss = [0.0] * epoch
                state = cast(Training, SimpleNamespace(record=record, done=epoch))
                others = [other for other in comparison._running if other.record.optimizer != chosen.name]
                comparison._running = [*others, state]
                on_step(state)
                on_lap(state)
            console = Console(width=width, no_color=True)
            with console.capture() as capture:
                console.print(display.get_renderable())
            seen.append(capture.get())
    for text, status in zip(seen, ("epoch 1: 2.500", "epoch 2: 1.938"), strict=True):
        lines = text.rstrip("\n").split("\n")
        assert len(lines) == 2
        assert all(len(line) <= width for line in lines)
        assert all(line.count(status) == 1 for line in lines)
    assert all("100%" in line or "2/2" in line for line in lines)
