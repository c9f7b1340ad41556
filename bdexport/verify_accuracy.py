"""What a precision costs in accuracy: a bundle's engines against a reference session, on the same labelled images."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from bdexport.backends.base import Session
from bdexport.bundle import Manifest
from bdexport.dataset import Dataset
from bdexport.errors import UsageError, VerificationError
from bdexport.parts import FULL, HEAD, POLICY, STEM, Masks
from bdexport.runtime.decide import masks_from_probabilities
from bdexport.runtime.executors import Chain
from bdexport.runtime.grouping import plan_batch

BATCH = 64
DYNAMIC = "dynamic"


def accuracy_report(
    candidate: Session, reference: Session, manifest: Manifest, dataset: Dataset, max_drop: float
) -> dict[str, Any]:
    """Accuracy (percent) of both sessions on ``dataset``, dynamic and full, as a JSON object.

    ``ok``: no drop is too large. Each side decides by its own policy. ``masks_equal``: share of the images for which
    both decide alike. One image is no drop that is too large, however few there are, unless ``max_drop`` is 0. Raises
    :class:`UsageError` for a limit below 0.
    """
    if not max_drop >= 0:
        raise UsageError("largest drop of accuracy", got=max_drop, expected="0 points or more")
    images = dataset.arrays(manifest.preprocess)
    ours, theirs = (_classified(session, manifest, images) for session in (candidate, reference))
    result: dict[str, Any] = {
        "dataset": {"name": dataset.name, "split": dataset.split},
        "images": len(dataset),
        "max_drop": max(max_drop, 100 / len(dataset)) if max_drop > 0 else 0.0,
        "masks_equal": float((ours[2] == theirs[2]).all(axis=1).mean()),
    }
    for index, kind in enumerate((DYNAMIC, FULL)):
        got, expected = (float(100 * (side[index] == dataset.labels).mean()) for side in (ours, theirs))
        result[kind] = {"accuracy": got, "reference": expected, "drop": expected - got}
    # Accuracies are rounded: a drop of just one image must not fail by the last bit.
    result["ok"] = all(result[kind]["drop"] <= result["max_drop"] + 1e-9 for kind in (DYNAMIC, FULL))
    return result


def require_accuracy(report: dict[str, Any], name: str) -> None:
    """Raise :class:`VerificationError` for a report of :func:`accuracy_report` that is not ``ok``."""
    if report["ok"]:
        return
    kind = max((DYNAMIC, FULL), key=lambda kind: float(report[kind]["drop"]))
    found = report[kind]
    raise VerificationError(
        f"{name}: accuracy ({kind}) on {report['images']} images of {report['dataset']['name']} falls too far",
        got=f"{found['accuracy']:.2f} % against {found['reference']:.2f} %",
        expected=f"at most {report['max_drop']:.3g} points less",
        remedy="calibrate with more images, take another precision, or set --max-drop",
    )


def accuracy_text(report: dict[str, Any]) -> str:
    """One line for people."""
    kinds = (
        f"{kind} {report[kind]['accuracy']:.2f} % (reference {report[kind]['reference']:.2f} %)"
        for kind in (DYNAMIC, FULL)
    )
    where = f"{report['images']} images of {report['dataset']['name']} {report['dataset']['split']}"
    return f"accuracy on {where}: {', '.join(kinds)}; the same mask for {report['masks_equal']:.1%}"


def _classified(
    session: Session, manifest: Manifest, images: NDArray[np.uint8]
) -> tuple[NDArray[np.intp], NDArray[np.intp], Masks]:
    """Classes under the session's own policy, classes of the full network, masks."""
    chain = Chain(session, manifest)
    size = BATCH if manifest.max_batch is None else min(BATCH, manifest.max_batch)
    dynamic, full, masks = [], [], []
    for start in range(0, len(images), size):
        x = manifest.preprocess.normalise(images[start : start + size])
        decided = masks_from_probabilities(session.get(POLICY, session.run(POLICY, session.put(POLICY, x))))
        plan = plan_batch(decided)
        order = np.arange(len(x)) if plan.order is None else plan.order
        logits = session.get(HEAD, chain.run(session.put(STEM, x[order]), plan))
        dynamic.append(logits[np.argsort(order)].argmax(axis=1))
        full.append(session.get(FULL, session.run(FULL, session.put(FULL, x))).argmax(axis=1))
        masks.append(decided)
    return np.concatenate(dynamic), np.concatenate(full), np.concatenate(masks)
