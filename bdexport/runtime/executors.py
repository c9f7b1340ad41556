"""How a path is run on a backend's session. ``chain``: one engine per part, in sequence, always available."""

from __future__ import annotations

from importlib import import_module
from typing import Protocol

from bdexport.backends.base import Session, Tensor
from bdexport.bundle import Manifest
from bdexport.errors import UsageError
from bdexport.parts import HEAD, STEM, Masks, block_part, path_parts, shortcut_part
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
    """One engine per part. One mask for the whole batch: its path at once; otherwise gather, run, scatter per block."""

    name = "chain"
    fallback: str | None = None  # why an executor that was asked for runs as this one does

    def __init__(self, session: Session, manifest: Manifest) -> None:
        self._session, self._transitions = session, frozenset(manifest.transitions)
        self._paths: dict[bytes, tuple[str, ...]] = {}

    def run(self, x: Tensor, plan: Plan) -> Tensor:
        """See :meth:`Executor.run`."""
        if plan.uniform:
            return self._session.run_path(self._path(plan.masks[0]), x)
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


EXECUTORS: dict[str, str] = {
    "chain": "bdexport.runtime.executors:Chain",
    "graph": "bdexport.runtime.graph_executor:GraphExecutor",
}


def choose_executor(name: str, session: Session, manifest: Manifest) -> tuple[Executor, str]:
    """The executor called ``name`` and the reason for it; ``auto`` follows what was measured at build time.

    Raises :class:`UsageError` for a name that is not in the table.
    """
    if name == "auto":
        measured = manifest.executor or {}
        name = str(measured.get("choice", "chain"))
        reason = str(measured.get("reason", "the only executor of this bundle"))
    else:
        reason = "asked for by name"
    if name not in EXECUTORS:
        raise UsageError("unknown executor", got=repr(name), expected="auto or one of " + ", ".join(EXECUTORS))
    module, _, class_name = EXECUTORS[name].partition(":")
    executor: Chain = getattr(import_module(module), class_name)(session, manifest)
    if executor.fallback is not None:
        reason += f"; runs as chain: {executor.fallback}"
    return executor, reason
