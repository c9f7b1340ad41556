"""The build's last steps: which masks become fused paths, and which executor ``auto`` means."""

from __future__ import annotations

from contextlib import closing
from dataclasses import replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bdexport.backends.base import Backend, FusedSession, RunOptions, Session, fuses_paths
from bdexport.bundle import Bundle, Manifest
from bdexport.choose import choose, policy_masks, policy_times
from bdexport.config import ChoiceConfig, FusedConfig
from bdexport.dataset import Dataset, check_classes
from bdexport.errors import BuildError, UsageError
from bdexport.export import Progress
from bdexport.fused import (
    MOST_FUSED,
    FusedPaths,
    MaskCounts,
    choose_fused,
    counts_of_masks,
    counts_of_statistics,
    sampled_masks,
)
from bdexport.mask_map import RULES, MaskMapper
from bdexport.parts import Masks
from bdexport.quantise import QuantisationTable
from bdexport.verify_comparison import random_images

NOT_COUNTED = "no fused paths: the checkpoint counts no masks in its policy statistics"
NOT_COUNTED_REMEDY = "pass --dataset and --data, whose validation split is used"


def check_fusing(config: FusedConfig, backend: Backend) -> None:
    """Raises UsageError for numbers that cannot be, and for fused paths of a backend that runs none."""
    if config.paths is not None and not 1 <= config.paths <= MOST_FUSED:
        remedy = f"leave it out for as many as cover {config.coverage:.0%} of the images"
        raise UsageError("--fused", got=config.paths, expected=f"1..{MOST_FUSED} paths", remedy=remedy)
    if config.paths is not None and not fuses_paths(backend):
        what = f"--fused: backend {backend.name} runs no fused paths"
        raise UsageError(what, remedy="leave --fused out, or build for onnxruntime or openvino")
    if config.max_bundle_mb is not None and not config.max_bundle_mb > 0:
        remedy = "leave it out for a bundle of any size"
        raise UsageError("--max-bundle-mb", got=config.max_bundle_mb, expected="a positive number", remedy=remedy)
    if config.quantise is not None and config.quantise not in RULES:
        raise UsageError("--quantise-masks", got=repr(config.quantise), expected=" or ".join(RULES))
    if config.quantise is not None and not fuses_paths(backend):
        what = f"--quantise-masks: backend {backend.name} runs no fused paths"
        raise UsageError(what, remedy="leave --quantise-masks out, or build for onnxruntime or openvino")
    if not 0 <= config.accuracy_budget <= 100:
        raise UsageError("--accuracy-budget", got=config.accuracy_budget, expected="points of accuracy, 0..100")
    if config.accuracy_budget != FusedConfig.accuracy_budget and config.quantise != "budget":
        remedy = "pass --quantise-masks budget, or leave it out"
        raise UsageError("--accuracy-budget has no effect without masks that lose accuracy", remedy=remedy)
    if config.mask_images < 1:
        raise UsageError("--mask-images", got=config.mask_images, expected="at least 1")


def check_static(config: FusedConfig) -> None:
    """Raises UsageError for what has no effect on a bundle of one mask."""
    if config.quantise is not None:
        raise UsageError("--quantise-masks has no effect with one fixed mask", remedy="leave it out")


def bundle_bytes(manifest: Manifest) -> int:
    """Bytes of all files but the manifest."""
    return sum(entry.bytes for entry in manifest.files())


def check_size(manifest: Manifest, most_mb: float | None) -> None:
    """Raises BuildError where the parts alone are larger than the budget, in 10^6 bytes."""
    size = bundle_bytes(manifest)
    if most_mb is not None and size > most_mb * 1e6:
        raise BuildError(
            "the bundle is larger than --max-bundle-mb without any fused path",
            got=f"{size / 1e6:.1f} MB in {len(manifest.parts)} parts",
            expected=f"at most {most_mb:g} MB",
            remedy=f"allow --max-bundle-mb {np.ceil(size / 1e5) / 10:g}: fused paths add no files to it",
        )


class Fusing:
    """One build's choice; ``notes`` and ``costs`` (see :class:`bdexport.build.BuiltBundle`) say what came of it."""

    def __init__(
        self, bundle: Bundle, backend: Backend, config: FusedConfig, calibration: Dataset | None, report: Progress
    ) -> None:
        self.bundle, self.backend, self.config, self.report = bundle, backend, config, report
        self.calibration = None if calibration is None else _checked(calibration, bundle.manifest, config)
        self.notes: list[str] = []
        self.table: list[dict[str, Any]] = []
        self.costs: dict[str, Any] | None = None
        self.times: dict[str, float] | None = None  # of the policy's and the full network's engine, where measured

    def with_paths(self) -> Manifest:
        """The manifest with its fused paths; as it was, with a note, where none can be."""
        manifest = self.bundle.manifest
        if not fuses_paths(self.backend):
            return manifest
        counts = self._counts
        if counts is None:
            if self.config.paths is not None:
                raise UsageError(f"--fused {self.config.paths}: {NOT_COUNTED}", remedy=NOT_COUNTED_REMEDY)
            self.notes.append(f"{NOT_COUNTED}; {NOT_COUNTED_REMEDY}")
            return manifest
        fused = self._chosen(counts)
        if self.config.paths is not None and len(fused.paths) < self.config.paths:
            self.notes.append(f"--fused {self.config.paths}: only {len(fused.paths)} masks that drop a block occur")
        return replace(manifest, fused=fused)

    def with_mapping(self, manifest: Manifest) -> Manifest:
        """The manifest with the mapping that ``config.quantise`` asks for; :attr:`table` says what it costs."""
        rule = self.config.quantise
        if rule is None:
            return manifest
        calibration, counts, fused = self.calibration, self._counts, manifest.fused
        if calibration is None or counts is None or fused is None:
            raise UsageError("--quantise-masks needs images with labels", remedy="pass --dataset and --data")
        most = max(*self.config.table, len(fused.paths))
        wide = replace(manifest, fused=choose_fused(counts, most, self.config.coverage, most))
        bundle = Bundle(self.bundle.path, wide)
        with closing(self.backend.open(bundle, RunOptions(fused=True))) as session:
            _prepare(session, self.backend)
            table = QuantisationTable(bundle, session, self._pixels, calibration.labels, self._masks)
            table.observe(lambda done, total: self.report("targets", done, total))
            numbers = [number for number in self.config.table if number < table.paths] + [table.paths]
            self.table = table.rows(sorted({*numbers, len(fused.paths)}), rule, self.config.accuracy_budget)
        mapping, row = table.mapping(len(fused.paths), rule, self.config.accuracy_budget)
        facts = {"images": len(calibration), "split": calibration.split, "accuracy_budget": self.config.accuracy_budget}
        return replace(manifest, mask_mapping=replace(mapping, facts=facts | row))

    def with_executor(self, manifest: Manifest) -> Manifest:
        """The manifest with the executor that ``auto`` means, measured unless ``config.measure`` is off."""
        if manifest.fused is None or not manifest.fused.paths:
            only = {"choice": "chain", "reason": "one engine per part; this bundle holds no fused paths"}
            return replace(manifest, executor=only)
        self.report("executors", 0, 1)
        bundle = Bundle(self.bundle.path, manifest)
        size = bundle_bytes(manifest)
        with closing(self.backend.open(bundle, RunOptions(fused=True))) as session:
            self.costs = {"seconds": _prepare(session, self.backend), "bytes_before": size, "bytes_after": size}
            executor = _UNMEASURED
            if self.config.measure:
                images, masks = self._sample(ChoiceConfig(), manifest)
                executor = choose(bundle, session, images, masks)
                self.times = policy_times(session, manifest.preprocess(images[:1]), ChoiceConfig.seconds)
        self.report("executors", 1, 1)
        return replace(manifest, executor=executor)

    # ---- what masks occur

    @cached_property
    def _counts(self) -> MaskCounts | None:
        if self.calibration is None:
            return counts_of_statistics(self.bundle.manifest.policy_statistics)
        return counts_of_masks(self._masks, self.calibration.split)

    @cached_property
    def _pixels(self) -> NDArray[np.uint8]:
        if self.calibration is None:
            raise RuntimeError("no calibration images")
        return self.calibration.arrays(self.bundle.manifest.preprocess)

    @cached_property
    def _masks(self) -> Masks:
        """What the policy's engine draws for the calibration images."""
        self.report("masks", 0, 1)
        manifest = self.bundle.manifest
        with closing(self.backend.open(self.bundle, RunOptions())) as session:
            masks = policy_masks(session, manifest.preprocess(self._pixels), manifest.max_batch)
        self.report("masks", 1, 1)
        return masks

    def _chosen(self, counts: MaskCounts) -> FusedPaths:
        return choose_fused(counts, self.config.paths, self.config.coverage, self.config.most)

    def _sample(self, config: ChoiceConfig, manifest: Manifest) -> tuple[NDArray[np.uint8], Masks]:
        """Images and their masks to measure with: the first calibration images, or random ones and masks as counted."""
        number = config.batch * config.batch_calls
        if self.calibration is not None:
            masks, mapping = self._masks[:number], manifest.mask_mapping
            mapped = masks if mapping is None else MaskMapper(mapping, manifest.num_blocks)(masks)
            return self._pixels[:number], mapped
        counts = self._counts
        if counts is None:
            raise RuntimeError("no masks were counted")
        masks = sampled_masks(counts, number)
        return random_images(number, self.bundle.manifest.preprocess.size, seed=0), masks


def _prepare(session: Session, backend: Backend) -> float:
    """All fused paths are ready when time is taken; seconds that it took, batches of any size included."""
    if not isinstance(session, FusedSession):
        raise BuildError(f"backend {backend.name} says that it fuses paths, and its session does not")
    session.prepare_fused(ChoiceConfig.batch)
    return session.fused_seconds


_UNMEASURED = {"choice": "fused", "reason": "not measured: one engine for each of the most frequent masks"}


def _checked(calibration: Dataset, manifest: Manifest, config: FusedConfig) -> Dataset:
    """The first images of a calibration set. Raises UsageError or InputError for an empty one or other classes."""
    if len(calibration) == 0:
        raise UsageError("calibration set", got="no images", expected="at least 1", remedy="name another data set")
    check_classes(calibration, len(manifest.class_names), manifest.class_names)
    return calibration.first(config.mask_images)
