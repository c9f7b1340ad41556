"""Data sets by name, split the same way wherever they are read: training, evaluation, calibration, bench.

    cifar10, cifar100   the "python version" folders of the original distribution
    folder              any tree of images with one sub-folder per class, with or without train/val/test above it
    digits              scikit-learn's handwritten digits: real images that ship with a dependency
    cifar10-samples     200 of CIFAR-10's test images, which ship with this package

A split depends on the data, ``validation_share`` and ``seed`` alone (see :mod:`bdexport.dataset.splits`). Use one seed
for all commands; it is not the seed of the training.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from bdexport.config import DatasetConfig
from bdexport.dataset.base import SPLITS, Dataset, check_classes, is_numbered, unnamed_classes, with_classes_of
from bdexport.dataset.cifar import CIFAR10, CIFAR100, load_cifar
from bdexport.dataset.digits import load_digits
from bdexport.dataset.folder import image_files, load_folder, load_images
from bdexport.dataset.samples import NAME as CIFAR10_SAMPLES
from bdexport.dataset.samples import load_samples
from bdexport.dataset.splits import SplitSettings
from bdexport.errors import DatasetError, UsageError
from bdexport.files import usable_path
from bdexport.image_files import check_max_pixels

DATASETS = {
    "cifar10": "CIFAR-10, python version (--data: the folder cifar-10-batches-py or its parent)",
    "cifar100": "CIFAR-100, python version, fine labels (--data: the folder cifar-100-python or its parent)",
    "folder": "images in one sub-folder per class, with or without train/, val/ and test/ above (--data: the folder)",
    "digits": "scikit-learn's 1,797 handwritten digits; needs no --data",
    CIFAR10_SAMPLES: "200 of CIFAR-10's test images, for a first look; needs no --data, has the split test only",
}

INSTALLED = ("digits", CIFAR10_SAMPLES)

__all__ = [
    "DATASETS",
    "SPLITS",
    "Dataset",
    "check_classes",
    "check_folder",
    "image_files",
    "is_numbered",
    "load_dataset",
    "load_images",
    "needs_folder",
    "unnamed_classes",
    "with_classes_of",
]


def load_dataset(
    name: str,
    data_dir: Path | None = None,
    split: str = "test",
    *,
    validation_share: float = DatasetConfig.validation_share,
    seed: int = DatasetConfig.seed,
    limit: int | None = None,
    skip_damaged: bool = False,
    max_pixels: int | None = None,
) -> Dataset:
    """One split of a data set: ``train``, ``validation`` (never part of ``train``) or ``test``.

    ``limit`` keeps the first images (all of them when there are fewer). ``skip_damaged`` leaves out image files that
    cannot be decoded (:meth:`Dataset.without_damaged`); which split an image belongs to does not change by it.
    ``max_pixels``: an image file that has more pixels is an error (None: ``bdexport.limits.MAX_PIXELS``).
    Raises :class:`UsageError` for an unknown name or split, a missing ``data_dir`` and one that the data set has no use
    for (:func:`needs_folder`), and :class:`DatasetError` naming the file for everything that is wrong with the data.
    """
    if name not in DATASETS:
        raise UsageError("unknown data set", got=repr(name), expected=f"one of {', '.join(DATASETS)}")
    if split not in SPLITS:
        raise UsageError("unknown split", got=repr(split), expected=f"one of {', '.join(SPLITS)}")
    if limit is not None and limit < 1:
        raise UsageError("number of images", got=limit, expected="at least 1")
    if skip_damaged and name != "folder":
        remedy = "leave it out, or pass --dataset folder"
        raise UsageError(f"--skip-damaged has no effect with data set {name}, whose images are no files", remedy=remedy)
    if max_pixels is not None and name != "folder":
        remedy = "leave it out, or pass --dataset folder"
        raise UsageError(f"--max-pixels has no effect with data set {name}, whose images are no files", remedy=remedy)
    dataset = _load(name, data_dir, split, SplitSettings(validation_share, seed))
    if max_pixels is not None:
        dataset = replace(dataset, max_pixels=check_max_pixels(max_pixels))
    dataset = dataset if limit is None else dataset.first(limit)
    return dataset.without_damaged() if skip_damaged else dataset


def needs_folder(name: str) -> bool:
    """Whether the images come from a folder; those of ``digits`` and ``cifar10-samples`` are installed."""
    return name not in INSTALLED


def check_folder(name: str, data_dir: Path | None) -> None:
    """Raise :class:`UsageError` for a folder that the data set has no use for; :func:`load_dataset` does so, too."""
    if data_dir is not None and not needs_folder(name):
        remedy = "leave --data out, or name the data set that is in that folder"
        raise UsageError(f"--data has no effect with data set {name}, which is installed", got=data_dir, remedy=remedy)


def _load(name: str, data_dir: Path | None, split: str, settings: SplitSettings) -> Dataset:
    check_folder(name, data_dir)
    if name == "digits":
        return load_digits(split, settings)
    if name == CIFAR10_SAMPLES:
        return load_samples(split)
    return _load_from(name, data_dir, split, settings)


def _load_from(name: str, data_dir: Path | None, split: str, settings: SplitSettings) -> Dataset:
    if data_dir is None:
        raise UsageError(f"data set {name}: no folder given", remedy=f"pass --data DIR; {DATASETS[name]}")
    data_dir = usable_path(data_dir)
    if not data_dir.exists():
        raise DatasetError(f"{data_dir}: no such folder", remedy="check the path given as --data")
    if name == "folder":
        return load_folder(data_dir, split, settings)
    return load_cifar({"cifar10": CIFAR10, "cifar100": CIFAR100}[name], data_dir, split, settings)
