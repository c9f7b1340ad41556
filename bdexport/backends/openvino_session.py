"""A bundle's engines, loaded by OpenVINO on the CPU.

Tensors between parts are plain NCHW float32, whatever the engines compute in: OpenVINO converts to its own layout and
precision inside a part. Giving the ends its layout through a preprocessor was slower: its transposes were not removed.
"""

from __future__ import annotations

import json
import threading
import zipfile
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from bdexport.backends.arrays import ArrayRows, closed_error
from bdexport.backends.openvino_common import (
    BF16,
    DESCRIPTION,
    KERNELS,
    PRECISIONS,
    SCHEMA,
    WEIGHTS,
    XML,
    Reported,
    core,
    import_openvino,
)
from bdexport.errors import BackendError
from bdexport.parts import HEAD, STEM

if TYPE_CHECKING:
    from bdexport.bundle import Manifest, PartEntry

ARITHMETIC = {"Convolution", "GroupConvolution", "FullyConnected", "MatMul"}  # layers whose precision is reported
EMULATED = ("undef", "ref")  # how kernels begin that stand in for units that are not there
REBUILD = "rebuild the bundle"
Array = NDArray[Any]


class OpenVinoSession(ArrayRows):
    """See :class:`bdexport.backends.base.Session`. Tensors are numpy arrays."""

    def __init__(self, manifest: Manifest, files: Mapping[str, Path], threads: int, note: str) -> None:
        self.device, self.threads = "cpu", threads
        precision = manifest.precision
        self._parts = {
            part: _Part(part, path, manifest.parts[part], threads, precision) for part, path in files.items()
        }
        self._thread = threading.local()
        self._closed = False
        # One pool: OpenVINO's threads come from one per process, whatever the number of engines.
        built, here = manifest.versions.get("openvino"), import_openvino().__version__.partition("-")[0]
        self.notes: tuple[str, ...] = (note, _precision_note(precision, self._parts.values()))
        self.notes += ("batch 1 is compiled when the bundle is opened, other batches by their first call",)
        if built != here:
            self.notes += (f"openvino: built with {built}, running with {here}",)

    def put(self, part: str, array: Array) -> Array:
        return np.ascontiguousarray(array)

    def get(self, part: str, tensor: Array) -> Array:
        return tensor.copy()

    def run(self, part: str, x: Array) -> Array:
        parts = self._parts
        if self._closed:
            raise closed_error("openvino")
        return parts[part].run(x)

    def run_path(self, parts: Sequence[str], x: Array) -> Array:
        engines = self._parts
        if self._closed:
            raise closed_error("openvino")
        if len(x) == 1 and parts[0] == STEM and parts[-1] == HEAD:
            try:
                path: _Path = self._thread.path
            except AttributeError:
                path = self._thread.path = _Path(engines)
            return path.run(parts, x)
        for part in parts:
            x = engines[part].run(x)
        return x

    def close(self) -> None:
        # Names are let go of, nothing is emptied: a call that another thread has begun ends as if before.
        self._closed = True
        self._parts = {}


class _Part:
    """One engine: compiled for single images when it is loaded, for any batch when one first comes."""

    def __init__(self, part: str, path: Path, entry: PartEntry, threads: int, precision: str) -> None:
        self.part, self.entry = part, entry
        self._model = _read_engine(part, path, entry)
        self._config = {
            "PERFORMANCE_HINT": "LATENCY",
            "NUM_STREAMS": 1,
            "INFERENCE_NUM_THREADS": threads,
            # Left to itself, OpenVINO takes BF16 or FP16 where the processor has it.
            "INFERENCE_PRECISION_HINT": PRECISIONS[precision],
            # Engines that pin their threads pin them to the same cores.
            "ENABLE_CPU_PINNING": False,
        }
        with Reported(part, f"cannot load {path}"):
            single = self._model.clone()
            single.reshape({0: [1, *entry.input.shape]})
            self.single = core().compile_model(single, "CPU", self._config)
        self.kernels = _kernels(self.single)
        if precision == BF16:
            _check_bf16(part, self.kernels)
        self._any: Any = None
        self._compiling = threading.Lock()
        self._thread = threading.local()

    def run(self, x: Array) -> Array:
        """The part's output, fresh."""
        if len(x) == 1:
            return self._single_image().run(x)
        request = self._any_request()
        with Reported(self.part, "failed"):
            results = request.infer([x if x.flags.writeable else x.copy()], share_inputs=True)
            result: Array = results[0]
        return result

    def _single_image(self) -> _SingleImage:
        try:
            found: _SingleImage = self._thread.single
        except AttributeError:
            found = self._thread.single = _SingleImage(self)
        return found

    def _any_request(self) -> Any:
        try:
            return self._thread.any
        except AttributeError:
            pass
        with self._compiling, Reported(self.part, "cannot be compiled for any batch"):
            if self._any is None:
                self._any = core().compile_model(self._model, "CPU", self._config)
            self._thread.any = self._any.create_infer_request()
        return self._thread.any


class _SingleImage:
    """A request with buffers of one image that are bound once; they belong to one thread."""

    def __init__(self, part: _Part, x: Array | None = None, y: Array | None = None) -> None:
        self._part = part.part
        self.x = np.zeros((1, *part.entry.input.shape), np.float32) if x is None else x
        self.y = np.zeros((1, *part.entry.output.shape), np.float32) if y is None else y
        tensor = import_openvino().Tensor
        with Reported(self._part, "cannot be bound"):
            self._request = part.single.create_infer_request()
            self._request.set_input_tensor(tensor(self.x, shared_memory=True))
            self._request.set_output_tensor(tensor(self.y, shared_memory=True))

    def run(self, x: Array) -> Array:
        """Copy in, run, copy out."""
        self.x[...] = x
        self.infer()
        return self.y.copy()

    def infer(self) -> None:
        """Run what is in the buffers."""
        with Reported(self._part, "failed"):
            self._request.infer(share_outputs=True)


class _Path:
    """One thread's way through whole paths of single images: parts in turn, each from one bound buffer to another."""

    def __init__(self, engines: Mapping[str, _Part]) -> None:
        self._engines = engines
        self._buffers: dict[tuple[tuple[int, ...], int], Array] = {}
        self._steps: dict[tuple[str, int], _SingleImage] = {}

    def run(self, parts: Sequence[str], x: Array) -> Array:
        """The last part's output, fresh."""
        # Every part reads one side and writes the other, so two bindings of a part are all there are.
        steps = [self._step(part, number % 2) for number, part in enumerate(parts)]
        steps[0].x[...] = x
        for step in steps:
            step.infer()
        return steps[-1].y.copy()

    def _step(self, part: str, side: int) -> _SingleImage:
        step = self._steps.get((part, side))
        if step is None:
            engine = self._engines[part]
            source = self._buffer(engine.entry.input.shape, side)
            target = self._buffer(engine.entry.output.shape, 1 - side)
            step = self._steps[part, side] = _SingleImage(engine, source, target)
        return step

    def _buffer(self, shape: tuple[int, ...], side: int) -> Array:
        return self._buffers.setdefault((shape, side), np.zeros((1, *shape), np.float32))


# ---- reading engines ---------------------------------------------------------------------------------------------


def _read_engine(part: str, path: Path, entry: PartEntry) -> Any:
    try:
        with zipfile.ZipFile(path) as packed:
            description = json.loads(packed.read(DESCRIPTION))
            xml, weights = packed.read(XML), packed.read(WEIGHTS)
        found = description["part"] if description["schema"] == SCHEMA else description["schema"]
    except (OSError, KeyError, TypeError, ValueError, zipfile.BadZipFile) as error:
        raise BackendError(f"{part} [openvino]: {path} is no engine ({error})", remedy=REBUILD) from error
    if found != part:
        raise BackendError(
            f"{part} [openvino]: {path} is another part's engine", got=found, expected=part, remedy=REBUILD
        )
    with Reported(part, f"cannot load {path}"):
        # The model keeps its weights in this memory.
        tensor = import_openvino().Tensor(np.frombuffer(weights, np.uint8).copy())
        model = core().read_model(xml, tensor)
    _check_shapes(part, path, model, entry)
    return model


def _check_shapes(part: str, path: Path, model: Any, entry: PartEntry) -> None:
    """The manifest and the engine agree on what goes in and comes out, beyond the batch."""
    for values, spec in ((model.inputs, entry.input), (model.outputs, entry.output)):
        shapes = [tuple(size.get_length() for size in list(value.partial_shape)[1:]) for value in values]
        if shapes != [spec.shape]:
            what = f"{part} [openvino]: {path} does not have the manifest's {spec.name}"
            raise BackendError(what, got=shapes, expected=[spec.shape], remedy=REBUILD)


# ---- what really runs --------------------------------------------------------------------------------------------


def _kernels(compiled: Any) -> Counter[tuple[str, str]]:
    """(precision, kernel) of every layer of a compiled part that multiplies."""
    found: Counter[tuple[str, str]] = Counter()
    for operation in compiled.get_runtime_model().get_ops():
        about = operation.get_rt_info()
        if about["layerType"].astype(str) in ARITHMETIC:
            found[about["runtimePrecision"].astype(str), about["primitiveType"].astype(str)] += 1
    return found


def _check_bf16(part: str, kernels: Counter[tuple[str, str]]) -> None:
    """BF16 by name and slow in fact is what nobody asked for."""
    emulated = sorted({kernel for precision, kernel in kernels if precision == BF16 and kernel.startswith(EMULATED)})
    if emulated:
        what = f"{part} [openvino]: bf16 would be emulated here"
        raise BackendError(what, got=", ".join(emulated), remedy="build with --precision fp32")


def _precision_note(precision: str, parts: Any) -> str:
    kernels: Counter[tuple[str, str]] = sum((part.kernels for part in parts), Counter())
    wanted = {kernel: count for (found, kernel), count in kernels.items() if found in KERNELS[precision]}
    names = ", ".join(sorted(wanted)) or "none"
    return f"precision: {precision}, in {sum(wanted.values())} of {kernels.total()} layers that multiply ({names})"
