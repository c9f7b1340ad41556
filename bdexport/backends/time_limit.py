"""A limit on the time of one call, for backends whose library can be told to end a run: nothing is left running.

One thread per limit looks at the calls that are under way, and tells the library to end those that have taken too
long, again and again until they are over: a library may not hear it between two runs of one call.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import inf
from time import monotonic, sleep
from typing import Any
from weakref import ref

from bdexport.errors import BackendError

SHORTEST_LOOK_S, LONGEST_LOOK_S = 0.002, 0.1
REMEDY = "pass smaller batches, or allow more time: bdexport.load(.., timeout_s=..)"
LOOKS = 20  # per limit: a call ends at most a twentieth of its limit late, or LONGEST_LOOK_S


@dataclass(eq=False)
class Call:
    """One call under way. ``running``: what the library is to be told to end; None: nothing that runs now."""

    deadline: float
    running: Any = None
    over: bool = False
    changing: threading.Lock = field(default_factory=threading.Lock)  # so that no other run is ended than the one meant


class OverError(BackendError):
    """The call's time was over before a run began: the library has done nothing, and nothing of it is in doubt."""


class TimeLimit:
    """``seconds`` for each call; ``stop`` tells the library to end what is in :attr:`Call.running`."""

    def __init__(self, seconds: float, stop: Callable[[Any], None]) -> None:
        self.seconds, self._stop = seconds, stop
        self._thread = threading.local()
        self._calls: set[Call] = set()
        self._starting = threading.Lock()
        self._process: int | None = None  # the one in which the watching thread runs: a fork does not copy it
        self._closed = False

    @property
    def current(self) -> Call | None:
        """The call that this thread works for."""
        call: Call | None = getattr(self._thread, "call", None)
        return call

    @contextmanager
    def call(self, running: Any = None) -> Iterator[None]:
        """One call. Raises BackendError, naming the part, where it was ended since its time was over."""
        self._watch()
        call = Call(monotonic() + self.seconds, running)
        self._calls.add(call)
        try:
            with self.work_for(call):
                yield
        except BackendError as error:
            if not call.over:
                raise
            raise self.error(error.what.partition(": ")[0]) from error  # every text begins with the part
        finally:
            self._calls.discard(call)

    @contextmanager
    def running(self, where: str, running: Any) -> Iterator[None]:
        """One run of the library's, if this thread works for a call. Raises BackendError where its time is over."""
        call = self.current
        if call is None:
            yield
            return
        with call.changing:
            if call.over:
                raise OverError(*self._words(where), remedy=REMEDY)
            call.running = running
        try:
            yield
        finally:
            with call.changing:
                call.running = None

    @contextmanager
    def clock_stopped(self) -> Iterator[None]:
        """What runs inside does not count: compiling, which cannot be ended, and is needed once."""
        call = self.current
        if call is None:
            yield
            return
        left, call.deadline = call.deadline - monotonic(), inf
        try:
            yield
        finally:
            call.deadline = monotonic() + left

    @contextmanager
    def waiting(self, lock: threading.Lock, where: str) -> Iterator[None]:
        """Hold ``lock``, for which a call waits no longer than its limit. Raises :class:`OverError`."""
        call = self.current
        left = -1.0 if call is None or call.deadline == inf else max(0.0, call.deadline - monotonic())
        if not lock.acquire(timeout=left):
            assert call is not None
            call.over = True
            raise OverError(*self._words(where), remedy=REMEDY)
        try:
            yield
        finally:
            lock.release()

    @contextmanager
    def work_for(self, call: Call | None) -> Iterator[None]:
        """What this thread runs inside belongs to a call that another thread may have begun."""
        before, self._thread.call = self.current, call
        try:
            yield
        finally:
            self._thread.call = before

    def error(self, where: str) -> BackendError:
        """What is raised for a call that was ended."""
        return BackendError(*self._words(where), remedy=REMEDY)

    def _words(self, where: str) -> tuple[str]:
        return (f"{where}: was ended, since the call took longer than timeout_s={self.seconds:g}",)

    def close(self) -> None:
        """End the watching thread, once no call is under way."""
        self._closed = True

    def _watch(self) -> None:
        if self._process != os.getpid():
            with self._starting:
                if self._process != os.getpid():
                    self._calls = set()  # in a forked process: the parent's
                    # By a weak reference: a session that is dropped without close() ends it too.
                    arguments = (ref(self), min(max(self.seconds / LOOKS, SHORTEST_LOOK_S), LONGEST_LOOK_S))
                    threading.Thread(target=_look, args=arguments, name="bdexport time limit", daemon=True).start()
                    self._process = os.getpid()

    def look(self) -> bool:
        """End the calls whose time is over; returns whether there can be others."""
        for call in self._calls.copy():
            if monotonic() > call.deadline:
                with call.changing:
                    call.over = True
                    if call.running is not None:
                        self._stop(call.running)
        return not self._closed or bool(self._calls)


def _look(limit: ref[TimeLimit], pause: float) -> None:
    while (found := limit()) is not None and found.look():
        del found
        sleep(pause)
