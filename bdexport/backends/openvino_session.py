"""A bundle's engines, loaded by OpenVINO on the CPU.

Tensors between parts are plain NCHW float32, whatever the engines compute in: OpenVINO converts to its own layout and
precision inside a part. Giving the ends its layout through a preprocessor was slower: its transposes were not removed.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from time import perf_counter
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from bdexport.backends.arrays import ArrayRows, closed_error
from bdexport.backends.base import Readable
from bdexport.backends.forking import LOAD_IN_WORKERS, Inside, KeptInForks, forked_error, was_cut
from bdexport.backends.openvino_common import (
    BF16,
    FAILURES,
    KERNELS,
    Reported,
    core,
    cpu_config,
    import_openvino,
    reason_of,
)
from bdexport.backends.openvino_engine import (
    SourceModel,
    compiled_for_one,
    imported,
    read_engine,
    requirements_here,
)
from bdexport.backends.output_guard import REMEDY, UNWRITTEN, check_written, mark, one_mark, unwritten_error
from bdexport.backends.time_limit import OverError, TimeLimit
from bdexport.errors import BackendError
from bdexport.parts import HEAD, STEM

if TYPE_CHECKING:
    from bdexport.bundle import Manifest, PartEntry

# Images given to OpenVINO at a time: it keeps what the largest batch ever needed, and is not faster with more of them.
LARGEST_CALL = 64
FORKED = "forked: OpenVINO's threads are not in a process forked after it was loaded"
ARITHMETIC = {"Convolution", "GroupConvolution", "FullyConnected", "MatMul"}  # layers whose precision is reported
EMULATED = ("undef", "ref")  # how kernels begin that stand in for units that are not there
Array = NDArray[Any]


class OpenVinoSession(ArrayRows, KeptInForks):
    """See :class:`bdexport.backends.base.Session`. Tensors are numpy arrays."""

    def __init__(
        self,
        manifest: Manifest,
        files: Mapping[str, Readable],
        threads: int,
        note: str,
        fused: bool = False,
        timeout_s: float | None = None,
    ) -> None:
        self.device, self.threads = "cpu", threads
        config = cpu_config(manifest.precision, threads)
        self._limit = None if timeout_s is None else TimeLimit(timeout_s, _cancel)
        opened = {part: _opened(part, path, manifest, config, self._limit) for part, path in files.items()}
        self._sources = {part: source for part, (source, _) in opened.items()}
        self._parts = {part: engine for part, (_, engine) in opened.items()}
        paths = manifest.fused.part_paths(manifest.transitions) if fused and manifest.fused is not None else []
        self._linking = threading.Lock()
        # Compiled when they are first called: all of them take seconds, and many may never be.
        self._fused = {path: self._path_engine(path, manifest, config) for path in paths}
        self.fused = frozenset(self._fused)
        self._thread = threading.local()
        self._closed = False
        # One pool: OpenVINO's threads come from one per process, whatever the number of engines.
        self.notes: tuple[str, ...] = (note, _precision_note(manifest.precision, self._parts.values()))
        self.notes += ("batch 1 is ready when the bundle is opened, other batches are compiled by their first call",)
        if paths:
            self.notes += (f"fused: {len(paths)} paths, each compiled from the parts' models by its first call",)
        self.notes += _compiled_anew(self._parts.values())

    @property
    def fused_seconds(self) -> float:
        """How long linking and compiling fused paths took so far."""
        return sum(engine.seconds for engine in self._fused.values())

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

    def run_fused(self, path: tuple[str, ...], x: Array) -> Array:
        fused = self._fused
        if self._closed:
            raise closed_error("openvino")
        return fused[path].run(x)

    def prepare_fused(self, batch: int = 1) -> None:
        """See :meth:`bdexport.backends.base.FusedSession.prepare_fused`."""
        fused, sources = self._fused, self._sources
        if self._closed:
            raise closed_error("openvino")
        for engine in fused.values():
            engine.prepare(batch)
        for source in sources.values():  # they are parsed again where one is needed
            source.forget()

    def in_fork(self) -> OpenVinoSession:
        """See :meth:`bdexport.backends.base.ForkingSession.in_fork`.

        The thread that calls does all the work there: OpenVINO's pool is one per process and is not made anew.
        """
        if was_cut():
            raise forked_error("openvino", "while another thread was running it: its locks stay locked here")
        if self.threads > 1:
            self.notes += (f"{FORKED}: 1 thread computes instead of {self.threads}; {LOAD_IN_WORKERS}",)
            self.threads = 1
        return self

    def limited(self) -> AbstractContextManager[None]:
        """See :class:`bdexport.backends.base.LimitedSession`."""
        return nullcontext() if self._limit is None else self._limit.call()

    def close(self) -> None:
        # Names are let go of, nothing is emptied: a call that another thread has begun ends as if before.
        self._closed = True
        self._parts, self._fused, self._sources = {}, {}, {}
        if self._limit is not None:
            self._limit.close()

    def _path_engine(self, path: tuple[str, ...], manifest: Manifest, config: dict[str, Any]) -> _Engine:
        """The path as one model: OpenVINO optimises across what were the parts' ends."""
        entry = replace(manifest.parts[STEM], name="fused", output=manifest.parts[HEAD].output)
        sources = [self._sources[part] for part in path]
        linked = partial(_linked, sources, self._linking)
        return _Engine("fused", entry, config, manifest.precision, linked, limit=self._limit)


class _Engine:
    """One model, compiled twice at most: for single images and for any batch, each when it is first needed.

    What was compiled is given up after any exception in a run of it, an interrupt included, and compiled anew when it
    is next needed: OpenVINO leaves a graph for any batch prepared for another one than its memory is for, and the next
    run overwrites memory that is not its own (seen). So that no other thread is the next one, runs of batches have a
    lock of ours; OpenVINO runs one request of a compiled model at a time anyway. Graphs for single images are prepared
    when they are compiled, and need none.

    ``single``: the former, where an engine file holds it. ``compiled_anew``: what that file had been compiled for,
    where it is not this machine.
    """

    def __init__(
        self,
        part: str,
        entry: PartEntry,
        config: dict[str, Any],
        precision: str,
        model: Callable[[], Any],
        single: Any | None = None,
        compiled_anew: str | None = None,
        limit: TimeLimit | None = None,
    ) -> None:
        self.part, self.entry, self.compiled_anew = part, entry, compiled_anew
        self._model, self._config, self._precision = model, config, precision
        self.made_single: Any = single
        self._any: Any = None
        self._limit = limit
        self.where = f"{part} [openvino]"
        self._compiling, self._any_running = threading.Lock(), threading.Lock()
        self._thread = threading.local()
        self.seconds = 0.0  # spent on compiling
        self.kernels = Counter[tuple[str, str]]() if single is None else self._checked(single)

    @property
    def single(self) -> Any:
        """The model compiled for single images."""
        made = self.made_single
        if made is None:
            with self._waiting(self._compiling):
                made = self.made_single
                if made is None:
                    made = self._timed("cannot be compiled", lambda: compiled_for_one(self._model(), self._config))
                    self.kernels = self._checked(made)
                    self.made_single = made
        return made

    def prepare(self, batch: int) -> None:
        """Compile what a batch of this size needs, and a group of one image out of it."""
        self._single_image()
        if batch > 1:
            self._any_request()

    def _timed(self, what: str, compiled: Callable[[], Any]) -> Any:
        began = perf_counter()
        with Reported(self.part, what), nullcontext() if self._limit is None else self._limit.clock_stopped():
            result = compiled()
        self.seconds += perf_counter() - began
        return result

    def _checked(self, compiled: Any) -> Counter[tuple[str, str]]:
        kernels = _kernels(compiled)
        if self._precision == BF16:
            _check_bf16(self.part, kernels)
        return kernels

    def run(self, x: Array) -> Array:
        """The part's output, fresh."""
        if len(x) == 1:
            return self._single_image().run(x)
        y = np.empty((len(x), *self.entry.output.shape), np.float32)
        pieces = -(-len(x) // LARGEST_CALL)
        if pieces == 1:
            self._infer(x, y)
            return y
        for rows in np.array_split(np.arange(len(x)), pieces):
            piece = slice(rows[0], rows[-1] + 1)
            self._infer(x[piece], y[piece])
        return y

    def _infer(self, x: Array, y: Array) -> None:
        """Run a batch of at most LARGEST_CALL images into ``y``."""
        with Inside(), self._waiting(self._any_running):  # a fork must see it before the lock is taken
            request = self._any_request()
            marks = mark(y)
            try:
                request.set_output_tensor(import_openvino().Tensor(y, shared_memory=True))
                inputs = [x if x.flags.writeable else x.copy()]
                self.run_of(request)(inputs, share_inputs=True, share_outputs=True)
                check_written(self.where, marks, y)
            except OverError:
                raise
            except BaseException as error:
                self._any = None
                self.report(error, len(x))
                raise

    def _waiting(self, lock: threading.Lock) -> AbstractContextManager[object]:
        """Hold ``lock``; within the time limit, if there is one."""
        return lock if self._limit is None else self._limit.waiting(lock, self.where)

    def run_of(self, request: Any) -> Callable[..., object]:
        """What runs a request of this engine, as its ``infer``: within the time limit, if there is one."""
        limit, inside = self._limit, Inside()  # a request belongs to one thread
        infer: Callable[..., object] = request.infer

        def run(*inputs: Any, **how: bool) -> None:
            with inside:
                infer(*inputs, **how)

        def limited(*inputs: Any, **how: bool) -> None:
            assert limit is not None
            with inside, limit.running(self.where, request):
                infer(*inputs, **how)

        return run if limit is None else limited

    def report(self, error: BaseException, batch: int) -> None:
        """Raises BackendError for what OpenVINO raised in a run."""
        if isinstance(error, FAILURES):
            what = f"{self.where}: batch {batch} of {self.entry.input.shape} failed ({reason_of(error)})"
            raise BackendError(what, remedy=REMEDY) from error

    def _single_image(self) -> _SingleImage:
        try:
            found: _SingleImage = self._thread.single
        except AttributeError:
            found = self._thread.single = _SingleImage(self)
        return found

    def _any_request(self) -> Any:
        """The calling thread's request of the model that is compiled for any batch."""
        compiled, request = getattr(self._thread, "any", (None, None))
        if compiled is not None and compiled is self._any:
            return request
        with self._waiting(self._compiling):
            if self._any is None:
                compile_any = partial(core().compile_model, device_name="CPU", config=self._config)
                self._any = self._timed("cannot be compiled for any batch", lambda: compile_any(self._model()))
            compiled = self._any
        with Reported(self.part, "cannot be bound"):
            request = compiled.create_infer_request()
        self._thread.any = compiled, request
        return request


class _SingleImage:
    """A request with buffers of one image that are bound once; they belong to one thread."""

    def __init__(self, engine: _Engine, x: Array | None = None, y: Array | None = None) -> None:
        self._engine = engine
        self.x = np.zeros((1, *engine.entry.input.shape), np.float32) if x is None else x
        self.y = np.zeros((1, *engine.entry.output.shape), np.float32) if y is None else y
        self._mark = one_mark(self.y)
        self._compiled: Any = None
        self._bind()

    def _bind(self) -> None:
        tensor, compiled = import_openvino().Tensor, self._engine.single
        with Reported(self._engine.part, "cannot be bound"):
            request = compiled.create_infer_request()
            request.set_input_tensor(tensor(self.x, shared_memory=True))
            request.set_output_tensor(tensor(self.y, shared_memory=True))
        self._compiled, self._run = compiled, self._engine.run_of(request)

    def run(self, x: Array) -> Array:
        """Copy in, run, copy out."""
        self.x[...] = x
        self.infer()
        return self.y.copy()

    def infer(self) -> None:
        """Run what is in the buffers."""
        engine, left = self._engine, self._mark
        if self._compiled is not engine.made_single:
            self._bind()
        left[0] = UNWRITTEN
        try:
            self._run(share_outputs=True)
            if left[0] == UNWRITTEN:
                raise unwritten_error(engine.where, self.y, 1)
        except OverError:
            raise
        except BaseException as error:
            engine.made_single = None
            engine.report(error, 1)
            raise


class _Path:
    """One thread's way through whole paths of single images: parts in turn, each from one bound buffer to another."""

    def __init__(self, engines: Mapping[str, _Engine]) -> None:
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


# ---- making engines ----------------------------------------------------------------------------------------------


def _cancel(request: Any) -> None:
    """End a run, if the request is in one. OpenVINO looks between a graph's nodes."""
    request.cancel()


def _opened(
    part: str, path: Readable, manifest: Manifest, config: dict[str, Any], limit: TimeLimit | None
) -> tuple[SourceModel, _Engine]:
    """A part's engine: imported where it was compiled for what is here, compiled otherwise."""
    entry, precision = manifest.parts[part], manifest.precision
    file = read_engine(part, path, entry, precision)
    if file.requirements == requirements_here():
        single = imported(part, path, entry, file.blob, config)
        return file.source, _Engine(part, entry, config, precision, file.source, single, limit=limit)
    with Reported(part, f"cannot compile {path}"):
        single = compiled_for_one(file.source(), config)
    anew = file.requirements
    return file.source, _Engine(part, entry, config, precision, file.source, single, anew, limit)


def _linked(sources: Sequence[SourceModel], linking: threading.Lock) -> Any:
    """One model that runs the given ones one after another, on the same weights in memory."""
    openvino = import_openvino()
    with linking:  # the parts' models are everybody's
        clones = [source().clone() for source in sources]
    output = clones[0].get_results()[0].input_value(0)
    for model in clones[1:]:
        model.get_parameters()[0].output(0).replace(output)
        output = model.get_results()[0].input_value(0)
    result = openvino.opset13.result(output)
    return openvino.Model([result], clones[0].get_parameters(), "fused")


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


def _compiled_anew(parts: Iterable[_Engine]) -> tuple[str, ...]:
    """A note where engines belong to another OpenVINO or processor: opening took the longer for it."""
    others = [part.compiled_anew for part in parts if part.compiled_anew is not None]
    if not others:
        return ()
    return (
        f"compiled anew: {len(others)} engines were compiled for {others[0]}, and this is {requirements_here()}; "
        "to open the bundle faster, build its engines anew here: bdexport rebuild BUNDLE",
    )
