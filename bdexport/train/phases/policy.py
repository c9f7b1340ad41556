"""What ``curriculum`` and ``finetune`` share: masks, rewards and the losses of the estimators."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from bdexport.train import gumbel, nested, rollout
from bdexport.train.phases.base import Phase
from bdexport.train.phases.setting import Setting
from bdexport.train.reward import budget_loss, leave_one_out_advantage, reward

REOPENED_ENTROPY, REOPENED_BOUND = 0.05, 0.8  # of a policy that gave every image the same mask


class PolicyPhase(Phase):
    """What curriculum and finetuning share: sampling masks and the policy gradient."""

    uses_policy = True
    explores = True  # exploration can be raised

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        self.exploration_bound = setting.config.policy.exploration_bound
        self.entropy_weight = setting.config.policy.entropy_bonus
        self.now_open = setting.num_blocks
        self.reopened = False

    def at(self, epoch: float) -> None:
        super().at(epoch)
        self.now_open = self.opened(int(epoch))
        bonus = max(self.setting.config.policy.entropy_bonus, REOPENED_ENTROPY if self.reopened else 0.0)
        self.entropy_weight = bonus * max(0.0, 1 - epoch / max(1, self.epochs))

    def reopen(self) -> None:
        """Make the policy explore again: what the loop does about one mask for all images."""
        self.reopened = True

    @property
    def _learns_head(self) -> bool:
        return self.setting.config.policy.learns == "head"

    def decider(self) -> nn.Module:
        """What learns to decide, beside the network."""
        return self.setting.model.policy

    def _probabilities(self, images: Tensor) -> Tensor:
        with self.setting.autocast():
            logits = self.setting.model.policy.logits(images)
        return logits.float().sigmoid()

    def _rewards(self, logits: Tensor, labels: Tensor, masks: Tensor) -> Tensor:
        config = self.setting.config.policy
        return reward(logits.detach(), labels, masks, config.wrong_prediction_penalty, config.reward)

    @torch.no_grad()
    def _evaluated(self, images: Tensor, masks: Tensor) -> Tensor:
        """Logits under ``masks`` with frozen batch-norm statistics: a baseline must not leave a trace."""
        network = self.setting.model.network
        training = network.training
        network.eval()
        with self.setting.autocast():
            logits = network.forward_masked(images, masks)
        network.train(training)
        return logits

    def _policy_loss(self, probabilities: Tensor, masks: Tensor, advantages: Tensor) -> Tensor:
        """REINFORCE (Eqn. 6) over masks (S, N, K) with advantages (S, N), minus the entropy bonus, plus the budget."""
        sampled_from = rollout.bounded(probabilities, self.exploration_bound)
        log_probability = rollout.log_probability(sampled_from, masks, self.now_open)
        return self._regularised(-(advantages * log_probability).mean(), probabilities)

    def _regularised(self, loss: Tensor, probabilities: Tensor) -> Tensor:
        """A policy loss minus the entropy bonus, plus the budget; the same for every estimator."""
        loss = loss - self.entropy_weight * rollout.entropy(probabilities, self.now_open)
        config = self.setting.config.policy
        # While the curriculum holds blocks, the open ones alone cannot meet the budget and would all be dropped.
        if config.target_blocks is None or self.now_open < self.setting.num_blocks:
            return loss
        return loss + config.budget_weight * budget_loss(probabilities, config.target_blocks, self.setting.world)

    def _nested(self, images: Tensor, labels: Tensor, probabilities: Tensor) -> tuple[Tensor, Tensor]:
        """Rewards (N, J) at the cuts and the policy loss of the nested estimator (:mod:`bdexport.train.nested`)."""
        config, setting = self.setting.config.policy, self.setting
        closed = setting.num_blocks - self.now_open
        cuts = nested.cut_points(setting.num_blocks, closed, config.cuts, setting.generator)
        held = torch.cat([torch.ones_like(probabilities[:, :closed]), probabilities[:, closed:]], dim=1)
        rewards = []
        for kept in cuts:
            masks = nested.most_probable(held.detach(), torch.full_like(labels, kept))
            rewards.append(self._rewards(self._evaluated(images, masks), labels, masks))
        stacked = torch.stack(rewards, dim=1)
        loss = -nested.expected_reward(held, stacked, cuts).mean()
        # The bonus is a sum over the open blocks, as the reward is; rollout.entropy is their mean.
        loss = loss - config.softness * self.now_open * rollout.entropy(probabilities, self.now_open)
        return stacked, self._regularised(loss, probabilities)

    def _gates(self, probabilities: Tensor) -> Tensor:
        """Gates (S, N, K) of the Gumbel-sigmoid estimator (:mod:`bdexport.train.gumbel`)."""
        config, setting = self.setting.config.policy, self.setting
        sampled_from = rollout.bounded(probabilities, self.exploration_bound)
        return gumbel.sample_gates(
            sampled_from, self.now_open, config.samples, config.temperature, setting.generator, setting.world
        )

    def _gated(self, images: Tensor, labels: Tensor, probabilities: Tensor, gates: Tensor) -> tuple[Tensor, Tensor]:
        """Rewards (S, N) and the policy loss of the Gumbel-sigmoid estimator; the network learns nothing from it."""
        config, network = self.setting.config.policy, self.setting.model.network
        rewards = []
        with _frozen(network):
            for one in gates:
                with self.setting.autocast():
                    logits = network.forward_gated(images, one)
                rewards.append(reward(logits.float(), labels, one, config.wrong_prediction_penalty, config.reward))
        stacked = torch.stack(rewards)
        return stacked.detach(), self._regularised(-stacked.mean(), probabilities)

    def _sampled(self, probabilities: Tensor) -> Tensor:
        config, setting = self.setting.config.policy, self.setting
        sampled_from = rollout.bounded(probabilities, self.exploration_bound)
        return rollout.sample_masks(sampled_from, self.now_open, config.samples, setting.generator, setting.world)

    def _advantages(self, rewards: Tensor, probabilities: Tensor, images: Tensor, labels: Tensor) -> Tensor:
        """Advantages (S, N) of sampled rewards (S, N)."""
        if self.setting.config.policy.estimator == "leave_one_out":
            return leave_one_out_advantage(rewards)
        greedy = rollout.greedy_masks(probabilities, self.now_open)
        return rewards - self._rewards(self._evaluated(images, greedy), labels, greedy)


@contextmanager
def _frozen(module: nn.Module) -> Iterator[None]:
    """Eval mode without gradients for the parameters, as it was before afterwards; gradients still pass through."""
    training, learning = module.training, [parameter for parameter in module.parameters() if parameter.requires_grad]
    module.eval()
    for parameter in learning:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        module.train(training)
        for parameter in learning:
            parameter.requires_grad_(True)
