"""Fashion-MNIST: grey 28 x 28 images of clothes in ten classes, 60,000 to train with and 10,000 to test with.

Source: Xiao, Rasul and Vollgraf, arXiv 1708.07747. The files are those of MNIST, in the format IDX, as they are or
compressed by gzip. They are looked for in a folder that ``look_in`` names (``--data``), in one that the environment
variable FISHER_KERNELS_DATA names, in ``build/data``, where ``make data`` puts them, and where the Debian package
dataset-fashion-mnist has them. A folder may also be the root of torchvision's data sets.
"""

from __future__ import annotations

import gzip
import math
import os
import struct
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from fisher_kernels.tasks.task import Batch, MissingDataError, shuffled

CLASSES = 10
SIDE = 28

VARIABLE = "FISHER_KERNELS_DATA"
PLACES = (Path("build/data"), Path("/"))
BELOW = (Path(), Path("usr/share/datasets/fashion-mnist"), Path("FashionMNIST/raw"), Path("raw"))
"""Where the files may lie in a folder: there, as the Debian package has them, and as torchvision does."""

FILES = (
    ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
    ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
)

UNSIGNED_BYTE = 8
"""The number by which IDX calls that type."""

_folders: list[Path] = []


def look_in(folder: Path) -> None:
    """Let the files be looked for there alone.

    Raises:
        MissingDataError: they are not there.
    """
    if _files_below(folder) is None:
        names = ", ".join(name for pair in FILES for name in pair)
        raise MissingDataError(f"{folder} has no Fashion-MNIST: expected the files {names}, with .gz or without")
    _folders[:] = [folder]
    load.cache_clear()


@cache
def load() -> tuple[Batch, Batch]:
    """(images [N, 1, 28, 28] as unsigned bytes, labels [N]) for training and for testing.

    Raises:
        MissingDataError: the files are nowhere; the message says where they were looked for, and how to get them.
        ValueError: a file is not what its name says.
    """
    training, test = (_read(*paths) for paths in find())
    return training, test


def find() -> list[tuple[Path, Path]]:
    """The files of images and of labels, for training and for testing."""
    named = [Path(os.environ[VARIABLE])] if os.environ.get(VARIABLE) else []
    folders = [*(_folders or named or PLACES)]
    for folder in folders:
        if (found := _files_below(folder)) is not None:
            return found
    places = ", ".join(str(folder) for folder in folders)
    raise MissingDataError(
        f"Fashion-MNIST is not in {places}: `make data` in a checkout brings it to build/data, the Debian package "
        f"dataset-fashion-mnist installs it; --data or {VARIABLE} names another folder, torchvision's for one"
    )


def _files_below(folder: Path) -> list[tuple[Path, Path]] | None:
    for place in (folder / below for below in BELOW):
        found = [[_with_suffix(place / name) for name in names] for names in FILES]
        if all(path is not None for pair in found for path in pair):
            return [(images, labels) for images, labels in found if images is not None and labels is not None]
    return None


def _with_suffix(path: Path) -> Path | None:
    """The file, or the compressed one."""
    for candidate in (path, path.with_name(f"{path.name}.gz")):
        if candidate.is_file():
            return candidate
    return None


def _read(images_file: Path, labels_file: Path) -> Batch:
    images, labels = read_idx(images_file), read_idx(labels_file)
    if images.dim() != 3 or images.shape[1:] != (SIDE, SIDE):
        raise ValueError(f"{images_file} has shape {tuple(images.shape)}, expected (N, {SIDE}, {SIDE})")
    if labels.shape != images.shape[:1]:
        raise ValueError(
            f"{labels_file} has shape {tuple(labels.shape)}, expected ({len(images)},), one for each image"
        )
    if labels.numel() and int(labels.max()) >= CLASSES:
        raise ValueError(f"{labels_file} has the label {int(labels.max())}, expected 0 to {CLASSES - 1}")
    return images.unsqueeze(1), labels.long()


def read_idx(path: Path) -> Tensor:
    """The array of unsigned bytes in an IDX file.

    Raises:
        ValueError: it is none, or is cut short.
    """
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            content = file.read()
    except (gzip.BadGzipFile, EOFError) as error:
        raise ValueError(f"{path} cannot be decompressed: {error}") from error
    if len(content) < 4 or content[:2] != b"\0\0" or content[2] != UNSIGNED_BYTE:
        raise ValueError(f"{path} begins with {content[:4].hex(' ')}, expected 00 00 08: an IDX file of unsigned bytes")
    dims, header = content[3], 4 + 4 * content[3]
    sizes = struct.unpack(f">{dims}I", content[4:header]) if len(content) >= header else (math.inf,)
    if len(content) != header + math.prod(sizes):
        raise ValueError(f"{path} has {len(content)} bytes, expected {header + math.prod(sizes)} for sizes {sizes}")
    return torch.frombuffer(bytearray(content[header:]), dtype=torch.uint8).reshape([int(size) for size in sizes])


def in_float(images: Tensor) -> Tensor:
    """Intensities in [0, 1]."""
    return images.float().div_(255)


def batches(seed: int, epoch: int, batch_size: int) -> Iterator[Batch]:
    """The training images and their labels, once each."""
    images, labels = load()[0]
    for indices in torch.split(shuffled(len(labels), seed, epoch), batch_size):
        yield in_float(images[indices]), labels[indices]


def steps_per_epoch(batch_size: int) -> int:
    """How many ``batches`` there are."""
    return math.ceil(len(load()[0][1]) / batch_size)


def accuracy(predict: torch.nn.Module) -> float:
    """Share of the test images that a model recognises, in per cent."""
    images, labels = load()[1]
    parts = zip(images.split(500), labels.split(500), strict=True)
    right = sum(int((predict(in_float(x)).argmax(1) == y).sum()) for x, y in parts)
    return 100 * right / len(labels)
