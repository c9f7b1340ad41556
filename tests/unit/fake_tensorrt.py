"""TensorRT's run-time API as far as a session uses it, on the double of CUDA: engines compute what torch does.

The real API needs a driver for everything that comes after building. A plan here is JSON: which part it is, and what
goes wrong with it.
"""

from __future__ import annotations

import json
from enum import Enum
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from cuda_double import CudaDouble, read
from manifests import with_engines_as_they_are
from tiny import tiny_checkpoint, tiny_model

from bdexport.backends.base import Availability, BuildOptions
from bdexport.backends.null import NullBackend
from bdexport.backends.tensorrt_common import Api, EngineDescription, Flavour, write_engine
from bdexport.build import bundle_from_model
from bdexport.bundle import Bundle, PartEntry
from bdexport.config import BuildConfig
from bdexport.models.pair import BlockDropNet
from bdexport.partition import part_module

VERSION = "10.13.0"
SCRATCH = 3000
MAX_BATCH = 9


class DescribingBackend(NullBackend):
    """Writes engine files whose plans the fake understands."""

    computes = True

    def __init__(self, flavour: Flavour) -> None:
        super().__init__()
        self.name = flavour.name

    def available(self) -> Availability:
        return Availability(False, "a double")

    def resolved(self, options: BuildOptions) -> BuildOptions:
        return options

    def build_part(
        self, part: str, graph: Path, engine: Path, options: BuildOptions, model: BlockDropNet | None = None
    ) -> None:
        write_fake_engine(engine, part, self.name)


def write_fake_engine(path: Path, part: str, flavour: str, fault: str | None = None, **changes: Any) -> None:
    """``changes``: of the description. ``fault``: what the fake refuses."""
    description: dict[str, Any] = {
        "part": part,
        "flavour": flavour,
        "version": VERSION,
        "gpu": "host memory",
        "compute_capabilities": ("9.0",),
        "batches": (1, 1, MAX_BATCH),
        "version_compatible": False,
        "hardware_compatible": None,
        "layers": None,
    }
    plan = json.dumps({"part": part, "fault": fault}).encode()
    write_engine(path, EngineDescription(**(description | changes)), plan, None)


def make_fake_bundle(folder: Path, flavour: Flavour) -> Bundle:
    """A bundle of ``tiny_model()`` with engines for the fake."""
    model = tiny_model()
    config = BuildConfig(flavour.name, max_batch=MAX_BATCH)
    built = bundle_from_model(
        model, tiny_checkpoint(model), folder, DescribingBackend(flavour), config=config, checkpoint_sha256="0" * 64
    )
    return Bundle(built.path, built.manifest)


def changed_bundle(folder: Path, bundle: Bundle, faults: dict[str, str] | None = None, **changes: Any) -> Bundle:
    """Other engines for the same manifest; ``faults`` by part. There are no graphs: for sessions only."""
    for part, entry in bundle.manifest.parts.items():
        assert entry.engine is not None
        write_fake_engine(
            folder / entry.engine.path, part, bundle.manifest.backend, (faults or {}).get(part), **changes
        )
    return with_engines_as_they_are(Bundle(folder, bundle.manifest))


class Severity(Enum):
    INTERNAL_ERROR, ERROR, WARNING, INFO = range(4)


class Logger:
    INTERNAL_ERROR, ERROR, WARNING, INFO = Severity


class FakeTensorRT:
    """The module. ``alive``: engines and contexts that are in use; ``calls``: what contexts were told."""

    __version__ = VERSION
    ILogger = Logger
    ExecutionContextAllocationStrategy = SimpleNamespace(USER_MANAGED="user")
    DynamicShapesKernelSpecializationStrategy = SimpleNamespace(EAGER="eager", LAZY="lazy")
    CudaGraphStrategy = SimpleNamespace(DISABLED="disabled")
    EngineInvalidityDiagnostics = SimpleNamespace(__members__={"VERSION_MISMATCH": 1, "UNSUPPORTED_CC": 2})

    def __init__(self, bundle: Bundle, cuda: CudaDouble, rtx: bool) -> None:
        self.bundle, self.cuda, self.rtx = bundle, cuda, rtx
        self.model = tiny_model()
        self.modules = {part: part_module(self.model, part) for part in bundle.manifest.parts}
        self.alive = 0
        self.calls: list[str] = []
        self.strategies: dict[str, list[tuple[str, int]]] = {}  # part -> (strategy, batch) of every run
        self.compiled = b"kernels"
        self.host_code = False
        self.alive_when_the_cache_went: int | None = None

    def Runtime(self, log: Any) -> FakeRuntime:  # noqa: N802 - TensorRT's name
        return FakeRuntime(self, log)


def fake_api(flavour: Flavour, fake: FakeTensorRT) -> Api:
    return Api(flavour, fake)


class FakeRuntime:
    engine_header_size = 8

    def __init__(self, trt: FakeTensorRT, log: Any) -> None:
        self._trt, self._log = trt, log
        if trt.rtx:
            self.get_engine_validity = lambda header: ("invalid", 2)

    @property
    def engine_host_code_allowed(self) -> bool:
        return self._trt.host_code

    @engine_host_code_allowed.setter
    def engine_host_code_allowed(self, value: bool) -> None:
        self._trt.host_code = value

    def deserialize_cuda_engine(self, plan: bytes) -> FakeEngine | None:
        data = json.loads(plan)
        if data["fault"] in ("refused", "memory"):
            said = {"refused": "no kernel image", "memory": "Cuda Runtime (out of memory)"}[data["fault"]]
            self._log.log(Severity.ERROR, said)
            return None
        return FakeEngine(self._trt, self._log, data["part"], data["fault"])


class FakeEngine:
    num_io_tensors = 2

    def __init__(self, trt: FakeTensorRT, log: Any, part: str, fault: str | None) -> None:
        self.trt, self.log, self.part, self.fault = trt, log, part, fault
        self.entry: PartEntry = trt.bundle.manifest.parts[part]
        self.device_memory_size_v2 = 1 << 40 if fault == "scratch" else SCRATCH
        trt.alive += 1

    def __del__(self) -> None:
        self.trt.alive -= 1

    def get_tensor_name(self, number: int) -> str:
        return (self.entry.input.name, self.entry.output.name)[number]

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        spec = self.entry.input if name == self.entry.input.name else self.entry.output
        return (-1, *spec.shape) if self.fault != "shape" else (-1, 1)

    def get_tensor_dtype(self, name: str) -> Any:
        return SimpleNamespace(name="HALF" if self.fault == "dtype" else "FLOAT")

    def create_runtime_config(self) -> FakeRuntimeConfig:
        return FakeRuntimeConfig(self.trt)

    def create_execution_context(self, how: Any) -> FakeContext | None:
        if self.fault == "context":
            self.log.log(Severity.ERROR, "no context")
            return None
        if isinstance(how, FakeRuntimeConfig):
            assert how.allocation == "user"
            assert how.cache is not None
            return FakeContext(self, how.dynamic_shapes_kernel_specialization_strategy)
        assert how == "user"
        return FakeContext(self, "static")


class FakeRuntimeConfig:
    dynamic_shapes_kernel_specialization_strategy = cuda_graph_strategy = ""

    def __init__(self, trt: FakeTensorRT) -> None:
        self._trt = trt
        self.allocation = ""
        self.cache: FakeCache | None = None

    def set_execution_context_allocation_strategy(self, strategy: str) -> None:
        self.allocation = strategy

    def create_runtime_cache(self) -> FakeCache:
        return FakeCache(self._trt)

    def set_runtime_cache(self, cache: FakeCache) -> bool:
        self.cache = cache
        return True


class FakeCache:
    def __init__(self, trt: FakeTensorRT) -> None:
        self._trt = trt

    def __del__(self) -> None:
        self._trt.alive_when_the_cache_went = self._trt.alive

    def deserialize(self, blob: bytes) -> bool:
        return blob == b"kernels"

    def serialize(self) -> bytes:
        return self._trt.compiled


class FakeContext:
    def __init__(self, engine: FakeEngine, strategy: str) -> None:
        self._engine, self._strategy = engine, strategy
        self._module = engine.trt.modules[engine.part]
        self._batch, self._memory = 0, 0
        self._addresses: dict[str, int] = {}
        engine.trt.alive += 1

    def __del__(self) -> None:
        self._engine.trt.alive -= 1

    def set_device_memory(self, pointer: int, size: int) -> None:
        assert pointer % 256 == 0
        assert self._engine.trt.cuda.live[pointer] >= size == self._engine.device_memory_size_v2
        self._memory = pointer

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self._engine.trt.calls.append("shape")
        assert shape[1:] == self._engine.entry.input.shape
        self._batch = shape[0]
        return True

    def set_tensor_address(self, name: str, pointer: int) -> bool:
        self._engine.trt.calls.append("address")
        assert pointer % 256 == 0
        self._addresses[name] = pointer
        return True

    def execute_async_v3(self, stream: int) -> bool:
        trt, entry, batch = self._engine.trt, self._engine.entry, self._batch
        if self._engine.fault == "run":
            self._engine.log.log(Severity.ERROR, "misaligned address")
            return False
        trt.calls.append("execute")
        trt.strategies.setdefault(self._engine.part, []).append((self._strategy, batch))
        source, target = self._addresses[entry.input.name], self._addresses[entry.output.name]
        scratch = read(self._memory, (SCRATCH // 4,))

        def work() -> None:
            scratch[...] = 7  # an engine that shares it with one that still runs is seen: both write
            x = torch.from_numpy(read(source, (batch, *entry.input.shape)).copy())
            with torch.no_grad():
                read(target, (batch, *entry.output.shape))[...] = self._module(x).numpy()

        trt.cuda.streams[stream].submit(work)
        return True
