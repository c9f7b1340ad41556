"""Mask quantisation, measured: which fused path may run instead of a mask, and what that costs in accuracy.

Every target runs on every calibration image once; tables for any number of targets and both rules follow from that
matrix without running anything again. Accuracies are the calibration images' own: with few images, or with targets
chosen by accuracy (``budget``), they flatter; check on a test set with ``bdexport bench``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from time import perf_counter_ns
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bdexport.backends.base import Session
from bdexport.bench.measure import without_garbage_collection
from bdexport.bench.results import path_flops
from bdexport.bundle import Bundle, Manifest
from bdexport.errors import UsageError
from bdexport.mask_map import BUDGET, COVER, MaskMapping, cover_target
from bdexport.parts import Masks, mask_to_text
from bdexport.runtime import Orchestrator
from bdexport.runtime.executors import Fused

Correct = NDArray[np.bool_]
RUN_BATCH = 64
LATENCY_CALLS, WARM_UP = 64, 8  # of each row of the table


@dataclass(frozen=True, eq=False)
class Observed:
    """What the calibration images gave. N images, T targets, most frequent first, the full network last.

    ``masks`` bool (N, K), the policy's; ``own`` bool (N,): right under them; ``targets`` bool (T, K); ``correct`` bool
    (N, T): right under each target; ``target_flops`` (T,), ``mask_flops`` (N,): of one image, policy included.
    """

    masks: Masks
    own: Correct
    targets: Masks
    correct: Correct
    target_flops: NDArray[np.float64]
    mask_flops: NDArray[np.float64]


def observe(
    run: Callable[[NDArray[np.float32], Masks], NDArray[np.float32]],
    inputs: NDArray[np.float32],
    labels: NDArray[np.int64],
    masks: Masks,
    fused: Masks,
    manifest: Manifest,
    progress: Callable[[int, int], None],
) -> Observed:
    """Run the policy's ``masks`` and every target. ``run``: preprocessed images and masks (N, K) -> logits."""
    targets = np.concatenate([fused, np.ones((1, fused.shape[1]), bool)])
    step = min(RUN_BATCH, manifest.max_batch or RUN_BATCH)

    def right(chosen: Masks) -> Correct:
        starts = range(0, len(inputs), step)
        logits = [run(inputs[start : start + step], chosen[start : start + step]) for start in starts]
        correct: Correct = np.concatenate(logits).argmax(axis=1) == labels
        return correct

    own = right(masks)
    columns = []
    for number, target in enumerate(targets):
        progress(number, len(targets))
        columns.append(right(np.broadcast_to(target, masks.shape)))
    progress(len(targets), len(targets))
    return Observed(
        masks, own, targets, np.stack(columns, axis=1), path_flops(targets, manifest), path_flops(masks, manifest)
    )


def quantised(observed: Observed, paths: int, rule: str, budget: float) -> tuple[MaskMapping, NDArray[np.int64]]:
    """The mapping to the ``paths`` most frequent targets and the full network, and each image's target, (N,).

    ``budget``: points of accuracy that rule ``budget`` may lose against the policy's own masks.
    """
    full = len(observed.targets) - 1
    few = range(min(paths, full))
    cheapest = [*sorted(few, key=lambda number: (observed.target_flops[number], number)), full]
    targets = observed.targets[cheapest]
    rows, inverse = np.unique(observed.masks, axis=0, return_inverse=True)
    inverse = inverse.reshape(-1)
    chosen = np.array([cover_target(row, targets) for row in rows])
    seen: dict[str, str] = {}
    if rule == BUDGET:
        chosen = _within(observed, cheapest, inverse, chosen, budget)
        seen = {mask_to_text(row): mask_to_text(targets[target]) for row, target in zip(rows, chosen, strict=True)}
    elif rule != COVER:
        raise UsageError("mask quantisation", got=repr(rule), expected=f"{COVER} or {BUDGET}")
    mapping = MaskMapping(rule, tuple(mask_to_text(target) for target in targets), seen)
    return mapping, np.array(cheapest)[chosen[inverse]]


def _within(
    observed: Observed, cheapest: Sequence[int], inverse: NDArray[np.intp], start: NDArray[np.int64], budget: float
) -> NDArray[np.int64]:
    """Each distinct mask's target: moves to cheaper ones, most saved per image lost first, within the budget."""
    groups = len(start)
    images = np.bincount(inverse, minlength=groups)
    right = np.zeros((groups, len(cheapest)))
    np.add.at(right, inverse, observed.correct[:, list(cheapest)])
    own = int(observed.own.sum())
    allowed = own - budget / 100 * len(inverse)
    flops = observed.target_flops[list(cheapest)]
    chosen, every = start.copy(), np.arange(groups)
    while True:
        lost = right[every, chosen][:, None] - right
        saved = (flops[chosen][:, None] - flops) * images[:, None]
        fits = (saved > 0) & (right[every, chosen].sum() - lost >= allowed)
        if not fits.any():
            return chosen
        # A move that loses nothing comes before any that does; among those, the larger saving first.
        value = np.where(fits, np.where(lost <= 0, saved * 1e9, saved / np.maximum(lost, 1e-9)), -np.inf)
        group, target = np.unravel_index(int(value.argmax()), value.shape)
        chosen[group] = target


def table_row(observed: Observed, paths: int, rule: str, budget: float) -> dict[str, Any]:
    """What quantising to ``paths`` fused paths gives on the calibration images; ``coverage``: without it."""
    mapping, target = quantised(observed, paths, rule, budget)
    kept = observed.targets[target].sum(axis=1)
    known = set(mapping.targets)
    hit = np.array([mask_to_text(mask) in known for mask in observed.masks])
    right = observed.correct[np.arange(len(target)), target]
    return {
        "paths": len(mapping.targets) - 1,
        "rule": rule,
        "accuracy": float(100 * right.mean()),
        "coverage": float(hit.mean()),
        "full_share": float((target == len(observed.targets) - 1).mean()),
        "blocks": float(kept.mean()),
        "flops": float(observed.target_flops[target].mean()),
    }


def unquantised_row(observed: Observed, paths: int) -> dict[str, Any]:
    """The same for the policy's masks as they are, with ``paths`` fused paths."""
    fused = {mask_to_text(mask) for mask in (*observed.targets[:paths], observed.targets[-1])}
    return {
        "paths": min(paths, len(observed.targets) - 1),
        "rule": "off",
        "accuracy": float(100 * observed.own.mean()),
        "coverage": float(np.mean([mask_to_text(mask) in fused for mask in observed.masks])),
        "full_share": float(observed.masks.all(axis=1).mean()),
        "blocks": float(observed.masks.sum(axis=1).mean()),
        "flops": float(observed.mask_flops.mean()),
    }


class QuantisationTable:
    """Rows for several numbers of fused paths, with latencies: what a user chooses from.

    ``bundle``'s manifest and ``session`` have the largest number of paths; ``images`` uint8 (N, H, W, 3), fitted.
    """

    def __init__(
        self,
        bundle: Bundle,
        session: Session,
        images: NDArray[np.uint8],
        labels: NDArray[np.int64],
        masks: Masks,
    ) -> None:
        self._bundle, self._session, self._images, self._labels, self._masks = bundle, session, images, labels, masks
        if bundle.manifest.fused is None:
            raise UsageError(f"{bundle.path}: no fused paths to map masks to", remedy="build it with --fused N")
        self._fused = bundle.manifest.fused
        self._observed: Observed | None = None

    @property
    def paths(self) -> int:
        """The largest number of paths that there can be."""
        return len(self._fused.paths)

    def observe(self, progress: Callable[[int, int], None]) -> None:
        """Run what the rows follow from."""
        manifest = self._bundle.manifest
        run = self._orchestrator(self.paths, None)
        self._observed = observe(
            lambda inputs, masks: run(inputs, masks=masks).logits,
            manifest.preprocess(self._images),
            self._labels,
            self._masks,
            self._fused.masks(manifest.num_blocks),
            manifest,
            progress,
        )

    def mapping(self, paths: int, rule: str, budget: float) -> tuple[MaskMapping, dict[str, Any]]:
        """The mapping for so many paths and its row, without a latency."""
        observed = self._seen()
        return quantised(observed, paths, rule, budget)[0], table_row(observed, paths, rule, budget)

    def rows(self, numbers: Sequence[int], rule: str, budget: float) -> list[dict[str, Any]]:
        """For each number of paths, the masks as they are, ``cover``, and ``budget`` where ``rule`` is that.

        ``latency_ms``: median of batch 1, policy included; all rows in turn on the same images.
        """
        observed, rules = self._seen(), (COVER,) if rule == COVER else (COVER, BUDGET)
        rows, sides = [], []
        for number in numbers:
            rows.append(unquantised_row(observed, number))
            sides.append(self._orchestrator(number, None))
            for each in rules:
                mapping, row = self.mapping(number, each, budget)
                rows.append(row)
                sides.append(self._orchestrator(number, mapping))
        times: list[list[float]] = [[] for _ in sides]
        calls = min(LATENCY_CALLS, len(self._images))
        with without_garbage_collection():
            for number in range(-WARM_UP, calls):
                image = self._images[number % calls : number % calls + 1]
                for side, own in zip(sides, times, strict=True):
                    begin = perf_counter_ns()
                    side(image)
                    if number >= 0:
                        own.append((perf_counter_ns() - begin) / 1e6)
        return [row | {"latency_ms": float(np.median(own))} for row, own in zip(rows, times, strict=True)]

    def _orchestrator(self, paths: int, mapping: MaskMapping | None) -> Orchestrator:
        fused = replace(self._fused, paths=self._fused.paths[:paths])
        manifest = replace(self._bundle.manifest, fused=fused, mask_mapping=mapping)
        return Orchestrator(Bundle(self._bundle.path, manifest), self._session, Fused.name)

    def _seen(self) -> Observed:
        if self._observed is None:
            raise UsageError("quantisation table", got="nothing observed", remedy="call observe() first")
        return self._observed
