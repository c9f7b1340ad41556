"""Phase ``finetune``: network and policy learn together."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.optim import Adam

from bdexport.train import nested, rollout
from bdexport.train.data import Batch
from bdexport.train.phases.base import FinetuningPhase, accuracy, trainable
from bdexport.train.phases.optimisers import make_optimiser
from bdexport.train.phases.policy import REOPENED_BOUND, PolicyPhase


class Finetune(FinetuningPhase, PolicyPhase):
    """Algorithm 1, lines 14-16: network and policy learn together."""

    def start(self) -> None:
        config, model = self.setting.config.finetune, self.setting.model
        trainable(model.network, True)
        trainable(model.policy, False)
        trainable(self.decider(), True)
        rates = (config.network_learning_rate, config.policy_learning_rate)
        classifying: nn.Module = model.network
        deciding = self.decider()
        if self._learns_head:
            backbone, deciding = model.policy.backbone_and_head()
            classifying = nn.ModuleList([model.network, backbone, self.setting.classifier])
        self.optimisers = [
            make_optimiser(config.optimiser, classifying, rates[0], config.weight_decay),
            Adam(deciding.parameters(), rates[1]),
        ]
        self.peak_rates = list(rates)

    def at(self, epoch: float) -> None:
        super().at(epoch)
        config = self.setting.config.policy
        progress = min(1.0, epoch / max(1, self.epochs))
        span = config.finetune_bound_end - config.finetune_bound_start
        self.exploration_bound = config.finetune_bound_start + span * progress
        if self.reopened:
            self.exploration_bound = min(self.exploration_bound, REOPENED_BOUND)

    def step(self, batch: Batch) -> dict[str, float]:
        setting, config = self.setting, self.setting.config.finetune
        images, labels, _ = batch
        probabilities, backbone_loss = self._decided(batch)
        estimator = setting.config.policy.estimator
        gates = self._gates(probabilities) if estimator == "gumbel" else None
        if gates is not None:
            masks = gates.detach().bool()
        elif estimator == "nested":
            masks = rollout.greedy_masks(probabilities, self.now_open)[None]
        else:
            masks = self._sampled(probabilities)
        # The batch: images that run every block, images that run a random number of their most probable blocks, images
        # that the policy learns from, and the rest, on which only the network learns. Images that ran every block say
        # nothing about the masks that were drawn for them.
        whole, levels = int(config.full_share * len(images)), int(config.level_share * len(images))
        learned = len(images) - whole - levels
        judged = slice(len(images) - max(1, int(config.policy_share * learned)), len(images))
        run = masks[0].clone()
        run[:whole] = True
        run[whole : whole + levels] = self._random_levels(probabilities[whole : whole + levels])
        with setting.autocast():
            logits = setting.model.network.forward_masked(images, run)
        loss = self._classification_loss(logits, batch)
        if gates is not None:
            rewards, policy_loss = self._gated(images[judged], labels[judged], probabilities[judged], gates[:, judged])
        elif estimator == "nested":
            rewards, policy_loss = self._nested(images[judged], labels[judged], probabilities[judged])
        else:
            rewards, policy_loss = self._judge(
                logits[judged], images[judged], labels[judged], probabilities[judged], masks[:, judged]
            )
        self._learn(loss + backbone_loss, policy_loss)
        used = rollout.greedy_masks(probabilities, self.now_open).float().sum(dim=1).mean().item()
        return {
            "loss": loss.item(),
            "reward": rewards.mean().item(),
            "accuracy": accuracy(logits, labels),
            "blocks_used": used,
        }

    def _decided(self, batch: Batch) -> tuple[Tensor, Tensor | float]:
        """Keep-probabilities (N, K), and what the backbone learns from where the policy gradient does not reach it."""
        if not self._learns_head:
            return self._probabilities(batch.images), 0.0
        policy = self.setting.model.policy
        with self.setting.autocast():
            features = policy.features(batch.images)
            logits, classes = policy.decide(features.detach()), self.setting.classifier(features)
        return logits.float().sigmoid(), self._classification_loss(classes, batch)

    def _judge(
        self, logits: Tensor, images: Tensor, labels: Tensor, probabilities: Tensor, masks: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Rewards (S, N) and the policy loss; ``logits`` (N, C) belong to the first of the masks (S, N, K)."""
        others = [self._rewards(self._evaluated(images, one), labels, one) for one in masks[1:]]
        rewards = torch.stack([self._rewards(logits, labels, masks[0]), *others])
        advantages = self._advantages(rewards, probabilities, images, labels)
        return rewards, self._policy_loss(probabilities, masks, advantages)

    def _random_levels(self, probabilities: Tensor) -> Tensor:
        """Masks (N, K) of each image's most probable blocks, their number uniform in 1..K."""
        kept = self.setting.randint(1, self.setting.num_blocks + 1, len(probabilities))
        return nested.most_probable(probabilities.detach(), kept)
