"""How the command line speaks: what it prints, errors of one line, interruption, progress."""

from __future__ import annotations

import errno
import io
import json
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any, NoReturn

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, ProgressColumn, TextColumn, TimeElapsedColumn
from typer.core import TyperGroup

INTERRUPTED = 130
"""Exit status of a command that Ctrl-C has ended."""

_WIDE = 100  # columns from which on progress has a bar and the time


# What standard output says that takes no more.
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EBADF)


class OutputError(Exception):
    """Standard output does not take what is printed."""


class Program(TyperGroup):
    """The commands; whatever is wrong with their use or with standard output is told in one line."""

    def main(self, *args: Any, **options: Any) -> Any:
        """Run what the arguments say and exit; without ``standalone_mode`` as any group does."""
        if not options.get("standalone_mode", True):
            return super().main(*args, **options)
        try:
            status = super().main(*args, **{**options, "standalone_mode": False})
            sys.stdout.flush()
        except (typer.Abort, KeyboardInterrupt):
            note("interrupted")
            sys.exit(INTERRUPTED)
        except BrokenPipeError:  # whoever reads has seen enough
            _drop_output()
            sys.exit(1)
        except (OutputError, OSError) as error:
            if isinstance(error, OSError) and (error.filename is not None or error.errno not in _FULL):
                raise
            _drop_output()
            line(str(error) if isinstance(error, OutputError) else _of_output(error))
            sys.exit(1)
        except Exception as error:
            if not hasattr(error, "format_message"):  # no error of usage
                raise
            if text := error.format_message():
                if hasattr(error, "show") and type(error).__name__ == "NoArgsIsHelpError":
                    error.show()
                else:
                    line(" ".join(text.split()))
            sys.exit(getattr(error, "exit_code", 2))
        sys.exit(status if isinstance(status, int) else 0)


def _of_output(error: OSError) -> str:
    return f"standard output: {error.strerror or error}"


def _drop_output() -> None:
    """Send what is still to be printed nowhere, so that the interpreter does not try again as it ends."""
    with suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@contextmanager
def _standard_output() -> Iterator[None]:
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        _drop_output()
        raise
    except OSError as error:
        _drop_output()
        raise OutputError(_of_output(error)) from error


def show(*objects: Any, width: int | None = None, **options: Any) -> None:
    """Print on standard output.

    Raises:
        OutputError: it takes no more.
    """
    with _standard_output():
        Console(width=width).print(*objects, **options)


def show_json(data: dict[str, Any]) -> None:
    """Print JSON on standard output, as ``show`` does."""
    with _standard_output():
        print(json.dumps(data, indent=2, allow_nan=False))


def line(message: str) -> None:
    """Say on standard error, in one line, what is wrong."""
    _say(f"[red]error:[/red] {escape(message)}")


def note(message: str) -> None:
    """Say something on standard error, in one line."""
    _say(escape(message))


def _say(text: str) -> None:
    with suppress(OSError):
        Console(stderr=True).print(text, soft_wrap=True, highlight=False)


def fail(message: str) -> NoReturn:
    """End with the exit status of failure."""
    line(message)
    raise typer.Exit(1)


def refuse(option: str, message: str) -> NoReturn:
    """End with the exit status of wrong usage, which is that of an option."""
    line(f"{option}: {message}")
    raise typer.Exit(2)


@contextmanager
def refusing(option: str) -> Iterator[None]:
    """A ValueError within is wrong usage of an option."""
    try:
        yield
    except ValueError as error:
        refuse(option, str(error))


@contextmanager
def interruptible() -> Iterator[Callable[[], bool]]:
    """Within the block Ctrl-C only changes what the yielded function returns; the second one works as ever."""
    asked = False

    def ask(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        asked = True
        signal.signal(signal.SIGINT, signal.default_int_handler)

    before = signal.getsignal(signal.SIGINT)
    if before == signal.SIG_IGN:  # in the background, for example
        yield lambda: False
        return
    signal.signal(signal.SIGINT, ask)
    try:
        yield lambda: asked
    finally:
        signal.signal(signal.SIGINT, before)


class _Lossy(io.StringIO):
    """Standard error for what nobody will miss: where it takes no more, training goes on."""

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return sys.stderr.encoding or "utf-8"

    def write(self, text: str) -> int:
        with suppress(OSError):
            return sys.stderr.write(text)
        return len(text)

    def flush(self) -> None:
        with suppress(OSError):
            sys.stderr.flush()

    def isatty(self) -> bool:
        return sys.stderr.isatty()

    def fileno(self) -> int:
        return sys.stderr.fileno()


def progress(columns: Sequence[ProgressColumn]) -> Progress:
    """A display on standard error."""
    return Progress(*columns, console=Console(file=_Lossy(), stderr=True))


def training_progress(width: int | None = None) -> Progress:
    """A line for each optimizer, with fields ``count`` and ``status``; in few columns there is no room for a bar."""
    console = Console(file=_Lossy(), stderr=True, width=width)
    name, status = TextColumn("{task.description}"), TextColumn("{task.fields[status]}")
    if console.width >= _WIDE:
        return Progress(
            name, BarColumn(), TextColumn("{task.fields[count]}"), TimeElapsedColumn(), status, console=console
        )
    return Progress(name, TextColumn("{task.percentage:3.0f}%"), status, console=console)
