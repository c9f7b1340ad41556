"""A residual network with its policy: what is trained, evaluated and exported."""

from __future__ import annotations

from torch import Tensor, nn

from bdexport.architecture import PolicySpec, ResNetSpec, policy_spec
from bdexport.models.policy import PolicyNet
from bdexport.models.resnet import ResNet
from bdexport.parts import KEEP_THRESHOLD


class BlockDropNet(nn.Module):
    """``network`` and ``policy`` side by side; both read the same preprocessed image."""

    def __init__(self, network: ResNetSpec, policy: PolicySpec | None = None) -> None:
        super().__init__()
        self.network = ResNet(network)
        self.policy = PolicyNet(policy or policy_spec(network))

    def masks(self, x: Tensor) -> Tensor:
        """The greedy masks, bool (N, K): p >= 0.5."""
        keep: Tensor = self.policy(x) >= KEEP_THRESHOLD
        return keep

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Dynamic inference: logits (N, classes) and the masks (N, K) that were run."""
        masks = self.masks(x)
        return self.network.forward_masked(x, masks), masks
