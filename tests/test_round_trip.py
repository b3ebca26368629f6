"""The helper by which a GPU takes tests that are written for CPU tensors: checked without one, on other CPU memory."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import increment_version

from fisher_kernels import backends, use_backend
from fisher_kernels.ops import adafisher_step_, column_sum_of_squares
from tests.comparison import assert_same_bits, surroundings
from tests.round_trip import ALIGNMENT, round_trip, through

DEVICE = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


def seen(*args: Any, **kwargs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments as they arrive on the device."""
    kept: list[Any] = []

    def keep(*args: Any, **kwargs: Any) -> None:
        kept.extend((args, kwargs))

    round_trip(keep, DEVICE)(*args, **kwargs)
    return kept[0], kept[1]


def test_views_arrive_as_they_lie() -> None:
    memory = torch.arange(200.0)
    views = (memory[3:63].view(6, 10).t(), memory[5:45:4], memory[7:8].expand(5), memory[:0])
    for view, there in zip(views, seen(*views)[0], strict=True):
        assert there.device == DEVICE
        assert (there.shape, there.stride(), there.dtype) == (view.shape, view.stride(), view.dtype)
        assert there.data_ptr() % ALIGNMENT == view.data_ptr() % ALIGNMENT or not view.numel()
        assert_same_bits(there.cpu(), view)


def test_views_of_one_storage_share_memory_there() -> None:
    memory = torch.zeros(10, dtype=torch.int64)
    whole, half, bits = memory, memory[5:], memory.view(torch.float64)

    def write(whole: Tensor, half: Tensor, bits: Tensor) -> None:
        half.fill_(7)
        assert whole.tolist() == [0] * 5 + [7] * 5
        bits[:2] = 1.0

    round_trip(write, DEVICE)(whole, half, bits)
    assert memory[5:].tolist() == [7] * 5
    assert memory.view(torch.float64)[:2].tolist() == [1.0, 1.0]


def test_lists_numbers_and_none_keep_their_places() -> None:
    steps = [torch.zeros(()), None, torch.ones(2)]
    (args, kwargs) = seen(steps, None, 3, (torch.ones(1), "x"), lr=torch.ones(()), rates=[torch.ones(())])
    assert [None if x is None else x.device for x in args[0]] == [DEVICE, None, DEVICE]
    assert args[1:3] == (None, 3)
    assert isinstance(args[3], tuple)
    assert args[3][1] == "x"
    assert kwargs["lr"].is_cpu, "a number by keyword stays on the CPU"
    assert kwargs["rates"][0].is_cpu


def test_tensors_of_other_devices_stay_there() -> None:
    meta = torch.ones(2, device="meta")
    assert seen(meta)[0][0] is meta


def test_what_is_written_comes_back_and_nothing_else() -> None:
    memory = torch.full((100,), torch.nan)
    x = memory[10:40:3]
    around = surroundings(x)
    before = memory.data_ptr()
    round_trip(lambda x: [x.fill_(2.0)], DEVICE)(x)
    assert memory.data_ptr() == before
    assert x.tolist() == [2.0] * 10
    assert_same_bits(surroundings(x), around)


def test_results_alias_nothing() -> None:
    x = torch.ones(3)
    results = round_trip(lambda x: [x, (x[1:], 5)], DEVICE)(x)
    results[0].zero_()
    results[1][0].zero_()
    assert x.tolist() == [1.0] * 3
    assert results[0].is_cpu
    assert results[1][1] == 5


def test_results_keep_their_strides() -> None:
    x = torch.ones(2, 3, 4, 5).to(memory_format=torch.channels_last)
    assert round_trip(lambda x: x + 1, DEVICE)(x).stride() == x.stride()


def test_errors_are_the_same_and_name_the_cpu() -> None:
    def fail(x: Tensor) -> None:
        x.add_(1)
        raise ValueError(f"x is on meta, expected {x.device}")

    x = torch.zeros(2)
    with pytest.raises(ValueError, match=r"^x is on meta, expected cpu$"):
        round_trip(fail, DEVICE)(x)
    assert x.tolist() == [1.0, 1.0], "what a failure left behind is there to be seen"


def test_writes_are_counted() -> None:
    written, read = nn.Parameter(torch.ones(2)), torch.ones(2)
    versions = written._version, read._version
    round_trip(lambda x, y: increment_version([x]), DEVICE)(written, read)
    assert written._version > versions[0]
    assert read._version == versions[1]


def test_inference_tensors_make_the_journey() -> None:
    with torch.inference_mode():
        x = torch.ones(3)
        assert round_trip(lambda x: x.mul_(2), DEVICE)(x).tolist() == [2.0] * 3
        assert x.tolist() == [2.0] * 3


needs_triton = pytest.mark.skipif("triton" not in backends.available(), reason=str(backends.reasons()["triton"]))


@needs_triton
def test_an_op_on_triton_takes_cpu_tensors() -> None:
    def arguments() -> dict[str, list[Tensor]]:
        torch.manual_seed(0)
        made: dict[str, Any] = {
            name: [torch.randn(6, 5).t(), torch.randn(4)] for name in ("params", "grads", "exp_avgs")
        }
        made["steps"] = [torch.zeros(()), torch.ones(())]
        made["row_factors"], made["column_factors"] = [torch.rand(5), None], [torch.rand(6), torch.rand(4)]
        return made

    def step(case: dict[str, Any]) -> Tensor:
        options = {"beta": 0.9, "damping": 0.1, "weight_decay": 0.0, "decoupled": False, "maximize": False}
        return adafisher_step_(*case.values(), lr=torch.tensor(0.1), grad_scale=torch.tensor(2.0), **options)

    expected, actual = arguments(), arguments()
    with use_backend("reference"):
        skipped = step(expected)
    with use_backend("triton"), through(DEVICE):
        assert torch.equal(step(actual), skipped)
    for name, tensors in expected.items():
        for x, y in zip(actual[name], tensors, strict=True):
            torch.testing.assert_close(x, y)
    assert expected["params"][0][0, 0] != arguments()["params"][0][0, 0]


@needs_triton
def test_only_triton_makes_the_journey(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.ones(3, 2)
    monkeypatch.setattr("tests.round_trip.round_trip", lambda run, device: pytest.fail("on another backend"))
    with through(DEVICE), use_backend("reference"):
        assert column_sum_of_squares(x).tolist() == [3.0, 3.0]


# What else the tests need where little is installed.

NEST = """
import sys
from pathlib import Path
from tests.checkout import nest_triton_kernels
import fisher_kernels
sys.meta_path[:] = [finder for finder in sys.meta_path if "editable" not in repr(finder)]
fisher_kernels.__path__[:] = [str(Path("fisher_kernels").resolve())]
nest_triton_kernels(Path.cwd())
import fisher_kernels.triton_kernels._configs
print(fisher_kernels.triton_kernels.__file__)
"""


@pytest.mark.slow
@needs_triton
def test_a_checkout_finds_its_own_kernels(tmp_path: Path) -> None:
    root = Path(__file__).resolve().parents[1]
    for name in ("tests", "triton_kernels"):
        (tmp_path / name).symlink_to(root / name)
    (tmp_path / "fisher_kernels").mkdir()
    for file in (root / "fisher_kernels").iterdir():
        if file.name != "triton_kernels":
            (tmp_path / "fisher_kernels" / file.name).symlink_to(file)
    result = subprocess.run([sys.executable, "-c", NEST], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == str(tmp_path / "triton_kernels" / "__init__.py")


WITHOUT_HYPOTHESIS = """
import sys
from importlib.abc import MetaPathFinder

class Missing(MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name.partition(".")[0] == "hypothesis":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Missing())
import pytest
sys.exit(pytest.main(["-q", "-p", "no:cacheprovider", *sys.argv[1:]]))
"""


@pytest.mark.slow
def test_modules_of_tests_run_without_hypothesis() -> None:
    root = Path(__file__).resolve().parents[1]
    arguments = ("tests/test_sum_of_squares.py", "-k", "definition or geometry and reference")
    result = subprocess.run(
        [sys.executable, "-c", WITHOUT_HYPOTHESIS, *arguments],
        cwd=root, env={**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout + result.stderr
    assert " passed" in result.stdout
    assert "hypothesis is not installed" in result.stdout


@pytest.mark.slow
def test_what_has_not_begun_in_time_is_skipped() -> None:
    root = Path(__file__).resolve().parents[1]
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/test_imports.py", "--seconds=0"],
        cwd=root, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout + result.stderr
    assert "passed" not in result.stdout
    assert "of --seconds were over" in result.stdout
