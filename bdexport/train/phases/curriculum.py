"""Phase ``curriculum``: the policy learns on the frozen network."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.optim import Adam

from bdexport.models.policy import PolicyNet
from bdexport.train import rollout
from bdexport.train.data import Batch, TrainingData
from bdexport.train.phases.base import trainable
from bdexport.train.phases.policy import PolicyPhase
from bdexport.train.phases.setting import Setting


class Curriculum(PolicyPhase):
    """Algorithm 1, lines 3-13: the policy learns on the frozen network, opening blocks from the last one."""

    name = "curriculum"
    learns_network = False

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        config = setting.config.curriculum
        self.epochs, self.batch, self.share = config.epochs, config.batch, config.epoch_share

    def begin(self, data: TrainingData, note: Callable[[str], None]) -> None:
        config = self.setting.config.policy
        if config.order_images == 0:
            return
        order = self.setting.order or self._drop_order(data.train, config.order_images)
        note(f"blocks in the order of backward elimination on {config.order_images} training images: {order}")
        start_in_order(self.setting.model.policy, order, config.initial_keep_logit, config.order_spread)

    def start(self) -> None:
        config = self.setting.config.curriculum
        policy, deciding = self.setting.model.policy, self.decider()
        trainable(self.setting.model.network, False)
        trainable(policy, False)
        trainable(deciding, True)
        if self._learns_head:
            backbone, deciding = policy.backbone_and_head()
            trainable(backbone, False)
        self.optimisers = [Adam(deciding.parameters(), config.learning_rate)]
        self.peak_rates = [config.learning_rate]

    def opened(self, epoch: int) -> int:
        return rollout.open_blocks(epoch, self.setting.num_blocks, self.setting.config.curriculum.blocks_per_epoch)

    def rate_factor(self, epoch: float) -> float:
        """Constant, as in the paper."""
        return 1.0

    def step(self, batch: Batch) -> dict[str, float]:
        images, labels, _ = batch
        probabilities = self._probabilities(images)
        estimator = self.setting.config.policy.estimator
        if estimator == "nested":
            rewards, loss = self._nested(images, labels, probabilities)
        elif estimator == "gumbel":
            rewards, loss = self._gated(images, labels, probabilities, self._gates(probabilities))
        else:
            masks = self._sampled(probabilities)
            rewards = torch.stack([self._rewards(self._evaluated(images, one), labels, one) for one in masks])
            loss = self._policy_loss(probabilities, masks, self._advantages(rewards, probabilities, images, labels))
        self._learn(loss)
        used = rollout.greedy_masks(probabilities, self.now_open).float().sum(dim=1).mean().item()
        return {"loss": loss.item(), "reward": rewards.mean().item(), "blocks_used": used}


@torch.no_grad()
def start_in_order(policy: PolicyNet, order: list[int], center: float, spread: float) -> None:
    """Set the policy's last layer so that every image drops blocks in ``order``.

    Biases run from ``center - spread`` for the first block to drop to ``center + spread`` for the last; the weights are
    zero, so that images differ only in what is learned from here.
    """
    policy.fc.weight.zero_()
    steps = torch.linspace(center - spread, center + spread, len(order), device=policy.fc.bias.device)
    policy.fc.bias[torch.tensor(order, device=steps.device)] = steps
