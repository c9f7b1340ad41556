"""``graph``: whole paths captured once and launched as one. For sessions on a GPU that can capture.

A graph belongs to one path and one batch size. The least recently used goes when :data:`CACHED_GRAPHS` are there. What
cannot run as a graph (batches of several masks, refused captures) runs as ``chain`` does, and :meth:`report` says why.
"""

from __future__ import annotations

import threading
from collections import Counter, OrderedDict
from collections.abc import Sequence
from typing import Any, Protocol

from bdexport.backends.base import Backend, Session, Tensor
from bdexport.bundle import Manifest
from bdexport.errors import BackendError
from bdexport.parts import POLICY
from bdexport.runtime.executors import Chain
from bdexport.runtime.grouping import Plan

CACHED_GRAPHS = 512  # BlockDrop's policy for ResNet-110 has 469 masks on CIFAR-10's test set
MIXED = "batches of several masks run block by block"


class CapturedPath(Protocol):
    """A path of one batch size that runs as one piece."""

    def run(self, x: Tensor) -> Tensor:
        """The path's output; see :meth:`bdexport.backends.base.Session.run_path`."""

    def close(self) -> None:
        """Free what the capture holds."""


class CapturingSession(Session, Protocol):
    """A session that can capture."""

    def can_capture(self) -> tuple[bool, str]:
        """Whether it really can, here, and the reason."""

    def capture_path(self, parts: Sequence[str], batch: int) -> CapturedPath:
        """Capture a path for batches of that size. Raises BackendError when it is refused."""


class GraphExecutor(Chain):
    """See the module's text. May be called from several threads."""

    name = "graph"

    def __init__(self, session: Any, manifest: Manifest, capacity: int = CACHED_GRAPHS) -> None:
        super().__init__(session, manifest)
        self._capturing: CapturingSession = session
        self._capacity = capacity
        self._graphs: OrderedDict[tuple[tuple[str, ...], int], CapturedPath | None] = OrderedDict()
        self._lock = threading.Lock()
        self._counts: Counter[str] = Counter()
        self._reasons: Counter[str] = Counter()
        self.fallback = self._refusal()

    @staticmethod
    def refused(backend: Backend, device: str) -> str | None:
        """Off a GPU there are no graphs; a backend whose work cannot be captured there says so in ``no_capture``."""
        if not device.startswith("cuda"):
            return f"a session on {device} cannot capture"
        reason: str | None = getattr(backend, "no_capture", None)
        return reason

    @staticmethod
    def unavailable(session: Session, manifest: Manifest) -> str | None:
        """Why no path can be captured on this session; a capture that the driver refuses shows later."""
        ask = getattr(session, "can_capture", None)
        if ask is None:
            return f"a session on {session.device} cannot capture"
        possible, reason = ask()
        return None if possible else str(reason)

    def run(self, x: Tensor, plan: Plan) -> Tensor:
        """See :meth:`bdexport.runtime.executors.Executor.run`."""
        if self.fallback is not None:
            return super().run(x, plan)
        if not plan.uniform:
            with self._lock:
                self._reasons[MIXED] += 1
            return super().run(x, plan)
        return self._launched(self._path(plan.masks[0]), x)

    def run_whole(self, part: str, x: Tensor) -> Tensor:
        """See :meth:`bdexport.runtime.executors.Executor.run_whole`."""
        return self._launched((part,), x) if self.fallback is None else super().run_whole(part, x)

    def report(self) -> dict[str, Any]:
        """Captures, hits, misses, evictions so far, the hit rate, and how often it fell back for which reason."""
        with self._lock:
            runs = self._counts["hits"] + self._counts["misses"]
            counts = {name: self._counts[name] for name in ("captured", "hits", "misses", "evicted")}
            kept = sum(graph is not None for graph in self._graphs.values())
            return counts | {
                "kept": kept,
                "capacity": self._capacity,
                "hit_rate": self._counts["hits"] / runs if runs else None,
                "fallbacks": dict(self._reasons) | ({} if self.fallback is None else {self.fallback: runs}),
            }

    def _refusal(self) -> str | None:
        """Why nothing is captured here; found by capturing the policy, which every call runs."""
        try:
            self._capture(((POLICY,), 1))
        except BackendError as error:
            return f"capture refused: {error}"
        return None

    def _launched(self, parts: tuple[str, ...], x: Tensor) -> Tensor:
        key = (parts, len(x))
        with self._lock:  # over the launch as well: nobody evicts a graph between lookup and launch
            if key in self._graphs:
                self._graphs.move_to_end(key)
                self._counts["hits"] += 1
            else:
                self._counts["misses"] += 1
                try:
                    self._capture(key)
                except BackendError as error:
                    self._graphs[key] = None  # not tried again
                    self._reasons[f"capture refused: {error}"] += 1
            graph = self._graphs[key]
            if graph is not None:
                return graph.run(x)
        return self._session.run_path(parts, x)

    def _capture(self, key: tuple[tuple[str, ...], int]) -> None:
        while len(self._graphs) >= self._capacity:
            _, oldest = self._graphs.popitem(last=False)
            if oldest is not None:
                oldest.close()
                self._counts["evicted"] += 1
        self._graphs[key] = self._capturing.capture_path(*key)
        self._counts["captured"] += 1
