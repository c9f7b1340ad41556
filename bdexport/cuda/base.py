"""What bdexport asks of CUDA: memory, streams, events, graphs. One small interface, two bindings behind it.

Everything runs on the device that the interface was opened for, in its primary context, which torch, CuPy and ONNX
Runtime use as well; each call makes it current in the calling thread first, so any thread may call.
Addresses are plain integers. Nothing here frees what it does not own, and every ``free`` and ``close`` may be repeated.
Errors of the driver are raised as :class:`bdexport.errors.BackendError`.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


class Address(Protocol):
    """Something at a device address."""

    @property
    def pointer(self) -> int:
        """Device address."""


class DeviceBuffer(Protocol):
    """Device memory that its maker owns; 256-byte aligned."""

    @property
    def pointer(self) -> int:
        """Device address."""

    @property
    def nbytes(self) -> int:
        """Size in bytes, at least 1."""

    def free(self) -> None:
        """Give the memory back. The caller sees to it that no work that uses it is still queued."""


class PinnedBuffer(Protocol):
    """Page-locked host memory: copies from and to it are asynchronous."""

    @property
    def array(self) -> NDArray[np.uint8]:
        """The memory as uint8 (nbytes,); not to be used after :meth:`free`."""

    @property
    def pointer(self) -> int:
        """Host address."""

    def free(self) -> None:
        """Give the memory back."""


class Stream(Protocol):
    """A queue of work on the device."""

    @property
    def handle(self) -> int:
        """The driver's ``CUstream``."""

    def synchronize(self) -> None:
        """Wait for everything queued so far; errors of queued work are raised here."""

    def wait(self, event: Event) -> None:
        """What is queued from now on waits for ``event``; the host does not."""

    def close(self) -> None:
        """Destroy the stream if the interface made it; a caller's stream is left alone."""


class Event(Protocol):
    """A point in a stream."""

    def record(self, stream: Stream) -> None:
        """Put the event behind what is queued on ``stream``."""

    def synchronize(self) -> None:
        """Wait until the event is reached."""

    def reached(self) -> bool:
        """Whether it is reached, or was never recorded; without waiting."""

    def elapsed_ms(self, later: Event) -> float:
        """Milliseconds on the device from this event to ``later``; both must be reached."""

    def close(self) -> None:
        """Destroy the event."""


class Graph(Protocol):
    """Work captured once, that can be launched many times. Its addresses are those of the capture."""

    def launch(self, stream: Stream) -> None:
        """Queue the whole graph on ``stream``."""

    def close(self) -> None:
        """Destroy the graph."""


class Capture(Protocol):
    """A capture under way; :attr:`graph` is there after the ``with`` block."""

    @property
    def graph(self) -> Graph:
        """What was captured, instantiated."""


class Cuda(Protocol):
    """One device through one binding; see :func:`bdexport.cuda.open_cuda`."""

    name: str  # "pycuda" or "cuda-python"
    note: str  # which binding was chosen and why
    device: int  # ordinal

    def device_name(self) -> str:
        """The GPU's name as its maker gives it."""

    def compute_capability(self) -> tuple[int, int]:
        """Major and minor, such as (9, 0)."""

    def driver_version(self) -> int:
        """CUDA version that the driver supports, as 1000 * major + 10 * minor: 13010 is 13.1."""

    def memory(self) -> tuple[int, int]:
        """Free and total device memory in bytes."""

    def allocate(self, nbytes: int) -> DeviceBuffer:
        """Device memory, not cleared. Raises BackendError: how much was asked for, how much is free."""

    def pinned(self, nbytes: int) -> PinnedBuffer:
        """Page-locked host memory, not cleared. Raises BackendError."""

    def stream(self) -> Stream:
        """A new stream, not the default one, that does not wait for the default one either."""

    def wrap_stream(self, stream: Any) -> Stream:
        """A caller's stream: a raw handle or an object with ``__cuda_stream__``. Raises UsageError for others.

        The object is kept alive as long as the wrapper. The default streams (handles 0, 1 and 2) are refused: work on
        them waits for other streams and cannot be captured. BackendError: this binding cannot use foreign streams.
        """

    def order(self, first: int, then: int) -> None:
        """What is queued on the stream ``then`` from now on waits for what is queued on ``first`` now; raw handles."""

    def event(self) -> Event:
        """A new event that measures time."""

    def copy_to_device(self, target: int, source: Array, stream: Stream) -> None:
        """Queue a copy of a C-contiguous host array; asynchronous where ``source`` is pinned.

        The array must stay as it is until the stream has passed the copy.
        """

    def copy_to_host(self, target: Array, source: int, stream: Stream) -> None:
        """Queue a copy into a C-contiguous, writeable host array; its values are there after a synchronisation."""

    def copy_on_device(self, target: int, source: int, nbytes: int, stream: Stream) -> None:
        """Queue a copy from one device address to another."""

    def can_capture(self) -> tuple[bool, str]:
        """Whether streams can be captured into graphs, and the reason."""

    def capture(self, stream: Stream) -> AbstractContextManager[Capture]:
        """Capture what the block queues on ``stream``; nothing of it runs.

        Raises BackendError when the driver refuses something inside; the stream is usable again afterwards.
        """

    def gather_rows(self, target: int, source: int, rows: Address, row_bytes: int, count: int, stream: Stream) -> None:
        """target[i] = source[rows[i]] for i < count; ``rows`` is int32 on the device; rows are ``row_bytes`` long."""

    def scatter_rows(self, target: int, source: int, rows: Address, row_bytes: int, count: int, stream: Stream) -> None:
        """target[rows[i]] = source[i] for i < count."""

    def close(self) -> None:
        """Give the context back. Buffers, streams and graphs must be freed before."""
