"""How a path is run on a backend's session.

``chain``: one engine per part, in sequence, always available. ``fused``: one engine for each of the manifest's most
frequent masks, the rest as ``chain``.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib import import_module
from threading import Lock
from typing import Protocol

import numpy as np

from bdexport.backends.base import Backend, FusedSession, Session, SharingSession, Tensor, fuses_paths
from bdexport.bundle import Manifest
from bdexport.errors import BundleError, UsageError
from bdexport.json_text import shown
from bdexport.parts import FULL, HEAD, STEM, Masks, block_part, path_parts, shortcut_part
from bdexport.runtime.grouping import BlockStep, Plan

CACHED_PATHS = 4096  # paths of single masks whose part names are kept; a few hundred bytes each


class Executor(Protocol):
    """Runs the network on a batch whose masks are planned."""

    name: str

    def run(self, x: Tensor, plan: Plan) -> Tensor:
        """The network's input, in the plan's order -> logits in the plan's order, as the session's tensor."""

    def run_whole(self, part: str, x: Tensor) -> Tensor:
        """A network of its own (``policy``, ``full``) on the network's input."""


class Chain:
    """One engine per part. One mask for the whole batch: its path at once; otherwise gather, run, scatter per block.

    A session with threads of its own gets a batch of mixed masks in shares of equal work, one for each.
    """

    name = "chain"
    fallback: str | None = None  # why an executor that was asked for runs as this one does

    def __init__(self, session: Session, manifest: Manifest) -> None:
        self._session, self._transitions = session, frozenset(manifest.transitions)
        self._paths: dict[bytes, tuple[str, ...]] = {}

    @staticmethod
    def refused(backend: Backend, device: str) -> str | None:
        """Why no session of this backend on this device could use the executor: known before anything is loaded."""
        return None

    @staticmethod
    def unavailable(session: Session, manifest: Manifest) -> str | None:
        """Why this executor cannot run; never the case."""
        return None

    def run(self, x: Tensor, plan: Plan) -> Tensor:
        """See :meth:`Executor.run`."""
        if plan.uniform:
            return self._session.run_path(self._path(plan.masks[0]), x)
        session = self._session
        shares = plan.shares(session.shares) if isinstance(session, SharingSession) else []
        if len(shares) < 2:
            return self._run_mixed(x, plan)
        assert isinstance(session, SharingSession)
        # Whole shares of the batch side by side: threads that met after every block would mostly wait for each other.
        calls = [partial(self._run_mixed, session.take(x, rows), plan.part(rows)) for rows in shares]
        return session.merge(list(zip(shares, session.side_by_side(calls), strict=True)), len(plan.masks))

    def _run_mixed(self, x: Tensor, plan: Plan) -> Tensor:
        """Block by block on the rows that keep it."""
        x = self._session.run(STEM, x)
        for step in plan.steps():
            x = self._run_block(x, step)
        return self._session.run(HEAD, x)

    def run_whole(self, part: str, x: Tensor) -> Tensor:
        """See :meth:`Executor.run_whole`."""
        return self._session.run(part, x)

    def _run_block(self, x: Tensor, step: BlockStep) -> Tensor:
        session, block, transition = self._session, block_part(step.index), step.index in self._transitions
        if len(step.dropped) == 0:
            return session.run(block, x)
        if len(step.kept) == 0:
            return session.run(shortcut_part(step.index), x) if transition else x
        kept = session.run(block, session.take(x, step.kept))
        if not transition:
            return session.replace(x, step.kept, kept)
        dropped = session.run(shortcut_part(step.index), session.take(x, step.dropped))
        return session.merge([(step.kept, kept), (step.dropped, dropped)], len(step.kept) + len(step.dropped))

    def _path(self, mask: Masks) -> tuple[str, ...]:
        key = mask.tobytes()
        parts = self._paths.get(key)
        if parts is None:
            parts = path_parts(mask.tolist(), self._transitions)
            if len(self._paths) < CACHED_PATHS:
                self._paths[key] = parts
        return parts


class Fused:
    """One engine per path where there is one, ``chain`` for every other mask; all blocks kept: the full engine.

    A batch of mixed masks runs group by group, equal masks together; the groups without an engine of their own are one
    batch for ``chain``. Whether an image's mask is a hit does not depend on the others of its batch.
    """

    name = "fused"
    fallback: str | None = None

    def __init__(self, session: Session, manifest: Manifest) -> None:
        self._session, self._chain = session, Chain(session, manifest)
        self._engines: dict[bytes, Callable[[Tensor], Tensor]] = {}
        if manifest.fused is not None and isinstance(session, FusedSession):
            paths = manifest.fused.part_paths(manifest.transitions)
            for mask, path in zip(manifest.fused.masks(manifest.num_blocks), paths, strict=True):
                if path in session.fused:
                    self._engines[mask.tobytes()] = partial(session.run_fused, path)
        self._engines[np.ones(manifest.num_blocks, bool).tobytes()] = partial(session.run, FULL)
        self._counting = Lock()
        self.images = self.hits = 0

    @staticmethod
    def refused(backend: Backend, device: str) -> str | None:
        """See :meth:`Chain.refused`."""
        return None

    @staticmethod
    def unavailable(session: Session, manifest: Manifest) -> str | None:
        """Why this executor would be ``chain`` under another name; None where it is not."""
        if manifest.fused is None or not manifest.fused.paths:
            return "this bundle has no fused paths; build it with --fused N"
        if not isinstance(session, FusedSession):
            return f"backend {manifest.backend} runs no fused paths"
        return None if session.fused else "its session was opened without the fused paths"

    def run(self, x: Tensor, plan: Plan) -> Tensor:
        """See :meth:`Executor.run`."""
        if plan.uniform:
            engine = self._engines.get(plan.masks[0].tobytes())
            self._count(len(plan.masks), len(plan.masks) if engine is not None else 0)
            return self._chain.run(x, plan) if engine is None else engine(x)
        return self._run_mixed(x, plan)

    def run_whole(self, part: str, x: Tensor) -> Tensor:
        """See :meth:`Executor.run_whole`."""
        return self._session.run(part, x)

    def _run_mixed(self, x: Tensor, plan: Plan) -> Tensor:
        session, pieces, missed = self._session, [], []
        for begin, end in plan.groups():
            engine, rows = self._engines.get(plan.masks[begin].tobytes()), np.arange(begin, end)
            if engine is None:
                missed.append(rows)
            else:
                pieces.append((rows, engine(session.take(x, rows))))
        images = len(plan.masks)
        if not pieces:
            self._count(images, 0)
            return self._chain.run(x, plan)
        if missed:
            rest = np.concatenate(missed)
            pieces.append((rest, self._chain.run(session.take(x, rest), plan.part(rest))))
        self._count(images, images - sum(len(rows) for rows in missed))
        return session.merge(pieces, images)

    def _count(self, images: int, hits: int) -> None:
        with self._counting:
            self.images += images
            self.hits += hits


# One visible table; a backend's own executors stand here too and say in ``unavailable`` where they cannot run.
EXECUTORS: dict[str, str] = {
    "chain": "bdexport.runtime.executors:Chain",
    "fused": "bdexport.runtime.executors:Fused",
    "graph": "bdexport.runtime.graph_executor:GraphExecutor",
}


def executor_name(name: str, manifest: Manifest) -> tuple[str, str]:
    """The executor that ``name`` means for this bundle and the reason; ``auto``: as measured when it was built.

    Raises :class:`UsageError` for a name that is not in the table, :class:`BundleError` where the manifest names such.
    """
    reason = "asked for by name"
    if name == "auto":
        measured = manifest.executor or {}
        chosen = measured.get("choice", "chain")
        name = str(chosen)
        reason = str(measured.get("reason", "the only executor of this bundle"))
        if name not in EXECUTORS:
            remedy = "pass --executor chain, or rebuild the bundle with `bdexport build`"
            choices = ", ".join(EXECUTORS)
            raise BundleError("manifest.json: executor: choice", got=shown(chosen), expected=choices, remedy=remedy)
    if name not in EXECUTORS:
        expected = "auto or one of " + ", ".join(EXECUTORS) + " (all: `bdexport bench` only)"
        raise UsageError("unknown executor", got=repr(name), expected=expected, remedy="leave it out for auto")
    return name, reason


def choose_executor(name: str, session: Session, manifest: Manifest) -> tuple[Executor, str]:
    """The executor called ``name``, see :func:`executor_name`, and the reason for it.

    Raises :class:`UsageError` for a name that is not in the table, or whose executor this bundle or session has not.
    """
    name, reason = executor_name(name, manifest)
    chosen = _executor_class(name)
    missing = chosen.unavailable(session, manifest)
    if missing is not None:
        raise _executor_error(name, missing, usable_executors(session, manifest))
    executor = chosen(session, manifest)
    if executor.fallback is not None:
        reason += f"; runs as chain: {executor.fallback}"
    return executor, reason


def check_executor(name: str, backend: Backend, device: str, manifest: Manifest) -> None:
    """Refuse an executor that the backend cannot offer on the device, before its engines are loaded.

    Raises :class:`UsageError`.
    """
    refusal = _executor_class(name).refused(backend, device)
    if refusal is not None:
        paths = manifest.fused is not None and bool(manifest.fused.paths)
        fused = paths and fuses_paths(backend) and not device.startswith("cuda")  # sessions on a GPU have none
        raise _executor_error(name, refusal, ("chain", "fused") if fused else ("chain",))


def _executor_error(name: str, reason: str, usable: tuple[str, ...]) -> UsageError:
    remedy = f"pass --executor {usable[0]}"
    return UsageError(f"executor {name!r}: {reason}", expected=" or ".join(usable), remedy=remedy)


def usable_executors(session: Session, manifest: Manifest) -> tuple[str, ...]:
    """Names of the executors that this session can run this bundle with, ``chain`` first."""
    return tuple(name for name in EXECUTORS if _executor_class(name).unavailable(session, manifest) is None)


def _executor_class(name: str) -> type[Chain] | type[Fused]:
    module, _, class_name = EXECUTORS[name].partition(":")
    found: type[Chain] | type[Fused] = getattr(import_module(module), class_name)
    return found
