"""Image files of every mode that Pillow reads, small and lossless, the same in every version; and hostile ones."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable
from functools import partial
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


def _encoded(form: str, mode: str = "RGB", size: tuple[int, int] = (64, 64), **options: object) -> bytearray:
    buffer = io.BytesIO()
    Image.new(mode, size).save(buffer, form, **options)
    return bytearray(buffer.getvalue())


def _with(data: bytearray, marker: bytes, offset: int, fields: str, *values: int) -> bytes:
    """``values`` written in the place of what stands behind ``marker``."""
    struct.pack_into(fields, data, data.index(marker) + offset, *values)
    return bytes(data)


def _tiff(width: int, height: int) -> bytes:
    """A grey TIFF of 8 x 8 pixels that claims others."""
    data = _encoded("TIFF", "L", (8, 8))
    start = struct.unpack_from("<I", data, 4)[0]
    for entry in range(start + 2, start + 2 + 12 * struct.unpack_from("<H", data, start)[0], 12):
        tag = struct.unpack_from("<H", data, entry)[0]
        if tag in (256, 257):
            struct.pack_into("<HII", data, entry + 2, 4, 1, width if tag == 256 else height)
    return bytes(data)


def _webp(side: int) -> bytes:
    data = _encoded("WEBP", lossless=True)
    at = data.index(b"VP8L") + 9
    bits = int.from_bytes(data[at : at + 4], "little") >> 28 << 28 | (side - 1) << 14 | (side - 1)
    data[at : at + 4] = bits.to_bytes(4, "little")
    return bytes(data)


def _tiled(side: int) -> bytes:
    """A TIFF of 8 x 8 pixels in one tile of ``side`` x ``side``, which is not all there."""
    entries = [
        (256, 8),
        (257, 8),
        (258, 8),
        (259, 1),
        (262, 1),
        (277, 1),
        (322, side),
        (323, side),
        (324, 8),
        (325, 64),
    ]
    table = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in entries)
    return b"II*\0" + struct.pack("<I", 72) + bytes(64) + struct.pack("<H", len(entries)) + table + bytes(4)


def _inflating(kind: bytes, lead: bytes) -> bytes:
    return png(8, 8, extra=chunk(kind, lead + zlib.compress(bytes(20_000_000), 9)))


# name -> a small file that claims much, or lacks what it claims
HOSTILE: dict[str, Callable[[], bytes]] = {
    "177 megapixels of 16 bits.png": lambda: png(13_300, 13_300, 16, rows=False),
    "no rows.png": lambda: png(10_000, 10_000, 8, 6, rows=False)[:-40],
    "a length of 2 GB.png": lambda: png(8, 8)[:33] + b"\x7f\xff\xff\xffIDAT" + bytes(100),
    "zTXt.png": lambda: _inflating(b"zTXt", b"a\0\0"),
    "iTXt.png": lambda: _inflating(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0"),
    "iCCP.png": lambda: _inflating(b"iCCP", b"a\0\0"),
    "scans.jpg": lambda: jpeg_of_scans(9000, 5000),
    "side.webp": lambda: _webp(16_383),
    "large.webp": lambda: _webp(9_000),
    "half.webp": lambda: _webp(7_000),
    "screen.gif": lambda: _with(_encoded("GIF", "P"), b"GIF", 6, "<HH", 65_535, 65_535),
    "huge.bmp": lambda: _with(_encoded("BMP"), b"BM", 18, "<ii", 60_000, 60_000),
    "short.bmp": lambda: _with(_encoded("BMP"), b"BM", 18, "<ii", 10_000, 10_000),
    "short.tga": lambda: _with(_encoded("TGA"), b"\0\0", 12, "<HH", 10_000, 10_000),
    "huge.ppm": lambda: b"P6 100000 100000 255\n",
    "short.ppm": lambda: b"P6 10000 10000 255\n",
    "plain.ppm": lambda: b"P3 10000 10000 255\n" + b"1 " * 100_000,
    "bits.pbm": lambda: b"P1 10000 10000\n" + b"1" * 500_000,
    "comment.ppm": lambda: b"P6 #" + b"a" * 500_000,
    "small.jp2": lambda: bytes(_encoded("JPEG2000")),
    "tile.tif": lambda: _tiled(30_000),
    "scans behind a marker.jpg": lambda: jpeg_of_scans(9000, 5000).replace(b"\xff\xda", b"\xff\x02\xff\xff\xff\xda"),
    "chunks.png": lambda: png(8, 8, extra=chunk(b"abCd", b"") * 250_000),
    "text.ppm": lambda: b"P3 2000 2000 255\n" + b"1 " * 17_000_000,
    "huge.tif": lambda: _tiff(2**32 - 1, 2**32 - 1),
    "short.tif": lambda: _tiff(10_000, 10_000),
    "photo.png": lambda: EPS,
    "nothing.png": lambda: b"",
    "half a header.png": lambda: png(8, 8)[:20],
}
# .. which are decoded: what they claim is within the limits, or no decoder notices what they lack
PERMITTED: dict[str, Callable[[], bytes]] = {
    "many chunks.png": lambda: png(8, 8, extra=chunk(b"abCd", b"") * 20_000),
    "more data than pixels.png": lambda: (
        png(8, 8)[:33] + chunk(b"IDAT", zlib.compress(bytes(20_000_000))) + chunk(b"IEND", b"")
    ),
    "frames.gif": lambda: bytes(_encoded("GIF", "P"))[:-1] + b",\0\0\0\0\x08\0\x08\0\0\x02\x01\xff\0" * 20_000 + b";",
    "4 megapixels of 16 bits.png": lambda: png(2000, 2000, 16),
}
# .. and at the limits: each is decoded in seconds, in as much memory as the table says
LARGE: dict[str, Callable[[], bytes]] = {
    "1 bit.png": lambda: png(10_900, 10_900, 1),
    "16 bits.png": lambda: png(10_900, 10_900, 16),
    "alpha.png": lambda: png(10_900, 10_900, 8, 6),
    "deflated.tif": lambda: bytes(_encoded("TIFF", "RGB", (10_900, 10_900), compression="tiff_adobe_deflate")),
    "floats.tif": lambda: bytes(_encoded("TIFF", "F", (10_900, 10_900), compression="tiff_adobe_deflate")),
    "progressive.jpg": lambda: bytes(_encoded("JPEG", "CMYK", (10_900, 10_900), progressive=True)),
    "turned.jpg": lambda: bytes(_encoded("JPEG", "RGB", (10_900, 10_900), exif=_exif(6))),
    "most.jpg": lambda: _with(_encoded("JPEG"), b"\xff\xc0", 5, ">HH", 10_900, 10_900),
    "most.gif": lambda: _with(_encoded("GIF", "P"), b"GIF", 6, "<HH", 10_900, 10_900),
    "most.webp": lambda: bytes(_encoded("WEBP", "RGBA", (7_700, 7_700), lossless=True, method=0)),
    "most.avif": lambda: bytes(_encoded("AVIF", "RGBA", (7_700, 7_700), speed=10)),
    "most scans.jpg": lambda: jpeg_of_scans(10_900, 90),
}


def _list_of(item: bytes) -> bytes:
    return b'{"rows": [' + item * ((2**22 - 20) // len(item)) + b"0]}"


# Calibration lists of 4 MiB: JSON whose values take the most memory for their length.
LISTS: dict[str, Callable[[], bytes]] = {
    name: partial(_list_of, item)
    for name, item in {
        "lists": b"[],",
        "nested": b"[[[[[[[[[[]]]]]]]]]],",
        "texts": b'"\xc4\x80",',
        "keys": b'{"":0},',
    }.items()
}
