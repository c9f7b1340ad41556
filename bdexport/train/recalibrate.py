"""Batch-norm statistics re-estimated on greedy paths: what the blocks will really see at inference."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from bdexport.models.pair import BlockDropNet


@torch.no_grad()
def recalibrate_batch_norm(model: BlockDropNet, batches: Iterable[tuple[Tensor, Tensor]]) -> None:
    """Replace the network's running statistics by averages over ``batches`` under the greedy masks, in place.

    A block that no image keeps has nothing to estimate from and retains its statistics (the full network needs them).
    """
    norms = [layer for layer in model.network.modules() if isinstance(layer, nn.BatchNorm2d)]
    before = [(_stat(layer.running_mean).clone(), _stat(layer.running_var).clone()) for layer in norms]
    momenta = [layer.momentum for layer in norms]
    model.eval()
    for layer in norms:
        layer.reset_running_stats()
        layer.momentum = None  # cumulative average over the batches
        layer.train()
    for images, _labels in batches:
        if model.gates is not None:  # they decide on the way, from the batch's own statistics
            model.decided(images)
            continue
        masks = model.masks(images)
        # A batch norm over a single value per channel is undefined; leave such a block out of this batch's estimate.
        model.network.forward_masked(images, masks & (masks.sum(dim=0) > 1))
    for layer, (mean, variance), momentum in zip(norms, before, momenta, strict=True):
        if _stat(layer.num_batches_tracked).item() == 0:
            _stat(layer.running_mean).copy_(mean)
            _stat(layer.running_var).copy_(variance)
        layer.momentum = momentum
    model.eval()


def _stat(buffer: Tensor | None) -> Tensor:
    assert buffer is not None  # the networks never build batch norms without running statistics
    return buffer
