"""How much could any policy gain on this network? Its accuracy at every level, and better deciders than its policy.

    python benchmarks/ceiling.py CKPT --dataset cifar10 --data DIR [--split validation] [--images N] [--json FILE]

A level is one of the masks that the policy draws (``--masks``: the N most frequent ones) or all blocks. Every image
runs every level. Then images are ordered by a score, easy ones first, and given the levels in ascending order, as
many to each as make the accuracy greatest at no more blocks than the policy keeps on average. These numbers are
chosen on one half of the images and judged on the other, in both directions, so that a score without information
gains nothing.

Scores: ``policy`` (its mean logit); ``chance`` (none: a mix of levels that ignores the image); ``network, N blocks``
(the confidence of the network itself at that level, which no policy has: it would have to run the network first). Where
even that gains little over the best level, the network sets the limit and not the policy. Prints a table last.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from bdexport.checkpoint import build_model, load_checkpoint
from bdexport.dataset import load_dataset
from bdexport.errors import BdexportError, UsageError
from bdexport.evaluate import run_masks, same_mask
from bdexport.hardware import machine, package_versions
from bdexport.models.pair import BlockDropNet
from bdexport.parts import frequent_masks, mask_from_text
from bdexport.train.data import DeviceImages

PIECES = 200  # a level begins at a multiple of a 200th of the images

Values = NDArray[np.float64]


@torch.no_grad()
def policy_scores(model: BlockDropNet, images: DeviceImages) -> tuple[NDArray[np.bool_], Values]:
    """The policy's masks (N, K), and its mean logit per image (N,): low where it calls an image easy."""
    logits = torch.cat([model.policy.logits(batch).float() for batch, _ in images.batches(250)])
    return (logits >= 0).cpu().numpy(), logits.mean(dim=1).double().cpu().numpy()


@torch.no_grad()
def confidence(model: BlockDropNet, images: DeviceImages, mask: NDArray[np.bool_]) -> Values:
    """The largest class probability (N,) of every image under ``mask`` (K,)."""
    chosen = same_mask(mask)
    out = [model.network.forward_masked(batch, chosen(batch)).float().softmax(1) for batch, _ in images.batches(250)]
    return torch.cat(out).amax(dim=1).double().cpu().numpy()


def best_shares(correct: NDArray[np.bool_], blocks: NDArray[np.int64], budget: float) -> list[float]:
    """Where, in 0..1, each level but the first begins: most right answers with a mean of at most ``budget`` blocks.

    ``correct`` (L, N): whether each level (``blocks`` (L,), ascending) is right, images in the order of the score.
    Dynamic programming over pieces of the images, the level reached, and the blocks spent on the pieces so far.
    """
    pieces = min(PIECES, correct.shape[1])
    edges = np.linspace(0, correct.shape[1], pieces + 1).round().astype(int)
    right = np.add.reduceat(correct.astype(np.int64), edges[:-1], axis=1)
    spendable = int(budget * pieces)
    value = np.zeros((len(blocks), spendable + 1))  # of the best way to a level, whatever is left is spent or not
    shallower = np.zeros((pieces, len(blocks), spendable + 1), bool)  # a lower level did as well for the same blocks
    for piece in range(pieces):
        for level, kept in enumerate(blocks):
            stays = np.full(spendable + 1, -np.inf)
            if kept <= spendable:
                stays[kept:] = value[level, : spendable + 1 - kept] + right[level, piece]
            value[level] = stays
        for level in range(1, len(blocks)):
            shallower[piece, level] = value[level - 1] > value[level]
            value[level] = np.maximum(value[level], value[level - 1])
    level, left, levels = len(blocks) - 1, spendable, []
    for piece in reversed(range(pieces)):
        while level and shallower[piece, level, left]:
            level -= 1
        levels.append(level)
        left -= int(blocks[level])
    counts = np.bincount(levels, minlength=len(blocks))
    return [float(share) for share in np.cumsum(counts)[:-1] / pieces]


def decided(correct: NDArray[np.bool_], blocks: NDArray[np.int64], starts: list[float]) -> tuple[float, float]:
    """Accuracy (percent) and mean blocks where sorted images get the levels that begin at ``starts`` (0..1)."""
    images = correct.shape[1]
    bounds = np.round(np.array([0, *starts, 1]) * images).astype(int)
    level = np.repeat(np.arange(len(blocks)), np.diff(bounds))
    return float(100 * correct[level, np.arange(images)].mean()), float(blocks[level].mean())


def judged(correct: NDArray[np.bool_], blocks: NDArray[np.int64], score: Values, budget: float) -> tuple[float, float]:
    """Accuracy and mean blocks, shares chosen on every other image and judged on the rest, in both directions."""
    results = []
    for half in (0, 1):
        rows = [np.arange(part, correct.shape[1], 2) for part in (half, 1 - half)]
        ordered = [correct[:, part[np.argsort(score[part], kind="stable")]] for part in rows]
        results.append(decided(ordered[1], blocks, best_shares(ordered[0], blocks, budget)))
    accuracy, used = np.mean(results, axis=0)
    return float(accuracy), float(used)


def ceiling(model: BlockDropNet, images: DeviceImages, count: int) -> list[dict[str, Any]]:
    """Rows of the table: levels, the policy itself, then what each score would give at the policy's budget."""
    masks, logits = policy_scores(model, images)
    own = run_masks(model, images.batches(250), lambda x: model.masks(x))
    frequent = [mask_from_text(text, masks.shape[1]) for text, _ in frequent_masks(masks)[:count]]
    levels = sorted({tuple(mask) for mask in [*frequent, np.ones(masks.shape[1], bool)]}, key=sum)
    chosen = [np.array(level) for level in levels]
    blocks = np.array([mask.sum() for mask in chosen])
    correct = np.stack([run_masks(model, images.batches(250), same_mask(mask)).correct for mask in chosen])
    budget = max(float(own.blocks_used.mean()), float(blocks.min()))  # rarer masks may have fewer blocks
    rows: list[dict[str, Any]] = [
        {"decider": f"{kept} blocks for all", "accuracy": 100 * float(right.mean()), "blocks": int(kept)}
        for kept, right in zip(blocks, correct, strict=True)
    ]
    rows.append({"decider": "the policy as it is", "accuracy": own.accuracy, "blocks": budget})
    scores = {"policy": logits, "chance": np.random.default_rng(0).random(len(images))}
    for mask, kept in zip(chosen, blocks, strict=True):
        scores[f"network, {kept} blocks"] = -confidence(model, images, mask)
    for name, score in scores.items():
        accuracy, used = judged(correct, blocks, score, budget)
        rows.append({"decider": f"score: {name}", "accuracy": accuracy, "blocks": used})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--dataset", default="cifar10")
    parser.add_argument("--data", type=Path)
    parser.add_argument("--split", default="validation")
    parser.add_argument("--images", type=int)
    parser.add_argument("--masks", type=int, default=5, help="how many of the policy's masks")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    try:
        _report(arguments)
    except BdexportError as error:
        parser.exit(1, f"error: {error}\n")


def _report(arguments: argparse.Namespace) -> None:
    for name in ("images", "masks"):
        value = getattr(arguments, name)
        if value is not None and value < (2 if name == "images" else 1):
            expected = "2 or more" if name == "images" else "1 or more"
            raise UsageError(f"--{name}", got=str(value), expected=expected)
    found = load_checkpoint(arguments.checkpoint)
    dataset = load_dataset(arguments.dataset, arguments.data, arguments.split, limit=arguments.images)
    model = build_model(found, with_policy=True).eval().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    images = DeviceImages(dataset.arrays(found.preprocess), dataset.labels, found.preprocess, "cpu")
    rows = ceiling(model, images, arguments.masks)
    table = Table(title=f"{arguments.checkpoint}, {arguments.split}, {len(dataset)} images", title_justify="left")
    for column in ("decider", "accuracy", "mean blocks"):
        table.add_column(column, justify="left" if column == "decider" else "right")
    for row in rows:
        table.add_row(row["decider"], f"{row['accuracy']:.2f} %", f"{row['blocks']:.2f}")
    if arguments.json:
        result = {
            "checkpoint": str(arguments.checkpoint),
            "split": arguments.split,
            "images": len(dataset),
            "rows": rows,
            "machine": machine(),
            "packages": package_versions(("bdexport", "numpy", "torch")),
        }
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")
    Console().print(table)


if __name__ == "__main__":
    main()
