"""The programs of examples/: as Python starts them, and those for several processes as torchrun does."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch.distributed as dist

from tests.checkout import ROOT
from tests.processes import needs_processes

SAYS_WHEN_IT_ENDS = ROOT / "tests" / "ends"
STEP = re.compile(r"step (\d+): loss")
STEP_AND_LOSS = re.compile(r"step (\d+): loss (\S+)")


NUMBER = r"([\d.]+)"


def printed(program: str, *arguments: str) -> str:
    """What a program prints; its warnings, and those of frameworks, are on standard error."""
    done = subprocess.run(
        [sys.executable, ROOT / "examples" / program, *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"},
        capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def figure(said: str, before: str) -> float:
    """The number behind some words."""
    return float(re.findall(re.escape(before) + NUMBER, said)[0])


def test_reports_are_read() -> None:
    said = printed("reading.py")
    first, second = said.split("after 60 steps")
    assert "fallback            0" in first.split("\nmix ")[1].split("\n")[0]
    assert "mix, by function" in second
    figures, flattened = second.split("the same with damping=10")
    assert 0 < figure(figures, "mix: damping ") < 90
    assert figure(flattened, "mix: damping ") > 95


@pytest.mark.slow
def test_16_bits_train_as_32() -> None:
    found = [float(loss) for loss in re.findall(rf"loss {NUMBER}", printed("mixed_precision.py"))]
    assert len(found) == 5
    assert max(found) < 1.1 * min(found)


@pytest.mark.slow
def test_optimizers_are_chosen() -> None:
    said = printed("choosing.py", "--steps", "200")
    assert 1e-3 < figure(said, "try lr=") < 2e-2
    found = {name: figure(line, "test loss ") for line in said.splitlines()[1:] for name in [line.split(",")[0]]}
    assert found.keys() == {"AdamW", "AdaFisherW", "MBF", "KFAC"}
    assert min(found["MBF"], found["KFAC"]) < found["AdamW"]


@pytest.mark.slow
@pytest.mark.parametrize(("model", "ours"), [("vit", "EKFACAdam"), ("resnet", "MBF")])
def test_images_are_learnt_from_scratch(model: str, ours: str) -> None:
    said = printed("vision.py", model, "--epochs", "4")
    assert figure(said, f"{ours}: ") > 85
    assert figure(said, f"{ours}: ") > figure(said, "AdamW: ") - 1


@pytest.mark.slow
@pytest.mark.parametrize(("program", "steps", "ours"), [("trainer.py", 60, "KFAC"), ("lora.py", 40, "EKFACAdam")])
def test_language_models_are_trained_in_frameworks(program: str, steps: int, ours: str) -> None:
    for name in ("transformers", "accelerate", "peft"):
        if importlib.util.find_spec(name) is None:
            pytest.skip(f"{name} cannot be imported; pip install 'fisher_kernels[integrations]'")
    said = printed(program, "--steps", str(steps))
    assert figure(said, f"{ours}: evaluation loss ") < figure(said, "\nAdamW: evaluation loss ") + 0.1
    if program == "lora.py":
        assert figure(said, f"{ours}: evaluation loss ") < figure(said, "before: evaluation loss ") - 0.5
        assert "served by a rule: 28 of 28" in said


def losses(processes: int, program: str, *arguments: str) -> dict[int, float]:
    """What a program prints, by the number of the step."""
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    path = os.pathsep.join(map(str, (ROOT, SAYS_WHEN_IT_ENDS)))
    done = subprocess.run(
        [*run, ROOT / "examples" / "distributed" / program, *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path},
        capture_output=True, text=True, timeout=180,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    # Its groups have threads until then, and one that gives back a tensor at that time aborts the process.
    assert "Python ends" not in done.stdout
    return {int(step): float(loss) for step, loss in STEP_AND_LOSS.findall(done.stdout)}


@needs_processes
@pytest.mark.parametrize(
    ("processes", "program", "arguments"),
    [
        (4, "fsdp.py", ["--replicas", "2"]),
        pytest.param(3, "fsdp.py", [], marks=pytest.mark.slow),
        pytest.param(2, "ddp.py", [], marks=pytest.mark.slow),
        pytest.param(4, "tensor_parallel.py", [], marks=pytest.mark.slow),
    ],
)
def test_it_trains(processes: int, program: str, arguments: list[str]) -> None:
    found = losses(processes, program, *arguments)
    assert [*found] == [20, 40, 60]
    assert found[60] < 0.4  # of log(5) = 1.6 at first


@needs_processes
@pytest.mark.slow
def test_it_goes_on_with_another_number_of_processes(tmp_path: Path) -> None:
    """From a checkpoint of two four go on as one goes on from its own."""
    folders = tmp_path / "some", tmp_path / "one"
    shares = [losses(n, "resume.py", str(folders[0])) for n in (2, 4)]
    alone = [losses(1, "resume.py", str(folders[1])) for _ in range(2)]
    assert [[*found] for found in shares] == [[20, 40], [60, 80]]
    for found, expected in zip(shares, alone, strict=True):
        assert found == pytest.approx(expected, abs=2e-4)  # of losses with four decimals


def _agent(port: int, folder: Path, output: Path) -> subprocess.Popen[bytes]:
    """torchrun on one of up to two machines, both of which are this one, with one process."""
    run = [sys.executable, "-m", "torch.distributed.run", "--nnodes=1:2", "--nproc-per-node=1", "--max-restarts=3"]
    run += ["--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{port}", "--rdzv-id=elastic"]
    # How long it waits for another machine, and how often it asks whether one is still there.
    run += ["--rdzv-conf=last_call_timeout=3,keep_alive_interval=1,keep_alive_max_attempt=3,is_host=0"]
    program = [ROOT / "examples" / "distributed" / "resume.py", folder, "--steps", "600"]
    with output.open("wb") as out:
        return subprocess.Popen(
            [*map(str, run + program)],
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
            stdout=out, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip


def _kill(agent: subprocess.Popen[bytes]) -> None:
    """With its process, which has a session of its own."""
    if agent.poll() is None:
        children = Path(f"/proc/{agent.pid}/task/{agent.pid}/children").read_text().split()
        for pid in (agent.pid, *map(int, children)):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def _wait_for(condition: Callable[[], bool], seconds: float) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it takes too long"
        time.sleep(0.05)


@needs_processes
@pytest.mark.slow
def test_it_goes_on_alone_when_the_other_machine_is_gone(tmp_path: Path) -> None:
    """Two agents of torchrun with a process each; one of them, and its process, are killed in the middle."""
    # Where agents meet is neither of them.
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    folder = tmp_path / "checkpoints"
    outputs = tmp_path / "stays", tmp_path / "goes"
    stays, goes = (_agent(store.port, folder, output) for output in outputs)
    try:
        _wait_for((folder / "60" / ".metadata").exists, 120)
        _kill(goes)
        goes.wait(30)
        assert stays.wait(180) == 0, outputs[0].read_text()
    finally:
        for agent in (stays, goes):
            _kill(agent)
            agent.wait(30)
    said = outputs[0].read_text()
    before, after = said.split("Traceback", 1)
    kept = max(int(step) for output in (before, outputs[1].read_text()) for step in STEP.findall(output))
    steps = [int(step) for step in STEP.findall(after)]
    # From the last checkpoint on, or the one before where the last one was being written.
    assert steps[0] in (kept, kept + 20)
    assert steps == [*range(steps[0], steps[0] + 600, 20)]
