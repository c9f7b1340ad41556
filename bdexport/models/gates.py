"""What all gates have in common: units inside the network that decide while it runs.

The comparison systems BlockDrop-seq, ACT and SACT are a residual network plus gates (:class:`Gates`). They differ in
what a unit reads and what follows from it; what comes out of a batch is the same for all (:class:`Decided`).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from bdexport.architecture import GateSpec
from bdexport.models.resnet import ResNet


@dataclass(frozen=True)
class Decided:
    """One batch of dynamic inference.

    ``logits`` (N, classes). ``masks`` bool (N, K): the block ran, for ``sact`` at one position or more. The shares are
    float32 (N, K) and say what ran: ``positions`` of all positions of the block's output, ``work`` of the FLOPs of its
    branch, ``gated`` 1 where its gate was asked. ``ponder`` (N,), differentiable: the ponder cost summed over the
    stages (``act`` and ``sact``; otherwise None).
    """

    logits: Tensor
    masks: Tensor
    positions: Tensor
    work: Tensor
    gated: Tensor
    ponder: Tensor | None = None


class Gates(nn.Module):
    """Base of the three kinds. ``units`` holds one small module for each block that has a gate, by its number."""

    def __init__(self, spec: GateSpec) -> None:
        super().__init__()
        self.spec = spec
        self.units = nn.ModuleDict()

    def run(self, network: ResNet, x: Tensor, fewest: int = 1) -> Decided:
        """Dynamic inference on preprocessed images (N, 3, H, W).

        A block that fewer images than ``fewest`` would run is left out, for batch-norm statistics that mean something.
        """
        raise NotImplementedError

    def probe(self, network: ResNet, x: Tensor) -> None:
        """Run every unit once, on what it reads when no block is left out; for counting FLOPs."""
        raise NotImplementedError

    @torch.no_grad()
    def start_from(self, logit: float, index: int | None = None) -> None:
        """Set the bias of every unit, or of that of block ``index``."""
        for key, unit in self.units.items():
            if index is None or key == str(index):
                assert isinstance(unit, PooledUnit)
                unit.fc.bias.fill_(logit)


class PooledUnit(nn.Module):
    """Global average pooling, a linear layer to one logit: (N, C, H, W) -> (N, 1)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.fc = nn.Linear(channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc(x.mean(dim=(2, 3)))
        return out
