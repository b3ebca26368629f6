"""Where the results of a run go: names that are not taken, whole files or none, and what it takes to go on."""

from __future__ import annotations

import io
import os
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from fisher_kernels.tasks import find_task
from fisher_kernels.tasks.comparison import Comparison
from fisher_kernels.tasks.optimizers import Recipe, recipe
from fisher_kernels.tasks.training import Settings

CHECKPOINT = ".resume.pt"
SUFFIXES = (".json", ".md", ".png", CHECKPOINT)


@dataclass(frozen=True)
class Destination:
    """A folder and the stem of the names of the files in it."""

    folder: Path
    stem: str

    def file(self, suffix: str) -> Path:
        """The file with that suffix."""
        return self.folder / f"{self.stem}{suffix}"

    def free(self) -> Destination:
        """This one, or with a number behind the stem if any of its files is there already."""
        number, found = 1, self
        while any(found.file(suffix).exists() for suffix in SUFFIXES):
            number += 1
            found = Destination(self.folder, f"{self.stem}-{number}")
        return found


def try_folder(folder: Path) -> None:
    """Makes the folder and a file in it, which goes away again.

    Raises:
        OSError: no file can be written there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder) as file:
        file.write(b"0")


def write(path: Path, content: bytes) -> None:
    """Writes a whole file or none: what was there stays until the new one is complete.

    Raises:
        OSError: it cannot be written.
    """
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        unfinished.write_bytes(content)
        unfinished.replace(path)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise


def checkpoint(command: str, comparison: Comparison) -> bytes:
    """What ``restored`` takes up again."""
    file = io.BytesIO()
    content = {
        "command": command,
        "task": comparison.task.name,
        "settings": asdict(comparison.settings),
        "seeds": [*comparison.seeds],
        "recipes": [_plain(recipe) for recipe in comparison.recipes],
        "threads": torch.get_num_threads(),
        "state": comparison.state_dict(),
    }
    torch.save(content, file)
    return file.getvalue()


@dataclass(frozen=True)
class Restored:
    """A comparison that was stopped, and where its files are."""

    comparison: Comparison
    threads: int
    destination: Destination


def restore(command: str, place: Path) -> Restored:
    """The comparison that ``command`` left unfinished in a folder, or in a checkpoint itself.

    Raises:
        ValueError: there is none, or more than one, or it cannot be read; the message says which.
    """
    path = _find(command, place) if place.is_dir() else place
    if not path.exists():
        raise ValueError(f"{path} does not exist")
    content = _read(path)
    if content["command"] != command:
        raise ValueError(f"{path} is of `fisher-kernels {content['command']}`, which takes it up again")
    task = find_task(content["task"])
    recipes = [
        replace(recipe(task, saved["name"], saved["hyperparameters"]), overrides=saved["overrides"])
        for saved in content["recipes"]
    ]
    comparison = Comparison(task, recipes, content["seeds"], Settings(**content["settings"]))
    comparison.load_state_dict(content["state"])
    destination = Destination(path.parent, path.name.removesuffix(CHECKPOINT))
    return Restored(comparison, content["threads"], destination)


def _plain(recipe: Recipe) -> dict[str, Any]:
    """All that it takes, so that another table of the task's hyperparameters changes nothing."""
    hyperparameters = {name: value for name, value in recipe.hyperparameters.items() if name != "variant"}
    return {"name": recipe.name, "hyperparameters": hyperparameters, "overrides": {**recipe.overrides}}


def _find(command: str, folder: Path) -> Path:
    found = [path for path in sorted(folder.glob(f"*{CHECKPOINT}")) if _read(path)["command"] == command]
    if not found:
        raise ValueError(f"there is nothing in {folder} that `fisher-kernels {command}` left unfinished")
    if len(found) > 1:
        raise ValueError(f"{folder} has several unfinished runs, name one: {_listed(found)}")
    return found[0]


def _listed(paths: Sequence[Path]) -> str:
    return ", ".join(map(str, paths))


def _read(path: Path) -> dict[str, Any]:
    try:
        content = torch.load(path, weights_only=True)
    except Exception as error:  # of many kinds, as the file may hold anything
        raise ValueError(
            f"{path} cannot be read: {next(iter(str(error).splitlines()), type(error).__name__)}"
        ) from error
    if not isinstance(content, dict) or not {"command", "task", "state"} <= content.keys():
        raise ValueError(f"{path} is not a checkpoint of this command line")
    return content
