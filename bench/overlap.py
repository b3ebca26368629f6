"""Seconds a step with and without ``overlap=True``, on the autoencoder at batch 32, by optimizer and intervals.

``python -m bench.overlap --threads 1``. Both take turns, so that what else the machine does meets both alike; a round
is two inversions long and ends when work beside training has ended, so that none of it goes uncounted.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import torch

from fisher_kernels.optim import EKFAC, KFAC, MBF
from fisher_kernels.tasks import autoencoder, pixels

INTERVALS = ((1, 10), (10, 20))
KINDS: tuple[Any, ...] = (MBF, KFAC, EKFAC)


class Run:
    """A model that is trained with constant intervals, and seconds a step of each round."""

    def __init__(self, kind: Any, overlap: bool, update: int, inverse: int) -> None:
        self.model = pixels.make_model(autoencoder.WIDTHS, 0)
        settings = autoencoder.HYPERPARAMETERS[kind.__name__.lower()]
        intervals = {"update_interval": update, "inverse_interval": inverse, "refresh": "constant"}
        self.optimizer = kind(self.model, overlap=overlap, **intervals, **settings)
        self.seconds: list[float] = []

    def round(self, batches: list[Any]) -> None:
        begin = time.perf_counter()
        for x, y in batches:
            self.optimizer.zero_grad()
            pixels.cross_entropy(self.model(x), y).backward()
            self.optimizer.step()
        self.optimizer.state_dict()  # waits for work
        self.seconds.append((time.perf_counter() - begin) / len(batches))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    data = list(autoencoder.TASK.batches(0, 0, 32))
    print(f"{given.threads} threads; ms a step, medians of {given.rounds} rounds")
    for kind in KINDS:
        for update, inverse in INTERVALS:
            runs = [Run(kind, overlap, update, inverse) for overlap in (False, True)]
            for _ in range(given.rounds + 1):
                for run in runs:
                    run.round((data * 2)[: 2 * inverse])
            # The first round has the first inversion, which is waited for, and allocates memory.
            without, beside = (1e3 * statistics.median(run.seconds[1:]) for run in runs)
            print(
                f"{kind.__name__:<6} every {update}, {inverse}: without {without:.2f}, with {beside:.2f}, "
                f"ratio {without / beside:.2f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
