"""One comparison of two sessions: every part and whole paths on the same inputs, and how far apart they are.

For :mod:`bdexport.verify`, which says what is compared and judges it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bdexport.backends.base import Session
from bdexport.bundle import Manifest
from bdexport.bundle_checks import REBUILD
from bdexport.config import Tolerance, VerifyConfig
from bdexport.errors import BundleError, VerificationError
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

SMALLEST_TOLERANCE = 1e-6  # for outputs that are zero throughout
Array = NDArray[np.float32]
Progress = Callable[[str, int, int], None]  # what is being done, steps done, steps in all
OWN_PARTS = "its own parts"  # what fused paths of a calibrated bundle are held to
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


class Comparison:
    """One run of :func:`bdexport.verify.compare`."""

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
        held_to = {"against": OWN_PARTS} if self.calibrated_only else {}
        return [
            {"kind": kind, "count": len(masks)} | held_to | self._path_entry(got, expected, masks)
            for kind, got in kinds.items()
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
