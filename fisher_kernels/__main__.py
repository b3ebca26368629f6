"""``fisher-kernels``, or ``python -m fisher_kernels``: the command line, where its packages are installed."""

from __future__ import annotations

import sys

NEEDED = ("rich", "typer")


def main() -> None:
    """Run the command line; the library itself needs torch alone, so what else this takes may be missing."""
    try:
        from fisher_kernels.cli import app
    except ModuleNotFoundError as error:
        if error.name not in NEEDED:
            raise
        sys.exit(f"the command line needs {error.name}: pip install 'fisher_kernels[cli]'")
    app()


if __name__ == "__main__":
    main()
