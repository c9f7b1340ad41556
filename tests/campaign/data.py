"""Damaged and hostile data: images, image folders, CIFAR's pickles."""

from __future__ import annotations

import os
import pickle
import shutil
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any, ClassVar

import numpy as np
from bundles import pixels
from PIL import Image
from tiny import SIZE

from bdexport.dataset import load_dataset
from bdexport.dataset.folder import load_images
from bdexport.preprocess import Preprocess
from campaign.cases import Kind, Tally, attempt, once
from campaign.mutations import CANARY, damage_file
from campaign.pickles import hostile_pickle

CIFAR_IMAGES = 60
PREPROCESS = Preprocess(size=SIZE)
MODES = ("RGB", "L", "P", "RGBA", "LA", "1", "CMYK", "I;16", "F")
SAVED = {"png": "PNG", "jpg": "JPEG", "bmp": "BMP", "gif": "GIF", "webp": "WEBP", "tif": "TIFF", "ppm": "PPM"}


class Data(Kind):
    """Image files of many forms, a folder of classes, and a small CIFAR-10."""

    name: ClassVar[str] = "data"
    about: ClassVar[str] = "images, image folders and CIFAR pickles with damage, bombs and code"
    share: ClassVar[float] = 2
    memory_mb: ClassVar[int | None] = 700

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        with once(folder / "good") as making:
            if making is not None:
                _make_images(making / "images")
                _make_cifar(making / "cifar-10-batches-py")
                _make_programs(making / "programs")
        self.good = folder / "good"
        self.images = sorted((self.good / "images").iterdir())
        programs = str(self.good / "programs")
        if programs not in os.environ["PATH"].split(os.pathsep):
            os.environ["PATH"] = programs + os.pathsep + os.environ["PATH"]

    def case(self, random: Random, scratch: Path) -> Tally:
        """One image, one folder, or one CIFAR."""
        return random.choices((self._image, self._folder, self._cifar), (4, 1, 3))[0](random, scratch)

    def _image(self, random: Random, scratch: Path) -> Tally:
        path, what = self._odd_image(random, scratch)
        return self._check(what, lambda: load_images(path, PREPROCESS)[1], 1)

    def _folder(self, random: Random, scratch: Path) -> Tally:
        root = scratch / "set"
        for name in ("cat", "dog\x1b[31m", "nëwt"):
            (root / name).mkdir(parents=True)
            for number in range(3):
                Image.fromarray(pixels(1, number)[0]).save(root / name / f"{number}.png")
        path, what = self._odd_image(random, scratch)
        if os.path.lexists(path):  # damage may have removed it
            shutil.move(path, root / "cat" / path.name)
        if random.random() < 0.3:
            (root / "dog\x1b[31m" / "around").symlink_to(root, target_is_directory=True)

        def load() -> Any:
            loaded = load_dataset("folder", root, "train")
            images = loaded.arrays(PREPROCESS)
            assert len(images) == len(loaded.labels)
            return images

        return self._check(f"folder with {what}", load, None)

    def _cifar(self, random: Random, scratch: Path) -> Tally:
        root = scratch / "cifar-10-batches-py"
        shutil.copytree(self.good / root.name, root)
        path = root / random.choice(("test_batch", "test_batch", "batches.meta"))
        if random.random() < 0.5:
            what = damage_file(path, random)
        else:
            path.write_bytes(hostile_pickle(random))
            what = "hostile pickle"
        return self._check(f"{path.name} {what}", lambda: load_dataset("cifar10", scratch, "test").source, None)

    def _check(self, what: str, load: Callable[[], Any], count: int | None) -> Tally:
        tally = Tally()
        images = attempt(tally, what, load)
        if images is not None:
            fits = images.dtype == np.uint8 and images.ndim == 4 and images.shape[3] == 3
            tally.check(fits and count in (None, len(images)), f"{what}: {images.dtype} {images.shape}")
        return tally

    def _odd_image(self, random: Random, scratch: Path) -> tuple[Path, str]:
        if random.random() < 0.85:
            good = random.choice(self.images)
            path = scratch / good.name
            shutil.copyfile(good, path)
            return path, f"{good.name} {damage_file(path, random)}"
        path = scratch / f"photo.{random.choice(('png', 'jpg', 'eps', 'tif'))}"
        # The bombs take long to make.
        maker = random.choices((_bomb, _program, _text_bomb, _many_frames), (1, 5, 1, 2))[0]
        path.write_bytes(maker(random))
        return path, maker.__name__[1:]


def _make_images(folder: Path) -> None:
    folder.mkdir()
    base = Image.fromarray(pixels(1)[0])
    for mode in MODES:
        if mode == "I;16":
            image = Image.fromarray((np.asarray(base.convert("L")).astype(np.uint16)) * 257)
        else:
            image = base.convert(mode)
        for suffix, kind in SAVED.items():
            try:
                image.save(folder / f"{mode.replace(';', '')}.{suffix}", kind)
            except (OSError, ValueError, KeyError):  # the format does not have this mode
                (folder / f"{mode.replace(';', '')}.{suffix}").unlink(missing_ok=True)


def _make_cifar(folder: Path) -> None:
    folder.mkdir()
    images = np.random.default_rng(0).integers(0, 256, (CIFAR_IMAGES, 3072), dtype=np.uint8)
    labels = [number % 10 for number in range(CIFAR_IMAGES)]
    for name in ("test_batch", *(f"data_batch_{number}" for number in range(1, 6))):
        (folder / name).write_bytes(pickle.dumps({"data": images, "labels": labels}, protocol=2))
    names = [f"class {number}" for number in range(10)]
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": names}, protocol=2))


def _make_programs(folder: Path) -> None:
    """Programs that image libraries are known to start; each leaves a trace."""
    folder.mkdir()
    for name in ("gs", "gswin64c", "djpeg", "xv", "display"):
        (folder / name).write_text(f'#!/bin/sh\ntouch "${CANARY}"\n')
        (folder / name).chmod(0o755)


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def _bomb(random: Random) -> bytes:
    """A PNG that says it is large, some of them with all their pixels."""
    side = random.choice((3_000, 13_300, 60_000, 2**31 - 1))
    depth, kind = random.choice(((8, 2), (16, 0), (16, 2), (16, 6), (1, 0)))
    channels = {0: 1, 2: 3, 6: 4}[kind]
    row = (side * depth * channels + 7) // 8 + 1
    megabytes = min(row * side, 300_000_000) >> 20  # of pixels; what says that it has more is cut off
    packer = zlib.compressobj(9)
    data = b"".join(packer.compress(bytes(1 << 20)) for _ in range(megabytes + 1))
    header = struct.pack(">IIBBBBB", side, side, depth, kind, 0, 0, 0)
    parts = _chunk(b"IHDR", header) + _chunk(b"IDAT", data + packer.flush()) + _chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + parts


def _program(random: Random) -> bytes:
    """PostScript, which some readers give to a program."""
    body = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 32 24\n%%EndComments\nshowpage\n%%EOF\n"
    if random.random() < 0.3:
        return struct.pack("<IIII", 0xC6D3D0C5, 32, len(body), 0).ljust(32, b"\0") + body
    return body


def _text_bomb(random: Random) -> bytes:
    """A PNG whose compressed comment unpacks to hundreds of megabytes."""
    size = random.choice((10, 300)) << 20
    packed = zlib.compress(bytes(size), 9)
    kind = random.choice((b"zTXt", b"iTXt", b"iCCP"))
    text = b"Comment\0\0" + packed if kind != b"iTXt" else b"Comment\0\1\0\0\0" + packed
    header = struct.pack(">IIBBBBB", 4, 4, 8, 2, 0, 0, 0)
    image = zlib.compress((b"\0" + bytes(12)) * 4)
    parts = _chunk(b"IHDR", header) + _chunk(kind, text) * random.choice((1, 20))
    return b"\x89PNG\r\n\x1a\n" + parts + _chunk(b"IDAT", image) + _chunk(b"IEND", b"")


def _many_frames(random: Random) -> bytes:
    """A GIF with very many frames."""
    frame = b"\x21\xf9\x04\0\0\0\0\0" + b"\x2c\0\0\0\0\x04\0\x04\0\0" + b"\x02\x04\x84\x8f\xa9\x5d\0"
    size = struct.pack("<HH", *random.choice(((4, 4), (65_535, 65_535))))
    return b"GIF89a" + size + b"\x80\0\0\0\0\0\xff\xff\xff" + frame * random.choice((1, 100_000)) + b";"
