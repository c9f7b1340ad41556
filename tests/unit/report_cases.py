"""Small inputs for the tests of reports: a network's spec, masks, results and epochs that are checked by hand."""

from __future__ import annotations

from typing import Any

import numpy as np

from bdexport.architecture import ResNetSpec
from bdexport.report.points import Point, Spread

NETWORK = ResNetSpec("cifar", "basic", (2, 2), (4, 8), "option_a", num_classes=3)  # K = 4, block 2 is the transition
MASKS = np.array([[1, 1, 0, 0], [1, 1, 0, 0], [1, 0, 1, 1], [1, 1, 1, 1], [1, 0, 0, 0], [1, 1, 0, 0]], dtype=bool)
LABELS = np.array([0, 0, 0, 2, 2, 2], dtype=np.int64)
CLASSES = ("cat", "dog", "newt")


def point(label: str = "a", **others: Any) -> Point:
    values: dict[str, Any] = {
        "source": "measured",
        "method": "blockdrop",
        "accuracy": 90.0,
        "finetuned": True,
        "flops": Spread(7e7, 1e6),
        "blocks": Spread(7.0, 1.0),
        "architecture": "resnet32",
        "num_blocks": 15,
        "dataset": "cifar10",
        "split": "test",
    }
    return Point(label, **(values | others))


def epoch(phase: str, accuracy: float, used: float | None = None, score: list[float] | None = None) -> dict[str, Any]:
    row: dict[str, Any] = {"phase": phase, "train": {"loss": 1.0}, "validation": {"accuracy": accuracy}}
    if used is not None:
        row["train"]["reward"] = -0.5
        row["validation"] |= {"blocks_used": {"mean": used, "std": 0.5}, "unique_masks": 3}
    return row | ({"score": score} if score else {})
