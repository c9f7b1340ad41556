"""Rounds: every contestant makes one timed call on the same images, in an order that is shuffled each round."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from time import perf_counter, perf_counter_ns
from typing import Any, TypeAlias

import numpy as np

from bdexport.bench.measure import without_garbage_collection
from benchmarks.suite.statistics import Times

Step: TypeAlias = Callable[[int], Any]  # the round's number -> logits (N, classes), or None
Progress: TypeAlias = Callable[[int, int], None]  # hundredths of the cell's time that are gone, of 100


@dataclass(frozen=True, eq=False)
class Rounds:
    """Times in ms by contestant, one per round and equally many for all; who was left out, and why."""

    times: dict[str, Times]
    missing: dict[str, str] = field(default_factory=dict)


def measure(
    steps: Mapping[str, Step],
    seconds: float,
    *,
    least: int,
    most: int,
    warm_calls: int = 0,
    pause_s: float = 0.0,
    progress: Progress | None = None,
    clock: Callable[[], float] = perf_counter,
) -> Rounds:
    """Rounds until ``seconds`` are over, at least ``least`` and at most ``most``.

    Before them each contestant makes two calls, which also tell what a call takes: one that could not make ``least``
    rounds in a third of the time is left out. If the rest cannot make them either, the slowest go until they can.
    Garbage is not collected meanwhile.
    """
    with without_garbage_collection():
        cost, missing = _costs(steps, seconds, least, warm_calls, clock)
        calls = 1 + warm_calls
        while len(cost) > 1 and least * calls * sum(cost.values()) > seconds:
            slowest = max(cost, key=lambda name: cost[name])
            missing[slowest] = _too_slow(cost.pop(slowest), seconds)
        names = [name for name in steps if name in cost]
        times: dict[str, list[float]] = {name: [] for name in names}
        started, done = clock(), 0
        rng = np.random.default_rng(0)
        while names and done < most and (done < least or clock() - started < seconds):
            for place in rng.permutation(len(names)).tolist():
                times[names[place]].append(_timed(steps[names[place]], done, warm_calls, pause_s))
            done += 1
            if progress is not None:
                progress(int(100 * max(done / most, min(1.0, (clock() - started) / max(seconds, 1e-9)))), 100)
    return Rounds({name: np.array(values) for name, values in times.items()}, missing)


def _costs(
    steps: Mapping[str, Step], seconds: float, least: int, warm_calls: int, clock: Callable[[], float]
) -> tuple[dict[str, float], dict[str, str]]:
    """Seconds of a call by contestant, of those that are fast enough; the others' reasons."""
    cost: dict[str, float] = {}
    missing: dict[str, str] = {}
    for name, step in steps.items():
        begin = clock()
        step(0)
        first = clock() - begin
        if first * (1 + warm_calls) * least > seconds / 3:
            begin = clock()
            step(0)  # the first call may have made kernels
            first = min(first, clock() - begin)
        if first * (1 + warm_calls) * least > seconds / 3:
            missing[name] = _too_slow(first, seconds)
            continue
        begin = clock()
        step(0)
        cost[name] = clock() - begin
    return cost, missing


def _too_slow(call_s: float, seconds: float) -> str:
    return f"left out: one call took {call_s:.2f} s and its cell had {seconds:.0f} s; give more --minutes"


def _timed(step: Step, number: int, warm_calls: int, pause_s: float) -> float:
    if pause_s:
        time.sleep(pause_s)
    for _ in range(warm_calls):
        step(number)
    begin = perf_counter_ns()
    step(number)
    return (perf_counter_ns() - begin) / 1e6
