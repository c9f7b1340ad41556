"""Batch-norm statistics re-estimated on greedy paths: what the blocks will really see at inference."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from bdexport.models.pair import BlockDropNet

# A block that fewer images of a batch keep is left out of it: their own mean and variance are no estimate of anything.
FEWEST_IMAGES = 16


@torch.no_grad()
def recalibrate_batch_norm(model: BlockDropNet, batches: Iterable[tuple[Tensor, Tensor]]) -> None:
    """Replace the network's running statistics by those over ``batches`` under the greedy masks, in place.

    Every image counts the same, however many of its batch keep the block. Batch norm normalises by the batch meanwhile,
    so that what later blocks see is right from the first batch on. A block that no batch has enough images for retains
    its statistics (the full network needs them).
    """
    norms = [layer for layer in model.network.modules() if isinstance(layer, nn.BatchNorm2d)]
    sums = {layer: Moments() for layer in norms}
    momenta = [layer.momentum for layer in norms]
    hooks = [layer.register_forward_pre_hook(_observe(sums[layer])) for layer in norms]
    model.eval()
    for layer in norms:
        layer.momentum = 0.0  # normalise by the batch, but leave the running statistics to the sums
        layer.train()
    try:
        for images, _labels in batches:
            fewest = min(FEWEST_IMAGES, len(images))
            if model.gates is not None:  # they decide on the way, from the batch's own statistics
                model.gates.run(model.network, images, fewest)
                continue
            masks = model.masks(images)
            model.network.forward_masked(images, masks & (masks.sum(dim=0) >= fewest))
    finally:
        for layer, hook, momentum in zip(norms, hooks, momenta, strict=True):
            hook.remove()
            layer.momentum = momentum
        model.eval()
    for layer in norms:
        sums[layer].store(layer)


class Moments:
    """Sums of a layer's inputs per channel, over all images and positions, in float64."""

    def __init__(self) -> None:
        self.count, self.first, self.second = 0, torch.zeros(()), torch.zeros(())

    def add(self, x: Tensor) -> None:
        """Take in (N, C, H, W)."""
        x = x.double()
        self.count += x.numel() // x.shape[1]
        self.first = self.first.to(x.device) + x.sum(dim=(0, 2, 3))
        self.second = self.second.to(x.device) + x.square().sum(dim=(0, 2, 3))

    def store(self, layer: nn.BatchNorm2d) -> None:
        """Write mean and unbiased variance into ``layer``, if anything was taken in."""
        if self.count < 2:
            return
        assert layer.running_mean is not None  # the networks never build batch norms without running statistics
        assert layer.running_var is not None
        mean = self.first / self.count
        variance = (self.second - self.count * mean.square()) / (self.count - 1)
        layer.running_mean.copy_(mean)
        layer.running_var.copy_(variance.clamp_min(0))


def _observe(moments: Moments) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
    def hook(_layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        moments.add(inputs[0])

    return hook
