"""CUDA through PyCUDA or cuda-python: memory, streams, events, graphs and two small kernels. Imported on use only."""

from __future__ import annotations

import importlib.util
import re

from bdexport.cuda.base import Capture, Cuda, DeviceBuffer, Event, Graph, PinnedBuffer, Stream
from bdexport.errors import BackendError, UsageError
from bdexport.packages import install_line

PYCUDA, BINDINGS = "pycuda", "cuda-python"
__all__ = [
    "Capture",
    "Cuda",
    "DeviceBuffer",
    "Event",
    "Graph",
    "PinnedBuffer",
    "Stream",
    "cuda_ordinal",
    "open_cuda",
    "why_no_cuda",
]


def open_cuda(prefer: str | None = None, device: int = 0, foreign_stream: bool = False) -> Cuda:
    """CUDA on one device: PyCUDA where it is installed, else cuda-python; the choice and its reason in ``note``.

    ``prefer``: "pycuda" or "cuda-python", and no other. ``foreign_stream``: work will be queued on a stream that
    somebody else made, which PyCUDA cannot do. Raises BackendError: no binding, no driver, driver too old, no GPU, no
    such device.
    """
    if prefer not in (None, PYCUDA, BINDINGS):
        raise UsageError("cuda binding", got=repr(prefer), expected=f"{PYCUDA} or {BINDINGS}")
    if prefer is not None:
        return _opened(prefer, device, f"{prefer}, asked for by name")
    has_bindings = _installed("cuda.bindings")
    if not _installed(PYCUDA):
        if not has_bindings:
            raise BackendError("cuda: neither PyCUDA nor cuda-python is installed", remedy=install_line("gpu"))
        return _opened(BINDINGS, device, "cuda-python: PyCUDA is not installed")
    if foreign_stream and has_bindings:
        return _opened(BINDINGS, device, "cuda-python: PyCUDA cannot work on the caller's stream")
    return _opened(PYCUDA, device, "PyCUDA: it is installed")


def why_no_cuda() -> BackendError | None:
    """Why no device can be used in this process; None where one can."""
    try:
        open_cuda().close()
    except BackendError as error:
        return error
    return None


def cuda_ordinal(device: str) -> int | None:
    """0 for "cuda", N for "cuda:N"; None for anything else."""
    match = re.fullmatch(r"cuda(?::(\d{1,4}))?", device)
    return None if match is None else int(match.group(1) or 0)


def _opened(name: str, device: int, note: str) -> Cuda:
    if name == PYCUDA:
        from bdexport.cuda.through_pycuda import PyCuda

        return PyCuda(device, note)
    from bdexport.cuda.through_bindings import BindingsCuda

    return BindingsCuda(device, note)


def _installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ImportError:  # the package above it is not there
        return False
