"""A bundle's TensorRT engines on a GPU: checked, loaded, and given to a :class:`DeviceSession` that owns all memory.

Engines have no memory of their own but their weights: activations lie in the session's arena, and the working memory
of all of them is one buffer, since they run one after another on one stream.

TensorRT for RTX compiles kernels for the shapes that come. Batches that the profile names (smallest, chosen for,
largest) are compiled when they first come, so that a graph captures the final kernels; others run on general kernels
until theirs are compiled in the background. What is compiled is kept in a file for the next session.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bdexport.backends.arrays import no_device_error
from bdexport.backends.base import RunOptions
from bdexport.backends.device_session import DeviceEngine, DeviceSession
from bdexport.backends.tensorrt_common import Api, EngineDescription, LogLines, read_engine, same_major
from bdexport.cuda import cuda_ordinal, open_cuda
from bdexport.errors import BackendError, OutputError
from bdexport.files import UntrustedError, cache_folder, check_trusted, make_cache, write_bytes

if TYPE_CHECKING:
    from bdexport.bundle import Bundle, PartEntry
    from bdexport.cuda.base import Cuda, Stream

OUT_OF_MEMORY = ("out of memory", "OutOfMemory", "MemoryAllocation")  # in TensorRT's log


def open_session(api: Api, bundle: Bundle, options: RunOptions) -> TensorRTSession:
    """Load every engine of ``bundle``. Raises BackendError naming the part, both sides and the remedy."""
    ordinal = cuda_ordinal(options.device)
    if ordinal is None:
        raise no_device_error(api.flavour.name, options.device, "cuda or cuda:N")
    loader = _Loader(api, bundle)
    loader.check_versions()
    # PyCUDA leaves no device behind in the thread, and TensorRT takes the first one then.
    loader.cuda = open_cuda(device=ordinal, foreign_stream=options.stream is not None or ordinal > 0)
    try:
        if ordinal > 0 and loader.cuda.name == "pycuda":
            what = f"backend {api.flavour.name}: PyCUDA works on cuda:0 only"
            raise BackendError(what, got=options.device, remedy='pip install "cuda-python>=12.6"')
        engines = loader.engines()
    except BaseException:
        loader.cuda.close()
        raise
    # From here on the session owns CUDA and the engines, whatever happens.
    return TensorRTSession(bundle, engines, loader, options.stream)


class TensorRTSession(DeviceSession):
    """See :class:`bdexport.backends.base.Session`."""

    def __init__(self, bundle: Bundle, engines: dict[str, DeviceEngine], loader: _Loader, stream: Any) -> None:
        self._compiled = loader.compiled
        self._runtime = loader.runtime  # engines need it as long as they live
        notes = [*loader.notes, *self._compiled.notes]
        super().__init__(loader.api.flavour.name, bundle.manifest, engines, loader.cuda, stream=stream, notes=notes)

    def close(self) -> None:
        """Keep what was compiled, then free everything."""
        with self._lock:
            if not self._closed:
                self._compiled.keep()
            super().close()
            # After the contexts, which use both.
            self._compiled = CompiledKernels(None)
            self._runtime = None


# ---- one engine ---------------------------------------------------------------------------------------------------


@dataclass
class _Context:
    """An execution context and what it was last told, so that a call that repeats tells it nothing."""

    handle: Any
    batch: int = 0
    source: int = 0
    target: int = 0


class TensorRTEngine:
    """See :class:`bdexport.backends.device_session.DeviceEngine`.

    ``exact``: the context for batches that the profile names; ``other``: for all others. They may be the same.
    ``enter``: has the calling thread work on the right device; None where that is the first, which it does anyway.
    """

    def __init__(
        self,
        api: Api,
        description: EngineDescription,
        entry: PartEntry,
        engine: Any,
        exact: Any,
        other: Any,
        enter: Callable[[], object] | None = None,
    ) -> None:
        self._enter = enter
        self._api, self._description, self._entry = api, description, entry
        self._engine = engine
        self._exact = _Context(exact)
        self._other = self._exact if other is exact else _Context(other)

    @property
    def scratch_bytes(self) -> int:
        """The most that a batch within the profile needs."""
        return int(self._engine.device_memory_size_v2)

    def use_scratch(self, pointer: int) -> None:
        """See :meth:`DeviceEngine.use_scratch`."""
        for context in {id(context): context for context in (self._exact, self._other)}.values():
            context.handle.set_device_memory(pointer, self.scratch_bytes)

    def enqueue(self, source: int, target: int, batch: int, stream: Stream) -> None:
        """See :meth:`DeviceEngine.enqueue`."""
        if self._enter is not None:
            self._enter()
        batches = self._description.batches
        context = self._exact if batch in batches else self._other
        x, y = self._entry.input.name, self._entry.output.name
        if context.batch != batch:
            self._check_batch(batch)
            context.batch = 0
            if not context.handle.set_input_shape(x, (batch, *self._entry.input.shape)):
                raise self._error(f"batch {batch} is refused")
            context.batch = batch
        if context.source != source:
            context.handle.set_tensor_address(x, source)
            context.source = source
        if context.target != target:
            context.handle.set_tensor_address(y, target)
            context.target = target
        if not context.handle.execute_async_v3(stream.handle):
            raise self._error("failed")

    def close(self) -> None:
        """Contexts first: they use the engine."""
        self._exact = self._other = _Context(None)
        self._engine = None

    def _check_batch(self, batch: int) -> None:
        smallest, _, largest = self._description.batches
        where = f"{self._description.part} [{self._api.flavour.name}]"
        if batch > largest:
            what = f"{where}: batch {batch} exceeds the profile's {largest}"
            raise BackendError(what, remedy=f"rebuild with --max-batch {batch}")
        if batch < smallest:
            what = f"{where}: batch {batch} is below the profile's {smallest}"
            raise BackendError(what, remedy=f"rebuild with --min-batch {batch}")

    def _error(self, what: str) -> BackendError:
        said = self._api.log.book.rest.quote()
        self._api.log.book.rest.clear()
        where = f"{self._description.part} [{self._api.flavour.name}]"
        return BackendError(f"{where}: {what}; {self._api.flavour.title} said: {said}")


# ---- loading ------------------------------------------------------------------------------------------------------


class _Loader:
    """Engines of one bundle, from files to contexts."""

    cuda: Cuda

    def __init__(self, api: Api, bundle: Bundle) -> None:
        self.api, self._bundle = api, bundle
        self._name = api.flavour.name
        self._remedy = f"rebuild it here: {bundle.build_command}"
        self._host_code = False
        self.notes: list[str] = []
        self.runtime: Any = None
        self.compiled = CompiledKernels(None)

    def check_versions(self) -> None:
        """TensorRT refuses another version's engines in words that name neither; needs no GPU."""
        for part in self._bundle.manifest.parts:
            description, _ = self._read(part)
            built, here = description.version, self.api.version
            if built == here:
                continue
            if not (description.version_compatible and same_major(built, here)):
                what = f"{part} [{self._name}]: its engine is for another version of {self.api.flavour.title}"
                raise BackendError(what, got=built, expected=f"{here} (here)", remedy=self._remedy)
            self._note(f"{self.api.flavour.title}: built with {built}, running with {here}")
            self._host_code = True

    def engines(self) -> dict[str, DeviceEngine]:
        """Every part's engine. Raises BackendError; what was loaded before is freed."""
        self.runtime = self._new_runtime()
        if self._host_code:
            # The plan brings a runtime of its own version along, which is code.
            self.runtime.engine_host_code_allowed = True
        if self.api.flavour.rtx:
            self.compiled = CompiledKernels(self._compiled_file())
        loaded: dict[str, DeviceEngine] = {}
        try:
            for part in self._bundle.manifest.parts:
                loaded[part] = self._load(part)
        except BaseException:
            for engine in loaded.values():
                engine.close()
            self.compiled = CompiledKernels(None)
            self.runtime = None
            raise
        return loaded

    def _new_runtime(self) -> Any:
        with self.api.log.book.capture() as said:
            try:
                return self.api.module.Runtime(self.api.log)
            except TypeError as error:  # "factory function returned nullptr"
                what = f"backend {self._name}: {self.api.flavour.title} {self.api.version} cannot run on this machine"
                raise BackendError(f"{what}; it said: {said.quote()}", remedy="see `bdexport doctor`") from error

    def _read(self, part: str) -> tuple[EngineDescription, bytes]:
        return read_engine(self._bundle.engine_file(part), part, self.api.flavour, self._remedy)

    def _load(self, part: str) -> TensorRTEngine:
        description, plan = self._read(part)
        self._check_gpu(description)
        with self.api.log.book.capture() as said:
            engine = self.runtime.deserialize_cuda_engine(plan)
            if engine is None:
                raise self._error(description, plan, "its engine does not load", said)
            self._check_tensors(description, engine)
            exact, other = self._contexts(engine)
            if exact is None or other is None:
                raise self._error(description, plan, "no execution context can be made", said)
        # Every call of the CUDA interface makes its device the thread's own; this is the cheapest one.
        enter = self.cuda.memory if self.cuda.device else None
        return TensorRTEngine(self.api, description, self._bundle.manifest.parts[part], engine, exact, other, enter)

    def _contexts(self, engine: Any) -> tuple[Any, Any]:
        """For batches that the profile names, and for others; without memory of their own."""
        trt = self.api.module
        user = trt.ExecutionContextAllocationStrategy.USER_MANAGED
        if not self.api.flavour.rtx:
            context = engine.create_execution_context(user)
            return context, context
        strategies = trt.DynamicShapesKernelSpecializationStrategy
        return tuple(
            engine.create_execution_context(self._runtime_config(engine, user, strategy))
            for strategy in (strategies.EAGER, strategies.LAZY)
        )

    def _runtime_config(self, engine: Any, allocation: Any, strategy: Any) -> Any:
        config = engine.create_runtime_config()
        config.set_execution_context_allocation_strategy(allocation)
        config.dynamic_shapes_kernel_specialization_strategy = strategy
        config.cuda_graph_strategy = self.api.module.CudaGraphStrategy.DISABLED  # the executor captures whole paths
        config.set_runtime_cache(self.compiled.cache(config))
        return config

    def _check_gpu(self, description: EngineDescription) -> None:
        """TensorRT's engines belong to a GPU; those for RTX are asked by loading them."""
        if self.api.flavour.rtx:
            return
        major, minor = self.cuda.compute_capability()
        here, built = f"{major}.{minor}", ", ".join(description.compute_capabilities)
        fits = major >= 8 if description.hardware_compatible == "ampere+" else built == here
        if not fits:
            what = f"{description.part} [{self._name}]: its engine is for another GPU"
            got = f"{description.gpu}, compute capability {built}"
            expected = f"{self.cuda.device_name()}, {here} (here)"
            raise BackendError(what, got=got, expected=expected, remedy=self._remedy)
        if description.gpu != self.cuda.device_name() and description.hardware_compatible is None:
            self._note(f"engines were tuned for {description.gpu}, and may be slower here than rebuilt ones")

    def _check_tensors(self, description: EngineDescription, engine: Any) -> None:
        """The manifest and the engine agree on what goes in and comes out."""
        entry = self._bundle.manifest.parts[description.part]
        names = [engine.get_tensor_name(number) for number in range(engine.num_io_tensors)]
        got = {
            name: (tuple(engine.get_tensor_shape(name))[1:], getattr(engine.get_tensor_dtype(name), "name", "?"))
            for name in names
        }
        expected = {spec.name: (spec.shape, "FLOAT") for spec in (entry.input, entry.output)}
        if got != expected:
            what = f"{description.part} [{self._name}]: its engine does not have the manifest's tensors"
            raise BackendError(what, got=got, expected=expected, remedy=self._remedy)

    def _error(self, description: EngineDescription, plan: bytes, what: str, said: LogLines) -> BackendError:
        where, quoted = f"{description.part} [{self._name}]", said.quote()
        if any(word in quoted for word in OUT_OF_MEMORY):
            free, total = self.cuda.memory()
            text = f"{where}: out of device memory ({quoted})"
            got = f"{free / 2**20:.0f} of {total / 2**20:.0f} MiB free, for an engine of {len(plan) / 2**20:.1f} MiB"
            return BackendError(text, got=got, remedy="free some, or rebuild with a smaller --max-batch")
        major, minor = self.cuda.compute_capability()
        targets = ", ".join(description.compute_capabilities) or "8.0 and newer"
        return BackendError(
            f"{where}: {what}{self._diagnosis(plan)}; {self.api.flavour.title} said: {quoted}",
            got=f"built for compute capability {targets}",
            expected=f"{self.cuda.device_name()}, {major}.{minor} (here)",
            remedy=self._remedy,
        )

    def _diagnosis(self, plan: bytes) -> str:
        """What TensorRT for RTX finds wrong with an engine on this system."""
        if not hasattr(self.runtime, "get_engine_validity"):
            return ""
        _, bits = self.runtime.get_engine_validity(plan[: self.runtime.engine_header_size])
        members = self.api.module.EngineInvalidityDiagnostics.__members__
        found = [name for name, value in members.items() if int(bits) & int(value)]
        return f" ({', '.join(found)})" if found else ""

    def _compiled_file(self) -> Path | None:
        """Kernels belong to a version, a GPU, a driver and these engines; None where no cache folder can be had."""
        manifest, cuda = self._bundle.manifest, self.cuda
        digests = [entry.engine.sha256 for entry in manifest.parts.values() if entry.engine is not None]
        key = [self.api.version, cuda.device_name(), str(cuda.driver_version()), *digests]
        digest = hashlib.sha256("\n".join(key).encode()).hexdigest()[:32]
        folder, why = cache_folder()
        if folder is None:
            self._note(f"compiled kernels are not kept: {why}")
            return None
        try:
            return check_trusted(folder / "tensorrt-rtx" / f"{digest}.cache")
        except UntrustedError as error:
            self._note(f"compiled kernels are not kept: {error}")
            return None

    def _note(self, note: str) -> None:
        if note not in self.notes:
            self.notes.append(note)


# ---- what TensorRT for RTX has compiled -----------------------------------------------------------------------------


@dataclass
class CompiledKernels:
    """The runtime cache that all contexts share, and the file it outlives the session in (None: nothing is kept)."""

    path: Path | None
    notes: Sequence[str] = field(default_factory=list)
    _cache: Any = None
    _read: bytes = b""

    def cache(self, config: Any) -> Any:
        """The cache, made by the first context's configuration and filled from the file, if there is one."""
        if self._cache is None:
            self._cache = config.create_runtime_cache()
            self._fill()
        return self._cache

    def _fill(self) -> None:
        if self.path is None:
            return
        try:
            self._read = self.path.read_bytes()
        except OSError:
            self.notes = [f"kernels are compiled as they are needed, and kept in {self.path}"]
            return
        if self._cache.deserialize(self._read):
            self.notes = [f"kernels compiled before: {self.path}"]
        else:
            self.notes = [f"kernels are compiled anew: TensorRT refuses {self.path}"]

    def keep(self) -> None:
        """Write the file, if there is anything new. A folder that cannot be written costs time, no result."""
        if self._cache is None or self.path is None:
            return
        data = bytes(self._cache.serialize())
        if data != self._read:
            with suppress(OutputError):
                make_cache(self.path.parent.parent)
                write_bytes(self.path, data, private=True)
