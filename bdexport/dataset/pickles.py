"""Reading CIFAR's pickles without running anything that they contain.

A pickle can name any function and have it called. The unpickler here resolves no name at all: the few names that
numpy arrays and bytes need stand for inert builders (:mod:`bdexport.pickled_arrays`), every other name is refused.
Before that, it is counted what loading would take (:mod:`bdexport.pickle_scan`).
What comes out is dict, list, tuple, str, int, float, bool, None and numpy arrays of numbers.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from bdexport.errors import DatasetError
from bdexport.files import read_bytes
from bdexport.limits import CIFAR_FILE
from bdexport.pickle_scan import ALL_OPERATIONS, scan
from bdexport.pickled_arrays import INTEGERS, PickledArray, PickledType, array_names

AGAIN = "unpack the data set again"


def read_pickle(path: Path) -> Any:
    """The content of a pickle of plain data, with str for byte strings (latin-1). Raises :class:`DatasetError`."""
    try:
        _check_size(path)
        data = read_bytes(path, CIFAR_FILE)
    except FileNotFoundError:
        raise DatasetError(f"{path}: no such file", remedy=AGAIN) from None
    except OSError as error:
        raise DatasetError(f"{path}: cannot be read ({error.strerror})") from error
    try:
        scan(io.BytesIO(data), len(data), _PlainRules())
        return _finished(_PlainUnpickler(io.BytesIO(data), encoding="latin1").load())
    except _RefusedError as error:
        raise DatasetError(
            f"{path}: refused, its pickle asks for {error}", expected="arrays and lists only", remedy="do not use it"
        ) from error
    except Exception as error:  # a damaged pickle makes the unpickler raise nearly anything
        raise DatasetError(f"{path}: damaged pickle ({_one_line(error)})", remedy=AGAIN) from error


def _check_size(path: Path) -> None:
    size = path.stat().st_size
    if size > CIFAR_FILE:
        raise DatasetError(f"{path}: too large a pickle", got=f"{size:,} bytes", expected=f"at most {CIFAR_FILE:,}")


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


class _IntegerType(PickledType):
    """CIFAR holds nothing else."""

    allowed = INTEGERS
    called = "integers"


class _PlainUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        build = _BUILDERS.get((module, name))
        if build is None:
            raise _RefusedError(_one_line(f"{module}.{name}"))
        return _Builder(build)


def _encode(text: str, encoding: str) -> bytes:
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"bytes encoded as {str(encoding)[:20]!r}")
    return text.encode("latin1")


_BUILDERS: dict[tuple[str, str], Callable[..., Any]] = {
    ("_codecs", "encode"): _encode,  # how protocol 2 writes bytes
    ("builtins", "bytes"): lambda: b"",  # .. and empty bytes
    ("__builtin__", "bytes"): lambda: b"",
    **array_names(_IntegerType),
}
_NAMES = {f"{module}.{name}" for module, name in _BUILDERS}


class _PlainRules:
    """What may be counted is what :class:`_PlainUnpickler` builds: its names are called, and nothing else is."""

    operations = ALL_OPERATIONS

    def call(self, name: str, arguments: tuple[Any, ...], place: str) -> int | None:
        if name not in _NAMES:
            raise _RefusedError(_one_line(name))
        if name == "builtins.bytes" and arguments:
            raise pickle.UnpicklingError("bytes of a length that it only claims")
        return None

    def build(self, name: str, state: Any) -> None:
        pass  # the builders check what they are given

    def storage(self, identity: Any) -> NoReturn:
        raise pickle.UnpicklingError("a persistent identity")


def _finished(value: Any) -> Any:
    """Records replaced by their arrays, bytes by str."""
    if isinstance(value, dict):
        return {_finished(key): _finished(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finished(item) for item in value]
    if isinstance(value, bytes):
        return value.decode("latin1")
    if isinstance(value, PickledArray):
        if value.array is None:
            raise pickle.UnpicklingError("array without its bytes")
        return value.array
    if value is None or isinstance(value, str | int | float | np.ndarray):
        return value
    raise pickle.UnpicklingError(f"a {type(value).__name__} where data belong")


def _one_line(error: object) -> str:
    return " ".join(str(error).split())[:120]
