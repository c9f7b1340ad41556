"""Is what a bundle computes what its network computes? Parts and whole paths, compared with a reference session.

The reference is the torch model at build time, and the bundle's own graphs, run without any optimisation, where there
is no torch. Images are random pixels through the preprocessing; every part is given what the reference's parts before
it make of them under random masks, since a part's error depends on the range of its input.
"""

from __future__ import annotations

from contextlib import closing
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from bdexport.backends import get_backend
from bdexport.backends.base import RunOptions, Session, default_device
from bdexport.bundle import Bundle, Manifest
from bdexport.config import Tolerance, VerifyConfig
from bdexport.dataset import Dataset
from bdexport.errors import UsageError, VerificationError
from bdexport.verify_accuracy import accuracy_report
from bdexport.verify_comparison import Comparison, Progress

if TYPE_CHECKING:
    from bdexport.models.pair import BlockDropNet

SCHEMA = "bdexport.verify/1"


def compare(
    candidate: Session,
    reference: Session,
    manifest: Manifest,
    *,
    config: VerifyConfig | None = None,
    reference_name: str = "reference",
    images: NDArray[np.uint8] | None = None,
    progress: Progress | None = None,
    judged: Dataset | None = None,
) -> dict[str, Any]:
    """Compare two sessions of one network; the result is a JSON object, ``ok`` says whether all held.

    ``images`` (uint8 (N, h, w, 3)) replace the random ones. ``judged``: labelled images; the result has ``accuracy``
    then (:func:`bdexport.verify_accuracy.accuracy_report`), which ``ok`` does not cover. Raises :class:`UsageError` for
    a precision without a tolerance.
    """
    config = config or VerifyConfig()
    tolerance = _tolerance(config, manifest.precision)
    comparison = Comparison(candidate, reference, manifest, config, tolerance, images, progress)
    parts, paths, policy = comparison.parts(), comparison.paths(), comparison.policy()
    accuracy = None
    if judged is not None:
        accuracy = accuracy_report(candidate, reference, manifest, judged, config.max_accuracy_drop)
    return {
        "schema": SCHEMA,
        "ok": all(entry["ok"] for entry in parts) and all(entry["ok"] for entry in paths),
        "reference": reference_name,
        "backend": manifest.backend,
        "precision": manifest.precision,
        "images": len(comparison.inputs),
        "seed": config.seed,
        "tolerance": {"part": tolerance.part, "logits": tolerance.logits},
        "parts": parts,
        "worst_part": max(parts, key=_badness)["part"],
        "paths": paths,
        "worst_path": max(paths, key=_badness)["kind"],
        "max_logit_difference": max(entry["max_abs"] for entry in paths),
        "policy": policy,
        "accuracy": accuracy,
    }


def verify_against_graphs(
    bundle: Bundle,
    *,
    config: VerifyConfig | None = None,
    threads: int | None = None,
    device: str | None = None,
    progress: Progress | None = None,
    judged: Dataset | None = None,
) -> dict[str, Any]:
    """The bundle's engines against its own graphs, run by ONNX Runtime with every optimisation off; needs no torch.

    ``judged`` as in :func:`compare`.
    """
    from bdexport.backends.onnxruntime import open_graphs

    get_backend("onnxruntime")  # the reference; says what to install where it is missing
    with _opened(bundle, threads, device) as candidate, closing(open_graphs(bundle)) as reference:
        return compare(
            candidate,
            reference,
            bundle.manifest,
            config=config,
            reference_name="graphs",
            progress=progress,
            judged=judged,
        )


def verify_against_model(
    bundle: Bundle,
    model: BlockDropNet,
    *,
    config: VerifyConfig | None = None,
    threads: int | None = None,
    device: str | None = None,
    progress: Progress | None = None,
    judged: Dataset | None = None,
) -> dict[str, Any]:
    """The bundle's engines against the torch model that they are built from; ``judged`` as in :func:`compare`."""
    from bdexport.backends.torch import session_from_model

    with (
        _opened(bundle, threads, device) as candidate,
        closing(session_from_model(bundle.manifest, model)) as reference,
    ):
        return compare(
            candidate,
            reference,
            bundle.manifest,
            config=config,
            reference_name="torch",
            progress=progress,
            judged=judged,
        )


def require(report: dict[str, Any]) -> None:
    """Raise :class:`VerificationError` naming the worst part or path of a report that is not ``ok``."""
    if report["ok"]:
        return
    worst = max([*report["parts"], *report["paths"]], key=_badness)
    name = worst.get("part") or f"path ({worst['kind']}, mask {worst['mask']})"
    raise VerificationError(
        f"{name} [{report['backend']}]: differs from {report['reference']}",
        got=f"{worst['max_abs']:.2e} (mean {worst['mean_abs']:.2e})",
        expected=f"at most {worst['tolerance']:.1e}{' in the mean' * (worst['held'] == 'mean_abs')}",
        remedy="do not use these engines; rebuild, and report it if it stays",
    )


def with_tolerance(config: VerifyConfig, precision: str, logits: float | None) -> VerifyConfig:
    """``config`` with another tolerance for the logits; None leaves it alone."""
    if logits is None:
        return config
    if not logits > 0:
        raise UsageError("tolerance", got=logits, expected="a positive number")
    changed = replace(_tolerance(config, precision), logits=logits)
    return replace(config, tolerances=config.tolerances | {precision: changed})


def _badness(entry: dict[str, Any]) -> float:
    badness: float = entry[entry["held"]] / entry["tolerance"]
    return badness


def _tolerance(config: VerifyConfig, precision: str) -> Tolerance:
    if precision not in config.tolerances:
        known = ", ".join(config.tolerances)
        remedy = "rebuild the bundle in one of these with `bdexport build --precision P`"
        raise UsageError("no tolerance is set for this precision", got=precision, expected=known, remedy=remedy)
    return config.tolerances[precision]


def _opened(bundle: Bundle, threads: int | None, device: str | None) -> closing[Session]:
    backend = get_backend(bundle.manifest.backend)
    if not backend.computes:
        what = f"{bundle.path}: backend {backend.name} computes nothing, so there is nothing to verify"
        raise UsageError(what, remedy="build it for another backend")
    return closing(backend.open(bundle, RunOptions(device or default_device(backend), threads, fused=True)))
