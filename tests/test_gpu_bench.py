"""The benchmarks for a GPU at tiny sizes on the CPU: the harness, its report, and what it does with failures."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import tables
from bench.gpu import __main__ as driver
from bench.gpu import choose, limits, measure, op_cases, probe, report, sanitize, shapes, step_cases
from bench.gpu.case import LIMITS, Case, Work
from bench.gpu.timing import Clock, Times
from fisher_kernels import backends

CPU = torch.device("cpu")
CLOCK = Clock(CPU, 0.0)
RATES = dict.fromkeys(LIMITS, 1e9)
CASES = list(chain(step_cases.cases(True, False), op_cases.cases(True, False)))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_case_is_right_and_measured(case: Case) -> None:
    (row,) = measure.measure(case, CLOCK, RATES, ["reference"], 0)
    assert row.error is None
    assert {name: b.error for name, b in row.baselines.items() if b.error} == {}
    assert row.times is not None
    assert row.times.p20 <= row.times.median <= row.times.p80
    assert row.bytes_moved > 0
    assert set(case.targets) <= {*row.ratios, *(f"memory: {name}" for name in row.baselines)}
    assert case.limit in row.ratios
    assert (row.wall is not None) == case.wall


def test_full_sizes_are_those_of_the_targets() -> None:
    for found in shapes.models(False).values():
        assert 0.95e9 < shapes.size(found) < 1.1e9
    assert shapes.size(shapes.resnet(64)) == 25_557_032, "a ResNet-50 as torchvision has it"
    full = list(chain(step_cases.cases(False, False), op_cases.cases(False, False)))
    assert len(full) == len(CASES)
    assert len({case.name for case in full}) == len(full)


def made(run: Any = lambda: None, check: Any = lambda: None, **targets: float) -> Case:
    return Case(
        "op", "shape", torch.float32,
        lambda device: Work(run, {"other": lambda: sum(range(1000)), "broken": lambda: 1 / 0}, check, 100),
        targets=targets,
    )  # fmt: skip


def test_a_wrong_result_has_no_figures() -> None:
    def check() -> None:
        raise AssertionError("off by 3\nand more")

    (row,) = measure.measure(made(check=check, copy=0.1), CLOCK, RATES, ["reference"], 0)
    assert row.times is None
    assert row.error == "AssertionError: off by 3"
    assert row.ratios == {}


def test_a_baseline_that_fails_leaves_the_case_alone() -> None:
    (row,) = measure.measure(made(), CLOCK, RATES, ["reference"], 0)
    assert row.error is None
    assert row.baselines["broken"].error == "ZeroDivisionError: division by zero"
    assert "broken" not in row.ratios
    assert row.ratios["other"] > 0


def test_inputs_that_do_not_fit_are_an_error() -> None:
    case = replace(made(), prepare=lambda device: torch.empty(1 << 60))  # type: ignore[arg-type, return-value]
    (row,) = measure.measure(case, CLOCK, RATES, ["reference"], 0)
    assert row.error is not None


@pytest.mark.parametrize(("cache", "sets"), [(0, 1), (40, 1), (60, 2), (400, 9), (10**9, measure.MOST_SETS)])
def test_sets_of_inputs_exceed_twice_the_cache(cache: int, sets: int) -> None:
    assert len(measure._sets(made(), CPU, cache)) == sets


def test_targets_are_of_the_fastest_backend_and_missed_if_not_measured() -> None:
    def row(backend: str, seconds: float | None, reached: float) -> measure.Row:
        times = None if seconds is None else Times(seconds, seconds, seconds, 3)
        return measure.Row(
            "op", "shape", "float32", backend, "copy", times=times, ratios={"copy": reached},
            targets={"copy": 0.9, "other": 1.0}, error=None if seconds else "no result",
        )  # fmt: skip

    slow, fast = row("triton", 2.0, 0.5), row("cuda", 1.0, 0.95)
    assert fast.missed == ["other"]
    assert measure._best([slow, fast, row("reference", 0.1, 9.0)]) == [fast]
    failed = row("cuda", None, 0.0)
    assert measure._best([slow, failed]) == [failed, slow]


def facts(device: str, date: str, **more: Any) -> dict[str, Any]:
    found, good = measure.run(CPU, tiny=True, compile_=False, seconds=60, only="^block_inverse_|^factor_ema_", wait=0.0)
    assert not good, "no processor copies as fast as promised at this size"
    return {**found, "device": device, "date": date, **more}


@pytest.mark.slow
def test_the_report_goes_into_the_documents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = facts("NVIDIA X1 80GB", "2026-01-02")
    files = [report.write({**old, "date": date}, tmp_path) for date in ("2026-01-02", "2025-12-31")]
    files.append(report.write({**old, "device": "B", "left_out": ["op 3 x 3 float32"]}, tmp_path))
    (tmp_path / "cpu.json").write_text('{"date": "2027-01-01", "rows": []}')
    assert [file.name for file in files] == [
        "nvidia-x1-80gb-2026-01-02.json", "nvidia-x1-80gb-2025-12-31.json", "b-2026-01-02.json"
    ]  # fmt: skip
    assert json.loads(files[0].read_text())["versions"]["torch"] == torch.__version__
    found = report.latest(tmp_path)
    assert [(f["device"], f["date"]) for f in found] == [("B", "2026-01-02"), ("NVIDIA X1 80GB", "2026-01-02")]
    monkeypatch.setattr(tables, "latest", lambda: found)
    page = tmp_path / "page.md"
    page.write_text("before\n\n<!-- gpu -->\nNot yet measured on a GPU.\n<!-- end -->\nafter\n")
    text = tables.filled(page)
    assert text.startswith("before\n\n<!-- gpu -->\n### B\n")
    assert text.endswith("<!-- end -->\nafter\n")
    assert "### NVIDIA X1 80GB" in text
    assert "- op 3 x 3 float32" in text
    assert f"torch {torch.__version__}" in text.replace("\n", " ")
    assert "copy 0.75 **missed**" in text
    assert "linalg.inv_ex 50" in text
    assert all(len(line) <= 120 for line in text.split("\n") if not line.startswith("|"))
    page.write_text(text)
    assert tables.filled(page) == text
    monkeypatch.setattr(tables, "latest", list)
    assert tables.filled(page) == "before\n\n<!-- gpu -->\nNot yet measured on a GPU.\n<!-- end -->\nafter\n"


@pytest.mark.slow
def test_the_report_is_shown_with_rich_and_without(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = facts("B", "2026-01-02", left_out=["op 3 x 3 float32"])
    for _ in range(2):
        report.show(found)
        printed = capsys.readouterr().out
        assert "missed: block_inverse_" in printed
        assert "left out, as the time was over: op 3 x 3 float32" in printed
        monkeypatch.setitem(sys.modules, "rich.console", None)


def test_what_there_is_no_time_for_is_listed(capsys: pytest.CaptureFixture[str]) -> None:
    found, good = measure.run(CPU, tiny=True, compile_=False, seconds=-1.0, only="^block_inverse_", wait=0.0)
    assert not good
    assert found["rows"] == []
    assert len(found["left_out"]) == 3


def test_limits_have_figures() -> None:
    found = limits.measure(CLOCK, True)
    assert tuple(found) == LIMITS
    assert min(found.values()) > 0
    assert torch.get_float32_matmul_precision() == "highest"


# The whole of make gpu.


def test_every_step_is_carried_out_whatever_becomes_of_the_others() -> None:
    def step(name: str, code: str, seconds: float = 60.0) -> driver.Step:
        return driver.Step(name, (sys.executable, "-c", code, "--seconds={soft}"), seconds)

    outcomes = driver.run(
        [
            step("bad", "import sys; sys.exit(3)"),
            step("slow", "import time; time.sleep(60)", 1.0),
            step("good", "import sys; assert sys.argv[1] == '--seconds=34', sys.argv", 40.0),
            driver.Step("late", ("false",), 0.0),
        ],
        deadline=10**9,
        now=lambda: 0.0,
    )
    assert outcomes == {
        "bad": "failed (3) in 0 s",
        "slow": "stopped after 1 s",
        "good": "done in 0 s",
        "late": "left out: the time was over",
    }


@pytest.mark.parametrize("status", [0, 1])
def test_after_a_probe_that_fails_kernels_go_without_tensor_cores(monkeypatch: pytest.MonkeyPatch, status: int) -> None:
    monkeypatch.setenv("FISHER_KERNELS_TENSOR_CORES", "1")
    (step,) = (step for step in driver.steps(driver.WHOLE) if step.name == "probe")
    code = "import os, sys; sys.exit(os.environ['FISHER_KERNELS_TENSOR_CORES'] != '%s')" % ("0" if status else "1")
    todo = [
        step._replace(command=(sys.executable, "-c", f"import sys; sys.exit({status})")),
        driver.Step("later", (sys.executable, "-c", code), 60.0),
    ]
    outcomes = driver.run(todo, deadline=10**9, now=lambda: 0.0)
    assert outcomes["later"] == "done in 0 s"
    assert step.required


def test_the_probe_tells_wrong_numbers(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "reasons", lambda: {"cuda": None})
    for wrong, status in ((0, 0), (3, 1)):
        monkeypatch.setattr(probe, "wrong_numbers", lambda wrong=wrong: {"products of bfloat16": wrong})
        assert probe.main() == status
    monkeypatch.setattr(backends, "reasons", lambda: {"cuda": "no GPU"})
    assert probe.main() == 0
    said = capsys.readouterr().out
    assert said.splitlines() == [
        "products of bfloat16: as expected",
        "products of bfloat16: 3 numbers are wrong",
        "not probed: no GPU",
    ]


def test_without_a_gpu_it_says_so_at_once(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["bench.gpu"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert driver.main() == 2
    assert measure.main([]) == 2
    errors = capsys.readouterr().err
    assert "make gpu: there is no GPU" in errors
    assert sys.executable in errors


def test_the_steps_fit_into_ten_minutes_and_name_files_that_exist() -> None:
    todo = {step.name: step for step in driver.steps(driver.WHOLE)}
    assert driver.WHOLE < 600
    assert driver.SOFT * todo["benchmarks"].seconds == pytest.approx(measure.BUDGET, rel=0.02)
    files = driver.tests()
    assert files[0] == "tests/test_gpu.py"
    assert "tests/test_adafisher_step.py" in files
    assert "tests/test_conv_mini_block_gram.py" in files


def measured(op: str, size: int | None, **milliseconds: float) -> list[dict[str, Any]]:
    return [
        {"op": op, "shape": str(size), "dtype": "float32", "size": size, "backend": name, "times": {"median": time}}
        for name, time in milliseconds.items()
    ]


def test_auto_takes_what_was_measured_to_be_faster(tmp_path: Path) -> None:
    rows = [
        *measured("block_inverse", 4, cuda=1.0, triton=2.0),
        *measured("block_inverse", 9, cuda=1.0, triton=1.1),
        *measured("block_inverse", 25, cuda=3.0, triton=1.0),
        *measured("block_inverse", 64, cuda=1.0, triton=5.0),
        *measured("gram", 100, cuda=2.0, triton=1.0),
        *measured("gram", 100, reference=0.1),
        *measured("only_one", 100, cuda=2.0),
        *measured("MBF.step", None, cuda=2.0, triton=1.0),
    ]
    made = choose.table({"device": "GPU X", "date": "2026-01-02", "rows": rows})
    assert made["ops"] == {
        "block_inverse": [(15, "cuda"), (40, "triton"), (None, "cuda")],
        "gram": [(None, "triton")],
    }
    source, out = tmp_path / "results.json", tmp_path / "auto.json"
    source.write_text(json.dumps({"device": "GPU X", "date": "2026-01-02", "rows": rows}))
    assert choose.main([str(source), "--out", str(out)]) == 0
    assert json.loads(out.read_text())["device"] == "GPU X"


def test_a_choice_that_is_clearly_slower_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def rows(cuda: float, triton: float) -> list[measure.Row]:
        both = (("cuda", cuda), ("triton", triton))
        spread = [(name, Times(t, 0.9 * t, 1.1 * t, 3)) for name, t in both]
        return [measure.Row("op", "shape", "float32", name, "copy", size=9, times=times) for name, times in spread]

    monkeypatch.setitem(backends._AUTO, "ops", {"op": [[8, "triton"], [None, "cuda"]]})
    assert measure._slower_choices(rows(1.0, 2.0)) == []
    assert measure._slower_choices(rows(1.1, 1.0)) == [], "within the spread"
    assert measure._slower_choices(rows(2.0, 1.0)) == ["op, shape, float32"]
    assert measure._slower_choices(rows(2.0, 1.0)[:1]) == []
    monkeypatch.setitem(backends._AUTO, "ops", {"op": [[9, "triton"], [None, "cuda"]]})
    assert measure._slower_choices(rows(2.0, 1.0)) == []


def test_a_measurement_of_one_backend_chooses_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tmp_path / "results.json"
    source.write_text(json.dumps({"device": "X", "date": "2026-01-02", "rows": measured("op", 1, cuda=1.0)}))
    with pytest.raises(SystemExit):
        choose.main([str(source), "--out", str(tmp_path / "auto.json")])
    assert "no case of the measurement on X has times of both cuda and triton" in capsys.readouterr().err
    assert not (tmp_path / "auto.json").exists()


SANITIZER = """#!/bin/sh
echo "$@" >> {log}
case "$*" in *{bad}*) exit {status};; esac
"""


@pytest.mark.parametrize(
    ("bad", "status", "outcome", "code"),
    [("nothing", 0, "clean", 0), ("racecheck", 99, "racecheck: faults found", 1), ("synccheck", 1, "failed (1)", 1)],
)
def test_every_tool_of_the_sanitizer_runs_the_self_test(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    bad: str,
    status: int,
    outcome: str,
    code: int,
) -> None:
    log, tool = tmp_path / "log", tmp_path / "compute-sanitizer"
    tool.write_text(SANITIZER.format(log=log, bad=bad, status=status))
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    assert sanitize.main([]) == code
    assert outcome in capsys.readouterr().out
    lines = log.read_text().splitlines()
    assert [line.split()[1] for line in lines] == list(sanitize.TOOLS)
    assert all(line.endswith("-m bench.gpu.selftest --backend cuda") for line in lines)


def test_without_a_sanitizer_nothing_is_claimed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sanitize, "find", lambda: None)
    assert sanitize.main([]) == 2
    assert "compute-sanitizer is not in PATH" in capsys.readouterr().err
