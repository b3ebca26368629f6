"""Every public name is in the API reference, with a docstring: what is missing is a warning, so the build fails."""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sphinx.util import logging

MODULES = ("fisher_kernels", "fisher_kernels.ops", "fisher_kernels.optim", "fisher_kernels.statistics")
ENTRY = re.compile(r"^\.\. (?:autoclass|autofunction|automodule|data):: (\S+)$(?:\n   :members: (.*)$)?", re.MULTILINE)
_LOGGER = logging.getLogger(__name__)


def documented(folder: Path) -> set[str]:
    """The names that the pages of the API reference have an entry for."""
    found = set()
    for page in folder.glob("*.rst"):
        for entry, members in ENTRY.findall(page.read_text()):
            found |= {entry, *(f"{entry}.{member}" for member in members.split(", "))}
    return found


def missing(folder: Path) -> Iterator[str]:
    """What is wrong with the reference, a line for each public name that it does not explain."""
    entries = documented(folder)
    for module in MODULES:
        for name in importlib.import_module(module).__all__:
            thing = getattr(importlib.import_module(module), name)
            # What several modules export is documented once.
            places = {*MODULES, getattr(thing, "__module__", module)}
            if not {f"{place}.{name}" for place in places} & entries:
                yield f"{module}.{name} has no entry in {folder.name}/"
            elif callable(thing) and not inspect.getdoc(thing):
                yield f"{module}.{name} has no docstring"


def _check(app: Any) -> None:
    for line in missing(Path(app.srcdir) / "api"):
        _LOGGER.warning(line)


def setup(app: Any) -> dict[str, bool]:
    """Look once, before the pages are read."""
    app.connect("builder-inited", _check)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
