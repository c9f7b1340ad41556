"""Image files of every mode that Pillow reads, small and lossless, the same in every version; and hostile ones."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

WIDTH, HEIGHT = 37, 23
ORIENTATION = 0x0112


def _noise(*shape: int, dtype: type = np.uint8) -> np.ndarray:
    return np.random.default_rng(7).integers(0, np.iinfo(dtype).max, (HEIGHT, WIDTH, *shape), dtype, endpoint=True)


def _exif(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    return exif


def _palette() -> Image.Image:
    image = Image.fromarray(_noise() % 16).convert("P")
    image.putpalette(np.random.default_rng(8).integers(0, 256, 48, np.uint8).tobytes())
    return image


def _floats(top: float) -> Image.Image:
    return Image.fromarray((_noise() / 255 * top).astype(np.float32))


def _bits() -> Image.Image:
    return Image.fromarray(_noise() > 127)


# name -> what writes such a file
ORDINARY: dict[str, Callable[[Path], None]] = {
    "rgb.png": lambda path: Image.fromarray(_noise(3)).save(path),
    "rgb.bmp": lambda path: Image.fromarray(_noise(3)).save(path),
    "rgb.ppm": lambda path: Image.fromarray(_noise(3)).save(path),
    "rgb.tif": lambda path: Image.fromarray(_noise(3)).save(path, compression="tiff_adobe_deflate"),
    "rgb.tga": lambda path: Image.fromarray(_noise(3)).save(path),
    "turned.png": lambda path: Image.fromarray(_noise(3)).save(path, exif=_exif(6)),
    "turned.tif": lambda path: Image.fromarray(_noise()).save(path, exif=_exif(5)),
    "grey.png": lambda path: Image.fromarray(_noise()).save(path),
    "one.png": lambda path: _bits().save(path),
    "alpha.png": lambda path: Image.fromarray(_noise(4)).save(path),
    "alpha_turned.png": lambda path: Image.fromarray(_noise(4)).save(path, exif=_exif(8)),
    "alpha.webp": lambda path: Image.fromarray(_noise(4)).save(path, lossless=True, exact=True),
    "grey_alpha.png": lambda path: Image.fromarray(_noise(2), "LA").save(path),
    "palette.png": lambda path: _palette().save(path),
    "palette.gif": lambda path: _palette().save(path),
    "palette_level.png": lambda path: _palette().save(path, transparency=3),
    "palette_levels.png": lambda path: _palette().save(path, transparency=bytes(range(0, 256, 16))),
    "colour_level.png": lambda path: Image.fromarray(_noise(3) // 128 * 255).save(path, transparency=(255, 0, 255)),
    "grey_level.png": lambda path: Image.fromarray(_noise() // 64 * 64).save(path, transparency=64),
    "deep.png": lambda path: Image.fromarray(_noise(dtype=np.uint16)).save(path),
    "deep_turned.png": lambda path: Image.fromarray(_noise(dtype=np.uint16)).save(path, exif=_exif(3)),
    "deep_level.png": lambda path: Image.fromarray(_noise(dtype=np.uint16) // 8192 * 8192).save(
        path, transparency=8192
    ),
    "deep.tif": lambda path: Image.fromarray(_noise(dtype=np.uint16)).save(path),
    "wide.tif": lambda path: Image.fromarray(_noise(dtype=np.int32) % 300).save(path),
    "unit.tif": lambda path: _floats(1).save(path),
    "bytes.tif": lambda path: _floats(255).save(path),
    "words.tif": lambda path: _floats(65535).save(path),
    "cmyk.tif": lambda path: Image.fromarray(_noise(4), "CMYK").save(path),
}


def png(width: int, height: int, depth: int = 8, colour: int = 0, rows: bool = True, extra: bytes = b"") -> bytes:
    """A PNG of one colour, without Pillow: ``extra`` chunks follow the header; no rows: it claims what it lacks."""
    channels = {0: 1, 2: 3, 4: 2, 6: 4}[colour]
    row = bytes(1 + (width * depth * channels + 7) // 8)
    packer = zlib.compressobj(9)
    packed = b"".join(packer.compress(row) for _ in range(height if rows else 1)) + packer.flush()
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    chunks = [chunk(b"IHDR", header), extra, chunk(b"IDAT", packed), chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def chunk(kind: bytes, content: bytes) -> bytes:
    """A PNG chunk."""
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def jpeg_of_scans(side: int, scans: int) -> bytes:
    """A grey progressive JPEG that names the same empty scan again and again: ten bytes each."""
    buffer = io.BytesIO()
    Image.new("L", (16, 16), 128).save(buffer, "JPEG", progressive=True)
    data = buffer.getvalue()
    header = data.index(b"\xff\xc2") + 5
    data = data[:header] + struct.pack(">HH", side, side) + data[header + 4 :]
    return data[: data.rindex(b"\xff\xd9")] + b"\xff\xda\x00\x08\x01\x01\x00\x01\x3f\x00" * scans + b"\xff\xd9"


EPS = b"""%!PS-Adobe-3.0 EPSF-3.0
%%BoundingBox: 0 0 10 10
%%EndComments
showpage
%%EOF
"""
