"""Arrays, calibration lists, class names and folders that somebody else made: refused in a line, in bounded memory."""

from __future__ import annotations

import json
import os
import struct
import tracemalloc
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from image_cases import png

from bdexport.array_files import read_npz
from bdexport.calibration_list import CalibrationList, list_images, make_list, read_list, write_list
from bdexport.cli.loading import read_class_names
from bdexport.config import CalibrationConfig
from bdexport.dataset import folder, image_files, load_dataset
from bdexport.errors import BdexportError, CalibrationError, DatasetError, ImageError, UsageError
from bdexport.files import open_regular, read_bytes, shown
from bdexport.limits import MAX_LIST_BYTES, MAX_LIST_ENTRIES
from bdexport.preprocess import Preprocess

NAMES = ("logits", "images")
HEADER = "{'descr': '<f4', 'fortran_order': False, 'shape': (2, 3), }"


def npy(header: str = HEADER, data: bytes = bytes(24), version: bytes = b"\1\0") -> bytes:
    text = header.encode().ljust(117) + b"\n"
    length = struct.pack("<H" if version == b"\1\0" else "<I", len(text))
    return b"\x93NUMPY" + version + length + text + data


def npz(path: Path, member: bytes, method: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", method) as archive:
        archive.writestr("logits.npy", member)
    return path


def patched(path: Path, find: bytes, offset: int, new: bytes) -> None:
    data = bytearray(path.read_bytes())
    at = data.rindex(find) + offset
    data[at : at + len(new)] = new
    path.write_bytes(data)


# ---- arrays --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_arrays_are_those_that_numpy_wrote(tmp_path: Path, save: Callable[..., None]) -> None:
    """Oracle: the arrays, of every kind of number, in both orders; what was not asked for is not read."""
    rng = np.random.default_rng(0)
    floats = rng.normal(size=(5, 3))
    for logits in (floats, floats.astype(np.float32), np.asfortranarray(floats), floats > 0, np.float64(3), floats[:0]):
        images = rng.integers(0, 256, (5, 4, 4, 3), np.uint8)
        save(tmp_path / "a.npz", logits=logits, images=images, other=np.array([{}], dtype=object))
        found = read_npz(tmp_path / "a.npz", NAMES)
        assert set(found) == set(NAMES)
        np.testing.assert_array_equal(found["logits"], logits)
        np.testing.assert_array_equal(found["images"], images)
        assert found["logits"].dtype == np.asarray(logits).dtype


SHAPE = "{'descr': '<f4', 'fortran_order': False, 'shape': %s, }"
MEMBERS = {
    "a shape that is not there": (npy(SHAPE % "(4000000000, 1000)"), r"claims \(4000000000, 1000\) of float32"),
    "a shape beyond 64 bits": (npy(SHAPE % "(4294967296, 4294967296)"), "claims"),
    "negative lengths": (npy(SHAPE % "(-2, -3)"), "has the shape"),
    "a hundred dimensions": (npy(SHAPE % f"({'1, ' * 25})", bytes(4)), "has the shape"),
    "too little data": (npy(data=bytes(23)), "claims"),
    "too much data": (npy(data=bytes(25)), "claims"),
    "truth values as lengths": (npy(SHAPE % "(True, 6)"), "shape"),
    "objects": (npy(HEADER.replace("<f4", "|O")), "object, no numbers"),
    "records": (npy(HEADER.replace("'<f4'", "[('a', '<f4')]")), "no numbers"),
    "parts": (npy(HEADER.replace("'<f4'", "('<f4', (2,))")), "no numbers"),
    "texts": (npy(HEADER.replace("<f4", "<U1")), "no numbers"),
    "times": (npy(HEADER.replace("<f4", "<M8[s]")), "no numbers"),
    "complex": (npy(HEADER.replace("<f4", "<c8")), "no numbers"),
    "an unknown version": (npy(version=b"\x09\x09"), "version 9.9"),
    "a header that is code": (npy("__import__('os').system('true')"), "no header"),
    "a nested header": (npy("(" * 117), "no header"),
    "no header": (b"\x93NUMPY\1\0\xff\xff", "no header"),
    "nothing": (b"", "no header"),
}


@pytest.mark.parametrize("name", MEMBERS)
@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_a_member_that_is_no_array_of_numbers_is_refused(tmp_path: Path, name: str, method: int) -> None:
    """Oracle: what is wrong with each; numpy takes 16 TB for the first, or tries to."""
    member, message = MEMBERS[name]
    tracemalloc.start()
    with pytest.raises(ValueError, match=message):
        read_npz(npz(tmp_path / "a.npz", member, method), NAMES)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 20_000_000


def test_members_that_inflate_are_refused(tmp_path: Path) -> None:
    """Oracle: 50 MB of nothing in 50 KB, where 10 MB may be read; and members that lie about their size."""
    path = npz(tmp_path / "a.npz", npy(SHAPE % "(12500000,)", bytes(50_000_000)), zipfile.ZIP_DEFLATED)
    tracemalloc.start()
    with pytest.raises(ValueError, match="its arrays have 48 MiB; at most 10 MiB are read"):
        read_npz(path, NAMES, 10 * 2**20)
    patched(path, b"PK\1\2", 24, struct.pack("<I", 1000))  # says that it has 1,000 bytes
    with pytest.raises(ValueError, match="CRC"):
        read_npz(path, NAMES, 10 * 2**20)
    patched(path, b"PK\1\2", 24, struct.pack("<I", 4_000_000_000))
    with pytest.raises(ValueError, match="its arrays have 3815 MiB"):
        read_npz(path, NAMES)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 5_000_000


def test_archives_that_are_none(tmp_path: Path) -> None:
    """Oracle: each kind of damage, and an archive of so many members that its table alone takes memory."""
    path = tmp_path / "a.npz"
    for data in (b"", b"PK\3\4", b"PK\5\6" + bytes(10), b"\x93NUMPY" * 9):
        path.write_bytes(data)
        with pytest.raises(ValueError, match="no zip archive"):
            read_npz(path, NAMES)
    with zipfile.ZipFile(path, "w") as archive:
        for number in range(6000):
            archive.writestr(f"{number}.npy", b"")
    with pytest.raises(ValueError, match="too many members"):
        read_npz(path, NAMES)
    npz(path, npy())
    patched(path, b"PK\1\2", 10, struct.pack("<H", 99))  # a method of compression that there is not
    with pytest.raises(ValueError, match="not supported"):
        read_npz(path, NAMES)
    npz(path, npy())
    patched(path, b"PK\1\2", 8, struct.pack("<H", 1))  # encrypted
    with pytest.raises(ValueError, match="encrypted"):
        read_npz(path, NAMES)


# ---- calibration lists and class names -----------------------------------------------------------------------------


def listed(**changes: Any) -> bytes:
    record = {
        "schema": "bdexport.calibration-list/1",
        "dataset": "digits",
        "split": "train",
        "shape": [8, 8, 3],
        "rows": [0, 1],
        "files": None,
        "sha256": "0" * 64,
    }
    return json.dumps(record | changes).encode()


LISTS = {
    "more bytes than a list has": (b" " * MAX_LIST_BYTES + listed(), "larger than 4 MiB"),
    "more rows than a list has": (listed(rows=list(range(MAX_LIST_ENTRIES + 1))), "got 100001 rows"),
    "an image a hundred times": (listed(rows=[7] * 100), "got an image twice"),
    "a file twice": (listed(rows=[1, 2], files=["a.png", "a.png"], shape=None), "got an image twice"),
    "a row below": (listed(rows=[-1]), "rows"),
    "rows that are texts": (listed(rows=["a"]), "rows"),
    "nested lists": (b'{"rows": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "nested|calibration list"),
    "nothing": (b"", "empty"),
    "half of a list": (listed()[:50], "not JSON"),
}


@pytest.mark.parametrize("name", LISTS)
def test_a_calibration_list_that_is_none(tmp_path: Path, name: str) -> None:
    """Oracle: what is wrong with each list."""
    data, message = LISTS[name]
    (tmp_path / "list.json").write_bytes(data)
    with pytest.raises(CalibrationError, match=message) as caught:
        read_list(tmp_path / "list.json")
    assert "list.json" in str(caught.value)


def test_a_list_names_images_that_are_no_files(tmp_path: Path) -> None:
    """Oracle: a FIFO among the images is refused when its bytes are hashed, which would wait for a writer for ever."""
    for name in ("a/1.png", "a/2.png", "b/1.png", "b/2.png"):
        path = tmp_path / "train" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png(8, 8))
    (tmp_path / "val").symlink_to(tmp_path / "train")
    chosen = make_list("folder", tmp_path, CalibrationConfig(images=4))
    assert list_images(chosen, tmp_path, Preprocess()).shape == (4, 32, 32, 3)
    (tmp_path / "train/a/1.png").unlink()
    os.mkfifo(tmp_path / "train/a/1.png")
    with pytest.raises(ImageError, match=r"1\.png: cannot be read \(not a regular file\)"):
        list_images(chosen, tmp_path, Preprocess())
    with pytest.raises(ImageError, match=r"1\.png: cannot be read \(not a regular file\)"):
        make_list("folder", tmp_path, CalibrationConfig(images=4))


def test_a_list_that_could_not_be_read_is_not_written(tmp_path: Path) -> None:
    """Oracle: the reader's limits."""
    names = tuple(f"{number}{'a' * 200}" for number in range(30_000))
    with pytest.raises(CalibrationError, match="the list is too long"):
        write_list(tmp_path / "a.json", CalibrationList("folder", "train", None, tuple(range(30_000)), names, "0"))
    assert not (tmp_path / "a.json").exists()
    with pytest.raises(UsageError, match="expected 1 to 100000"):
        make_list("digits", None, CalibrationConfig(images=MAX_LIST_ENTRIES + 1))


@pytest.mark.timeout(20)
@pytest.mark.parametrize("kind", ["fifo", "device", "folder", "dangling", "circle", "long", "nul"])
def test_lists_and_names_from_what_is_no_file(tmp_path: Path, kind: str) -> None:
    """Oracle: an error of this package from every reader, at once."""
    path = tmp_path / kind
    makers: dict[str, Callable[[], Any]] = {
        "fifo": lambda: os.mkfifo(path),
        "device": lambda: path.symlink_to("/dev/zero"),
        "folder": path.mkdir,
        "dangling": lambda: path.symlink_to(tmp_path / "missing"),
        "circle": lambda: path.symlink_to(path),
    }
    makers.get(kind, lambda: None)()
    path = {"long": Path("a" * 5000), "nul": Path("a\0b")}.get(kind, path)
    for read in (read_list, read_class_names):
        with pytest.raises((CalibrationError, UsageError)) as caught:
            read(path)
        assert len(str(caught.value)) < 1000
    with pytest.raises(OSError), open_regular(path):  # noqa: PT011 (each kind has its own number)
        pass


def test_names_of_a_bounded_file(tmp_path: Path) -> None:
    """Oracle: 3 MB of names are refused; 20,000 names are read."""
    (tmp_path / "a.txt").write_text("name\n" * 600_000)
    with pytest.raises(UsageError, match="larger than 2 MiB"):
        read_class_names(tmp_path / "a.txt")
    (tmp_path / "a.txt").write_text("\n".join(map(str, range(20_000))))
    assert len(read_class_names(tmp_path / "a.txt")) == 20_000


def test_read_bytes(tmp_path: Path) -> None:
    """Oracle: the limit itself and one byte more; a file of the kernel's, whose size is said to be 0."""
    (tmp_path / "a").write_bytes(bytes(100))
    assert len(read_bytes(tmp_path / "a", 100)) == 100
    with pytest.raises(OSError, match="larger than"):
        read_bytes(tmp_path / "a", 99)
    if Path("/proc/self/maps").exists():
        with pytest.raises(OSError, match="larger than"):
            read_bytes(Path("/proc/self/maps"), 10)


def test_a_long_name_is_cut_in_a_message() -> None:
    """Oracle: both ends of the name, and control characters escaped."""
    text = shown(Path("a" * 3000 + "\n/end.png"))
    assert len(text) < 600
    assert text.startswith("aaa")
    assert text.endswith("\\n/end.png")


# ---- folders -------------------------------------------------------------------------------------------------------


@contextmanager
def deep(root: Path, name: str, depth: int) -> Iterator[None]:
    """A folder of this name in another .., with an image in the last; removed afterwards: pytest itself could not."""
    here = os.open(root, os.O_RDONLY)
    for _ in range(depth):
        os.mkdir(name, dir_fd=here)
        inner = os.open(name, os.O_RDONLY, dir_fd=here)
        os.close(here)
        here = inner
    handle = os.open("deep.png", os.O_WRONLY | os.O_CREAT, dir_fd=here)
    os.close(handle)
    os.close(here)
    try:
        yield
    finally:
        for _ in range(depth - 1):
            os.rename(root / name / name, root / "rest")
            os.rmdir(root / name)
            os.rename(root / "rest", root / name)


def test_folders_in_folders_and_links_in_circles(tmp_path: Path) -> None:
    """Oracle: images are found once, by the name of the place where they are, below 1,100 folders and any links."""
    for place in ("a", "b/c"):
        (tmp_path / place).mkdir(parents=True)
        (tmp_path / place / "1.png").write_bytes(b"")
    (tmp_path / "a/up").symlink_to(tmp_path)
    (tmp_path / "a/itself").symlink_to(tmp_path / "a/itself")
    (tmp_path / "a/0").symlink_to(tmp_path / "b/c")
    (tmp_path / "b/c/back").symlink_to(tmp_path / "b")
    with deep(tmp_path, "d", 1100):
        found = [path.relative_to(tmp_path).as_posix() for path in image_files(tmp_path, recursive=True)]
    assert found == ["a/0/1.png", "a/1.png", "d/" * 1100 + "deep.png"]


def test_a_folder_that_the_system_cannot_name(tmp_path: Path) -> None:
    """Oracle: folders in each other whose name together has more than 4,096 bytes: an error, no traceback."""
    with deep(tmp_path, "d" * 250, 20), pytest.raises(DatasetError, match="File name too long") as caught:
        image_files(tmp_path, recursive=True)
    assert len(str(caught.value)) < 1000


def test_entries_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: of 50 entries, hidden ones and other kinds too, a limit of 50 and of 49; an entry takes little memory."""
    for number in range(25):
        (tmp_path / f"{number}.png").write_bytes(b"")
        (tmp_path / f".{number}.txt").write_bytes(b"")
    monkeypatch.setattr(folder, "MAX_FOLDER_ENTRIES", 50)
    assert len(image_files(tmp_path)) == 25
    monkeypatch.setattr(folder, "MAX_FOLDER_ENTRIES", 49)
    with pytest.raises(DatasetError, match="too many files: got more than 49 entries"):
        image_files(tmp_path)


def test_a_class_of_many_images_takes_bounded_memory(tmp_path: Path) -> None:
    """Oracle: at most 1 KB for an entry, 5 GB for as many as are accepted; measured by Python's own count."""
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for number in range(1000):
            os.close(os.open(tmp_path / name / f"{number}.png", os.O_CREAT | os.O_WRONLY))
    tracemalloc.start()
    found = load_dataset("folder", tmp_path, "train")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(found) == 1600
    assert peak / 2000 < 1000, f"{peak / 2000:.0f} bytes for an entry"


def test_errors_are_this_packages(tmp_path: Path) -> None:
    """Oracle: whatever stands at a class's place, reading the folder ends in an error with a remedy or in images."""
    (tmp_path / "a").mkdir()
    (tmp_path / "b").symlink_to(tmp_path / "b")
    os.mkfifo(tmp_path / "c")
    with pytest.raises(BdexportError, match="too few classes"):
        load_dataset("folder", tmp_path)


@pytest.mark.timeout(20)
def test_other_data_that_are_no_regular_files(tmp_path: Path) -> None:
    """Oracle: an error of this package at once, for a batch of CIFAR and a checkpoint that are FIFOs."""
    from bdexport.checkpoint import load_checkpoint

    for name in ("batches.meta", "test_batch", "model.th"):
        os.mkfifo(tmp_path / name)
    for read in (
        lambda: load_dataset("cifar10", tmp_path),
        lambda: load_checkpoint(tmp_path / "model.th"),
    ):
        with pytest.raises(BdexportError, match="not a regular file"):
            read()


@pytest.mark.parametrize("name", ["a" * 5000, "a\0b"])
def test_names_that_no_file_can_have(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Oracle: UsageError in a short line, from what reads and from what writes."""
    import bdexport
    from bdexport.bundle import open_bundle
    from bdexport.checkpoint import load_checkpoint
    from bdexport.files import check_writable, making_folder, refuse_existing, write_text

    monkeypatch.chdir(tmp_path)
    path = Path(name)

    def make() -> None:
        with making_folder(path):
            pass

    calls: list[Callable[[], object]] = [
        lambda: bdexport.load(path),
        lambda: open_bundle(name),
        lambda: load_checkpoint(path),
        lambda: read_list(path),
        lambda: load_dataset("folder", path),
        lambda: check_writable(path),
        lambda: refuse_existing(path, False),
        lambda: write_text(path, ""),
        make,
    ]
    for call in calls:
        with pytest.raises(UsageError) as caught:
            call()
        assert len(str(caught.value)) < 700
        assert str(caught.value).isprintable()
    assert list(tmp_path.iterdir()) == []
