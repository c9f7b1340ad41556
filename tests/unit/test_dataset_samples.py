"""The sample images: what they are, where they come from, and that nothing can be trained on them."""

from __future__ import annotations

import json
import pickle
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from bdexport.dataset import load_dataset, samples
from bdexport.dataset.samples import RECORD, SHEET, image_id, load_samples, sheet_of, tiles_of
from bdexport.dataset.samples.make import make_samples
from bdexport.errors import DatasetError, UsageError

NAMES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
PER_SHEET, ACROSS = 2500, 50  # of the sheets in the shared folder
INSTALLED = Path(samples.__file__).parent


def test_are_a_small_balanced_set() -> None:
    """Oracles: 20 images of each of CIFAR-10's classes, the first ten one of each, no image twice, under 600 kB."""
    found = load_dataset("cifar10-samples")
    images = found.images()
    assert isinstance(images, np.ndarray)
    assert images.shape == (200, 32, 32, 3)
    assert images.dtype == np.uint8
    assert list(found.class_names) == NAMES
    assert set(Counter(found.labels.tolist()).values()) == {20}
    assert found.labels[:10].tolist() == list(range(10))
    assert len({image_id(image) for image in images}) == 200
    assert (INSTALLED / SHEET).stat().st_size + (INSTALLED / RECORD).stat().st_size < 600_000
    assert "README.md" in {path.name for path in INSTALLED.iterdir()}


def test_are_test_images_of_cifar10(shared: Path) -> None:
    """Oracle: CIFAR-10 itself: each image is in the test set, once, with this label."""
    folder = shared / "data" / "cifar10"
    if not folder.is_dir():
        pytest.skip(f"no CIFAR-10 at {folder}")
    truth = np.load(folder / "labels.npz")["test_labels"]
    label_of: dict[str, list[int]] = {}
    for start, sheet in enumerate(sorted(folder.glob("test-*.webp"))):
        with Image.open(sheet) as image:
            pixels = np.asarray(image.convert("RGB"))
        for row, tile in enumerate(tiles_of(pixels)):
            label_of.setdefault(image_id(tile), []).append(int(truth[start * PER_SHEET + row]))
    found = load_samples("test")
    images = found.images()
    assert isinstance(images, np.ndarray)
    assert [label_of.get(image_id(image)) for image in images] == [[label] for label in found.labels.tolist()]


@pytest.mark.parametrize("split", ["train", "validation"])
def test_cannot_be_trained_or_chosen_on(split: str) -> None:
    """Oracle: the documented refusal."""
    with pytest.raises(UsageError, match="test images"):
        load_dataset("cifar10-samples", None, split)


def test_the_choice_does_not_depend_on_the_order_of_the_data(tmp_path: Path) -> None:
    """Property: the same files from a copy in another order; and each image has its own label."""
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (60, 3072), dtype=np.uint8)
    labels = np.arange(60) % 10
    pixels[:, 0] = labels  # so that an image tells its class
    written = []
    for name, order in (("one", np.arange(60)), ("two", rng.permutation(60))):
        folder = tmp_path / name / "cifar-10-batches-py"
        folder.mkdir(parents=True)
        (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": NAMES, "num_vis": 3072}))
        content = {b"data": pixels[order], b"labels": labels[order].tolist()}
        for file in ("test_batch", *(f"data_batch_{index}" for index in range(1, 6))):
            (folder / file).write_bytes(pickle.dumps(content))
        make_samples(tmp_path / name, tmp_path / f"{name}-out", per_class=2)
        written.append([(tmp_path / f"{name}-out" / file).read_bytes() for file in (SHEET, RECORD)])
    assert written[0] == written[1]
    with Image.open(tmp_path / "one-out" / SHEET) as image:
        tiles = tiles_of(np.asarray(image))
    record = json.loads((tmp_path / "one-out" / RECORD).read_text())
    assert tiles[:, 0, 0, 0].tolist() == record["labels"] == [*range(10), *range(10)]
    assert [image_id(tile) for tile in tiles] == record["ids"]


def test_a_sheet_is_taken_apart_as_it_was_put_together() -> None:
    """Property: round trip; the first row of the sheet shows the first images."""
    images = np.random.default_rng(1).integers(0, 256, (6, 32, 32, 3), dtype=np.uint8)
    sheet = sheet_of(images, columns=3)
    assert sheet.shape == (64, 96, 3)
    assert np.array_equal(sheet[:32, 32:64], images[1])
    assert np.array_equal(tiles_of(sheet), images)


@pytest.mark.parametrize("damage", ["pixel", "cut", "missing", "record"])
def test_damaged_files_are_said_to_be_so(damage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: DatasetError that names the remedy, for every way in which an installed file can be wrong."""
    for file in (SHEET, RECORD):
        shutil.copy(INSTALLED / file, tmp_path / file)
    if damage == "pixel":
        with Image.open(tmp_path / SHEET) as image:
            changed = np.array(image)
        changed[5, 5, 0] ^= 1
        Image.fromarray(changed).save(tmp_path / SHEET)
    elif damage == "cut":
        (tmp_path / SHEET).write_bytes((INSTALLED / SHEET).read_bytes()[:1000])
    elif damage == "missing":
        (tmp_path / SHEET).unlink()
    else:
        (tmp_path / RECORD).write_text("{")
    monkeypatch.setattr(samples, "files", lambda _package: tmp_path)
    with pytest.raises(DatasetError, match="install bdexport again"):
        load_samples("test")
