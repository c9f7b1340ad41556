"""The CUDA interface by cuda-python (``cuda.bindings``): the driver API, everything it has."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bdexport.cuda import graphs
from bdexport.cuda.base import Address, Array, Event, Stream
from bdexport.cuda.driver_api import check_device, checked, describe, driver_api, out_of_memory, start, stream_handle
from bdexport.cuda.kernels import GATHER, MAX_ROWS, SCATTER, SOURCE, THREADS, compiled, grid_width
from bdexport.errors import BackendError

OUT_OF_MEMORY = "CUDA_ERROR_OUT_OF_MEMORY"


class BindingsCuda:
    """See :class:`bdexport.cuda.base.Cuda`.

    The primary context is retained and stays so for as long as the process lives, as torch's does: arrays that were
    given to others may outlive the session.
    """

    name = "cuda-python"

    def __init__(self, device: int, note: str) -> None:
        self.device, self.note = device, note
        self.api = api = driver_api()
        self._driver = start(api)
        check_device(device, int(checked(api, api.cuDeviceGetCount(), "count of devices")))
        self._ordinal = checked(api, api.cuDeviceGet(device), "device")
        self._context = _primary_context(api, device, self._ordinal)
        self._module: Any = None
        self._functions: dict[str, Any] = {}
        self.current()

    def current(self) -> None:
        """Make the context current in this thread."""
        checked(self.api, self.api.cuCtxSetCurrent(self._context), "context")

    def device_name(self) -> str:
        name: bytes = checked(self.api, self.api.cuDeviceGetName(256, self._ordinal), "device name")
        return name.split(b"\0")[0].decode(errors="replace")

    def compute_capability(self) -> tuple[int, int]:
        attribute = self.api.CUdevice_attribute
        major, minor = (
            int(checked(self.api, self.api.cuDeviceGetAttribute(item, self._ordinal), "compute capability"))
            for item in (
                attribute.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR,
                attribute.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR,
            )
        )
        return major, minor

    def driver_version(self) -> int:
        return self._driver

    def memory(self) -> tuple[int, int]:
        self.current()
        free, total = checked(self.api, self.api.cuMemGetInfo(), "memory")
        return int(free), int(total)

    def allocate(self, nbytes: int) -> _DeviceMemory:
        self.current()
        code, pointer = self.api.cuMemAlloc(nbytes)
        if code.name == OUT_OF_MEMORY:
            raise out_of_memory("device", nbytes, self.memory())
        checked(self.api, (code,), f"allocation of {nbytes} bytes")
        return _DeviceMemory(self, int(pointer), nbytes)

    def pinned(self, nbytes: int) -> _PinnedMemory:
        self.current()
        code, pointer = self.api.cuMemHostAlloc(nbytes, 0)
        if code.name == OUT_OF_MEMORY:
            raise out_of_memory("pinned host", nbytes, self.memory())
        checked(self.api, (code,), f"allocation of {nbytes} pinned bytes")
        return _PinnedMemory(self, int(pointer), nbytes)

    def stream(self) -> _Stream:
        self.current()
        flags = int(self.api.CUstream_flags.CU_STREAM_NON_BLOCKING)
        return _Stream(self, int(checked(self.api, self.api.cuStreamCreate(flags), "new stream")), None)

    def wrap_stream(self, stream: Any) -> _Stream:
        return _Stream(self, stream_handle(stream), stream)

    def event(self) -> _Event:
        self.current()
        return _Event(self, checked(self.api, self.api.cuEventCreate(0), "new event"))

    def order(self, first: int, then: int) -> None:
        self.current()
        flags = int(self.api.CUevent_flags.CU_EVENT_DISABLE_TIMING)
        event = checked(self.api, self.api.cuEventCreate(flags), "new event")
        try:
            checked(self.api, self.api.cuEventRecord(event, first), "event")
            checked(self.api, self.api.cuStreamWaitEvent(then, event, 0), "waiting for an event")
        finally:
            self.api.cuEventDestroy(event)  # the driver frees it once it is reached

    def copy_to_device(self, target: int, source: Array, stream: Stream) -> None:
        self.current()
        address = _address(source)
        checked(
            self.api, self.api.cuMemcpyHtoDAsync(target, address, source.nbytes, stream.handle), "copy to the device"
        )

    def copy_to_host(self, target: Array, source: int, stream: Stream) -> None:
        self.current()
        address = _address(target)
        checked(self.api, self.api.cuMemcpyDtoHAsync(address, source, target.nbytes, stream.handle), "copy to the host")

    def copy_on_device(self, target: int, source: int, nbytes: int, stream: Stream) -> None:
        self.current()
        checked(self.api, self.api.cuMemcpyDtoDAsync(target, source, nbytes, stream.handle), "copy on the device")

    def can_capture(self) -> tuple[bool, str]:
        return True, "cuda-python captures graphs"

    def capture(self, stream: Stream) -> AbstractContextManager[graphs.Capturing]:
        self.current()
        return graphs.capture(stream)

    def gather_rows(self, target: int, source: int, rows: Address, row_bytes: int, count: int, stream: Stream) -> None:
        self._move_rows(GATHER, target, source, rows, row_bytes, count, stream)

    def scatter_rows(self, target: int, source: int, rows: Address, row_bytes: int, count: int, stream: Stream) -> None:
        self._move_rows(SCATTER, target, source, rows, row_bytes, count, stream)

    def close(self) -> None:
        module, self._module, self._functions = self._module, None, {}
        if module is not None:
            self.current()
            self.api.cuModuleUnload(module)

    def launch(
        self, function: Any, grid: tuple[int, int], threads: int, arguments: tuple[Any, ...], stream: Stream
    ) -> None:
        """Queue a kernel; ``arguments`` are ctypes values, copied before this returns."""
        addresses = (ctypes.c_void_p * len(arguments))(*(ctypes.addressof(argument) for argument in arguments))
        result = self.api.cuLaunchKernel(
            *(function, *grid, 1, threads, 1, 1, 0, stream.handle, ctypes.addressof(addresses), 0)
        )
        checked(self.api, result, "kernel launch")

    def load(self, image: bytes, names: tuple[str, ...]) -> tuple[Any, dict[str, Any]]:
        """A module and its functions by name."""
        self.current()
        module = checked(self.api, self.api.cuModuleLoadData(image), "loading kernels")
        functions = {
            name: checked(self.api, self.api.cuModuleGetFunction(module, name.encode()), f"kernel {name}")
            for name in names
        }
        return module, functions

    def _move_rows(
        self, name: str, target: int, source: int, rows: Address, row_bytes: int, count: int, stream: Stream
    ) -> None:
        if not self._functions:
            self._module, self._functions = self.load(compiled(SOURCE, self.compute_capability()), (GATHER, SCATTER))
        if count > MAX_ROWS:
            raise BackendError("cuda: rows of one batch", got=count, expected=f"at most {MAX_ROWS}")
        self.current()
        pointers = (ctypes.c_void_p(target), ctypes.c_void_p(source), ctypes.c_void_p(rows.pointer))
        grid = (grid_width(row_bytes), count)
        self.launch(self._functions[name], grid, THREADS, (*pointers, ctypes.c_longlong(row_bytes)), stream)


def _primary_context(api: Any, device: int, ordinal: Any) -> Any:
    if device not in _contexts:
        _contexts[device] = checked(api, api.cuDevicePrimaryCtxRetain(ordinal), "primary context")
    return _contexts[device]


_contexts: dict[int, Any] = {}  # by ordinal; retained once per process


def _address(array: Array) -> int:
    if not array.flags.c_contiguous:
        raise ValueError("only C-contiguous arrays are copied")  # a bug of ours
    return int(array.ctypes.data)


class _DeviceMemory:
    def __init__(self, cuda: BindingsCuda, pointer: int, nbytes: int) -> None:
        self._cuda, self.pointer, self.nbytes = cuda, pointer, nbytes
        self._freed = False

    def free(self) -> None:
        if not self._freed:
            self._freed = True
            self._cuda.current()
            self._cuda.api.cuMemFree(self.pointer)


class _PinnedMemory:
    def __init__(self, cuda: BindingsCuda, pointer: int, nbytes: int) -> None:
        self._cuda, self.pointer = cuda, pointer
        self.array: NDArray[np.uint8] = np.ctypeslib.as_array((ctypes.c_uint8 * nbytes).from_address(pointer))
        self._freed = False

    def free(self) -> None:
        if not self._freed:
            self._freed = True
            self._cuda.current()
            self._cuda.api.cuMemFreeHost(self.pointer)


class _Stream:
    def __init__(self, cuda: BindingsCuda, handle: int, owner: Any) -> None:
        self._cuda, self.handle, self._owner = cuda, handle, owner
        self._closed = owner is not None

    def synchronize(self) -> None:
        self._cuda.current()
        code = self._cuda.api.cuStreamSynchronize(self.handle)[0]
        if code != self._cuda.api.CUresult.CUDA_SUCCESS:
            lost = not code.name.startswith("CUDA_ERROR_STREAM_CAPTURE")  # that one only ends the capture
            remedy = "the process must be started again" if lost else None
            raise BackendError(f"cuda: queued work failed ({describe(self._cuda.api, code)})", remedy=remedy)

    def wait(self, event: Event) -> None:
        self._cuda.current()
        assert isinstance(event, _Event)
        checked(self._cuda.api, self._cuda.api.cuStreamWaitEvent(self.handle, event.event, 0), "waiting for an event")

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            self._cuda.current()
            self._cuda.api.cuStreamDestroy(self.handle)


class _Event:
    def __init__(self, cuda: BindingsCuda, event: Any) -> None:
        self._cuda, self.event = cuda, event
        self._closed = False

    def record(self, stream: Stream) -> None:
        self._cuda.current()
        checked(self._cuda.api, self._cuda.api.cuEventRecord(self.event, stream.handle), "event")

    def synchronize(self) -> None:
        self._cuda.current()
        checked(self._cuda.api, self._cuda.api.cuEventSynchronize(self.event), "event")

    def reached(self) -> bool:
        self._cuda.current()
        api = self._cuda.api
        (code,) = api.cuEventQuery(self.event)
        if code == api.CUresult.CUDA_ERROR_NOT_READY:
            return False
        checked(api, (code,), "event")
        return True

    def elapsed_ms(self, later: Event) -> float:
        assert isinstance(later, _Event)
        self._cuda.current()
        return float(checked(self._cuda.api, self._cuda.api.cuEventElapsedTime(self.event, later.event), "event"))

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            self._cuda.current()
            self._cuda.api.cuEventDestroy(self.event)


@contextmanager
def on_device(device: int = 0) -> Iterator[BindingsCuda]:
    """The interface for a ``with`` block: what experiments use."""
    cuda = BindingsCuda(device, "cuda-python, asked for by name")
    try:
        yield cuda
    finally:
        cuda.close()
