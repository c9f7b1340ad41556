"""Which blocks a policy keeps: how many per image, how often each, and how that differs between classes. Pure data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bdexport.architecture import ResNetSpec
from bdexport.errors import InputError
from bdexport.parts import Masks, frequent_masks, mask_from_text
from bdexport.report.fields import count, field, figure, text

LISTED_MASKS = 10


@dataclass(frozen=True, eq=False)
class Usage:
    """Block usage of one checkpoint.

    ``histogram[n]``: share of the images that keep n of the K blocks, n = 0..K; its sum is ``covered``, which is less
    than 1 where only the most frequent masks are known. ``keep_rate`` (K,); ``class_keep_rate`` (C, K) and
    ``class_images`` (C,) where every image is known. ``masks``: the most frequent, with their shares.
    """

    name: str
    data: str
    images: int
    stages: tuple[int, ...]
    transitions: tuple[int, ...]
    mean: float
    std: float
    unique_masks: int
    histogram: NDArray[np.float64]
    covered: float
    keep_rate: NDArray[np.float64]
    masks: tuple[tuple[str, float], ...]
    class_names: tuple[str, ...] = ()
    class_images: NDArray[np.int64] | None = None
    class_keep_rate: NDArray[np.float64] | None = None

    @property
    def num_blocks(self) -> int:
        """K."""
        return sum(self.stages)

    def to_json(self) -> dict[str, Any]:
        """The same as plain data (arrays are left to whoever writes the JSON)."""
        return dict(vars(self))


def usage_of_masks(
    name: str,
    data: str,
    network: ResNetSpec,
    masks: Masks,
    labels: NDArray[np.int64],
    class_names: tuple[str, ...],
) -> Usage:
    """From the mask (N, K) and label (N,) of every image."""
    used = masks.sum(axis=1)
    frequent = frequent_masks(masks)
    of_class = np.stack([labels == label for label in range(len(class_names))])  # (C, N)
    counts = of_class.sum(axis=1)
    return Usage(
        name=name,
        data=data,
        images=len(masks),
        stages=network.stages,
        transitions=_transitions(network),
        mean=float(used.mean()),
        std=float(used.std()),
        unique_masks=len(frequent),
        histogram=np.bincount(used, minlength=network.num_blocks + 1) / len(masks),
        covered=1.0,
        keep_rate=masks.mean(axis=0),
        masks=tuple((text, count / len(masks)) for text, count in frequent[:LISTED_MASKS]),
        class_names=class_names,
        class_images=counts,
        class_keep_rate=(of_class.astype(np.float64) @ masks) / np.maximum(counts, 1)[:, None],
    )


def usage_of_statistics(name: str, network: ResNetSpec, statistics: Any) -> Usage | None:
    """From the ``policy_statistics`` that a checkpoint carries; None where they are not of this network or incomplete.

    They hold the most frequent masks only, so the histogram covers the images that use one of these.
    """
    try:
        pairs = [(text(mask, "mask"), figure(mask, "share", high=1)) for mask in field(statistics, "masks")]
        histogram = np.zeros(network.num_blocks + 1)
        for mask, share in pairs:
            histogram[mask_from_text(mask, network.num_blocks).sum()] += share
        keep_rate = np.asarray(field(statistics, "keep_rate"), dtype=np.float64)
        if keep_rate.shape != (network.num_blocks,) or not ((keep_rate >= 0) & (keep_rate <= 1)).all():
            return None
        return Usage(
            name=name,
            data=f"{text(statistics, 'split')} split, as stored in the checkpoint",
            images=count(statistics, "images"),
            stages=network.stages,
            transitions=_transitions(network),
            mean=figure(statistics, "blocks_used.mean", high=network.num_blocks),
            std=figure(statistics, "blocks_used.std", high=network.num_blocks),
            unique_masks=count(statistics, "unique_masks"),
            histogram=histogram,
            covered=float(histogram.sum()),
            keep_rate=keep_rate,
            masks=tuple(pairs[:LISTED_MASKS]),
        )
    except (TypeError, ValueError, OverflowError, InputError):
        return None


def heat_map_rows(usage: Usage, most: int) -> list[int]:
    """The classes to show: those that have images, the first ``most`` of them by name order of the data set."""
    assert usage.class_images is not None
    return [int(row) for row in np.flatnonzero(usage.class_images)[:most]]


def _transitions(network: ResNetSpec) -> tuple[int, ...]:
    return tuple(block.index for block in network.blocks() if block.transition)
