"""A session with clocks: what passes between an executor and the backend's session; what the clocks cost."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from time import perf_counter_ns
from typing import Any, cast

from numpy.typing import NDArray

from bdexport.backends.base import FusedSession, Rows, Session, Tensor
from bdexport.bundle import Manifest

PART, FUSED, COPY, REGROUP = "part", "fused", "copy", "regroup"  # kinds of events
CLOCK_RUNS, CLOCK_ROUNDS = 200, 25  # calls of an empty session, and how often: the clocks' own cost is the median


@dataclass(frozen=True, slots=True)
class Event:
    """One verb of a session: ``what`` is a part's name, a fused path's mask or the verb; ``rows``: images it worked on.

    Clock: host, ns.
    """

    kind: str
    what: str
    begin_ns: int
    end_ns: int
    rows: int

    @property
    def ms(self) -> float:
        """How long it took."""
        return (self.end_ns - self.begin_ns) / 1e6


class PartByPart:
    """A session whose paths run part by part. The wrapped session's own verbs otherwise; it is not closed."""

    def __init__(self, session: Session) -> None:
        self.device, self.threads, self.notes = session.device, session.threads, session.notes
        # The verbs themselves, not methods that call them: this side is to cost nothing.
        self.put, self.get, self.run = session.put, session.get, session.run
        self.take, self.replace, self.merge = session.take, session.replace, session.merge

    def run_path(self, parts: Sequence[str], x: Tensor) -> Tensor:
        """See :meth:`bdexport.backends.base.Session.run_path`."""
        for part in parts:
            x = self.run(part, x)
        return x

    def close(self) -> None:
        """Nothing: whoever opened the session closes it."""


def end_clock(session: Session) -> Callable[[], int]:
    """The host's clock once the session's work is done: on a GPU a verb returns when it has queued its work."""
    wait: Callable[[], None] | None = getattr(session, "wait", None)
    if wait is None:
        return perf_counter_ns

    def ended_ns() -> int:
        wait()
        return perf_counter_ns()

    return ended_ns


class TimedSession:
    """:class:`PartByPart` that notes every verb in :attr:`events`; for one thread.

    On a GPU it waits for each verb's work: an event holds the launch and the wait as well, and nothing overlaps.
    """

    def __init__(self, session: Session) -> None:
        self.device, self.threads, self.notes = session.device, session.threads, session.notes
        self._session = session
        self._ended_ns = end_clock(session)
        self.events: list[tuple[str, str, int, int, int]] = []

    def put(self, part: str, array: NDArray[Any]) -> Tensor:
        begin = perf_counter_ns()
        result = self._session.put(part, array)
        self.events.append((COPY, "put", begin, self._ended_ns(), len(array)))
        return result

    def get(self, part: str, tensor: Tensor) -> NDArray[Any]:
        begin = perf_counter_ns()
        result = self._session.get(part, tensor)
        self.events.append((COPY, "get", begin, self._ended_ns(), len(result)))
        return result

    def run(self, part: str, x: Tensor) -> Tensor:
        begin = perf_counter_ns()
        result = self._session.run(part, x)
        self.events.append((PART, part, begin, self._ended_ns(), len(x)))
        return result

    def run_path(self, parts: Sequence[str], x: Tensor) -> Tensor:
        for part in parts:
            x = self.run(part, x)
        return x

    def take(self, x: Tensor, rows: Rows) -> Tensor:
        begin = perf_counter_ns()
        result = self._session.take(x, rows)
        self.events.append((REGROUP, "take", begin, self._ended_ns(), len(rows)))
        return result

    def replace(self, x: Tensor, rows: Rows, y: Tensor) -> Tensor:
        begin = perf_counter_ns()
        result = self._session.replace(x, rows, y)
        self.events.append((REGROUP, "replace", begin, self._ended_ns(), len(rows)))
        return result

    def merge(self, pieces: Sequence[tuple[Rows, Tensor]], batch: int) -> Tensor:
        begin = perf_counter_ns()
        result = self._session.merge(pieces, batch)
        self.events.append((REGROUP, "merge", begin, self._ended_ns(), batch))
        return result

    def close(self) -> None:
        """Nothing: whoever opened the session closes it."""

    def taken(self) -> tuple[Event, ...]:
        """The events since the last time."""
        events, self.events = self.events, []
        return tuple(Event(*event) for event in events)


class TimedFusedSession(TimedSession):
    """:class:`TimedSession` of a session with fused paths, which are noted by their masks."""

    def __init__(self, session: FusedSession, manifest: Manifest) -> None:
        super().__init__(cast(Session, session))
        self.fused, self.prepare_fused, self._run_fused = session.fused, session.prepare_fused, session.run_fused
        self._of_paths = session
        assert manifest.fused is not None  # or the session would have no fused paths
        paths = manifest.fused.part_paths(manifest.transitions)
        self._masks = {path: fused.mask for path, fused in zip(paths, manifest.fused.paths, strict=True)}

    @property
    def fused_seconds(self) -> float:
        """See :attr:`bdexport.backends.base.FusedSession.fused_seconds`."""
        return self._of_paths.fused_seconds

    def run_fused(self, path: tuple[str, ...], x: Tensor) -> Tensor:
        """See :meth:`bdexport.backends.base.FusedSession.run_fused`."""
        begin = perf_counter_ns()
        result = self._run_fused(path, x)
        self.events.append((FUSED, self._masks[path], begin, self._ended_ns(), len(x)))
        return result


def clock_cost_us() -> float:
    """What noting one event costs: the same call of an empty session through a :class:`TimedSession` and directly."""
    session = cast(Session, _Empty())
    timed = TimedSession(session)
    costs = []
    for _ in range(CLOCK_ROUNDS):
        direct, noted = (_loop_us(run, CLOCK_RUNS) for run in (session.run, timed.run))
        costs.append(noted - direct)
    return max(0.0, median(costs))


def _loop_us(run: Callable[[str, Any], Any], runs: int) -> float:
    """One call's mean over a loop."""
    x: list[int] = []
    begin = perf_counter_ns()
    for _ in range(runs):
        run("", x)
    return (perf_counter_ns() - begin) / 1e3 / runs


class _Empty:
    """As much of a session as the clocks' cost needs: it runs nothing."""

    device, threads = "", None
    notes: tuple[str, ...] = ()

    def run(self, part: str, x: Any) -> Any:
        return x
