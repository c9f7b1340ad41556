"""What every session on the CPU shares: rows of numpy batches, and the refusal to work after close."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bdexport.backends.base import Rows
from bdexport.errors import BackendError, UsageError

Array = NDArray[Any]


class ArrayRows:
    """The row verbs of a session whose tensors are C-contiguous numpy arrays with the batch first."""

    def take(self, x: Array, rows: Rows) -> Array:
        """See :meth:`bdexport.backends.base.Session.take`; contiguous rows are a view."""
        span = row_span(rows)
        return x[span] if span is not None else x.take(rows, axis=0)

    def replace(self, x: Array, rows: Rows, y: Array) -> Array:
        """See :meth:`bdexport.backends.base.Session.replace`; writes into ``x``."""
        x[row_index(rows)] = y
        return x

    def merge(self, pieces: Sequence[tuple[Rows, Array]], batch: int) -> Array:
        """See :meth:`bdexport.backends.base.Session.merge`."""
        first = pieces[0][1]
        out = np.empty((batch, *first.shape[1:]), first.dtype)
        for rows, piece in pieces:
            out[row_index(rows)] = piece
        return out


def row_span(rows: Rows) -> slice | None:
    """The slice that ``rows`` are when they ascend without a gap; None otherwise. Moving a slice is one memcpy."""
    first, count = int(rows[0]), len(rows)
    if int(rows[-1]) - first + 1 != count or (count > 2 and not (np.diff(rows) == 1).all()):
        return None
    return slice(first, first + count)


def row_index(rows: Rows) -> slice | Rows:
    """``rows`` as the cheapest index that numpy takes."""
    return row_span(rows) or rows


def closed_error(backend: str) -> UsageError:
    """What a session raises after ``close()``."""
    return UsageError(f"session [{backend}]: used after close", remedy="open the bundle again")


def no_device_error(backend: str, device: str, known: str) -> BackendError:
    """What a backend raises for a device that it does not have here."""
    return BackendError(
        f"backend {backend}: no such device", got=repr(device), expected=known, remedy="pass device=None"
    )
