"""The CUDA interface through PyCUDA, on a stand-in with PyCUDA's names and signatures: PyCUDA has no wheel."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from bdexport.cuda import open_cuda
from bdexport.errors import BackendError, UsageError

TOTAL = 1 << 20


class Error(Exception):
    pass


class OutOfMemoryError(Error):
    pass


class Context:
    """PyCUDA aborts the process when contexts are left on its stack."""

    stack: list[Context] = []  # noqa: RUF012 (PyCUDA's is the process's, too)

    def push(self) -> None:
        self.stack.append(self)

    @staticmethod
    def pop() -> None:
        Context.stack.pop()


class Device:
    def __init__(self, ordinal: int) -> None:
        pass

    @staticmethod
    def count() -> int:
        return 1

    def name(self) -> str:
        return "stand-in"

    def compute_capability(self) -> tuple[int, int]:
        return 9, 0

    def retain_primary_context(self) -> Context:
        return Context()


class Allocation:
    def __init__(self, nbytes: int) -> None:
        self._memory = np.zeros(nbytes, np.uint8)

    def __int__(self) -> int:
        return int(self._memory.ctypes.data)

    def free(self) -> None:
        assert Context.stack
        if self._memory is None:
            raise Error("invalid handle")
        self._memory = None  # type: ignore[assignment]


class Stream:
    handle = 500

    def __init__(self, flags: int = 0) -> None:
        assert flags == 1, "a stream that waits for the default one"

    def synchronize(self) -> None:
        assert Context.stack

    def wait_for_event(self, event: Event) -> None:
        assert isinstance(event, Event)


class Event:
    def __init__(self, flags: int = 0) -> None:
        pass

    def record(self, stream: Stream | None = None) -> Event:
        return self

    def synchronize(self) -> Event:
        return self

    def query(self) -> bool:
        assert Context.stack
        return True

    def time_till(self, event: Event) -> float:
        return 1.5


def stand_in() -> ModuleType:
    driver = ModuleType("pycuda.driver")

    def mem_alloc(nbytes: int) -> Allocation:
        assert Context.stack
        if nbytes > TOTAL:
            raise OutOfMemoryError("cuMemAlloc failed: out of memory")
        return Allocation(nbytes)

    def memcpy_htod_async(dest: int, src: Any, stream: Stream | None = None) -> None:
        assert isinstance(stream, Stream)
        ctypes.memmove(dest, src.ctypes.data, src.nbytes)

    def memcpy_dtoh_async(dest: Any, src: int, stream: Stream | None = None) -> None:
        assert isinstance(stream, Stream)
        ctypes.memmove(dest.ctypes.data, src, dest.nbytes)

    def memcpy_dtod_async(dest: int, src: int, size: int, stream: Stream | None = None) -> None:
        assert isinstance(stream, Stream)
        ctypes.memmove(dest, src, size)

    names: dict[str, Any] = {
        "init": lambda: None,
        "get_driver_version": lambda: 13010,
        "mem_get_info": lambda: (TOTAL, TOTAL),
        "pagelocked_empty": lambda shape, dtype: np.empty(shape, dtype),
        "mem_alloc": mem_alloc,
        "memcpy_htod_async": memcpy_htod_async,
        "memcpy_dtoh_async": memcpy_dtoh_async,
        "memcpy_dtod_async": memcpy_dtod_async,
        "Error": Error,
        "MemoryError": OutOfMemoryError,
        "Context": Context,
        "Device": Device,
        "Stream": Stream,
        "Event": Event,
    }
    driver.__dict__.update(names)
    return driver


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    from bdexport.cuda import through_pycuda

    package = ModuleType("pycuda")
    package.driver = stand_in()  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "pycuda", package)
    monkeypatch.setitem(sys.modules, "pycuda.driver", package.driver)
    monkeypatch.setattr(through_pycuda, "_contexts", {})
    yield open_cuda("pycuda")
    assert Context.stack == []


def test_copies_there_and_back(cuda: Any) -> None:
    """Oracle: the values; no context is left on the stack."""
    stream, pinned, first, second = cuda.stream(), cuda.pinned(64), cuda.allocate(64), cuda.allocate(64)
    pinned.array[...] = np.arange(64)
    cuda.copy_to_device(first.pointer, pinned.array, stream)
    cuda.copy_on_device(second.pointer, first.pointer, 64, stream)
    got = np.zeros(64, np.uint8)
    cuda.copy_to_host(got, second.pointer, stream)
    begin, end = cuda.event(), cuda.event()
    begin.record(stream)
    end.record(stream)
    stream.wait(end)
    stream.synchronize()
    assert np.array_equal(got, np.arange(64))
    assert end.reached() is True
    assert begin.elapsed_ms(end) == 1.5
    for item in (first, second, pinned):
        item.free()
        item.free()
    stream.close()
    cuda.close()
    assert (cuda.device_name(), cuda.compute_capability(), cuda.driver_version()) == ("stand-in", (9, 0), 13010)


def test_failures_are_ours(cuda: Any) -> None:
    """Oracle: BackendError with numbers, and for a stream that PyCUDA did not make."""
    with pytest.raises(BackendError, match=r"out of device memory: 2\.0 MiB asked for, 1\.0 of 1\.0 MiB free"):
        cuda.allocate(2 << 20)
    with pytest.raises(BackendError, match="PyCUDA cannot work on a stream that it did not make"):
        cuda.wrap_stream(12345)
    with pytest.raises(BackendError, match="got cuda:1, expected cuda:0 to cuda:0"):
        open_cuda("pycuda", device=1)
    with pytest.raises(UsageError):
        open_cuda("pycudas")


def test_its_own_streams_can_be_lent(cuda: Any) -> None:
    """Oracle: the same handle; nothing is destroyed."""
    stream = Stream(1)
    lent = cuda.wrap_stream(stream)
    assert lent.handle == 500
    lent.close()
    lent.close()
