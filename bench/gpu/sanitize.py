"""The self-test of the CUDA kernels under each tool of compute-sanitizer: what ``make gpu-sanitize`` runs.

Memory errors, races in shared memory, reads of what was never written, barriers that threads miss.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from pathlib import Path

TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
FAULT = 99
"""Exit status for what a tool has found, to tell it from a self-test that fails."""


def find() -> str | None:
    """compute-sanitizer, from PATH or from the toolkit."""
    homes = [Path(os.environ[name]) for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    folders = [*(home / "bin" for home in homes), Path("/usr/local/cuda/bin")]
    path = os.pathsep.join([os.environ.get("PATH", os.defpath), *map(str, folders)])
    return shutil.which("compute-sanitizer", path=path)


def command(sanitizer: str, tool: str) -> list[str]:
    """What runs one tool."""
    options = ["--tool", tool, "--error-exitcode", str(FAULT), "--print-limit", "20"]
    return [sanitizer, *options, sys.executable, "-m", "bench.gpu.selftest", "--backend", "cuda"]


def main(arguments: list[str] | None = None) -> int:
    """The command: 1 if a tool found anything or a case failed, 2 if nothing can be done here."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu.sanitize", description=__doc__)
    parser.add_argument("--tool", choices=TOOLS, action="append", help="one of them (default: all)")
    options = parser.parse_args(arguments)
    sanitizer = find()
    if sanitizer is None:
        print("compute-sanitizer is not in PATH, CUDA_HOME/bin or /usr/local/cuda/bin", file=sys.stderr)
        return 2
    # Every tensor in an allocation of its own, so that an access just past its end is seen.
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    outcomes = {}
    for tool in options.tool or TOOLS:
        print(f"\n== {tool}", flush=True)
        status = subprocess.run(command(sanitizer, tool), env=environment, check=False).returncode
        outcomes[tool] = "clean" if status == 0 else "faults found" if status == FAULT else f"failed ({status})"
    print()
    for tool, outcome in outcomes.items():
        print(f"{tool}: {outcome}")
    return int(any(outcome != "clean" for outcome in outcomes.values()))


if __name__ == "__main__":
    sys.exit(main())
