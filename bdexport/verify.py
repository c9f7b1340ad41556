"""Is what a bundle computes what its network computes? Parts and whole paths, compared with a reference session.

The reference is the torch model at build time, and the bundle's own graphs, run without any optimisation, where there
is no torch. Images are random pixels through the preprocessing; every part is given what the reference's parts before
it make of them under random masks, since a part's error depends on the range of its input.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from bdexport.backends import get_backend
from bdexport.backends.base import RunOptions, Session, default_device
from bdexport.bundle import Bundle, Manifest
from bdexport.bundle_checks import REBUILD
from bdexport.config import Tolerance, VerifyConfig
from bdexport.dataset import Dataset
from bdexport.errors import BundleError, UsageError, VerificationError
from bdexport.json_text import json_kind
from bdexport.parts import (
    FULL,
    HEAD,
    KEEP_THRESHOLD,
    POLICY,
    STEM,
    Masks,
    block_part,
    mask_from_text,
    mask_to_text,
    path_parts,
    shortcut_part,
)
from bdexport.runtime.executors import Chain, Executor, Fused
from bdexport.runtime.grouping import plan_batch
from bdexport.samples import CALIBRATION, samples_from_json
from bdexport.verify_accuracy import accuracy_report

if TYPE_CHECKING:
    from bdexport.models.pair import BlockDropNet

SCHEMA = "bdexport.verify/1"
SMALLEST_TOLERANCE = 1e-6  # for outputs that are zero throughout
Array = NDArray[np.float32]
Progress = Callable[[str, int, int], None]  # what is being done, steps done, steps in all


OWN = "policy's own"  # kind of mask: what the reference's policy draws for the images


@dataclass(frozen=True)
class Difference:
    """Largest and mean absolute difference from the reference, and the reference's largest value."""

    max_abs: float
    mean_abs: float
    scale: float
    mean_scale: float = 0.0  # the reference's mean absolute value


def difference(got: Array, expected: Array) -> Difference:
    """Compare two arrays of one shape; values that are not finite count as infinitely far away."""
    gap = np.abs(got.astype(np.float64) - expected.astype(np.float64))
    if got.shape != expected.shape or not np.isfinite(gap).all():
        return Difference(np.inf, np.inf, float(np.abs(expected).max()))
    values = np.abs(expected)
    return Difference(float(gap.max()), float(gap.mean()), float(values.max()), float(values.mean()))


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
    comparison = _Comparison(candidate, reference, manifest, config, tolerance, images, progress)
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


def kept_samples(manifest: Manifest) -> NDArray[np.uint8] | None:
    """Some of the images that a bundle's scales come from, uint8 (N, H, W, 3); None where it keeps none."""
    found = manifest.extra.get(CALIBRATION, {})
    if not isinstance(found, dict):
        where = f"manifest.json: extra.{CALIBRATION}"
        raise BundleError(where, got=json_kind(found), expected="an object", remedy=REBUILD)
    if "samples" not in found:
        return None
    return samples_from_json(found["samples"], manifest.preprocess.size)


def random_images(count: int, size: tuple[int, int], seed: int) -> NDArray[np.uint8]:
    """uint8 (count, height, width, 3): coarse random patches with noise on them, so that every scale is present."""
    generator = np.random.default_rng(seed)
    height, width = size
    coarse = generator.integers(0, 256, (count, -(-height // 8), -(-width // 8), 3))
    patches = coarse.repeat(8, axis=1).repeat(8, axis=2)[:, :height, :width]
    return np.clip(patches + generator.normal(0, 24, patches.shape), 0, 255).astype(np.uint8)


class _Comparison:
    """One run of :func:`compare`."""

    def __init__(
        self,
        candidate: Session,
        reference: Session,
        manifest: Manifest,
        config: VerifyConfig,
        tolerance: Tolerance,
        images: NDArray[np.uint8] | None,
        progress: Progress | None,
    ) -> None:
        self.candidate, self.reference, self.manifest = candidate, reference, manifest
        self.config, self.tolerance = config, tolerance
        self.progress: Progress = progress or (lambda _what, _done, _total: None)
        # Scales hold for what they were gathered from: other images and other paths are cut off, however good they are.
        self.calibrated_only = tolerance.of_mean
        if images is None:
            images = kept_samples(manifest) if self.calibrated_only else None
            if images is None and self.calibrated_only:
                raise VerificationError(
                    f"{manifest.name}: scales hold for images like those that they come from; the bundle keeps none",
                    got="no extra.calibration.samples in its manifest",
                    expected="up to 16 calibration images",
                    remedy="rebuild it with this version of bdexport",
                )
        if images is None:
            images = random_images(config.images, manifest.preprocess.size, config.seed)
        self.inputs = manifest.preprocess(images)
        self.batch = len(self.inputs) if manifest.max_batch is None else min(manifest.max_batch, len(self.inputs))
        self.generator = np.random.default_rng(config.seed)

    # ---- parts

    def parts(self) -> list[dict[str, Any]]:
        """One entry per part, in path order."""
        names = list(self.manifest.parts)
        entries: list[dict[str, Any]] = []
        for part, got, expected in self._part_outputs():
            self.progress("parts", len(entries), len(names))
            found = difference(got, expected)
            entries.append({"part": part} | self._entry(found, self._part_limit(part, found)))
        return sorted(entries, key=lambda entry: names.index(entry["part"]))

    def _part_limit(self, part: str, found: Difference) -> float:
        if part == FULL:
            return self._logit_limit(found)
        scale = found.mean_scale if self.tolerance.of_mean else found.scale
        return max(self.tolerance.part * (1.0 if part == POLICY else scale), SMALLEST_TOLERANCE)

    def _part_outputs(self) -> Iterator[tuple[str, Array, Array]]:
        """Every part with the candidate's and the reference's output for the reference's input."""
        for part in (POLICY, FULL):
            yield part, *self._both(part, self.inputs)
        got, x = self._both(STEM, self.inputs)
        yield STEM, got, x
        masks = self._own_masks() if self.calibrated_only else self._random_masks(len(x))
        masks[0] |= not self.calibrated_only
        for index in range(self.manifest.num_blocks):
            got, kept = self._both(block_part(index), x)
            yield block_part(index), *self._of(masks[:, index], got, kept)
            dropped = x
            if index in self.manifest.transitions:
                got, dropped = self._both(shortcut_part(index), x)
                yield shortcut_part(index), *self._of(~masks[:, index], got, dropped)
            x = np.where(masks[:, index, None, None, None], kept, dropped)
        yield HEAD, *self._both(HEAD, x)

    def _of(self, run: NDArray[np.bool_], got: Array, expected: Array) -> tuple[Array, Array]:
        """What is compared of a part: all images, or where only calibrated ones count, those that run it, if any do."""
        some = self.calibrated_only and bool(run.any())
        return (got[run], expected[run]) if some else (got, expected)

    def _own_masks(self) -> Masks:
        """The masks that the reference's policy draws, (N, K)."""
        masks: Masks = self._probabilities(self.reference) >= KEEP_THRESHOLD
        return masks

    def _both(self, part: str, x: Array) -> tuple[Array, Array]:
        return self._outputs(self.candidate, part, x), self._outputs(self.reference, part, x)

    def _outputs(self, session: Session, part: str, x: Array) -> Array:
        """One part on all of ``x``, in as many calls as the bundle's largest batch asks for."""
        pieces = [x[start : start + self.batch] for start in range(0, len(x), self.batch)]
        return np.concatenate([session.get(part, session.run(part, session.put(part, piece))) for piece in pieces])

    # ---- paths

    def paths(self) -> list[dict[str, Any]]:
        """One entry per kind of mask, with the worst mask of its kind."""
        entries: list[dict[str, Any]] = []
        kinds = self._kinds()
        total, done = sum(len(masks) for masks in kinds.values()), 0
        for kind, masks in kinds.items():
            rows = np.arange(len(masks)) % len(self.inputs)
            got, expected = [], []
            for row, mask in zip(rows, masks, strict=True):
                self.progress("paths", done, total)
                got.append(self._path(self.candidate, mask, self.inputs[row : row + 1]))
                expected.append(self._path(self.reference, mask, self.inputs[row : row + 1]))
                done += 1
            reference = np.concatenate(expected)
            entries.append(
                {"kind": kind, "count": len(masks)} | self._path_entry(np.concatenate(got), reference, masks)
            )
            if kind == (OWN if self.calibrated_only else "random"):
                grouped = self._grouped(Chain(self.candidate, self.manifest), masks, rows)
                entries.append(
                    {"kind": f"{kind}, as batches", "count": len(masks)} | self._path_entry(grouped, reference, masks)
                )
        return entries + self._fused_paths()

    def _fused_paths(self) -> list[dict[str, Any]]:
        """The fused paths' own engines, image by image and as mixed batches; nothing where there are none."""
        if Fused.unavailable(self.candidate, self.manifest) is not None or self.manifest.fused is None:
            return []
        executor, own = Fused(self.candidate, self.manifest), self.manifest.fused.masks(self.manifest.num_blocks)
        masks = np.concatenate([own, np.ones((1, self.manifest.num_blocks), bool), own])
        if self.calibrated_only:  # every block kept runs the full engine, which has scales of its own
            masks = masks[~masks.all(axis=1)]
        if len(masks) == 0:
            return []
        rows = np.arange(len(masks)) % len(self.inputs)
        pairs = list(zip(rows, masks, strict=True))
        # Where paths are no other image's, what one engine gives is held to what the parts' engines give.
        whole = self.candidate if self.calibrated_only else self.reference
        expected = np.concatenate([self._path(whole, mask, self.inputs[row : row + 1]) for row, mask in pairs])
        singly = [self._grouped(executor, mask[None], np.array([row])) for row, mask in pairs]
        batches = self._grouped(executor, masks, rows)
        kinds = {"fused paths": np.concatenate(singly), "fused paths, as batches": batches}
        return [
            {"kind": kind, "count": len(masks)} | self._path_entry(got, expected, masks) for kind, got in kinds.items()
        ]

    def _kinds(self) -> dict[str, Masks]:
        if self.calibrated_only:
            return {OWN: self._own_masks()}
        blocks = self.manifest.num_blocks
        texts = [item["mask"] for item in self.manifest.policy_statistics.get("masks", [])]
        frequent = [mask_from_text(text, blocks) for text in texts[: self.config.frequent_masks]]
        kinds = {
            "all kept": np.ones((1, blocks), bool),
            "all dropped": np.zeros((1, blocks), bool),
            "most frequent": np.array(frequent, bool).reshape(-1, blocks),
            "random": self._random_masks(self.config.random_masks),
            OWN: self._own_masks(),
        }
        return {kind: masks for kind, masks in kinds.items() if len(masks)}

    def _random_masks(self, count: int) -> Masks:
        """Every mask with a keep rate of its own, so that short paths and long ones occur."""
        rates = self.generator.random((count, 1))
        masks: Masks = self.generator.random((count, self.manifest.num_blocks)) < rates
        return masks

    def _path(self, session: Session, mask: Masks, x: Array) -> Array:
        parts = path_parts(mask.tolist(), self.manifest.transitions)
        return session.get(HEAD, session.run_path(parts, session.put(STEM, x)))

    def _grouped(self, executor: Executor, masks: Masks, rows: NDArray[np.intp]) -> Array:
        """The candidate's logits when the same images and masks come as batches, regrouped."""
        size, logits = self.batch, []
        for start in range(0, len(masks), size):
            plan = plan_batch(masks[start : start + size])
            batch = self.inputs[rows[start : start + size]]
            order = np.arange(len(batch)) if plan.order is None else plan.order
            out = self.candidate.get(HEAD, executor.run(self.candidate.put(STEM, batch[order]), plan))
            logits.append(out[np.argsort(order)])
        return np.concatenate(logits)

    def _path_entry(self, got: Array, expected: Array, masks: Masks) -> dict[str, Any]:
        found = difference(got, expected)
        worst = int(np.abs(got - expected).max(axis=1).argmax()) if got.shape == expected.shape else 0
        return self._entry(found, self._logit_limit(found)) | {"mask": mask_to_text(masks[worst])}

    def _entry(self, found: Difference, limit: float) -> dict[str, Any]:
        held = "mean_abs" if self.tolerance.of_mean else "max_abs"
        numbers = {"max_abs": found.max_abs, "mean_abs": found.mean_abs, "scale": found.scale}
        return numbers | {"held": held, "tolerance": limit, "ok": numbers[held] <= limit}

    def _logit_limit(self, found: Difference) -> float:
        if self.tolerance.of_mean:
            return max(self.tolerance.logits * found.mean_scale, SMALLEST_TOLERANCE)
        return self.tolerance.logits * max(1.0, found.scale / self.config.logit_scale)

    # ---- policy

    def policy(self) -> dict[str, Any]:
        """On how many images both sides decide alike. A probability within the tolerance of 0.5 may fall either way."""
        got, expected = self._probabilities(self.candidate), self._probabilities(self.reference)
        equal = ((got >= KEEP_THRESHOLD) == (expected >= KEEP_THRESHOLD)).all(axis=1)
        margin = float(np.abs(expected - KEEP_THRESHOLD).min())
        return {"images": len(equal), "masks_equal": int(equal.sum()), "smallest_margin": margin}

    def _probabilities(self, session: Session) -> Array:
        return self._outputs(session, POLICY, self.inputs)


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
