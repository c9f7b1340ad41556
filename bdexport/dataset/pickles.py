"""Reading CIFAR's pickles without running anything that they contain.

A pickle can name any function and have it called. The unpickler here resolves no name at all: the few names that
numpy arrays and bytes need stand for the inert builders below, every other name is refused. What comes out is dict,
list, tuple, str, int, float, bool, None and numpy arrays of numbers.
"""

from __future__ import annotations

import io
import math
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from bdexport.errors import DatasetError

AGAIN = "unpack the data set again"
NUMBERS = re.compile(r"[|<>=]?[biu][1248]")  # bool and integers: CIFAR holds nothing else


def read_pickle(path: Path) -> Any:
    """The content of a pickle of plain data, with str for byte strings (latin-1). Raises :class:`DatasetError`."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise DatasetError(f"{path}: no such file", remedy=AGAIN) from None
    except OSError as error:
        raise DatasetError(f"{path}: cannot be read ({error.strerror})") from error
    try:
        return _finished(_PlainUnpickler(io.BytesIO(data), encoding="latin1").load())
    except _RefusedError as error:
        raise DatasetError(
            f"{path}: refused, its pickle asks for {error}", expected="arrays and lists only", remedy="do not use it"
        ) from error
    except Exception as error:  # a damaged pickle makes the unpickler raise nearly anything
        raise DatasetError(f"{path}: damaged pickle ({_one_line(error)})", remedy=AGAIN) from error


class _RefusedError(Exception):
    """A pickle named something that is not on the list."""


class _Builder:
    """What a name in a pickle stands for: callable, and nothing else can be done to it."""

    __slots__ = ("_call",)

    def __init__(self, call: Callable[..., Any]) -> None:
        self._call = call

    def __call__(self, *arguments: Any) -> Any:
        return self._call(*arguments)

    def __setstate__(self, state: object) -> NoReturn:
        raise pickle.UnpicklingError("state set on a function")


class _PickledType:
    """``numpy.dtype(code, align, copy)``, then its state, of which only the byte order matters."""

    def __init__(self, code: object, *_: object) -> None:
        text = code.decode("latin1") if isinstance(code, bytes) else code
        if not isinstance(text, str) or not NUMBERS.fullmatch(text):
            raise pickle.UnpicklingError(f"array of type {str(text)[:20]!r}, not of integers")
        self.dtype = np.dtype(text)

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        if state[1] in ("<", ">", b"<", b">"):
            self.dtype = self.dtype.newbyteorder("<" if state[1] in ("<", b"<") else ">")


class _PickledArray:
    """``numpy._reconstruct(ndarray, (0,), 'b')``, then its state: version, shape, dtype, Fortran order, bytes."""

    def __init__(self, *_: object) -> None:
        self.array: NDArray[Any] | None = None

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        shape, kind, fortran, content = state[-4:]
        self.array = _array(content, kind, shape, "F" if fortran else "C")


class _PlainUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        build = _BUILDERS.get((module, name))
        if build is None:
            raise _RefusedError(_one_line(f"{module}.{name}"))
        return _Builder(build)


def _array(content: Any, kind: Any, shape: Any, order: Any) -> NDArray[Any]:
    if isinstance(content, str):
        content = content.encode("latin1")
    if not isinstance(content, bytes | bytearray) or not isinstance(kind, _PickledType):
        raise pickle.UnpicklingError("array without its bytes")
    if not isinstance(shape, tuple) or not all(type(size) is int and size >= 0 for size in shape):
        raise pickle.UnpicklingError("array without a shape")
    if math.prod(shape) * kind.dtype.itemsize != len(content):
        raise pickle.UnpicklingError(f"array of shape {shape} with {len(content)} bytes")
    return np.frombuffer(content, kind.dtype).reshape(shape, order="F" if order == "F" else "C")


def _array_from_buffer(content: Any, kind: Any, shape: Any, order: Any) -> NDArray[Any]:
    return _array(content, kind, shape, order)


def _scalar(kind: Any, content: Any) -> int:
    return int(_array(content, kind, (), "C"))


def _encode(text: str, encoding: str) -> bytes:
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"bytes encoded as {str(encoding)[:20]!r}")
    return text.encode("latin1")


_BUILDERS: dict[tuple[str, str], Callable[..., Any]] = {
    ("_codecs", "encode"): _encode,  # how protocol 2 writes bytes
    ("builtins", "bytes"): lambda: b"",  # .. and empty bytes
    ("__builtin__", "bytes"): lambda: b"",
    ("numpy", "dtype"): _PickledType,
    ("numpy", "ndarray"): _PickledArray,
}
for _module in ("numpy.core", "numpy._core"):  # numpy 1 and 2
    _BUILDERS |= {
        (f"{_module}.multiarray", "_reconstruct"): _PickledArray,
        (f"{_module}.multiarray", "scalar"): _scalar,
        (f"{_module}.numeric", "_frombuffer"): _array_from_buffer,  # protocol 5
    }


def _finished(value: Any) -> Any:
    """Records replaced by their arrays, bytes by str."""
    if isinstance(value, dict):
        return {_finished(key): _finished(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finished(item) for item in value]
    if isinstance(value, bytes):
        return value.decode("latin1")
    if isinstance(value, _PickledArray):
        if value.array is None:
            raise pickle.UnpicklingError("array without its bytes")
        return value.array
    if value is None or isinstance(value, str | int | float | np.ndarray):
        return value
    raise pickle.UnpicklingError(f"a {type(value).__name__} where data belong")


def _one_line(error: object) -> str:
    return " ".join(str(error).split())[:120]
