"""The ONNX Runtime backend on the CPU: the embedded default.

Engines are optimised offline (:mod:`bdexport.backends.onnxruntime_build`). Whole paths run in one linked session
(:mod:`bdexport.backends.onnxruntime_link`), so that however many parts there are, one thread pool computes them. Single
parts run in sessions of one thread without a pool; their batches are split between this session's own threads.
"""

from __future__ import annotations

import importlib.util
import platform
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from bdexport.backends import onnx_wire as wire
from bdexport.backends.arrays import ArrayRows, closed_error, no_device_error
from bdexport.backends.base import Availability, BuildOptions, RunOptions
from bdexport.backends.onnxruntime_link import INPUT, OUTPUT, input_name, keep_name, link, output_name
from bdexport.errors import BackendError, BuildError
from bdexport.hardware import usable_cores
from bdexport.parts import FULL, HEAD, POLICY, STEM, Masks, block_part

if TYPE_CHECKING:
    from bdexport.bundle import Bundle, Manifest
    from bdexport.models.pair import BlockDropNet

NCHWC_DOMAIN = "com.microsoft.nchwc"  # ONNX Runtime's operators on the blocked layout
PART_PROPERTY, BLOCK_PROPERTY = "bdexport.part", "bdexport.channel_block"
INPUT_PROPERTY, OUTPUT_PROPERTY = "bdexport.input", "bdexport.output"
BLOCKED, PLAIN = "blocked", "plain"
ENGINE_FORMAT = "1"  # of what is in an engine file: names and properties
# Below this, sharing one image between threads costs about what it saves (ResNet-56, 0.25 GFLOP, 2 threads: 1.3 x).
FLOPS_WORTH_THREADS = 1_000_000_000
FAILURES = (
    *("EPFail", "EngineError", "Fail", "InvalidArgument", "InvalidGraph", "InvalidProtobuf", "ModelLoaded"),
    *("NoModel", "NoSuchFile", "NotImplemented", "RuntimeException"),
)
Array = NDArray[Any]


class OnnxRuntimeBackend:
    """Builds and opens engines for ONNX Runtime's CPU execution provider."""

    name = "onnxruntime"
    precisions: tuple[str, ...] = ("fp32",)
    engine_suffix = ".onnx"
    computes = True

    def available(self) -> Availability:
        """Whether onnxruntime can be imported."""
        if importlib.util.find_spec("onnxruntime") is None:
            return Availability(False, "onnxruntime is not installed", 'pip install "bdexport[cpu]"')
        try:
            import onnxruntime  # noqa: F401
        except ImportError as error:
            return Availability(False, f"onnxruntime cannot be imported: {error}", "reinstall onnxruntime")
        return Availability(True, "onnxruntime is installed")

    def versions(self) -> Mapping[str, str]:
        """Optimised graphs belong to one version of ONNX Runtime."""
        import onnxruntime

        return {"onnxruntime": onnxruntime.__version__, "onnxruntime-engine": ENGINE_FORMAT}

    def fingerprint(self) -> str:
        """The processor family and the channel block of its blocked layout; engines hold nothing else of a machine."""
        block = channel_block()
        return f"{platform.machine()} {f'nchwc{block}' if block > 1 else 'nchw'}"

    def build_part(
        self, part: str, graph: Path, engine: Path, options: BuildOptions, model: BlockDropNet | None = None
    ) -> None:
        """Optimise the part for this processor. Raises BuildError naming the part."""
        from bdexport.backends.onnxruntime_build import build_engine

        if options.precision not in self.precisions:
            expected = ", ".join(self.precisions)
            raise BuildError(f"{part} [onnxruntime]: precision", got=options.precision, expected=expected)
        build_engine(part, graph, engine, channel_block())

    def open(self, bundle: Bundle, options: RunOptions) -> OnnxRuntimeSession:
        """Load the engines. Raises BackendError for another machine, version or device than they are built for."""
        if options.device != "cpu":
            raise no_device_error(self.name, options.device, "cpu (this backend has no other device yet)")
        self._check_built_for_this(bundle)
        threads, note = chosen_threads(options.threads, bundle.manifest.parts[FULL].flops)
        return OnnxRuntimeSession(
            bundle.manifest, {part: bundle.engine(part) for part in bundle.manifest.parts}, threads, note
        )

    def _check_built_for_this(self, bundle: Bundle) -> None:
        """Engines of another channel block would run and give wrong numbers, so this is never only a warning."""
        manifest = bundle.manifest
        remedy = f"rebuild it on this machine: bdexport build CHECKPOINT --backend onnxruntime --out {bundle.path}"
        if manifest.fingerprint != self.fingerprint():
            what = f"{bundle.path} [onnxruntime]: its engines are for another processor"
            raise BackendError(what, got=manifest.fingerprint, expected=f"{self.fingerprint()} (here)", remedy=remedy)
        for name, here in self.versions().items():
            built = manifest.versions.get(name)
            if built != here:
                what = f"{bundle.path} [onnxruntime]: its engines are for another version of {name}"
                raise BackendError(what, got=built, expected=f"{here} (here)", remedy=remedy)


def open_graphs(bundle: Bundle) -> OnnxRuntimeSession:
    """The bundle's graphs as they are, every optimisation off, one thread: the reference without torch."""
    graphs = {part: bundle.graph(part) for part in bundle.manifest.parts}
    return OnnxRuntimeSession(bundle.manifest, graphs, 1, "graphs as exported, not optimised", linked=False)


def chosen_threads(asked: int | None, flops: int) -> tuple[int, str]:
    """Threads for one call, and the reason; ``flops`` of one image in the full network."""
    if asked is not None:
        return asked, f"threads: {asked}, as asked for"
    cores = usable_cores()
    if flops < FLOPS_WORTH_THREADS or cores == 1:
        return 1, f"threads: 1, since an image of {flops:.2e} FLOPs is too little to share between threads"
    return cores, f"threads: {cores}, all usable cores"


def session_options(threads: int, optimise: bool) -> Any:
    """Options of one ONNX Runtime session. Errors come as exceptions, so its own log stays silent."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.log_severity_level = 4
    level = ort.GraphOptimizationLevel
    options.graph_optimization_level = level.ORT_ENABLE_ALL if optimise else level.ORT_DISABLE_ALL
    # A pool that goes on spinning after its session's run takes the core from the next session's.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    return options


@lru_cache(maxsize=1)
def failures() -> tuple[type[Exception], ...]:
    """The exceptions of ONNX Runtime, which have no common base of their own."""
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    return tuple(getattr(state, name) for name in FAILURES if hasattr(state, name))


@lru_cache(maxsize=1)
def channel_block() -> int:
    """Channels per block in ONNX Runtime's blocked layout on this processor (16 with AVX-512, 8 with AVX2); 1: none.

    Found by converting a small tensor: the value that follows the first pixel's block is the second pixel's first.
    """
    channels = 64
    probe = wire.message(
        [
            (wire.GRAPH_NODE, wire.node("ReorderInput", [INPUT], OUTPUT, domain=NCHWC_DOMAIN)),
            (wire.GRAPH_NAME, "probe"),
            (wire.GRAPH_INPUT, wire.tensor_info(INPUT, wire.FLOAT, (1, channels, 1, 2))),
            (wire.GRAPH_OUTPUT, wire.tensor_info(OUTPUT, wire.FLOAT, (1, channels, 1, 2))),
        ]
    )
    opsets = [
        (wire.MODEL_OPSET, wire.message([(1, domain), (2, version)]))
        for domain, version in (("", 17), (NCHWC_DOMAIN, 1))
    ]
    model = wire.message([(wire.MODEL_IR_VERSION, 8), (wire.MODEL_GRAPH, probe), *opsets])
    pixels = np.tile(np.array([0, 1], np.float32), channels).reshape(1, channels, 1, 2)
    try:
        session = _load(model, 1)
        (blocked,) = session.run([OUTPUT], {INPUT: pixels})
    except failures():  # a build of ONNX Runtime without the blocked operators
        return 1
    return int(np.flatnonzero(blocked.ravel())[0])


def _load(model: str | bytes, threads: int) -> Any:
    import onnxruntime as ort

    return ort.InferenceSession(model, session_options(threads, optimise=False), providers=["CPUExecutionProvider"])


class OnnxRuntimeSession(ArrayRows):
    """See :class:`bdexport.backends.base.Session`. Tensors are numpy arrays, between parts in the blocked layout.

    ``files``: the part's models. ``linked``: run whole paths in one session, see the module's text.
    """

    def __init__(
        self, manifest: Manifest, files: Mapping[str, Path], threads: int, note: str, linked: bool = True
    ) -> None:
        self.device, self.threads = "cpu", threads
        self.notes: tuple[str, ...] = (note,)
        self._manifest = manifest
        whole = (POLICY, FULL)
        self._parts = {
            part: _Part(part, path, threads if part in whole else 1, named=linked) for part, path in files.items()
        }
        self._chain = _LinkedChain(manifest, files, threads) if linked else None
        self._pool = ThreadPoolExecutor(threads - 1, "bdexport") if threads > 1 else None
        self._closed = False

    def put(self, part: str, array: Array) -> Array:
        array = np.ascontiguousarray(array)
        return _to_blocked(array, self._part(part).input_block)

    def get(self, part: str, tensor: Array) -> Array:
        block = self._part(part).output_block
        return tensor.copy() if block == 1 else _from_blocked(tensor, block)

    def run(self, part: str, x: Array) -> Array:
        engine = self._part(part)
        if self._pool is None or engine.threads > 1 or len(x) == 1:
            return engine.run(x)
        shares = np.array_split(x, min(self.threads, len(x)))
        others = [self._pool.submit(engine.run, share) for share in shares[1:]]
        return np.concatenate([engine.run(shares[0]), *(other.result() for other in others)])

    def run_path(self, parts: Sequence[str], x: Array) -> Array:
        self._check_open()
        keep = self._chain.mask(parts) if self._chain is not None else None
        if self._chain is not None and keep is not None:
            return self._chain.run(x, keep)
        for part in parts:
            x = self.run(part, x)
        return x

    def close(self) -> None:
        self._closed = True
        self._parts.clear()
        self._chain = None
        if self._pool is not None:
            self._pool.shutdown()

    def _part(self, part: str) -> _Part:
        self._check_open()
        return self._parts[part]

    def _check_open(self) -> None:
        if self._closed:
            raise closed_error("onnxruntime")


class _Part:
    """One engine in a session of its own."""

    def __init__(self, part: str, path: Path, threads: int, named: bool) -> None:
        self.part, self.threads = part, threads
        self._input, self._outputs = (input_name(part), [output_name(part)]) if named else (INPUT, [OUTPUT])
        with _reported(part, f"cannot load {path}"):
            self._session = _load(str(path), threads)
            properties = self._session.get_modelmeta().custom_metadata_map
        if properties.get(PART_PROPERTY) != part:
            what = f"{part} [onnxruntime]: {path} is another part's engine"
            raise BackendError(what, got=properties.get(PART_PROPERTY), expected=part, remedy="rebuild the bundle")
        block = int(properties.get(BLOCK_PROPERTY, "1"))
        self.input_block = block if properties.get(INPUT_PROPERTY) == BLOCKED else 1
        self.output_block = block if properties.get(OUTPUT_PROPERTY) == BLOCKED else 1

    def run(self, x: Array) -> Array:
        with _reported(self.part, "failed"):
            result: Array = self._session.run(self._outputs, {self._input: x})[0]
        return result


class _LinkedChain:
    """Stem, blocks and head in one session, an image's mask as its inputs."""

    def __init__(self, manifest: Manifest, files: Mapping[str, Path], threads: int) -> None:
        parts = [part for part in files if part not in (POLICY, FULL)]
        self._keeps = [keep_name(index) for index in range(manifest.num_blocks)]
        self._blocks = [block_part(index) for index in range(manifest.num_blocks)]
        self._image, self._logits = manifest.parts[STEM].input.shape, manifest.parts[HEAD].output.shape
        with _reported("chain", "cannot link the parts' engines"):
            data = {part: files[part].read_bytes() for part in parts}
            self._session = _load(link(data, manifest.num_blocks, frozenset(manifest.transitions)), threads)
        self._thread = threading.local()

    def mask(self, parts: Sequence[str]) -> Masks | None:
        """The mask whose path ``parts`` are; None when they are no whole path."""
        if not parts or parts[0] != STEM or parts[-1] != HEAD:
            return None
        ran = set(parts)
        return np.array([block in ran for block in self._blocks])

    def run(self, x: Array, keep: Masks) -> Array:
        with _reported("chain", "failed"):
            if len(x) == 1:
                return self._buffers()(x, keep)
            feeds = {INPUT: x} | {name: np.asarray(keep[index]) for index, name in enumerate(self._keeps)}
            result: Array = self._session.run([OUTPUT], feeds)[0]
        return result

    def _buffers(self) -> _SingleImage:
        """Bound buffers belong to one thread: two that filled the same ones would run each other's image."""
        buffers: _SingleImage | None = getattr(self._thread, "buffers", None)
        if buffers is None:
            buffers = _SingleImage(self._session, self._image, self._keeps, self._logits)
            self._thread.buffers = buffers
        return buffers


class _SingleImage:
    """Static buffers of one image, bound once: a call copies the image and the mask in and runs."""

    def __init__(self, session: Any, image: Sequence[int], keeps: Sequence[str], logits: Sequence[int]) -> None:
        import onnxruntime as ort

        self._run, self._binding = session.run_with_iobinding, session.io_binding()
        self._x, self._keep = np.zeros((1, *image), np.float32), np.zeros(len(keeps), bool)
        self._y = np.zeros((1, *logits), np.float32)
        self._binding.bind_ortvalue_input(INPUT, ort.OrtValue.ortvalue_from_numpy(self._x))
        for index, name in enumerate(keeps):
            scalar = self._keep[index : index + 1].reshape(())  # shares memory with the mask
            self._binding.bind_ortvalue_input(name, ort.OrtValue.ortvalue_from_numpy(scalar))
        self._binding.bind_ortvalue_output(OUTPUT, ort.OrtValue.ortvalue_from_numpy(self._y))

    def __call__(self, x: Array, keep: Masks) -> Array:
        self._x[...] = x
        self._keep[...] = keep
        self._run(self._binding)
        return self._y.copy()


@contextmanager
def _reported(part: str, what: str) -> Iterator[None]:
    expected: tuple[type[Exception], ...] = (OSError, ValueError, *failures())
    try:
        yield
    except expected as error:
        raise BackendError(f"{part} [onnxruntime]: {what} ({' '.join(str(error).split())})") from error


def _to_blocked(array: Array, block: int) -> Array:
    """(N, C, H, W) -> the same shape, in memory (N, C / block, H, W, block)."""
    if block == 1:
        return array
    n, c, h, w = array.shape
    return np.ascontiguousarray(array.reshape(n, c // block, block, h, w).transpose(0, 1, 3, 4, 2)).reshape(array.shape)


def _from_blocked(tensor: Array, block: int) -> Array:
    """Inverse of :func:`_to_blocked`."""
    n, c, h, w = tensor.shape
    return np.ascontiguousarray(tensor.reshape(n, c // block, h, w, block).transpose(0, 1, 4, 2, 3)).reshape(
        tensor.shape
    )
