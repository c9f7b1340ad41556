"""ACT and SACT: a stage stops when its blocks have said often enough that it may (Figurnov et al., CVPR 2017).

Within a stage of L blocks, y^l is the output of the l-th and h^l its halting score. Adaptive Computation Time (section
3.1, after Graves, arXiv:1603.08983) reads the score off the pooled output, gives the last block the score 1, stops at

    N = min { n : h^1 + .. + h^n >= 1 - margin },            R = 1 - (h^1 + .. + h^(N-1))          (Eqns. 7, 8)

and hands on the weighted mean of the outputs, sum_l p^l y^l with p^l = h^l for l < N, p^N = R and none behind (Eqn. 6).
The ponder cost N + R is added to the loss with the weight tau; N counts as a constant, so that the gradient of the cost
by each of the scores before N is -1. Spatial ACT (section 3.2) does the same at each position by itself, with

    h = sigmoid(W3x3 * y + W pool(y) + b);

a position that has halted keeps its value while the blocks go on around it, and the cost is the mean over positions.

FLOPs of SACT, as the authors count them: a branch's last convolutions run at the active positions, the first one also
at their neighbours, whose values the 3x3 convolution reads. Executed here is the dense computation.

Deviations: blocks end in a ReLU (the authors' are pre-activation networks), and no batch norm precedes the units (their
code has one that the paper does not mention).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bdexport.architecture import BlockSpec, GateSpec, ResNetSpec
from bdexport.models.gates import Decided, Gates, PooledUnit
from bdexport.models.resnet import Block, ResNet, run_block


class SpatialUnit(PooledUnit):
    """A 3x3 convolution plus the pooled term, to one logit for each position: (N, C, H, W) -> (N, 1, H, W)."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.conv = nn.Conv2d(channels, 1, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        pooled: Tensor = self.fc(x.mean(dim=(2, 3)))
        out: Tensor = self.conv(x) + pooled[:, :, None, None]
        return out


@dataclass
class _Stage:
    """Where a stage stands; all (N, 1, h, w), with h = w = 1 where whole images halt."""

    active: Tensor  # bool: has not halted
    cumulative: Tensor  # sum of the scores so far
    out: Tensor | float  # weighted sum of the outputs so far, (N, C, H, W)
    ponder: Tensor  # N + R of what has halted; of the rest, the blocks so far


class HaltingGates(Gates):
    """A halting unit behind every block but the last of each stage."""

    def __init__(self, spec: GateSpec, network: ResNetSpec) -> None:
        super().__init__(spec)
        assert spec.margin is not None  # of every halting spec; the header's reader sees to it
        self.threshold = 1.0 - spec.margin
        kind = SpatialUnit if spec.kind == "sact" else PooledUnit
        blocks = network.blocks()
        last = {stage[-1].index for stage in stages_of(network)}
        units = {str(block.index): kind(block.out_channels) for block in blocks if block.index not in last}
        for unit in units.values():
            for name, parameter in unit.named_parameters():
                if name.endswith("weight"):
                    nn.init.normal_(parameter, std=0.01)  # the scores begin near sigmoid(bias) for every image
        self.units = nn.ModuleDict(units)

    def run(self, network: ResNet, x: Tensor, fewest: int = 1) -> Decided:
        x = network.stem(x)
        ponder: Tensor | float = 0.0
        positions, work = [], []
        for stage in stages_of(network.spec):
            state: _Stage | None = None
            for spec in stage:
                block = network.blocks[spec.index]
                assert isinstance(block, Block)
                x, active = self._block(block, x, state, fewest)
                state = self._halted(x, active, state, self._score(spec, x, last=spec is stage[-1]))
                positions.append(active.float().mean(dim=(1, 2, 3)))
                work.append(_work(block, active))
            assert state is not None
            assert isinstance(state.out, Tensor)
            x = state.out
            ponder = ponder + state.ponder.mean(dim=(1, 2, 3))
        assert isinstance(ponder, Tensor)
        shares = torch.stack(positions, dim=1)
        masks = shares > 0
        return Decided(network.head(x), masks, shares, torch.stack(work, dim=1), gated=masks.float(), ponder=ponder)

    def _block(self, block: Block, x: Tensor, state: _Stage | None, fewest: int) -> tuple[Tensor, Tensor]:
        """The block's output, and where it ran; what has halted keeps its value."""
        if state is None:  # the first of its stage runs everywhere
            y = block(x)
            shape = (len(y), 1, *y.shape[2:]) if self.spec.kind == "sact" else (len(y), 1, 1, 1)
            return y, torch.ones(shape, dtype=torch.bool, device=y.device)
        images = state.active.flatten(1).any(dim=1)
        y = run_block(block, x, images & (images.sum() >= fewest))
        return torch.where(state.active, y, x), state.active

    def _score(self, block: BlockSpec, y: Tensor, last: bool) -> Tensor | float:
        """h, float32 (N, 1, h, w); the last block of a stage halts whatever is left."""
        if last:
            return 1.0
        logit: Tensor = self.units[str(block.index)](y)
        return logit.float().sigmoid().reshape(len(y), 1, *logit.shape[2:] or (1, 1))

    def _halted(self, y: Tensor, active: Tensor, state: _Stage | None, score: Tensor | float) -> _Stage:
        """The stage after a block with output ``y`` and this score: Eqns. 6 to 8, one term on."""
        if state is None:
            zero = torch.zeros(active.shape, device=y.device)
            state = _Stage(active, zero, 0.0, zero)
        cumulative = torch.where(active, state.cumulative + score, state.cumulative)
        halts = active & (cumulative >= self.threshold)
        remainder = 1.0 - state.cumulative
        weight = torch.where(halts, remainder, torch.where(active, score, 0.0))
        ponder = state.ponder + active.float() + torch.where(halts, remainder, 0.0)
        return _Stage(active & ~halts, cumulative, state.out + weight * y, ponder)

    def probe(self, network: ResNet, x: Tensor) -> None:
        x = network.stem(x)
        for index, block in enumerate(network.blocks):
            x = block(x)
            if str(index) in self.units:
                self.units[str(index)](x)


def stages_of(network: ResNetSpec) -> list[tuple[BlockSpec, ...]]:
    """The blocks of each stage, in order."""
    blocks = iter(network.blocks())
    return [tuple(next(blocks) for _ in range(count)) for count in network.stages]


def _work(block: Block, active: Tensor) -> Tensor:
    """The share of the branch's FLOPs that its active positions need, (N,)."""
    convolutions = [layer.weight.numel() for layer in block.branch.modules() if isinstance(layer, nn.Conv2d)]
    first, whole = convolutions[0], sum(convolutions)
    where = active.float()
    dilated = F.max_pool2d(where, 3, stride=1, padding=1)
    shares: Tensor = (first * dilated + (whole - first) * where) / whole
    return shares.mean(dim=(1, 2, 3))
