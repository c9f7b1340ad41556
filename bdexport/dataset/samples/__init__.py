"""A few CIFAR-10 test images that ship with bdexport, so that a CIFAR-10 model can be run without the data set.

    cifar10.png    the images, lossless, in rows of one image per class
    cifar10.json   split, labels, class names, seed of the choice, a hash of each image and of all

``README.md`` beside them says what they are; ``python -m bdexport.dataset.samples.make`` makes them again.
"""

from __future__ import annotations

import hashlib
import json
from importlib.resources import files
from importlib.resources.abc import Traversable

import numpy as np
from numpy.typing import NDArray

from bdexport.dataset.base import Dataset
from bdexport.errors import DatasetError, UsageError
from bdexport.image_files import open_package_image
from bdexport.json_text import why

NAME = "cifar10-samples"
SHEET, RECORD = "cifar10.png", "cifar10.json"
SIDE = 32  # pixels
REMEDY = "install bdexport again"


def load_samples(split: str) -> Dataset:
    """The sample images: uint8 RGB (200, 32, 32, 3), in rounds over the classes. ``test`` is the only split.

    Raises :class:`UsageError` for any other split: these are test images, nothing may be trained or chosen on them.
    :class:`DatasetError` when the installed files are damaged.
    """
    if split != "test":
        raise UsageError(
            f"data set {NAME}: its images are test images",
            got=f"split {split!r}",
            expected="test",
            remedy="train and choose on cifar10 itself",
        )
    folder = files(__name__)
    try:
        record = json.loads((folder / RECORD).read_text())
        images = _images(folder / SHEET)
    except (OSError, ValueError) as error:
        raise DatasetError(f"{folder}: sample images missing or damaged ({why(error)})", remedy=REMEDY) from error
    if pixels_digest(images) != record["sha256"]:
        raise DatasetError(f"{folder / SHEET}: damaged", remedy=REMEDY)
    return Dataset(NAME, split, tuple(record["class_names"]), np.array(record["labels"], dtype=np.int64), images)


def _images(sheet: Traversable) -> NDArray[np.uint8]:
    return tiles_of(np.asarray(open_package_image(sheet.read_bytes()).convert("RGB")))


def sheet_of(images: NDArray[np.uint8], columns: int) -> NDArray[np.uint8]:
    """Images (N, 32, 32, 3), N a multiple of ``columns``, side by side, row after row: uint8 (H, W, 3)."""
    rows = images.reshape(-1, columns, SIDE, SIDE, 3)
    return np.ascontiguousarray(rows.transpose(0, 2, 1, 3, 4)).reshape(len(rows) * SIDE, columns * SIDE, 3)


def tiles_of(sheet: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """What :func:`sheet_of` put together: uint8 (N, 32, 32, 3), contiguous."""
    height, width, _ = sheet.shape
    tiles = sheet.reshape(height // SIDE, SIDE, width // SIDE, SIDE, 3).transpose(0, 2, 1, 3, 4)
    return np.ascontiguousarray(tiles).reshape(-1, SIDE, SIDE, 3)


def image_id(image: NDArray[np.uint8]) -> str:
    """What finds the image (32, 32, 3) in any copy of CIFAR-10, whatever its order: 16 hex digits of its SHA-256."""
    return pixels_digest(image)[:16]


def pixels_digest(images: NDArray[np.uint8]) -> str:
    """Hex SHA-256 of the pixels, in order."""
    return hashlib.sha256(np.ascontiguousarray(images).tobytes()).hexdigest()
