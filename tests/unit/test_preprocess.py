"""Geometry and normalisation against Pillow's own operations and float64 arithmetic; every kind of image file."""

from __future__ import annotations

import json
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from bdexport.errors import ImageError, InputError
from bdexport.preprocess import EXIF_ORIENTATION, Preprocess, preprocess_from_json, read_image

IMAGENET = Preprocess(size=(224, 224), resize_short=256)


def noise(*shape: int, seed: int = 0) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def smooth(width: int, height: int) -> Image.Image:
    """A gradient: JPEG and resampling keep it nearly as it is."""
    x, y = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    return Image.fromarray(np.stack([x, y, (x + y) / 2], axis=-1).round().astype(np.uint8))


# ---- normalisation -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [1, 3])
def test_normalise_matches_float64(batch: int) -> None:
    """Oracle: (pixel / 255 - mean) / std in float64, transposed; all 256 values occur."""
    pre = Preprocess(size=(16, 48), mean=(0.1, 0.5, 0.9), std=(0.2, 0.25, 1.0))
    images = noise(batch, 16, 48, 3)
    expected = ((images / 255.0 - np.array(pre.mean)) / np.array(pre.std)).transpose(0, 3, 1, 2)
    result = pre.normalise(images)
    difference = np.abs(result - expected)
    assert difference.max() < 1e-6, f"largest {difference.max():.3g}, mean {difference.mean():.3g}"
    assert result.dtype == np.float32
    assert result.flags.c_contiguous


def test_normalise_of_a_view_equals_that_of_a_copy() -> None:
    """Invariant: the memory layout of the input does not matter (every second image, mirrored)."""
    pre, view = Preprocess(), noise(6, 32, 32, 3)[::2, :, ::-1]
    np.testing.assert_array_equal(pre(view), pre(view.copy()))


def test_call_does_not_touch_its_input() -> None:
    """Invariant: the caller's pixels are the caller's."""
    images = noise(2, 32, 32, 3)
    before = images.copy()
    Preprocess()(images)
    np.testing.assert_array_equal(images, before)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (np.zeros((1, 32, 32, 3), np.float32), "wrong dtype: got float32, expected uint8"),
        (np.zeros((32, 32, 3), np.uint8), "wrong shape: got (32, 32, 3), expected (N, height, width, 3)"),
        (np.zeros((1, 3, 32, 32), np.uint8), "wrong shape: got (1, 3, 32, 32)"),
        (np.zeros((1, 32, 32, 4), np.uint8), "wrong shape: got (1, 32, 32, 4)"),
        (np.zeros((0, 32, 32, 3), np.uint8), "empty batch"),
        (np.zeros((0, 8, 8, 3), np.uint8), "empty batch"),
        (np.zeros((1, 0, 32, 3), np.uint8), "empty batch"),
    ],
)
def test_arrays_that_are_no_images_are_refused(images: NDArray[np.uint8], message: str) -> None:
    """Oracle: the rule, uint8 (N, height, width, 3) with at least one pixel."""
    with pytest.raises(InputError) as caught:
        Preprocess()(images)
    assert message in str(caught.value)


# ---- geometry ------------------------------------------------------------------------------------------------------


def test_array_of_the_right_size_is_returned_as_it_is() -> None:
    """Invariant: fitting twice is fitting once, also with a crop; nothing is copied on the hot path."""
    for pre in (Preprocess(), Preprocess(resize_short=40)):
        images = noise(2, 32, 32, 3)
        assert pre.fit_array(images) is images


def test_array_of_another_size_is_fitted_like_images() -> None:
    """Oracle: Pillow's resize of each image."""
    images = noise(3, 8, 8, 3)
    expected = [np.asarray(Image.fromarray(image).resize((32, 32), Image.Resampling.BILINEAR)) for image in images]
    np.testing.assert_array_equal(Preprocess().fit_array(images), np.stack(expected))


@pytest.mark.parametrize(("width", "height"), [(500, 333), (333, 500), (256, 256), (224, 224), (97, 61), (1, 1)])
@pytest.mark.parametrize("resampling", ["bilinear", "bicubic"])
def test_short_side_then_centre_crop(width: int, height: int, resampling: str) -> None:
    """Oracle: the two steps one after the other, the whole scaled image made (as torchvision does).

    Pillow takes the box in float32, so that its filter may begin one pixel earlier or later in a row or column.
    """
    pre = Preprocess(size=(224, 224), resize_short=256, resampling=resampling)  # type: ignore[arg-type]
    image = Image.fromarray(noise(height, width, 3))
    scale = 256 / min(width, height)
    scaled = image.resize((round(width * scale), round(height * scale)), Image.Resampling[resampling.upper()])
    left, top = (scaled.width - 224) // 2, (scaled.height - 224) // 2
    expected = np.asarray(scaled.crop((left, top, left + 224, top + 224))).astype(int)
    difference = np.abs(pre.fit_image(image) - expected)
    assert (difference > 1).mean() < 0.02, f"largest {difference.max()}, mean {difference.mean():.3f}"
    assert difference.max() <= 16


@pytest.mark.parametrize("size", [(1, 20_000), (20_000, 1)])
def test_huge_aspect_ratio_needs_no_huge_image(size: tuple[int, int]) -> None:
    """Oracle: one colour stays that colour; the scaled strip would have 1.3e9 pixels, which Pillow would refuse."""
    image = Image.new("RGB", size, (10, 20, 30))
    for pre in (IMAGENET, Preprocess()):
        fitted = pre.fit_image(image)
        assert fitted.shape == (*pre.size, 3)
        assert (fitted == (10, 20, 30)).all()


def test_one_pixel_fills_the_image() -> None:
    """Oracle: its colour everywhere."""
    assert (Preprocess().fit_image(Image.new("RGB", (1, 1), (1, 2, 3))) == (1, 2, 3)).all()


# ---- colour --------------------------------------------------------------------------------------------------------


def fitted_pixel(image: Image.Image) -> list[int]:
    """The one colour of a one-colour image after fitting."""
    pixels: list[int] = Preprocess(size=(4, 4)).fit_image(image)[1, 1].tolist()
    return pixels


@pytest.mark.parametrize(
    ("mode", "colour", "expected"),
    [
        ("1", 1, [255, 255, 255]),
        ("L", 77, [77, 77, 77]),
        ("LA", (77, 0), [255, 255, 255]),
        ("RGB", (1, 2, 3), [1, 2, 3]),
        ("RGBA", (1, 2, 3, 255), [1, 2, 3]),
        ("RGBA", (1, 2, 3, 0), [255, 255, 255]),
        ("RGBa", (0, 0, 0, 0), [255, 255, 255]),
        ("CMYK", (0, 0, 0, 0), [255, 255, 255]),
        ("CMYK", (255, 0, 0, 0), [0, 255, 255]),
        ("CMYK", (0, 0, 0, 255), [0, 0, 0]),
        ("I;16", 0xABCD, [0xAB, 0xAB, 0xAB]),
        ("I;16", 200, [1, 1, 1]),  # dark, and it stays dark
        ("I", 65535, [255, 255, 255]),
        ("I", 200, [200, 200, 200]),
        ("I", -5, [0, 0, 0]),
        ("F", 0.5, [128, 128, 128]),
        ("F", 128.0, [128, 128, 128]),
    ],
)
def test_every_mode_becomes_rgb(mode: str, colour: int, expected: list[int]) -> None:
    """Oracle: the colour written down by hand; transparency shows white, 16 bits keep the upper 8."""
    result = fitted_pixel(Image.new(mode, (4, 4), colour))
    assert np.abs(np.array(result) - expected).max() <= 1, result


def test_palette_with_transparency() -> None:
    """Oracle: the transparent entry shows white, the other its own colour."""
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 40, 50, 60])
    image.putpixel((1, 0), 1)
    image.info["transparency"] = 0
    fitted = Preprocess(size=(1, 2)).fit_image(image)
    assert fitted.tolist() == [[[255, 255, 255], [40, 50, 60]]]


def test_rgb_with_a_transparent_colour(tmp_path: Path) -> None:
    """Oracle: a PNG's tRNS colour shows white."""
    image = Image.fromarray(np.array([[[9, 9, 9], [1, 2, 3]]], np.uint8))
    image.save(tmp_path / "a.png", transparency=(9, 9, 9))
    fitted = Preprocess(size=(1, 2)).fit_image(read_image(tmp_path / "a.png"))
    assert fitted.tolist() == [[[255, 255, 255], [1, 2, 3]]]


def test_float_image_with_nan_is_refused() -> None:
    """Oracle: NaN has no colour."""
    with pytest.raises(ImageError, match="NaN"):
        Preprocess().fit_image(Image.fromarray(np.full((4, 4), np.nan, np.float32)))


# ---- files ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "bmp", "gif", "tif", "ppm"])
def test_image_is_usable_after_its_file_is_gone(tmp_path: Path, suffix: str) -> None:
    """Oracle: the picture that was saved, read back when the file no longer exists."""
    path = tmp_path / f"a.{suffix}"
    smooth(40, 30).save(path)
    image = read_image(path)
    path.unlink()
    fitted = Preprocess(size=(30, 40)).fit_image(image).astype(int)
    difference = np.abs(fitted - np.asarray(smooth(40, 30)))
    assert difference.mean() < 6, f"largest {difference.max()}, mean {difference.mean():.2f}"


def test_16_bit_grey_png(tmp_path: Path) -> None:
    """Oracle: value / 65535 of white, whatever mode this version of Pillow opens it in."""
    values = np.linspace(0, 65535, 16).astype(np.uint16).reshape(4, 4)
    Image.fromarray(values).save(tmp_path / "a.png")
    fitted = Preprocess(size=(4, 4)).fit_image(read_image(tmp_path / "a.png"))
    assert np.abs(fitted[..., 0] - values / 257).max() <= 0.51


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tif"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(tmp_path: Path, suffix: str, orientation: int) -> None:
    """Oracle: the corner that holds red. TIFF 6.0, tag 274: where row 0 and column 0 of the stored image are shown."""
    stored = np.zeros((16, 24, 3), np.uint8)
    stored[:8, :8] = (255, 0, 0)  # at row 0, column 0
    exif = Image.Exif()
    exif[EXIF_ORIENTATION] = orientation
    path = tmp_path / f"a.{suffix}"
    Image.fromarray(stored).save(path, exif=exif)
    shown = np.asarray(read_image(path).convert("RGB"))
    corner = {1: "tl", 2: "tr", 3: "br", 4: "bl", 5: "tl", 6: "tr", 7: "br", 8: "bl"}[orientation]
    red = shown[3 if corner[0] == "t" else -4, 3 if corner[1] == "l" else -4]
    assert red[0] > 200
    assert shown.shape == ((24, 16, 3) if orientation >= 5 else (16, 24, 3))


def test_animated_gif_gives_its_first_frame(tmp_path: Path) -> None:
    """Oracle: the first frame's colour."""
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    assert fitted_pixel(read_image(tmp_path / "a.gif")) == [255, 0, 0]


def test_cmyk_jpeg(tmp_path: Path) -> None:
    """Oracle: full cyan is (0, 255, 255), also through a file (some decoders return it inverted)."""
    Image.new("CMYK", (16, 16), (255, 0, 0, 0)).save(tmp_path / "a.jpg")
    assert np.abs(np.array(fitted_pixel(read_image(tmp_path / "a.jpg"))) - [0, 255, 255]).max() <= 3


@pytest.mark.parametrize("suffix", ["jpg", "png", "gif", "bmp", "webp", "tif"])
@pytest.mark.parametrize("share", [0.05, 0.5, 0.9])
def test_truncated_file_is_named(tmp_path: Path, suffix: str, share: float) -> None:
    """Oracle: a file cut off is an error that names it, never a half-grey image."""
    path = tmp_path / f"cut.{suffix}"
    Image.fromarray(noise(64, 64, 3)).save(path)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(ImageError, match=f"cut.{suffix}"):
        read_image(path)


@pytest.mark.parametrize("suffix", ["jpg", "png", "gif", "webp", "tif", "bmp"])
def test_damaged_file_is_an_image_error_or_an_image(tmp_path: Path, suffix: str) -> None:
    """Property: whatever 60 random damages do to a file, the outcome is an image or an ImageError naming the file."""
    path = tmp_path / f"bad.{suffix}"
    exif = Image.Exif()
    exif[EXIF_ORIENTATION] = 6
    smooth(32, 24).save(path, exif=exif)  # GIF and BMP have none and ignore it
    data, rng = path.read_bytes(), np.random.default_rng(1)
    for _ in range(60):
        damaged = bytearray(data)
        for position in rng.integers(0, min(len(data), 300), 4):
            damaged[position] = int(rng.integers(0, 256))
        path.write_bytes(damaged)
        try:
            assert min(read_image(path).size) > 0
        except ImageError as error:
            assert f"bad.{suffix}" in str(error)  # noqa: PT017 (both outcomes are right)


@pytest.mark.parametrize("content", [b"", b"not an image"])
def test_other_content_is_named(tmp_path: Path, content: bytes) -> None:
    """Oracle: the sentence says what it is not."""
    (tmp_path / "a.png").write_bytes(content)
    with pytest.raises(ImageError, match="not an image that Pillow can decode"):
        read_image(tmp_path / "a.png")


def test_missing_file_and_folder(tmp_path: Path) -> None:
    """Oracle: each is said to be what it is."""
    with pytest.raises(ImageError, match="no such file"):
        read_image(tmp_path / "a.png")
    with pytest.raises(ImageError, match="Is a directory"):
        read_image(tmp_path)


@pytest.mark.parametrize("side", [10_000, 30_000])
def test_decompression_bomb_is_refused(tmp_path: Path, side: int) -> None:
    """Oracle: a PNG of a few bytes that claims 1e8 or 9e8 pixels is refused before it is decoded.

    Below twice its limit Pillow only warns; warnings are errors in this suite, which is how both are seen here.
    """
    header = struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(bytes(1000))), (b"IEND", b"")]
    data = b"\x89PNG\r\n\x1a\n"
    for kind, content in chunks:
        data += struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
    (tmp_path / "bomb.png").write_bytes(data)
    with pytest.raises(ImageError, match=r"bomb\.png: too large to decode safely"):
        read_image(tmp_path / "bomb.png")


# ---- settings ------------------------------------------------------------------------------------------------------


def test_json_round_trip() -> None:
    """Oracle: equality after real JSON text, also once the cached constants exist."""
    pre = Preprocess((48, 64), (0.1, 0.2, 0.3), (0.4, 0.5, 0.6), "bicubic", 56)
    pre.normalise(noise(1, 48, 64, 3))
    assert preprocess_from_json(json.loads(json.dumps(pre.to_json()))) == pre
    assert preprocess_from_json(json.loads(json.dumps(Preprocess().to_json()))) == Preprocess()


@pytest.mark.parametrize(
    "wrong",
    [
        {"size": [0, 32]},
        {"size": [32, 5000]},
        {"std": [0.1, 0.0, 0.1]},
        {"mean": [0.1, float("nan"), 0.1]},
        {"std": [0.1, float("inf"), 0.1]},
        {"resampling": "nearest"},
        {"resize_short": 0},
        {"resize_short": "256"},
        {"size": None},
    ],
)
def test_settings_that_make_no_sense_are_refused(wrong: dict[str, object]) -> None:
    """Oracle: the documented exceptions of the reader, one wrong value at a time."""
    with pytest.raises((InputError, ValueError, TypeError)):
        preprocess_from_json(Preprocess().to_json() | wrong)


def test_transparency_of_deep_grey_shows_white(tmp_path: Path) -> None:
    """Oracle: the rule for 8 bits: the level that a PNG calls transparent is white, its neighbours stay."""
    levels = np.array([[1000, 1001], [30000, 65535]], dtype=np.uint16)
    Image.fromarray(levels).save(tmp_path / "deep.png", transparency=1000)
    grey = Preprocess((2, 2)).fit_image(read_image(tmp_path / "deep.png"))
    assert (grey == np.array([[255, 4], [117, 255]])[..., None]).all()
