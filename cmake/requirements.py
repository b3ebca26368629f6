"""Prints what pyproject.toml asks for, in lines that pip reads: an extra, or what builds the package.

    python cmake/requirements.py build
    python cmake/requirements.py test

pip installs an extra only together with the package, which is compiled at the same time.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path

if sys.version_info >= (3, 11):
    import tomllib
else:
    from pip._vendor import tomli as tomllib

PYPROJECT = tomllib.loads((Path(__file__).resolve().parents[1] / "pyproject.toml").read_text())


def requirements(extra: str) -> Iterator[str]:
    """The requirements of an extra, with those of the extras that it names."""
    project = PYPROJECT["project"]
    for requirement in project["optional-dependencies"][extra]:
        if inner := re.fullmatch(re.escape(project["name"]) + r"\[(.*)\]", requirement):
            for name in inner[1].split(","):
                yield from requirements(name.strip())
        else:
            yield requirement


wanted = sys.argv[1]
if wanted == "build":
    print(*PYPROJECT["build-system"]["requires"], sep="\n")
else:  # with what the package itself needs, which a torch that is too old does not meet
    print(*PYPROJECT["project"]["dependencies"], *requirements(wanted), sep="\n")
