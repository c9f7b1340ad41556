"""Image files that somebody else made: nothing is started, the memory is bounded, and every error names the file."""

from __future__ import annotations

import ast
import hashlib
import inspect
import os
import threading
import warnings
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from subprocess import SubprocessError

import numpy as np
import pytest
from bundles import make_bundle
from image_cases import EPS, ORDINARY, chunk, jpeg_of_scans, png
from PIL import Image
from tiny import tiny_model

import bdexport
from bdexport import image_files, preprocess
from bdexport.backends.null import NullBackend
from bdexport.cli.app import COMMANDS
from bdexport.cli.main import main
from bdexport.dataset import Dataset, load_dataset, load_images
from bdexport.errors import ImageError, UsageError
from bdexport.image_files import FORMATS, jpeg_scans, open_image
from bdexport.limits import MAX_JPEG_SCANS
from bdexport.preprocess import Preprocess, read_image

PACKAGE = Path(bdexport.__file__).parent
FROZEN = {  # SHA-256 of the RGB pixels, computed before images were converted in bands
    "rgb.png": "f21e1760617d",
    "rgb.bmp": "f21e1760617d",
    "rgb.ppm": "f21e1760617d",
    "rgb.tif": "f21e1760617d",
    "rgb.tga": "f21e1760617d",
    "turned.png": "92f78936dc28",
    "turned.tif": "f233d1bc2a0d",
    "grey.png": "71e9c0bb4f79",
    "one.png": "2e1b1b36fa09",
    "alpha.png": "e571adae15e2",
    "alpha_turned.png": "54df30f3b9ae",
    "alpha.webp": "e571adae15e2",
    "grey_alpha.png": "db8d57aed8d6",
    "palette.png": "41b00402fde6",
    "palette.gif": "41b00402fde6",
    "palette_level.png": "06a99948e6d2",
    "palette_levels.png": "4370a32b8b32",
    "colour_level.png": "2309e67cb502",
    "grey_level.png": "ab8b5d4ececf",
    "deep.png": "2e2620b749bf",
    "deep_turned.png": "99998c2f6d98",
    "deep_level.png": "dee928ab11e8",
    "deep.tif": "2e2620b749bf",
    "wide.tif": "39ad7ea3d4ce",
    "unit.tif": "71e9c0bb4f79",
    "bytes.tif": "71e9c0bb4f79",
    "words.tif": "71e9c0bb4f79",
    "cmyk.tif": "b2a7f3cd175a",
}


@pytest.fixture
def trap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The trace that is left where something runs Ghostscript."""
    trace, folder = tmp_path / "trace", tmp_path / "bin"
    folder.mkdir()
    for name in ("gs", "gswin32c", "gswin64c"):
        (folder / name).write_text(f"#!/bin/sh\necho started >> {trace}\nexit 1\n")
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    monkeypatch.setattr("PIL.EpsImagePlugin.gs_binary", None)
    return trace


# ---- which formats -------------------------------------------------------------------------------------------------


@pytest.mark.skipif(os.name != "posix", reason="the trap is a shell script")
@pytest.mark.parametrize("name", ["photo.png", "photo.jpg", "photo.eps", "photo"])
def test_no_file_starts_a_program(trap: Path, tmp_path: Path, name: str) -> None:
    """Oracle: the trap, which Pillow's own reading of the same file springs."""
    (tmp_path / name).write_bytes(EPS)
    with pytest.raises(ImageError, match=f"{name}: not an image that Pillow can decode"):
        read_image(tmp_path / name)
    with pytest.raises(ImageError, match=name):
        load_images(tmp_path / name, Preprocess())
    assert not trap.exists()
    with suppress(OSError, SubprocessError), Image.open(tmp_path / name) as image:
        image.load()
    assert trap.exists()


def test_images_are_opened_in_one_place() -> None:
    """Oracle: the package's syntax trees: one call of Image.open, with the list of formats; no other reader."""
    calls = []
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and node.attr in ("open", "open_image", "imread", "imageio"):
                owner = ast.unparse(node.value).rpartition(".")[2]
                if owner in ("Image", "PIL", "ImageFile", "plt", "image", "iio", "cv2"):
                    calls.append(f"{path.relative_to(PACKAGE)}: {ast.unparse(node)}")
            if isinstance(node, ast.ImportFrom) and node.module == "PIL.Image":
                assert "open" not in [name.name for name in node.names], path
    assert calls == ["image_files.py: Image.open"]
    assert "formats=_formats()" in Path(image_files.__file__).read_text()
    assert set(image_files._formats()) <= set(FORMATS)
    assert not {"EPS", "WMF", "PDF", "MPEG", "GRIB", "HDF5", "BUFR", "FITS", "ICNS", "PSD"} & set(FORMATS)


# ---- what ordinary images become -----------------------------------------------------------------------------------


@pytest.mark.parametrize("bands", [1_000_000, 100])
def test_every_kind_of_image_gives_the_pixels_that_it_gave(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bands: int
) -> None:
    """Frozen: the pixels of 28 lossless files of every mode, whole and in bands of two rows.

    ``turned.tif`` is the exception: Pillow, given a name instead of an open file, gave the bytes in another order.
    """
    monkeypatch.setattr(preprocess, "BAND_PIXELS", bands)
    found = {}
    for name, write in ORDINARY.items():
        write(tmp_path / name)
        image = read_image(tmp_path / name)
        assert image.mode == "RGB"
        found[name] = hashlib.sha256(np.asarray(image).tobytes()).hexdigest()[:12]
    assert found == FROZEN


def test_bands_hold_a_level_of_white_for_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: one bright pixel in the last row decides what white is for the first, whatever the bands are."""
    values = np.full((40, 10), 0.5, np.float32)
    values[-1, -1] = 200
    Image.fromarray(values).save(tmp_path / "a.tif")
    monkeypatch.setattr(preprocess, "BAND_PIXELS", 20)
    grey = np.asarray(read_image(tmp_path / "a.tif"))
    assert (int(grey[0, 0, 0]), int(grey[-1, -1, 0])) == (0, 200)


# ---- how many pixels -----------------------------------------------------------------------------------------------


def test_a_16_bit_png_of_177_megapixels_is_refused_before_it_is_decoded(tmp_path: Path) -> None:
    """Oracle: the file claims what it does not have, so that decoding it would say that it is damaged."""
    path = tmp_path / "large.png"
    path.write_bytes(png(13_300, 13_300, 16, rows=False))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        with pytest.raises(ImageError) as caught:
            read_image(path)
    text = str(caught.value)
    assert "large.png: too large to decode safely: got 13300 x 13300 = 176890000 pixels" in text
    assert "expected at most 120000000 pixels" in text
    assert "--max-pixels" in text


@pytest.mark.parametrize(("name", "share"), [("a.png", 1), ("a.jpg", 1), ("a.webp", 2), ("a.gif", 1)])
def test_max_pixels(tmp_path: Path, name: str, share: int) -> None:
    """Oracle: the number of pixels, and one less; formats whose decoders take more memory may have half."""
    Image.new("RGB", (40, 30), (1, 2, 3)).save(tmp_path / name)
    assert read_image(tmp_path / name, max_pixels=1200 * share).size == (40, 30)
    with pytest.raises(ImageError, match=f"{name}: too large"):
        read_image(tmp_path / name, max_pixels=1200 * share - 1)
    with pytest.raises(ImageError, match=f"{name}: too large"):
        load_images([tmp_path / name], Preprocess(), max_pixels=1000)


def test_a_data_set_keeps_its_limit(tmp_path: Path) -> None:
    """Oracle: images of 100 pixels, with a limit of 100 and of 99; a data set without files refuses the option."""
    for name in ("a/1.png", "a/2.png", "b/1.png", "b/2.png"):
        path = tmp_path / "test" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (10, 10)).save(path)
    assert len(load_dataset("folder", tmp_path, max_pixels=100).first(2).arrays(Preprocess())) == 2
    small = load_dataset("folder", tmp_path, max_pixels=99)
    with pytest.raises(ImageError, match=r"1\.png: too large.*at most 99 pixels"):
        small.take([0]).images()
    with pytest.raises(ImageError, match=r"1\.png: too large.*at most 99 pixels"):
        small.first(3).arrays(Preprocess())
    for wrong in (0, -1, 1.5, True, "9"):
        with pytest.raises(UsageError, match="max_pixels"):
            load_dataset("folder", tmp_path, max_pixels=wrong)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="--max-pixels has no effect with data set digits"):
        load_dataset("digits", max_pixels=100)


def test_a_larger_limit_than_pillows_holds_for_one_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: Pillow refuses twice its own limit, which is a global of the process: as it was afterwards."""
    Image.new("RGB", (40, 30)).save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(ImageError, match=r"a\.png: too large"):
        read_image(tmp_path / "a.png", max_pixels=200)
    assert read_image(tmp_path / "a.png", max_pixels=2000).size == (40, 30)
    assert Image.MAX_IMAGE_PIXELS == 100


def test_a_small_image_in_a_huge_file_is_refused(tmp_path: Path) -> None:
    """Oracle: a file of 300 MB, of which the disk holds nothing: read, it would be there twice."""
    path = tmp_path / "a.png"
    path.write_bytes(png(8, 8))
    os.truncate(path, 300_000_000)
    with pytest.raises(ImageError, match=r"a\.png: file too large for an image: got 300 MB, expected at most 67 MB"):
        read_image(path, max_pixels=1_000_000)
    assert read_image(path).size == (8, 8)


def test_large_images_wait_for_each_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: the most pixels that are in memory at once, of 24 images of 1,200 in eight threads, where 2,500 may."""
    shared, seen = image_files._Shared(2500), []
    monkeypatch.setattr(image_files, "_IN_MEMORY", shared)
    Image.new("RGB", (40, 30)).save(tmp_path / "a.png")
    Image.new("RGB", (100, 30)).save(tmp_path / "wide.png")  # alone, since it has more than all may

    def read(name: str) -> None:
        for _ in range(3):
            with open_image(tmp_path / name):
                seen.append(shared._used)

    threads = [threading.Thread(target=read, args=("wide.png" if n == 3 else "a.png",)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert (len(seen), shared._used) == (24, 0)
    assert set(seen) <= {1200, 2400, 3000}


# ---- what never ends -----------------------------------------------------------------------------------------------


def test_a_jpeg_of_many_scans_is_refused(tmp_path: Path) -> None:
    """Oracle: 10 KB that take libjpeg seconds are refused; what an encoder writes is not. The count is the file's."""
    path = tmp_path / "scans.jpg"
    path.write_bytes(jpeg_of_scans(9000, 1000))
    with pytest.raises(
        ImageError, match=r"scans\.jpg: refused, each scan .*got more than 100 scans, expected about 10"
    ):
        read_image(path)
    path.write_bytes(jpeg_of_scans(16, MAX_JPEG_SCANS - 10))
    assert read_image(path).size == (16, 16)
    for progressive, scans in ((False, 1), (True, 10)):
        Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)).save(
            path, progressive=progressive, quality=95
        )
        assert jpeg_scans(path.read_bytes()) == scans
        assert jpeg_scans(path.read_bytes() + b"\xff\xda" * 1000) == scans  # a film behind the image
        assert read_image(path).size == (64, 64)


@pytest.mark.parametrize("kind", [b"zTXt", b"iTXt", b"iCCP"])
def test_text_that_inflates_is_refused(tmp_path: Path, kind: bytes) -> None:
    """Oracle: 20 MB of nothing in 20 KB; Pillow inflates 1 MiB at most."""
    import zlib

    lead = b"XML:com.adobe.xmp\0\1\0\0\0" if kind == b"iTXt" else b"a\0\0"
    (tmp_path / "a.png").write_bytes(png(8, 8, extra=chunk(kind, lead + zlib.compress(bytes(20_000_000)))))
    with pytest.raises(ImageError, match=r"a\.png: damaged or unreadable image \(Decompressed data too large"):
        read_image(tmp_path / "a.png")


def test_only_the_first_of_many_frames_is_decoded(tmp_path: Path) -> None:
    """Oracle: frame 1 is red; the other 20,000 are damaged, which nobody sees who does not decode them."""
    Image.new("RGB", (8, 8), "red").save(tmp_path / "a.gif")
    data = (tmp_path / "a.gif").read_bytes()
    frame = b",\0\0\0\0\x08\0\x08\0\0\x02\x01\xff\0"
    (tmp_path / "a.gif").write_bytes(data[:-1] + frame * 20_000 + b";")
    assert np.asarray(read_image(tmp_path / "a.gif"))[0, 0].tolist() == [255, 0, 0]


# ---- what is no file -----------------------------------------------------------------------------------------------


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no FIFOs here")
@pytest.mark.timeout(20)
def test_what_is_no_regular_file_is_refused_at_once(tmp_path: Path) -> None:
    """Oracle: the kind of each; a FIFO that nobody writes to would keep a plain open() waiting for ever."""
    os.mkfifo(tmp_path / "fifo.png")
    (tmp_path / "device.png").symlink_to("/dev/zero")
    (tmp_path / "nowhere.png").symlink_to(tmp_path / "missing")
    (tmp_path / "circle.png").symlink_to(tmp_path / "circle.png")
    reasons = {
        "fifo.png": "not a regular file",
        "device.png": "not a regular file",
        "nowhere.png": "no such file",
        "circle.png": "symbolic links",
    }
    for name, reason in reasons.items():
        with pytest.raises(ImageError, match=f"{name}: .*{reason}"):
            read_image(tmp_path / name)
    with pytest.raises(ImageError, match="Is a directory"):
        read_image(tmp_path)


@pytest.mark.parametrize("name", ["a" * 5000, "a\0b.png", "\ud800.png"])
def test_names_that_no_file_can_have(tmp_path: Path, name: str) -> None:
    """Oracle: an error of this package, of one short line, from each function that takes a path of images."""
    for call in (
        lambda: read_image(Path(name)),
        lambda: load_images([Path(name)], Preprocess()),
        lambda: load_dataset("folder", Path(name)),
        lambda: load_dataset("cifar10", Path(name)),
    ):
        with pytest.raises((ImageError, UsageError)) as caught:
            call()
        assert len(str(caught.value)) < 800
        assert str(caught.value).isprintable() or "\ud800" in name


# ---- errors name the file ------------------------------------------------------------------------------------------


def test_errors_of_the_conversion_name_the_file(tmp_path: Path) -> None:
    """Oracle: pixels that have no colour are found after decoding, and the message has the file's name all the same."""
    values = np.zeros((4, 4), np.float32)
    values[0, 0] = np.nan
    Image.fromarray(values).save(tmp_path / "nan.tif")
    for read in (lambda: read_image(tmp_path / "nan.tif"), lambda: load_images(tmp_path / "nan.tif", Preprocess())):
        with pytest.raises(ImageError, match=r"nan\.tif: greyscale image of floats: NaN"):
            read()
    data = Dataset("x", "test", ("a",), np.zeros(1, np.int64), (tmp_path / "nan.tif",))
    with pytest.raises(ImageError, match=r"nan\.tif: greyscale"):
        data.images()


def test_lack_of_memory_names_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: what a decoder raises where there is no memory."""
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")

    def load(_self: object) -> None:
        raise MemoryError

    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", load)
    with pytest.raises(ImageError, match=r"a\.png: too large for this machine's memory"):
        read_image(tmp_path / "a.png")


# ---- the commands --------------------------------------------------------------------------------------------------


def test_every_command_that_reads_image_files_has_the_limit() -> None:
    """Oracle: the parameters of the commands themselves."""
    for name in COMMANDS:
        parameters = inspect.signature(getattr(import_module(f"bdexport.cli.{name}"), name)).parameters
        assert ("max_pixels" in parameters) == bool({"data", "image"} & set(parameters)), name


def test_run_goes_on_after_hostile_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Oracle: the file names in the lines of error, the class of the only ordinary image, and the exit code."""
    bundle = make_bundle(tmp_path / "bundle", tiny_model(), backend=NullBackend())
    folder = tmp_path / "images"
    folder.mkdir()
    Image.new("RGB", (40, 30)).save(folder / "good.png")
    Image.new("RGB", (50, 30)).save(folder / "large.png")
    (folder / "photo.png").write_bytes(EPS)
    (folder / "scans.jpg").write_bytes(jpeg_of_scans(500, 200))
    os.mkfifo(folder / "pipe.png")
    assert main(["run", str(bundle.path), str(folder), "--max-pixels", "1200"]) == 1
    said = capsys.readouterr()
    lines = said.err.splitlines()
    assert lines[-1] == "bdexport: error: 4 of 5 images were not read"
    for name in ("large.png", "photo.png", "scans.jpg", "pipe.png"):
        assert sum(f"not read: {folder / name}: " in line for line in lines) == 1
    assert f"{folder / 'good.png'}: " in said.out
    assert main(["run", str(bundle.path), str(folder / "large.png"), "--max-pixels", "1499"]) == 1
    assert "large.png: too large to decode safely: got 50 x 30 = 1500 pixels" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (
            ["evaluate", "zoo:resnet32-cifar10", "--dataset", "digits"],
            "--max-pixels has no effect with data set digits",
        ),
        (["build", "zoo:resnet32-cifar10", "--out", "x"], "--max-pixels has no effect without images"),
        (["report", "x.json", "--out", "x"], "--max-pixels has no effect without a data set"),
        (["profile", "x"], "--max-pixels has no effect with synthetic images"),
        (["verify", "x"], "--max-pixels has no effect without a data set"),
    ],
)
def test_a_limit_without_effect_is_refused(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: list[str], message: str
) -> None:
    """Oracle: the house's rule about options that would not be used."""
    monkeypatch.chdir(tmp_path)
    assert main([*line, "--max-pixels", "5"]) == 2
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "line",
    [
        ["run", "LONG", "x.png"],
        ["inspect", "LONG"],
        ["evaluate", "LONG", "--dataset", "digits"],
        ["report", "LONG", "--out", "x"],
        ["report", "LONG.json", "--out", "x"],
        ["report", "x", "--out", "LONG"],
        ["export", "zoo:resnet32-cifar10", "--out", "LONG"],
        ["calibrate", "x", "--list", "LONG"],
        ["train", "--arch", "resnet8", "--dataset", "folder", "--data", "LONG", "--out", "x"],
        ["inspect", "x", "--json", "LONG"],
    ],
)
def test_a_path_of_5000_characters_is_one_short_line(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: list[str]
) -> None:
    """Oracle: wrong usage, one line, cut in the middle; nothing is left."""
    monkeypatch.chdir(tmp_path)
    assert main([word.replace("LONG", "a" * 5000) for word in line]) == 2
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1
    assert said[0].startswith("bdexport: error: ")
    assert "File name too long: got 500" in said[0]
    assert len(said[0]) < 700
    assert list(tmp_path.iterdir()) == []
