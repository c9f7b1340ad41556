"""Make the sample images from CIFAR-10 itself, the same bytes every time.

    python -m bdexport.dataset.samples.make --data DIR [--out FOLDER]

20 test images of each class: those with the smallest keys of ``SEED`` (see :mod:`bdexport.dataset.splits`). Nothing
about a model goes into the choice. In rounds over the classes, so that the first N are of all classes.
"""

from __future__ import annotations

import argparse
import io
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from bdexport.dataset import load_dataset
from bdexport.dataset.samples import RECORD, SHEET, pixels_digest, sheet_of
from bdexport.dataset.splits import split_rows
from bdexport.files import write_bytes, write_json

SEED, SHARE = 0, 0.02  # of 10,000 test images


def make_samples(data: Path, out: Path) -> None:
    """Write the sheet and its record to ``out``, from the CIFAR-10 in ``data``. Raises DatasetError, OutputError."""
    test = load_dataset("cifar10", data, "test")
    rows = in_rounds(test.labels, split_rows(test.labels, (SHARE,), SEED)[0])
    chosen = test.take(rows)
    images = chosen.images()
    assert isinstance(images, np.ndarray)
    sheet = io.BytesIO()
    Image.fromarray(sheet_of(images, len(test.class_names))).save(sheet, "PNG", optimize=True)
    write_bytes(out / SHEET, sheet.getvalue())
    record = {
        "schema": "bdexport.samples/1",
        "dataset": test.name,
        "split": test.split,
        "split_images": len(test),
        "seed": SEED,
        "class_names": list(test.class_names),
        "indices": rows.tolist(),
        "labels": chosen.labels.tolist(),
        "sha256": pixels_digest(images),
    }
    write_json(out / RECORD, record)


def in_rounds(labels: NDArray[np.int64], rows: NDArray[np.intp]) -> NDArray[np.intp]:
    """``rows`` reordered: the first of each class, the second of each, ..; as many of one class as of another."""
    by_class = [rows[labels[rows] == label] for label in np.unique(labels)]
    return np.stack(by_class, axis=1).reshape(-1)


def main() -> None:
    """The command line of this file."""
    parser = argparse.ArgumentParser(description="Make the sample images from CIFAR-10 itself.")
    parser.add_argument("--data", type=Path, required=True, help="folder of CIFAR-10, python version")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="default: beside this file")
    arguments = parser.parse_args()
    make_samples(arguments.data, arguments.out)


if __name__ == "__main__":
    main()
