"""Applies each fault to a copy of the checkout, runs the tests that can see it, and prints what became of it.

``python -m tests.mutants [NAME]`` runs those whose name contains NAME. Verdicts are kept in ``build/mutants``, so that
an interrupted run goes on where it was; a change of a source, of a test or of the patch itself makes a verdict void.
"""

from __future__ import annotations

import hashlib
import json
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from tests.mutants.patches import ROOT, Mutant, StaleError, mutants
from tests.mutants.scratch import Scratch, Verdict, files_of, judge

MOST_FOR_ALL = 5
"""How many faults may be such that only ``--all`` sees them."""


@dataclass(frozen=True)
class Result:
    """A verdict, and what it took."""

    status: str
    by: str
    seconds: float
    proved: bool = False
    """Whether the test that caught it was seen to pass without it."""


def tree_key(root: Path) -> str:
    """What verdicts depend on besides the patch: every source and test of a checkout."""
    key = hashlib.sha256()
    for path in files_of(root):
        if path.endswith((".md", ".png", ".svg", ".patch")):
            continue
        key.update(path.encode() + b"\0" + (root / path).read_bytes() + b"\0")
    return key.hexdigest()


class Results:
    """Verdicts of this tree, in a file."""

    def __init__(self, path: Path, tree: str) -> None:
        self.path, self.tree = path, tree
        self.kept: dict[str, Result] = {}
        if path.exists():
            content = json.loads(path.read_text())
            if content["tree"] == tree:
                self.kept = {key: Result(**value) for key, value in content["results"].items()}

    @staticmethod
    def _key(mutant: Mutant) -> str:
        return hashlib.sha256(mutant.text.encode()).hexdigest()

    def get(self, mutant: Mutant) -> Result | None:
        """The last verdict on a fault."""
        return self.kept.get(self._key(mutant))

    def is_settled(self, mutant: Mutant) -> bool:
        """Whether another run would say the same: what broke or hung may have done so for want of memory or time."""
        result = self.get(mutant)
        return result is not None and result.status in ("caught", "survived")

    def is_proved(self, mutant: Mutant) -> bool:
        """Whether nothing is left to be seen of a fault: the test that caught it passes without it."""
        result = self.get(mutant)
        return result is not None and (result.proved or result.status == "survived" or "::" not in result.by)

    def put(self, mutant: Mutant, result: Result) -> None:
        self.kept[self._key(mutant)] = result
        content = {"tree": self.tree, "results": {key: asdict(value) for key, value in self.kept.items()}}
        fresh = self.path.with_suffix(".new")
        fresh.write_text(json.dumps(content, indent=1))
        fresh.replace(self.path)


def run_one(scratch: Scratch, mutant: Mutant) -> Result:
    """Put one fault in, build, test, and take it out."""
    began = time.monotonic()
    tests = [f"tests/{name}" for name in mutant.tests]
    try:
        with scratch.fault(mutant) as complaint:
            if complaint:
                verdict = Verdict("broken", f"it does not build: {complaint.strip().splitlines()[-1]}")
            elif any("/cuda" in path for path in mutant.files) and not scratch.has_host_module():
                verdict = Verdict("not run", "there are no CUDA kernels on the host, which need a toolkit's headers")
            else:
                verdict = judge(*scratch.test(tests, everything=bool(mutant.reason)))
    except StaleError as error:
        verdict = Verdict("broken", str(error))
    return Result(verdict.status, verdict.by, round(time.monotonic() - began, 1))


def prove(scratch: Scratch, results: Results, chosen: Sequence[Mutant]) -> None:
    """See that the tests which caught a fault pass without it."""
    open_ones = {}
    for mutant in chosen:
        result = results.get(mutant)
        if result is not None and result.status == "caught" and "::" in result.by and not result.proved:
            open_ones[mutant] = result
    for everything in (False, True):
        of_tier = {mutant: result for mutant, result in open_ones.items() if bool(mutant.reason) == everything}
        if not of_tier:
            continue
        status, failed = scratch.test(sorted({r.by for r in of_tier.values()}), everything=everything, first=False)
        for mutant, result in of_tier.items():
            if status not in (0, 1):
                results.put(mutant, Result("broken", f"pytest ended with {status} without any fault", result.seconds))
            elif result.by in failed:
                results.put(mutant, Result("broken", f"{result.by} fails without it too", result.seconds))
            else:
                results.put(mutant, Result("caught", result.by, result.seconds, proved=True))


def table(chosen: Iterable[Mutant], results: Results) -> Table:
    """One row for each fault."""
    made = Table("mutant", "file", "tests", "became", "by", "seconds")
    for mutant in chosen:
        result = results.get(mutant) or Result("not run", "", 0.0)
        tests = " ".join(mutant.tests) + (" --all" if mutant.reason else "")
        files = "\n".join(mutant.files)
        made.add_row(mutant.name, files, tests, result.status, Text(result.by), f"{result.seconds:.1f}")
    return made


def run(name: str, folder: Path, console: Console) -> int:
    """Run the faults whose name contains ``name``; how many were not caught."""
    chosen = [mutant for mutant in mutants() if name in mutant.name]
    if not chosen:
        raise SystemExit(f"no mutant has {name!r} in its name")
    folder.mkdir(parents=True, exist_ok=True)
    results = Results(folder / "results.json", tree_key(ROOT))
    waiting = [mutant for mutant in chosen if not results.is_settled(mutant)]
    if waiting or any(not results.is_proved(mutant) for mutant in chosen):
        console.print(f"{len(chosen)} mutants, {len(waiting)} of them to run")
        scratch = Scratch(folder)
        if complaint := scratch.build():
            raise SystemExit(f"the native module cannot be built, even without a fault:\n{complaint}")
        scratch.check()
        for mutant in waiting:
            result = run_one(scratch, mutant)
            if result.status != "not run":
                results.put(mutant, result)
            console.print(f"{mutant.name}: {result.status} {result.by} ({result.seconds:.1f} s)", markup=False)
        prove(scratch, results, chosen)
    console.print(table(chosen, results))
    return verdict(chosen, results, console)


def verdict(chosen: Sequence[Mutant], results: Results, console: Console) -> int:
    """Say how many were caught; how many were not is what is returned."""
    missed = [mutant for mutant in chosen if (r := results.get(mutant)) is None or r.status != "caught"]
    console.print(f"{len(chosen) - len(missed)} of {len(chosen)} caught")
    for mutant in missed:
        result = results.get(mutant) or Result("not run", "", 0.0)
        console.print(f"{result.status}: {mutant.name}: {mutant.fault} {result.by}", markup=False)
    return len(missed)


if __name__ == "__main__":
    sys.exit(run(" ".join(sys.argv[1:]), ROOT / "build" / "mutants", Console(width=200)) > 0)
