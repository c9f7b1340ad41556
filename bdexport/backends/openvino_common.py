"""What building and running with OpenVINO share: the import without telemetry, the processor's BF16, its exceptions."""

from __future__ import annotations

import os
import sys
from importlib import import_module
from typing import Any

import numpy as np

from bdexport.backends.first_use import once
from bdexport.backends.forking import Inside, KeptInForks
from bdexport.errors import BackendError
from bdexport.hardware import machine

LEAST_OPENVINO = (2026, 4)  # of pyproject.toml: earlier ones do not say what a compiled model belongs to
FP32, BF16, INT8 = "fp32", "bf16", "int8"
# Ours -> OpenVINO's, for whatever the graph leaves in floating point: int8 is Q/DQ in the graph.
PRECISIONS = {FP32: "f32", BF16: "bf16", INT8: "f32"}
KERNELS = {FP32: ("f32",), BF16: ("bf16",), INT8: ("i8", "u8")}  # what a layer of that precision runs in
BF16_FLAGS = {"avx512_bf16", "amx_bf16", "avx_ne_convert", "bf16"}  # instruction sets that have BF16 products
TELEMETRY = "openvino_telemetry"
KERNEL_CACHE = "ONEDNN_PRIMITIVE_CACHE_CAPACITY"  # read by torch's oneDNN as well, hence not left set
FAILURES = (OSError, ValueError, KeyError, RuntimeError)  # what OpenVINO raises, which has no class of its own


@once
def import_openvino() -> Any:
    """The package ``openvino``.

    It reports every import of itself to a server. That part is an own package and may be absent: so it is made to
    look, for as long as the import lasts. Nothing is changed where the program has imported openvino before.
    """
    if "openvino" in sys.modules:  # whole, or half imported by a thread of the program's: this waits for its end
        return import_module("openvino")
    had, before = TELEMETRY in sys.modules, sys.modules.get(TELEMETRY)
    sys.modules[TELEMETRY] = None  # type: ignore[assignment]
    try:
        return import_module("openvino")
    finally:
        del sys.modules[TELEMETRY]
        if had:
            sys.modules[TELEMETRY] = before  # type: ignore[assignment]


class _Core(KeptInForks):
    def __init__(self) -> None:
        openvino = import_openvino()
        self.made = openvino.Core()
        before = os.environ.get(KERNEL_CACHE)
        os.environ[KERNEL_CACHE] = "0"
        try:
            self._made_a_kernel(openvino.opset13)
        finally:
            del os.environ[KERNEL_CACHE]
            if before is not None:
                os.environ[KERNEL_CACHE] = before

    def _made_a_kernel(self, operations: Any) -> None:
        """The smallest convolution, since the variable is read when the first kernel is made, and never again."""
        x = operations.parameter([1, 1, 1, 1], np.float32)
        weights = operations.constant(np.ones((1, 1, 1, 1), np.float32))
        y = operations.convolution(x, weights, [1, 1], [0, 0], [0, 0], [1, 1])
        self.made.compile_model(import_openvino().Model([y], [x], "smallest"), "CPU", cpu_config(FP32, threads=1))


@once
def _only_core() -> _Core:
    return _Core()


def core() -> Any:
    """OpenVINO's core: plugins are loaded once per process.

    Its kernels are not shared through oneDNN's cache, which is one per process: that keeps what could not be made for
    want of memory, and the next model that needs the same kernel fails or crashes on it, with memory to spare (seen
    within seconds, 5 of 5 runs; none without the cache). Without it, opening ResNet-32 takes 12 % more processor time
    and 7 MB more; calls take the same. Where a program has compiled models with OpenVINO before, the cache stays.
    """
    return _only_core().made


def cpu_config(precision: str, threads: int) -> dict[str, Any]:
    """How every model is compiled and imported."""
    return {
        "PERFORMANCE_HINT": "LATENCY",
        # No stream: the thread that calls computes. One stream of one thread would do the same, but there infer()
        # drops every exception (OpenVINO 2026.4), gives the output of the call before, and cannot be cancelled.
        "NUM_STREAMS": 0 if threads == 1 else 1,
        "INFERENCE_NUM_THREADS": threads,
        # Left to itself, OpenVINO takes BF16 or FP16 where the processor has it.
        "INFERENCE_PRECISION_HINT": PRECISIONS[precision],
        # Engines that pin their threads pin them to the same cores.
        "ENABLE_CPU_PINNING": False,
    }


def openvino_version() -> str:
    """The release, without the build: ``2026.4.1``."""
    return str(import_openvino().__version__).partition("-")[0]


def no_bf16_reason() -> str | None:
    """Why this processor does not compute in BF16; None where it does.

    OpenVINO's own list is not enough: it names BF16 where it would only be emulated, slower than FP32.
    """
    if "BF16" not in core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        return "OpenVINO does not offer it on this processor"
    flags = set(machine()["isa"])
    if flags and not flags & BF16_FLAGS:
        return f"this processor has no BF16 units (none of {', '.join(sorted(BF16_FLAGS))})"
    return None


def reason_of(error: BaseException) -> str:
    """What an exception of OpenVINO says, in one line."""
    return " ".join(str(error).split())[:500]


class Reported(Inside):
    """Maps what OpenVINO raises, which are RuntimeErrors, and tells forks that a thread is inside OpenVINO.

    A class: ``@contextmanager`` costs microseconds per call.
    """

    def __init__(self, part: str, what: str, remedy: str | None = None) -> None:
        self._part, self._what, self._remedy = part, what, remedy

    def __exit__(self, *about: object) -> None:
        super().__exit__()
        error = about[1]
        if isinstance(error, FAILURES):
            what = f"{self._part} [openvino]: {self._what} ({reason_of(error)})"
            raise BackendError(what, remedy=self._remedy) from error
