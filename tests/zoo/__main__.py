"""Examines the zoo: ``python -m tests.zoo``, with the names of architectures or of all that there are.

Prints one line of JSON for each check. With ``--page`` it writes docs/models.md instead, and fails where rules serve
less of a model than they should. A process of its own, because Transformers takes long to import.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import torch

from tests.zoo import MODELS, checks, document


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.zoo", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help="architectures; all by default")
    parser.add_argument("--optimizers", default=",".join(checks.OPTIMIZERS), help="names with commas between them")
    parser.add_argument("--one", action="store_true", help="one optimizer for each architecture, in turn")
    parser.add_argument("--text", action="store_true", help="lines of text in place of JSON")
    parser.add_argument("--page", type=Path, metavar="FILE", help="where to write the page of models")
    return parser.parse_args()


def examine(names: list[str], optimizers: list[str], one: bool, as_text: bool) -> bool:
    """Whether all checks pass."""
    passed = True
    for name in names:
        turn = list(MODELS).index(name)
        for optimizer in [optimizers[turn % len(optimizers)]] if one else optimizers:
            for result in checks.examine(name, MODELS[name], optimizer):
                passed = passed and result.fault is None
                if as_text:
                    where = f"{name:18} {optimizer:10} {result.check:10}"
                    print(f"{where} {result.seconds:5.2f} s  {result.fault or 'ok'}", flush=True)
                else:
                    print(json.dumps(dataclasses.asdict(result)), flush=True)
    return passed


def write_page(names: list[str], path: Path) -> bool:
    """Whether every architecture is served as far as it should be."""
    counted, good = [], True
    for name in names:
        entry = document.count(MODELS[name])
        counted.append(entry)
        for fault in document.faults(entry):
            good = False
            print(f"{name}: {fault}")
    path.write_text(document.page(counted))
    return good


def main() -> None:
    given = _arguments()
    torch.set_num_threads(1)
    names = given.names or list(MODELS)
    if given.page:
        passed = write_page(names, given.page)
    else:
        passed = examine(names, given.optimizers.split(","), given.one, given.text)
    sys.exit(not passed)


if __name__ == "__main__":
    main()
