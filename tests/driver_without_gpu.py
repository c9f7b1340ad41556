"""The real cuda-bindings where there is no driver: every call's arguments are converted, then answered from here.

Without libcuda a call of cuda-bindings fails, but only after its arguments have been turned into what the driver
takes. So a wrong number, type or order of arguments is seen on any machine; what the driver would do is not.
Device memory is host memory, copies run at once, and of the kernels ``write_mask`` does; captures keep nothing.
"""

from __future__ import annotations

import ctypes
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

VERSION = 13000


@contextmanager
def standing_in() -> Iterator[DriverWithoutGpu]:
    """Everything that asks for the driver gets this one."""
    import bdexport.cuda.graphs
    import bdexport.cuda.through_bindings as through_bindings
    from bdexport.cuda.driver_api import driver_api

    double = DriverWithoutGpu(driver_api())
    with (
        patch.object(through_bindings, "driver_api", lambda: double),
        patch.object(bdexport.cuda.graphs, "driver_api", lambda: double),
        patch.object(through_bindings, "_contexts", {}),
    ):
        yield double


class DriverWithoutGpu:
    """Stands for the module ``cuda.bindings.driver``. ``calls``: how often each function took its arguments."""

    def __init__(self, driver: Any) -> None:
        self._driver = driver
        self._memory: dict[int, Any] = {}
        self._names: dict[int, str] = {}  # of functions
        self.calls: Counter[str] = Counter()

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._driver, name)
        return self._answered(name, value) if name.startswith("cu") else value

    def _answered(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> tuple[Any, ...]:
            try:
                function(*arguments)
            except RuntimeError as error:  # the arguments were taken, and the library is not there
                assert "cuda" in str(error)  # noqa: PT017 (what was raised decides how the call goes on)
            else:
                raise AssertionError(f"{name}: a driver has answered; this is for machines without one")
            self.calls[name] += 1
            return (self._driver.CUresult.CUDA_SUCCESS, *self._values(name, arguments))

        return call

    def _values(self, name: str, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        """What the function gives besides its result code, in the types that cuda-bindings gives."""
        driver = self._driver
        made: dict[str, Callable[[], tuple[Any, ...]]] = {
            "cuDriverGetVersion": lambda: (VERSION,),
            "cuDeviceGetCount": lambda: (1,),
            "cuDeviceGet": lambda: (driver.CUdevice(0),),
            "cuDeviceGetName": lambda: (b"no GPU\0",),
            "cuDeviceGetAttribute": lambda: (9 if "MAJOR" in arguments[0].name else 0,),
            "cuDevicePrimaryCtxRetain": lambda: (driver.CUcontext(16),),
            "cuCtxGetCurrent": lambda: (driver.CUcontext(16),),
            "cuMemGetInfo": lambda: (1 << 30, 1 << 30),
            "cuMemAlloc": lambda: (driver.CUdeviceptr(self._allocated(arguments[0])),),
            "cuMemHostAlloc": lambda: (self._allocated(arguments[0]),),
            "cuMemHostGetDevicePointer": lambda: (driver.CUdeviceptr(arguments[0]),),
            "cuStreamCreate": lambda: (driver.CUstream(32),),
            "cuEventCreate": lambda: (driver.CUevent(48),),
            "cuEventElapsedTime": lambda: (0.5,),
            "cuStreamEndCapture": lambda: (driver.CUgraph(64),),
            "cuGraphCreate": lambda: (driver.CUgraph(64),),
            "cuGraphInstantiate": lambda: (driver.CUgraphExec(80),),
            "cuGraphGetNodes": lambda: ([driver.CUgraphNode(96)] if len(arguments) > 1 else [], 1),
            "cuGraphAddNode": lambda: (driver.CUgraphNode(96),),
            "cuGraphConditionalHandleCreate": lambda: (driver.CUgraphConditionalHandle(112),),
            "cuModuleLoadData": lambda: (driver.CUmodule(128),),
            "cuModuleGetFunction": lambda: (self._named(arguments[1]),),
            "cuGetErrorString": lambda: (b"",),
        }
        work = {"cuMemcpyHtoDAsync": self._copy, "cuMemcpyDtoHAsync": self._copy, "cuMemcpyDtoDAsync": self._copy}
        if name in work:
            work[name](*arguments)
        if name == "cuLaunchKernel":
            self._launch(*arguments)
        return made[name]() if name in made else ()

    def _allocated(self, nbytes: int) -> int:
        memory = (ctypes.c_uint8 * nbytes)()
        self._memory[ctypes.addressof(memory)] = memory
        return ctypes.addressof(memory)

    def _named(self, name: bytes) -> Any:
        handle = 256 + len(self._names)
        self._names[handle] = name.decode()
        return self._driver.CUfunction(handle)

    def _copy(self, target: int, source: int, nbytes: int, _stream: int) -> None:
        ctypes.memmove(target, source, nbytes)

    def _launch(self, function: Any, *rest: Any) -> None:
        threads, parameters = rest[3], rest[8]
        if self._names[int(function)] == "write_mask":
            addresses = (ctypes.c_void_p * 3).from_address(parameters)
            target, flag = (ctypes.c_void_p.from_address(address or 0).value or 0 for address in addresses[:2])
            turn = ctypes.c_uint.from_address(addresses[2] or 0).value
            ctypes.memset(target, turn % 256, threads)
            ctypes.c_uint.from_address(flag).value = turn
