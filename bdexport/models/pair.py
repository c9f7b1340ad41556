"""A residual network with what decides about its blocks: what is trained, evaluated and exported."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from bdexport.architecture import GateSpec, PolicySpec, ResNetSpec, policy_spec
from bdexport.models.gates import Decided, Gates
from bdexport.models.halting import HaltingGates
from bdexport.models.policy import FixedPolicy, PolicyNet
from bdexport.models.resnet import ResNet
from bdexport.models.sequential import SequentialGates
from bdexport.parts import KEEP_THRESHOLD

GATES = {"sequential": SequentialGates, "act": HaltingGates, "sact": HaltingGates}


class BlockDropNet(nn.Module):
    """``network`` and ``policy`` side by side; both read the same preprocessed image.

    With ``gates`` (a comparison system) these decide, inside the network, and the policy network is not used.
    """

    def __init__(self, network: ResNetSpec, policy: PolicySpec | None = None, gates: GateSpec | None = None) -> None:
        super().__init__()
        self.network = ResNet(network)
        self.policy = PolicyNet(policy or policy_spec(network))
        self.gates: Gates | None = None
        if gates is not None:
            self.set_gates(gates)

    def set_mask(self, mask: Sequence[bool]) -> None:
        """One mask, bool (K,), for every image, in the place of the policy network; for building, not for training."""
        # A policy network has more to it than building and running ask for: its features and what decides from them.
        self.policy = FixedPolicy(mask)  # type: ignore[assignment]

    def set_gates(self, spec: GateSpec) -> Gates:
        """Fresh gates of this kind."""
        gates = GATES[spec.kind](spec, self.network.spec)
        self.gates = gates
        return gates

    def masks(self, x: Tensor) -> Tensor:
        """The greedy masks, bool (N, K): p >= 0.5, or what the gates decide."""
        if self.gates is not None:
            return self.gates.run(self.network, x).masks
        keep: Tensor = self.policy(x) >= KEEP_THRESHOLD
        return keep

    def decided(self, x: Tensor) -> Decided:
        """Dynamic inference with all that is known about it, whatever decides."""
        if self.gates is not None:
            return self.gates.run(self.network, x)
        masks = self.masks(x)
        share = masks.float()
        return Decided(self.network.forward_masked(x, masks), masks, share, share, gated=share.new_zeros(share.shape))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Dynamic inference: logits (N, classes) and the masks (N, K) that were run."""
        decided = self.decided(x)
        return decided.logits, decided.masks
