"""What every reader returns: labelled images, either all in memory or read from their files when asked for."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import numpy as np
from numpy.typing import NDArray

from bdexport.errors import BdexportError, DatasetError, ImageError
from bdexport.hardware import usable_cores
from bdexport.limits import MAX_PIXELS
from bdexport.preprocess import Preprocess, decoded_image, read_image

if TYPE_CHECKING:
    from PIL import Image

SPLITS = ("train", "validation", "test")
DECODERS = 8  # threads that decode image files, at most; Pillow lets go of the interpreter while it decodes

Rows = slice | Sequence[int] | NDArray[np.intp]
Pixels = NDArray[np.uint8]
Failure = TypeVar("Failure", bound=BdexportError)
SEPARATOR, NAMED_ERRORS = " | ", 100  # between the errors of one message; how many of them it names


@dataclass(frozen=True, eq=False)
class Dataset:
    """One split of a data set. ``labels`` are int64 (N,) and index ``class_names``.

    ``source`` is uint8 RGB (N, h, w, 3), contiguous, or the N image files, which are decoded when they are asked for.
    ``skipped`` says, of damaged images that were left out because somebody asked for it, which and why. Of image files
    that have more than ``max_pixels`` pixels, each is an error.
    """

    name: str
    split: str
    class_names: tuple[str, ...]
    labels: NDArray[np.int64]
    source: Pixels | tuple[Path, ...]
    skipped: tuple[str, ...] = ()
    max_pixels: int = MAX_PIXELS

    def __len__(self) -> int:
        return len(self.labels)

    def images(self, rows: Rows = slice(None)) -> Pixels | list[Pixels]:
        """The given images as they are: uint8 (n, h, w, 3), or for files a list of (h, w, 3), each of its own size.

        Files are RGB as :mod:`bdexport.preprocess` defines it. Raises :class:`ImageError` naming a damaged file.
        """
        if isinstance(self.source, np.ndarray):
            return self.source[rows]
        return [np.asarray(read_image(path, max_pixels=self.max_pixels)) for path in _pick(self.source, rows)]

    def fitted(self, preprocess: Preprocess, rows: Rows = slice(None)) -> Pixels:
        """The given images at the network's size: uint8 (n, H, W, 3). An array of that size is not touched.

        Raises :class:`ImageError` naming a damaged file.
        """
        if isinstance(self.source, np.ndarray):
            chosen = self.source[rows]
            return preprocess.fit_array(chosen) if len(chosen) else np.empty((0, *preprocess.size, 3), np.uint8)
        return fit_files(_pick(self.source, rows), preprocess, self.max_pixels)

    def arrays(self, preprocess: Preprocess) -> Pixels:
        """All images at the network's size: uint8 (N, H, W, 3); normalise them with ``preprocess.normalise``."""
        return self.fitted(preprocess)

    def batches(self, preprocess: Preprocess, batch: int) -> Iterator[tuple[NDArray[np.float32], NDArray[np.int64]]]:
        """In order: preprocessed float32 (n, 3, H, W) and labels (n,), n = ``batch`` but for the last."""
        for start in range(0, len(self), batch):
            rows = slice(start, start + batch)
            yield preprocess.normalise(self.fitted(preprocess, rows)), self.labels[rows]

    @cached_property
    def digest(self) -> str:
        """SHA-256 over class names, labels and the images: their pixels, or for files their names and sizes."""
        digest = hashlib.sha256("\n".join(self.class_names).encode(errors="surrogateescape"))
        digest.update(np.ascontiguousarray(self.labels).data)
        if isinstance(self.source, np.ndarray):
            digest.update(np.ascontiguousarray(self.source).data)
        else:
            for path in self.source:
                size = path.stat().st_size if path.is_file() else -1
                digest.update(f"{path.name} {size}\n".encode(errors="surrogateescape"))
        return digest.hexdigest()

    def without_damaged(self) -> Dataset:
        """The images that can be decoded, which takes decoding all of them; ``skipped`` lists the others.

        Raises :class:`DatasetError` where none is left.
        """
        if isinstance(self.source, np.ndarray):
            return self
        errors = _decoded(self.source, lambda _row, _image: None, self.max_pixels)
        bad = [row for row, error in enumerate(errors) if error is not None]
        if not bad:
            return self
        if len(bad) == len(self):
            raise DatasetError(f"data set {self.name}: every image of the {self.split} split is damaged", got=errors[0])
        good = self.take(np.delete(np.arange(len(self)), bad))
        return replace(good, skipped=tuple(str(errors[row]) for row in bad))

    def first(self, count: int) -> Dataset:
        """The first ``count`` images, or all when there are fewer."""
        return self.take(slice(count))

    def take(self, rows: Rows) -> Dataset:
        """The given images as a data set of their own."""
        if isinstance(self.source, np.ndarray):
            return replace(self, labels=self.labels[rows], source=np.ascontiguousarray(self.source[rows]))
        return replace(self, labels=self.labels[rows], source=_pick(self.source, rows))


def fit_files(paths: Sequence[Path], preprocess: Preprocess, max_pixels: int = MAX_PIXELS) -> Pixels:
    """Image files decoded and fitted, several at a time: uint8 (n, H, W, 3). ImageError names all that are damaged."""
    fitted = np.empty((len(paths), *preprocess.size, 3), np.uint8)

    def fill(row: int, image: Image.Image) -> None:
        fitted[row] = preprocess.fit_image(image)

    errors = [error for error in _decoded(paths, fill, max_pixels) if error is not None]
    if errors:
        raise all_of(errors)
    return fitted


def _decoded(
    paths: Sequence[Path], use: Callable[[int, Image.Image], None], max_pixels: int
) -> list[ImageError | None]:
    """Give every image that can be decoded to ``use``, several at a time; the error of each other one, by its place."""

    def read(row: int) -> ImageError | None:
        try:
            with decoded_image(paths[row], max_pixels) as image:
                use(row, image)
        except ImageError as error:
            return error
        return None

    workers = min(DECODERS, usable_cores(), len(paths))
    if workers < 2:
        return [read(row) for row in range(len(paths))]
    with ThreadPoolExecutor(workers) as pool:
        try:
            return list(pool.map(read, range(len(paths))))
        except BaseException:  # Ctrl-C: what has not begun need not be decoded any more
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def all_of(errors: Sequence[Failure]) -> Failure:
    """One error that says what all of ``errors`` (one or more of a kind) say: who mends data wants the whole list."""
    if len(errors) == 1:
        return errors[0]
    named = [name for error in errors for name in str(error).split(SEPARATOR)]
    rest = f"{SEPARATOR}and {len(named) - NAMED_ERRORS} more" if len(named) > NAMED_ERRORS else ""
    return type(errors[0])(SEPARATOR.join(named[:NAMED_ERRORS]) + rest)


def check_classes(dataset: Dataset, num_classes: int, class_names: Sequence[str] = ()) -> None:
    """Raise :class:`DatasetError` unless labels mean to a model what they mean in ``dataset``.

    The number of classes must be equal, and so must names and order, unless the model does not name its classes (no
    names, or "0", "1", ..).
    """
    what = f"data set {dataset.name}: its classes are not the model's"
    if len(dataset.class_names) != num_classes:
        raise DatasetError(
            what,
            got=f"{len(dataset.class_names)} classes",
            expected=f"{num_classes}",
            remedy="choose the data set that the checkpoint was trained on",
        )
    if is_numbered(class_names):
        return
    for label, (theirs, ours) in enumerate(zip(dataset.class_names, class_names, strict=False)):
        if theirs != ours:
            raise DatasetError(
                what,
                got=f"label {label} is {theirs!r}",
                expected=repr(ours),
                remedy="use the class names and the order that the checkpoint was trained with",
            )


def with_classes_of(dataset: Dataset, class_names: Sequence[str]) -> Dataset:
    """``dataset`` with a model's labels where its classes are some of the model's, by name; otherwise as it is."""
    theirs = dataset.class_names
    if is_numbered(class_names) or not set(theirs) < set(class_names):
        return dataset
    label_of = np.array([list(class_names).index(name) for name in theirs], np.int64)
    return replace(dataset, class_names=tuple(class_names), labels=label_of[dataset.labels])


def is_numbered(class_names: Sequence[str]) -> bool:
    """Whether classes are called "0", "1", ..: names that say nothing."""
    return list(class_names) == [str(label) for label in range(len(class_names))]


def unnamed_classes(dataset: Dataset, class_names: Sequence[str]) -> list[str]:
    """What to say where a model calls its classes "0", "1", .. and the data set does not: nothing compares the two."""
    if not class_names or not is_numbered(class_names) or is_numbered(dataset.class_names):
        return []
    return [
        f"note: the model's classes have no names, {dataset.name}'s have: whether label 0 means "
        f"{dataset.class_names[0]!r} to it is not known"
    ]


def _pick(paths: tuple[Path, ...], rows: Rows) -> tuple[Path, ...]:
    if isinstance(rows, slice):
        return paths[rows]
    return tuple(paths[row] for row in np.arange(len(paths))[rows])
