"""BlockDrop-seq: the decision on a block is taken in front of it, from the activations that arrive there.

    p_i = softmax(W_i pool(y_{i-1}) + b_i)          (Wu et al., CVPR 2018, supplement, "Details of BlockDrop-seq")

with pool the global average pooling. A softmax over (drop, keep) depends on the difference of its two logits alone, so
that one logit and a sigmoid are the same family of functions with half the weights.

Deviation: the gates read detached activations. As with BlockDrop's policy network, the policy gradient changes what
decides and not the features; these learn from the classification loss.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from bdexport.architecture import GateSpec, ResNetSpec
from bdexport.models.gates import Decided, Gates, PooledUnit
from bdexport.models.resnet import ResNet, run_block
from bdexport.parts import KEEP_THRESHOLD

Decide = Callable[[int, Tensor], Tensor]  # block number, keep-probabilities (N,) -> keep it, bool (N,)


@dataclass(frozen=True)
class Walk:
    """One pass with decisions: ``logits`` (N, classes), ``masks`` bool (N, K) and, along the path that was taken,
    ``probabilities`` float32 (N, K) of keeping, differentiable in the gates alone.
    """

    logits: Tensor
    masks: Tensor
    probabilities: Tensor


class SequentialGates(Gates):
    """A gate in front of every block."""

    def __init__(self, spec: GateSpec, network: ResNetSpec) -> None:
        super().__init__(spec)
        self.units = nn.ModuleDict({str(block.index): PooledUnit(block.in_channels) for block in network.blocks()})

    def probability(self, index: int, x: Tensor) -> Tensor:
        """Of keeping block ``index``, float32 (N,), from the activations (N, C, H, W) in front of it."""
        logit: Tensor = self.units[str(index)](x)
        return logit.float().sigmoid().squeeze(1)

    def walk(self, network: ResNet, x: Tensor, decide: Decide, learn_network: bool = False) -> Walk:
        """Run the network, asking ``decide`` in front of each block. ``learn_network``: with gradients for it."""
        learns = learn_network and torch.is_grad_enabled()
        masks, probabilities = [], []
        with torch.set_grad_enabled(learns):
            x = network.stem(x)
        for index, block in enumerate(network.blocks):
            p = self.probability(index, x.detach())
            keep = decide(index, p.detach())
            with torch.set_grad_enabled(learns):
                x = run_block(block, x, keep)
            masks.append(keep)
            probabilities.append(p)
        with torch.set_grad_enabled(learns):
            logits = network.head(x)
        return Walk(logits, torch.stack(masks, dim=1), torch.stack(probabilities, dim=1))

    def run(self, network: ResNet, x: Tensor, fewest: int = 1) -> Decided:
        def decide(index: int, p: Tensor) -> Tensor:
            keep = greedy(index, p)
            return keep & (keep.sum() >= fewest)

        walk = self.walk(network, x, decide, learn_network=True)
        share = walk.masks.float()
        return Decided(walk.logits, walk.masks, positions=share, work=share, gated=torch.ones_like(share))

    def probe(self, network: ResNet, x: Tensor) -> None:
        self.walk(network, x, lambda _index, p: torch.ones_like(p, dtype=torch.bool))


def greedy(_index: int, probabilities: Tensor) -> Tensor:
    """Inference's decision: p >= 0.5."""
    return probabilities >= KEEP_THRESHOLD
