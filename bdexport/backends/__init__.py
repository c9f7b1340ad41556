"""The backends, in one visible table; a backend's module is imported when it is asked for by name."""

from __future__ import annotations

from importlib import import_module

from bdexport.backends.base import Backend
from bdexport.errors import BackendError, UsageError

BACKENDS: dict[str, str] = {
    "onnxruntime": "bdexport.backends.onnxruntime:OnnxRuntimeBackend",
    "openvino": "bdexport.backends.openvino:OpenVinoBackend",
    "tensorrt": "bdexport.backends.tensorrt:TensorRTBackend",
    "tensorrt-rtx": "bdexport.backends.tensorrt:TensorRTForRTXBackend",
    "torch": "bdexport.backends.torch:TorchBackend",
    "null": "bdexport.backends.null:NullBackend",
}


def get_backend(name: str) -> Backend:
    """The backend of that name, usable in this process.

    Raises :class:`UsageError` for a name that is not in the table and :class:`BackendError`, with the reason and the
    remedy, for a backend that cannot be used here.
    """
    backend = backend_class(name)()
    availability = backend.available()
    if not availability.ok:
        raise BackendError(f"backend {name}: not available ({availability.reason})", remedy=availability.remedy)
    return backend


def get_builder(name: str) -> Backend:
    """The backend of that name, able to build engines in this process, though perhaps not to run them.

    Raises as :func:`get_backend`.
    """
    backend = backend_class(name)()
    availability = backend.can_build()
    if not availability.ok:
        what = f"backend {name}: cannot build here ({availability.reason})"
        raise BackendError(what, remedy=availability.remedy)
    return backend


def backend_class(name: str) -> type[Backend]:
    """The class behind a name, available here or not. Raises :class:`UsageError` for an unknown name."""
    if name not in BACKENDS:
        raise UsageError("unknown backend", got=repr(name), expected="one of " + ", ".join(BACKENDS))
    module, _, class_name = BACKENDS[name].partition(":")
    found: type[Backend] = getattr(import_module(module), class_name)
    return found
