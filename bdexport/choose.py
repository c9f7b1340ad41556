"""Which executor ``auto`` means for a bundle: measured when it is built, on masks as they occur, executors in turn."""

from __future__ import annotations

from collections.abc import Sequence
from time import monotonic, perf_counter_ns
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bdexport.backends.base import Session
from bdexport.bench.measure import without_garbage_collection
from bdexport.bundle import Bundle
from bdexport.config import ChoiceConfig
from bdexport.parts import FULL, POLICY, Masks
from bdexport.runtime import Orchestrator
from bdexport.runtime.decide import masks_from_probabilities
from bdexport.runtime.executors import usable_executors

WARM_UP_CALLS, FEWEST_CALLS, TIMED_CALLS = 8, 3, 64
POLICY_BATCH = 250  # images that the policy sees at a time


def policy_masks(session: Session, inputs: NDArray[np.float32], max_batch: int | None) -> Masks:
    """The masks (N, K) that the bundle's own policy engine draws for preprocessed images (N, 3, H, W)."""
    step = min(POLICY_BATCH, max_batch or POLICY_BATCH)
    pieces = [inputs[start : start + step] for start in range(0, len(inputs), step)]
    decided = [session.get(POLICY, session.run(POLICY, session.put(POLICY, piece))) for piece in pieces]
    return masks_from_probabilities(np.concatenate(decided))


def choose(
    bundle: Bundle, session: Session, images: NDArray[np.uint8], masks: Masks, config: ChoiceConfig | None = None
) -> dict[str, Any]:
    """``{"choice", "reason", "measured"}`` for the manifest.

    ``images`` uint8 (N, H, W, 3), fitted; ``masks`` (N, K) are forced on them: the policy would take the
    same time on every side. ``session`` has the fused paths loaded. Times are medians in ms per call.
    """
    config = config or ChoiceConfig()
    names = usable_executors(session, bundle.manifest)
    if len(names) == 1:
        return {"choice": names[0], "reason": "the only executor that this bundle and its backend have"}
    sides = {name: Orchestrator(bundle, session, name) for name in names}
    most = min(len(images), bundle.manifest.max_batch or len(images))
    measured = [
        _measured(sides, images, masks, min(batch, most), calls, config.seconds)
        for batch, calls in ((1, config.single_calls), (config.batch, config.batch_calls))
    ]
    choice, reason = decision(measured, config.worth)
    return {"choice": choice, "reason": reason, "measured": measured, "threads": session.threads}


def policy_times(session: Session, image: NDArray[np.float32], seconds: float) -> dict[str, float]:
    """``{"policy_ms", "full_ms"}``: medians of the two engines at batch 1, in turn; ``image`` (1, 3, H, W)."""
    times: dict[str, list[float]] = {POLICY: [], FULL: []}
    until = monotonic() + seconds
    with without_garbage_collection():
        for number in range(WARM_UP_CALLS + TIMED_CALLS):
            for part, own in times.items():
                begin = perf_counter_ns()
                session.get(part, session.run(part, session.put(part, image)))
                if number >= WARM_UP_CALLS:
                    own.append((perf_counter_ns() - begin) / 1e6)
            if monotonic() > until and number >= WARM_UP_CALLS + FEWEST_CALLS:
                break
    return {f"{part}_ms": float(np.median(own)) for part, own in times.items()}


def decision(measured: Sequence[dict[str, Any]], worth: float) -> tuple[str, str]:
    """The executor with the lowest mean of times relative to ``chain``'s, and the reason; ``chain`` unless worth it.

    ``measured``: per batch ``{"batch", "calls", "ms": {executor: ms}}``.
    """
    names = list(measured[0]["ms"])
    relative = {name: float(np.mean([row["ms"][name] / row["ms"]["chain"] for row in measured])) for name in names}
    best = min(names, key=lambda name: relative[name])
    choice = best if relative[best] <= 1 - worth else "chain"
    times = "; ".join(
        f"batch {row['batch']}: " + ", ".join(f"{name} {row['ms'][name]:.3f} ms" for name in names) for row in measured
    )
    return choice, f"measured when it was built, network alone: {times}"


def _measured(
    sides: dict[str, Orchestrator],
    images: NDArray[np.uint8],
    masks: Masks,
    batch: int,
    calls: int,
    seconds: float,
) -> dict[str, Any]:
    """Medians of ``calls`` calls of every side, in turn and each first as often; fewer where ``seconds`` run out.

    But for ``FEWEST_CALLS``: a single call on a busy machine is no measurement.
    """
    starts = range(0, len(images) - batch + 1, batch)
    times: dict[str, list[float]] = {name: [] for name in sides}
    warm = min(len(starts), calls, WARM_UP_CALLS)
    with without_garbage_collection():
        until = monotonic() + seconds
        for number in range(warm + calls):
            start = starts[number % len(starts)]
            order = list(sides)[:: 1 if number % 2 else -1]
            for name in order:
                begin = perf_counter_ns()
                sides[name](images[start : start + batch], masks=masks[start : start + batch])
                elapsed = (perf_counter_ns() - begin) / 1e6
                if number >= warm:
                    times[name].append(elapsed)
            if monotonic() > until and number + 1 >= warm + min(FEWEST_CALLS, calls):
                break
    return {
        "batch": batch,
        "calls": min(len(values) for values in times.values()),
        "ms": {name: float(np.median(values)) for name, values in times.items()},
    }
