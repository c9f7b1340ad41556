"""The driver API by cuda-bindings: imported, started, its results checked."""

from __future__ import annotations

from typing import Any

from bdexport.errors import BackendError
from bdexport.packages import install_line

NO_DRIVER = "install the NVIDIA driver; run `bdexport doctor`"
UPDATE = "update the NVIDIA driver, or install packages for the CUDA version that it supports"
LEAST_DRIVER = 12000  # CUDA version; graph calls have the form used here from 12.0 on


def driver_api() -> Any:
    """The module ``cuda.bindings.driver``. Raises BackendError where it is not installed."""
    try:
        from cuda.bindings import driver
    except ImportError as error:
        what = f"cuda: cuda-python cannot be imported ({' '.join(str(error).split())})"
        raise BackendError(what, remedy=install_line("gpu")) from error
    return driver


def checked(api: Any, result: tuple[Any, ...], what: str) -> Any:
    """The value of a driver call (None, one, or a tuple of them). Raises BackendError: what, and the driver's words."""
    code, *values = result
    if code != api.CUresult.CUDA_SUCCESS:
        raise BackendError(f"cuda: {what} failed ({describe(api, code)})", remedy=_remedy(code))
    return values[0] if len(values) == 1 else tuple(values) or None


def describe(api: Any, code: Any) -> str:
    """An error's name and the driver's sentence about it."""
    name = getattr(code, "name", str(code))
    try:
        _, text = api.cuGetErrorString(code)
    except RuntimeError:  # no driver to ask
        return str(name)
    return f"{name}: {text.decode(errors='replace')}" if text else str(name)


def _remedy(code: Any) -> str | None:
    name = getattr(code, "name", "")
    if name in ("CUDA_ERROR_SYSTEM_DRIVER_MISMATCH", "CUDA_ERROR_UNSUPPORTED_PTX_VERSION", "CUDA_ERROR_NOT_SUPPORTED"):
        return UPDATE
    if name == "CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED":
        return "use the executor chain"
    return None


def start(api: Any) -> int:
    """Start CUDA; the CUDA version that the driver supports. BackendError: no driver, too old, or no GPU."""
    try:
        (code,) = api.cuInit(0)
    except RuntimeError as error:  # libcuda is not there
        words = " ".join(str(error).split())
        raise BackendError(f"cuda: no NVIDIA driver ({words})", remedy=NO_DRIVER) from error
    if code == api.CUresult.CUDA_ERROR_NO_DEVICE:
        raise BackendError("cuda: the driver finds no GPU", remedy="see `nvidia-smi`, and CUDA_VISIBLE_DEVICES")
    checked(api, (code,), "start")
    version = int(checked(api, api.cuDriverGetVersion(), "driver version"))
    if version < LEAST_DRIVER:
        raise BackendError(
            "cuda: driver too old", got=version_text(version), expected="CUDA 12.0 or newer", remedy=UPDATE
        )
    return version


def version_text(version: int) -> str:
    """13010 -> 13.1."""
    return f"{version // 1000}.{version % 1000 // 10}"


def check_device(device: int, count: int) -> None:
    """Raises BackendError for an ordinal that is not there."""
    if not 0 <= device < count:
        got = f"cuda:{device}"
        raise BackendError("cuda: no such device", got=got, expected=f"cuda:0 to cuda:{count - 1}" if count else "none")


def out_of_memory(kind: str, asked: int, memory: tuple[int, int]) -> BackendError:
    """The error for an allocation that the device, or the host, refuses."""
    needed, free, total = (size / 2**20 for size in (asked, *memory))
    what = f"cuda: out of {kind} memory: {needed:.1f} MiB asked for, {free:.1f} of {total:.1f} MiB free on the device"
    return BackendError(what, remedy="use a smaller batch, or free memory of other processes")


def stream_handle(stream: Any) -> int:
    """The handle of a caller's stream: a raw int, ``__cuda_stream__``, torch's, CuPy's or PyCUDA's own stream.

    Raises UsageError for anything else and for the default streams.
    """
    from bdexport.errors import UsageError

    expected = "a raw handle, or an object with __cuda_stream__"
    handle: Any = None
    if isinstance(stream, int) and not isinstance(stream, bool):
        handle = stream
    elif hasattr(stream, "__cuda_stream__"):
        protocol = stream.__cuda_stream__
        version, handle = protocol() if callable(protocol) else protocol
        if version != 0:
            raise UsageError("stream: __cuda_stream__ version", got=version, expected=0)
    else:
        # torch, CuPy and PyCUDA, in versions without __cuda_stream__
        names = ("cuda_stream", "ptr", "handle")
        handle = next((getattr(stream, name) for name in names if hasattr(stream, name)), None)
    if not isinstance(handle, int):
        raise UsageError("stream", got=repr(stream), expected=expected)
    if handle < 3:
        remedy = "pass a stream that you made, such as torch.cuda.Stream()"
        raise UsageError("stream: a default stream", got=handle, expected=f"another one: {expected}", remedy=remedy)
    return handle
