"""A checkpoint on a data set: the undropped network, and mask, correctness and confidence of every image. Needs torch.

The same arithmetic as ``bdexport evaluate`` (:mod:`bdexport.evaluate`); the report needs the images one by one as well.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from bdexport.base_figures import BaseFigures
from bdexport.checkpoint import Checkpoint, build_model, load_checkpoint
from bdexport.dataset import Dataset, check_classes
from bdexport.evaluate import Batches, Outcome, Strategy, fixed_strategy, keep_all, run_masks
from bdexport.evaluate_base import base_figures
from bdexport.models.flops import FlopsTable, count_flops
from bdexport.models.pair import BlockDropNet
from bdexport.train.data import DeviceImages

Tracked = Callable[[str, Batches, int], Batches]  # (title, batches, their number) -> the same batches, watched


@dataclass(frozen=True, eq=False)
class Measured:
    """One checkpoint on one data set.

    ``dropped``: under its policy, or under the fixed mask that it was trained for; None for a plain network.
    ``confidence`` (N,): probability of the predicted class in ``dropped``. ``with_policy``: a policy network ran.
    """

    full: Outcome
    dropped: Outcome | None
    confidence: NDArray[np.float32]
    flops: FlopsTable
    with_policy: bool


def load(path: Path) -> Checkpoint:
    """Any checkpoint that bdexport reads."""
    return load_checkpoint(path)


def flops_of(found: Checkpoint) -> FlopsTable:
    """FLOPs by part of a checkpoint's networks."""
    return count_flops(build_model(found, with_policy=False), found.preprocess.size)


def measure(found: Checkpoint, dataset: Dataset, batch: int, name: str, tracked: Tracked) -> Measured:
    """Run the data set through the undropped network, and through the policy or the fixed mask of the checkpoint.

    Raises DatasetError where the classes are not the checkpoint's.
    """
    check_classes(dataset, found.network.num_classes, found.class_names)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = build_model(found, with_policy=False)
    flops = count_flops(model, found.preprocess.size)
    model = model.to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    source = DeviceImages(dataset.arrays(found.preprocess), dataset.labels, found.preprocess, device)

    def batches(what: str) -> Batches:
        return tracked(f"{name}: {what}", source.batches(batch), -(-len(source) // batch))

    full = run_masks(model, batches("full network"), keep_all(found.network.num_blocks))
    strategy = _strategy(found, model)
    if strategy is None:
        return Measured(full, None, np.zeros(0, np.float32), flops, False)
    dropped, confidence = _with_confidence(model, batches("dropping blocks"), strategy)
    return Measured(full, dropped, confidence, flops, found.policy is not None)


def base(path: Path, found: Checkpoint, dataset: Dataset, batch: int, tracked: Tracked) -> BaseFigures | None:
    """What ``found`` was trained from, on the same images where its file is there; see :func:`base_figures`."""

    def watched(batches: Batches, total: int) -> Batches:
        return tracked(f"{path.name}: its base", batches, total)

    return base_figures(path, found, None, dataset, None, batch=batch, tracked=watched)


def _strategy(found: Checkpoint, model: BlockDropNet) -> Strategy | None:
    """The policy, or the fixed mask that the network was finetuned under (random-k drawn as ``evaluate`` draws it)."""
    if found.policy is not None:
        return model.masks
    fixed: Any = found.training.get("fixed_mask")
    return fixed_strategy(fixed["mask"], fixed["kept"], 0, model)[1] if isinstance(fixed, dict) else None


@torch.no_grad()
def _with_confidence(model: BlockDropNet, batches: Batches, strategy: Strategy) -> tuple[Outcome, NDArray[np.float32]]:
    """As :func:`bdexport.evaluate.run_masks`, and the largest softmax output of every image, (N,)."""
    masks, correct, confidence = [], [], []
    for images, labels in batches:
        chosen = strategy(images)
        best, predicted = model.network.forward_masked(images, chosen).float().softmax(dim=1).max(dim=1)
        masks.append(chosen.cpu().numpy())
        correct.append((predicted == labels).cpu().numpy())
        confidence.append(best.cpu().numpy())
    return Outcome(np.concatenate(masks), np.concatenate(correct)), np.concatenate(confidence)
