"""The CUDA interface by PyCUDA: memory, streams, events, kernels; graphs by cuda-bindings where that is installed.

The device's primary context is used, as torch and TensorRT do, and pushed for each call: PyCUDA keeps a stack of
contexts per thread and aborts the process at exit when it is not empty.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bdexport.cuda import graphs
from bdexport.cuda.base import Address, Array, Event, Stream
from bdexport.cuda.driver_api import LEAST_DRIVER, NO_DRIVER, UPDATE, check_device, out_of_memory, version_text
from bdexport.cuda.kernels import GATHER, MAX_ROWS, SCATTER, SOURCE, THREADS, compiled, grid_width
from bdexport.errors import BackendError
from bdexport.packages import install_line

NON_BLOCKING = 1  # CU_STREAM_NON_BLOCKING


class PyCuda:
    """See :class:`bdexport.cuda.base.Cuda`."""

    name = "pycuda"

    def __init__(self, device: int, note: str) -> None:
        self.device, self.note = device, note
        try:
            import pycuda.driver as driver
        except ImportError as error:
            words = " ".join(str(error).split())
            raise BackendError(f"cuda: PyCUDA cannot be imported ({words})", remedy=NO_DRIVER) from error
        self._cuda = driver
        with _reported(driver, "start"):
            driver.init()
            self._driver = int(driver.get_driver_version())
            count = driver.Device.count()
        if self._driver < LEAST_DRIVER:
            got = version_text(self._driver)
            raise BackendError("cuda: driver too old", got=got, expected="CUDA 12.0 or newer", remedy=UPDATE)
        check_device(device, count)
        with _reported(driver, "primary context"):
            self._device = driver.Device(device)
            if device not in _contexts:
                _contexts[device] = self._device.retain_primary_context()
        self._context = _contexts[device]
        self._functions: dict[str, Any] = {}
        self._module: Any = None

    @contextmanager
    def active(self, what: str) -> Iterator[Any]:
        """PyCUDA's driver module with the context current; what it raises becomes BackendError."""
        with _reported(self._cuda, what):
            self._context.push()
            try:
                yield self._cuda
            finally:
                self._cuda.Context.pop()

    def device_name(self) -> str:
        return str(self._device.name())

    def compute_capability(self) -> tuple[int, int]:
        major, minor = self._device.compute_capability()
        return int(major), int(minor)

    def driver_version(self) -> int:
        return self._driver

    def memory(self) -> tuple[int, int]:
        with self.active("memory") as cuda:
            free, total = cuda.mem_get_info()
        return int(free), int(total)

    def allocate(self, nbytes: int) -> _DeviceMemory:
        try:
            with self.active(f"allocation of {nbytes} bytes") as cuda:
                return _DeviceMemory(self, cuda.mem_alloc(nbytes), nbytes)
        except BackendError as error:
            if isinstance(error.__cause__, self._cuda.MemoryError):
                raise out_of_memory("device", nbytes, self.memory()) from error.__cause__
            raise

    def pinned(self, nbytes: int) -> _PinnedMemory:
        try:
            with self.active(f"allocation of {nbytes} pinned bytes") as cuda:
                return _PinnedMemory(self, cuda.pagelocked_empty(nbytes, np.uint8))
        except BackendError as error:
            if isinstance(error.__cause__, self._cuda.MemoryError):
                raise out_of_memory("pinned host", nbytes, self.memory()) from error.__cause__
            raise

    def stream(self) -> _Stream:
        with self.active("new stream") as cuda:
            return _Stream(self, cuda.Stream(NON_BLOCKING))

    def wrap_stream(self, stream: Any) -> _Stream:
        if isinstance(stream, self._cuda.Stream):
            return _Stream(self, stream, owned=False)
        what = "stream: PyCUDA cannot work on a stream that it did not make"
        remedy = "uninstall pycuda so that cuda-python is used, or pass a pycuda.driver.Stream"
        raise BackendError(what, got=type(stream).__name__, remedy=remedy)

    def event(self) -> _Event:
        with self.active("new event") as cuda:
            return _Event(self, cuda.Event())

    def order(self, first: int, then: int) -> None:
        if importlib.util.find_spec("cuda") is None:
            what = "cuda: PyCUDA cannot order streams that it did not make"
            raise BackendError(what, remedy=install_line("gpu"))
        from bdexport.cuda.driver_api import checked, driver_api

        api = driver_api()
        with self.active("ordering streams"):
            event = checked(api, api.cuEventCreate(int(api.CUevent_flags.CU_EVENT_DISABLE_TIMING)), "new event")
            try:
                checked(api, api.cuEventRecord(event, first), "event")
                checked(api, api.cuStreamWaitEvent(then, event, 0), "waiting for an event")
            finally:
                api.cuEventDestroy(event)

    def copy_to_device(self, target: int, source: Array, stream: Stream) -> None:
        with self.active("copy to the device") as cuda:
            cuda.memcpy_htod_async(target, source, _own(stream))

    def copy_to_host(self, target: Array, source: int, stream: Stream) -> None:
        with self.active("copy to the host") as cuda:
            cuda.memcpy_dtoh_async(target, source, _own(stream))

    def copy_on_device(self, target: int, source: int, nbytes: int, stream: Stream) -> None:
        with self.active("copy on the device") as cuda:
            cuda.memcpy_dtod_async(target, source, nbytes, _own(stream))

    def can_capture(self) -> tuple[bool, str]:
        try:
            found = importlib.util.find_spec("cuda.bindings") is not None
        except ImportError:
            found = False
        if not found:
            return False, "PyCUDA has no graph calls, and cuda-python is not installed"
        return True, "PyCUDA has no graph calls; cuda-python captures"

    @contextmanager
    def capture(self, stream: Stream) -> Iterator[graphs.Capturing]:
        with self.active("capture"), graphs.capture(stream) as capturing:
            yield capturing

    def gather_rows(self, target: int, source: int, rows: Address, row_bytes: int, count: int, stream: Stream) -> None:
        self._move_rows(GATHER, target, source, rows, row_bytes, count, stream)

    def scatter_rows(self, target: int, source: int, rows: Address, row_bytes: int, count: int, stream: Stream) -> None:
        self._move_rows(SCATTER, target, source, rows, row_bytes, count, stream)

    def close(self) -> None:
        with self.active("close"):
            self._functions, self._module = {}, None

    def _move_rows(
        self, name: str, target: int, source: int, rows: Address, row_bytes: int, count: int, stream: Stream
    ) -> None:
        if count > MAX_ROWS:
            raise BackendError("cuda: rows of one batch", got=count, expected=f"at most {MAX_ROWS}")
        with self.active(name) as cuda:
            if not self._functions:
                self._module = cuda.module_from_buffer(self._image())
                self._functions = {key: self._module.get_function(key) for key in (GATHER, SCATTER)}
            addresses = (np.uintp(target), np.uintp(source), np.uintp(rows.pointer), np.int64(row_bytes))
            grid = (grid_width(row_bytes), count)
            self._functions[name](*addresses, grid=grid, block=(THREADS, 1, 1), stream=_own(stream))

    def _image(self) -> bytes:
        """The kernels by NVRTC; else by nvcc, which PyCUDA's own compiler calls."""
        try:
            return compiled(SOURCE, self.compute_capability())
        except BackendError:
            from pycuda.compiler import compile as nvcc

            return bytes(nvcc(SOURCE, no_extern_c=True))


_contexts: dict[int, Any] = {}  # by ordinal; retained once per process


@contextmanager
def _reported(driver: Any, what: str) -> Iterator[None]:
    try:
        yield
    except (driver.Error, OSError) as error:
        raise BackendError(f"cuda: {what} failed ({' '.join(str(error).split())})") from error


def _own(stream: Stream) -> Any:
    assert isinstance(stream, _Stream)
    return stream.stream


class _DeviceMemory:
    def __init__(self, cuda: PyCuda, allocation: Any, nbytes: int) -> None:
        self._cuda, self._allocation = cuda, allocation
        self.pointer, self.nbytes = int(allocation), nbytes

    def free(self) -> None:
        allocation, self._allocation = self._allocation, None
        if allocation is not None:
            with self._cuda.active("freeing memory"):
                allocation.free()


class _PinnedMemory:
    def __init__(self, cuda: PyCuda, array: NDArray[np.uint8]) -> None:
        self._cuda, self.array = cuda, array
        self.pointer = int(array.ctypes.data)

    def free(self) -> None:
        with self._cuda.active("freeing pinned memory"):
            self.array = np.empty(0, np.uint8)  # the memory goes with its last array


class _Stream:
    def __init__(self, cuda: PyCuda, stream: Any, owned: bool = True) -> None:
        self._cuda, self.stream, self._owned = cuda, stream, owned
        self.handle = int(stream.handle)

    def synchronize(self) -> None:
        with self._cuda.active("queued work"):
            self.stream.synchronize()

    def wait(self, event: Event) -> None:
        assert isinstance(event, _Event)
        with self._cuda.active("waiting for an event"):
            self.stream.wait_for_event(event.event)

    def close(self) -> None:
        with self._cuda.active("closing a stream"):
            self.stream = None  # PyCUDA destroys a stream of its own when nothing refers to it


class _Event:
    def __init__(self, cuda: PyCuda, event: Any) -> None:
        self._cuda, self.event = cuda, event

    def record(self, stream: Stream) -> None:
        with self._cuda.active("event"):
            self.event.record(_own(stream))

    def synchronize(self) -> None:
        with self._cuda.active("event"):
            self.event.synchronize()

    def reached(self) -> bool:
        with self._cuda.active("event"):
            return bool(self.event.query())

    def elapsed_ms(self, later: Event) -> float:
        assert isinstance(later, _Event)
        with self._cuda.active("event"):
            return float(self.event.time_till(later.event))

    def close(self) -> None:
        with self._cuda.active("event"):
            self.event = None
