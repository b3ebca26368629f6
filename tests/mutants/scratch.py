"""A copy of the checkout in which faults are put, built and tested. It stays, so that little is compiled each time."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

from tests.mutants.patches import ROOT, Mutant, changed

LEFT_OUT = {".git", ".venv", "build", "dist", ".benchmarks", ".hypothesis"}
SUFFIX = str(sysconfig.get_config_var("EXT_SUFFIX"))
HOST_MODULE = f"_cuda_on_host{SUFFIX}"
BUILD = {  # for this machine; no GPU code is run, so none is compiled
    "FISHER_KERNELS_NATIVE": "on",
    "FISHER_KERNELS_CPU": "native",
    "FISHER_KERNELS_CUDA": "off",
    "FISHER_KERNELS_CUDA_ON_HOST": "ON",
    "FISHER_KERNELS_WERROR": "OFF",  # a fault may leave a name without use
}
PART = ".part"
"""Ending of what is being set aside."""
SECONDS = 900
"""How long the tests of one fault may take."""


@dataclass(frozen=True)
class Verdict:
    """What became of one fault: ``"caught"``, ``"survived"``, ``"broken"`` (it does not build, or the tests cannot be
    imported), ``"hung"`` or ``"not run"``.
    """

    status: str
    by: str
    """The test that failed, or what else there is to say."""


def files_of(root: Path) -> Iterator[str]:
    """Paths of the sources of a checkout, in order."""
    for folder, folders, names in os.walk(root):
        folders[:] = sorted(
            name for name in folders if not (name in LEFT_OUT or name.endswith(("_cache", "__pycache__", ".egg-info")))
        )
        for name in sorted(names):
            if not name.endswith((".so", ".pyc")) and not Path(folder, name).is_symlink():
                yield Path(folder, name).relative_to(root).as_posix()


class Scratch:
    """The copy.

    Args:
        folder: where it is, and what was set aside of its build while a fault is in it.
    """

    def __init__(self, folder: Path, root: Path = ROOT) -> None:
        self.root, self.tree, self.aside = root, folder / "tree", folder / "aside"
        self.tree.mkdir(parents=True, exist_ok=True)
        self._put_back()
        self._copy()

    def _copy(self) -> None:
        wanted = set(files_of(self.root))
        for path in set(files_of(self.tree)) - wanted:
            (self.tree / path).unlink()
        for path in wanted:
            source, target = self.root / path, self.tree / path
            if not target.exists() or source.read_bytes() != target.read_bytes():
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(source, target)  # as a new file: what depends on it is built
        # An installed checkout would be asked for this module otherwise.
        nested = self.tree / "fisher_kernels" / "triton_kernels"
        if not nested.is_symlink():
            nested.symlink_to(Path("..", "triton_kernels"))

    # What is run in it.

    def _environment(self) -> dict[str, str]:
        kept = {name: value for name, value in os.environ.items() if not name.startswith("FISHER_KERNELS_")}
        return {**kept, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(self.tree), "PYTHONDONTWRITEBYTECODE": "1"}

    def build(self) -> str:
        """Build the native modules; what the compiler said if that fails, else nothing."""
        command = [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"]
        environment = {**self._environment(), **BUILD}
        done = subprocess.run(command, cwd=self.tree, env=environment, capture_output=True, text=True)
        return (done.stdout + done.stderr)[-4000:] if done.returncode else ""

    def ask(self, code: str) -> str:
        """What a line of Python prints in the copy."""
        command = [sys.executable, "-c", code]
        done = subprocess.run(command, cwd=self.tree, env=self._environment(), capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(done.stderr)
        return done.stdout.strip()

    def check(self) -> None:
        """The copy is what its tests import, not an installed package."""
        code = "import fisher_kernels.triton_kernels as t; import fisher_kernels as f; print(f.__file__, t.__file__)"
        for path in self.ask(code).split():
            if not Path(path).is_relative_to(self.tree):
                raise RuntimeError(f"the tests in {self.tree} would import {path}")

    def has_host_module(self) -> bool:
        return (self.tree / "fisher_kernels" / HOST_MODULE).exists()

    def test(self, tests: Sequence[str], everything: bool = False, first: bool = True) -> tuple[int, list[str]]:
        """Run tests: the exit status, and those that failed."""
        report = self.tree / "build" / "report.xml"
        report.unlink(missing_ok=True)
        command = [
            *(sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={report}"),
            *(["-x"] if first else []),
            *(["--all"] if everything else []),
            *tests,
        ]
        process = subprocess.Popen(
            command,
            cwd=self.tree,
            env=self._environment(),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            status = process.wait(SECONDS)
        except subprocess.TimeoutExpired:
            status = HUNG
        finally:  # an interruption too: what the tests have started ends with them
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        return status, _failed(report) if report.exists() else []

    # Faults.

    @contextlib.contextmanager
    def fault(self, mutant: Mutant) -> Iterator[str]:
        """Within the block the fault is in the copy, built; what the compiler said if it cannot be built."""
        texts = changed(mutant, lambda path: (self.root / path).read_text())
        try:
            for path, text in texts.items():
                self._exchange(path, text)
            yield self.build() if mutant.compiled else ""
        finally:
            self._put_back()

    def _exchange(self, path: str, text: str) -> None:
        """Put a faulty file in place of the right one, and set aside what is built of it.

        A source that is compiled keeps its time: only what is missing is built, so that kernels are compiled for one
        instruction set.
        """
        target = self.tree / path
        times = target.stat().st_atime_ns, target.stat().st_mtime_ns
        compiled = path.startswith("csrc/")
        if compiled:
            for output in [*self._built_of(target), *self._modules()]:
                self._set_aside(output, keep=output.suffix == ".so")
        self._set_aside(target)
        target.write_text(text)
        if compiled:
            os.utime(target, ns=times)

    def _modules(self) -> list[Path]:
        return [*self.tree.glob("fisher_kernels/*.so"), *self.tree.glob("build/native*/*.so")]

    def _built_of(self, source: Path) -> list[Path]:
        """Object files that depend on a source, without those of CPU kernels for lesser instruction sets."""
        best = self.ask("from fisher_kernels._library import native_module; print(native_module().capability())")
        found = []
        for folder in self.tree.glob("build/native*"):
            ninja = shutil.which("ninja", path=os.pathsep.join([sysconfig.get_path("scripts"), os.environ["PATH"]]))
            assert ninja is not None
            lines = subprocess.run([ninja, "-C", folder, "-t", "deps"], capture_output=True, text=True, check=True)
            for block in lines.stdout.split("\n\n"):
                output, *needs = block.strip().splitlines() or [""]
                name = output.partition(": #deps")[0]
                kernel = re.search(r"CMakeFiles/cpu_(\w+)\.dir/", name)
                depends = any(os.path.normpath(folder / need.strip()) == str(source) for need in needs)
                if depends and (kernel is None or kernel[1] == best):
                    found.append(folder / name)
        return found

    def _set_aside(self, path: Path, keep: bool = False) -> None:
        kept = self.aside / path.relative_to(self.tree)
        if not kept.exists() and path.exists():
            kept.parent.mkdir(parents=True, exist_ok=True)
            part = kept.with_name(kept.name + PART)
            shutil.copy2(path, part)
            part.replace(kept)  # so that it is whole, whenever a run is killed
            if not keep:
                path.unlink()

    def _put_back(self) -> None:
        """Everything as it was, also what an interrupted run has left."""
        if self.aside.exists():
            for kept in [path for path in self.aside.rglob("*") if path.is_file() and path.suffix != PART]:
                shutil.copy2(kept, self.tree / kept.relative_to(self.aside))
            shutil.rmtree(self.aside)


HUNG = -1000


def judge(status: int, failed: Sequence[str]) -> Verdict:
    """What the exit status of the tests, and those that failed, say of a fault."""
    if status == HUNG:
        return Verdict("hung", f"not over after {SECONDS} s")
    if status < 0:
        return Verdict("caught", f"the tests died of {signal.Signals(-status).name}")
    if status == 0:
        return Verdict("survived", "")
    if status == 1 and failed:
        return Verdict("caught", failed[0])
    return Verdict("broken", f"pytest ended with {status} and {len(failed)} failures")


def _failed(report: Path) -> list[str]:
    cases = ElementTree.parse(report).iter("testcase")
    return [
        _node(case.get("classname", ""), case.get("name", ""))
        for case in cases
        if case.find("failure") is not None or case.find("error") is not None
    ]


def _node(dotted: str, name: str) -> str:
    """What pytest calls a test, from its report: ``tests.test_a`` or ``tests.fuzz.test_a.TestClass``, and a name."""
    parts = dotted.split(".")
    module = next((i for i, part in enumerate(parts) if part.startswith("test_")), len(parts) - 1)
    return "::".join(["/".join(parts[: module + 1]) + ".py", *parts[module + 1 :], name])
