"""What one mask for all images gives at the policy's cost: a policy that is no better is a pruned network, and dearer.

A static mask needs no policy network, so that it may spend the policy's own FLOPs on blocks. Looked at are the masks
that the policy draws most often, the blocks that it keeps most often, and those that backward elimination leaves of the
blocks that it ever keeps (:mod:`bdexport.mask_search`), all on the validation split. The network is not finetuned for
any of them, which ``train --method fixed --mask M`` would do.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np

from bdexport.evaluate import Outcome, same_mask
from bdexport.mask_search import eliminated
from bdexport.models.flops import FlopsTable
from bdexport.parts import Masks, frequent_masks, mask_from_text, mask_to_text
from bdexport.train.data import TrainingData
from bdexport.train.loop import validation_outcome
from bdexport.train.phases import Setting
from bdexport.train.reporter import Reporter

FREQUENT = 3  # of the policy's masks, so many are tried
FORWARDS = 20_000  # image passes that elimination may take, about four passes over CIFAR's validation split
FEWEST_IMAGES = 100
BATCH = 250


def best_static_mask(
    setting: Setting, data: TrainingData, outcome: Outcome, flops: FlopsTable, reporter: Reporter
) -> dict[str, Any] | None:
    """The most accurate mask found that costs no more than ``outcome``, the policy's on the validation split.

    None where the search is switched off, or no mask is as cheap.
    """
    if setting.config.static_images == 0:
        return None
    budget = float(flops.of_masks(outcome.masks).mean())
    texts = list(dict.fromkeys(mask_to_text(mask) for mask in _candidates(setting, data, outcome, flops, budget)))
    found: list[dict[str, Any]] = []
    with reporter.epoch("static masks at the policy's cost", len(texts)) as advance:
        for text in texts:
            mask = mask_from_text(text, setting.num_blocks)
            accuracy = validation_outcome(setting, data.validation, same_mask(mask)).accuracy
            found.append({"mask": text, "accuracy": accuracy, "flops": float(_cost(flops, mask))})
            advance()
    if not found:
        return None
    best = max(found, key=lambda one: (one["accuracy"], -one["flops"]))
    return {**best, "blocks": best["mask"].count("1"), "tried": len(found), "images": len(outcome.masks)}


def _cost(flops: FlopsTable, mask: Masks) -> float:
    return float(flops.of_masks(mask[None], with_policy=False)[0])


def _candidates(
    setting: Setting, data: TrainingData, outcome: Outcome, flops: FlopsTable, budget: float
) -> Iterator[Masks]:
    """Masks that cost at most ``budget`` FLOPs."""
    for text, _ in frequent_masks(outcome.masks)[:FREQUENT]:
        mask = mask_from_text(text, setting.num_blocks)
        if mask.any() and _cost(flops, mask) <= budget:
            yield mask
    rates = outcome.masks.mean(axis=0)
    mask = np.zeros(setting.num_blocks, dtype=bool)
    for index in np.argsort(-rates, kind="stable"):
        wider = mask.copy()
        wider[index] = True
        if _cost(flops, wider) <= budget:
            mask = wider
    if mask.any():
        yield mask
    searched = _searched(setting, data, rates > 0, flops, budget)
    if searched.any():
        yield searched


def _searched(setting: Setting, data: TrainingData, ever: Masks, flops: FlopsTable, budget: float) -> Masks:
    """What backward elimination leaves of the blocks that are ``ever`` kept, on some validation images."""
    kept = int(ever.sum())
    wanted = max(1, round(kept * budget / max(_cost(flops, ever), 1.0)))
    passes = (
        sum(range(min(wanted, kept) + 1, kept + 1)) / 2
    )  # behind the block in question, half the network on average
    images = min(setting.config.static_images, max(FEWEST_IMAGES, int(FORWARDS / max(1.0, passes))))
    network = setting.model.network.eval()

    def search() -> list[int]:
        batches = list(data.validation.batches(BATCH, images))
        with setting.autocast():
            return eliminated(
                network, batches, ever.tolist(), lambda mask: _cost(flops, np.array(mask, dtype=bool)) <= budget
            )

    mask = ever.copy()
    mask[setting.world.once(search)] = False
    return mask


def _standard_error(accuracy: float, images: int) -> float:
    """Of an accuracy, in points; one image at least, since 100 % of a few images are not certain."""
    return max(math.sqrt(accuracy * (100 - accuracy) / images), 100 / images + 1e-9)


def static_text(static: dict[str, Any], policy_accuracy: float, num_blocks: int, run: object) -> str:
    """One line for a person: what a static mask of the policy's cost gives, and what follows."""
    error = max(_standard_error(share, static["images"]) for share in (static["accuracy"], policy_accuracy))
    ahead = policy_accuracy - static["accuracy"]
    if ahead > error:
        verdict = f"the policy is {ahead:.2f} points better"
    else:
        than = "better" if ahead < -error else f"as good, within the standard error of {error:.2f} points,"
        verdict = f"it is {than} and needs no policy: bdexport build {run} --mask {static['mask']}"
    return (
        f"static mask of the same cost, the best of {static['tried']} tried: {static['mask']} ({static['blocks']} of "
        f"{num_blocks} blocks, {static['flops']:.3g} FLOPs) has {static['accuracy']:.2f} % on validation, the policy "
        f"{policy_accuracy:.2f} %: {verdict}"
    )
