"""Arrays from a ``.npz`` file that somebody else wrote: numbers alone, and never more memory than the file claims.

numpy's own reader takes the memory that a header names before it looks whether the numbers are there. Here the size of
each member, its header and its data are compared first.
"""

from __future__ import annotations

import io
import math
import struct
import zipfile
from collections.abc import Collection
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from bdexport.files import open_regular
from bdexport.limits import MAX_NPZ_TABLE_BYTES, MIB, REFERENCE_ARRAYS

NUMBERS = "biuf"  # kinds of dtype: truth values, integers, floats; no objects, records, texts, times
MAX_DIMENSIONS = 8
SUFFIX = ".npy"
_END = struct.Struct("<4s4H2LH")  # the zip format's end of central directory
_LONGEST_COMMENT = 65535


def read_npz(path: Path, names: Collection[str], most: int = REFERENCE_ARRAYS) -> dict[str, NDArray[Any]]:
    """The arrays of the given names that are in the file, read-only; others are not looked at.

    All of them together may have ``most`` bytes, inflated. Raises ValueError with the reason for a file that is
    damaged, too large or holds other things than numbers, and OSError for one that cannot be read.
    """
    try:
        with open_regular(path) as file:
            _check_table(file)
            with zipfile.ZipFile(file) as archive:
                chosen = [entry for entry in archive.infolist() if entry.filename.removesuffix(SUFFIX) in names]
                size = sum(entry.file_size for entry in chosen)
                if size > most:
                    raise ValueError(f"its arrays have {size / MIB:.0f} MiB; at most {most / MIB:.0f} MiB are read")
                return {entry.filename.removesuffix(SUFFIX): _array(archive, entry) for entry in chosen}
    except OSError:
        raise
    except Exception as error:  # zipfile and numpy's parser of headers raise nearly anything for damaged bytes
        raise ValueError(" ".join(str(error).split())[:200] or type(error).__name__) from error


def _check_table(file: BinaryIO) -> None:
    """Raise ValueError for a table of contents that ``zipfile`` would take much memory to read."""
    size = file.seek(0, io.SEEK_END)
    file.seek(max(0, size - _END.size - _LONGEST_COMMENT))
    tail = file.read()
    at = tail.rfind(b"PK\x05\x06")
    if at < 0 or len(tail) - at < _END.size:
        raise ValueError("no zip archive: its end is missing")
    table = _END.unpack_from(tail, at)[5]
    if table > MAX_NPZ_TABLE_BYTES or tail[max(0, at - 20) :].startswith(b"PK\x06\x07"):  # a 64-bit table, elsewhere
        raise ValueError("too many members for a few arrays")
    file.seek(0)


def _array(archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> NDArray[Any]:
    """One member, checked before numpy sees it. Raises ValueError, or what a damaged archive makes zipfile raise."""
    with archive.open(entry) as member:
        data = member.read(entry.file_size + 1)  # never more than it claims
    stream = io.BytesIO(data)
    shape, fortran, dtype = _header(stream, entry.filename)
    if dtype.kind not in NUMBERS or dtype.fields is not None or dtype.subdtype is not None:
        raise ValueError(f"{entry.filename} holds {dtype}, no numbers")
    if len(shape) > MAX_DIMENSIONS or any(type(length) is not int or length < 0 for length in shape):
        raise ValueError(f"{entry.filename} has the shape {str(shape)[:60]}")
    wanted, there = math.prod(shape) * dtype.itemsize, len(data) - stream.tell()
    if wanted != there:
        raise ValueError(f"{entry.filename} claims {str(shape)[:60]} of {dtype}, {wanted} bytes, and has {there}")
    values = np.frombuffer(data, dtype, offset=stream.tell())
    return values.reshape(shape, order="F" if fortran else "C")


def _header(stream: io.BytesIO, name: str) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    """Shape, whether columns come first, and dtype. Raises ValueError."""
    try:
        version = npy.read_magic(stream)
        readers = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}
        if version in readers:
            return readers[version](stream)
    except Exception as error:  # numpy's parser raises nearly anything for what is no header
        raise ValueError(f"{name} has no header of numpy's format") from error
    raise ValueError(f"{name} is of version {version[0]}.{version[1]} of numpy's format")
