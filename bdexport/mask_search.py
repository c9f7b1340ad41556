"""Which blocks can all images do without: backward elimination, one block at a time (a static mask, no policy).

It serves two ends: the searched static mask, which a policy has to beat at the same mean usage, and the order in which
a fresh policy starts to drop blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from bdexport.models.resnet import ResNet

Batches = Iterable[tuple[Tensor, Tensor]]


@torch.no_grad()
def drop_order(network: ResNet, batches: Sequence[tuple[Tensor, Tensor]]) -> list[int]:
    """Block indices from the first to drop to the last: each time the one whose loss costs least cross-entropy.

    ``network`` must be in eval mode; ``batches`` of images (N, 3, H, W) and labels (N,). Takes K (K + 1) / 2
    evaluations of the part of the network behind the block in question.
    """
    return eliminated(network, batches, [True] * len(network.blocks), lambda mask: not any(mask))


@torch.no_grad()
def eliminated(
    network: ResNet,
    batches: Sequence[tuple[Tensor, Tensor]],
    mask: Sequence[bool],
    enough: Callable[[Sequence[bool]], bool],
) -> list[int]:
    """The blocks that ``mask`` (K) loses, in the order of :func:`drop_order`, until it is small ``enough``."""
    left = list(mask)
    order: list[int] = []
    while any(left) and not enough(left):
        losses = _losses_without(network, batches, left)
        order.append(min(losses, key=lambda index: losses[index]))
        left[order[-1]] = False
    return order


def _losses_without(network: ResNet, batches: Batches, mask: list[bool]) -> dict[int, float]:
    """Summed cross-entropy under ``mask`` with one more block dropped, by that block's index."""
    losses = {index: 0.0 for index, keep in enumerate(mask) if keep}
    for images, labels in batches:
        x = network.stem(images)
        for index, block in enumerate(network.blocks):
            if mask[index]:
                logits = _rest(network, block.dropped(x), index + 1, mask)  # type: ignore[operator]
                losses[index] += F.cross_entropy(logits.float(), labels, reduction="sum").item()
            x = _run(block, x, mask[index])
    return losses


def _rest(network: ResNet, x: Tensor, start: int, mask: list[bool]) -> Tensor:
    for index in range(start, len(mask)):
        x = _run(network.blocks[index], x, mask[index])
    logits: Tensor = network.head(x)
    return logits


def _run(block: torch.nn.Module, x: Tensor, keep: bool) -> Tensor:
    out: Tensor = block(x) if keep else block.dropped(x)  # type: ignore[operator]
    return out
