"""Whether an engine has written what it was asked for.

A library may fail and say nothing: OpenVINO 2026.4 ends ``infer()`` without an error where an allocation failed, and
its output is still that of the call before. So every row of an output buffer is marked before a run, one value each,
and the marks are looked for afterwards.

The mark is a NaN that no arithmetic gives. Processors make every NaN that comes out of an operation a quiet one
(IEEE 754-2019, 6.2), and this is a signalling one; it is compared by its bits. So NaN and infinity that a network
really computes pass: the orchestrator reports those with a text of its own.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from bdexport.errors import BackendError

UNWRITTEN = 0x7FA0BDE7  # the bits of a float32: all of the exponent, not the first of the mantissa, then a payload
REMEDY = "pass smaller batches, or give the process more memory"
Array = NDArray[Any]


def marks_of(outputs: Array) -> NDArray[np.uint32]:
    """The last value of every row of a C-contiguous float32 array (N, ..), as bits: a view (N,) to write and to read.

    The last one: a row that was written in part counts as one that was not.
    """
    marks: NDArray[np.uint32] = outputs.reshape(len(outputs), -1).view(np.uint32)[:, -1]
    return marks


def one_mark(output: Array) -> memoryview:
    """The same for a buffer of one row: index 0 of it is read and written in some 20 ns, where an array takes 100."""
    return marks_of(output).data


def mark(outputs: Array) -> NDArray[np.uint32]:
    """Mark every row as not written, and return the marks for :func:`check_written`."""
    marks = marks_of(outputs)
    marks.fill(UNWRITTEN)
    return marks


def check_written(where: str, marks: NDArray[np.uint32], outputs: Array) -> None:
    """Raises BackendError where a row of ``outputs`` still has its mark. ``where``: ``part [backend]``."""
    left = marks.tolist()  # a search in a list takes a tenth of what array operations do, for rows as few as these
    if UNWRITTEN in left:
        raise unwritten_error(where, outputs, left.count(UNWRITTEN))


def unwritten_error(where: str, outputs: Array, missing: int) -> BackendError:
    """What is raised for an output of which ``missing`` rows were not written."""
    what = f"{where}: batch {len(outputs)}: the library reported no error, but did not write its output"
    return BackendError(what, got=f"{len(outputs) - missing} rows", expected=f"float32 {outputs.shape}", remedy=REMEDY)


def check_rows(where: str, outputs: Array, batch: int, shape: tuple[int, ...]) -> None:
    """Raises BackendError where an output that the library made is not (batch, *shape)."""
    if outputs.shape != (batch, *shape):
        what = f"{where}: batch {batch}: its output has another shape"
        raise BackendError(what, got=outputs.shape, expected=(batch, *shape), remedy=REMEDY)
