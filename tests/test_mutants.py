"""The deliberate faults still apply to the sources, and one that no test sees is reported.

``make mutants`` runs the tests against them, which takes too long for a test.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from tests.mutants import __main__ as runner
from tests.mutants import patches, scratch
from tests.mutants.patches import ROOT, Mutant, StaleError

pytest.importorskip("rich")
from rich.console import Console

MUTANTS = patches.mutants()
LEAST = 80

FILE = "one\ntwo\nthree\nfour\nfive\n"
PATCH = """# Four is five.
# tests: test_sums.py
diff --git a/fisher_kernels/numbers.py b/fisher_kernels/numbers.py
--- a/fisher_kernels/numbers.py
+++ b/fisher_kernels/numbers.py
@@ -2,4 +2,3 @@ def f():
 two
 three
-four
 five
"""


def written(folder: Path, text: str = PATCH, name: str = "fault") -> Mutant:
    path = folder / f"{name}.patch"
    path.write_text(text)
    return patches.read(path)


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_every_patch_applies(mutant: Mutant) -> None:
    texts = patches.changed(mutant, lambda path: (ROOT / path).read_text())
    for path, text in texts.items():
        assert not path.startswith("tests/"), "a fault in a test proves nothing"
        assert text != (ROOT / path).read_text()
        if path.endswith(".py"):
            compile(text, path, "exec")
    for name in mutant.tests:
        assert (ROOT / "tests" / name).is_file()
        assert Path(name).name.startswith("test_")


def test_there_are_enough_and_no_two_are_the_same() -> None:
    assert len(MUTANTS) >= LEAST
    assert len({repr(mutant.files) for mutant in MUTANTS}) == len(MUTANTS)
    assert sum(bool(mutant.reason) for mutant in MUTANTS) <= runner.MOST_FOR_ALL


def test_every_kernel_has_one() -> None:
    folders = ("csrc/cpu/*.cpp", "csrc/cuda/*.cu", "triton_kernels/[a-z]*.py", "fisher_kernels/ops/[a-z]*.py")
    kernels = {path.relative_to(ROOT).as_posix() for folder in folders for path in ROOT.glob(folder)}
    kernels -= {"csrc/cpu/limits.cpp", "csrc/cuda/toolkit.cu"}  # no kernels: what was built, and for what
    assert kernels
    assert kernels - {path for mutant in MUTANTS for path in mutant.files} == set()


def test_a_patch_is_applied_where_its_lines_are(tmp_path: Path) -> None:
    mutant = written(tmp_path)
    assert (mutant.name, mutant.fault, mutant.tests, mutant.reason) == ("fault", "Four is five.", ("test_sums.py",), "")
    assert patches.changed(mutant, lambda _: FILE) == {"fisher_kernels/numbers.py": "one\ntwo\nthree\nfive\n"}
    moved = patches.changed(mutant, lambda _: "zero\n" * 9 + FILE)
    assert moved["fisher_kernels/numbers.py"].endswith("three\nfive\n")


@pytest.mark.parametrize("text", [FILE.replace("four", "4"), "zero\n" + FILE + FILE], ids=["changed", "twice"])
def test_a_patch_that_does_not_fit_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(StaleError, match=r"numbers\.py: the lines around line 2"):
        patches.changed(written(tmp_path), lambda _: text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (PATCH.replace("# tests: test_sums.py\n", ""), "expected '# <what is wrong>' and '# tests:"),
        (PATCH.replace("# Four is five.\n", ""), "expected '# <what is wrong>' and '# tests:"),
        (PATCH[: PATCH.index("diff")], "there is no patch in it"),
    ],
)
def test_a_patch_without_header_or_body_is_refused(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        written(tmp_path, text)


@pytest.mark.parametrize(
    ("status", "failed", "expected"),
    [
        (0, [], ("survived", "")),
        (1, ["tests/test_sums.py::test_a"], ("caught", "tests/test_sums.py::test_a")),
        (1, [], ("broken", "pytest ended with 1 and 0 failures")),
        (2, ["tests/test_sums.py::test_a"], ("broken", "pytest ended with 2 and 1 failures")),
        (5, [], ("broken", "pytest ended with 5 and 0 failures")),
        (-11, [], ("caught", "the tests died of SIGSEGV")),
        (scratch.HUNG, [], ("hung", "not over after 900 s")),
    ],
)
def test_only_a_failed_test_counts_as_caught(status: int, failed: list[str], expected: tuple[str, str]) -> None:
    verdict = scratch.judge(status, failed)
    assert (verdict.status, verdict.by) == expected


class _Stub:
    """A copy of a checkout whose tests end as one is told."""

    def __init__(self, answer: Callable[[], tuple[int, list[str]]]) -> None:
        self.answer, self.asked, self.faulty = answer, list[tuple[str, ...]](), False

    def __call__(self, folder: Path) -> _Stub:
        return self

    def build(self) -> str:
        return ""

    def check(self) -> None:
        pass

    def has_host_module(self) -> bool:
        return False

    def fault(self, mutant: Mutant) -> _Stub:
        return self

    def __enter__(self) -> str:
        self.faulty = True
        return ""

    def __exit__(self, *_: object) -> None:
        self.faulty = False

    def test(self, tests: Sequence[str], everything: bool = False, first: bool = True) -> tuple[int, list[str]]:
        self.asked.append(tuple(tests))
        return self.answer() if self.faulty else (0, [])


def ran(monkeypatch: pytest.MonkeyPatch, folder: Path, stub: _Stub, texts: dict[str, str]) -> tuple[int, str]:
    """How many were not caught, and what was printed."""
    chosen = [written(folder, text, name) for name, text in texts.items()]
    monkeypatch.setattr(runner, "mutants", lambda: chosen)
    monkeypatch.setattr(runner, "Scratch", stub)
    monkeypatch.setattr(runner, "tree_key", lambda _: "tree")
    console = Console(file=io.StringIO(), width=200)
    missed = runner.run("", folder, console)
    assert isinstance(console.file, io.StringIO)
    return missed, console.file.getvalue()


def test_a_fault_that_no_test_sees_is_a_failure(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    stub = _Stub(lambda: (0, []))
    missed, said = ran(monkeypatch, tmp_path, stub, {"fault": PATCH})
    assert missed == 1
    assert "0 of 1 caught" in said
    assert "survived: fault: Four is five." in said
    assert stub.asked == [("tests/test_sums.py",)]


def test_a_fault_that_is_caught_is_not_run_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    stub = _Stub(lambda: (1, ["tests/test_sums.py::test_a"]))
    for _ in range(2):
        missed, said = ran(monkeypatch, tmp_path, stub, {"fault": PATCH})
        assert missed == 0
        assert "1 of 1 caught" in said
    assert stub.asked == [("tests/test_sums.py",), ("tests/test_sums.py::test_a",)]  # with the fault, and without
    changed = PATCH.replace("Four is five", "There is no four")
    assert ran(monkeypatch, tmp_path, stub, {"fault": changed})[0] == 0
    assert len(stub.asked) == 4


def test_a_test_that_fails_anyway_catches_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    stub = _Stub(lambda: (1, ["tests/test_sums.py::test_a"]))
    monkeypatch.setattr(_Stub, "test", lambda self, *_, **__: self.answer())
    missed, said = ran(monkeypatch, tmp_path, stub, {"fault": PATCH})
    assert missed == 1
    assert "tests/test_sums.py::test_a fails without it too" in said


def test_cuda_faults_without_the_module_are_not_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    stub = _Stub(lambda: (0, []))
    text = PATCH.replace("fisher_kernels/numbers.py", "csrc/cuda/numbers.cu")
    missed, said = ran(monkeypatch, tmp_path, stub, {"fault": text})
    assert missed == 1
    assert "there are no CUDA kernels on the host" in said
    assert stub.asked == []


def test_the_copy_holds_a_fault_only_for_a_while(tmp_path: Path) -> None:
    root = tmp_path / "checkout"
    for path in ("fisher_kernels/numbers.py", "triton_kernels/__init__.py", "build/ignored.py", ".git/config"):
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(FILE)
    copy = scratch.Scratch(tmp_path / "mutants", root)
    inside = copy.tree / "fisher_kernels" / "numbers.py"
    assert sorted(scratch.files_of(copy.tree)) == ["fisher_kernels/numbers.py", "triton_kernels/__init__.py"]
    before = inside.stat().st_mtime_ns
    with copy.fault(written(tmp_path)) as complaint:
        assert not complaint
        assert inside.read_text() == "one\ntwo\nthree\nfive\n"
    assert inside.read_text() == FILE
    assert inside.stat().st_mtime_ns == before
    with pytest.raises(KeyboardInterrupt), copy.fault(written(tmp_path)):
        raise KeyboardInterrupt
    assert inside.read_text() == FILE
    copy._exchange("fisher_kernels/numbers.py", "a run that was killed")
    scratch.Scratch(tmp_path / "mutants", root)
    assert inside.read_text() == FILE


def test_the_key_of_a_tree_follows_its_sources(tmp_path: Path) -> None:
    source = tmp_path / "a.py"
    source.write_text("x = 1\n")
    before = runner.tree_key(tmp_path)
    (tmp_path / "page.md").write_text("words")
    assert runner.tree_key(tmp_path) == before
    source.write_text("x = 2\n")
    assert runner.tree_key(tmp_path) != before
