"""Rounds: every contestant makes one timed call on the same images, in an order that is shuffled each round."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from time import perf_counter, perf_counter_ns
from typing import Any, TypeAlias

import numpy as np

from bdexport.bench.measure import without_garbage_collection
from benchmarks.suite.statistics import Times

Step: TypeAlias = Callable[[int], Any]  # the round's number -> logits (N, classes), or None
Progress: TypeAlias = Callable[[int, int], None]  # hundredths of the cell's time that are gone, of 100


@dataclass(frozen=True, eq=False)
class Rounds:
    """Times in ms by contestant, one per round and equally many for all; ``seconds`` that all rounds took."""

    times: dict[str, Times]
    seconds: float = 0.0


def measure(
    steps: Mapping[str, Step],
    seconds: float,
    *,
    least: int,
    most: int,
    warm_calls: Mapping[str, int] | None = None,
    pause_s: float = 0.0,
    progress: Progress | None = None,
    clock: Callable[[], float] = perf_counter,
) -> Rounds:
    """Rounds until ``seconds`` are over, at least ``least`` and at most ``most``.

    ``warm_calls``: by contestant, the calls before each timed one that are not timed. Garbage is not collected
    meanwhile.
    """
    warm, names = warm_calls or {}, list(steps)
    times: dict[str, list[float]] = {name: [] for name in names}
    with without_garbage_collection():
        started, done = clock(), 0
        rng = np.random.default_rng(0)
        while names and done < most and (done < least or clock() - started < seconds):
            for place in rng.permutation(len(names)).tolist():
                name = names[place]
                times[name].append(_timed(steps[name], done, warm.get(name, 0), pause_s))
            done += 1
            if progress is not None:
                progress(int(100 * max(done / most, min(1.0, (clock() - started) / max(seconds, 1e-9)))), 100)
        ended = clock()
    return Rounds({name: np.array(values) for name, values in times.items()}, ended - started)


def call_seconds(
    step: Step, again_below_s: float = 1.0, clock: Callable[[], float] = perf_counter
) -> tuple[Any, float]:
    """What a call returns, and the seconds that it takes; the first may make kernels, so a short one is made twice."""
    begin = clock()
    returned = step(0)
    seconds = clock() - begin
    if seconds < again_below_s:
        begin = clock()
        step(0)
        seconds = min(seconds, clock() - begin)
    return returned, seconds


def _timed(step: Step, number: int, warm_calls: int, pause_s: float) -> float:
    if pause_s:
        time.sleep(pause_s)
    for _ in range(warm_calls):
        step(number)
    begin = perf_counter_ns()
    step(number)
    return (perf_counter_ns() - begin) / 1e6
