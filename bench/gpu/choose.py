"""What ``auto`` takes on a GPU: ``python -m bench.gpu.choose RESULTS.json`` brings a measurement into the package.

For each op the faster of CUDA and Triton, by classes of sizes where it depends on them.
"""

from __future__ import annotations

import argparse
import json
import math
from collections import defaultdict
from pathlib import Path
from typing import Any

TABLE = Path(__file__).parents[2] / "fisher_kernels" / "auto.json"
BACKENDS = ("cuda", "triton")


def _advantage(rows: list[dict[str, Any]]) -> dict[str, dict[int, float]]:
    """Op -> size -> mean logarithm of Triton's time over CUDA's, over the cases that both have."""
    times: dict[tuple[str, str, str, int], dict[str, float]] = defaultdict(dict)
    for row in rows:
        if row["backend"] in BACKENDS and row["times"] is not None and row["size"] is not None:
            key = row["op"], row["shape"], row["dtype"], row["size"]
            times[key][row["backend"]] = row["times"]["median"]
    found: dict[str, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    for (op, _, _, size), both in times.items():
        if len(both) == len(BACKENDS):
            found[op][size].append(math.log(both["triton"] / both["cuda"]))
    return {op: {size: sum(x) / len(x) for size, x in sizes.items()} for op, sizes in found.items()}


def classes(advantage: dict[int, float]) -> list[tuple[int | None, str]]:
    """The largest size and the faster backend of each class; borders are half way between sizes, by ratio."""
    found: list[tuple[int | None, str]] = []
    before = None
    for size in sorted(advantage):
        fast = "cuda" if advantage[size] >= 0 else "triton"
        if found and found[-1][1] == fast:
            found.pop()
        elif found:
            found[-1] = (math.isqrt(before * size) if before else size - 1, found[-1][1])
        found.append((None, fast))
        before = size
    return found


def table(facts: dict[str, Any]) -> dict[str, Any]:
    """The table of a measurement.

    Raises:
        ValueError: no case was measured on both backends.
    """
    ops = {op: classes(sizes) for op, sizes in sorted(_advantage(facts["rows"]).items())}
    if not ops:
        raise ValueError(f"no case of the measurement on {facts['device']} has times of both cuda and triton")
    return {"device": facts["device"], "date": facts["date"], "note": "CUDA first for other ops.", "ops": ops}


def main(arguments: list[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu.choose", description=__doc__)
    parser.add_argument("results", type=Path, help="what python -m bench.gpu.measure wrote")
    parser.add_argument("--out", type=Path, default=TABLE, help="the table (default: %(default)s)")
    options = parser.parse_args(arguments)
    try:
        made = table(json.loads(options.results.read_text()))
    except ValueError as error:
        parser.error(str(error))
    options.out.write_text(json.dumps(made, indent=1) + "\n")
    print(f"written: {options.out}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
