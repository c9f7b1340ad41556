"""Accuracy, block usage and FLOPs of a model on a data set: undropped, under its policy, and under fixed masks."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bdexport.errors import UsageError
from bdexport.models.flops import FlopsTable, count_flops
from bdexport.models.pair import BlockDropNet
from bdexport.parts import Masks, frequent_masks, mask_from_text

Batches = Iterable[tuple[Tensor, Tensor]]
Strategy = Callable[[Tensor], Tensor]  # images (N, 3, H, W) -> masks bool (N, K)


@dataclass(frozen=True)
class Shares:
    """What ran of a network with gates, each float32 (N, K); see :class:`bdexport.models.gates.Decided`."""

    positions: NDArray[np.float32]
    work: NDArray[np.float32]
    gated: NDArray[np.float32]

    def flops(self, table: FlopsTable) -> NDArray[np.float64]:
        """FLOPs per image, (N,), the gates included."""
        return table.of_shares(self.work, self.gated, self.positions)


@dataclass(frozen=True)
class Outcome:
    """What one pass over a data set gave. ``masks`` (N, K), ``correct`` (N,); ``shares`` of a network with gates."""

    masks: Masks
    correct: NDArray[np.bool_]
    shares: Shares | None = None

    def over(self, change: Callable[[NDArray[Any]], NDArray[Any]]) -> Outcome:
        """The same with ``change`` applied to every array, e.g. to put the images of several processes together."""
        shares = self.shares
        if shares is not None:
            shares = Shares(change(shares.positions), change(shares.work), change(shares.gated))
        return Outcome(change(self.masks), change(self.correct), shares)

    @property
    def accuracy(self) -> float:
        """Share of correct predictions, in percent."""
        return float(100.0 * self.correct.mean())

    @property
    def blocks_used(self) -> NDArray[np.int64] | NDArray[np.float64]:
        """Kept blocks per image, (N,); where positions are decided on, a block counts with its share of them."""
        if self.shares is not None:
            return np.asarray(self.shares.positions.sum(axis=1, dtype=np.float64))
        return np.asarray(self.masks.sum(axis=1), dtype=np.int64)

    @property
    def unique_masks(self) -> int:
        """How many different masks occurred."""
        return len(np.unique(self.masks, axis=0))

    def to_json(self, flops: FlopsTable, with_policy: bool) -> dict[str, Any]:
        """Accuracy (percent), FLOPs and block usage (mean and standard deviation over images), unique masks."""
        per_image = flops.of_masks(self.masks, with_policy) if self.shares is None else self.shares.flops(flops)
        used = self.blocks_used
        return {
            "accuracy": self.accuracy,
            "images": len(used),
            "flops": {"mean": float(per_image.mean()), "std": float(per_image.std())},
            "blocks_used": {
                "mean": float(used.mean()),
                "std": float(used.std()),
                "min": _plain(used.min()),
                "max": _plain(used.max()),
            },
            "unique_masks": self.unique_masks,
        }


@torch.no_grad()
def run_masks(model: BlockDropNet, batches: Batches, strategy: Strategy) -> Outcome:
    """Run every batch under the masks that ``strategy`` gives; the model must be in eval mode."""
    masks, correct = [], []
    for images, labels in batches:
        chosen = strategy(images)
        logits = model.network.forward_masked(images, chosen)
        masks.append(chosen.cpu().numpy())
        correct.append((logits.argmax(dim=1) == labels).cpu().numpy())
    return Outcome(np.concatenate(masks), np.concatenate(correct))


@torch.no_grad()
def run_decided(model: BlockDropNet, batches: Batches) -> Outcome:
    """Run every batch as the model itself decides, by policy or gates; the model must be in eval mode."""
    masks, correct = [], []
    shares: list[list[NDArray[np.float32]]] = []
    for images, labels in batches:
        decided = model.decided(images)
        masks.append(decided.masks.cpu().numpy())
        correct.append((decided.logits.argmax(dim=1) == labels).cpu().numpy())
        shares.append([share.cpu().numpy() for share in (decided.positions, decided.work, decided.gated)])
    gathered = Shares(*map(np.concatenate, zip(*shares, strict=True)))
    return Outcome(np.concatenate(masks), np.concatenate(correct), None if model.gates is None else gathered)


def keep_all(num_blocks: int) -> Strategy:
    """The undropped network."""
    return lambda images: torch.ones(len(images), num_blocks, dtype=torch.bool, device=images.device)


def same_mask(mask: Masks) -> Strategy:
    """One mask, bool (K,), for every image."""
    return lambda images: torch.as_tensor(mask, device=images.device).expand(len(images), -1)


def first_k_mask(num_blocks: int, kept: int) -> Masks:
    """FirstK (Wu et al. 2018, section 4.1): the first ``kept`` blocks."""
    return np.arange(num_blocks) < _checked(kept, num_blocks)


def distribute_k_mask(num_blocks: int, kept: int, stages: tuple[int, ...]) -> Masks:
    """DistributeK: ``kept`` blocks spread evenly over the stages, the first ones of each stage.

    Where K does not divide evenly, the stages take turns from the first one on, each up to its own size.
    """
    _checked(kept, num_blocks)
    quota = [0] * len(stages)
    while sum(quota) < kept:
        for stage, size in enumerate(stages):
            if quota[stage] < size and sum(quota) < kept:
                quota[stage] += 1
    return np.concatenate([np.arange(size) < count for size, count in zip(stages, quota, strict=True)])


EVERY_IMAGE = slice(0, None, 1)


def random_k(num_blocks: int, kept: int, seed: int, places: slice = EVERY_IMAGE) -> Strategy:
    """RandomK: for each image, ``kept`` blocks drawn without replacement.

    ``places``: of n processes that each see every n-th image, ``slice(rank, None, n)``: each draws for all images, so
    that an image has the same mask whoever sees it.
    """
    _checked(kept, num_blocks)
    generator = torch.Generator().manual_seed(seed)

    def strategy(images: Tensor) -> Tensor:
        draws = torch.rand(len(images) * places.step, num_blocks, generator=generator)[places]
        order = draws.argsort(dim=1)
        return (order < kept).to(images.device)

    return strategy


def _checked(kept: int, num_blocks: int) -> int:
    if not 0 <= kept <= num_blocks:
        remedy = "choose K with --kept; all blocks are the row 'full', which is always there"
        raise UsageError("kept blocks", got=kept, expected=f"0 to {num_blocks}", remedy=remedy)
    return kept


def evaluate_model(
    model: BlockDropNet,
    batches: Callable[[str], Batches],
    image_size: tuple[int, int],
    *,
    has_policy: bool,
    fixed: list[str],
    kept: int | None,
    seed: int,
) -> dict[str, Any]:
    """``{"full", "policy" or "gates", "fixed"}`` as ``evaluate --json`` writes them.

    ``batches(title)`` starts a pass over the data. ``fixed`` names strategies (``first-k``, ``random-k``,
    ``distribute-k``) or masks as text; ``kept`` is their K, by default the policy's mean usage, rounded up. Fixed masks
    need no policy network: their FLOPs leave it out.
    """
    num_blocks = len(model.network.blocks)
    decides = has_policy or model.gates is not None
    for name in fixed:  # before minutes of measuring, not after
        fixed_strategy(name, num_blocks if kept is None and decides else kept, seed, model)
    flops = count_flops(model, image_size)
    full = run_masks(model, batches("full"), keep_all(num_blocks))
    result: dict[str, Any] = {"full": {"accuracy": full.accuracy, "flops": flops.full}}
    if has_policy:
        outcome = run_decided(model, batches("policy"))
        result["policy"] = outcome.to_json(flops, with_policy=True)
        kept = math.ceil(outcome.blocks_used.mean()) if kept is None else kept
    if model.gates is not None:
        outcome = run_decided(model, batches(model.gates.spec.kind))
        result["gates"] = {"kind": model.gates.spec.kind, **outcome.to_json(flops, with_policy=False)}
        kept = math.ceil(outcome.blocks_used.mean()) if kept is None else kept
    for name in fixed:
        title, strategy = fixed_strategy(name, kept, seed, model)
        outcome = run_masks(model, batches(title), strategy)
        result.setdefault("fixed", {})[title] = outcome.to_json(flops, with_policy=False)
    return result


def fixed_strategy(
    name: str, kept: int | None, seed: int, model: BlockDropNet, places: slice = EVERY_IMAGE
) -> tuple[str, Strategy]:
    """A title and the masks for ``first-k``, ``random-k``, ``distribute-k`` (``kept`` blocks) or a text of 0 and 1.

    ``places``: see :func:`random_k`.
    """
    num_blocks, stages = len(model.network.blocks), model.network.spec.stages
    if name and not set(name) - {"0", "1"}:
        if len(name) != num_blocks:
            expected = f"{num_blocks} characters, each 0 or 1"
            remedy = "write one for each block, block 0 first; 'bdexport inspect' shows the masks of a bundle"
            raise UsageError("fixed mask", got=f"{len(name)} characters", expected=expected, remedy=remedy)
        if "1" not in name:
            raise UsageError("fixed mask", got=name, expected="at least one block kept")
        return name, same_mask(mask_from_text(name, num_blocks))
    if name not in ("first-k", "random-k", "distribute-k"):
        raise UsageError("fixed mask", got=repr(name), expected="first-k, random-k, distribute-k or a text of 0 and 1")
    if kept is None:
        raise UsageError(f"{name}: how many blocks to keep is not known", remedy="pass --kept K")
    title = f"{name} {kept}"
    if name == "first-k":
        return title, same_mask(first_k_mask(num_blocks, kept))
    if name == "distribute-k":
        return title, same_mask(distribute_k_mask(num_blocks, kept, stages))
    return title, random_k(num_blocks, kept, seed, places)


def _plain(number: Any) -> int | float:
    """A count of blocks; only a share of positions makes it fractional."""
    return int(number) if float(number).is_integer() else float(number)


def policy_statistics(outcome: Outcome, split: str, most: int = 64) -> dict[str, Any]:
    """The most frequent masks with their counts and shares, as checkpoints and manifests store them."""
    images = len(outcome.masks)
    used = outcome.blocks_used
    masks = [
        {"mask": text, "count": count, "share": count / images} for text, count in frequent_masks(outcome.masks)[:most]
    ]
    return {
        "split": split,
        "images": images,
        "unique_masks": outcome.unique_masks,
        "blocks_used": {"mean": float(used.mean()), "std": float(used.std())},
        "keep_rate": [float(rate) for rate in outcome.masks.mean(axis=0)],
        "masks": masks,
    }
