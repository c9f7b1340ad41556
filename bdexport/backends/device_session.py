"""A session on a GPU, whatever runs the parts: memory, copies, rows, captured paths. Engines only queue their work.

One stream carries everything, so memory that is given back may be used again at once by what is queued next. Tensors
between parts are float32 (N, *shape), C-contiguous, in blocks of one arena; engines share one scratch buffer.
Copies between host and device go through pinned memory; the host waits in :meth:`DeviceSession.get` only.
"""

from __future__ import annotations

import math
import threading
import weakref
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from bdexport.backends.arrays import closed_error, row_span
from bdexport.backends.base import Rows
from bdexport.backends.device_memory import FLOAT, DeviceTensor, StaticBlock, StaticBuffers, nobody
from bdexport.backends.output_guard import check_written, mark
from bdexport.cuda.arena import ALIGNMENT, Arena, Block, Staging
from bdexport.cuda.base import Cuda, DeviceBuffer, Graph, Stream
from bdexport.cuda.exchange import DeviceArray, adopt, is_device_array
from bdexport.errors import BackendError

if TYPE_CHECKING:
    from bdexport.bundle import Manifest

Array = NDArray[Any]


class DeviceEngine(Protocol):
    """One part's engine on the device: float32 in, float32 out, at addresses that the session chooses."""

    @property
    def scratch_bytes(self) -> int:
        """Working memory that :meth:`enqueue` needs and the session provides; 0 where the engine has its own."""

    def use_scratch(self, pointer: int) -> None:
        """Called once, before the first enqueue, with 256-byte aligned memory; only where ``scratch_bytes`` > 0."""

    def enqueue(self, source: int, target: int, batch: int, stream: Stream) -> None:
        """Queue the part on ``stream``: (batch, *input) at ``source`` -> (batch, *output) at ``target``.

        Both addresses are 256-byte aligned. Must not wait for the stream. Raises BackendError naming the part.
        """

    def close(self) -> None:
        """Free the engine; nothing of it is queued any more."""


class DeviceSession:
    """See :class:`bdexport.backends.base.Session`. Takes over ``cuda`` and ``engines``, also when it cannot be made.

    ``stream``: the caller's (a raw handle or an object with ``__cuda_stream__``); None: one of its own. ``made``: the
    same stream where the engines already had to be told of it; the session closes it.
    ``capturable``: whether the engines' work may be captured into graphs, and the reason.
    """

    threads = None

    def __init__(
        self,
        backend: str,
        manifest: Manifest,
        engines: Mapping[str, DeviceEngine],
        cuda: Cuda,
        *,
        stream: Any = None,
        made: Stream | None = None,
        notes: Sequence[str] = (),
        capturable: tuple[bool, str] = (True, "the engines' work can be captured"),
    ) -> None:
        self.device = f"cuda:{cuda.device}"
        self._backend, self._manifest, self._cuda = backend, manifest, cuda
        self._engines = dict(engines)
        self._arena, self._staging = Arena(cuda), Staging(cuda)
        self._scratch: DeviceBuffer | None = None
        self._static: dict[int, StaticBuffers] = {}
        self._graphs: set[CapturedPath] = set()
        self._lock = threading.RLock()
        self._stream = made
        self._capture_stream: Stream | None = None
        self._capturable = capturable
        self._closed = False
        try:
            if self._stream is None:
                self._stream = cuda.stream() if stream is None else cuda.wrap_stream(stream)
            scratch = self._share_scratch()
        except BaseException:
            self.close()
            raise
        owner = "its own" if stream is None else "the caller's"
        self.notes: tuple[str, ...] = (
            f"device: {cuda.device_name()}, driver for CUDA {_version_text(cuda.driver_version())}",
            cuda.note,
            f"stream: {owner}; scratch shared by all engines: {scratch / 2**20:.1f} MiB",
            *notes,
        )

    # ---- in and out -----------------------------------------------------------------------------------------------

    def put(self, part: str, array: Any) -> DeviceTensor:
        """A host array is copied; an array on this device (DLPack, ``__cuda_array_interface__``) is used as it is."""
        with self._lock:
            stream = self._open_stream()
            if is_device_array(array):
                return self._adopt(array, (..., *self._manifest.parts[part].input.shape), stream)
            array = np.ascontiguousarray(array, FLOAT)
            tensor = self._input(array.shape)
            staged = self._staging.take(array.nbytes)
            np.copyto(staged.bytes.view(FLOAT).reshape(array.shape), array)
            self._cuda.copy_to_device(tensor.pointer, staged.bytes, stream)
            staged.release(stream)
            return tensor

    def get(self, part: str, tensor: DeviceTensor) -> Array:
        with self._lock:
            stream = self._open_stream()
            staged = self._staging.take(tensor.nbytes)
            marks = mark(staged.bytes.view(FLOAT).reshape(tensor.shape))  # another call's output lay there
            self._cuda.copy_to_host(staged.bytes, tensor.pointer, stream)
        stream.synchronize()  # not under the lock: other threads may queue meanwhile
        result: Array = staged.bytes.view(FLOAT).reshape(tensor.shape).copy()
        check_written(f"{part} [{self._backend}]", marks, result)
        with self._lock:  # another thread may have closed the session meanwhile
            staged.release(stream)
        return result

    def wait(self) -> None:
        """Wait until everything that is queued is done: for measuring."""
        with self._lock:
            stream = self._open_stream()
        stream.synchronize()

    def export(self, tensor: DeviceTensor) -> DeviceArray:
        """A tensor as an array for others on the device (DLPack, ``__cuda_array_interface__``), without a copy.

        Its memory is its own from now on; see :class:`bdexport.cuda.exchange.DeviceArray` for streams.
        """
        with self._lock:
            stream = self._open_stream()
            if isinstance(tensor.memory, StaticBlock):
                self._move_out(tensor.memory, stream)
            return DeviceArray(tensor.pointer, tensor.shape, tensor.memory, self._cuda, stream)

    # ---- running --------------------------------------------------------------------------------------------------

    def run(self, part: str, x: DeviceTensor) -> DeviceTensor:
        with self._lock:
            stream = self._open_stream()
            return self._run(part, x, stream)

    def run_path(self, parts: Sequence[str], x: DeviceTensor) -> DeviceTensor:
        with self._lock:
            stream = self._open_stream()
            for part in parts:
                x = self._run(part, x, stream)
            return x

    def _run(self, part: str, x: DeviceTensor, stream: Stream) -> DeviceTensor:
        self._check_batch(part, len(x))
        out = self._new((len(x), *self._manifest.parts[part].output.shape))
        self._engines[part].enqueue(x.pointer, out.pointer, len(x), stream)
        return out

    # ---- rows -----------------------------------------------------------------------------------------------------

    def take(self, x: DeviceTensor, rows: Rows) -> DeviceTensor:
        with self._lock:
            stream = self._open_stream()
            shape = (len(rows), *x.shape[1:])
            span = row_span(rows)
            if span is not None:
                pointer = x.pointer + span.start * x.row_bytes
                if pointer % ALIGNMENT == 0 and not isinstance(x.memory, StaticBlock):
                    return DeviceTensor(pointer, shape, x.memory)
            out = self._new(shape)
            if span is not None:
                self._cuda.copy_on_device(out.pointer, pointer, out.nbytes, stream)
            else:
                self._cuda.gather_rows(
                    out.pointer, x.pointer, self._row_numbers(rows, stream), x.row_bytes, len(rows), stream
                )
            return out

    def replace(self, x: DeviceTensor, rows: Rows, y: DeviceTensor) -> DeviceTensor:
        with self._lock:
            self._write(x, rows, y, self._open_stream())
            return x

    def merge(self, pieces: Sequence[tuple[Rows, DeviceTensor]], batch: int) -> DeviceTensor:
        with self._lock:
            stream = self._open_stream()
            out = self._new((batch, *pieces[0][1].shape[1:]))
            for rows, piece in pieces:
                self._write(out, rows, piece, stream)
            return out

    def _write(self, x: DeviceTensor, rows: Rows, y: DeviceTensor, stream: Stream) -> None:
        span = row_span(rows)
        if span is not None:
            self._cuda.copy_on_device(x.pointer + span.start * x.row_bytes, y.pointer, y.nbytes, stream)
        else:
            self._cuda.scatter_rows(
                x.pointer, y.pointer, self._row_numbers(rows, stream), x.row_bytes, len(rows), stream
            )

    def _row_numbers(self, rows: Rows, stream: Stream) -> Block:
        numbers = rows.astype(np.int32)
        staged = self._staging.take(numbers.nbytes)
        staged.bytes.view(np.int32)[...] = numbers
        block = self._arena.take(numbers.nbytes)
        self._cuda.copy_to_device(block.pointer, staged.bytes, stream)
        staged.release(stream)
        return block

    # ---- captured paths -------------------------------------------------------------------------------------------

    def can_capture(self) -> tuple[bool, str]:
        """Whether paths can be captured into graphs, and the reason."""
        return self._cuda.can_capture() if self._capturable[0] else self._capturable

    def capture_path(self, parts: Sequence[str], batch: int) -> CapturedPath:
        """The path as one graph for batches of that size. Raises BackendError when the capture is refused."""
        with self._lock:
            main = self._open_stream()
            for part in parts:
                self._check_batch(part, batch)
            if self._capture_stream is None:
                self._capture_stream = self._cuda.stream()
            stream = self._capture_stream
            buffers = self._static_buffers(batch)
            buffers.input(parts[0])  # made now: nothing may be allocated in a capture
            self._move_out(buffers.output(parts[-1]), main)
            main.synchronize()  # the warm-up uses scratch and static buffers on another stream
            # Once outside of a capture: engines load kernels and allocate on their first run, which no capture allows.
            self._enqueue_static(parts, buffers, batch, stream)
            stream.synchronize()
            with self._cuda.capture(stream) as capture:
                self._enqueue_static(parts, buffers, batch, stream)
            stream.synchronize()  # the graph has reached the device before another stream launches it
            path = CapturedPath(self, tuple(parts), batch, buffers, capture.graph)
            self._graphs.add(path)
            return path

    def _enqueue_static(self, parts: Sequence[str], buffers: StaticBuffers, batch: int, stream: Stream) -> None:
        source = buffers.input(parts[0]).block.pointer
        for step, part in enumerate(parts):
            last = step == len(parts) - 1
            target = buffers.output(part).block.pointer if last else buffers.sides[step % 2].pointer
            self._engines[part].enqueue(source, target, batch, stream)
            source = target

    def launch(self, path: CapturedPath, graph: Graph, x: DeviceTensor) -> DeviceTensor:
        """For :class:`CapturedPath`: run ``graph`` on ``x``."""
        with self._lock:
            stream, buffers = self._open_stream(), path.buffers
            if buffers is None:
                raise closed_error(self._backend)
            into = buffers.input(path.parts[0])
            source = into.block.pointer
            if x.pointer != source:
                # Another thread's images may lie there, waiting for their turn.
                self._move_out(into, stream)
                self._cuda.copy_on_device(source, x.pointer, x.nbytes, stream)
            output = buffers.output(path.parts[-1])
            self._move_out(output, stream)
            graph.launch(stream)
            return output.hold((path.batch, *self._manifest.parts[path.parts[-1]].output.shape))

    def forget(self, path: CapturedPath) -> None:
        """For :class:`CapturedPath`: it is closed."""
        with self._lock:
            self._graphs.discard(path)

    def _static_buffers(self, batch: int) -> StaticBuffers:
        capacity = self._capacity(batch)
        if capacity not in self._static:
            self._static[capacity] = StaticBuffers(self._arena, self._manifest, capacity)
        return self._static[capacity]

    def _capacity(self, batch: int) -> int:
        """The batch that buffers are made for: the next power of two, as far as the profile goes."""
        capacity = 1 << (batch - 1).bit_length()
        most = self._manifest.max_batch
        return capacity if most is None else max(batch, min(capacity, most))

    def _input(self, shape: tuple[int, ...]) -> DeviceTensor:
        """Memory for images: where graphs of that batch read them, if nobody's images are there; else anywhere."""
        buffers = self._static.get(self._capacity(shape[0]))
        block = None if buffers is None else buffers.inputs.get(shape[1:])
        return block.hold(shape) if block is not None and block.unused else self._new(shape)

    def _move_out(self, static: StaticBlock, stream: Stream) -> None:
        """Whoever still uses what lies in a static block gets a copy of it: the block is about to be overwritten."""
        holder = static.holder()
        if holder is not None:
            moved = self._arena.take(holder.nbytes)
            self._cuda.copy_on_device(moved.pointer, holder.pointer, holder.nbytes, stream)
            holder.pointer, holder.memory = moved.pointer, moved
            static.holder = nobody

    # ---- the rest -------------------------------------------------------------------------------------------------

    def close(self) -> None:
        with self._lock:
            if self._closed:
                return
            self._closed = True
            try:
                if self._stream is not None:
                    self._stream.synchronize()
            finally:  # also where a queued kernel has failed
                self._free_all()

    def _free_all(self) -> None:
        for path in list(self._graphs):
            path.close()
        self._static.clear()
        self._arena.close()
        self._staging.close()
        for engine in self._engines.values():
            engine.close()
        self._engines = {}
        if self._scratch is not None:
            self._scratch.free()
        for stream in (self._capture_stream, self._stream):
            if stream is not None:
                stream.close()
        self._cuda.close()

    def _share_scratch(self) -> int:
        needed = max((engine.scratch_bytes for engine in self._engines.values()), default=0)
        if needed:
            self._scratch = self._cuda.allocate(needed)
            for engine in self._engines.values():
                if engine.scratch_bytes:
                    engine.use_scratch(self._scratch.pointer)
        return needed

    def _new(self, shape: tuple[int, ...]) -> DeviceTensor:
        block = self._arena.take(math.prod(shape) * FLOAT.itemsize)
        return DeviceTensor(block.pointer, shape, block)

    def _adopt(self, array: Any, shape: tuple[Any, ...], stream: Stream) -> DeviceTensor:
        pointer, found, keep = adopt(array, shape[1:], self._cuda, stream)
        tensor = DeviceTensor(pointer, found, keep)
        if pointer % ALIGNMENT == 0:
            return tensor
        aligned = self._new(found)
        self._cuda.copy_on_device(aligned.pointer, pointer, tensor.nbytes, stream)
        # The producer's memory is released when this returns, before the copy has run.
        stream.synchronize()
        return aligned

    def _check_batch(self, part: str, batch: int) -> None:
        most = self._manifest.max_batch
        if most is not None and batch > most:
            what = f"{part} [{self._backend}]: batch {batch} exceeds the profile's {most}"
            raise BackendError(what, remedy=f"rebuild with --max-batch {batch}")

    def _open_stream(self) -> Stream:
        if self._closed or self._stream is None:
            raise closed_error(self._backend)
        return self._stream


class CapturedPath:
    """A path of one batch size as a graph on static buffers."""

    def __init__(
        self, session: DeviceSession, parts: tuple[str, ...], batch: int, buffers: StaticBuffers, graph: Graph
    ) -> None:
        self.parts, self.batch = parts, batch
        self.buffers: StaticBuffers | None = buffers
        self._session, self._graph = weakref.ref(session), graph

    def run(self, x: DeviceTensor) -> DeviceTensor:
        """The path's output for ``x`` (``batch`` images), queued. Raises UsageError once the session is closed."""
        session = self._session()
        if session is None:
            raise closed_error("cuda")
        return session.launch(self, self._graph, x)

    def close(self) -> None:
        """Destroy the graph, and let go of the buffers."""
        self._graph.close()
        self.buffers = None
        session = self._session()
        if session is not None:
            session.forget(self)


def _version_text(version: int) -> str:
    return f"{version // 1000}.{version % 1000 // 10}"
