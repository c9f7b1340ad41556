"""Readers and splits, against data written by the test itself in the layout of the original distributions."""

from __future__ import annotations

import hashlib
import os
import pickle
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from bdexport.dataset import Dataset, check_classes, image_files, load_dataset, load_images
from bdexport.dataset.pickles import read_pickle
from bdexport.dataset.splits import split_rows
from bdexport.errors import BdexportError, DatasetError, ImageError, UsageError
from bdexport.preprocess import Preprocess

GOLDEN_ROWS, GOLDEN_DIGEST = [2, 3, 11, 13, 20, 48], "af1098a0d464d73b"
GOLDEN_DIGITS = "af8856a0831bea25"
SPLITS = ("train", "validation", "test")
CIFAR10_NAMES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]


def pixels(dataset: Dataset) -> NDArray[np.uint8]:
    images = dataset.images()
    assert isinstance(images, np.ndarray)
    return images


def digest(rows: NDArray[np.intp]) -> str:
    return hashlib.sha256(rows.astype("<i8").tobytes()).hexdigest()[:16]


# ---- splits --------------------------------------------------------------------------------------------------------


def test_split_is_the_same_everywhere() -> None:
    """Golden: the hash of the rows that are held out of 50,000 labels 0..9 in turn. A change would move images that
    published models were trained on into the validation set.
    """
    labels = np.arange(50_000, dtype=np.int64) % 10
    validation, train = split_rows(labels, (0.1,), seed=0)
    assert (len(validation), len(train)) == (5000, 45_000)
    assert validation[:6].tolist() == GOLDEN_ROWS
    assert digest(validation) == GOLDEN_DIGEST
    assert digest(split_rows(labels, (0.1,), seed=1)[0]) != GOLDEN_DIGEST


@pytest.mark.parametrize("counts", [(500, 500), (7, 100, 33), (3, 3, 3), (50, 1, 2)])
@pytest.mark.parametrize("shares", [(0.1,), (0.2, 0.1), (0.25, 0.5)])
def test_split_is_a_stratified_partition(counts: tuple[int, ...], shares: tuple[float, ...]) -> None:
    """Properties: every row once, ascending; a class has its share of each part to within one row."""
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(len(counts)), counts))
    parts = split_rows(labels, shares, seed=3)
    assert sorted(np.concatenate(parts).tolist()) == list(range(len(labels)))
    for part, share in zip(parts, shares, strict=False):
        assert (np.diff(part) > 0).all()
        for label, count in enumerate(counts):
            assert abs(int((labels[part] == label).sum()) - share * count) <= 1
            assert count < 3 or label in labels[part]


def test_split_sizes_are_exact() -> None:
    """Oracle: ceil(share x N), though no class has a whole share: 12 classes of 21 make 25.2 -> 26."""
    held_out, rest = split_rows(np.repeat(np.arange(12), 21), (0.1,), seed=0)
    assert (len(held_out), len(rest)) == (26, 226)


# ---- CIFAR ---------------------------------------------------------------------------------------------------------


def python_2_pickle(fields: dict[str, Any]) -> bytes:
    """A batch as Python 2 and numpy 1 wrote the original ones: protocol 2, byte strings, numpy.core."""

    def string(text: bytes) -> bytes:
        return b"U" + bytes([len(text)]) + text if len(text) < 256 else b"T" + struct.pack("<i", len(text)) + text

    def value(item: Any) -> bytes:
        if isinstance(item, list):
            return b"](" + b"".join(map(value, item)) + b"e"
        if isinstance(item, int):
            return b"J" + struct.pack("<i", item)
        if isinstance(item, str):
            return string(item.encode())
        kind = b"cnumpy\ndtype\n" + string(b"u1") + b"K\x00K\x01\x87R(K\x03" + string(b"|")
        kind += b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
        empty = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85" + string(b"b") + b"\x87R"
        shape = value(item.shape[0]) + value(item.shape[1]) + b"\x86"
        return empty + b"(K\x01" + shape + kind + b"\x89" + string(item.tobytes()) + b"tb"

    return b"\x80\x02}(" + b"".join(string(key.encode()) + value(item) for key, item in fields.items()) + b"u."


def python_3_pickle(fields: dict[str, Any], protocol: int) -> bytes:
    return pickle.dumps({key.encode(): item for key, item in fields.items()}, protocol)


WRITERS: dict[str, Callable[[dict[str, Any]], bytes]] = {
    "python 2": python_2_pickle,
    "protocol 2": lambda fields: python_3_pickle(fields, 2),
    "protocol 4": lambda fields: python_3_pickle(fields, 4),
    "protocol 5": lambda fields: python_3_pickle(fields, 5),
}


def batch(count: int, seed: int, classes: int = 10, key: str = "labels") -> dict[str, Any]:
    data = np.random.default_rng(seed).integers(0, 256, (count, 3072), dtype=np.uint8)
    return {"data": data, key: [row % classes for row in range(count)]}


def write_cifar10(
    parent: Path, count: int = 20, write: Callable[[dict[str, Any]], bytes] = WRITERS["protocol 2"]
) -> Path:
    folder = parent / "cifar-10-batches-py"
    folder.mkdir()
    for number, name in enumerate(["test_batch", *(f"data_batch_{n}" for n in range(1, 6))]):
        (folder / name).write_bytes(write(batch(count, number)))
    (folder / "batches.meta").write_bytes(write({"label_names": CIFAR10_NAMES}))
    return folder


@pytest.mark.parametrize("writer", WRITERS)
def test_cifar10(tmp_path: Path, writer: str) -> None:
    """Oracle: the arrays that were written, moved to channels-last, whichever Python wrote them."""
    folder = write_cifar10(tmp_path, write=WRITERS[writer])
    test = load_dataset("cifar10", tmp_path, "test")
    expected = batch(20, 0)["data"].reshape(20, 3, 32, 32).transpose(0, 2, 3, 1)
    np.testing.assert_array_equal(pixels(test), expected)
    assert pixels(test).flags.c_contiguous
    assert test.labels.tolist() == [row % 10 for row in range(20)]
    assert test.labels.dtype == np.int64
    assert test.class_names == tuple(CIFAR10_NAMES)
    assert len(load_dataset("cifar10", folder, "test")) == 20  # the folder itself


def test_cifar10_validation_is_held_out_of_train(tmp_path: Path) -> None:
    """Oracle: split_rows on the five batches in their order; together the two splits are all images, each once."""
    write_cifar10(tmp_path)
    train, validation = (load_dataset("cifar10", tmp_path, split, validation_share=0.2) for split in SPLITS[:2])
    everything = np.concatenate([batch(20, number)["data"] for number in range(1, 6)])
    everything = everything.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    rows = split_rows(np.arange(100, dtype=np.int64) % 10, (0.2,), seed=0)
    np.testing.assert_array_equal(pixels(validation), everything[rows[0]])
    np.testing.assert_array_equal(pixels(train), everything[rows[1]])
    assert np.bincount(validation.labels).tolist() == [2] * 10


def test_cifar100_uses_fine_labels(tmp_path: Path) -> None:
    """Oracle: the fine labels and names that were written, not the coarse ones."""
    folder = tmp_path / "cifar-100-python"
    folder.mkdir()
    names = [f"fine {number}" for number in range(100)]
    for file, seed in (("train", 1), ("test", 0)):
        content = batch(300, seed, 100, "fine_labels") | {"coarse_labels": [0] * 300}
        (folder / file).write_bytes(pickle.dumps(content, 2))
    (folder / "meta").write_bytes(pickle.dumps({"fine_label_names": names, "coarse_label_names": ["c"] * 20}, 2))
    test = load_dataset("cifar100", folder, "test")
    assert test.labels.tolist() == [row % 100 for row in range(300)]
    assert test.class_names == tuple(names)
    assert len(load_dataset("cifar100", tmp_path, "validation", validation_share=1 / 3)) == 100


class Attack:
    """Pickles as a call of os.system."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (self.command,)


def test_pickle_that_runs_code_is_refused(tmp_path: Path) -> None:
    """Oracle: the command in the pickle would make a file, and does not."""
    folder = write_cifar10(tmp_path)
    content = batch(20, 0) | {"extra": Attack(f"touch {tmp_path}/ran")}
    (folder / "test_batch").write_bytes(pickle.dumps(content))
    with pytest.raises(DatasetError, match=r"test_batch: refused, its pickle asks for (posix|nt)\.system"):
        load_dataset("cifar10", tmp_path, "test")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "name",
    [
        b"builtins\neval",
        b"builtins\ngetattr",
        b"__builtin__\nexec",
        b"numpy\nload",
        b"numpy.testing._private.utils\nrunstring",
        b"numpy.core.multiarray\nfromfile",
        b"_codecs\nlookup",
        b"copyreg\n_reconstructor",
    ],
)
def test_no_other_name_resolves(tmp_path: Path, name: bytes) -> None:
    """Oracle: the list of names in bdexport.dataset.pickles; merely naming another is refused."""
    folder = write_cifar10(tmp_path)
    (folder / "test_batch").write_bytes(b"c" + name + b"\n.")
    with pytest.raises(DatasetError, match="refused"):
        load_dataset("cifar10", tmp_path, "test")


@pytest.mark.parametrize(
    "content",
    [
        b"c_codecs\nencode\n(N}X\x08\x00\x00\x00__code__Nstb.",  # attributes set on what a name stands for
        b"cnumpy\nndarray\n)\x81.",  # an object made without its constructor
        b"cnumpy\ndtype\n(U\x01OtR.",  # arrays of objects
        b"cnumpy\ndtype\n(U\x02f8tR.",  # arrays of floats
        b"cnumpy.core.multiarray\n_reconstruct\n(tR.",  # an array that never got its bytes
        b"c_codecs\nencode\n(X\x01\x00\x00\x00aX\x03\x00\x00\x00rottR.",
        b"(" * 10,
        b"}q\x00h\x00h\x00s.",
        b"]q\x00h\x00a.",  # a list that contains itself
        b"P1\n.",
        b"",
    ],
)
def test_strange_pickles_are_damaged_pickles(tmp_path: Path, content: bytes) -> None:
    """Oracle: one sentence naming the file, whatever the unpickler makes of it."""
    folder = write_cifar10(tmp_path)
    (folder / "test_batch").write_bytes(content)
    with pytest.raises(DatasetError, match="test_batch"):
        load_dataset("cifar10", tmp_path, "test")


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("share", [0.001, 0.3, 0.9999])
def test_truncated_batch_is_named(tmp_path: Path, writer: str, share: float) -> None:
    """Oracle: a file cut off is said to be damaged, by name."""
    folder = write_cifar10(tmp_path, write=WRITERS[writer])
    data = (folder / "data_batch_3").read_bytes()
    (folder / "data_batch_3").write_bytes(data[: int(len(data) * share)])
    with pytest.raises(DatasetError, match="data_batch_3: damaged pickle"):
        load_dataset("cifar10", tmp_path, "train")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": [10] + [0] * 19}, "label out of range: got 10, expected 0..9"),
        ({"labels": [-1] + [0] * 19}, "label out of range: got -1"),
        ({"labels": [0] * 19}, "images and labels differ: got 20 and 19"),
        ({"labels": "0" * 20}, "wrong labels: got no list"),
        ({"labels": [0.5] * 20}, "wrong labels"),
        ({"data": np.zeros((20, 3071), np.uint8)}, "wrong images: got uint8 (20, 3071), expected uint8 (N, 3072)"),
        ({"data": np.zeros((20, 3, 32, 32), np.uint8)}, "wrong images"),
        ({"data": np.zeros((20, 3072), np.int32)}, "wrong images: got int32"),
        ({"data": [0] * 20}, "wrong images: got no array"),
        ({"data": np.zeros((0, 3072), np.uint8), "labels": []}, "images and labels differ"),
    ],
)
def test_wrong_batches_are_named(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    """Oracle: the sentence for each thing that can be wrong in a batch."""
    folder = write_cifar10(tmp_path)
    (folder / "test_batch").write_bytes(pickle.dumps(batch(20, 0) | change, 2))
    with pytest.raises(DatasetError) as caught:
        load_dataset("cifar10", tmp_path, "test")
    assert "test_batch" in str(caught.value)
    assert message in str(caught.value)


def test_missing_batch_is_named(tmp_path: Path) -> None:
    """Oracle: the file's name; the splits that do not need it are unharmed."""
    folder = write_cifar10(tmp_path)
    (folder / "data_batch_4").unlink()
    with pytest.raises(DatasetError, match="data_batch_4: no such file"):
        load_dataset("cifar10", tmp_path, "train")
    assert len(load_dataset("cifar10", tmp_path, "test")) == 20


def test_all_damaged_and_missing_batches_are_named(tmp_path: Path) -> None:
    """Oracle: the files that were spoiled, all in one error, and none that was not."""
    folder = write_cifar10(tmp_path)
    (folder / "batches.meta").write_bytes(b"")
    (folder / "data_batch_1").unlink()
    data = (folder / "data_batch_3").read_bytes()
    (folder / "data_batch_3").write_bytes(data[: len(data) // 2])
    (folder / "data_batch_5").write_bytes(pickle.dumps(batch(20, 0) | {"data": np.zeros((20, 3071), np.uint8)}, 2))
    with pytest.raises(DatasetError) as caught:
        load_dataset("cifar10", tmp_path, "train")
    said = str(caught.value)
    assert [name in said for name in ("batches.meta", *(f"data_batch_{number}" for number in range(1, 6)))] == [
        *(True, True, False, True, False, True),
    ]
    assert "data_batch_1: no such file" in said
    assert "data_batch_5: wrong images: got uint8 (20, 3071)" in said
    assert "\n" not in said


def test_cifar_elsewhere(tmp_path: Path) -> None:
    """Oracle: the sentence tells what to do: unpack, fetch another version, or give another folder."""
    with pytest.raises(DatasetError, match="no cifar10 here"):
        load_dataset("cifar10", tmp_path, "test")
    (tmp_path / "test_batch.bin").touch()
    with pytest.raises(DatasetError, match="get the python version"):
        load_dataset("cifar10", tmp_path, "test")
    (tmp_path / "cifar-10-python.tar.gz").touch()
    for data_dir in (tmp_path, tmp_path / "cifar-10-python.tar.gz"):
        with pytest.raises(DatasetError, match="unpack it: tar xzf"):
            load_dataset("cifar10", data_dir, "test")
    with pytest.raises(DatasetError, match="no such folder"):
        load_dataset("cifar10", tmp_path / "nothing", "test")


# ---- image folders -------------------------------------------------------------------------------------------------


def write_images(folder: Path, classes: dict[str, int], size: tuple[int, int] = (8, 6)) -> None:
    """``count`` images for each class; image i of class c has the colour (c, i, 0)."""
    for label, (name, count) in enumerate(classes.items()):
        (folder / name).mkdir(parents=True)
        for number in range(count):
            Image.new("RGB", size, (label, number, 0)).save(folder / name / f"{number:03d}.png")


def colours(dataset: Dataset) -> list[tuple[int, int]]:
    """(class, number) of each image as it was written."""
    return [tuple(image[0, 0, :2].tolist()) for image in dataset.images()]


def test_one_tree_is_split_in_three(tmp_path: Path) -> None:
    """Properties: 80/10/10, each image in one split with its own label, and the same when it is read again."""
    write_images(tmp_path, {"ant": 20, "bee": 40})
    splits = {split: load_dataset("folder", tmp_path, split) for split in SPLITS}
    assert [len(splits[split]) for split in SPLITS] == [48, 6, 6]
    assert splits["test"].class_names == ("ant", "bee")
    seen = [pair for split in SPLITS for pair in colours(splits[split])]
    assert sorted(seen) == sorted([(0, n) for n in range(20)] + [(1, n) for n in range(40)])
    for dataset in splits.values():
        assert [label for label, _ in colours(dataset)] == dataset.labels.tolist()
    again = load_dataset("folder", tmp_path, "validation")
    assert again.source == splits["validation"].source


def test_first_images_are_of_all_classes(tmp_path: Path) -> None:
    """Oracle: rounds over the classes, so that --images n is no choice of class."""
    write_images(tmp_path / "test", {"ant": 3, "bee": 5, "cat": 4})
    test = load_dataset("folder", tmp_path, "test", limit=7)
    assert colours(test) == [(0, 0), (1, 0), (2, 0), (0, 1), (1, 1), (2, 1), (0, 2)]
    assert len(load_dataset("folder", tmp_path, "test", limit=99)) == 12


@pytest.mark.parametrize("name", ["val", "validation", "valid", "Val"])
def test_split_folders_are_used_as_they_are(tmp_path: Path, name: str) -> None:
    """Oracle: the counts in each folder."""
    write_images(tmp_path / "train", {"ant": 10, "bee": 10})
    write_images(tmp_path / name, {"ant": 3, "bee": 4})
    write_images(tmp_path / "test", {"ant": 2, "bee": 2})
    (tmp_path / "annotations").mkdir()
    assert [len(load_dataset("folder", tmp_path, split)) for split in SPLITS] == [20, 7, 4]


def test_validation_is_held_out_of_train_where_it_has_no_folder(tmp_path: Path) -> None:
    """Property: train and validation together are train/, and test is test/."""
    write_images(tmp_path / "train", {"ant": 10, "bee": 20})
    write_images(tmp_path / "test", {"ant": 2, "bee": 2})
    train, validation, test = (load_dataset("folder", tmp_path, split) for split in SPLITS)
    assert (len(train), len(validation), len(test)) == (27, 3, 4)
    assert sorted(colours(train) + colours(validation)) == [(0, n) for n in range(10)] + [(1, n) for n in range(20)]


def test_missing_split_folder_is_said(tmp_path: Path) -> None:
    """Oracle: neither test nor train images are made up from another split."""
    write_images(tmp_path / "val", {"ant": 2, "bee": 2})
    assert len(load_dataset("folder", tmp_path, "validation")) == 4
    for split in ("train", "test"):
        with pytest.raises(DatasetError, match=f"no folder {split}/ for the {split} split: got val"):
            load_dataset("folder", tmp_path, split)


def test_class_called_train_is_a_class(tmp_path: Path) -> None:
    """Oracle: a folder of images is a class whatever its name."""
    write_images(tmp_path, {"car": 10, "train": 10})
    assert load_dataset("folder", tmp_path, "test").class_names == ("car", "train")


def test_other_files_are_ignored_and_images_may_lie_deeper(tmp_path: Path) -> None:
    """Oracle: hidden files and other suffixes do not count; images at any depth and in capitals do."""
    write_images(tmp_path / "test", {"ant": 2, "bee": 2})
    (tmp_path / "test" / "ant" / "notes.txt").write_text("no image")
    (tmp_path / "test" / "ant" / "._000.png").write_text("no image")
    (tmp_path / "test" / ".cache").mkdir()
    (tmp_path / "test" / "bee" / "deep" / "er").mkdir(parents=True)
    Image.new("RGB", (4, 4), (1, 9, 0)).save(tmp_path / "test" / "bee" / "deep" / "er" / "X.PNG")
    test = load_dataset("folder", tmp_path, "test")
    assert sorted(colours(test)) == [(0, 0), (0, 1), (1, 0), (1, 1), (1, 9)]


def test_damaged_image_is_named(tmp_path: Path) -> None:
    """Oracle: the file's name, from each way of reading it."""
    write_images(tmp_path / "test", {"ant": 40, "bee": 40})
    (tmp_path / "test" / "bee" / "003.png").write_bytes(b"\x89PNG\r\n\x1a\nrubbish")
    test = load_dataset("folder", tmp_path, "test")
    for read in (test.images, lambda: test.arrays(Preprocess()), lambda: list(test.batches(Preprocess(), 16))):
        with pytest.raises(ImageError, match=r"bee.003\.png"):
            read()


def test_all_damaged_images_are_named_up_to_a_hundred(tmp_path: Path) -> None:
    """Oracle: the files that were spoiled; of very many, a hundred and the number of the others."""
    write_images(tmp_path / "test", {"ant": 90, "bee": 90})
    for number in (3, 50, 71):
        (tmp_path / "test" / "bee" / f"{number:03d}.png").write_bytes(b"\x89PNG\r\n\x1a\nrubbish")
    test = load_dataset("folder", tmp_path, "test")
    with pytest.raises(ImageError) as caught:
        test.arrays(Preprocess())
    assert [name for name in ("003", "050", "071", "004") if f"{name}.png" in str(caught.value)] == [
        "003",
        "050",
        "071",
    ]
    for path in (tmp_path / "test").rglob("*.png"):
        path.write_bytes(b"")
    with pytest.raises(ImageError, match=r"and 80 more$") as caught:
        test.arrays(Preprocess())
    assert str(caught.value).count(".png: ") == 100


def test_all_empty_and_unknown_classes_are_named(tmp_path: Path) -> None:
    """Oracle: the folders that were made so."""
    write_images(tmp_path / "train", {"ant": 3, "bee": 3})
    for name in ("cat", "dog"):
        (tmp_path / "train" / name).mkdir()
    with pytest.raises(DatasetError, match=r"cat: no image files in it.*dog: no image files in it"):
        load_dataset("folder", tmp_path, "train")
    write_images(tmp_path / "val", {"eel": 1, "fox": 1})
    with pytest.raises(DatasetError, match="classes 'eel', 'fox' are not of the training set's 4"):
        load_dataset("folder", tmp_path, "validation")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda root: None, "too few classes: got 0 sub-folders"),
        (lambda root: (root / "only").mkdir(), "too few classes: got 1 sub-folder, 'only'"),
        (lambda root: [(root / name).mkdir() for name in "ab"], "no image files in it"),
        (lambda root: [(root / split / "a").mkdir(parents=True) for split in ("val", "valid")], "two folders for"),
    ],
)
def test_folders_that_hold_no_data_set(tmp_path: Path, make: Callable[[Path], object], message: str) -> None:
    """Oracle: what is missing, said before any training begins."""
    make(tmp_path)
    with pytest.raises(DatasetError) as caught:
        load_dataset("folder", tmp_path, "train")
    assert message in str(caught.value)


def test_class_that_train_does_not_have(tmp_path: Path) -> None:
    """Oracle: labels would shift; the class is named. A class that only train has is no fault."""
    write_images(tmp_path / "train", {"ant": 3, "bee": 3, "cat": 3})
    write_images(tmp_path / "test", {"ant": 1, "cat": 1})
    assert load_dataset("folder", tmp_path, "test").labels.tolist() == [0, 2]
    write_images(tmp_path / "test", {"dog": 1})
    with pytest.raises(DatasetError, match="class 'dog' is not one of the training set's 3"):
        load_dataset("folder", tmp_path, "test")


def test_too_few_images_for_a_split(tmp_path: Path) -> None:
    """Oracle: one image of each class cannot make three splits; no split is silently empty."""
    write_images(tmp_path, {"ant": 1, "bee": 1})
    sizes = []
    for split in SPLITS:
        try:
            sizes.append(len(load_dataset("folder", tmp_path, split)))
        except DatasetError as error:
            assert "no image is left" in str(error)  # noqa: PT017 (which split is empty is not the point)
            sizes.append(0)
    assert sum(sizes) == 2


# ---- digits --------------------------------------------------------------------------------------------------------


def test_digits() -> None:
    """Oracle: scikit-learn's own arrays: every image once over the splits, grey 16 is white, 360 test images."""
    from sklearn.datasets import load_digits

    splits = [load_dataset("digits", None, split) for split in SPLITS]
    assert [len(split) for split in splits] == [1257, 180, 360]
    data = load_digits()
    expected = sorted(zip(data.target.tolist(), (data.images * 255 / 16).round().astype(int).tolist(), strict=True))
    found = []
    for split in splits:
        images = pixels(split)
        assert (images[..., 0] == images[..., 2]).all()
        found += list(zip(split.labels.tolist(), images[..., 0].astype(int).tolist(), strict=True))
    assert sorted(found) == expected


def test_digits_validation_is_golden() -> None:
    """Golden: the validation labels and pixels of the default seed."""
    validation = load_dataset("digits", None, "validation")
    content = validation.labels.astype("<i8").tobytes() + pixels(validation).tobytes()
    assert hashlib.sha256(content).hexdigest()[:16] == GOLDEN_DIGITS


def test_digits_without_scikit_learn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: Python's own refusal to import, told with the line that mends it."""
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(DatasetError, match=r"scikit-learn cannot be imported .*; pip install scikit-learn"):
        load_dataset("digits", None, "test")


# ---- what a data set can do ----------------------------------------------------------------------------------------


def test_arrays_of_the_right_size_are_not_copied() -> None:
    """Invariant: the fast path gives the pixels themselves."""
    source = np.zeros((3, 32, 32, 3), np.uint8)
    dataset = Dataset("x", "test", ("a", "b"), np.zeros(3, np.int64), source)
    assert dataset.arrays(Preprocess()) is source or dataset.arrays(Preprocess()).base is source


def test_batches_are_the_preprocessed_images_in_order(tmp_path: Path) -> None:
    """Oracle: Preprocess on each image by itself; from files and from memory."""
    pre = Preprocess(size=(16, 16))
    write_images(tmp_path / "test", {"ant": 5, "bee": 6})
    for dataset in (load_dataset("folder", tmp_path, "test"), load_dataset("digits", None, "test", limit=11)):
        expected = np.concatenate([pre(np.asarray(image)[None]) for image in dataset.images()])
        batches = list(dataset.batches(pre, 4))
        assert [len(labels) for _, labels in batches] == [4, 4, 3]
        np.testing.assert_array_equal(np.concatenate([x for x, _ in batches]), expected)
        np.testing.assert_array_equal(np.concatenate([labels for _, labels in batches]), dataset.labels)
        np.testing.assert_array_equal(pre.normalise(dataset.arrays(pre)), expected)


@pytest.mark.parametrize("rows", [slice(1, 9, 3), [4, 0, 4], np.array([7, 2])])
def test_take(tmp_path: Path, rows: Any) -> None:
    """Oracle: numpy's indexing, for images in memory and in files alike."""
    write_images(tmp_path / "test", {"ant": 5, "bee": 5})
    files, memory = load_dataset("folder", tmp_path, "test"), load_dataset("digits", None, "test", limit=10)
    order = np.arange(10)[rows]
    np.testing.assert_array_equal(pixels(memory.take(rows)), pixels(memory)[order])
    assert colours(files.take(rows)) == [colours(files)[row] for row in order]
    assert files.take(rows).labels.tolist() == files.labels[order].tolist()
    assert memory.fitted(Preprocess(), slice(0, 0)).shape == (0, 32, 32, 3)


def test_check_classes() -> None:
    """Oracle: equal count, names and order; a model without names is compared by count."""
    dataset = Dataset("x", "test", ("ant", "bee"), np.zeros(1, np.int64), np.zeros((1, 8, 8, 3), np.uint8))
    check_classes(dataset, 2, ("ant", "bee"))
    check_classes(dataset, 2)
    check_classes(dataset, 2, ("0", "1"))
    with pytest.raises(DatasetError, match="got 2 classes, expected 10"):
        check_classes(dataset, 10)
    for names in (("bee", "ant"), ("cat", "dog")):
        with pytest.raises(DatasetError, match=f"label 0 is 'ant', expected '{names[0]}'"):
            check_classes(dataset, 2, names)


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        (("mnist", None, "test"), {}, "unknown data set: got 'mnist', expected one of cifar10"),
        (("digits", None, "dev"), {}, "unknown split"),
        (("cifar10", None, "test"), {}, "no folder given; pass --data DIR"),
        (("digits", None, "test"), {"limit": 0}, "number of images"),
        (("digits", None, "test"), {"validation_share": 0.0}, "validation share"),
        (("digits", None, "test"), {"validation_share": 0.9}, "less than 1 in all"),
        (("digits", None, "test"), {"seed": -1}, "seed of the split"),
    ],
)
def test_wrong_usage(arguments: tuple[Any, ...], options: dict[str, Any], message: str) -> None:
    """Oracle: exit code 2 and the sentence."""
    with pytest.raises(UsageError) as caught:
        load_dataset(*arguments, **options)
    assert message in str(caught.value)
    assert caught.value.exit_code == 2


# ---- single images -------------------------------------------------------------------------------------------------


def test_load_images(tmp_path: Path) -> None:
    """Oracle: files in the order given, folders sorted and not entered further unless asked; pixels at size."""
    write_images(tmp_path, {"a": 2, "b": 1}, size=(20, 10))
    Image.new("RGB", (5, 5), (7, 7, 7)).save(tmp_path / "z.png")
    Image.new("RGB", (5, 5), (7, 7, 7)).save(tmp_path / "odd.suffix", format="png")
    files, images = load_images([tmp_path / "odd.suffix", tmp_path], Preprocess())
    assert [file.name for file in files] == ["odd.suffix", "z.png"]
    assert images.shape == (2, 32, 32, 3)
    assert (images == 7).all()
    deep = image_files(tmp_path, recursive=True)
    assert [file.relative_to(tmp_path).as_posix() for file in deep] == ["a/000.png", "a/001.png", "b/000.png", "z.png"]


def test_load_images_errors(tmp_path: Path) -> None:
    """Oracle: no such file, and a folder without images, each by name."""
    for path, message in ((tmp_path / "x.png", "no such file"), (tmp_path, "no image files in it")):
        with pytest.raises(BdexportError, match=message) as caught:
            load_images(path, Preprocess())
        assert str(path) in str(caught.value)


def _picture(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (4, 4)).save(path)


def test_folders_that_are_links_are_read_once(tmp_path: Path) -> None:
    """Oracle: the images by hand: those behind a link count, a link in a circle ends, none counts twice."""
    _picture(tmp_path / "store" / "1.png")
    _picture(tmp_path / "data" / "a" / "inner" / "2.png")
    (tmp_path / "data" / "a" / "linked").symlink_to(tmp_path / "store")
    (tmp_path / "data" / "a" / "again").symlink_to(tmp_path / "data" / "a" / "inner")
    (tmp_path / "data" / "a" / "loop").symlink_to(tmp_path / "data")
    found = image_files(tmp_path / "data" / "a", recursive=True)
    inside = [path.relative_to(tmp_path / "data" / "a").as_posix() for path in found]
    assert inside == ["inner/2.png", "linked/1.png"]


def test_folders_one_level_too_deep_say_what_was_found(tmp_path: Path) -> None:
    """Oracle: the folder to name instead stands in the message."""
    for name in "ab":
        _picture(tmp_path / "data" / "unpacked" / name / "1.png")
    with pytest.raises(DatasetError, match=r"1 sub-folder, 'unpacked'.*pass .*data/unpacked, which has 2"):
        load_dataset("folder", tmp_path / "data", "train")
    with pytest.raises(DatasetError, match="no image files directly in it: got 2 images in its 2 sub-folders"):
        image_files(tmp_path / "data" / "unpacked")


def test_damaged_images_are_skipped_and_listed_when_asked(tmp_path: Path) -> None:
    """Oracle: the same split without the damaged ones; each of them is named; off by default, and never all of them."""
    for name in "ab":
        for number in range(10):
            _picture(tmp_path / name / f"{number}.png")
    whole = load_dataset("folder", tmp_path, "train")
    assert isinstance(whole.source, tuple)
    bad = whole.source[3]
    bad.write_bytes(bad.read_bytes()[:40])
    with pytest.raises(ImageError, match=bad.name):
        load_dataset("folder", tmp_path, "train").arrays(Preprocess())
    skipping = load_dataset("folder", tmp_path, "train", skip_damaged=True)
    assert skipping.source == whole.source[:3] + whole.source[4:]
    assert len(skipping.skipped) == 1
    assert str(bad) in skipping.skipped[0]
    assert len(skipping.arrays(Preprocess())) == len(skipping.labels) == len(whole) - 1
    for path in whole.source:
        path.write_bytes(b"")
    with pytest.raises(DatasetError, match="every image of the train split is damaged"):
        load_dataset("folder", tmp_path, "train", skip_damaged=True)
    with pytest.raises(UsageError, match="--skip-damaged has no effect with data set digits"):
        load_dataset("digits", skip_damaged=True)


def test_keys_that_can_be_chosen_to_collide_are_few(tmp_path: Path) -> None:
    """Oracle: the limit; as many texts, and as many small integers, are read."""
    path = tmp_path / "batch"
    honest: list[list[int] | list[str]] = [[str(key) for key in range(25_000)], list(range(25_000))]
    for keys in (*honest, list(range(2**30, 2**30 + 19_000))):
        path.write_bytes(pickle.dumps(dict.fromkeys(keys), protocol=2))
        assert len(read_pickle(path)) == len(keys)
    path.write_bytes(pickle.dumps(dict.fromkeys(range(2**30, 2**30 + 25_000)), protocol=2))
    with pytest.raises(DatasetError, match="more than 20,000 keys"):
        read_pickle(path)
