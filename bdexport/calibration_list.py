"""A calibration list: which images of a data set scales (INT8, FP8) are gathered from. Small, and made to be committed.

    {"schema": .., "dataset": "cifar10", "split": "train", "shape": [32, 32, 3], "rows": [..],
     "files": null, "sha256": ..}

``rows`` count within the split as :mod:`bdexport.dataset` draws it; an image folder's images are named instead
(``files``, relative to the data folder). ``sha256`` covers the pixels, or the files' bytes: a list that meets other
images is refused.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bdexport.config import CalibrationConfig, DatasetConfig
from bdexport.dataset import Dataset, check_classes, load_dataset
from bdexport.dataset.samples import NAME as SAMPLES
from bdexport.dataset.splits import split_rows
from bdexport.errors import CalibrationError, ImageError, UsageError
from bdexport.files import read_bytes, sha256_file, usable_path, utf8_name, write_text
from bdexport.files import shown as shown_path
from bdexport.json_text import MalformedError, json_kind, parse_json, shown
from bdexport.limits import MAX_LIST_BYTES, MAX_LIST_ENTRIES
from bdexport.preprocess import Preprocess

SCHEMA = "bdexport.calibration-list/1"
AGAIN = "make it again with `bdexport calibrate CKPT --dataset D --data DIR`"


@dataclass(frozen=True)
class CalibrationList:
    """``shape`` (h, w, 3) of the data set's images, None for files, whose names are ``files`` then."""

    dataset: str
    split: str
    shape: tuple[int, ...] | None
    rows: tuple[int, ...]
    files: tuple[str, ...] | None
    sha256: str

    def __len__(self) -> int:
        return len(self.rows)


def default_split(dataset: str, wanted: str) -> str:
    """``wanted``, but for the samples, which have test images only."""
    return "test" if dataset == SAMPLES else wanted


def make_list(dataset: str, data: Path | None, config: CalibrationConfig) -> CalibrationList:
    """A stratified draw of ``config.images`` of a split (all where there are fewer), the same every time."""
    if not 1 <= config.images <= MAX_LIST_ENTRIES:
        expected = f"1 to {MAX_LIST_ENTRIES}"
        raise UsageError("number of calibration images", got=config.images, expected=expected)
    split = default_split(dataset, config.split)
    loaded = load_dataset(dataset, data, split)
    if config.images < len(loaded):
        rows = split_rows(loaded.labels, (config.images / len(loaded),), DatasetConfig.seed)[0][: config.images]
    else:
        rows = np.arange(len(loaded))  # no more than were asked for
    return _list_of(loaded, rows.tolist(), data)


def write_list(path: Path, chosen: CalibrationList) -> None:
    """Write it, a line per key. Raises :class:`CalibrationError` for one that :func:`read_list` would refuse."""
    lines = [
        f"  {json.dumps(key)}: {json.dumps(value)}" for key, value in ({"schema": SCHEMA} | asdict(chosen)).items()
    ]
    text = "{\n" + ",\n".join(lines) + "\n}\n"
    if len(text) > MAX_LIST_BYTES:  # JSON of json.dumps is ASCII
        got, expected = f"{len(text)} bytes", f"at most {MAX_LIST_BYTES}"
        raise CalibrationError(f"{path}: the list is too long", got=got, expected=expected, remedy="draw fewer images")
    write_text(path, text)


def read_list(path: Path) -> CalibrationList:
    """Inverse of :func:`write_list`. Raises :class:`CalibrationError` for a file that is unreadable, empty, no list."""
    try:
        data = parse_json(read_bytes(usable_path(path), MAX_LIST_BYTES))
    except OSError as error:
        raise CalibrationError(f"{shown_path(path)}: cannot be read ({error.strerror})", remedy=AGAIN) from error
    except MalformedError as error:
        raise CalibrationError(f"{path}: no calibration list ({error})", remedy=AGAIN) from error
    found = _from_json(data, path)
    if not found.rows:
        raise CalibrationError(f"{path}: the calibration list is empty", expected="at least one image", remedy=AGAIN)
    return found


def _from_json(data: Any, path: Path) -> CalibrationList:
    """Raises :class:`CalibrationError` naming the first key that is missing or holds what it cannot."""

    def wrong(key: str, got: str, expected: str) -> CalibrationError:
        return CalibrationError(f"{path}: no calibration list: {key}", got=got, expected=expected, remedy=AGAIN)

    def checked(key: str, fits: Callable[[Any], bool], expected: str) -> Any:
        if key not in data:
            raise wrong(key, "nothing", expected)
        if not fits(data[key]):
            raise wrong(key, shown(data[key]), expected)
        return data[key]

    if not isinstance(data, dict):
        raise wrong("the document", json_kind(data), "an object")
    checked("schema", lambda value: value == SCHEMA, SCHEMA)
    rows = checked(
        "rows", lambda value: _is_list_of(int, value) and min(value, default=0) >= 0, "a list of row numbers"
    )
    files = checked("files", lambda value: value is None or _is_list_of(str, value), "a list of file names, or null")
    shape = checked(
        "shape", lambda value: value is None or (_is_list_of(int, value) and len(value) == 3), "[h, w, 3], or null"
    )
    unique = len(set(rows)) == len(rows) and (files is None or len(set(files)) == len(files))
    if not unique or len(rows) > MAX_LIST_ENTRIES:
        got = f"{len(rows)} rows" if len(rows) > MAX_LIST_ENTRIES else "an image twice"
        raise wrong("rows", got, f"at most {MAX_LIST_ENTRIES} rows, each once")
    if files is not None and len(files) != len(rows):
        raise wrong("files", f"{len(files)} names", f"{len(rows)}, one for each row")
    return CalibrationList(
        checked("dataset", _is_text, "the name of a data set"),
        checked("split", _is_text, "the name of a split"),
        None if shape is None else tuple(shape),
        tuple(rows),
        None if files is None else tuple(files),
        checked("sha256", _is_text, "a SHA-256"),
    )


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value)


def _is_list_of(wanted: type, value: Any) -> bool:
    # True is an int in Python, not in JSON.
    return isinstance(value, list) and all(type(item) is wanted for item in value)


def list_images(
    chosen: CalibrationList,
    data: Path | None,
    preprocess: Preprocess,
    class_names: Sequence[str] = (),
    where: Path | None = None,
    max_pixels: int | None = None,
) -> NDArray[np.uint8]:
    """The images of a list at the network's size: uint8 (N, H, W, 3).

    Raises :class:`CalibrationError` where they are not those that the list was made from.
    """
    name = str(where) if where is not None else f"calibration list of {chosen.dataset}"
    loaded = load_dataset(chosen.dataset, data, chosen.split, max_pixels=max_pixels)
    if class_names:
        check_classes(loaded, len(class_names), class_names)
    rows = _rows(chosen, loaded, data, name)
    shape = loaded.source.shape[1:] if isinstance(loaded.source, np.ndarray) else None
    if shape != chosen.shape:
        raise CalibrationError(f"{name}: images of another shape", got=shape, expected=chosen.shape, remedy=AGAIN)
    images = loaded.take(np.array(rows, np.intp))
    digest = _digest(images)
    if digest != chosen.sha256:
        got, expected = f"SHA-256 {digest[:12]}..", f"{chosen.sha256[:12]}.."
        raise CalibrationError(f"{name}: its images have changed", got=got, expected=expected, remedy=AGAIN)
    return images.arrays(preprocess)


def _rows(chosen: CalibrationList, loaded: Dataset, data: Path | None, name: str) -> list[int]:
    if chosen.files is not None and not isinstance(loaded.source, np.ndarray):
        known = {_relative(path, data): row for row, path in enumerate(loaded.source)}
        missing = [file for file in chosen.files if file not in known]
        if missing:
            got = f"{len(missing)} files that are not there, {missing[0]} first"
            raise CalibrationError(f"{name}: its images have changed", got=got, remedy=AGAIN)
        return [known[file] for file in chosen.files]
    outside = [row for row in chosen.rows if not 0 <= row < len(loaded)]
    if outside:
        got, expected = f"row {shown(outside[0])}", f"0..{len(loaded) - 1} (split {chosen.split})"
        raise CalibrationError(f"{name}: names an image that is not there", got=got, expected=expected, remedy=AGAIN)
    return list(chosen.rows)


def _list_of(loaded: Dataset, rows: list[int], data: Path | None) -> CalibrationList:
    images = loaded.take(np.array(rows, np.intp))
    if isinstance(images.source, np.ndarray):
        shape, files = images.source.shape[1:], None
    else:
        shape, files = None, tuple(_relative(path, data) for path in images.source)
    return CalibrationList(loaded.name, loaded.split, shape, tuple(rows), files, _digest(images))


def _relative(path: Path, data: Path | None) -> str:
    """How a list names an image; a name that is no UTF-8 in a form that JSON can hold."""
    inside = data is not None and path.is_relative_to(data)
    return utf8_name(path.relative_to(data).as_posix() if data is not None and inside else path.as_posix())


def _digest(images: Dataset) -> str:
    if isinstance(images.source, np.ndarray):
        return hashlib.sha256(np.ascontiguousarray(images.source).tobytes()).hexdigest()
    return hashlib.sha256("\n".join(_image_digest(path) for path in images.source).encode()).hexdigest()


def _image_digest(path: Path) -> str:
    try:
        return sha256_file(path)
    except OSError as error:
        what = f"{shown_path(path)}: cannot be read ({error.strerror})"
        raise ImageError(what, remedy="check the path") from error
