"""The site: what keeps ``make docs`` from passing over a broken link, a formula or a public name."""

from __future__ import annotations

import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import fisher_kernels
from docs._site.links import broken
from fisher_kernels import ops

ROOT = Path(__file__).resolve().parents[1]
API = ROOT / "docs" / "api"

pytest.importorskip("sphinx", reason="the extra docs is not installed")

from docs._site import public_names  # noqa: E402
from docs._site.mathml import converted  # noqa: E402


def public() -> dict[str, object]:
    """The ops and optimizers, by name."""
    names = [*ops.__all__, *fisher_kernels.optim.__all__]
    things = {name: getattr(ops, name, None) or getattr(fisher_kernels, name) for name in names}
    return {name: thing for name, thing in things.items() if callable(thing)}


def formulas(thing: object) -> list[str]:
    """The text of the directives ``math`` in a docstring."""
    found, lines = [], (inspect.getdoc(thing) or "").split("\n")
    for number, line in enumerate(lines):
        if line.startswith(".. math::"):
            block = [line.removeprefix(".. math::")]
            for following in lines[number + 1 :]:
                if following.strip() and not following.startswith("    "):
                    break
                block.append(following)
            found.append("\n".join(block).strip())
    return found


def test_every_public_name_is_in_the_reference() -> None:
    assert list(public_names.missing(API)) == []


def test_a_public_name_that_is_not_in_the_reference_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "__all__", [*ops.__all__, "define"])
    monkeypatch.setattr(ops, "define", lambda: None, raising=False)
    assert list(public_names.missing(API)) == ["fisher_kernels.ops.define has no entry in api/"]


def test_a_public_name_without_docstring_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops.minmax, "__doc__", None)
    assert list(public_names.missing(API)) == ["fisher_kernels.ops.minmax has no docstring"]


@pytest.mark.parametrize("name", sorted({*public()} - {"Costs", "Rounding"}))
def test_every_op_and_optimizer_has_a_formula_that_is_drawn(name: str) -> None:
    found = formulas(public()[name])
    if name == "AdaFisherW":  # says how it differs from AdaFisher
        assert "AdaFisher" in (inspect.getdoc(public()[name]) or "")
    else:
        assert found
    for formula in found:
        assert converted(formula, block=True).startswith("<math")


def test_broken_links_and_anchors_are_found(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "b.html").write_text('<h1 id="there">B</h1><a href="../a.html">back</a>')
    good = '<a href="sub/b.html#there">1</a><a href="#here">2</a><p id="here"><a href="https://example.org/no">3</a>'
    (tmp_path / "a.html").write_text(good)
    assert list(broken(tmp_path)) == []
    (tmp_path / "a.html").write_text(good + '<a href="sub/c.html">4</a><a href="sub/b.html#gone"><img src="p.png">')
    assert list(broken(tmp_path)) == [
        "a.html: sub/c.html is not there",
        "a.html: sub/b.html#gone names an anchor that is not there",
        "a.html: p.png is not there",
    ]


@pytest.mark.slow
def test_a_page_with_a_broken_link_fails_the_build(tmp_path: Path) -> None:
    """A site of one page, built as ``make docs`` does it; it has no API reference either."""
    (tmp_path / "_static").mkdir()
    (tmp_path / "_static" / "site.css").write_text("")
    (tmp_path / "index.md").write_text("# A page\n\n[gone](gone.md), [nowhere](#nowhere), $\\nonsense{x}$\n")
    command = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-c", str(ROOT / "docs")]
    result = subprocess.run(
        [*command, str(tmp_path), str(tmp_path / "site")], capture_output=True, text=True, check=False
    )
    assert result.returncode == 1, result.stderr
    for warning in ("gone.md", "'nowhere'", "a formula cannot be converted", "fisher_kernels.MBF has no entry in api/"):
        assert warning in result.stderr
