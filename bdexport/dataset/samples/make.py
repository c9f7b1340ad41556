"""Make the sample images from CIFAR-10 itself, the same bytes every time.

    python -m bdexport.dataset.samples.make --data DIR [--out FOLDER]

20 test images of each class: those whose pixels have the smallest SHA-256, salted with ``SEED``. So the choice is the
same whatever the order of the images in the folder, and nothing about a model goes into it. They stand in rounds over
the classes, so that the first N are of all classes.
"""

from __future__ import annotations

import argparse
import hashlib
import io
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from bdexport.dataset import load_dataset
from bdexport.dataset.samples import RECORD, SHEET, image_id, pixels_digest, sheet_of
from bdexport.files import write_bytes, write_json

SEED, PER_CLASS = 0, 20


def make_samples(data: Path, out: Path, per_class: int = PER_CLASS) -> None:
    """Write the sheet and its record to ``out``, from the CIFAR-10 in ``data``. Raises DatasetError, OutputError."""
    test = load_dataset("cifar10", data, "test")
    pixels = test.images()
    assert isinstance(pixels, np.ndarray)
    rows = chosen_rows(pixels, test.labels, per_class)
    images = pixels[rows]
    sheet = io.BytesIO()
    Image.fromarray(sheet_of(images, len(test.class_names))).save(sheet, "PNG", optimize=True)
    write_bytes(out / SHEET, sheet.getvalue())
    record = {
        "schema": "bdexport.samples/1",
        "dataset": test.name,
        "split": test.split,
        "seed": SEED,
        "class_names": list(test.class_names),
        "labels": test.labels[rows].tolist(),
        "ids": [image_id(image) for image in images],
        "sha256": pixels_digest(images),
    }
    write_json(out / RECORD, record)


def chosen_rows(pixels: NDArray[np.uint8], labels: NDArray[np.int64], per_class: int) -> NDArray[np.intp]:
    """Rows of the chosen images: the first of each class, the second of each, .."""
    keys = [hashlib.sha256(f"{SEED}:".encode() + image.tobytes()).digest() for image in pixels]
    by_class = [
        sorted(np.flatnonzero(labels == label).tolist(), key=keys.__getitem__)[:per_class]
        for label in np.unique(labels)
    ]
    return np.stack([np.array(rows, dtype=np.intp) for rows in by_class], axis=1).reshape(-1)


def main() -> None:
    """The command line of this file."""
    parser = argparse.ArgumentParser(description="Make the sample images from CIFAR-10 itself.")
    parser.add_argument("--data", type=Path, required=True, help="folder of CIFAR-10, python version")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="default: beside this file")
    arguments = parser.parse_args()
    make_samples(arguments.data, arguments.out)


if __name__ == "__main__":
    main()
