"""Latency of dynamic inference and of the full network, batch by batch, in turn.

Both calls start from the same uint8 images at the network's size, so both include normalisation and leave out decoding
and scaling. They alternate, and so does which of them comes first: whatever else the machine does meets both alike.
With ``turn`` above 1 each makes that many calls before it is the other's turn: alternating call by call has each side
find the other's weights in the processor's caches, which whoever deploys one of the two does not see.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import inf
from time import perf_counter_ns

import numpy as np
from numpy.typing import NDArray

from bdexport.backends.base import FusedSession
from bdexport.errors import UsageError
from bdexport.parts import Masks
from bdexport.runtime import Orchestrator, Result

INPUT = "uint8 at the network's size; normalisation included, decoding and scaling not"
Progress = Callable[[int, int], None]  # batches done, batches in all
Times = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Series:
    """One side of a measurement. ``latency_ms``, ``policy_ms``, ``network_ms``: one value per timed batch.

    ``latency_ms`` is a whole call; ``network_ms`` its engines without preprocessing and policy. ``correct`` (N,).
    """

    latency_ms: Times
    policy_ms: Times
    network_ms: Times
    correct: NDArray[np.bool_]
    masks: Masks


@dataclass(frozen=True, eq=False)
class Measurement:
    """Both sides on the same N images; ``batch`` images per call, ``rounds`` timed calls per batch and side."""

    full: Series
    dynamic: Series
    batch: int
    rounds: int
    warmup_calls: int
    turn: int
    images_not_timed: int  # the rest that fills no batch; it counts for accuracy only


def measure(
    orchestrator: Orchestrator,
    images: NDArray[np.uint8],
    labels: NDArray[np.int64],
    *,
    batch: int = 1,
    rounds: int = 1,
    warmup_batches: int = 10,
    turn: int = 1,
    progress: Progress | None = None,
) -> Measurement:
    """:func:`measure_all` of one orchestrator."""
    (only,) = measure_all(
        {"": orchestrator},
        images,
        labels,
        batch=batch,
        rounds=rounds,
        warmup_batches=warmup_batches,
        turn=turn,
        progress=progress,
    ).values()
    return only


def measure_all(
    orchestrators: Mapping[str, Orchestrator],
    images: NDArray[np.uint8],
    labels: NDArray[np.int64],
    *,
    batch: int = 1,
    rounds: int = 1,
    warmup_batches: int = 10,
    turn: int = 1,
    progress: Progress | None = None,
    seconds: float | None = None,
    estimated: Callable[[float, int], None] | None = None,
) -> dict[str, Measurement]:
    """Run and time ``images`` (uint8 (N, H, W, 3), fitted) in batches, ``turn`` calls of one side at a time.

    The sides are the first orchestrator's full network, which all measurements share, and every orchestrator.
    ``seconds``: as many rounds as fit into them by the warm-up's times, at least one, in place of ``rounds``.
    ``estimated(seconds, rounds)`` is told before the timed calls what they will take.
    Garbage is not collected meanwhile. Raises :class:`UsageError` for numbers below 1 or a batch larger than N, and
    whatever an orchestrator raises.
    """
    _check(batch, rounds, turn, len(images))
    if seconds is not None and not 0 < seconds < inf:
        raise UsageError("seconds", got=seconds, expected="a positive number")
    starts = range(0, len(images) - batch + 1, batch)
    full = _Recorder(next(iter(orchestrators.values())).full)
    dynamic = {name: _Recorder(orchestrator) for name, orchestrator in orchestrators.items()}
    sides = [full, *dynamic.values()]
    for orchestrator in orchestrators.values():
        _prepare(orchestrator, batch)
    with without_garbage_collection():
        fastest = _warm_up(sides, [images[start : start + batch] for start in starts], warmup_batches)
        if seconds is not None:
            rounds = max(1, int(seconds / (fastest * len(starts)))) if fastest < inf else 1
        calls = rounds * len(starts)
        if estimated is not None and fastest < inf:
            estimated(calls * fastest, rounds)
        for number, begin in enumerate(range(0, calls, turn)):
            if progress is not None:
                progress(begin, calls)
            first = number % len(sides)
            for side in (*sides[first:], *sides[:first]):
                for call in range(begin, min(begin + turn, calls)):
                    start = starts[call % len(starts)]
                    side.timed(images[start : start + batch], keep=call < len(starts))
    rest = starts[-1] + batch
    for side in sides:
        if rest < len(images):
            side.keep(side.call(images[rest:]))
    reference, left = full.series(labels), len(images) - rest
    return {
        name: Measurement(reference, side.series(labels), batch, rounds, warmup_batches, turn, left)
        for name, side in dynamic.items()
    }


def _warm_up(sides: Sequence[_Recorder], batches: Sequence[NDArray[np.uint8]], calls: int) -> float:
    """Call every side ``calls`` times; returns the seconds of the fastest round of all sides, infinite without any."""
    fastest = inf
    for number in range(calls):
        began = perf_counter_ns()
        for side in sides:
            side.call(batches[number % len(batches)])
        fastest = min(fastest, (perf_counter_ns() - began) / 1e9)
    return fastest


def _prepare(orchestrator: Orchestrator, batch: int) -> None:
    """Fused paths that the warm-up's images do not take are not to be compiled while time is taken."""
    session = orchestrator.session
    if isinstance(session, FusedSession):
        session.prepare_fused(batch)


class _Recorder:
    """One side: its call, the times, and the results of the first round."""

    def __init__(self, call: Callable[[NDArray[np.uint8]], Result]) -> None:
        self.call = call
        self._times: list[tuple[float, float, float]] = []
        self._classes: list[NDArray[np.int64]] = []
        self._masks: list[Masks] = []

    def timed(self, images: NDArray[np.uint8], keep: bool) -> None:
        started = perf_counter_ns()
        result = self.call(images)
        elapsed = perf_counter_ns() - started
        self._times.append((elapsed / 1e6, result.timings["policy"], result.timings["network"]))
        if keep:
            self.keep(result)

    def keep(self, result: Result) -> None:
        self._classes.append(result.classes)
        self._masks.append(result.masks)

    def series(self, labels: NDArray[np.int64]) -> Series:
        latency, policy, network = np.array(self._times).T
        correct = np.concatenate(self._classes) == labels
        return Series(latency, policy, network, correct, np.concatenate(self._masks))


def _check(batch: int, rounds: int, turn: int, images: int) -> None:
    for name, value in (("rounds", rounds), ("turn", turn)):
        if value < 1:
            raise UsageError(name, got=value, expected="at least 1")
    if not 1 <= batch <= images:
        remedy = "take more images, or a smaller batch"
        raise UsageError("batch", got=batch, expected=f"1..{images} (the number of images)", remedy=remedy)


@contextmanager
def without_garbage_collection() -> Iterator[None]:
    """No collection inside, which would fall into one call and not into another; as before afterwards."""
    enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
