"""numpy's arrays and numbers in a pickle, read without numpy's own loaders. No torch.

A pickle names the functions that rebuild an array, and numpy's own trust what they are given: a dtype that lies about
itself turns bytes into pointers. The classes here stand for those functions, take plain numbers only, and check sizes.
"""

from __future__ import annotations

import math
import pickle
import re
from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

INTEGERS = re.compile(r"[|<>=]?[biu][1248]")  # bool and integers
MOST_AXES = 64  # numpy's own limit, for the sake of what multiplying a million numbers takes
NUMBERS = re.compile(r"[|<>=]?(b1|[iu][1248]|f[248]|c8|c16)")


class PickledType:
    """``numpy.dtype(code, align, copy)``, then its state, of which only the byte order matters."""

    allowed: ClassVar[re.Pattern[str]] = NUMBERS
    called: ClassVar[str] = "numbers"

    def __init__(self, code: object, *_: object) -> None:
        text = code.decode("latin1") if isinstance(code, bytes) else code
        if not isinstance(text, str) or not self.allowed.fullmatch(text):
            raise pickle.UnpicklingError(f"array of type {str(text)[:20]!r}, not of {self.called}")
        self.dtype = np.dtype(text)

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        if state[1] in ("<", ">", b"<", b">"):
            self.dtype = self.dtype.newbyteorder("<" if state[1] in ("<", b"<") else ">")


class PickledArray:
    """``numpy._reconstruct(ndarray, (0,), 'b')``, then its state: version, shape, dtype, Fortran order, bytes.

    ``array`` is None until the state has come.
    """

    def __init__(self, *_: object) -> None:
        self.array: NDArray[Any] | None = None

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        shape, kind, fortran, content = state[-4:]
        self.array = array_from_parts(content, kind, shape, "F" if fortran else "C")


def array_from_parts(content: Any, kind: Any, shape: Any, order: Any) -> NDArray[Any]:
    """An array of these bytes. Raises pickle.UnpicklingError unless type, shape and the number of bytes fit."""
    if isinstance(content, str):
        content = content.encode("latin1")
    if not isinstance(content, bytes | bytearray) or not isinstance(kind, PickledType):
        raise pickle.UnpicklingError("array without its bytes")
    if (
        not isinstance(shape, tuple)
        or len(shape) > MOST_AXES
        or not all(type(size) is int and size >= 0 for size in shape)
    ):
        raise pickle.UnpicklingError("array without a shape")
    if math.prod(shape) * kind.dtype.itemsize != len(content):
        raise pickle.UnpicklingError(f"array of shape {shape} with {len(content)} bytes")
    return np.frombuffer(content, kind.dtype).reshape(shape, order="F" if order == "F" else "C")


def number_from_parts(kind: Any, content: Any) -> Any:
    """numpy's ``scalar``: a bool, int or float of Python. A complex number stays an array, which can be no dict's key:
    complex numbers of one hash are easily found, and a dict of them would take a time without end.
    """
    array = array_from_parts(content, kind, (), "C")
    return array if array.dtype.kind == "c" else array.item()


def array_names(kind: type[PickledType] = PickledType) -> dict[tuple[str, str], Callable[..., Any]]:
    """What (module, name) in a pickle of arrays stands for."""
    names: dict[tuple[str, str], Callable[..., Any]] = {("numpy", "dtype"): kind, ("numpy", "ndarray"): PickledArray}
    for module in ("numpy.core", "numpy._core"):  # numpy 1 and 2
        names |= {
            (f"{module}.multiarray", "_reconstruct"): PickledArray,
            (f"{module}.multiarray", "scalar"): number_from_parts,
            (f"{module}.numeric", "_frombuffer"): array_from_parts,  # protocol 5
        }
    return names
