"""Reads the patches and applies them, without git, so that a checkout without a repository can do it too.

A patch is a unified diff of one or more files below comment lines::

    # What is wrong, in a sentence or two.
    # tests: test_gram.py test_mbf.py       the files of tests/ that can see it
    # all: why                              only where the fast tier cannot see it and ``--all`` does
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FOLDER = Path(__file__).parent


class StaleError(Exception):
    """A patch does not fit the files."""


@dataclass(frozen=True)
class Hunk:
    """Lines that stand in a file, and those to put in their place."""

    line: int  # of the first of them, from 0
    old: tuple[str, ...]
    new: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class Mutant:
    """One fault.

    Attributes:
        name: of the patch, without its ending.
        fault: what is wrong.
        tests: files of tests/ that can see it.
        reason: why only ``--all`` sees it; empty where the fast tier does.
        text: the patch.
        files: path -> hunks.
    """

    name: str
    fault: str
    tests: tuple[str, ...]
    reason: str
    text: str
    files: dict[str, tuple[Hunk, ...]]

    @property
    def compiled(self) -> bool:
        """Whether the native modules have to be built anew."""
        return any(path.startswith("csrc/") for path in self.files)


def mutants(folder: Path = FOLDER) -> list[Mutant]:
    """All of them, by name."""
    return [read(path) for path in sorted(folder.glob("*.patch"))]


def read(path: Path) -> Mutant:
    """One patch.

    Raises:
        ValueError: it is not a patch with a header as above.
    """
    text = path.read_text()
    comments = [line[1:].strip() for line in text.splitlines() if line.startswith("#")]
    notes = dict(re.findall(r"^(tests|all): *(.*)$", "\n".join(comments), re.MULTILINE))
    fault = " ".join(line for line in comments if not re.match("tests:|all:", line))
    if not fault or not notes.get("tests"):
        raise ValueError(f"{path.name}: expected '# <what is wrong>' and '# tests: <files of tests/>' above the patch")
    files = _parse(text)
    if not files:
        raise ValueError(f"{path.name}: there is no patch in it")
    return Mutant(path.stem, fault, tuple(notes["tests"].split()), notes.get("all", ""), text, files)


def _parse(text: str) -> dict[str, tuple[Hunk, ...]]:
    files: dict[str, tuple[Hunk, ...]] = {}
    for part in re.split(r"^diff --git .*\n", text, flags=re.MULTILINE)[1:]:
        head, *bodies = re.split(r"^(?=@@ )", part, flags=re.MULTILINE)
        target = re.search(r"^\+\+\+ b/(.+)$", head, re.MULTILINE)
        if target is None:
            raise ValueError(f"expected a file that is changed, found {head!r}")
        hunks = []
        for body in bodies:
            first, *lines = body.splitlines()
            begin = re.match(r"@@ -(\d+)", first)
            assert begin is not None
            old = tuple(line[1:] for line in lines if line[:1] in (" ", "-", ""))
            new = tuple(line[1:] for line in lines if line[:1] in (" ", "+", ""))
            hunks.append(Hunk(int(begin[1]) - 1, old, new))
        files[target[1]] = tuple(hunks)
    return files


def _place(hunk: Hunk, lines: list[str], path: str) -> int:
    """Where a hunk fits: in one place only, or of several where it was made."""
    size = len(hunk.old)
    places = [i for i in range(len(lines) - size + 1) if tuple(lines[i : i + size]) == hunk.old]
    if len(places) == 1:
        return places[0]
    if hunk.line in places:
        return hunk.line
    raise StaleError(f"{path}: the lines around line {hunk.line + 1} are found {len(places)} times")


def changed(mutant: Mutant, read_file: Callable[[str], str]) -> dict[str, str]:
    """The text of each file with the fault in it.

    Raises:
        StaleError: the patch does not fit.
    """
    texts = {}
    for path, hunks in mutant.files.items():
        lines = read_file(path).splitlines()
        places = sorted(((_place(hunk, lines, path), hunk) for hunk in hunks), key=lambda pair: pair[0])
        for place, hunk in reversed(places):
            lines[place : place + len(hunk.old)] = hunk.new
        texts[path] = "\n".join(lines) + "\n"
    return texts
