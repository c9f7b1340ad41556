"""ONNX Runtime's CUDA provider: the bundle's graphs as exported, optimised when they are loaded, on device memory.

A bundle's engines are laid out for the CPU and are not used. Every part's session reads and writes device addresses
(IOBinding) and queues on the session's stream; without the two synchronisations that ``Run`` does by default, nothing
but the policy's probabilities and the logits makes the host wait. A stock session aborts inside a stream capture, so
paths run as ``chain``.
"""

from __future__ import annotations

import importlib.util
import io
import subprocess
import sys
from collections.abc import Mapping
from contextlib import redirect_stdout
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from bdexport.backends.base import Readable
from bdexport.backends.device_session import DeviceSession
from bdexport.backends.onnxruntime_common import NO_CAPTURE, Reported, forget_model, import_onnxruntime
from bdexport.bundle import INPUT_NAME, OUTPUT_NAME
from bdexport.cuda import open_cuda
from bdexport.errors import BackendError
from bdexport.packages import install_line

if TYPE_CHECKING:
    from bdexport.bundle import Bundle, PartEntry
    from bdexport.cuda import Stream

PROVIDER = "CUDAExecutionProvider"
LIBRARIES = (
    "install the NVIDIA driver, and CUDA and cuDNN of the versions that onnxruntime-gpu names (see `bdexport doctor`)"
)
CACHED_BINDINGS = 64  # per part; one for each pair of addresses and batch
PROVIDER_LIBRARIES = ("libonnxruntime_providers_shared.so", "libonnxruntime_providers_cuda.so")  # in this order
LOAD_CHECK_TIMEOUT_S = 60


def open_on_cuda(bundle: Bundle, device: str, ordinal: int, stream: Any = None) -> DeviceSession:
    """Load the bundle's graphs on a GPU. Raises BackendError: no provider, no driver, no such device, out of memory."""
    if bundle.manifest.precision != "fp32":  # scales and types stand in the engines, which are the CPU's
        what = f"{bundle.path} [onnxruntime]: device {device} runs the graphs, which are float32"
        raise BackendError(
            what, got=bundle.manifest.precision, expected="fp32", remedy="build it with --precision fp32"
        )
    ort = import_onnxruntime()
    if PROVIDER not in ort.get_available_providers():
        what = "backend onnxruntime: no such device"
        remedy = f"pip uninstall onnxruntime, then {install_line('gpu')}: both at once hide the CUDA provider"
        expected = f"cpu (this onnxruntime {ort.__version__} has no CUDA provider)"
        raise BackendError(what, got=repr(device), expected=expected, remedy=remedy)
    preload_cuda_libraries(ort)
    cuda = open_cuda(device=ordinal, foreign_stream=stream is not None)
    manifest = bundle.manifest
    # The sessions are made with the stream's handle, hence before the device session, which owns it from then on.
    own = cuda.stream() if stream is None else cuda.wrap_stream(stream)
    engines: dict[str, OrtCudaEngine] = {}
    try:
        options = provider_options(ordinal, own.handle)
        for part, entry in manifest.parts.items():
            engines[part] = OrtCudaEngine(part, bundle.graph_file(part), entry, options, ordinal)
    except BaseException:
        for engine in engines.values():
            engine.close()
        own.close()
        cuda.close()
        raise
    note = "onnxruntime: the graphs as exported, optimised at load; float32, TF32 off"
    return DeviceSession(
        *("onnxruntime", manifest, engines, cuda),
        stream=stream,
        made=own,
        notes=(note, f"graph: {NO_CAPTURE}"),
        capturable=(False, NO_CAPTURE),
    )


def provider_options(ordinal: int, stream: int) -> dict[str, str]:
    """Options of the CUDA provider, all of them text. Memory grows by what is asked for, not in powers of two."""
    return {
        "device_id": str(ordinal),
        "user_compute_stream": str(stream),
        "arena_extend_strategy": "kSameAsRequested",
        # EXHAUSTIVE times every algorithm again for each new batch size; mixed batches have new ones all the time.
        "cudnn_conv_algo_search": "HEURISTIC",
        "use_tf32": "0",
        "do_copy_in_default_stream": "1",
    }


class OrtCudaEngine:
    """One part; see :class:`bdexport.backends.device_session.DeviceEngine`."""

    scratch_bytes = 0  # the provider's own arena

    def __init__(self, part: str, graph: Readable, entry: PartEntry, options: Mapping[str, str], ordinal: int) -> None:
        import onnxruntime as ort

        self._part, self._entry, self._ordinal = part, entry, ordinal
        session_options = ort.SessionOptions()
        session_options.log_severity_level = 4
        session_options.intra_op_num_threads = session_options.inter_op_num_threads = 1
        # Operators that would run on the CPU copy between host and device in every call: an error, not a slow answer.
        session_options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
        try:
            with Reported(part, f"cannot load {graph} on CUDA"):
                model, providers = graph.read_bytes(), [(PROVIDER, dict(options))]
                self._session: Any = ort.InferenceSession(model, session_options, providers=providers)
                forget_model(self._session)
        except BackendError as error:
            raise _provider_error(part) or error from error
        if PROVIDER not in self._session.get_providers():
            what = f"{part} [onnxruntime]: the CUDA provider could not be started"
            got = ", ".join(self._session.get_providers())
            raise _provider_error(part) or BackendError(what, got=got, expected=PROVIDER, remedy=LIBRARIES)
        self._run_options = ort.RunOptions()
        self._run_options.add_run_config_entry("disable_synchronize_execution_providers", "1")
        self._bindings: dict[tuple[int, int, int], Any] = {}

    def use_scratch(self, pointer: int) -> None:
        """Never called: ``scratch_bytes`` is 0."""

    def enqueue(self, source: int, target: int, batch: int, stream: Stream) -> None:
        """The stream is the one that the session was made with."""
        key = (source, target, batch)
        binding = self._bindings.get(key)
        with Reported(self._part, "failed"):
            if binding is None:
                binding = self._bound(source, target, batch)
                if len(self._bindings) >= CACHED_BINDINGS:
                    self._bindings.clear()
                self._bindings[key] = binding
            self._session.run_with_iobinding(binding, self._run_options)

    def close(self) -> None:
        self._bindings, self._session = {}, None

    def _bound(self, source: int, target: int, batch: int) -> Any:
        binding = self._session.io_binding()
        ends = (
            (binding.bind_input, INPUT_NAME, self._entry.input.shape, source),
            (binding.bind_output, OUTPUT_NAME, self._entry.output.shape, target),
        )
        for bind, name, shape, pointer in ends:
            bind(name, "cuda", self._ordinal, np.float32, [batch, *shape], pointer)
        return binding


def preload_cuda_libraries(ort: Any) -> None:
    """Load CUDA's and cuDNN's libraries before the provider asks for them, from NVIDIA's packages wherever they are.

    ONNX Runtime itself looks beside its own package only; PyTorch's wheels may have them in another folder of the path.
    """
    preload = getattr(ort, "preload_dlls", None)
    if preload is None:
        return
    with redirect_stdout(io.StringIO()):  # it prints what it does not find; what counts is quoted when loading fails
        for folder in nvidia_library_folders():
            preload(directory=str(folder))
        preload()


def nvidia_library_folders() -> list[Path]:
    """The folders with libraries of NVIDIA's Python packages (``nvidia/cu13/lib``, ``nvidia/cudnn/lib``, ..)."""
    package = importlib.util.find_spec("nvidia")  # a namespace package: one place for each folder of the path
    places = [] if package is None else package.submodule_search_locations or []
    return [folder for place in places for folder in sorted(Path(place).glob("*/lib")) if folder.is_dir()]


def _provider_error(part: str) -> BackendError | None:
    """Why the provider's library cannot be loaded, in the linker's words; None where it can."""
    said = _linkers_words()
    if said is None:
        return None
    return BackendError(f"{part} [onnxruntime]: the CUDA provider cannot be loaded ({said})", remedy=LIBRARIES)


@lru_cache(maxsize=1)
def _linkers_words() -> str | None:
    """What the linker says of the provider's libraries; None where it has nothing to say. Asked once per process.

    ONNX Runtime writes these words to stderr alone and goes on without the provider. Asked in a process of its own:
    a provider that is loaded by hand before ONNX Runtime has introduced itself cannot be used afterwards.
    """
    code = f"from {__name__} import load_provider_by_hand; load_provider_by_hand()"
    try:
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, timeout=LOAD_CHECK_TIMEOUT_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    said = done.stdout.strip().splitlines()
    return said[-1] if said else None


def load_provider_by_hand() -> None:
    """Print the linker's words if a library of the provider cannot be loaded, nothing otherwise."""
    import ctypes

    ort = import_onnxruntime()
    preload_cuda_libraries(ort)
    try:
        for name in PROVIDER_LIBRARIES:
            ctypes.CDLL(str(Path(ort.__file__).parent / "capi" / name), ctypes.RTLD_GLOBAL)
    except OSError as error:
        print(error)


def cuda_reason() -> str | None:
    """Why the CUDA provider cannot be used here; None where it can, as far as is known without loading a graph."""
    import onnxruntime as ort

    from bdexport.cuda import why_no_cuda

    if PROVIDER not in ort.get_available_providers():
        return f"onnxruntime {ort.__version__} has no CUDA provider"
    error = why_no_cuda()
    return None if error is None else str(error)
