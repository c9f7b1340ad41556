"""What a backend is: the same few verbs everywhere, so that the run-time loop never asks which one it has.

Build half: :meth:`Backend.build_part` turns a part's ONNX graph into an engine file.
Run-time half: :meth:`Backend.open` loads a bundle's engines into a :class:`Session`, whose verbs are all that the
orchestrator uses.
A session's tensors are opaque to the loop (numpy arrays on the CPU, device buffers on a GPU).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from bdexport.config import TensorRTConfig
from bdexport.errors import BackendError, UsageError

if TYPE_CHECKING:
    from bdexport.bundle import Bundle, Manifest
    from bdexport.models.pair import BlockDropNet

Tensor = Any  # a session's own handle: numpy.ndarray on the CPU
Rows = NDArray[np.intp]
PartProgress = Callable[[str, float], bool]  # (part, share done) -> whether to go on


class Readable(Protocol):
    """A file that a backend opens: ``str()`` of it is its name in errors.

    One of a bundle (:class:`bdexport.bundle.BundleFile`) gives only bytes that the manifest's hash is true of; a path
    gives whatever is there. It is read once for each engine that is made of it, and never opened by its name.
    """

    def read_bytes(self) -> bytes:
        """The whole file."""


@dataclass(frozen=True)
class Availability:
    """Whether a backend can be used here; when not, why, and the line that mends it."""

    ok: bool
    reason: str
    remedy: str | None = None


@dataclass(frozen=True)
class BuildOptions:
    """What an engine is built for. ``max_batch`` None means any batch (backends with dynamic shapes).

    ``cache_folder``, where a builder may keep what makes the next build faster, and ``progress`` do not change an
    engine.
    """

    precision: str = "fp32"
    max_batch: int | None = None
    tensorrt: TensorRTConfig = field(default_factory=TensorRTConfig)
    cache_folder: Path | None = None
    progress: PartProgress | None = None

    def recipe(self) -> dict[str, Any]:
        """What an engine depends on, for its cache key."""
        return {name: value for name, value in asdict(self).items() if name not in ("cache_folder", "progress")}


@dataclass(frozen=True)
class RunOptions:
    """How engines are loaded. ``threads`` None: the backend's choice, reported by the session.

    ``stream``: on a GPU, the caller's stream (a raw handle or an object with ``__cuda_stream__``); None: the session's.
    ``fused``: load the manifest's fused paths too, where the backend can (:class:`FusedSession`).
    ``timeout_s``: the most seconds that one call may take, for backends that can end a run (:func:`why_no_limit`).
    """

    device: str = "cpu"
    threads: int | None = None
    stream: Any = None
    fused: bool = False
    timeout_s: float | None = None


class Session(Protocol):
    """The engines of one bundle, loaded on one device. Calls from several threads are safe.

    A backend may keep activations between parts in a layout of its own: only :meth:`put` and :meth:`get` know it, so
    a tensor that one session made is given to no other.
    """

    @property
    def device(self) -> str:
        """Where the engines run."""

    @property
    def threads(self) -> int | None:
        """Threads that compute one call; None where the device has no such notion."""

    @property
    def notes(self) -> tuple[str, ...]:
        """Choices made while loading, each with its reason."""

    def put(self, part: str, array: NDArray[Any]) -> Tensor:
        """A host array in the manifest's layout -> the session's tensor, as input of ``part``; it may share memory.

        The image has one form for ``stem``, ``policy`` and ``full``, and logits one for ``head`` and ``full``.
        """

    def get(self, part: str, tensor: Tensor) -> NDArray[Any]:
        """An output of ``part`` -> a host array in the manifest's layout that the caller owns."""

    def run(self, part: str, x: Tensor) -> Tensor:
        """Run one part on a batch; the result is fresh."""

    def run_path(self, parts: Sequence[str], x: Tensor) -> Tensor:
        """Run parts one after another on the whole batch; the result is valid until the thread's next path begins.

        Part by part, whether or not the path is also a fused one: what executor ``chain`` runs.
        """

    def take(self, x: Tensor, rows: Rows) -> Tensor:
        """The given images of a batch, gathered in that order; contiguous rows may be a view of ``x``."""

    def replace(self, x: Tensor, rows: Rows, y: Tensor) -> Tensor:
        """``x`` with the given images replaced by those of ``y`` (same shape); ``x`` is given up and may be reused."""

    def merge(self, pieces: Sequence[tuple[Rows, Tensor]], batch: int) -> Tensor:
        """One fresh batch from pieces whose rows together are 0..batch-1, each exactly once."""

    def close(self) -> None:
        """Free everything; further calls raise UsageError."""


@runtime_checkable
class FusedSession(Protocol):
    """A session that can also run whole paths as one engine each."""

    @property
    def fused(self) -> frozenset[tuple[str, ...]]:
        """The paths, as the parts that they run, which :meth:`run_fused` takes."""

    @property
    def fused_seconds(self) -> float:
        """How long linking, compiling and loading them took so far; some backends do it when one is first called."""

    def prepare_fused(self, batch: int = 1) -> None:
        """Link, compile and load every one of them for batches of this size, unless it has been done."""

    def run_fused(self, path: tuple[str, ...], x: Tensor) -> Tensor:
        """The network's input -> logits, fresh, by the path's own engine."""


@runtime_checkable
class SharingSession(Protocol):
    """A session with threads of its own, which compute shares of a batch side by side."""

    @property
    def shares(self) -> int:
        """How many shares are worth making; 1: none."""

    def side_by_side(self, calls: Sequence[Callable[[], Tensor]]) -> list[Tensor]:
        """The results of ``calls``, in order; each runs the parts that it runs on one thread."""


@runtime_checkable
class ForkingSession(Protocol):
    """A session that says what becomes of it in a process forked from the one that opened it."""

    def in_fork(self) -> Session:
        """What serves in the forked process: itself, or a new one. Raises UsageError where neither can."""


@runtime_checkable
class LimitedSession(Protocol):
    """A session whose calls may have a time limit (``RunOptions.timeout_s``)."""

    def limited(self) -> AbstractContextManager[None]:
        """What this thread runs inside is one call: BackendError, and nothing left running, where it takes too long."""


@dataclass(frozen=True)
class Misfit:
    """Why engines are not for this machine: ``what`` they are, ``got`` for what, and what is ``here``.

    ``install``: the line that brings what they were built with, where one does. ``refused``: they cannot be run;
    otherwise they only take longer to open.
    """

    what: str
    got: str
    here: str
    install: str | None = None
    refused: bool = True

    def error(self, bundle: Bundle) -> BackendError:
        """What a backend raises for such a bundle."""
        remedy = f"build them anew from its graphs: {bundle.rebuild_command}, or bdexport.load(BUNDLE, rebuild=True)"
        if self.install is not None:
            remedy += f"; or run it with what built it: {self.install}"
        what = f"{bundle.path} [{bundle.manifest.backend}]: its {self.what}"
        return BackendError(what, got=self.got, expected=f"{self.here} (here)", remedy=remedy)


class Backend(Protocol):
    """Builds engines and opens sessions."""

    name: str
    precisions: tuple[str, ...]
    engine_suffix: str  # of engine files, with the dot
    computes: bool  # False: the outputs mean nothing, and are not verified

    def available(self) -> Availability:
        """Can engines of this backend be loaded and run in this process? Never raises."""

    def can_build(self) -> Availability:
        """Can engines be built in this process, whether or not they run here? Never raises."""

    def can_run(self, options: BuildOptions) -> Availability:
        """Can engines that are built with ``options`` run in this process? Never raises."""

    def resolved(self, options: BuildOptions) -> BuildOptions:
        """``options`` with what they leave open. Raises UsageError for one that this backend cannot honour."""

    def versions(self) -> Mapping[str, str]:
        """Versions that an engine depends on; part of its cache key and of the manifest."""

    def fingerprint(self) -> str:
        """What an engine is bound to on this machine (CPU features, GPU model); part of its cache key."""

    def build_part(
        self, part: str, graph: Path, engine: Path, options: BuildOptions, model: BlockDropNet | None = None
    ) -> None:
        """Build ``engine`` from the ONNX file ``graph``. Raises BuildError naming the part.

        ``model`` is what the graph was exported from; only a backend that has no use for ONNX (torch) asks for it.
        """

    def open(self, bundle: Bundle, options: RunOptions) -> Session:
        """Load every engine of ``bundle``. Raises BackendError naming the part, both sides and the remedy."""


@runtime_checkable
class RebuildingBackend(Backend, Protocol):
    """A backend that builds engines from a bundle's graphs alone, on the machine that runs them."""

    from_float: tuple[str, ...]  # precisions whose engines are built from the float32 graphs

    def misfit(self, manifest: Manifest) -> Misfit | None:
        """Why the engines are not for this machine; None where they are."""


class BuildsWhereItRuns:
    """What backends share whose engines are built on the machine that runs them, with no settings of their own."""

    def can_build(self: Backend) -> Availability:
        """See :meth:`Backend.can_build`."""
        return self.available()

    def can_run(self: Backend, options: BuildOptions) -> Availability:
        """See :meth:`Backend.can_run`."""
        return self.available()

    def resolved(self: Backend, options: BuildOptions) -> BuildOptions:
        """See :meth:`Backend.resolved`."""
        if options.tensorrt != TensorRTConfig():
            remedy = "leave them out, or build with --backend tensorrt or tensorrt-rtx"
            raise UsageError(f"settings of TensorRT have no effect on backend {self.name}", remedy=remedy)
        return options


def default_device(backend: Backend) -> str:
    """Where a backend runs when nobody names a device: its ``default_device``, which only backends off the CPU have."""
    return str(getattr(backend, "default_device", RunOptions().device))


def fuses_paths(backend: Backend) -> bool:
    """Whether the backend's sessions are :class:`FusedSession`; a backend says so with ``fuses = True``."""
    return bool(getattr(backend, "fuses", False))


def why_no_limit(backend: Backend, device: str) -> str | None:
    """Why calls can have no time limit there; None where they can. A backend says so with ``stops_runs = True``."""
    if device.startswith("cuda"):
        return "what is queued on a GPU cannot be ended"
    return None if getattr(backend, "stops_runs", False) else f"backend {backend.name} cannot end a run"
