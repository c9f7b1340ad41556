"""Which images go on the contact sheets (the paper's Figures 4 and 5). Pure data: row numbers, no pixels."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bdexport.parts import Masks, mask_to_text

Bools = NDArray[np.bool_]
Floats = NDArray[np.floating[Any]]
Labels = NDArray[np.int64]


@dataclass(frozen=True)
class Strip:
    """One row of a sheet: images (rows of the data set) of one class with something in common."""

    class_name: str
    caption: str
    rows: tuple[int, ...]
    blocks: tuple[int, ...]  # kept blocks of each of them
    mask: str | None = None

    def to_json(self) -> dict[str, Any]:
        """The same as plain data."""
        return dict(vars(self))


def shared_policies(
    masks: Masks, labels: Labels, class_names: tuple[str, ...], *, classes: int, policies: int, images: int
) -> list[Strip]:
    """Figure 4: per class, its most frequent masks (ties: as text), each with the first images that use it.

    ``masks`` (N, K), ``labels`` (N,); the first ``classes`` classes that have images. In the order of the data set, not
    picked by eye or by confidence.
    """
    strips = []
    for label in _classes(labels, classes):
        rows = np.flatnonzero(labels == label)
        texts = [mask_to_text(masks[row]) for row in rows]
        ranked = sorted(Counter(texts).items(), key=lambda pair: (-pair[1], pair[0]))
        for text, count in ranked[:policies]:
            same = [int(row) for row, other in zip(rows, texts, strict=True) if other == text][:images]
            kept = text.count("1")
            caption = f"{count} of {len(rows)} images, {kept} blocks"
            strips.append(Strip(class_names[label], caption, tuple(same), (kept,) * len(same), text))
    return strips


def easiest_and_hardest(
    masks: Masks,
    labels: Labels,
    correct: Bools,
    confidence: Floats,
    class_names: tuple[str, ...],
    *,
    classes: int,
    images: int,
) -> list[Strip]:
    """Figure 5: per class, correctly classified images with the fewest and with the most blocks.

    Ties go to the more confident prediction, then to the earlier image; no image stands in both strips. ``correct`` and
    ``confidence`` are (N,).
    """
    used = masks.sum(axis=1)
    strips = []
    for label in _classes(labels, classes):
        rows = np.flatnonzero((labels == label) & correct)
        if not len(rows):
            continue
        easy = rows[np.lexsort((rows, -confidence[rows], used[rows]))][:images]
        rest = np.setdiff1d(rows, easy)
        hard = rest[np.lexsort((rest, -confidence[rest], -used[rest]))][:images]
        for name, chosen in (("fewest", easy), ("most", hard)):
            if len(chosen):
                blocks = tuple(int(count) for count in used[chosen])
                caption = f"{name} blocks: {_range(blocks)}"
                strips.append(Strip(class_names[label], caption, tuple(int(row) for row in chosen), blocks))
    return strips


def _classes(labels: Labels, most: int) -> list[int]:
    return [int(label) for label in np.unique(labels)[:most]]


def _range(blocks: tuple[int, ...]) -> str:
    low, high = min(blocks), max(blocks)
    return str(low) if low == high else f"{low} to {high}"
