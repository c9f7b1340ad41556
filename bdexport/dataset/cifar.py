"""CIFAR-10 and CIFAR-100 (Krizhevsky 2009) from the "python version" of the original distribution.

Each batch is a pickle of a dict: ``data`` is uint8 (N, 3072), a row holding 1024 red, 1024 green and 1024 blue
values, row by row of the 32x32 image; ``labels`` (CIFAR-100: ``fine_labels``) is a list of N integers.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bdexport.dataset.base import Dataset, all_of
from bdexport.dataset.pickles import AGAIN, read_pickle
from bdexport.dataset.splits import SplitSettings, split_rows
from bdexport.errors import DatasetError

PIXELS = 3 * 32 * 32


@dataclass(frozen=True)
class CifarLayout:
    """Where the files of one of the two data sets are and what they call things."""

    name: str
    folder: str
    archive: str
    train: tuple[str, ...]
    test: str
    meta: str
    labels_key: str
    names_key: str
    num_classes: int


CIFAR10 = CifarLayout(
    name="cifar10",
    folder="cifar-10-batches-py",
    archive="cifar-10-python.tar.gz",
    train=tuple(f"data_batch_{number}" for number in range(1, 6)),
    test="test_batch",
    meta="batches.meta",
    labels_key="labels",
    names_key="label_names",
    num_classes=10,
)
CIFAR100 = CifarLayout(
    name="cifar100",
    folder="cifar-100-python",
    archive="cifar-100-python.tar.gz",
    train=("train",),
    test="test",
    meta="meta",
    labels_key="fine_labels",
    names_key="fine_label_names",
    num_classes=100,
)


def load_cifar(layout: CifarLayout, data_dir: Path, split: str, settings: SplitSettings) -> Dataset:
    """One split; validation is held out of the training batches. Raises :class:`DatasetError` naming the file."""
    folder = _find_folder(layout, data_dir)
    names, batches = _read_all(layout, folder, (layout.test,) if split == "test" else layout.train)
    labels = np.concatenate([labels for _, labels in batches])
    pixels = [pixels for pixels, _ in batches]
    del batches  # so that _gather can free each batch as it goes
    if split == "test":
        rows = np.arange(len(labels))
    else:
        validation, train = split_rows(labels, (settings.validation_share,), settings.seed)
        rows = validation if split == "validation" else train
    if len(rows) == 0:
        raise DatasetError(
            f"{folder}: too few images", got=len(labels), expected="some left for each split", remedy=AGAIN
        )
    return Dataset(layout.name, split, names, labels[rows], _gather(pixels, rows))


def _read_all(
    layout: CifarLayout, folder: Path, files: tuple[str, ...]
) -> tuple[tuple[str, ...], list[tuple[NDArray[np.uint8], NDArray[np.int64]]]]:
    """Class names and batches. The error names every file that is missing or damaged, not only the first."""
    names: tuple[str, ...] = ()
    batches, errors = [], []
    try:
        names = _class_names(layout, folder)
    except DatasetError as error:
        errors.append(error)
    for file in files:
        try:
            batches.append(_read_batch(layout, folder / file))
        except DatasetError as error:
            errors.append(error)
    if errors:
        raise all_of(errors)
    return names, batches


def _find_folder(layout: CifarLayout, data_dir: Path) -> Path:
    for folder in (data_dir / layout.folder, data_dir):
        if folder.is_dir() and any((folder / file).exists() for file in (layout.meta, *layout.train, layout.test)):
            return folder
    what = f"{data_dir}: no {layout.name} here"
    if data_dir.name == layout.archive or (data_dir / layout.archive).is_file():
        raise DatasetError(what, got=layout.archive, remedy=f"unpack it: tar xzf {layout.archive}")
    expected = f"{layout.folder} or the files in it"
    if any(data_dir.glob("*.bin")) or any(data_dir.glob("cifar-*-b*/*.bin")):
        raise DatasetError(what, got="the binary version", expected=expected, remedy="get the python version")
    raise DatasetError(what, expected=expected, remedy="pass the folder, or its parent, as --data")


def _class_names(layout: CifarLayout, folder: Path) -> tuple[str, ...]:
    path = folder / layout.meta
    content = read_pickle(path)
    names = content.get(layout.names_key) if isinstance(content, dict) else None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise DatasetError(f"{path}: no list {layout.names_key!r} in it", remedy=AGAIN)
    if len(names) != layout.num_classes or len(set(names)) != len(names):
        raise DatasetError(
            f"{path}: class names", got=f"{len(set(names))} of them", expected=layout.num_classes, remedy=AGAIN
        )
    return tuple(names)


def _read_batch(layout: CifarLayout, path: Path) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """uint8 (N, 3072) and int64 (N,) of one file."""
    content = read_pickle(path)
    if not isinstance(content, dict) or not {"data", layout.labels_key} <= content.keys():
        keys = ", ".join(map(repr, content)) if isinstance(content, dict) else "no keys"
        expected = f"'data', {layout.labels_key!r}"
        raise DatasetError(
            f"{path}: not a batch of {layout.name}", got=keys[:200] or "{}", expected=expected, remedy=AGAIN
        )
    pixels = content["data"]
    if not isinstance(pixels, np.ndarray) or pixels.dtype != np.uint8 or pixels.shape[1:] != (PIXELS,):
        got = f"{pixels.dtype} {pixels.shape}" if isinstance(pixels, np.ndarray) else "no array"
        raise DatasetError(f"{path}: wrong images", got=got, expected=f"uint8 (N, {PIXELS})", remedy=AGAIN)
    return pixels, _labels(content[layout.labels_key], len(pixels), layout, path)


def _labels(values: Any, count: int, layout: CifarLayout, path: Path) -> NDArray[np.int64]:
    if isinstance(values, np.ndarray):
        values = values.tolist()
    if not isinstance(values, list) or not all(type(value) is int for value in values):
        got = "a list of other things" if isinstance(values, list) else "no list"
        raise DatasetError(f"{path}: wrong labels", got=got, expected="a list of integers", remedy=AGAIN)
    if len(values) != count or count == 0:
        got = f"{count} and {len(values)}"
        raise DatasetError(f"{path}: images and labels differ", got=got, expected="as many", remedy=AGAIN)
    wrong = next((value for value in values if not 0 <= value < layout.num_classes), None)
    if wrong is not None:
        expected = f"0..{layout.num_classes - 1}"
        raise DatasetError(f"{path}: label out of range", got=wrong, expected=expected, remedy=AGAIN)
    return np.array(values, dtype=np.int64)


def _gather(batches: list[NDArray[np.uint8]], rows: NDArray[np.intp]) -> NDArray[np.uint8]:
    """The given rows (ascending) of all batches: uint8 (n, 32, 32, 3), contiguous. Empties ``batches`` on the way."""
    images = np.empty((len(rows), 32, 32, 3), np.uint8)
    offset = done = 0
    while batches:
        batch = batches.pop(0)
        here = rows[(rows >= offset) & (rows < offset + len(batch))] - offset
        images[done : done + len(here)] = batch[here].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
        done += len(here)
        offset += len(batch)
    return images
