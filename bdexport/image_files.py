"""The one place where an image file is opened: which formats, how many pixels, how much at a time. No torch.

Pillow reads about forty formats. Some of them start a program (EPS runs Ghostscript, whatever the file is called),
some are left to a plug-in that may or may not be there, and JPEG 2000 takes gigabytes for a few kilobytes.
:data:`FORMATS` are those that photographs and data sets come in; Pillow is not asked about any other.
"""

from __future__ import annotations

import io
import os
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from bdexport.errors import ImageError, UsageError
from bdexport.files import open_regular, shown
from bdexport.limits import (
    FILE_BYTES_PER_PIXEL,
    MAX_JPEG_SCANS,
    MAX_PIXELS,
    MAX_PNG_CHUNKS,
    MAX_TEXT_PPM_BYTES,
    MIN_IMAGE_BYTES,
    PIXEL_SHARE,
)

if TYPE_CHECKING:  # arrays of the network's size need no Pillow, and a machine that measures may not have it
    from PIL import Image

# Pillow's names. JPEG includes the MPO files of phones and stereo cameras, whose first image is read.
FORMATS = ("PNG", "JPEG", "WEBP", "AVIF", "GIF", "TIFF", "BMP", "DIB", "PPM", "TGA")
RAISE_LIMIT = "scale it down first, or allow more with --max-pixels (in Python: max_pixels)"
SAVE_AGAIN = "open it in a program for images and save it as PNG"

# What follows 0xFF in a JPEG stream and begins a segment that says its own length, or ends the image (0xD9). Smaller
# numbers have no meaning: a decoder passes over the two bytes where it looks for its place, and so must who counts.
_SEGMENT = re.compile(rb"\xff[\xc0-\xcf\xd9-\xfe]")
_END_OF_IMAGE, _SCAN = 0xD9, 0xDA
_TILE_SIDES = (322, 323)  # TIFF's tags TileWidth and TileLength


def check_max_pixels(max_pixels: int) -> int:
    """``max_pixels`` as it is. Raises :class:`UsageError` for what is no whole number of 1 or more."""
    if isinstance(max_pixels, bool) or not isinstance(max_pixels, int) or max_pixels < 1:
        raise UsageError("max_pixels", got=repr(max_pixels), expected="a whole number of 1 or more")
    return max_pixels


@contextmanager
def open_image(path: Path, max_pixels: int = MAX_PIXELS) -> Iterator[Image.Image]:
    """An image file, decoded completely, as Pillow has it; inside the block alone.

    All blocks of a process together hold at most ``MAX_PIXELS`` pixels, or one image that has more; the others wait.
    The size is taken from the header: a larger image than ``max_pixels`` is refused before it is decoded.

    Raises :class:`ImageError` naming the file, for whatever is wrong with it; also for every error of Pillow's, for
    :class:`ImageError` and for lack of memory inside the block.
    """
    check_max_pixels(max_pixels)
    name = shown(path)
    try:
        with open_regular(path) as file:
            _check_bytes(file, max_pixels)
            with _header(file, max_pixels) as image:
                _check_pixels(image, max_pixels)
                _check_tiles(image, max_pixels)
                _check_pieces(image, file)
                with _IN_MEMORY.holding(image.width * image.height):
                    _check_scans(image, file)
                    image.load()
                    yield image
    except Exception as error:  # decoders of damaged files raise nearly anything: struct.error, IndexError, EOFError..
        raise _named(error, name) from error


def open_package_image(data: bytes) -> Image.Image:
    """An image that ships with this package, decoded: the samples' sheet. Raises OSError or ValueError."""
    with _header(io.BytesIO(data), MAX_PIXELS) as image:
        image.load()
        return image.copy()


def _header(file: BinaryIO, max_pixels: int) -> Image.Image:
    """The only call of ``Image.open``."""
    from PIL import Image

    pillows = Image.MAX_IMAGE_PIXELS
    with _raised_limit(max_pixels) if pillows is not None and max_pixels > 2 * pillows else nullcontext():
        return Image.open(file, formats=_formats())


@cache
def _formats() -> tuple[str, ...]:
    """:data:`FORMATS`, but for AVIF in a Pillow before 11.3, which does not know it and fails on its name."""
    known = find_spec("PIL.AvifImagePlugin") is not None
    return tuple(name for name in FORMATS if known or name != "AVIF")


@contextmanager
def _raised_limit(max_pixels: int) -> Iterator[None]:
    """Pillow refuses twice ``Image.MAX_IMAGE_PIXELS``, a global: raised for the reading of one header, where asked."""
    from PIL import Image

    with _PILLOWS_LIMIT:
        before = Image.MAX_IMAGE_PIXELS
        Image.MAX_IMAGE_PIXELS = max_pixels
        try:
            yield
        finally:
            Image.MAX_IMAGE_PIXELS = before


def _check_bytes(file: BinaryIO, max_pixels: int) -> None:
    size, most = os.fstat(file.fileno()).st_size, max(MIN_IMAGE_BYTES, FILE_BYTES_PER_PIXEL * max_pixels)
    if size > most:
        got, expected = f"{size / 1e6:.0f} MB", f"at most {most / 1e6:.0f} MB for {max_pixels} pixels"
        raise ImageError("file too large for an image", got=got, expected=expected, remedy=RAISE_LIMIT)


def _check_pixels(image: Image.Image, max_pixels: int) -> None:
    most = int(max_pixels * PIXEL_SHARE.get(image.format or "", 1))
    if image.width * image.height > most:
        got = f"{image.width} x {image.height} = {image.width * image.height} pixels"
        expected = f"at most {most} pixels"
        if most != max_pixels:
            expected += f" in {image.format}, whose decoder holds an image several times ({max_pixels} in others)"
        raise ImageError("too large to decode safely", got=got, expected=expected, remedy=RAISE_LIMIT)


def _check_tiles(image: Image.Image, max_pixels: int) -> None:
    """A tile of a TIFF is decoded whole, however little of it belongs to the image."""
    tags = getattr(image, "tag_v2", {})
    width, height = (tags.get(tag, 0) for tag in _TILE_SIDES)
    if isinstance(width, int) and isinstance(height, int) and width * height <= max_pixels:
        return
    raise ImageError(
        "too large to decode safely",
        got=f"tiles of {shown(str((width, height)))} pixels",
        expected=f"at most {max_pixels} pixels in one",
        remedy=RAISE_LIMIT,
    )


def _check_pieces(image: Image.Image, file: BinaryIO) -> None:
    """What is read piece by piece must not have millions of them."""
    file.seek(0)
    if image.format == "PNG" and png_chunks(file) > MAX_PNG_CHUNKS:
        got = f"more than {MAX_PNG_CHUNKS} chunks"
        raise ImageError("refused, each chunk of a PNG takes time", got=got, expected="fewer", remedy=SAVE_AGAIN)
    if image.format == "PPM" and file.read(2) in (b"P1", b"P2", b"P3"):
        size = os.fstat(file.fileno()).st_size
        if size > MAX_TEXT_PPM_BYTES:
            got, expected = f"{size / 1e6:.0f} MB of numbers", f"at most {MAX_TEXT_PPM_BYTES / 1e6:.0f} MB"
            raise ImageError("refused, text takes long to read", got=got, expected=expected, remedy=SAVE_AGAIN)


def png_chunks(file: BinaryIO) -> int:
    """The chunks of a PNG file; counting ends where there are more than ``MAX_PNG_CHUNKS``."""
    at, chunks = 8, 0  # after the signature
    while chunks <= MAX_PNG_CHUNKS:
        file.seek(at)
        head = file.read(8)  # length and type
        if len(head) < 8 or head[4:] == b"IEND":
            break
        at += 12 + int.from_bytes(head[:4], "big")
        chunks += 1
    return chunks


def _check_scans(image: Image.Image, file: BinaryIO) -> None:
    if image.format not in ("JPEG", "MPO"):
        return
    file.seek(0)
    if jpeg_scans(file.read()) > MAX_JPEG_SCANS:
        raise ImageError(
            "refused, each scan of a JPEG takes the time of a whole image",
            got=f"more than {MAX_JPEG_SCANS} scans",
            expected="about 10",
            remedy=SAVE_AGAIN,
        )


def jpeg_scans(data: bytes) -> int:
    """The scans of a JPEG file's first image; counting ends where there are more than ``MAX_JPEG_SCANS``."""
    at, scans = 2, 0  # after the marker that begins the file
    while scans <= MAX_JPEG_SCANS and (found := _SEGMENT.search(data, at)) is not None:
        marker = data[found.end() - 1]
        if marker == _END_OF_IMAGE:
            break
        scans += marker == _SCAN
        at = found.end() + int.from_bytes(data[found.end() : found.end() + 2], "big")
    return scans


def _named(error: Exception, name: str) -> Exception:
    """The :class:`ImageError` that says which file it is about, and what to do."""
    from PIL import Image, UnidentifiedImageError

    if isinstance(error, ImageError):
        return ImageError(f"{name}: {error.what}", got=error.got, expected=error.expected, remedy=error.remedy)
    if isinstance(error, UnidentifiedImageError):
        return ImageError(
            f"{name}: not an image that Pillow can decode", expected="PNG, JPEG, WebP, BMP, TIFF.. (no EPS, PDF or PSD)"
        )
    if isinstance(error, FileNotFoundError):
        return ImageError(f"{name}: no such file", remedy="check the path")
    if isinstance(error, Image.DecompressionBombError | Image.DecompressionBombWarning):
        return ImageError(f"{name}: too large to decode safely ({error})", remedy=RAISE_LIMIT)
    if isinstance(error, MemoryError):
        return ImageError(f"{name}: too large for this machine's memory", remedy="scale it down first")
    if isinstance(error, OSError) and error.errno is not None:
        return ImageError(f"{name}: cannot be read ({error.strerror})", remedy="check the path")
    return ImageError(f"{name}: damaged or unreadable image ({' '.join(str(error).split())[:200]})")


class _Shared:
    """How many pixels are in memory in all threads together."""

    def __init__(self, most: int) -> None:
        self._most, self._used, self._changed = most, 0, threading.Condition()

    @contextmanager
    def holding(self, pixels: int) -> Iterator[None]:
        """Wait until ``pixels`` more are within the limit, or none are in use."""
        with self._changed:
            self._changed.wait_for(lambda: self._used == 0 or self._used + pixels <= self._most)
            self._used += pixels
        try:
            yield
        finally:
            with self._changed:
                self._used -= pixels
                self._changed.notify_all()

    def reset(self) -> None:
        """Begin anew, in a process forked while another thread was decoding: that thread is not in it."""
        self._used, self._changed = 0, threading.Condition()


_IN_MEMORY = _Shared(MAX_PIXELS)
_PILLOWS_LIMIT = threading.Lock()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_IN_MEMORY.reset)
