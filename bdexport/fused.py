"""Fused paths: the masks that occur most, each to be run as one engine. Which they are, and how a manifest names them.

They have no files of their own: the backend links the parts' engines when the bundle is opened or a path is first
called, so that weights are on the disk once. The mask that keeps every block is not among them: its engine is ``full``,
which every bundle has.
Shared by the build half and the run-time half; numpy only.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from bdexport.bundle_checks import Reader, rule_error
from bdexport.errors import InputError
from bdexport.parts import Masks, frequent_masks, mask_from_text, path_parts

LINKED = "linked"  # how a path is stored: made from the parts' engines
MOST_FUSED = 256  # beyond it, making them ready takes seconds


@dataclass(frozen=True)
class FusedPath:
    """One mask (K characters, 1: kept) and the share of the calibration images that have it, 0..1."""

    mask: str
    share: float


@dataclass(frozen=True)
class FusedPaths:
    """The fused paths of a bundle, most frequent first.

    ``coverage``: share of the ``images`` calibration images of ``split`` that run as one engine, those whose mask keeps
    every block included.
    """

    split: str
    images: int
    coverage: float
    paths: tuple[FusedPath, ...]
    stored: str = LINKED

    def masks(self, num_blocks: int) -> Masks:
        """The paths' masks, bool (N, K)."""
        rows = [mask_from_text(path.mask, num_blocks) for path in self.paths]
        return np.array(rows, bool).reshape(-1, num_blocks)

    def part_paths(self, transitions: Iterable[int]) -> list[tuple[str, ...]]:
        """The parts that each path runs."""
        crossing = frozenset(transitions)
        return [path_parts([character == "1" for character in path.mask], crossing) for path in self.paths]

    def to_json(self) -> dict[str, Any]:
        """As the manifest has it; :func:`fused_from_json` reads it back."""
        paths = [{"mask": path.mask, "share": path.share} for path in self.paths]
        return {
            "split": self.split,
            "images": self.images,
            "coverage": self.coverage,
            "stored": self.stored,
            "paths": paths,
        }


def fused_from_json(data: Any, num_blocks: int, where: str) -> FusedPaths:
    """Inverse of :meth:`FusedPaths.to_json`. Raises BundleError (R16)."""
    reader = Reader(data, f"{where}: fused")
    paths = []
    for item in reader.items("paths", "R16"):
        path = Reader(item, f"{reader.where} paths")
        paths.append(
            FusedPath(checked_mask(path.text("mask", "R16"), num_blocks, path.where), path.share("share", "R16"))
        )
        path.finish()
    found = FusedPaths(
        split=reader.text("split", "R16"),
        images=reader.integer("images", "R16", 1),
        coverage=reader.share("coverage", "R16"),
        paths=tuple(paths),
        stored=reader.choice("stored", (LINKED,), "R16"),
    )
    reader.finish()
    texts = [path.mask for path in paths]
    if len(set(texts)) != len(texts) or "1" * num_blocks in texts or len(texts) > MOST_FUSED:
        expected = f"at most {MOST_FUSED} distinct masks, none of which keeps every block"
        raise rule_error("R16", f"{reader.where}: paths", got=texts, expected=expected)
    return found


def checked_mask(text: str, num_blocks: int, where: str, rule: str = "R16") -> str:
    """``text`` if it is a mask of K blocks. Raises BundleError naming ``rule``."""
    try:
        mask_from_text(text, num_blocks)
    except InputError as error:
        raise rule_error(rule, f"{where}: {error}") from error
    return text


@dataclass(frozen=True)
class MaskCounts:
    """How often masks occur: ``counted`` as (mask, images) most frequent first, of ``images`` images of ``split``."""

    split: str
    images: int
    counted: tuple[tuple[str, int], ...]


def counts_of_statistics(statistics: dict[str, Any]) -> MaskCounts | None:
    """From a checkpoint's or manifest's policy statistics; None where they name no masks."""
    masks = [(str(item["mask"]), int(item["count"])) for item in statistics.get("masks", ())]
    if not masks:
        return None
    masks.sort(key=lambda pair: (-pair[1], -pair[0].count("1"), pair[0]))
    return MaskCounts(str(statistics["split"]), int(statistics["images"]), tuple(masks))


def counts_of_masks(masks: Masks, split: str) -> MaskCounts:
    """From the masks (N, K) of a calibration set."""
    return MaskCounts(split, len(masks), tuple(frequent_masks(masks)))


def choose_fused(counts: MaskCounts, number: int | None, coverage: float, most: int) -> FusedPaths:
    """The ``number`` most frequent masks; None: as many as cover ``coverage`` of the images, at most ``most``.

    Fewer, where fewer occur.
    """
    chosen: list[FusedPath] = []
    covered = sum(count for mask, count in counts.counted if "0" not in mask)
    for mask, count in counts.counted:
        enough = covered >= coverage * counts.images if number is None else False
        if enough or len(chosen) >= (most if number is None else number):
            break
        if "0" in mask:
            chosen.append(FusedPath(mask, count / counts.images))
            covered += count
    return FusedPaths(counts.split, counts.images, covered / counts.images, tuple(chosen))


def sampled_masks(counts: MaskCounts, number: int) -> Masks:
    """``number`` masks in the proportions that were counted, evenly spread, without chance: bool (number, K)."""
    ends = np.cumsum([count for _, count in counts.counted])
    # A low-discrepancy walk through the images: equal masks do not come in runs, as they do not in a data set.
    places = (np.arange(number) * 0.6180339887498949 + 0.5) % 1 * ends[-1]
    texts: Sequence[str] = [counts.counted[int(np.searchsorted(ends, place, side="right"))][0] for place in places]
    return np.array([[character == "1" for character in text] for text in texts])


def shares_text(fused: FusedPaths) -> str:
    """``11 fused paths cover 99.8 % of 5000 validation images``."""
    one = len(fused.paths) == 1
    if fused.images == 1:  # a fixed mask, counted once: it is every image's
        return "the mask runs as one fused path" if one else "the mask keeps every block"
    subject = "1 fused path covers" if one else f"{len(fused.paths)} fused paths cover"
    return f"{subject} {100 * fused.coverage:.1f} % of {fused.images} {fused.split} images"
