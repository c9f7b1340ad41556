"""Images in folders: one sub-folder per class, split by folders above them or by a seeded, stratified draw.

    ROOT/cat/001.jpg            one tree: 80 % train, 10 % validation, 10 % test
    ROOT/train/cat/001.jpg      train/, val/ (or validation/, valid/) and test/: used as they are; without val/,
    ROOT/test/cat/002.jpg       validation is held out of train/

Classes are the sub-folders in sorted order (of train/, where there is one). Below a class, images may lie at any depth.
What starts with a dot, and files whose suffix is no image's, are ignored; an image that cannot be decoded is an error.
Images stand in rounds over the classes (the first of each, the second of each, ..), so that the first n are of all.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NoReturn

import numpy as np

from bdexport.config import DatasetConfig
from bdexport.dataset.base import SPLITS, Dataset, Pixels, all_of, fit_files
from bdexport.dataset.splits import SplitSettings, split_rows
from bdexport.errors import DatasetError, ImageError
from bdexport.files import shown, usable_path
from bdexport.limits import MAX_FOLDER_ENTRIES, MAX_PIXELS
from bdexport.preprocess import Preprocess

IMAGE_SUFFIXES = (
    *(".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".avif", ".gif", ".tif", ".tiff"),
    *(".bmp", ".dib", ".ppm", ".pgm", ".pbm", ".pnm", ".tga"),
)
SPLIT_FOLDERS = {
    "train": "train",
    "val": "validation",
    "validation": "validation",
    "valid": "validation",
    "test": "test",
}

Samples = list[tuple[Path, int]]  # image file, label


def load_folder(root: Path, split: str, settings: SplitSettings) -> Dataset:
    """One split of an image folder; nothing is decoded yet. Raises :class:`DatasetError` naming the folder."""
    if not root.is_dir():
        raise DatasetError(f"{root}: not a folder", remedy="unpack an archive first and pass its folder")
    parts = _split_folders(root)
    if parts:
        names, samples = _of_split_folders(root, parts, split, settings)
    else:
        names = _class_names(root)
        samples = _drawn(_samples(root, names), split, DatasetConfig.test_share, settings)
    if not samples:
        raise DatasetError(f"{root}: no image is left for the {split} split", remedy="add images or split folders")
    labels = np.array([label for _, label in samples], dtype=np.int64)
    return Dataset("folder", split, names, labels, tuple(path for path, _ in samples))


def image_files(paths: Path | Iterable[Path], *, recursive: bool = False) -> tuple[Path, ...]:
    """The given files as they are, and the image files in the given folders, sorted by name.

    Raises :class:`ImageError` for a path that does not exist and :class:`DatasetError` for a folder without images.
    """
    found: list[Path] = []
    for path in [paths] if isinstance(paths, str | Path) else paths:
        path = usable_path(path)
        if path.is_dir():
            inside = _images_below(path, recursive)
            if not inside:
                raise _no_images(path)
            found += inside
        elif path.exists():
            found.append(path)
        else:
            raise ImageError(f"{shown(path)}: no such file", remedy="check the path")
    return tuple(found)


def load_images(
    paths: Path | Iterable[Path], preprocess: Preprocess, *, recursive: bool = False, max_pixels: int = MAX_PIXELS
) -> tuple[tuple[Path, ...], Pixels]:
    """The files that :func:`image_files` finds and their pixels, uint8 (N, H, W, 3) at the network's size.

    Raises :class:`ImageError` naming a file that cannot be decoded, or has more than ``max_pixels`` pixels.
    """
    files = image_files(paths, recursive=recursive)
    return files, fit_files(files, preprocess, max_pixels)


def _split_folders(root: Path) -> dict[str, Path]:
    """The folders of the splits, or nothing: a folder without sub-folders is a class that happens to be called so."""
    parts: dict[str, Path] = {}
    for folder in _folders(root):
        split = SPLIT_FOLDERS.get(folder.name.casefold())
        if split is None or not _folders(folder):
            continue
        if split in parts:
            got = f"{parts[split].name} and {folder.name}"
            raise DatasetError(f"{root}: two folders for {split}", got=got, remedy="rename or merge one of them")
        parts[split] = folder
    return parts


def _of_split_folders(
    root: Path, parts: dict[str, Path], split: str, settings: SplitSettings
) -> tuple[tuple[str, ...], Samples]:
    names = _class_names(parts.get("train") or next(iter(parts.values())))
    if split in parts and (split != "train" or "validation" in parts):
        return names, _samples(parts[split], names)
    if split == "test" or "train" not in parts:
        missing = "test" if split == "test" else "train"
        got, remedy = ", ".join(sorted(parts)), f"add one with the same classes, or choose another split than {split}"
        raise DatasetError(f"{root}: no folder {missing}/ for the {split} split", got=got, remedy=remedy)
    return names, _drawn(_samples(parts["train"], names), split, None, settings)


def _drawn(samples: Samples, split: str, test_share: float | None, settings: SplitSettings) -> Samples:
    """The images that the seed gives to ``split``; no test images are drawn if ``test_share`` is None."""
    labels = np.array([label for _, label in samples], dtype=np.int64)
    shares = [settings.validation_share] if test_share is None else [test_share, settings.validation_share]
    *test, validation, train = split_rows(labels, shares, settings.seed)
    rows = dict(zip(SPLITS, (train, validation, *test), strict=False))[split]
    return [samples[row] for row in rows]


def _class_names(folder: Path) -> tuple[str, ...]:
    names = tuple(path.name for path in _folders(folder))
    if len(names) < 2:
        inner = _folders(folder / names[0]) if names else []
        remedy = "put the images of each class into a sub-folder of its own"
        if len(inner) > 1:  # an archive that was unpacked into a folder of its own name
            remedy = f"pass {shown(folder / names[0])}, which has {len(inner)}, if those are the classes"
        got = f"{len(names)} sub-folders" if len(names) != 1 else f"1 sub-folder, {names[0]!r}"
        raise DatasetError(
            f"{shown(folder)}: too few classes", got=got, expected="at least 2, one for each class", remedy=remedy
        )
    return names


def _samples(folder: Path, names: tuple[str, ...]) -> Samples:
    """Every image below the class folders, in rounds over the classes."""
    unknown = [path.name for path in _folders(folder) if path.name not in names]
    if unknown:
        classes = "class" if len(unknown) == 1 else "classes"
        is_not = "is not one" if len(unknown) == 1 else "are not"
        listed = ", ".join(map(repr, unknown))
        what = f"{folder}: {classes} {listed} {is_not} of the training set's {len(names)}"
        raise DatasetError(what, remedy="name the folders as those of the training set, or remove them")
    ranked, empty = [], []
    for label, name in enumerate(names):
        if not (folder / name).is_dir():
            continue  # a class of the training set need not occur in the others
        images = _images_below(folder / name, recursive=True)
        if not images:
            empty.append(_no_images(folder / name))
        ranked += [(position, label, path) for position, path in enumerate(images)]
    if empty:
        raise all_of(empty)
    return [(path, label) for _, label, path in sorted(ranked, key=lambda entry: entry[:2])]


def _folders(folder: Path) -> list[Path]:
    """Sub-folders that are not hidden, sorted by name."""
    try:
        return sorted(path for path in folder.iterdir() if not path.name.startswith(".") and path.is_dir())
    except OSError as error:
        _unreadable(error)


def _images_below(folder: Path, recursive: bool) -> list[Path]:
    """Image files by suffix, sorted by path; hidden files and folders are left out."""
    found = [name for name in _names_below(folder, recursive) if name.lower().endswith(IMAGE_SUFFIXES)]
    return [Path(name) for name in sorted(found, key=lambda name: name.replace(os.sep, "/"))]


def _names_below(top: Path, recursive: bool) -> Iterator[str]:
    """The names of everything that is no folder and not hidden, with the folders above it.

    Folders that are links are followed. Every folder is read once, wherever links lead: none can go round in a circle.
    Raises :class:`DatasetError` for a folder that cannot be read, and for more than ``MAX_FOLDER_ENTRIES`` entries.
    """
    waiting, entries = [str(top)], 0
    seen: set[tuple[int, int] | str] = set()
    while waiting:
        place = waiting.pop()
        folders: list[tuple[bool, str]] = []
        try:
            about = os.stat(place)  # realpath asks for every folder above, again for each of a thousand in each other
            identity = (about.st_dev, about.st_ino) if about.st_ino else os.path.realpath(place)
            if identity in seen:
                continue
            seen.add(identity)
            with os.scandir(place) as listing:
                for entry in listing:
                    entries += 1
                    if entries > MAX_FOLDER_ENTRIES:
                        got, remedy = f"more than {MAX_FOLDER_ENTRIES} entries", "name a smaller folder"
                        raise DatasetError(f"{shown(top)}: too many files", got=got, remedy=remedy)
                    if entry.name.startswith("."):
                        continue
                    if not _is_folder(entry):
                        yield entry.path
                    elif recursive:
                        folders.append((entry.is_symlink(), entry.path))
        except OSError as error:
            _unreadable(error)
        # Folders before links to them, so that an image has the name of the place where it is.
        waiting += [path for _, path in sorted(folders, reverse=True)]


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link that leads to itself
        return False


def _no_images(folder: Path) -> DatasetError:
    """What is in a folder that holds no image directly, so that its owner sees what to name instead."""
    deeper = _images_below(folder, recursive=True)
    if deeper:
        found = f"{len(deeper)} images in its {len(_folders(folder))} sub-folders"
        return DatasetError(f"{shown(folder)}: no image files directly in it", got=found, remedy="name the sub-folders")
    others = sum(1 for _ in _names_below(folder, recursive=True))
    got = f"{others} files of other kinds" if others else None
    return DatasetError(f"{shown(folder)}: no image files in it", got=got, remedy="add images, or remove the folder")


def _unreadable(error: OSError) -> NoReturn:
    raise DatasetError(
        f"{shown(error.filename)}: cannot be read ({error.strerror})", remedy="check its permissions"
    ) from error
