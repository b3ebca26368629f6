"""Examines the zoo: ``python -m tests.zoo``, with the names of architectures or of all that there are.

Prints one line of JSON for each check. A process of its own, because Transformers takes long to import.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys

os.environ["HF_HUB_OFFLINE"] = "1"

import torch

from tests.zoo import MODELS, checks


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help="architectures; all by default")
    parser.add_argument("--optimizers", default=",".join(checks.OPTIMIZERS), help="names with commas between them")
    parser.add_argument("--one", action="store_true", help="one optimizer for each architecture, in turn")
    parser.add_argument("--verbose", action="store_true", help="what failed as text, in place of JSON")
    given = parser.parse_args()
    torch.set_num_threads(1)
    names = given.names or list(MODELS)
    optimizers = given.optimizers.split(",")
    failed = False
    for name in names:
        turn = list(MODELS).index(name)
        chosen = [optimizers[turn % len(optimizers)]] if given.one else optimizers
        for optimizer in chosen:
            for result in checks.examine(name, MODELS[name], optimizer, {}):
                failed = failed or result.fault is not None
                if given.verbose:
                    print(f"{name:20} {optimizer:10} {result.check:10} {result.seconds:5.2f}s {result.fault or 'ok'}", flush=True)
                else:
                    print(json.dumps(dataclasses.asdict(result)), flush=True)
    sys.exit(failed)


if __name__ == "__main__":
    main()
