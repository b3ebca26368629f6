"""``python -m fisher_kernels``: the command line."""

from __future__ import annotations

from fisher_kernels.cli import main

main()
