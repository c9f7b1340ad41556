"""Which images are held out: stratified, seeded, and the same on every machine and in every version of numpy.

Each image gets a 64-bit key, in the order of the data, from the PCG64 bit stream of the seed; in each class the images
with the smallest keys go to the test part (where the data have none of their own), the next to validation, the rest to
train. numpy promises that a bit generator's stream never changes (NEP 19); for ``Generator.permutation`` it does not.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from bdexport.config import DatasetConfig
from bdexport.errors import UsageError

Indices = NDArray[np.intp]


@dataclass(frozen=True)
class SplitSettings:
    """``validation_share`` of the images that are not a test set of the data's own; ``seed`` of the keys."""

    validation_share: float = DatasetConfig.validation_share
    seed: int = DatasetConfig.seed

    def __post_init__(self) -> None:
        if not 0 < self.validation_share < 1:
            raise UsageError("validation share", got=self.validation_share, expected="more than 0, less than 1")
        if self.seed < 0:
            raise UsageError("seed of the split", got=self.seed, expected="0 or more")


def split_rows(labels: NDArray[np.int64], shares: Sequence[float], seed: int) -> list[Indices]:
    """Disjoint row indices, ascending: one stratified part for each share of all rows, then the rest.

    A part has ceil(share x N) rows, shared among the classes in proportion (largest remainder, lower class first); it
    has more only so that each class of three or more rows is in it. Raises :class:`UsageError` if nothing is left.
    """
    if sum(shares) >= 1:
        raise UsageError(
            "shares of the data that are held out",
            got=f"{sum(shares):g}",
            expected="less than 1 in all",
            remedy="lower validation_share (or the test's share, where the data set has no test split of its own)",
        )
    keys = np.random.PCG64(seed).random_raw(len(labels))
    by_class = [rows[np.argsort(keys[rows], kind="stable")] for rows in _rows_by_class(labels)]
    counts = np.array([len(rows) for rows in by_class])
    taken = np.zeros_like(counts)
    parts = []
    for share in shares:
        quota = np.minimum(_quotas(counts, share), counts - taken)
        parts.append(_joined(rows[t : t + q] for rows, t, q in zip(by_class, taken, quota, strict=True)))
        taken = taken + quota
    return [*parts, _joined(rows[t:] for rows, t in zip(by_class, taken, strict=True))]


def _rows_by_class(labels: NDArray[np.int64]) -> list[Indices]:
    return [np.flatnonzero(labels == label) for label in np.unique(labels)]


def _quotas(counts: Indices, share: float) -> Indices:
    """Rows of each class for one part: in proportion, ceil(share x N) in all."""
    total = int(np.ceil(round(share * counts.sum(), 6)))  # round: 0.1 x N must not become N / 10 + 1
    exact = counts * (total / counts.sum())
    quota = np.floor(exact + 1e-9).astype(np.intp)
    largest_remainder = np.argsort(quota - exact, kind="stable")
    quota[largest_remainder[: total - quota.sum()]] += 1
    return np.where((quota == 0) & (counts >= 3), 1, quota)


def _joined(pieces: Iterable[Indices]) -> Indices:
    return np.sort(np.concatenate(list(pieces)))
