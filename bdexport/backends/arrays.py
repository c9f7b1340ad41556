"""What sessions on the CPU share: rows of numpy batches, the choice of threads, the refusal to work after close."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bdexport.backends.base import Rows
from bdexport.errors import BackendError, UsageError
from bdexport.hardware import usable_cores

# Below this, sharing one image between threads costs about what it saves (ResNet-56, 0.25 GFLOP, 2 threads: 1.3 x).
FLOPS_WORTH_THREADS = 1_000_000_000
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
        f"backend {backend}: no such device", got=repr(device), expected=known, remedy="leave --device (device=...) out"
    )


def chosen_threads(asked: int | None, flops: int) -> tuple[int, str]:
    """Threads for one call, and the reason; ``flops`` of one image in the full network."""
    if asked is not None:
        return asked, f"threads: {asked}, as asked for"
    cores = usable_cores()
    if flops < FLOPS_WORTH_THREADS or cores == 1:
        return 1, f"threads: 1, since an image of {flops:.2e} FLOPs is too little to share between threads"
    return cores, f"threads: {cores}, all usable cores"
