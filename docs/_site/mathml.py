"""Formulas as MathML, which browsers draw by themselves: no script, no font and no network is needed for them."""

from __future__ import annotations

from typing import Any

from docutils import nodes
from docutils.utils.math import MathError
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx.util import logging

_LOGGER = logging.getLogger(__name__)


def converted(formula: str, *, block: bool) -> str:
    """The MathML of a formula in LaTeX; one of several lines is aligned at its ``&``."""
    if r"\\" in formula and not formula.lstrip().startswith(r"\begin"):
        formula = rf"\begin{{aligned}}{formula}\end{{aligned}}"
    try:
        mathml: str = tex2mathml(formula, as_block=block)
    except AttributeError as error:  # what braces that do not match come to
        raise MathError(f"{error}; are its braces balanced?") from error
    return mathml


def _mathml(node: nodes.Element, *, block: bool) -> str:
    try:
        return converted(node.astext(), block=block)
    except MathError as error:
        _LOGGER.warning("a formula cannot be converted: %s: %s", error, node.astext(), location=node)
        return ""


def _visit_inline(translator: Any, node: nodes.Element) -> None:
    translator.body.append(_mathml(node, block=False))
    raise nodes.SkipNode


def _visit_block(translator: Any, node: nodes.Element) -> None:
    translator.body.append(f'<div class="formula">{_mathml(node, block=True)}</div>\n')
    raise nodes.SkipNode


def setup(app: Any) -> dict[str, bool]:
    """Register the renderer."""
    app.add_html_math_renderer("mathml", (_visit_inline, None), (_visit_block, None))
    return {"parallel_read_safe": True, "parallel_write_safe": True}
