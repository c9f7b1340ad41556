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
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from time import perf_counter
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from bdexport.backends.arrays import ArrayRows, closed_error
from bdexport.backends.base import Readable
from bdexport.backends.forking import KeptInForks
from bdexport.backends.onnxruntime_common import Reported, load_model, new_run_options
from bdexport.backends.onnxruntime_engine import blocks_of, check_ends, check_straight
from bdexport.backends.onnxruntime_link import (
    INPUT,
    OUTPUT,
    Linker,
    float_weights,
    input_name,
    keep_name,
    output_name,
)
from bdexport.backends.output_guard import REMEDY, UNWRITTEN, check_rows, one_mark, unwritten_error
from bdexport.backends.time_limit import TimeLimit
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
        timeout_s: float | None = None,
    ) -> None:
        self.device, self.threads = "cpu", threads
        self.notes: tuple[str, ...] = (note,)
        self._manifest = manifest
        self._again = partial(OnnxRuntimeSession, manifest, files, threads, note, linked, fused, timeout_s)
        self._files = files
        self._limit = None if timeout_s is None else TimeLimit(timeout_s, _terminate)
        engines = _read_engines(files) if linked else {}  # their bytes are let go of when they are all loaded
        weights = _SharedWeights(engines)
        self._parts = {
            part: _Part(
                *(part, path, engines.get(part), manifest.parts[part]),
                *(threads if part in WHOLE else 1, linked, weights.of([part]), self._limit),
            )
            for part, path in files.items()
        }
        paths = manifest.fused.part_paths(manifest.transitions) if fused and manifest.fused is not None else []
        linker = _linker(engines) if linked and (paths or threads > 1) else None
        self._switched = (
            _SwitchedChain(manifest, linker, threads, self._limit) if linker is not None and threads > 1 else None
        )
        if self._switched is not None:
            self.notes += (f"chain: parts linked into one session, one pool of {threads} threads",)
        elif linked:
            self.notes += ("chain: a session per part, without thread pools",)
        began = perf_counter()
        self._fused = {
            path: _FusedPath(manifest, linker, path, threads, weights, self._limit)
            for path in paths
            if linker is not None
        }
        self.fused, self.fused_seconds = frozenset(self._fused), perf_counter() - began
        if paths:
            self.notes += (f"fused: {len(paths)} paths linked from the parts' engines, on the same weights",)
        self._in_turn: _PartsInTurn | None = _PartsInTurn(self._parts, manifest, self._limit)
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
        limited = nullcontext if self._limit is None else partial(self._limit.work_for, self._limit.current)
        try:
            for call in calls[1:]:
                try:
                    others.append(self._pool.submit(self._share, call, limited))
                except RuntimeError as error:
                    if self._closed:  # by another thread, in between
                        raise closed_error("onnxruntime") from error
                    what = f"chain [onnxruntime]: no thread for a share of the batch ({error})"
                    raise BackendError(what, remedy=f"{REMEDY}, or load the bundle with threads=1") from error
            return [self._share(calls[0], limited), *(other.result() for other in others)]
        finally:
            wait(others)  # whatever failed: nobody works on the batch any more when this returns

    def _share(self, call: Callable[[], Array], limited: Callable[[], AbstractContextManager[None]]) -> Array:
        self._thread.shares = True
        try:
            with limited():
                return call()
        finally:
            self._thread.shares = False

    def limited(self) -> AbstractContextManager[None]:
        """See :class:`bdexport.backends.base.LimitedSession`."""
        return nullcontext() if self._limit is None else self._limit.call(new_run_options())

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
        if self._limit is not None:
            self._limit.close()

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
        limit: TimeLimit | None,
    ) -> None:
        """``model``: the bytes of ``path`` where they have been read before."""
        self.part, self.threads, self._limit = part, threads, limit
        self._weights = weights  # the session reads them where they are and does not keep them
        self._input, self._outputs = (input_name(part), [output_name(part)]) if named else (INPUT, [OUTPUT])
        with Reported(part, f"cannot load {path}"):
            self._session = load_model(_read_engine(part, path) if model is None else model, threads, weights)
        self.input_block, self.output_block = blocks_of(part, path, self._session, entry)
        check_ends(part, path, self._session, entry, (self._input, self._outputs[0]))
        self._output_shape = entry.output.shape
        self._single = (
            _SingleImage(part, self._session, entry.input.shape, entry.output.shape, limit=limit)
            if part in WHOLE
            else None
        )

    def run(self, x: Array) -> Array:
        if self._single is not None and len(x) == 1:
            return self._single(x)
        return _batch(self.part, self._session, self._outputs, {self._input: x}, self._output_shape, self._limit)

    def bound(self, source: Any, target: Any) -> tuple[Any, Any]:
        """A function and the binding to call it with, which runs this part from one OrtValue to another.

        The function takes the options of the run after it.
        """
        binding = self._session.io_binding()
        binding.bind_ortvalue_input(self._input, source)
        binding.bind_ortvalue_output(self._outputs[0], target)
        return self._session.run_with_iobinding, binding


def _batch(
    part: str,
    session: Any,
    outputs: list[str],
    inputs: Mapping[str, Array],
    shape: tuple[int, ...],
    limit: TimeLimit | None,
) -> Array:
    """The one output of a batch, fresh: ONNX Runtime makes it. Raises BackendError where it is not (batch, *shape)."""
    with Reported(part, "failed"):
        result: Array = session.run(outputs, inputs, _options(limit))[0]
    check_rows(f"{part} [onnxruntime]", result, len(next(iter(inputs.values()))), shape)
    return result


def _terminate(options: Any) -> None:
    """End every run that was begun with these RunOptions; one that begins later ends at once."""
    options.terminate = True


def _options(limit: TimeLimit | None) -> Any:
    """The RunOptions of the call that this thread works for; None without a limit."""
    call = None if limit is None else limit.current
    return None if call is None else call.running


def _shared(array: Array) -> Any:
    """An OrtValue on the array's own memory (which it keeps alive)."""
    import onnxruntime as ort

    return ort.OrtValue.ortvalue_from_numpy(array)


class _PartsInTurn:
    """Whole paths of single images, one session after another, between static buffers that are bound once per thread.

    Measured, ResNet-32 with 7 of 15 blocks: 8 % less than handing numpy arrays from session to session.
    """

    def __init__(self, parts: Mapping[str, _Part], manifest: Manifest, limit: TimeLimit | None) -> None:
        self._parts, self._entries, self._limit = parts, manifest.parts, limit
        self._thread = threading.local()

    def __call__(self, path: tuple[str, ...], x: Array) -> Array:
        try:
            buffers: _PartBuffers = self._thread.buffers
        except AttributeError:
            buffers = self._thread.buffers = _PartBuffers(self._parts, self._entries)
        buffers.x[...] = x
        options = _options(self._limit)
        with Reported("chain", "failed"):
            for run, binding, left in buffers.calls(path):
                left[0] = UNWRITTEN
                run(binding, options)
                if left[0] == UNWRITTEN:
                    raise unwritten_error("chain [onnxruntime]", buffers.y, 1)
        result: Array = buffers.y.copy()
        return result


_Step = tuple[Any, Any, memoryview]  # a function, the binding to call it with, and the mark of what it writes


class _PartBuffers:
    """One thread's buffers: the image, the logits, and for every shape between parts one to read and one to write."""

    def __init__(self, parts: Mapping[str, _Part], entries: Mapping[str, PartEntry]) -> None:
        self._parts, self._entries = parts, entries
        self.x = np.zeros((1, *entries[STEM].input.shape), np.float32)
        self.y = np.zeros((1, *entries[HEAD].output.shape), np.float32)
        self._x, self._y = _shared(self.x), _shared(self.y)
        self._between: dict[tuple[tuple[int, ...], int], tuple[Any, memoryview]] = {}
        self._bindings: dict[tuple[str, int], _Step] = {}
        self._calls: dict[tuple[str, ...], list[_Step]] = {}

    def calls(self, path: tuple[str, ...]) -> list[_Step]:
        """What to call for a path, in order."""
        calls = self._calls.get(path)
        if calls is None:
            # Every part reads one side and writes the other, so two bindings of a part are all there are.
            calls = [self._binding(part, step % 2) for step, part in enumerate(path)]
            if len(self._calls) < CACHED_MASKS:
                self._calls[path] = calls
        return calls

    def _binding(self, part: str, side: int) -> _Step:
        found = self._bindings.get((part, side))
        if found is None:
            entry, engine = self._entries[part], self._parts[part]
            source = self._x if part == STEM else self._buffer(entry.input.shape, side)[0]
            last = self._y, one_mark(self.y)
            target, left = last if part == HEAD else self._buffer(entry.output.shape, 1 - side)
            found = self._bindings[part, side] = (*engine.bound(source, target), left)
        return found

    def _buffer(self, shape: tuple[int, ...], side: int) -> tuple[Any, memoryview]:
        if (shape, side) not in self._between:
            array = np.zeros((1, *shape), np.float32)
            self._between[shape, side] = _shared(array), one_mark(array)
        return self._between[shape, side]


def _read_engines(files: Mapping[str, Readable]) -> dict[str, bytes]:
    """The engines that are linked: all but whole networks."""
    return {part: _read_engine(part, path) for part, path in files.items() if part not in WHOLE}


def _read_engine(part: str, path: Readable) -> bytes:
    """The engine's bytes. Raises :class:`BundleError` for one with control flow."""
    with Reported(part, f"cannot read {path}"):
        data = path.read_bytes()
    check_straight(part, path, data)
    return data


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
        self,
        manifest: Manifest,
        linker: Linker,
        path: tuple[str, ...],
        threads: int,
        weights: _SharedWeights,
        limit: TimeLimit | None,
    ) -> None:
        self._weights = weights.of(path)  # the session reads them where they are and does not keep them
        with Reported("fused", "cannot link the parts' engines"):
            self._session = load_model(linker.path(path), threads, self._weights)
        image, logits = manifest.parts[STEM].input.shape, manifest.parts[HEAD].output.shape
        self._single = _SingleImage("fused", self._session, image, logits, limit=limit)
        self._logits, self._limit = logits, limit

    def run(self, x: Array) -> Array:
        """The logits of a batch, fresh."""
        if len(x) == 1:
            return self._single(x)
        return _batch("fused", self._session, [OUTPUT], {INPUT: x}, self._logits, self._limit)


class _SwitchedChain:
    """All parts in one session with an image's mask as its inputs: one thread pool, and no second one to spin with."""

    def __init__(self, manifest: Manifest, linker: Linker, threads: int, limit: TimeLimit | None) -> None:
        self._keeps = [keep_name(index) for index in range(manifest.num_blocks)]
        self._blocks = [block_part(index) for index in range(manifest.num_blocks)]
        image, logits = manifest.parts[STEM].input.shape, manifest.parts[HEAD].output.shape
        with Reported("chain", "cannot link the parts' engines"):
            model = linker.switched(manifest.num_blocks, frozenset(manifest.transitions))
            self._session = load_model(model, threads)
        self._single = _SingleImage("chain", self._session, image, logits, self._keeps, limit)
        self._logits, self._limit = logits, limit
        self._masks: dict[tuple[str, ...], Masks] = {}

    def run(self, parts: Sequence[str], x: Array) -> Array | None:
        """The logits of a whole path; None when ``parts`` are no whole path."""
        keep = self._mask(tuple(parts))
        if keep is None:
            return None
        if len(x) == 1:
            return self._single(x, keep)
        switches = {name: np.asarray(keep[index]) for index, name in enumerate(self._keeps)}
        return _batch("chain", self._session, [OUTPUT], {INPUT: x} | switches, self._logits, self._limit)

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
        self,
        part: str,
        session: Any,
        image: Sequence[int],
        output: Sequence[int],
        keeps: Sequence[str] = (),
        limit: TimeLimit | None = None,
    ) -> None:
        self._part, self._session, self._keeps, self._limit = part, session, keeps, limit
        self._image, self._output = (1, *image), (1, *output)
        self._run = session.run_with_iobinding
        self._thread = threading.local()

    def __call__(self, x: Array, keep: Masks | None = None) -> Array:
        try:
            own_x, own_keep, own_y, left, binding = self._thread.buffers
        except AttributeError:
            own_x, own_keep, own_y, left, binding = self._thread.buffers = self._bound()
        own_x[...] = x
        if keep is not None:
            own_keep[...] = keep
        left[0] = UNWRITTEN
        with Reported(self._part, "failed"):
            self._run(binding, _options(self._limit))
        if left[0] == UNWRITTEN:
            raise unwritten_error(f"{self._part} [onnxruntime]", own_y, 1)
        result: Array = own_y.copy()
        return result

    def _bound(self) -> tuple[Array, Masks, Array, memoryview, Any]:
        x, y = np.zeros(self._image, np.float32), np.zeros(self._output, np.float32)
        keep = np.zeros(len(self._keeps), bool)
        binding = self._session.io_binding()
        binding.bind_ortvalue_input(INPUT, _shared(x))
        for index, name in enumerate(self._keeps):
            binding.bind_ortvalue_input(name, _shared(keep[index : index + 1].reshape(())))
        binding.bind_ortvalue_output(OUTPUT, _shared(y))
        return x, keep, y, one_mark(y), binding


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
