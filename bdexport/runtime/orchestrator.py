"""Dynamic inference on a bundle: decide -> group -> run blocks -> classify (Wu et al., CVPR 2018, figure 2)."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from threading import Lock
from time import perf_counter_ns
from types import TracebackType
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from bdexport.backends import get_backend
from bdexport.backends.base import (
    ForkingSession,
    FusedSession,
    LimitedSession,
    RunOptions,
    Session,
    Tensor,
    default_device,
    why_no_limit,
)
from bdexport.backends.forking import forked_error
from bdexport.backends.output_guard import REMEDY
from bdexport.bundle import Bundle, Manifest, open_bundle
from bdexport.cuda.exchange import is_device_array
from bdexport.errors import BackendError, UsageError
from bdexport.hardware import usable_cores
from bdexport.mask_map import MaskMapper
from bdexport.parts import FULL, HEAD, POLICY, STEM, Masks
from bdexport.runtime.decide import all_finite, checked_masks, masks_from_probabilities
from bdexport.runtime.executors import Fused, check_executor, choose_executor, executor_name, usable_executors
from bdexport.runtime.grouping import Plan, plan_batch
from bdexport.runtime.inputs import device_input, network_input

LONGEST_TIMEOUT_S = 86_400  # a day; beyond it, a limit is a mistake
LEAST_THREAD_LIMIT = 16  # may be asked for anywhere, so that a script runs on any machine


@dataclass(frozen=True, eq=False)
class Result:
    """What one call gives, image by image in the order they were passed.

    ``logits`` float32 (N, classes); ``masks`` bool (N, K), what ran, after the bundle's mask mapping if it has one;
    ``probabilities`` float32 (N, K), None where the
    policy did not run (masks forced, or the full engine); ``timings`` in ms: ``preprocess``, ``policy``, ``network``,
    ``total``. The rest is computed when it is asked for, and takes no time from the inference.
    """

    logits: NDArray[np.float32]
    masks: Masks
    probabilities: NDArray[np.float32] | None
    timings: dict[str, float]

    @property
    def blocks_used(self) -> NDArray[np.int64]:
        """Kept blocks, (N,)."""
        used: NDArray[np.int64] = self.masks.sum(axis=1, dtype=np.int64)
        return used

    @property
    def classes(self) -> NDArray[np.int64]:
        """The class with the largest logit, (N,)."""
        best: NDArray[np.int64] = self.logits.argmax(axis=1)
        return best

    @property
    def confidence(self) -> NDArray[np.float32]:
        """The softmax probability of that class, (N,)."""
        relative = np.exp(self.logits - self.logits.max(axis=1, keepdims=True))
        top: NDArray[np.float32] = 1 / relative.sum(axis=1)
        return top


@dataclass(frozen=True, eq=False)
class DeviceResult:
    """What :meth:`Orchestrator.on_device` gives. ``logits``: (N, classes) on the device, with DLPack and
    ``__cuda_array_interface__``; the other fields as in :class:`Result`. ``inputs`` keeps the images' memory alive.
    """

    logits: Any
    masks: Masks
    probabilities: NDArray[np.float32] | None
    inputs: Any


class Orchestrator:
    """A loaded bundle. Call it with images; it may be called from several threads at once. A context manager."""

    def __init__(self, bundle: Bundle, session: Session, executor: str = "auto", notes: tuple[str, ...] = ()) -> None:
        self.bundle, self.session, self._notes = bundle, session, notes
        self._limit = _limit_of(session)
        self._executor, self.executor_reason = choose_executor(executor, session, bundle.manifest)
        mapping = bundle.manifest.mask_mapping
        self._mapped = None if mapping is None else MaskMapper(mapping, bundle.manifest.num_blocks)
        self._closed = False
        self._process, self._adopting = os.getpid(), Lock()

    @property
    def manifest(self) -> Manifest:
        """Everything that is known about the bundle."""
        return self.bundle.manifest

    @property
    def notes(self) -> tuple[str, ...]:
        """Choices made while loading, each with its reason."""
        return (*self._notes, *self.session.notes)

    @property
    def executor(self) -> str:
        """Name of the executor in use; ``executor_reason`` says why."""
        return self._executor.name

    def executor_report(self) -> dict[str, Any] | None:
        """What the executor counted so far (hits, captures, reasons of fallbacks); None where it counts nothing."""
        report = getattr(self._executor, "report", None)
        return None if report is None else dict(report())

    @property
    def hit_rate(self) -> float | None:
        """Share of the images so far that ran as one engine; None before the first, and unless ``fused`` runs."""
        executor = self._executor
        return executor.hits / executor.images if isinstance(executor, Fused) and executor.images else None

    @property
    def device(self) -> str:
        """Where the engines run."""
        return self.session.device

    @property
    def threads(self) -> int | None:
        """Threads that compute one call; None where the backend has no such notion."""
        return self.session.threads

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the classes in the logits' order."""
        return self.manifest.class_names

    def __call__(self, images: Any, masks: Any = None) -> Result:
        """Run the blocks that the policy keeps, or those that ``masks`` (bool (N, K)) forces, which are not mapped.

        ``images``: uint8 (N, h, w, 3) of any size, fitted by the manifest's preprocessing, or float32 (N, 3, H, W)
        that is preprocessed already. Raises :class:`InputError` for anything else, :class:`BackendError` when an
        engine fails, takes longer than ``load(timeout_s=)`` or gives numbers that are not finite, :class:`UsageError`
        after :meth:`close`.
        """
        with self._limited():
            return self._call(images, masks)

    def _call(self, images: Any, masks: Any) -> Result:
        started = perf_counter_ns()
        inputs = self._inputs(images)
        forced = None if masks is None else checked_masks(masks, inputs.shape[0], self.manifest.num_blocks)
        prepared = perf_counter_ns()
        x = self.session.put(POLICY if forced is None else STEM, inputs)
        probabilities, masks = (None, forced) if forced is not None else self._decide(x)
        decided = prepared if forced is not None else perf_counter_ns()
        logits = self._run_blocks(x, masks)
        ended = perf_counter_ns()
        timings = _timings_ms(started, prepared, decided, ended)
        return Result(logits, masks, probabilities, timings)

    def full(self, images: Any) -> Result:
        """The undropped network's own engine: the reference that speed-ups are measured against. Same input checks."""
        with self._limited():
            return self._full(images)

    def _full(self, images: Any) -> Result:
        started = perf_counter_ns()
        inputs = self._inputs(images)
        prepared = perf_counter_ns()
        x = self.session.put(FULL, inputs)
        logits = _answers(self.session.get(FULL, self._executor.run_whole(FULL, x)), inputs.shape[0])
        ended = perf_counter_ns()
        masks = np.ones((inputs.shape[0], self.manifest.num_blocks), dtype=bool)
        timings = _timings_ms(started, prepared, prepared, ended)
        return Result(logits, masks, None, timings)

    def on_device(self, images: Any, masks: Any = None) -> DeviceResult:
        """Like a call, but the logits stay on the GPU, and the host waits for the policy's masks only.

        The work is queued on the session's stream when this returns; logits are not checked for being finite. Keep the
        result until your own stream is done with it. Raises as a call does, and UsageError on a CPU.
        """
        inputs = self._inputs(images)
        export = getattr(self.session, "export", None)
        if export is None:
            raise UsageError(f"on_device: this bundle runs on {self.device}", remedy="load it with device='cuda'")
        forced = None if masks is None else checked_masks(masks, inputs.shape[0], self.manifest.num_blocks)
        x = self.session.put(POLICY if forced is None else STEM, inputs)
        probabilities, masks = (None, forced) if forced is not None else self._decide(x)
        plan = plan_batch(masks)
        logits = self._run_plan(x, plan)
        if plan.order is not None:
            logits = self.session.take(logits, np.argsort(plan.order))
        return DeviceResult(export(logits), masks, probabilities, x)

    def warm_up(self, batch: int = 1) -> None:
        """Run every part once at this batch size. Fused paths may still have first-time work, see :meth:`prepare`.

        Raises UsageError for a ``batch`` that is not a whole number of 1 or more.
        """
        images = self._blank(batch)
        for keep in (True, False):
            self(images, masks=np.full((batch, self.manifest.num_blocks), keep))
        self(images)
        self.full(images)

    def prepare(self, batch: int = 1) -> None:
        """Do now what first calls would wait for: for a service, before it takes traffic.

        Runs every part and, where the executor is ``fused``, every fused path at this batch size; a larger one also
        makes ready the groups of one image that a mixed batch may have. OpenVINO compiles a fused path when it is first
        called, a tenth of a second or more each, and its kernels for larger batches prepare themselves again at the
        first call of each other size, for some hundredths of a second: prepare every size that must not wait. Raises
        what a call raises, and UsageError for a ``batch`` that is not a whole number of 1 or more.
        """
        self.warm_up(batch)
        session = self.session
        if isinstance(self._executor, Fused) and isinstance(session, FusedSession):
            session.prepare_fused(batch)
            x = session.put(STEM, self._inputs(self._blank(batch)))
            for path in session.fused:
                session.run_fused(path, x)

    def _blank(self, batch: int) -> NDArray[np.uint8]:
        """Black images (batch, H, W, 3), which no memory is taken for."""
        if isinstance(batch, bool) or not isinstance(batch, (int, np.integer)) or batch < 1:
            raise UsageError("batch", got=repr(batch), expected="a whole number of 1 or more")
        return np.broadcast_to(np.uint8(0), (int(batch), *self.manifest.preprocess.size, 3))

    def close(self) -> None:
        """Free the engines. Closing twice is harmless."""
        if not self._closed:
            self._closed = True
            self.session.close()

    def __enter__(self) -> Orchestrator:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _limited(self) -> AbstractContextManager[None]:
        """One call, in this process, within the time limit if the bundle was loaded with one."""
        self._check_usable()
        return self._limit()

    def _check_usable(self) -> None:
        if self._closed:
            raise UsageError(f"orchestrator of {self.bundle.path}: used after close", remedy="load the bundle again")
        if os.getpid() != self._process:
            self._adopt()

    def _inputs(self, images: Any) -> Any:
        """float32 (N, 3, H, W) on the host; images on the session's device as they are, for the session to check."""
        self._check_usable()
        if is_device_array(images):
            return device_input(images, self.device)
        return network_input(images, self.manifest.preprocess, self.manifest.max_batch)

    def _adopt(self) -> None:
        """Go on in a process forked from the one that loaded the bundle. Raises UsageError where that cannot be."""
        with self._adopting:
            if self._process == os.getpid():  # another thread has done it meanwhile
                return
            session = self.session
            if not isinstance(session, ForkingSession):
                why = f"where device {session.device} cannot be used"
                raise forked_error(f"orchestrator of {self.bundle.path}", why)
            self.session = session.in_fork()
            self._limit = _limit_of(self.session)
            self._executor, _ = choose_executor(self.executor, self.session, self.manifest)
            self._process = os.getpid()

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        """Engines belong to one process: neither pickled nor copied."""
        what = f"orchestrator of {self.bundle.path}: cannot be pickled or copied, since engines belong to one process"
        raise UsageError(what, remedy="pass the bundle's path instead, and call bdexport.load in the worker")

    def _decide(self, x: Tensor) -> tuple[NDArray[np.float32], Masks]:
        """The only time that anything but the logits comes to the host."""
        probabilities = self.session.get(POLICY, self._executor.run_whole(POLICY, x))
        _check_rows("policy", probabilities, x.shape[0])
        masks = masks_from_probabilities(probabilities)
        return probabilities, masks if self._mapped is None else self._mapped(masks)

    def _run_blocks(self, x: Tensor, masks: Masks) -> NDArray[np.float32]:
        plan = plan_batch(masks)
        sorted_logits = _answers(self.session.get(HEAD, self._run_plan(x, plan)), len(masks))
        if plan.order is None:
            return sorted_logits
        logits = np.empty_like(sorted_logits)
        logits[plan.order] = sorted_logits
        return logits

    def _run_plan(self, x: Tensor, plan: Plan) -> Tensor:
        """The logits in the plan's order."""
        return self._executor.run(x if plan.order is None else self.session.take(x, plan.order), plan)


def load(
    bundle: str | Path | Bundle,
    *,
    threads: int | None = None,
    device: str | None = None,
    executor: str = "auto",
    fused: bool = False,
    stream: Any = None,
    rebuild: bool = False,
    verify_key: str | Path | None = None,
    timeout_s: float | None = None,
) -> Orchestrator:
    """Open a bundle for inference with the backend that it was built for.

    ``threads``: threads that compute one call (None: the backend's choice, see ``orchestrator.threads``). ``device``:
    None for the backend's default. ``executor``: ``auto`` or a name. ``fused``: load the fused paths whatever the
    executor, for comparing executors on one session. ``stream``: on a GPU, the caller's stream that all work is queued
    on (a raw handle or an object with ``__cuda_stream__``); None: one of its own.

    ``rebuild``: where the engines are for another version of the backend or another processor, build them anew from the
    bundle's graphs, verify them, keep them in the cache folder (:func:`bdexport.files.default_cache_folder`) and use
    those. The first time takes seconds to minutes; ``orchestrator.notes`` say what was done. False: such a bundle is
    refused.

    ``verify_key``: a minisign public key, as a file or as its text (``RW..``): the bundle must be signed by its owner,
    see docs/bundle-format.md. What ``rebuild`` makes of a bundle that was checked so is made and kept here, not signed.

    ``timeout_s``: the most seconds that one call may take, waiting for threads and for first-time work included; it is
    ended then, with :class:`BackendError`, and nothing of it is left running. For ONNX Runtime and OpenVINO on the CPU;
    other backends cannot end a run, and refuse it. None: no limit.

    Raises :class:`BundleError` for a bundle that is damaged, not signed as asked for, or replaced by another while it
    is opened; :class:`BackendError` where its engines cannot run here, :class:`UsageError` for a wrong argument.
    """
    _check_arguments(bundle, threads, device, executor, timeout_s)
    if verify_key is not None and isinstance(bundle, Bundle):
        raise UsageError("verify_key has no effect on a bundle that is open", remedy="pass it to open_bundle")
    opened = bundle if isinstance(bundle, Bundle) else open_bundle(bundle, verify_key)
    notes: tuple[str, ...] = ()
    if rebuild:
        from bdexport.rebuild import rebuilt_for_here  # which verifies by running bundles: it stands above this module

        opened, note = rebuilt_for_here(opened)
        notes = (note,)
    name, _ = executor_name(executor, opened.manifest)
    backend = get_backend(opened.manifest.backend)
    place = default_device(backend) if device is None else device
    if stream is not None and not place.startswith("cuda"):
        raise UsageError(
            "stream", got=f"one for device {place!r}", expected="a device with streams", remedy="device='cuda'"
        )
    if timeout_s is not None and (why := why_no_limit(backend, place)) is not None:
        remedy = "leave it out, and load the bundle in a process of its own that can be ended"
        raise UsageError("timeout_s", got=repr(timeout_s), expected=f"None ({why})", remedy=remedy)
    options = RunOptions(
        place,
        None if threads is None else int(threads),
        stream=stream,
        fused=fused or name == Fused.name,
        timeout_s=None if timeout_s is None else float(timeout_s),
    )
    if opened.manifest.precision not in backend.precisions:
        raise BackendError(
            f"{opened.path} [{backend.name}]: precision",
            got=opened.manifest.precision,
            expected=", ".join(backend.precisions),
            remedy="rebuild it with this version of bdexport",
        )
    check_executor(name, backend, place, opened.manifest)
    session = backend.open(opened, options)
    try:
        opened.check_in_place()
        return Orchestrator(opened, session, executor, notes)
    except BaseException:
        session.close()
        raise


def executors_of(orchestrator: Orchestrator) -> dict[str, Orchestrator]:
    """One orchestrator for every executor that its session can run, on that session: close only the one given.

    The one given stands for its own executor. Load it with ``fused=True``, or the fused paths are missing.
    """
    bundle, session = orchestrator.bundle, orchestrator.session
    return {
        name: orchestrator if name == orchestrator.executor else Orchestrator(bundle, session, name)
        for name in usable_executors(session, bundle.manifest)
    }


def _limit_of(session: Session) -> Callable[[], AbstractContextManager[None]]:
    """What a call runs inside. Asked once: to ask a class for its protocol takes microseconds."""
    return session.limited if isinstance(session, LimitedSession) else nullcontext


def _check_arguments(bundle: Any, threads: Any, device: Any, executor: Any, timeout_s: Any) -> None:
    if not isinstance(bundle, str | PathLike | Bundle):
        raise UsageError("bundle", got=repr(bundle), expected="the path of a folder")
    most = max(LEAST_THREAD_LIMIT, usable_cores())  # beyond the cores, threads only take time from each other
    whole = isinstance(threads, int | np.integer) and not isinstance(threads, bool)
    if threads is not None and not (whole and 1 <= threads <= most):
        remedy = "leave it out for the backend's choice; more threads than cores only take time from each other"
        raise UsageError("threads", got=repr(threads), expected=f"a whole number in 1..{most}", remedy=remedy)
    if device is not None and not (isinstance(device, str) and device):
        raise UsageError("device", got=repr(device), expected="a name, or None for the backend's own choice")
    if not isinstance(executor, str):
        raise UsageError("executor", got=repr(executor), expected="a name")
    number = isinstance(timeout_s, int | float | np.number) and not isinstance(timeout_s, bool)
    if timeout_s is not None and not (number and 0 < timeout_s <= LONGEST_TIMEOUT_S):
        raise UsageError("timeout_s", got=repr(timeout_s), expected=f"seconds above 0, at most {LONGEST_TIMEOUT_S}")


def _timings_ms(started: int, prepared: int, decided: int, ended: int) -> dict[str, float]:
    return {
        "preprocess": (prepared - started) / 1e6,
        "policy": (decided - prepared) / 1e6,
        "network": (ended - decided) / 1e6,
        "total": (ended - started) / 1e6,
    }


def _answers(logits: NDArray[np.float32], batch: int) -> NDArray[np.float32]:
    """The logits of a batch. A row too few would be another batch's answer, and a NaN would come out as class 0."""
    _check_rows("network", logits, batch)
    if not all_finite(logits):
        raise BackendError("network: logits are not finite", remedy="check the input's range; run `bdexport verify`")
    return logits


def _check_rows(where: str, outputs: NDArray[np.float32], batch: int) -> None:
    if len(outputs) != batch:
        raise BackendError(
            f"{where}: batch {batch}: its output is another's", got=f"{len(outputs)} rows", remedy=REMEDY
        )
