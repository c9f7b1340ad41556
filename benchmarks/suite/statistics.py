"""Medians, ratios and how far they can be trusted: the rounds are drawn again, with replacement (bootstrap).

A round holds one call of every contestant on the same images. Ratios draw whole rounds, so that what a busy moment did
to both sides stays paired.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Times = NDArray[np.float64]  # ms, one per round
DRAWS = 400
LEVEL = 95  # percent of the draws that lie inside an interval


def summary(times_ms: Times) -> dict[str, float]:
    """Mean, median, tails and the smallest of one contestant's calls, in ms."""
    p50, p90, p99 = np.percentile(times_ms, (50, 90, 99)).tolist()
    return {"mean": float(times_ms.mean()), "p50": p50, "p90": p90, "p99": p99, "min": float(times_ms.min())}


def ratio(numerator: Times, denominator: Times, seed: int = 0) -> dict[str, float]:
    """``value``: ratio of the medians; ``low`` and ``high``: its bootstrap interval; ``means``: ratio of the means.

    Both of the same rounds, in order. Above 1: the denominator is faster.
    """
    rows = drawn_rounds(len(numerator), seed)
    draws = np.median(numerator[rows], axis=1) / np.median(denominator[rows], axis=1)
    value = float(np.median(numerator) / np.median(denominator))
    return _interval(value, draws) | {"means": float(numerator.mean() / denominator.mean())}


def efficiency(own: Times, policy: Times, full: Times, share: Times, seed: int = 0) -> dict[str, float]:
    """``(policy + share * full) / own``, round by round; its median with a bootstrap interval.

    ``share`` (rounds,): the part of the full network's FLOPs that the round's paths run, policy left out. 1: the time
    follows the FLOPs. ``means``: the same of the mean times.
    """
    ideal = policy + share * full
    each = ideal / own
    rows = drawn_rounds(len(own), seed)
    draws = np.median(each[rows], axis=1)
    return _interval(float(np.median(each)), draws) | {"means": float(ideal.mean() / own.mean())}


def drawn_rounds(rounds: int, seed: int = 0) -> NDArray[np.intp]:
    """Row numbers (DRAWS, rounds), drawn with replacement."""
    return np.random.default_rng(seed).integers(0, rounds, (DRAWS, rounds), dtype=np.intp)


def straight_line(x: Times, y: Times) -> dict[str, float]:
    """Least squares ``y = intercept + slope * x``, and the share of the variance that it explains (``r2``)."""
    slope, intercept = np.polyfit(x, y, 1)
    rest = y - (intercept + slope * x)
    spread = float(((y - y.mean()) ** 2).sum())
    r2 = 1.0 - float((rest**2).sum()) / spread if spread > 0 else 1.0
    return {"intercept": float(intercept), "slope": float(slope), "r2": r2}


def _interval(value: float, draws: Any) -> dict[str, float]:
    tail = (100 - LEVEL) / 2
    low, high = np.percentile(draws, (tail, 100 - tail)).tolist()
    return {"value": value, "low": low, "high": high}
