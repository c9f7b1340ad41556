"""The CUDA interface on host memory, for tests of what is built on it where no GPU is.

Addresses are real host addresses. Nothing that is queued runs before somebody waits for it, so a test sees a result
that is read too early and memory that is used again too early.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from time import perf_counter
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bdexport.cuda.base import Event, Stream
from bdexport.cuda.driver_api import out_of_memory, stream_handle
from bdexport.errors import BackendError

Work = Callable[[], None]
ALIGNMENT = 256


class CudaDouble:
    """See :class:`bdexport.cuda.base.Cuda`. ``total``: bytes of the device. ``refusal``: why captures fail."""

    name, note, device = "double", "double: host memory", 0

    def __init__(self, total: int = 1 << 30, refusal: str | None = None) -> None:
        self.total, self.refusal = total, refusal
        self.live: dict[int, int] = {}  # bytes by address
        self.pinned_live = 0
        self.allocations = 0
        self.to_host: list[int] = []  # bytes of every copy to the host
        self.streams: dict[int, StreamDouble] = {}
        self.closed = False
        self.device_lock = threading.RLock()  # one thing runs at a time, in the order of its stream

    def device_name(self) -> str:
        return "host memory"

    def compute_capability(self) -> tuple[int, int]:
        return 9, 0

    def driver_version(self) -> int:
        return 13010

    def memory(self) -> tuple[int, int]:
        return self.total - sum(self.live.values()), self.total

    def allocate(self, nbytes: int) -> MemoryDouble:
        if nbytes > self.memory()[0]:
            raise out_of_memory("device", nbytes, self.memory())
        self.allocations += 1
        return MemoryDouble(self, nbytes)

    def pinned(self, nbytes: int) -> PinnedDouble:
        return PinnedDouble(self, nbytes)

    def stream(self) -> StreamDouble:
        return StreamDouble(self, 100 + len(self.streams))

    def wrap_stream(self, stream: Any) -> StreamDouble:
        return self.streams[stream_handle(stream)].lent()

    def order(self, first: int, then: int) -> None:
        event = EventDouble(self)
        event.record(self.streams[first])
        self.streams[then].submit(event.synchronize)

    def event(self) -> EventDouble:
        return EventDouble(self)

    def copy_to_device(self, target: int, source: NDArray[Any], stream: Stream) -> None:
        assert source.flags.c_contiguous
        of(stream).submit(lambda: move(target, source.ctypes.data, source.nbytes))

    def copy_to_host(self, target: NDArray[Any], source: int, stream: Stream) -> None:
        self.to_host.append(target.nbytes)
        of(stream).submit(lambda: move(target.ctypes.data, source, target.nbytes))

    def copy_on_device(self, target: int, source: int, nbytes: int, stream: Stream) -> None:
        of(stream).submit(lambda: move(target, source, nbytes))

    def can_capture(self) -> tuple[bool, str]:
        return True, "the double records"

    @contextmanager
    def capture(self, stream: Stream) -> Iterator[CaptureDouble]:
        recorded: list[Work] = []
        stream_double = of(stream)
        stream_double.recording = recorded
        capture = CaptureDouble()
        try:
            yield capture
            if self.refusal is not None:
                raise BackendError(f"cuda: capture failed ({self.refusal})")
        finally:
            stream_double.recording = None
        capture.graph = GraphDouble(self, recorded)

    def gather_rows(self, target: int, source: int, rows: Any, row_bytes: int, count: int, stream: Stream) -> None:
        numbers = rows.pointer  # the queue keeps no memory alive

        def work() -> None:
            for index, row in enumerate(read(numbers, (count,), np.int32)):
                move(target + index * row_bytes, source + int(row) * row_bytes, row_bytes)

        of(stream).submit(work)

    def scatter_rows(self, target: int, source: int, rows: Any, row_bytes: int, count: int, stream: Stream) -> None:
        numbers = rows.pointer  # the queue keeps no memory alive

        def work() -> None:
            for index, row in enumerate(read(numbers, (count,), np.int32)):
                move(target + int(row) * row_bytes, source + index * row_bytes, row_bytes)

        of(stream).submit(work)

    def close(self) -> None:
        self.closed = True

    def wait_for_all(self) -> None:
        for stream in list(self.streams.values()):
            stream.synchronize()


class MemoryDouble:
    def __init__(self, cuda: CudaDouble, nbytes: int) -> None:
        self._cuda, self.nbytes = cuda, nbytes
        self._memory = np.full(nbytes + ALIGNMENT, 0xFF, np.uint8)  # float32 NaN: what nobody wrote is seen
        self.pointer = -(-self._memory.ctypes.data // ALIGNMENT) * ALIGNMENT
        cuda.live[self.pointer] = nbytes

    def free(self) -> None:
        if self._cuda.live.pop(self.pointer, None) is not None:
            self._cuda.wait_for_all()  # as cuMemFree does
            self._memory[...] = 0xFF


class PinnedDouble:
    def __init__(self, cuda: CudaDouble, nbytes: int) -> None:
        self._cuda, self.array = cuda, np.full(nbytes, 0xFF, np.uint8)
        self.pointer = self.array.ctypes.data
        cuda.pinned_live += 1

    def free(self) -> None:
        self._cuda.pinned_live -= 1


class StreamDouble:
    def __init__(self, cuda: CudaDouble, handle: int, queue: list[Work] | None = None) -> None:
        self._cuda, self.handle = cuda, handle
        self.queue: list[Work] = [] if queue is None else queue
        self.recording: list[Work] | None = None
        self.closed = False
        self.submitted = 0
        cuda.streams.setdefault(handle, self)

    def lent(self) -> StreamDouble:
        """The same queue for somebody who does not own it."""
        return self

    def submit(self, work: Work) -> None:
        self.submitted += 1
        (self.queue if self.recording is None else self.recording).append(work)

    def synchronize(self) -> None:
        if self.recording is not None:  # as CUDA refuses it, and the capture with it
            raise BackendError("cuda: a stream that is being captured cannot be waited for")
        with self._cuda.device_lock:
            while self.queue:
                self.queue.pop(0)()

    def wait(self, event: Event) -> None:
        self.submit(event.synchronize)

    def close(self) -> None:
        self.closed = True


class EventDouble:
    def __init__(self, cuda: CudaDouble) -> None:
        self._cuda = cuda
        self._stream: StreamDouble | None = None
        self._reached = True
        self._at = 0.0

    def record(self, stream: Stream) -> None:
        self._stream, self._reached = of(stream), False
        self._stream.submit(self._reach)

    def _reach(self) -> None:
        self._reached, self._at = True, perf_counter()

    def synchronize(self) -> None:
        with self._cuda.device_lock:
            while not self._reached and self._stream is not None and self._stream.queue:
                self._stream.queue.pop(0)()

    def reached(self) -> bool:
        return self._reached

    def elapsed_ms(self, later: Event) -> float:
        assert isinstance(later, EventDouble)
        return 1e3 * (later._at - self._at)

    def close(self) -> None:
        pass


class CaptureDouble:
    graph: GraphDouble


class GraphDouble:
    alive = 0

    def __init__(self, cuda: CudaDouble, work: list[Work]) -> None:
        self._work: list[Work] | None = work
        GraphDouble.alive += 1

    def launch(self, stream: Stream) -> None:
        assert self._work is not None, "launched after close"
        for work in self._work:
            of(stream).submit(work)

    def close(self) -> None:
        if self._work is not None:
            self._work = None
            GraphDouble.alive -= 1


def of(stream: Stream) -> StreamDouble:
    """The double behind the protocol."""
    assert isinstance(stream, StreamDouble)
    return stream


def move(target: int, source: int, nbytes: int) -> None:
    ctypes.memmove(target, source, nbytes)


def read(pointer: int, shape: tuple[int, ...], dtype: Any = np.float32) -> NDArray[Any]:
    """The array at an address; shares its memory."""
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    return np.frombuffer((ctypes.c_uint8 * size).from_address(pointer), dtype).reshape(shape)
