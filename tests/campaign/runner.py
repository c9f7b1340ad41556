"""Hands cases to workers, two kinds at a time, and collects what came of them."""

from __future__ import annotations

import json
import os
import selectors
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from campaign.cases import Kind
from campaign.kinds import kind_of

PREPARE_S = 300.0  # making a kind's bundles, checkpoints or runs
LANES = 2
MOST_FAILURES = 200  # of one kind: after so many, the rest says nothing new


@dataclass
class Findings:
    """What a kind's cases came to."""

    kind: str
    cases: int = 0
    refused: int = 0
    right: int = 0
    failures: list[dict[str, Any]] = field(default_factory=list)
    slowest_s: float = 0.0
    most_mb: float = 0.0
    seconds: float = 0.0
    interrupted: bool = False

    @property
    def tried(self) -> int:
        """Number of things that were tried: a case may try several."""
        return self.refused + self.right + len(self.failures)


class Worker:
    """A worker process; it is started again after it died or was killed."""

    def __init__(self, kind: str, folder: Path) -> None:
        self.kind, self.folder = kind, folder
        self._process: subprocess.Popen[str] | None = None
        self._log: IO[str] | None = None

    def run(self, seed: int, number: int, limit_s: float) -> dict[str, Any]:
        """The answer to one case; a death or a hang is an answer too."""
        died = self._started()
        if died is not None:
            return {"failures": [f"the worker did not start: {died}"], "fatal": True}
        process = self._process
        assert process is not None
        assert process.stdin is not None
        try:
            print(seed, number, file=process.stdin, flush=True)
        except BrokenPipeError:
            return {"failures": [f"the process died: {self._end()}"]}
        answer = self._answer(limit_s)
        if answer is None:
            return {"failures": [f"no answer within {limit_s:g} s"], "seconds": limit_s}
        return answer

    def close(self) -> None:
        """End the process."""
        if self._process is not None:
            self._end()

    def _started(self) -> str | None:
        if self._process is not None:
            return None
        self.folder.mkdir(parents=True, exist_ok=True)
        self._log = (self.folder.parent / f"{self.kind}.log").open("a")
        threads = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        own = {"BDEXPORT_CACHE": str(self.folder / "cache"), "TMPDIR": str(self.folder)}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "campaign.worker", self.kind, str(self.folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            env=os.environ | threads | own,
            start_new_session=True,
        )
        answer = self._answer(PREPARE_S)
        if answer is None or not answer.get("ready"):
            return str(answer)
        return None

    def _answer(self, limit_s: float) -> dict[str, Any] | None:
        assert self._process is not None
        assert self._process.stdout is not None
        with selectors.DefaultSelector() as selector:
            selector.register(self._process.stdout, selectors.EVENT_READ)
            if not selector.select(limit_s):
                self._end()
                return None
        line = self._process.stdout.readline()
        if not line:
            return {"failures": [f"the process died: {self._end()}"]}
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _end(self) -> str:
        """Kill the process and its children; returns how it had ended by itself, if it had."""
        process, self._process = self._process, None
        assert process is not None
        for stream in (process.stdin, process.stdout):
            assert stream is not None
            with suppress(BrokenPipeError):
                stream.close()
        try:
            code: int | None = process.wait(2)
        except subprocess.TimeoutExpired:
            code = None
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        if self._log is not None:
            self._log.close()
        if code is None:
            return "it was killed"
        return f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"


def run_kind(
    found: Findings, seed: int, seconds: float, folder: Path, tell: Callable[[Findings], None], stop: threading.Event
) -> None:
    """Cases 0, 1, 2 .. of a kind for about ``seconds``, the preparation not counted, at least one, until ``stop``."""
    if stop.is_set():
        return
    kind = kind_of(found.kind)
    worker = Worker(found.kind, folder / found.kind)
    try:
        collect(found, worker, kind, seed, 0)
        ends = time.monotonic() + seconds
        while time.monotonic() < ends and len(found.failures) < MOST_FAILURES and not stop.is_set():
            if collect(found, worker, kind, seed, found.cases):
                break
            tell(found)
    finally:
        worker.close()
    tell(found)


def collect(found: Findings, worker: Worker, kind: type[Kind], seed: int, number: int) -> bool:
    """Run one case and count what came of it; returns whether there is no point in going on."""
    started = time.monotonic()
    answer = worker.run(seed, number, kind.limit_s)
    found.seconds += time.monotonic() - started
    found.cases += 1
    found.refused += answer.get("refused", 0)
    found.right += answer.get("right", 0)
    found.slowest_s = max(found.slowest_s, answer.get("seconds", 0.0))
    found.most_mb = max(found.most_mb, answer.get("grown_mb", 0.0))
    again = f"make campaign REPLAY='{found.kind} {seed} {number}'"
    found.failures += [{"seed": seed, "case": number, "what": what, "again": again} for what in answer["failures"]]
    return bool(answer.get("fatal"))


def run_kinds(
    names: Iterable[str], seed: int, minutes: float, folder: Path, tell: Callable[[Findings], None]
) -> list[Findings]:
    """All kinds, two at a time, the ones with the largest share of the time first.

    After Ctrl-C, what was found so far: ``interrupted`` is true in each then.
    """
    kinds = {name: kind_of(name) for name in names}
    whole = sum(kind.share for kind in kinds.values())
    lanes = min(LANES, len(kinds))
    order = sorted(kinds, key=lambda name: -kinds[name].share)
    found, stop = {name: Findings(name) for name in kinds}, threading.Event()
    with ThreadPoolExecutor(lanes) as pool:
        waiting = []
        for name in order:
            seconds = lanes * minutes * 60 * kinds[name].share / whole
            waiting.append(pool.submit(run_kind, found[name], seed, seconds, folder, tell, stop))
        try:
            for each in waiting:
                each.result()
        except KeyboardInterrupt:
            stop.set()  # the case under way ends first
            for findings in found.values():
                findings.interrupted = True
    return list(found.values())
