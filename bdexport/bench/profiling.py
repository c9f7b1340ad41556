"""Where the time of a call goes: every part, copy and regrouping of an executor, with its beginning and end.

The run-time loop knows nothing of it: a :class:`TimedSession` stands between an executor and the backend's session, and
notes what passes. It runs whole paths part by part, which the backend itself may do in one piece. So four sides take
turns on the same images, batch by batch: as the executor runs them (*as run*), part by part without clocks, part by
part with clocks (*profiled*), and the full network's own engine. The second and third tell what the clocks cost, the
first and second what running part by part does. Inside a fused path there are no parts to time: whatever the executor
is, the second and third side run ``chain``. Where the session holds fused paths, a fifth side runs ``fused`` with
clocks around each of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from time import perf_counter_ns

import numpy as np
from numpy.typing import NDArray

from bdexport.backends.base import FusedSession
from bdexport.bench.measure import Progress, Times, without_garbage_collection
from bdexport.bench.timed_session import (
    PART,
    Event,
    PartByPart,
    TimedFusedSession,
    TimedSession,
    clock_cost_us,
    end_clock,
)
from bdexport.bundle import Bundle, PartEntry
from bdexport.config import ProfileConfig
from bdexport.errors import UsageError
from bdexport.parts import Masks
from bdexport.runtime import Orchestrator, Result
from bdexport.runtime.executors import Chain, Fused

FLOAT_BYTES = 4
Image = NDArray[np.uint8]


@dataclass(frozen=True, eq=False)
class Call:
    """One profiled call of the orchestrator: its events in order, the masks (N, K) that ran and its own timings."""

    begin_ns: int
    end_ns: int
    preprocess_ns: int
    masks: Masks
    events: tuple[Event, ...]

    @property
    def ms(self) -> float:
        """The whole call."""
        return (self.end_ns - self.begin_ns) / 1e6


@dataclass(frozen=True)
class Alone:
    """A part by itself at batch 1, and the copy that it is compared with; medians in ms.

    ``copy_ms``: copying as many bytes as the part moves at least (:func:`bytes_moved`) in the profiled calls;
    ``single_copy_ms``: the same at batch 1. None where the device's memory is not the host's.
    """

    ms: float
    copy_ms: float | None
    single_copy_ms: float | None


@dataclass(frozen=True, eq=False)
class Profile:
    """What was measured. Times in ms, one per timed call; ``clock_us`` is what noting one event costs.

    ``calls``: part by part; ``fused_calls``: the same images through the fused paths, none where the session has none.
    """

    calls: tuple[Call, ...]
    as_run_ms: Times
    part_by_part_ms: Times
    full_ms: Times
    alone: dict[str, Alone]
    clock_us: float
    batch: int
    rounds: int
    warmup_calls: int
    images_not_timed: int
    fused_calls: tuple[Call, ...] = ()


def profile(
    orchestrator: Orchestrator,
    images: Image,
    *,
    batch: int = ProfileConfig.batch,
    rounds: int = ProfileConfig.rounds,
    config: ProfileConfig | None = None,
    progress: Progress | None = None,
) -> Profile:
    """Profile ``images`` (uint8 (N, H, W, 3), fitted) in batches; a rest that fills no batch is left out.

    Garbage is not collected meanwhile. Raises :class:`UsageError` for numbers below 1, a batch larger than N and more
    events than ``config.max_events``, and whatever the orchestrator raises.
    """
    config = config or ProfileConfig()
    _check(orchestrator, batch, rounds, len(images), config)
    starts = range(0, len(images) - batch + 1, batch)
    sides = _Sides(orchestrator)
    with without_garbage_collection():
        sides.warm_up(images, starts, batch, config.warmup_batches)
        total = rounds * len(starts)
        for number in range(total):
            if progress is not None:
                progress(number, total)
            start = starts[number % len(starts)]
            sides.measure(images[start : start + batch], first=number)
        clock_us = clock_cost_us()
        alone = _alone(orchestrator, sides.chain.calls, config.alone_runs)
    return Profile(
        calls=tuple(sides.chain.calls),
        as_run_ms=np.array(sides.as_run_ms),
        part_by_part_ms=np.array(sides.part_by_part_ms),
        full_ms=np.array(sides.full_ms),
        alone=alone,
        clock_us=clock_us,
        batch=batch,
        rounds=rounds,
        warmup_calls=config.warmup_batches,
        images_not_timed=len(images) - len(starts) * batch,
        fused_calls=() if sides.fused is None else tuple(sides.fused.calls),
    )


class _Profiled:
    """An executor on a session with clocks, and the calls that were made of it."""

    def __init__(self, bundle: Bundle, session: TimedSession, executor: str) -> None:
        self._session = session
        self.run = Orchestrator(bundle, session, executor)
        self.calls: list[Call] = []

    def measure(self, images: Image) -> None:
        """One call that is kept."""
        begin = perf_counter_ns()
        result = self.run(images)
        end = perf_counter_ns()
        preprocess_ns = round(result.timings["preprocess"] * 1e6)
        self.calls.append(Call(begin, end, preprocess_ns, result.masks, self._session.taken()))

    def forget(self) -> None:
        """The events of calls that were made by the way."""
        self._session.taken()


def _fused_session(orchestrator: Orchestrator) -> FusedSession | None:
    """The orchestrator's session, where it holds fused paths."""
    session = orchestrator.session
    return session if Fused.unavailable(session, orchestrator.manifest) is None else None  # type: ignore[return-value]


class _Sides:
    """The ways to run the same images, and what was measured of each."""

    def __init__(self, orchestrator: Orchestrator) -> None:
        bundle, session = orchestrator.bundle, orchestrator.session
        self._as_run = orchestrator
        self._part_by_part = Orchestrator(bundle, PartByPart(session), Chain.name)
        self.chain = _Profiled(bundle, TimedSession(session), Chain.name)
        self._paths = paths = _fused_session(orchestrator)
        timed = None if paths is None else TimedFusedSession(paths, bundle.manifest)
        self.fused = None if timed is None else _Profiled(bundle, timed, Fused.name)
        self.as_run_ms: list[float] = []
        self.part_by_part_ms: list[float] = []
        self.full_ms: list[float] = []

    def warm_up(self, images: Image, starts: range, batch: int, count: int) -> None:
        """Every part once at this batch, then ``count`` batches on every side, none of it kept."""
        for side in (self._as_run, self.chain.run):
            side.warm_up(batch)
        self._warm_up_paths(images[:batch])
        runs: list[Callable[[Image], object]]
        runs = [self._as_run, self._part_by_part, self._as_run.full, *(side.run for side in self._profiled())]
        for number in range(count):
            start = starts[number % len(starts)]
            for run in runs:
                run(images[start : start + batch])
        for profiled in self._profiled():
            profiled.forget()

    def _warm_up_paths(self, images: Image) -> None:
        """Every fused path once, also those that the warm-up's images do not take."""
        manifest = self._as_run.manifest
        if self._paths is not None and self.fused is not None and manifest.fused is not None:
            self._paths.prepare_fused(len(images))
            for mask in manifest.fused.masks(manifest.num_blocks):
                self.fused.run(images, masks=np.tile(mask, (len(images), 1)))

    def _profiled(self) -> list[_Profiled]:
        return [self.chain] if self.fused is None else [self.chain, self.fused]

    def measure(self, images: Image, first: int) -> None:
        """One call of every side; ``first`` turns their order."""
        turns: list[Callable[[Image], None]] = [
            lambda batch: self.as_run_ms.append(_timed_ms(self._as_run, batch)),
            lambda batch: self.part_by_part_ms.append(_timed_ms(self._part_by_part, batch)),
            lambda batch: self.full_ms.append(_timed_ms(self._as_run.full, batch)),
            *(profiled.measure for profiled in self._profiled()),
        ]
        for turn in range(len(turns)):
            turns[(first + turn) % len(turns)](images)


def _timed_ms(run: Callable[[Image], Result], images: Image) -> float:
    begin = perf_counter_ns()
    run(images)
    return (perf_counter_ns() - begin) / 1e6


# ---- what the numbers are compared with --------------------------------------------------------------------------


def bytes_moved(entry: PartEntry, rows: float) -> float:
    """The least that a part moves through memory: its engine's file, its input and its output of ``rows`` images."""
    weights = 0 if entry.engine is None else entry.engine.bytes
    tensors = float(np.prod(entry.input.shape) + np.prod(entry.output.shape)) * FLOAT_BYTES
    return weights + rows * tensors


def _alone(orchestrator: Orchestrator, calls: Sequence[Call], runs: int) -> dict[str, Alone]:
    """Parts take turns, so that each finds the caches as the others left them, which is how it runs in a path."""
    session, entries = orchestrator.session, orchestrator.manifest.parts
    ended_ns = end_clock(session)
    rows = _mean_rows(calls)
    inputs = {part: session.put(part, np.zeros((1, *entry.input.shape), np.float32)) for part, entry in entries.items()}
    times: dict[str, list[float]] = {part: [] for part in inputs}
    ended_ns()  # the inputs are there
    for _ in range(runs):
        for part, x in inputs.items():
            begin = perf_counter_ns()
            session.run(part, x)
            times[part].append((ended_ns() - begin) / 1e6)
    if session.device != "cpu":
        return {part: Alone(median(own), None, None) for part, own in times.items()}
    moved = {part: (bytes_moved(entries[part], rows.get(part, 1.0)), bytes_moved(entries[part], 1.0)) for part in times}
    copy = _Copy(max(max(pair) for pair in moved.values()))
    return {part: Alone(median(own), *(copy.ms(size, runs) for size in moved[part])) for part, own in times.items()}


def _mean_rows(calls: Sequence[Call]) -> dict[str, float]:
    """Images per run of each part."""
    rows: dict[str, list[int]] = {}
    for call in calls:
        for event in call.events:
            if event.kind == PART:
                rows.setdefault(event.what, []).append(event.rows)
    return {part: float(np.mean(counts)) for part, counts in rows.items()}


class _Copy:
    """Copies of so many bytes, half of which are read and half written."""

    def __init__(self, largest: float) -> None:
        self._source = np.ones(_half(largest), np.uint8)
        self._target = np.empty_like(self._source)

    def ms(self, moved: float, runs: int) -> float:
        """The median of so many copies."""
        source, target = self._source[: _half(moved)], self._target[: _half(moved)]
        times = []
        for _ in range(runs):
            begin = perf_counter_ns()
            np.copyto(target, source)
            times.append((perf_counter_ns() - begin) / 1e6)
        return median(times)


def _half(moved: float) -> int:
    return max(1, int(moved) // 2)


def _check(orchestrator: Orchestrator, batch: int, rounds: int, images: int, config: ProfileConfig) -> None:
    if rounds < 1:
        raise UsageError("rounds", got=rounds, expected="at least 1")
    if not 1 <= batch <= images:
        remedy = "take more images, or a smaller batch"
        raise UsageError("batch", got=batch, expected=f"1..{images} (the number of images)", remedy=remedy)
    # A block is at most run, gathered and written back, a transition's shortcut beside it; and a few around them.
    per_call = 5 * orchestrator.manifest.num_blocks + 10
    if (paths := _fused_session(orchestrator)) is not None:  # the fifth side: a group for each path, and the rest
        per_call = 2 * per_call + 2 * min(batch, len(paths.fused))
    most = rounds * (images // batch) * per_call
    if most > config.max_events:
        what = f"{images} images in batches of {batch}, {rounds} rounds: too many events to keep"
        expected = f"at most {config.max_events}"
        raise UsageError(what, got=f"up to {most}", expected=expected, remedy="take fewer images or rounds")
