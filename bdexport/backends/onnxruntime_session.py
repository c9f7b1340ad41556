"""A bundle's engines, loaded by ONNX Runtime on the CPU.

No two thread pools compute one call: with one thread, no session has a pool; with more, whole paths run in one linked
session (:mod:`bdexport.backends.onnxruntime_link`) and single parts in sessions without a pool, whose batches are split
between this session's own threads. Fused paths are linked from the parts' engines as well, one session each, on the
same weights in memory (:class:`_SharedWeights`).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from functools import partial
from time import perf_counter
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from bdexport.backends.arrays import ArrayRows, closed_error
from bdexport.backends.base import Readable
from bdexport.backends.forking import KeptInForks
from bdexport.backends.onnxruntime_common import (
    BLOCK_PROPERTY,
    BLOCKED,
    INPUT_PROPERTY,
    OUTPUT_PROPERTY,
    PART_PROPERTY,
    Reported,
    load_model,
)
from bdexport.backends.onnxruntime_link import (
    INPUT,
    OUTPUT,
    Linker,
    float_weights,
    input_name,
    keep_name,
    output_name,
)
from bdexport.errors import BackendError
from bdexport.parts import FULL, HEAD, POLICY, STEM, Masks, block_part

if TYPE_CHECKING:
    from bdexport.bundle import Manifest, PartEntry

WHOLE = (POLICY, FULL)  # parts that are networks of their own, outside the chain
CACHED_MASKS = 4096
Array = NDArray[Any]


class OnnxRuntimeSession(ArrayRows, KeptInForks):
    """See :class:`bdexport.backends.base.Session`. Tensors are numpy arrays, between parts in the blocked layout.

    ``files``: the part's models. ``linked``: run whole paths in one session, see the module's text.
    """

    def __init__(
        self,
        manifest: Manifest,
        files: Mapping[str, Readable],
        threads: int,
        note: str,
        linked: bool = True,
        fused: bool = False,
    ) -> None:
        self.device, self.threads = "cpu", threads
        self.notes: tuple[str, ...] = (note,)
        self._manifest = manifest
        self._again = partial(OnnxRuntimeSession, manifest, files, threads, note, linked, fused)
        self._files = files
        engines = _read_engines(files) if linked else {}  # their bytes are let go of when they are all loaded
        weights = _SharedWeights(engines)
        self._parts = {
            part: _Part(
                *(part, path, engines.get(part), manifest.parts[part]),
                *(threads if part in WHOLE else 1, linked, weights.of([part])),
            )
            for part, path in files.items()
        }
        paths = manifest.fused.part_paths(manifest.transitions) if fused and manifest.fused is not None else []
        linker = _linker(engines) if linked and (paths or threads > 1) else None
        self._switched = _SwitchedChain(manifest, linker, threads) if linker is not None and threads > 1 else None
        if self._switched is not None:
            self.notes += (f"chain: parts linked into one session, one pool of {threads} threads",)
        elif linked:
            self.notes += ("chain: a session per part, without thread pools",)
        began = perf_counter()
        self._fused = {
            path: _FusedPath(manifest, linker, path, threads, weights) for path in paths if linker is not None
        }
        self.fused, self.fused_seconds = frozenset(self._fused), perf_counter() - began
        if paths:
            self.notes += (f"fused: {len(paths)} paths linked from the parts' engines, on the same weights",)
        self._in_turn: _PartsInTurn | None = _PartsInTurn(self._parts, manifest)
        self._pool = ThreadPoolExecutor(threads - 1, "bdexport") if threads > 1 else None
        self._thread = threading.local()  # .shares: this thread computes a share of a batch, which is not split again
        self._closed = False

    def put(self, part: str, array: Array) -> Array:
        array = np.ascontiguousarray(array)
        return _to_blocked(array, self._part(part).input_block)

    def get(self, part: str, tensor: Array) -> Array:
        block = self._part(part).output_block
        return tensor.copy() if block == 1 else _from_blocked(tensor, block)

    def run(self, part: str, x: Array) -> Array:
        engine, pool = self._part(part), self._pool
        if pool is None or engine.threads > 1 or len(x) == 1 or getattr(self._thread, "shares", False):
            return engine.run(x)
        shares = np.array_split(x, min(self.threads, len(x)))
        return np.concatenate(self.side_by_side([partial(engine.run, share) for share in shares]))

    @property
    def shares(self) -> int:
        """See :class:`bdexport.backends.base.SharingSession`."""
        return 1 if self._pool is None else self.threads

    def side_by_side(self, calls: Sequence[Callable[[], Array]]) -> list[Array]:
        """See :class:`bdexport.backends.base.SharingSession`."""
        self._check_open()
        if self._pool is None:
            return [call() for call in calls]
        others: list[Future[Array]] = []
        try:
            for call in calls[1:]:
                try:
                    others.append(self._pool.submit(self._share, call))
                except RuntimeError as error:  # another thread has closed the session in between
                    raise closed_error("onnxruntime") from error
            return [self._share(calls[0]), *(other.result() for other in others)]
        finally:
            wait(others)  # whatever failed: nobody works on the batch any more when this returns

    def _share(self, call: Callable[[], Array]) -> Array:
        self._thread.shares = True
        try:
            return call()
        finally:
            self._thread.shares = False

    def run_path(self, parts: Sequence[str], x: Array) -> Array:
        switched, in_turn = self._switched, self._in_turn
        self._check_open()
        logits = switched.run(parts, x) if switched is not None else None
        if logits is not None:
            return logits
        if in_turn is not None and len(x) == 1 and parts[0] == STEM and parts[-1] == HEAD:
            return in_turn(tuple(parts), x)
        for part in parts:
            x = self.run(part, x)
        return x

    def run_fused(self, path: tuple[str, ...], x: Array) -> Array:
        fused = self._fused
        self._check_open()
        return fused[path].run(x)

    def prepare_fused(self, batch: int = 1) -> None:
        """See :meth:`bdexport.backends.base.FusedSession.prepare_fused`: it was done when the session was opened."""
        self._check_open()

    def in_fork(self) -> OnnxRuntimeSession:
        """See :meth:`bdexport.backends.base.ForkingSession.in_fork`: one thread needs nobody; pools are made anew."""
        if self._closed or self.threads == 1:
            return self
        return self._again()

    def close(self) -> None:
        # Names are let go of, nothing is emptied: a call that another thread has begun ends as if before.
        self._closed = True
        self._parts, self._switched, self._in_turn, self._fused = {}, None, None, {}
        if self._pool is not None:
            self._pool.shutdown()

    def _part(self, part: str) -> _Part:
        parts = self._parts
        self._check_open()
        return parts[part]

    def _check_open(self) -> None:
        if self._closed:
            raise closed_error("onnxruntime")


class _Part:
    """One engine in a session of its own. Whole networks (policy, full) run single images in static buffers."""

    def __init__(
        self,
        part: str,
        path: Readable,
        model: bytes | None,
        entry: PartEntry,
        threads: int,
        named: bool,
        weights: Mapping[str, Any],
    ) -> None:
        """``model``: the bytes of ``path`` where they have been read before."""
        self.part, self.threads = part, threads
        self._weights = weights  # the session reads them where they are and does not keep them
        self._input, self._outputs = (input_name(part), [output_name(part)]) if named else (INPUT, [OUTPUT])
        with Reported(part, f"cannot load {path}"):
            self._session = load_model(path.read_bytes() if model is None else model, threads, weights)
            properties = self._session.get_modelmeta().custom_metadata_map
        if properties.get(PART_PROPERTY) != part:
            what = f"{part} [onnxruntime]: {path} is another part's engine"
            raise BackendError(what, got=properties.get(PART_PROPERTY), expected=part, remedy="rebuild the bundle")
        _check_shapes(part, path, self._session, entry)
        block = int(properties.get(BLOCK_PROPERTY, "1"))
        self.input_block = block if properties.get(INPUT_PROPERTY) == BLOCKED else 1
        self.output_block = block if properties.get(OUTPUT_PROPERTY) == BLOCKED else 1
        self._single = (
            _SingleImage(part, self._session, entry.input.shape, entry.output.shape) if part in WHOLE else None
        )

    def run(self, x: Array) -> Array:
        if self._single is not None and len(x) == 1:
            return self._single(x)
        with Reported(self.part, "failed"):
            result: Array = self._session.run(self._outputs, {self._input: x})[0]
        return result

    def bound(self, source: Any, target: Any) -> tuple[Any, Any]:
        """A function and the binding to call it with, which runs this part from one OrtValue to another."""
        binding = self._session.io_binding()
        binding.bind_ortvalue_input(self._input, source)
        binding.bind_ortvalue_output(self._outputs[0], target)
        return self._session.run_with_iobinding, binding


def _check_shapes(part: str, path: Readable, session: Any, entry: PartEntry) -> None:
    """The manifest and the engine agree on what goes in and comes out, beyond the batch."""
    ends = ((session.get_inputs(), entry.input), (session.get_outputs(), entry.output))
    for values, spec in ends:
        shapes = [tuple(value.shape[1:]) for value in values]
        if shapes != [spec.shape]:
            what = f"{part} [onnxruntime]: {path} does not have the manifest's {spec.name}"
            raise BackendError(what, got=shapes, expected=[spec.shape], remedy="rebuild the bundle")


def _shared(array: Array) -> Any:
    """An OrtValue on the array's own memory (which it keeps alive)."""
    import onnxruntime as ort

    return ort.OrtValue.ortvalue_from_numpy(array)


class _PartsInTurn:
    """Whole paths of single images, one session after another, between static buffers that are bound once per thread.

    Measured, ResNet-32 with 7 of 15 blocks: 8 % less than handing numpy arrays from session to session.
    """

    def __init__(self, parts: Mapping[str, _Part], manifest: Manifest) -> None:
        self._parts, self._entries = parts, manifest.parts
        self._thread = threading.local()

    def __call__(self, path: tuple[str, ...], x: Array) -> Array:
        try:
            buffers: _PartBuffers = self._thread.buffers
        except AttributeError:
            buffers = self._thread.buffers = _PartBuffers(self._parts, self._entries)
        buffers.x[...] = x
        with Reported("chain", "failed"):
            for run, binding in buffers.calls(path):
                run(binding)
        result: Array = buffers.y.copy()
        return result


class _PartBuffers:
    """One thread's buffers: the image, the logits, and for every shape between parts one to read and one to write."""

    def __init__(self, parts: Mapping[str, _Part], entries: Mapping[str, PartEntry]) -> None:
        self._parts, self._entries = parts, entries
        self.x = np.zeros((1, *entries[STEM].input.shape), np.float32)
        self.y = np.zeros((1, *entries[HEAD].output.shape), np.float32)
        self._x, self._y = _shared(self.x), _shared(self.y)
        self._between: dict[tuple[tuple[int, ...], int], Any] = {}
        self._bindings: dict[tuple[str, int], tuple[Any, Any]] = {}
        self._calls: dict[tuple[str, ...], list[tuple[Any, Any]]] = {}

    def calls(self, path: tuple[str, ...]) -> list[tuple[Any, Any]]:
        """What to call for a path, in order: functions with their bindings."""
        calls = self._calls.get(path)
        if calls is None:
            # Every part reads one side and writes the other, so two bindings of a part are all there are.
            calls = [self._binding(part, step % 2) for step, part in enumerate(path)]
            if len(self._calls) < CACHED_MASKS:
                self._calls[path] = calls
        return calls

    def _binding(self, part: str, side: int) -> tuple[Any, Any]:
        found = self._bindings.get((part, side))
        if found is None:
            entry, engine = self._entries[part], self._parts[part]
            source = self._x if part == STEM else self._buffer(entry.input.shape, side)
            target = self._y if part == HEAD else self._buffer(entry.output.shape, 1 - side)
            found = self._bindings[part, side] = engine.bound(source, target)
        return found

    def _buffer(self, shape: tuple[int, ...], side: int) -> Any:
        if (shape, side) not in self._between:
            self._between[shape, side] = _shared(np.zeros((1, *shape), np.float32))
        return self._between[shape, side]


def _read_engines(files: Mapping[str, Readable]) -> dict[str, bytes]:
    with Reported("chain", "cannot read the parts' engines"):
        return {part: path.read_bytes() for part, path in files.items() if part not in WHOLE}


def _linker(engines: Mapping[str, bytes]) -> Linker:
    with Reported("chain", "cannot link the parts' engines"):
        return Linker(engines)


class _SharedWeights:
    """The parts' weights, once in memory: sessions of parts and of fused paths are given the same arrays."""

    def __init__(self, engines: Mapping[str, bytes]) -> None:
        self._values: dict[str, dict[str, Any]] = {}
        for part, engine in engines.items():
            with Reported(part, "cannot read its weights"):
                self._values[part] = {name: _shared(array) for name, array in float_weights(engine).items()}

    def of(self, parts: Sequence[str]) -> dict[str, Any]:
        """Weights by name, of the given parts; none of a part that shares none."""
        return {name: value for part in parts for name, value in self._values.get(part, {}).items()}


class _FusedPath:
    """One path in a session of its own, its parts in a row."""

    def __init__(
        self, manifest: Manifest, linker: Linker, path: tuple[str, ...], threads: int, weights: _SharedWeights
    ) -> None:
        self._weights = weights.of(path)  # the session reads them where they are and does not keep them
        with Reported("fused", "cannot link the parts' engines"):
            self._session = load_model(linker.path(path), threads, self._weights)
        image, logits = manifest.parts[STEM].input.shape, manifest.parts[HEAD].output.shape
        self._single = _SingleImage("fused", self._session, image, logits)

    def run(self, x: Array) -> Array:
        """The logits of a batch, fresh."""
        if len(x) == 1:
            return self._single(x)
        with Reported("fused", "failed"):
            result: Array = self._session.run([OUTPUT], {INPUT: x})[0]
        return result


class _SwitchedChain:
    """All parts in one session with an image's mask as its inputs: one thread pool, and no second one to spin with."""

    def __init__(self, manifest: Manifest, linker: Linker, threads: int) -> None:
        self._keeps = [keep_name(index) for index in range(manifest.num_blocks)]
        self._blocks = [block_part(index) for index in range(manifest.num_blocks)]
        image, logits = manifest.parts[STEM].input.shape, manifest.parts[HEAD].output.shape
        with Reported("chain", "cannot link the parts' engines"):
            model = linker.switched(manifest.num_blocks, frozenset(manifest.transitions))
            self._session = load_model(model, threads)
        self._single = _SingleImage("chain", self._session, image, logits, self._keeps)
        self._masks: dict[tuple[str, ...], Masks] = {}

    def run(self, parts: Sequence[str], x: Array) -> Array | None:
        """The logits of a whole path; None when ``parts`` are no whole path."""
        keep = self._mask(tuple(parts))
        if keep is None:
            return None
        if len(x) == 1:
            return self._single(x, keep)
        switches = {name: np.asarray(keep[index]) for index, name in enumerate(self._keeps)}
        with Reported("chain", "failed"):
            result: Array = self._session.run([OUTPUT], {INPUT: x} | switches)[0]
        return result

    def _mask(self, path: tuple[str, ...]) -> Masks | None:
        mask = self._masks.get(path)
        if mask is None and path and path[0] == STEM and path[-1] == HEAD:
            ran = set(path)
            mask = np.array([block in ran for block in self._blocks])
            if len(self._masks) < CACHED_MASKS:
                self._masks[path] = mask
        return mask


class _SingleImage:
    """A session's static buffers of one image, bound once per thread: a call copies in, runs, and copies out.

    Buffers belong to one thread: two that filled the same ones would run each other's image.
    """

    def __init__(
        self, part: str, session: Any, image: Sequence[int], output: Sequence[int], keeps: Sequence[str] = ()
    ) -> None:
        self._part, self._session, self._keeps = part, session, keeps
        self._image, self._output = (1, *image), (1, *output)
        self._run = session.run_with_iobinding
        self._thread = threading.local()

    def __call__(self, x: Array, keep: Masks | None = None) -> Array:
        try:
            own_x, own_keep, own_y, binding = self._thread.buffers
        except AttributeError:
            own_x, own_keep, own_y, binding = self._thread.buffers = self._bound()
        own_x[...] = x
        if keep is not None:
            own_keep[...] = keep
        with Reported(self._part, "failed"):
            self._run(binding)
        result: Array = own_y.copy()
        return result

    def _bound(self) -> tuple[Array, Masks, Array, Any]:
        x, y = np.zeros(self._image, np.float32), np.zeros(self._output, np.float32)
        keep = np.zeros(len(self._keeps), bool)
        binding = self._session.io_binding()
        binding.bind_ortvalue_input(INPUT, _shared(x))
        for index, name in enumerate(self._keeps):
            binding.bind_ortvalue_input(name, _shared(keep[index : index + 1].reshape(())))
        binding.bind_ortvalue_output(OUTPUT, _shared(y))
        return x, keep, y, binding


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
