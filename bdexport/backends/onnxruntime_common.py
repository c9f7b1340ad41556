"""What building and running with ONNX Runtime share: session options, its exceptions, and its blocked layout."""

from __future__ import annotations

import os
from collections.abc import Mapping
from importlib import import_module
from typing import Any

import numpy as np

from bdexport.backends import onnx_wire as wire
from bdexport.backends.first_use import once
from bdexport.errors import BackendError

NO_TELEMETRY = "ORT_DISABLE_TELEMETRY"
NO_CAPTURE = "ONNX Runtime's CUDA provider cannot be captured into a graph from outside"
NCHWC_DOMAIN = "com.microsoft.nchwc"  # ONNX Runtime's operators on the blocked layout
PART_PROPERTY, BLOCK_PROPERTY = "bdexport.part", "bdexport.channel_block"
INPUT_PROPERTY, OUTPUT_PROPERTY = "bdexport.input", "bdexport.output"
BLOCKED, PLAIN = "blocked", "plain"
FAILURES = (
    *("EPFail", "EngineError", "Fail", "InvalidArgument", "InvalidGraph", "InvalidProtobuf", "ModelLoaded"),
    *("NoModel", "NoSuchFile", "NotImplemented", "RuntimeException"),
)


@once
def import_onnxruntime() -> Any:
    """The package ``onnxruntime`` with its telemetry off: its newer releases report to a server, on Linux as well.

    The variable is what they read when they start, where a program has not set it itself; the call is what they offer
    afterwards.
    """
    os.environ.setdefault(NO_TELEMETRY, "1")
    onnxruntime = import_module("onnxruntime")
    if hasattr(onnxruntime, "disable_telemetry_events"):
        onnxruntime.disable_telemetry_events()
    return onnxruntime


def session_options(threads: int, optimise: bool) -> Any:
    """Options of one ONNX Runtime session. Errors come as exceptions, so its own log stays silent."""
    ort = import_onnxruntime()
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.log_severity_level = 4
    level = ort.GraphOptimizationLevel
    options.graph_optimization_level = level.ORT_ENABLE_ALL if optimise else level.ORT_DISABLE_ALL
    # A pool that goes on spinning after its session's run takes the core from the next session's.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    return options


def load_model(model: bytes, threads: int, weights: Mapping[str, Any] | None = None) -> Any:
    """A session. ``weights``: OrtValues that stand for the model's initializers of those names, shared or not."""
    ort = import_onnxruntime()
    options = session_options(threads, optimise=False)
    if _arena_is_shared():
        options.add_session_config_entry("session.use_env_allocators", "1")
    for name, value in (weights or {}).items():
        options.add_initializer(name, value)
    # Its fallback would print to stdout and try the same again.
    session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"], enable_fallback=0)
    forget_model(session)
    return session


def new_run_options() -> Any:
    """Options of one call, by which its runs are ended."""
    options = import_onnxruntime().RunOptions()
    # "No graph capture", as without it; but ONNX Runtime 1.31 asks in every run, and takes 28 us to find nothing.
    options.add_run_config_entry("gpu_graph_id", "-1")
    return options


def forget_model(session: Any) -> None:
    """Let go of the model's bytes, which ONNX Runtime's Python class keeps to make the session again elsewhere.

    Measured, ResNet-50 with its parts: 515 -> 305 MB.
    """
    if hasattr(session, "_model_bytes"):
        session._model_bytes = None


@once
def failures() -> tuple[type[Exception], ...]:
    """The exceptions of ONNX Runtime, which have no common base of their own."""
    import_onnxruntime()
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    return tuple(getattr(state, name) for name in FAILURES if hasattr(state, name))


@once
def _arena_is_shared() -> bool:
    """Whether sessions may draw on one arena: otherwise each keeps the largest activations that it ever had for itself.

    Measured, ResNet-110, chain, after a batch of 64: 120 -> 44 MB, times alike. Sessions of the host program have no
    part in it unless they ask for it. False where this build cannot, or where the host has set up an arena of its own.
    """
    import onnxruntime as ort

    memory = ort.OrtMemoryInfo("Cpu", ort.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, ort.OrtMemType.DEFAULT)
    refused: tuple[type[Exception], ...] = (RuntimeError, ValueError, *failures())
    try:
        ort.create_and_register_allocator(memory, ort.OrtArenaCfg({"arena_extend_strategy": 1}))
    except refused:
        return False
    return True


@once
def channel_block() -> int:
    """Channels per block in ONNX Runtime's blocked layout on this processor (16 with AVX-512, 8 with AVX2); 1: none.

    Found by converting a small tensor: the value that follows the first pixel's block is the second pixel's first.
    """
    channels = 64
    probe = wire.message(
        [
            (wire.GRAPH_NODE, wire.node("ReorderInput", ["x"], "y", domain=NCHWC_DOMAIN)),
            (wire.GRAPH_NAME, "probe"),
            (wire.GRAPH_INPUT, wire.tensor_info("x", wire.FLOAT, (1, channels, 1, 2))),
            (wire.GRAPH_OUTPUT, wire.tensor_info("y", wire.FLOAT, (1, channels, 1, 2))),
        ]
    )
    opsets = [
        (wire.MODEL_OPSET, wire.message([(1, domain), (2, version)]))
        for domain, version in (("", 17), (NCHWC_DOMAIN, 1))
    ]
    model = wire.message([(wire.MODEL_IR_VERSION, 8), (wire.MODEL_GRAPH, probe), *opsets])
    pixels = np.tile(np.array([0, 1], np.float32), channels).reshape(1, channels, 1, 2)
    try:
        session = load_model(model, 1)
        (blocked,) = session.run(["y"], {"x": pixels})
    except failures():  # a build of ONNX Runtime without the blocked operators
        return 1
    return int(np.flatnonzero(blocked.ravel())[0])


class Reported:
    """Maps what ONNX Runtime raises. A class, since ``@contextmanager`` costs microseconds in every call."""

    def __init__(self, part: str, what: str) -> None:
        self._part, self._what = part, what

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        # A plain RuntimeError is what running with bound buffers raises, whatever the failure.
        if error is not None and isinstance(error, (OSError, ValueError, RuntimeError, *failures())):
            raise BackendError(f"{self._part} [onnxruntime]: {self._what} ({' '.join(str(error).split())})") from error
