"""The policy network: image -> K keep-probabilities in one shot (Wu et al., CVPR 2018, section 3.2).

Deviation from one sentence of the paper, in agreement with the authors' code: an output is the probability that the
block is *kept*. The exploration bound alpha belongs to training (``bdexport.train.rollout``) and is no part of this.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bdexport.architecture import PolicySpec
from bdexport.models.resnet import CifarStem, ResNet

LOGIT = 20.0  # sigmoid(20) is 1 to float32, and small enough for every precision


class FixedPolicy(nn.Module):
    """One mask, bool (K,), for every image, in the place of a policy network: a statically pruned network has it.

    Input and output are a policy network's. The weights are zero: the image has no influence but for its number.
    """

    def __init__(self, mask: Sequence[bool]) -> None:
        super().__init__()
        self.fc = nn.Linear(3, len(mask)).requires_grad_(False)
        self.fc.weight.zero_()
        self.fc.bias.copy_(torch.tensor([LOGIT if keep else -LOGIT for keep in mask]))

    def logits(self, x: Tensor) -> Tensor:
        """Log-odds of keeping each block, (N, K)."""
        out: Tensor = self.fc(x.mean(dim=(2, 3)))
        return out

    def forward(self, x: Tensor) -> Tensor:
        return self.logits(x).sigmoid()


class PolicyNet(nn.Module):
    """Input: float (N, 3, H, W), preprocessed. Output of ``forward``: keep-probabilities (N, K)."""

    def __init__(self, spec: PolicySpec) -> None:
        super().__init__()
        self.spec = spec
        backbone = ResNet(spec.backbone())
        self.stem, self.blocks = backbone.stem, backbone.blocks
        if spec.stem_stride > 1:
            self.stem = CifarStem(spec.widths[0], spec.stem_stride)
        width = spec.widths[-1]
        if spec.hidden:
            self.hidden = nn.Linear(width, spec.hidden)
        self.fc = nn.Linear(spec.hidden or width, spec.num_blocks)

    def features(self, x: Tensor) -> Tensor:
        """What the backbone says of an image, (N, widths[-1])."""
        if self.spec.input_pool > 1:
            x = F.avg_pool2d(x, self.spec.input_pool)
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        out: Tensor = x.mean(dim=(2, 3))
        return out

    def decide(self, features: Tensor) -> Tensor:
        """Log-odds of keeping each block, (N, K), from :meth:`features`."""
        out: Tensor = self.fc(F.relu(self.hidden(features)) if self.spec.hidden else features)
        return out

    def logits(self, x: Tensor) -> Tensor:
        """Log-odds of keeping each block, (N, K)."""
        return self.decide(self.features(x))

    def backbone_and_head(self) -> tuple[nn.ModuleList, nn.ModuleList]:
        """What gives the features, and what decides from them."""
        head = [self.hidden, self.fc] if self.spec.hidden else [self.fc]
        return nn.ModuleList([self.stem, self.blocks]), nn.ModuleList(head)

    def forward(self, x: Tensor) -> Tensor:
        return self.logits(x).sigmoid()
