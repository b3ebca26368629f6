"""The documents: their Python runs and prints what they say, their links lead somewhere, and they leave nothing out."""

from __future__ import annotations

import importlib.util
import inspect
import itertools
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import typer

from bench.tables import filled
from fisher_kernels import ops
from fisher_kernels.cli import app

ROOT = Path(__file__).resolve().parents[1]
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
]
SETTINGS = (ROOT / "docs" / "environment.md").read_text()

each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


class Block(NamedTuple):
    """A fenced block of a page."""

    language: str
    line: int  # of its fence, counted from 1
    text: str


def blocks(page: Path) -> Iterator[Block]:
    fence = re.compile(r"^```([^\n]*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
    text = page.read_text()
    for match in fence.finditer(text):
        yield Block(match[1], text.count("\n", 0, match.start()) + 1, match[2])


def prose(page: Path) -> list[str]:
    """The lines outside fenced blocks; the others are empty."""
    return re.sub(
        r"^```.*?^```$", lambda m: "\n" * m[0].count("\n"), page.read_text(), flags=re.DOTALL | re.MULTILINE
    ).split("\n")


# Runs the snippets of a page one after another, as one program that says where in the page it is. The compiler that
# torch.compile calls takes a minute; what it is given to compile is the same without.
RUN = """
import functools, json, sys
import torch
torch.compile = functools.partial(torch.compile, backend="aot_eager")
page, snippets = json.load(sys.stdin)
names = {"__name__": "__main__"}
for line, code in snippets:
    exec(compile("\\n" * line + code, page, "exec"), names)
    print("\\0", end="")
"""


@pytest.mark.parametrize(
    "page",  # each page is a process that imports torch
    [page if page.name == "README.md" else pytest.param(page, marks=pytest.mark.slow) for page in PAGES],
    ids=lambda page: str(page.relative_to(ROOT)),
)
def test_python_snippets_run_and_print_what_the_page_says(page: Path, tmp_path: Path) -> None:
    found = list(blocks(page))
    snippets = [block for block in found if block.language == "python"]
    if not snippets:
        pytest.skip("no Python on this page")
    if any("find_task" in block.text for block in snippets):
        pytest.importorskip("sklearn")
    for name in ("transformers", "lightning", "accelerate", "peft"):
        if any(f"from {name}" in block.text for block in snippets) and importlib.util.find_spec(name) is None:
            pytest.skip(f"{name} cannot be imported; pip install 'fisher_kernels[integrations]'")
    result = subprocess.run(
        [sys.executable, "-c", RUN],
        input=json.dumps([str(page), [(block.line, block.text) for block in snippets]]),
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUTF8": "1", "FISHER_KERNELS_BACKEND": "auto"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    printed = dict(zip(snippets, result.stdout.split("\0"), strict=False))
    for block, following in itertools.pairwise(found):
        if following.language == "output":
            lines = [line.rstrip() for line in printed[block].strip("\n").split("\n")]
            assert lines == following.text.rstrip("\n").split("\n"), f"{page}:{following.line}"


def anchors(page: Path) -> set[str]:
    """What a link can point to in a page: its headings, as GitHub spells them."""
    headings = re.findall(r"^#+ (.*)$", "\n".join(prose(page)), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@each_page
def test_relative_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", "\n".join(prose(page))):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), f"{page.name}: {target}"
        assert not anchor or anchor in anchors(file), f"{page.name}: {target}"


@each_page
def test_prose_fits_on_a_line(page: Path) -> None:
    long = [i for i, line in enumerate(prose(page), 1) if len(line) > 120 and not line.startswith("|")]
    assert not long, f"{page}: lines {long}"


@each_page
def test_measured_tables_name_ops_that_are_measured(page: Path) -> None:
    benches = [file.read_text() for file in (ROOT / "bench").glob("bench_*.py")]
    measured = {name for text in benches for name in re.findall(r'op="(.+)"', text)}
    for text in benches:
        for names in re.findall(r'parametrize\("op", \[(.+)\]\)', text):
            measured.update(re.findall(r'"(.+?)"', names))
    for names in re.findall(r"^<!-- measured: (.*) -->$", "\n".join(prose(page)), re.MULTILINE):
        assert set(names.split(", ")) <= measured


@each_page
def test_tables_are_those_of_the_committed_reports(page: Path) -> None:
    assert filled(page) == page.read_text()


# Nothing is left out.


def sources() -> Iterator[str]:
    """Text of everything that may read or set a variable, or name a macro."""
    yield from (file.read_text() for name in ("Makefile", "CMakeLists.txt", "setup.py") for file in ROOT.glob(name))
    for folder in ("cmake", "fisher_kernels", "csrc", "triton_kernels", "tests", "bench", ".ci"):
        for file in (ROOT / folder).rglob("*"):
            if file.suffix in (".py", ".cmake", ".cpp", ".h", ".cu", "") and file.is_file():
                yield file.read_text()


def test_every_variable_is_in_the_settings_and_the_other_way_round() -> None:
    variable = re.compile(r"\bFISHER_KERNELS_[A-Z0-9_]*[A-Z0-9]")
    used = {name for text in sources() for name in variable.findall(text)}
    assert set(variable.findall(SETTINGS)) == used


def test_every_variable_and_target_of_make_is_in_the_settings() -> None:
    makefile = (ROOT / "Makefile").read_text()
    variables = re.findall(r"\b([A-Z_]+)=", makefile.partition("\n\n")[0])
    targets = re.findall(r"^\.PHONY: (.*)$", makefile, re.MULTILINE)[0].split()
    assert variables
    for name in {*variables, *targets} - {"FORCE"}:
        assert f"`{name}`" in SETTINGS, name


def test_every_option_of_the_tests_and_benchmarks_is_in_the_settings() -> None:
    for folder in ("tests", "bench"):
        for option in re.findall(r'addoption\(\s*"(--[\w-]+)"', (ROOT / folder / "conftest.py").read_text()):
            assert f"`{option}" in SETTINGS, option


def test_every_command_and_option_is_in_the_settings() -> None:
    group: Any = typer.main.get_command(app)
    for command in (group, *group.commands.values()):
        start = "| | `--version`" if command is group else f"| `{command.name}"
        (row,) = (line for line in SETTINGS.partition("## Command line")[2].split("\n") if line.startswith(start))
        for option in (name for parameter in command.params for name in parameter.opts if name.startswith("--")):
            assert f"`{option}`" in row, f"{command.name} {option}"


def test_every_op_has_a_page_and_every_page_an_op() -> None:
    pages = {page.stem: page.read_text() for page in (ROOT / "docs" / "kernels").glob("*.md")}
    functions = {name: f for name in ops.__all__ if inspect.isfunction(f := getattr(ops, name))}
    stems = {name: f.__module__.rpartition(".")[2] for name, f in functions.items()}
    assert set(stems.values()) == set(pages)
    for name, stem in stems.items():
        assert f"{name}(" in pages[stem], f"{name} is not on its page"
