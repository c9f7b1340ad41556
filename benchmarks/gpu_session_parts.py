"""ONNX Runtime's CUDA build, carried to a machine without a network in parts: kept, checked, joined and unpacked.

The parts are pieces of one tar.xz with the contents of the wheel: ``ort.part.00``, ``ort.part.01``, .. with
``ort.SHA256SUMS`` beside the first, in folders ``.gpu/ort-0``, ``.gpu/ort-1``, .. of the checkout, one per transfer.
docs/gpu.md says how they are made.
"""

from __future__ import annotations

import filecmp
import importlib.metadata
import os
import re
import shutil
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from bdexport.files import sha256_file

PACKAGE = "onnxruntime-gpu"
CARRIED = "ort-*"  # folders in .gpu/
SUMS = "ort.SHA256SUMS"
UNPACKED_BYTES = 400 << 20


class PartsError(Exception):
    """ONNX Runtime's CUDA build cannot be had here, and why, in one line."""


def keep_parts(checkout: Path, store: Path) -> None:
    """Copy the parts that came with this checkout to ``store``, where the next transfer does not replace them.

    Raises PartsError where they cannot be written, or where the folder is another user's.
    """
    try:
        if store.exists() and store.stat().st_uid != os.getuid():
            raise PartsError(f"{store}: another user's folder; code is run from there")
        for part in sorted(checkout.glob(f".gpu/{CARRIED}/ort.*")):
            store.mkdir(mode=0o700, parents=True, exist_ok=True)
            target = store / part.name
            if not target.exists() or not filecmp.cmp(part, target, shallow=False):
                shutil.copyfile(part, target)
    except OSError as error:
        raise PartsError(f"{store}: a part cannot be kept there ({error.strerror})") from error


def installed() -> str | None:
    """The version of onnxruntime-gpu that is installed; None without it."""
    try:
        return importlib.metadata.version(PACKAGE)
    except importlib.metadata.PackageNotFoundError:
        return None


def unpacked(store: Path) -> Path:
    """The folder for PYTHONPATH, unpacked from the parts in ``store`` unless it was before.

    Raises PartsError: a part is missing or damaged, it is for another Python, or the disk is full.
    """
    site = store / "site"
    complete = site / ".complete"  # with the digests of the parts that it came from
    if complete.exists() and (store / SUMS).is_file() and complete.read_bytes() == (store / SUMS).read_bytes():
        return site
    parts = checked_parts(store)
    shutil.rmtree(site, ignore_errors=True)
    free = shutil.disk_usage(store).free
    if free < UNPACKED_BYTES:
        raise PartsError(f"{store}: {free >> 20} MiB are free, and {PACKAGE} takes {UNPACKED_BYTES >> 20}")
    try:
        with _Joined(parts) as joined, tarfile.open(fileobj=joined, mode="r|xz") as archive:
            archive.extractall(site, filter="data")
    except (OSError, EOFError, tarfile.TarError) as error:
        raise PartsError(f"{store}: the parts cannot be unpacked ({error})") from error
    _check_python(site)
    shutil.copyfile(store / SUMS, complete)
    return site


def checked_parts(store: Path) -> list[Path]:
    """The parts in their order, each as its digest says. Raises PartsError."""
    sums = store / SUMS
    if not sums.is_file():
        raise PartsError(
            f"{PACKAGE} is not installed, and no parts of it have come: {SUMS} is in none of .gpu/{CARRIED}"
        )
    parts = []
    for line in sums.read_text(errors="replace").splitlines():
        known = re.fullmatch(r"([0-9a-f]{64})  (ort\.part\.[0-9]+)", line)
        if known is None:
            sums.unlink()  # so that the next transfer's is kept
            raise PartsError(f"{PACKAGE}: {SUMS} is damaged; carry the folder .gpu/ort-0 again")
        digest, name = known.groups()
        path = store / name
        if not path.is_file():
            raise PartsError(
                f"{PACKAGE}: part {path.name} has not come; carry its folder .gpu/ort-{int(path.suffix[1:])}"
            )
        if sha256_file(path) != digest:
            path.unlink()  # so that the next transfer's is kept
            raise PartsError(f"{PACKAGE}: part {path.name} is damaged; carry its folder again")
        parts.append(path)
    return parts


def _check_python(site: Path) -> None:
    """Compiled modules are for one version of Python."""
    ours = f"cpython-{sys.version_info.major}{sys.version_info.minor}"
    found = [path.name.split(".")[1] for path in site.glob("onnxruntime/capi/onnxruntime_pybind11_state.cpython-*.so")]
    if not any(tag.startswith(f"{ours}-") for tag in found):
        raise PartsError(f"the parts of {PACKAGE} are for {', '.join(found) or 'no Python'}, and this is {ours}")


class _Joined:
    """Files one after another, as one that tarfile reads."""

    def __init__(self, paths: list[Path]) -> None:
        self._files: Iterator[IO[bytes]] = (path.open("rb") for path in paths)
        self._file: IO[bytes] | None = next(self._files, None)

    def read(self, size: int) -> bytes:
        """At most ``size`` bytes; none at the end of the last file."""
        while self._file is not None:
            data = self._file.read(size)
            if data:
                return data
            self._file.close()
            self._file = next(self._files, None)
        return b""

    def __enter__(self) -> IO[bytes]:
        return self  # type: ignore[return-value]

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()


def default_store() -> Path:
    """Outside of the checkout, which each transfer replaces."""
    return Path(tempfile.gettempdir()) / "bdexport-gpu-parts"
